//! Pure deciders: hand-over, admission, inspection.

pub mod inspect;
