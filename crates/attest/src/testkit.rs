//! A real software TPM for tests, of this room and of others (feature `testkit`).
//!
//! ```no_run
//! let swtpm = attest::testkit::Swtpm::start()?;
//! let mut tpm = swtpm.tpm()?;
//! let ak = tpm.create_ak()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! The process ends with its value, also when a test panics. Its state lies in a private folder that goes
//! with it.

mod firmware;
mod forge;

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub use firmware::{FirmwareLog, digest};
pub use forge::{Forge, KeyShape};

use crate::tpm::{Address, Options, Tpm, TpmFault};

/// The program.
const PROGRAM: &str = "swtpm";
/// A slow machine under load starts it within that.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at whether it has started.
const LOOK: Duration = Duration::from_millis(10);
/// How often another pair of ports is tried, when somebody else was faster.
const PORT_TRIES: usize = 10;

/// What a test lacks to run a swtpm, for a test that must say why it does nothing.
#[must_use]
pub fn missing() -> Option<String> {
    let ran = Command::new(PROGRAM).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match ran {
        Ok(status) if status.success() => None,
        _ => Some(format!("{PROGRAM} is not installed (Debian: swtpm)")),
    }
}

/// A running swtpm.
#[derive(Debug)]
pub struct Swtpm {
    folder: TempDir,
    process: Option<Child>,
    address: Address,
}

impl Swtpm {
    /// Starts a new TPM behind a UNIX socket.
    ///
    /// # Errors
    /// It does not start.
    pub fn start() -> io::Result<Self> {
        Self::with_state(|_| Ok(()))
    }

    /// The same, after `prepare` had its hands on the folder of the TPM's state.
    ///
    /// # Errors
    /// As [`Self::start`], or what `prepare` says.
    pub fn with_state(prepare: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join("state"))?;
        prepare(&folder.path().join("state"))?;
        let address = Address::Unix(folder.path().join("data"));
        let mut swtpm = Self { folder, process: None, address };
        swtpm.power_on()?;
        Ok(swtpm)
    }

    /// Starts a new TPM behind a TCP port of the loopback device, which is what `tpm2-tools` can reach.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_tcp() -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::create_dir(folder.path().join("state"))?;
        let mut swtpm =
            Self { folder, process: None, address: Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))) };
        let mut outcome = Ok(());
        for _ in 0..PORT_TRIES {
            swtpm.address = Address::Tcp(free_pair()?);
            outcome = swtpm.power_on();
            if outcome.is_ok() {
                break;
            }
        }
        outcome.map(|()| swtpm)
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What the tools of `tpm2-tools` take as `TPM2TOOLS_TCTI`; nothing behind a UNIX socket.
    #[must_use]
    pub fn tcti(&self) -> Option<String> {
        match self.address {
            Address::Tcp(address) => Some(format!("swtpm:host={},port={}", address.ip(), address.port())),
            _ => None,
        }
    }

    /// A folder of the test's own, which goes with the TPM.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A new connection. A swtpm serves one at a time.
    ///
    /// # Errors
    /// [`TpmFault::Transport`].
    pub fn tpm(&self) -> Result<Tpm, TpmFault> {
        Tpm::open(&self.address, Options::default())
    }

    /// The number of the process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Cuts the power: the process is killed in whatever it does.
    pub fn power_off(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself; it is gone either way.
            drop(process.kill());
            drop(process.wait());
        }
    }

    /// Starts it again with the state that is there: a TPM reset, as at a boot.
    ///
    /// # Errors
    /// It does not start.
    pub fn power_on(&mut self) -> io::Result<()> {
        self.power_off();
        let errors = self.folder.path().join("errors");
        self.process = Some(self.spawn(&errors)?);
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if self.tpm().is_ok_and(|mut tpm| tpm.read_clock().is_ok()) {
                return Ok(());
            }
            let ended = self.process.as_mut().map(Child::try_wait).transpose()?.flatten();
            if ended.is_some() || Instant::now() > deadline {
                self.power_off();
                let errors = fs::read_to_string(&errors).unwrap_or_default();
                return Err(io::Error::other(format!("{PROGRAM} does not start: {errors}")));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Keeps a copy of the state as it is on disk.
    ///
    /// # Errors
    /// Of the file system.
    pub fn copy_state(&self, to: &Path) -> io::Result<()> {
        copy_files(&self.folder.path().join("state"), to)
    }

    /// Puts a copy of the state back, as an attacker who wants the counters back would; the TPM must be off.
    ///
    /// # Errors
    /// Of the file system.
    pub fn put_state_back(&self, from: &Path) -> io::Result<()> {
        copy_files(from, &self.folder.path().join("state"))
    }

    fn spawn(&self, errors: &Path) -> io::Result<Child> {
        let state = self.folder.path().join("state");
        let mut swtpm = Command::new(PROGRAM);
        swtpm.args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate"]);
        // An absolute folder: a relative one silently gives a TPM in failure mode.
        swtpm.arg(format!("dir={},mode=0600", state.display()));
        match &self.address {
            Address::Tcp(address) => {
                let control = address.port().saturating_add(1);
                swtpm.arg("--server").arg(format!("type=tcp,port={}", address.port()));
                swtpm.arg("--ctrl").arg(format!("type=tcp,port={control}"));
            }
            Address::Unix(path) | Address::Device(path) => {
                swtpm.arg("--server").arg(format!("type=unixio,path={},mode=0600", path.display()));
            }
        }
        swtpm.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(errors)?).spawn()
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.power_off();
    }
}

/// Two neighbouring ports that are free now, of which this is the first: where `tpm2-tools` look for a
/// swtpm's two channels.
fn free_pair() -> io::Result<SocketAddr> {
    for _ in 0..100 {
        let first = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = first.local_addr()?;
        let next = address.port().checked_add(1);
        if next.is_some_and(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            return Ok(address);
        }
    }
    Err(io::Error::other("no two neighbouring TCP ports are free"))
}

fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
