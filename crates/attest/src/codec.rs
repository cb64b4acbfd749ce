//! Bytes as a TPM writes them (TCG TPM 2.0 Library, Part 2, section 4: big-endian, lengths first), read
//! totally.
//!
//! Every length is checked against what is there and against a limit before anything is copied, and a
//! structure that is followed by more bytes is refused: two readers must never see two meanings.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why bytes are not the structure that they were taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes end inside a field.
    #[error("{what} is cut short")]
    Truncated {
        /// The field.
        what: &'static str,
    },
    /// A field is longer than it may be.
    #[error("{what} has {found} bytes, more than the {limit} allowed")]
    TooLong {
        /// The field.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Bytes follow the structure.
    #[error("{bytes} bytes follow {what}")]
    Trailing {
        /// The structure.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
    /// A value that this reader does not know, or that is not allowed there.
    #[error("{what} is {found:#x}, which is not accepted")]
    Unaccepted {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
}

/// Reads big-endian fields from the front of a slice.
#[derive(Clone)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, bytes: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Malformed::Truncated { what })?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed::Truncated { what })?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        self.array(what).map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// A `TPM2B`: its length in 16 bits, then that many bytes, at most `limit`.
    pub(crate) fn sized(&mut self, limit: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let found = usize::from(self.u16(what)?);
        within(found, limit, what)?;
        self.take(found, what)
    }

    /// The same with a length of 32 bits.
    pub(crate) fn long(&mut self, limit: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let found = usize::try_from(self.u32(what)?).unwrap_or(usize::MAX);
        within(found, limit, what)?;
        self.take(found, what)
    }

    /// Little-endian, as the firmware's event log is.
    pub(crate) fn le_u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn le_u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// A length of 32 bits, little-endian, then that many bytes. What is there is the limit.
    pub(crate) fn le_long(&mut self, what: &'static str) -> Result<&'a [u8], Malformed> {
        let found = usize::try_from(self.le_u32(what)?).unwrap_or(usize::MAX);
        self.take(found, what)
    }

    /// All that is left.
    #[cfg(feature = "tpm")]
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Refuses anything that is left.
    pub(crate) fn finish(self, what: &'static str) -> Result<(), Malformed> {
        match self.0.len() {
            0 => Ok(()),
            bytes => Err(Malformed::Trailing { what, bytes }),
        }
    }
}

pub(crate) fn within(found: usize, limit: usize, what: &'static str) -> Result<(), Malformed> {
    if found > limit { Err(Malformed::TooLong { what, found, limit }) } else { Ok(()) }
}

/// Writes big-endian fields. What is written is ours, and short: a length that does not fit its field is a
/// mistake in this crate and is cut off by `debug_assert`.
#[derive(Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, value: u8) -> Self {
        self.raw(&[value])
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.raw(&value.to_be_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.raw(&value.to_be_bytes())
    }

    pub(crate) fn sized(self, bytes: &[u8]) -> Self {
        let length = u16::try_from(bytes.len());
        debug_assert!(length.is_ok(), "a TPM2B of {} bytes", bytes.len());
        self.u16(length.unwrap_or(u16::MAX)).raw(bytes)
    }

    pub(crate) fn long(self, bytes: &[u8]) -> Self {
        let length = u32::try_from(bytes.len());
        debug_assert!(length.is_ok(), "a field of {} bytes", bytes.len());
        self.u32(length.unwrap_or(u32::MAX)).raw(bytes)
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// At most `LIMIT` bytes; base64 where it is text. The limit is checked before the text is decoded.
#[derive(Clone, PartialEq, Eq)]
pub struct Bounded<const LIMIT: usize>(Vec<u8>);

impl<const LIMIT: usize> Bounded<LIMIT> {
    /// Takes the bytes.
    ///
    /// # Errors
    /// [`Malformed::TooLong`] above the limit.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Malformed> {
        within(bytes.len(), LIMIT, "a field")?;
        Ok(Self(bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// Gives the bytes away.
    #[must_use]
    pub fn into_vec(self) -> Vec<u8> {
        self.0
    }
}

impl<const LIMIT: usize> fmt::Debug for Bounded<LIMIT> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl<const LIMIT: usize> Serialize for Bounded<LIMIT> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de, const LIMIT: usize> Deserialize<'de> for Bounded<LIMIT> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        if text.len() > LIMIT.div_ceil(3) * 4 {
            return Err(de::Error::custom(format_args!("more than the {LIMIT} bytes allowed")));
        }
        let bytes = STANDARD.decode(text).map_err(|_| de::Error::custom("not base64"))?;
        Self::new(bytes).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lengths_are_checked_before_anything_is_taken() {
        let check = |bytes: &[u8], expect| {
            assert_eq!(Reader::new(bytes).sized(4, "field").err(), expect, "{bytes:?}");
        };
        check(&[0, 2, 7, 8], None);
        check(&[0], Some(Malformed::Truncated { what: "field" }));
        check(&[0, 3, 7, 8], Some(Malformed::Truncated { what: "field" }));
        check(&[0xff, 0xff, 7], Some(Malformed::TooLong { what: "field", found: 0xffff, limit: 4 }));
        let long = Reader::new(&[0xff; 8]).long(16, "field");
        assert!(matches!(long, Err(Malformed::TooLong { found: 0xffff_ffff, .. })), "{long:?}");
        let trailing = Reader::new(&[1, 2]).finish("it");
        assert_eq!(trailing, Err(Malformed::Trailing { what: "it", bytes: 2 }));
    }

    #[test]
    fn bounded_bytes_refuse_more_than_their_limit_as_text_too() {
        let good = Bounded::<3>::new(vec![1, 2, 3]).unwrap();
        let text = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<Bounded<3>>(&text).unwrap(), good);
        for bad in ["\"AQIDBA==\"", "\"AQIDBAUGBwgJ\"", "\"A\"", "3"] {
            assert!(serde_json::from_str::<Bounded<3>>(bad).is_err(), "{bad}");
        }
    }
}
