//! The manager from outside: its two ports, its state folder, and hosts that speak the protocol (in this process,
//! without hypervisors).
#![allow(clippy::unwrap_used)]

mod fake_host;
mod http;
mod joining;
mod migrating;
mod restarting;
mod starting;
mod world;
