//! The nouns of the hand-over: keys, epochs, votes, receipts. The rules live in `engine::handover`.

use crate::id::{HostName, MigrationId, Nonce, VmId};
use serde::{Deserialize, Serialize};

/// A fencing number of a VM's location. It only grows; every permit burns a fresh pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// One side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The host that runs the VM before.
    Source,
    /// The host that is to run it after.
    Target,
}

impl Side {
    /// The side at the other end.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// A BLAKE3 digest of 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The BLAKE3 digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> Self {
        d.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = hex::FromHexError;
    fn try_from(text: String) -> Result<Self, hex::FromHexError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

/// What every hand-over message must match **exactly**, never "at least" (a RELEASE of an earlier A→B→A would
/// otherwise act on a later migration).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverKey {
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The epoch under which the source holds the VM while the permit is open.
    pub source_epoch: Epoch,
    /// The epoch under which the target would run it.
    pub target_epoch: Epoch,
}

/// Whether the guest ran or was paused by its user before the hand-over; the commit carries it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PriorRunState {
    /// The guest ran.
    Running,
    /// Its user had paused it; it stays paused on the target.
    Paused,
}

/// Why a hand-over is given up. Also the reason that an operator reads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbortReason {
    /// The public code.
    pub code: crate::ErrorCode,
    /// What happened.
    pub detail: String,
}

/// Evidence of a complete stream: what both agents must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamEvidence {
    /// Bytes of QEMU's stream, over all channels.
    pub stream_bytes: u64,
    /// BLAKE3 over the stream; of several channels see [`Self::of_channels`].
    pub digest: Digest,
}

impl StreamEvidence {
    /// The evidence of a stream on several channels, given by number (0, the main one, first).
    ///
    /// One channel is its own evidence. Of more, the bytes are the sum, and the digest is BLAKE3 over channel number
    /// (`u16`), bytes (`u64`) and digest of each, big-endian, one after the other.
    #[must_use]
    pub fn of_channels(channels: &[Self]) -> Self {
        if let [only] = channels {
            return *only;
        }
        let mut hasher = blake3::Hasher::new();
        let mut stream_bytes = 0u64;
        for (number, channel) in (0u16..).zip(channels) {
            hasher.update(&number.to_be_bytes());
            hasher.update(&channel.stream_bytes.to_be_bytes());
            hasher.update(&channel.digest.0);
            stream_bytes = stream_bytes.saturating_add(channel.stream_bytes);
        }
        Self { stream_bytes, digest: Digest(*hasher.finalize().as_bytes()) }
    }
}

/// A statement that a daemon (or the manager) signs; see `permit::statement` for the encoding. Each covers the
/// whole key, so that none can be replayed into another attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Statement {
    /// The source's daemon asks for a migration.
    Request(MigrationRequest),
    /// The source froze its QEMU after the whole stream had left it, and proved that nothing moved since.
    Frozen(SourceVote),
    /// The source could not freeze or prove; its guest runs on, or will.
    NoVote(NoVote),
    /// The target holds the complete, accepted state, paused.
    Prepared(TargetVote),
    /// The target runs the VM (the receipt that lets the source's copy be destroyed).
    Running(RunningReceipt),
    /// The target will never run this attempt: its copy is dead. Only this frees a frozen source.
    Renounced(Renunciation),
    /// The source, which still holds its frozen QEMU, asks the target to renounce (directly or through the manager).
    AskRenounce(RenounceRequest),
    /// The source's frozen copy is destroyed.
    Released(ReleaseReceipt),
    /// The source let its guest run again, on the proof that it names.
    Thawed(ThawReceipt),
}

/// See [`Statement::Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// The VM.
    pub vm: VmId,
    /// The host that asks; it must be the one that signs.
    pub source: HostName,
    /// The host that is to receive.
    pub target: HostName,
    /// Never used before.
    pub nonce: Nonce,
    /// Milliseconds since the Unix epoch, by the source's clock.
    pub timestamp_unix_ms: u64,
    /// The operator's intent that it answers (32 hexadecimal digits), empty for a request of the host's own.
    pub intent: String,
}

/// See [`Statement::Frozen`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceVote {
    /// The attempt.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
    /// What left the source.
    pub evidence: StreamEvidence,
    /// How the guest stood before.
    pub prior: PriorRunState,
}

/// See [`Statement::NoVote`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoVote {
    /// The attempt.
    pub key: HandoverKey,
    /// Why.
    pub reason: AbortReason,
}

/// See [`Statement::Prepared`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetVote {
    /// The attempt.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
    /// What the inspector accepted and released; both agents' digests were equal.
    pub evidence: StreamEvidence,
}

/// See [`Statement::Running`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningReceipt {
    /// The attempt.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
    /// Digest of the stream that it runs from.
    pub evidence: StreamEvidence,
    /// How the guest stands now.
    pub state: PriorRunState,
}

/// See [`Statement::Renounced`]. Signed only after the journal holds it and the target's QEMU is dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renunciation {
    /// The attempt.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
    /// The source.
    pub source: HostName,
    /// The target, which signs.
    pub target: HostName,
    /// The journal that holds the entry: a restored or replaced journal has another id.
    pub journal: Nonce,
}

/// See [`Statement::AskRenounce`]. Only a source whose frozen QEMU is alive may sign it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenounceRequest {
    /// The attempt.
    pub key: HandoverKey,
    /// Digest of the permit's token.
    pub permit: Digest,
}

/// See [`Statement::Released`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseReceipt {
    /// The attempt.
    pub key: HandoverKey,
    /// Digest of the stream that the copy had sent.
    pub evidence: StreamEvidence,
}

/// See [`Statement::Thawed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThawReceipt {
    /// The attempt.
    pub key: HandoverKey,
    /// Whether it had ever voted.
    pub had_voted: bool,
}
