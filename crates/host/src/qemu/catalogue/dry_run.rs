//! A dry run: the VM's own devices in a QEMU that never runs a guest and touches nothing of the host, migrated to us.
//!
//! It lives in a cgroup and a folder of its own whose names begin with [`PREFIX`]; both go when it is over, whatever
//! happened, and with the next start of the daemon if this one dies in between.

use crate::cgroup::Group;
use crate::channel::HypervisorListener;
use crate::daemon::lock;
use crate::error::HostError;
use crate::folders::{last_words, private_folder};
use crate::migration::source::fresh_nonce;
use crate::process::{Process, Spawn, end_text};
use crate::qemu::binary::Binary;
use crate::qemu::command::{Launch, Paths, Purpose, arguments, dump_arguments};
use crate::qmp::{Qmp, QmpError};
use crate::sweep;
use serde_json::{Value, json};
use std::fs::Permissions;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use types::Problem;
use types::vm::VmSpec;

/// How its cgroup and folder are named. No VM's slot begins so: those are hexadecimal.
pub(super) const PREFIX: &str = "dry-run-";
/// A dry run takes a tenth of a second on a machine that is not busy.
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// A recording is 0.5 to 2 MB; a graphics card adds its memory.
const STREAM_BYTES_MAX: usize = 64 << 20;
/// A dump of descriptions is 800 KB.
const DUMP_BYTES_MAX: usize = 16 << 20;
const POLL: Duration = Duration::from_millis(2);
/// QEMU answers its monitor within this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a dry run gives.
#[derive(Debug)]
pub(super) struct Recording {
    /// The whole stream.
    pub(super) stream: Vec<u8>,
    /// Descriptions of all devices of that QEMU and machine type, JSON.
    pub(super) dump: Arc<Vec<u8>>,
}

/// Why there is no recording.
#[derive(Debug, thiserror::Error)]
pub enum DryRunError {
    /// Nothing could be started.
    #[error("it cannot be started")]
    Start(#[source] HostError),
    /// QEMU ended before it was done.
    #[error("QEMU ended: {how}; {said}")]
    Ended {
        /// How.
        how: String,
        /// The last of what it printed.
        said: String,
    },
    /// The monitor failed.
    #[error("QEMU's monitor")]
    Monitor(#[source] QmpError),
    /// QEMU did not migrate.
    #[error("QEMU could not migrate: {0}")]
    Migrate(String),
    /// The stream or the dump can't be read.
    #[error("the {what} cannot be read")]
    Read {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// More than any machine writes.
    #[error("the {what} is longer than {limit_bytes} bytes")]
    TooLong {
        /// Which.
        what: &'static str,
        /// The limit.
        limit_bytes: usize,
    },
    /// It took too long.
    #[error("it was not over after {} s", TIME_LIMIT.as_secs())]
    Late,
}

impl From<Problem> for DryRunError {
    fn from(problem: Problem) -> Self {
        Self::Start(problem.into())
    }
}

/// What to run, and where.
#[derive(Debug, Clone, Copy)]
pub(super) struct DryRun<'a> {
    pub(super) binary: &'a Binary,
    pub(super) machine: &'a str,
    /// Reduced to what shapes devices.
    pub(super) spec: &'a VmSpec,
    pub(super) run_folder: &'a Path,
    pub(super) group: &'a Group,
    pub(super) user: Option<&'a str>,
}

/// What one dry run uses.
struct Place {
    folder: PathBuf,
    group: Group,
    /// Everything that was started in it: where no cgroup is mounted, nothing else would know.
    processes: Mutex<Vec<Process>>,
}

impl DryRun<'_> {
    /// Records the stream, and the dump unless it is known. Nothing is left of it, unless it is cancelled.
    pub(super) async fn record(&self, dump: Option<Arc<Vec<u8>>>) -> Result<Recording, DryRunError> {
        let (stream, dump) = self
            .in_place(async |place| {
                let dumped = async {
                    match dump {
                        Some(dump) => Ok(dump),
                        None => self.dump(place).await.map(Arc::new),
                    }
                };
                tokio::try_join!(self.stream(place), dumped)
            })
            .await?;
        Ok(Recording { stream, dump })
    }

    /// What its monitor answers to these commands, in their order. Nothing is left of it, unless it is cancelled.
    pub(super) async fn ask(&self, commands: &[(&str, Value)]) -> Result<Vec<Value>, DryRunError> {
        self.in_place(async |place| {
            let (process, paths) = self.hypervisor(place)?;
            let answers = async {
                let Ok(monitor) = answering(&process, &paths.monitor).await else {
                    return std::future::pending().await;
                };
                let mut answers = Vec::with_capacity(commands.len());
                for (command, arguments) in commands {
                    let answer = monitor.execute(command, arguments.clone()).await;
                    answers.push(answer.map_err(DryRunError::Monitor)?);
                }
                Ok(answers)
            };
            tokio::select! {
                biased;
                answers = answers => answers,
                how = end_of(&process) => Err(DryRunError::Ended { how, said: last_words(&paths.log) }),
            }
        })
        .await
    }

    /// In a folder and a cgroup of its own, which are gone afterwards with everything in them.
    async fn in_place<T>(
        &self,
        work: impl AsyncFnOnce(&Place) -> Result<T, DryRunError>,
    ) -> Result<T, DryRunError> {
        let nonce =
            fresh_nonce().map_err(|e| DryRunError::Start(HostError::system("no random numbers", e)))?;
        let name = format!("{PREFIX}{}", &nonce.to_string()[..12]);
        let place = Place {
            folder: self.run_folder.join(&name),
            group: self.group.child(&name),
            processes: Mutex::default(),
        };
        let work = async {
            self.open(&place).await?;
            work(&place).await
        };
        let worked = tokio::time::timeout(TIME_LIMIT, work).await;
        place.clear().await;
        worked.map_err(|_| DryRunError::Late)?
    }

    async fn open(&self, place: &Place) -> Result<(), DryRunError> {
        private_folder(&place.folder).and_then(|()| place.group.create()).map_err(DryRunError::Start)?;
        if let Some(user) = self.user {
            crate::folders::give(&place.folder, user).await?;
        }
        Ok(())
    }

    fn spawn(&self, place: &Place, arguments: Vec<String>, log: &Path) -> Result<Process, DryRunError> {
        let spawn = Spawn {
            program: &self.binary.path,
            arguments,
            environment: vec![],
            group: &place.group,
            user: self.user,
            input: std::process::Stdio::null(),
            log,
        };
        let process = spawn.start().map_err(DryRunError::Start)?;
        lock(&place.processes).push(process.clone());
        Ok(process)
    }

    async fn stream(&self, place: &Place) -> Result<Vec<u8>, DryRunError> {
        let paths = Paths::new(&place.folder);
        let listener = HypervisorListener::bind(&paths.stream)?;
        // The folder is private; in it, QEMU's user may connect.
        std::fs::set_permissions(&paths.stream, Permissions::from_mode(0o666))
            .map_err(|e| DryRunError::Start(HostError::file("cannot open to QEMU", &paths.stream, e)))?;
        let (process, _) = self.hypervisor(place)?;
        tokio::select! {
            biased;
            recorded = migrate(&process, &listener, &paths) => recorded,
            how = end_of(&process) => Err(DryRunError::Ended { how, said: last_words(&paths.log) }),
        }
    }

    /// The VM's own devices, in a QEMU that runs no guest.
    fn hypervisor(&self, place: &Place) -> Result<(Process, Paths), DryRunError> {
        let paths = Paths::new(&place.folder);
        let launch = Launch {
            spec: self.spec,
            machine: self.machine,
            folder: &place.folder,
            taps: &[],
            purpose: Purpose::DryRun,
            serial_log: false,
        };
        Ok((self.spawn(place, arguments(&launch), &paths.log)?, paths))
    }

    async fn dump(&self, place: &Place) -> Result<Vec<u8>, DryRunError> {
        let (file, log) = (place.folder.join("dump.json"), place.folder.join("dump.log"));
        let process = self.spawn(place, dump_arguments(self.machine, &file), &log)?;
        process.exited().await;
        if let Some(status) = process.ended().await.filter(|status| !status.success()) {
            return Err(DryRunError::Ended { how: end_text(status), said: last_words(&log) });
        }
        let what = "dump of descriptions";
        let mut dump = Vec::new();
        std::fs::File::open(&file)
            .and_then(|file| file.take(DUMP_BYTES_MAX as u64 + 1).read_to_end(&mut dump))
            .map_err(|source| DryRunError::Read { what, source })?;
        if dump.len() > DUMP_BYTES_MAX {
            return Err(DryRunError::TooLong { what, limit_bytes: DUMP_BYTES_MAX });
        }
        Ok(dump)
    }
}

impl Place {
    /// Nothing in it is worth a polite end.
    async fn clear(&self) {
        let started = std::mem::take(&mut *lock(&self.processes));
        for process in started.iter().filter(|process| process.is_alive()) {
            sweep::end_process(process).await;
        }
        let left = sweep::end_all(&self.group).await;
        if !left.is_empty() {
            tracing::error!(?left, cgroup = self.group.path(), "a dry run cannot be ended");
        }
        sweep::remove_folder(&self.folder);
        sweep::remove_group(&self.group).await;
    }
}

async fn end_of(process: &Process) -> String {
    process.exited().await;
    process.ended().await.map_or_else(|| "it is gone".to_owned(), end_text)
}

/// Has QEMU migrate to us, and takes everything.
async fn migrate(
    process: &Process,
    listener: &HypervisorListener,
    paths: &Paths,
) -> Result<Vec<u8>, DryRunError> {
    let Ok(monitor) = answering(process, &paths.monitor).await else { return std::future::pending().await };
    let uri = format!("unix:{}", paths.stream.display());
    let told = monitor.execute("migrate", json!({"uri": uri})).await;
    // A QEMU that died says more by how it ended.
    let gone = |error: QmpError| (!matches!(error, QmpError::Closed { .. })).then_some(error);
    if let Err(error) = told {
        return match gone(error) {
            Some(error) => Err(DryRunError::Monitor(error)),
            None => std::future::pending().await,
        };
    }
    let stream = read(listener.accept(process).await?).await?;
    match outcome(&monitor).await {
        Ok(None) => Ok(stream),
        Ok(Some(refusal)) => Err(DryRunError::Migrate(refusal)),
        Err(error) => match gone(error) {
            Some(error) => Err(DryRunError::Monitor(error)),
            None => std::future::pending().await,
        },
    }
}

/// The monitor, as soon as it answers; nothing once QEMU has ended.
async fn answering(process: &Process, monitor: &Path) -> Result<Qmp, ()> {
    while process.is_alive() {
        if monitor.exists()
            && let Ok((qmp, _)) = Qmp::connect(monitor, false, CONNECT_TIMEOUT).await
        {
            return Ok(qmp);
        }
        tokio::time::sleep(POLL).await;
    }
    Err(())
}

async fn read(socket: OwnedFd) -> Result<Vec<u8>, DryRunError> {
    let what = "stream";
    let failed = |source| DryRunError::Read { what, source };
    let socket = tokio::net::UnixStream::from_std(socket.into()).map_err(failed)?;
    let mut stream = Vec::new();
    socket.take(STREAM_BYTES_MAX as u64 + 1).read_to_end(&mut stream).await.map_err(failed)?;
    if stream.len() > STREAM_BYTES_MAX {
        return Err(DryRunError::TooLong { what, limit_bytes: STREAM_BYTES_MAX });
    }
    Ok(stream)
}

/// Waits until QEMU says how its migration ended; gives what went wrong.
async fn outcome(monitor: &Qmp) -> Result<Option<String>, QmpError> {
    loop {
        let now = monitor.execute("query-migrate", json!({})).await?;
        match now["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(None),
            status @ ("failed" | "cancelled") => {
                let reason = now["error-desc"].as_str().unwrap_or(status);
                return Ok(Some(reason.chars().take(400).collect()));
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}
