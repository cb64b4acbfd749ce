//! The hand-over of a VM from source to target: never twice, never zero, never back in time (I1, I2).
//!
//! Three pure machines. Each takes one event, answers with a [`Reaction`] (what it thinks of the event, and the
//! effects that follow) and knows no clock, no I/O and no randomness.
//!
//! | machine | lives in | remembers through |
//! |---|---|---|
//! | [`source::Source`] | the source's daemon | its journal ([`journal::SourceEntry`]) |
//! | [`target::Target`] | the target's daemon | its journal ([`journal::TargetEntry`]) |
//! | [`decider`] | the manager | one row of the registry ([`decider::HandoverRow`]) |
//!
//! # The run
//! ```text
//!  manager              source daemon          source QEMU      target QEMU        target daemon
//!    | permit: (source, s) (target, s+1)           |                 |                   |
//!    |--- prepare ------------------------------------------------------------------->  | Consumed
//!    |                                             |                 | <-- -S, incoming -| Prepared
//!    |--- start ----------> | Opened               |                 |                   |
//!    |                      |--- migrate --------> |==== stream ===> |                   |
//!    |                      | <------ STOP --------|                 |                   |
//!    |                      | Freezing             |                 |                   |
//!    |                      | <-- end of stream    |                 |  accepted ------> |
//!    |                      |--- freeze, prove --> *                 |  completed+paused |
//!    |                      | Frozen               *                 |                   | Voted
//!    | <--- FROZEN -------- |                      *                 |                   |
//!    | <--- PREPARED -------------------------------------------------------------------|
//!  COMMIT: both votes, (source, s) -> (target, s+1), audit: one transaction              |
//!    |--- commit -------------------------------------------------------------------->  | Run
//!    |                      |                      *                 | <---- cont -------|
//!    | <--- RUNNING --------------------------------------------------------------------|
//!    |--- release --------> | Releasing            *                                     |
//!    |                      |--- kill -----------> x                                     |
//!    | <--- RELEASED ------ | Released                                                   |
//!    |--- close ----------> | Closed       --- close ---------------------------------> | Closed
//! ```
//! Giving up before the source's vote is the source's own affair (NO-VOTE, journalled, then it runs on). After
//! it **only the target's renunciation, or a fenced target, frees the source**: the target journals RENOUNCED,
//! kills its QEMU, waits for its death, then signs; the source journals the proof, then thaws, and presents it
//! until the manager has adopted it, even over a commit that the target refused.
//!
//! # What the shell owes the machines
//! 1. Effects of one machine run strictly one after the other, each to its end, before its next event is handled.
//!    An event that arrives meanwhile waits in a queue.
//! 2. `Journal` is durable before the next effect starts. If it fails, or any effect's outcome is unknown, the
//!    daemon treats the machine as crashed: drop it, recover it from the journal.
//! 3. Every effect is idempotent, because a restart may repeat it. A restart recovers an attempt as superseded when a
//!    later one was opened on the same VM ([`journal::superseded`]): a freeze that is seen may be the later one's.
//! 4. Statements are verified (signature, signer, permit) before they become events.
//! 5. Timers are monotonic. They wake; they decide nothing, so a shell may fire one early (a permit with a smaller
//!    downtime budget) without harm.
//! 6. An order to end an attempt that no machine knows (PREPARE or START was lost, or is late), or a renunciation of
//!    one that was never started here, makes a machine that declines it: [`source::Source::decline`], [`target::Target::decline`]. A request to renounce that no machine
//!    knows is answered with [`TargetStatus::NoRecord`].
//! 7. A message is given to the machine of the migration that it names; the machine checks the rest of the key.
//! 8. A machine that ended is kept (or recovered) for as long as its journal is: it answers late messages.

pub mod decider;
pub mod journal;
#[cfg(any(test, feature = "sim"))]
pub mod model;
mod rules;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod source;
pub mod target;

pub use rules::{Rule, Rules};

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use types::handover::{AbortReason, HandoverKey, Renunciation};
use types::permit::hex_bytes;
use types::{Digest, Epoch, ErrorCode, HostName, MigrationId, Nonce};

/// From the end of the stream the source's VM agent waits this long for FROZEN, then closes QEMU's sockets so that
/// the guest resumes: a daemon that died must not hold the guest, and a freeze takes milliseconds.
pub const FREEZE_GUARD_MS: u64 = 1_000;
/// The source asks the target to renounce after its guest was frozen this long: guests' TCP peers and watchdogs
/// bear five seconds, and a commit takes milliseconds when everybody is there.
pub const FROZEN_WATCHDOG_MS: u64 = 5_000;
/// From the guest's STOP to the end of the stream, at most: past it the switchover is stalled (a held link can
/// freeze the guest for as long as it likes), and the source gives up.
pub const SWITCHOVER_LIMIT_MS: u64 = 5_000;
/// An unanswered statement or request is repeated this often: five tries within the recovery bound of 10 s, and no
/// load worth the name.
pub const RESEND_MS: u64 = 1_000;
/// The target asks its QEMU again this soon when the stream is in but `query-migrate` is not `completed` yet: the
/// wait is part of the downtime.
pub const QEMU_POLL_MS: u64 = 5;
/// With both votes durable and an abort wanted, the manager waits this long for the source to have the target
/// renounce; a source that can't is lost, and loss of the source favours COMMIT.
pub const SOURCE_SILENCE_MS: u64 = 3_000;

/// What the permit says about one attempt, as far as the hand-over cares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    /// What every message must match exactly.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
    /// The permit's single-use nonce.
    pub nonce: Nonce,
    /// The source.
    pub source: HostName,
    /// The target.
    pub target: HostName,
    /// The target's journal: a renunciation from another one is no proof.
    pub target_journal: Nonce,
    /// How long the target waits for the whole stream before it gives up by itself (never after its vote).
    pub run_budget_ms: u64,
}

/// A QEMU process, so that it can't be taken for another with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuFacts {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time_ticks: u64,
    /// The 128 bits of the kernel's boot id.
    pub boot: Nonce,
}

/// A renunciation with the token that proves it, to be shown to anybody who doubts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenunciationProof {
    /// What the target signed.
    pub renunciation: Renunciation,
    /// The signed token (opaque here, verified by the shell).
    #[serde(with = "hex_bytes")]
    pub token: Vec<u8>,
}

impl RenunciationProof {
    /// Whether it is the renunciation of exactly this attempt (H5: everything that it covers is compared).
    fn covers(&self, rules: Rules, attempt: &Attempt) -> bool {
        let r = &self.renunciation;
        let hosts = r.source == attempt.source && r.target == attempt.target;
        if !rules.has(Rule::RenunciationCoversAttempt) {
            return hosts && r.key.vm == attempt.key.vm;
        }
        hosts && r.key == attempt.key && r.permit == attempt.permit && r.journal == attempt.target_journal
    }
}

/// What the operator's word "the target is dead and fenced" means for the frozen copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// The target was never told to run: the frozen copy runs again.
    Thaw,
    /// The target may have run: the frozen copy is stale. It is discarded, and the VM restarts from its disk.
    Discard,
}

/// What a target says when asked to renounce, besides the renunciation itself. Never proof of anything (H3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetStatus {
    /// Its journal knows nothing of this attempt (a replaced or restored journal says the same).
    NoRecord,
    /// It has not run it; the renunciation is under way.
    NotRun,
    /// It was told to run it.
    Running,
}

/// Timers of the daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TimerKind {
    /// Source: [`SWITCHOVER_LIMIT_MS`] from STOP.
    Switchover,
    /// Source: [`FROZEN_WATCHDOG_MS`] from the vote.
    Watchdog,
    /// Both: [`RESEND_MS`], for what was not answered.
    Resend,
    /// Target: [`QEMU_POLL_MS`].
    Poll,
    /// Target: the attempt's run budget.
    RunBudget,
}

/// How much a report matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// Worth a line.
    Notice,
    /// Something that the rules exclude was seen: a breach, or a defect.
    Breach,
}

/// Text of a report.
pub type Text = Cow<'static, str>;

/// What a machine makes of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reaction<Effect> {
    /// Whether it was legal.
    pub verdict: Verdict,
    /// What to do, in this order. May be there on a refusal too: the answer that sets the sender right.
    pub effects: Vec<Effect>,
}

impl<Effect> Reaction<Effect> {
    fn act(effects: Vec<Effect>) -> Self {
        Self { verdict: Verdict::Accepted, effects }
    }
    fn ignored() -> Self {
        Self { verdict: Verdict::Ignored, effects: Vec::new() }
    }
    fn refused(refusal: Refusal, effects: Vec<Effect>) -> Self {
        Self { verdict: Verdict::Refused(refusal), effects }
    }
}

/// See [`Reaction`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Legal; the effects follow from it.
    Accepted,
    /// Harmless here: a duplicate, or too late to matter.
    Ignored,
    /// Illegal here.
    Refused(Refusal),
}

/// Why an event was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// It names another attempt.
    #[error("it names another attempt (migration, VM and both epochs must match exactly)")]
    WrongKey,
    /// It is about another permit, other hosts or another journal.
    #[error("it is signed for another permit, other hosts or another journal")]
    NotCovered,
    /// It is about another stream than the one that was voted on.
    #[error("its stream differs from the one that was voted on")]
    EvidenceDiffers,
    /// This side has not voted.
    #[error("this side has not voted")]
    NotVoted,
    /// This side has voted: only the other side can free it now.
    #[error("this side has voted and is bound by its vote")]
    BoundByVote,
    /// This side gave up, and stays with it.
    #[error("this side gave this attempt up")]
    GaveUp,
    /// The VM runs here under this attempt.
    #[error("the VM was told to run on the target")]
    TooLate,
    /// It contradicts what is durable: a breach or a defect.
    #[error("it contradicts what is on record")]
    Contradiction,
    /// It makes no sense in this state.
    #[error("it makes no sense in this state")]
    WrongState,
}

/// Why a machine could not be recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// There is no first entry, which holds the attempt.
    #[error("the journal does not start with the attempt of migration {migration:?}")]
    NoAttempt {
        /// The migration of the first entry, if there is one.
        migration: Option<MigrationId>,
    },
    /// Entries of several attempts were mixed.
    #[error("the journal entries mix migrations {first} and {other}")]
    MixedAttempts {
        /// The migration of the first entry.
        first: MigrationId,
        /// Another one.
        other: MigrationId,
    },
}

/// The epochs of a fresh attempt: no attempt ever shares one with another, whether or not it succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochPair {
    /// The source's.
    pub source: Epoch,
    /// The target's.
    pub target: Epoch,
}

/// Burns a fresh pair above `location`, the epoch in the VM's record. The permit's transaction moves the location
/// to (source host, [`EpochPair::source`]); every end of the attempt leaves it at or above [`EpochPair::target`].
/// `None`: the epochs are used up (never in practice).
#[must_use]
pub fn fresh_epochs(location: Epoch) -> Option<EpochPair> {
    let source = location.0.checked_add(1)?;
    // Room for the target's epoch and for the void after it.
    let target = source.checked_add(1).filter(|t| *t < u64::MAX)?;
    Some(EpochPair { source: Epoch(source), target: Epoch(target) })
}

/// Whether `found` names the attempt `own` (H6: exactly, never "at least").
fn key_matches(rules: Rules, own: &HandoverKey, found: &HandoverKey) -> bool {
    if rules.has(Rule::ExactOrders) {
        return own == found;
    }
    own.vm == found.vm && found.source_epoch <= own.source_epoch
}

fn reason(code: ErrorCode, detail: impl Into<String>) -> AbortReason {
    AbortReason { code, detail: detail.into() }
}
