//! Seeded VMs: which QEMUs, which machine, which devices, and how often it moves.

use std::path::Path;

use serde::Serialize;

use super::rng::Rng;
use crate::guest::GuestImage;
use crate::qemu::Version;

/// Enough to boot the lab's guest; less is not.
const BOOTED_MEMORY_MIB: u32 = 96;
const DISK_BYTES: u32 = 16 << 20;
/// What the kernel of a guest that boots is told.
const COMMAND_LINE: &str = crate::guest::BASE_COMMAND_LINE;

/// Which versions of QEMU take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Versions {
    /// Only one.
    Only(Version),
    /// Both, also from one to the other.
    Both,
}

/// The chip set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Chipset {
    /// i440fx.
    Pc,
    /// Q35.
    Q35,
}

/// A device that the VM has beside what its chip set brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// virtio-net on nothing, without a ROM.
    Net,
    /// virtio-net on QEMU's user network, whose state is in the stream.
    UserNet,
    /// virtio-blk.
    Block,
    /// virtio-rng.
    Rng,
    /// virtio-balloon.
    Balloon,
    /// virtio-scsi with a disk.
    Scsi,
    /// virtio-serial with a port.
    Serial,
    /// A disk on an AHCI controller.
    Ahci,
    /// An xHCI controller.
    Xhci,
    /// An xHCI controller with a tablet.
    Tablet,
    /// A VGA card with little memory.
    Vga,
}

const VIRTIO: [Device; 7] =
    [Device::Net, Device::UserNet, Device::Block, Device::Rng, Device::Balloon, Device::Scsi, Device::Serial];
/// QEMU allows one balloon, and numbers its user networks differently in 7.2 and 10.0.
const ONCE: [Device; 2] = [Device::Balloon, Device::UserNet];
const SOMETIMES: [Device; 4] = [Device::Ahci, Device::Xhci, Device::Tablet, Device::Vga];

/// One migration of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// The target's QEMU.
    pub to: Version,
    /// Channels besides the main one.
    pub multifd_channels: u16,
}

/// A VM and its migrations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Seed and number that it is made from.
    pub seed: u64,
    /// Its number.
    pub case: u64,
    /// The chip set.
    pub chipset: Chipset,
    /// Version of the machine type.
    pub machine_version: Version,
    /// The QEMU that it is started with.
    pub from: Version,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Whether it boots the lab's guest; else it is migrated before it has run, and its firmware runs afterwards.
    pub boots: bool,
    /// Devices, in the order of the command line.
    pub devices: Vec<Device>,
    /// Its migrations, in order.
    pub hops: Vec<Hop>,
}

impl Shape {
    /// The VM of one case; `max_multifd` bounds the channels of its hops.
    #[must_use]
    pub fn of(seed: u64, case: u64, versions: Versions, max_multifd: u16) -> Self {
        let mut rng = Rng::of(seed, case);
        let from = match versions {
            Versions::Only(version) => version,
            Versions::Both => *rng.pick(&Version::ALL).unwrap_or(&Version::V10),
        };
        let crosses = versions == Versions::Both && rng.one_in(2);
        let old_machine = from == Version::V72 || crosses || rng.one_in(5);
        let boots = !rng.one_in(3);
        let chipset = if rng.one_in(2) { Chipset::Pc } else { Chipset::Q35 };
        let memory_mib =
            if boots { BOOTED_MEMORY_MIB } else { *rng.pick(&[64, 80, 96]).unwrap_or(&BOOTED_MEMORY_MIB) };
        let cpus = if rng.one_in(3) { 2 } else { 1 };
        let devices = devices(&mut rng);
        let hops = hops(&mut rng, from, crosses, boots, max_multifd);
        Self {
            seed,
            case,
            chipset,
            machine_version: if old_machine { Version::V72 } else { Version::V10 },
            from,
            memory_mib,
            cpus,
            boots,
            devices,
            hops,
        }
    }

    /// A VM that has never run, of the newest machine type of one version.
    #[must_use]
    pub fn small(version: Version, chipset: Chipset, devices: &[Device]) -> Self {
        Self {
            seed: 0,
            case: 0,
            chipset,
            machine_version: version,
            from: version,
            memory_mib: 16,
            cpus: 1,
            boots: false,
            devices: devices.to_vec(),
            hops: Vec::new(),
        }
    }

    /// QEMU's name of the machine type.
    #[must_use]
    pub fn machine(&self) -> String {
        let name = match self.chipset {
            Chipset::Pc => "i440fx",
            Chipset::Q35 => "q35",
        };
        format!("pc-{name}-{}", self.machine_version.name())
    }

    /// The command line of source, target and dry run alike; only the serial line leads elsewhere in each.
    #[must_use]
    pub fn arguments(&self, image: Option<&GuestImage>, console: Option<&Path>) -> Vec<String> {
        let mut words: Vec<String> =
            ["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned).into();
        let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
        add("-display", "none".to_owned());
        add("-accel", "tcg".to_owned());
        add("-machine", self.machine());
        // The model with the widest reach that migrates between versions.
        add("-cpu", "qemu64".to_owned());
        add("-m", self.memory_mib.to_string());
        add("-smp", self.cpus.to_string());
        add("-serial", console.map_or("null".to_owned(), |file| format!("file:{}", file.display())));
        for (index, device) in self.devices.iter().enumerate() {
            for (name, value) in device.arguments(self.chipset, index) {
                add(name, value);
            }
        }
        if let Some(image) = image.filter(|_| self.boots) {
            add("-kernel", image.kernel.display().to_string());
            add("-initrd", image.initrd.display().to_string());
            add("-append", COMMAND_LINE.to_owned());
        }
        words
    }
}

fn devices(rng: &mut Rng) -> Vec<Device> {
    let count = 1 + rng.below(8);
    let mut devices: Vec<Device> = Vec::new();
    for device in (0..count).filter_map(|_| rng.pick(&VIRTIO)) {
        if !ONCE.contains(device) || !devices.contains(device) {
            devices.push(*device);
        }
    }
    for device in SOMETIMES {
        if rng.one_in(4) {
            let at = rng.below(devices.len() + 1);
            devices.insert(at, device);
        }
    }
    devices
}

fn hops(rng: &mut Rng, from: Version, crosses: bool, boots: bool, max_multifd: u16) -> Vec<Hop> {
    let other = if from == Version::V10 { Version::V72 } else { Version::V10 };
    let mut at = from;
    // A boot costs as much as several migrations.
    let count = if boots { 3 + rng.below(3) } else { 1 + rng.below(3) };
    (0..count)
        .map(|_| {
            at = if crosses { if at == from { other } else { from } } else { from };
            let wanted = *rng.pick(&[0, 0, 2, 4, 8]).unwrap_or(&0);
            Hop { to: at, multifd_channels: wanted.min(max_multifd) }
        })
        .collect()
}

impl Device {
    fn arguments(self, chipset: Chipset, index: usize) -> Vec<(&'static str, String)> {
        let disk =
            ("-blockdev", format!("driver=null-co,node-name=n{index},size={DISK_BYTES},read-zeroes=on"));
        let device = |text: String| ("-device", text);
        match self {
            Self::Net => vec![
                ("-netdev", format!("hubport,id=n{index},hubid={index}")),
                device(format!("virtio-net-pci,netdev=n{index},romfile=")),
            ],
            Self::UserNet => vec![
                ("-netdev", format!("user,id=n{index},restrict=on")),
                device(format!("virtio-net-pci,netdev=n{index},romfile=")),
            ],
            Self::Block => vec![disk, device(format!("virtio-blk-pci,drive=n{index}"))],
            Self::Rng => vec![
                ("-object", format!("rng-builtin,id=n{index}")),
                device(format!("virtio-rng-pci,rng=n{index}")),
            ],
            Self::Balloon => vec![device("virtio-balloon-pci".to_owned())],
            Self::Scsi => vec![
                disk,
                device(format!("virtio-scsi-pci,id=d{index}")),
                device(format!("scsi-hd,bus=d{index}.0,drive=n{index}")),
            ],
            Self::Serial => vec![
                ("-chardev", format!("null,id=n{index}")),
                device(format!("virtio-serial-pci,id=d{index}")),
                device(format!("virtserialport,bus=d{index}.0,chardev=n{index}")),
            ],
            // Q35 brings its controller.
            Self::Ahci if chipset == Chipset::Q35 => {
                vec![disk, device(format!("ide-hd,bus=ide.0,drive=n{index}"))]
            }
            Self::Ahci => vec![
                disk,
                device(format!("ahci,id=d{index}")),
                device(format!("ide-hd,bus=d{index}.0,drive=n{index}")),
            ],
            Self::Xhci => vec![device(format!("qemu-xhci,id=d{index}"))],
            Self::Tablet => {
                vec![device(format!("qemu-xhci,id=d{index}")), device(format!("usb-tablet,bus=d{index}.0"))]
            }
            Self::Vga => vec![device("VGA,vgamem_mb=1,romfile=".to_owned())],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_the_same_every_time_and_shapes_differ() {
        let shapes = |seed| (0..50).map(|case| Shape::of(seed, case, Versions::Both, 8)).collect::<Vec<_>>();
        let first = shapes(1);
        assert_eq!(first, shapes(1));
        assert_ne!(first, shapes(2));
        let kinds = |test: fn(&Shape) -> bool| first.iter().filter(|shape| test(shape)).count();
        for count in [
            kinds(|shape| shape.boots),
            kinds(|shape| shape.chipset == Chipset::Pc),
            kinds(|shape| shape.hops.iter().any(|hop| hop.to != shape.from)),
            kinds(|shape| shape.hops.iter().any(|hop| hop.multifd_channels == 8)),
            kinds(|shape| shape.devices.contains(&Device::UserNet)),
        ] {
            assert!((5..45).contains(&count), "{count} of 50");
        }
    }

    #[test]
    fn a_vm_that_an_older_qemu_runs_has_an_older_machine_type() {
        for case in 0..200 {
            let shape = Shape::of(3, case, Versions::Both, 0);
            let oldest = shape.hops.iter().map(|hop| hop.to).chain([shape.from]).min();
            assert!(oldest == Some(Version::V10) || shape.machine_version == Version::V72, "{shape:?}");
            assert!(!shape.hops.is_empty() && !shape.devices.is_empty());
            for once in ONCE {
                let count = shape.devices.iter().filter(|device| **device == once).count();
                assert!(count <= 1, "{shape:?}");
            }
            assert!(shape.hops.iter().all(|hop| hop.multifd_channels == 0));
        }
    }

    #[test]
    fn one_version_alone_never_crosses() {
        for case in 0..50 {
            let shape = Shape::of(3, case, Versions::Only(Version::V72), 8);
            assert!(shape.hops.iter().all(|hop| hop.to == Version::V72));
        }
    }
}
