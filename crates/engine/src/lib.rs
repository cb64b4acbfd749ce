//! Pure deciders: hand-over, admission, inspection.

pub mod admission;
pub mod handover;
pub mod inspect;
