//! Signed things: permits, votes, renunciations, receipts, audit checkpoints. Bytes in, proof out.
//!
//! | what | module | standard |
//! |---|---|---|
//! | the manager's single-use permission for one migration | [`permit`] | CWT (RFC 8392) in COSE_Sign1 (RFC 9052), EdDSA |
//! | what daemons and managers state about a hand-over | [`statement`] | COSE_Sign1 over canonical CBOR |
//! | audit checkpoints, journal entries | [`document`] | the same |
//! | the order of an audit log or journal | [`chain`] | BLAKE3 hash chain |
//! | where the audit log stands, and what it holds | [`checkpoint`], [`merkle`] | COSE_Sign1; RFC 9162 |
//! | an enrolment's single-use secret | [`join`] | text, `ojt1.…` |
//!
//! Architecture invariants: no clock (`now` is a parameter), no I/O, no TLS; randomness only where a key or a
//! join secret is made. Every signed thing has exactly one valid encoding: what is decoded is encoded again and
//! must come out byte for byte, so that no bit can be flipped, added or left out. Every kind has its own domain
//! in the signed bytes, so that none can be taken for another.

pub mod chain;
pub mod checkpoint;
pub mod document;
mod domain;
mod envelope;
pub mod join;
pub mod key;
pub mod merkle;
pub mod permit;
pub mod statement;

pub use domain::Domain;
pub use envelope::SignatureError;
pub use join::JoinToken;
pub use key::{KeyError, SigningKey, VerifyingKey};
pub use permit::{DEFAULT_SKEW_S, KeyRing, PermitRefusal, PermitToken, VerifiedPermit, issue, verify};
pub use statement::SignedStatement;
