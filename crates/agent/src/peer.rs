//! The channel to the other agent: TLS records in and out of one TCP connection, frames inside.

use crate::queue::OutQueue;
use link::channel::{ChannelConfig, ChannelError, ChannelFacts, ChannelTls, Opened, Received};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use types::handover::Side;
use wire::frame::{Control, Frame, FrameError, HEADER_BYTES, Reader, data_header, return_header};

/// The other side has this long to prove its key.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// A peer that makes us answer more than this without reading is not an agent of ours.
const MAX_OUT_BYTES: usize = 2 << 20;
/// Control frames of one read: an honest agent sends ten a second.
const MAX_CONTROLS_PER_READ: u32 = 256;

/// Why the channel broke.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// TLS or its socket.
    #[error("{0}")]
    Channel(#[from] ChannelError),
    /// The frames inside.
    #[error("the other agent broke the frame format: {0}")]
    Frame(#[from] FrameError),
    /// The socket, on sending.
    #[error("sending to the other agent failed: {0}")]
    Send(Errno),
    /// It closed the channel.
    #[error("the other agent closed the channel")]
    Closed,
    /// It does not read its answers.
    #[error("the other agent reads no answers")]
    Stuck,
    /// It keeps us busy.
    #[error("the other agent sends control frames without end")]
    Flood,
}

/// An open channel.
pub struct Peer {
    socket: OwnedFd,
    tls: ChannelTls,
    out: OutQueue,
    frames: Reader,
    received_bytes: u64,
}

impl Peer {
    /// Shakes hands: the source dials, the target accepts. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// Why the other side was refused.
    pub fn open(
        socket: OwnedFd,
        config: &ChannelConfig,
        side: Side,
        deadline: Instant,
    ) -> Result<(Self, ChannelFacts), ChannelError> {
        // Small frames (the end of the stream, RUNNING) must not wait for an acknowledgement. A socket that is
        // not TCP has no such delay.
        let _not_tcp = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let mut tls = match side {
            Side::Source => ChannelTls::client(config)?,
            Side::Target => ChannelTls::server(config)?,
        };
        let facts = tls.handshake(&socket, deadline)?;
        let peer =
            Self { socket, tls, out: OutQueue::default(), frames: Reader::default(), received_bytes: 0 };
        Ok((peer, facts))
    }

    /// For poll.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Bytes that wait for the network.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.out.len()
    }

    /// Bytes on the wire: sent and received.
    #[must_use]
    pub fn wire_bytes(&self) -> (u64, u64) {
        (self.out.total_sent(), self.received_bytes)
    }

    /// Whether bytes wait inside that no poll would tell.
    #[must_use]
    pub fn has_unopened(&self) -> bool {
        self.tls.has_unopened()
    }

    /// Queues a control frame.
    ///
    /// # Errors
    /// The channel is broken, or the peer reads nothing.
    pub fn control(&mut self, control: &Control) -> Result<(), PeerError> {
        let mut plain = Vec::new();
        control.encode(&mut plain);
        self.seal(&plain)
    }

    /// Queues a DATA frame from a buffer that has [`HEADER_BYTES`] of room in front of `len` bytes of payload.
    ///
    /// # Errors
    /// The channel is broken.
    pub fn data(&mut self, buffer: &mut [u8], len: usize) -> Result<(), PeerError> {
        if let Some(room) = buffer.first_chunk_mut::<HEADER_BYTES>() {
            *room = data_header(len);
        }
        self.seal(buffer.get(..HEADER_BYTES + len).unwrap_or_default())
    }

    /// Queues a RETURN frame.
    ///
    /// # Errors
    /// The channel is broken.
    pub fn return_path(&mut self, bytes: &[u8]) -> Result<(), PeerError> {
        self.seal(&[&return_header(bytes.len()), bytes].concat())
    }

    fn seal(&mut self, plain: &[u8]) -> Result<(), PeerError> {
        if self.out.len() > MAX_OUT_BYTES {
            return Err(PeerError::Stuck);
        }
        let tls = &mut self.tls;
        Ok(self.out.append(|out| tls.seal(plain, out))?)
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn flush(&mut self) -> Result<(), PeerError> {
        self.out.flush(&self.socket).map_err(PeerError::Send)
    }

    /// Reads once, `limit_bytes` at most, and gives the frames to `each`, which can't fail: an error here would kill the
    /// channel, and with it the ABORT that is to follow. False when nothing was there.
    ///
    /// # Errors
    /// The channel's.
    pub fn receive(
        &mut self,
        limit_bytes: usize,
        mut each: impl FnMut(Frame<'_>),
    ) -> Result<bool, PeerError> {
        match self.tls.receive_at_most(&self.socket, limit_bytes)? {
            Received::Bytes(count) => self.received_bytes += count as u64,
            Received::WouldBlock if self.has_unopened() => {}
            Received::WouldBlock => return Ok(false),
            Received::Closed => return Err(PeerError::Closed),
        }
        let frames = &mut self.frames;
        let mut controls = 0;
        let opened = self.tls.open(|plain| {
            frames.feed(plain, |frame| {
                controls += u32::from(matches!(frame, Frame::Control(_)));
                if controls > MAX_CONTROLS_PER_READ {
                    return Err(PeerError::Flood);
                }
                each(frame);
                Ok(())
            })
        })?;
        match opened {
            Opened::More => Ok(true),
            Opened::Closed => Err(PeerError::Closed),
        }
    }

    /// Sends what waits and the channel's close, and reads until the other side has hung up too: closing a socket
    /// with unread bytes would reset the connection and could overtake the ABORT. Until `deadline` at most.
    pub fn goodbye(&mut self, deadline: Instant) {
        let tls = &mut self.tls;
        let _may_be_dead = self.out.append(|out| tls.close_notify(out));
        while !self.out.is_empty() {
            if self.out.flush(&self.socket).is_err() || !self.wait(PollFlags::OUT, deadline) {
                return;
            }
        }
        let _may_be_closed = shutdown(&self.socket, Shutdown::Write);
        let mut discarded = vec![0; 64 * 1024];
        while self.wait(PollFlags::IN, deadline) {
            match recv(&self.socket, discarded.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((_, 0)) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Waits until the socket is ready; false when the deadline passed.
    fn wait(&self, what: PollFlags, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok().filter(|_| !left.is_zero());
        timeout.is_some_and(|timeout| {
            poll(&mut [PollFd::new(&self.socket, what)], Some(&timeout)).is_ok_and(|ready| ready > 0)
        })
    }
}
