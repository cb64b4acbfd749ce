//! Policy sets that were in force, and plans of maintenance.

use crate::error::RegistryError;
use crate::tx::{Tx, column, parsed, plain, signed, unsigned};
use sqlx::any::AnyRow;
use types::HostName;

/// A policy set and when it came into force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyVersion {
    /// Counts up by one; the last is in force.
    pub sequence: u64,
    /// Of its content.
    pub digest: String,
    /// The document.
    pub content: String,
    /// Who applied it.
    pub applied_by: String,
    /// Microseconds since the Unix epoch.
    pub applied_at_us: i64,
}

impl PolicyVersion {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            sequence: unsigned(row, "sequence")?,
            digest: column(row, "digest")?,
            content: column(row, "content")?,
            applied_by: column(row, "applied_by")?,
            applied_at_us: column(row, "applied_at_us")?,
        })
    }
}

/// A plan of maintenance, as it was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRow {
    /// Its id.
    pub id: String,
    /// The host that it is about.
    pub host: HostName,
    /// The signed document.
    pub token: Vec<u8>,
    /// Who made it.
    pub created_by: String,
    /// Microseconds since the Unix epoch.
    pub created_at_us: i64,
    /// When it was taken back.
    pub revoked_at_us: Option<i64>,
}

impl PlanRow {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            id: column(row, "id")?,
            host: parsed(row, "host")?,
            token: column(row, "token")?,
            created_by: column(row, "created_by")?,
            created_at_us: column(row, "created_at_us")?,
            revoked_at_us: column(row, "revoked_at_us")?,
        })
    }
}

impl Tx {
    /// The number of the policy set that is in force; 0 when none was ever applied.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn policy_sequence(&mut self) -> Result<u64, RegistryError> {
        let sql = "SELECT COALESCE(MAX(sequence), 0) AS n FROM policy_versions";
        self.optional(sqlx::query(sql)).await?.as_ref().map_or(Ok(0), |row| unsigned(row, "n"))
    }

    /// The policy set that is in force, if one was applied.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn policy_in_force(&mut self) -> Result<Option<PolicyVersion>, RegistryError> {
        let query = sqlx::query("SELECT * FROM policy_versions ORDER BY sequence DESC LIMIT 1");
        self.optional(query).await?.as_ref().map(PolicyVersion::read).transpose()
    }

    /// The last set with this digest.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn policy_of_digest(&mut self, digest: &str) -> Result<Option<PolicyVersion>, RegistryError> {
        let sql = "SELECT * FROM policy_versions WHERE digest = $1 ORDER BY sequence DESC LIMIT 1";
        let row = self.optional(sqlx::query(sql).bind(plain(digest))).await?;
        row.as_ref().map(PolicyVersion::read).transpose()
    }

    /// The latest sets, newest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn policy_history(&mut self, limit: u32) -> Result<Vec<PolicyVersion>, RegistryError> {
        let query = sqlx::query("SELECT * FROM policy_versions ORDER BY sequence DESC LIMIT $1");
        self.all(query.bind(i64::from(limit))).await?.iter().map(PolicyVersion::read).collect()
    }

    /// Puts a policy set into force; gives its number.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn apply_policy(
        &mut self,
        digest: &str,
        content: &str,
        applied_by: &str,
    ) -> Result<u64, RegistryError> {
        let sequence = self.policy_sequence().await? + 1;
        let sql = "INSERT INTO policy_versions (sequence, digest, content, applied_by, applied_at_us) \
                   VALUES ($1, $2, $3, $4, $5)";
        let query = sqlx::query(sql)
            .bind(signed("sequence", sequence)?)
            .bind(plain(digest))
            .bind(plain(content))
            .bind(plain(applied_by))
            .bind(self.now_us());
        self.insert(|| format!("policy version {sequence}"), query).await?;
        Ok(sequence)
    }

    /// Keeps a plan.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when there is one with its id.
    pub async fn add_plan(&mut self, plan: &PlanRow) -> Result<(), RegistryError> {
        let sql = "INSERT INTO maintenance_plans (id, host, token, created_by, created_at_us) \
                   VALUES ($1, $2, $3, $4, $5)";
        let query = sqlx::query(sql)
            .bind(plain(&plan.id))
            .bind(plan.host.to_string())
            .bind(plan.token.clone())
            .bind(plain(&plan.created_by))
            .bind(plan.created_at_us);
        self.insert(|| format!("plan {}", plan.id), query).await
    }

    /// A plan by its id.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn plan(&mut self, id: &str) -> Result<Option<PlanRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM maintenance_plans WHERE id = $1").bind(plain(id));
        self.optional(query).await?.as_ref().map(PlanRow::read).transpose()
    }

    /// The latest plans, newest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn plans(&mut self, limit: u32) -> Result<Vec<PlanRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM maintenance_plans ORDER BY created_at_us DESC, id LIMIT $1");
        self.all(query.bind(i64::from(limit))).await?.iter().map(PlanRow::read).collect()
    }

    /// Takes a plan back; whether there was one in force.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn revoke_plan(&mut self, id: &str) -> Result<bool, RegistryError> {
        let sql = "UPDATE maintenance_plans SET revoked_at_us = $2 WHERE id = $1 AND revoked_at_us IS NULL";
        let query = sqlx::query(sql).bind(plain(id)).bind(self.now_us());
        Ok(self.execute(query).await? == 1)
    }
}
