//! Records VMs with many devices from the QEMU of this machine: paused, and while their firmware or guest runs.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// What runs in the VM.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Runs {
    Nothing,
    /// A paused processor whose ports are written from the monitor: devices stop in the middle of something.
    Ports,
    Firmware,
    Guest,
}

/// A machine and its devices, `-device` arguments; those that this QEMU does not have are left out.
pub struct Machine {
    pub name: &'static str,
    pub options: &'static [&'static str],
    pub devices: &'static [&'static str],
    /// Width, port and value.
    pub ports: &'static [(char, u16, u32)],
}

const DISKS: usize = 6;

pub const MACHINES: &[Machine] = &[
    Machine {
        name: "q35",
        options: &["-smp", "2,maxcpus=4"],
        devices: &[
            "VGA",
            "pcie-root-port,id=port1,chassis=1",
            "pcie-root-port,id=port2,chassis=2",
            "pcie-pci-bridge,bus=port2",
            "pci-bridge,chassis_nr=9",
            "e1000e,bus=port1",
            "virtio-net-pci,romfile=",
            "virtio-balloon-pci",
            "virtio-rng-pci",
            "virtio-blk-pci,drive=d0",
            "virtio-scsi-pci,id=scsi",
            "scsi-hd,bus=scsi.0,drive=d1",
            "ide-hd,drive=d2,bus=ide.0",
            "ide-cd,drive=cd,bus=ide.1",
            "qemu-xhci,id=xhci",
            "usb-tablet,bus=xhci.0",
            "usb-kbd,bus=xhci.0",
            "usb-storage,bus=xhci.0,drive=d3",
            "i6300esb",
            "pvpanic",
            "vmgenid",
        ],
        ports: &[
            // A serial line in loopback, with three bytes in its queue.
            ('b', 0x3f9, 2),
            ('b', 0x3fa, 1),
            ('b', 0x3fc, 0x10),
            ('b', 0x3f8, 0x41),
            ('b', 0x3f8, 0x42),
            ('b', 0x3f8, 0x43),
            // A keyboard that was asked for its number.
            ('b', 0x60, 0xf2),
            // Processor hot-plug as firmware turns it on.
            ('b', 0xcd8, 0),
            // A picture of 1024 by 768, in 32 bits a pixel.
            ('w', 0x1ce, 1),
            ('w', 0x1cf, 1024),
            ('w', 0x1ce, 2),
            ('w', 0x1cf, 768),
            ('w', 0x1ce, 3),
            ('w', 0x1cf, 32),
            ('w', 0x1ce, 4),
            ('w', 0x1cf, 0x41),
            ('w', 0x1ce, 5),
            ('w', 0x1cf, 3),
        ],
    },
    Machine {
        name: "pc",
        options: &["-smp", "1,maxcpus=2"],
        devices: &[
            "cirrus-vga",
            "e1000",
            "rtl8139",
            "pcnet",
            "virtio-net-pci,romfile=",
            "virtio-balloon-pci",
            "ide-hd,drive=d0,bus=ide.0",
            "ide-cd,drive=cd,bus=ide.1",
            "piix3-usb-uhci,id=uhci",
            "usb-tablet,bus=uhci.0",
            "usb-ehci,id=ehci",
            "usb-storage,bus=ehci.0,drive=d1",
            "lsi53c895a,id=lsi",
            "scsi-hd,bus=lsi.0,drive=d2",
            "sb16,audiodev=none",
            "ipmi-bmc-sim,id=bmc",
            "isa-ipmi-kcs,bmc=bmc",
        ],
        ports: &[
            // A disk that was asked who it is, and a CD-ROM that waits for a packet.
            ('b', 0x1f6, 0xe0),
            ('b', 0x1f7, 0xec),
            ('b', 0x174, 0),
            ('b', 0x175, 8),
            ('b', 0x176, 0xa0),
            ('b', 0x177, 0xa0),
            // A floppy controller after a reset, in an answer.
            ('b', 0x3f2, 0),
            ('b', 0x3f2, 0xc),
            ('b', 0x3f5, 8),
            // Half an address of the DMA controller, half a count of the timer.
            ('b', 0x02, 0x12),
            ('b', 0x43, 0x34),
            ('b', 0x40, 0x12),
        ],
    },
    Machine {
        name: "q35,kernel-irqchip=split",
        options: &[],
        devices: &[
            "intel-iommu",
            "igb",
            "vmxnet3",
            "pvscsi",
            "am53c974",
            "intel-hda",
            "hda-duplex,audiodev=none",
            "uefi-vars-x64",
            "ipmi-bmc-sim,id=bmc",
            "isa-ipmi-bt,bmc=bmc",
        ],
        ports: &[],
    },
];

/// The guest of the lab, where it has been built.
pub fn guest() -> Option<PathBuf> {
    let built = std::env::var_os("OUTRIDER_GUEST").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/lab/guest"),
        PathBuf::from,
    );
    built.join("vmlinuz").exists().then_some(built)
}

/// The stream of the machine; nothing when there is no such QEMU.
pub fn record(qemu: &str, machine: &Machine, runs: Runs) -> Option<Vec<u8>> {
    let known = Command::new(qemu).args(["-device", "help"]).output().ok()?;
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(qemu);
    command.args(["-accel", "tcg", "-cpu", "qemu64", "-m", "128", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-machine", machine.name, "-qmp", "stdio"]).args(machine.options);
    command.args(["-audiodev", "none,id=none"]);
    for disk in (0..DISKS).map(|n| format!("d{n}")).chain(["cd,media=cdrom,readonly=on".into()]) {
        command.args(["-drive", &format!("if=none,driver=null-co,size=4M,read-zeroes=on,id={disk}")]);
    }
    for device in machine.devices {
        let model = device.split(',').next().unwrap();
        if known.contains(&format!("name \"{model}\"")) {
            command.args(["-device", device]);
        }
    }
    let ready = run(&mut command, runs, folder.path());
    let (mut vm, mut lines) = Vm::start(&mut command)?;
    if let Some((file, text)) = ready {
        vm.wait_for(&file, text);
    }
    if runs == Runs::Ports {
        vm.write_ports(machine.ports);
    }
    let stream = folder.path().join("stream");
    vm.migrate(&mut lines, &stream);
    Some(std::fs::read(stream).unwrap())
}

/// What shows that it runs: a text in a file.
fn run(command: &mut Command, runs: Runs, folder: &Path) -> Option<(PathBuf, &'static str)> {
    let (firmware, serial) = (folder.join("firmware"), folder.join("serial"));
    match runs {
        Runs::Nothing | Runs::Ports => {
            command.args(["-serial", "null", "-S"]);
            None
        }
        Runs::Firmware => {
            command.args(["-chardev", &format!("file,id=firmware,path={}", firmware.display())]);
            command.args(["-device", "isa-debugcon,iobase=0x402,chardev=firmware", "-serial", "null"]);
            Some((firmware, "Booting from"))
        }
        Runs::Guest => {
            let guest = guest()?;
            command.args(["-uuid", "00000000-0000-4000-8000-000000000001"]);
            command.arg("-serial").arg(format!("file:{}", serial.display()));
            command.arg("-kernel").arg(guest.join("vmlinuz")).arg("-initrd").arg(guest.join("initrd.gz"));
            command.args(["-append", "console=ttyS0 quiet no_timer_check panic=-1"]);
            Some((serial, "GUEST-UP"))
        }
    }
}

struct Vm {
    process: Child,
    to: ChildStdin,
}

type Lines = std::io::Lines<BufReader<std::process::ChildStdout>>;

impl Vm {
    fn start(command: &mut Command) -> Option<(Self, Lines)> {
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = pipes.spawn().ok()?;
        let mut to = process.stdin.take().unwrap();
        writeln!(to, r#"{{"execute":"qmp_capabilities"}}"#).unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Some((Self { process, to }, lines))
    }

    fn wait_for(&mut self, file: &Path, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} within two minutes");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn write_ports(&mut self, ports: &[(char, u16, u32)]) {
        for (width, port, value) in ports {
            let line = format!("o/{width} {port:#x} {value:#x}");
            let write =
                serde_json::json!({"execute": "human-monitor-command", "arguments": {"command-line": line}});
            writeln!(self.to, "{write}").unwrap();
        }
    }

    fn migrate(&mut self, lines: &mut Lines, stream: &Path) {
        let events = r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#;
        let uri = format!("exec:cat > {}", stream.display());
        let migrate = serde_json::json!({"execute": "migrate", "arguments": {"uri": uri}});
        // QEMU may have ended already; then the reason follows from its lines.
        let sent = writeln!(self.to, "{events}\n{migrate}");
        let is_end = |line: &String| {
            line.contains("\"completed\"") || line.contains("\"failed\"") || line.contains("\"error\"")
        };
        let end = lines.map_while(Result::ok).find(is_end);
        let completed = sent.is_ok() && end.as_ref().is_some_and(|line| line.contains("\"completed\""));
        if completed {
            writeln!(self.to, "{{\"execute\":\"quit\"}}").unwrap();
        } else {
            self.process.kill().unwrap();
        }
        lines.for_each(drop);
        self.process.wait().unwrap();
        let said = std::io::read_to_string(self.process.stderr.take().unwrap()).unwrap();
        assert!(completed, "QEMU could not record its stream: {end:?}: {said}");
    }
}
