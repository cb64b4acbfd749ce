//! Bounded output to a socket, and the throttle.

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Bytes that wait for a socket. Who fills it checks [`OutQueue::len`] against a bound first.
#[derive(Debug, Default)]
pub struct OutQueue {
    bytes: Vec<u8>,
    sent: usize,
    total_sent: u64,
}

/// Sent bytes are dropped from the front once there are this many.
const COMPACT_BYTES: usize = 1 << 20;

impl OutQueue {
    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Whether none wait.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the socket took so far.
    #[must_use]
    pub fn total_sent(&self) -> u64 {
        self.total_sent
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Where bytes are added by others (sealed records).
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Sends as much as the socket takes.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn flush(&mut self, socket: impl AsFd) -> Result<(), Errno> {
        while !self.is_empty() {
            match send_some(&socket, self.bytes.get(self.sent..).unwrap_or_default())? {
                0 => break,
                count => {
                    self.sent += count;
                    self.total_sent += count as u64;
                }
            }
        }
        if self.is_empty() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent > COMPACT_BYTES {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
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
mod tests {
    use super::*;

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
