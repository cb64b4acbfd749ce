//! TPM 2.0 attestation of host platforms: is this the machine, in the state, that its record says, now?
//!
//! | half | module | sees |
//! |---|---|---|
//! | the manager appraises evidence | [`verify`] | bytes, and the time as a parameter |
//! | the manager enrols a platform | [`enrol`] | the same; draws random numbers for a credential |
//! | the host asks its TPM | `tpm`, behind the feature of that name | a device file or a socket |
//!
//! One appraisal: the manager draws a nonce and makes a [`Binding`]; the host quotes its registers over
//! [`Binding::qualifying_data`] with its attestation key and sends [`Evidence`]; [`verify::appraise`] gives
//! an [`Appraised`], which is the proof that a permit demands, or a [`Refusal`] with every reason found.
//!
//! Architecture invariants: outside `tpm` and `testkit` no I/O, no clock, no async; no byte of a peer causes
//! a panic, an unbounded allocation or a pass by default. Everything that stands between a quote and an
//! [`Appraised`] is a condition that must hold, never one that is logged and passed over (CVE-2023-3674 at
//! another's).

mod codec;
pub mod enrol;
pub mod event_log;
mod pcr;
pub mod structure;
#[cfg(feature = "testkit")]
pub mod testkit;
#[cfg(feature = "tpm")]
pub mod tpm;
pub mod verify;

pub use codec::{Bounded, Malformed};
pub use enrol::Enrolled;
pub use pcr::{Bank, PcrDigest, PcrIndex, PcrSelection, PcrValues};
pub use structure::{ClockInfo, Public, TpmName};
pub use verify::{
    Appraisal, Appraised, Binding, Evidence, HostId, Purpose, Reason, ReasonCode, ReferenceValues, Refusal,
};
