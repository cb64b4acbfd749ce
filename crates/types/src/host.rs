//! A host's record and what it reports about itself.

use crate::id::{HostName, Name, VmId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// What an admin enrols.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSpec {
    /// Its name.
    pub name: HostName,
    /// The address from which its daemon dials the manager.
    pub control_address: IpAddr,
    /// The address of its interface on the migration network.
    pub migration_address: IpAddr,
    /// MACs of its control and migration interfaces, lower case.
    pub macs: Vec<String>,
    /// What it can carry.
    pub capacity: Capacity,
    /// Zone, for policy.
    #[serde(default)]
    pub zone: String,
    /// The TPM with which it proves itself; without one it is unattested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmSpec>,
}

/// Which TPM a host must have, and where its reference values come from. Exactly one of `ek_name` and `vendor_roots`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TpmSpec {
    /// Name of its endorsement key in hexadecimal, as `outrider host ek` prints it on that machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_name: Option<String>,
    /// Certificates (DER in base64) of TPM vendors: any TPM that one of them certified. Weaker: it says "a genuine TPM".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vendor_roots: Vec<String>,
    /// Class of hosts whose reference values count, where the host has none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<Name>,
    /// PCRs (0 to 23, bank sha256) whose values at the join become its reference, where there is none yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub record_pcrs: Vec<u8>,
}

/// What a host can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Memory for guests.
    pub memory_bytes: u64,
    /// Virtual CPUs for guests.
    pub vcpus: u32,
    /// Guests.
    pub vms: u32,
}

/// One network interface as the daemon sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC, lower case.
    pub mac: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// The measured load of a host: of its cgroup subtree, or of the machine when that is the root. What an older daemon
/// does not measure is missing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Name of what was measured: a cgroup path or `machine`.
    pub scope: String,
    /// Memory in use.
    pub memory_used_bytes: u64,
    /// Memory that guests can still get (limit or machine, less what is used).
    pub memory_available_bytes: u64,
    /// CPU seconds used per second over the sampling window.
    pub cpu_cores_used: f64,
    /// CPUs that it may use.
    pub cpu_cores: f64,
    /// PSI `some avg10` of CPU in percent, where the kernel has it.
    pub cpu_pressure_percent: Option<f64>,
    /// PSI `some avg10` of memory in percent, where the kernel has it.
    pub memory_pressure_percent: Option<f64>,
    /// QEMUs that are held there, also those that wait for a migration.
    pub vms: u32,
    /// PSI `full avg10` of memory in percent: nothing at all could run for want of it.
    #[serde(default)]
    pub memory_full_pressure_percent: Option<f64>,
    /// PSI `some avg10` of I/O in percent.
    #[serde(default)]
    pub io_pressure_percent: Option<f64>,
    /// The interface of the migration network.
    #[serde(default)]
    pub link: Option<LinkUse>,
    /// The guests that run there: processes that live, not records.
    #[serde(default)]
    pub running: Option<BTreeSet<VmId>>,
}

/// How much of a link is used, over the last seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkUse {
    /// Name of the interface.
    pub interface: String,
    /// Bytes per second that came in.
    pub received_bytes_per_s: f64,
    /// Bytes per second that went out.
    pub sent_bytes_per_s: f64,
    /// What it carries each way, where that is known.
    pub capacity_bytes_per_s: Option<f64>,
}

/// What a host did when it was asked to prove what it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Bytes of fresh memory, each page of them written to.
    pub touched_bytes: u64,
    /// How long that took, microseconds.
    pub touch_us: u64,
    /// Units of work, of a fixed kind.
    pub work_units: u64,
    /// How long they took, microseconds.
    pub work_us: u64,
    /// CPU time that they took, microseconds.
    pub cpu_us: u64,
}

impl Probe {
    /// How fast memory came, MiB per second; nothing when the numbers make no sense.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn touch_mib_per_s(&self) -> Option<f64> {
        let mib = self.touched_bytes as f64 / f64::from(1 << 20);
        (self.touch_us > 0).then(|| mib / (self.touch_us as f64 / 1e6))
    }

    /// How much of a CPU it had while it worked, percent. A little more than all of it is the clocks' doing.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn cpu_share_percent(&self) -> Option<f64> {
        let share = self.cpu_us as f64 / self.work_us as f64 * 100.0;
        (self.work_us > 0 && share <= 150.0).then_some(share)
    }

    /// Units of work per millisecond.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn units_per_ms(&self) -> Option<f64> {
        (self.work_us > 0).then(|| self.work_units as f64 / (self.work_us as f64 / 1e3))
    }
}

/// How a host stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// Recorded, not yet joined.
    Enrolled,
    /// Joined; connected now.
    Connected,
    /// Joined; not connected.
    Lost,
    /// Set aside.
    Quarantined,
}
