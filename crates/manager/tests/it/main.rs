//! The manager from outside: its two ports, its state folder, and hosts that speak the protocol (in this process,
//! without hypervisors).
#![allow(clippy::unwrap_used)]

mod bundling;
mod fake_host;
mod http;
mod joining;
mod migrating;
#[path = "../../../registry/tests/support/postgres.rs"]
mod postgres;
mod reconciling;
mod restarting;
mod sharing;
#[path = "../../../engine/tests/support/skip.rs"]
mod skip;
mod starting;
mod world;
