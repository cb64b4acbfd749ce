//! The VM agent: one sandboxed process per side per migration. It touches every byte of the stream and holds no
//! privilege: descriptors that the daemon opened, no file system, no new sockets.
//!
//! ```text
//!  daemon ──socketpair── agent                       agent ──socketpair── daemon
//!  QEMU  ──unix──> digest, end of stream ══ TLS ══> digest, inspector ──unix──> QEMU
//!        <─unix──  PONG only <════════════════════  SHUT is swallowed <─unix──
//! ```
//!
//! | module | job |
//! |---|---|
//! | `arm` | the permit: is it for this agent, this side, this migration, now? |
//! | `source`, `target` | what to do with bytes, frames, commands and time; no I/O |
//! | `session` | the poll loop that joins them to their sockets |
//! | `lane` | one QEMU connection and the channel that carries it: the main one, and one for each multifd channel |
//! | `control`, `peer`, `queue` | the daemon's socket, the other agent's end of a lane, bounded output |
//! | `signatures` | guest pages to a scanner, and its verdict |
//! | `probe` | another life of this program: the micro-probe of a target |
//! | `sandbox` | what the process gives up before the first byte |
//!
//! Invariants met here: nothing is read from QEMU to be sent before the peer proved the permit's key on every lane
//! (I3); nothing reaches the target's QEMU that the inspector has not accepted (I5); the agent ends when its daemon
//! does (I9); no guest memory, key or stream byte is ever logged (I10); every buffer, wait and count is bounded, and
//! the process stays below 64 MiB resident (I11, `tests/memory.rs`).

pub mod arm;
pub mod control;
pub mod effect;
pub(crate) mod lane;
pub mod log;
pub mod peer;
pub mod probe;
pub mod queue;
pub mod sandbox;
pub mod session;
pub mod signatures;
pub mod source;
pub mod target;
