//! Device state against the catalogue of the target's own QEMU: layout, then values.
//!
//! ```text
//! dry run + dump of descriptions –compile→ Catalogue        (trusted side, at enrolment)
//! held state + Catalogue         –judge→   Judged | Violation
//! ```
//!
//! A section's length comes from the catalogue alone, read as the destination reads it; then its footer must be
//! there, and the stream's own description must agree. Where the catalogue can't tell a length, the policy says
//! whether one possible end is enough. Everything here is pure and total: no I/O, no panic on any bytes.

mod align;
mod build;
mod codecs;
mod compile;
mod describe;
mod judge;
mod known;
mod parse;
pub mod rule;
pub mod rules;
mod values;

pub use compile::{CompileError, compile};
pub use judge::{Judged, JudgedSection, Unvouched, Vouched, judge};
