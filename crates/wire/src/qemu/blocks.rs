//! The list of RAM blocks that the main channel opens with; every channel's pages are named by it.

/// One block.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block {
    name: Vec<u8>,
    length_bytes: u64,
}

/// The blocks in stream order; at most [`super::MAX_RAM_BLOCKS`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blocks(Vec<Block>);

impl Blocks {
    /// Adds a block; the caller has checked name and length, and that there is room.
    pub fn push(&mut self, name: &[u8], length_bytes: u64) {
        self.0.push(Block { name: name.to_vec(), length_bytes });
    }

    /// The index of the block with that name.
    #[must_use]
    pub fn find(&self, name: &[u8]) -> Option<usize> {
        self.0.iter().position(|block| block.name == name)
    }

    /// Its length in bytes; 0 for a block that is not there, so that no offset lies inside.
    #[must_use]
    pub fn length_bytes(&self, index: usize) -> u64 {
        self.0.get(index).map_or(0, |block| block.length_bytes)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self, index: usize) -> Option<&[u8]> {
        self.0.get(index).map(|block| block.name.as_slice())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
