//! A host's record and what it reports about itself.

use crate::id::{HostName, Name};
use serde::{Deserialize, Serialize};
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

/// The measured load of a host: of its cgroup subtree, or of the machine when that is the root.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Guests that run there.
    pub vms: u32,
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
