//! Host records.

use crate::error::RegistryError;
use crate::tx::{Tx, column, document, document_text, parsed_or_null, plain, variant, variant_text};
use serde::{Deserialize, Serialize};
use sqlx::any::AnyRow;
use types::host::{HostSpec, Interface};
use types::{HostName, Nonce};

/// How a host's record stands. Whether it is connected is the live session's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Enrolment {
    /// Recorded; its join token is not used yet.
    Enrolled,
    /// Joined.
    Joined,
    /// Set aside.
    Quarantined,
}

/// A host as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRow {
    /// What the admin enrolled.
    pub spec: HostSpec,
    /// How it stands.
    pub state: Enrolment,
    /// Raw Ed25519 key of its daemon, since it joined.
    pub signing_key: Option<Vec<u8>>,
    /// Id of its journal, since it joined.
    pub journal: Option<Nonce>,
    /// Serial of its last certificate.
    pub cert_serial: Option<String>,
    /// As it last reported.
    pub interfaces: Vec<Interface>,
    /// Version of its daemon.
    pub version: Option<String>,
    /// Microseconds since the Unix epoch.
    pub last_seen_us: Option<i64>,
}

impl HostRow {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &HostName {
        &self.spec.name
    }

    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            spec: document(row, "spec")?,
            state: variant(row, "state")?,
            signing_key: column(row, "signing_key")?,
            journal: parsed_or_null(row, "journal")?,
            cert_serial: column(row, "cert_serial")?,
            interfaces: document(row, "interfaces")?,
            version: column(row, "version")?,
            last_seen_us: column(row, "last_seen_us")?,
        })
    }
}

impl Tx {
    /// Adds a host's record.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when the name is taken.
    pub async fn add_host(&mut self, spec: &HostSpec) -> Result<(), RegistryError> {
        let sql =
            "INSERT INTO hosts (name, spec, state, interfaces, created_at_us) VALUES ($1, $2, $3, '[]', $4)";
        let query = sqlx::query(sql)
            .bind(spec.name.to_string())
            .bind(document_text("spec", spec)?)
            .bind(variant_text(&Enrolment::Enrolled))
            .bind(self.now_us());
        self.insert(|| format!("host {}", spec.name), query).await
    }

    /// One host.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn host(&mut self, name: &HostName) -> Result<Option<HostRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM hosts WHERE name = $1").bind(name.to_string());
        self.optional(query).await?.as_ref().map(HostRow::read).transpose()
    }

    /// Every host, by name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn hosts(&mut self) -> Result<Vec<HostRow>, RegistryError> {
        let rows = self.all(sqlx::query("SELECT * FROM hosts ORDER BY name")).await?;
        rows.iter().map(HostRow::read).collect()
    }

    /// Records that a host joined with these keys.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn host_joined(
        &mut self,
        name: &HostName,
        signing_key: &[u8],
        journal: Nonce,
        cert_serial: &str,
        interfaces: &[Interface],
    ) -> Result<(), RegistryError> {
        let sql = "UPDATE hosts SET state = $2, signing_key = $3, journal = $4, cert_serial = $5, interfaces = $6 \
                   WHERE name = $1";
        let query = sqlx::query(sql)
            .bind(name.to_string())
            .bind(variant_text(&Enrolment::Joined))
            .bind(signing_key.to_vec())
            .bind(journal.to_string())
            .bind(plain(cert_serial))
            .bind(document_text("interfaces", &interfaces)?);
        self.execute(query).await.map(|_| ())
    }

    /// Records what a host said when it connected.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn host_seen(
        &mut self,
        name: &HostName,
        version: &str,
        interfaces: &[Interface],
    ) -> Result<(), RegistryError> {
        let sql = "UPDATE hosts SET version = $2, interfaces = $3, last_seen_us = $4 WHERE name = $1";
        let query = sqlx::query(sql)
            .bind(name.to_string())
            .bind(plain(version))
            .bind(document_text("interfaces", &interfaces)?)
            .bind(self.now_us());
        self.execute(query).await.map(|_| ())
    }

    /// Sets a host's standing.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn set_host_state(&mut self, name: &HostName, state: Enrolment) -> Result<(), RegistryError> {
        let query = sqlx::query("UPDATE hosts SET state = $2 WHERE name = $1")
            .bind(name.to_string())
            .bind(variant_text(&state));
        self.execute(query).await.map(|_| ())
    }
}
