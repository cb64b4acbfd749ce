//! The manager from outside: its two ports, its state folder, and hosts that speak the protocol (in this process,
//! without hypervisors).
#![allow(clippy::unwrap_used)]

mod admission;
mod attesting;
mod bundling;
mod fake_host;
mod fake_tpm;
mod http;
mod joining;
mod migrating;
mod policies;
#[path = "../../../registry/tests/support/postgres.rs"]
mod postgres;
mod reconciling;
mod restarting;
mod sharing;
#[path = "../../../engine/tests/support/skip.rs"]
mod skip;
mod starting;
mod world;
