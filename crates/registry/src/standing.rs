//! Which log this registry holds, and whether what it remembers may be decided by.
//!
//! A registry that was restored from a backup, or whose log lacks what was signed, keeps that in its own row, so that a
//! restart forgets it no more than another manager overlooks it. Only an operator's reconciliation ends it.

use crate::error::RegistryError;
use crate::tx::{Tx, column, parsed, plain, signed, unsigned};
use serde::{Deserialize, Serialize};
use sqlx::any::AnyRow;
use types::Nonce;

/// Whether the registry is known to hold everything that it ever said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is.
    Trusted,
    /// It was restored from a backup.
    Restored,
    /// Its log lacks what was seen of it, or is another one.
    Distrusted,
}

/// The audit log's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRow {
    /// Which log.
    pub log: Nonce,
    /// How often an operator accepted a loss.
    pub generation: u64,
    /// How it stands.
    pub standing: Standing,
    /// Why, where it is not trusted.
    pub why: String,
    /// Since when, microseconds since the Unix epoch.
    pub since_us: i64,
    /// The first entry that is not what was seen, where that is known.
    pub first_bad: Option<u64>,
    /// When a loss was last accepted (0: never). Requests from before are not known any more, and count as used.
    pub accepted_at_us: i64,
}

impl LogRow {
    /// Of a log that begins.
    #[must_use]
    pub const fn new(log: Nonce, now_us: i64) -> Self {
        let standing = Standing::Trusted;
        let why = String::new();
        Self { log, generation: 0, standing, why, since_us: now_us, first_bad: None, accepted_at_us: 0 }
    }
}

/// A manager's key as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagerKey {
    /// Its id.
    pub key_id: String,
    /// Whose it is.
    pub manager: String,
    /// Raw Ed25519.
    pub public_key: Vec<u8>,
}

impl ManagerKey {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            key_id: column(row, "key_id")?,
            manager: column(row, "manager")?,
            public_key: column(row, "public_key")?,
        })
    }
}

impl Tx {
    /// The log's row; `None` before the first manager ran.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit_log(&mut self) -> Result<Option<LogRow>, RegistryError> {
        let Some(row) = self.optional(sqlx::query("SELECT * FROM audit_log WHERE id = 1")).await? else {
            return Ok(None);
        };
        let first_bad: Option<i64> = column(&row, "first_bad")?;
        Ok(Some(LogRow {
            log: parsed(&row, "log")?,
            generation: unsigned(&row, "generation")?,
            standing: crate::tx::variant(&row, "standing")?,
            why: column(&row, "why")?,
            since_us: column(&row, "since_us")?,
            first_bad: first_bad.and_then(|n| u64::try_from(n).ok()),
            accepted_at_us: column(&row, "accepted_at_us")?,
        }))
    }

    /// Writes the log's row.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn put_audit_log(&mut self, row: &LogRow) -> Result<(), RegistryError> {
        let sql = "INSERT INTO audit_log (id, log, generation, standing, why, since_us, first_bad, accepted_at_us) \
                   VALUES (1, $1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO UPDATE SET log = excluded.log, \
                   generation = excluded.generation, standing = excluded.standing, why = excluded.why, \
                   since_us = excluded.since_us, first_bad = excluded.first_bad, \
                   accepted_at_us = excluded.accepted_at_us";
        let first_bad = row.first_bad.map(|n| signed("first_bad", n)).transpose()?;
        let query = sqlx::query(sql)
            .bind(row.log.to_string())
            .bind(signed("generation", row.generation)?)
            .bind(crate::tx::variant_text(&row.standing))
            .bind(plain(&row.why))
            .bind(row.since_us)
            .bind(first_bad)
            .bind(row.accepted_at_us);
        self.execute(query).await.map(|_| ())
    }

    /// Notes a manager's key. Returns whether it is new.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn note_manager_key(&mut self, key: &ManagerKey) -> Result<bool, RegistryError> {
        let sql = "INSERT INTO manager_keys (key_id, manager, public_key, first_seen_us) VALUES ($1, $2, $3, $4) \
                   ON CONFLICT (key_id) DO NOTHING";
        let query = sqlx::query(sql)
            .bind(plain(&key.key_id))
            .bind(plain(&key.manager))
            .bind(key.public_key.clone())
            .bind(self.now_us());
        Ok(self.execute(query).await? == 1)
    }

    /// Every key.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn manager_keys(&mut self) -> Result<Vec<ManagerKey>, RegistryError> {
        let query = sqlx::query("SELECT * FROM manager_keys ORDER BY first_seen_us, key_id");
        self.all(query).await?.iter().map(ManagerKey::read).collect()
    }

    /// The key of this id.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn manager_key(&mut self, key_id: &str) -> Result<Option<ManagerKey>, RegistryError> {
        let query = sqlx::query("SELECT * FROM manager_keys WHERE key_id = $1").bind(plain(key_id));
        self.optional(query).await?.as_ref().map(ManagerKey::read).transpose()
    }
}
