//! Bounded, total codecs: QEMU's migration stream, the frames between two VM agents, QMP, agent control packets.
//!
//! Every decoder here is incremental (any split of the input gives the same result), bounded (it keeps at most a
//! stated number of bytes, whatever the peer sends) and total (every input gives a value or a typed error).
//!
//! Architecture invariant: no sockets, no files, no clock, no randomness. Bytes in, values out.

pub mod frame;
pub mod packet;
pub mod qemu;
pub mod qmp;
