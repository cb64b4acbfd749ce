//! The daemon's socket: whole packets in, whole packets out, descriptors beside them.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;
use types::agent::{FromAgent, MAX_PACKET_BYTES, ToAgent};
use wire::packet::{self, PacketError};

/// Reports that wait for a slow daemon. Heartbeats are dropped first; beyond this the daemon is as good as gone.
const MAX_WAITING_PACKETS: usize = 64;

/// Why the daemon can't be talked to any more.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It closed its end, or died.
    #[error("the daemon closed the control socket")]
    Closed,
    /// The socket failed.
    #[error("{operation} on the control socket failed")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Its error.
        #[source]
        source: std::io::Error,
    },
    /// A packet that is none.
    #[error("the daemon sent a packet that is no message")]
    Malformed(#[from] PacketError),
    /// More than one descriptor, or one beside a packet that takes none.
    #[error("the daemon sent descriptors that do not belong to the packet")]
    StrayDescriptor,
    /// The daemon does not read.
    #[error("the daemon left {MAX_WAITING_PACKETS} reports unread")]
    Stuck,
}

fn io(operation: &'static str) -> impl Fn(Errno) -> ControlError {
    move |errno| ControlError::Io { operation, source: errno.into() }
}

/// The control socket.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    waiting: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Control {
    /// The inherited descriptor with that number; 0 is standard input.
    ///
    /// # Errors
    /// There is no such descriptor.
    pub fn inherited(number: i32) -> Result<Self, ControlError> {
        // A descriptor that is only a number can't be owned safely; asking the kernel for a copy of our own
        // descriptor can.
        let me = pidfd_open(getpid(), PidfdFlags::empty()).map_err(io("opening ourselves"))?;
        let socket = pidfd_getfd(me, number, PidfdGetfdFlags::empty()).map_err(io("taking over"))?;
        Ok(Self::new(socket))
    }

    /// Over a connected `SOCK_SEQPACKET` socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, waiting: VecDeque::new(), buffer: vec![0; MAX_PACKET_BYTES + 1] }
    }

    /// For poll.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether reports wait for the socket.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The next packet and its descriptor; nothing when none is there.
    ///
    /// # Errors
    /// The daemon is gone or talks nonsense.
    pub fn receive(&mut self) -> Result<Option<(ToAgent, Option<OwnedFd>)>, ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = {
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
                Err(errno) => return Err(io("receiving")(errno)),
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        if received.bytes == 0 && descriptors.is_empty() {
            return Err(ControlError::Closed);
        }
        let message: ToAgent = packet::decode(self.buffer.get(..received.bytes).unwrap_or_default())?;
        let takes_one = matches!(message, ToAgent::Attach { .. });
        if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() != usize::from(takes_one) {
            return Err(ControlError::StrayDescriptor);
        }
        Ok(Some((message, descriptors.pop())))
    }

    /// Sends a report, or keeps it for later. A heartbeat that does not fit is dropped: the next one says more.
    ///
    /// # Errors
    /// The daemon is gone, or does not read.
    pub fn report(&mut self, message: &FromAgent) -> Result<(), ControlError> {
        let heartbeat = matches!(message, FromAgent::Progress { .. });
        if heartbeat && self.wants_write() {
            return Ok(());
        }
        if self.waiting.len() == MAX_WAITING_PACKETS {
            return Err(ControlError::Stuck);
        }
        self.waiting.push_back(packet::encode(message)?);
        self.flush()
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn flush(&mut self) -> Result<(), ControlError> {
        while let Some(packet) = self.waiting.front() {
            match send(&self.socket, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => drop(self.waiting.pop_front()),
                Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ControlError::Closed),
                Err(errno) => return Err(io("sending")(errno)),
            }
        }
        Ok(())
    }

    /// Sends what waits, until `deadline` at most. True when all of it went.
    pub fn drain(&mut self, deadline: Instant) -> bool {
        while self.wants_write() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(left) else { return false };
            if left.is_zero() || self.flush().is_err() {
                return false;
            }
            if self.wants_write() {
                let _woken = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout));
            }
        }
        true
    }
}
