//! What goes into the source's machine and what comes out of it.

use super::super::journal::SourceEntry;
use super::super::{QemuFacts, RenunciationProof, Resolution, TargetStatus, Text, TimerKind, Weight};
use serde::{Deserialize, Serialize};
use types::handover::{AbortReason, HandoverKey, PriorRunState, Statement, StreamEvidence};

/// What the manager tells a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "order")]
pub enum Order {
    /// Hold the relay; the guest runs on. From the guest's STOP on it means abort.
    Suspend,
    /// Relay again.
    Resume,
    /// Give up if you still can; once voted, have the target renounce.
    Abort {
        /// Why.
        reason: AbortReason,
    },
    /// The target runs: destroy the frozen copy.
    Release,
    /// The operator's word that the target is dead.
    Fenced {
        /// What follows from it.
        resolution: Resolution,
    },
    /// Say again where you stand.
    Present,
    /// The hand-over has ended in the registry; nothing more will be asked.
    Close,
}

/// What happens to a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// QEMU's STOP event.
    GuestStopped,
    /// QEMU's RESUME event.
    GuestResumed,
    /// The VM agent: the whole stream has left, and QEMU has been silent since.
    EndOfStream(StreamEvidence),
    /// Result of [`Effect::Freeze`]: the frozen state was read back.
    FreezeConfirmed,
    /// Result of [`Effect::Freeze`].
    FreezeFailed {
        /// Why.
        detail: String,
    },
    /// Result of [`Effect::Prove`].
    ProofOk,
    /// Result of [`Effect::Prove`].
    ProofFailed {
        /// What moved.
        detail: String,
    },
    /// QEMU gave the migration up by itself (`failed`, `cancelled`, or `migrate` was refused).
    MigrationFailed {
        /// QEMU's words.
        detail: String,
    },
    /// Result of [`Effect::YankOrCancel`]: no migration is left in QEMU and the guest stands as before.
    Cancelled,
    /// An order of the manager.
    Order {
        /// The attempt that it names.
        key: HandoverKey,
        /// The order.
        order: Order,
    },
    /// A renunciation, verified, from the target directly or through the manager.
    Renounced(RenunciationProof),
    /// The target's answer to the request to renounce.
    TargetStatus {
        /// The attempt that it names.
        key: HandoverKey,
        /// What it says.
        status: TargetStatus,
    },
    /// A timer fired.
    Timer(TimerKind),
    /// QEMU is dead (its pid descriptor says so); also the result of [`Effect::KillFrozenQemu`].
    QemuDied,
    /// Result of [`Effect::KillFrozenQemu`]: the process is not the journalled one, or is not frozen.
    KillRefused {
        /// Which.
        detail: String,
    },
    /// The VM agent or its channel ended.
    ChannelLost {
        /// Why.
        detail: String,
    },
    /// The manager was reached again.
    ManagerContact,
}

/// What a source wants done. The shell runs them in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Append and make durable before anything that follows.
    Journal(SourceEntry),
    /// Tell QEMU to migrate into the VM agent's socket. Failure comes back as [`Event::MigrationFailed`].
    StartMigration,
    /// The VM agent stops relaying.
    SuspendRelay,
    /// The VM agent relays again.
    ResumeRelay,
    /// Freeze QEMU's process and read the frozen state back ([`Event::FreezeConfirmed`] or `FreezeFailed`).
    Freeze,
    /// Over a fresh nonce: every QEMU socket is open and was never closed, QEMU wrote nothing since the end of the
    /// stream but return-path replies, and the buffered QMP events hold no RESUME since STOP (for a guest whose
    /// user had paused it: no RESUME at all). [`Event::ProofOk`] or `ProofFailed`.
    Prove {
        /// How the guest stood before.
        prior: PriorRunState,
    },
    /// Tell the VM agent that FROZEN is journalled: its guard ([`super::super::FREEZE_GUARD_MS`]) ends.
    TellAgentFrozen,
    /// Sign and send to the manager.
    Send(Statement),
    /// Show the target's renunciation to the manager.
    Present(RenunciationProof),
    /// Sign and send to the target, directly and through the manager, **only if the journalled process is alive and
    /// frozen at that moment**; else send nothing ([`Event::QemuDied`] is on its way): the target's copy may be the
    /// only one left (H7).
    AskRenounce(Statement),
    /// End the VM agent; QEMU's sockets close.
    CloseAgent,
    /// Let QEMU's process run. No error if it is not frozen.
    Thaw,
    /// Make QEMU's migration end and the guest stand as before: `migrate_cancel`, `yank` where QMP is blocked, `cont`
    /// if it is left in `postmigrate` and its user had not paused it. [`Event::Cancelled`] when it is so; no answer
    /// means that it is tried again.
    YankOrCancel {
        /// How the guest stood before.
        prior: PriorRunState,
    },
    /// Kill exactly this process, and only if it is frozen (v1 freezer: kill, then thaw). [`Event::QemuDied`] once
    /// its pid descriptor says so, or [`Event::KillRefused`].
    KillFrozenQemu(QemuFacts),
    /// Start a timer, replacing one of the same kind.
    SetTimer(TimerKind, u64),
    /// Stop a timer.
    ClearTimer(TimerKind),
    /// Tell the people.
    Report(Weight, Text),
    /// The source's part has ended; the machine only answers late messages from here on.
    Done(Outcome),
}

/// How a source's part ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// The target runs the VM; the copy here is destroyed.
    Migrated,
    /// The guest runs here.
    Kept,
    /// The copy here was stale and is destroyed; the VM restarts from its disk.
    Discarded,
    /// QEMU died.
    Lost,
}

/// What the daemon sees of QEMU's process when it recovers. Another boot id or start time means dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuSeen {
    /// Frozen.
    Frozen,
    /// Not frozen.
    Running,
    /// Gone.
    Dead,
    /// A later attempt was opened on it ([`super::super::journal::attempts`] says so): it is not this one's any more.
    Superseded,
}
