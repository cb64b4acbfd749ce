//! What hosts are measured against, and what they proved. The documents are the manager's to read: here they are text.

use crate::error::RegistryError;
use crate::tx::{Tx, column, parsed, plain};
use sqlx::any::AnyRow;
use types::{HostName, MigrationId, Side};

/// A host's enrolled platform, and what came of the last question to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformRow {
    /// The host.
    pub host: HostName,
    /// What quotes are appraised against, JSON.
    pub enrolled: String,
    /// Microseconds since the Unix epoch.
    pub enrolled_at_us: i64,
    /// The TPM's clock in the last good quote, JSON.
    pub clock: Option<String>,
    /// What came of the last question.
    pub verdict: Option<PlatformVerdict>,
}

/// What came of one question to a platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformVerdict {
    /// Whether it is trusted.
    pub trusted: bool,
    /// Microseconds since the Unix epoch.
    pub at_us: i64,
    /// Why it is not.
    pub reason: Option<String>,
    /// The record of the appraisal, JSON; none where there was no evidence.
    pub appraisal: Option<String>,
}

/// Reference values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceRow {
    /// `host/NAME` or `class/NAME`.
    pub scope: String,
    /// The values, JSON.
    pub document: String,
    /// Microseconds since the Unix epoch.
    pub set_at_us: i64,
    /// Who set them.
    pub set_by: String,
}

/// A quote on which a migration rests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuoteRow {
    /// Which side of the migration the host is.
    pub side: Side,
    /// `permit` or `convergence`.
    pub stage: String,
    /// What it is about, JSON.
    pub binding: String,
    /// As the host sent it.
    pub evidence: Vec<u8>,
    /// What came of it, JSON.
    pub appraisal: String,
    /// Microseconds since the Unix epoch.
    pub taken_at_us: i64,
}

const TRUSTED: &str = "trusted";
const REFUSED: &str = "refused";

impl PlatformRow {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        let verdict: Option<String> = column(row, "verdict")?;
        let at_us: Option<i64> = column(row, "verdict_at_us")?;
        let verdict = match (verdict, at_us) {
            (Some(verdict), Some(at_us)) => Some(PlatformVerdict {
                trusted: verdict == TRUSTED,
                at_us,
                reason: column(row, "reason")?,
                appraisal: column(row, "appraisal")?,
            }),
            _ => None,
        };
        Ok(Self {
            host: parsed(row, "host")?,
            enrolled: column(row, "enrolled")?,
            enrolled_at_us: column(row, "enrolled_at_us")?,
            clock: column(row, "clock")?,
            verdict,
        })
    }
}

impl Tx {
    /// A host's platform.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn platform(&mut self, host: &HostName) -> Result<Option<PlatformRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM platforms WHERE host = $1").bind(host.to_string());
        self.optional(query).await?.as_ref().map(PlatformRow::read).transpose()
    }

    /// Records that a host proved its TPM; what was known of another one is forgotten.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn enrol_platform(&mut self, host: &HostName, enrolled: &str) -> Result<(), RegistryError> {
        let sql = "INSERT INTO platforms (host, enrolled, enrolled_at_us) VALUES ($1, $2, $3) \
                   ON CONFLICT (host) DO UPDATE SET enrolled = excluded.enrolled, \
                   enrolled_at_us = excluded.enrolled_at_us, clock = NULL, verdict = NULL, verdict_at_us = NULL, \
                   reason = NULL, appraisal = NULL";
        let query = sqlx::query(sql).bind(host.to_string()).bind(enrolled.to_owned()).bind(self.now_us());
        self.execute(query).await.map(|_| ())
    }

    /// Records what came of a question; a clock only with a good quote.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn platform_appraised(
        &mut self,
        host: &HostName,
        verdict: &PlatformVerdict,
        clock: Option<&str>,
    ) -> Result<(), RegistryError> {
        let sql = "UPDATE platforms SET verdict = $2, verdict_at_us = $3, reason = $4, appraisal = $5, \
                   clock = COALESCE($6, clock) WHERE host = $1";
        let query = sqlx::query(sql)
            .bind(host.to_string())
            .bind(if verdict.trusted { TRUSTED } else { REFUSED })
            .bind(verdict.at_us)
            .bind(verdict.reason.as_deref().map(plain))
            .bind(verdict.appraisal.clone())
            .bind(clock.map(str::to_owned));
        self.execute(query).await.map(|_| ())
    }

    /// The reference values of a scope.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn reference(&mut self, scope: &str) -> Result<Option<ReferenceRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM reference_values WHERE scope = $1").bind(scope.to_owned());
        self.optional(query).await?.as_ref().map(reference_row).transpose()
    }

    /// All reference values, by scope.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn references(&mut self) -> Result<Vec<ReferenceRow>, RegistryError> {
        let rows = self.all(sqlx::query("SELECT * FROM reference_values ORDER BY scope")).await?;
        rows.iter().map(reference_row).collect()
    }

    /// Sets the reference values of a scope.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn set_reference(
        &mut self,
        scope: &str,
        document: &str,
        by: &str,
    ) -> Result<(), RegistryError> {
        let sql = "INSERT INTO reference_values (scope, document, set_at_us, set_by) VALUES ($1, $2, $3, $4) \
                   ON CONFLICT (scope) DO UPDATE SET document = excluded.document, \
                   set_at_us = excluded.set_at_us, set_by = excluded.set_by";
        let query = sqlx::query(sql)
            .bind(scope.to_owned())
            .bind(document.to_owned())
            .bind(self.now_us())
            .bind(plain(by));
        self.execute(query).await.map(|_| ())
    }

    /// Removes the reference values of a scope. Returns whether there were any.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn remove_reference(&mut self, scope: &str) -> Result<bool, RegistryError> {
        let query = sqlx::query("DELETE FROM reference_values WHERE scope = $1").bind(scope.to_owned());
        Ok(self.execute(query).await? > 0)
    }

    /// Keeps a quote of a migration; a later one of the same stage takes its place.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn put_quote(&mut self, migration: MigrationId, quote: &QuoteRow) -> Result<(), RegistryError> {
        let sql = "INSERT INTO quotes (migration, side, stage, binding, evidence, appraisal, taken_at_us) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7) \
                   ON CONFLICT (migration, side, stage) DO UPDATE SET binding = excluded.binding, \
                   evidence = excluded.evidence, appraisal = excluded.appraisal, \
                   taken_at_us = excluded.taken_at_us";
        let query = sqlx::query(sql)
            .bind(migration.to_string())
            .bind(quote.side.to_string())
            .bind(quote.stage.clone())
            .bind(quote.binding.clone())
            .bind(quote.evidence.clone())
            .bind(quote.appraisal.clone())
            .bind(quote.taken_at_us);
        self.execute(query).await.map(|_| ())
    }

    /// The quotes of a migration.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn quotes(&mut self, migration: MigrationId) -> Result<Vec<QuoteRow>, RegistryError> {
        let sql = "SELECT * FROM quotes WHERE migration = $1 ORDER BY stage DESC, side";
        let rows = self.all(sqlx::query(sql).bind(migration.to_string())).await?;
        rows.iter().map(quote_row).collect()
    }
}

fn reference_row(row: &AnyRow) -> Result<ReferenceRow, RegistryError> {
    Ok(ReferenceRow {
        scope: column(row, "scope")?,
        document: column(row, "document")?,
        set_at_us: column(row, "set_at_us")?,
        set_by: column(row, "set_by")?,
    })
}

fn quote_row(row: &AnyRow) -> Result<QuoteRow, RegistryError> {
    Ok(QuoteRow {
        side: crate::tx::variant(row, "side")?,
        stage: column(row, "stage")?,
        binding: column(row, "binding")?,
        evidence: column(row, "evidence")?,
        appraisal: column(row, "appraisal")?,
        taken_at_us: column(row, "taken_at_us")?,
    })
}
