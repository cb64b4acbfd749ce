//! The outcome: what was expected and what was found, for the audit log and for people; and the proof that it
//! was good.

use std::fmt;

use serde::{Deserialize, Serialize};
use types::{Digest, MigrationId};

use super::binding::{Binding, HostId};
use super::reason::{Reason, ReasonCode};
use super::reference::AllowedDigest;
use crate::pcr::{Bank, PcrDigest, PcrIndex};
use crate::structure::{ClockInfo, TpmName};

/// How long an appraisal counts, seconds: long enough to open a channel under the permit that rests on it.
pub const VALID_S: u64 = 60;
/// The version of the record below.
const VERSION: u32 = 1;

/// Whether the platform is trusted for what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every condition held.
    Trusted,
    /// At least one did not.
    Refused,
}

/// One register: expected against found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PcrAppraisal {
    /// The register.
    pub index: PcrIndex,
    /// Its value is allowed now.
    pub matches: bool,
    /// The values that are allowed now.
    pub expected: Vec<AllowedDigest>,
    /// The value that was quoted.
    pub found: PcrDigest,
    /// Why it differs, as far as the event log tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<String>,
}

/// The record of one appraisal. By itself it proves nothing: see [`Appraised`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Appraisal {
    /// The version of this record.
    pub version: u32,
    /// The outcome.
    pub verdict: Verdict,
    /// The host.
    pub host: HostId,
    /// The migration, if it was for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// When, in seconds since 1970.
    pub appraised_at_unix_s: u64,
    /// What the quote had to be bound to.
    pub qualifying_data: Digest,
    /// The digest of the evidence.
    pub evidence: Digest,
    /// The digest of the reference values.
    pub reference: Digest,
    /// The name of the enrolled attestation key.
    pub ak_name: TpmName,
    /// The bank.
    pub bank: Bank,
    /// The registers. Empty when the quote itself was not good: then nothing is known about them.
    pub pcrs: Vec<PcrAppraisal>,
    /// The TPM's clock, from a good quote: what the next appraisal is compared with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<ClockInfo>,
    /// The TPM's firmware version, 16 hexadecimal digits in its vendor's own numbering, from a good quote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware_version: Option<String>,
    /// Every reason found why it is not trusted.
    pub reasons: Vec<Reason>,
    /// What is worth knowing and decides nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Appraisal {
    /// A record of which nothing is known yet, and which is therefore a refusal.
    pub(super) fn begin(
        binding: &Binding,
        ak_name: TpmName,
        bank: Bank,
        evidence: Digest,
        reference: Digest,
        now_unix_s: u64,
    ) -> Self {
        Self {
            version: VERSION,
            verdict: Verdict::Refused,
            host: binding.host.clone(),
            migration: binding.migration(),
            appraised_at_unix_s: now_unix_s,
            qualifying_data: binding.qualifying_data(),
            evidence,
            reference,
            ak_name,
            bank,
            pcrs: Vec::new(),
            clock: None,
            firmware_version: None,
            reasons: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// The digest for the audit log, over RFC 8785 JSON.
    #[must_use]
    pub fn digest(&self) -> Digest {
        super::json_digest(self)
    }

    /// The outcome as a proof or a refusal. `complete` says that every condition was looked at.
    pub(super) fn conclude(mut self, complete: bool) -> Result<Appraised, Refusal> {
        if complete && self.reasons.is_empty() {
            self.verdict = Verdict::Trusted;
            Ok(Appraised(Box::new(self)))
        } else {
            Err(Refusal(Box::new(self)))
        }
    }
}

/// The proof that a platform was appraised and found good. Only [`super::appraise`] makes one; it can't be
/// read from a file or a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appraised(Box<Appraisal>);

impl Appraised {
    /// The record.
    #[must_use]
    pub fn appraisal(&self) -> &Appraisal {
        &self.0
    }

    /// Whether it still counts at that time: not when it is older than [`VALID_S`], nor when it lies in the
    /// future, since then the clock was set back and its age is not known.
    #[must_use]
    pub fn counts_at(&self, now_unix_s: u64) -> bool {
        now_unix_s.checked_sub(self.0.appraised_at_unix_s).is_some_and(|age_s| age_s <= VALID_S)
    }

    /// Whether it is the answer to that question, and to no other.
    #[must_use]
    pub fn is_about(&self, binding: &Binding) -> bool {
        self.0.qualifying_data == binding.qualifying_data()
    }
}

/// A platform that is not trusted, with every reason found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(Box<Appraisal>);

impl Refusal {
    /// The record.
    #[must_use]
    pub fn appraisal(&self) -> &Appraisal {
        &self.0
    }

    /// The reasons; there is at least one.
    #[must_use]
    pub fn reasons(&self) -> &[Reason] {
        &self.0.reasons
    }

    /// Whether it is refused for that, among others.
    #[must_use]
    pub fn has(&self, code: ReasonCode) -> bool {
        self.0.reasons.iter().any(|reason| reason.code == code)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not trusted", self.0.host)?;
        for (at, reason) in self.0.reasons.iter().enumerate() {
            write!(f, "{} {reason}", if at == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}
