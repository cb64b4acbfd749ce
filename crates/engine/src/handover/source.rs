//! The source daemon's part of a hand-over.
//!
//! ```text
//!            GuestStopped           EndOfStream          FreezeConfirmed        ProofOk
//! Streaming ─────────────> Stopping ───────────> Freezing ─────────────> Proving ───────> Voted
//!     │ (EndOfStream may come first)                 │                      │               │
//!     └───────────────┬──────────────────────────────┴──────────────────────┘               │
//!          anything that fails, ABORT,                                      RENUNCIATION, or │ RELEASE, or
//!          suspend from STOP on: NO-VOTE                               fenced target (thaw)  │ fenced (discard)
//!                     v                                                         ┌────────────┴──────┐
//!                Cancelling                                                     v                   v
//!                     │                                                      Thawed             Releasing
//!                     │ Close                                                   │ Close             │ QemuDied
//!                     └──────────────────────> Closed <─────────────────────────┴───── Released <───┘
//! QemuDied before the vote: Lost.  QemuDied after it: VotedLost (the vote stands; it may not ask any more).
//! ```
//! From `Voted` on the guest is frozen, and no timer, order or guess of this daemon lets it run again: only the two
//! edges that the drawing names leave the state.

mod claim;
mod messages;
mod recover;

pub use self::claim::Claim;
pub use self::messages::{Effect, Event, Order, Outcome, QemuSeen};
use self::recover::Past;
use super::journal::{SourceEntry, SourceFact};
use super::{
    Attempt, FROZEN_WATCHDOG_MS, QemuFacts, RESEND_MS, Reaction, RecoverError, Refusal, RenunciationProof,
    Resolution, Rule, Rules, SWITCHOVER_LIMIT_MS, TargetStatus, TimerKind, Weight, key_matches, reason,
};
use types::ErrorCode;
use types::handover::{
    AbortReason, NoVote, PriorRunState, ReleaseReceipt, RenounceRequest, SourceVote, Statement,
    StreamEvidence, ThawReceipt,
};

/// The machine. One per attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    shared: Shared,
    state: State,
}

/// What every state has.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shared {
    attempt: Attempt,
    qemu: QemuFacts,
    prior: PriorRunState,
    rules: Rules,
}

/// One variant per state, with what is legal in it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Streaming {
        suspended: bool,
    },
    Stopping,
    Freezing {
        evidence: StreamEvidence,
    },
    Proving {
        evidence: StreamEvidence,
    },
    Voted {
        vote: SourceVote,
        asked: bool,
    },
    VotedLost {
        vote: SourceVote,
    },
    Thawed {
        freed_by: FreedBy,
        runs: bool,
    },
    Cancelling {
        reason: AbortReason,
        runs: bool,
    },
    Releasing {
        evidence: StreamEvidence,
        outcome: Outcome,
    },
    Released {
        evidence: StreamEvidence,
        outcome: Outcome,
    },
    Lost {
        reason: AbortReason,
    },
    /// With what late messages are answered.
    Closed {
        answer: Effects,
        outcome: Outcome,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum FreedBy {
    Renunciation(RenunciationProof),
    Fence,
}

type Effects = Vec<Effect>;
type Next = (State, Reaction<Effect>);

impl Source {
    /// Starts the migration. The permit is verified, both VM agents are connected, and the target is ready.
    #[must_use]
    pub fn start(
        claim: Claim,
        attempt: Attempt,
        qemu: QemuFacts,
        prior: PriorRunState,
    ) -> (Self, Vec<Effect>) {
        Self::start_under(Rules::ALL, claim, attempt, qemu, prior)
    }

    pub(super) fn start_under(
        rules: Rules,
        _claim: Claim,
        attempt: Attempt,
        qemu: QemuFacts,
        prior: PriorRunState,
    ) -> (Self, Effects) {
        let shared = Shared { attempt, qemu, prior, rules };
        let opened = SourceFact::Opened { attempt: Box::new(shared.attempt.clone()), qemu, prior };
        let effects = vec![shared.journal(opened), Effect::StartMigration];
        (Self { shared, state: State::Streaming { suspended: false } }, effects)
    }

    /// Declines an attempt that never started here: an order to abort came for it and no machine knows it. Journalled,
    /// so that a START that was only late finds the promise never to vote.
    #[must_use]
    pub fn decline(attempt: Attempt, reason: AbortReason) -> (Self, Vec<Effect>) {
        let shared = Shared::declining(Rules::ALL, attempt);
        let fact = SourceFact::Declined { attempt: Box::new(shared.attempt.clone()), reason: reason.clone() };
        let mut effects = vec![shared.journal(fact)];
        effects.extend(shared.send_no_vote(&reason));
        (Self { shared, state: State::Cancelling { reason, runs: true } }, effects)
    }

    /// Rebuilds the machine from the entries of one attempt, oldest first, and from what is seen of QEMU; the
    /// effects take up where the crash cut. No VM agent outlives its daemon.
    ///
    /// # Errors
    /// The entries are not those of one attempt from its start.
    pub fn recover<'a>(
        entries: impl IntoIterator<Item = &'a SourceEntry>,
        qemu: QemuSeen,
    ) -> Result<(Self, Vec<Effect>), RecoverError> {
        Self::recover_under(Rules::ALL, entries, qemu)
    }

    pub(super) fn recover_under<'a>(
        rules: Rules,
        entries: impl IntoIterator<Item = &'a SourceEntry>,
        seen: QemuSeen,
    ) -> Result<(Self, Effects), RecoverError> {
        let mut entries = entries.into_iter();
        let first = entries.next();
        let (shared, mut past) = match first.map(|e| &e.fact) {
            Some(SourceFact::Opened { attempt, qemu, prior }) => {
                (Shared { attempt: (**attempt).clone(), qemu: *qemu, prior: *prior, rules }, Past::Open)
            }
            Some(SourceFact::Declined { attempt, reason }) => {
                (Shared::declining(rules, (**attempt).clone()), Past::Declined(reason.clone()))
            }
            _ => return Err(RecoverError::NoAttempt { migration: first.map(|e| e.key.migration) }),
        };
        let key = shared.attempt.key;
        for entry in entries {
            if entry.key != key {
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

    /// Whether this daemon holds the guest frozen under its vote.
    #[must_use]
    pub fn holds_frozen(&self) -> bool {
        matches!(self.state, State::Voted { .. })
    }

    /// Whether it will never touch its QEMU again.
    fn has_let_go(&self) -> bool {
        match self.state {
            State::Cancelling { runs, .. } | State::Thawed { runs, .. } => runs,
            State::Released { .. } | State::Lost { .. } | State::Closed { .. } => true,
            _ => false,
        }
    }

    /// The name of the state, for `migration show`, logs and tests.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match &self.state {
            State::Streaming { suspended: false } => "streaming",
            State::Streaming { suspended: true } => "suspended",
            State::Stopping => "stopping",
            State::Freezing { .. } => "freezing",
            State::Proving { .. } => "proving",
            State::Voted { asked: false, .. } => "voted",
            State::Voted { asked: true, .. } => "asking",
            State::VotedLost { .. } => "voted-lost",
            State::Thawed { .. } => "thawed",
            State::Cancelling { .. } => "cancelling",
            State::Releasing { .. } => "releasing",
            State::Released { .. } => "released",
            State::Lost { .. } => "lost",
            State::Closed { .. } => "closed",
        }
    }

    /// Takes one event.
    pub fn handle(&mut self, event: Event) -> Reaction<Effect> {
        // The placeholder is never seen: `next` replaces it before this returns.
        let placeholder = State::Closed { answer: Vec::new(), outcome: Outcome::Lost };
        let state = std::mem::replace(&mut self.state, placeholder);
        let (state, reaction) = self.shared.next(state, event);
        self.state = state;
        reaction
    }
}

impl Shared {
    /// A declined attempt has no QEMU: its only state asks nothing of one.
    fn declining(rules: Rules, attempt: Attempt) -> Self {
        let qemu = QemuFacts { pid: 0, start_time_ticks: 0, boot: attempt.nonce };
        Self { attempt, qemu, prior: PriorRunState::Running, rules }
    }

    /// Sorts out what names another attempt, then asks the state.
    fn next(&self, state: State, event: Event) -> Next {
        let named = match &event {
            Event::Order { key, .. } | Event::TargetStatus { key, .. } => Some(key),
            _ => None,
        };
        if named.is_some_and(|key| !key_matches(self.rules, &self.attempt.key, key)) {
            return (state, Reaction::refused(Refusal::WrongKey, Vec::new()));
        }
        if let Event::Renounced(proof) = &event
            && !proof.covers(self.rules, &self.attempt)
        {
            return (state, Reaction::refused(Refusal::NotCovered, Vec::new()));
        }
        match state {
            State::Streaming { suspended } => self.streaming(suspended, event),
            State::Stopping => self.stopping(event),
            State::Freezing { evidence } => self.freezing(evidence, event),
            State::Proving { evidence } => self.proving(evidence, event),
            State::Voted { vote, asked } => self.voted(vote, asked, event),
            State::VotedLost { vote } => self.voted_lost(vote, event),
            State::Thawed { freed_by, runs } => self.thawed(freed_by, runs, event),
            State::Cancelling { reason, runs } => self.cancelling(reason, runs, event),
            State::Releasing { evidence, outcome } => self.releasing(evidence, outcome, event),
            State::Released { evidence, outcome } => self.released(evidence, outcome, event),
            State::Lost { reason } => self.lost(reason, event),
            State::Closed { answer, outcome } => closed(answer, outcome, event),
        }
    }

    fn streaming(&self, suspended: bool, event: Event) -> Next {
        let same = State::Streaming { suspended };
        match event {
            Event::GuestStopped if suspended && self.rules.has(Rule::StopWhileSuspendedAborts) => self
                .give_up(reason(
                    ErrorCode::Terminated,
                    "the guest stopped for the switchover while suspended",
                )),
            Event::GuestStopped => {
                let effects = vec![
                    Effect::SetTimer(TimerKind::Switchover, SWITCHOVER_LIMIT_MS),
                    self.journal(SourceFact::Freezing),
                ];
                (State::Stopping, Reaction::act(effects))
            }
            Event::EndOfStream(_) if suspended && self.rules.has(Rule::StopWhileSuspendedAborts) => {
                self.give_up(reason(ErrorCode::Terminated, "the stream ended while suspended"))
            }
            // The VM agent may be faster than QMP; the proof asks for STOP anyway.
            Event::EndOfStream(evidence) => self.freeze(evidence, vec![self.journal(SourceFact::Freezing)]),
            Event::Order { order: Order::Suspend, .. } if !suspended => {
                (State::Streaming { suspended: true }, Reaction::act(vec![Effect::SuspendRelay]))
            }
            Event::Order { order: Order::Resume, .. } if suspended => {
                (State::Streaming { suspended: false }, Reaction::act(vec![Effect::ResumeRelay]))
            }
            // A resume outside the switchover is the user's own `cont` after a pause.
            Event::GuestResumed => (same, Reaction::ignored()),
            other => self.before_the_vote(same, other),
        }
    }

    fn stopping(&self, event: Event) -> Next {
        match event {
            Event::EndOfStream(evidence) => self.freeze(evidence, Vec::new()),
            Event::GuestResumed => {
                self.give_up(reason(ErrorCode::SourceFailed, "the guest resumed by itself in the switchover"))
            }
            Event::Timer(TimerKind::Switchover) => self
                .give_up(reason(ErrorCode::BudgetExceeded, "the switchover stalled before the stream ended")),
            // From the guest's STOP on a hold would freeze the guest: suspend means abort.
            Event::Order { order: Order::Suspend, .. } => {
                self.give_up(reason(ErrorCode::Terminated, "suspended during the switchover"))
            }
            other => self.before_the_vote(State::Stopping, other),
        }
    }

    fn freeze(&self, evidence: StreamEvidence, mut effects: Effects) -> Next {
        effects.push(Effect::ClearTimer(TimerKind::Switchover));
        let prove = Effect::Prove { prior: self.prior };
        if !self.rules.has(Rule::Freeze) {
            effects.push(prove);
            return (State::Proving { evidence }, Reaction::act(effects));
        }
        if !self.rules.has(Rule::ProofAfterFreeze) {
            effects.push(prove);
        }
        effects.push(Effect::Freeze);
        (State::Freezing { evidence }, Reaction::act(effects))
    }

    fn freezing(&self, evidence: StreamEvidence, event: Event) -> Next {
        match event {
            // H1: the frozen state is confirmed first, and only then is it proven that nothing moved before it.
            Event::FreezeConfirmed => {
                if !self.rules.has(Rule::Proof) || !self.rules.has(Rule::ProofAfterFreeze) {
                    return self.vote(evidence);
                }
                (State::Proving { evidence }, Reaction::act(vec![Effect::Prove { prior: self.prior }]))
            }
            Event::FreezeFailed { detail } => self.give_up(reason(ErrorCode::SourceFailed, detail)),
            Event::GuestResumed => {
                self.give_up(reason(ErrorCode::SourceFailed, "the guest resumed by itself before the freeze"))
            }
            Event::Order { order: Order::Suspend, .. } => {
                self.give_up(reason(ErrorCode::Terminated, "suspended during the switchover"))
            }
            other => self.before_the_vote(State::Freezing { evidence }, other),
        }
    }

    fn proving(&self, evidence: StreamEvidence, event: Event) -> Next {
        match event {
            Event::ProofOk => self.vote(evidence),
            Event::ProofFailed { detail } => self.give_up(reason(ErrorCode::SourceFailed, detail)),
            Event::GuestResumed => {
                self.give_up(reason(ErrorCode::SourceFailed, "the guest resumed by itself before the freeze"))
            }
            Event::Order { order: Order::Suspend, .. } => {
                self.give_up(reason(ErrorCode::Terminated, "suspended during the switchover"))
            }
            other => self.before_the_vote(State::Proving { evidence }, other),
        }
    }

    /// What every state before the vote makes of what it does not await.
    fn before_the_vote(&self, same: State, event: Event) -> Next {
        match event {
            Event::Order { order: Order::Abort { reason }, .. } => self.give_up(reason),
            Event::Renounced(_) => {
                self.give_up(reason(ErrorCode::TargetFailed, "the target gave this attempt up"))
            }
            Event::ChannelLost { detail } => self.give_up(reason(ErrorCode::ChannelFailed, detail)),
            Event::MigrationFailed { detail } => self.give_up(reason(ErrorCode::HypervisorFailed, detail)),
            Event::QemuDied => self.lose(),
            Event::Order { order: Order::Release | Order::Fenced { .. } | Order::Close, .. } => {
                (same, Reaction::refused(Refusal::NotVoted, Vec::new()))
            }
            _ => (same, Reaction::ignored()),
        }
    }

    fn vote(&self, evidence: StreamEvidence) -> Next {
        let Attempt { key, permit, .. } = self.attempt;
        let vote = SourceVote { key, permit, evidence, prior: self.prior };
        let journal = self.journal(SourceFact::Frozen { vote: vote.clone() });
        let send = Effect::Send(Statement::Frozen(vote.clone()));
        let mut effects = match self.rules.has(Rule::DurableVote) {
            true => vec![journal, send],
            false => vec![send, journal],
        };
        effects.push(Effect::TellAgentFrozen);
        if self.rules.has(Rule::Watchdog) {
            effects.push(Effect::SetTimer(TimerKind::Watchdog, FROZEN_WATCHDOG_MS));
        }
        effects.push(resend_timer());
        (State::Voted { vote, asked: false }, Reaction::act(effects))
    }

    fn voted(&self, vote: SourceVote, asked: bool, event: Event) -> Next {
        match event {
            Event::Renounced(proof) => self.thaw(FreedBy::Renunciation(proof)),
            Event::Order { order: Order::Fenced { resolution: Resolution::Thaw }, .. } => {
                self.thaw(FreedBy::Fence)
            }
            Event::Order { order: Order::Fenced { resolution: Resolution::Discard }, .. } => {
                let fact = SourceFact::FenceAccepted { resolution: Resolution::Discard };
                self.kill(vote.evidence, Outcome::Discarded, vec![self.journal(fact)])
            }
            // H2: nothing but RELEASE, which follows the RUNNING receipt, kills the copy.
            Event::Order { order: Order::Release, .. } => {
                self.kill(vote.evidence, Outcome::Migrated, vec![self.journal(SourceFact::Releasing)])
            }
            Event::Order { order: Order::Abort { reason }, .. } => self.ask(vote, asked, reason),
            Event::Order { order: Order::Suspend, .. } => {
                self.ask(vote, asked, reason(ErrorCode::Terminated, "suspended during the switchover"))
            }
            Event::Timer(TimerKind::Watchdog) => self.ask(
                vote,
                asked,
                reason(ErrorCode::BudgetExceeded, "the guest was frozen for longer than the watchdog allows"),
            ),
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present, .. } => {
                let effects = self.present_vote(&vote, asked);
                (State::Voted { vote, asked }, Reaction::act(effects))
            }
            Event::TargetStatus { status, .. } => self.target_status(vote, asked, status),
            Event::QemuDied => self.lose_after_vote(vote),
            Event::GuestResumed | Event::Cancelled | Event::MigrationFailed { .. } => {
                let text = "QEMU moved while it was held frozen under a vote; it is frozen again";
                let effects = vec![Effect::Report(Weight::Breach, text.into()), Effect::Freeze];
                (State::Voted { vote, asked }, Reaction::refused(Refusal::Contradiction, effects))
            }
            Event::FreezeFailed { detail } => {
                let effects = vec![Effect::Report(Weight::Breach, detail.into())];
                (State::Voted { vote, asked }, Reaction::refused(Refusal::Contradiction, effects))
            }
            // H10, and "abort changes nothing by itself": a Close without proof frees nobody.
            Event::Order { order: Order::Close | Order::Resume, .. } => {
                (State::Voted { vote, asked }, Reaction::refused(Refusal::BoundByVote, Vec::new()))
            }
            _ => (State::Voted { vote, asked }, Reaction::ignored()),
        }
    }

    fn target_status(&self, vote: SourceVote, asked: bool, status: TargetStatus) -> Next {
        // H3: whatever the target says short of RENOUNCED, the source stays frozen.
        if !self.rules.has(Rule::OnlyRenouncedIsProof) && status != TargetStatus::Running {
            return self.thaw(FreedBy::Fence);
        }
        let text = match status {
            TargetStatus::NoRecord => {
                "the target's journal has no record of this attempt: no proof that it never ran"
            }
            TargetStatus::NotRun => "the target has not run the VM; its renunciation is under way",
            TargetStatus::Running => "the target was told to run the VM; RELEASE is awaited",
        };
        let effects = vec![Effect::Report(Weight::Notice, text.into())];
        (State::Voted { vote, asked }, Reaction::act(effects))
    }

    /// Only a source whose frozen QEMU lives gets here.
    fn ask(&self, vote: SourceVote, asked: bool, reason: AbortReason) -> Next {
        let mut effects = Vec::new();
        if !asked {
            effects.push(self.journal(SourceFact::Asked { reason }));
        }
        effects.extend([self.ask_effect(), resend_timer()]);
        (State::Voted { vote, asked: true }, Reaction::act(effects))
    }

    fn ask_effect(&self) -> Effect {
        let Attempt { key, permit, .. } = self.attempt;
        Effect::AskRenounce(Statement::AskRenounce(RenounceRequest { key, permit }))
    }

    fn present_vote(&self, vote: &SourceVote, asked: bool) -> Effects {
        let mut effects = vec![Effect::Send(Statement::Frozen(vote.clone()))];
        if asked {
            effects.push(self.ask_effect());
        }
        effects.push(resend_timer());
        effects
    }

    /// Journal the proof, then close QEMU's link, then thaw: the order that lets it regain its image locks.
    fn thaw(&self, freed_by: FreedBy) -> Next {
        let fact = match &freed_by {
            FreedBy::Renunciation(proof) => SourceFact::RenunciationAccepted { proof: proof.clone() },
            FreedBy::Fence => SourceFact::FenceAccepted { resolution: Resolution::Thaw },
        };
        let mut effects = vec![self.journal(fact)];
        effects.extend(self.thaw_effects());
        effects.extend(self.present_thaw(&freed_by));
        (State::Thawed { freed_by, runs: false }, Reaction::act(effects))
    }

    fn thaw_effects(&self) -> Effects {
        vec![
            Effect::ClearTimer(TimerKind::Watchdog),
            Effect::CloseAgent,
            Effect::Thaw,
            Effect::YankOrCancel { prior: self.prior },
        ]
    }

    fn present_thaw(&self, freed_by: &FreedBy) -> Effects {
        let mut effects = self.thaw_answer(freed_by);
        effects.push(resend_timer());
        effects
    }

    fn thaw_answer(&self, freed_by: &FreedBy) -> Effects {
        let mut effects = Vec::new();
        if let FreedBy::Renunciation(proof) = freed_by {
            effects.push(Effect::Present(proof.clone()));
        }
        effects.push(Effect::Send(self.thaw_receipt()));
        effects
    }

    fn thaw_receipt(&self) -> Statement {
        Statement::Thawed(ThawReceipt { key: self.attempt.key, had_voted: true })
    }

    fn thawed(&self, freed_by: FreedBy, runs: bool, event: Event) -> Next {
        match event {
            Event::Cancelled => (State::Thawed { freed_by, runs: true }, Reaction::act(vec![])),
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present, .. } => {
                let mut effects = match runs {
                    true => Vec::new(),
                    false => vec![Effect::YankOrCancel { prior: self.prior }],
                };
                effects.extend(self.present_thaw(&freed_by));
                (State::Thawed { freed_by, runs }, Reaction::act(effects))
            }
            // Closed only once the guest runs: until then there is something left to try.
            Event::Order { order: Order::Close, .. } if runs => {
                let answer = self.thaw_answer(&freed_by);
                self.close(answer, Outcome::Kept)
            }
            // H8: whoever takes the running copy for a stale one is shown the proof.
            Event::Order { order: Order::Release, .. } if !self.rules.has(Rule::AdoptBeforeStopping) => {
                let evidence = StreamEvidence { stream_bytes: 0, digest: self.attempt.permit };
                self.kill(evidence, Outcome::Discarded, vec![self.journal(SourceFact::Releasing)])
            }
            Event::Order { order: Order::Release | Order::Fenced { .. }, .. } => {
                let effects = self.present_thaw(&freed_by);
                (State::Thawed { freed_by, runs }, Reaction::refused(Refusal::GaveUp, effects))
            }
            // An ordinary crash of the VM, after the hand-over: the proof is still owed to the manager.
            Event::QemuDied => {
                let text = "QEMU died after the thaw; the VM crashed on this host";
                let effects =
                    vec![self.journal(SourceFact::Lost), Effect::Report(Weight::Notice, text.into())];
                (State::Thawed { freed_by, runs: true }, Reaction::act(effects))
            }
            _ => (State::Thawed { freed_by, runs }, Reaction::ignored()),
        }
    }

    /// NO-VOTE: journalled, so that no vote can follow; then the guest is let go, whatever state it is in.
    fn give_up(&self, reason: AbortReason) -> Next {
        let effects = self.give_up_effects(&reason);
        (State::Cancelling { reason, runs: false }, Reaction::act(effects))
    }

    fn give_up_effects(&self, reason: &AbortReason) -> Effects {
        let mut effects = vec![
            self.journal(SourceFact::NoVote { reason: reason.clone() }),
            Effect::ClearTimer(TimerKind::Switchover),
            Effect::CloseAgent,
            Effect::Thaw,
            Effect::YankOrCancel { prior: self.prior },
        ];
        effects.extend(self.send_no_vote(reason));
        effects
    }

    fn send_no_vote(&self, reason: &AbortReason) -> Effects {
        vec![Effect::Send(self.no_vote(reason)), resend_timer()]
    }

    fn no_vote(&self, reason: &AbortReason) -> Statement {
        Statement::NoVote(NoVote { key: self.attempt.key, reason: reason.clone() })
    }

    fn cancelling(&self, reason: AbortReason, runs: bool, event: Event) -> Next {
        match event {
            Event::Cancelled => (State::Cancelling { reason, runs: true }, Reaction::act(Vec::new())),
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present, .. } => {
                let mut effects = match runs {
                    true => Vec::new(),
                    false => vec![Effect::Thaw, Effect::YankOrCancel { prior: self.prior }],
                };
                effects.extend(self.send_no_vote(&reason));
                (State::Cancelling { reason, runs }, Reaction::act(effects))
            }
            Event::Order { order: Order::Close, .. } if runs => {
                let answer = vec![Effect::Send(self.no_vote(&reason))];
                self.close(answer, Outcome::Kept)
            }
            Event::Order { order: Order::Release | Order::Fenced { .. }, .. } => {
                let effects = self.send_no_vote(&reason);
                (State::Cancelling { reason, runs }, Reaction::refused(Refusal::GaveUp, effects))
            }
            Event::QemuDied if !runs => self.lose(),
            _ => (State::Cancelling { reason, runs }, Reaction::ignored()),
        }
    }

    fn kill(&self, evidence: StreamEvidence, outcome: Outcome, mut effects: Effects) -> Next {
        effects.extend([
            Effect::ClearTimer(TimerKind::Watchdog),
            Effect::KillFrozenQemu(self.qemu),
            resend_timer(),
        ]);
        (State::Releasing { evidence, outcome }, Reaction::act(effects))
    }

    fn releasing(&self, evidence: StreamEvidence, outcome: Outcome, event: Event) -> Next {
        match event {
            Event::QemuDied => {
                let mut effects = vec![self.journal(SourceFact::Released), Effect::CloseAgent];
                effects.extend(self.send_released(evidence));
                (State::Released { evidence, outcome }, Reaction::act(effects))
            }
            Event::KillRefused { detail } => {
                let effects = vec![Effect::Report(Weight::Breach, detail.into()), resend_timer()];
                (State::Releasing { evidence, outcome }, Reaction::act(effects))
            }
            Event::Timer(TimerKind::Resend) => {
                let effects = vec![Effect::KillFrozenQemu(self.qemu), resend_timer()];
                (State::Releasing { evidence, outcome }, Reaction::act(effects))
            }
            // The target runs, or may have run: nothing frees this copy any more.
            Event::Renounced(_) => {
                let text = "a renunciation arrived for an attempt that runs on the target";
                let effects = vec![Effect::Report(Weight::Breach, text.into())];
                (State::Releasing { evidence, outcome }, Reaction::refused(Refusal::TooLate, effects))
            }
            _ => (State::Releasing { evidence, outcome }, Reaction::ignored()),
        }
    }

    fn send_released(&self, evidence: StreamEvidence) -> Effects {
        vec![Effect::Send(self.release_receipt(evidence)), resend_timer()]
    }

    fn release_receipt(&self, evidence: StreamEvidence) -> Statement {
        Statement::Released(ReleaseReceipt { key: self.attempt.key, evidence })
    }

    fn released(&self, evidence: StreamEvidence, outcome: Outcome, event: Event) -> Next {
        let same = State::Released { evidence, outcome };
        match event {
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present | Order::Release | Order::Fenced { .. }, .. } => {
                (same, Reaction::act(self.send_released(evidence)))
            }
            Event::Order { order: Order::Close, .. } => {
                self.close(vec![Effect::Send(self.release_receipt(evidence))], outcome)
            }
            _ => (same, Reaction::ignored()),
        }
    }

    fn lose(&self) -> Next {
        let reason = reason(ErrorCode::HypervisorFailed, "QEMU died on the source; the VM crashed there");
        let mut effects = vec![
            self.journal(SourceFact::Lost),
            Effect::CloseAgent,
            Effect::Report(Weight::Notice, "QEMU died on the source before the vote".into()),
        ];
        effects.extend(self.send_no_vote(&reason));
        (State::Lost { reason }, Reaction::act(effects))
    }

    fn lost(&self, reason: AbortReason, event: Event) -> Next {
        match event {
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present, .. } => {
                let effects = self.send_no_vote(&reason);
                (State::Lost { reason }, Reaction::act(effects))
            }
            Event::Order { order: Order::Close, .. } => {
                let answer = vec![Effect::Send(self.no_vote(&reason))];
                self.close(answer, Outcome::Lost)
            }
            _ => (State::Lost { reason }, Reaction::ignored()),
        }
    }

    /// The vote stands: the target may hold the only copy now, so nothing here may ask it to renounce (H7).
    fn lose_after_vote(&self, vote: SourceVote) -> Next {
        let text = "the frozen QEMU died without an order; its vote stands and the commit is awaited";
        let effects = vec![
            self.journal(SourceFact::Lost),
            Effect::ClearTimer(TimerKind::Watchdog),
            Effect::CloseAgent,
            Effect::Report(Weight::Breach, text.into()),
            Effect::Send(Statement::Frozen(vote.clone())),
            resend_timer(),
        ];
        (State::VotedLost { vote }, Reaction::act(effects))
    }

    fn voted_lost(&self, vote: SourceVote, event: Event) -> Next {
        match event {
            Event::Timer(TimerKind::Resend)
            | Event::ManagerContact
            | Event::Order { order: Order::Present | Order::Abort { .. }, .. } => {
                let effects = vec![Effect::Send(Statement::Frozen(vote.clone())), resend_timer()];
                (State::VotedLost { vote }, Reaction::act(effects))
            }
            Event::Order { order: Order::Release, .. } => {
                let evidence = vote.evidence;
                let mut effects =
                    vec![self.journal(SourceFact::Releasing), self.journal(SourceFact::Released)];
                effects.extend(self.send_released(evidence));
                (State::Released { evidence, outcome: Outcome::Migrated }, Reaction::act(effects))
            }
            Event::Renounced(proof) => {
                let fact = SourceFact::RenunciationAccepted { proof: proof.clone() };
                let report = Effect::Report(Weight::Breach, "both copies of the VM are dead".into());
                let mut effects = vec![self.journal(fact), report];
                // The proof is owed to the manager until it has adopted it, as after a thaw: the target may be gone.
                let freed_by = FreedBy::Renunciation(proof);
                effects.extend(self.present_thaw(&freed_by));
                (State::Thawed { freed_by, runs: true }, Reaction::act(effects))
            }
            // What is to be destroyed is gone: the registry hears what it waits for.
            Event::Order {
                order: Order::Fenced { resolution: resolution @ Resolution::Discard }, ..
            } => {
                let evidence = vote.evidence;
                let mut effects = vec![
                    self.journal(SourceFact::FenceAccepted { resolution }),
                    self.journal(SourceFact::Released),
                    Effect::Report(Weight::Breach, "both copies of the VM are dead".into()),
                ];
                effects.extend(self.send_released(evidence));
                (State::Released { evidence, outcome: Outcome::Discarded }, Reaction::act(effects))
            }
            Event::Order { order: Order::Fenced { resolution: resolution @ Resolution::Thaw }, .. } => {
                self.both_dead(vec![self.journal(SourceFact::FenceAccepted { resolution })])
            }
            _ => (State::VotedLost { vote }, Reaction::ignored()),
        }
    }

    fn both_dead(&self, mut effects: Effects) -> Next {
        let text = "both copies of the VM are dead";
        let reason = reason(ErrorCode::HypervisorFailed, text);
        effects.push(Effect::Report(Weight::Breach, text.into()));
        effects.extend(self.send_no_vote(&reason));
        (State::Lost { reason }, Reaction::act(effects))
    }

    fn close(&self, answer: Effects, outcome: Outcome) -> Next {
        let effects = vec![
            self.journal(SourceFact::Closed),
            Effect::ClearTimer(TimerKind::Resend),
            Effect::CloseAgent,
            Effect::Done(outcome),
        ];
        (State::Closed { answer, outcome }, Reaction::act(effects))
    }

    fn journal(&self, fact: SourceFact) -> Effect {
        Effect::Journal(SourceEntry { key: self.attempt.key, fact })
    }
}

fn closed(answer: Effects, outcome: Outcome, event: Event) -> Next {
    let asks = match event {
        Event::Order { order: Order::Close, .. } => false,
        Event::Order { .. } | Event::Renounced(_) | Event::ManagerContact => true,
        _ => false,
    };
    let reaction = if asks { Reaction::act(answer.clone()) } else { Reaction::ignored() };
    (State::Closed { answer, outcome }, reaction)
}

fn resend_timer() -> Effect {
    Effect::SetTimer(TimerKind::Resend, RESEND_MS)
}
