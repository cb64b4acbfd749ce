//! Migrations, from the request to the report.
//!
//! | file | job |
//! |---|---|
//! | `request` | the operator's request: gates that need no host, the row, the audit entry |
//! | `gates` | the signed request of the source, and every gate behind it, up to the durable grant |
//! | `probe` | has the target prove that it can do a moment's work |
//! | `convergence` | what is looked at once more before the stream converges |
//! | `reconcile` | one task per open migration: from the row, the next act; wake-ups carry no data |
//! | `handover` | statements and wishes through `engine::handover::decider`, each in one transaction |
//! | `events` | what hosts tell of a migration: facts, metrics, the watch |
//! | `explain` | every gate asked, nothing moved |
//! | `compatibility` | the gate that compares what both hosts' QEMUs can run |
//! | `control` | suspend, resume, terminate |
//! | `view` | the row as people see it |

mod compatibility;
pub(crate) mod control;
pub(crate) mod convergence;
pub(crate) mod events;
pub(crate) mod explain;
mod facts;
pub(crate) mod gates;
pub(crate) mod handover;
pub(crate) mod permit;
pub(crate) mod probe;
pub(crate) mod reconcile;
pub(crate) mod request;
pub(crate) mod view;

pub(crate) use facts::Facts;
