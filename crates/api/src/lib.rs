//! The interfaces to the outside: the protocol between hosts and manager, and the HTTP documents.

pub mod http;

/// The host protocol as generated from `proto/outrider.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications, unreachable_pub)]
pub mod fleet {
    tonic::include_proto!("outrider.v1");
}
