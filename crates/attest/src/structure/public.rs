//! `TPMT_PUBLIC` (Part 2, 12.2.4): public areas of keys, their names, and which of them may attest or
//! endorse.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{PUBLIC_LIMIT_BYTES, algorithm};
use crate::codec::{Malformed, Reader, within};

/// `TPMA_OBJECT` (Part 2, 8.3), the bits that occur here.
pub(crate) mod attribute {
    pub(crate) const FIXED_TPM: u32 = 1 << 1;
    pub(crate) const FIXED_PARENT: u32 = 1 << 4;
    pub(crate) const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    pub(crate) const RESTRICTED: u32 = 1 << 16;
    pub(crate) const DECRYPT: u32 = 1 << 17;
    pub(crate) const SIGN: u32 = 1 << 18;
}

/// What holds a key to its TPM: made there, and never to leave it.
const BOUND_TO_TPM: [(u32, &str); 3] = [
    (attribute::FIXED_TPM, "fixedTPM"),
    (attribute::FIXED_PARENT, "fixedParent"),
    (attribute::SENSITIVE_DATA_ORIGIN, "sensitiveDataOrigin"),
];

/// `TPM_ECC_NIST_P256` (Part 2, 6.4).
pub(crate) const NIST_P256: u16 = 0x0003;
const POLICY_LIMIT_BYTES: usize = 64;
const RSA_LIMIT_BYTES: usize = 512;
const COORDINATE_BYTES: usize = 32;
/// A modulus outside this range is refused, bits: too weak, or a way to make the manager compute for long.
const RSA_BITS: std::ops::RangeInclusive<u16> = 2048..=4096;
/// What an exponent of 0 means (Part 2, 12.2.3.5).
const DEFAULT_EXPONENT: u32 = 65537;

/// The name of an object: its hash algorithm and the hash of its public area (Part 1, "Names"), as
/// hexadecimal text that begins with `000b`. What `tpm2_readpublic` prints as "name".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TpmName([u8; 34]);

impl TpmName {
    /// The name of a public area.
    #[must_use]
    pub fn of(public: &Public) -> Self {
        Self::hashed(&[public.as_bytes()])
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The qualified name of this object below a parent's (Part 1, "Qualified Name"): the hash of both.
    pub(crate) fn qualified(&self, parent: &[u8]) -> Self {
        Self::hashed(&[parent, &self.0])
    }

    fn hashed(parts: &[&[u8]]) -> Self {
        let mut name = [0; 34];
        let (algorithm, hash) = name.split_at_mut(2);
        algorithm.copy_from_slice(&algorithm::SHA256.to_be_bytes());
        hash.copy_from_slice(digest(&SHA256, &parts.concat()).as_ref());
        Self(name)
    }
}

impl fmt::Display for TpmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for TpmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<TpmName> for String {
    fn from(name: TpmName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for TpmName {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        const RULE: &str = "a TPM name is 000b and the 64 hexadecimal digits of a SHA-256 digest";
        let mut bytes = [0; 34];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| RULE)?;
        if bytes.starts_with(&algorithm::SHA256.to_be_bytes()) { Ok(Self(bytes)) } else { Err(RULE) }
    }
}

/// How a key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// It says so at each use.
    Null,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    RsaSsa,
    /// RSASSA-PSS with SHA-256.
    RsaPss,
    /// ECDSA with SHA-256.
    Ecdsa,
}

/// The public key itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// RSA.
    Rsa {
        /// Its modulus, big-endian; of as many bits as the public area says.
        modulus: Vec<u8>,
        /// Its exponent.
        exponent: u32,
    },
    /// A point on P-256.
    P256 {
        /// Its abscissa.
        x: [u8; 32],
        /// Its ordinate.
        y: [u8; 32],
    },
}

/// Why a key may not do what it is offered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyFault {
    /// An attribute is missing.
    #[error("its attribute {0} is not set")]
    Lacks(&'static str),
    /// An attribute is set that must not be.
    #[error("its attribute {0} is set")]
    Has(&'static str),
    /// It signs in a way that is not accepted.
    #[error("its scheme is not ECDSA, RSASSA or RSAPSS with SHA-256 to match its kind")]
    Scheme,
    /// It does not encrypt its children as every endorsement key does.
    #[error("its symmetric algorithm is not {0}")]
    Symmetric(&'static str),
}

/// A public area: RSA or P-256, named by SHA-256. Nothing else is read.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Public {
    bytes: Vec<u8>,
    attributes: u32,
    policy: Vec<u8>,
    aes_128_cfb: bool,
    scheme: Scheme,
    key: Key,
}

impl Public {
    /// Reads a public area.
    ///
    /// # Errors
    /// [`Malformed`], also for kinds of keys that are not accepted.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        within(bytes.len(), PUBLIC_LIMIT_BYTES, "the public area")?;
        let mut from = Reader::new(bytes);
        let kind = from.u16("type")?;
        let hash = from.u16("nameAlg")?;
        if hash != algorithm::SHA256 {
            return Err(Malformed::Unaccepted { what: "nameAlg", found: hash.into() });
        }
        let attributes = from.u32("objectAttributes")?;
        let policy = from.sized(POLICY_LIMIT_BYTES, "authPolicy")?.to_vec();
        let aes_128_cfb = read_symmetric(&mut from)?;
        let scheme = read_scheme(&mut from)?;
        let key = match kind {
            algorithm::RSA => read_rsa(&mut from)?,
            algorithm::ECC => read_p256(&mut from)?,
            other => return Err(Malformed::Unaccepted { what: "type", found: other.into() }),
        };
        from.finish("the public area")?;
        Ok(Self { bytes: bytes.to_vec(), attributes, policy, aes_128_cfb, scheme, key })
    }

    /// The public area as the TPM writes it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The public key.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// How it signs.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> TpmName {
        TpmName::of(self)
    }

    /// The digest that a policy session must reach before the key is used; empty if none can.
    #[cfg(feature = "tpm")]
    pub(crate) fn policy(&self) -> &[u8] {
        &self.policy
    }

    /// Whether the key may attest: made in this TPM, never to leave it, and **restricted** to sign only what
    /// the TPM itself made, so that it can never be talked into signing a quote that somebody composed
    /// outside.
    ///
    /// # Errors
    /// What it lacks.
    pub fn may_attest(&self) -> Result<(), KeyFault> {
        let must = [(attribute::RESTRICTED, "restricted"), (attribute::SIGN, "sign")];
        self.expect(&must, &[(attribute::DECRYPT, "decrypt")])?;
        let fits = match self.key {
            Key::Rsa { .. } => matches!(self.scheme, Scheme::RsaSsa | Scheme::RsaPss),
            Key::P256 { .. } => self.scheme == Scheme::Ecdsa,
        };
        match (fits, self.aes_128_cfb) {
            (false, _) => Err(KeyFault::Scheme),
            (true, true) => Err(KeyFault::Symmetric("null")),
            (true, false) => Ok(()),
        }
    }

    /// Whether the key may endorse: made in this TPM, never to leave it, and **restricted** to decrypt only
    /// what is meant for the TPM itself, so that activating a credential proves what it says.
    ///
    /// # Errors
    /// What it lacks.
    pub fn may_endorse(&self) -> Result<(), KeyFault> {
        let must = [(attribute::RESTRICTED, "restricted"), (attribute::DECRYPT, "decrypt")];
        self.expect(&must, &[(attribute::SIGN, "sign")])?;
        if self.aes_128_cfb { Ok(()) } else { Err(KeyFault::Symmetric("AES-128 in CFB mode")) }
    }

    fn expect(&self, must: &[(u32, &'static str)], must_not: &[(u32, &'static str)]) -> Result<(), KeyFault> {
        let missing = BOUND_TO_TPM.iter().chain(must).find(|(bit, _)| self.attributes & bit == 0);
        if let Some((_, name)) = missing {
            return Err(KeyFault::Lacks(name));
        }
        match must_not.iter().find(|(bit, _)| self.attributes & bit != 0) {
            Some((_, name)) => Err(KeyFault::Has(name)),
            None => Ok(()),
        }
    }
}

/// `TPMT_SYM_DEF_OBJECT` (Part 2, 11.1.7): whether it is AES-128 in CFB mode. Null is the only other.
fn read_symmetric(from: &mut Reader<'_>) -> Result<bool, Malformed> {
    let unaccepted =
        |found: u16| Malformed::Unaccepted { what: "the symmetric algorithm", found: found.into() };
    match from.u16("symmetric")? {
        algorithm::NULL => Ok(false),
        algorithm::AES => match (from.u16("keyBits")?, from.u16("mode")?) {
            (128, algorithm::CFB) => Ok(true),
            (128, mode) => Err(unaccepted(mode)),
            (bits, _) => Err(unaccepted(bits)),
        },
        other => Err(unaccepted(other)),
    }
}

/// `TPMT_ASYM_SCHEME` (Part 2, 11.2.3.4).
fn read_scheme(from: &mut Reader<'_>) -> Result<Scheme, Malformed> {
    let scheme = match from.u16("scheme")? {
        algorithm::NULL => return Ok(Scheme::Null),
        algorithm::RSASSA => Scheme::RsaSsa,
        algorithm::RSAPSS => Scheme::RsaPss,
        algorithm::ECDSA => Scheme::Ecdsa,
        other => return Err(Malformed::Unaccepted { what: "scheme", found: other.into() }),
    };
    match from.u16("the scheme's hash")? {
        algorithm::SHA256 => Ok(scheme),
        other => Err(Malformed::Unaccepted { what: "the scheme's hash", found: other.into() }),
    }
}

/// `TPMS_RSA_PARMS` after its scheme (Part 2, 12.2.3.5), and the modulus.
fn read_rsa(from: &mut Reader<'_>) -> Result<Key, Malformed> {
    let bits = from.u16("keyBits")?;
    let exponent = match from.u32("exponent")? {
        0 | DEFAULT_EXPONENT => DEFAULT_EXPONENT,
        other => return Err(Malformed::Unaccepted { what: "exponent", found: other.into() }),
    };
    let modulus = from.sized(RSA_LIMIT_BYTES, "modulus")?.to_vec();
    // As long as it says, and full: so one key has one modulus, and the cost of a verification is known.
    let full = modulus.first().is_some_and(|first| *first >= 0x80);
    if !RSA_BITS.contains(&bits) || !full || modulus.len() * 8 != usize::from(bits) {
        return Err(Malformed::Unaccepted { what: "the RSA key's size", found: bits.into() });
    }
    Ok(Key::Rsa { modulus, exponent })
}

/// `TPMS_ECC_PARMS` after its scheme (Part 2, 12.2.3.6), and the point.
fn read_p256(from: &mut Reader<'_>) -> Result<Key, Malformed> {
    let curve = from.u16("curveID")?;
    if curve != NIST_P256 {
        return Err(Malformed::Unaccepted { what: "curveID", found: curve.into() });
    }
    let kdf = from.u16("kdf")?;
    if kdf != algorithm::NULL {
        return Err(Malformed::Unaccepted { what: "kdf", found: kdf.into() });
    }
    Ok(Key::P256 { x: read_coordinate(from, "x")?, y: read_coordinate(from, "y")? })
}

fn read_coordinate(from: &mut Reader<'_>, what: &'static str) -> Result<[u8; 32], Malformed> {
    let found = from.sized(COORDINATE_BYTES, what)?;
    let mut coordinate = [0; COORDINATE_BYTES];
    if let Some(end) = coordinate.get_mut(COORDINATE_BYTES.saturating_sub(found.len())..) {
        end.copy_from_slice(found);
    }
    Ok(coordinate)
}

impl fmt::Debug for Public {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Public({})", self.name())
    }
}

impl From<Public> for String {
    fn from(public: Public) -> Self {
        hex::encode(public.bytes)
    }
}

/// Why text is not a public area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublicTextFault {
    /// Not hexadecimal, or far too long.
    #[error("a public area is at most {PUBLIC_LIMIT_BYTES} bytes in hexadecimal digits")]
    NotHex,
    /// Not a public area that is accepted.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl TryFrom<String> for Public {
    type Error = PublicTextFault;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.len() > 2 * PUBLIC_LIMIT_BYTES {
            return Err(PublicTextFault::NotHex);
        }
        let bytes = hex::decode(text).map_err(|_| PublicTextFault::NotHex)?;
        Ok(Self::parse(&bytes)?)
    }
}
