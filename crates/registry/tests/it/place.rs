//! A database of a test's own, of either kind, and what is put into it.

use crate::{postgres, skip};
use outrider_registry::{AuditVerdict, Database, Location, MigrationRow, Registry, RegistryError};
use serde_json::json;
use sqlx::{AnyConnection, Connection as _};
use tempfile::TempDir;
use types::host::{Capacity, HostSpec};
use types::migration::MigrationState;
use types::vm::{VmSpec, VmState};
use types::{HostName, MigrationId, Nonce, VmId};

/// Where a test keeps its registry.
pub(crate) struct Place {
    url: String,
    _folder: Option<TempDir>,
}

impl Place {
    pub(crate) fn sqlite() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("r.db").display());
        Some(Self { url, _folder: Some(folder) })
    }

    /// A fresh database on the server that this process's tests share; `None` (counted) where there is no
    /// server.
    pub(crate) fn postgres() -> Option<Self> {
        match postgres::shared() {
            Ok(cluster) => Some(Self::at(cluster.database())),
            Err(why) => {
                skip::skip(&why);
                None
            }
        }
    }

    /// A fresh one of the same kind.
    pub(crate) fn another(&self) -> Self {
        let other = if self._folder.is_some() { Self::sqlite() } else { Self::postgres() };
        other.unwrap()
    }

    pub(crate) fn at(url: String) -> Self {
        Self { url, _folder: None }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn database(&self) -> Database {
        self.url.parse().unwrap()
    }

    pub(crate) async fn open(&self) -> Registry {
        Registry::open(&self.database()).await.unwrap()
    }

    /// A registry with two hosts, a VM that runs on host-a, and five audit entries.
    pub(crate) async fn furnished(&self) -> (Registry, VmSpec) {
        let registry = self.open().await;
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

    /// A connection of somebody who does not go through the registry.
    pub(crate) async fn intruder(&self) -> AnyConnection {
        sqlx::any::install_default_drivers();
        AnyConnection::connect(&self.url).await.unwrap()
    }
}

pub(crate) fn host_spec(name: &str) -> HostSpec {
    HostSpec {
        name: name.parse().unwrap(),
        control_address: "10.0.0.1".parse().unwrap(),
        migration_address: "10.0.1.1".parse().unwrap(),
        macs: vec!["02:00:00:00:00:01".to_owned()],
        capacity: Capacity { memory_bytes: 1 << 32, vcpus: 8, vms: 8 },
        zone: "z1".to_owned(),
        tpm: None,
    }
}

pub(crate) fn vm_spec(number: u8) -> VmSpec {
    let toml = json!({
        "uuid": VmId::from_bytes([number; 16]), "name": format!("vm-{number}"),
        "vcpus": 1, "memory_bytes": 268_435_456_u64,
    });
    serde_json::from_value(toml).unwrap()
}

pub(crate) fn name(text: &str) -> HostName {
    text.parse().unwrap()
}

pub(crate) fn migration(number: u8, vm: &VmSpec) -> MigrationRow {
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

/// Whether the log is whole, and how long.
pub(crate) async fn whole(registry: &Registry) -> u64 {
    match registry.read("verify").await.unwrap().verify_audit(None).await.unwrap() {
        AuditVerdict::Whole { entries, .. } => entries,
        broken @ AuditVerdict::Broken { .. } => panic!("{broken:?}"),
    }
}

/// Appends one entry to the audit log, in a transaction of its own.
pub(crate) async fn append(registry: &Registry, subject: &str) -> Result<(), RegistryError> {
    let mut tx = registry.begin("append", 2).await?;
    tx.audit("x", "append", subject, json!({})).await?;
    tx.commit().await
}

/// How many audit entries have a subject.
pub(crate) async fn count(registry: &Registry, subject: &str) -> usize {
    let entries = registry.read("count").await.unwrap().audit_entries(0, 100_000).await.unwrap();
    entries.iter().filter(|e| e.subject == subject).count()
}

/// Makes two tests of each function that takes a [`Place`]: one for each kind of database.
macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test]
            async fn $test() {
                super::$test(crate::place::Place::sqlite().unwrap()).await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test]
            async fn $test() {
                let Some(place) = crate::place::Place::postgres() else { return };
                super::$test(place).await;
            })*
        }
    };
}
pub(crate) use on_both;
