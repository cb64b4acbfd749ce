//! A transaction: the only way to the rows.

use crate::backend::{Backend, Session, Settled, bounded};
use crate::error::RegistryError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::{Any, AnyRow};
use sqlx::query::Query;
use sqlx::{AnyConnection, AnyPool, Row};
use std::time::{Duration, Instant};
use tokio::sync::OwnedMutexGuard;

/// Longer transactions are worth a line in the log: they are in the way of a switchover.
const SLOW_TRANSACTION_MS: u128 = 250;

/// One transaction. Dropped without [`Tx::commit`] it never happened. A statement that fails spoils it:
/// nothing of it can be committed any more.
pub struct Tx {
    name: &'static str,
    now_us: i64,
    began: Instant,
    backend: Backend,
    pool: AnyPool,
    standing: Standing,
    session: Option<Session>,
    writing: Option<Writing>,
}

/// What a writing transaction holds.
pub(crate) struct Writing {
    /// This process writes one at a time.
    pub(crate) _writer: OwnedMutexGuard<()>,
    /// By which its commit is known.
    pub(crate) number: i64,
}

/// Whether it may commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Sound,
    /// The database refused a statement.
    Spoilt,
    /// A statement was not answered: it failed on the way, or nobody waited for it.
    Unanswered,
}

impl Drop for Tx {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else { return };
        // An SQLite connection that failed to write is closed: when a disk is full SQLite rolls back by
        // itself.
        let keeps = self.writing.is_none() || !matches!(self.backend, Backend::Sqlite);
        if keeps && self.standing != Standing::Unanswered {
            session.roll_back(self.writing.take());
        }
    }
}

pub(crate) type Statement<'q> = Query<'q, Any, <Any as sqlx::Database>::Arguments>;

impl Tx {
    pub(crate) fn begun(
        name: &'static str,
        now_us: i64,
        (backend, pool): (&Backend, &AnyPool),
        session: Session,
        writing: Option<Writing>,
    ) -> Self {
        Self {
            name,
            now_us,
            began: Instant::now(),
            backend: backend.clone(),
            pool: pool.clone(),
            standing: Standing::Sound,
            session: Some(session),
            writing,
        }
    }

    /// The time that its rows carry, microseconds since the Unix epoch.
    #[must_use]
    pub const fn now_us(&self) -> i64 {
        self.now_us
    }

    /// Which database.
    pub(crate) const fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Makes it durable.
    ///
    /// An answer that gets lost on its way (PostgreSQL) is asked after, for up to ten seconds.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] and [`RegistryError::Spoilt`]: nothing of it happened.
    /// [`RegistryError::CommitUnknown`]: it cannot be told whether it happened.
    pub async fn commit(mut self) -> Result<(), RegistryError> {
        let operation = self.name;
        if self.writing.is_none() {
            return Ok(());
        }
        if self.standing != Standing::Sound {
            return Err(RegistryError::Spoilt { operation });
        }
        self.standing = Standing::Unanswered;
        let Some(mut session) = self.session.take() else { return Err(RegistryError::Spoilt { operation }) };
        match self.backend.commit(session.connection()).await {
            Ok(()) => session.give_back(),
            Err(source) => {
                // Cut first: what is asked must not wait for this connection.
                drop(session);
                self.settle(source).await?;
            }
        }
        self.note_duration();
        Ok(())
    }

    /// What came of a commit that failed, or whose answer was lost.
    async fn settle(&mut self, source: sqlx::Error) -> Result<(), RegistryError> {
        let operation = self.name;
        let number = self.writing.as_ref().map_or(0, |w| w.number);
        match self.backend.settle(&self.pool, number).await {
            Some(Settled::Happened) => {
                tracing::warn!(
                    transaction = operation,
                    "the answer to a commit was lost: it happened ({source})"
                );
                Ok(())
            }
            Some(Settled::DidNot) => Err(RegistryError::from_sqlx(operation, source)),
            None => Err(RegistryError::CommitUnknown { operation, source }),
        }
    }

    fn note_duration(&self) {
        let duration_ms = self.began.elapsed().as_millis();
        if duration_ms > SLOW_TRANSACTION_MS {
            tracing::warn!(transaction = self.name, duration_ms, "slow transaction");
        } else {
            tracing::trace!(transaction = self.name, duration_ms, "transaction");
        }
    }

    /// The time by the database's own clock where it is a server's: several machines go by it.
    pub(crate) async fn shared_now_us(&mut self) -> Result<i64, RegistryError> {
        let Some(sql) = self.backend.clock() else { return Ok(self.now_us) };
        let row = self.optional(sqlx::query(sqlx::AssertSqlSafe(sql))).await?;
        row.as_ref().map_or(Ok(self.now_us), |r| column(r, "now_us"))
    }

    /// The connection, for one statement. What is not answered leaves the transaction unusable.
    fn enter(&mut self) -> Result<(&mut AnyConnection, Option<Duration>), RegistryError> {
        if self.standing != Standing::Sound {
            return Err(RegistryError::Spoilt { operation: self.name });
        }
        self.standing = Standing::Unanswered;
        let session = self.session.as_mut().expect("taken by `commit` only, which consumes the transaction");
        Ok((session.connection(), self.backend.answer_limit()))
    }

    fn leave<T>(&mut self, result: &Result<T, sqlx::Error>) {
        self.standing = match result {
            Ok(_) => Standing::Sound,
            Err(sqlx::Error::Database(_)) => Standing::Spoilt,
            Err(_) => Standing::Unanswered,
        };
    }

    pub(crate) async fn execute(&mut self, query: Statement<'_>) -> Result<u64, RegistryError> {
        let (connection, limit) = self.enter()?;
        let done = bounded(limit, query.execute(connection)).await;
        self.leave(&done);
        Ok(done.map_err(|e| RegistryError::from_sqlx(self.name, e))?.rows_affected())
    }

    pub(crate) async fn insert(
        &mut self,
        what: impl FnOnce() -> String,
        query: Statement<'_>,
    ) -> Result<(), RegistryError> {
        let (connection, limit) = self.enter()?;
        let done = bounded(limit, query.execute(connection)).await;
        self.leave(&done);
        done.map(|_| ()).map_err(|e| RegistryError::on_insert(self.name, what, e))
    }

    pub(crate) async fn optional(&mut self, query: Statement<'_>) -> Result<Option<AnyRow>, RegistryError> {
        let (connection, limit) = self.enter()?;
        let row = bounded(limit, query.fetch_optional(connection)).await;
        self.leave(&row);
        row.map_err(|e| RegistryError::from_sqlx(self.name, e))
    }

    pub(crate) async fn all(&mut self, query: Statement<'_>) -> Result<Vec<AnyRow>, RegistryError> {
        let (connection, limit) = self.enter()?;
        let rows = bounded(limit, query.fetch_all(connection)).await;
        self.leave(&rows);
        rows.map_err(|e| RegistryError::from_sqlx(self.name, e))
    }

    /// Writes without changing anything, to see whether writing works.
    pub(crate) async fn touch(&mut self) -> Result<(), RegistryError> {
        self.execute(sqlx::query("DELETE FROM request_nonces WHERE nonce = ''")).await?;
        // A row that goes in and out again makes SQLite allocate a page of its log: a full disk shows.
        let probe = "INSERT INTO request_nonces (nonce, used_by, seen_at_us) VALUES ('probe', '', 0)";
        self.execute(sqlx::query(probe)).await?;
        self.execute(sqlx::query("DELETE FROM request_nonces WHERE nonce = 'probe'")).await?;
        Ok(())
    }
}

/// Text of a peer as it can be kept: PostgreSQL takes no zero characters in text, so none are kept anywhere.
pub(crate) fn plain(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// A column as text, integer or bytes; a type that differs is a malformed registry, not a panic.
pub(crate) fn column<'r, T>(row: &'r AnyRow, name: &'static str) -> Result<T, RegistryError>
where
    T: sqlx::Decode<'r, Any> + sqlx::Type<Any>,
{
    row.try_get(name).map_err(|e| RegistryError::malformed(name, e))
}

/// A text column that parses.
pub(crate) fn parsed<T>(row: &AnyRow, name: &'static str) -> Result<T, RegistryError>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    column::<String>(row, name)?.parse().map_err(|e: T::Err| RegistryError::malformed(name, e))
}

/// A text column that may be null and parses.
pub(crate) fn parsed_or_null<T>(row: &AnyRow, name: &'static str) -> Result<Option<T>, RegistryError>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    let text: Option<String> = column(row, name)?;
    text.map(|t| t.parse().map_err(|e: T::Err| RegistryError::malformed(name, e))).transpose()
}

/// A text column that holds a JSON document.
pub(crate) fn document<T: DeserializeOwned>(row: &AnyRow, name: &'static str) -> Result<T, RegistryError> {
    let text: String = column(row, name)?;
    serde_json::from_str(&text).map_err(|e| RegistryError::malformed(name, e))
}

/// A text column that holds a unit variant, such as a state.
pub(crate) fn variant<T: DeserializeOwned>(row: &AnyRow, name: &'static str) -> Result<T, RegistryError> {
    let text: String = column(row, name)?;
    serde_json::from_value(serde_json::Value::String(text)).map_err(|e| RegistryError::malformed(name, e))
}

/// The text of a unit variant.
pub(crate) fn variant_text<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        other => unreachable!("states serialise as text, not {other:?}"),
    }
}

/// A document as JSON text.
pub(crate) fn document_text<T: Serialize>(what: &'static str, value: &T) -> Result<String, RegistryError> {
    serde_json::to_string(value).map_err(|e| RegistryError::malformed(what, e))
}

pub(crate) fn unsigned(row: &AnyRow, name: &'static str) -> Result<u64, RegistryError> {
    let value: i64 = column(row, name)?;
    u64::try_from(value).map_err(|e| RegistryError::malformed(name, e))
}

pub(crate) fn signed(what: &'static str, value: u64) -> Result<i64, RegistryError> {
    i64::try_from(value).map_err(|e| RegistryError::malformed(what, e))
}
