//! Managers and leases: who works on what, and who took over.

use crate::place::{Place, migration, on_both, vm_spec};
use outrider_registry::{Acquired, Holder, Lease, MAX_LEASE_US, Registry, Tx};
use std::time::{Duration, Instant, SystemTime};
use types::{MigrationId, Name};

on_both!(
    a_lease_is_kept_by_its_holder_and_refused_to_others,
    a_lease_whose_time_is_over_goes_to_whoever_asks_first,
    a_restarted_manager_takes_its_own_leases_back_at_once,
    leases_are_of_open_migrations_and_of_known_managers,
    a_lease_from_a_clock_that_jumped_back_does_not_last,
    terms_only_grow,
    managers_say_that_they_are_there,
);

const LONG_US: i64 = 30_000_000;
const SHORT_US: i64 = 300_000;

/// SQLite's leases go by the caller's clock, PostgreSQL's by the server's: a real one is right for both.
fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_micros()).unwrap()
}

fn manager(name: &str) -> Name {
    name.parse().unwrap()
}

async fn begin(registry: &Registry) -> Tx {
    registry.begin("managers", now_us()).await.unwrap()
}

async fn start(registry: &Registry, name: &str) -> Holder {
    let mut tx = begin(registry).await;
    let holder = tx.manager_started(&manager(name), "10.0.0.9:7444", "0.1").await.unwrap();
    tx.commit().await.unwrap();
    holder
}

async fn acquire(registry: &Registry, id: MigrationId, holder: &Holder, us: i64) -> Acquired {
    let mut tx = begin(registry).await;
    let acquired = tx.lease_acquire(id, holder, us).await.unwrap();
    tx.commit().await.unwrap();
    acquired
}

async fn held(registry: &Registry, id: MigrationId, holder: &Holder, us: i64) -> Lease {
    match acquire(registry, id, holder, us).await {
        Acquired::Held(lease) => lease,
        other => panic!("{holder:?}: {other:?}"),
    }
}

/// A registry with open migrations 1 and 2, of two VMs.
async fn with_migrations(place: &Place) -> (Registry, MigrationId, MigrationId) {
    let (registry, vm) = place.furnished().await;
    let (first, second) = (migration(1, &vm), migration(2, &vm_spec(2)));
    let mut tx = begin(&registry).await;
    tx.add_vm(&vm_spec(2)).await.unwrap();
    tx.add_migration(&first).await.unwrap();
    tx.add_migration(&second).await.unwrap();
    tx.commit().await.unwrap();
    (registry, first.id, second.id)
}

async fn a_lease_is_kept_by_its_holder_and_refused_to_others(place: Place) {
    let (registry, id, other) = with_migrations(&place).await;
    let (a, b) = (start(&registry, "a").await, start(&registry, "b").await);
    let lease = held(&registry, id, &a, LONG_US).await;
    assert_eq!(acquire(&registry, id, &b, LONG_US).await, Acquired::Elsewhere(lease.clone()));
    let again = held(&registry, id, &a, LONG_US).await;
    assert_eq!((again.term, &again.holder), (lease.term, &a), "the same tenure goes on");
    assert!(again.expires_at_us >= lease.expires_at_us);
    let of_b = held(&registry, other, &b, LONG_US).await;
    let mut tx = begin(&registry).await;
    assert!(tx.lease_holds(&again).await.unwrap() && tx.lease_holds(&of_b).await.unwrap());
    let forged = Lease { holder: b.clone(), ..again.clone() };
    assert!(!tx.lease_holds(&forged).await.unwrap());
    assert_eq!(tx.leases_renew(&a, LONG_US).await.unwrap(), 1);
    assert_eq!(tx.leases().await.unwrap().len(), 2);
    assert!(tx.lease_release(&again).await.unwrap());
    assert!(!tx.lease_release(&again).await.unwrap(), "twice");
    assert!(!tx.lease_holds(&again).await.unwrap());
    tx.commit().await.unwrap();
    let taken = held(&registry, id, &b, LONG_US).await;
    assert!(taken.term > again.term);
}

async fn a_lease_whose_time_is_over_goes_to_whoever_asks_first(place: Place) {
    let (registry, id, _) = with_migrations(&place).await;
    let (a, b) = (start(&registry, "a").await, start(&registry, "b").await);
    let lease = held(&registry, id, &a, SHORT_US).await;
    let since = Instant::now();
    let taken = loop {
        match acquire(&registry, id, &b, LONG_US).await {
            Acquired::Held(lease) => break lease,
            Acquired::Elsewhere(seen) => assert_eq!(seen.term, lease.term),
            other => panic!("{other:?}"),
        }
        assert!(since.elapsed() < Duration::from_secs(20), "the lease never ended");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(since.elapsed() >= Duration::from_millis(200), "taken over in {:?}", since.elapsed());
    assert!(taken.term > lease.term);
    // The old holder comes back: its tenure is over, whatever it thinks, and what it holds is not prolonged.
    let mut tx = begin(&registry).await;
    assert!(!tx.lease_holds(&lease).await.unwrap());
    assert!(!tx.lease_release(&lease).await.unwrap());
    assert_eq!(tx.leases_renew(&a, LONG_US).await.unwrap(), 0);
    assert!(tx.lease_holds(&taken).await.unwrap());
    tx.commit().await.unwrap();
    assert_eq!(acquire(&registry, id, &a, LONG_US).await, Acquired::Elsewhere(taken));
}

async fn a_restarted_manager_takes_its_own_leases_back_at_once(place: Place) {
    let (registry, id, other) = with_migrations(&place).await;
    let before = start(&registry, "a").await;
    let lease = held(&registry, id, &before, LONG_US).await;
    let after = start(&registry, "a").await;
    assert!(after.term > before.term);
    // The process before it, if it still runs, is told.
    assert_eq!(acquire(&registry, id, &before, LONG_US).await, Acquired::Superseded);
    assert_eq!(acquire(&registry, other, &before, LONG_US).await, Acquired::Superseded);
    let mut tx = begin(&registry).await;
    assert!(!tx.lease_holds(&lease).await.unwrap(), "of a process that is superseded");
    assert_eq!(tx.leases_renew(&before, LONG_US).await.unwrap(), 0);
    assert!(!tx.manager_seen(&before).await.unwrap());
    tx.commit().await.unwrap();
    let taken = held(&registry, id, &after, LONG_US).await;
    assert!(taken.term > lease.term && taken.holder == after);
}

async fn leases_are_of_open_migrations_and_of_known_managers(place: Place) {
    let (registry, id, _) = with_migrations(&place).await;
    let a = start(&registry, "a").await;
    let unknown = MigrationId::from_bytes([99; 16]);
    assert_eq!(acquire(&registry, unknown, &a, LONG_US).await, Acquired::NotOpen);
    let nobody = Holder { manager: manager("nobody"), term: 1 };
    assert_eq!(acquire(&registry, id, &nobody, LONG_US).await, Acquired::Superseded);
    let lease = held(&registry, id, &a, LONG_US).await;
    let mut tx = begin(&registry).await;
    assert_eq!(tx.sweep_leases().await.unwrap(), 0);
    let mut row = tx.migration(id).await.unwrap().unwrap();
    row.open = false;
    tx.save_migration(&row).await.unwrap();
    assert_eq!(tx.lease_acquire(id, &a, LONG_US).await.unwrap(), Acquired::NotOpen);
    assert_eq!(tx.lease(id).await.unwrap().map(|l| l.term), Some(lease.term));
    assert_eq!(tx.sweep_leases().await.unwrap(), 1);
    assert_eq!(tx.lease(id).await.unwrap(), None);
}

async fn a_lease_from_a_clock_that_jumped_back_does_not_last(place: Place) {
    let (registry, id, _) = with_migrations(&place).await;
    let (a, b) = (start(&registry, "a").await, start(&registry, "b").await);
    let lease = held(&registry, id, &a, i64::MAX).await;
    assert!(lease.expires_at_us <= now_us() + MAX_LEASE_US, "no lease is longer than the longest");
    let mut intruder = place.intruder().await;
    let ahead = sqlx::query("UPDATE leases SET expires_at_us = $1").bind(now_us() + 3_600_000_000);
    ahead.execute(&mut intruder).await.unwrap();
    assert!(held(&registry, id, &b, LONG_US).await.term > lease.term);
}

async fn terms_only_grow(place: Place) {
    let (registry, id, other) = with_migrations(&place).await;
    let (mut last, mut seen) = (0, Vec::new());
    for round in 0..6 {
        let holder = start(&registry, if round % 2 == 0 { "a" } else { "b" }).await;
        seen.push(holder.term);
        for id in [id, other] {
            if let Acquired::Held(lease) = acquire(&registry, id, &holder, 0).await {
                seen.push(lease.term);
            }
        }
        {
            // A number that was drawn and given up may come again: nobody has seen it.
            let mut tx = begin(&registry).await;
            tx.manager_started(&manager("c"), "", "").await.unwrap();
        }
    }
    assert_eq!(seen.len(), 18);
    for term in seen {
        assert!(term > last, "{term} after {last}");
        last = term;
    }
}

async fn managers_say_that_they_are_there(place: Place) {
    let registry = place.open().await;
    let (a, b) = (start(&registry, "a").await, start(&registry, "b").await);
    let mut tx = begin(&registry).await;
    let first = tx.managers().await.unwrap();
    assert_eq!(first.iter().map(|m| m.holder.clone()).collect::<Vec<_>>(), [a.clone(), b]);
    assert_eq!((first[0].address.as_str(), first[0].version.as_str()), ("10.0.0.9:7444", "0.1"));
    assert!(first[0].silent_us < 60_000_000, "{:?}", first[0]);
    drop(tx);
    let mut tx = begin(&registry).await;
    assert!(tx.manager_seen(&a).await.unwrap());
    let second = tx.managers().await.unwrap();
    assert!(second[0].seen_at_us > first[0].seen_at_us, "{second:?}");
    assert_eq!(second[0].started_at_us, first[0].started_at_us);
    tx.commit().await.unwrap();
}
