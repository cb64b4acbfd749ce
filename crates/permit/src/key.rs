//! Ed25519 keys: of managers (permits, checkpoints) and of daemons (statements, journals).

use std::fmt;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// Why a key can't be used. Never says anything about the key's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No random numbers, or no memory.
    #[error("no key could be generated")]
    NotGenerated,
    /// Not a PKCS#8 Ed25519 key in PEM.
    #[error("not an Ed25519 private key in PKCS#8 PEM")]
    NotPkcs8Pem,
    /// Not 32 bytes, or not a SubjectPublicKeyInfo of an Ed25519 key.
    #[error("not an Ed25519 public key")]
    NotPublicKey,
    /// A point of small order or a second encoding: anything would verify under it, or two texts name one key.
    #[error("a degenerate Ed25519 public key")]
    Degenerate,
}

const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";
/// An Ed25519 key in PEM takes about 120 characters, with its public key 170.
const PEM_LIMIT_BYTES: usize = 1024;

/// A private signing key. Never printed; its bytes leave only as PEM, for a file of mode 0600.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    public: VerifyingKey,
}

impl SigningKey {
    /// Makes a key.
    ///
    /// # Errors
    /// [`KeyError::NotGenerated`].
    pub fn generate() -> Result<Self, KeyError> {
        Self::from_pair(Ed25519KeyPair::generate().map_err(|_| KeyError::NotGenerated)?)
    }

    /// From PKCS#8 in PEM.
    ///
    /// # Errors
    /// [`KeyError::NotPkcs8Pem`].
    pub fn from_pkcs8_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let der = pem_body(pem).ok_or(KeyError::NotPkcs8Pem)?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|_| KeyError::NotPkcs8Pem)?;
        Self::from_pair(pair)
    }

    /// As PKCS#8 in PEM; wiped from memory when dropped.
    ///
    /// # Errors
    /// [`KeyError::NotGenerated`] when the library is out of memory.
    pub fn to_pkcs8_pem(&self) -> Result<Zeroizing<String>, KeyError> {
        let der = self.pair.to_pkcs8v1().map_err(|_| KeyError::NotGenerated)?;
        let body = Zeroizing::new(STANDARD.encode(der.as_ref()));
        let mut pem = Zeroizing::new(String::with_capacity(PEM_LIMIT_BYTES));
        pem.push_str(PEM_BEGIN);
        pem.push('\n');
        for (at, character) in body.chars().enumerate() {
            if at > 0 && at % 64 == 0 {
                pem.push('\n');
            }
            pem.push(character);
        }
        pem.push('\n');
        pem.push_str(PEM_END);
        pem.push('\n');
        Ok(pem)
    }

    /// The public half.
    pub fn verifying_key(&self) -> &VerifyingKey {
        &self.public
    }

    fn from_pair(pair: Ed25519KeyPair) -> Result<Self, KeyError> {
        let public = VerifyingKey::from_bytes(pair.public_key().as_ref())?;
        Ok(Self { pair, public })
    }

    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("public", &self.public).finish_non_exhaustive()
    }
}

fn pem_body(pem: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let text = std::str::from_utf8(pem).ok().filter(|text| text.len() <= PEM_LIMIT_BYTES)?;
    let body = text.trim().strip_prefix(PEM_BEGIN)?.strip_suffix(PEM_END)?;
    let mut digits = Zeroizing::new(String::with_capacity(body.len()));
    digits.extend(body.chars().filter(|c| !c.is_ascii_whitespace()));
    STANDARD.decode(digits.as_bytes()).ok().map(Zeroizing::new)
}

/// DER of an Ed25519 SubjectPublicKeyInfo up to the key itself (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A public key: 32 bytes, checked not to be degenerate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerifyingKey([u8; 32]);

impl VerifyingKey {
    /// From the raw 32 bytes.
    ///
    /// # Errors
    /// [`KeyError::NotPublicKey`] or [`KeyError::Degenerate`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| KeyError::NotPublicKey)?;
        if is_degenerate(&bytes) {
            return Err(KeyError::Degenerate);
        }
        Ok(Self(bytes))
    }

    /// From hexadecimal text.
    ///
    /// # Errors
    /// As [`Self::from_bytes`].
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| KeyError::NotPublicKey)?;
        Self::from_bytes(&bytes)
    }

    /// From a SubjectPublicKeyInfo in DER.
    ///
    /// # Errors
    /// As [`Self::from_bytes`].
    pub fn from_spki_der(der: &[u8]) -> Result<Self, KeyError> {
        Self::from_bytes(der.strip_prefix(&SPKI_PREFIX).ok_or(KeyError::NotPublicKey)?)
    }

    /// The raw 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// As hexadecimal text.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// As SubjectPublicKeyInfo in DER.
    pub fn to_spki_der(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.0].concat()
    }

    /// A short, stable name of the key: 16 hexadecimal digits of its BLAKE3 digest.
    pub fn id(&self) -> String {
        hex::encode(&blake3::hash(&self.0).as_bytes()[..8])
    }

    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ed25519:{}", self.to_hex())
    }
}

impl fmt::Display for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.to_hex())
    }
}

/// The y coordinates of the two pairs of points of order 8, little endian; the other small orders have y = 0 and
/// ±1, which are compared as numbers below.
const ORDER_8: [[u8; 32]; 2] = [
    [
        0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5,
        0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
    ],
    [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a,
        0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
    ],
];

/// Whether y is that of a point of small order (any signature can be made to verify), or at least p, which would
/// be a second name of another key.
fn is_degenerate(key: &[u8; 32]) -> bool {
    let mut y = *key;
    y[31] &= 0x7f;
    let zero_or_one = y[0] <= 1 && y[1..].iter().all(|byte| *byte == 0);
    // p = 2^255 - 19 is ed ff … ff 7f; minus one is of order 2.
    let minus_one_or_beyond = y[0] >= 0xec && y[1..31].iter().all(|byte| *byte == 0xff) && y[31] == 0x7f;
    zero_or_one || minus_one_or_beyond || ORDER_8.contains(&y)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_key_survives_pem_and_signs_the_same() {
        let key = SigningKey::generate().unwrap();
        let again = SigningKey::from_pkcs8_pem(key.to_pkcs8_pem().unwrap().as_bytes()).unwrap();
        assert_eq!(key.verifying_key(), again.verifying_key());
        assert!(key.verifying_key().verifies(b"message", &again.sign(b"message")));
        assert!(!key.verifying_key().verifies(b"another", &again.sign(b"message")));
    }

    #[test]
    fn the_private_half_is_never_printed() {
        let key = SigningKey::generate().unwrap();
        assert_eq!(format!("{key:?}"), format!("SigningKey {{ public: {:?}, .. }}", key.verifying_key()));
    }

    #[test]
    fn pem_that_is_not_a_key_is_refused() {
        let good = SigningKey::generate().unwrap().to_pkcs8_pem().unwrap();
        let long = format!("{}{}", *good, " ".repeat(PEM_LIMIT_BYTES));
        let cut = &good[..good.len() / 2];
        let public = good.replace("PRIVATE", "PUBLIC");
        let empty = format!("{PEM_BEGIN}\n{PEM_END}");
        for bad in ["", cut, &public, &long, &empty, PEM_BEGIN, "\u{0}"] {
            assert_eq!(
                SigningKey::from_pkcs8_pem(bad.as_bytes()).unwrap_err(),
                KeyError::NotPkcs8Pem,
                "{bad}"
            );
        }
        assert!(SigningKey::from_pkcs8_pem(&[0xff; 40]).is_err());
    }

    #[test]
    fn public_keys_convert_and_nothing_else_is_one() {
        let key = *SigningKey::generate().unwrap().verifying_key();
        assert_eq!(VerifyingKey::from_hex(&key.to_hex()), Ok(key));
        assert_eq!(VerifyingKey::from_spki_der(&key.to_spki_der()), Ok(key));
        assert_eq!(VerifyingKey::from_bytes(&[1; 31]), Err(KeyError::NotPublicKey));
        assert_eq!(VerifyingKey::from_spki_der(key.as_bytes()), Err(KeyError::NotPublicKey));
        assert_eq!(VerifyingKey::from_hex("zz"), Err(KeyError::NotPublicKey));
        assert_eq!(key.id().len(), 16);
    }

    #[test]
    fn degenerate_keys_are_refused_with_either_sign() {
        let number = |first: u8, rest: u8, last: u8| {
            let mut y = [rest; 32];
            (y[0], y[31]) = (first, last);
            y
        };
        let minus_one = number(0xec, 0xff, 0x7f);
        let second_names = (0xed..=0xff).map(|first| number(first, 0xff, 0x7f));
        let small = [number(0, 0, 0), number(1, 0, 0), minus_one, ORDER_8[0], ORDER_8[1]];
        for mut y in small.into_iter().chain(second_names) {
            assert_eq!(VerifyingKey::from_bytes(&y), Err(KeyError::Degenerate), "{y:02x?}");
            y[31] |= 0x80;
            assert_eq!(VerifyingKey::from_bytes(&y), Err(KeyError::Degenerate), "{y:02x?}");
        }
        assert!(VerifyingKey::from_bytes(&number(0xeb, 0xff, 0x7f)).is_ok());
    }
}
