//! The manager's part of a hand-over: pure functions over one row of the registry.
//!
//! ```text
//!           both votes                RUNNING                RELEASED
//!   Open ───────────────> Committed ───────────> Running ───────────────> Completed
//!    │  │                  │      │                 │
//!    │  │   RENOUNCED,     │      └── target fenced ┴──> Discarded (the VM restarts from its disk)
//!    │  │   NO-VOTE,       │ RENOUNCED (adopted over the commit:
//!    │  │   target fenced  │ location (target, t) -> (source, t+1))
//!    │  └────────> Voided <┘
//!    └── target fenced, registry restored, and RELEASED ──> Discarded
//!                     Voided after that word, RELEASED ──────> Discarded
//! ```
//! A commit whose target is fenced is discarded only when the source has said RELEASED: it may hold a renunciation
//! that the registry has not heard of, and run. After that word a void by renunciation and the order to discard may
//! cross: RELEASED then means that the order came first, and no host holds the VM. A registry that was set back and hears that the source is fenced asks
//! the target, which may run the VM, before it believes itself.
//!
//! [`decide`] is given the row as one transaction read it and says what that transaction writes: the new row, and
//! what happens to the VM's location, as a compare-and-swap on (host, epoch). **Row, location and audit entry are
//! one transaction; orders go out after it.** Nothing is remembered outside the row: after a restart, after a lost
//! message, and every [`super::RESEND_MS`], [`outstanding`] says again what each side must hear.
//!
//! Void needs proof, never absence (H10): a NO-VOTE (the source promises never to vote), a renunciation (the target
//! promises never to run), or the operator's word that a side is fenced. What the registry itself remembers of votes
//! is not proof, because a restored backup remembers less than it once said.

use super::{RenunciationProof, Resolution, Rule, Rules, source, target};
use serde::{Deserialize, Serialize};
use types::handover::{
    AbortReason, HandoverKey, NoVote, PriorRunState, Renunciation, RunningReceipt, SourceVote, Statement,
    StreamEvidence, TargetVote,
};
use types::{Digest, Epoch, ErrorCode, HostName, Nonce, Side};

/// What the registry holds of one attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverRow {
    /// What every message must match exactly.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
    /// The source.
    pub source: HostName,
    /// The target.
    pub target: HostName,
    /// The target's journal.
    pub target_journal: Nonce,
    /// Whether the registry is known to hold everything that it ever said about this attempt.
    pub continuity: Continuity,
    /// Where it stands.
    pub state: RowState,
}

/// See [`HandoverRow::continuity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Continuity {
    /// The same registry, since the row was made.
    Proven,
    /// Restored from a backup, or failed over asynchronously, while the row was open.
    Unproven,
}

/// Where a row stands: each state with what is known in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum RowState {
    /// Permit issued; nothing decided.
    Open(Open),
    /// The target owns the VM.
    Committed(Committed),
    /// The target runs it; the source's copy is to be destroyed.
    Running {
        /// The target's receipt.
        receipt: RunningReceipt,
    },
    /// The source's copy is destroyed. Final.
    Completed {
        /// The target's receipt.
        receipt: RunningReceipt,
    },
    /// The source keeps the VM. Final once both sides are settled.
    Voided(Voided),
    /// The target is dead and may have run: the source's copy is stale, and the VM restarts from its disk. Final once
    /// the source is settled.
    Discarded {
        /// Whether the stale copy is known to be destroyed.
        source_settled: bool,
    },
}

/// See [`RowState::Open`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Open {
    /// The source's vote.
    pub source_vote: Option<SourceVote>,
    /// The target's vote.
    pub target_vote: Option<TargetVote>,
    /// Somebody wants it ended.
    pub abort: Option<AbortReason>,
    /// The source's receipt that its copy is destroyed (seen only by a restored registry, which forgot why).
    #[serde(default)]
    pub released: Option<StreamEvidence>,
    /// The operator's word that the target is dead, given to a registry that may have committed without remembering
    /// it: the source's own word decides whether its copy is stale.
    #[serde(default)]
    pub target_fenced: bool,
    /// The operator's word that the source is dead, given to such a registry: the target's own word decides whether
    /// the VM runs there.
    #[serde(default)]
    pub source_fenced: bool,
}

/// See [`RowState::Committed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Committed {
    /// The stream that both sides voted on.
    pub evidence: StreamEvidence,
    /// How the guest stood before.
    pub prior: PriorRunState,
    /// The operator's word that the target is dead. The source may hold a renunciation already, and run: its own word
    /// is awaited before the VM is given to its disk.
    #[serde(default)]
    pub target_fenced: bool,
}

/// See [`RowState::Voided`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Voided {
    /// What it rests on.
    pub grounds: Grounds,
    /// What the people read.
    pub reason: AbortReason,
    /// The source is known to run the guest (or to have lost it).
    pub source_settled: bool,
    /// The target is known to be dead for this attempt.
    pub target_settled: bool,
    /// The source may have been told to discard its copy before this: its own word says whether it obeyed.
    #[serde(default)]
    pub told_to_discard: bool,
}

/// What frees the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "grounds")]
pub enum Grounds {
    /// The source gave up before it voted.
    NoVote,
    /// The target renounced.
    Renunciation {
        /// Its word, to be shown to the source.
        proof: RenunciationProof,
    },
    /// The operator's word that the target is dead.
    TargetFenced,
    /// The operator's word that the source is dead, before both votes: the VM is lost with it.
    SourceFenced,
}

/// What comes to the manager about one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A statement of a daemon: signature, signer and side verified. For RENOUNCED use [`Event::Renounced`].
    Statement {
        /// Whose key signed it.
        from: Side,
        /// What it says.
        statement: Statement,
    },
    /// The target's renunciation with its token, from whichever side showed it.
    Renounced(RenunciationProof),
    /// A person, a monitor, a lapsed attestation or a deadline wants it ended. (Feed a lapsed attestation before the
    /// vote, in the same transaction.)
    AbortRequested(AbortReason),
    /// Both votes are durable, an abort is wanted, and [`super::SOURCE_SILENCE_MS`] passed without a renunciation.
    SourceSilent,
    /// The operator's word that the target's host is dead.
    TargetFenced,
    /// The operator's word that the source's host is dead.
    SourceFenced,
}

/// What happens to the VM's location in the same transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Keep,
    /// The target owns the VM.
    Commit(Move),
    /// The source keeps the VM, or gets it back.
    Void(Move),
    /// No host holds it: it restarts from its disk under the new epoch.
    Discard(Move),
    /// A restored registry learns that it had committed.
    AdoptCommit(Move),
}

/// A compare-and-swap of a VM's location on (host, epoch).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// What the record must hold, exactly; else the transaction fails and is tried again from a fresh read.
    pub from: Place,
    /// What it holds afterwards.
    pub to: Place,
}

/// A host and the epoch under which it holds the VM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The host.
    pub host: HostName,
    /// The epoch.
    pub epoch: Epoch,
}

/// What one transaction writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The row as it is to be written; equal to the old one if nothing changed.
    pub row: HandoverRow,
    /// What happens to the location.
    pub decision: Decision,
    /// What goes out **after** the transaction is durable.
    pub orders: Vec<Order>,
}

/// One order to one daemon, always under the row's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// To the source.
    Source(source::Order),
    /// To the source: the target's renunciation.
    ShowRenunciation(RenunciationProof),
    /// To the target.
    Target(target::Order),
}

/// Why the manager refuses an event. Nothing is written but the audit entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// It names another attempt.
    #[error("it names another attempt (migration, VM and both epochs must match exactly)")]
    WrongKey,
    /// It is about another permit, other hosts or another journal.
    #[error("it is signed for another permit, other hosts or another journal")]
    NotCovered,
    /// The wrong side said it.
    #[error("it is not this side's to say")]
    WrongSide,
    /// It is about another stream than the one on record.
    #[error("its stream differs from the one on record")]
    EvidenceDiffers,
    /// It came after the commit.
    #[error("the commit is past: the target owns the VM")]
    TooLate,
    /// It contradicts what is durable: a breach, a defect, or a registry that forgot.
    #[error("it contradicts what is on record")]
    Contradiction,
    /// Too little is known to act on it yet; it will be repeated.
    #[error("too little is on record to act on it yet")]
    NotYet,
}

type Verdict = Result<Outcome, Refusal>;

impl HandoverRow {
    /// A row as the permit's transaction writes it.
    #[must_use]
    pub fn new(attempt: &super::Attempt) -> Self {
        Self {
            key: attempt.key,
            permit: attempt.permit,
            source: attempt.source.clone(),
            target: attempt.target.clone(),
            target_journal: attempt.target_journal,
            continuity: Continuity::Proven,
            state: RowState::Open(Open::default()),
        }
    }

    /// Whether the hand-over has ended: pinhole and daemon-to-daemon path may go, and a new attempt may be opened.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match &self.state {
            RowState::Completed { .. } => true,
            RowState::Voided(v) => v.source_settled && v.target_settled,
            RowState::Discarded { source_settled } => *source_settled,
            _ => false,
        }
    }

    /// Whether [`Event::SourceSilent`] is due once [`super::SOURCE_SILENCE_MS`] passed in this state.
    #[must_use]
    pub fn awaits_source(&self) -> bool {
        let RowState::Open(open) = &self.state else { return false };
        let voted = open.source_vote.is_some() && open.target_vote.is_some();
        voted && open.abort.is_some() && !open.target_fenced
    }

    /// Whether no order of an operator can stop the move any more.
    #[must_use]
    pub fn is_past_commit(&self) -> bool {
        matches!(self.state, RowState::Committed(_) | RowState::Running { .. } | RowState::Completed { .. })
    }

    /// Where the VM is to be while this row stands so.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        match self.state {
            RowState::Open(_) => Some(self.at_source()),
            RowState::Committed(_) | RowState::Running { .. } | RowState::Completed { .. } => {
                Some(self.at_target())
            }
            RowState::Voided(_) => Some(self.back_at_source()),
            RowState::Discarded { .. } => None,
        }
    }

    fn at_source(&self) -> Place {
        Place { host: self.source.clone(), epoch: self.key.source_epoch }
    }

    fn at_target(&self) -> Place {
        Place { host: self.target.clone(), epoch: self.key.target_epoch }
    }

    /// A void burns the target's epoch too (`fresh_epochs` left room above it).
    fn back_at_source(&self) -> Place {
        Place { host: self.source.clone(), epoch: Epoch(self.key.target_epoch.0.saturating_add(1)) }
    }

    fn keep(&self) -> Outcome {
        self.becomes(self.state.clone(), Decision::Keep)
    }

    /// Orders follow a change at once. A statement that changes nothing is a repetition, and answering each one would
    /// let two sides echo each other for ever: the timer of [`outstanding`] answers it. An ended row answers always.
    fn becomes(&self, state: RowState, decision: Decision) -> Outcome {
        let row = Self { state, ..self.clone() };
        let orders = if row != *self || row.is_final() { outstanding(&row) } else { Vec::new() };
        Outcome { row, decision, orders }
    }

    fn covers(&self, r: &Renunciation) -> bool {
        r.key == self.key
            && r.permit == self.permit
            && r.source == self.source
            && r.target == self.target
            && r.journal == self.target_journal
    }
}

/// What one transaction writes for one event.
///
/// # Errors
/// The event is refused; the row stays as it is.
pub fn decide(row: &HandoverRow, event: Event) -> Result<Outcome, Refusal> {
    decide_under(Rules::ALL, row, event)
}

pub(super) fn decide_under(rules: Rules, row: &HandoverRow, event: Event) -> Verdict {
    let decider = Decider { rules, row };
    let verdict = match event {
        Event::Statement { from, statement } => decider.statement(from, statement),
        Event::Renounced(proof) => decider.renounced(proof),
        Event::AbortRequested(reason) => decider.abort(reason),
        Event::SourceSilent => decider.source_silent(),
        Event::TargetFenced => decider.target_fenced(),
        Event::SourceFenced => decider.source_fenced(),
    };
    // Mutation only: what each side hears depends on the rules too.
    verdict.map(|mut outcome| {
        if rules != Rules::ALL && outcome.row != *row {
            outcome.orders.extend(outstanding_under(rules, &outcome.row));
        }
        outcome
    })
}

/// What each side must hear while the row stands so. Safe to repeat at any time; sent after every transaction, when a
/// side is reached again, and every [`super::RESEND_MS`] until the row is final. On a final row it is the answer to
/// whatever a side still says.
#[must_use]
pub fn outstanding(row: &HandoverRow) -> Vec<Order> {
    outstanding_under(Rules::ALL, row)
}

pub(super) fn outstanding_under(rules: Rules, row: &HandoverRow) -> Vec<Order> {
    let mut orders = Vec::new();
    // A registry that forgot asks before it believes itself.
    if row.continuity == Continuity::Unproven && !row.is_final() {
        orders.push(Order::Source(source::Order::Present));
        orders.push(Order::Target(target::Order::Present));
    }
    match &row.state {
        RowState::Open(open) => {
            if open.target_fenced {
                orders.push(Order::Source(source::Order::Fenced { resolution: Resolution::Discard }));
            }
            if let Some(reason) =
                open.abort.as_ref().filter(|_| open.source_fenced && open.source_vote.is_none())
            {
                // A target that voted is bound by an abort's refusal; without the source's vote nothing can commit it.
                orders.push(Order::Target(target::Order::Void { reason: reason.clone() }));
            }
            if let Some(reason) = &open.abort {
                orders.push(Order::Source(source::Order::Abort { reason: reason.clone() }));
                orders.push(Order::Target(target::Order::Abort { reason: reason.clone() }));
            }
        }
        RowState::Committed(Committed { target_fenced: true, .. }) => {
            orders.push(Order::Source(source::Order::Fenced { resolution: Resolution::Discard }));
        }
        RowState::Committed(Committed { evidence, prior, .. }) => {
            orders.push(Order::Target(target::Order::Commit { evidence: *evidence, prior: *prior }));
            if !rules.has(Rule::ReleaseAfterRunning) {
                orders.push(Order::Source(source::Order::Release));
            }
        }
        RowState::Running { .. } => orders.push(Order::Source(source::Order::Release)),
        RowState::Completed { .. } => orders.extend(close_both()),
        RowState::Voided(voided) if voided.source_settled && voided.target_settled => {
            orders.extend(close_both())
        }
        RowState::Voided(voided) => orders.extend(settle(voided)),
        RowState::Discarded { source_settled: true } => orders.extend(close_both()),
        RowState::Discarded { source_settled: false } => {
            orders.push(Order::Source(source::Order::Fenced { resolution: Resolution::Discard }));
        }
    }
    orders
}

fn close_both() -> [Order; 2] {
    [Order::Source(source::Order::Close), Order::Target(target::Order::Close)]
}

/// What a voided row still has to tell.
fn settle(voided: &Voided) -> Vec<Order> {
    let mut orders = Vec::new();
    if !voided.source_settled {
        orders.push(match &voided.grounds {
            Grounds::Renunciation { proof } => Order::ShowRenunciation(proof.clone()),
            Grounds::TargetFenced => Order::Source(source::Order::Fenced { resolution: Resolution::Thaw }),
            Grounds::NoVote | Grounds::SourceFenced => {
                Order::Source(source::Order::Abort { reason: voided.reason.clone() })
            }
        });
        if voided.grounds == Grounds::TargetFenced {
            // A source that has not voted is not frozen: it hears that it may end.
            orders.push(Order::Source(source::Order::Abort { reason: voided.reason.clone() }));
        }
    }
    if !voided.target_settled {
        orders.push(Order::Target(target::Order::Void { reason: voided.reason.clone() }));
    }
    orders
}

struct Decider<'a> {
    rules: Rules,
    row: &'a HandoverRow,
}

impl Decider<'_> {
    fn statement(&self, from: Side, statement: Statement) -> Verdict {
        match (from, statement) {
            (Side::Source, Statement::Frozen(vote)) => {
                self.exactly(&vote.key, Some(&vote.permit))?;
                self.source_vote(vote)
            }
            (Side::Target, Statement::Prepared(vote)) => {
                self.exactly(&vote.key, Some(&vote.permit))?;
                self.target_vote(vote)
            }
            (Side::Source, Statement::NoVote(no_vote)) => {
                self.exactly(&no_vote.key, None)?;
                self.no_vote(no_vote)
            }
            (Side::Target, Statement::Running(receipt)) => {
                self.exactly(&receipt.key, Some(&receipt.permit))?;
                self.running(receipt)
            }
            (Side::Source, Statement::Released(receipt)) => {
                self.exactly(&receipt.key, None)?;
                self.released(receipt.evidence)
            }
            (Side::Source, Statement::Thawed(receipt)) => {
                self.exactly(&receipt.key, None)?;
                self.thawed()
            }
            // The ask itself is relayed to the target as it is; for the registry it is a wish to end.
            (Side::Source, Statement::AskRenounce(request)) => {
                self.exactly(&request.key, Some(&request.permit))?;
                let detail = "the frozen source asked the target to renounce".to_owned();
                self.abort(AbortReason { code: ErrorCode::BudgetExceeded, detail })
            }
            _ => Err(Refusal::WrongSide),
        }
    }

    /// Whether a statement names exactly this attempt and its permit.
    fn exactly(&self, key: &HandoverKey, permit: Option<&Digest>) -> Result<(), Refusal> {
        if !self.rules.has(Rule::ExactReceipts) {
            return if key.vm == self.row.key.vm { Ok(()) } else { Err(Refusal::WrongKey) };
        }
        if *key != self.row.key {
            return Err(Refusal::WrongKey);
        }
        if permit.is_some_and(|p| *p != self.row.permit) {
            return Err(Refusal::NotCovered);
        }
        Ok(())
    }

    fn source_vote(&self, vote: SourceVote) -> Verdict {
        match &self.row.state {
            RowState::Open(open) => {
                if open.source_vote.as_ref().is_some_and(|held| *held != vote) {
                    return Err(Refusal::Contradiction);
                }
                Ok(self.count(Open { source_vote: Some(vote), ..open.clone() }))
            }
            _ => Ok(self.row.keep()),
        }
    }

    fn target_vote(&self, vote: TargetVote) -> Verdict {
        match &self.row.state {
            RowState::Open(open) => {
                if open.target_vote.as_ref().is_some_and(|held| *held != vote) {
                    return Err(Refusal::Contradiction);
                }
                Ok(self.count(Open { target_vote: Some(vote), ..open.clone() }))
            }
            _ => Ok(self.row.keep()),
        }
    }

    /// Commits as soon as both votes are in the row, equal, and nobody wants it ended.
    fn count(&self, open: Open) -> Outcome {
        match (&open.source_vote, &open.target_vote) {
            (Some(source), Some(target)) if source.evidence != target.evidence => {
                let detail = "the two sides voted on different streams".to_owned();
                let abort =
                    open.abort.clone().or(Some(AbortReason { code: ErrorCode::StreamRejected, detail }));
                self.row.becomes(RowState::Open(Open { abort, ..open }), Decision::Keep)
            }
            (Some(source), Some(_)) if open.abort.is_none() && !open.target_fenced => self.commit(source),
            _ => self.row.becomes(RowState::Open(open), Decision::Keep),
        }
    }

    fn commit(&self, vote: &SourceVote) -> Outcome {
        let (from, to) = (self.row.at_source(), self.row.at_target());
        let committed = Committed { evidence: vote.evidence, prior: vote.prior, target_fenced: false };
        self.row.becomes(RowState::Committed(committed), Decision::Commit(Move { from, to }))
    }

    fn abort(&self, reason: AbortReason) -> Verdict {
        match &self.row.state {
            RowState::Open(open) if open.source_vote.is_some() && !self.rules.has(Rule::VoidNeedsProof) => {
                Ok(self.void(Grounds::TargetFenced, reason, false, false))
            }
            // Only a wish: the row waits for the source's NO-VOTE or the target's renunciation.
            RowState::Open(open) => {
                let abort = open.abort.clone().or(Some(reason));
                Ok(self.row.becomes(RowState::Open(Open { abort, ..open.clone() }), Decision::Keep))
            }
            RowState::Committed(_) | RowState::Running { .. } | RowState::Completed { .. } => {
                Err(Refusal::TooLate)
            }
            RowState::Voided(_) | RowState::Discarded { .. } => Ok(self.row.keep()),
        }
    }

    /// H7: after both votes, loss of the source favours the commit, whoever wanted it ended.
    fn source_silent(&self) -> Verdict {
        match &self.row.state {
            // Never to a target that is dead: its source was told to discard, and says whether it did.
            RowState::Open(Open {
                source_vote: Some(source),
                target_vote: Some(target),
                target_fenced: false,
                ..
            }) if source.evidence == target.evidence => Ok(self.commit(source)),
            _ => Ok(self.row.keep()),
        }
    }

    fn no_vote(&self, no_vote: NoVote) -> Verdict {
        match &self.row.state {
            RowState::Open(open) if open.source_vote.is_some() => Err(Refusal::Contradiction),
            RowState::Open(open) => {
                let reason = open.abort.clone().unwrap_or(no_vote.reason);
                Ok(self.void(Grounds::NoVote, reason, true, false))
            }
            RowState::Voided(_) | RowState::Discarded { .. } => Ok(self.source_settled()),
            _ => Err(Refusal::Contradiction),
        }
    }

    fn renounced(&self, proof: RenunciationProof) -> Verdict {
        if !self.row.covers(&proof.renunciation) {
            let wrong_key = proof.renunciation.key != self.row.key;
            return Err(if wrong_key { Refusal::WrongKey } else { Refusal::NotCovered });
        }
        match &self.row.state {
            RowState::Open(open) => {
                let detail = "the target renounced".to_owned();
                let reason =
                    open.abort.clone().unwrap_or(AbortReason { code: ErrorCode::TargetFailed, detail });
                Ok(self.void(Grounds::Renunciation { proof }, reason, open.source_fenced, true))
            }
            // Adopted even over the commit: the target refused it, so nothing ever ran from it.
            RowState::Committed(_) => {
                let detail = "the target renounced before it ran the VM".to_owned();
                let reason = AbortReason { code: ErrorCode::TargetFailed, detail };
                Ok(self.void(Grounds::Renunciation { proof }, reason, false, true))
            }
            RowState::Voided(voided) => {
                let mut voided = Voided { target_settled: true, ..voided.clone() };
                if !voided.source_settled {
                    voided.grounds = Grounds::Renunciation { proof };
                }
                Ok(self.row.becomes(RowState::Voided(voided), Decision::Keep))
            }
            RowState::Discarded { .. } => Ok(self.row.keep()),
            RowState::Running { .. } | RowState::Completed { .. } => Err(Refusal::Contradiction),
        }
    }

    fn void(
        &self,
        grounds: Grounds,
        reason: AbortReason,
        source_settled: bool,
        target_settled: bool,
    ) -> Outcome {
        let from = match &self.row.state {
            RowState::Committed(_) => self.row.at_target(),
            _ => self.row.at_source(),
        };
        let to = self.row.back_at_source();
        let fenced = match &self.row.state {
            RowState::Open(open) => open.target_fenced,
            RowState::Committed(committed) => committed.target_fenced,
            _ => false,
        };
        // A registry that was set back may have said so and forgotten it.
        let told_to_discard = fenced || self.row.continuity == Continuity::Unproven;
        let voided = Voided { grounds, reason, source_settled, target_settled, told_to_discard };
        self.row.becomes(RowState::Voided(voided), Decision::Void(Move { from, to }))
    }

    fn running(&self, receipt: RunningReceipt) -> Verdict {
        match &self.row.state {
            RowState::Committed(committed) => {
                if receipt.evidence != committed.evidence && self.rules.has(Rule::ExactReceipts) {
                    return Err(Refusal::EvidenceDiffers);
                }
                Ok(self.row.becomes(RowState::Running { receipt }, Decision::Keep))
            }
            RowState::Open(open) => self.adopt_commit(open, receipt),
            RowState::Running { .. } | RowState::Completed { .. } => Ok(self.row.keep()),
            // Nothing frees a source that a running target makes stale; only people can say what this is.
            RowState::Voided(_) | RowState::Discarded { .. } => Err(Refusal::Contradiction),
        }
    }

    /// A target runs only on a commit: this registry forgot it. The source's word (vote or receipt) for the same
    /// stream is awaited, so that a target alone can't take a VM; of a source that is dead no word will come.
    fn adopt_commit(&self, open: &Open, receipt: RunningReceipt) -> Verdict {
        let said = open.source_vote.as_ref().map(|v| v.evidence).or(open.released);
        let vouched = said.or(open.source_fenced.then_some(receipt.evidence)).ok_or(Refusal::NotYet)?;
        if vouched != receipt.evidence {
            return Err(Refusal::EvidenceDiffers);
        }
        let (from, to) = (self.row.at_source(), self.row.at_target());
        let state = match open.released {
            Some(_) => RowState::Completed { receipt },
            // A dead host needs no release.
            None if open.source_fenced => RowState::Completed { receipt },
            None => RowState::Running { receipt },
        };
        Ok(self.row.becomes(state, Decision::AdoptCommit(Move { from, to })))
    }

    fn released(&self, evidence: StreamEvidence) -> Verdict {
        match &self.row.state {
            RowState::Running { receipt } => {
                if evidence != receipt.evidence && self.rules.has(Rule::ExactReceipts) {
                    return Err(Refusal::EvidenceDiffers);
                }
                let state = RowState::Completed { receipt: receipt.clone() };
                Ok(self.row.becomes(state, Decision::Keep))
            }
            // The frozen copy of a commit, known or forgotten, whose target is dead.
            RowState::Open(open) if open.target_fenced => Ok(self.discard(self.row.at_source(), true)),
            RowState::Committed(committed) if committed.target_fenced => {
                Ok(self.discard(self.row.at_target(), true))
            }
            RowState::Open(open) => {
                let open = Open { released: Some(evidence), ..open.clone() };
                Ok(self.row.becomes(RowState::Open(open), Decision::Keep))
            }
            RowState::Completed { .. } => Ok(self.row.keep()),
            RowState::Discarded { .. } => Ok(self.source_settled()),
            // The operator's word that the target is dead, and with it the order to discard, crossed the target's
            // renunciation: the source has obeyed what reached it first.
            RowState::Voided(Voided { told_to_discard: true, source_settled: false, .. }) => {
                Ok(self.discard(self.row.back_at_source(), true))
            }
            RowState::Committed(_) | RowState::Voided(_) => Err(Refusal::Contradiction),
        }
    }

    fn thawed(&self) -> Verdict {
        match &self.row.state {
            RowState::Voided(_) => Ok(self.source_settled()),
            RowState::Open(open) if open.target_fenced => {
                Ok(self.void(Grounds::TargetFenced, fenced("target"), true, true))
            }
            // The source was freed by a word or a renunciation that this registry forgot, and it runs: with the target
            // dead nothing else does.
            RowState::Committed(committed) if committed.target_fenced => {
                Ok(self.void(Grounds::TargetFenced, fenced("target"), true, true))
            }
            // H8: a thawed source over a commit holds a renunciation; it shows it, and that is adopted. Nothing is
            // killed on suspicion.
            RowState::Open(_) | RowState::Committed(_) if self.rules.has(Rule::AdoptBeforeStopping) => {
                Err(Refusal::NotYet)
            }
            RowState::Committed(_) => {
                let mut outcome = self.row.keep();
                outcome.orders.push(Order::Source(source::Order::Release));
                Ok(outcome)
            }
            RowState::Open(_) => Err(Refusal::NotYet),
            RowState::Running { .. } | RowState::Completed { .. } | RowState::Discarded { .. } => {
                Err(Refusal::Contradiction)
            }
        }
    }

    fn source_settled(&self) -> Outcome {
        let state = match &self.row.state {
            RowState::Voided(voided) => RowState::Voided(Voided { source_settled: true, ..voided.clone() }),
            RowState::Discarded { .. } => RowState::Discarded { source_settled: true },
            other => other.clone(),
        };
        self.row.becomes(state, Decision::Keep)
    }

    fn target_fenced(&self) -> Verdict {
        match &self.row.state {
            RowState::Open(open) if open.source_fenced => Ok(self.discard(self.row.at_source(), true)),
            // H10: a registry that can't prove continuity may have committed, so the frozen copy may be stale.
            RowState::Open(open) if self.row.continuity == Continuity::Unproven => {
                let abort = open.abort.clone().or(Some(fenced("target")));
                let open = Open { target_fenced: true, abort, ..open.clone() };
                Ok(self.row.becomes(RowState::Open(open), Decision::Keep))
            }
            RowState::Open(_) => Ok(self.void(Grounds::TargetFenced, fenced("target"), false, true)),
            RowState::Committed(committed) => {
                let committed = Committed { target_fenced: true, ..committed.clone() };
                Ok(self.row.becomes(RowState::Committed(committed), Decision::Keep))
            }
            RowState::Running { .. } => Ok(self.discard(self.row.at_target(), false)),
            RowState::Voided(voided) => {
                let voided = Voided { target_settled: true, ..voided.clone() };
                Ok(self.row.becomes(RowState::Voided(voided), Decision::Keep))
            }
            RowState::Completed { .. } => Err(Refusal::TooLate),
            RowState::Discarded { .. } => Ok(self.row.keep()),
        }
    }

    fn discard(&self, from: Place, source_settled: bool) -> Outcome {
        // Above every epoch of this attempt, the one of a void that came before it included.
        let epoch = self.row.back_at_source().epoch.max(Epoch(from.epoch.0.saturating_add(1)));
        let to = Place { host: from.host.clone(), epoch };
        let state = RowState::Discarded { source_settled };
        self.row.becomes(state, Decision::Discard(Move { from, to }))
    }

    fn source_fenced(&self) -> Verdict {
        match &self.row.state {
            RowState::Open(open) if open.target_fenced => Ok(self.discard(self.row.at_source(), true)),
            RowState::Open(open) if open.source_vote.is_some() && open.target_vote.is_some() => {
                self.source_silent()
            }
            // H10: such a registry may have committed, and the target may run the VM.
            RowState::Open(open) if self.row.continuity == Continuity::Unproven => {
                let abort = open.abort.clone().or(Some(fenced("source")));
                let open = Open { source_fenced: true, abort, ..open.clone() };
                Ok(self.row.becomes(RowState::Open(open), Decision::Keep))
            }
            RowState::Open(_) => Ok(self.void(Grounds::SourceFenced, fenced("source"), true, false)),
            RowState::Committed(committed) if committed.target_fenced => {
                Ok(self.discard(self.row.at_target(), true))
            }
            RowState::Committed(_) => Ok(self.row.keep()),
            // A dead host needs no release.
            RowState::Running { receipt } => {
                Ok(self.row.becomes(RowState::Completed { receipt: receipt.clone() }, Decision::Keep))
            }
            RowState::Voided(_) | RowState::Discarded { .. } => Ok(self.source_settled()),
            RowState::Completed { .. } => Ok(self.row.keep()),
        }
    }
}

fn fenced(side: &str) -> AbortReason {
    let detail = format!("the operator's word: the {side} is dead and fenced");
    AbortReason { code: ErrorCode::HostUnreachable, detail }
}
