//! Where a restarted source daemon takes up: the journal, folded, against what is seen of QEMU.

use super::super::journal::SourceFact;
use super::super::{FROZEN_WATCHDOG_MS, Resolution, TimerKind, reason};
use super::{Effect, Effects, Event, FreedBy, Outcome, QemuSeen, Shared, State, resend_timer};
use types::ErrorCode;
use types::handover::{AbortReason, SourceVote, Statement, StreamEvidence};

/// The journal so far, folded.
pub(super) enum Past {
    Open,
    Declined(AbortReason),
    NoVote(AbortReason),
    Voted {
        vote: SourceVote,
        asked: bool,
    },
    Freed(FreedBy),
    Releasing(StreamEvidence, Outcome),
    Released(StreamEvidence, Outcome),
    /// With its vote, if it had voted.
    Lost(Option<SourceVote>),
    Closed(Box<Self>),
}

impl Past {
    pub(super) fn then(self, fact: &SourceFact) -> Self {
        match (self, fact) {
            (Self::Closed(past), _) => Self::Closed(past),
            (past, SourceFact::Opened { .. } | SourceFact::Declined { .. } | SourceFact::Freezing) => past,
            (_, SourceFact::NoVote { reason }) => Self::NoVote(reason.clone()),
            (_, SourceFact::Frozen { vote }) => Self::Voted { vote: vote.clone(), asked: false },
            (Self::Voted { vote, .. }, SourceFact::Asked { .. }) => Self::Voted { vote, asked: true },
            (past, SourceFact::Asked { .. }) => past,
            (_, SourceFact::RenunciationAccepted { proof }) => {
                Self::Freed(FreedBy::Renunciation(proof.clone()))
            }
            (_, SourceFact::FenceAccepted { resolution: Resolution::Thaw }) => Self::Freed(FreedBy::Fence),
            (past, SourceFact::FenceAccepted { resolution: Resolution::Discard }) => {
                past.releasing(Outcome::Discarded)
            }
            (past, SourceFact::Releasing) => past.releasing(Outcome::Migrated),
            (Self::Releasing(evidence, outcome), SourceFact::Released) => Self::Released(evidence, outcome),
            (past, SourceFact::Released) => past,
            (Self::Voted { vote, .. }, SourceFact::Lost) => Self::Lost(Some(vote)),
            (Self::Freed(freed_by), SourceFact::Lost) => Self::Freed(freed_by),
            (_, SourceFact::Lost) => Self::Lost(None),
            (past, SourceFact::Closed) => Self::Closed(Box::new(past)),
        }
    }

    fn releasing(self, outcome: Outcome) -> Self {
        match self {
            Self::Voted { vote, .. } | Self::Lost(Some(vote)) => Self::Releasing(vote.evidence, outcome),
            past => past,
        }
    }
}

impl Shared {
    /// Where a restarted daemon takes up.
    pub(super) fn resume(&self, past: Past, seen: QemuSeen) -> (State, Effects) {
        let restart = || reason(ErrorCode::SourceFailed, "the source's daemon restarted before the vote");
        let next = match (past, seen) {
            (Past::Closed(past), _) => return (self.ended(*past), Vec::new()),
            (Past::Released(evidence, outcome), _) => {
                return (State::Released { evidence, outcome }, self.send_released(evidence));
            }
            (Past::NoVote(reason), QemuSeen::Superseded) => {
                let effects = self.send_no_vote(&reason);
                return (State::Cancelling { reason, runs: true }, effects);
            }
            (Past::Freed(freed_by), QemuSeen::Superseded | QemuSeen::Dead) => {
                let effects = self.present_thaw(&freed_by);
                return (State::Thawed { freed_by, runs: true }, effects);
            }
            (Past::Releasing(evidence, outcome), QemuSeen::Dead) => {
                self.releasing(evidence, outcome, Event::QemuDied)
            }
            // A claim is given only once these are over: whatever this is, the QEMU is not this attempt's to touch.
            (Past::Releasing(..) | Past::Open, QemuSeen::Superseded) => self.lose(),
            (Past::Voted { vote, .. }, QemuSeen::Superseded) => self.lose_after_vote(vote),
            (Past::Releasing(evidence, outcome), _) => self.kill(evidence, outcome, Vec::new()),
            (Past::Declined(reason), _) => {
                let effects = self.send_no_vote(&reason);
                return (State::Cancelling { reason, runs: true }, effects);
            }
            (Past::Open | Past::NoVote(_), QemuSeen::Dead) => self.lose(),
            (Past::Open, _) => self.give_up(restart()),
            (Past::NoVote(reason), _) => self.give_up(reason),
            (Past::Voted { vote, .. }, QemuSeen::Dead) => self.lose_after_vote(vote),
            (Past::Voted { vote, asked }, QemuSeen::Frozen) => {
                let mut effects = self.present_vote(&vote, asked);
                effects.push(Effect::SetTimer(TimerKind::Watchdog, FROZEN_WATCHDOG_MS));
                return (State::Voted { vote, asked }, effects);
            }
            (Past::Voted { vote, asked }, QemuSeen::Running) => self.voted(vote, asked, Event::GuestResumed),
            (Past::Freed(freed_by), _) => {
                let mut effects = self.thaw_effects();
                effects.extend(self.present_thaw(&freed_by));
                return (State::Thawed { freed_by, runs: false }, effects);
            }
            (Past::Lost(Some(vote)), _) => {
                let effects = vec![Effect::Send(Statement::Frozen(vote.clone())), resend_timer()];
                return (State::VotedLost { vote }, effects);
            }
            (Past::Lost(None), _) => self.lose(),
        };
        let (state, reaction) = next;
        (state, reaction.effects)
    }

    fn ended(&self, past: Past) -> State {
        let (answer, outcome) = match past {
            Past::Releasing(evidence, outcome) | Past::Released(evidence, outcome) => {
                (vec![Effect::Send(self.release_receipt(evidence))], outcome)
            }
            Past::NoVote(reason) | Past::Declined(reason) => {
                (vec![Effect::Send(self.no_vote(&reason))], Outcome::Kept)
            }
            Past::Freed(freed_by) => (self.thaw_answer(&freed_by), Outcome::Kept),
            Past::Open | Past::Voted { .. } | Past::Closed(_) => (Vec::new(), Outcome::Kept),
            Past::Lost(_) => {
                let reason = reason(ErrorCode::HypervisorFailed, "QEMU died on the source");
                (vec![Effect::Send(self.no_vote(&reason))], Outcome::Lost)
            }
        };
        State::Closed { answer, outcome }
    }
}
