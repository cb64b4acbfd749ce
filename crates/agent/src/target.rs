//! The target's half: inspects, releases, holds QEMU's final acknowledgement back. No I/O.
//!
//! ```text
//! Receiving –END of every lane, inspector and digests agree→ [Judging –verdict→] Releasing –all written→ Accepted
//!     └ anything breaks: end, QEMU's sockets close without another byte
//!
//! Judging only where the permit asks for signatures: the device state waits for the scanner's verdict.
//! ```

use crate::arm::Armed;
use crate::effect::Effect;
use crate::log;
use crate::signatures::Judgement;
use crate::source::{micros, return_finding};
use engine::inspect::{HeldState, Inspector, Output, Pages, Unsupported, Violation, finding, unvouched};
use serde_json::json;
use std::time::{Duration, Instant};
use types::ErrorCode;
use types::agent::{EndedBy, FromAgent};
use types::handover::{Digest, StreamEvidence};
use types::migration::{Finding, Severity};
use wire::frame::Control;
use wire::qemu::return_path::{Decoder, Message};

/// A stream that stands still for this long is not going to end; suspended ones are meant to.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Receiving,
    Judging { evidence: StreamEvidence, state: HeldState },
    Releasing { evidence: StreamEvidence, held_us: u64 },
    Accepted,
}

/// See the module.
#[derive(Debug)]
pub struct Target {
    stage: Stage,
    inspector: Inspector,
    lanes: Vec<Received>,
    held_since: Option<Instant>,
    /// Whether the device state waits for a verdict.
    awaits_verdict: bool,
    released_bytes: u64,
    time_budget: Instant,
    downtime_budget: Duration,
    /// When the main lane had ended: the guest is stopped, and the others have that long.
    main_ended: Option<Instant>,
    suspended: bool,
    peer_suspended: bool,
    /// When a byte of the stream came last, or could not have come.
    last_byte: Instant,
    returns: Decoder,
    acknowledged: bool,
}

/// What came on one lane.
#[derive(Debug, Default)]
struct Received {
    hasher: blake3::Hasher,
    bytes: u64,
    /// By its END, equal on both sides.
    ended: bool,
}

impl Received {
    fn evidence(&self) -> StreamEvidence {
        StreamEvidence { stream_bytes: self.bytes, digest: Digest(*self.hasher.finalize().as_bytes()) }
    }
}

/// Counts what is released on its way.
struct Counted<'o> {
    released_bytes: &'o mut u64,
    out: &'o mut dyn Output,
}

impl Output for Counted<'_> {
    fn release(&mut self, channel: u16, bytes: &[u8]) {
        *self.released_bytes += bytes.len() as u64;
        self.out.release(channel, bytes);
    }

    fn page(&mut self, block: usize, offset: u64, piece: &[u8]) {
        self.out.page(block, offset, piece);
    }

    fn has_room(&self) -> bool {
        self.out.has_room()
    }
}

impl Target {
    /// A target that starts to receive at `now`.
    ///
    /// # Errors
    /// There is no inspector for this record and permit.
    pub fn new(armed: &Armed, now: Instant) -> Result<Self, Unsupported> {
        Ok(Self {
            stage: Stage::Receiving,
            inspector: Inspector::new(&armed.inventory, armed.catalogue.as_ref(), &armed.limits)?,
            lanes: (0..armed.lanes).map(|_| Received::default()).collect(),
            held_since: None,
            awaits_verdict: armed.profile.signatures.is_on(),
            released_bytes: 0,
            time_budget: now + armed.time_left,
            downtime_budget: armed.downtime_budget(),
            main_ended: None,
            suspended: false,
            peer_suspended: false,
            last_byte: now,
            returns: Decoder::default(),
            acknowledged: false,
        })
    }

    /// Whether released bytes may go to QEMU now.
    #[must_use]
    pub fn suspended(&self) -> bool {
        self.suspended
    }

    /// Bytes released so far.
    #[must_use]
    pub fn released_bytes(&self) -> u64 {
        self.released_bytes
    }

    /// Pages seen so far.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.inspector.pages()
    }

    /// The name of a RAM block by its index in the stream's own list.
    #[must_use]
    pub fn block_name(&self, index: usize) -> Option<String> {
        self.inspector.block_name(index)
    }

    /// Whether a lane is to be read. One that is ahead of the others waits, as QEMU would make it.
    #[must_use]
    pub fn wants(&self, lane: u16) -> bool {
        self.stage != Stage::Receiving || self.inspector.wants(lane) || self.has_ended(lane)
    }

    fn has_ended(&self, lane: u16) -> bool {
        self.lanes.get(usize::from(lane)).is_some_and(|received| received.ended)
    }

    /// Bytes of a lane. What may reach QEMU is given to `out`, with its lane, and so are the pages that it holds.
    ///
    /// # Errors
    /// The end, because a rule was broken.
    pub fn data(
        &mut self,
        lane: u16,
        bytes: &[u8],
        now: Instant,
        out: &mut dyn Output,
    ) -> Result<(), Vec<Effect>> {
        // After the end nothing can be undone any more, and nothing of this reaches QEMU.
        let open = self.stage == Stage::Receiving && !self.has_ended(lane);
        let Some(received) = self.lanes.get_mut(usize::from(lane)).filter(|_| open) else {
            return Err(self.peer_gone("the other agent sent stream bytes after the end"));
        };
        self.last_byte = now;
        received.hasher.update(bytes);
        received.bytes += bytes.len() as u64;
        let mut counted = Counted { released_bytes: &mut self.released_bytes, out };
        let result = self.inspector.feed(lane, bytes, &mut counted);
        if self.held_since.is_none() && self.inspector.held_bytes().is_some_and(|held| held > 0) {
            self.held_since = Some(now);
        }
        result.map_err(|refused| vec![reject(finding(&refused.violation, refused.channel, "terminated"))])?;
        if self.is_over() { Err(self.finish(now)) } else { Ok(()) }
    }

    /// Whether bytes that came wait for room in the scanner, and for nothing else.
    #[must_use]
    pub fn is_held_back(&self) -> bool {
        self.stage == Stage::Receiving && self.inspector.is_held_back()
    }

    /// Goes on with what was held back, as [`Self::data`] does with new bytes.
    pub fn resume(&mut self, now: Instant, out: &mut dyn Output) -> Vec<Effect> {
        let mut counted = Counted { released_bytes: &mut self.released_bytes, out };
        match self.inspector.resume(&mut counted) {
            Err(refused) => vec![reject(finding(&refused.violation, refused.channel, "terminated"))],
            Ok(()) if self.is_over() => self.finish(now),
            Ok(()) => Vec::new(),
        }
    }

    /// Whether all has come: every lane has ended, or what is open waits for what can't come any more.
    fn is_over(&self) -> bool {
        let mut lanes = (0u16..).zip(&self.lanes);
        self.has_ended(0)
            && !self.inspector.is_held_back()
            && lanes.all(|(lane, received)| received.ended || !self.inspector.wants(lane))
    }

    /// A control frame of the other agent.
    pub fn control(&mut self, lane: u16, control: Control, now: Instant) -> Vec<Effect> {
        match control {
            Control::End(evidence) if self.stage == Stage::Receiving => self.end(lane, evidence, now),
            Control::End(_) | Control::Accepted(_) | Control::Running => {
                self.peer_gone("the other agent sent a frame that has no place here")
            }
            _ if lane != 0 => self.peer_gone("the other agent sent a frame that belongs to the main channel"),
            Control::Ping(number) => vec![Effect::Frame(Control::Pong(number))],
            Control::Abort { code, text } => {
                self.peer_gone(&format!("the other agent gave up: {code}: {text}"))
            }
            // Informational: nothing arrives while the source is suspended.
            Control::Suspended | Control::Resumed => {
                self.peer_suspended = control == Control::Suspended;
                self.last_byte = now;
                Vec::new()
            }
            Control::Pong(_) => Vec::new(),
        }
    }

    fn end(&mut self, lane: u16, claimed: StreamEvidence, now: Instant) -> Vec<Effect> {
        let Some(received) = self.lanes.get_mut(usize::from(lane)).filter(|received| !received.ended) else {
            return self.peer_gone("the other agent ended a channel twice");
        };
        let here = received.evidence();
        if here != claimed {
            return vec![reject(digest_finding(lane, claimed, here))];
        }
        received.ended = true;
        if lane == 0 {
            self.main_ended = Some(now);
        }
        if self.is_over() { self.finish(now) } else { Vec::new() }
    }

    /// Judges the whole.
    fn finish(&mut self, now: Instant) -> Vec<Effect> {
        let state = match self.inspector.finish() {
            Ok(state) => state,
            Err(refused) => return vec![reject(finding(&refused.violation, refused.channel, "terminated"))],
        };
        if !self.lanes.iter().all(|received| received.ended) {
            return self.peer_gone("a channel's end is missing");
        }
        let evidence =
            StreamEvidence::of_channels(&self.lanes.iter().map(Received::evidence).collect::<Vec<_>>());
        if self.awaits_verdict {
            self.stage = Stage::Judging { evidence, state };
            return Vec::new();
        }
        self.release(evidence, state, now)
    }

    /// Whether only the verdict on guest pages is awaited.
    #[must_use]
    pub fn is_judging(&self) -> bool {
        matches!(self.stage, Stage::Judging { .. })
    }

    /// The verdict on guest pages; before the end of the stream only one that refuses counts.
    pub fn judged(&mut self, judgement: Judgement, now: Instant) -> Vec<Effect> {
        let observed = |finding| Effect::report(FromAgent::Observed { finding: Box::new(finding) });
        let mut effects: Vec<Effect> = Vec::new();
        match (std::mem::replace(&mut self.stage, Stage::Receiving), judgement.refusal) {
            (Stage::Receiving | Stage::Judging { .. }, Some(refusal)) => {
                effects.extend(judgement.findings.into_iter().map(observed));
                effects.push(reject(refusal));
            }
            (Stage::Judging { evidence, state }, None) => {
                effects.extend(judgement.findings.into_iter().map(observed));
                effects.extend(self.release(evidence, state, now));
            }
            (stage, _) => self.stage = stage,
        }
        effects
    }

    fn release(&mut self, evidence: StreamEvidence, state: HeldState, now: Instant) -> Vec<Effect> {
        let held_us = self.held_since.map_or(0, |since| micros(now.duration_since(since)));
        self.stage = Stage::Releasing { evidence, held_us };
        self.released_bytes += state.bytes.len() as u64;
        log::line(
            "info",
            "released",
            &[("devices", json!(state.sections.len())), ("held_us", json!(held_us))],
        );
        // The guest waits for its state; what is worth telling of it comes behind.
        let told = unvouched(&state.sections).into_iter();
        let told = told.map(|finding| Effect::report(FromAgent::Observed { finding: Box::new(finding) }));
        std::iter::once(Effect::ToHypervisor(state.bytes)).chain(told).collect()
    }

    /// QEMU took everything that was released.
    pub fn flushed(&mut self, wire_bytes: u64) -> Vec<Effect> {
        let Stage::Releasing { evidence, held_us } = self.stage else { return Vec::new() };
        self.stage = Stage::Accepted;
        vec![
            Effect::Frame(Control::Accepted(evidence)),
            Effect::report(FromAgent::Accepted { evidence, held_us, wire_bytes }),
        ]
    }

    /// Bytes of our QEMU's return path, on the main lane. SHUT is swallowed, for ever.
    pub fn from_hypervisor(&mut self, lane: u16, bytes: &[u8]) -> Vec<Effect> {
        if lane != 0 {
            let found = "an answer on a channel that only goes one way";
            return vec![Effect::reject(Finding { channel: lane, ..return_finding(found) })];
        }
        let mut messages = Vec::new();
        if let Err(error) = self.returns.feed(bytes, |message| messages.push(message)) {
            return vec![Effect::reject(return_finding(&error.to_string()))];
        }
        let (mut effects, mut back) = (Vec::new(), Vec::new());
        for message in messages {
            match message {
                Message::Shut(status) => {
                    self.acknowledged = true;
                    effects.push(Effect::report(FromAgent::AcknowledgementHeld { status }));
                }
                Message::Pong(_) | Message::SwitchoverAcknowledged => {
                    back.extend(message.encode().unwrap_or_default())
                }
                other => return vec![Effect::reject(return_finding(&format!("{other:?}")))],
            }
        }
        if !back.is_empty() {
            effects.insert(0, Effect::Return(back));
        }
        effects
    }

    /// The guest runs: the other side is told.
    pub fn announce_running(&self) -> Vec<Effect> {
        if self.stage != Stage::Accepted {
            log::line("error", "running-before-accepted", &[]);
            return Vec::new();
        }
        vec![Effect::Frame(Control::Running)]
    }

    /// The channel is gone. An accepted stream needs it no more.
    pub fn peer_gone(&mut self, detail: &str) -> Vec<Effect> {
        if matches!(self.stage, Stage::Receiving | Stage::Judging { .. }) {
            return vec![Effect::end(EndedBy::Peer, detail, ErrorCode::ChannelFailed)];
        }
        log::line("warning", "peer-gone-after-the-end", &[("detail", json!(detail))]);
        vec![Effect::DropPeer]
    }

    /// QEMU closed a socket: the main one as it should once it has acknowledged, the others when it has read the end.
    /// `flushed` says whether it had taken all of it.
    pub fn hypervisor_gone(&mut self, lane: u16, flushed: bool) -> Vec<Effect> {
        let may_close = match (lane, &self.stage) {
            (0, stage) => self.acknowledged && *stage == Stage::Accepted,
            (_, Stage::Receiving | Stage::Judging { .. }) => false,
            (_, Stage::Releasing { .. } | Stage::Accepted) => flushed,
        };
        if may_close {
            return Vec::new();
        }
        let detail = "QEMU closed its socket before it acknowledged the stream";
        vec![Effect::end(EndedBy::Hypervisor, detail, ErrorCode::TargetFailed)]
    }

    /// Holds or releases what goes to QEMU; the other agent is told.
    pub fn suspend(&mut self, on: bool) -> Vec<Effect> {
        self.suspended = on;
        vec![Effect::Frame(if on { Control::Suspended } else { Control::Resumed })]
    }

    /// Nothing is read from the other agent, because QEMU or the scanner does not take what came: its silence is ours.
    pub fn not_reading(&mut self, now: Instant) {
        self.last_byte = now;
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        if matches!(self.stage, Stage::Receiving | Stage::Judging { .. }) && now >= self.time_budget {
            let detail = "the stream takes longer than the permit allows";
            return vec![Effect::end(EndedBy::Budget, detail, ErrorCode::BudgetExceeded)];
        }
        let late = |ended| now >= ended + self.downtime_budget;
        if matches!(self.stage, Stage::Receiving | Stage::Judging { .. }) && self.main_ended.is_some_and(late)
        {
            let detail = "the guest is stopped and its stream is not accepted within the downtime budget";
            return vec![Effect::end(EndedBy::Budget, detail, ErrorCode::BudgetExceeded)];
        }
        if self.suspended || self.peer_suspended {
            self.last_byte = now;
        }
        if self.stage == Stage::Receiving && now >= self.last_byte + SILENCE_LIMIT {
            return vec![reject(self.silence())];
        }
        Vec::new()
    }

    /// An honest source always sends: while it has nothing new it says so, many times a second.
    fn silence(&self) -> Finding {
        let violation = Violation::new(
            "INV-T5",
            self.inspector.stream_bytes(),
            "stream",
            format!("a byte at least every {} s", SILENCE_LIMIT.as_secs()),
            "silence",
        );
        finding(&violation, 0, "terminated")
    }
}

fn reject(finding: Finding) -> Effect {
    log::line(
        "error",
        "rejected",
        &[
            ("rule", json!(finding.rule)),
            ("threat", json!(finding.threat)),
            ("offset", json!(finding.offset)),
        ],
    );
    Effect::reject(finding)
}

/// The sides disagree on the stream: what arrived is not what left.
fn digest_finding(lane: u16, claimed: StreamEvidence, here: StreamEvidence) -> Finding {
    let text = |e: StreamEvidence| format!("{} bytes, {}", e.stream_bytes, e.digest);
    Finding {
        rule: "INV-E4".to_owned(),
        threat: "MM-10".to_owned(),
        severity: Severity::Critical,
        channel: lane,
        offset: here.stream_bytes,
        section: "whole stream".to_owned(),
        expected: text(claimed),
        found: text(here),
        response: "terminated".to_owned(),
    }
}
