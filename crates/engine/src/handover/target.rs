//! The target daemon's part of a hand-over.
//!
//! ```text
//!            QemuPrepared             accepted + completed + paused          COMMIT
//! Preparing ─────────────> Receiving ──────────────────────────────> Voted ────────> Starting
//!     │                        │                                       │                │ paused: Cont, ContDone
//!     │ fails                  │ ABORT, VOID, asked, rejected,         │ VOID, asked,   v
//!     │                        │ channel lost, budget, QEMU died       │ QEMU died   Running ──Close──> Closed
//!     └────────────────────────┴──────────────┬────────────────────────┘                │
//!                                             v            ContRefused, still paused    │ QemuDied
//!                                        Renouncing <──────── (same daemon life) ── Starting
//!                                             │ QemuDied: sign, send                    v
//!                                             v                                       Lost
//!                                         Renounced ──Close──> Closed
//! ```
//! Before its vote the target may give up on its own. After it, only the registry (VOID), a source that still holds
//! its frozen QEMU, or the death of its own copy makes it renounce; after `cont` may have been sent, nothing does.

mod messages;
mod recover;

pub use self::messages::{Effect, Event, Order, Outcome, QemuSeen, QemuStatus, RunState};
use self::recover::Past;
use super::journal::{AlreadyConsumed, NonceLedger, TargetEntry, TargetFact};
use super::{
    Attempt, QEMU_POLL_MS, RESEND_MS, Reaction, RecoverError, Refusal, Rule, Rules, TargetStatus, TimerKind,
    Weight, key_matches, reason,
};
use types::ErrorCode;
use types::handover::{
    AbortReason, PriorRunState, Renunciation, RunningReceipt, Statement, StreamEvidence, TargetVote,
};

/// The machine. One per attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    shared: Shared,
    state: State,
}

/// What every state has.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shared {
    attempt: Attempt,
    rules: Rules,
}

/// Whether `cont` may have reached QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cont {
    /// Never written in this daemon's life, in which RUN was journalled too.
    NotSent,
    /// Written in this life, in which RUN was journalled too.
    Sent,
    /// RUN was found in the journal: an earlier life may have written it.
    Unknown,
}

/// One variant per state, with what is legal in it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Preparing,
    Receiving { accepted: Option<StreamEvidence> },
    Voted { vote: TargetVote },
    Starting { vote: TargetVote, prior: PriorRunState, cont: Cont },
    Running { receipt: RunningReceipt },
    Renouncing { reason: AbortReason },
    Renounced,
    Lost { reason: AbortReason },
    Closed { last: Option<Box<Statement>>, outcome: Outcome },
}

type Effects = Vec<Effect>;
type Next = (State, Reaction<Effect>);

impl Target {
    /// Consumes the permit and prepares QEMU. The permit is verified; the first effect makes its nonce's use
    /// durable, before anything else happens (I4).
    ///
    /// # Errors
    /// The nonce was consumed before. The attempt that consumed it is the machine that answers.
    pub fn prepare(
        attempt: Attempt,
        ledger: &mut NonceLedger,
    ) -> Result<(Self, Vec<Effect>), AlreadyConsumed> {
        Self::prepare_under(Rules::ALL, attempt, ledger)
    }

    pub(super) fn prepare_under(
        rules: Rules,
        attempt: Attempt,
        ledger: &mut NonceLedger,
    ) -> Result<(Self, Effects), AlreadyConsumed> {
        ledger.consume(&attempt)?;
        let budget_ms = attempt.run_budget_ms;
        let shared = Shared { attempt, rules };
        let mut effects = Vec::new();
        if rules.has(Rule::DurableNonce) {
            effects.push(shared.journal(TargetFact::Consumed { attempt: Box::new(shared.attempt.clone()) }));
        }
        effects.extend([
            Effect::SetTimer(TimerKind::RunBudget, budget_ms),
            Effect::PrepareQemu { paused: rules.has(Rule::TargetStartsPaused) },
        ]);
        Ok((Self { shared, state: State::Preparing }, effects))
    }

    /// Renounces an attempt that was never prepared here: an order to end it came and no machine knows it. Consumes
    /// the nonce, so that a PREPARE that was only late finds it used.
    ///
    /// # Errors
    /// The nonce was consumed before: the machine that consumed it answers.
    pub fn decline(
        attempt: Attempt,
        reason: AbortReason,
        ledger: &mut NonceLedger,
    ) -> Result<(Self, Vec<Effect>), AlreadyConsumed> {
        ledger.consume(&attempt)?;
        let shared = Shared { attempt, rules: Rules::ALL };
        let mut effects =
            vec![shared.journal(TargetFact::Consumed { attempt: Box::new(shared.attempt.clone()) })];
        let (state, reaction) = shared.renounce(reason);
        effects.extend(reaction.effects);
        Ok((Self { shared, state }, effects))
    }

    /// Rebuilds the machine from the entries of one attempt, oldest first, and from what is seen of QEMU; the
    /// effects take up where the crash cut. No VM agent outlives its daemon.
    ///
    /// # Errors
    /// The entries are not those of one attempt from its start.
    pub fn recover<'a>(
        entries: impl IntoIterator<Item = &'a TargetEntry>,
        seen: QemuSeen,
    ) -> Result<(Self, Vec<Effect>), RecoverError> {
        Self::recover_under(Rules::ALL, entries, seen)
    }

    pub(super) fn recover_under<'a>(
        rules: Rules,
        entries: impl IntoIterator<Item = &'a TargetEntry>,
        seen: QemuSeen,
    ) -> Result<(Self, Effects), RecoverError> {
        let mut entries = entries.into_iter();
        let first = entries.next();
        let Some(TargetEntry { key, fact: TargetFact::Consumed { attempt } }) = first else {
            return Err(RecoverError::NoAttempt { migration: first.map(|e| e.key.migration) });
        };
        let shared = Shared { attempt: (**attempt).clone(), rules };
        let mut past = Past::Unvoted;
        for entry in entries {
            if entry.key != *key {
                let (first, other) = (key.migration, entry.key.migration);
                return Err(RecoverError::MixedAttempts { first, other });
            }
            past = past.then(&entry.fact);
        }
        let (state, effects) = shared.resume(past, seen);
        Ok((Self { shared, state }, effects))
    }

    /// The attempt.
    #[must_use]
    pub fn attempt(&self) -> &Attempt {
        &self.shared.attempt
    }

    /// How it ended, once nothing is awaited any more.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        match self.state {
            State::Closed { outcome, .. } => Some(outcome),
            _ => None,
        }
    }

    /// Whether it will never touch its QEMU again.
    pub(super) fn has_let_go(&self) -> bool {
        matches!(
            self.state,
            State::Running { .. } | State::Renounced | State::Lost { .. } | State::Closed { .. }
        )
    }

    /// The name of the state, for `migration show`, logs and tests.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match &self.state {
            State::Preparing => "preparing",
            State::Receiving { accepted: None } => "receiving",
            State::Receiving { accepted: Some(_) } => "accepted",
            State::Voted { .. } => "voted",
            State::Starting { cont: Cont::NotSent, .. } => "starting",
            State::Starting { cont: Cont::Sent, .. } => "cont-sent",
            State::Starting { cont: Cont::Unknown, .. } => "starting-again",
            State::Running { .. } => "running",
            State::Renouncing { .. } => "renouncing",
            State::Renounced => "renounced",
            State::Lost { .. } => "lost",
            State::Closed { .. } => "closed",
        }
    }

    /// Takes one event.
    pub fn handle(&mut self, event: Event) -> Reaction<Effect> {
        // The placeholder is never seen: `next` replaces it before this returns.
        let placeholder = State::Closed { last: None, outcome: Outcome::Lost };
        let state = std::mem::replace(&mut self.state, placeholder);
        let (state, reaction) = self.shared.next(state, event);
        self.state = state;
        reaction
    }
}

impl Shared {
    /// Sorts out what names another attempt, then asks the state.
    fn next(&self, state: State, event: Event) -> Next {
        let key = match &event {
            Event::Order { key, .. } => Some(key),
            Event::Asked(request) => Some(&request.key),
            _ => None,
        };
        if key.is_some_and(|key| !key_matches(self.rules, &self.attempt.key, key)) {
            return (state, Reaction::refused(Refusal::WrongKey, Vec::new()));
        }
        if let Event::Asked(request) = &event
            && request.permit != self.attempt.permit
            && self.rules.has(Rule::ExactOrders)
        {
            return (state, Reaction::refused(Refusal::NotCovered, Vec::new()));
        }
        match state {
            State::Preparing => self.preparing(event),
            State::Receiving { accepted } => self.receiving(accepted, event),
            State::Voted { vote } => self.voted(vote, event),
            State::Starting { vote, prior, cont } => self.starting(vote, prior, cont, event),
            State::Running { receipt } => self.running(receipt, event),
            State::Renouncing { reason } => self.renouncing(reason, event),
            State::Renounced => self.renounced(event),
            State::Lost { reason } => self.lost(reason, event),
            State::Closed { last, outcome } => closed(last, outcome, event),
        }
    }

    fn preparing(&self, event: Event) -> Next {
        match event {
            Event::QemuPrepared(qemu) => {
                let effects = vec![self.journal(TargetFact::Prepared { qemu }), Effect::Ready];
                (State::Receiving { accepted: None }, Reaction::act(effects))
            }
            Event::PrepareFailed { detail } => self.renounce(reason(ErrorCode::TargetFailed, detail)),
            other => self.before_the_vote(State::Preparing, other),
        }
    }

    fn receiving(&self, accepted: Option<StreamEvidence>, event: Event) -> Next {
        match event {
            Event::StreamAccepted(evidence) if accepted.is_none() => {
                let accepted = Some(evidence);
                (State::Receiving { accepted }, Reaction::act(vec![Effect::QueryQemu]))
            }
            Event::Timer(TimerKind::Poll) if accepted.is_some() => {
                (State::Receiving { accepted }, Reaction::act(vec![Effect::QueryQemu]))
            }
            Event::QemuStatus(QemuStatus { run: RunState::Running, .. })
                if self.rules.has(Rule::TargetStartsPaused) =>
            {
                self.ran_by_itself()
            }
            Event::QemuStatus(QemuStatus { completed, run }) => match accepted {
                Some(evidence) if completed && run != RunState::InMigrate => self.vote(evidence),
                // Mutation only: without the check, acceptance alone makes the vote.
                Some(evidence) if !self.rules.has(Rule::CheckBeforeCont) => self.vote(evidence),
                _ => {
                    let effects = vec![Effect::SetTimer(TimerKind::Poll, QEMU_POLL_MS)];
                    (State::Receiving { accepted }, Reaction::act(effects))
                }
            },
            other => self.before_the_vote(State::Receiving { accepted }, other),
        }
    }

    /// Before its vote the target is free to give up: its copy is not the only one.
    fn before_the_vote(&self, same: State, event: Event) -> Next {
        match event {
            Event::Order { order: Order::Abort { reason } | Order::Void { reason }, .. } => {
                self.renounce(reason)
            }
            Event::Asked(_) => self.renounce_when_asked(),
            Event::StreamRejected { detail } => self.renounce(reason(ErrorCode::StreamRejected, detail)),
            Event::ChannelLost { detail } => self.renounce(reason(ErrorCode::ChannelFailed, detail)),
            Event::QemuDied => self.renounce(reason(ErrorCode::HypervisorFailed, "QEMU died on the target")),
            Event::Timer(TimerKind::RunBudget) => {
                self.renounce(reason(ErrorCode::BudgetExceeded, "the stream did not end within its budget"))
            }
            Event::Order { order: Order::Commit { .. } | Order::Close, .. } => {
                (same, Reaction::refused(Refusal::NotVoted, Vec::new()))
            }
            _ => (same, Reaction::ignored()),
        }
    }

    fn vote(&self, evidence: StreamEvidence) -> Next {
        let Attempt { key, permit, .. } = self.attempt;
        let vote = TargetVote { key, permit, evidence };
        let mut effects = vec![
            self.journal(TargetFact::Voted { vote: vote.clone() }),
            Effect::Send(Statement::Prepared(vote.clone())),
            resend_timer(),
        ];
        if self.rules.has(Rule::NoTimerRenounce) {
            effects.push(Effect::ClearTimer(TimerKind::RunBudget));
        } else {
            effects.push(Effect::SetTimer(TimerKind::RunBudget, 2 * RESEND_MS));
        }
        (State::Voted { vote }, Reaction::act(effects))
    }

    fn voted(&self, vote: TargetVote, event: Event) -> Next {
        match event {
            Event::Order { order: Order::Commit { evidence, prior }, .. } => {
                self.commit(vote, evidence, prior)
            }
            Event::Order { order: Order::Void { reason }, .. } => self.renounce(reason),
            Event::Asked(_) => self.renounce_when_asked(),
            Event::QemuDied => self.renounce(reason(ErrorCode::HypervisorFailed, "QEMU died on the target")),
            // H7: bound by the vote; the source may be gone, and then this copy is the only one.
            Event::Order { order: Order::Abort { .. }, .. } => {
                let effects = present_vote(&vote);
                (State::Voted { vote }, Reaction::refused(Refusal::BoundByVote, effects))
            }
            Event::Timer(TimerKind::RunBudget) if !self.rules.has(Rule::NoTimerRenounce) => {
                self.renounce(reason(ErrorCode::BudgetExceeded, "no commit came"))
            }
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present, .. } => {
                let effects = present_vote(&vote);
                (State::Voted { vote }, Reaction::act(effects))
            }
            Event::Order { order: Order::Close, .. } => {
                (State::Voted { vote }, Reaction::refused(Refusal::BoundByVote, Vec::new()))
            }
            Event::QemuStatus(QemuStatus { run: RunState::Running, .. }) => self.ran_by_itself(),
            _ => (State::Voted { vote }, Reaction::ignored()),
        }
    }

    /// RUN is journalled before `cont` is even considered.
    fn commit(&self, vote: TargetVote, evidence: StreamEvidence, prior: PriorRunState) -> Next {
        if evidence != vote.evidence && self.rules.has(Rule::ExactOrders) {
            return (State::Voted { vote }, Reaction::refused(Refusal::EvidenceDiffers, Vec::new()));
        }
        let effects = vec![
            self.journal(TargetFact::Run { prior }),
            Effect::ClearTimer(TimerKind::Resend),
            Effect::QueryQemu,
        ];
        (State::Starting { vote, prior, cont: Cont::NotSent }, Reaction::act(effects))
    }

    fn starting(&self, vote: TargetVote, prior: PriorRunState, cont: Cont, event: Event) -> Next {
        match event {
            Event::QemuStatus(status) => self.start_or_wait(vote, prior, cont, status),
            Event::Timer(TimerKind::Poll | TimerKind::Resend) | Event::ManagerContact => {
                (State::Starting { vote, prior, cont }, Reaction::act(vec![Effect::QueryQemu]))
            }
            Event::ContDone => self.runs(&vote, prior),
            // H9, and its limit: only in the life that journalled RUN is it known that nothing ran.
            Event::ContRefused { still_paused: true } if cont != Cont::Unknown => {
                if !self.rules.has(Rule::RefusedContRenounces) {
                    return (State::Starting { vote, prior, cont: Cont::NotSent }, Reaction::ignored());
                }
                self.renounce(reason(ErrorCode::TargetFailed, "QEMU refused to continue the VM"))
            }
            Event::ContRefused { .. } => {
                let text = "QEMU refuses to continue the VM, which may have run already; it is tried again";
                let effects = vec![Effect::Report(Weight::Notice, text.into()), resend_timer()];
                (State::Starting { vote, prior, cont }, Reaction::act(effects))
            }
            Event::QemuDied if cont == Cont::NotSent => self.renounce(reason(
                ErrorCode::HypervisorFailed,
                "QEMU died on the target before it was continued",
            )),
            Event::QemuDied => {
                self.lose("QEMU died on the target when the VM may have run; it restarts from its disk")
            }
            Event::Asked(_) => {
                let effects = vec![Effect::Answer(TargetStatus::Running)];
                (State::Starting { vote, prior, cont }, Reaction::refused(Refusal::TooLate, effects))
            }
            Event::Order { order: Order::Void { .. } | Order::Abort { .. } | Order::Close, .. } => {
                (State::Starting { vote, prior, cont }, Reaction::refused(Refusal::TooLate, Vec::new()))
            }
            _ => (State::Starting { vote, prior, cont }, Reaction::ignored()),
        }
    }

    fn start_or_wait(&self, vote: TargetVote, prior: PriorRunState, cont: Cont, status: QemuStatus) -> Next {
        let ready = status.completed && status.run == RunState::Paused;
        if status.run == RunState::Running {
            return self.runs(&vote, prior);
        }
        if !ready && self.rules.has(Rule::CheckBeforeCont) {
            let effects = vec![Effect::SetTimer(TimerKind::Poll, QEMU_POLL_MS)];
            return (State::Starting { vote, prior, cont }, Reaction::act(effects));
        }
        if prior == PriorRunState::Paused {
            return self.runs(&vote, prior);
        }
        let cont = if cont == Cont::NotSent { Cont::Sent } else { cont };
        (State::Starting { vote, prior, cont }, Reaction::act(vec![Effect::Cont]))
    }

    fn runs(&self, vote: &TargetVote, prior: PriorRunState) -> Next {
        let receipt = self.receipt(vote, prior);
        let effects =
            vec![Effect::Announce, Effect::Send(Statement::Running(receipt.clone())), resend_timer()];
        (State::Running { receipt }, Reaction::act(effects))
    }

    fn receipt(&self, vote: &TargetVote, state: PriorRunState) -> RunningReceipt {
        let Attempt { key, permit, .. } = self.attempt;
        RunningReceipt { key, permit, evidence: vote.evidence, state }
    }

    fn running(&self, receipt: RunningReceipt, event: Event) -> Next {
        match event {
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present | Order::Commit { .. }, .. } => {
                let effects = vec![Effect::Send(Statement::Running(receipt.clone())), resend_timer()];
                (State::Running { receipt }, Reaction::act(effects))
            }
            Event::Asked(_) => {
                let effects = vec![Effect::Answer(TargetStatus::Running)];
                (State::Running { receipt }, Reaction::refused(Refusal::TooLate, effects))
            }
            // If the target ran even a millisecond the source is never thawed.
            Event::Order { order: Order::Void { .. } | Order::Abort { .. }, .. } => {
                let effects = vec![Effect::Send(Statement::Running(receipt.clone())), resend_timer()];
                (State::Running { receipt }, Reaction::refused(Refusal::TooLate, effects))
            }
            Event::Order { order: Order::Close, .. } => {
                let last = Some(Box::new(Statement::Running(receipt)));
                self.close(last, Outcome::Runs)
            }
            Event::QemuDied => {
                // An ordinary crash of the VM, after the hand-over: the receipt is still true, and still owed.
                let text = "QEMU died on the target after the hand-over; the VM crashed there";
                let effects = vec![Effect::Report(Weight::Notice, text.into())];
                (State::Running { receipt }, Reaction::act(effects))
            }
            _ => (State::Running { receipt }, Reaction::ignored()),
        }
    }

    fn renounce_when_asked(&self) -> Next {
        let (state, mut reaction) =
            self.renounce(reason(ErrorCode::Terminated, "the source, frozen, asked for it"));
        reaction.effects.insert(0, Effect::Answer(TargetStatus::NotRun));
        (state, reaction)
    }

    /// H4: journal RENOUNCED, kill QEMU, wait for its death, and only then sign.
    fn renounce(&self, reason: AbortReason) -> Next {
        let journal = self.journal(TargetFact::Renounced { reason: reason.clone() });
        let mut effects = vec![
            Effect::ClearTimer(TimerKind::RunBudget),
            Effect::ClearTimer(TimerKind::Poll),
            Effect::KillQemu,
            resend_timer(),
        ];
        match (self.rules.has(Rule::JournalBeforeSigning), self.rules.has(Rule::DeadBeforeSigning)) {
            (true, true) => effects.insert(0, journal),
            (false, _) => {
                effects.insert(0, Effect::Send(self.renunciation()));
                effects.insert(1, journal);
            }
            (true, false) => {
                effects.insert(0, journal);
                effects.insert(1, Effect::Send(self.renunciation()));
            }
        }
        (State::Renouncing { reason }, Reaction::act(effects))
    }

    fn renouncing(&self, reason: AbortReason, event: Event) -> Next {
        match event {
            Event::QemuDied => {
                let effects = vec![Effect::CloseAgent, Effect::Send(self.renunciation()), resend_timer()];
                (State::Renounced, Reaction::act(effects))
            }
            Event::Timer(TimerKind::Resend) => {
                let effects = vec![Effect::KillQemu, resend_timer()];
                (State::Renouncing { reason }, Reaction::act(effects))
            }
            Event::Asked(_) => {
                let effects = vec![Effect::Answer(TargetStatus::NotRun)];
                (State::Renouncing { reason }, Reaction::act(effects))
            }
            Event::Order { order: Order::Commit { .. }, .. } => {
                (State::Renouncing { reason }, Reaction::refused(Refusal::GaveUp, Vec::new()))
            }
            _ => (State::Renouncing { reason }, Reaction::ignored()),
        }
    }

    fn renounced(&self, event: Event) -> Next {
        let effects = || vec![Effect::Send(self.renunciation()), resend_timer()];
        match event {
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Asked(_)
            | Event::Order { order: Order::Present | Order::Void { .. } | Order::Abort { .. }, .. } => {
                (State::Renounced, Reaction::act(effects()))
            }
            Event::Order { order: Order::Commit { .. }, .. } => {
                (State::Renounced, Reaction::refused(Refusal::GaveUp, effects()))
            }
            Event::Order { order: Order::Close, .. } => {
                let last = Some(Box::new(self.renunciation()));
                self.close(last, Outcome::Renounced)
            }
            _ => (State::Renounced, Reaction::ignored()),
        }
    }

    fn renunciation(&self) -> Statement {
        let Attempt { key, permit, ref source, ref target, target_journal: journal, .. } = self.attempt;
        let (source, target) = (source.clone(), target.clone());
        Statement::Renounced(Renunciation { key, permit, source, target, journal })
    }

    /// It ran without an order (its `-S` was undone): no renunciation is true any more, and it must not go on.
    fn ran_by_itself(&self) -> Next {
        let (state, mut reaction) = self.lose("the target's QEMU ran without a commit; it is killed");
        reaction.effects.insert(1, Effect::KillQemu);
        (state, reaction)
    }

    fn lose(&self, text: &'static str) -> Next {
        let effects = vec![
            self.journal(TargetFact::Lost),
            Effect::CloseAgent,
            Effect::Report(Weight::Breach, text.into()),
        ];
        let reason = reason(ErrorCode::HypervisorFailed, text);
        (State::Lost { reason }, Reaction::act(effects))
    }

    fn lost(&self, reason: AbortReason, event: Event) -> Next {
        match event {
            Event::Asked(_) => {
                let effects = vec![Effect::Answer(TargetStatus::Running)];
                (State::Lost { reason }, Reaction::refused(Refusal::TooLate, effects))
            }
            Event::Order { order: Order::Commit { .. } | Order::Present, .. } => {
                let effects = vec![Effect::Report(Weight::Notice, reason.detail.clone().into())];
                (State::Lost { reason }, Reaction::refused(Refusal::WrongState, effects))
            }
            Event::Order { order: Order::Close, .. } => self.close(None, Outcome::Lost),
            _ => (State::Lost { reason }, Reaction::ignored()),
        }
    }

    fn close(&self, last: Option<Box<Statement>>, outcome: Outcome) -> Next {
        let effects = vec![
            self.journal(TargetFact::Closed),
            Effect::ClearTimer(TimerKind::Resend),
            Effect::CloseAgent,
            Effect::Done(outcome),
        ];
        (State::Closed { last, outcome }, Reaction::act(effects))
    }

    fn journal(&self, fact: TargetFact) -> Effect {
        Effect::Journal(TargetEntry { key: self.attempt.key, fact })
    }
}

fn present_vote(vote: &TargetVote) -> Effects {
    vec![Effect::Send(Statement::Prepared(vote.clone())), resend_timer()]
}

fn closed(last: Option<Box<Statement>>, outcome: Outcome, event: Event) -> Next {
    let asks = match event {
        Event::Order { order: Order::Close, .. } => false,
        Event::Order { .. } | Event::Asked(_) | Event::ManagerContact => true,
        _ => false,
    };
    let reaction = match &last {
        Some(statement) if asks => Reaction::act(vec![Effect::Send((**statement).clone())]),
        _ => Reaction::ignored(),
    };
    (State::Closed { last, outcome }, reaction)
}

fn resend_timer() -> Effect {
    Effect::SetTimer(TimerKind::Resend, RESEND_MS)
}
