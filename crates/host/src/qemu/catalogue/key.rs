//! What names a catalogue: the program and its firmware, the machine type, and what of a spec shapes devices.

use crate::daemon::lock;
use crate::error::HostError;
use crate::qemu::binary::Binary;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use types::vm::{Accel, DiskSpec, NicSpec, VmSpec};
use types::{Digest, VmId};

/// Counts up whenever a catalogue of the same devices would read otherwise: what is kept of another format is made anew.
pub(super) const FORMAT: u32 = 2;
/// Memory of a dry run beside what its boot files need. Nobody writes to it, so it costs address space only, and a
/// few KB of zero pages in the recording.
const MEMORY_BYTES: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// Names a catalogue on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(pub(super) Digest);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A QEMU as it is installed: what decides what its devices look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Build {
    hypervisor: String,
    program: Digest,
    firmware: Digest,
    /// With KVM the kernel writes some of the state.
    kernel: String,
}

/// Tells one file from what another is installed in its place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    changed: (i64, i64),
    inode: (u64, u64),
}

impl Stamp {
    fn of(path: &Path, metadata: &Metadata) -> Self {
        Self {
            path: path.to_owned(),
            bytes: metadata.len(),
            changed: (metadata.mtime(), metadata.mtime_nsec()),
            inode: (metadata.dev(), metadata.ino()),
        }
    }
}

/// Digests of programs, so that each is read once.
#[derive(Debug, Default)]
pub(super) struct Programs(Mutex<BTreeMap<Stamp, Digest>>);

/// One QEMU is at hand, and a few are in the course of upgrades.
const PROGRAMS_MAX: usize = 8;

impl Programs {
    /// Reads a program, unless it is known, and looks at its firmware.
    pub(super) fn identify(&self, binary: &Binary) -> Result<Build, HostError> {
        Ok(Build {
            hypervisor: binary.hypervisor.clone(),
            program: self.digest(&binary.path)?,
            firmware: firmware(&binary.data_folders),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default(),
        })
    }

    fn digest(&self, path: &Path) -> Result<Digest, HostError> {
        let failed = |e| HostError::file("cannot read", path, e);
        let file = std::fs::File::open(path).map_err(failed)?;
        let stamp = Stamp::of(path, &file.metadata().map_err(failed)?);
        if let Some(digest) = lock(&self.0).get(&stamp) {
            return Ok(*digest);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file).map_err(failed)?;
        let digest = Digest(*hasher.finalize().as_bytes());
        let mut known = lock(&self.0);
        if known.len() >= PROGRAMS_MAX {
            known.pop_first();
        }
        known.insert(stamp, digest);
        Ok(digest)
    }
}

/// Names, sizes and times of the files in QEMU's data folders: its firmware is upgraded apart from it, and is pinned.
fn firmware(folders: &[PathBuf]) -> Digest {
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let stamp = |path: PathBuf| {
        // A link's target counts.
        let metadata = std::fs::metadata(&path).ok().filter(Metadata::is_file)?;
        Some(Stamp::of(&path, &metadata))
    };
    let mut stamps: Vec<_> = files.filter_map(|entry| stamp(entry.path())).collect();
    stamps.sort();
    Digest::of(format!("{stamps:?}").as_bytes())
}

/// The key of a reduced spec.
pub(super) fn of(build: &Build, machine: &str, reduced: &VmSpec) -> Key {
    let mut spec = reduced.clone();
    // Where boot files are does not matter. What a kernel is does: it decides which option ROM loads it.
    for file in spec.kernel.iter_mut().chain(&mut spec.initrd) {
        file.path.clear();
    }
    if let Some(initrd) = &mut spec.initrd {
        initrd.blake3 = Digest([0; 32]);
    }
    let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 catalogue key");
    let kernel = if spec.accel == Accel::Kvm { build.kernel.as_str() } else { "" };
    for part in [env!("CARGO_PKG_VERSION"), &build.hypervisor, kernel, machine] {
        hasher.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
    }
    hasher.update(&FORMAT.to_be_bytes()).update(&build.program.0).update(&build.firmware.0);
    hasher.update(&spec.digest().0);
    Key(Digest(*hasher.finalize().as_bytes()))
}

/// The key of a dump of descriptions, in memory only.
pub(super) fn of_dump(binary: &Binary, machine: &str) -> Key {
    let stamp = std::fs::metadata(&binary.path).map(|metadata| Stamp::of(&binary.path, &metadata));
    let stamp = stamp.ok();
    Key(Digest::of(format!("{stamp:?} {machine}").as_bytes()))
}

/// A spec without what shapes no device: the spec of its dry run.
pub(super) fn reduced(spec: &VmSpec) -> VmSpec {
    let boot_files = spec.kernel.iter().chain(&spec.initrd);
    let boot_bytes = boot_files.map(|file| std::fs::metadata(&file.path).map_or(0, |m| m.len())).sum();
    reduced_with(spec, boot_bytes)
}

fn reduced_with(spec: &VmSpec, boot_bytes: u64) -> VmSpec {
    // An initial RAM disk must fit in the memory that it is never loaded into.
    let room = MEMORY_BYTES.saturating_add(boot_bytes).checked_next_multiple_of(MIB).unwrap_or(u64::MAX);
    let disk =
        DiskSpec { path: String::new(), format: "raw".to_owned(), volume: String::new(), shared: false };
    VmSpec {
        uuid: VmId::from_bytes([0; 16]),
        name: NAME.parse().expect("a constant that follows the rule of names"),
        tenant: NAME.parse().expect("a constant that follows the rule of names"),
        labels: BTreeMap::new(),
        accel: spec.accel,
        machine: String::new(),
        cpu_model: spec.cpu_model.clone(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes.min(room),
        kernel: spec.kernel.clone(),
        initrd: spec.initrd.clone(),
        cmdline: String::new(),
        disks: spec.disks.iter().map(|_| disk.clone()).collect(),
        nics: (0..spec.nics.len()).map(nic).collect(),
        tpm: spec.tpm,
        responsive_tcp_port: None,
    }
}

/// Of the process and of the guest that never runs.
const NAME: &str = "dry-run";

fn nic(index: usize) -> NicSpec {
    NicSpec { mac: format!("52:54:00:00:00:{index:02x}"), bridge: String::new() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn spec(change: serde_json::Value) -> VmSpec {
        let mut json = serde_json::json!({
            "uuid": "11111111-2222-3333-4444-555555555555", "name": "web-1", "accel": "tcg", "vcpus": 2,
            "memory_bytes": 256 << 20,
            "kernel": {"path": "/boot/k", "blake3": "11".repeat(32)},
            "initrd": {"path": "/boot/i", "blake3": "22".repeat(32)},
            "disks": [{"path": "/d", "format": "raw", "volume": "v", "shared": true}],
            "nics": [{"mac": "52:54:00:00:00:01", "bridge": "br0"}],
        });
        for (key, value) in change.as_object().unwrap() {
            json[key] = value.clone();
        }
        serde_json::from_value(json).unwrap()
    }

    fn build() -> Build {
        Build {
            hypervisor: "qemu/10.0.2".to_owned(),
            program: Digest([1; 32]),
            firmware: Digest([2; 32]),
            kernel: "6.1".to_owned(),
        }
    }

    fn key(change: serde_json::Value) -> Key {
        of(&build(), "pc-q35-10.0", &reduced_with(&spec(change), 30 << 20))
    }

    #[test]
    fn what_is_one_vms_own_is_not_in_the_key() {
        let plain = key(serde_json::json!({}));
        for change in [
            serde_json::json!({"uuid": "21111111-2222-3333-4444-555555555555", "name": "db", "tenant": "x"}),
            serde_json::json!({"labels": {"a": "b"}, "cmdline": "quiet", "responsive_tcp_port": 80}),
            serde_json::json!({"memory_bytes": 4_u64 << 30}),
            serde_json::json!({"nics": [{"mac": "52:54:00:00:00:99", "bridge": "br7"}]}),
            serde_json::json!({"disks": [{"path": "/e", "format": "qcow2", "volume": "w"}]}),
            serde_json::json!({"kernel": {"path": "/elsewhere", "blake3": "11".repeat(32)}}),
            serde_json::json!({"initrd": {"path": "/elsewhere", "blake3": "33".repeat(32)}}),
        ] {
            assert_eq!(key(change.clone()), plain, "{change}");
        }
    }

    #[test]
    fn what_shapes_devices_is_in_the_key() {
        let nic = serde_json::json!({"mac": "52:54:00:00:00:01", "bridge": "br0"});
        let mut keys = vec![key(serde_json::json!({}))];
        keys.extend(
            [
                serde_json::json!({"accel": "kvm"}),
                serde_json::json!({"cpu_model": "qemu32"}),
                serde_json::json!({"vcpus": 3}),
                serde_json::json!({"memory_bytes": 32 << 20}),
                serde_json::json!({"nics": [nic, nic]}),
                serde_json::json!({"nics": []}),
                serde_json::json!({"disks": []}),
                serde_json::json!({"kernel": null, "initrd": null}),
                serde_json::json!({"kernel": {"path": "/boot/k", "blake3": "44".repeat(32)}}),
                serde_json::json!({"initrd": null}),
                serde_json::json!({"tpm": true}),
            ]
            .map(key),
        );
        let reduced = reduced_with(&spec(serde_json::json!({})), 30 << 20);
        keys.push(of(&build(), "pc-q35-9.2", &reduced));
        keys.push(of(&Build { program: Digest([3; 32]), ..build() }, "pc-q35-10.0", &reduced));
        keys.push(of(&Build { firmware: Digest([3; 32]), ..build() }, "pc-q35-10.0", &reduced));
        keys.push(of(&Build { hypervisor: "qemu/10.0.3".to_owned(), ..build() }, "pc-q35-10.0", &reduced));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count, "every one of them is another");
        // The kernel of the host matters to KVM alone.
        let other = Build { kernel: "6.2".to_owned(), ..build() };
        assert_eq!(of(&other, "pc-q35-10.0", &reduced), key(serde_json::json!({})));
        let with_kvm = VmSpec { accel: Accel::Kvm, ..reduced };
        assert_ne!(of(&other, "pc-q35-10.0", &with_kvm), key(serde_json::json!({"accel": "kvm"})));
    }

    #[test]
    fn an_initial_ram_disk_has_room_and_no_dry_run_is_larger_than_the_vm() {
        let memory =
            |vm, boot| reduced_with(&spec(serde_json::json!({"memory_bytes": vm})), boot).memory_bytes;
        assert_eq!(memory(4_u64 << 30, 0), 64 << 20);
        assert_eq!(memory(4_u64 << 30, (30 << 20) + 1), 95 << 20);
        assert_eq!(memory(32 << 20, 1), 32 << 20);
        assert_eq!(memory(1 << 30, u64::MAX - MIB), 1 << 30);
    }

    #[test]
    fn a_program_or_firmware_that_is_replaced_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu");
        let programs = Programs::default();
        std::fs::write(&program, "one").unwrap();
        let first = programs.digest(&program).unwrap();
        assert_eq!(programs.digest(&program).unwrap(), first);
        std::fs::write(&program, "another").unwrap();
        assert_ne!(programs.digest(&program).unwrap(), first);
        assert!(programs.digest(&folder.path().join("none")).is_err());
        let folders = [folder.path().to_owned(), folder.path().join("none")];
        let before = firmware(&folders);
        assert_eq!(firmware(&folders), before);
        std::fs::write(folder.path().join("bios.bin"), "b").unwrap();
        assert_ne!(firmware(&folders), before);
    }
}
