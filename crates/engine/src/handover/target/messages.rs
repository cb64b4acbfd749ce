//! What goes into the target's machine and what comes out of it.

use super::super::journal::TargetEntry;
use super::super::{QemuFacts, TargetStatus, Text, TimerKind, Weight};
use serde::{Deserialize, Serialize};
use types::handover::{AbortReason, HandoverKey, PriorRunState, RenounceRequest, Statement, StreamEvidence};

/// What the manager tells a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "order")]
pub enum Order {
    /// The registry holds the commit: run.
    Commit {
        /// The stream that both sides voted on.
        evidence: StreamEvidence,
        /// How the guest stood before.
        prior: PriorRunState,
    },
    /// Give up if you have not voted.
    Abort {
        /// Why.
        reason: AbortReason,
    },
    /// The registry will never commit this attempt: renounce.
    Void {
        /// Why.
        reason: AbortReason,
    },
    /// Say again where you stand.
    Present,
    /// The hand-over has ended in the registry; nothing more will be asked.
    Close,
}

/// How the target's QEMU stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunState {
    /// `query-status` says `paused` (or `prelaunch` with the incoming migration done).
    Paused,
    /// It says `inmigrate`.
    InMigrate,
    /// vCPUs run.
    Running,
}

/// Result of [`Effect::QueryQemu`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuStatus {
    /// `query-migrate` says `completed`.
    pub completed: bool,
    /// `query-status`.
    pub run: RunState,
}

/// What happens to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Result of [`Effect::PrepareQemu`].
    QemuPrepared(QemuFacts),
    /// Result of [`Effect::PrepareQemu`].
    PrepareFailed {
        /// Why.
        detail: String,
    },
    /// The VM agent: complete, accepted by the inspector, released to QEMU; both agents' digests are equal.
    StreamAccepted(StreamEvidence),
    /// The inspector refused the stream.
    StreamRejected {
        /// Why.
        detail: String,
    },
    /// Result of [`Effect::QueryQemu`].
    QemuStatus(QemuStatus),
    /// Result of [`Effect::Cont`].
    ContDone,
    /// Result of [`Effect::Cont`]: QEMU refused, and `query-status` afterwards says whether the VM is still paused.
    ContRefused {
        /// Whether it is.
        still_paused: bool,
    },
    /// An order of the manager.
    Order {
        /// The attempt that it names.
        key: HandoverKey,
        /// The order.
        order: Order,
    },
    /// The source's signed request, verified, directly or through the manager.
    Asked(RenounceRequest),
    /// A timer fired.
    Timer(TimerKind),
    /// QEMU is dead (its pid descriptor says so), or was never started; also the result of [`Effect::KillQemu`].
    QemuDied,
    /// The VM agent or its channel ended.
    ChannelLost {
        /// Why.
        detail: String,
    },
    /// The manager was reached again.
    ManagerContact,
}

/// What a target wants done. The shell runs them in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Append and make durable before anything that follows.
    Journal(TargetEntry),
    /// Start QEMU with incoming deferred, in its own session and cgroup. [`Event::QemuPrepared`] or `PrepareFailed`.
    PrepareQemu {
        /// With `-S`: always, outside mutation tests.
        paused: bool,
    },
    /// Tell the manager that the stream may come.
    Ready,
    /// Ask `query-migrate` and `query-status` ([`Event::QemuStatus`]).
    QueryQemu,
    /// `cont` ([`Event::ContDone`] or `ContRefused`).
    Cont,
    /// `announce-self`, and tell the VM agent that the guest runs. Harmless when repeated.
    Announce,
    /// Sign and send to the manager; [`Statement::Renounced`] also to the source directly.
    Send(Statement),
    /// Answer the source's request, the way it came.
    Answer(TargetStatus),
    /// Kill this attempt's QEMU, whichever state it is in, and wait for its death ([`Event::QemuDied`], also when
    /// there is none).
    KillQemu,
    /// End the VM agent.
    CloseAgent,
    /// Start a timer, replacing one of the same kind.
    SetTimer(TimerKind, u64),
    /// Stop a timer.
    ClearTimer(TimerKind),
    /// Tell the people.
    Report(Weight, Text),
    /// The target's part has ended; the machine only answers late messages from here on.
    Done(Outcome),
}

/// How a target's part ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The VM is here.
    Runs,
    /// It never ran here.
    Renounced,
    /// It ran here, or may have, and died.
    Lost,
}

/// What the daemon sees of the attempt's QEMU when it recovers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuSeen {
    /// Alive, not running: incoming or paused.
    Paused,
    /// vCPUs run.
    Running,
    /// Gone, or never started.
    Dead,
    /// A later attempt moves it away ([`super::super::journal::attempts`] says so): it is not this one's any more.
    Superseded,
}
