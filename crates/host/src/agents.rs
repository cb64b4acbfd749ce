//! VM agents: one sandboxed process per side per migration, which carries the stream. The daemon talks to it in
//! packets over a socket pair (its standard input: no descriptor needs to be un-marked close-on-exec, so that
//! concurrent spawns can't leak one), hands it connected descriptors, and watches its heartbeat.

use crate::cgroup::Group;
use crate::daemon::lock;
use crate::error::{HostError, chain};
use crate::folders::{private_folder, remove_file};
use crate::process::{Process, Spawn, end_text, watch};
use crate::sweep;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::Signal;
use std::io::{IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use types::agent::{Descriptor, FromAgent, MAX_PACKET_BYTES, ToAgent};
use types::handover::Side;
use types::layout::Catalogue;
use types::{ErrorCode, MigrationId, Problem};

/// The agent makes a key and enters its sandbox: milliseconds.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent reports five times a second; one that is silent this long is dead or stopped, and an unwatched
/// migration does not progress (I9).
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// After `Terminate` an agent closes and exits; a guest may be waiting for that.
const END_TIMEOUT: Duration = Duration::from_millis(200);
/// The kernel closes the sockets of a process before it can be reaped, a moment before.
const REAP_TIMEOUT: Duration = Duration::from_millis(250);
/// An agent prints a few lines in its life.
const LOG_BYTES_READ: u64 = 256 * 1024;
/// A packet that the agent does not take in this time means that it hangs.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// A spare agent is started this long after the last was taken: not beside the migration that took it.
const SPARE_PAUSE: Duration = Duration::from_secs(2);

/// Starts agents, and keeps one started ahead: it has no key and knows no migration yet, and it takes the start of a
/// process, and its way into the cgroups, out of the decision on a permit.
#[derive(Debug, Clone)]
pub struct AgentSpawner {
    binary: Option<PathBuf>,
    group: Group,
    folder: PathBuf,
    spare: Arc<Mutex<Option<Agent>>>,
    started: Arc<AtomicU64>,
}

/// A live agent. Sending and receiving may go on at once; dropping it closes its socket, and it ends.
#[derive(Debug, Clone)]
pub struct Agent {
    process: Process,
    socket: Arc<AsyncFd<OwnedFd>>,
    group: Group,
    log: PathBuf,
}

/// What a fresh agent said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// SPKI (DER) of its ephemeral key.
    pub spki: Vec<u8>,
    /// Which parts of the sandbox are in force.
    pub sandbox: String,
}

/// The agent is gone, or says nothing that can be understood.
#[derive(Debug, Clone, thiserror::Error)]
#[error("VM agent lost: {detail}")]
pub struct AgentGone {
    /// How.
    pub detail: String,
    /// Without a word of why: it died, or hangs.
    pub abrupt: bool,
}

impl AgentGone {
    /// Gone in an orderly way.
    pub fn new(detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), abrupt: false }
    }
}

impl AgentSpawner {
    /// Of agents that run `binary` (the one beside this program when `None`), in children of `group`, with their logs in
    /// `folder`.
    #[must_use]
    pub fn new(binary: Option<PathBuf>, group: Group, folder: PathBuf) -> Self {
        Self { binary, group, folder, spare: Arc::default(), started: Arc::default() }
    }

    /// Takes the spare agent, or starts one, and has it make its key.
    ///
    /// # Errors
    /// `missing-program`, or it does not answer.
    pub async fn spawn(&self, migration: MigrationId, side: Side) -> Result<(Agent, Ready), Problem> {
        let binary = self.locate()?;
        let spare = lock(&self.spare).take();
        self.refill();
        if let Some(agent) = spare {
            match agent.greet(migration, side).await {
                Ok(ready) => return Ok((agent, ready)),
                // It died while it waited; a fresh one tells why, if there is a reason.
                Err(_) => agent.end().await,
            }
        }
        let agent = self.start(&binary).map_err(|e| e.problem())?;
        match agent.greet(migration, side).await {
            Ok(ready) => Ok((agent, ready)),
            Err(gone) => {
                let text = format!("{gone}; {}", log_tail(&agent.log));
                agent.end().await;
                Err(Problem::new(ErrorCode::Internal, text))
            }
        }
    }

    /// Has a spare agent started in a while.
    pub fn refill(&self) {
        let spawner = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SPARE_PAUSE).await;
            if lock(&spawner.spare).is_some() {
                return;
            }
            let agent = spawner.locate().and_then(|binary| spawner.start(&binary).map_err(|e| e.problem()));
            match agent {
                Ok(agent) => {
                    let other = lock(&spawner.spare).replace(agent);
                    if let Some(other) = other {
                        other.end().await;
                    }
                }
                Err(problem) => tracing::warn!(%problem, "no VM agent could be started ahead"),
            }
        });
    }

    /// Ends the spare agent, when the daemon ends.
    pub async fn end_spare(&self) {
        let spare = lock(&self.spare).take();
        if let Some(agent) = spare {
            agent.stop().await;
            // Nothing runs after the daemon: what was made for the agent goes now.
            agent.sweep().await;
        }
    }

    /// At the daemon's start: no agent outlives its daemon by design; one that hangs is ended by force, and what was
    /// made for it is removed.
    pub async fn end_orphans(&self) {
        sweep::end_orphans(&self.group, &self.folder).await;
    }

    /// The agent's program.
    ///
    /// # Errors
    /// `missing-program`.
    pub(crate) fn locate(&self) -> Result<PathBuf, Problem> {
        let beside = || {
            let mut path = std::env::current_exe().ok()?;
            path.set_file_name("outrider-agent");
            Some(path)
        };
        self.binary.clone().or_else(beside).filter(|path| path.is_file()).ok_or_else(|| {
            let text = match &self.binary {
                Some(path) => format!("the VM agent {} does not exist", path.display()),
                None => "the VM agent `outrider-agent` is not beside the running program".to_owned(),
            };
            Problem::new(ErrorCode::MissingProgram, text).hint("set agent_binary in the host's configuration")
        })
    }

    fn start(&self, binary: &Path) -> Result<Agent, HostError> {
        let name = format!("agent-{}", self.started.fetch_add(1, Ordering::Relaxed));
        let group = self.group.child(&name);
        group.create()?;
        private_folder(&self.folder)?;
        let log = self.folder.join(format!("{name}.log"));
        let system = |e: Errno| HostError::system("cannot make a socket pair", e);
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(system)?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(system)?;
        let process = Spawn {
            program: binary,
            arguments: vec![],
            environment: vec![("OUTRIDER_AGENT_FD", "0".to_owned())],
            group: &group,
            user: None,
            input: theirs.into(),
            log: &log,
        }
        .start()?;
        let socket = watch(ours).map_err(|e| HostError::system("cannot watch an agent's socket", e))?;
        Ok(Agent { process, socket: Arc::new(socket), group, log })
    }
}

impl Agent {
    async fn greet(&self, migration: MigrationId, side: Side) -> Result<Ready, AgentGone> {
        self.send(&ToAgent::Hello { side, migration }).await?;
        let answer = tokio::time::timeout(READY_TIMEOUT, self.receive())
            .await
            .map_err(|_| gone("it did not make its key in time"))??;
        match answer {
            FromAgent::Ready { spki, sandbox, .. } => {
                let spki = hex::decode(spki).map_err(|_| gone("its key is not hexadecimal"))?;
                Ok(Ready { spki, sandbox })
            }
            other => Err(gone(format!("it answered hello with {other:?}"))),
        }
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// It is gone or hangs.
    pub async fn send(&self, message: &ToAgent) -> Result<(), AgentGone> {
        self.send_with(message, None).await
    }

    /// Hands over a descriptor; the daemon's copy is closed.
    ///
    /// # Errors
    /// It is gone or hangs.
    pub async fn attach(
        &self,
        channel: u16,
        descriptor: Descriptor,
        handle: OwnedFd,
    ) -> Result<(), AgentGone> {
        self.send_with(&ToAgent::Attach { channel, descriptor }, Some(handle)).await
    }

    /// Hands over the catalogue of the VM's devices, before the permit: a sealed file in memory.
    ///
    /// # Errors
    /// The file can't be made, or the agent is gone or hangs.
    pub async fn attach_catalogue(&self, catalogue: &Catalogue) -> Result<(), Problem> {
        let unusable =
            |e: String| Problem::new(ErrorCode::Internal, format!("the catalogue of devices: {e}"));
        let text = serde_json::to_vec(catalogue).map_err(|e| unusable(e.to_string()))?;
        let file = memory_file(&text).map_err(|e| unusable(e.to_string()))?;
        self.attach(0, Descriptor::Catalogue, file)
            .await
            .map_err(|gone| Problem::new(ErrorCode::ChannelFailed, gone.to_string()))
    }

    async fn send_with(&self, message: &ToAgent, handle: Option<OwnedFd>) -> Result<(), AgentGone> {
        let packet = wire::packet::encode(message).map_err(|e| gone(chain(&e)))?;
        let work = async {
            loop {
                let mut ready = self.socket.writable().await.map_err(|e| gone(e.to_string()))?;
                match send_packet(self.socket.get_ref(), &packet, handle.as_ref()) {
                    Ok(()) => return Ok(()),
                    Err(Errno::WOULDBLOCK) => ready.clear_ready(),
                    Err(e) => return Err(gone(e.to_string())),
                }
            }
        };
        tokio::time::timeout(SEND_TIMEOUT, work).await.map_err(|_| gone("it takes no more packets"))?
    }

    /// The next packet.
    ///
    /// # Errors
    /// It is gone, or sent what is none.
    pub async fn receive(&self) -> Result<FromAgent, AgentGone> {
        let mut buffer = vec![0; MAX_PACKET_BYTES + 1];
        loop {
            let mut ready = self.socket.readable().await.map_err(|e| gone(e.to_string()))?;
            match rustix::net::recv(self.socket.get_ref(), &mut buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => return Err(gone("it closed its socket")),
                Ok((length, _)) => {
                    return wire::packet::decode(&buffer[..length]).map_err(|e| gone(chain(&e)));
                }
                Err(Errno::WOULDBLOCK) => ready.clear_ready(),
                Err(e) => return Err(gone(e.to_string())),
            }
        }
    }

    /// What became of an agent that is gone, for those who have to act on it: how its process ended, if it did.
    pub async fn post_mortem(&self, gone: AgentGone) -> AgentGone {
        let Ok(Some(status)) = tokio::time::timeout(REAP_TIMEOUT, self.process.ended()).await else {
            return AgentGone { abrupt: true, ..gone };
        };
        let mut detail = end_text(status);
        if self.group.ran_out_of_memory() || ran_out_of_memory(&self.log) {
            detail.push_str(": out of memory");
        }
        AgentGone { detail, abrupt: true }
    }

    /// Ends it, politely at first, and removes what was made for it.
    pub async fn end(&self) {
        self.stop().await;
        let agent = self.clone();
        // The guest may be waiting for what comes after this: sweeping is not urgent.
        tokio::spawn(async move { agent.sweep().await });
    }

    async fn stop(&self) {
        if self.process.is_alive() && self.send(&ToAgent::Terminate).await.is_ok() {
            tokio::time::timeout(END_TIMEOUT, self.process.exited()).await.ok();
        }
        if let Err(error) = self.process.signal(Signal::KILL) {
            tracing::error!(%error, "cannot end a VM agent");
        }
        self.process.exited().await;
    }

    async fn sweep(&self) {
        sweep::remove_group(&self.group).await;
        relay_log(&self.log);
        remove_file(&self.log);
    }
}

/// The agent's own lines go where the daemon's go.
fn relay_log(log: &Path) {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    for line in text.lines().rev().take(50).collect::<Vec<_>>().into_iter().rev() {
        tracing::debug!(agent = line);
    }
}

/// A file that nobody can change any more, to be read from its beginning.
fn memory_file(content: &[u8]) -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = std::fs::File::from(memfd_create("outrider-catalogue", flags)?);
    file.write_all(content)?;
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The allocator's last word. Nothing else that an agent prints is passed on: it may be about guest memory.
fn ran_out_of_memory(log: &Path) -> bool {
    let mut tail = String::new();
    let read = std::fs::File::open(log).and_then(|file| file.take(LOG_BYTES_READ).read_to_string(&mut tail));
    read.is_ok() && tail.contains("memory allocation of ")
}

fn send_packet(socket: &OwnedFd, packet: &[u8], handle: Option<&OwnedFd>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let handles = handle.map(|handle| [handle.as_fd()]);
    if let Some(handles) = &handles {
        ancillary.push(SendAncillaryMessage::ScmRights(handles));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut ancillary, flags).map(|_| ())
}

fn gone(detail: impl Into<String>) -> AgentGone {
    AgentGone::new(detail)
}

fn log_tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().last().unwrap_or("it printed nothing").chars().take(300).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_memory_is_read_from_its_beginning_and_never_changed() {
        let mut file = std::fs::File::from(memory_file(b"catalogue").unwrap());
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "catalogue");
        assert!(file.write_all(b"x").is_err() && file.set_len(1).is_err() && file.set_len(99).is_err());
    }
}
