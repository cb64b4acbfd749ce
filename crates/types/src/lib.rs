//! The shared nouns of Outrider: ids, records, stages, messages and public error codes.
//!
//! Architecture invariant: no I/O, no clock, no randomness and no cryptography here; every type can be
//! built, compared and serialised by every room, the pure ones included.

pub mod agent;
pub mod error;
pub mod handover;
pub mod host;
pub mod hypervisor;
pub mod id;
pub mod inventory;
pub mod layout;
pub mod migration;
pub mod permit;
pub mod profile;
pub mod vm;

pub use error::{ErrorCode, Problem};
pub use handover::{Digest, Epoch, HandoverKey, Side};
pub use id::{HostName, MigrationId, Name, Nonce, VmId};
pub use profile::InspectionProfile;
