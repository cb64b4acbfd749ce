//! A transaction: the only way to the rows.

use crate::error::RegistryError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::any::{Any, AnyRow};
use sqlx::pool::PoolConnection;
use sqlx::query::Query;
use sqlx::{AnyConnection, Row, Transaction};
use std::time::Instant;
use tokio::sync::OwnedMutexGuard;

/// Longer transactions are worth a line in the log: they are in the way of a switchover.
const SLOW_TRANSACTION_MS: u128 = 250;

/// One transaction. Dropped without [`Tx::commit`] it never happened.
pub struct Tx {
    name: &'static str,
    now_us: i64,
    began: Instant,
    on: On,
}

/// What it runs on.
enum On {
    /// One consistent picture.
    Read(Transaction<'static, Any>),
    /// Begun and committed here: when a disk is full SQLite rolls back by itself, after which the pool's own
    /// book-keeping would be wrong for ever; a connection whose transaction did not commit is closed instead.
    Write { connection: Option<PoolConnection<Any>>, _writer: OwnedMutexGuard<()> },
}

impl Drop for On {
    fn drop(&mut self) {
        if let Self::Write { connection: Some(connection), .. } = self {
            connection.close_on_drop();
        }
    }
}

pub(crate) type Statement<'q> = Query<'q, Any, <Any as sqlx::Database>::Arguments>;

impl Tx {
    pub(crate) fn reading(name: &'static str, transaction: Transaction<'static, Any>) -> Self {
        Self { name, now_us: 0, began: Instant::now(), on: On::Read(transaction) }
    }

    pub(crate) async fn writing(
        name: &'static str,
        now_us: i64,
        mut connection: PoolConnection<Any>,
        writer: OwnedMutexGuard<()>,
    ) -> Result<Self, (sqlx::Error, OwnedMutexGuard<()>)> {
        match sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await {
            Ok(_) => {
                let on = On::Write { connection: Some(connection), _writer: writer };
                Ok(Self { name, now_us, began: Instant::now(), on })
            }
            Err(error) => Err((error, writer)),
        }
    }

    /// The time that its rows carry, microseconds since the Unix epoch.
    #[must_use]
    pub const fn now_us(&self) -> i64 {
        self.now_us
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`]; then nothing of it happened.
    pub async fn commit(mut self) -> Result<(), RegistryError> {
        let name = self.name;
        if let On::Write { connection: slot, .. } = &mut self.on
            && let Some(mut connection) = slot.take()
            && let Err(error) = sqlx::query("COMMIT").execute(&mut *connection).await
        {
            connection.close_on_drop();
            return Err(RegistryError::from_sqlx(name, error));
        }
        let duration_ms = self.began.elapsed().as_millis();
        if duration_ms > SLOW_TRANSACTION_MS {
            tracing::warn!(transaction = name, duration_ms, "slow transaction");
        } else {
            tracing::trace!(transaction = name, duration_ms, "transaction");
        }
        Ok(())
    }

    pub(crate) fn connection(&mut self) -> &mut AnyConnection {
        match &mut self.on {
            On::Read(transaction) => transaction,
            On::Write { connection, .. } => {
                connection.as_mut().expect("taken by `commit` only, which consumes the transaction")
            }
        }
    }

    pub(crate) async fn execute(&mut self, query: Statement<'_>) -> Result<u64, RegistryError> {
        let name = self.name;
        let done = query.execute(self.connection()).await.map_err(|e| RegistryError::from_sqlx(name, e))?;
        Ok(done.rows_affected())
    }

    pub(crate) async fn insert(
        &mut self,
        what: impl FnOnce() -> String,
        query: Statement<'_>,
    ) -> Result<(), RegistryError> {
        let name = self.name;
        query
            .execute(self.connection())
            .await
            .map(|_| ())
            .map_err(|e| RegistryError::on_insert(name, what, e))
    }

    pub(crate) async fn optional(&mut self, query: Statement<'_>) -> Result<Option<AnyRow>, RegistryError> {
        let name = self.name;
        query.fetch_optional(self.connection()).await.map_err(|e| RegistryError::from_sqlx(name, e))
    }

    pub(crate) async fn all(&mut self, query: Statement<'_>) -> Result<Vec<AnyRow>, RegistryError> {
        let name = self.name;
        query.fetch_all(self.connection()).await.map_err(|e| RegistryError::from_sqlx(name, e))
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
