//! The registry on real files: atomicity, constraints, tampering, a full disk.
#![allow(clippy::unwrap_used)]

use outrider_registry::{AuditVerdict, Location, MigrationRow, Registry, RegistryError, TokenUse};
use serde_json::json;
use sqlx::Connection as _;
use std::path::Path;
use types::host::{Capacity, HostSpec};
use types::migration::MigrationState;
use types::vm::{VmSpec, VmState};
use types::{Epoch, ErrorCode, HostName, MigrationId, Nonce, VmId};

fn host_spec(name: &str) -> HostSpec {
    HostSpec {
        name: name.parse().unwrap(),
        control_address: "10.0.0.1".parse().unwrap(),
        migration_address: "10.0.1.1".parse().unwrap(),
        macs: vec!["02:00:00:00:00:01".to_owned()],
        capacity: Capacity { memory_bytes: 1 << 32, vcpus: 8, vms: 8 },
        zone: "z1".to_owned(),
    }
}

fn vm_spec(number: u8) -> VmSpec {
    let toml = json!({
        "uuid": VmId::from_bytes([number; 16]), "name": format!("vm-{number}"),
        "vcpus": 1, "memory_bytes": 268_435_456_u64,
    });
    serde_json::from_value(toml).unwrap()
}

fn name(text: &str) -> HostName {
    text.parse().unwrap()
}

fn migration(number: u8, vm: &VmSpec) -> MigrationRow {
    MigrationRow {
        id: MigrationId::from_bytes([number; 16]),
        vm: vm.uuid,
        vm_name: vm.name.clone(),
        source: name("host-a"),
        target: name("host-b"),
        state: MigrationState::Requested,
        open: true,
        suspended: false,
        requested_by: "test".to_owned(),
        requested_at_us: i64::from(number),
        ended_at_us: None,
        intent: Nonce::from_bytes([number; 16]),
        handover: None,
        facts: "{}".to_owned(),
    }
}

/// A registry with two hosts and a VM that runs on host-a.
async fn furnished(path: &Path) -> (Registry, VmSpec) {
    let registry = Registry::open(path).await.unwrap();
    let vm = vm_spec(1);
    let mut tx = registry.begin("furnish", 1).await.unwrap();
    tx.add_host(&host_spec("host-a")).await.unwrap();
    tx.add_host(&host_spec("host-b")).await.unwrap();
    tx.add_vm(&vm).await.unwrap();
    let epoch = tx.place_vm(vm.uuid, &name("host-a")).await.unwrap().unwrap();
    let at = Location { host: name("host-a"), epoch };
    assert!(tx.set_vm_state(vm.uuid, &at, VmState::Running).await.unwrap());
    for n in 0..5 {
        tx.audit("admin", "test.act", "vm-1", json!({ "n": n })).await.unwrap();
    }
    tx.commit().await.unwrap();
    (registry, vm)
}

#[tokio::test]
async fn an_uncommitted_transaction_never_happened_and_a_committed_one_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.db");
    let (registry, vm) = furnished(&path).await;
    {
        let mut tx = registry.begin("dropped", 2).await.unwrap();
        tx.add_vm(&vm_spec(2)).await.unwrap();
        tx.audit("x", "y", "z", json!({})).await.unwrap();
    }
    registry.close().await;
    let registry = Registry::open(&path).await.unwrap();
    let mut tx = registry.read("look").await.unwrap();
    assert_eq!(tx.vms().await.unwrap().len(), 1);
    assert_eq!(tx.vm_named(&vm.name).await.unwrap().unwrap().spec, vm);
    assert!(matches!(tx.verify_audit(None).await.unwrap(), AuditVerdict::Whole { entries: 5, .. }));
}

#[tokio::test]
async fn of_twenty_concurrent_migrations_of_one_vm_one_is_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let (registry, vm) = furnished(&folder.path().join("r.db")).await;
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

#[tokio::test]
async fn locations_move_by_compare_and_swap_and_epochs_only_grow() {
    let folder = tempfile::tempdir().unwrap();
    let (registry, vm) = furnished(&folder.path().join("r.db")).await;
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

#[tokio::test]
async fn nonces_and_join_tokens_are_used_once_and_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.db");
    let (registry, _) = furnished(&path).await;
    let nonce = Nonce::from_bytes([9; 16]);
    let mut tx = registry.begin("use", 10).await.unwrap();
    assert!(tx.use_nonce(nonce, "first").await.unwrap());
    tx.add_join_token(&[1; 32], &name("host-a"), 100).await.unwrap();
    tx.add_join_token(&[2; 32], &name("host-a"), 11).await.unwrap();
    tx.commit().await.unwrap();
    registry.close().await;
    let registry = Registry::open(&path).await.unwrap();
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

/// What an intruder does to the file, and the first entry that must be named.
async fn check_tamper(sql: &'static [&'static str], with_anchor: bool, expect_first_bad: u64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.db");
    let (registry, _) = furnished(&path).await;
    let mut tx = registry.read("anchor").await.unwrap();
    let anchor = tx.audit_head().await.unwrap();
    drop(tx);
    let url = format!("sqlite://{}", path.display());
    let mut intruder = sqlx::AnyConnection::connect(&url).await.unwrap();
    for statement in sql {
        let done = sqlx::query(*statement).execute(&mut intruder).await.unwrap();
        assert!(done.rows_affected() > 0, "{statement} changed nothing");
    }
    let mut tx = registry.read("verify").await.unwrap();
    match tx.verify_audit(with_anchor.then_some(anchor)).await.unwrap() {
        AuditVerdict::Broken { first_bad, .. } => assert_eq!(first_bad, expect_first_bad, "{sql:?}"),
        whole @ AuditVerdict::Whole { .. } => panic!("{sql:?} went unseen: {whole:?}"),
    }
}

#[tokio::test]
async fn any_edit_removal_or_reordering_of_the_audit_log_is_found() {
    check_tamper(&["UPDATE audit SET actor = 'mallory' WHERE sequence = 3"], false, 3).await;
    check_tamper(&["UPDATE audit SET detail = '{\"n\":9}' WHERE sequence = 1"], false, 1).await;
    check_tamper(&["UPDATE audit SET at_us = 7 WHERE sequence = 5"], false, 5).await;
    check_tamper(&["DELETE FROM audit WHERE sequence = 2"], false, 2).await;
    check_tamper(&["DELETE FROM audit WHERE sequence = 5"], false, 5).await;
    check_tamper(&["DELETE FROM audit"], false, 1).await;
    check_tamper(&["DELETE FROM audit", "DELETE FROM audit_head"], true, 1).await;
    let swap: &[&str] = &[
        "UPDATE audit SET sequence = 99 WHERE sequence = 2",
        "UPDATE audit SET sequence = 2 WHERE sequence = 3",
        "UPDATE audit SET sequence = 3 WHERE sequence = 99",
    ];
    check_tamper(swap, false, 2).await;
    // The tail cut off together with the head row: only the anchor outside knows.
    let cut: &[&str] = &[
        "DELETE FROM audit WHERE sequence = 5",
        "UPDATE audit_head SET sequence = 4, hash = (SELECT hash FROM audit WHERE sequence = 4)",
    ];
    check_tamper(cut, true, 5).await;
}

/// Fills a small file system of its own, writes until it is full, makes room, writes again.
#[tokio::test]
async fn a_full_disk_refuses_loses_nothing_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let mount = folder.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(&mount)
        .status()
        .is_ok_and(|s| s.success());
    if !mounted {
        println!("SKIPPED a_full_disk: this user may not mount a tmpfs");
        return;
    }
    let _unmount = Unmount(&mount);
    let (registry, _) = furnished(&mount.join("r.db")).await;
    let ballast = mount.join("ballast");
    let mut size = 1 << 20;
    while size > 256 {
        let mut old = std::fs::read(&ballast).unwrap_or_default();
        old.resize(old.len() + size, 0);
        if std::fs::write(mount.join("next"), &old).is_err() {
            let _ignored = std::fs::remove_file(mount.join("next"));
            // Written in place, so that the last bytes are taken as well.
            use std::io::Write as _;
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&ballast).unwrap();
            while file.write_all(&[0; 4096]).is_ok() {}
            break;
        }
        std::fs::rename(mount.join("next"), &ballast).unwrap();
        size /= 2;
    }
    let mut accepted = 0;
    let error = loop {
        let written = async {
            let mut tx = registry.begin("write", 2).await?;
            tx.audit("x", "fill", "disk", json!({ "n": "x".repeat(2000) })).await?;
            tx.commit().await
        };
        match written.await {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
        assert!(accepted < 2000, "the disk never filled");
    };
    assert_eq!(error.code(), ErrorCode::RegistryUnavailable);
    assert!(registry.probe(3).await.is_err(), "still full");
    let mut tx = registry.read("look").await.unwrap();
    let AuditVerdict::Whole { entries, .. } = tx.verify_audit(None).await.unwrap() else {
        panic!("a full disk broke the chain")
    };
    assert_eq!(entries, 5 + accepted, "what was acknowledged is there, what was refused is not");
    drop(tx);
    std::fs::remove_file(&ballast).unwrap();
    registry.probe(4).await.unwrap();
    let mut tx = registry.begin("write", 5).await.unwrap();
    tx.audit("x", "room", "again", json!({})).await.unwrap();
    tx.commit().await.unwrap();
    registry.close().await;
}

struct Unmount<'a>(&'a Path);
impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount").arg("--lazy").arg(self.0).status();
        assert!(done.is_ok_and(|s| s.success()), "cannot unmount {}", self.0.display());
    }
}
