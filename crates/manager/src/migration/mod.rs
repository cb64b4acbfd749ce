//! Migrations, from the request to the report.
//!
//! | file | job |
//! |---|---|
//! | `request` | the operator's request: gates that need no host, the row, the audit entry |
//! | `gates` | the signed request of the source, and every gate behind it, up to the durable grant |
//! | `reconcile` | one task per open migration: from the row, the next act; wake-ups carry no data |
//! | `handover` | statements and wishes through `engine::handover::decider`, each in one transaction |
//! | `events` | what hosts tell of a migration: facts, metrics, the watch |
//! | `explain` | every gate asked, nothing moved |
//! | `control` | suspend, resume, terminate |
//! | `view` | the row as people see it |

pub(crate) mod control;
pub(crate) mod events;
pub(crate) mod explain;
mod facts;
pub(crate) mod gates;
pub(crate) mod handover;
pub(crate) mod permit;
pub(crate) mod reconcile;
pub(crate) mod request;
pub(crate) mod view;

pub(crate) use facts::Facts;
