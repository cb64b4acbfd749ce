//! The two places where a channel meets its socket: the handshake and large reads.
//!
//! System calls used here, for the sandbox: `sendto`, `recvfrom`, `ppoll`/`poll`, `clock_gettime`.

use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{ChannelError, ChannelFacts, ChannelTls, HANDSHAKE_LIMIT_BYTES, Phase, Step};

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes wait for [`ChannelTls::open`].
    Bytes(usize),
    /// Nothing now.
    WouldBlock,
    /// The connection ended, after the peer's close_notify.
    Closed,
}

impl ChannelTls {
    /// Shakes hands over a connected stream socket, blocking until `deadline` at most, whether the
    /// descriptor is blocking or not. On success nothing of ours is left unsent; bytes that the peer sent
    /// after its handshake may wait already (see [`ChannelTls::has_unopened`]).
    ///
    /// # Errors
    /// The reason for the refusal; the channel is dead then, and not a byte of payload was handed out.
    pub fn handshake(&mut self, socket: impl AsFd, deadline: Instant) -> Result<ChannelFacts, ChannelError> {
        if self.phase != Phase::Handshaking {
            return Err(ChannelError::NotOpen { operation: "another handshake" });
        }
        let mut out = Vec::new();
        let result = self.shake(&socket, deadline, &mut out);
        if result.is_err() {
            self.phase = Phase::Dead;
            // An alert may be left: the peer should learn why, but a peer that does not read must not hold us.
            let _unread = send(&socket, &out, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        }
        result
    }

    fn shake(
        &mut self,
        socket: &impl AsFd,
        deadline: Instant,
        out: &mut Vec<u8>,
    ) -> Result<ChannelFacts, ChannelError> {
        let mut received_bytes = 0;
        let mut broken = None;
        loop {
            match self.handshake_turn(out)? {
                Step::Again => {}
                // A peer that refuses hangs up at once; why it did waits to be read.
                Step::Flush => broken = hung_up(send_all(socket, out, deadline))?,
                Step::NeedMore => {
                    if received_bytes >= HANDSHAKE_LIMIT_BYTES {
                        return Err(ChannelError::HandshakeTooLarge { limit_bytes: HANDSHAKE_LIMIT_BYTES });
                    }
                    received_bytes +=
                        self.receive_some(socket, deadline, HANDSHAKE_LIMIT_BYTES - received_bytes)?;
                }
                Step::Done => {
                    broken.map_or(Ok(()), Err)?;
                    send_all(socket, out, deadline)?;
                    return self.establish();
                }
            }
        }
    }

    fn receive_some(
        &mut self,
        socket: &impl AsFd,
        deadline: Instant,
        limit_bytes: usize,
    ) -> Result<usize, ChannelError> {
        loop {
            wait(socket, PollFlags::IN, deadline)?;
            let space = self.incoming.space();
            let room = space.len().min(limit_bytes);
            match recv(socket, &mut space[..room], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(ChannelError::Truncated),
                Ok((_, count)) => {
                    self.incoming.commit(count);
                    return Ok(count);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::io("receiving", errno)),
            }
        }
    }

    /// Reads once, as much as there is room for (256 KiB at least), without waiting. Call
    /// [`ChannelTls::open`] after every [`Received::Bytes`].
    ///
    /// # Errors
    /// The socket's, [`ChannelError::Truncated`] when the connection ended without close_notify, or
    /// [`ChannelError::ReceiveBufferFull`] when nothing was opened in between.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Received, ChannelError> {
        self.receive_at_most(socket, usize::MAX)
    }

    /// The same, and never more than `limit_bytes`, for those who have many channels and little memory.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_at_most(
        &mut self,
        socket: impl AsFd,
        limit_bytes: usize,
    ) -> Result<Received, ChannelError> {
        let space = self.incoming.space();
        if space.is_empty() {
            return Err(ChannelError::ReceiveBufferFull);
        }
        let room = space.len().min(limit_bytes);
        match recv(socket, &mut space[..room], RecvFlags::DONTWAIT) {
            // An end of the connection must not overtake a close_notify that waits to be opened.
            Ok((_, 0)) if self.has_unopened() => Ok(Received::Bytes(self.incoming.unscanned())),
            Ok((_, 0)) => self.end_of_input().map(|()| Received::Closed),
            Ok((_, count)) => {
                self.incoming.commit(count);
                Ok(Received::Bytes(count))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Received::WouldBlock),
            Err(errno) => Err(self.die(ChannelError::io("receiving", errno))),
        }
    }
}

/// Sets the peer's hang-up aside; any other error stays one.
fn hung_up(sent: Result<(), ChannelError>) -> Result<Option<ChannelError>, ChannelError> {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match sent {
        Err(ChannelError::Io { operation, source })
            if matches!(source.kind(), BrokenPipe | ConnectionReset) =>
        {
            Ok(Some(ChannelError::Io { operation, source }))
        }
        other => other.map(|()| None),
    }
}

/// Sends and empties `out`.
fn send_all(socket: &impl AsFd, out: &mut Vec<u8>, deadline: Instant) -> Result<(), ChannelError> {
    let mut rest = &out[..];
    while !rest.is_empty() {
        match send(socket, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(ChannelError::io("sending", errno)),
        }
    }
    out.clear();
    Ok(())
}

/// Waits until the socket is ready or broken, or the deadline passed.
fn wait(socket: &impl AsFd, what: PollFlags, deadline: Instant) -> Result<(), ChannelError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| ChannelError::HandshakeTimeout)?;
        match poll(&mut [PollFd::new(socket, what)], Some(&timeout)) {
            Ok(0) => return Err(ChannelError::HandshakeTimeout),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(ChannelError::io("waiting", errno)),
        }
    }
}
