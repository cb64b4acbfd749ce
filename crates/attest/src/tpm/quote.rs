//! Registers, clock and quotes (Part 3, sections 18, 22 and 29).

use std::collections::BTreeMap;

use types::Digest;

use super::command::{Command, TpmFault, code};
use super::keys::LoadedAk;
use super::{RESPONSE_LIMIT_BYTES, Tpm};
use crate::codec::{Bounded, Malformed, Reader};
use crate::pcr::{PcrDigest, PcrIndex, PcrSelection, PcrValues};
use crate::structure::{ATTEST_LIMIT_BYTES, Attest, ClockInfo, SIGNATURE_LIMIT_BYTES, algorithm};
use crate::verify::Evidence;

/// How often registers are read again when they change meanwhile.
const TRIES: usize = 4;

/// A quote: what the TPM signed, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote {
    /// `TPMS_ATTEST`.
    pub attest: Bounded<ATTEST_LIMIT_BYTES>,
    /// `TPMT_SIGNATURE`.
    pub signature: Bounded<SIGNATURE_LIMIT_BYTES>,
}

impl Tpm {
    /// Quotes registers, and reads the values that the quote is of.
    ///
    /// # Errors
    /// [`TpmFault`]; [`TpmFault::Unsteady`] when the registers change each time between the two.
    pub fn evidence(
        &mut self,
        ak: &LoadedAk,
        selection: &PcrSelection,
        qualifying_data: &Digest,
        event_log: Option<Bounded<{ crate::event_log::EVENT_LOG_LIMIT_BYTES }>>,
    ) -> Result<Evidence, TpmFault> {
        for _ in 0..TRIES {
            let pcrs = self.pcr_read(selection)?;
            let quote = self.quote(ak, selection, qualifying_data)?;
            // A quote that is not one is the manager's to refuse; here only the values must be its own.
            let steady = Attest::parse(quote.attest.as_slice())
                .map_or(true, |attest| attest.pcr_digest == pcrs.quote_digest());
            if steady {
                let malformed = |source| TpmFault::Malformed { command: "TPM2_Quote", source };
                let ak_public = Bounded::new(ak.public().as_bytes().to_vec()).map_err(malformed)?;
                let Quote { attest, signature } = quote;
                return Ok(Evidence { attest, signature, pcrs, ak_public, event_log });
            }
        }
        Err(TpmFault::Unsteady)
    }

    /// Has the TPM sign registers and `qualifying_data`.
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn quote(
        &mut self,
        ak: &LoadedAk,
        selection: &PcrSelection,
        qualifying_data: &Digest,
    ) -> Result<Quote, TpmFault> {
        let command = Command::new("TPM2_Quote", code::QUOTE).with_password(ak.handle, &[]);
        // The key has its scheme; no other is asked for.
        let command =
            command.parameters(|to| selection.write(to.sized(&qualifying_data.0).u16(algorithm::NULL)));
        self.run(&command)?.read(|from| {
            let attest = Bounded::new(from.sized(ATTEST_LIMIT_BYTES, "quoted")?.to_vec())?;
            // The last of the parameters: all that is left.
            let signature = Bounded::new(from.rest().to_vec())?;
            Ok(Quote { attest, signature })
        })
    }

    /// Reads registers, all of one moment.
    ///
    /// # Errors
    /// [`TpmFault`]; a bank that the TPM does not keep is [`TpmFault::Malformed`].
    pub fn pcr_read(&mut self, selection: &PcrSelection) -> Result<PcrValues, TpmFault> {
        for _ in 0..TRIES {
            if let Some(values) = self.pcr_read_once(selection)? {
                return Ok(values);
            }
        }
        Err(TpmFault::Unsteady)
    }

    /// A response holds eight values at most; nothing when a register changed between two of them.
    fn pcr_read_once(&mut self, selection: &PcrSelection) -> Result<Option<PcrValues>, TpmFault> {
        let malformed =
            |what| TpmFault::Malformed { command: "TPM2_PCR_Read", source: Malformed::Truncated { what } };
        let mut values = BTreeMap::new();
        let mut moment = None;
        loop {
            let missing = selection.iter().filter(|index| !values.contains_key(index));
            let missing = PcrSelection::of(selection.bank(), missing);
            if missing.is_empty() {
                let values = PcrValues::new(selection.bank(), values);
                return values.map(Some).map_err(|_| malformed("a value of the bank"));
            }
            let (counter, read) = self.pcr_read_some(&missing)?;
            if *moment.get_or_insert(counter) != counter {
                return Ok(None);
            }
            let before = values.len();
            values.extend(read.into_iter().filter(|(index, _)| missing.contains(*index)));
            if values.len() == before {
                return Err(malformed("the bank, which the TPM does not keep,"));
            }
        }
    }

    /// `TPM2_PCR_Read`: the counter of changes, and as many values as the TPM gives at once.
    fn pcr_read_some(
        &mut self,
        selection: &PcrSelection,
    ) -> Result<(u32, Vec<(PcrIndex, PcrDigest)>), TpmFault> {
        const DIGESTS_LIMIT: u32 = 8;
        let command = Command::new("TPM2_PCR_Read", code::PCR_READ).parameters(|to| selection.write(to));
        self.run(&command)?.read(|from| {
            let counter = from.u32("pcrUpdateCounter")?;
            let given = PcrSelection::read_any(from)?;
            let count = from.u32("pcrValues count")?;
            let indices: Vec<PcrIndex> = given.iter().flat_map(PcrSelection::iter).collect();
            if count > DIGESTS_LIMIT || usize::try_from(count) != Ok(indices.len()) {
                return Err(Malformed::Unaccepted { what: "pcrValues count", found: count.into() });
            }
            let value = |index| Ok((index, read_value(from)?));
            Ok((counter, indices.into_iter().map(value).collect::<Result<_, Malformed>>()?))
        })
    }

    /// The TPM's clock and counters.
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn read_clock(&mut self) -> Result<ClockInfo, TpmFault> {
        let command = Command::new("TPM2_ReadClock", code::READ_CLOCK);
        self.run(&command)?.read(|from| {
            from.u64("time")?;
            ClockInfo::read(from)
        })
    }
}

fn read_value(from: &mut Reader<'_>) -> Result<PcrDigest, Malformed> {
    let value = from.sized(RESPONSE_LIMIT_BYTES, "a PCR value")?;
    let found = u64::try_from(value.len()).unwrap_or(u64::MAX);
    PcrDigest::new(value).map_err(|_| Malformed::Unaccepted { what: "the length of a PCR value", found })
}
