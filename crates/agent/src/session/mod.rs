//! The poll loop: the daemon's socket, two for each lane and the scanner's where signatures are looked for; one thread,
//! no waiting on any single one of them.
//!
//! Order within a turn: the daemon first, so that suspend and terminate never wait behind bulk; then the peers, the
//! scanner, QEMU, and time. Back-pressure goes both ways and lane by lane: a QEMU socket is not read while much waits for its lane's
//! network, and a lane of the network is not read while much waits for its QEMU socket, or while the inspector waits
//! for other lanes. The one exception is the handshakes, which block for [`crate::peer::HANDSHAKE_LIMIT`] at most,
//! all together, before anything moves.
//!
//! | module | job |
//! |---|---|
//! | `orders` | what the daemon says |
//! | `connect` | handshakes of all lanes, and QEMU's connections |
//! | `relay` | bytes between QEMU and the network |
//! | `verdict` | guest pages to the scanner, and what comes of its verdict |
//! | `close` | what the halves ask for, and the end |

mod close;
mod connect;
mod orders;
mod relay;
mod verdict;

use crate::arm::{Armed, Identity};
use crate::control::{Control, ControlError};
use crate::effect::End;
use crate::lane::{Bounds, Lane};
use crate::log;
use crate::queue::Throttle;
use crate::signatures::Signatures;
use crate::source::Source;
use crate::target::Target;
use close::internal;
use link::channel::EphemeralKey;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::json;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use types::agent::FromAgent;
use types::layout::Catalogue;
use wire::frame::{self, HEADER_BYTES};

/// Also the heartbeat.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

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
use on_half;

/// What poll said of a lane.
#[derive(Debug, Clone, Copy)]
struct LaneReady {
    pending: PollFlags,
    peer: PollFlags,
    hypervisor: PollFlags,
}

/// What poll said.
#[derive(Debug)]
struct Ready {
    control: PollFlags,
    lanes: Vec<LaneReady>,
    scanner: PollFlags,
}

/// One agent's life.
pub struct Session {
    control: Control,
    sandbox: String,
    key: EphemeralKey,
    identity: Option<Identity>,
    armed: Option<Armed>,
    /// Of the target's own QEMU; goes into what is armed.
    catalogue: Option<Catalogue>,
    /// One until the permit says how many.
    lanes: Vec<Lane>,
    bounds: Bounds,
    /// When all handshakes must be done; set with the first connection.
    handshakes_until: Option<Instant>,
    half: Option<Half>,
    /// On a target whose permit asks for signatures.
    signatures: Option<Signatures>,
    suspended: bool,
    throttle: Throttle,
    /// The lane whose QEMU is read first in the next turn: what the throttle leaves goes to all of them.
    first: usize,
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
            catalogue: None,
            lanes: vec![Lane::default()],
            bounds: Bounds::of(1),
            handshakes_until: None,
            half: None,
            signatures: None,
            suspended: false,
            throttle: Throttle::unlimited(now),
            first: 0,
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
        self.handshake_turn(&ready.lanes)?;
        for (number, ready) in (0u16..).zip(&ready.lanes) {
            self.peer_turn(number, ready.peer)?;
        }
        self.verdict_turn(ready.scanner)?;
        self.want_hypervisors()?;
        self.hypervisors_turn(&ready.lanes)?;
        self.time_turn()
    }

    /// Sleeps until a descriptor is ready that is of interest now, or time is to be looked at.
    fn wait(&mut self) -> Result<Ready, Stop> {
        let now = Instant::now();
        let timeout = Timespec::try_from(self.timeout(now)).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        let throttled = self.throttle.allowed(1, now) == 0;
        let mut control_interest = PollFlags::IN;
        control_interest.set(PollFlags::OUT, self.control.wants_write());
        let mut fds = vec![PollFd::from_borrowed_fd(self.control.fd(), control_interest)];
        let mut places = Vec::with_capacity(self.lanes.len());
        for (number, lane) in (0u16..).zip(&self.lanes) {
            let peer = lane.peer.as_ref().map(|peer| (peer.fd(), self.peer_interest(number)));
            let hypervisor = lane.hypervisor.as_ref();
            let hypervisor = hypervisor.map(|fd| (fd.as_fd(), self.hypervisor_interest(number, throttled)));
            places.push([
                watch(&mut fds, lane.pending.as_ref().map(|fd| (fd.as_fd(), PollFlags::IN))),
                watch(&mut fds, peer),
                watch(&mut fds, hypervisor),
            ]);
        }
        let scanner = watch(&mut fds, self.signatures.as_ref().and_then(Signatures::interest));
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(internal(format!("waiting failed: {errno}"))),
        }
        let seen = |place: Option<usize>| {
            place.and_then(|at| fds.get(at)).map_or(PollFlags::empty(), PollFd::revents)
        };
        let lanes = places.into_iter().map(|[pending, peer, hypervisor]| LaneReady {
            pending: seen(pending),
            peer: seen(peer),
            hypervisor: seen(hypervisor),
        });
        Ok(Ready { control: seen(Some(0)), lanes: lanes.collect(), scanner: seen(scanner) })
    }

    fn timeout(&mut self, now: Instant) -> Duration {
        if self.has_work_inside(now) {
            return Duration::ZERO;
        }
        let mut until = self.next_progress;
        if let Some(Half::Source(source)) = &self.half {
            until = until.min(source.next_tick());
        }
        if let Some(deadline) = self.handshakes_until.filter(|_| self.half.is_none()) {
            until = until.min(deadline);
        }
        if let Some(deadline) = self.signatures.as_ref().and_then(Signatures::deadline) {
            until = until.min(deadline);
        }
        let left = until.saturating_duration_since(now);
        // A throttled source has no descriptor that would wake it.
        if self.throttle.is_limited() { left.min(Throttle::PAUSE) } else { left }
    }

    /// Whether there is something to do that no descriptor tells.
    fn has_work_inside(&mut self, now: Instant) -> bool {
        let Some(half) = &self.half else { return false };
        let draining = matches!(half, Half::Source(source) if source.is_draining());
        let throttled = self.throttle.allowed(1, now) == 0;
        (0u16..).zip(&self.lanes).any(|(number, lane)| {
            let drains = draining && !throttled && lane.hypervisor.is_some() && self.reads_hypervisor(number);
            drains || (lane.has_unopened() && self.wants_peer(number))
        })
    }

    fn lane(&self, number: u16) -> Option<&Lane> {
        self.lanes.get(usize::from(number))
    }

    fn lane_mut(&mut self, number: u16) -> Option<&mut Lane> {
        self.lanes.get_mut(usize::from(number))
    }

    // --- time

    fn time_turn(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        if self.half.is_none() && self.handshakes_until.is_some_and(|deadline| now >= deadline) {
            return Err(close::handshake_failed("the other agent did not speak in time"));
        }
        let reading = (0u16..).zip(&self.lanes).any(|(number, _)| self.wants_peer(number));
        let effects = match &mut self.half {
            Some(half) => {
                if let (Half::Target(target), false) = (&mut *half, reading) {
                    target.not_reading(now);
                }
                on_half!(half, it => it.tick(now))
            }
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

    /// Bytes on the wire, all lanes: sent and received.
    fn wire_bytes(&self) -> (u64, u64) {
        let peers = self.lanes.iter().filter_map(|lane| lane.peer.as_ref());
        peers.fold((0, 0), |(sent, received), peer| {
            let (out, back) = peer.wire_bytes();
            (sent + out, received + back)
        })
    }

    fn progress(&self) -> FromAgent {
        let (sent, received) = self.wire_bytes();
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
}

/// Adds a descriptor to what is polled, and gives its place. One without interest would still report a hang-up, again
/// and again.
fn watch<'fd>(fds: &mut Vec<PollFd<'fd>>, fd: Option<(BorrowedFd<'fd>, PollFlags)>) -> Option<usize> {
    let (fd, interest) = fd.filter(|(_, interest)| !interest.is_empty())?;
    fds.push(PollFd::from_borrowed_fd(fd, interest));
    Some(fds.len() - 1)
}
