//! Signatures in guest pages in flight: what a VM agent and a scanner say to each other, and when that is a verdict.
//! Optional by policy: pages are copied into batches while they pass, a scanner in a process of its own looks
//! at them, and the last piece of the stream, the device state, waits for its verdict. The rest of the stream
//! waits only where the policy says that every page must be seen.
//!
//! ```text
//! pages ─ Collector ─ batches ─> scanner          Receiving ─finish→ Finishing ─Done→ verdict
//!              Scan <─ hits, scanned, done ─┘          └ lost, late, a hit that refuses ─┘
//! ```
//!
//! | module | job |
//! |---|---|
//! | `collector` | pieces of pages in any order become batches of contiguous runs, in bounded memory |
//! | `scan` | batches out, answers in, budgets, the verdict |
//! | `frame` | the bytes between agent and scanner; bounded, total |
//! | `address` | from an offset in `pc.ram` to the guest-physical address |
//!
//! What is absent from the library: I/O, a clock (time is a parameter), the engine. The engine and its program are
//! behind the feature `yara`. A hit names its rule and its place, never what was found there (I10); a scanner that
//! crashes, hangs or talks nonsense costs its verdict, never the agent (I11).

pub mod address;
pub mod collector;
pub mod frame;
pub mod scan;

pub use frame::{Answer, Request, Response};
pub use scan::{Cause, Hit, Outcome, Policy, Scan, Trouble, Verdict, WhenBehind, WhenLate};
