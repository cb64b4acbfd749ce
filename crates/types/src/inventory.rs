//! What a VM's stream must look like: enrolled from the VM's own QEMU, compared by the inspector.

use crate::handover::Digest;
use crate::layout::Catalogue;
use serde::{Deserialize, Serialize};

/// A VM's inventory as its record holds it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    /// The exact machine type in the stream's configuration section, e.g. `pc-q35-10.0`.
    pub machine: String,
    /// Guest page size, 4096 on x86.
    pub page_size_bytes: u32,
    /// RAM blocks in stream order where known; compared as a set of (name, length).
    pub ram_blocks: Vec<RamBlock>,
    /// Device sections that must be present, each exactly once: (idstr, instance, version). Empty means that no
    /// list was enrolled, and only the stream's own consistency is checked.
    #[serde(default)]
    pub devices: Vec<DeviceSection>,
    /// Hypervisor and version, e.g. `qemu/10.0.2`.
    pub hypervisor: String,
}

/// A VM's enrolment as one document: what `vm inspect --save` and `inspect --learn` write, and `inspect --vm` reads.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enrolment {
    /// What its stream must look like.
    pub inventory: Inventory,
    /// What the QEMU of the host that runs it makes of its devices; nothing when that host could not say.
    #[serde(default)]
    pub catalogue: Option<Catalogue>,
}

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamBlock {
    /// Its idstr, e.g. `pc.ram`.
    pub name: String,
    /// Used length in bytes.
    pub length_bytes: u64,
    /// BLAKE3 of its content, for firmware that never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
}

/// One device section.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSection {
    /// Its idstr, e.g. `0000:00:02.0/virtio-net`.
    pub name: String,
    /// Its instance.
    pub instance: u32,
    /// Its version.
    pub version: u32,
}
