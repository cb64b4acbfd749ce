//! The only room that names rustls: identities, mutual TLS, permit-bound channels.
//!
//! Two halves that share nothing but the cryptographic provider:
//!
//! - [`channel`] (always there, no async runtime, no certificate parser): the data plane between two VM
//!   agents. TLS 1.3 with single-use raw public keys that the permit names, and an ALPN value that binds
//!   the connection to that permit and channel number.
//! - `ca`, `identity`, `control`, `peer` (feature `control`, for the daemons and the command line): the embedded CA,
//!   SPIFFE identities in short-lived certificates, and the mutual-TLS listeners and connectors on which
//!   gRPC and HTTP sit.
//!
//! Absent on purpose, everywhere: TLS below 1.3, session resumption, tickets, 0-RTT, key logging, and
//! any path that continues after a failed verification.

pub mod channel;
mod provider;
pub mod spki;

#[cfg(feature = "control")]
pub mod ca;
#[cfg(feature = "control")]
pub mod control;
#[cfg(feature = "control")]
pub mod identity;
#[cfg(feature = "control")]
pub mod peer;
#[cfg(feature = "control")]
mod verify;
