//! What decisions rest on: permits, nonces, reservations, signed statements, events.

use crate::error::RegistryError;
use crate::tx::{Tx, column, document, parsed, plain, signed, unsigned};
use sqlx::any::AnyRow;
use types::permit::PermitClaims;
use types::{Digest, HostName, MigrationId, Nonce, VmId};

/// A permit as the registry holds it. The row is there before the permit is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PermitRow {
    /// What it says.
    pub claims: PermitClaims,
    /// Digest of the token, once signed.
    pub digest: Option<Digest>,
    /// The token, once signed.
    pub token: Option<Vec<u8>>,
    /// Microseconds since the Unix epoch.
    pub issued_at_us: i64,
    /// When the target said that it consumed it.
    pub consumed_at_us: Option<i64>,
}

/// What is promised to guests on a host: running ones by the registry, and reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReservationTotals {
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Guests.
    pub vms: u64,
}

/// A signed statement as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatementRow {
    /// Digest of the token.
    pub digest: Digest,
    /// Its kind, e.g. `frozen`.
    pub kind: String,
    /// Who signed.
    pub host: HostName,
    /// The token.
    pub token: Vec<u8>,
    /// Microseconds since the Unix epoch.
    pub received_at_us: i64,
}

/// Something that happened in a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Counts up by one in each migration.
    pub sequence: u64,
    /// Microseconds since the Unix epoch, by the sender's clock.
    pub at_us: i64,
    /// Which host (or `manager`) saw it.
    pub host: String,
    /// Its kind.
    pub kind: String,
    /// Details, JSON.
    pub detail: serde_json::Value,
}

fn digest_of(text: String) -> Result<Digest, RegistryError> {
    Digest::try_from(text).map_err(|e| RegistryError::malformed("digest", e))
}

impl Tx {
    /// Adds the permit of a migration, before it is signed.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the nonce was used, or the migration has a permit.
    pub async fn add_permit(&mut self, claims: &PermitClaims) -> Result<(), RegistryError> {
        let sql = "INSERT INTO permits (nonce, migration, claims, issued_at_us) VALUES ($1, $2, $3, $4)";
        let query = sqlx::query(sql)
            .bind(claims.nonce.to_string())
            .bind(claims.key.migration.to_string())
            .bind(crate::tx::document_text("claims", claims)?)
            .bind(self.now_us());
        self.insert(|| format!("a permit of {}", claims.key.migration), query).await
    }

    /// Keeps the signed token.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn permit_signed(
        &mut self,
        migration: MigrationId,
        digest: Digest,
        token: &[u8],
    ) -> Result<(), RegistryError> {
        let query =
            sqlx::query("UPDATE permits SET digest = $2, token = $3 WHERE migration = $1 AND token IS NULL")
                .bind(migration.to_string())
                .bind(digest.to_string())
                .bind(token.to_vec());
        self.execute(query).await.map(|_| ())
    }

    /// Marks a permit consumed; `false` when it was already.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn permit_consumed(&mut self, migration: MigrationId) -> Result<bool, RegistryError> {
        let sql = "UPDATE permits SET consumed_at_us = $2 WHERE migration = $1 AND consumed_at_us IS NULL";
        let query = sqlx::query(sql).bind(migration.to_string()).bind(self.now_us());
        Ok(self.execute(query).await? == 1)
    }

    /// The permit of a migration.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn permit(&mut self, migration: MigrationId) -> Result<Option<PermitRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM permits WHERE migration = $1").bind(migration.to_string());
        let Some(row) = self.optional(query).await? else { return Ok(None) };
        let digest: Option<String> = column(&row, "digest")?;
        Ok(Some(PermitRow {
            claims: document(&row, "claims")?,
            digest: digest.map(digest_of).transpose()?,
            token: column(&row, "token")?,
            issued_at_us: column(&row, "issued_at_us")?,
            consumed_at_us: column(&row, "consumed_at_us")?,
        }))
    }

    /// Uses a request's nonce; `false` when it was used before.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn use_nonce(&mut self, nonce: Nonce, by: &str) -> Result<bool, RegistryError> {
        let sql = "INSERT INTO request_nonces (nonce, used_by, seen_at_us) VALUES ($1, $2, $3) \
                   ON CONFLICT (nonce) DO NOTHING";
        let query = sqlx::query(sql).bind(nonce.to_string()).bind(plain(by)).bind(self.now_us());
        Ok(self.execute(query).await? == 1)
    }

    /// Forgets nonces seen before a time far outside of any request's validity.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn sweep_nonces(&mut self, seen_before_us: i64) -> Result<u64, RegistryError> {
        self.execute(sqlx::query("DELETE FROM request_nonces WHERE seen_at_us < $1").bind(seen_before_us))
            .await
    }

    /// Reserves room on a host for a migration.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the migration has a reservation.
    pub async fn reserve(
        &mut self,
        migration: MigrationId,
        host: &HostName,
        vm: VmId,
        memory_bytes: u64,
        vcpus: u32,
    ) -> Result<(), RegistryError> {
        let sql =
            "INSERT INTO reservations (migration, host, vm, memory_bytes, vcpus) VALUES ($1, $2, $3, $4, $5)";
        let query = sqlx::query(sql)
            .bind(migration.to_string())
            .bind(host.to_string())
            .bind(vm.to_string())
            .bind(signed("memory_bytes", memory_bytes)?)
            .bind(i64::from(vcpus));
        self.insert(|| format!("a reservation for {migration}"), query).await
    }

    /// Frees a migration's reservation, if it has one.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn free_reservation(&mut self, migration: MigrationId) -> Result<bool, RegistryError> {
        let query = sqlx::query("DELETE FROM reservations WHERE migration = $1").bind(migration.to_string());
        Ok(self.execute(query).await? == 1)
    }

    /// How many reservations there are.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn count_reservations(&mut self) -> Result<u64, RegistryError> {
        let row = self.optional(sqlx::query("SELECT COUNT(*) AS n FROM reservations")).await?;
        row.as_ref().map_or(Ok(0), |r| unsigned(r, "n"))
    }

    /// What is promised on a host: guests that the registry places there, and reservations of guests that it does
    /// not place there yet.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn promised_on(&mut self, host: &HostName) -> Result<ReservationTotals, RegistryError> {
        let placed = "SELECT memory_bytes, vcpus FROM vms WHERE host = $1";
        let reserved = "SELECT r.memory_bytes AS memory_bytes, r.vcpus AS vcpus FROM reservations r \
                        JOIN vms v ON v.uuid = r.vm WHERE r.host = $1 AND (v.host IS NULL OR v.host <> $1)";
        let mut totals = ReservationTotals::default();
        for sql in [placed, reserved] {
            for row in self.all(sqlx::query(sql).bind(host.to_string())).await? {
                totals.memory_bytes = totals.memory_bytes.saturating_add(unsigned(&row, "memory_bytes")?);
                totals.vcpus = totals.vcpus.saturating_add(unsigned(&row, "vcpus")?);
                totals.vms += 1;
            }
        }
        Ok(totals)
    }

    /// Keeps a signed statement; `false` when it is there already.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn add_statement(
        &mut self,
        migration: MigrationId,
        kind: &str,
        host: &HostName,
        digest: Digest,
        token: &[u8],
    ) -> Result<bool, RegistryError> {
        let sql = "INSERT INTO statements (digest, migration, kind, host, token, received_at_us) \
                   VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (digest) DO NOTHING";
        let query = sqlx::query(sql)
            .bind(digest.to_string())
            .bind(migration.to_string())
            .bind(plain(kind))
            .bind(host.to_string())
            .bind(token.to_vec())
            .bind(self.now_us());
        Ok(self.execute(query).await? == 1)
    }

    /// The statements of a migration, oldest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn statements(&mut self, migration: MigrationId) -> Result<Vec<StatementRow>, RegistryError> {
        let sql = "SELECT * FROM statements WHERE migration = $1 ORDER BY received_at_us, digest";
        let rows = self.all(sqlx::query(sql).bind(migration.to_string())).await?;
        rows.iter().map(read_statement).collect()
    }

    /// Keeps an event, unless the migration has `limit` of them already. Returns whether it was kept.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn add_event(
        &mut self,
        migration: MigrationId,
        event: &EventRow,
        limit: u64,
    ) -> Result<bool, RegistryError> {
        let count = "SELECT COALESCE(MAX(sequence), 0) AS n FROM migration_events WHERE migration = $1";
        let row = self.optional(sqlx::query(count).bind(migration.to_string())).await?;
        let last = row.as_ref().map_or(Ok(0), |r| unsigned(r, "n"))?;
        if last >= limit {
            return Ok(false);
        }
        let sql = "INSERT INTO migration_events (migration, sequence, at_us, host, kind, detail) \
                   VALUES ($1, $2, $3, $4, $5, $6)";
        let query = sqlx::query(sql)
            .bind(migration.to_string())
            .bind(signed("sequence", last + 1)?)
            .bind(event.at_us)
            .bind(plain(&event.host))
            .bind(plain(&event.kind))
            .bind(event.detail.to_string());
        self.execute(query).await?;
        Ok(true)
    }

    /// The events of a migration, oldest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn events(&mut self, migration: MigrationId) -> Result<Vec<EventRow>, RegistryError> {
        let sql = "SELECT * FROM migration_events WHERE migration = $1 ORDER BY sequence";
        let rows = self.all(sqlx::query(sql).bind(migration.to_string())).await?;
        rows.iter()
            .map(|row| {
                Ok(EventRow {
                    sequence: unsigned(row, "sequence")?,
                    at_us: column(row, "at_us")?,
                    host: column(row, "host")?,
                    kind: column(row, "kind")?,
                    detail: document(row, "detail")?,
                })
            })
            .collect()
    }
}

fn read_statement(row: &AnyRow) -> Result<StatementRow, RegistryError> {
    Ok(StatementRow {
        digest: digest_of(column(row, "digest")?)?,
        kind: column(row, "kind")?,
        host: parsed(row, "host")?,
        token: column(row, "token")?,
        received_at_us: column(row, "received_at_us")?,
    })
}
