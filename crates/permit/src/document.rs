//! Other signed things whose content belongs to other rooms: audit checkpoints, journal entries.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::domain::Domain;
use crate::envelope::{self, SignatureError};
use crate::key::{SigningKey, VerifyingKey};

/// No signed document is longer: a journal entry may hold a signed statement or a permit.
pub const DOCUMENT_LIMIT_BYTES: usize = 16 * 1024;

/// What a document is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentKind {
    /// A signed head of the audit log.
    AuditCheckpoint,
    /// An entry of a daemon's journal.
    JournalEntry,
    /// A plan of maintenance.
    MaintenancePlan,
}

impl DocumentKind {
    fn domain(self) -> Domain {
        match self {
            Self::AuditCheckpoint => Domain::AuditCheckpoint,
            Self::JournalEntry => Domain::JournalEntry,
            Self::MaintenancePlan => Domain::MaintenancePlan,
        }
    }
}

/// Signs `value`, which must always serialise to the same bytes (no hash maps, no floats computed anew).
///
/// # Errors
/// It is too long.
pub fn sign<T: Serialize>(
    key: &SigningKey,
    kind: DocumentKind,
    value: &T,
) -> Result<Vec<u8>, SignatureError> {
    let payload = envelope::to_cbor(value)?;
    envelope::seal(key, &key.verifying_key().id(), kind.domain(), payload, DOCUMENT_LIMIT_BYTES)
}

/// Reads a document of this kind that `key` signed.
///
/// # Errors
/// It is not one, or another key signed it.
pub fn verify<T: Serialize + DeserializeOwned>(
    bytes: &[u8],
    kind: DocumentKind,
    key: &VerifyingKey,
) -> Result<T, SignatureError> {
    let find = |id: &str| (id == key.id()).then_some(*key);
    let opened = envelope::open(bytes, &[kind.domain()], DOCUMENT_LIMIT_BYTES, find)?;
    envelope::from_cbor(&opened.payload)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_document_is_read_back_only_as_what_it_was_signed_for() {
        let key = SigningKey::generate().unwrap();
        let head = ("audit".to_owned(), 7u64, vec![1u8, 2, 3]);
        let signed = sign(&key, DocumentKind::AuditCheckpoint, &head).unwrap();
        let read = verify(&signed, DocumentKind::AuditCheckpoint, key.verifying_key());
        assert_eq!(read, Ok(head.clone()));
        let other =
            verify::<(String, u64, Vec<u8>)>(&signed, DocumentKind::JournalEntry, key.verifying_key());
        assert_eq!(other.unwrap_err().code(), "wrong-domain");
        let stranger = SigningKey::generate().unwrap();
        let read = verify::<(String, u64, Vec<u8>)>(
            &signed,
            DocumentKind::AuditCheckpoint,
            stranger.verifying_key(),
        );
        assert_eq!(read.unwrap_err().code(), "unknown-key-id");
        let huge = vec![0u8; DOCUMENT_LIMIT_BYTES];
        assert_eq!(sign(&key, DocumentKind::JournalEntry, &huge).unwrap_err().code(), "too-large");
    }
}
