//! Stops a whole QEMU process so that it can't resume its guest by itself, and proves that it is stopped.
//!
//! Three ways, best first: the version 2 freezer (dies frozen when killed), the version 1 freezer (a kill stays
//! pending until the thaw, so [`Freezer::kill`] thaws after it; the signal is delivered before any guest
//! instruction), and SIGSTOP (needs QEMU in its own session, which `process` sees to).
//!
//! Rooms: only the shell of the hand-over and the life cycle of VMs may call this.

use crate::cgroup::Group;
use crate::error::HostError;
use crate::process::{Process, stat_field};
use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A freeze takes well under a millisecond; the source's agent gives up a second after the end of the stream.
const CONFIRM_TIMEOUT_MS: u64 = 500;
/// Looks without a pause at first: most freezes are done by then, and the runtime's timers round up to a millisecond.
const CONFIRM_LOOKS_AT_ONCE: u32 = 100;
/// Pause between two looks while a freeze is confirmed: it counts as downtime.
const CONFIRM_PAUSE_US: u64 = 200;

/// How a process is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezerKind {
    /// `cgroup.freeze`.
    V2,
    /// `freezer.state`.
    V1,
    /// SIGSTOP.
    Signal,
}

/// Stops and continues one process.
#[derive(Debug, Clone)]
pub struct Freezer {
    way: Way,
    process: Process,
}

#[derive(Debug, Clone)]
enum Way {
    V2(PathBuf),
    V1(PathBuf),
    Signal,
}

impl FreezerKind {
    /// The best way for processes in `group`, which exists.
    #[must_use]
    pub fn best(group: &Group) -> Self {
        if group.v2().is_some_and(|f| f.join("cgroup.freeze").exists()) {
            Self::V2
        } else if group.v1("freezer").is_some_and(|f| f.join("freezer.state").exists()) {
            Self::V1
        } else {
            Self::Signal
        }
    }

    /// For people.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V2 => "cgroup-v2",
            Self::V1 => "cgroup-v1",
            Self::Signal => "sigstop",
        }
    }
}

impl Freezer {
    /// For a process that lives alone in `group`.
    #[must_use]
    pub fn new(kind: FreezerKind, group: &Group, process: Process) -> Self {
        let way = match kind {
            FreezerKind::V2 => group.v2().map(Way::V2),
            FreezerKind::V1 => group.v1("freezer").map(Way::V1),
            FreezerKind::Signal => None,
        };
        Self { way: way.unwrap_or(Way::Signal), process }
    }

    /// Which way it has.
    #[must_use]
    pub fn kind(&self) -> FreezerKind {
        match self.way {
            Way::V2(_) => FreezerKind::V2,
            Way::V1(_) => FreezerKind::V1,
            Way::Signal => FreezerKind::Signal,
        }
    }

    /// Freezes and confirms: when this returns `Ok`, no task of the process runs.
    ///
    /// # Errors
    /// It could not be confirmed in time; the process may be half frozen: thaw it.
    pub async fn freeze(&self) -> Result<(), HostError> {
        let deadline = Instant::now() + Duration::from_millis(CONFIRM_TIMEOUT_MS);
        self.ask_freeze()?;
        let mut looks = 0;
        while !self.is_frozen() {
            if Instant::now() >= deadline || !self.process.is_alive() {
                return Err(HostError::system(
                    format!("process {} did not freeze ({})", self.process.id().pid, self.kind().as_str()),
                    std::io::ErrorKind::TimedOut,
                ));
            }
            looks += 1;
            if looks < CONFIRM_LOOKS_AT_ONCE {
                tokio::task::yield_now().await;
                continue;
            }
            sleep(Duration::from_micros(CONFIRM_PAUSE_US)).await;
            if let Way::V1(folder) = &self.way {
                // Version 1 can hang in FREEZING; asking again is its documented cure.
                write(&folder.join("freezer.state"), "FROZEN")?;
            }
        }
        Ok(())
    }

    fn ask_freeze(&self) -> Result<(), HostError> {
        match &self.way {
            Way::V2(folder) => write(&folder.join("cgroup.freeze"), "1"),
            Way::V1(folder) => write(&folder.join("freezer.state"), "FROZEN"),
            Way::Signal => self.process.signal(Signal::STOP),
        }
    }

    /// Whether the kernel says that every task of the process is stopped.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        let pid = self.process.id().pid;
        match &self.way {
            // An empty group reports "frozen" too: the process must be in it.
            Way::V2(folder) => {
                holds(folder, pid) && read(&folder.join("cgroup.events")).lines().any(|l| l == "frozen 1")
            }
            Way::V1(folder) => holds(folder, pid) && read(&folder.join("freezer.state")).trim() == "FROZEN",
            Way::Signal => every_task_stopped(pid),
        }
    }

    /// Lets it run again.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn thaw(&self) -> Result<(), HostError> {
        match &self.way {
            Way::V2(folder) => write(&folder.join("cgroup.freeze"), "0")?,
            Way::V1(folder) => write(&folder.join("freezer.state"), "THAWED")?,
            Way::Signal => self.process.signal(Signal::CONT)?,
        }
        let deadline = Instant::now() + Duration::from_millis(CONFIRM_TIMEOUT_MS);
        while self.is_frozen() && self.process.is_alive() {
            if Instant::now() >= deadline {
                return Err(HostError::system(
                    format!("process {} did not thaw", self.process.id().pid),
                    std::io::ErrorKind::TimedOut,
                ));
            }
            sleep(Duration::from_micros(CONFIRM_PAUSE_US)).await;
        }
        Ok(())
    }

    /// Kills it, frozen or not, and waits until it is gone. The guest executes nothing more.
    ///
    /// # Errors
    /// The kernel refused, or it is not gone in time.
    pub async fn kill(&self) -> Result<(), HostError> {
        self.process.signal(Signal::KILL)?;
        if let Way::V1(folder) = &self.way
            && folder.exists()
        {
            // SIGKILL is pending now: the thaw delivers it before anything else of the process runs.
            write(&folder.join("freezer.state"), "THAWED")?;
        }
        let gone = tokio::time::timeout(KILL_TIMEOUT, self.process.exited()).await;
        gone.map_err(|_| {
            HostError::system(
                format!("process {} did not end", self.process.id().pid),
                std::io::ErrorKind::TimedOut,
            )
        })
    }
}

/// Freeing a large guest's memory takes a while.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

fn holds(folder: &Path, pid: u32) -> bool {
    read(&folder.join("cgroup.procs")).lines().any(|l| l.parse() == Ok(pid))
}

fn every_task_stopped(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut any = false;
    for task in tasks {
        let Ok(task) = task else { return false };
        let stat = read(&task.path().join("stat"));
        any = true;
        // A task that has just ended has no stat any more; then look again.
        if !matches!(stat_field(&stat, 3), Some("T" | "t")) {
            return false;
        }
    }
    any
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn write(path: &Path, text: &str) -> Result<(), HostError> {
    fs::write(path, text).map_err(|e| HostError::file("cannot write", path, e))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cgroup::Hierarchies;
    use crate::process::Spawn;

    fn cpu_ticks(pid: u32) -> u64 {
        let stat = read(&PathBuf::from(format!("/proc/{pid}/stat")));
        stat_field(&stat, 14).and_then(|f| f.parse().ok()).unwrap_or(0)
    }

    /// A busy process is frozen, proven to be, thawed, and killed while frozen.
    async fn check(kind: FreezerKind) {
        let folder = tempfile::tempdir().unwrap();
        let group = Hierarchies::detect().group(&format!(
            "outrider-test-freezer/{}-{}",
            kind.as_str(),
            std::process::id()
        ));
        group.create().unwrap();
        let process = Spawn {
            program: Path::new("/bin/sh"),
            arguments: vec!["-c".into(), "while :; do :; done".into()],
            environment: vec![],
            group: &group,
            user: None,
            input: std::process::Stdio::null(),
            log: &folder.path().join("log"),
        }
        .start()
        .unwrap();
        let freezer = Freezer::new(kind, &group, process.clone());
        assert_eq!(freezer.kind(), kind, "the hierarchy is mounted here");
        let pid = process.id().pid;
        while cpu_ticks(pid) < 2 {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(!freezer.is_frozen());
        freezer.freeze().await.unwrap();
        let before = cpu_ticks(pid);
        sleep(Duration::from_millis(60)).await;
        assert_eq!(cpu_ticks(pid), before, "a frozen process uses no CPU");
        assert!(freezer.is_frozen() && process.is_alive());
        freezer.thaw().await.unwrap();
        while cpu_ticks(pid) == before {
            sleep(Duration::from_millis(1)).await;
        }
        freezer.freeze().await.unwrap();
        freezer.kill().await.unwrap();
        assert!(!process.is_alive());
        assert!(!freezer.is_frozen(), "a process that is gone is not frozen");
        while group.remove().is_err() {
            sleep(Duration::from_millis(1)).await;
        }
        group.parent().remove().ok();
    }

    #[tokio::test]
    async fn version_2_freezes_thaws_and_kills() {
        if Hierarchies::detect().group("x").v2().is_none() {
            eprintln!("SKIPPED: cgroup v2 is not mounted");
            return;
        }
        check(FreezerKind::V2).await;
    }

    #[tokio::test]
    async fn version_1_freezes_thaws_and_kills() {
        if Hierarchies::detect().group("x").v1("freezer").is_none() {
            eprintln!("SKIPPED: the cgroup v1 freezer is not mounted");
            return;
        }
        check(FreezerKind::V1).await;
    }

    #[tokio::test]
    async fn a_signal_freezes_thaws_and_kills() {
        check(FreezerKind::Signal).await;
    }
}
