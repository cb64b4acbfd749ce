//! The source's half: QEMU's stream out, return path in, and the end of the stream. No I/O.
//!
//! ```text
//! Streaming –last byte→ Draining –lanes empty→ Flushing –all written→ Guarded –Frozen→ Frozen
//!     |                    |                       |                    └ 1 s without Frozen: end, QEMU's sockets
//!     └────────────────────┴── anything breaks: end ┘                      close, the guest resumes
//!                                                                  Frozen: nothing ends it but the daemon
//! ```
//! The main lane's last byte comes when QEMU has written all of the others: what is in their sockets by then is the
//! rest, and a socket that would block is at its end. With the main lane alone there is nothing to drain.
//!
//! Once the daemon has journalled FROZEN, QEMU's sockets stay open whatever happens to the peer: a frozen QEMU that
//! finds one closed when thawed would resume, and thawing is the daemon's decision (hand-over rules).

use crate::arm::Armed;
use crate::effect::{Effect, End};
use crate::log;
use engine::inspect::EndDetector;
use serde_json::json;
use std::time::{Duration, Instant};
use types::agent::{EndedBy, FromAgent};
use types::handover::{Digest, StreamEvidence};
use types::{ErrorCode, Nonce};
use wire::frame::Control;
use wire::qemu::return_path::{Decoder, Message};

/// Without FROZEN this long after the end of the stream, the guest must run again.
pub const FREEZE_GUARD: Duration = Duration::from_secs(1);
/// Round trips while streaming.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Round trips after the end: the last one before RUNNING is what the downtime is corrected by.
const PING_INTERVAL_AT_END: Duration = Duration::from_millis(100);
/// An honest QEMU answers PING 1 once and may announce the switchover once.
const MAX_RETURN_MESSAGES: u32 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Streaming,
    Draining,
    Flushing(StreamEvidence),
    Guarded { until: Instant },
    Frozen,
}

/// See the module.
#[derive(Debug)]
pub struct Source {
    stage: Stage,
    lanes: Vec<Sent>,
    stream_bytes: u64,
    byte_budget: u64,
    time_budget: Instant,
    downtime_budget: Duration,
    /// When the first device state was seen: the guest is stopped since.
    stopped_since: Option<Instant>,
    end: EndDetector,
    end_lost_logged: bool,
    last_byte: Instant,
    suspended: bool,
    peer_suspended: bool,
    returns: Decoder,
    return_messages: u32,
    ping: Pinger,
}

/// What left on one lane.
#[derive(Debug, Default)]
struct Sent {
    hasher: blake3::Hasher,
    bytes: u64,
    /// After the main lane's end, QEMU's socket had nothing more.
    drained: bool,
}

impl Sent {
    fn evidence(&self) -> StreamEvidence {
        StreamEvidence { stream_bytes: self.bytes, digest: Digest(*self.hasher.finalize().as_bytes()) }
    }
}

#[derive(Debug)]
struct Pinger {
    number: u64,
    outstanding: Option<Instant>,
    next: Instant,
    round_trip: Option<Duration>,
}

impl Pinger {
    fn send(&mut self, now: Instant, interval: Duration) -> Effect {
        self.number += 1;
        self.outstanding = Some(now);
        self.next = now + interval;
        Effect::Frame(Control::Ping(self.number))
    }

    fn answered(&mut self, number: u64, now: Instant) {
        if number == self.number
            && let Some(sent) = self.outstanding.take()
        {
            // The least one: a ping that waits behind the stream measures the stream, not the way.
            let taken = now.duration_since(sent);
            self.round_trip = self.round_trip.map_or(taken, |least| least.min(taken)).into();
        }
    }
}

impl Source {
    /// A source that starts to relay at `now`.
    #[must_use]
    pub fn new(armed: &Armed, now: Instant) -> Self {
        let claims = armed.permit.claims();
        Self {
            stage: Stage::Streaming,
            lanes: (0..armed.lanes).map(|_| Sent::default()).collect(),
            stream_bytes: 0,
            byte_budget: claims.byte_budget,
            time_budget: now + armed.time_left,
            downtime_budget: armed.downtime_budget(),
            stopped_since: None,
            end: EndDetector::new(
                &armed.inventory,
                armed.limits.device_state_bytes,
                armed.limits.multifd.is_some(),
            ),
            end_lost_logged: false,
            last_byte: now,
            suspended: false,
            peer_suspended: false,
            returns: Decoder::default(),
            return_messages: 0,
            ping: Pinger { number: 0, outstanding: None, next: now, round_trip: None },
        }
    }

    /// Whether QEMU is to be read on a lane.
    #[must_use]
    pub fn wants_stream(&self, lane: u16) -> bool {
        let open = match self.stage {
            Stage::Streaming => true,
            Stage::Draining => self.lanes.get(usize::from(lane)).is_some_and(|sent| !sent.drained),
            _ => false,
        };
        open && !self.suspended && !self.peer_suspended
    }

    /// Whether lanes are read until they would block.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.stage == Stage::Draining
    }

    /// Bytes relayed so far, all lanes.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.stream_bytes
    }

    /// Bytes that QEMU sent on a lane and that are about to go out.
    ///
    /// # Errors
    /// The budget is used up; the bytes stay here.
    pub fn stream(&mut self, lane: u16, bytes: &[u8], now: Instant) -> Result<(), Effect> {
        let total = self.stream_bytes.saturating_add(bytes.len() as u64);
        if total > self.byte_budget {
            let detail = format!("the stream is longer than the permit's {} bytes", self.byte_budget);
            return Err(Effect::end(EndedBy::Budget, detail, ErrorCode::BudgetExceeded));
        }
        self.stream_bytes = total;
        self.last_byte = now;
        if let Some(sent) = self.lanes.get_mut(usize::from(lane)) {
            sent.hasher.update(bytes);
            sent.bytes += bytes.len() as u64;
        }
        if lane == 0 {
            self.main_stream(bytes, now);
        }
        Ok(())
    }

    fn main_stream(&mut self, bytes: &[u8], now: Instant) {
        if self.end.feed(bytes) {
            self.stage = Stage::Draining;
            self.drained(0);
        }
        if self.stopped_since.is_none() && self.end.in_devices() {
            self.stopped_since = Some(now);
        }
        if let Some(violation) = self.end.lost().filter(|_| !self.end_lost_logged) {
            self.end_lost_logged = true;
            log::line(
                "warning",
                "unreadable-stream",
                &[("rule", json!(violation.rule)), ("offset", json!(violation.offset))],
            );
        }
    }

    /// A lane's socket would block. Only after the main lane's end does that mean anything.
    pub fn drained(&mut self, lane: u16) {
        if self.stage == Stage::Draining
            && let Some(sent) = self.lanes.get_mut(usize::from(lane))
        {
            sent.drained = true;
        }
    }

    fn evidence(&self) -> StreamEvidence {
        StreamEvidence::of_channels(&self.lanes.iter().map(Sent::evidence).collect::<Vec<_>>())
    }

    /// What follows the last byte of all lanes, once.
    pub fn end_frames(&mut self, now: Instant) -> Vec<Effect> {
        if self.stage != Stage::Draining || !self.lanes.iter().all(|sent| sent.drained) {
            return Vec::new();
        }
        self.stage = Stage::Flushing(self.evidence());
        let ends = (0u16..).zip(&self.lanes).map(|(lane, sent)| Effect::EndOfLane(lane, sent.evidence()));
        let mut effects: Vec<_> = ends.collect();
        effects.push(self.ping.send(now, PING_INTERVAL_AT_END));
        effects
    }

    /// Everything queued is on the network.
    pub fn flushed(&mut self, now: Instant) -> Vec<Effect> {
        let Stage::Flushing(evidence) = self.stage else { return Vec::new() };
        self.stage = Stage::Guarded { until: now + FREEZE_GUARD };
        let idle_us = micros(now.duration_since(self.last_byte));
        vec![Effect::report(FromAgent::EndOfStream { evidence, idle_us })]
    }

    /// Bytes of the other QEMU's return path: only what pre-copy needs passes. SHUT never does.
    pub fn return_path(&mut self, bytes: &[u8]) -> Vec<Effect> {
        let mut messages = Vec::new();
        if let Err(error) = self.returns.feed(bytes, |message| messages.push(message)) {
            return vec![self.refuse_return(&error.to_string())];
        }
        let mut out = Vec::new();
        for message in messages {
            self.return_messages += 1;
            match message {
                Message::Pong(1) | Message::SwitchoverAcknowledged
                    if self.return_messages <= MAX_RETURN_MESSAGES =>
                {
                    out.extend(message.encode().unwrap_or_default());
                }
                // The other agent holds it back too; a compromised one must not end the hand-over early.
                Message::Shut(_) => log::line("warning", "acknowledgement-withheld", &[]),
                other => return vec![self.refuse_return(&format!("{other:?}"))],
            }
        }
        // Once the stream has ended QEMU waits for nothing but SHUT, and nothing may move between proof and vote.
        let open = matches!(self.stage, Stage::Streaming | Stage::Flushing(_));
        if out.is_empty() || !open { Vec::new() } else { vec![Effect::ToHypervisor(out)] }
    }

    /// What a bad return path leads to: while frozen, only the daemon ends anything.
    fn refuse_return(&self, found: &str) -> Effect {
        if self.stage == Stage::Frozen {
            log::line("warning", "return-path-refused-while-frozen", &[("found", json!(found))]);
            return Effect::DropPeer;
        }
        Effect::reject(return_finding(found))
    }

    /// A control frame of the other agent.
    pub fn control(&mut self, lane: u16, control: Control, now: Instant) -> Vec<Effect> {
        match control {
            _ if lane != 0 => self.peer_gone("the other agent sent a frame that belongs to the main channel"),
            Control::Ping(number) => vec![Effect::Frame(Control::Pong(number))],
            Control::Pong(number) => {
                self.ping.answered(number, now);
                Vec::new()
            }
            Control::Suspended => {
                self.peer_suspended = true;
                Vec::new()
            }
            Control::Resumed => {
                self.peer_suspended = false;
                Vec::new()
            }
            Control::Accepted(_) => {
                log::line("info", "accepted-by-peer", &[]);
                Vec::new()
            }
            Control::Running => {
                let round_trip_us = micros(self.ping.round_trip.unwrap_or_default());
                vec![Effect::report(FromAgent::PeerRunning { round_trip_us })]
            }
            Control::Abort { code, text } => {
                self.peer_gone(&format!("the other agent gave up: {code}: {text}"))
            }
            Control::End(_) => self.peer_gone("the other agent sent what only a source sends"),
        }
    }

    /// The channel is gone.
    pub fn peer_gone(&mut self, detail: &str) -> Vec<Effect> {
        if self.stage == Stage::Frozen {
            log::line("warning", "peer-gone-while-frozen", &[("detail", json!(detail))]);
            return vec![Effect::DropPeer];
        }
        vec![Effect::end(EndedBy::Peer, detail, ErrorCode::ChannelFailed)]
    }

    /// QEMU closed a socket.
    pub fn hypervisor_gone(&mut self) -> Vec<Effect> {
        if self.stage == Stage::Frozen {
            log::line("info", "hypervisor-gone-while-frozen", &[]);
            return Vec::new();
        }
        let detail = match self.stage {
            Stage::Streaming | Stage::Draining => "QEMU closed its socket before the end of the stream",
            _ => "QEMU closed its socket after the end of the stream, before the freeze",
        };
        vec![Effect::end(EndedBy::Hypervisor, detail, ErrorCode::SourceFailed)]
    }

    /// Holds or releases the stream; the other agent is told.
    pub fn suspend(&mut self, on: bool) -> Vec<Effect> {
        self.suspended = on;
        vec![Effect::Frame(if on { Control::Suspended } else { Control::Resumed })]
    }

    /// Answers whether anything moved since the end of the stream; `quiet` is what the socket shows right now.
    pub fn prove(&self, nonce: Nonce, quiet: Result<(), String>) -> Vec<Effect> {
        let proof = match self.stage {
            Stage::Streaming | Stage::Draining | Stage::Flushing(_) => {
                Err("the stream has not ended".to_owned())
            }
            Stage::Guarded { .. } | Stage::Frozen => quiet,
        };
        vec![Effect::report(match proof {
            Ok(()) => FromAgent::Proven { nonce },
            Err(detail) => FromAgent::NotProven { nonce, detail },
        })]
    }

    /// FROZEN is journalled. Only a proven end can be: anything else is a defect that must not stop the guard.
    pub fn frozen(&mut self) {
        match self.stage {
            Stage::Guarded { .. } | Stage::Frozen => self.stage = Stage::Frozen,
            _ => log::line("error", "frozen-before-the-end", &[]),
        }
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        match self.stage {
            Stage::Guarded { until } if now >= until => {
                let report = FromAgent::Ended {
                    what: EndedBy::FreezeGuard,
                    detail: "no FROZEN within a second of the end of the stream".to_owned(),
                    digest: Some(self.evidence().digest),
                };
                let abort = (ErrorCode::SourceFailed, "the source was not frozen in time".to_owned());
                return vec![Effect::End(End { report: Some(Box::new(report)), abort: Some(abort) })];
            }
            Stage::Streaming | Stage::Draining if now >= self.time_budget => {
                let detail = "the stream takes longer than the permit allows";
                return vec![Effect::end(EndedBy::Budget, detail, ErrorCode::BudgetExceeded)];
            }
            Stage::Streaming | Stage::Draining
                if self.stopped_since.is_some_and(|since| now >= since + self.downtime_budget) =>
            {
                let detail = "the guest is stopped and its stream does not end within the downtime budget";
                return vec![Effect::end(EndedBy::Budget, detail, ErrorCode::BudgetExceeded)];
            }
            _ => {}
        }
        if now < self.ping.next {
            return Vec::new();
        }
        let interval = if self.stage == Stage::Streaming { PING_INTERVAL } else { PING_INTERVAL_AT_END };
        vec![self.ping.send(now, interval)]
    }

    /// When time must be looked at next.
    #[must_use]
    pub fn next_tick(&self) -> Instant {
        match self.stage {
            Stage::Guarded { until } => until.min(self.ping.next),
            _ => self.ping.next,
        }
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The finding of a return path that breaks its rules.
pub(crate) fn return_finding(found: &str) -> types::migration::Finding {
    types::migration::Finding {
        rule: "INV-P1".to_owned(),
        threat: "MM-01".to_owned(),
        severity: types::migration::Severity::Critical,
        channel: 0,
        offset: 0,
        section: "return path".to_owned(),
        expected: "PONG 1, SWITCHOVER_ACK or SHUT".to_owned(),
        found: found.chars().take(120).collect(),
        response: "terminated".to_owned(),
    }
}
