//! The poll loop: three sockets (a fourth where signatures are looked for), one thread, no waiting on any single one of them.
//!
//! Order within a turn: the daemon first, so that suspend and terminate never wait behind bulk; then the peer, QEMU,
//! and time. Back-pressure goes both ways: QEMU is not read while much waits for the network, and the network is
//! not read while much waits for QEMU. The one exception is the handshake, which blocks for
//! [`crate::peer::HANDSHAKE_LIMIT`] at most, before anything moves.

use crate::arm::{Armed, Identity, arm, channel_config};
use crate::control::{Control, ControlError};
use crate::effect::{Effect, End};
use crate::peer::{HANDSHAKE_LIMIT, HIGH_WATER_BYTES, Peer, PeerError};
use crate::queue::{OutQueue, Throttle};
use crate::signatures::Signatures;
use crate::source::Source;
use crate::target::Target;
use crate::{log, sandbox};
use engine::inspect::coverage_bytes;
use link::channel::EphemeralKey;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde_json::json;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use types::agent::{Descriptor, EndedBy, FromAgent, ToAgent};
use types::handover::Side;
use types::inventory::Inventory;
use types::migration::ChannelView;
use types::{ErrorCode, MigrationId};
use wire::frame::{self, Frame, HEADER_BYTES};

/// Also the heartbeat.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// A suspended target takes in what was on its way; TCP's buffers hold less.
const SUSPENDED_HIGH_WATER_BYTES: usize = 16 << 20;
/// Commands looked at in one turn.
const MAX_COMMANDS_PER_TURN: usize = 16;
/// How long the last report and the ABORT may take.
const GOODBYE_LIMIT: Duration = Duration::from_millis(500);
const CLOSED: PollFlags = PollFlags::HUP.union(PollFlags::ERR).union(PollFlags::RDHUP).union(PollFlags::NVAL);

/// Why the loop stopped.
#[derive(Debug)]
enum Stop {
    /// The daemon is gone or talks nonsense: nobody to report to.
    Daemon(ControlError),
    /// Something to be reported, unless the daemon asked for it.
    Ended(End),
}

impl From<ControlError> for Stop {
    fn from(error: ControlError) -> Self {
        Self::Daemon(error)
    }
}

enum Half {
    Source(Box<Source>),
    Target(Box<Target>),
}

/// Both halves have these methods and no reason for a common trait.
macro_rules! on_half {
    ($half:expr, $it:ident => $do:expr) => {
        match $half {
            Half::Source($it) => $do,
            Half::Target($it) => $do,
        }
    };
}

/// What poll said.
#[derive(Debug, Clone, Copy)]
struct Ready {
    control: PollFlags,
    pending: PollFlags,
    peer: PollFlags,
    hypervisor: PollFlags,
    scanner: PollFlags,
}

/// One agent's life.
pub struct Session {
    control: Control,
    sandbox: String,
    key: EphemeralKey,
    identity: Option<Identity>,
    armed: Option<Armed>,
    /// An accepted connection whose handshake waits for the other side's first bytes, and until when.
    pending_peer: Option<(OwnedFd, Instant)>,
    peer: Option<Peer>,
    peer_attached: bool,
    hypervisor: Option<OwnedFd>,
    to_hypervisor: OutQueue,
    half: Option<Half>,
    signatures: Option<Signatures>,
    suspended: bool,
    throttle: Throttle,
    sequence: u64,
    next_progress: Instant,
    buffer: Vec<u8>,
}

impl Session {
    /// A session that waits for its daemon; `sandbox` is what is in force, `key` is this agent's own.
    #[must_use]
    pub fn new(control: Control, sandbox: String, key: EphemeralKey) -> Self {
        let now = Instant::now();
        Self {
            control,
            sandbox,
            key,
            identity: None,
            armed: None,
            pending_peer: None,
            peer: None,
            peer_attached: false,
            hypervisor: None,
            to_hypervisor: OutQueue::default(),
            half: None,
            signatures: None,
            suspended: false,
            throttle: Throttle::unlimited(now),
            sequence: 0,
            next_progress: now + PROGRESS_INTERVAL,
            buffer: vec![0; HEADER_BYTES + frame::MAX_PAYLOAD_BYTES],
        }
    }

    /// Serves until it ends. False when the daemon talked nonsense or could not be told why.
    #[must_use]
    pub fn run(mut self) -> bool {
        loop {
            match self.turn() {
                Ok(()) => {}
                Err(Stop::Ended(end)) => return self.goodbye(end),
                Err(Stop::Daemon(error)) => {
                    log::line("error", "daemon-gone", &[("detail", json!(error.to_string()))]);
                    return matches!(error, ControlError::Closed);
                }
            }
        }
    }

    fn turn(&mut self) -> Result<(), Stop> {
        let ready = self.wait()?;
        self.control_turn(ready.control)?;
        self.pending_turn(ready.pending)?;
        self.peer_turn(ready.peer)?;
        self.scanner_turn(ready.scanner)?;
        self.hypervisor_turn(ready.hypervisor)?;
        self.time_turn()
    }

    fn wait(&mut self) -> Result<Ready, Stop> {
        let now = Instant::now();
        let timeout = self.timeout(now);
        let hypervisor_interest = self.hypervisor_interest(now);
        let mut control_interest = PollFlags::IN;
        control_interest.set(PollFlags::OUT, self.control.wants_write());
        let wanted: [Option<(BorrowedFd<'_>, PollFlags)>; 5] = [
            Some((self.control.fd(), control_interest)),
            self.pending_peer.as_ref().map(|(fd, _)| (fd.as_fd(), PollFlags::IN)),
            self.peer.as_ref().map(|peer| (peer.fd(), self.peer_interest(peer))),
            self.hypervisor.as_ref().zip(hypervisor_interest).map(|(fd, interest)| (fd.as_fd(), interest)),
            self.signatures.as_ref().and_then(Signatures::interest),
        ];
        let mut fds = Vec::with_capacity(wanted.len());
        let places = wanted.map(|fd| {
            // A descriptor without interest would still report a hang-up, again and again.
            let (fd, interest) = fd.filter(|(_, interest)| !interest.is_empty())?;
            fds.push(PollFd::from_borrowed_fd(fd, interest));
            Some(fds.len() - 1)
        });
        let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(internal(format!("waiting failed: {errno}"))),
        }
        let [control, pending, peer, hypervisor, scanner] =
            places.map(|place| place.and_then(|at| fds.get(at)).map_or(PollFlags::empty(), PollFd::revents));
        Ok(Ready { control, pending, peer, hypervisor, scanner })
    }

    fn timeout(&self, now: Instant) -> Duration {
        if self.peer.as_ref().is_some_and(|peer| peer.has_unopened() && self.wants_peer()) {
            return Duration::ZERO;
        }
        let mut until = self.next_progress;
        if let Some(Half::Source(source)) = &self.half {
            until = until.min(source.next_tick());
        }
        if let Some((_, deadline)) = &self.pending_peer {
            until = until.min(*deadline);
        }
        if let Some(deadline) = self.signatures.as_ref().and_then(Signatures::deadline) {
            until = until.min(deadline);
        }
        let left = until.saturating_duration_since(now);
        // A throttled source has no descriptor that would wake it.
        if self.throttle.is_limited() { left.min(Throttle::PAUSE) } else { left }
    }

    fn wants_peer(&self) -> bool {
        let high_water = if self.suspended { SUSPENDED_HIGH_WATER_BYTES } else { HIGH_WATER_BYTES };
        let room = self.signatures.as_ref().is_none_or(Signatures::has_room);
        matches!(self.half, Some(Half::Source(_))) || (self.to_hypervisor.len() < high_water && room)
    }

    fn peer_interest(&self, peer: &Peer) -> PollFlags {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, self.wants_peer());
        interest.set(PollFlags::OUT, peer.waiting_bytes() > 0);
        interest
    }

    /// Nothing is asked of QEMU's socket before the channel stands (I3).
    fn hypervisor_interest(&mut self, now: Instant) -> Option<PollFlags> {
        let half = self.half.as_ref()?;
        let reads = match half {
            Half::Source(source) => {
                let room = self.peer.as_ref().is_some_and(|peer| peer.waiting_bytes() < HIGH_WATER_BYTES);
                source.wants_stream() && room && self.throttle.allowed(1, now) > 0
            }
            Half::Target(_) => true,
        };
        let mut interest = PollFlags::RDHUP;
        interest.set(PollFlags::IN, reads);
        interest.set(PollFlags::OUT, !self.to_hypervisor.is_empty() && !self.suspended);
        Some(interest)
    }

    // --- the daemon

    fn control_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        self.control.flush()?;
        if !ready.intersects(PollFlags::IN | CLOSED) {
            return Ok(());
        }
        for _ in 0..MAX_COMMANDS_PER_TURN {
            let Some((message, descriptor)) = self.control.receive()? else { break };
            self.command(message, descriptor)?;
        }
        Ok(())
    }

    fn command(&mut self, message: ToAgent, descriptor: Option<OwnedFd>) -> Result<(), Stop> {
        let now = Instant::now();
        match message {
            ToAgent::Hello { side, migration } => self.hello(side, migration),
            ToAgent::Arm { permit, keys, now_unix_s, inventory } => {
                self.arm(&permit, &keys, now_unix_s, *inventory)
            }
            ToAgent::Attach { channel, descriptor: kind } => self.attach(channel, kind, descriptor),
            ToAgent::Suspend => self.suspend(true),
            ToAgent::Resume => self.suspend(false),
            ToAgent::Throttle { bytes_per_second } => {
                self.throttle.limit(bytes_per_second, now);
                Ok(())
            }
            ToAgent::Prove { nonce } => {
                let quiet = self.hypervisor_quiet();
                let effects = match &self.half {
                    Some(Half::Source(source)) => source.prove(nonce, quiet),
                    _ => {
                        let detail = "nothing was relayed".to_owned();
                        vec![Effect::report(FromAgent::NotProven { nonce, detail })]
                    }
                };
                self.apply(effects)
            }
            ToAgent::Frozen => {
                if let Some(Half::Source(source)) = &mut self.half {
                    source.frozen();
                }
                Ok(())
            }
            ToAgent::AnnounceRunning => {
                let effects = match &self.half {
                    Some(Half::Target(target)) => target.announce_running(),
                    _ => Vec::new(),
                };
                self.apply(effects)
            }
            ToAgent::Terminate => {
                let abort = Some((ErrorCode::Terminated, "ended by its daemon".to_owned()));
                Err(Stop::Ended(End { report: None, abort }))
            }
        }
    }

    fn hello(&mut self, side: Side, migration: MigrationId) -> Result<(), Stop> {
        if self.identity.is_some() {
            return Err(refused(ErrorCode::WrongState, "a second HELLO"));
        }
        let key = self.key.clone();
        let ready = FromAgent::Ready {
            spki: hex::encode(key.spki()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sandbox: self.sandbox.clone(),
        };
        log::line("info", "ready", &[("side", json!(side)), ("migration", json!(migration))]);
        self.identity = Some(Identity { side, migration, key });
        self.control.report(&ready)?;
        Ok(())
    }

    fn arm(
        &mut self,
        permit: &str,
        keys: &[(String, String)],
        now_unix_s: u64,
        inventory: Inventory,
    ) -> Result<(), Stop> {
        let Some(identity) = self.identity.as_ref().filter(|_| self.armed.is_none()) else {
            return Err(refused(ErrorCode::WrongState, "ARM before HELLO, or a second one"));
        };
        let coverage = coverage_bytes(&inventory);
        let armed = arm(identity, permit, keys, now_unix_s, inventory)
            .map_err(|refusal| refused(refusal.code(), &refusal.to_string()))?;
        sandbox::limit_memory(coverage).map_err(|error| internal(error.to_string()))?;
        self.armed = Some(armed);
        self.control.report(&FromAgent::Armed)?;
        Ok(())
    }

    fn attach(&mut self, channel: u16, kind: Descriptor, fd: Option<OwnedFd>) -> Result<(), Stop> {
        let (Some(fd), 0) = (fd, channel) else {
            return Err(refused(
                ErrorCode::BadRequest,
                "ATTACH without a descriptor, or for a second channel",
            ));
        };
        let Some((identity, armed)) = self.identity.as_ref().zip(self.armed.as_ref()) else {
            return Err(refused(ErrorCode::WrongState, "ATTACH before ARM"));
        };
        let scans = identity.side == Side::Target && armed.profile.signatures;
        match kind {
            Descriptor::Scanner if scans && self.signatures.is_none() => {
                self.signatures = Some(Signatures::new(fd, signature::Policy::default(), &armed.inventory));
                Ok(())
            }
            // The permit asks for what would not be done.
            Descriptor::Peer if scans && self.signatures.is_none() => {
                Err(refused(ErrorCode::WrongState, "ATTACH of the peer before the permit's scanner"))
            }
            Descriptor::Hypervisor if self.hypervisor.is_none() => {
                self.hypervisor = Some(fd);
                Ok(())
            }
            Descriptor::Peer if !self.peer_attached => {
                self.peer_attached = true;
                match identity.side {
                    Side::Source => self.open_peer(fd),
                    Side::Target => {
                        self.pending_peer = Some((fd, Instant::now() + HANDSHAKE_LIMIT));
                        Ok(())
                    }
                }
            }
            _ => Err(refused(ErrorCode::WrongState, "ATTACH of a second descriptor of one kind")),
        }
    }

    fn suspend(&mut self, on: bool) -> Result<(), Stop> {
        self.suspended = on;
        let effects = match &mut self.half {
            Some(half) => on_half!(half, it => it.suspend(on)),
            None => Vec::new(),
        };
        self.apply(effects)
    }

    /// Whether QEMU's socket is open, was never closed, and nothing waits to be read from it.
    fn hypervisor_quiet(&self) -> Result<(), String> {
        let socket = self.hypervisor.as_ref().ok_or("QEMU's socket is closed")?;
        let interest = PollFlags::IN | PollFlags::PRI | PollFlags::RDHUP;
        let mut fds = [PollFd::new(socket, interest)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).map_err(|errno| format!("QEMU's socket could not be polled: {errno}"))?;
        let seen = fds[0].revents();
        if seen.intersects(CLOSED) {
            return Err("QEMU closed its socket after the end of the stream".to_owned());
        }
        if seen.is_empty() { Ok(()) } else { Err("QEMU wrote after the end of the stream".to_owned()) }
    }

    // --- the other agent

    fn pending_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        let Some((fd, deadline)) = self.pending_peer.take() else { return Ok(()) };
        if !ready.is_empty() {
            return self.open_peer(fd);
        }
        if Instant::now() >= deadline {
            return Err(handshake_failed("the other agent did not speak in time"));
        }
        self.pending_peer = Some((fd, deadline));
        Ok(())
    }

    fn open_peer(&mut self, fd: OwnedFd) -> Result<(), Stop> {
        let (Some(identity), Some(armed)) = (&self.identity, &self.armed) else {
            return Err(internal("a channel without a permit".to_owned()));
        };
        let side = identity.side;
        let opened = channel_config(identity, armed, 0).and_then(|config| Peer::open(fd, &config, side));
        let (peer, facts) =
            opened.map_err(|error| handshake_failed(&format!("{}: {error}", error.code())))?;
        let now = Instant::now();
        self.half = Some(match side {
            Side::Source => Half::Source(Box::new(Source::new(armed, now))),
            Side::Target => {
                Half::Target(Box::new(Target::new(armed, now).map_err(|error| internal(error.to_string()))?))
            }
        });
        self.peer = Some(peer);
        let channel = ChannelView {
            protocol: facts.protocol.to_owned(),
            cipher_suite: facts.cipher_suite.to_owned(),
            key_exchange: facts.key_exchange,
            channels: 1,
        };
        log::line("info", "connected", &[("channel", json!(channel))]);
        self.control.report(&FromAgent::Connected { channel })?;
        if self.suspended { self.suspend(true) } else { Ok(()) }
    }

    fn peer_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        let wants = self.wants_peer();
        let Some(peer) = &mut self.peer else { return Ok(()) };
        if ready.intersects(PollFlags::OUT | CLOSED)
            && let Err(error) = peer.flush()
        {
            return self.peer_gone(&error);
        }
        let waits = peer.has_unopened();
        if !wants || !(waits || ready.intersects(PollFlags::IN | CLOSED)) {
            return Ok(());
        }
        let (effects, received) = self.receive();
        self.apply(effects)?;
        received.or_else(|error| self.peer_gone(&error))
    }

    /// Reads once from the channel. Inspected bytes go on to QEMU, everything else becomes effects. What comes behind a
    /// violation is not looked at.
    fn receive(&mut self) -> (Vec<Effect>, Result<(), PeerError>) {
        let now = Instant::now();
        let mut effects = Vec::new();
        let (Some(peer), Some(half)) = (&mut self.peer, &mut self.half) else { return (effects, Ok(())) };
        // Records are small: gathered, they cost QEMU and us one system call instead of two dozen.
        let queue = &mut self.to_hypervisor;
        let mut release = |piece: &[u8]| queue.push(piece);
        let mut violated = false;
        let received = peer.receive(|frame| {
            if violated {
                return;
            }
            match (frame, &mut *half) {
                (Frame::Data(bytes), Half::Target(target)) => {
                    if let Err(end) = target.data(bytes, now, &mut release) {
                        violated = true;
                        effects.extend(end);
                    }
                }
                (Frame::Return(bytes), Half::Source(source)) => effects.extend(source.return_path(bytes)),
                (Frame::Control(control), half) => {
                    effects.extend(on_half!(half, it => it.control(control, now)));
                }
                (Frame::Data(_) | Frame::Return(_), half) => {
                    violated = true;
                    let detail = "the other agent sent bytes in the wrong direction";
                    effects.extend(on_half!(half, it => it.peer_gone(detail)));
                }
            }
        });
        (effects, received.map(|_| ()))
    }

    fn peer_gone(&mut self, error: &PeerError) -> Result<(), Stop> {
        self.peer = None;
        let effects = match &mut self.half {
            Some(half) => on_half!(half, it => it.peer_gone(&error.to_string())),
            None => Vec::new(),
        };
        self.apply(effects)
    }

    /// What the scanner says, and what comes of it once the stream is complete.
    fn scanner_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        let now = Instant::now();
        let (Some(signatures), Some(Half::Target(target))) = (&mut self.signatures, &mut self.half) else {
            return Ok(());
        };
        signatures.ready(ready, now);
        if target.is_judging() {
            signatures.finish(now);
        }
        let judgement = signatures.judgement(|block| target.block_name(block));
        let effects = judgement.map_or_else(Vec::new, |judgement| target.judged(judgement, now));
        self.apply(effects)
    }

    // --- QEMU

    fn hypervisor_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        self.flush_hypervisor()?;
        self.flushed_turn()?;
        let Some(half) = &self.half else { return Ok(()) };
        if self.hypervisor.is_none() || ready.is_empty() {
            return Ok(());
        }
        let reads = match half {
            Half::Source(source) => source.wants_stream(),
            Half::Target(_) => true,
        };
        if reads && ready.contains(PollFlags::IN) {
            return self.read_hypervisor();
        }
        if ready.intersects(CLOSED) { self.hypervisor_gone() } else { Ok(()) }
    }

    fn flush_hypervisor(&mut self) -> Result<(), Stop> {
        let Some(socket) = self.hypervisor.as_ref().filter(|_| !self.suspended) else { return Ok(()) };
        match self.to_hypervisor.flush(socket) {
            Ok(()) => Ok(()),
            Err(_) => self.hypervisor_gone(),
        }
    }

    /// Tells the half when what it waits for has left.
    fn flushed_turn(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        let effects = match (&mut self.half, &self.peer) {
            (Some(Half::Source(source)), Some(peer)) if peer.waiting_bytes() == 0 => source.flushed(now),
            (Some(Half::Target(target)), peer)
                if self.to_hypervisor.is_empty() && self.hypervisor.is_some() =>
            {
                target.flushed(peer.as_ref().map_or(0, |peer| peer.wire_bytes().1))
            }
            _ => return Ok(()),
        };
        self.apply(effects)
    }

    fn read_hypervisor(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        let Some(socket) = &self.hypervisor else { return Ok(()) };
        let allowed = self.throttle.allowed(frame::MAX_PAYLOAD_BYTES, now);
        let Some(room) = self.buffer.get_mut(HEADER_BYTES..HEADER_BYTES + allowed) else { return Ok(()) };
        match recv(socket, room, RecvFlags::DONTWAIT) {
            Ok((_, 0)) if allowed > 0 => self.hypervisor_gone(),
            Ok((_, count)) => self.relay_from_hypervisor(count, now),
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => self.hypervisor_gone(),
        }
    }

    /// `count` bytes of QEMU's are in the buffer, behind the room for a frame header.
    fn relay_from_hypervisor(&mut self, count: usize, now: Instant) -> Result<(), Stop> {
        self.throttle.take(count);
        let bytes = self.buffer.get(HEADER_BYTES..HEADER_BYTES + count).unwrap_or_default();
        let ended = match &mut self.half {
            Some(Half::Source(source)) => source.stream(bytes, now),
            Some(Half::Target(target)) => {
                let effects = target.from_hypervisor(bytes);
                return self.apply(effects);
            }
            None => return Ok(()),
        };
        let ended = match ended {
            Ok(ended) => ended,
            Err(effect) => return self.apply(vec![effect]),
        };
        let Some(peer) = &mut self.peer else { return Ok(()) };
        if let Err(error) = peer.data(&mut self.buffer, count).and_then(|()| peer.flush()) {
            return self.peer_gone(&error);
        }
        if ended && let Some(Half::Source(source)) = &mut self.half {
            let effects = source.end_frames(now);
            self.apply(effects)?;
            return self.flushed_turn();
        }
        Ok(())
    }

    fn hypervisor_gone(&mut self) -> Result<(), Stop> {
        self.hypervisor = None;
        let effects = match &mut self.half {
            Some(half) => on_half!(half, it => it.hypervisor_gone()),
            None => Vec::new(),
        };
        self.apply(effects)
    }

    // --- time and effects

    fn time_turn(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        let effects = match &mut self.half {
            Some(half) => on_half!(half, it => it.tick(now)),
            None => Vec::new(),
        };
        self.apply(effects)?;
        if now < self.next_progress {
            return Ok(());
        }
        self.next_progress = now + PROGRESS_INTERVAL;
        if self.identity.is_some() {
            self.sequence += 1;
            let progress = self.progress();
            self.control.report(&progress)?;
        }
        Ok(())
    }

    fn progress(&self) -> FromAgent {
        let (sent, received) = self.peer.as_ref().map_or((0, 0), Peer::wire_bytes);
        let (stream_bytes, wire_bytes, pages) = match &self.half {
            Some(Half::Source(source)) => (source.stream_bytes(), sent, (0, 0)),
            Some(Half::Target(target)) => {
                let pages = target.pages();
                (target.released_bytes(), received, (pages.normal, pages.zero))
            }
            None => (0, 0, (0, 0)),
        };
        FromAgent::Progress { sequence: self.sequence, stream_bytes, wire_bytes, pages }
    }

    fn apply(&mut self, effects: Vec<Effect>) -> Result<(), Stop> {
        for effect in effects {
            let sent = match effect {
                Effect::Frame(control) => self.send(|peer| peer.control(&control)),
                Effect::Return(bytes) => self.send(|peer| peer.return_path(&bytes)),
                Effect::Report(message) => {
                    self.control.report(&message)?;
                    Ok(())
                }
                Effect::ToHypervisor(bytes) => {
                    self.to_hypervisor.push(&bytes);
                    self.flush_hypervisor()?;
                    Ok(())
                }
                Effect::DropPeer => {
                    self.peer = None;
                    Ok(())
                }
                Effect::End(end) => return Err(Stop::Ended(end)),
            };
            if let Err(error) = sent {
                self.peer_gone(&error)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, put: impl FnOnce(&mut Peer) -> Result<(), PeerError>) -> Result<(), PeerError> {
        match &mut self.peer {
            Some(peer) => put(peer).and_then(|()| peer.flush()),
            None => Ok(()),
        }
    }

    /// QEMU's socket first: on the source its closing lets the guest go on.
    fn goodbye(mut self, end: End) -> bool {
        drop(self.hypervisor.take());
        let deadline = Instant::now() + GOODBYE_LIMIT;
        let told = match &end.report {
            Some(report) => self.control.report(report).is_ok() && self.control.drain(deadline),
            None => true,
        };
        if let Some(mut peer) = self.peer.take() {
            if let Some((code, text)) = end.abort {
                let _best_effort = peer.control(&frame::Control::Abort { code, text });
            }
            peer.goodbye(deadline);
        }
        told
    }
}

fn internal(detail: String) -> Stop {
    let report = FromAgent::Ended { what: EndedBy::Internal, detail: detail.clone(), digest: None };
    Stop::Ended(End { report: Some(Box::new(report)), abort: Some((ErrorCode::Internal, detail)) })
}

fn refused(code: ErrorCode, detail: &str) -> Stop {
    let report = FromAgent::Refused { code, detail: detail.to_owned() };
    Stop::Ended(End { report: Some(Box::new(report)), abort: None })
}

fn handshake_failed(detail: &str) -> Stop {
    let report = FromAgent::Ended { what: EndedBy::Handshake, detail: detail.to_owned(), digest: None };
    Stop::Ended(End { report: Some(Box::new(report)), abort: None })
}
