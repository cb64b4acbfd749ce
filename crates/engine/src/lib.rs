//! Pure deciders: hand-over, admission, inspection.

pub mod handover;
pub mod inspect;
