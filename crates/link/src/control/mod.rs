//! The control plane's connections: hosts to the manager (gRPC), operators to the manager (HTTPS).
//!
//! | who listens | who dials | authentication | ALPN |
//! |---|---|---|---|
//! | manager, [`HostListener`] | host, [`connect_manager`] | both by certificates of our CA | `h2` |
//! | manager, [`HostListener`] | joining host, [`connect_pinned`] | the manager by its CA's fingerprint; the host by its join token, later | `h2` |
//! | manager, [`OperatorListener`] | CLI, [`connect_operator`]; browsers | the manager; the operator by token, later | `http/1.1` |
//! | host, [`crate::peer`] | host | both by certificates, both by name | `outrider-handover/1` |
//!
//! Every stream is a [`TlsConn`], on which tonic, hyper and axum can sit.

mod client;
mod config;
mod error;
mod server;
mod stream;

pub use client::{connect_manager, connect_operator, connect_pinned};
pub use error::LinkError;
pub use server::{
    HALF_OPEN_LIMIT, HALF_OPEN_PER_ADDRESS_LIMIT, HANDSHAKE_TIMEOUT, HostListener, OperatorListener, Refusal,
};
pub use stream::TlsConn;

pub(crate) use client::dial;
pub(crate) use config::{client_config, server_config};
pub(crate) use server::{Listening, listener};

#[cfg(test)]
mod tests;
