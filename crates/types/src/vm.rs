//! A VM's spec: what an operator writes down (TOML), what its digest covers (RFC 8785 JSON).

use crate::handover::Digest;
use crate::id::{Name, VmId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a VM is. Never holds raw arguments for the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// UUID; also the guest's own.
    pub uuid: VmId,
    /// Name, unique in the registry.
    pub name: Name,
    /// Tenant that owns it.
    #[serde(default = "default_tenant")]
    pub tenant: Name,
    /// Labels for policy.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Accelerator. `tcg` and `kvm` are never mixed: a KVM that hangs Linux exists.
    #[serde(default)]
    pub accel: Accel,
    /// QEMU machine type; `q35` and `pc` mean the newest of the QEMU at hand and are resolved when first started.
    #[serde(default = "default_machine")]
    pub machine: String,
    /// CPU model by name. `host` and `max` do not migrate and are refused.
    #[serde(default = "default_cpu_model")]
    pub cpu_model: String,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Guest memory, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Linux kernel to start directly, with its digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<FileRef>,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<FileRef>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Disks, in order.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces, in order.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// A virtual TPM.
    #[serde(default)]
    pub tpm: bool,
    /// TCP port on which the guest answers, for `time_to_responsiveness_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub responsive_tcp_port: Option<u16>,
}

fn default_tenant() -> Name {
    "default".parse().expect("a constant that follows the rule of names")
}
fn default_machine() -> String {
    "q35".to_owned()
}
fn default_cpu_model() -> String {
    "qemu64".to_owned()
}

/// How guest instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// Hardware virtualisation.
    #[default]
    Kvm,
    /// Emulation.
    Tcg,
}

/// A file that both hosts must hold with the same content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Absolute path on the host.
    pub path: String,
    /// BLAKE3 of the content; a host refuses to start the VM with another.
    pub blake3: Digest,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Absolute path of the image on the host; shared between hosts unless storage is transferred.
    pub path: String,
    /// Image format: `raw` or `qcow2`.
    pub format: String,
    /// Identity of the volume: the same text means the same storage.
    pub volume: String,
    /// Whether both hosts see the same storage.
    #[serde(default)]
    pub shared: bool,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// MAC address, `52:54:00:…` in lower case.
    pub mac: String,
    /// Bridge on the host that its tap joins.
    pub bridge: String,
}

impl VmSpec {
    /// BLAKE3 over canonical JSON (RFC 8785).
    ///
    /// # Panics
    /// Never: every field serialises (no floats, no non-string keys).
    #[must_use]
    pub fn digest(&self) -> Digest {
        let json =
            serde_json_canonicalizer::to_vec(self).expect("a spec has only strings, integers and booleans");
        Digest::of(&json)
    }

    /// What is wrong with the spec, if anything: every rule that a host relies on.
    ///
    /// # Errors
    /// The first rule that it breaks, as a sentence for the operator.
    pub fn validate(&self) -> Result<(), String> {
        const MIB: u64 = 1 << 20;
        if self.vcpus == 0 || self.vcpus > 512 {
            return Err(format!("vcpus is {}, must be 1 to 512", self.vcpus));
        }
        if self.memory_bytes < 16 * MIB
            || !self.memory_bytes.is_multiple_of(MIB)
            || self.memory_bytes > (16 << 40)
        {
            return Err(format!(
                "memory_bytes is {}, must be a multiple of 1 MiB from 16 MiB to 16 TiB",
                self.memory_bytes
            ));
        }
        if matches!(self.cpu_model.as_str(), "host" | "max") {
            return Err(format!(
                "cpu_model {:?} cannot be migrated between hosts; name a model",
                self.cpu_model
            ));
        }
        for (what, text) in [("machine", &self.machine), ("cpu_model", &self.cpu_model)] {
            if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._+".contains(&b)) {
                return Err(format!("{what} {text:?} is not a plain name"));
            }
        }
        let paths =
            self.kernel.iter().chain(&self.initrd).map(|f| &f.path).chain(self.disks.iter().map(|d| &d.path));
        for path in paths {
            if !path.starts_with('/') || path.contains(',') || path.bytes().any(|b| b < 0x20) {
                return Err(format!("path {path:?} must be absolute, without commas or control characters"));
            }
        }
        if self.cmdline.bytes().any(|b| b < 0x20) || self.cmdline.len() > 2048 {
            return Err("cmdline must be one line of at most 2048 bytes".to_owned());
        }
        for disk in &self.disks {
            if !matches!(disk.format.as_str(), "raw" | "qcow2") {
                return Err(format!("disk format {:?} is not raw or qcow2", disk.format));
            }
        }
        for nic in &self.nics {
            let octets: Vec<_> = nic.mac.split(':').collect();
            let hex2 = |o: &&str| {
                o.len() == 2 && o.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
            };
            if octets.len() != 6 || !octets.iter().all(hex2) {
                return Err(format!("mac {:?} is not six lower-case octets", nic.mac));
            }
            if nic.bridge.is_empty()
                || nic.bridge.len() > 15
                || !nic.bridge.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            {
                return Err(format!("bridge {:?} is not an interface name", nic.bridge));
            }
        }
        Ok(())
    }
}

/// Where a VM is and how it stands, as the registry knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Known, never started, or stopped.
    Defined,
    /// A host was told to start it.
    Starting,
    /// It runs.
    Running,
    /// A migration is open.
    Migrating,
    /// It should run and does not.
    Failed,
}
