//! What differs between SQLite and PostgreSQL: how a connection is set up, how a transaction begins, commits
//! and ends, how long anything may take, and what an error means for another try.
//!
//! Writers are serialised: on SQLite by `BEGIN IMMEDIATE`, on PostgreSQL by an advisory lock that every
//! writing transaction takes first, and that the server gives back when the transaction ends, however it
//! ends. A writer runs at READ COMMITTED, since a snapshot of a higher level would be taken before it has the
//! lock; with the lock held nobody else changes anything, and each statement sees all that was committed
//! before.
//!
//! A manager that stands still (SIGSTOP, a machine that swaps) inside a transaction would keep all others
//! from writing. The server ends its session after [`IDLE_IN_TRANSACTION_MS`]; one that is kept busy past
//! [`HOLDER_LIMIT_MS`] is ended by the next writer. Its transaction is gone then, and its commit fails.

use crate::database::{Database, Server};
use crate::error::{RegistryError, is_busy, is_lost};
use futures::FutureExt;
use sqlx::any::{Any, AnyPoolOptions, AnyRow};
use sqlx::migrate::Migrator;
use sqlx::pool::PoolConnection;
use sqlx::{AnyConnection, AnyPool, AssertSqlSafe, Executor, Row};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::runtime::Handle;

/// Readers beside the one writer: handlers of the API and one reconciler for each open migration.
pub(crate) const CONNECTIONS: u32 = 6;
/// How long a transaction waits for a free connection, or for a server that is not there.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(5);

/// How long SQLite waits for another process's lock before it says "busy".
const SQLITE_BUSY_MS: u32 = 2_000;

/// How long PostgreSQL waits for the writers' lock before it says "busy": longer than a holder may stand
/// still.
const LOCK_TIMEOUT_MS: u32 = 3_000;
/// No statement of the registry takes a tenth of this on a server that works.
const STATEMENT_TIMEOUT_MS: u32 = 5_000;
/// A transaction does nothing else between its statements, so that half a second without one means a process
/// that does not run; four of those leave room for a loaded machine, and a frozen guest (5 s of downtime at
/// most) is still decided on in time.
const IDLE_IN_TRANSACTION_MS: u32 = 2_000;
/// Age at which a transaction that holds the writers' lock is ended by one that waits for it.
const HOLDER_LIMIT_MS: u32 = 5_000;
/// When the network to a server that vanished counts as dead, on the server's side.
const TCP_USER_TIMEOUT_MS: u32 = 5_000;
/// How long this process waits for any answer: longer than the server's own limits, so that those come first.
const ANSWER_LIMIT: Duration = Duration::from_secs(8);
/// How long a commit whose answer was lost is asked after before its outcome counts as unknown. A server that
/// is restarted is back within this.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// Rest between questions.
const SETTLE_RETRY: Duration = Duration::from_millis(100);

/// Key of the writers' lock among the database's advisory locks ("Outr", registry).
const LOCK: (i32, i32) = (0x4f75_7472, 1);
/// The oldest server that makes UUIDs by itself.
const OLDEST_SERVER: i64 = 130_000;
/// How long marks of processes that ended are kept: far longer than anybody asks after a commit.
const MARKS_KEPT_US: i64 = 24 * 3_600 * 1_000_000;

/// For what nobody waits for: the end of a transaction that is given up, a connection on its way back.
const CLEANUP_LIMIT: Duration = Duration::from_secs(2);

/// Which database it is, and what is kept for it.
#[derive(Clone)]
pub(crate) enum Backend {
    Sqlite,
    Postgres(Arc<Marks>),
}

/// The numbers of this process's commits: what tells afterwards whether one happened whose answer was lost.
pub(crate) struct Marks {
    /// Made by the server; letters and digits.
    instance: String,
    last: AtomicI64,
}

/// What was found out about a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settled {
    Happened,
    DidNot,
}

/// Opens the pool and brings the schema up to date.
pub(crate) async fn open(database: &Database) -> Result<(AnyPool, Backend), RegistryError> {
    sqlx::any::install_default_drivers();
    match database {
        Database::Sqlite(path) => {
            let pool = pool(&format!("sqlite://{}?mode=rwc", path.display()), sqlite_session()).await?;
            migrated(sqlx::migrate!("migrations/sqlite").run(&pool).await)?;
            Ok((pool, Backend::Sqlite))
        }
        Database::Postgres(server) => open_postgres(server).await,
    }
}

/// The versions of the schema that this program knows.
fn known(database: &Database) -> Migrator {
    match database {
        Database::Sqlite(_) => sqlx::migrate!("migrations/sqlite"),
        Database::Postgres(_) => sqlx::migrate!("migrations/postgres"),
    }
}

/// Whether it knows this one.
pub(crate) fn knows(database: &Database, version: i64) -> bool {
    known(database).version_exists(version)
}

/// The newest.
pub(crate) fn newest(database: &Database) -> i64 {
    known(database).iter().map(|m| m.version).max().unwrap_or(0)
}

/// Opens the pool of a registry that is there, and leaves its schema alone. For reading: its commits have no numbers.
pub(crate) async fn open_as_it_is(database: &Database) -> Result<(AnyPool, Backend), RegistryError> {
    sqlx::any::install_default_drivers();
    match database {
        Database::Sqlite(path) => {
            let pool = pool(&format!("sqlite://{}?mode=rw", path.display()), sqlite_session()).await?;
            Ok((pool, Backend::Sqlite))
        }
        Database::Postgres(server) => {
            let marks = Marks { instance: String::new(), last: AtomicI64::new(0) };
            Ok((pool(server.url(), postgres_session()).await?, Backend::Postgres(Arc::new(marks))))
        }
    }
}

/// Opens the pool and brings the schema up to exactly these versions.
pub(crate) async fn open_up_to(
    database: &Database,
    versions: &[i64],
) -> Result<(AnyPool, Backend), RegistryError> {
    sqlx::any::install_default_drivers();
    let wanted = known(database).iter().filter(|m| versions.contains(&m.version)).cloned().collect();
    let wanted = Migrator::with_migrations(wanted);
    match database {
        Database::Sqlite(path) => {
            let pool = pool(&format!("sqlite://{}?mode=rwc", path.display()), sqlite_session()).await?;
            migrated(wanted.run(&pool).await)?;
            Ok((pool, Backend::Sqlite))
        }
        Database::Postgres(server) => {
            let pool = pool(server.url(), postgres_session()).await?;
            check_server(&pool).await?;
            migrated(wanted.run(&pool).await)?;
            let marks = Marks { instance: instance(&pool).await?, last: AtomicI64::new(0) };
            Ok((pool, Backend::Postgres(Arc::new(marks))))
        }
    }
}

async fn open_postgres(server: &Server) -> Result<(AnyPool, Backend), RegistryError> {
    let pool = pool(server.url(), postgres_session()).await?;
    let opened = async {
        check_server(&pool).await?;
        let up_to_date = sqlx::migrate!("migrations/postgres").run(&pool);
        migrated(bounded(Some(SETTLE_LIMIT), async { Ok(up_to_date.await) }).await.map_err(on_open)?)?;
        instance(&pool).await
    };
    match opened.await {
        Ok(instance) => Ok((pool, Backend::Postgres(Arc::new(Marks { instance, last: AtomicI64::new(0) })))),
        Err(error) => {
            pool.close().now_or_never();
            Err(error)
        }
    }
}

fn on_open(source: sqlx::Error) -> RegistryError {
    RegistryError::from_sqlx("open", source)
}

fn migrated(result: Result<(), sqlx::migrate::MigrateError>) -> Result<(), RegistryError> {
    result.map_err(|e| RegistryError::Unavailable {
        operation: "bring the schema up to date",
        source: sqlx::Error::Migrate(Box::new(e)),
    })
}

async fn pool(url: &str, session: String) -> Result<AnyPool, RegistryError> {
    let session: Arc<str> = session.into();
    AnyPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(ACQUIRE_LIMIT)
        // A file does not go away, and that a server did shows when the transaction begins, where it is met
        // by another try; the ping would stand in the way of every commit.
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            let session = Arc::clone(&session);
            async move {
                let settings = sqlx::raw_sql(AssertSqlSafe(session.to_string()));
                connection.execute(settings).await.map(|_| ())
            }
            .boxed()
        })
        .connect(url)
        .await
        .map_err(on_open)
}

fn sqlite_session() -> String {
    format!(
        "PRAGMA busy_timeout={SQLITE_BUSY_MS}; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; \
         PRAGMA foreign_keys=ON;"
    )
}

/// Whatever the server, the role or the environment say: the registry rests on these.
fn postgres_session() -> String {
    format!(
        "SET synchronous_commit = on; SET lock_timeout = {LOCK_TIMEOUT_MS}; \
         SET statement_timeout = {STATEMENT_TIMEOUT_MS}; \
         SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}; \
         SET tcp_user_timeout = {TCP_USER_TIMEOUT_MS}; SET standard_conforming_strings = on"
    )
}

/// Refuses a server whose word does not count.
async fn check_server(pool: &AnyPool) -> Result<(), RegistryError> {
    let sql = "SELECT CAST(current_setting('server_version_num') AS BIGINT) AS version, \
               current_setting('fsync') AS fsync, current_setting('full_page_writes') AS pages, \
               current_setting('server_encoding') AS encoding";
    let row = bounded(Some(ANSWER_LIMIT), sqlx::query(sql).fetch_one(pool)).await.map_err(on_open)?;
    let text = |name: &str| row.try_get::<String, _>(name).map_err(on_open);
    let unfit = |why: &str| {
        let source = sqlx::Error::Configuration(format!("the PostgreSQL server does not do: {why}").into());
        Err(on_open(source))
    };
    if row.try_get::<i64, _>("version").map_err(on_open)? < OLDEST_SERVER {
        return unfit("it is older than version 13");
    }
    if text("fsync")? != "on" || text("pages")? != "on" {
        return unfit("fsync or full_page_writes is off, so that what it commits may be lost");
    }
    if text("encoding")? != "UTF8" {
        return unfit("the database's encoding is not UTF8");
    }
    Ok(())
}

/// A name for this process's marks; those of processes long gone are forgotten.
async fn instance(pool: &AnyPool) -> Result<String, RegistryError> {
    let forget = format!("DELETE FROM commit_marks WHERE at_us < {SERVER_NOW_US} - {MARKS_KEPT_US}");
    let forget = sqlx::query(AssertSqlSafe(forget));
    bounded(Some(ANSWER_LIMIT), forget.execute(pool)).await.map_err(on_open)?;
    let sql = "SELECT replace(CAST(gen_random_uuid() AS TEXT), '-', '') AS instance";
    let row = bounded(Some(ANSWER_LIMIT), sqlx::query(sql).fetch_one(pool)).await.map_err(on_open)?;
    row.try_get("instance").map_err(on_open)
}

/// PostgreSQL's clock, microseconds since the Unix epoch.
const SERVER_NOW_US: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)";

/// Waits for an answer, but not for ever. What was under way when the limit came leaves the connection
/// unusable.
pub(crate) async fn bounded<T>(
    limit: Option<Duration>,
    answer: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let Some(limit) = limit else { return answer.await };
    tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| {
        let text = format!("the server did not answer within {} s", limit.as_secs());
        Err(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, text)))
    })
}

impl Backend {
    /// How long a statement may go without an answer. SQLite is in this process, and has its own time-out.
    pub(crate) const fn answer_limit(&self) -> Option<Duration> {
        match self {
            Self::Sqlite => None,
            Self::Postgres(_) => Some(ANSWER_LIMIT),
        }
    }

    /// The database's own clock where several machines use it: leases must not depend on theirs.
    pub(crate) fn clock(&self) -> Option<String> {
        match self {
            Self::Sqlite => None,
            Self::Postgres(_) => Some(format!("SELECT {SERVER_NOW_US} AS now_us")),
        }
    }

    /// Begins a writing transaction. Returns the number that its commit will be known by.
    pub(crate) async fn begin_writing(&self, connection: &mut AnyConnection) -> Result<i64, sqlx::Error> {
        let Self::Postgres(marks) = self else {
            return sqlx::query("BEGIN IMMEDIATE").execute(connection).await.map(|_| 0);
        };
        // Never given out twice, also when this begin fails.
        let number = marks.last.fetch_add(1, Ordering::Relaxed) + 1;
        // The parts must be sent at once: each answer that is waited for is time that the lock is held.
        let (instance, lock) = (&marks.instance, lock_sql());
        let sql = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {lock}; \
             INSERT INTO commit_marks (instance, number, at_us) \
             VALUES ('{instance}', {number}, {SERVER_NOW_US}) \
             ON CONFLICT (instance) DO UPDATE SET number = excluded.number, at_us = excluded.at_us"
        );
        run(connection, ANSWER_LIMIT, sql).await?;
        Ok(number)
    }

    /// Begins a reading transaction: everything in it is seen as it stood at its first statement.
    pub(crate) async fn begin_reading(&self, connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
        match self {
            Self::Sqlite => sqlx::query("BEGIN").execute(connection).await.map(|_| ()),
            Self::Postgres(_) => {
                let sql = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
                run(connection, ANSWER_LIMIT, sql.to_owned()).await
            }
        }
    }

    /// Commits. An error says nothing yet about what happened: see [`Self::settle`]. The server's statement
    /// time-out does not run any more while a commit waits for replicas (it would be told as success); this
    /// process's own limit does.
    pub(crate) async fn commit(&self, connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
        match self {
            Self::Sqlite => sqlx::query("COMMIT").execute(connection).await.map(|_| ()),
            Self::Postgres(_) => run(connection, ANSWER_LIMIT, "COMMIT".to_owned()).await,
        }
    }

    /// Finds out what came of a commit that was not answered with success. `None`: it cannot be told (yet).
    ///
    /// On PostgreSQL the question is put under the writers' lock: having it means that the transaction in
    /// question has ended, one way or the other. An SQLite commit that fails did not happen.
    pub(crate) async fn settle(&self, pool: &AnyPool, number: i64) -> Option<Settled> {
        let Self::Postgres(marks) = self else { return Some(Settled::DidNot) };
        let asked = async {
            loop {
                match ask(pool, marks, number).await {
                    Ok(settled) => return settled,
                    Err(error) => tracing::debug!(%error, "cannot ask yet what came of a commit"),
                }
                tokio::time::sleep(SETTLE_RETRY).await;
            }
        };
        tokio::time::timeout(SETTLE_LIMIT, asked).await.ok()
    }

    /// What an error at the beginning of a transaction, when nothing can have happened yet, means.
    pub(crate) fn again(&self, error: &sqlx::Error) -> Again {
        match self {
            _ if is_busy(error) => Again::Busy,
            Self::Postgres(_) if is_lost(error) => Again::Lost,
            _ => Again::No,
        }
    }

    /// Ends the session of whoever has held the writers' lock for too long.
    pub(crate) async fn end_holder(&self, pool: &AnyPool) {
        let Self::Postgres(_) = self else { return };
        let (class, object) = LOCK;
        // Not one that waits for a replica: it has committed, and would be taken for done by all but the
        // replica.
        let sql = format!(
            "SELECT count(pg_terminate_backend(a.pid)) AS ended FROM pg_locks l \
             JOIN pg_stat_activity a ON a.pid = l.pid \
             WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 \
             AND l.classid = {class} AND l.objid = {object} AND a.datname = current_database() \
             AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
             AND a.xact_start < clock_timestamp() - interval '{HOLDER_LIMIT_MS} milliseconds' \
             AND a.wait_event IS DISTINCT FROM 'SyncRep' AND a.pid <> pg_backend_pid()"
        );
        let query = sqlx::query(AssertSqlSafe(sql)).persistent(false);
        let ended = async {
            let mut session = Session::acquire(pool).await?;
            let row: AnyRow = bounded(Some(ANSWER_LIMIT), query.fetch_one(session.connection())).await?;
            session.give_back();
            row.try_get::<i64, _>("ended")
        };
        match ended.await {
            Ok(0) => {}
            Ok(_) => tracing::warn!("ended a session that held the registry's lock for {HOLDER_LIMIT_MS} ms"),
            Err(error) => tracing::debug!(%error, "cannot end the session that holds the registry's lock"),
        }
    }
}

/// Whether beginning again may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// Somebody holds the lock.
    Busy,
    /// The connection was dead already: the server was restarted meanwhile.
    Lost,
    No,
}

fn lock_sql() -> String {
    format!("SELECT 1 AS locked FROM pg_advisory_xact_lock({}, {})", LOCK.0, LOCK.1)
}

async fn run(connection: &mut AnyConnection, limit: Duration, sql: String) -> Result<(), sqlx::Error> {
    let statements = sqlx::raw_sql(AssertSqlSafe(sql));
    bounded(Some(limit), connection.execute(statements)).await.map(|_| ())
}

async fn ask(pool: &AnyPool, marks: &Marks, number: i64) -> Result<Settled, sqlx::Error> {
    let mut session = Session::acquire(pool).await?;
    let connection = session.connection();
    run(connection, ANSWER_LIMIT, format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}", lock_sql()))
        .await?;
    // An update, not a look: its commit is durable (on the replicas too), and with it all that came before.
    let sql = "UPDATE commit_marks SET number = number WHERE instance = $1 AND number = $2";
    let touch = sqlx::query(sql).bind(marks.instance.clone()).bind(number);
    let found = bounded(Some(ANSWER_LIMIT), touch.execute(&mut *connection)).await?.rows_affected() == 1;
    run(connection, ANSWER_LIMIT, "COMMIT".to_owned()).await?;
    session.give_back();
    Ok(if found { Settled::Happened } else { Settled::DidNot })
}

/// A connection of the pool that is in use. Unless it is given back it is cut when dropped: a future that was
/// given up in the middle of a statement must not leave a transaction, or the writers' lock, on a connection
/// that the next caller gets.
pub(crate) struct Session {
    connection: Option<PoolConnection<Any>>,
}

impl Session {
    pub(crate) async fn acquire(pool: &AnyPool) -> Result<Self, sqlx::Error> {
        Ok(Self { connection: Some(pool.acquire().await?) })
    }

    pub(crate) fn connection(&mut self) -> &mut AnyConnection {
        self.connection.as_mut().expect("taken by methods only that consume the session")
    }

    /// Hands it back; no transaction may be open on it. The pool pings it on the way, and a server that
    /// vanished must not keep one of the few connections for ever.
    pub(crate) fn give_back(mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let Ok(runtime) = Handle::try_current() else { return drop(connection.detach()) };
        let returned = connection.return_to_pool();
        runtime.spawn(async move { tokio::time::timeout(CLEANUP_LIMIT, returned).await.ok() });
    }

    /// Rolls back behind the caller's back, then hands it back; `keep` lives until then.
    pub(crate) fn roll_back<K: Send + 'static>(mut self, keep: K) {
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            if run(self.connection(), CLEANUP_LIMIT, "ROLLBACK".to_owned()).await.is_ok() {
                self.give_back();
            }
            drop(keep);
        });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(connection.detach());
        }
    }
}
