//! The one envelope of everything signed: tagged COSE_Sign1, EdDSA, with key id and domain in the protected
//! header, nothing unprotected, and exactly one valid encoding.

use coset::iana::Algorithm;
use coset::{
    ContentType, CoseSign1, CoseSign1Builder, HeaderBuilder, RegisteredLabelWithPrivate,
    TaggedCborSerializable,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::domain::Domain;
use crate::key::{SigningKey, VerifyingKey};

/// Key ids are names of keys, not prose.
pub(crate) const KEY_ID_LIMIT_BYTES: usize = 64;

/// Why signed bytes are not what they are taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Longer than its kind can be.
    #[error("{actual_bytes} bytes are more than the {limit_bytes} of a {domain:?}")]
    TooLarge {
        /// What it was to be.
        domain: Domain,
        /// Its length.
        actual_bytes: usize,
        /// The bound.
        limit_bytes: usize,
    },
    /// Not the one valid encoding of anything.
    #[error("malformed: {rule}")]
    Malformed {
        /// What was not met.
        rule: &'static str,
    },
    /// Signed for another purpose.
    #[error("signed for another purpose: {found}")]
    WrongDomain {
        /// Its content type, cut to 80 characters.
        found: String,
    },
    /// Signed with a key that is not the one asked for.
    #[error("key id {key_id} is not known here")]
    UnknownKeyId {
        /// The id, cut to 80 characters.
        key_id: String,
    },
    /// The signature does not verify under the key.
    #[error("the signature does not verify")]
    BadSignature,
}

impl SignatureError {
    /// Stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too-large",
            Self::Malformed { .. } => "malformed",
            Self::WrongDomain { .. } => "wrong-domain",
            Self::UnknownKeyId { .. } => "unknown-key-id",
            Self::BadSignature => "bad-signature",
        }
    }
}

pub(crate) const fn malformed(rule: &'static str) -> SignatureError {
    SignatureError::Malformed { rule }
}

/// What an envelope held, after its signature was verified.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) domain: Domain,
    pub(crate) key_id: String,
    pub(crate) payload: Vec<u8>,
}

/// Signs `payload`.
pub(crate) fn seal(
    key: &SigningKey,
    key_id: &str,
    domain: Domain,
    payload: Vec<u8>,
    limit_bytes: usize,
) -> Result<Vec<u8>, SignatureError> {
    if key_id.is_empty() || key_id.len() > KEY_ID_LIMIT_BYTES {
        return Err(malformed("a key id has 1 to 64 bytes"));
    }
    let envelope = unsigned(key_id, domain, payload)
        .create_signature(domain.as_str().as_bytes(), |message| key.sign(message))
        .build();
    let bytes = encode(envelope)?;
    check_size(domain, &bytes, limit_bytes)?;
    Ok(bytes)
}

/// Verifies the envelope of one of `domains` under the key that `find_key` knows by its id.
pub(crate) fn open(
    bytes: &[u8],
    domains: &[Domain],
    limit_bytes: usize,
    find_key: impl FnOnce(&str) -> Option<VerifyingKey>,
) -> Result<Opened, SignatureError> {
    let first = domains.first().copied().unwrap_or(Domain::Permit);
    check_size(first, bytes, limit_bytes)?;
    let envelope = CoseSign1::from_tagged_slice(bytes).map_err(|_| malformed("a tagged COSE_Sign1"))?;
    let domain = domain_of(&envelope, domains)?;
    let key_id = String::from_utf8(envelope.protected.header.key_id.clone())
        .map_err(|_| malformed("the key id is text"))?;
    let payload = envelope.payload.clone().ok_or(malformed("the payload is attached"))?;
    // One valid encoding: whatever else the bytes held (other headers, other lengths) is not in this one.
    let canonical = unsigned(&key_id, domain, payload.clone()).signature(envelope.signature.clone()).build();
    if encode(canonical)? != bytes {
        return Err(malformed("the canonical encoding"));
    }
    let key = find_key(&key_id).ok_or_else(|| SignatureError::UnknownKeyId { key_id: cut(&key_id) })?;
    let verify = |signature: &[u8], message: &[u8]| {
        key.verifies(message, signature).then_some(()).ok_or(SignatureError::BadSignature)
    };
    envelope.verify_signature(domain.as_str().as_bytes(), verify)?;
    Ok(Opened { domain, key_id, payload })
}

/// Encodes a value; the same value always gives the same bytes.
pub(crate) fn to_cbor<T: Serialize>(value: &T) -> Result<Vec<u8>, SignatureError> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).map_err(|_| malformed("a value that CBOR can hold"))?;
    Ok(bytes)
}

/// Decodes a value from its one valid encoding: unknown fields, trailing bytes and other spellings are refused.
pub(crate) fn from_cbor<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<T, SignatureError> {
    let value: T =
        ciborium::from_reader(bytes).map_err(|_| malformed("a payload with exactly the known fields"))?;
    if to_cbor(&value)? != bytes {
        return Err(malformed("the canonical encoding of the payload"));
    }
    Ok(value)
}

fn unsigned(key_id: &str, domain: Domain, payload: Vec<u8>) -> CoseSign1Builder {
    let protected = HeaderBuilder::new()
        .algorithm(Algorithm::EdDSA)
        .content_type(domain.content_type())
        .key_id(key_id.as_bytes().to_vec())
        .build();
    CoseSign1Builder::new().protected(protected).payload(payload)
}

fn domain_of(envelope: &CoseSign1, allowed: &[Domain]) -> Result<Domain, SignatureError> {
    let header = &envelope.protected.header;
    if header.alg != Some(RegisteredLabelWithPrivate::Assigned(Algorithm::EdDSA)) {
        return Err(malformed("the algorithm is EdDSA"));
    }
    let Some(ContentType::Text(found)) = &header.content_type else {
        return Err(malformed("the content type is text"));
    };
    allowed
        .iter()
        .copied()
        .find(|domain| domain.content_type() == *found)
        .ok_or_else(|| SignatureError::WrongDomain { found: cut(found) })
}

fn encode(envelope: CoseSign1) -> Result<Vec<u8>, SignatureError> {
    envelope.to_tagged_vec().map_err(|_| malformed("an envelope that CBOR can hold"))
}

fn check_size(domain: Domain, bytes: &[u8], limit_bytes: usize) -> Result<(), SignatureError> {
    if bytes.len() > limit_bytes {
        return Err(SignatureError::TooLarge { domain, actual_bytes: bytes.len(), limit_bytes });
    }
    Ok(())
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}
