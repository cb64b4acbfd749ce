//! Processes that the daemon starts and finds again: identity, pid descriptor, spawning into a group.
//!
//! A pid alone is never trusted: pids are reused. A process is (pid, start time, boot id), and every signal goes
//! through a pid descriptor that was checked against all three after it was opened.

use crate::cgroup::Group;
use crate::error::HostError;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use tokio::io::unix::AsyncFd;

/// Names one process for ever on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessId {
    /// Its pid.
    pub pid: u32,
    /// Its start, in clock ticks since boot.
    pub start_ticks: u64,
    /// The boot in which it lived.
    pub boot_id: String,
}

/// A process held by a descriptor: it can't be mistaken for another.
#[derive(Debug, Clone)]
pub struct Process {
    id: ProcessId,
    descriptor: Arc<AsyncFd<OwnedFd>>,
    /// Only of a child of this daemon.
    status: Option<tokio::sync::watch::Receiver<Option<ExitStatus>>>,
}

/// What to start, and how.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Variables besides PATH.
    pub environment: Vec<(&'static str, String)>,
    /// The group that it joins before it executes.
    pub group: &'a Group,
    /// Another user to run as.
    pub user: Option<&'a str>,
    /// Standard input: null, or the socket of an agent.
    pub input: Stdio,
    /// File for what it prints.
    pub log: &'a Path,
}

/// Joins the groups, leaves the daemon's session, then becomes the program: same pid throughout. The daemon itself
/// can't run code between fork and exec without `unsafe`, so a shell does.
const WRAPPER: &str = r#"n=$1; shift
while [ "$n" -gt 0 ]; do echo $$ >"$1" || exit 126; shift; n=$((n-1)); done
exec setsid "$@""#;

/// The current boot.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl ProcessId {
    /// The identity of a live process.
    ///
    /// # Errors
    /// It does not exist.
    pub fn of(pid: u32) -> Result<Self, HostError> {
        let path = format!("/proc/{pid}/stat");
        let stat =
            fs::read_to_string(&path).map_err(|e| HostError::file("cannot read", Path::new(&path), e))?;
        let start_ticks = stat_field(&stat, 22).and_then(|f| f.parse().ok()).ok_or_else(|| {
            HostError::system(format!("cannot read start time of {pid}"), std::io::ErrorKind::InvalidData)
        })?;
        Ok(Self { pid, start_ticks, boot_id: boot_id() })
    }
}

/// A field of /proc/PID/stat by its number in proc(5); the name in parentheses may hold anything.
pub(crate) fn stat_field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(") ")?.1.split(' ').nth(number.checked_sub(3)?)
}

/// Hands a descriptor to the runtime's poller.
///
/// tokio 1.54 deprecates the safe constructor because a type could lie about its descriptor; an [`OwnedFd`] that is
/// never taken out cannot, and the replacement is `unsafe`, which this room forbids.
#[allow(deprecated)]
pub(crate) fn watch(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(descriptor)
}

impl Process {
    /// Holds the process with this identity, if it still lives.
    ///
    /// # Errors
    /// System calls that failed for another reason than its absence.
    pub fn adopt(id: &ProcessId) -> Result<Option<Self>, HostError> {
        Ok(Self::hold(id)?.filter(Self::is_alive))
    }

    /// The same, also of one that has ended and was not reaped yet.
    fn hold(id: &ProcessId) -> Result<Option<Self>, HostError> {
        if id.boot_id != boot_id() {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(id.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let descriptor = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(HostError::system(format!("cannot hold process {}", id.pid), e)),
        };
        // The descriptor is open: from here on the pid can't be reused under us.
        match ProcessId::of(id.pid) {
            Ok(now) if now == *id => {}
            _ => return Ok(None),
        }
        let descriptor =
            watch(descriptor).map_err(|e| HostError::system("cannot watch a pid descriptor", e))?;
        Ok(Some(Self { id: id.clone(), descriptor: Arc::new(descriptor), status: None }))
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Whether it has not ended yet.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut polled =
            [rustix::event::PollFd::new(self.descriptor.get_ref(), rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        !matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(n) if n > 0)
    }

    /// Sends a signal. A process that is gone already is fine.
    ///
    /// # Errors
    /// It may not be signalled.
    pub fn signal(&self, signal: Signal) -> Result<(), HostError> {
        match rustix::process::pidfd_send_signal(self.descriptor.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(HostError::system(format!("cannot signal process {}", self.id.pid), e)),
        }
    }

    /// Waits until it has ended.
    pub async fn exited(&self) {
        while self.is_alive() {
            match self.descriptor.readable().await {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return,
            }
        }
    }

    /// How it ended, once it has; nothing of one that this daemon did not start.
    pub async fn ended(&self) -> Option<ExitStatus> {
        let mut status = self.status.clone()?;
        let seen = status.wait_for(Option::is_some).await.ok()?;
        *seen
    }
}

/// How a process ended, in words.
#[must_use]
pub fn end_text(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(101), _) => "it panicked (exit code 101)".to_owned(),
        (Some(code), _) => format!("it ended with exit code {code}"),
        (None, Some(number)) => match signal_name(number) {
            Some(name) => format!("it was killed by signal {number} ({name})"),
            None => format!("it was killed by signal {number}"),
        },
        (None, None) => "it ended".to_owned(),
    }
}

/// Those that tell something.
const fn signal_name(number: i32) -> Option<&'static str> {
    Some(match number {
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        31 => "SIGSYS, by its sandbox",
        _ => return None,
    })
}

impl Spawn<'_> {
    /// Starts it. It is reaped when it ends, which may be at once, and lives on when the daemon ends.
    ///
    /// # Errors
    /// The program, shell or group can't be used.
    pub fn start(self) -> Result<Process, HostError> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log)
            .map_err(|e| HostError::file("cannot open log", self.log, e))?;
        let second = log.try_clone().map_err(|e| HostError::file("cannot open log", self.log, e))?;
        let procs = self.group.procs_files();
        let mut command = tokio::process::Command::new("/bin/sh");
        command.arg("-c").arg(WRAPPER).arg("outrider").arg(procs.len().to_string()).args(&procs);
        if let Some(user) = self.user {
            command.args(["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"]);
        }
        command.arg(self.program).args(&self.arguments);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(self.environment);
        command.current_dir("/").stdin(self.input).stdout(log).stderr(second).kill_on_drop(false);
        let failed = |source| HostError::Program { program: self.program.display().to_string(), source };
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id().ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let process = Process::hold(&ProcessId::of(pid)?)?;
        let name = self.program.display().to_string();
        let (told, status) = tokio::sync::watch::channel(None);
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) => {
                    tracing::debug!(pid, program = name, %status, "process ended");
                    told.send_replace(Some(status));
                }
                Err(error) => tracing::warn!(pid, program = name, %error, "cannot wait for process"),
            }
        });
        let process = process.ok_or_else(|| failed(std::io::Error::other("it cannot be held")))?;
        Ok(Process { status: Some(status), ..process })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_in_words() {
        for (raw, expected) in [
            (0, "it ended with exit code 0"),
            (3 << 8, "it ended with exit code 3"),
            (101 << 8, "it panicked (exit code 101)"),
            (9, "it was killed by signal 9 (SIGKILL)"),
            (11, "it was killed by signal 11 (SIGSEGV)"),
            (31, "it was killed by signal 31 (SIGSYS, by its sandbox)"),
            (40, "it was killed by signal 40"),
        ] {
            assert_eq!(end_text(ExitStatus::from_raw(raw)), expected);
        }
    }
}
