//! `TPMT_SIGNATURE` (Part 2, 11.3.4), of the three schemes that are accepted, over SHA-256.

use super::{SIGNATURE_LIMIT_BYTES, algorithm};
use crate::codec::{Malformed, Reader, within};

/// Bytes of a coordinate or half a signature on P-256.
const P256_BYTES: usize = 32;
const RSA_LIMIT_BYTES: usize = 512;

/// A signature by an attestation key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    /// ECDSA on P-256: r and s, 32 bytes each.
    Ecdsa([u8; 64]),
    /// RSASSA-PKCS1-v1_5.
    RsaSsa(Vec<u8>),
    /// RSASSA-PSS.
    RsaPss(Vec<u8>),
}

impl Signature {
    /// Reads a signature.
    ///
    /// # Errors
    /// [`Malformed`], also for schemes and hashes that are not accepted.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        within(bytes.len(), SIGNATURE_LIMIT_BYTES, "the signature")?;
        let mut from = Reader::new(bytes);
        let scheme = from.u16("sigAlg")?;
        let hash = from.u16("hash")?;
        if hash != algorithm::SHA256 {
            return Err(Malformed::Unaccepted { what: "the signature's hash", found: hash.into() });
        }
        let signature = match scheme {
            algorithm::ECDSA => Self::ecdsa(&mut from)?,
            algorithm::RSASSA => Self::RsaSsa(from.sized(RSA_LIMIT_BYTES, "sig")?.to_vec()),
            algorithm::RSAPSS => Self::RsaPss(from.sized(RSA_LIMIT_BYTES, "sig")?.to_vec()),
            other => return Err(Malformed::Unaccepted { what: "sigAlg", found: other.into() }),
        };
        from.finish("the signature")?;
        Ok(signature)
    }

    fn ecdsa(from: &mut Reader<'_>) -> Result<Self, Malformed> {
        let mut both = [0; 2 * P256_BYTES];
        let (r, s) = both.split_at_mut(P256_BYTES);
        for (half, what) in [(r, "signatureR"), (s, "signatureS")] {
            let found = from.sized(P256_BYTES, what)?;
            // A TPM may leave leading zeros away.
            let start = P256_BYTES.saturating_sub(found.len());
            if let Some(end) = half.get_mut(start..) {
                end.copy_from_slice(found);
            }
        }
        Ok(Self::Ecdsa(both))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Writer;

    fn ecdsa(r: &[u8], s: &[u8]) -> Vec<u8> {
        Writer::new().u16(algorithm::ECDSA).u16(algorithm::SHA256).sized(r).sized(s).done()
    }

    #[test]
    fn short_halves_are_padded_and_long_ones_refused() {
        let mut expect = [0; 64];
        (expect[31], expect[62], expect[63]) = (7, 1, 2);
        assert_eq!(Signature::parse(&ecdsa(&[7], &[1, 2])), Ok(Signature::Ecdsa(expect)));
        let long = Signature::parse(&ecdsa(&[0; 33], &[1]));
        assert!(matches!(long, Err(Malformed::TooLong { found: 33, .. })), "{long:?}");
        let trailing = [ecdsa(&[7], &[1]), vec![0]].concat();
        assert!(matches!(Signature::parse(&trailing), Err(Malformed::Trailing { bytes: 1, .. })));
    }

    #[test]
    fn other_schemes_and_hashes_are_refused() {
        const SHA1: u16 = 4;
        const HMAC: u16 = 5;
        for (scheme, hash) in
            [(algorithm::ECDSA, SHA1), (algorithm::RSAPSS, algorithm::SHA384), (HMAC, algorithm::SHA256)]
        {
            let bytes = Writer::new().u16(scheme).u16(hash).sized(&[1; 32]).sized(&[1; 32]).done();
            let found = Signature::parse(&bytes);
            assert!(matches!(found, Err(Malformed::Unaccepted { .. })), "{scheme} {hash}: {found:?}");
        }
    }
}
