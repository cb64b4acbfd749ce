//! Which pages came at least once: a bit each.

/// The map of all blocks, in stream order.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    blocks: Vec<Vec<u64>>,
    missing: u64,
}

impl Coverage {
    pub(super) fn add_block(&mut self, pages: u64) {
        // Bounded: the inventory's total was checked, and the block equals an entry of it.
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        self.blocks.push(vec![0; words]);
        self.missing += pages;
    }

    pub(super) fn mark(&mut self, block: usize, page: u64) {
        let word = usize::try_from(page / 64).ok().and_then(|w| self.blocks.get_mut(block)?.get_mut(w));
        if let Some(word) = word {
            let bit = 1u64 << (page % 64);
            self.missing -= u64::from(*word & bit == 0);
            *word |= bit;
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
        let mut coverage = Coverage::default();
        coverage.add_block(65);
        coverage.add_block(1);
        for (block, page, missing) in
            [(0, 0, 65), (0, 0, 65), (0, 64, 64), (1, 0, 63), (2, 0, 63), (0, 999, 63)]
        {
            coverage.mark(block, page);
            assert_eq!(coverage.missing(), missing, "block {block}, page {page}");
        }
    }
}
