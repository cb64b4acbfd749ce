//! One lane: a QEMU connection, the channel that carries it, and what waits between them. Lane 0 is the main one.

use crate::peer::Peer;
use crate::queue::OutQueue;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::OwnedFd;

/// What poll says of a connection that has ended.
pub(crate) const CLOSED: PollFlags =
    PollFlags::HUP.union(PollFlags::ERR).union(PollFlags::RDHUP).union(PollFlags::NVAL);

/// Most that one lane's queue holds before its other end is not read.
const MAX_HIGH_WATER_BYTES: usize = 1 << 20;
/// What all lanes' queues hold together: an agent stays below 64 MiB, whatever is sent.
const ALL_HIGH_WATER_BYTES: usize = 4 << 20;
/// One read of the network with several lanes: what waits for the other lanes to catch up is this much each.
const READ_BYTES: usize = 128 * 1024;
/// A suspended target takes in what was on its way, so that what comes behind it is still heard: TCP's buffers hold
/// less.
const SUSPENDED_HIGH_WATER_BYTES: usize = 16 << 20;
/// The same where pages have lanes of their own, on which nothing but pages comes: they are not read then.
const SUSPENDED_MAIN_BYTES: usize = 4 << 20;
/// QEMU looks at these before it does anything else.
const FIRST_BYTES: u64 = 4;

/// What each of so many lanes may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Above this a queue's other end is not read.
    pub(crate) high_water_bytes: usize,
    /// The same for a suspended target's main lane.
    pub(crate) suspended_bytes: usize,
    /// One read of the network.
    pub(crate) read_bytes: usize,
}

impl Bounds {
    pub(crate) fn of(lanes: usize) -> Self {
        let share = ALL_HIGH_WATER_BYTES / lanes.max(1);
        Self {
            high_water_bytes: share.min(MAX_HIGH_WATER_BYTES),
            suspended_bytes: if lanes > 1 { SUSPENDED_MAIN_BYTES } else { SUSPENDED_HIGH_WATER_BYTES },
            read_bytes: if lanes > 1 { READ_BYTES } else { usize::MAX },
        }
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Lane {
    /// An accepted connection whose handshake waits for the other side's first bytes.
    pub(crate) pending: Option<OwnedFd>,
    pub(crate) peer: Option<Peer>,
    pub(crate) peer_attached: bool,
    pub(crate) hypervisor: Option<OwnedFd>,
    pub(crate) hypervisor_attached: bool,
    /// The daemon was asked for QEMU's connection.
    pub(crate) hypervisor_wanted: bool,
    pub(crate) to_hypervisor: OutQueue,
}

impl Lane {
    /// Bytes that wait for the network.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.peer.as_ref().map_or(0, Peer::waiting_bytes)
    }

    /// Whether bytes wait inside the channel that no poll would tell.
    pub(crate) fn has_unopened(&self) -> bool {
        self.peer.as_ref().is_some_and(Peer::has_unopened)
    }

    /// Whether QEMU has what it looks at first.
    pub(crate) fn has_begun(&self) -> bool {
        self.to_hypervisor.total_sent() >= FIRST_BYTES
    }

    /// Whether QEMU could be given what it looks at first, and is not connected yet.
    pub(crate) fn awaits_hypervisor(&self) -> bool {
        !self.hypervisor_attached && !self.hypervisor_wanted && self.to_hypervisor.len() as u64 >= FIRST_BYTES
    }

    /// Whether all that was released is with QEMU.
    pub(crate) fn is_flushed(&self) -> bool {
        self.hypervisor_attached && self.to_hypervisor.is_empty()
    }

    /// Whether QEMU's socket is open, was never closed, and nothing waits to be read from it.
    pub(crate) fn quiet(&self) -> Result<(), String> {
        let socket = self.hypervisor.as_ref().ok_or("QEMU's socket is closed")?;
        let interest = PollFlags::IN | PollFlags::PRI | PollFlags::RDHUP;
        let mut fds = [PollFd::new(socket, interest)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).map_err(|errno| format!("QEMU's socket could not be polled: {errno}"))?;
        let seen = fds[0].revents();
        if seen.intersects(CLOSED) {
            return Err("QEMU closed its socket after the end of the stream".to_owned());
        }
        if seen.is_empty() { Ok(()) } else { Err("QEMU wrote after the end of the stream".to_owned()) }
    }
}
