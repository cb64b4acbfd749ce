//! What a host's QEMU can run, as the host says it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Longest text of it that is read: QEMU 10.0 comes to 12 KB.
pub const MAX_ABILITIES_BYTES: usize = 256 << 10;

/// What a host's QEMU can run; `cpu` is about the machine type, model and accelerator that were asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Abilities {
    /// Hypervisor and version, e.g. `qemu/10.0.2`.
    pub hypervisor: String,
    /// Exact machine types, e.g. `pc-q35-10.0`.
    pub machines: BTreeSet<String>,
    /// CPU models, aliases and versions included.
    pub cpu_models: BTreeSet<String>,
    /// CPUID flags that a guest really gets; nothing when that could not be found out.
    #[serde(default)]
    pub cpu_features: Option<BTreeSet<String>>,
    /// Why it could not.
    #[serde(default)]
    pub cpu_missing: String,
}
