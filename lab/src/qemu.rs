//! The QEMUs that the lab knows: which versions, where they are, and processes of them.
//!
//! A process takes its migration stream and its monitor over sockets that are its standard input and output, so no
//! socket file has to be waited for or removed.

use std::env;
use std::fs::{self, File};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::target_folder;
use crate::process;
use crate::qmp::Qmp;

const NAME: &str = "qemu-system-x86_64";
/// Where `cargo xtask setup` unpacks the older QEMU, below the lab's folder.
const OLDER_FOLDER: &str = "qemu72";
/// Folders below `usr` that an unpacked QEMU has to be told of.
const DATA_FOLDERS: [&str; 3] = ["share/qemu", "share/seabios", "lib/ipxe/qemu"];

/// A version of QEMU that streams are checked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 7.2, unpacked beside the installed one.
    V72,
    /// 10.0, installed.
    V10,
}

/// How a QEMU is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Arguments that come before all others.
    pub arguments: Vec<String>,
}

impl serde::Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl Version {
    /// Every version, oldest first.
    pub const ALL: [Self; 2] = [Self::V72, Self::V10];

    /// As QEMU writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V72 => "7.2",
            Self::V10 => "10.0",
        }
    }

    /// Finds the program and asks it for its version; the error says why it can't be used.
    pub fn program(self) -> Result<Program> {
        let program = match self {
            Self::V72 => unpacked(&target_folder()?.join("lab").join(OLDER_FOLDER))?,
            Self::V10 => Program { path: in_path()?, arguments: Vec::new() },
        };
        let said = process::run(Command::new(&program.path).arg("--version"))
            .with_context(|| format!("QEMU {} does not start", self.name()))?;
        let said = said.lines().next().unwrap_or_default();
        let expected = format!("version {}.", self.name());
        ensure!(said.contains(&expected), "{} is no QEMU {}: {said}", program.path.display(), self.name());
        Ok(program)
    }

    /// Why this version can't be used; `None` when it can.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        self.program().err().map(|error| format!("{error:#}"))
    }
}

fn unpacked(folder: &Path) -> Result<Program> {
    let place = folder.display();
    ensure!(
        folder.join(".complete").is_file(),
        "QEMU {} is missing: nothing complete in {place} (run `cargo xtask setup`)",
        Version::V72.name()
    );
    let usr = folder.join("usr");
    let data = |name: &str| ["-L".to_owned(), usr.join(name).display().to_string()];
    Ok(Program {
        path: usr.join("bin").join(NAME),
        arguments: DATA_FOLDERS.into_iter().flat_map(data).collect(),
    })
}

fn in_path() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(NAME)).find(|file| file.is_file());
    found.with_context(|| format!("the program {NAME} is missing (run `cargo xtask setup`)"))
}

/// A QEMU process. Dropping it kills the process; so does the end of the thread that started it, however it ends.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    errors: PathBuf,
    monitor: Option<UnixStream>,
    stream: UnixStream,
}

impl Qemu {
    /// Starts it with these arguments, and what it says in the file `errors`. Its descriptor 0 is the other end of
    /// [`Qemu::stream`] (`-incoming fd:0`), its descriptor 1 the monitor's.
    pub fn start(program: &Program, arguments: &[String], errors: &Path) -> Result<Self> {
        let (stream, for_input) = UnixStream::pair().context("making a socket pair")?;
        let (monitor, for_output) = UnixStream::pair().context("making a socket pair")?;
        let log = File::create(errors).with_context(|| format!("making {}", errors.display()))?;
        // QEMU must not outlive a lab that is killed, and Ctrl-C at the terminal is for the lab alone.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&program.path).args(&program.arguments);
        command.args(arguments).args(["-chardev", "socket,id=monitor,fd=1"]);
        command.args(["-mon", "chardev=monitor,mode=control"]).process_group(0);
        command.stdin(OwnedFd::from(for_input)).stdout(OwnedFd::from(for_output)).stderr(Stdio::from(log));
        let child = command.spawn().with_context(|| format!("starting {}", program.path.display()))?;
        Ok(Self { child, errors: errors.to_owned(), monitor: Some(monitor), stream })
    }

    /// Negotiates with the monitor; the error holds what QEMU said.
    pub fn monitor(&mut self) -> Result<Qmp> {
        let Some(monitor) = self.monitor.take() else { bail!("the monitor was already taken") };
        Qmp::over(monitor).with_context(|| format!("QEMU says: {}", self.said()))
    }

    /// The lab's end of descriptor 0.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What it has written to its error output.
    #[must_use]
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.errors).unwrap_or_default()).trim().to_owned()
    }

    /// Waits for its end.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let child = &mut self.child;
        process::wait_for("QEMU's end", limit, || child.try_wait().context("asking for QEMU's end"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _closed = self.stream.shutdown(Shutdown::Both);
        // These fail only for a child that has already been waited for.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_unpacked_qemu_needs_its_mark_and_is_told_of_its_data() {
        let folder = tempfile::tempdir().unwrap();
        let missing = unpacked(folder.path()).unwrap_err().to_string();
        assert!(missing.contains("QEMU 7.2 is missing") && missing.contains("setup"), "{missing}");
        fs::write(folder.path().join(".complete"), "").unwrap();
        let program = unpacked(folder.path()).unwrap();
        assert_eq!(program.path, folder.path().join("usr/bin/qemu-system-x86_64"));
        assert_eq!(program.arguments.len(), 6);
        assert_eq!(program.arguments[0], "-L");
    }

    #[test]
    fn a_process_answers_on_its_monitor_and_ends_when_dropped() {
        let program = match Version::V10.program() {
            Ok(program) => program,
            Err(error) => {
                assert!(crate::require::skip(Some(format!("{error:#}"))));
                return;
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let arguments = ["-M", "none", "-nodefaults", "-display", "none", "-S"].map(str::to_owned);
        let mut qemu = Qemu::start(&program, &arguments, &folder.path().join("errors")).unwrap();
        let pid = i32::try_from(qemu.child.id()).unwrap();
        assert_eq!(qemu.monitor().unwrap().status().unwrap(), "prelaunch");
        drop(qemu);
        assert!(!process::is_alive(pid));
    }
}
