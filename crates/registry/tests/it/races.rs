//! Many at once, through several registries as several managers would: exactly one gets what there is one of.

use crate::place::{Place, append, migration, name, on_both, vm_spec, whole};
use outrider_registry::{Acquired, Registry, RegistryError, Tx};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use types::migration::MigrationState;
use types::permit::{HostPart, PermitClaims, StreamFeatures};
use types::vm::VmSpec;
use types::{Digest, Epoch, HandoverKey, MigrationId, Nonce};

on_both!(
    of_twenty_concurrent_migrations_of_one_vm_one_is_let_in,
    of_a_hundred_redemptions_of_one_permit_one_counts,
    of_a_hundred_reservations_the_last_room_is_given_to_one,
    of_a_hundred_managers_one_gets_the_lease,
    two_managers_append_a_thousand_entries_to_one_chain,
);

/// So many registries share the tries.
const MANAGERS: usize = 4;
const TRIES: usize = 100;

async fn of_twenty_concurrent_migrations_of_one_vm_one_is_let_in(place: Place) {
    let (registry, vm) = place.furnished().await;
    let tries = (0..20_u8).map(|n| {
        let (registry, row) = (registry.clone(), migration(n, &vm));
        tokio::spawn(async move {
            let mut tx = registry.begin("race", 2).await.unwrap();
            match tx.add_migration(&row).await {
                Ok(()) => tx.commit().await.map(|()| true).unwrap(),
                Err(RegistryError::Exists { .. }) => false,
                Err(other) => panic!("{other:?}"),
            }
        })
    });
    let won = futures::future::join_all(tries).await.into_iter().filter(|r| *r.as_ref().unwrap()).count();
    assert_eq!(won, 1);
    // A closed one is out of the way.
    let mut tx = registry.begin("close", 3).await.unwrap();
    let mut row = tx.open_migration_of(vm.uuid).await.unwrap().unwrap();
    (row.open, row.state) = (false, MigrationState::Failed);
    tx.save_migration(&row).await.unwrap();
    tx.add_migration(&migration(30, &vm)).await.unwrap();
    tx.commit().await.unwrap();
}

/// What one of many tries to do in a transaction; whether it got it.
type Try = Pin<Box<dyn Future<Output = (Tx, bool)> + Send>>;

/// Runs [`TRIES`] transactions at once, over several registries; how many got what they wanted.
async fn contend(place: &Place, attempt: impl Fn(usize, Tx) -> Try + Send + Sync + 'static) -> usize {
    let attempt = Arc::new(attempt);
    let registries: Vec<Registry> = futures::future::join_all((0..MANAGERS).map(|_| place.open())).await;
    let tries = (0..TRIES).map(|n| {
        let (registry, attempt) = (registries[n % MANAGERS].clone(), Arc::clone(&attempt));
        tokio::spawn(async move {
            let tx = registry.begin("contend", 2).await.unwrap();
            let (tx, won) = attempt(n, tx).await;
            tx.commit().await.unwrap();
            won
        })
    });
    let won = futures::future::join_all(tries).await;
    won.into_iter().filter(|r| *r.as_ref().unwrap()).count()
}

fn claims(vm: &VmSpec, id: MigrationId) -> PermitClaims {
    let part =
        |host| HostPart { host: name(host), agent_spki: vec![1; 44], daemon_key: vec![2; 32], quote: None };
    PermitClaims {
        version: 1,
        key: HandoverKey { migration: id, vm: vm.uuid, source_epoch: Epoch(2), target_epoch: Epoch(3) },
        spec_digest: vm.digest(),
        source: part("host-a"),
        target: part("host-b"),
        target_journal: Nonce::from_bytes([3; 16]),
        nonce: Nonce::from_bytes([4; 16]),
        issued_at_unix_s: 1,
        not_after_unix_s: 2,
        run_deadline_unix_s: 3,
        byte_budget: 4,
        duration_budget_ms: 5,
        downtime_budget_ms: 6,
        features: StreamFeatures::default(),
        inspection_profile: "strict".to_owned(),
        compatibility: "qemu".to_owned(),
    }
}

async fn of_a_hundred_redemptions_of_one_permit_one_counts(place: Place) {
    let (registry, vm) = place.furnished().await;
    let row = migration(1, &vm);
    let claims = claims(&vm, row.id);
    let mut tx = registry.begin("permit", 2).await.unwrap();
    tx.add_migration(&row).await.unwrap();
    tx.add_permit(&claims).await.unwrap();
    tx.permit_signed(row.id, Digest([5; 32]), b"token").await.unwrap();
    tx.commit().await.unwrap();
    let id = row.id;
    let consumed = contend(&place, move |_, mut tx| {
        Box::pin(async move {
            let won = tx.permit_consumed(id).await.unwrap();
            (tx, won)
        })
    });
    assert_eq!(consumed.await, 1, "permits consumed");
    let nonces = contend(&place, move |n, mut tx| {
        Box::pin(async move {
            let won = tx.use_nonce(Nonce::from_bytes([9; 16]), &n.to_string()).await.unwrap();
            (tx, won)
        })
    });
    assert_eq!(nonces.await, 1, "nonces used");
    let burned = contend(&place, move |_, mut tx| {
        let vm = vm.uuid;
        Box::pin(async move {
            let at = tx.vm(vm).await.unwrap().unwrap().location().unwrap();
            let won = tx.burn_epochs(vm, &at).await.unwrap().is_some();
            (tx, won)
        })
    });
    assert_eq!(burned.await, 1, "epoch pairs burned");
    let held = registry.read("look").await.unwrap().permit(id).await.unwrap().unwrap();
    assert_eq!((held.claims, held.token.as_deref()), (claims, Some(b"token".as_slice())));
    assert!(held.consumed_at_us.is_some());
}

/// Each looks at what is promised, and takes the room if there is some: two that looked at once must not
/// both.
async fn of_a_hundred_reservations_the_last_room_is_given_to_one(place: Place) {
    let (registry, _) = place.furnished().await;
    let numbers = || (10..).take(TRIES).map(|n| u8::try_from(n).unwrap());
    let mut tx = registry.begin("vms", 2).await.unwrap();
    for n in numbers() {
        tx.add_vm(&vm_spec(n)).await.unwrap();
        tx.add_migration(&migration(n, &vm_spec(n))).await.unwrap();
    }
    tx.commit().await.unwrap();
    let rows: Vec<_> = numbers().map(|n| migration(n, &vm_spec(n))).collect();
    let reserved = contend(&place, move |n, mut tx| {
        let row = rows[n].clone();
        Box::pin(async move {
            let room = tx.promised_on(&row.target).await.unwrap().vms == 0;
            if room {
                tx.reserve(row.id, &row.target, row.vm, 1 << 28, 1).await.unwrap();
            }
            (tx, room)
        })
    });
    assert_eq!(reserved.await, 1);
    assert_eq!(registry.read("look").await.unwrap().count_reservations().await.unwrap(), 1);
}

async fn of_a_hundred_managers_one_gets_the_lease(place: Place) {
    let (registry, vm) = place.furnished().await;
    let row = migration(1, &vm);
    let mut tx = registry.begin("migration", 2).await.unwrap();
    tx.add_migration(&row).await.unwrap();
    tx.commit().await.unwrap();
    let won = contend(&place, move |n, mut tx| {
        Box::pin(async move {
            let manager = format!("m{n}").parse().unwrap();
            let holder = tx.manager_started(&manager, "h:1", "1").await.unwrap();
            let held = tx.lease_acquire(row.id, &holder, 60_000_000).await.unwrap();
            (tx, matches!(held, Acquired::Held(_)))
        })
    });
    assert_eq!(won.await, 1);
    let mut tx = registry.read("look").await.unwrap();
    let managers = tx.managers().await.unwrap();
    let terms: std::collections::BTreeSet<u64> = managers.iter().map(|m| m.holder.term).collect();
    assert_eq!((managers.len(), terms.len(), tx.leases().await.unwrap().len()), (TRIES, TRIES, 1));
}

async fn two_managers_append_a_thousand_entries_to_one_chain(place: Place) {
    let (first, second) = (place.open().await, place.open().await);
    let write = |registry: Registry, by: &'static str| async move {
        for _ in 0..500 {
            append(&registry, by).await.unwrap();
        }
    };
    let both = tokio::join!(
        tokio::spawn(write(first.clone(), "first")),
        tokio::spawn(write(second.clone(), "second"))
    );
    both.0.unwrap();
    both.1.unwrap();
    assert_eq!((whole(&first).await, whole(&second).await), (1_000, 1_000));
    assert_eq!(crate::place::count(&first, "second").await, 500);
}

/// On PostgreSQL only: of an SQLite file's managers, the second one does not get past the lock of its state
/// folder.
#[tokio::test]
async fn managers_that_start_together_make_one_schema() {
    let Some(place) = Place::postgres() else { return };
    let opened = futures::future::join_all((0..MANAGERS).map(|n| {
        let database = place.database();
        async move {
            let registry = Registry::open(&database).await.unwrap();
            append(&registry, &n.to_string()).await.unwrap();
            registry
        }
    }))
    .await;
    assert_eq!(whole(&opened[0]).await, MANAGERS as u64);
}
