//! The database module: records, transactions, the audit chain.
//!
//! Every decision of the manager is one named transaction ([`Registry::begin`] … [`Tx::commit`]) that holds the
//! rows *and* the audit entry of the decision, so that neither exists without the other. SQLite is embedded
//! (WAL, `synchronous=FULL`); the statements use text, 64-bit integers and blobs only, so that PostgreSQL needs
//! a folder of migrations and nothing else.
//!
//! A transaction is a guard rather than a closure: writers take the write lock when they begin (and it is there
//! that "busy" is met and retried), so that nothing inside ever has to be run twice.
//!
//! Architecture invariant: no decisions here. Rows go in and out; who may do what is decided by the manager.

mod audit;
mod error;
mod evidence;
mod hosts;
mod migrations;
mod tokens;
mod tx;
mod vms;

pub use audit::{AuditRecord, AuditVerdict};
pub use error::RegistryError;
pub use evidence::{EventRow, PermitRow, ReservationTotals, StatementRow};
pub use hosts::{Enrolment, HostRow};
pub use migrations::MigrationRow;
pub use tokens::{ApiToken, JoinTokenRow, TokenUse};
pub use tx::Tx;
pub use vms::{Location, VmRow};

use futures::FutureExt;
use sqlx::any::AnyPoolOptions;
use sqlx::{AnyPool, Executor};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Readers beside the one writer: handlers of the API and one reconciler for each open migration.
const CONNECTIONS: u32 = 6;
/// How long a connection waits for another one's lock before SQLite says "busy".
const BUSY_TIMEOUT_MS: u32 = 2_000;
/// How often a transaction tries to begin before the registry counts as unavailable.
const BEGIN_ATTEMPTS: u32 = 4;
/// Rest between those tries.
const BEGIN_RETRY_MS: u64 = 50;

/// The registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    pool: AnyPool,
    writer: Arc<Mutex<()>>,
}

impl Registry {
    /// Opens (and where needed creates) the SQLite file at `path` and brings its schema up to date.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when it cannot be read, written or brought up to date.
    pub async fn open(path: &Path) -> Result<Self, RegistryError> {
        sqlx::any::install_default_drivers();
        let url = format!("sqlite://{}?mode=rwc", path.display());
        let pool = AnyPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(Duration::from_secs(5))
            // A file does not go away like a server does; the ping would stand in the way of every commit.
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                async move {
                    let pragmas = sqlx::AssertSqlSafe(format!(
                        "PRAGMA busy_timeout={BUSY_TIMEOUT_MS}; PRAGMA journal_mode=WAL; \
                         PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;"
                    ));
                    connection.execute(sqlx::raw_sql(pragmas)).await.map(|_| ())
                }
                .boxed()
            })
            .connect(&url)
            .await
            .map_err(|e| RegistryError::from_sqlx("open", e))?;
        sqlx::migrate!("migrations/sqlite").run(&pool).await.map_err(|e| RegistryError::Unavailable {
            operation: "bring the schema up to date",
            source: sqlx::Error::Migrate(Box::new(e)),
        })?;
        Ok(Self { pool, writer: Arc::new(Mutex::new(())) })
    }

    /// Begins a writing transaction. Dropping it rolls it back.
    ///
    /// `now_us` is the time (microseconds since the Unix epoch) that its rows and audit entries carry.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when the database stays locked or cannot be reached.
    pub async fn begin(&self, name: &'static str, now_us: i64) -> Result<Tx, RegistryError> {
        let mut writer = Arc::clone(&self.writer).lock_owned().await;
        let mut attempt = 1;
        loop {
            let connection = self.pool.acquire().await.map_err(|e| RegistryError::from_sqlx(name, e))?;
            match Tx::writing(name, now_us, connection, writer).await {
                Ok(tx) => return Ok(tx),
                Err((error, back)) if attempt < BEGIN_ATTEMPTS && error::is_busy(&error) => {
                    tracing::debug!(transaction = name, attempt, "registry is busy, trying again");
                    tokio::time::sleep(Duration::from_millis(BEGIN_RETRY_MS)).await;
                    (attempt, writer) = (attempt + 1, back);
                }
                Err((error, _)) => return Err(RegistryError::from_sqlx(name, error)),
            }
        }
    }

    /// Begins a reading transaction: one consistent picture.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when the database cannot be reached.
    pub async fn read(&self, name: &'static str) -> Result<Tx, RegistryError> {
        let transaction = self.pool.begin().await.map_err(|e| RegistryError::from_sqlx(name, e))?;
        Ok(Tx::reading(name, transaction))
    }

    /// Whether it can be written now: an empty, committed change.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] with what the database said.
    pub async fn probe(&self, now_us: i64) -> Result<(), RegistryError> {
        let mut tx = self.begin("probe", now_us).await?;
        tx.touch().await?;
        tx.commit().await
    }

    /// Closes every connection; what was committed is on disk already.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
