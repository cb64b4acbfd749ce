//! What a permit says. `permit` signs and verifies it; nothing moves without one.

use crate::handover::{Digest, HandoverKey, Side};
use crate::id::{HostName, Nonce};
use serde::{Deserialize, Serialize};

/// Most multifd channels of a permit: a VM agent's memory is bounded, and nobody gains from more.
pub const MAX_MULTIFD_CHANNELS: u16 = 16;

/// The claims of a permit: the manager's signed, single-use permission for exactly one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PermitClaims {
    /// Format version; 1.
    pub version: u16,
    /// Migration, VM and the fresh epoch pair.
    pub key: HandoverKey,
    /// Digest of the VM's spec (BLAKE3 over RFC 8785 JSON).
    pub spec_digest: Digest,
    /// The source.
    pub source: HostPart,
    /// The target.
    pub target: HostPart,
    /// The target's journal: a renunciation from another journal is no proof.
    pub target_journal: Nonce,
    /// Single use rests on this, not on time.
    pub nonce: Nonce,
    /// Seconds since the Unix epoch.
    pub issued_at_unix_s: u64,
    /// Seconds since the Unix epoch: the migration must *start* before.
    pub not_after_unix_s: u64,
    /// Seconds since the Unix epoch: the transfer must *end* before.
    pub run_deadline_unix_s: u64,
    /// Most bytes of stream, over all channels.
    pub byte_budget: u64,
    /// Most milliseconds from start to end.
    pub duration_budget_ms: u64,
    /// Most milliseconds of downtime before the watchdog asks for an abort.
    pub downtime_budget_ms: u64,
    /// What the stream may use.
    pub features: StreamFeatures,
    /// Name of the inspection profile.
    pub inspection_profile: String,
    /// Hypervisor, version and machine type on both ends, e.g. `qemu/10.0.2/pc-q35-10.0`.
    pub compatibility: String,
}

/// What a permit says about one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPart {
    /// Its name.
    pub host: HostName,
    /// SPKI (DER) of its VM agent's ephemeral key for this migration.
    #[serde(with = "hex_bytes")]
    pub agent_spki: Vec<u8>,
    /// Raw Ed25519 key (32 bytes) with which its daemon signs votes and receipts.
    #[serde(with = "hex_bytes")]
    pub daemon_key: Vec<u8>,
    /// Digest of the evidence (a TPM's quote) with which it proved its platform for this migration; none: unattested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quote: Option<Digest>,
}

/// Features of QEMU's stream that a permit allows. Everything else is refused.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamFeatures {
    /// Number of multifd channels; 0 is none.
    pub multifd_channels: u16,
    /// Post-copy.
    pub postcopy: bool,
    /// Compression method, empty is none.
    pub compression: String,
    /// Names of storage exports, none by default.
    pub storage_exports: Vec<String>,
}

impl StreamFeatures {
    /// Connections between the two hosts, and between each VM agent and its QEMU: the main one and the multifd
    /// channels.
    #[must_use]
    pub fn connections(&self) -> u16 {
        self.multifd_channels.saturating_add(1)
    }

    /// QEMU's name for the compression.
    #[must_use]
    pub fn multifd_compression(&self) -> &str {
        if self.compression.is_empty() { "none" } else { &self.compression }
    }

    /// Whether multifd channels and compression are ones that exist.
    ///
    /// # Errors
    /// What is wrong with them, in words.
    pub fn check_channels(&self) -> Result<(), String> {
        if self.multifd_channels > MAX_MULTIFD_CHANNELS {
            let asked = self.multifd_channels;
            return Err(format!("{asked} channels were asked for, {MAX_MULTIFD_CHANNELS} are possible"));
        }
        match (self.compression.as_str(), self.multifd_channels) {
            ("", _) | ("zlib" | "zstd", 1..) => Ok(()),
            ("zlib" | "zstd", 0) => {
                Err("compression needs at least one channel beside the main one".to_owned())
            }
            (other, _) => Err(format!("the compression {other:?} is unknown: it is zlib or zstd")),
        }
    }
}

impl PermitClaims {
    /// The part of one side.
    #[must_use]
    pub fn part(&self, side: Side) -> &HostPart {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }
}

/// Serde of byte strings as hexadecimal text.
pub mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// As hexadecimal text.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    /// From hexadecimal text.
    ///
    /// # Errors
    /// Text that is not hexadecimal.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}
