//! Records all channels of a migration of a QEMU on this machine into a listening socket of the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// Names the folder in whose `bin` and `share` an older QEMU is, 7.2.
const OLD_QEMU: &str = "OUTRIDER_OLD_QEMU";

/// A QEMU that may be here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qemu {
    Distribution,
    /// 7.2.
    Old,
}

impl Qemu {
    /// Its binary, where it is here.
    pub fn find(self) -> Option<PathBuf> {
        let binary = match self {
            Self::Distribution => PathBuf::from("qemu-system-x86_64"),
            Self::Old => old_folder()?.join("bin/qemu-system-x86_64"),
        };
        let mut run = Command::new(&binary);
        let run = run.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        matches!(run.status(), Ok(status) if status.success()).then_some(binary)
    }

    /// Why it may not be here.
    pub fn missing(self) -> String {
        match self {
            Self::Distribution => "no qemu-system-x86_64".to_owned(),
            Self::Old => format!("{OLD_QEMU} names no folder with an older QEMU"),
        }
    }

    fn command(self) -> Command {
        let mut command = Command::new(self.find().unwrap());
        if let (Self::Old, Some(folder)) = (self, old_folder()) {
            for firmware in ["share/qemu", "share/seabios", "lib/ipxe/qemu"] {
                command.arg("-L").arg(folder.join(firmware));
            }
        }
        command
    }
}

fn old_folder() -> Option<PathBuf> {
    std::env::var_os(OLD_QEMU).map(PathBuf::from)
}

/// What is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Never run: mostly zero pages.
    Fresh,
    /// The lab's guest, booted.
    Booted,
}

impl Guest {
    fn memory_mib(self) -> &'static str {
        match self {
            Self::Fresh => "64",
            // The least that its kernel unpacks itself in.
            Self::Booted => "128",
        }
    }

    /// The kernel and its initial file system, where the lab has built them.
    pub fn files() -> Option<[PathBuf; 2]> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/lab/guest");
        let files = ["vmlinuz", "initrd.gz"].map(|name| folder.join(name));
        files.iter().all(|file| file.exists()).then_some(files)
    }
}

/// All channels: the main one, and the others by arrival.
pub struct Recording {
    pub main: Vec<u8>,
    pub channels: Vec<Vec<u8>>,
}

pub fn record(qemu: Qemu, machine: &str, guest: Guest, compression: &str) -> Recording {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("to");
    let listener = UnixListener::bind(&socket).unwrap();
    let accepting = std::thread::spawn(move || accept(&listener, 3));
    let serial = folder.path().join("serial");
    let mut vm = Vm::start(qemu, machine, guest, &serial);
    if guest == Guest::Booted {
        await_boot(&serial);
    }
    vm.migrate(&socket, compression);
    let mut channels = accepting.join().unwrap();
    vm.quit();
    let main = channels.iter().position(|bytes| bytes.starts_with(b"QEVM")).unwrap();
    Recording { main: channels.swap_remove(main), channels }
}

fn accept(listener: &UnixListener, count: usize) -> Vec<Vec<u8>> {
    let readers: Vec<JoinHandle<Vec<u8>>> = (0..count)
        .map(|_| {
            let (mut stream, _) = listener.accept().unwrap();
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).unwrap();
                bytes
            })
        })
        .collect();
    readers.into_iter().map(|reader| reader.join().unwrap()).collect()
}

/// The guest's console says something once its kernel is up.
fn await_boot(serial: &Path) {
    let begin = Instant::now();
    while std::fs::metadata(serial).map_or(0, |file| file.len()) == 0 {
        assert!(begin.elapsed() < BOOT_LIMIT, "the guest did not boot");
        std::thread::sleep(Duration::from_millis(100));
    }
}

struct Vm {
    child: Child,
    to: ChildStdin,
    from: std::io::Lines<BufReader<ChildStdout>>,
}

impl Vm {
    fn start(qemu: Qemu, machine: &str, guest: Guest, serial: &Path) -> Self {
        let mut command = qemu.command();
        command.args([
            "-accel",
            "tcg",
            "-machine",
            machine,
            "-m",
            guest.memory_mib(),
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args(["-display", "none", "-qmp", "stdio"]);
        command.arg("-serial").arg(format!("file:{}", serial.display()));
        match (guest, Guest::files()) {
            (Guest::Booted, Some([kernel, initrd])) => {
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
                command.args(["-append", "console=ttyS0 init_on_free=1"]);
            }
            _ => _ = command.arg("-S"),
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut vm = Self { child, to, from: BufReader::new(from).lines() };
        vm.say(r#"{"execute":"qmp_capabilities"}"#);
        vm
    }

    fn say(&mut self, command: &str) {
        writeln!(self.to, "{command}").unwrap();
    }

    fn migrate(&mut self, socket: &Path, compression: &str) {
        self.say(
            r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true},{"capability":"multifd","state":true}]}}"#,
        );
        self.say(&format!(
            r#"{{"execute":"migrate-set-parameters","arguments":{{"multifd-channels":2,"multifd-compression":"{compression}","max-bandwidth":4000000000,"downtime-limit":2000}}}}"#
        ));
        self.say(&format!(r#"{{"execute":"migrate","arguments":{{"uri":"unix:{}"}}}}"#, socket.display()));
        let ended = self.from.by_ref().map_while(Result::ok).find(|line| {
            line.contains("\"error\"")
                || line.contains("\"MIGRATION\"") && (line.contains("completed") || line.contains("failed"))
        });
        assert!(ended.as_ref().is_some_and(|line| line.contains("completed")), "{ended:?}");
    }

    /// The recording is complete: a QEMU that has ended by itself is as good.
    fn quit(mut self) {
        writeln!(self.to, r#"{{"execute":"quit"}}"#).unwrap_or_default();
        self.from.by_ref().for_each(drop);
        self.child.wait().unwrap();
    }
}
