//! What a platform is expected to measure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use types::Digest;

use crate::event_log::{EventLog, RecordedEvent};
use crate::pcr::{Bank, PcrDigest, PcrIndex, PcrSelection, PcrValues};

/// Values that one register may have at once: the present, and a few planned changes (threats.md B-23).
const ALLOWED_LIMIT: usize = 16;
/// Events that are kept for one register; a PC's busiest has about 100.
pub const EVENTS_LIMIT: usize = 512;
const NOTE_LIMIT_BYTES: usize = 128;

/// A value that a register may have, and when. Times are seconds since 1970, both ends included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowedDigest {
    /// The value.
    pub digest: PcrDigest,
    /// What it stands for, for people: "kernel 6.1.148, change 4711".
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Not accepted earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before_unix_s: Option<u64>,
    /// Not accepted later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after_unix_s: Option<u64>,
}

impl AllowedDigest {
    /// A value that is allowed at any time.
    #[must_use]
    pub fn always(digest: PcrDigest) -> Self {
        Self { digest, note: String::new(), not_before_unix_s: None, not_after_unix_s: None }
    }

    /// Whether it counts at that time.
    #[must_use]
    pub fn counts_at(&self, now_unix_s: u64) -> bool {
        self.not_before_unix_s.is_none_or(|from| from <= now_unix_s)
            && self.not_after_unix_s.is_none_or(|until| now_unix_s <= until)
    }

    fn check(&self, index: PcrIndex, bank: Bank) -> Result<(), ReferenceFault> {
        if self.digest.bank() != bank {
            return Err(ReferenceFault::OtherBank { index, bank });
        }
        if self.note.len() > NOTE_LIMIT_BYTES {
            return Err(ReferenceFault::LongNote { index });
        }
        match (self.not_before_unix_s, self.not_after_unix_s) {
            (Some(from), Some(until)) if until < from => Err(ReferenceFault::NeverCounts { index }),
            _ => Ok(()),
        }
    }
}

/// What is expected of one register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferencePcr {
    /// The values that it may have.
    pub allowed: Vec<AllowedDigest>,
    /// The events that led to one of them, to explain a mismatch by the first that differs. They decide
    /// nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<RecordedEvent>,
}

/// Why values can't serve as reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceFault {
    /// Nothing is expected: anything would pass.
    #[error("no PCR is named: such a reference would accept any platform")]
    Empty,
    /// Too few or too many values.
    #[error("{index} has {found} allowed values; it must have 1 to {ALLOWED_LIMIT}")]
    Allowed {
        /// The register.
        index: PcrIndex,
        /// How many.
        found: usize,
    },
    /// Too many events.
    #[error("{index} has {found} recorded events, more than {EVENTS_LIMIT}")]
    Events {
        /// The register.
        index: PcrIndex,
        /// How many.
        found: usize,
    },
    /// A digest of another length.
    #[error("{index} has a digest that is not of the bank {bank}")]
    OtherBank {
        /// The register.
        index: PcrIndex,
        /// The bank.
        bank: Bank,
    },
    /// A note that is too long.
    #[error("{index} has a note of more than {NOTE_LIMIT_BYTES} bytes")]
    LongNote {
        /// The register.
        index: PcrIndex,
    },
    /// An end before its beginning.
    #[error("{index} has a value whose not_after lies before its not_before")]
    NeverCounts {
        /// The register.
        index: PcrIndex,
    },
}

/// The registers of one bank that are quoted, and what they may hold. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawReference", into = "RawReference")]
pub struct ReferenceValues {
    bank: Bank,
    pcrs: BTreeMap<PcrIndex, ReferencePcr>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReference {
    bank: Bank,
    pcrs: BTreeMap<PcrIndex, ReferencePcr>,
}

impl ReferenceValues {
    /// These registers of that bank.
    ///
    /// # Errors
    /// [`ReferenceFault`].
    pub fn new(bank: Bank, pcrs: BTreeMap<PcrIndex, ReferencePcr>) -> Result<Self, ReferenceFault> {
        if pcrs.is_empty() {
            return Err(ReferenceFault::Empty);
        }
        for (index, pcr) in &pcrs {
            check_pcr(*index, pcr, bank)?;
        }
        Ok(Self { bank, pcrs })
    }

    /// The state of now as reference: the values of a platform that an admin trusts as it is, with the events
    /// that its log gives for them.
    ///
    /// # Errors
    /// [`ReferenceFault::Empty`].
    pub fn recorded(values: &PcrValues, log: Option<&EventLog>) -> Result<Self, ReferenceFault> {
        let bank = values.bank();
        let replayed = log.map(|log| (log, log.replay(bank)));
        let record = |(index, value): (&PcrIndex, &PcrDigest)| {
            // A log that does not lead to the value explains nothing later either.
            let matching = replayed.as_ref().filter(|(_, values)| values.get(index) == Some(value));
            let events = matching.map(|(log, _)| log.recorded(*index, bank)).unwrap_or_default();
            (*index, ReferencePcr { allowed: vec![AllowedDigest::always(value.clone())], events })
        };
        Self::new(bank, values.values().iter().map(record).collect())
    }

    /// The bank.
    #[must_use]
    pub fn bank(&self) -> Bank {
        self.bank
    }

    /// What is expected of each register.
    #[must_use]
    pub fn pcrs(&self) -> &BTreeMap<PcrIndex, ReferencePcr> {
        &self.pcrs
    }

    /// Exactly what must be quoted.
    #[must_use]
    pub fn selection(&self) -> PcrSelection {
        PcrSelection::of(self.bank, self.pcrs.keys().copied())
    }

    /// The digest that an appraisal names, over RFC 8785 JSON.
    #[must_use]
    pub fn digest(&self) -> Digest {
        super::json_digest(self)
    }
}

fn check_pcr(index: PcrIndex, pcr: &ReferencePcr, bank: Bank) -> Result<(), ReferenceFault> {
    let found = pcr.allowed.len();
    if !(1..=ALLOWED_LIMIT).contains(&found) {
        return Err(ReferenceFault::Allowed { index, found });
    }
    let found = pcr.events.len();
    if found > EVENTS_LIMIT {
        return Err(ReferenceFault::Events { index, found });
    }
    if pcr.events.iter().any(|event| event.digest.bank() != bank) {
        return Err(ReferenceFault::OtherBank { index, bank });
    }
    pcr.allowed.iter().try_for_each(|allowed| allowed.check(index, bank))
}

impl TryFrom<RawReference> for ReferenceValues {
    type Error = ReferenceFault;
    fn try_from(raw: RawReference) -> Result<Self, ReferenceFault> {
        Self::new(raw.bank, raw.pcrs)
    }
}

impl From<ReferenceValues> for RawReference {
    fn from(values: ReferenceValues) -> Self {
        Self { bank: values.bank, pcrs: values.pcrs }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn allowed(count: usize) -> ReferencePcr {
        let digest = Bank::Sha256.hash(b"good");
        ReferencePcr { allowed: vec![AllowedDigest::always(digest); count], events: Vec::new() }
    }

    #[test]
    fn a_reference_that_expects_nothing_or_too_much_is_refused() {
        let pcr = PcrIndex::try_from(4).unwrap();
        let with = |entry: ReferencePcr| ReferenceValues::new(Bank::Sha256, BTreeMap::from([(pcr, entry)]));
        assert_eq!(ReferenceValues::new(Bank::Sha256, BTreeMap::new()), Err(ReferenceFault::Empty));
        assert!(matches!(with(allowed(0)), Err(ReferenceFault::Allowed { found: 0, .. })));
        assert!(matches!(with(allowed(17)), Err(ReferenceFault::Allowed { found: 17, .. })));
        assert!(with(allowed(16)).is_ok());
        let other = ReferenceValues::new(Bank::Sha384, BTreeMap::from([(pcr, allowed(1))]));
        assert!(matches!(other, Err(ReferenceFault::OtherBank { .. })));
        let edit = |change: fn(&mut AllowedDigest)| {
            let mut entry = allowed(1);
            entry.allowed.iter_mut().for_each(change);
            with(entry)
        };
        let never = edit(|a| (a.not_before_unix_s, a.not_after_unix_s) = (Some(2), Some(1)));
        assert!(matches!(never, Err(ReferenceFault::NeverCounts { .. })));
        assert!(matches!(edit(|a| a.note = "n".repeat(129)), Err(ReferenceFault::LongNote { .. })));
        assert!(serde_json::from_str::<ReferenceValues>(r#"{"bank": "sha256", "pcrs": {}}"#).is_err());
    }

    #[test]
    fn a_planned_value_counts_in_its_time_only() {
        let digest = Bank::Sha256.hash(b"new kernel");
        let planned = AllowedDigest {
            not_before_unix_s: Some(10),
            not_after_unix_s: Some(20),
            ..AllowedDigest::always(digest)
        };
        let counts: Vec<u64> = (0..30).filter(|now| planned.counts_at(*now)).collect();
        assert_eq!(counts, (10..=20).collect::<Vec<_>>());
    }
}
