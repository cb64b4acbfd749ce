//! What the two daemons write down before they act. The shell appends each entry to the host's hash-chained,
//! signed journal, makes it durable, and hands the entries of one attempt back after a restart.

use super::{Attempt, QemuFacts, RenunciationProof, Resolution};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use types::handover::{AbortReason, HandoverKey, PriorRunState, SourceVote, TargetVote};
use types::{MigrationId, Nonce};

/// One line of a host's journal about a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "side")]
pub enum Entry {
    /// Written as the source.
    Source(SourceEntry),
    /// Written as the target.
    Target(TargetEntry),
}

impl Entry {
    /// The attempt that it is about.
    #[must_use]
    pub const fn key(&self) -> &HandoverKey {
        match self {
            Self::Source(entry) => &entry.key,
            Self::Target(entry) => &entry.key,
        }
    }
}

/// What a source wrote down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceEntry {
    /// The attempt.
    pub key: HandoverKey,
    /// What.
    pub fact: SourceFact,
}

/// See [`SourceEntry`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "fact")]
pub enum SourceFact {
    /// The migration starts.
    Opened {
        /// What the permit allows.
        attempt: Box<Attempt>,
        /// The QEMU that runs the guest.
        qemu: QemuFacts,
        /// How the guest stood.
        prior: PriorRunState,
    },
    /// The attempt was aborted before it started here: the source will never vote in it. Always the first entry.
    Declined {
        /// What the permit allows.
        attempt: Box<Attempt>,
        /// Why.
        reason: AbortReason,
    },
    /// QEMU will be frozen as soon as its stream has ended.
    Freezing,
    /// The source gave up before it voted, and will never vote in this attempt.
    NoVote {
        /// Why.
        reason: AbortReason,
    },
    /// QEMU is frozen and proven; the vote is about to be sent.
    Frozen {
        /// The vote.
        vote: SourceVote,
    },
    /// The target is about to be asked to renounce.
    Asked {
        /// Why.
        reason: AbortReason,
    },
    /// The target's renunciation is here; QEMU is about to be thawed.
    RenunciationAccepted {
        /// The proof.
        proof: RenunciationProof,
    },
    /// The operator's word that the target is dead is here.
    FenceAccepted {
        /// What follows from it.
        resolution: Resolution,
    },
    /// RELEASE is here; the frozen copy is about to be killed.
    Releasing,
    /// The copy is dead.
    Released,
    /// QEMU died without an order.
    Lost,
    /// The hand-over has ended at the manager too.
    Closed,
}

/// What a target wrote down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetEntry {
    /// The attempt.
    pub key: HandoverKey,
    /// What.
    pub fact: TargetFact,
}

/// See [`TargetEntry`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "fact")]
pub enum TargetFact {
    /// The permit's nonce is used up. Always the first entry.
    Consumed {
        /// What the permit allows.
        attempt: Box<Attempt>,
    },
    /// QEMU waits for the stream, paused.
    Prepared {
        /// The QEMU.
        qemu: QemuFacts,
    },
    /// The complete, accepted state is held, paused; the vote is about to be sent.
    Voted {
        /// The vote.
        vote: TargetVote,
    },
    /// COMMIT is here; `cont` may be sent.
    Run {
        /// Whether the guest is to run or to stay paused.
        prior: PriorRunState,
    },
    /// This attempt will never run here; QEMU is about to be killed.
    Renounced {
        /// Why.
        reason: AbortReason,
    },
    /// QEMU died after it may have run, or ran without an order. Never a renunciation.
    Lost,
    /// The hand-over has ended at the manager too.
    Closed,
}

/// The entries of one attempt on one side, for recovery.
#[derive(Debug, Clone)]
pub enum Recorded<'a> {
    /// For [`super::source::Source::recover`].
    Source {
        /// The attempt.
        key: HandoverKey,
        /// Whether a later attempt was opened on the VM's QEMU: recover with `QemuSeen::Superseded`.
        superseded: bool,
        /// Its entries, oldest first.
        entries: Vec<&'a SourceEntry>,
    },
    /// For [`super::target::Target::recover`].
    Target {
        /// The attempt.
        key: HandoverKey,
        /// Whether a later attempt moves the VM's QEMU away: recover with `QemuSeen::Superseded`.
        superseded: bool,
        /// Its entries, oldest first.
        entries: Vec<&'a TargetEntry>,
    },
}

/// Sorts a host's journal by attempt, in the order in which they began.
pub fn attempts<'a>(journal: impl IntoIterator<Item = &'a Entry>) -> Vec<Recorded<'a>> {
    let mut recorded: Vec<Recorded<'a>> = Vec::new();
    for entry in journal {
        if let Entry::Source(SourceEntry { key, fact: SourceFact::Opened { .. } }) = entry {
            supersede(&mut recorded, key);
        }
        let known = recorded.iter_mut().any(|r| match (r, entry) {
            (Recorded::Source { key, entries, .. }, Entry::Source(e)) if *key == e.key => {
                entries.push(e);
                true
            }
            (Recorded::Target { key, entries, .. }, Entry::Target(e)) if *key == e.key => {
                entries.push(e);
                true
            }
            _ => false,
        });
        if !known {
            recorded.push(match entry {
                Entry::Source(e) => Recorded::Source { key: e.key, superseded: false, entries: vec![e] },
                Entry::Target(e) => Recorded::Target { key: e.key, superseded: false, entries: vec![e] },
            });
        }
    }
    recorded
}

/// Whether a later attempt was opened on the QEMU of this one's VM, so that it must be recovered with
/// `QemuSeen::Superseded`, whatever is seen of the process. `journal` is the whole journal of the host, oldest first.
pub fn superseded<'a>(journal: impl IntoIterator<Item = &'a Entry>, key: &HandoverKey) -> bool {
    let mut known = false;
    for entry in journal {
        known |= entry.key() == key;
        let opens = matches!(entry, Entry::Source(SourceEntry { fact: SourceFact::Opened { .. }, .. }));
        if known && opens && entry.key() != key && entry.key().vm == key.vm {
            return true;
        }
    }
    false
}

/// Every attempt before this one has let go of the VM's QEMU ([`super::source::Claim`]).
fn supersede(recorded: &mut [Recorded<'_>], by: &HandoverKey) {
    for earlier in recorded {
        let (Recorded::Source { key, superseded, .. } | Recorded::Target { key, superseded, .. }) = earlier;
        *superseded |= key.vm == by.vm && key != by;
    }
}

/// Why the permit's nonce was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the nonce {nonce} of the permit for migration {migration} was consumed before")]
pub struct AlreadyConsumed {
    /// The nonce.
    pub nonce: Nonce,
    /// The migration that the permit names.
    pub migration: MigrationId,
}

/// Every nonce that this host ever consumed (I4), rebuilt from the journal after a restart.
#[derive(Debug, Clone, Default)]
pub struct NonceLedger {
    consumed: BTreeSet<Nonce>,
}

impl NonceLedger {
    /// From every entry of the host's journal.
    pub fn rebuild<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Self {
        let consumed = entries.into_iter().filter_map(|entry| match entry {
            Entry::Target(TargetEntry { fact: TargetFact::Consumed { attempt }, .. }) => Some(attempt.nonce),
            _ => None,
        });
        Self { consumed: consumed.collect() }
    }

    /// Whether the nonce was consumed.
    #[must_use]
    pub fn contains(&self, nonce: &Nonce) -> bool {
        self.consumed.contains(nonce)
    }

    /// Consumes the nonce in memory; [`super::target::Target::prepare`] pairs it with the journal entry.
    pub(super) fn consume(&mut self, attempt: &Attempt) -> Result<(), AlreadyConsumed> {
        if self.consumed.insert(attempt.nonce) {
            return Ok(());
        }
        Err(AlreadyConsumed { nonce: attempt.nonce, migration: attempt.key.migration })
    }
}
