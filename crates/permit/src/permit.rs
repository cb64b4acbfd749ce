//! Permits: issued by the manager, verified by both daemons and both VM agents.
//!
//! ```text
//!  PermitClaims --issue--> PermitToken (<= 2048 bytes) --verify--> VerifiedPermit --expect_*--> the same, or a
//!                                                          |                          PermitRefusal with its code
//!                                                          +-- PermitRefusal
//! ```
//! A [`VerifiedPermit`] can't be made otherwise; functions that act on a permit demand one, and each checks with
//! `expect_*` what it is about to rely on. Single use (I4) is not decided here: the target's durable store is,
//! and names its refusal [`PermitRefusal::Replayed`].
//!
//! Threats met here, each with its test: CP-03 forged permit, CP-04 tampered permit, CP-07 outside its time window;
//! CP-05 and CP-06 (replay, double redemption) by the target's store; CP-09 (relayed over another channel) by the
//! permit's digest in the channel's ALPN value.

use std::collections::BTreeMap;

use ciborium::value::Value;
use coset::CborSerializable;
use coset::cwt::{ClaimName, ClaimsSet, ClaimsSetBuilder, Timestamp};
use types::handover::Side;
use types::permit::{HostPart, PermitClaims};
use types::{Digest, ErrorCode, HandoverKey, HostName, Nonce, Problem, VmId};

use crate::domain::Domain;
use crate::envelope::{self, KEY_ID_LIMIT_BYTES, SignatureError};
use crate::key::{SigningKey, VerifyingKey};

/// No permit is longer.
pub const PERMIT_LIMIT_BYTES: usize = 2048;
/// The format that this code writes and reads.
pub const PERMIT_VERSION: u16 = 1;
/// Two hosts with NTP are within milliseconds; more than this between manager and host is a fault to be seen.
pub const DEFAULT_SKEW_S: u64 = 5;
/// Keys of managers that a daemon pins: n managers, each with an old and a new key while one is rotated.
pub const KEY_RING_LIMIT: usize = 64;

const CLAIM_NAME: &str = "outrider";
const NAME_LIMIT_BYTES: usize = 128;
const STORAGE_EXPORT_LIMIT: usize = 16;

/// Why a permit was refused. The code is public and stable; detectors and scripts rely on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PermitRefusal {
    /// Its time is over.
    #[error("the permit's {what} passed {late_s} s ago")]
    Expired {
        /// `start window` or `run deadline`.
        what: &'static str,
        /// How long ago, by our clock.
        late_s: u64,
    },
    /// Issued in our future.
    #[error("the permit is issued {early_s} s in the future: compare the clocks of manager and host")]
    NotYetValid {
        /// How far, by our clock.
        early_s: u64,
    },
    /// Its nonce was consumed before.
    #[error("the permit was consumed before")]
    Replayed,
    /// It names another host for this side.
    #[error("the permit names {named} as its {side}, not {here}")]
    WrongHost {
        /// Which side.
        side: Side,
        /// Whom it names.
        named: HostName,
        /// Who checks.
        here: HostName,
    },
    /// It names another key for this side.
    #[error("the permit names another {whose} key for its {side}")]
    WrongKey {
        /// Which side.
        side: Side,
        /// `VM agent` or `daemon`.
        whose: &'static str,
    },
    /// It is for another VM, or another state of its record.
    #[error("the permit is for another {what}")]
    WrongVm {
        /// `VM`, `spec of the VM` or `migration`.
        what: &'static str,
    },
    /// It is for another attempt.
    #[error("the permit is for epochs {named_source} to {named_target}, not for these")]
    WrongEpoch {
        /// The source's epoch in the permit.
        named_source: u64,
        /// The target's epoch in the permit.
        named_target: u64,
    },
    /// The target's journal is another than the permit names.
    #[error("the permit names another journal of the target")]
    WrongJournal,
    /// The signature is wrong.
    #[error("the permit's signature does not verify")]
    BadSignature,
    /// Nobody whom we know signed it.
    #[error("the permit is signed with the unknown key {key_id}")]
    UnknownKeyId {
        /// The key's id, cut to 80 characters.
        key_id: String,
    },
    /// Signed for another purpose.
    #[error("the signature is for another purpose than a permit")]
    WrongDomain,
    /// A budget is used up.
    #[error("the permit's {what} budget is used up: {used} of {allowed}")]
    OverBudget {
        /// `byte` or `duration`.
        what: &'static str,
        /// Used so far.
        used: u64,
        /// Allowed.
        allowed: u64,
    },
    /// Longer than a permit can be.
    #[error("{actual_bytes} bytes are more than a permit can have")]
    TooLarge {
        /// Its length.
        actual_bytes: usize,
    },
    /// A format that is newer or older than this code.
    #[error("permit version {version} is not known here")]
    UnsupportedVersion {
        /// The version.
        version: u16,
    },
    /// Not the one valid encoding of a permit, or a permit that contradicts itself.
    #[error("the permit is malformed: {rule}")]
    Malformed {
        /// What was not met.
        rule: &'static str,
    },
}

impl PermitRefusal {
    /// Stable, public code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not-yet-valid",
            Self::Replayed => "replayed",
            Self::WrongHost { .. } => "wrong-host",
            Self::WrongKey { .. } => "wrong-key",
            Self::WrongVm { .. } => "wrong-vm",
            Self::WrongEpoch { .. } => "wrong-epoch",
            Self::WrongJournal => "wrong-journal",
            Self::BadSignature => "bad-signature",
            Self::UnknownKeyId { .. } => "unknown-key-id",
            Self::WrongDomain => "wrong-domain",
            Self::OverBudget { .. } => "over-budget",
            Self::TooLarge { .. } => "too-large",
            Self::UnsupportedVersion { .. } => "unsupported-version",
            Self::Malformed { .. } => "malformed",
        }
    }

    /// As people and scripts see it: `permit-refused`, with this refusal's own code in front of the detail.
    pub fn problem(&self) -> Problem {
        Problem::new(ErrorCode::PermitRefused, format!("{}: {self}", self.code()))
    }
}

impl From<SignatureError> for PermitRefusal {
    fn from(error: SignatureError) -> Self {
        match error {
            SignatureError::TooLarge { actual_bytes, .. } => Self::TooLarge { actual_bytes },
            SignatureError::Malformed { rule } => Self::Malformed { rule },
            SignatureError::WrongDomain { .. } => Self::WrongDomain,
            SignatureError::UnknownKeyId { key_id } => Self::UnknownKeyId { key_id },
            SignatureError::BadSignature => Self::BadSignature,
        }
    }
}

/// The public permit keys of the managers, as a daemon pins them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyRing(BTreeMap<String, VerifyingKey>);

impl KeyRing {
    /// No keys: refuses everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key, or replaces the one of that id. `false` when the id is none or the ring is full.
    #[must_use]
    pub fn insert(&mut self, key_id: &str, key: VerifyingKey) -> bool {
        let good_id = (1..=KEY_ID_LIMIT_BYTES).contains(&key_id.len());
        let room = self.0.len() < KEY_RING_LIMIT || self.0.contains_key(key_id);
        if good_id && room {
            self.0.insert(key_id.to_owned(), key);
        }
        good_id && room
    }

    /// The key of that id.
    pub fn find(&self, key_id: &str) -> Option<&VerifyingKey> {
        self.0.get(key_id)
    }

    /// All keys, by id.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &VerifyingKey)> {
        self.0.iter().map(|(id, key)| (id.as_str(), key))
    }
}

/// A permit as it travels. Says nothing until [`verify`] has read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PermitToken(Vec<u8>);

impl PermitToken {
    /// Takes bytes from a peer or a file for a permit.
    ///
    /// # Errors
    /// [`PermitRefusal::TooLarge`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, PermitRefusal> {
        if bytes.len() > PERMIT_LIMIT_BYTES {
            return Err(PermitRefusal::TooLarge { actual_bytes: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// From hexadecimal text.
    ///
    /// # Errors
    /// [`PermitRefusal::Malformed`] or [`PermitRefusal::TooLarge`].
    pub fn from_hex(text: &str) -> Result<Self, PermitRefusal> {
        if text.len() > 2 * PERMIT_LIMIT_BYTES {
            return Err(PermitRefusal::TooLarge { actual_bytes: text.len() / 2 });
        }
        Self::from_bytes(
            hex::decode(text).map_err(|_| PermitRefusal::Malformed { rule: "hexadecimal text" })?,
        )
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As hexadecimal text.
    pub fn to_hex(&self) -> String {
        hex::encode(&self.0)
    }

    /// BLAKE3 of the bytes: the permit's id, and what the channel's ALPN value carries.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.0)
    }
}

/// A permit whose signature, encoding, consistency and start window were checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPermit {
    claims: PermitClaims,
    token: PermitToken,
    digest: Digest,
    key_id: String,
}

/// Signs a permit.
///
/// # Errors
/// The claims contradict themselves or don't fit into a permit.
pub fn issue(key: &SigningKey, key_id: &str, claims: &PermitClaims) -> Result<PermitToken, PermitRefusal> {
    check_claims(claims)?;
    let payload = encode_claims(claims)?;
    let bytes = envelope::seal(key, key_id, Domain::Permit, payload, PERMIT_LIMIT_BYTES)?;
    Ok(PermitToken(bytes))
}

/// Reads a permit: who signed it, that it is whole, and that a migration may start under it at `now_unix_s`, give
/// or take `skew_s`.
///
/// # Errors
/// Why not.
pub fn verify(
    token: &PermitToken,
    keys: &KeyRing,
    now_unix_s: u64,
    skew_s: u64,
) -> Result<VerifiedPermit, PermitRefusal> {
    let permit = verify_past(token, keys)?;
    permit.expect_start(now_unix_s, skew_s)?;
    Ok(permit)
}

/// Reads a permit whose time may be over, as evidence: who signed it, and that it is whole. Nothing may start under it.
///
/// # Errors
/// Why not.
pub fn verify_past(token: &PermitToken, keys: &KeyRing) -> Result<VerifiedPermit, PermitRefusal> {
    let opened =
        envelope::open(&token.0, &[Domain::Permit], PERMIT_LIMIT_BYTES, |id| keys.find(id).copied())?;
    let claims = decode_claims(&opened.payload)?;
    check_claims(&claims)?;
    Ok(VerifiedPermit { claims, token: token.clone(), digest: token.digest(), key_id: opened.key_id })
}

impl VerifiedPermit {
    /// What it says.
    pub fn claims(&self) -> &PermitClaims {
        &self.claims
    }

    /// The token it was read from.
    pub fn token(&self) -> &PermitToken {
        &self.token
    }

    /// BLAKE3 of the token's bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The id of the manager's key that signed it.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// A migration may start now.
    ///
    /// # Errors
    /// [`PermitRefusal::NotYetValid`] or [`PermitRefusal::Expired`].
    pub fn expect_start(&self, now_unix_s: u64, skew_s: u64) -> Result<&Self, PermitRefusal> {
        let early_s = self.claims.issued_at_unix_s.saturating_sub(now_unix_s);
        if early_s > skew_s {
            return Err(PermitRefusal::NotYetValid { early_s });
        }
        self.expect_before("start window", self.claims.not_after_unix_s, now_unix_s, skew_s)
    }

    /// The transfer may go on now.
    ///
    /// # Errors
    /// [`PermitRefusal::Expired`].
    pub fn expect_running(&self, now_unix_s: u64, skew_s: u64) -> Result<&Self, PermitRefusal> {
        self.expect_before("run deadline", self.claims.run_deadline_unix_s, now_unix_s, skew_s)
    }

    fn expect_before(
        &self,
        what: &'static str,
        end_unix_s: u64,
        now_unix_s: u64,
        skew_s: u64,
    ) -> Result<&Self, PermitRefusal> {
        let late_s = now_unix_s.saturating_sub(end_unix_s);
        if late_s > skew_s {
            return Err(PermitRefusal::Expired { what, late_s });
        }
        Ok(self)
    }

    /// The host of that side is `here`.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongHost`].
    pub fn expect_host(&self, side: Side, here: &HostName) -> Result<&Self, PermitRefusal> {
        let named = &self.claims.part(side).host;
        if named != here {
            return Err(PermitRefusal::WrongHost { side, named: named.clone(), here: here.clone() });
        }
        Ok(self)
    }

    /// The source is `here`.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongHost`].
    pub fn expect_source(&self, here: &HostName) -> Result<&Self, PermitRefusal> {
        self.expect_host(Side::Source, here)
    }

    /// The target is `here`.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongHost`].
    pub fn expect_target(&self, here: &HostName) -> Result<&Self, PermitRefusal> {
        self.expect_host(Side::Target, here)
    }

    /// The VM agent of that side has this key (SubjectPublicKeyInfo in DER).
    ///
    /// # Errors
    /// [`PermitRefusal::WrongKey`].
    pub fn expect_agent_key(&self, side: Side, spki: &[u8]) -> Result<&Self, PermitRefusal> {
        if self.claims.part(side).agent_spki != spki {
            return Err(PermitRefusal::WrongKey { side, whose: "VM agent" });
        }
        Ok(self)
    }

    /// The daemon of that side signs with this key.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongKey`].
    pub fn expect_daemon_key(&self, side: Side, key: &VerifyingKey) -> Result<&Self, PermitRefusal> {
        if self.claims.part(side).daemon_key != key.as_bytes() {
            return Err(PermitRefusal::WrongKey { side, whose: "daemon" });
        }
        Ok(self)
    }

    /// The key with which the daemon of that side signs.
    pub fn daemon_key(&self, side: Side) -> VerifyingKey {
        VerifyingKey::from_bytes(&self.claims.part(side).daemon_key)
            .expect("checked before a VerifiedPermit was made")
    }

    /// It is for this VM, in this state of its record.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongVm`].
    pub fn expect_vm(&self, vm: &VmId, spec_digest: &Digest) -> Result<&Self, PermitRefusal> {
        if self.claims.key.vm != *vm {
            return Err(PermitRefusal::WrongVm { what: "VM" });
        }
        if self.claims.spec_digest != *spec_digest {
            return Err(PermitRefusal::WrongVm { what: "spec of the VM" });
        }
        Ok(self)
    }

    /// It is for exactly this attempt.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongVm`] or [`PermitRefusal::WrongEpoch`].
    pub fn expect_attempt(&self, key: &HandoverKey) -> Result<&Self, PermitRefusal> {
        let named = &self.claims.key;
        if named.vm != key.vm {
            return Err(PermitRefusal::WrongVm { what: "VM" });
        }
        if named.migration != key.migration {
            return Err(PermitRefusal::WrongVm { what: "migration" });
        }
        if named != key {
            let (named_source, named_target) = (named.source_epoch.0, named.target_epoch.0);
            return Err(PermitRefusal::WrongEpoch { named_source, named_target });
        }
        Ok(self)
    }

    /// The target's journal has this id.
    ///
    /// # Errors
    /// [`PermitRefusal::WrongJournal`].
    pub fn expect_target_journal(&self, journal: &Nonce) -> Result<&Self, PermitRefusal> {
        if self.claims.target_journal != *journal {
            return Err(PermitRefusal::WrongJournal);
        }
        Ok(self)
    }

    /// So many bytes and milliseconds are within its budgets.
    ///
    /// # Errors
    /// [`PermitRefusal::OverBudget`].
    pub fn expect_within_budget(&self, stream_bytes: u64, elapsed_ms: u64) -> Result<&Self, PermitRefusal> {
        let over = |what, used, allowed| PermitRefusal::OverBudget { what, used, allowed };
        if stream_bytes > self.claims.byte_budget {
            return Err(over("byte", stream_bytes, self.claims.byte_budget));
        }
        if elapsed_ms > self.claims.duration_budget_ms {
            return Err(over("duration", elapsed_ms, self.claims.duration_budget_ms));
        }
        Ok(self)
    }
}

/// A CWT claims set: the registered claims that tools know, and ours under one name. The registered ones repeat
/// what ours say; that they agree follows from the one valid encoding.
fn encode_claims(claims: &PermitClaims) -> Result<Vec<u8>, PermitRefusal> {
    let malformed = |rule| PermitRefusal::Malformed { rule };
    let seconds = |at: u64| i64::try_from(at).map(Timestamp::WholeSeconds);
    let time_rule = |_| malformed("times before the year 292 billion");
    ClaimsSetBuilder::new()
        .expiration_time(seconds(claims.not_after_unix_s).map_err(time_rule)?)
        .issued_at(seconds(claims.issued_at_unix_s).map_err(time_rule)?)
        .cwt_id(claims.nonce.as_bytes().to_vec())
        .text_claim(
            CLAIM_NAME.to_owned(),
            Value::serialized(claims).map_err(|_| malformed("claims that CBOR can hold"))?,
        )
        .build()
        .to_vec()
        .map_err(|_| malformed("claims that CBOR can hold"))
}

fn decode_claims(payload: &[u8]) -> Result<PermitClaims, PermitRefusal> {
    let malformed = |rule| PermitRefusal::Malformed { rule };
    let set = ClaimsSet::from_slice(payload).map_err(|_| malformed("a CWT claims set"))?;
    let name = ClaimName::Text(CLAIM_NAME.to_owned());
    let (_, value) =
        set.rest.into_iter().find(|(found, _)| *found == name).ok_or(malformed("our claim is there"))?;
    // The version comes first: a later format must be named as such, not as garbage.
    check_version(&value)?;
    let claims: PermitClaims =
        value.deserialized().map_err(|_| malformed("exactly the known fields of the claim"))?;
    if encode_claims(&claims)? != payload {
        return Err(malformed("the canonical encoding of the claims"));
    }
    Ok(claims)
}

fn check_version(claims: &Value) -> Result<(), PermitRefusal> {
    let found = claims
        .as_map()
        .and_then(|fields| fields.iter().find(|(name, _)| name.as_text() == Some("version")))
        .and_then(|(_, version)| version.as_integer())
        .and_then(|version| u16::try_from(version).ok());
    match found {
        Some(PERMIT_VERSION) => Ok(()),
        Some(version) => Err(PermitRefusal::UnsupportedVersion { version }),
        None => Err(PermitRefusal::Malformed { rule: "the claim has a version" }),
    }
}

/// What must hold within any permit, whoever made it.
fn check_claims(claims: &PermitClaims) -> Result<(), PermitRefusal> {
    if claims.version != PERMIT_VERSION {
        return Err(PermitRefusal::UnsupportedVersion { version: claims.version });
    }
    check_part(&claims.source)?;
    check_part(&claims.target)?;
    let names = [&claims.inspection_profile, &claims.compatibility, &claims.features.compression];
    let exports = &claims.features.storage_exports;
    let (source, target) = (&claims.source, &claims.target);
    let rules = [
        ("source and target are two hosts", source.host != target.host),
        ("every VM agent has its own key", source.agent_spki != target.agent_spki),
        ("the target's epoch is after the source's", claims.key.target_epoch > claims.key.source_epoch),
        ("it can start after it was issued", claims.not_after_unix_s > claims.issued_at_unix_s),
        ("it can run after it was started", claims.run_deadline_unix_s >= claims.not_after_unix_s),
        (
            "no budget is empty",
            claims.byte_budget > 0 && claims.duration_budget_ms > 0 && claims.downtime_budget_ms > 0,
        ),
        ("names have at most 128 bytes", names.iter().all(|name| name.len() <= NAME_LIMIT_BYTES)),
        ("at most 16 storage exports", exports.len() <= STORAGE_EXPORT_LIMIT),
    ];
    match rules.iter().find(|(_, holds)| !holds) {
        Some((rule, _)) => Err(PermitRefusal::Malformed { rule }),
        None => Ok(()),
    }
}

fn check_part(part: &HostPart) -> Result<(), PermitRefusal> {
    VerifyingKey::from_spki_der(&part.agent_spki)
        .map_err(|_| PermitRefusal::Malformed { rule: "VM agents have Ed25519 keys" })?;
    VerifyingKey::from_bytes(&part.daemon_key)
        .map_err(|_| PermitRefusal::Malformed { rule: "daemons have Ed25519 keys" })?;
    Ok(())
}

#[cfg(test)]
mod tests;
