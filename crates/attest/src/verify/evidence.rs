//! What a host sends to be appraised, and its one encoding.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use types::Digest;

use crate::codec::{Bounded, Malformed, Reader, Writer, within};
use crate::event_log::EVENT_LOG_LIMIT_BYTES;
use crate::pcr::{Bank, PcrDigest, PcrIndex, PcrValues};
use crate::structure::{ATTEST_LIMIT_BYTES, PUBLIC_LIMIT_BYTES, SIGNATURE_LIMIT_BYTES};

/// What the encoding begins with: its kind and version.
const MAGIC: &[u8; 8] = b"outrEV01";
/// Longest encoding, bytes: an event log, and 4 KiB for everything else.
pub const EVIDENCE_LIMIT_BYTES: usize = EVENT_LOG_LIMIT_BYTES + 4096;

/// A quote and what is needed to understand it. Nothing in it is believed before it is appraised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// `TPMS_ATTEST`: what the TPM signed.
    pub attest: Bounded<ATTEST_LIMIT_BYTES>,
    /// `TPMT_SIGNATURE` over it.
    pub signature: Bounded<SIGNATURE_LIMIT_BYTES>,
    /// The values of the registers, which the quote signs only as one digest.
    pub pcrs: PcrValues,
    /// `TPMT_PUBLIC` of the attestation key.
    pub ak_public: Bounded<PUBLIC_LIMIT_BYTES>,
    /// The firmware's log of what it extended the registers with, if the platform has one. It explains; it
    /// proves nothing by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_log: Option<Bounded<EVENT_LOG_LIMIT_BYTES>>,
}

impl Evidence {
    /// The encoding: what travels, and what the digest is over. Evidence has exactly one.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let to = Writer::new()
            .raw(MAGIC)
            .sized(self.attest.as_slice())
            .sized(self.signature.as_slice())
            .sized(self.ak_public.as_slice())
            .u16(self.pcrs.bank().algorithm());
        let mask = self.pcrs.values().keys().fold(0, |mask, index| mask | 1 << u8::from(*index));
        let to = self.pcrs.values().values().fold(to.u32(mask), |to, value| to.raw(value.as_bytes()));
        match &self.event_log {
            None => to.u8(0),
            Some(log) => to.u8(1).long(log.as_slice()),
        }
        .done()
    }

    /// Reads the encoding.
    ///
    /// # Errors
    /// [`Malformed`]; longer than [`EVIDENCE_LIMIT_BYTES`] is refused unread.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        within(bytes.len(), EVIDENCE_LIMIT_BYTES, "the evidence")?;
        let mut from = Reader::new(bytes);
        if from.array("the evidence's kind")? != *MAGIC {
            return Err(Malformed::Unaccepted { what: "the evidence's kind", found: 0 });
        }
        let attest = Bounded::new(from.sized(ATTEST_LIMIT_BYTES, "attest")?.to_vec())?;
        let signature = Bounded::new(from.sized(SIGNATURE_LIMIT_BYTES, "signature")?.to_vec())?;
        let ak_public = Bounded::new(from.sized(PUBLIC_LIMIT_BYTES, "ak_public")?.to_vec())?;
        let pcrs = read_values(&mut from)?;
        let event_log = match from.u8("event_log")? {
            0 => None,
            1 => Some(Bounded::new(from.long(EVENT_LOG_LIMIT_BYTES, "event_log")?.to_vec())?),
            found => return Err(Malformed::Unaccepted { what: "event_log", found: found.into() }),
        };
        from.finish("the evidence")?;
        Ok(Self { attest, signature, pcrs, ak_public, event_log })
    }

    /// The digest that a permit and the audit log carry.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }
}

fn read_values(from: &mut Reader<'_>) -> Result<PcrValues, Malformed> {
    let id = from.u16("pcr bank")?;
    let unaccepted = |found: u32| Malformed::Unaccepted { what: "the PCR values", found: found.into() };
    let bank = Bank::of_algorithm(id).ok_or(unaccepted(id.into()))?;
    let mask = from.u32("pcrs")?;
    let indices = PcrIndex::all().filter(|index| mask & 1 << u8::from(*index) != 0);
    let indices: Vec<PcrIndex> = indices.collect();
    if mask >> PcrIndex::all().count() != 0 {
        return Err(unaccepted(mask));
    }
    let mut values = BTreeMap::new();
    for index in indices {
        let value = PcrDigest::new(from.take(bank.digest_bytes(), "a PCR value")?);
        values.insert(index, value.map_err(|_| unaccepted(mask))?);
    }
    PcrValues::new(bank, values).map_err(|_| unaccepted(mask))
}
