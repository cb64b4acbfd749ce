//! Pieces of pages, in any order and from several channels at once, become batches of contiguous runs.
//!
//! Several runs are open at once, each known by the address at which it goes on: a channel's next piece finds its own
//! run, however the channels take turns. A run that is full, or that others pushed out, is closed; its tail stays
//! open, so that the next run begins with it and a pattern across the seam is seen.

use crate::frame::{MAX_BATCH_BYTES, MAX_RUN_BYTES, MAX_RUNS, OVERLAP_BYTES, Run};
use std::collections::BTreeMap;
use std::fmt;

/// Bytes of all open runs, tails included.
pub const MAX_OPEN_BYTES: usize = 384 * 1024;
/// Open runs: a full batch of single pages, or many channels with their tails.
pub const MAX_OPEN_RUNS: usize = 64;

/// A batch that is to be scanned.
#[derive(PartialEq, Eq)]
pub struct Batch {
    /// Its runs.
    pub runs: Vec<Run>,
    /// Their bytes.
    pub bytes: Vec<u8>,
    /// How many of them no earlier batch had.
    pub fresh_bytes: usize,
}

/// Never shows guest memory (I10).
impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({:?}, {} bytes, {} fresh)", self.runs, self.bytes.len(), self.fresh_bytes)
    }
}

/// See the module.
#[derive(Default)]
pub struct Collector {
    /// By block, and the offset at which the run goes on.
    open: BTreeMap<(u16, u64), Open>,
    open_bytes: usize,
    clock: u64,
    closed: Closed,
}

/// A run that grows.
struct Open {
    bytes: Vec<u8>,
    /// The last so many bytes were in no closed run yet.
    fresh: usize,
    /// When it last grew: the oldest is pushed out first.
    touched: u64,
}

/// Closed runs that are no batch yet.
#[derive(Default)]
struct Closed {
    runs: Vec<Run>,
    bytes: Vec<u8>,
    fresh: usize,
}

impl Collector {
    /// Takes bytes of guest memory that begin at `offset` of `block`, and gives batches that are full to `seal`.
    pub fn piece(&mut self, block: u16, offset: u64, piece: &[u8], seal: &mut impl FnMut(Batch)) {
        let (mut at, mut rest) = (offset, piece);
        while !rest.is_empty() {
            let mut run = self.take((block, at)).unwrap_or_else(Open::empty);
            let (now, later) = rest.split_at((MAX_RUN_BYTES - run.fresh).min(rest.len()));
            run.bytes.extend_from_slice(now);
            run.fresh += now.len();
            self.clock += 1;
            run.touched = self.clock;
            at = at.saturating_add(now.len() as u64);
            rest = later;
            let full = run.fresh >= MAX_RUN_BYTES;
            self.keep((block, at), run, seal);
            if full {
                self.close((block, at), seal);
            }
            self.make_room(seal);
        }
    }

    /// Gives everything that is left to `seal`.
    pub fn flush(&mut self, seal: &mut impl FnMut(Batch)) {
        for (end, run) in std::mem::take(&mut self.open) {
            self.closed.add(end, &run, seal);
        }
        self.open_bytes = 0;
        self.closed.seal(seal);
    }

    fn take(&mut self, end: (u16, u64)) -> Option<Open> {
        let run = self.open.remove(&end)?;
        self.open_bytes -= run.bytes.len();
        Some(run)
    }

    /// Two runs can't go on at one address: the older one, of memory that came again, is closed.
    fn keep(&mut self, end: (u16, u64), run: Open, seal: &mut impl FnMut(Batch)) {
        if let Some(older) = self.take(end) {
            self.closed.add(end, &older, seal);
        }
        self.open_bytes += run.bytes.len();
        self.open.insert(end, run);
    }

    /// Hands a run on, and keeps its tail, as old as it was. A run that is only a tail goes.
    fn close(&mut self, end: (u16, u64), seal: &mut impl FnMut(Batch)) {
        let Some(mut run) = self.take(end) else { return };
        if run.fresh == 0 {
            return;
        }
        self.closed.add(end, &run, seal);
        let tail = run.bytes.len().saturating_sub(OVERLAP_BYTES);
        // Not in place: the run's whole room would stay with the tail.
        run.bytes = run.bytes.split_off(tail);
        run.fresh = 0;
        self.keep(end, run, seal);
    }

    fn make_room(&mut self, seal: &mut impl FnMut(Batch)) {
        while self.open_bytes > MAX_OPEN_BYTES || self.open.len() > MAX_OPEN_RUNS {
            let oldest = self.open.iter().min_by_key(|(_, run)| run.touched).map(|(end, _)| *end);
            let Some(end) = oldest else { return };
            self.close(end, seal);
        }
    }
}

impl Open {
    fn empty() -> Self {
        Self { bytes: Vec::new(), fresh: 0, touched: 0 }
    }
}

impl Closed {
    fn add(&mut self, (block, end): (u16, u64), run: &Open, seal: &mut impl FnMut(Batch)) {
        let Ok(length) = u32::try_from(run.bytes.len()) else { return };
        if run.fresh == 0 {
            return;
        }
        if self.bytes.len() + run.bytes.len() > MAX_BATCH_BYTES || self.runs.len() == MAX_RUNS {
            self.seal(seal);
        }
        self.runs.push(Run { block, offset: end.saturating_sub(u64::from(length)), length });
        self.bytes.extend_from_slice(&run.bytes);
        self.fresh += run.fresh;
        if self.bytes.len() >= MAX_RUN_BYTES {
            self.seal(seal);
        }
    }

    fn seal(&mut self, seal: &mut impl FnMut(Batch)) {
        let Self { runs, bytes, fresh } = std::mem::take(self);
        if !runs.is_empty() {
            seal(Batch { runs, bytes, fresh_bytes: fresh });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    /// What memory holds at an address, so that a run's bytes show whether it was put together rightly.
    fn content(block: u16, offset: u64, length: usize) -> Vec<u8> {
        (offset..offset + length as u64).map(|at| (at / 13 + u64::from(block)).to_le_bytes()[0]).collect()
    }

    fn batches(
        feed: impl FnOnce(&mut Collector, &mut dyn FnMut(u16, u64, usize, &mut Collector)),
    ) -> Vec<Batch> {
        let (mut collector, mut all) = (Collector::default(), Vec::new());
        feed(&mut collector, &mut |block, offset, length, collector| {
            collector.piece(block, offset, &content(block, offset, length), &mut |batch| all.push(batch));
            assert!(collector.open_bytes <= MAX_OPEN_BYTES && collector.open.len() <= MAX_OPEN_RUNS);
        });
        collector.flush(&mut |batch| all.push(batch));
        check(&all);
        all
    }

    /// Every batch is within its bounds, and every run holds what lies at its address.
    fn check(all: &[Batch]) {
        for batch in all {
            assert!(batch.bytes.len() <= MAX_BATCH_BYTES && batch.runs.len() <= MAX_RUNS, "{batch:?}");
            let mut at = 0;
            for run in &batch.runs {
                let length = run.length as usize;
                assert_eq!(batch.bytes[at..at + length], content(run.block, run.offset, length), "{run:?}");
                at += length;
            }
            assert_eq!(at, batch.bytes.len());
        }
    }

    fn fresh(all: &[Batch]) -> usize {
        all.iter().map(|batch| batch.fresh_bytes).sum()
    }

    /// Whether some run holds the whole of `length` bytes at the address.
    fn seen(all: &[Batch], block: u16, offset: u64, length: u64) -> bool {
        let holds = |run: &Run| run.contains(block, offset) && run.contains(block, offset + length - 1);
        all.iter().any(|batch| batch.runs.iter().any(holds))
    }

    #[test]
    fn a_long_run_is_cut_with_an_overlap() {
        let total = 3 * MAX_RUN_BYTES;
        let all = batches(|collector, piece| {
            for at in (0..total).step_by(PAGE) {
                piece(0, at as u64, PAGE, collector);
            }
        });
        assert_eq!(all.len(), 3);
        assert_eq!(fresh(&all), total);
        for seam in [MAX_RUN_BYTES as u64, 2 * MAX_RUN_BYTES as u64] {
            assert!(seen(&all, 0, seam - 2048, PAGE as u64), "across {seam}");
        }
    }

    #[test]
    fn pieces_of_several_channels_find_their_own_runs() {
        let (channels, pages, small) = (8u64, 64u64, 512u64);
        let base = |channel: u64| channel << 32;
        let all = batches(|collector, piece| {
            for step in 0..pages * PAGE as u64 / small {
                for channel in 0..channels {
                    piece(1, base(channel) + step * small, 512, collector);
                }
            }
        });
        assert_eq!(fresh(&all) as u64, channels * pages * PAGE as u64);
        for channel in 0..channels {
            for page in 1..pages {
                let seam = base(channel) + page * PAGE as u64;
                assert!(seen(&all, 1, seam - 16, 32), "channel {channel}, page {page}");
            }
        }
    }

    #[test]
    fn scattered_pages_share_batches() {
        let count = 1000u64;
        let all = batches(|collector, piece| {
            for page in 0..count {
                piece(0, (page * 7919 % count) * 3 * PAGE as u64, PAGE, collector);
            }
        });
        assert_eq!(fresh(&all), 1000 * PAGE);
        assert!(all.len() < 25, "{} batches", all.len());
        let bytes: usize = all.iter().map(|batch| batch.bytes.len()).sum();
        assert_eq!(bytes, fresh(&all), "nothing is contiguous, nothing is looked at twice");
    }

    #[test]
    fn memory_that_comes_again_is_looked_at_again() {
        let all = batches(|collector, piece| {
            for _ in 0..2 {
                piece(0, 0, PAGE, collector);
                piece(0, PAGE as u64, PAGE, collector);
            }
            piece(3, u64::MAX - 8192, 0, collector);
        });
        assert_eq!(fresh(&all), 4 * PAGE);
        assert!(seen(&all, 0, 0, 2 * PAGE as u64));
    }

    #[test]
    fn a_piece_larger_than_a_run_is_cut() {
        let all = batches(|collector, piece| piece(0, 100, 5 * MAX_RUN_BYTES + 1, collector));
        assert_eq!(fresh(&all), 5 * MAX_RUN_BYTES + 1);
    }
}
