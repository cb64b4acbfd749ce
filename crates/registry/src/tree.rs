//! The audit log's Merkle tree as it is stored: with each entry the nodes that it completed, with the head the frontier.
//! Appending costs no statement more than the chain alone; a proof reads a few rows for each level.

use crate::audit::AuditRecord;
use crate::error::RegistryError;
use crate::tx::{Tx, column, signed};
use permit::checkpoint::Extension;
use permit::merkle::{self, Frontier, Node, TreeHash};
use sqlx::any::AnyRow;
use types::Digest;

/// Entries of an older version that one transaction hashes: some ten milliseconds.
const GROW_ENTRIES: i64 = 500;

/// Where the log stands, as a checkpoint says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditTip {
    /// Entries.
    pub size: u64,
    /// Chain hash of the last.
    pub head: Digest,
    /// Root of the tree.
    pub root: TreeHash,
}

/// Nodes as they are stored.
pub(crate) fn bytes_of(nodes: &[TreeHash]) -> Vec<u8> {
    nodes.iter().flat_map(|n| n.0).collect()
}

impl Tx {
    /// Where the log stands; `None` when its tree does not (an older version's log that is not hashed yet, or a damaged
    /// one): then nothing can be signed.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit_tip(&mut self) -> Result<Option<AuditTip>, RegistryError> {
        let end = self.audit_end().await?;
        let tree = end.tree.filter(|tree| tree.size() == end.head.seq);
        Ok(tree.map(|tree| AuditTip { size: end.head.seq, head: end.head.hash, root: tree.root() }))
    }

    /// Hashes some entries that an older version wrote. Returns whether that is not all yet.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn grow_tree(&mut self) -> Result<bool, RegistryError> {
        let end = self.audit_end().await?;
        let Some(mut tree) = end.tree.filter(|tree| tree.size() < end.head.seq) else { return Ok(false) };
        let rows = self.audit_rows(tree.size(), GROW_ENTRIES).await?;
        for row in &rows {
            // What is not the next entry, or can't be read, was tampered with: `verify` says so.
            let Ok(entry) = AuditRecord::read(row) else { return Ok(false) };
            if entry.sequence != tree.size() + 1 {
                return Ok(false);
            }
            let nodes = tree.push(merkle::leaf(&entry.canonical()?));
            let query = sqlx::query("UPDATE audit SET nodes = $2 WHERE sequence = $1")
                .bind(signed("sequence", entry.sequence)?)
                .bind(bytes_of(&nodes));
            self.execute(query).await?;
        }
        let query = sqlx::query("UPDATE audit_head SET tree_size = $1, frontier = $2 WHERE id = 1")
            .bind(signed("tree_size", tree.size())?)
            .bind(tree.to_bytes());
        self.execute(query).await?;
        Ok(!rows.is_empty() && tree.size() < end.head.seq)
    }

    /// The proof that the log as it stands, with `to` entries, begins with its first `from` ones.
    ///
    /// # Errors
    /// Those of the database; `None` when it has not so many, or a node is missing.
    pub async fn audit_extension(&mut self, from: u64, to: u64) -> Result<Option<Extension>, RegistryError> {
        let Some(parts) = merkle::consistency_nodes(from, to) else { return Ok(None) };
        let proof = self.audit_proof(parts).await?;
        Ok(proof.map(|proof| Extension { from_size: from, proof }))
    }

    /// The proof that the entry of this number (from 1) is in the log of `size` entries.
    ///
    /// # Errors
    /// As [`Self::audit_extension`].
    pub async fn audit_inclusion(
        &mut self,
        sequence: u64,
        size: u64,
    ) -> Result<Option<Vec<TreeHash>>, RegistryError> {
        let parts = sequence.checked_sub(1).and_then(|index| merkle::inclusion_nodes(index, size));
        match parts {
            Some(parts) => self.audit_proof(parts).await,
            None => Ok(None),
        }
    }

    async fn audit_proof(&mut self, parts: Vec<Vec<Node>>) -> Result<Option<Vec<TreeHash>>, RegistryError> {
        let mut proof = Vec::with_capacity(parts.len());
        for part in parts {
            let mut hashes = Vec::with_capacity(part.len());
            for node in part {
                let Some(hash) = self.audit_node(node).await? else { return Ok(None) };
                hashes.push(hash);
            }
            let Some(hash) = merkle::joined(&hashes) else { return Ok(None) };
            proof.push(hash);
        }
        Ok(Some(proof))
    }

    async fn audit_node(&mut self, node: Node) -> Result<Option<TreeHash>, RegistryError> {
        let query = sqlx::query("SELECT nodes FROM audit WHERE sequence = $1")
            .bind(signed("sequence", node.stored_at())?);
        let Some(row) = self.optional(query).await? else { return Ok(None) };
        let nodes = column::<Option<Vec<u8>>>(&row, "nodes")?.unwrap_or_default();
        let (nodes, _) = nodes.as_chunks::<32>();
        let hash = usize::try_from(node.level).ok().and_then(|level| nodes.get(level));
        Ok(hash.map(|hash| TreeHash(*hash)))
    }
}

/// Checks the stored tree while the log is walked from its first entry.
#[derive(Default)]
pub(crate) struct Walk {
    tree: Frontier,
    /// An entry without nodes was met: those of an older version, which are hashed one day. None may follow with nodes.
    ended: bool,
}

impl Walk {
    /// The next entry.
    pub(crate) fn step(&mut self, row: &AnyRow, entry: &AuditRecord) -> Result<(), String> {
        let stored: Option<Vec<u8>> = column(row, "nodes").map_err(|e| e.to_string())?;
        let Some(stored) = stored else {
            self.ended = true;
            return Ok(());
        };
        if self.ended {
            return Err("an entry before it lacks its place in the tree".to_owned());
        }
        let nodes = self.tree.push(merkle::leaf(&entry.canonical().map_err(|e| e.to_string())?));
        if bytes_of(&nodes) == stored { Ok(()) } else { Err("its tree hashes do not match it".to_owned()) }
    }

    /// The end of the log, against what is stored with the head. The first bad entry and what is wrong.
    pub(crate) fn ends(&self, stored: Option<&Frontier>) -> Option<(u64, String)> {
        if stored == Some(&self.tree) {
            return None;
        }
        let size = self.tree.size();
        let detail = "the tree's frontier does not match the entries".to_owned();
        Some((stored.map_or(size, |s| s.size().min(size)).max(1), detail))
    }
}
