//! The database module: records, transactions, the audit chain.
//!
//! Every decision of the manager is one named transaction ([`Registry::begin`] … [`Tx::commit`]) that holds
//! the rows *and* the audit entry of the decision, so that neither exists without the other. One manager
//! keeps its registry in an embedded SQLite file (WAL, `synchronous=FULL`); several share a PostgreSQL
//! server. The statements use text, 64-bit integers and blobs only, and are the same on both; there is a
//! folder of migrations for each.
//!
//! A transaction is a guard rather than a closure: writers take the write lock when they begin (and it is
//! there that "busy", or a server that was restarted, is met and retried), so that nothing inside ever has to
//! be run twice. docs/registry.md says how writers wait for each other, and for how long.
//!
//! Architecture invariant: no decisions here. Rows go in and out; who may do what is decided by the manager.

mod admission;
mod audit;
mod audit_of;
mod backend;
mod backup;
mod database;
mod error;
mod evidence;
mod hosts;
mod managers;
mod migrations;
mod platforms;
mod policies;
mod reconcile;
mod standing;
mod tokens;
mod tree;
mod tx;
mod vms;

pub use audit::{AuditRecord, AuditVerdict, NotNext, audit_start};
pub use backup::{BackupError, BackupHeader, back_up, restore};
pub use database::{Database, DatabaseError, Server};
pub use error::RegistryError;
pub use evidence::{EventRow, PermitRow, ReservationTotals, StatementRow};
pub use hosts::{Enrolment, HostRow};
pub use managers::{Acquired, Holder, Lease, MAX_LEASE_US, ManagerRow};
pub use migrations::MigrationRow;
pub use platforms::{PlatformRow, PlatformVerdict, QuoteRow, ReferenceRow};
pub use policies::{PlanRow, PolicyVersion};
pub use standing::{LogRow, ManagerKey, Standing};
pub use tokens::{ApiToken, JoinTokenRow, TokenUse};
pub use tree::AuditTip;
pub use tx::Tx;
pub use vms::{Location, VmRow};

use backend::{Again, Backend, CONNECTIONS, Session};
use sqlx::AnyPool;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tx::Writing;

/// How often a transaction tries to begin while another process holds the lock, before the registry counts as
/// unavailable.
const BUSY_ATTEMPTS: u32 = 4;
/// Rest between those tries.
const BUSY_RETRY: Duration = Duration::from_millis(50);
/// How often it tries when its connection turns out to be dead: every one of the pool may be, after a
/// restart.
const LOST_ATTEMPTS: u32 = CONNECTIONS + 2;
/// How long a transaction waits for those of this process that come before it: each is bounded on its own,
/// and a caller must not wait for all of them when the server hangs.
const QUEUE_LIMIT: Duration = Duration::from_secs(20);

/// The registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    pool: AnyPool,
    backend: Backend,
    writer: Arc<Mutex<()>>,
}

impl Registry {
    /// Opens the database (SQLite: creates it where needed) and brings its schema up to date.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when it cannot be read, written or brought up to date, or is a
    /// PostgreSQL server whose commits are not durable (`fsync=off`).
    pub async fn open(database: &Database) -> Result<Self, RegistryError> {
        let (pool, backend) = backend::open(database).await?;
        let registry = Self { pool, backend, writer: Arc::new(Mutex::new(())) };
        registry.grow_tree().await?;
        Ok(registry)
    }

    /// As it is: with the schema that it has, and nothing written.
    async fn open_as_it_is(database: &Database) -> Result<Self, RegistryError> {
        let (pool, backend) = backend::open_as_it_is(database).await?;
        Ok(Self { pool, backend, writer: Arc::new(Mutex::new(())) })
    }

    /// With these versions of the schema, and no later one.
    async fn open_up_to(database: &Database, versions: &[i64]) -> Result<Self, RegistryError> {
        let (pool, backend) = backend::open_up_to(database, versions).await?;
        Ok(Self { pool, backend, writer: Arc::new(Mutex::new(())) })
    }

    /// Hashes the entries that an older version wrote into the tree, a few at a time: others may write in between.
    async fn grow_tree(&self) -> Result<(), RegistryError> {
        loop {
            // Most often there is nothing to do, which a look tells.
            let end = self.read("audit tree").await?.audit_end().await?;
            if end.tree.is_none_or(|tree| tree.size() >= end.head.seq) {
                return Ok(());
            }
            let mut tx = self.begin("audit tree", 0).await?;
            let more = tx.grow_tree().await?;
            tx.commit().await?;
            if !more {
                return Ok(());
            }
        }
    }

    /// Begins a writing transaction. Dropping it rolls it back.
    ///
    /// `now_us` is the time (microseconds since the Unix epoch) that its rows and audit entries carry.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when the database stays locked or cannot be reached.
    pub async fn begin(&self, name: &'static str, now_us: i64) -> Result<Tx, RegistryError> {
        let waiting = tokio::time::timeout(QUEUE_LIMIT, Arc::clone(&self.writer).lock_owned());
        let writer = waiting.await.map_err(|_| RegistryError::from_sqlx(name, sqlx::Error::PoolTimedOut))?;
        self.begin_after(name, now_us, writer).await.map_err(|e| RegistryError::from_sqlx(name, e))
    }

    async fn begin_after(
        &self,
        name: &'static str,
        now_us: i64,
        writer: OwnedMutexGuard<()>,
    ) -> Result<Tx, sqlx::Error> {
        let (mut busy, mut lost) = (0, 0);
        loop {
            let mut session = Session::acquire(&self.pool).await?;
            let error = match self.backend.begin_writing(session.connection()).await {
                Ok(number) => {
                    let writing = Writing { _writer: writer, number };
                    return Ok(Tx::begun(name, now_us, (&self.backend, &self.pool), session, Some(writing)));
                }
                Err(error) => error,
            };
            // Cut, whatever it was: nobody knows how far the beginning came.
            drop(session);
            match self.backend.again(&error) {
                Again::Busy if busy + 1 < BUSY_ATTEMPTS => {
                    tracing::debug!(transaction = name, busy, "registry is busy, trying again");
                    (busy, lost) = (busy + 1, 0);
                    self.backend.end_holder(&self.pool).await;
                    tokio::time::sleep(BUSY_RETRY).await;
                }
                Again::Lost if lost + 1 < LOST_ATTEMPTS => lost += 1,
                Again::Busy | Again::Lost | Again::No => return Err(error),
            }
        }
    }

    /// Begins a reading transaction: one consistent picture.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when the database cannot be reached.
    pub async fn read(&self, name: &'static str) -> Result<Tx, RegistryError> {
        let mut lost = 0;
        loop {
            let failed = |e| RegistryError::from_sqlx(name, e);
            let mut session = Session::acquire(&self.pool).await.map_err(failed)?;
            match self.backend.begin_reading(session.connection()).await {
                Ok(()) => return Ok(Tx::begun(name, 0, (&self.backend, &self.pool), session, None)),
                Err(error) if self.backend.again(&error) == Again::Lost && lost + 1 < LOST_ATTEMPTS => {
                    lost += 1
                }
                Err(error) => return Err(failed(error)),
            }
        }
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
