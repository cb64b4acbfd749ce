//! Migrations: one row each, at most one open per VM.

use crate::error::RegistryError;
use crate::tx::{Tx, column, parsed, plain, variant, variant_text};
use sqlx::any::AnyRow;
use types::migration::MigrationState;
use types::{HostName, MigrationId, Name, Nonce, VmId};

/// A migration as the registry holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationRow {
    /// Its id.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The VM's name.
    pub vm_name: Name,
    /// Where it comes from.
    pub source: HostName,
    /// Where it goes.
    pub target: HostName,
    /// Where it stands.
    pub state: MigrationState,
    /// Whether anything is still to be done for it.
    pub open: bool,
    /// Whether someone holds it.
    pub suspended: bool,
    /// Who asked.
    pub requested_by: String,
    /// Microseconds since the Unix epoch.
    pub requested_at_us: i64,
    /// Microseconds since the Unix epoch.
    pub ended_at_us: Option<i64>,
    /// Names the operator's intent towards the source host.
    pub intent: Nonce,
    /// The row of the hand-over's decider, as JSON.
    pub handover: Option<String>,
    /// What is known for its report, as JSON.
    pub facts: String,
}

impl MigrationRow {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            id: parsed(row, "id")?,
            vm: parsed(row, "vm")?,
            vm_name: parsed(row, "vm_name")?,
            source: parsed(row, "source")?,
            target: parsed(row, "target")?,
            state: variant(row, "state")?,
            open: column::<i64>(row, "is_open")? != 0,
            suspended: column::<i64>(row, "suspended")? != 0,
            requested_by: column(row, "requested_by")?,
            requested_at_us: column(row, "requested_at_us")?,
            ended_at_us: column(row, "ended_at_us")?,
            intent: parsed(row, "intent")?,
            handover: column(row, "handover")?,
            facts: column(row, "facts")?,
        })
    }
}

impl Tx {
    /// Adds a migration.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when it is open and its VM has another open one.
    pub async fn add_migration(&mut self, row: &MigrationRow) -> Result<(), RegistryError> {
        let sql = "INSERT INTO migrations (id, vm, vm_name, source, target, state, is_open, suspended, requested_by, \
                   requested_at_us, ended_at_us, intent, handover, facts) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)";
        let query = sqlx::query(sql)
            .bind(row.id.to_string())
            .bind(row.vm.to_string())
            .bind(row.vm_name.to_string())
            .bind(row.source.to_string())
            .bind(row.target.to_string())
            .bind(variant_text(&row.state))
            .bind(i64::from(row.open))
            .bind(i64::from(row.suspended))
            .bind(plain(&row.requested_by))
            .bind(row.requested_at_us)
            .bind(row.ended_at_us)
            .bind(row.intent.to_string())
            .bind(row.handover.clone())
            .bind(row.facts.clone());
        self.insert(|| format!("an open migration of VM {}", row.vm_name), query).await
    }

    /// Writes back what may change of a migration.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn save_migration(&mut self, row: &MigrationRow) -> Result<(), RegistryError> {
        let sql = "UPDATE migrations SET state = $2, is_open = $3, suspended = $4, ended_at_us = $5, handover = $6, \
                   facts = $7 WHERE id = $1";
        let query = sqlx::query(sql)
            .bind(row.id.to_string())
            .bind(variant_text(&row.state))
            .bind(i64::from(row.open))
            .bind(i64::from(row.suspended))
            .bind(row.ended_at_us)
            .bind(row.handover.clone())
            .bind(row.facts.clone());
        self.execute(query).await.map(|_| ())
    }

    /// One migration.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn migration(&mut self, id: MigrationId) -> Result<Option<MigrationRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM migrations WHERE id = $1").bind(id.to_string());
        self.optional(query).await?.as_ref().map(MigrationRow::read).transpose()
    }

    /// The migration that an intent belongs to.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn migration_of_intent(
        &mut self,
        intent: Nonce,
    ) -> Result<Option<MigrationRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM migrations WHERE intent = $1").bind(intent.to_string());
        self.optional(query).await?.as_ref().map(MigrationRow::read).transpose()
    }

    /// The open migration of a VM.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn open_migration_of(&mut self, vm: VmId) -> Result<Option<MigrationRow>, RegistryError> {
        let query =
            sqlx::query("SELECT * FROM migrations WHERE vm = $1 AND is_open = 1").bind(vm.to_string());
        self.optional(query).await?.as_ref().map(MigrationRow::read).transpose()
    }

    /// Every open migration.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn open_migrations(&mut self) -> Result<Vec<MigrationRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM migrations WHERE is_open = 1 ORDER BY requested_at_us");
        self.all(query).await?.iter().map(MigrationRow::read).collect()
    }

    /// The latest migrations, newest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn migrations(&mut self, limit: u32) -> Result<Vec<MigrationRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM migrations ORDER BY requested_at_us DESC, id LIMIT $1")
            .bind(i64::from(limit));
        self.all(query).await?.iter().map(MigrationRow::read).collect()
    }

    /// How many migrations there are in each state, for the metrics.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn count_migrations(&mut self) -> Result<Vec<(MigrationState, u64)>, RegistryError> {
        let query = sqlx::query("SELECT state, COUNT(*) AS n FROM migrations GROUP BY state ORDER BY state");
        let rows = self.all(query).await?;
        rows.iter().map(|r| Ok((variant(r, "state")?, crate::tx::unsigned(r, "n")?))).collect()
    }
}
