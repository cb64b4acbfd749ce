//! How long decisions take at a given rate: each is one transaction like that of a grant (reads, reservation,
//! migration, permit's nonce, audit entry, commit). Prints percentiles, in milliseconds, of the time from
//! when a decision was due until it was durable.
//!
//! `decision_speed DATABASE [RATE_PER_S] [SECONDS] [MANAGERS]`: the database is filled with test rows.
#![allow(clippy::unwrap_used)]

use outrider_registry::{MigrationRow, Registry, RegistryError};
use serde_json::json;
use std::time::{Duration, Instant};
use types::host::{Capacity, HostSpec};
use types::migration::MigrationState;
use types::vm::VmSpec;
use types::{HostName, MigrationId, Nonce, VmId};

fn id(number: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn vm(number: u64) -> VmSpec {
    let toml = json!({
        "uuid": VmId::from_bytes(id(number)), "name": format!("vm-{number}"), "vcpus": 1, "memory_bytes": 1 << 28,
    });
    serde_json::from_value(toml).unwrap()
}

fn host(name: &HostName) -> HostSpec {
    HostSpec {
        name: name.clone(),
        control_address: "10.0.0.1".parse().unwrap(),
        migration_address: "10.0.1.1".parse().unwrap(),
        macs: Vec::new(),
        capacity: Capacity { memory_bytes: 1 << 40, vcpus: 8_000, vms: 8_000 },
        zone: "z".to_owned(),
        tpm: None,
    }
}

async fn decide(registry: &Registry, number: u64) -> Result<(), RegistryError> {
    let (vm, source, target): (VmSpec, HostName, HostName) =
        (vm(number), "host-a".parse().unwrap(), format!("host-{}", number % 64).parse().unwrap());
    let row = MigrationRow {
        id: MigrationId::from_bytes(id(number)),
        vm: vm.uuid,
        vm_name: vm.name.clone(),
        source,
        target,
        state: MigrationState::Setup,
        open: true,
        suspended: false,
        requested_by: "bench".to_owned(),
        requested_at_us: 1,
        ended_at_us: None,
        intent: Nonce::from_bytes(id(number)),
        handover: None,
        facts: "{}".to_owned(),
    };
    let mut tx = registry.begin("decide", 1).await?;
    tx.use_nonce(row.intent, "bench").await?;
    tx.vm(row.vm).await?;
    tx.host(&row.source).await?;
    tx.host(&row.target).await?;
    tx.promised_on(&row.target).await?;
    tx.add_migration(&row).await?;
    tx.reserve(row.id, &row.target, row.vm, vm.memory_bytes, vm.vcpus).await?;
    tx.audit("manager/bench", "permit.issue", vm.name.as_str(), json!({ "migration": row.id })).await?;
    tx.commit().await
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| arguments.get(at).map_or(default, |t| t.parse().unwrap());
    let database = arguments.first().expect("the first argument names the database").parse().unwrap();
    let (rate, seconds, managers) = (number(1, 200), number(2, 10), number(3, 1));
    let mut registries = Vec::new();
    for _ in 0..managers {
        registries.push(Registry::open(&database).await.unwrap());
    }
    let total = rate * seconds;
    let mut tx = registries[0].begin("fill", 1).await.unwrap();
    for n in (0..64).map(|n| format!("host-{n}")).chain(["host-a".to_owned()]) {
        tx.add_host(&host(&n.parse().unwrap())).await.unwrap();
    }
    for n in 0..total {
        tx.add_vm(&vm(n)).await.unwrap();
    }
    tx.commit().await.unwrap();

    let began = Instant::now();
    let decisions = (0..total).map(|n| {
        let registry = registries[usize::try_from(n % managers).unwrap()].clone();
        tokio::spawn(async move {
            let due = began + Duration::from_micros(n * 1_000_000 / rate);
            tokio::time::sleep_until(due.into()).await;
            decide(&registry, n).await.unwrap();
            due.elapsed().as_secs_f64() * 1_000.0
        })
    });
    let mut took: Vec<f64> = Vec::new();
    for decision in futures::future::join_all(decisions).await {
        took.push(decision.unwrap());
    }
    took.sort_by(f64::total_cmp);
    let at = |permille: usize| took[(took.len() - 1) * permille / 1_000];
    println!(
        "{total} decisions at {rate}/s by {managers} manager(s), ms: p50 {:.1}, p95 {:.1}, p99 {:.1}, most {:.1}",
        at(500),
        at(950),
        at(990),
        at(1_000)
    );
}
