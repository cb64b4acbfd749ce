//! Pure deciders: hand-over, admission, inspection.

pub mod admission;
pub mod compatibility;
pub mod handover;
pub mod inspect;
