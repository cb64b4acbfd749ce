//! Bounded output to a socket, and the throttle.

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A chunk that holds this much takes no more: what is sent is given back chunk by chunk.
const FULL_CHUNK_BYTES: usize = 64 * 1024;
/// An empty chunk is kept for the next bytes when it is no larger.
const KEPT_CHUNK_BYTES: usize = 512 * 1024;

/// Bytes that wait for a socket, in chunks. Who fills it checks [`OutQueue::len`] against a bound first.
#[derive(Debug, Default)]
pub struct OutQueue {
    chunks: VecDeque<Vec<u8>>,
    /// Sent bytes of the first chunk.
    sent: usize,
    len: usize,
    total_sent: u64,
}

impl OutQueue {
    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none wait.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the socket took so far.
    #[must_use]
    pub fn total_sent(&self) -> u64 {
        self.total_sent
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(FULL_CHUNK_BYTES) {
            self.last().extend_from_slice(piece);
        }
        self.len += bytes.len();
    }

    /// Adds bytes without copying them.
    pub fn push_owned(&mut self, bytes: Vec<u8>) {
        self.len += bytes.len();
        self.chunks.push_back(bytes);
    }

    /// Lets `add` append bytes (sealed records).
    ///
    /// # Errors
    /// Those of `add`.
    pub fn append<E>(&mut self, add: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        let chunk = self.last();
        let before = chunk.len();
        let added = add(chunk);
        let count = chunk.len().saturating_sub(before);
        self.len += count;
        added
    }

    /// The chunk that takes the next bytes.
    fn last(&mut self) -> &mut Vec<u8> {
        if self.chunks.back().is_none_or(|chunk| chunk.len() >= FULL_CHUNK_BYTES) {
            self.chunks.push_back(Vec::new());
        }
        self.chunks.back_mut().expect("one was added where there was none")
    }

    /// Sends as much as the socket takes.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn flush(&mut self, socket: impl AsFd) -> Result<(), Errno> {
        while let Some(chunk) = self.chunks.front() {
            let rest = chunk.get(self.sent..).unwrap_or_default();
            let count = if rest.is_empty() { 0 } else { send_some(&socket, rest)? };
            let whole = count == rest.len();
            self.sent += count;
            self.len -= count;
            self.total_sent += count as u64;
            if !whole {
                return Ok(());
            }
            self.next_chunk();
            if self.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The first chunk is sent. The only one is kept for the next bytes.
    fn next_chunk(&mut self) {
        self.sent = 0;
        match self.chunks.front_mut() {
            Some(only) if self.len == 0 && only.capacity() <= KEPT_CHUNK_BYTES => only.clear(),
            _ => drop(self.chunks.pop_front()),
        }
    }
}

/// Sends what fits; 0 when nothing does.
fn send_some(socket: &impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    match send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(count) => Ok(count),
        Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// A token bucket: at most so many bytes a second, in bursts of a tenth of a second.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: u64,
    tokens: u64,
    since: Instant,
}

/// Bursts below one read of QEMU's pieces would only cost wake-ups.
const MIN_BURST_BYTES: u64 = 64 * 1024;

impl Throttle {
    /// When to look again while nothing is allowed.
    pub const PAUSE: Duration = Duration::from_millis(5);

    /// No limit.
    #[must_use]
    pub fn unlimited(now: Instant) -> Self {
        Self { bytes_per_second: 0, tokens: 0, since: now }
    }

    /// Another limit; 0 is none.
    pub fn limit(&mut self, bytes_per_second: u64, now: Instant) {
        *self = Self { bytes_per_second, tokens: 0, since: now };
    }

    /// How many bytes may pass now, at most `want`.
    pub fn allowed(&mut self, want: usize, now: Instant) -> usize {
        if self.bytes_per_second == 0 {
            return want;
        }
        let burst = (self.bytes_per_second / 10).max(MIN_BURST_BYTES);
        let elapsed_us = u64::try_from(now.duration_since(self.since).as_micros()).unwrap_or(u64::MAX);
        let earned = elapsed_us.saturating_mul(self.bytes_per_second) / 1_000_000;
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(burst);
            self.since = now;
        }
        usize::try_from(self.tokens).unwrap_or(usize::MAX).min(want)
    }

    /// So many bytes passed.
    pub fn take(&mut self, count: usize) {
        self.tokens = self.tokens.saturating_sub(count as u64);
    }

    /// Whether there is a limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.bytes_per_second != 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_leave_in_order_whatever_their_pieces() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (mut queue, mut expect, mut got) = (OutQueue::default(), Vec::new(), Vec::new());
        for round in 0..40u8 {
            let piece = vec![round; usize::from(round) * 9_000];
            match round % 3 {
                0 => queue.push(&piece),
                1 => queue.push_owned(piece.clone()),
                _ => queue
                    .append(|out| -> Result<(), ()> {
                        out.extend_from_slice(&piece);
                        Ok(())
                    })
                    .unwrap(),
            }
            expect.extend_from_slice(&piece);
            queue.flush(&ours).unwrap();
            let mut some = [0; 100_000];
            if let Ok(count) = theirs.read(&mut some) {
                got.extend_from_slice(&some[..count]);
            }
            assert_eq!(queue.len() as u64 + queue.total_sent(), expect.len() as u64);
        }
        while !queue.is_empty() || got.len() < expect.len() {
            queue.flush(&ours).unwrap();
            let mut some = [0; 100_000];
            let count = theirs.read(&mut some).unwrap();
            got.extend_from_slice(&some[..count]);
        }
        assert!(got == expect);
        assert!(queue.chunks.iter().all(|chunk| chunk.capacity() <= KEPT_CHUNK_BYTES));
    }

    #[test]
    fn the_throttle_lets_its_rate_through() {
        let start = Instant::now();
        let mut throttle = Throttle::unlimited(start);
        assert_eq!(throttle.allowed(1 << 30, start), 1 << 30);
        throttle.limit(1_000_000, start);
        let mut passed = 0;
        for tick in 0..=2000 {
            let now = start + Duration::from_millis(tick);
            let count = throttle.allowed(1 << 20, now);
            throttle.take(count);
            passed += count;
        }
        assert!((1_900_000..=2_000_000).contains(&passed), "{passed}");
    }
}
