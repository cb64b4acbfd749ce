//! Device state against the catalogue of the target's own QEMU: layout, then values.

pub mod rule;
pub mod rules;
