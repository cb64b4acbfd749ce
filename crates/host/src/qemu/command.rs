//! The command line of a QEMU, from a spec and nothing else. Both sides of a migration build the same devices at
//! the same addresses, so that a stream from one fits the other.

use std::path::{Path, PathBuf};
use types::vm::{Accel, DiskSpec, NicSpec, VmSpec};

/// First PCI slot of network interfaces: slots are fixed, so that adding a disk moves no interface.
const NIC_SLOT_FIRST: usize = 0x02;
/// First PCI slot of disks.
const DISK_SLOT_FIRST: usize = 0x0a;
/// Most interfaces, and most disks: their slots must not meet.
pub const DEVICES_MAX: usize = 8;
/// QEMU's type of every interface, and of every disk.
pub(super) const NIC_DEVICE: &str = "virtio-net-pci";
pub(super) const DISK_DEVICE: &str = "virtio-blk-pci";
/// A disk's size is a number in its state; it shapes nothing.
const DRY_RUN_DISK_BYTES: u64 = 1 << 30;
/// No QEMU of ours starts programs, nor becomes more than it is.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Threads that touch a target's memory before the transfer; measured, more do not help on small machines.
const PREALLOC_THREADS: u32 = 2;

/// Everything that decides a command line.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// The VM.
    pub spec: &'a VmSpec,
    /// Exact machine type.
    pub machine: &'a str,
    /// Folder of its sockets.
    pub folder: &'a Path,
    /// Its taps, one per interface of the spec.
    pub taps: &'a [String],
    /// What it is started for.
    pub purpose: Purpose,
    /// Whether the serial console is written to a file.
    pub serial_log: bool,
}

/// What a QEMU is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A guest.
    Run,
    /// A guest that comes by a migration: it waits, and its memory is touched beforehand.
    Incoming,
    /// To be looked at: the same devices, of which none touches anything of the host.
    DryRun,
}

/// Sockets and files in the folder of one QEMU.
#[derive(Debug, Clone)]
pub struct Paths {
    /// First monitor.
    pub monitor: PathBuf,
    /// Second monitor, for rescue.
    pub rescue: PathBuf,
    /// Migration stream: the daemon listens (source) or QEMU does (target).
    pub stream: PathBuf,
    /// What QEMU prints.
    pub log: PathBuf,
    /// The guest's serial console.
    pub serial: PathBuf,
}

impl Paths {
    /// In `folder`.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self {
            monitor: folder.join("qmp"),
            rescue: folder.join("qmp2"),
            stream: folder.join("stream"),
            log: folder.join("qemu.log"),
            serial: folder.join("serial.log"),
        }
    }
}

/// The arguments.
#[must_use]
pub fn arguments(launch: &Launch<'_>) -> Vec<String> {
    let spec = launch.spec;
    let paths = Paths::new(launch.folder);
    let accel = match spec.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    };
    let mut args = Args::default();
    args.flag("-nodefaults").flag("-no-user-config").flag("-S");
    args.pair("-name", format!("guest={},process=qemu-{}", spec.name, short(spec.name.as_str())));
    args.pair("-uuid", spec.uuid.to_string()).pair("-display", "none").pair("-accel", accel);
    args.pair("-machine", format!("{},memory-backend=pc.ram", launch.machine));
    args.pair("-object", memory(spec, launch.purpose)).pair("-m", format!("{}M", spec.memory_bytes >> 20));
    args.pair("-cpu", spec.cpu_model.as_str()).pair("-smp", spec.vcpus.to_string());
    for (name, path) in [("mon0", &paths.monitor), ("mon1", &paths.rescue)] {
        args.pair("-chardev", format!("socket,id={name},path={},server=on,wait=off", path.display()));
        args.pair("-mon", format!("chardev={name},mode=control"));
    }
    // The device is there whether or not it is logged: the two sides may differ in that.
    args.pair("-chardev", console(&paths.serial, launch.serial_log)).pair("-serial", "chardev:con0");
    boot(&mut args, spec);
    for (index, nic) in spec.nics.iter().enumerate() {
        args.pair("-netdev", network(index, launch));
        interface(&mut args, index, nic);
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        args.pair("-blockdev", image(index, disk, launch.purpose));
        self::disk(&mut args, index);
    }
    if launch.purpose == Purpose::Incoming {
        args.pair("-incoming", "defer");
    }
    args.pair("-sandbox", SANDBOX);
    args.0
}

/// The arguments that make a QEMU write the descriptions of all its devices to a file, and end.
#[must_use]
pub fn dump_arguments(machine: &str, file: &Path) -> Vec<String> {
    let mut args = Args::default();
    args.flag("-nodefaults").flag("-no-user-config").pair("-machine", machine);
    args.pair("-dump-vmstate", file.display().to_string()).pair("-sandbox", SANDBOX);
    args.0
}

fn memory(spec: &VmSpec, purpose: Purpose) -> String {
    let touch = if purpose == Purpose::Incoming {
        format!(",prealloc=on,prealloc-threads={PREALLOC_THREADS}")
    } else {
        String::new()
    };
    format!("memory-backend-ram,id=pc.ram,size={}{touch}", spec.memory_bytes)
}

fn console(path: &Path, log: bool) -> String {
    if log { format!("file,id=con0,path={},append=on", path.display()) } else { "null,id=con0".to_owned() }
}

fn boot(args: &mut Args, spec: &VmSpec) {
    if let Some(kernel) = &spec.kernel {
        args.pair("-kernel", kernel.path.as_str());
        if !spec.cmdline.is_empty() {
            args.pair("-append", spec.cmdline.as_str());
        }
    }
    if let Some(initrd) = &spec.initrd {
        args.pair("-initrd", initrd.path.as_str());
    }
}

/// The host's end of an interface. It shapes no device: what it can do changes feature bits, no layout.
fn network(index: usize, launch: &Launch<'_>) -> String {
    if launch.purpose == Purpose::DryRun {
        return format!("hubport,id=net{index},hubid={index}");
    }
    let tap = launch.taps.get(index).map_or("", String::as_str);
    format!("tap,id=net{index},ifname={tap},script=no,downscript=no")
}

fn interface(args: &mut Args, index: usize, nic: &NicSpec) {
    let slot = NIC_SLOT_FIRST + index;
    args.pair("-device", format!("{NIC_DEVICE},netdev=net{index},mac={},romfile=,addr={slot:#x}", nic.mac));
}

/// What a disk is backed by.
fn image(index: usize, disk: &DiskSpec, purpose: Purpose) -> String {
    let name = format!("disk{index}");
    let node = match purpose {
        Purpose::DryRun => {
            serde_json::json!({"driver": "null-co", "node-name": name, "size": DRY_RUN_DISK_BYTES})
        }
        Purpose::Run | Purpose::Incoming => serde_json::json!({
            "driver": disk.format, "node-name": name, "file": {"driver": "file", "filename": disk.path},
        }),
    };
    node.to_string()
}

fn disk(args: &mut Args, index: usize) {
    let slot = DISK_SLOT_FIRST + index;
    let id = disk_id(index);
    args.pair("-device", format!("{DISK_DEVICE},drive=disk{index},id={id},addr={slot:#x}"));
}

/// The id of a disk's device.
pub(super) fn disk_id(index: usize) -> String {
    format!("vd{index}")
}

/// Process names are cut at 15 bytes by the kernel.
fn short(name: &str) -> &str {
    &name[..name.len().min(10)]
}

#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.to_owned());
        self
    }
    fn pair(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.into());
        self
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        serde_json::from_value(serde_json::json!({
            "uuid": "11111111-2222-3333-4444-555555555555", "name": "web-1", "accel": "tcg", "vcpus": 2,
            "memory_bytes": 256 << 20,
            "disks": [{"path": "/d", "format": "raw", "volume": "v", "shared": true}],
            "nics": [{"mac": "52:54:00:00:00:01", "bridge": "br0"}],
        }))
        .unwrap()
    }

    fn line(purpose: Purpose, serial_log: bool) -> String {
        let launch = Launch {
            spec: &spec(),
            machine: "pc-q35-10.0",
            folder: Path::new("/run/o/vm"),
            taps: &["ot0".to_owned()],
            purpose,
            serial_log,
        };
        arguments(&launch).join(" ")
    }

    #[test]
    fn both_sides_have_the_same_devices() {
        let devices = |line: &str| {
            let words: Vec<_> = line.split(' ').collect();
            words.windows(2).filter(|w| w[0] == "-device").map(|w| w[1].to_owned()).collect::<Vec<_>>()
        };
        let (source, target) = (line(Purpose::Run, true), line(Purpose::Incoming, false));
        assert_eq!(devices(&source), devices(&target));
        let dry_run = line(Purpose::DryRun, false);
        assert_eq!(devices(&source), devices(&dry_run));
        for used in ["ot0", "\"/d\"", "-incoming", "prealloc"] {
            assert!(!dry_run.contains(used), "{used} in {dry_run}");
        }
        assert_eq!(devices(&source).len(), 2);
        assert!(target.contains("-incoming defer") && !source.contains("-incoming"));
        assert!(target.contains("prealloc=on") && !source.contains("prealloc"));
    }

    #[test]
    fn every_qemu_starts_paused_sandboxed_and_without_defaults() {
        for line in [line(Purpose::Run, false), line(Purpose::Incoming, true), line(Purpose::DryRun, false)] {
            for part in [
                "-S ",
                "-nodefaults",
                "-no-user-config",
                "-sandbox on,",
                "memory-backend=pc.ram",
                "id=pc.ram",
            ] {
                assert!(line.contains(part), "{part} in {line}");
            }
        }
    }
}
