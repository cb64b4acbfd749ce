//! `TPMS_ATTEST` of a quote (Part 2, 10.12): what the TPM signs.

use serde::{Deserialize, Serialize};

use super::ATTEST_LIMIT_BYTES;
use crate::codec::{Malformed, Reader, within};
use crate::pcr::PcrSelection;

/// `TPM_GENERATED_VALUE` (Part 2, 6.2): a restricted key never signs outside data that begin so.
const GENERATED: u32 = 0xff54_4347;
/// `TPM_ST_ATTEST_QUOTE` (Part 2, 6.9).
const ST_ATTEST_QUOTE: u16 = 0x8018;
/// Largest name: an algorithm and a SHA-512 digest (Part 2, 10.5.3).
const NAME_LIMIT_BYTES: usize = 66;
/// Largest `TPM2B_DATA` (Part 2, 10.4.3), the same.
const DATA_LIMIT_BYTES: usize = 66;
const DIGEST_LIMIT_BYTES: usize = 64;
/// A clock beyond this (285,000 years) is no clock, and no exact JSON number.
const CLOCK_LIMIT_MS: u64 = 1 << 53;

/// `TPMS_CLOCK_INFO` (Part 2, 10.11.1): how often the TPM was started, and how long it has run in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockInfo {
    /// Milliseconds that the TPM has been powered, over its whole life.
    pub clock_ms: u64,
    /// TPM resets since the last clear: one for each start of the platform.
    pub reset_count: u32,
    /// Suspends or hibernations since the last reset.
    pub restart_count: u32,
    /// The clock is known not to have gone back since an unorderly shutdown.
    pub safe: bool,
}

impl ClockInfo {
    /// Reads a `TPMS_CLOCK_INFO`.
    pub(crate) fn read(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let clock_ms = from.u64("clock")?;
        if clock_ms >= CLOCK_LIMIT_MS {
            return Err(Malformed::Unaccepted { what: "clock", found: clock_ms });
        }
        let reset_count = from.u32("resetCount")?;
        let restart_count = from.u32("restartCount")?;
        let safe = match from.u8("safe")? {
            0 => false,
            1 => true,
            other => return Err(Malformed::Unaccepted { what: "safe", found: other.into() }),
        };
        Ok(Self { clock_ms, reset_count, restart_count, safe })
    }
}

/// Why bytes are not the attestation of a quote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AttestFault {
    /// It does not begin with `TPM_GENERATED_VALUE`: no TPM made it.
    #[error("it begins with {0:#010x} instead of TPM_GENERATED_VALUE: no TPM made it")]
    NotTpmGenerated(u32),
    /// Another kind of attestation, for instance of a key (certify) or of the time.
    #[error("its type is {0:#06x} instead of TPM_ST_ATTEST_QUOTE (0x8018)")]
    NotAQuote(u16),
    /// Not well formed.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// What a quote says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attest {
    /// The qualified name of the key that signs: which key, under which parents.
    pub qualified_signer: Vec<u8>,
    /// What the caller asked to be signed along.
    pub extra_data: Vec<u8>,
    /// The TPM's clock and counters.
    pub clock: ClockInfo,
    /// The TPM's firmware, in its vendor's own numbering.
    pub firmware_version: u64,
    /// The registers that are quoted.
    pub selection: PcrSelection,
    /// The digest over their values, in ascending order, by the hash of the signature.
    pub pcr_digest: Vec<u8>,
}

impl Attest {
    /// Reads the attestation of a quote.
    ///
    /// # Errors
    /// [`AttestFault`]; a known kind of fault is told apart from other bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, AttestFault> {
        within(bytes.len(), ATTEST_LIMIT_BYTES, "the attestation")?;
        let mut from = Reader::new(bytes);
        let magic = from.u32("magic")?;
        if magic != GENERATED {
            return Err(AttestFault::NotTpmGenerated(magic));
        }
        let kind = from.u16("type")?;
        if kind != ST_ATTEST_QUOTE {
            return Err(AttestFault::NotAQuote(kind));
        }
        let attest = Self {
            qualified_signer: from.sized(NAME_LIMIT_BYTES, "qualifiedSigner")?.to_vec(),
            extra_data: from.sized(DATA_LIMIT_BYTES, "extraData")?.to_vec(),
            clock: ClockInfo::read(&mut from)?,
            firmware_version: from.u64("firmwareVersion")?,
            selection: PcrSelection::read(&mut from)?,
            pcr_digest: from.sized(DIGEST_LIMIT_BYTES, "pcrDigest")?.to_vec(),
        };
        from.finish("the attestation")?;
        Ok(attest)
    }
}
