//! Checkpoints of the audit log: what a manager signs, and what a host makes of the next one.
//!
//! A host remembers the last checkpoint that it took, and shows it. So a log that was rolled back or forked is found by
//! whoever sees both: the manager when the host comes, the host when the manager shows a checkpoint that does not extend
//! what the host holds.

use crate::document::DOCUMENT_LIMIT_BYTES;
use crate::domain::Domain;
use crate::envelope::{self, SignatureError};
use crate::key::{SigningKey, VerifyingKey};
use crate::merkle::{self, TreeHash};
use serde::{Deserialize, Serialize};
use types::{Digest, Nonce};

/// A signed checkpoint has about 400 bytes.
pub const CHECKPOINT_LIMIT_BYTES: usize = 1024;
const _: () = assert!(CHECKPOINT_LIMIT_BYTES <= DOCUMENT_LIMIT_BYTES);

/// Where a log stood at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Which log.
    pub log: Nonce,
    /// How often an operator has accepted that the log lost entries. A higher one starts anew.
    pub generation: u64,
    /// How many entries it has.
    pub size: u64,
    /// Chain hash of the last entry.
    pub head: Digest,
    /// Root of the Merkle tree over all entries.
    pub root: TreeHash,
    /// When it was signed, microseconds since the Unix epoch.
    pub at_us: i64,
}

/// Signs a checkpoint.
///
/// # Errors
/// It is too long to be one.
pub fn sign(key: &SigningKey, checkpoint: &Checkpoint) -> Result<Vec<u8>, SignatureError> {
    let payload = envelope::to_cbor(checkpoint)?;
    let key_id = key.verifying_key().id();
    envelope::seal(key, &key_id, Domain::AuditCheckpoint, payload, CHECKPOINT_LIMIT_BYTES)
}

/// Reads a checkpoint that one of the known keys signed.
///
/// # Errors
/// It is none, or nobody known signed it.
pub fn verify(
    bytes: &[u8],
    find_key: impl FnOnce(&str) -> Option<VerifyingKey>,
) -> Result<Checkpoint, SignatureError> {
    let opened = envelope::open(bytes, &[Domain::AuditCheckpoint], CHECKPOINT_LIMIT_BYTES, find_key)?;
    envelope::from_cbor(&opened.payload)
}

/// The proof that came with a checkpoint: that its log begins with the one of `from_size` entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extension {
    /// Entries of the earlier log.
    pub from_size: u64,
    /// RFC 9162 consistency proof.
    pub proof: Vec<TreeHash>,
}

/// What is to be done with a checkpoint that may be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It takes the place of what was held.
    Newer,
    /// It says what was held already.
    Same,
}

/// Why a checkpoint is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// It may be good: what came with it does not prove that it extends what is held.
    #[error("no proof that it extends the log of {held} entries that is remembered here")]
    Unproven {
        /// Size of what is held.
        held: u64,
    },
    /// It contradicts what is held.
    #[error("{0}")]
    Contradicts(#[from] Contradiction),
}

/// What no honest log does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// Another log took its place.
    #[error("it is of another log than the one that is remembered")]
    OtherLog,
    /// From before an operator accepted a loss.
    #[error("its generation {shown} is before the remembered {held}")]
    OlderGeneration {
        /// Of the checkpoint.
        shown: u64,
        /// Remembered.
        held: u64,
    },
    /// The log lost entries.
    #[error("the log was rolled back: it has {shown} entries, {held} are remembered")]
    Shorter {
        /// Of the checkpoint.
        shown: u64,
        /// Remembered.
        held: u64,
    },
    /// As long, but another.
    #[error("the log was forked: entry {size} is another one than is remembered")]
    OtherHead {
        /// Entries of both.
        size: u64,
    },
    /// Longer, and what it begins with is another log.
    #[error("the log was forked: it does not begin with the {held} entries that are remembered")]
    NotAnExtension {
        /// Remembered.
        held: u64,
    },
}

/// Judges a checkpoint, whose signature is good, against the one that is held.
///
/// # Errors
/// Why it is not to be kept.
pub fn judge(
    held: Option<&Checkpoint>,
    shown: &Checkpoint,
    extension: Option<&Extension>,
) -> Result<Taken, NotTaken> {
    let Some(held) = held else { return Ok(Taken::Newer) };
    if held.log != shown.log {
        return Err(Contradiction::OtherLog.into());
    }
    if shown.generation != held.generation {
        let (shown, held) = (shown.generation, held.generation);
        return match shown > held {
            true => Ok(Taken::Newer),
            false => Err(Contradiction::OlderGeneration { shown, held }.into()),
        };
    }
    if shown.size < held.size {
        return Err(Contradiction::Shorter { shown: shown.size, held: held.size }.into());
    }
    if shown.size == held.size {
        let same = (shown.head, shown.root) == (held.head, held.root);
        return if same { Ok(Taken::Same) } else { Err(Contradiction::OtherHead { size: held.size }.into()) };
    }
    let Some(extension) = extension.filter(|e| e.from_size == held.size) else {
        return Err(NotTaken::Unproven { held: held.size });
    };
    match merkle::extends((held.size, held.root), (shown.size, shown.root), &extension.proof) {
        true => Ok(Taken::Newer),
        false => Err(Contradiction::NotAnExtension { held: held.size }.into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::merkle::Frontier;
    use proptest::prelude::*;

    fn checkpoint(generation: u64, size: u64, fork: u8) -> Checkpoint {
        let mut frontier = Frontier::default();
        for n in 0..size {
            frontier.push(merkle::leaf(&[u8::try_from(n).unwrap(), fork]));
        }
        Checkpoint {
            log: Nonce::from_bytes([7; 16]),
            generation,
            size,
            head: Digest::of(&[u8::try_from(size).unwrap(), fork]),
            root: frontier.root(),
            at_us: 1,
        }
    }

    fn extension(from: u64, to: u64, fork: u8) -> Extension {
        let mut frontier = Frontier::default();
        let leaves = (0..to).map(|n| merkle::leaf(&[u8::try_from(n).unwrap(), fork]));
        let nodes: Vec<_> = leaves.map(|leaf| frontier.push(leaf)).collect();
        let find = |n: &merkle::Node| nodes[usize::try_from(n.stored_at()).unwrap() - 1][n.level as usize];
        let parts = merkle::consistency_nodes(from, to).unwrap();
        let proof = parts.iter().map(|p| merkle::joined(&p.iter().map(find).collect::<Vec<_>>()).unwrap());
        Extension { from_size: from, proof: proof.collect() }
    }

    #[test]
    fn only_what_extends_the_held_log_is_kept() {
        let held = checkpoint(1, 5, 0);
        let check = |shown: &Checkpoint, extension: Option<Extension>, expect: Result<Taken, NotTaken>| {
            assert_eq!(judge(Some(&held), shown, extension.as_ref()), expect);
        };
        check(&checkpoint(1, 9, 0), Some(extension(5, 9, 0)), Ok(Taken::Newer));
        check(&Checkpoint { at_us: 9, ..held.clone() }, None, Ok(Taken::Same));
        check(&checkpoint(1, 9, 0), None, Err(NotTaken::Unproven { held: 5 }));
        check(&checkpoint(1, 9, 0), Some(extension(4, 9, 0)), Err(NotTaken::Unproven { held: 5 }));
        check(
            &checkpoint(1, 9, 1),
            Some(extension(5, 9, 1)),
            Err(Contradiction::NotAnExtension { held: 5 }.into()),
        );
        check(&checkpoint(1, 4, 0), None, Err(Contradiction::Shorter { shown: 4, held: 5 }.into()));
        check(&checkpoint(1, 5, 1), None, Err(Contradiction::OtherHead { size: 5 }.into()));
        check(
            &checkpoint(0, 9, 0),
            Some(extension(5, 9, 0)),
            Err(Contradiction::OlderGeneration { shown: 0, held: 1 }.into()),
        );
        check(&checkpoint(2, 1, 3), None, Ok(Taken::Newer));
        let other = Checkpoint { log: Nonce::from_bytes([8; 16]), ..checkpoint(2, 9, 0) };
        check(&other, Some(extension(5, 9, 0)), Err(Contradiction::OtherLog.into()));
        assert_eq!(judge(None, &held, None), Ok(Taken::Newer));
    }

    #[test]
    fn a_checkpoint_is_good_under_its_signer_s_key_only() {
        let (key, stranger) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
        let signed = sign(&key, &checkpoint(0, 3, 0)).unwrap();
        assert!(signed.len() <= 512, "{}", signed.len());
        let known = |id: &str| (id == key.verifying_key().id()).then_some(*key.verifying_key());
        assert_eq!(verify(&signed, known), Ok(checkpoint(0, 3, 0)));
        let wrong = verify(&signed, |_| Some(*stranger.verifying_key()));
        assert_eq!(wrong.unwrap_err().code(), "bad-signature");
        assert_eq!(verify(&signed, |_| None).unwrap_err().code(), "unknown-key-id");
    }

    proptest! {
        #[test]
        fn no_changed_byte_is_accepted(place in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>()) {
            let key = SigningKey::generate().unwrap();
            let mut signed = sign(&key, &checkpoint(1, 200, 0)).unwrap();
            let at = place.index(signed.len());
            if cut { signed.truncate(at); } else { signed[at] ^= 1 << bit; }
            prop_assert!(verify(&signed, |_| Some(*key.verifying_key())).is_err());
        }

        /// Whatever a manager shows, what is held afterwards has all that was held before, unless a person accepted a loss.
        #[test]
        fn within_a_generation_nothing_is_forgotten(shows in prop::collection::vec((0u64..3, 1u64..40, 0u8..2), 1..30)) {
            let mut held: Option<Checkpoint> = None;
            for (generation, size, fork) in shows {
                let shown = checkpoint(generation, size, fork);
                let from = held.as_ref().map_or(0, |h| h.size).min(size);
                if judge(held.as_ref(), &shown, Some(&extension(from, size, fork))) == Ok(Taken::Newer) {
                    if let Some(before) = held.filter(|b| b.generation == shown.generation) {
                        prop_assert!(before.size < shown.size);
                        prop_assert_eq!(checkpoint(generation, before.size, fork).root, before.root);
                    }
                    held = Some(shown);
                }
            }
        }
    }
}
