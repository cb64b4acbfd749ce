//! Platform configuration registers: banks, selections, values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use crate::codec::{Malformed, Reader};
use crate::structure::algorithm;

/// Registers of a PC's TPM (TCG PC Client Platform TPM Profile).
const PCR_COUNT: u8 = 24;
/// More banks than a TPM has.
const BANKS_LIMIT: u32 = 16;

/// The hash with which a set of registers is extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bank {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
}

impl Bank {
    /// Its `TPM_ALG_ID`.
    pub(crate) const fn algorithm(self) -> u16 {
        match self {
            Self::Sha256 => algorithm::SHA256,
            Self::Sha384 => algorithm::SHA384,
        }
    }

    /// Bytes of one of its values.
    #[must_use]
    pub const fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }

    pub(crate) const fn of_algorithm(id: u16) -> Option<Self> {
        match id {
            algorithm::SHA256 => Some(Self::Sha256),
            algorithm::SHA384 => Some(Self::Sha384),
            _ => None,
        }
    }

    pub(crate) fn hash(self, bytes: &[u8]) -> PcrDigest {
        let algorithm = match self {
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
        };
        PcrDigest(digest::digest(algorithm, bytes).as_ref().to_vec())
    }
}

impl fmt::Display for Bank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
        })
    }
}

/// The number of a register, 0 to 23.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct PcrIndex(u8);

impl PcrIndex {
    /// Every register.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..PCR_COUNT).map(Self)
    }

    const fn bit(self) -> u32 {
        1 << self.0
    }
}

impl TryFrom<u8> for PcrIndex {
    type Error = &'static str;
    fn try_from(index: u8) -> Result<Self, Self::Error> {
        if index < PCR_COUNT { Ok(Self(index)) } else { Err("a PCR's number is 0 to 23") }
    }
}

impl From<PcrIndex> for u8 {
    fn from(index: PcrIndex) -> Self {
        index.0
    }
}

impl fmt::Display for PcrIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PCR {}", self.0)
    }
}

/// A register's value, or what it is extended with: 32 or 48 bytes, as hexadecimal text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PcrDigest(Vec<u8>);

impl PcrDigest {
    /// From the bytes of a digest.
    ///
    /// # Errors
    /// Neither 32 bytes nor 48.
    pub fn new(bytes: &[u8]) -> Result<Self, &'static str> {
        match bytes.len() {
            32 | 48 => Ok(Self(bytes.to_vec())),
            _ => Err("a PCR digest is 32 (sha256) or 48 (sha384) bytes in hexadecimal digits"),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bank that such a value is of.
    #[must_use]
    pub fn bank(&self) -> Bank {
        if self.0.len() == Bank::Sha256.digest_bytes() { Bank::Sha256 } else { Bank::Sha384 }
    }
}

impl fmt::Display for PcrDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(&self.0))
    }
}

impl fmt::Debug for PcrDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<PcrDigest> for String {
    fn from(digest: PcrDigest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for PcrDigest {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        // Whatever is not hexadecimal has the wrong length, too.
        Self::new(&hex::decode(text).unwrap_or_default())
    }
}

/// Some registers of one bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RawPcrSelection", into = "RawPcrSelection")]
pub struct PcrSelection {
    bank: Bank,
    mask: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPcrSelection {
    bank: Bank,
    pcrs: BTreeSet<PcrIndex>,
}

impl From<RawPcrSelection> for PcrSelection {
    fn from(raw: RawPcrSelection) -> Self {
        Self::of(raw.bank, raw.pcrs)
    }
}

impl From<PcrSelection> for RawPcrSelection {
    fn from(selection: PcrSelection) -> Self {
        Self { bank: selection.bank, pcrs: selection.iter().collect() }
    }
}

impl PcrSelection {
    /// These registers of that bank.
    pub fn of(bank: Bank, indices: impl IntoIterator<Item = PcrIndex>) -> Self {
        let mask = indices.into_iter().fold(0, |mask, index| mask | index.bit());
        Self { bank, mask }
    }

    /// The bank.
    #[must_use]
    pub fn bank(&self) -> Bank {
        self.bank
    }

    /// The registers, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PcrIndex> + use<> {
        let mask = self.mask;
        PcrIndex::all().filter(move |index| mask & index.bit() != 0)
    }

    /// Whether it holds that register.
    #[must_use]
    pub fn contains(&self, index: PcrIndex) -> bool {
        self.mask & index.bit() != 0
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mask == 0
    }

    /// Reads a `TPML_PCR_SELECTION` (Part 2, 10.9.7) that selects from one bank. Banks of which nothing is
    /// selected, which some TPMs list, say nothing and are passed over.
    pub(crate) fn read(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        Self::read_any(from)?.ok_or(Malformed::Unaccepted { what: "the number of selected PCRs", found: 0 })
    }

    /// The same, where it may be that none is selected.
    pub(crate) fn read_any(from: &mut Reader<'_>) -> Result<Option<Self>, Malformed> {
        let count = from.u32("pcrSelect count")?;
        if count > BANKS_LIMIT {
            return Err(Malformed::Unaccepted { what: "pcrSelect count", found: count.into() });
        }
        let mut selected = None;
        for _ in 0..count {
            let hash = from.u16("pcrSelect hash")?;
            let mask = read_mask(from)?;
            if mask == 0 {
                continue;
            }
            let bank = Bank::of_algorithm(hash).filter(|_| selected.is_none());
            let unaccepted = Malformed::Unaccepted { what: "the PCR bank", found: hash.into() };
            selected = Some(Self { bank: bank.ok_or(unaccepted)?, mask });
        }
        Ok(selected)
    }

    /// Writes a `TPML_PCR_SELECTION`.
    #[cfg(any(test, feature = "tpm"))]
    pub(crate) fn write(&self, to: crate::codec::Writer) -> crate::codec::Writer {
        // `PCR_SELECT_MIN` of the same profile.
        const SELECT_BYTES: u8 = 3;
        let [first, second, third, _] = self.mask.to_le_bytes();
        to.u32(1).u16(self.bank.algorithm()).u8(SELECT_BYTES).raw(&[first, second, third])
    }
}

impl fmt::Display for PcrSelection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bank)?;
        for (at, index) in self.iter().enumerate() {
            write!(f, "{}{}", if at == 0 { ':' } else { ',' }, index.0)?;
        }
        Ok(())
    }
}

fn read_mask(from: &mut Reader<'_>) -> Result<u32, Malformed> {
    let bytes = from.u8("sizeofSelect")?;
    if bytes > 4 {
        return Err(Malformed::Unaccepted { what: "sizeofSelect", found: bytes.into() });
    }
    let mut mask = [0; 4];
    for (to, byte) in mask.iter_mut().zip(from.take(usize::from(bytes), "pcrSelect")?) {
        *to = *byte;
    }
    let mask = u32::from_le_bytes(mask);
    match mask >> PCR_COUNT {
        0 => Ok(mask),
        beyond => Err(Malformed::Unaccepted { what: "a PCR above 23", found: beyond.into() }),
    }
}

/// Values of registers of one bank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawPcrValues", into = "RawPcrValues")]
pub struct PcrValues {
    bank: Bank,
    values: BTreeMap<PcrIndex, PcrDigest>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPcrValues {
    bank: Bank,
    values: BTreeMap<PcrIndex, PcrDigest>,
}

impl PcrValues {
    /// These values of that bank.
    ///
    /// # Errors
    /// A value has the length of another bank's.
    pub fn new(bank: Bank, values: BTreeMap<PcrIndex, PcrDigest>) -> Result<Self, &'static str> {
        match values.values().all(|value| value.bank() == bank) {
            true => Ok(Self { bank, values }),
            false => Err("a PCR value has the length of another bank's"),
        }
    }

    /// The bank.
    #[must_use]
    pub fn bank(&self) -> Bank {
        self.bank
    }

    /// The values, in ascending order of their registers.
    #[must_use]
    pub fn values(&self) -> &BTreeMap<PcrIndex, PcrDigest> {
        &self.values
    }

    /// What a quote over these values signs (Part 3, 18.4): SHA-256, the hash of every signature that is
    /// accepted, over the values in ascending order.
    #[must_use]
    pub fn quote_digest(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.values.len() * self.bank.digest_bytes());
        self.values.values().for_each(|value| all.extend_from_slice(value.as_bytes()));
        digest::digest(&digest::SHA256, &all).as_ref().to_vec()
    }
}

impl TryFrom<RawPcrValues> for PcrValues {
    type Error = &'static str;
    fn try_from(raw: RawPcrValues) -> Result<Self, Self::Error> {
        Self::new(raw.bank, raw.values)
    }
}

impl From<PcrValues> for RawPcrValues {
    fn from(values: PcrValues) -> Self {
        Self { bank: values.bank, values: values.values }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::codec::Writer;

    fn read(bytes: &[u8]) -> Result<PcrSelection, Malformed> {
        let mut from = Reader::new(bytes);
        let selection = PcrSelection::read(&mut from)?;
        from.finish("it")?;
        Ok(selection)
    }

    #[test]
    fn selections_read_back_as_written() {
        let pcrs = [0, 4, 7, 23].map(|index| PcrIndex::try_from(index).unwrap());
        let selection = PcrSelection::of(Bank::Sha384, pcrs);
        assert_eq!(read(&selection.write(Writer::new()).done()), Ok(selection));
        assert_eq!(selection.to_string(), "sha384:0,4,7,23");
        let json = serde_json::to_string(&selection).unwrap();
        assert_eq!(json, r#"{"bank":"sha384","pcrs":[0,4,7,23]}"#);
        assert_eq!(serde_json::from_str::<PcrSelection>(&json).unwrap(), selection);
        assert_eq!(selection.iter().collect::<Vec<_>>(), pcrs);
    }

    #[test]
    fn banks_without_a_register_are_passed_over_and_two_with_are_refused() {
        let sha1_none = [0, 4, 3, 0, 0, 0];
        let sha256_pcr_0 = [0, 0x0b, 3, 1, 0, 0];
        let sha384_pcr_0 = [0, 0x0c, 3, 1, 0, 0];
        let list = |banks: &[[u8; 6]]| {
            let count = u8::try_from(banks.len()).unwrap();
            [&[0, 0, 0, count][..], &banks.concat()].concat()
        };
        assert!(read(&list(&[sha1_none, sha256_pcr_0])).is_ok());
        for bad in [&list(&[sha256_pcr_0, sha384_pcr_0]), &list(&[sha1_none]), &list(&[])] {
            assert!(matches!(read(bad), Err(Malformed::Unaccepted { .. })), "{bad:?}");
        }
        let above_23 = [0, 0, 0, 1, 0, 0x0b, 4, 1, 0, 0, 1];
        assert!(matches!(read(&above_23), Err(Malformed::Unaccepted { what: "a PCR above 23", .. })));
    }

    #[test]
    fn values_of_another_bank_and_registers_beyond_23_are_refused() {
        let value = |bytes: usize| "00".repeat(bytes);
        let json = |index: u8, bytes: usize| {
            format!(r#"{{"bank": "sha256", "values": {{"{index}": "{}"}}}}"#, value(bytes))
        };
        assert!(serde_json::from_str::<PcrValues>(&json(23, 32)).is_ok());
        for bad in [json(24, 32), json(0, 48), json(0, 31), json(0, 0)] {
            assert!(serde_json::from_str::<PcrValues>(&bad).is_err(), "{bad}");
        }
    }
}
