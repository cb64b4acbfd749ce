//! What the daemon remembers of a QEMU, written before QEMU is started, so that a restarted daemon finds it.

use crate::error::HostError;
use crate::folders::write_durably;
use crate::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use types::inventory::Inventory;
use types::vm::VmSpec;
use types::{Epoch, ErrorCode, MigrationId, Problem, VmId};

/// Name of the folder, cgroup and record of a VM under an epoch. The whole id is in it: VMs whose ids begin alike
/// must not share a QEMU's place. At most [`SLOT_BYTES_MAX`] bytes.
#[must_use]
pub fn slot(vm: VmId, epoch: Epoch) -> String {
    format!("{}{:x}", slot_prefix(vm), epoch.0)
}

/// How the slots of a VM begin.
pub(super) fn slot_prefix(vm: VmId) -> String {
    format!("{}-", hex::encode(vm.as_bytes()))
}

/// Both ids in hexadecimal, and what separates them.
pub const SLOT_BYTES_MAX: usize = 32 + 1 + 16;

/// One QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Name of its folder, its cgroup and this record.
    pub slot: String,
    /// The VM.
    pub spec: VmSpec,
    /// Epoch under which this host holds it.
    pub epoch: Epoch,
    /// Exact machine type.
    pub machine: String,
    /// How far it is.
    pub phase: Phase,
    /// The process, once started.
    pub process: Option<ProcessId>,
    /// Its taps.
    pub taps: Vec<String>,
    /// Its inventory, once learned or given.
    pub inventory: Option<Inventory>,
}

/// How far a QEMU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Phase {
    /// Being started; a daemon that finds it so after a restart ends it.
    Starting,
    /// The guest was let go.
    Running,
    /// Waits for a migration's stream, or holds it; the hand-over decides about it.
    Incoming {
        /// Which.
        migration: MigrationId,
    },
}

impl Record {
    /// Its file.
    #[must_use]
    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.json", self.slot))
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// It can't be written: the act that it announces must not happen.
    pub fn save(&self, folder: &Path) -> Result<(), HostError> {
        let path = self.path(folder);
        let bytes =
            serde_json::to_vec_pretty(self).map_err(|e| HostError::file("cannot encode", &path, e))?;
        write_durably(&path, &bytes)
    }

    /// Every record in the folder. One that can't be read is an error: its QEMU may run, and a daemon that does not
    /// know of it would say that nothing of the VM is here.
    ///
    /// # Errors
    /// The folder or a record can't be read.
    pub fn load_all(folder: &Path) -> Result<Vec<Self>, HostError> {
        let unlisted = |e| HostError::file("cannot read folder", folder, e);
        let mut records = Vec::new();
        for file in std::fs::read_dir(folder).map_err(unlisted)? {
            let file = file.map_err(unlisted)?.path();
            if file.extension().is_some_and(|e| e == "json") {
                records.push(Self::load(&file).map_err(|e| unreadable(&file, &e))?);
            }
        }
        records.sort_by(|a, b| a.slot.cmp(&b.slot));
        Ok(records)
    }

    fn load(file: &Path) -> std::io::Result<Self> {
        let record: Self = serde_json::from_slice(&std::fs::read(file)?)?;
        if file.file_stem().is_some_and(|stem| stem == record.slot.as_str()) {
            return Ok(record);
        }
        Err(std::io::Error::other(format!("it is the record of {}", record.slot)))
    }
}

fn unreadable(file: &Path, error: &std::io::Error) -> HostError {
    let text =
        format!("the record {} of a VM cannot be read: {error}; its QEMU may be running", file.display());
    Problem::new(ErrorCode::WrongState, text)
        .hint("restore the record, or end its QEMU (its cgroup has the record's name) and remove the record")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_hold_all_of_both_ids() {
        let vm = VmId::from_bytes([0xff; 16]);
        assert_eq!(slot(vm, Epoch(u64::MAX)).len(), SLOT_BYTES_MAX);
        let mut alike = [0xff; 16];
        alike[15] = 0;
        assert_ne!(slot(vm, Epoch(1)), slot(VmId::from_bytes(alike), Epoch(1)));
        assert_ne!(slot(vm, Epoch(1)), slot(vm, Epoch(1 + (1 << 32))));
    }
}
