//! Where a restarted target daemon takes up: the journal, folded, against what is seen of QEMU.

use super::super::journal::TargetFact;
use super::super::reason;
use super::{Cont, Effect, Effects, Event, Outcome, QemuSeen, Shared, State, present_vote, resend_timer};
use types::ErrorCode;
use types::handover::{AbortReason, PriorRunState, Statement, TargetVote};

/// The journal so far, folded.
pub(super) enum Past {
    Unvoted,
    Voted(TargetVote),
    Run(TargetVote, PriorRunState),
    Renounced(AbortReason),
    Lost,
    Closed(Box<Self>),
}

impl Past {
    pub(super) fn then(self, fact: &TargetFact) -> Self {
        match (self, fact) {
            (Self::Closed(past), _) => Self::Closed(past),
            (past, TargetFact::Consumed { .. } | TargetFact::Prepared { .. }) => past,
            (_, TargetFact::Voted { vote }) => Self::Voted(vote.clone()),
            (Self::Voted(vote), TargetFact::Run { prior }) => Self::Run(vote, *prior),
            (past, TargetFact::Run { .. }) => past,
            (_, TargetFact::Renounced { reason }) => Self::Renounced(reason.clone()),
            (_, TargetFact::Lost) => Self::Lost,
            (past, TargetFact::Closed) => Self::Closed(Box::new(past)),
        }
    }
}

impl Shared {
    /// Where a restarted daemon takes up.
    pub(super) fn resume(&self, past: Past, seen: QemuSeen) -> (State, Effects) {
        let restart = || reason(ErrorCode::TargetFailed, "the target's daemon restarted before the vote");
        let (state, reaction) = match (past, seen) {
            (Past::Closed(past), _) => return (self.ended(*past), Vec::new()),
            (Past::Renounced(reason), _) => {
                return (State::Renouncing { reason }, vec![Effect::KillQemu, resend_timer()]);
            }
            (Past::Unvoted | Past::Voted(_), QemuSeen::Running) => self.ran_by_itself(),
            (Past::Unvoted, _) => self.renounce(restart()),
            (Past::Voted(vote), QemuSeen::Dead | QemuSeen::Superseded) => self.voted(vote, Event::QemuDied),
            (Past::Voted(vote), QemuSeen::Paused) => {
                let effects = present_vote(&vote);
                return (State::Voted { vote }, effects);
            }
            // It ran, or no later attempt could have been opened: the receipt is still owed, `cont` is not.
            (Past::Run(vote, prior), QemuSeen::Superseded) => {
                let receipt = self.receipt(&vote, prior);
                let effects = vec![Effect::Send(Statement::Running(receipt.clone())), resend_timer()];
                return (State::Running { receipt }, effects);
            }
            (Past::Run(vote, prior), QemuSeen::Running) => self.runs(&vote, prior),
            (Past::Run(vote, prior), QemuSeen::Paused) => {
                return (State::Starting { vote, prior, cont: Cont::Unknown }, vec![Effect::QueryQemu]);
            }
            (Past::Run(..), QemuSeen::Dead) => {
                self.lose("QEMU died on the target when the VM may have run; it restarts from its disk")
            }
            (Past::Lost, _) => self.ran_by_itself(),
        };
        (state, reaction.effects)
    }

    fn ended(&self, past: Past) -> State {
        let (last, outcome) = match past {
            Past::Run(vote, prior) => {
                (Some(Box::new(Statement::Running(self.receipt(&vote, prior)))), Outcome::Runs)
            }
            Past::Renounced(_) => (Some(Box::new(self.renunciation())), Outcome::Renounced),
            Past::Unvoted | Past::Voted(_) | Past::Closed(_) => (None, Outcome::Renounced),
            Past::Lost => (None, Outcome::Lost),
        };
        State::Closed { last, outcome }
    }
}
