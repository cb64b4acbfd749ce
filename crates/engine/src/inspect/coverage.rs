//! Which pages came, and how often: bounded maps beside the guest's memory, never its content.

/// Pages with a resend counter of their own; in larger guests several neighbours share one.
const MAX_COUNTERS: u64 = 2 << 20;

/// Words that are cleared one by one: an epoch with few pages must not cost a pass over the whole map.
const MAX_TOUCHED: usize = 4096;

/// Why a page may not come now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TooOften {
    /// It came as often as any page may.
    Resent,
    /// It came already since the channels synchronised last, so that two channels could write it at once.
    InEpoch,
}

#[derive(Debug)]
struct Block {
    pages: u64,
    /// A bit for each page that came.
    came: Vec<u64>,
    /// A bit for each page that came since the last synchronisation; empty without multifd.
    epoch: Vec<u64>,
    /// How often the pages of each group came.
    counters: Vec<u32>,
}

/// The maps of all blocks, in stream order. Memory: one bit for each page, another with multifd, and at most
/// 8 MiB of counters.
#[derive(Debug)]
pub(super) struct Coverage {
    blocks: Vec<Block>,
    missing: u64,
    group_shift: u32,
    /// Most times that all pages of a group may come together.
    group_limit: u32,
    with_epochs: bool,
    /// Words of epoch maps that have to be cleared: (block, word). Beyond [`MAX_TOUCHED`] all are.
    touched: Vec<(usize, usize)>,
}

impl Coverage {
    /// For a guest of so many pages in all, of which each may come `page_limit` times.
    pub(super) fn new(total_pages: u64, page_limit: u32, with_epochs: bool) -> Self {
        let groups = total_pages.div_ceil(MAX_COUNTERS).max(1).next_power_of_two();
        let group_limit = u64::from(page_limit).saturating_mul(groups);
        Self {
            blocks: Vec::new(),
            missing: 0,
            group_shift: groups.trailing_zeros(),
            group_limit: u32::try_from(group_limit).unwrap_or(u32::MAX),
            with_epochs,
            touched: Vec::new(),
        }
    }

    pub(super) fn add_block(&mut self, pages: u64) {
        // Bounded: the inventory's total was checked, and the block equals an entry of it.
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        let groups = usize::try_from((pages >> self.group_shift) + 1).unwrap_or(0);
        let epoch = if self.with_epochs { vec![0; words] } else { Vec::new() };
        self.blocks.push(Block { pages, came: vec![0; words], epoch, counters: vec![0; groups] });
        self.missing += pages;
    }

    /// Notes a page; `in_epoch` asks that it did not come since the last synchronisation (of multifd channels; the
    /// main channel runs beside them).
    #[inline]
    pub(super) fn mark(&mut self, block: usize, page: u64, in_epoch: bool) -> Result<(), TooOften> {
        let Some(map) = self.blocks.get_mut(block).filter(|map| page < map.pages) else { return Ok(()) };
        let bit = 1u64 << (page % 64);
        // A page inside the block has its word and its counter; the parser checked that it is inside.
        let at = usize::try_from(page / 64).unwrap_or(usize::MAX);
        if let Some(word) = map.came.get_mut(at) {
            self.missing -= u64::from(*word & bit == 0);
            *word |= bit;
        }
        if in_epoch && let Some(word) = map.epoch.get_mut(at) {
            if *word & bit != 0 {
                return Err(TooOften::InEpoch);
            }
            if *word == 0 && self.touched.len() <= MAX_TOUCHED {
                self.touched.push((block, at));
            }
            *word |= bit;
        }
        let group = usize::try_from(page >> self.group_shift).unwrap_or(usize::MAX);
        match map.counters.get_mut(group) {
            Some(counter) if *counter < self.group_limit => {
                *counter += 1;
                Ok(())
            }
            _ => Err(TooOften::Resent),
        }
    }

    /// The channels have synchronised: every page may come again.
    pub(super) fn next_epoch(&mut self) {
        if self.touched.len() > MAX_TOUCHED {
            self.blocks.iter_mut().for_each(|block| block.epoch.fill(0));
        }
        for (block, at) in self.touched.drain(..) {
            if let Some(word) = self.blocks.get_mut(block).and_then(|block| block.epoch.get_mut(at)) {
                *word = 0;
            }
        }
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn missing(&self) -> u64 {
        self.missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_counts_once() {
        let mut coverage = Coverage::new(66, 100, false);
        coverage.add_block(65);
        coverage.add_block(1);
        for (block, page, missing) in
            [(0, 0, 65), (0, 0, 65), (0, 64, 64), (1, 0, 63), (2, 0, 63), (0, 999, 63)]
        {
            coverage.mark(block, page, true).expect("within every limit");
            assert_eq!(coverage.missing(), missing, "block {block}, page {page}");
        }
    }

    #[test]
    fn a_page_may_come_so_often_and_no_oftener() {
        let mut coverage = Coverage::new(10, 3, false);
        coverage.add_block(10);
        for _ in 0..3 {
            assert_eq!(coverage.mark(0, 5, true), Ok(()));
        }
        assert_eq!(coverage.mark(0, 5, true), Err(TooOften::Resent));
        assert_eq!(coverage.mark(0, 6, true), Ok(()));
    }

    #[test]
    fn counters_of_a_large_guest_stay_few() {
        let pages = MAX_COUNTERS * 5;
        let mut coverage = Coverage::new(pages, 3, false);
        coverage.add_block(pages);
        assert!(coverage.blocks[0].counters.len() as u64 <= MAX_COUNTERS + 1);
        assert_eq!((coverage.group_shift, coverage.group_limit), (3, 24));
    }

    #[test]
    fn once_in_an_epoch() {
        let mut coverage = Coverage::new(10, 100, true);
        coverage.add_block(10);
        assert_eq!(coverage.mark(0, 1, true), Ok(()));
        assert_eq!(coverage.mark(0, 1, true), Err(TooOften::InEpoch));
        assert_eq!(coverage.mark(0, 1, false), Ok(()));
        coverage.next_epoch();
        assert_eq!(coverage.mark(0, 1, true), Ok(()));
    }
}
