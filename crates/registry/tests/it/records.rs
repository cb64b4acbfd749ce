//! Atomicity, compare-and-swap, single use: the same on both databases.

use crate::place::{Place, host_spec, migration, name, on_both, vm_spec};
use outrider_registry::{AuditVerdict, EventRow, Location, RegistryError, TokenUse};
use serde_json::json;
use types::vm::VmState;
use types::{Epoch, ErrorCode, Nonce};

on_both!(
    an_uncommitted_transaction_never_happened_and_a_committed_one_survives_a_restart,
    locations_move_by_compare_and_swap_and_epochs_only_grow,
    nonces_and_join_tokens_are_used_once_and_in_time,
    a_statement_that_fails_spoils_its_transaction,
    a_reader_sees_one_picture_and_writes_nothing,
    a_transaction_that_was_given_up_leaves_no_lock,
    names_are_ordered_by_their_bytes,
    text_of_peers_is_kept_whatever_is_in_it,
    the_largest_numbers_and_empty_columns_come_back,
);

async fn an_uncommitted_transaction_never_happened_and_a_committed_one_survives_a_restart(place: Place) {
    let (registry, vm) = place.furnished().await;
    {
        let mut tx = registry.begin("dropped", 2).await.unwrap();
        tx.add_vm(&vm_spec(2)).await.unwrap();
        tx.audit("x", "y", "z", json!({})).await.unwrap();
    }
    registry.close().await;
    let registry = place.open().await;
    let mut tx = registry.read("look").await.unwrap();
    assert_eq!(tx.vms().await.unwrap().len(), 1);
    assert_eq!(tx.vm_named(&vm.name).await.unwrap().unwrap().spec, vm);
    assert!(matches!(tx.verify_audit(None).await.unwrap(), AuditVerdict::Whole { entries: 5, .. }));
}

async fn locations_move_by_compare_and_swap_and_epochs_only_grow(place: Place) {
    let (registry, vm) = place.furnished().await;
    let mut tx = registry.begin("move", 2).await.unwrap();
    let at = tx.vm(vm.uuid).await.unwrap().unwrap().location().unwrap();
    let stale = Location { host: at.host.clone(), epoch: Epoch(at.epoch.0 + 7) };
    assert_eq!(tx.burn_epochs(vm.uuid, &stale).await.unwrap(), None);
    let (source, target) = tx.burn_epochs(vm.uuid, &at).await.unwrap().unwrap();
    assert!(source > at.epoch && target > source);
    // Migrating already: the same pair is not given out twice.
    let held = Location { host: at.host.clone(), epoch: source };
    assert_eq!(tx.burn_epochs(vm.uuid, &held).await.unwrap(), None);
    let to = Location { host: name("host-b"), epoch: target };
    assert!(!tx.relocate_vm(vm.uuid, &at, &to, VmState::Running).await.unwrap(), "old epoch");
    assert!(tx.relocate_vm(vm.uuid, &held, &to, VmState::Running).await.unwrap());
    assert!(!tx.relocate_vm(vm.uuid, &held, &to, VmState::Running).await.unwrap(), "twice");
    let row = tx.vm(vm.uuid).await.unwrap().unwrap();
    assert_eq!(row.location(), Some(to));
    assert!(row.next_epoch > target);
}

async fn nonces_and_join_tokens_are_used_once_and_in_time(place: Place) {
    let (registry, _) = place.furnished().await;
    let nonce = Nonce::from_bytes([9; 16]);
    let mut tx = registry.begin("use", 10).await.unwrap();
    assert!(tx.use_nonce(nonce, "first").await.unwrap());
    tx.add_join_token(&[1; 32], &name("host-a"), 100).await.unwrap();
    tx.add_join_token(&[2; 32], &name("host-a"), 11).await.unwrap();
    tx.commit().await.unwrap();
    registry.close().await;
    let registry = place.open().await;
    let mut tx = registry.begin("again", 50).await.unwrap();
    assert!(!tx.use_nonce(nonce, "second").await.unwrap(), "durable across a restart");
    for (hash, host, expect) in [
        ([3; 32], "host-a", TokenUse::Unknown),
        ([1; 32], "host-b", TokenUse::Unknown),
        ([2; 32], "host-a", TokenUse::Expired),
        ([1; 32], "host-a", TokenUse::Used),
        ([1; 32], "host-a", TokenUse::UsedBefore),
    ] {
        assert_eq!(tx.use_join_token(&hash, &name(host)).await.unwrap(), expect, "{hash:?} {host}");
    }
}

async fn a_statement_that_fails_spoils_its_transaction(place: Place) {
    let (registry, _) = place.furnished().await;
    let mut tx = registry.begin("fail", 2).await.unwrap();
    tx.add_vm(&vm_spec(2)).await.unwrap();
    assert!(matches!(tx.add_host(&host_spec("host-a")).await, Err(RegistryError::Exists { .. })));
    assert!(matches!(tx.vms().await, Err(RegistryError::Spoilt { .. })));
    let error = tx.commit().await.unwrap_err();
    assert_eq!((error.code(), error.to_string().contains("fail")), (ErrorCode::Internal, true));
    assert_eq!(registry.read("look").await.unwrap().vms().await.unwrap().len(), 1);
    // A reference to what is not there is refused as well, and is no "exists".
    let mut tx = registry.begin("dangle", 3).await.unwrap();
    let dangling = tx.add_migration(&migration(1, &vm_spec(9))).await.unwrap_err();
    assert!(matches!(dangling, RegistryError::Unavailable { .. }), "{dangling:?}");
    drop(tx);
    registry.probe(4).await.unwrap();
}

async fn a_reader_sees_one_picture_and_writes_nothing(place: Place) {
    let (registry, vm) = place.furnished().await;
    let mut reader = registry.read("read").await.unwrap();
    assert_eq!(reader.vms().await.unwrap().len(), 1);
    let mut tx = registry.begin("meanwhile", 2).await.unwrap();
    tx.add_vm(&vm_spec(2)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(reader.vms().await.unwrap().len(), 1, "the picture changed");
    assert_eq!(reader.vm(vm.uuid).await.unwrap().unwrap().spec, vm);
    drop(reader);
    assert_eq!(registry.read("read").await.unwrap().vms().await.unwrap().len(), 2);
}

/// Futures are dropped at every point of a beginning and of a statement; whoever comes next must not wait for
/// them.
async fn a_transaction_that_was_given_up_leaves_no_lock(place: Place) {
    let (registry, _) = place.furnished().await;
    for polls in 0..60 {
        let writes = async {
            let mut tx = registry.begin("given up", 2).await.unwrap();
            tx.audit("x", "given up", "y", json!({})).await.unwrap();
            std::future::pending::<()>().await;
        };
        let mut writes = Box::pin(writes);
        for _ in 0..polls {
            if futures::poll!(writes.as_mut()).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(writes);
    }
    let since = std::time::Instant::now();
    let mut tx = registry.begin("next", 3).await.unwrap();
    tx.audit("x", "after", "y", json!({})).await.unwrap();
    tx.commit().await.unwrap();
    assert!(since.elapsed().as_secs() < 2, "it waited {:?} for one that was given up", since.elapsed());
    let verdict = registry.read("verify").await.unwrap().verify_audit(None).await.unwrap();
    assert!(matches!(verdict, AuditVerdict::Whole { entries: 6, .. }), "{verdict:?}");
}

async fn names_are_ordered_by_their_bytes(place: Place) {
    let registry = place.open().await;
    let mut tx = registry.begin("hosts", 1).await.unwrap();
    for host in ["host-b", "host-10", "hosta", "host-2", "host-a"] {
        tx.add_host(&host_spec(host)).await.unwrap();
    }
    let names: Vec<String> = tx.hosts().await.unwrap().iter().map(|h| h.name().to_string()).collect();
    assert_eq!(names, ["host-10", "host-2", "host-a", "host-b", "hosta"]);
}

async fn text_of_peers_is_kept_whatever_is_in_it(place: Place) {
    let (registry, vm) = place.furnished().await;
    let row = migration(1, &vm);
    let odd = "a\0b'; DROP TABLE audit; -- \u{1f980} \\ \"";
    let kept = odd.replace('\0', "\u{fffd}");
    let mut tx = registry.begin("odd", 2).await.unwrap();
    tx.add_migration(&row).await.unwrap();
    let event = EventRow {
        sequence: 0,
        at_us: 2,
        host: odd.to_owned(),
        kind: odd.to_owned(),
        detail: json!({ odd: odd, "big": u64::MAX }),
    };
    assert!(tx.add_event(row.id, &event, 1).await.unwrap());
    assert!(!tx.add_event(row.id, &event, 1).await.unwrap(), "past its limit");
    tx.host_seen(&name("host-a"), odd, &[]).await.unwrap();
    tx.audit(odd, odd, odd, json!({ "odd": odd })).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = registry.read("look").await.unwrap();
    let events = tx.events(row.id).await.unwrap();
    assert_eq!((&events[0].host, &events[0].kind), (&kept, &kept));
    assert_eq!(events[0].detail, event.detail);
    assert_eq!(tx.host(&name("host-a")).await.unwrap().unwrap().version, Some(kept.clone()));
    let entry = tx.audit_entries(5, 1).await.unwrap().remove(0);
    assert_eq!((entry.actor, entry.detail), (kept, json!({ "odd": odd })));
    assert!(matches!(tx.verify_audit(None).await.unwrap(), AuditVerdict::Whole { entries: 6, .. }));
}

async fn the_largest_numbers_and_empty_columns_come_back(place: Place) {
    let (registry, vm) = place.furnished().await;
    let mut row = migration(1, &vm);
    row.requested_at_us = i64::MAX;
    let mut tx = registry.begin("large", i64::MAX).await.unwrap();
    tx.add_migration(&row).await.unwrap();
    let too_large = tx.reserve(row.id, &row.target, vm.uuid, u64::MAX, 1).await.unwrap_err();
    assert!(matches!(too_large, RegistryError::Malformed { what: "memory_bytes", .. }), "{too_large:?}");
    tx.reserve(row.id, &row.target, vm.uuid, i64::MAX as u64, u32::MAX).await.unwrap();
    let promised = tx.promised_on(&row.target).await.unwrap();
    assert_eq!(
        (promised.memory_bytes, promised.vcpus, promised.vms),
        (i64::MAX as u64, u64::from(u32::MAX), 1)
    );
    let token = vec![0, 1, 255, 0];
    assert!(tx.add_statement(row.id, "vote", &row.source, types::Digest([7; 32]), &token).await.unwrap());
    assert!(!tx.add_statement(row.id, "vote", &row.source, types::Digest([7; 32]), &token).await.unwrap());
    tx.commit().await.unwrap();
    let mut tx = registry.read("look").await.unwrap();
    assert_eq!(tx.migration(row.id).await.unwrap().unwrap(), row);
    assert_eq!(tx.statements(row.id).await.unwrap()[0].token, token);
    assert_eq!(tx.count_migrations().await.unwrap(), [(row.state, 1)]);
    assert_eq!(tx.count_reservations().await.unwrap(), 1);
    assert_eq!(tx.permit(row.id).await.unwrap(), None);
}
