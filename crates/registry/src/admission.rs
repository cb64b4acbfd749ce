//! What admission asks of the rows.

use crate::error::RegistryError;
use crate::tx::{Tx, unsigned};
use types::{HostName, MigrationId};

impl Tx {
    /// Memory that migrations other than this one have reserved on a host and had not taken there by `since_us`
    /// (microseconds since the Unix epoch): a measurement of that moment does not show it. A target that says that it
    /// is prepared has taken it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn pending_on(
        &mut self,
        host: &HostName,
        migration: MigrationId,
        since_us: i64,
    ) -> Result<u64, RegistryError> {
        let sql = "SELECT r.memory_bytes AS memory_bytes FROM reservations r \
                   JOIN permits p ON p.migration = r.migration WHERE r.host = $1 AND r.migration <> $2 \
                   AND (p.consumed_at_us IS NULL OR p.consumed_at_us > $3)";
        let query = sqlx::query(sql).bind(host.to_string()).bind(migration.to_string()).bind(since_us);
        let mut pending: u64 = 0;
        for row in self.all(query).await? {
            pending = pending.saturating_add(unsigned(&row, "memory_bytes")?);
        }
        Ok(pending)
    }
}
