//! What daemons state about a hand-over, signed: requests, votes, renunciations, receipts.
//!
//! Threat CP-24 (forged, old or duplicated decisions): every statement has a domain of its own and names the whole
//! attempt; whether it is the attempt at hand is compared exactly by the reader.

use types::handover::Statement;

use crate::domain::Domain;
use crate::envelope::{self, SignatureError, malformed};
use crate::key::{SigningKey, VerifyingKey};

/// No signed statement is longer.
pub const STATEMENT_LIMIT_BYTES: usize = 4096;

const DOMAINS: [Domain; 9] = [
    Domain::Request,
    Domain::Frozen,
    Domain::NoVote,
    Domain::Prepared,
    Domain::Running,
    Domain::Renounced,
    Domain::AskRenounce,
    Domain::Released,
    Domain::Thawed,
];

/// A statement with its signature, as bytes. Says nothing until [`verify`] has read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedStatement(Vec<u8>);

impl SignedStatement {
    /// Takes bytes from a peer or a file for a signed statement.
    ///
    /// # Errors
    /// [`SignatureError::TooLarge`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, SignatureError> {
        if bytes.len() > STATEMENT_LIMIT_BYTES {
            let (actual_bytes, limit_bytes) = (bytes.len(), STATEMENT_LIMIT_BYTES);
            return Err(SignatureError::TooLarge { domain: Domain::Request, actual_bytes, limit_bytes });
        }
        Ok(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, as hexadecimal text.
    pub fn to_hex(&self) -> String {
        hex::encode(&self.0)
    }

    /// From hexadecimal text.
    ///
    /// # Errors
    /// [`SignatureError::Malformed`] or [`SignatureError::TooLarge`].
    pub fn from_hex(text: &str) -> Result<Self, SignatureError> {
        Self::from_bytes(hex::decode(text).map_err(|_| malformed("hexadecimal text"))?)
    }
}

/// Signs a statement. The same statement and key always give the same bytes.
///
/// # Errors
/// The statement is too long to be one.
pub fn sign(key: &SigningKey, statement: &Statement) -> Result<SignedStatement, SignatureError> {
    let payload = envelope::to_cbor(statement)?;
    let domain = Domain::of(statement);
    envelope::seal(key, &key.verifying_key().id(), domain, payload, STATEMENT_LIMIT_BYTES)
        .map(SignedStatement)
}

/// Reads a statement that `key` signed. Whether it fits the migration at hand is the reader's to check: every
/// statement of a hand-over names its whole key.
///
/// # Errors
/// It is not one, or another key signed it.
pub fn verify(signed: &SignedStatement, key: &VerifyingKey) -> Result<Statement, SignatureError> {
    let opened =
        envelope::open(&signed.0, &DOMAINS, STATEMENT_LIMIT_BYTES, |id| (id == key.id()).then_some(*key))?;
    let statement: Statement = envelope::from_cbor(&opened.payload)?;
    if Domain::of(&statement) != opened.domain {
        return Err(malformed("the statement is of the kind that was signed"));
    }
    Ok(statement)
}

#[cfg(test)]
mod tests;
