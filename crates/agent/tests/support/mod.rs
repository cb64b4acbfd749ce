//! A fake daemon for real agent processes: socket pairs, a permit of its own manager's key, loopback TCP.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use permit::{SigningKey, VerifyingKey, issue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, send, sendmsg, socketpair,
};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use types::agent::{Descriptor, FromAgent, MAX_PACKET_BYTES, ToAgent};
use types::handover::{HandoverKey, Side};
use types::inventory::Inventory;
use types::permit::{HostPart, PermitClaims, StreamFeatures};
use types::{Digest, Epoch, MigrationId, Nonce, VmId};

pub const NOW_UNIX_S: u64 = 1_900_000_000;
/// Long enough for a loaded machine; a condition that holds is seen at once.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A pair of connected packet sockets.
pub fn packet_pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

/// Whether the descriptor has one of `what` within the patience.
pub fn ready(fd: impl AsFd, what: PollFlags, within: Duration) -> PollFlags {
    let timeout = Timespec::try_from(within).unwrap();
    let mut fds = [PollFd::new(&fd, what)];
    poll(&mut fds, Some(&timeout)).unwrap();
    fds[0].revents()
}

/// One agent process.
pub struct Agent {
    pub process: Child,
    control: Option<OwnedFd>,
    pub spki: Vec<u8>,
    pub sandbox: String,
    pub side: Side,
    /// Everything that it said.
    pub said: Vec<FromAgent>,
}

impl Agent {
    /// Starts one and greets it.
    pub fn start(side: Side, migration: MigrationId) -> Self {
        let (ours, theirs) = packet_pair();
        let process =
            Command::new(env!("CARGO_BIN_EXE_outrider-agent")).stdin(Stdio::from(theirs)).spawn().unwrap();
        let mut agent = Self::adopt(process, ours, side);
        agent.greet(migration);
        agent
    }

    /// An agent that the test started in its own way.
    pub fn adopt(process: Child, control: OwnedFd, side: Side) -> Self {
        Self {
            process,
            control: Some(control),
            spki: Vec::new(),
            sandbox: String::new(),
            side,
            said: Vec::new(),
        }
    }

    pub fn greet(&mut self, migration: MigrationId) {
        self.send(&ToAgent::Hello { side: self.side, migration });
        let FromAgent::Ready { spki, sandbox, .. } = self.wait(|m| matches!(m, FromAgent::Ready { .. }))
        else {
            unreachable!("waited for it")
        };
        self.spki = hex::decode(spki).unwrap();
        self.sandbox = sandbox;
    }

    pub fn send(&self, message: &ToAgent) {
        let packet = wire::packet::encode(message).unwrap();
        // An agent that has ended takes nothing more; the test then sees what it said last.
        let _may_have_ended = send(self.control.as_ref().unwrap(), &packet, SendFlags::NOSIGNAL);
    }

    pub fn attach(&self, descriptor: Descriptor, fd: impl AsFd) {
        self.attach_lane(0, descriptor, fd);
    }

    pub fn attach_lane(&self, channel: u16, descriptor: Descriptor, fd: impl AsFd) {
        let packet = wire::packet::encode(&ToAgent::Attach { channel, descriptor }).unwrap();
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let control = self.control.as_ref().unwrap();
        sendmsg(control, &[IoSlice::new(&packet)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    }

    pub fn arm(&self, permit: &Permit, inventory: &Inventory) {
        self.send(&ToAgent::Arm {
            permit: permit.token.clone(),
            keys: permit.keys.clone(),
            now_unix_s: NOW_UNIX_S,
            inventory: Box::new(inventory.clone()),
        });
    }

    /// The next packet; nothing when the agent ended or the patience did.
    pub fn next(&mut self, within: Duration) -> Option<FromAgent> {
        let control = self.control.as_ref().unwrap();
        if ready(control, PollFlags::IN, within).is_empty() {
            return None;
        }
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let (_, count) = recv(control, buffer.as_mut_slice(), RecvFlags::empty()).ok()?;
        if count == 0 {
            return None;
        }
        let message: FromAgent = wire::packet::decode(&buffer[..count]).unwrap();
        self.said.push(message.clone());
        Some(message)
    }

    /// The first message that is wanted.
    pub fn wait(&mut self, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
        self.wait_for(PATIENCE, wanted)
    }

    /// The same where hundreds of megabytes have to pass first.
    pub fn wait_long(&mut self, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
        self.wait_for(20 * PATIENCE, wanted)
    }

    fn wait_for(&mut self, patience: Duration, wanted: impl Fn(&FromAgent) -> bool) -> FromAgent {
        let deadline = Instant::now() + patience;
        loop {
            match self.next(deadline.saturating_duration_since(Instant::now())) {
                Some(message) if wanted(&message) => return message,
                Some(_) => {}
                None => panic!("the {} agent never said it; it said {:?}", self.side, self.summary()),
            }
        }
    }

    fn summary(&self) -> Vec<&FromAgent> {
        self.said.iter().filter(|m| !matches!(m, FromAgent::Progress { .. })).collect()
    }

    /// Stream bytes of the next heartbeat.
    pub fn progress(&mut self) -> u64 {
        match self.wait(|m| matches!(m, FromAgent::Progress { .. })) {
            FromAgent::Progress { stream_bytes, .. } => stream_bytes,
            _ => unreachable!("waited for it"),
        }
    }

    /// Waits until it exits by itself.
    pub fn exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the {} agent did not end", self.side);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the process is gone.
    pub fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    /// The daemon dies.
    pub fn hang_up(&mut self) {
        self.control = None;
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !matches!(self.process.try_wait(), Ok(Some(_))) {
            let _may_have_ended = self.process.kill();
            let _status = self.process.wait();
        }
    }
}

/// A permit of the test's own manager.
#[derive(Clone)]
pub struct Permit {
    pub token: String,
    pub keys: Vec<(String, String)>,
}

pub fn migration() -> MigrationId {
    MigrationId::from_bytes([0x4d; 16])
}

pub fn claims(source: &[u8], target: &[u8]) -> PermitClaims {
    let daemon_key = || SigningKey::generate().unwrap().verifying_key().as_bytes().to_vec();
    let part = |host: &str, spki: &[u8]| HostPart {
        host: host.parse().unwrap(),
        agent_spki: spki.to_vec(),
        daemon_key: daemon_key(),
        quote: None,
    };
    PermitClaims {
        version: 1,
        key: HandoverKey {
            migration: migration(),
            vm: VmId::from_bytes([7; 16]),
            source_epoch: Epoch(4),
            target_epoch: Epoch(5),
        },
        spec_digest: Digest::of(b"spec"),
        source: part("host-a", source),
        target: part("host-b", target),
        target_journal: Nonce::from_bytes([1; 16]),
        nonce: Nonce::from_bytes([2; 16]),
        issued_at_unix_s: NOW_UNIX_S - 1,
        not_after_unix_s: NOW_UNIX_S + 60,
        run_deadline_unix_s: NOW_UNIX_S + 600,
        byte_budget: 1 << 30,
        duration_budget_ms: 120_000,
        downtime_budget_ms: 5_000,
        features: StreamFeatures::default(),
        inspection_profile: "strict+report-unvouched".to_owned(),
        compatibility: "qemu/test".to_owned(),
    }
}

pub fn sign(claims: &PermitClaims) -> Permit {
    let manager = SigningKey::generate().unwrap();
    let token = issue(&manager, "m1", claims).unwrap().to_hex();
    let key: &VerifyingKey = manager.verifying_key();
    Permit { token, keys: vec![("m1".to_owned(), key.to_hex())] }
}

/// A TCP connection over loopback: the dialled end and the accepted end.
pub fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialled, listener.accept().unwrap().0)
}

/// Two armed and connected agents, and the test's ends of their QEMU sockets.
pub struct Pair {
    pub source: Agent,
    pub target: Agent,
    /// The test is the source's QEMU.
    pub from_qemu: Option<UnixStream>,
    /// The test is the target's QEMU.
    pub to_qemu: Option<UnixStream>,
}

impl Pair {
    /// Agents with a permit, not connected to anything yet.
    pub fn armed(inventory: &Inventory, adjust: impl Fn(&mut PermitClaims)) -> Self {
        let mut source = Agent::start(Side::Source, migration());
        let mut target = Agent::start(Side::Target, migration());
        let mut claims = claims(&source.spki, &target.spki);
        adjust(&mut claims);
        let permit = sign(&claims);
        for agent in [&mut source, &mut target] {
            agent.arm(&permit, inventory);
            agent.wait(|m| matches!(m, FromAgent::Armed));
        }
        Self { source, target, from_qemu: None, to_qemu: None }
    }

    /// Agents with a permit, connected to each other, not yet to any QEMU.
    pub fn connect(inventory: &Inventory, adjust: impl Fn(&mut PermitClaims)) -> Self {
        let mut pair = Self::armed(inventory, adjust);
        pair.meet();
        pair
    }

    /// Connects the agents to each other.
    pub fn meet(&mut self) {
        let (dialled, accepted) = tcp();
        self.target.attach(Descriptor::Peer, &accepted);
        self.source.attach(Descriptor::Peer, &dialled);
        for agent in [&mut self.source, &mut self.target] {
            agent.wait(|m| matches!(m, FromAgent::Connected { .. }));
        }
    }

    /// The same, with the test as QEMU on both sides.
    pub fn with_fake_qemus(inventory: &Inventory, adjust: impl Fn(&mut PermitClaims)) -> Self {
        let mut pair = Self::connect(inventory, adjust);
        pair.attach_fake_target();
        pair.attach_fake_source();
        pair
    }

    pub fn attach_fake_source(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.source.attach(Descriptor::Hypervisor, &theirs);
        self.from_qemu = Some(ours);
    }

    pub fn attach_fake_target(&mut self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.target.attach(Descriptor::Hypervisor, &theirs);
        self.to_qemu = Some(ours);
    }

    /// Writes `bytes` as the source's QEMU, in a thread of its own: the agents may stop reading.
    pub fn write(&self, bytes: &[u8]) -> std::thread::JoinHandle<()> {
        let mut socket = self.from_qemu.as_ref().unwrap().try_clone().unwrap();
        let bytes = bytes.to_vec();
        std::thread::spawn(move || {
            // The agent may close in the middle: that is what some tests are about.
            let _may_break = socket.write_all(&bytes);
        })
    }

    /// Reads exactly `len` bytes as the target's QEMU.
    pub fn read(&self, len: usize) -> Vec<u8> {
        let mut socket = self.to_qemu.as_ref().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = vec![0; len];
        socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads until the target's agent closes.
    pub fn read_to_close(&self) -> Vec<u8> {
        let mut socket = self.to_qemu.as_ref().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).unwrap();
        bytes
    }
}
