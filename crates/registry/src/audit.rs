//! The audit log: hash-chained, appended in the same transaction as what it records.
//!
//! Each hash covers the hash before it, the sequence number and the canonical JSON of the entry, so that an edit,
//! a removal or a reordering shows at the first entry that it touches. The head is kept in a row of its own, and
//! the manager keeps an anchor outside the database: cutting off the tail, or putting back an older file, shows
//! against that.

use crate::error::RegistryError;
use crate::tx::{Tx, column, document, plain, unsigned};
use permit::chain::Head;
use permit::merkle::{self, Frontier};
use serde::Serialize;
use serde_json::Value;
use sqlx::any::AnyRow;
use types::Digest;

/// Entries are read in pages of this size when the chain is verified: the log may be longer than memory.
const PAGE_ENTRIES: i64 = 1_000;
/// Name of the chain.
const CHAIN: &[u8] = b"audit";

/// One entry.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditRecord {
    /// Counts up by one from 1.
    pub sequence: u64,
    /// Microseconds since the Unix epoch.
    pub at_us: i64,
    /// Who.
    pub actor: String,
    /// What.
    pub action: String,
    /// On what.
    pub subject: String,
    /// Details.
    pub detail: Value,
    /// Chain hash.
    pub hash: Digest,
}

/// What verifying the chain found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuditVerdict {
    /// Every entry is where and what it was.
    Whole {
        /// How many.
        entries: u64,
        /// Hash of the last.
        head: Digest,
    },
    /// Someone changed it.
    Broken {
        /// The first entry that is wrong or missing.
        first_bad: u64,
        /// How.
        detail: String,
        /// How many entries are good before it.
        entries: u64,
    },
}

/// An entry that does not belong where it is.
#[derive(Debug, thiserror::Error)]
pub enum NotNext {
    /// Another one should be here.
    #[error("it has number {found}, {expected} should be here")]
    Number {
        /// Its number.
        found: u64,
        /// The number that comes next.
        expected: u64,
    },
    /// It, or one before it, was changed.
    #[error("its hash does not fit the entry and the one before it")]
    Hash,
    /// It can't be hashed.
    #[error("it cannot be hashed")]
    Malformed(#[source] RegistryError),
}

/// How the log ends: chain and tree.
pub(crate) struct End {
    pub(crate) head: Head,
    /// `None`: its stored form is damaged.
    pub(crate) tree: Option<Frontier>,
}

/// The head of a log without entries.
#[must_use]
pub fn audit_start() -> Head {
    Head::genesis(CHAIN)
}

#[derive(Serialize)]
struct Payload<'a> {
    sequence: u64,
    at_us: i64,
    actor: &'a str,
    action: &'a str,
    subject: &'a str,
    detail: &'a Value,
}

impl AuditRecord {
    pub(crate) fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        let hash: String = column(row, "hash")?;
        Ok(Self {
            sequence: unsigned(row, "sequence")?,
            at_us: column(row, "at_us")?,
            actor: column(row, "actor")?,
            action: column(row, "action")?,
            subject: column(row, "subject")?,
            detail: document(row, "detail")?,
            hash: Digest::try_from(hash).map_err(|e| RegistryError::malformed("hash", e))?,
        })
    }

    /// The head after this entry, which has to be the one that comes next.
    ///
    /// # Errors
    /// It is not.
    pub fn follows(&self, head: Head) -> Result<Head, NotNext> {
        let next = self.after(head).map_err(NotNext::Malformed)?;
        if self.sequence != next.seq {
            return Err(NotNext::Number { found: self.sequence, expected: next.seq });
        }
        if self.hash == next.hash { Ok(next) } else { Err(NotNext::Hash) }
    }

    /// What is hashed of it: the same bytes for chain and tree.
    ///
    /// # Errors
    /// It can't be written as canonical JSON.
    pub fn canonical(&self) -> Result<Vec<u8>, RegistryError> {
        let payload = Payload {
            sequence: self.sequence,
            at_us: self.at_us,
            actor: &self.actor,
            action: &self.action,
            subject: &self.subject,
            detail: &self.detail,
        };
        serde_json_canonicalizer::to_vec(&payload).map_err(|e| RegistryError::malformed("audit detail", e))
    }

    /// The head of the chain after this entry.
    fn after(&self, head: Head) -> Result<Head, RegistryError> {
        Ok(head.append(&self.canonical()?))
    }
}

impl Tx {
    /// Appends an entry; it becomes durable with the rest of this transaction.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit(
        &mut self,
        actor: &str,
        action: &str,
        subject: &str,
        detail: Value,
    ) -> Result<(), RegistryError> {
        let end = self.audit_end().await?;
        let mut entry = AuditRecord {
            sequence: end.head.seq + 1,
            at_us: self.now_us(),
            actor: plain(actor),
            action: plain(action),
            subject: plain(subject),
            detail,
            hash: end.head.hash,
        };
        let canonical = entry.canonical()?;
        entry.hash = end.head.append(&canonical).hash;
        // A tree that does not stand where the chain does (of an older version, or damaged) is not built upon.
        let tree = end.tree.filter(|tree| tree.size() == end.head.seq);
        let grown = tree.map(|mut tree| (tree.push(merkle::leaf(&canonical)), tree));
        self.insert_entry(entry, grown).await
    }

    async fn insert_entry(
        &mut self,
        entry: AuditRecord,
        grown: Option<(Vec<merkle::TreeHash>, Frontier)>,
    ) -> Result<(), RegistryError> {
        let sequence = crate::tx::signed("sequence", entry.sequence)?;
        let hash = entry.hash.to_string();
        let sql = "INSERT INTO audit (sequence, at_us, actor, action, subject, detail, hash, nodes) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
        let query = sqlx::query(sql)
            .bind(sequence)
            .bind(entry.at_us)
            .bind(entry.actor)
            .bind(entry.action)
            .bind(entry.subject)
            .bind(entry.detail.to_string())
            .bind(hash.clone())
            .bind(grown.as_ref().map(|(nodes, _)| crate::tree::bytes_of(nodes)));
        self.insert(|| format!("audit entry {sequence}"), query).await?;
        let sql = match &grown {
            Some(_) => {
                "INSERT INTO audit_head (id, sequence, hash, tree_size, frontier) VALUES (1, $1, $2, $1, $3) \
                 ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash, \
                 tree_size = excluded.tree_size, frontier = excluded.frontier"
            }
            None => {
                "INSERT INTO audit_head (id, sequence, hash) VALUES (1, $1, $2) \
                 ON CONFLICT (id) DO UPDATE SET sequence = excluded.sequence, hash = excluded.hash"
            }
        };
        let query = sqlx::query(sql).bind(sequence).bind(hash);
        let query = match grown {
            Some((_, tree)) => query.bind(tree.to_bytes()),
            None => query,
        };
        self.execute(query).await.map(|_| ())
    }

    /// How the log ends. A log without entries has an empty tree.
    pub(crate) async fn audit_end(&mut self) -> Result<End, RegistryError> {
        let Some(row) = self.optional(sqlx::query("SELECT * FROM audit_head WHERE id = 1")).await? else {
            return Ok(End { head: Head::genesis(CHAIN), tree: Some(Frontier::default()) });
        };
        let hash: String = column(&row, "hash")?;
        let hash = Digest::try_from(hash).map_err(|e| RegistryError::malformed("hash", e))?;
        let size: Option<i64> = column(&row, "tree_size")?;
        let frontier: Option<Vec<u8>> = column(&row, "frontier")?;
        let size = u64::try_from(size.unwrap_or(0)).ok();
        let tree = size.and_then(|size| Frontier::from_bytes(size, &frontier.unwrap_or_default()));
        Ok(End { head: Head { seq: unsigned(&row, "sequence")?, hash }, tree })
    }

    /// Sequence number and hash of the last entry.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit_head(&mut self) -> Result<(u64, Digest), RegistryError> {
        let End { head, .. } = self.audit_end().await?;
        Ok((head.seq, head.hash))
    }

    /// Whether the log holds an entry with this number and hash. A cheap look at one row; it proves nothing of the others.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit_holds(&mut self, sequence: u64, hash: Digest) -> Result<bool, RegistryError> {
        let Some(before) = sequence.checked_sub(1) else { return Ok(true) };
        let found = self.audit_entries(before, 1).await?;
        Ok(found.first().is_some_and(|entry| entry.sequence == sequence && entry.hash == hash))
    }

    /// Entries after a sequence number, oldest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit_entries(&mut self, after: u64, limit: u32) -> Result<Vec<AuditRecord>, RegistryError> {
        let rows = self.audit_rows(after, i64::from(limit)).await?;
        rows.iter().map(AuditRecord::read).collect()
    }

    pub(crate) async fn audit_rows(&mut self, after: u64, limit: i64) -> Result<Vec<AnyRow>, RegistryError> {
        let sql = "SELECT * FROM audit WHERE sequence > $1 ORDER BY sequence LIMIT $2";
        self.all(sqlx::query(sql).bind(crate::tx::signed("sequence", after)?).bind(limit)).await
    }

    /// Verifies the whole chain, the head row, and (where given) that the chain holds the anchor that was kept
    /// outside of the database.
    ///
    /// # Errors
    /// Those of the database; a broken chain is a verdict, not an error.
    pub async fn verify_audit(
        &mut self,
        anchor: Option<(u64, Digest)>,
    ) -> Result<AuditVerdict, RegistryError> {
        let mut head = Head::genesis(CHAIN);
        let mut tree = crate::tree::Walk::default();
        loop {
            let rows = self.audit_rows(head.seq, PAGE_ENTRIES).await?;
            if rows.is_empty() {
                break;
            }
            for row in &rows {
                let next = check_next(row, head, anchor)
                    .and_then(|(entry, next)| tree.step(row, &entry).map(|()| next));
                match next {
                    Ok(next) => head = next,
                    Err(detail) => {
                        let (first_bad, entries) = (head.seq + 1, head.seq);
                        return Ok(AuditVerdict::Broken { first_bad, detail, entries });
                    }
                }
            }
        }
        let entries = head.seq;
        let (last, last_hash) = self.audit_head().await?;
        let known = last.max(anchor.map_or(0, |(sequence, _)| sequence));
        if known > entries {
            let detail = format!("entries {} to {known} were removed", entries + 1);
            return Ok(AuditVerdict::Broken { first_bad: entries + 1, detail, entries });
        }
        if (last, last_hash) != (entries, head.hash) {
            let detail =
                format!("the head names entry {last}, the chain ends at {entries} with another hash");
            return Ok(AuditVerdict::Broken { first_bad: last.max(1), detail, entries });
        }
        let stored = self.audit_end().await?.tree;
        if let Some((first_bad, detail)) = tree.ends(stored.as_ref()) {
            return Ok(AuditVerdict::Broken { first_bad, detail, entries });
        }
        Ok(AuditVerdict::Whole { entries, head: head.hash })
    }
}

/// The next entry and the head after it, or what is wrong with it.
fn check_next(
    row: &AnyRow,
    head: Head,
    anchor: Option<(u64, Digest)>,
) -> Result<(AuditRecord, Head), String> {
    let entry = AuditRecord::read(row).map_err(|e| e.to_string())?;
    if entry.sequence != head.seq + 1 {
        return Err(format!("entry {} is missing, {} follows", head.seq + 1, entry.sequence));
    }
    let next = entry.after(head).map_err(|e| e.to_string())?;
    if next.hash != entry.hash {
        return Err("its content does not match its hash".to_owned());
    }
    if anchor.is_some_and(|(sequence, hash)| sequence == entry.sequence && hash != entry.hash) {
        return Err(
            "the chain was rewritten: it differs from the anchor kept outside of the database".to_owned()
        );
    }
    Ok((entry, next))
}
