//! Plain QEMU processes on lab hosts: what the baselines and the split-brain demonstrations are made of.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use uuid::Uuid;

use crate::guest::{GuestImage, GuestLoad};
use crate::net::{GUEST_MAC, Node};
use crate::process;
use crate::qmp::Qmp;

/// Boot to the daemon takes 4 s on a quiet machine; a loaded one must not fail a test.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const TAP: &str = "tap0";

/// How a VM is started.
#[derive(Debug, Clone)]
pub struct VmOptions {
    /// Name, also of its files.
    pub name: String,
    /// UUID; source and target of a migration share it.
    pub uuid: Uuid,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// What the guest does.
    pub load: GuestLoad,
    /// Starts waiting for a migration.
    pub incoming: bool,
    /// Starts paused (`-S`).
    pub paused: bool,
    /// A raw disk, opened with QEMU's default image locking.
    pub disk: Option<PathBuf>,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
}

impl VmOptions {
    /// A 256 MiB guest with a new UUID.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uuid: Uuid::new_v4(),
            memory_mib: 256,
            load: GuestLoad::default(),
            incoming: false,
            paused: false,
            disk: None,
            extra: Vec::new(),
        }
    }

    /// The target's side of a migration of this VM.
    #[must_use]
    pub fn target(&self) -> Self {
        Self { incoming: true, ..self.clone() }
    }
}

/// A running QEMU. Dropping it kills the process.
#[derive(Debug)]
pub struct Vm {
    /// The monitor.
    pub qmp: Qmp,
    child: Child,
    node: Node,
    folder: PathBuf,
}

impl Vm {
    /// Starts QEMU inside the machine and connects to its monitor.
    pub fn start(node: &Node, image: &GuestImage, options: &VmOptions) -> Result<Self> {
        let folder = node.folder()?.join(&options.name);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        node.add_tap(TAP)?;
        let arguments = arguments(&folder, image, options);
        let mut child = node.spawn(&options.name, "qemu-system-x86_64", &arguments)?;
        match Qmp::connect(&folder.join("qmp")) {
            Ok(qmp) => Ok(Self { qmp, child, node: node.clone(), folder }),
            Err(error) => {
                end(&mut child, node);
                let log = node.folder()?.join(format!("{}.log", options.name));
                let said = fs::read_to_string(log).unwrap_or_default();
                Err(error.context(format!("QEMU says: {}", said.trim())))
            }
        }
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// Waits until the guest daemon serves.
    pub fn wait_ready(&mut self) -> Result<()> {
        let serial = self.folder.join("serial");
        let child = &mut self.child;
        process::wait_for("the guest to serve", BOOT_LIMIT, || {
            ensure!(child.try_wait()?.is_none(), "QEMU has ended");
            let text = fs::read(&serial).unwrap_or_default();
            Ok(String::from_utf8_lossy(&text).contains("GUEST-READY").then_some(()))
        })
        .with_context(|| format!("the guest's console says: {}", self.console()))
    }

    /// The last lines of the guest's console.
    #[must_use]
    pub fn console(&self) -> String {
        let text = fs::read(self.folder.join("serial")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let start = text.char_indices().rev().nth(600).map_or(0, |(index, _)| index);
        text[start..].trim().to_owned()
    }

    /// A path for a socket in the VM's folder.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Listens for a migration at `uri`.
    pub fn listen(&mut self, uri: &str) -> Result<()> {
        self.qmp.execute("migrate-incoming", json!({"uri": uri}))?;
        Ok(())
    }

    /// Switches migration capabilities on.
    pub fn enable(&mut self, capabilities: &[&str]) -> Result<()> {
        let list: Vec<_> =
            capabilities.iter().map(|name| json!({"capability": name, "state": true})).collect();
        self.qmp.execute("migrate-set-capabilities", json!({"capabilities": list}))?;
        Ok(())
    }

    /// Waits until `query-migrate` says one of these words.
    pub fn wait_migration(&mut self, words: &[&str], limit: Duration) -> Result<String> {
        let qmp = &mut self.qmp;
        process::wait_for(&format!("a migration that is {words:?}"), limit, || {
            let status = qmp.migration_status()?;
            Ok(words.contains(&status.as_str()).then_some(status))
        })
    }

    /// CPU time of the whole process, in milliseconds.
    #[must_use]
    pub fn cpu_ms(&self) -> u64 {
        process::cpu_ms(self.pid()).unwrap_or(0)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        end(&mut self.child, &self.node);
    }
}

fn end(child: &mut Child, node: &Node) {
    // These fail only for a child that has already been waited for, and a network that is already gone.
    let _ended = child.kill();
    let _reaped = child.wait();
    let _removed = node.remove_tap(TAP);
}

fn arguments(folder: &Path, image: &GuestImage, options: &VmOptions) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    let memory = options.memory_mib;
    let mut words: Vec<String> = vec![
        "-name".to_owned(),
        format!("{},debug-threads=on", options.name),
        "-uuid".to_owned(),
        options.uuid.to_string(),
    ];
    let pairs = [
        ("-accel", "tcg".to_owned()),
        ("-M", "q35,memory-backend=pc.ram".to_owned()),
        ("-object", format!("memory-backend-ram,id=pc.ram,size={memory}M")),
        ("-m", memory.to_string()),
        ("-cpu", "qemu64".to_owned()),
        ("-smp", "1".to_owned()),
        ("-kernel", image.kernel.display().to_string()),
        ("-initrd", image.initrd.display().to_string()),
        ("-append", options.load.command_line()),
        ("-display", "none".to_owned()),
        ("-serial", format!("file:{}", file("serial"))),
        ("-qmp", format!("unix:{},server=on,wait=off", file("qmp"))),
        ("-netdev", format!("tap,id=n0,ifname={TAP},script=no,downscript=no")),
        ("-device", format!("virtio-net-pci,netdev=n0,mac={GUEST_MAC},romfile=")),
    ];
    words.extend(pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    words.extend(["-nodefaults".to_owned(), "-no-reboot".to_owned()]);
    if let Some(disk) = &options.disk {
        words.push("-drive".to_owned());
        words.push(format!("if=virtio,format=raw,cache=none,file={}", disk.display()));
    }
    if options.incoming {
        words.extend(["-incoming".to_owned(), "defer".to_owned()]);
    }
    if options.paused {
        words.push("-S".to_owned());
    }
    words.extend(options.extra.iter().cloned());
    words
}
