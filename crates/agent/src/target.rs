//! The target's half: inspects, releases, holds QEMU's final acknowledgement back. No I/O.
//!
//! ```text
//! Receiving –END, inspector and digest agree→ [Judging –verdict→] Releasing –all written→ Accepted
//!     └ anything breaks: end, QEMU's socket closes without another byte
//!
//! Judging only where the permit asks for signatures: the device state waits for the scanner's verdict.
//! ```

use crate::arm::Armed;
use crate::effect::Effect;
use crate::log;
use crate::signatures::Judgement;
use crate::source::{micros, return_finding};
use engine::inspect::{HeldState, Inspector, Pages, Unsupported, finding};
use serde_json::json;
use std::time::Instant;
use types::ErrorCode;
use types::agent::{EndedBy, FromAgent};
use types::handover::{Digest, StreamEvidence};
use types::migration::{Finding, Severity};
use wire::frame::Control;
use wire::qemu::return_path::{Decoder, Message};

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
    hasher: blake3::Hasher,
    held_since: Option<Instant>,
    /// Whether the device state waits for a verdict.
    awaits_verdict: bool,
    released_bytes: u64,
    time_budget: Instant,
    suspended: bool,
    returns: Decoder,
    acknowledged: bool,
}

impl Target {
    /// A target that starts to receive at `now`.
    ///
    /// # Errors
    /// There is no inspector for this record and permit.
    pub fn new(armed: &Armed, now: Instant) -> Result<Self, Unsupported> {
        Ok(Self {
            stage: Stage::Receiving,
            inspector: Inspector::new(&armed.inventory, &armed.limits)?,
            hasher: blake3::Hasher::new(),
            held_since: None,
            awaits_verdict: armed.profile.signatures,
            released_bytes: 0,
            time_budget: now + armed.time_left,
            suspended: false,
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
    pub fn block_name(&self, index: u16) -> Option<String> {
        self.inspector.block_name(usize::from(index))
    }

    /// Bytes of the stream. What may reach QEMU is given to `release`.
    ///
    /// # Errors
    /// The end, because a rule was broken.
    pub fn data(
        &mut self,
        bytes: &[u8],
        now: Instant,
        release: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Vec<Effect>> {
        match self.stage {
            Stage::Receiving => {}
            // Nothing can be undone any more, and nothing of this reaches QEMU.
            Stage::Judging { .. } | Stage::Releasing { .. } | Stage::Accepted => {
                return Err(self.peer_gone("the other agent sent stream bytes after the end"));
            }
        }
        self.hasher.update(bytes);
        let released = &mut self.released_bytes;
        let result = self.inspector.feed(bytes, &mut |piece| {
            *released += piece.len() as u64;
            release(piece);
        });
        if self.held_since.is_none() && self.inspector.held_bytes().is_some_and(|held| held > 0) {
            self.held_since = Some(now);
        }
        result.map_err(|violation| vec![reject(finding(&violation, 0, "terminated"))])
    }

    /// A control frame of the other agent.
    pub fn control(&mut self, control: Control, now: Instant) -> Vec<Effect> {
        match control {
            Control::Ping(number) => vec![Effect::Frame(Control::Pong(number))],
            Control::End(evidence) if self.stage == Stage::Receiving => self.end(evidence, now),
            Control::Abort { code, text } => {
                self.peer_gone(&format!("the other agent gave up: {code}: {text}"))
            }
            // Informational: nothing arrives while the source is suspended.
            Control::Suspended | Control::Resumed | Control::Pong(_) => Vec::new(),
            Control::End(_) | Control::Accepted(_) | Control::Running => {
                self.peer_gone("the other agent sent a frame that has no place here")
            }
        }
    }

    fn end(&mut self, claimed: StreamEvidence, now: Instant) -> Vec<Effect> {
        let digest = Digest(*self.hasher.finalize().as_bytes());
        let evidence = StreamEvidence { stream_bytes: self.inspector.stream_bytes(), digest };
        let state = match self.inspector.finish() {
            Ok(state) => state,
            Err(violation) => return vec![reject(finding(&violation, 0, "terminated"))],
        };
        if evidence != claimed {
            return vec![reject(digest_finding(claimed, evidence))];
        }
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
        log::line("info", "released", &[("devices", json!(state.devices)), ("held_us", json!(held_us))]);
        vec![Effect::ToHypervisor(state.bytes)]
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

    /// Bytes of our QEMU's return path. SHUT is swallowed, for ever.
    pub fn from_hypervisor(&mut self, bytes: &[u8]) -> Vec<Effect> {
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

    /// QEMU closed its socket: as it should once it has acknowledged.
    pub fn hypervisor_gone(&mut self) -> Vec<Effect> {
        if self.acknowledged && self.stage == Stage::Accepted {
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

    /// Time passed.
    pub fn tick(&mut self, now: Instant) -> Vec<Effect> {
        if matches!(self.stage, Stage::Receiving | Stage::Judging { .. }) && now >= self.time_budget {
            let detail = "the stream takes longer than the permit allows";
            return vec![Effect::end(EndedBy::Budget, detail, ErrorCode::BudgetExceeded)];
        }
        Vec::new()
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
fn digest_finding(claimed: StreamEvidence, here: StreamEvidence) -> Finding {
    let text = |e: StreamEvidence| format!("{} bytes, {}", e.stream_bytes, e.digest);
    Finding {
        rule: "INV-E4".to_owned(),
        threat: "MM-10".to_owned(),
        severity: Severity::Critical,
        channel: 0,
        offset: here.stream_bytes,
        section: "whole stream".to_owned(),
        expected: text(claimed),
        found: text(here),
        response: "terminated".to_owned(),
    }
}
