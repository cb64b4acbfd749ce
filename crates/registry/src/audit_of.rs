//! The audit entries about one migration.

use crate::audit::AuditRecord;
use crate::error::RegistryError;
use crate::tx::Tx;
use types::MigrationId;

impl Tx {
    /// Entries whose detail names the migration, oldest first, at most `limit`. Reads the whole log.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn audit_of(
        &mut self,
        migration: MigrationId,
        limit: u32,
    ) -> Result<Vec<AuditRecord>, RegistryError> {
        let id = migration.to_string();
        let sql = "SELECT * FROM audit WHERE detail LIKE $1 ORDER BY sequence LIMIT $2";
        let rows = self.all(sqlx::query(sql).bind(format!("%{id}%")).bind(i64::from(limit))).await?;
        let entries = rows.iter().map(AuditRecord::read).collect::<Result<Vec<_>, _>>()?;
        let named = |entry: &AuditRecord| entry.detail.get("migration").and_then(|m| m.as_str()) == Some(&id);
        Ok(entries.into_iter().filter(named).collect())
    }
}
