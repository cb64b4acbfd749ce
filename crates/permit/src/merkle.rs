//! The Merkle tree over a log's entries (RFC 9162, SHA-256): what lets one entry be shown to belong to a signed
//! checkpoint, and one checkpoint to another, without the rest of the log.
//!
//! Every entry completes some perfect subtrees; their roots are stored beside it (two on average) and never change.
//! Appending needs only the [`Frontier`], a proof only the nodes that [`inclusion_nodes`] and [`consistency_nodes`] name.

use aws_lc_rs::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

/// A tree of 2^63 entries has so many levels: no proof is longer, and no frontier is.
pub const LEVELS_MAX: usize = 64;

/// Hash of a leaf or of a subtree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TreeHash(pub [u8; 32]);

impl std::fmt::Display for TreeHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl std::fmt::Debug for TreeHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl From<TreeHash> for String {
    fn from(hash: TreeHash) -> Self {
        hash.to_string()
    }
}

impl TryFrom<String> for TreeHash {
    type Error = hex::FromHexError;
    fn try_from(text: String) -> Result<Self, hex::FromHexError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl TryFrom<&[u8]> for TreeHash {
    type Error = std::array::TryFromSliceError;
    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self(bytes.try_into()?))
    }
}

fn hashed(tag: u8, parts: &[&[u8]]) -> TreeHash {
    let mut context = Context::new(&SHA256);
    context.update(&[tag]);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    TreeHash(hash)
}

/// The hash of an entry.
#[must_use]
pub fn leaf(entry: &[u8]) -> TreeHash {
    hashed(0, &[entry])
}

fn parent(left: &TreeHash, right: &TreeHash) -> TreeHash {
    hashed(1, &[&left.0, &right.0])
}

/// Root of a tree without entries.
#[must_use]
pub fn empty_root() -> TreeHash {
    let mut hash = [0; 32];
    hash.copy_from_slice(aws_lc_rs::digest::digest(&SHA256, b"").as_ref());
    TreeHash(hash)
}

/// Roots of the perfect subtrees that a tree is made of, the largest first: one for each bit of its size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    roots: Vec<TreeHash>,
}

impl Frontier {
    /// From its stored form; `None` when it has not exactly the roots that a tree of this size has.
    #[must_use]
    pub fn from_bytes(size: u64, bytes: &[u8]) -> Option<Self> {
        let (roots, rest) = bytes.as_chunks::<32>();
        let fits = rest.is_empty() && roots.len() == size.count_ones() as usize;
        fits.then(|| Self { size, roots: roots.iter().map(|r| TreeHash(*r)).collect() })
    }

    /// Its stored form.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.roots.iter().flat_map(|r| r.0).collect()
    }

    /// How many entries the tree has.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Adds an entry. Returns the roots of the perfect subtrees that it completes, its own leaf first: what is to be
    /// stored with it.
    pub fn push(&mut self, leaf: TreeHash) -> Vec<TreeHash> {
        let mut completed = vec![leaf];
        let mut node = leaf;
        for _ in 0..self.size.trailing_ones() {
            let Some(left) = self.roots.pop() else { break };
            node = parent(&left, &node);
            completed.push(node);
        }
        self.roots.push(node);
        self.size = self.size.saturating_add(1);
        completed
    }

    /// The root of the tree.
    #[must_use]
    pub fn root(&self) -> TreeHash {
        joined(&self.roots).unwrap_or_else(empty_root)
    }
}

/// The root over perfect subtrees that stand beside each other, the largest first.
#[must_use]
pub fn joined(roots: &[TreeHash]) -> Option<TreeHash> {
    let (last, left) = roots.split_last()?;
    Some(left.iter().rfold(*last, |right, left| parent(left, &right)))
}

/// A perfect subtree: the entries from `index * 2^level` (counted from 0) on, 2^level of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// How high.
    pub level: u32,
    /// The how many-eth of its level.
    pub index: u64,
}

impl Node {
    /// Number (from 1) of the entry that completed it, with which it is stored, at the place `level`.
    #[must_use]
    pub const fn stored_at(self) -> u64 {
        self.index.saturating_add(1) << self.level
    }
}

/// The largest power of two below `n`, which is at least 2.
const fn split(n: u64) -> u64 {
    1 << (n - 1).ilog2()
}

/// The perfect subtrees of the entries `from..to`, where `from` is a multiple of the first one's size.
fn perfect(mut from: u64, to: u64) -> Vec<Node> {
    let mut nodes = Vec::new();
    while from < to {
        let level = (to - from).ilog2();
        nodes.push(Node { level, index: from >> level });
        from += 1 << level;
    }
    nodes
}

/// What the inclusion proof of entry `index` (from 0) in a tree of `size` entries is made of: each hash of the proof is
/// [`joined`] from these nodes. `None` when the tree has no such entry.
#[must_use]
pub fn inclusion_nodes(index: u64, size: u64) -> Option<Vec<Vec<Node>>> {
    if index >= size {
        return None;
    }
    let (mut from, mut to, mut path) = (0, size, Vec::new());
    while to - from > 1 {
        let middle = from + split(to - from);
        if index < middle {
            path.push(perfect(middle, to));
            to = middle;
        } else {
            path.push(perfect(from, middle));
            from = middle;
        }
    }
    path.reverse();
    Some(path)
}

/// The same for the proof that the tree of `new` entries begins with that of `old` entries.
#[must_use]
pub fn consistency_nodes(old: u64, new: u64) -> Option<Vec<Vec<Node>>> {
    if old > new {
        return None;
    }
    if old == 0 || old == new {
        return Some(Vec::new());
    }
    let (mut from, mut to, mut path) = (0, new, Vec::new());
    while old != to {
        let middle = from + split(to - from);
        if old <= middle {
            path.push(perfect(middle, to));
            to = middle;
        } else {
            path.push(perfect(from, middle));
            from = middle;
        }
    }
    if from != 0 {
        path.push(perfect(from, to));
    }
    path.reverse();
    Some(path)
}

/// Whether the proof shows that `leaf` is entry `index` (from 0) of the tree with this size and root.
#[must_use]
pub fn includes(leaf: TreeHash, index: u64, size: u64, proof: &[TreeHash], root: TreeHash) -> bool {
    if index >= size || proof.len() > LEVELS_MAX {
        return false;
    }
    let (mut at, mut last, mut node) = (index, size - 1, leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if at % 2 == 1 || at == last {
            node = parent(sibling, &node);
            while at % 2 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            node = parent(&node, sibling);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    last == 0 && node == root
}

/// Whether the proof shows that the tree of `new` entries begins with the tree of `old` entries.
#[must_use]
pub fn extends(
    (old, old_root): (u64, TreeHash),
    (new, new_root): (u64, TreeHash),
    proof: &[TreeHash],
) -> bool {
    if old > new || proof.len() > LEVELS_MAX {
        return false;
    }
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty() && old_root == empty_root();
    }
    let mut hashes = proof.iter();
    let first = if old.is_power_of_two() { Some(&old_root) } else { hashes.next() };
    let Some(first) = first else { return false };
    let shift = (old - 1).trailing_ones();
    let (mut at, mut last) = ((old - 1) >> shift, (new - 1) >> shift);
    let (mut of_old, mut of_new) = (*first, *first);
    for sibling in hashes {
        if last == 0 {
            return false;
        }
        if at % 2 == 1 || at == last {
            of_old = parent(sibling, &of_old);
            of_new = parent(sibling, &of_new);
            while at % 2 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            of_new = parent(&of_new, sibling);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    last == 0 && of_old == old_root && of_new == new_root
}

#[cfg(test)]
mod tests;
