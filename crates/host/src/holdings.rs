//! Everything that a manager must hear from this host before it may decide again with a registry that was set back: the
//! copies of VMs, the highest epochs, hand-overs that are not done (each with its permit), and the checkpoint.

use crate::daemon::{Daemon, lock};
use crate::migration::attempt::AttemptFile;
use crate::migration::registry::Migrations;
use crate::vms::record::Phase;
use api::fleet::{EpochSeen, HeldVm, Holdings, OpenAttempt, to_manager};
use std::collections::BTreeMap;
use std::sync::Arc;
use types::{Epoch, VmId};

/// A spec has a kilobyte or two, and a message four MiB at most.
const PART_ITEMS: usize = 256;

/// Queues the answer, in parts.
pub fn report(daemon: &Arc<Daemon>, migrations: &Migrations, ask: u64) {
    let (vms, epochs, attempts) = (held(daemon), epochs(daemon), attempts(daemon, migrations));
    let parts = [vms.len(), epochs.len(), attempts.len()].into_iter().max().unwrap_or(0).div_ceil(PART_ITEMS);
    let (mut vms, mut epochs, mut attempts) = (vms.into_iter(), epochs.into_iter(), attempts.into_iter());
    for part in 0..parts.max(1) {
        let holdings = Holdings {
            ask,
            vms: vms.by_ref().take(PART_ITEMS).collect(),
            epochs: epochs.by_ref().take(PART_ITEMS).collect(),
            attempts: attempts.by_ref().take(PART_ITEMS).collect(),
            checkpoint: daemon.checkpoints.token(),
            last: part + 1 >= parts,
        };
        daemon.outbox.push(to_manager::Body::Holdings(holdings));
    }
}

fn held(daemon: &Daemon) -> Vec<HeldVm> {
    let row = |instance: Arc<crate::vms::instance::Instance>| {
        let record = instance.record();
        let state = match record.phase {
            _ if instance.freezer().is_frozen() => "frozen",
            Phase::Incoming { .. } => "incoming",
            Phase::Starting => "starting",
            Phase::Running => "running",
        };
        HeldVm {
            vm: record.spec.uuid.to_string(),
            epoch: record.epoch.0,
            state: state.to_owned(),
            spec_json: serde_json::to_string(&record.spec).unwrap_or_default(),
        }
    };
    daemon.vms.all().into_iter().map(row).collect()
}

/// The journal remembers every attempt in which this host took part.
fn epochs(daemon: &Daemon) -> Vec<EpochSeen> {
    let mut highest: BTreeMap<VmId, Epoch> = BTreeMap::new();
    let store = lock(&daemon.journal);
    for key in store.migrations().iter().filter_map(|id| store.of(*id).first().map(|entry| *entry.key())) {
        let epoch = highest.entry(key.vm).or_insert(key.target_epoch);
        *epoch = (*epoch).max(key.target_epoch).max(key.source_epoch);
    }
    highest.into_iter().map(|(vm, epoch)| EpochSeen { vm: vm.to_string(), epoch: epoch.0 }).collect()
}

fn attempts(daemon: &Daemon, migrations: &Migrations) -> Vec<OpenAttempt> {
    let known = lock(&daemon.journal).migrations();
    let open = known.into_iter().filter(|id| !migrations.is_closed(*id));
    open.filter_map(|id| {
        let side = migrations.side_of(id)?;
        // One whose file is gone shows itself without its permit: the manager then says that it can't be taken up.
        let permit = AttemptFile::load(daemon, id).map(|file| file.token).unwrap_or_default();
        Some(OpenAttempt { migration: id.to_string(), side: side.to_string(), permit })
    })
    .collect()
}
