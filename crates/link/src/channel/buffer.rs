//! The receive buffer: large reads in, records decrypted in place, bounded for ever.

use std::ops::Range;

/// One read fills it at most; a TLS record is at most 18,437 bytes and a handshake message 65,535, so that
/// an unfinished rest always leaves room to read on.
pub const RECEIVE_BUFFER_BYTES: usize = 384 * 1024;

/// Room that a read should find: below it the rest is moved to the front first.
const READ_ROOM_BYTES: usize = 256 * 1024;

/// Bytes as they came from the socket: `[start..scanned]` was seen by TLS and is an incomplete record,
/// `[scanned..end]` has not been looked at.
pub(super) struct RecordBuffer {
    bytes: Box<[u8]>,
    start: usize,
    scanned: usize,
    end: usize,
}

impl RecordBuffer {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; RECEIVE_BUFFER_BYTES].into_boxed_slice(), start: 0, scanned: 0, end: 0 }
    }

    /// Where the next read goes. Empty only when the caller has opened nothing of a full buffer.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start == self.end || self.bytes.len() - self.end < READ_ROOM_BYTES {
            self.compact();
        }
        &mut self.bytes[self.end..]
    }

    /// `count` bytes were written to [`Self::space`].
    pub(super) fn commit(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// Everything unread.
    pub(super) fn filled_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// Only what TLS has already seen and found incomplete.
    pub(super) fn scanned_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.scanned]
    }

    /// TLS has used up `count` bytes of the front.
    pub(super) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        self.scanned = self.scanned.max(self.start);
    }

    /// TLS found no further complete record in what is there.
    pub(super) fn mark_scanned(&mut self) {
        self.scanned = self.end;
    }

    /// Bytes that came in since [`Self::mark_scanned`].
    pub(super) fn unscanned(&self) -> usize {
        self.end - self.scanned
    }

    fn compact(&mut self) {
        let Range { start, end } = self.start..self.end;
        self.bytes.copy_within(start..end, 0);
        self.scanned -= start;
        self.end -= start;
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_rest_survives_moving_and_room_never_runs_out() {
        let mut buffer = RecordBuffer::new();
        for round in 0..50u8 {
            let room = buffer.space();
            assert!(room.len() >= READ_ROOM_BYTES);
            room.fill(round);
            let count = room.len();
            buffer.commit(count);
            assert!(buffer.unscanned() >= count);
            // TLS takes all but an unfinished record.
            let unread = buffer.filled_mut().len();
            buffer.consume(unread - 18_000);
            buffer.mark_scanned();
            assert!(buffer.scanned_mut().iter().all(|byte| *byte == round));
            assert_eq!(buffer.scanned_mut().len(), 18_000);
        }
    }

    #[test]
    fn a_full_unopened_buffer_offers_no_room() {
        let mut buffer = RecordBuffer::new();
        let count = buffer.space().len();
        buffer.commit(count);
        assert!(buffer.space().is_empty());
    }
}
