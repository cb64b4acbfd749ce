//! A copy of the registry in one file, and a registry from such a file; the same file for both databases.
//!
//! The file is lines of JSON: what it is, then for each table its columns and its rows, then how many rows there were and
//! the digest of all lines before. It is read in one transaction, so that it is one picture of an instant, while managers
//! go on. It holds no keys: those lie in the managers' state folders. See docs/audit.md for the format.

mod catalog;

use crate::backend;
use crate::database::Database;
use crate::error::RegistryError;
use crate::standing::{LogRow, Standing};
use crate::tx::{Tx, column};
use crate::{Registry, tx};
use catalog::{Kind, Table};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};
use std::io::{BufRead, Read, Write};
use types::{Digest, ErrorCode, Nonce, Problem};

/// Rows that are read at a time.
const PAGE_ROWS: usize = 500;
/// The longest rows hold a VM's spec and inventory: far below.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// A schema has some twenty.
const TABLES_MAX: usize = 256;
const FORMAT: u32 = 1;
/// The version of the schema with the row that says how a registry stands: an older one can't be marked as restored.
const STANDING_SCHEMA: i64 = 4;

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupHeader {
    /// Version of the format.
    pub outrider_backup: u32,
    /// Microseconds since the Unix epoch.
    pub created_us: i64,
    /// Versions of the schema that were applied.
    pub migrations: Vec<i64>,
    /// How many tables.
    pub tables: usize,
    /// Entries of the audit log.
    pub audit_entries: u64,
    /// Chain hash of the last.
    pub audit_head: Digest,
}

/// The last line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trailer {
    rows: u64,
    blake3: Digest,
}

/// Why a backup can't be made or used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The registry can't be read or written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The file can't be read or written.
    #[error("cannot {operation} the backup")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// It is not what it was, or never was a backup.
    #[error("the backup is damaged at line {line}: {why}")]
    Damaged {
        /// Counts from 1.
        line: u64,
        /// What is wrong.
        why: String,
    },
    /// It was made by a later version.
    #[error(
        "the backup was made by a newer version (schema {found}, this one knows up to {known}); use that version"
    )]
    Newer {
        /// Of the backup.
        found: i64,
        /// Of this version.
        known: i64,
    },
    /// The registry that it is to be put into holds something.
    #[error(
        "the database is not empty: {table} has rows. A backup is restored into an empty one; the old one stays as it is"
    )]
    NotEmpty {
        /// A table that has rows.
        table: String,
    },
    /// Its registry is of a version that has no place to say that it was restored.
    #[error("the registry is of an older version (schema {found}); start its manager once with this one")]
    Older {
        /// Of the registry.
        found: i64,
    },
}

impl From<BackupError> for Problem {
    fn from(error: BackupError) -> Self {
        let code = match error {
            BackupError::Registry(inner) => return inner.into(),
            BackupError::Io { .. } => ErrorCode::BadConfiguration,
            BackupError::Damaged { .. } | BackupError::Newer { .. } => ErrorCode::BadRequest,
            BackupError::NotEmpty { .. } | BackupError::Older { .. } => ErrorCode::WrongState,
        };
        let cause = std::error::Error::source(&error).map(|e| format!(": {e}")).unwrap_or_default();
        Self::new(code, format!("{error}{cause}"))
    }
}

/// Writes lines, and remembers their digest.
struct Lines<W> {
    out: W,
    hasher: blake3::Hasher,
    rows: u64,
}

impl<W: Write> Lines<W> {
    fn line(&mut self, value: &impl Serialize) -> Result<(), BackupError> {
        let failed = |source| BackupError::Io { operation: "write", source };
        let mut line = serde_json::to_vec(value).map_err(|e| failed(e.into()))?;
        line.push(b'\n');
        self.hasher.update(&line);
        self.out.write_all(&line).map_err(failed)
    }
}

/// Copies a registry, which may be in use, into `out`.
///
/// # Errors
/// Those of the database, and of `out`: what was written then is no backup.
pub async fn back_up(database: &Database, now_us: i64, out: impl Write) -> Result<BackupHeader, BackupError> {
    let registry = Registry::open_as_it_is(database).await?;
    let copied = copied(&registry, now_us, out).await;
    registry.close().await;
    copied
}

async fn copied(registry: &Registry, now_us: i64, out: impl Write) -> Result<BackupHeader, BackupError> {
    let mut tx = registry.read("back up").await?;
    let migrations = new_enough(applied(&mut tx).await?)?;
    let tables = catalog::tables(&mut tx).await?;
    let (audit_entries, audit_head) = tx.audit_head().await?;
    let header = BackupHeader {
        outrider_backup: FORMAT,
        created_us: now_us,
        migrations,
        tables: tables.len(),
        audit_entries,
        audit_head,
    };
    let mut lines = Lines { out, hasher: blake3::Hasher::new(), rows: 0 };
    lines.line(&header)?;
    for table in &tables {
        lines.line(table)?;
        copy_rows(&mut tx, table, &mut lines).await?;
    }
    let trailer = Trailer { rows: lines.rows, blake3: Digest(*lines.hasher.finalize().as_bytes()) };
    lines.line(&trailer)?;
    lines.out.flush().map_err(|source| BackupError::Io { operation: "write", source })?;
    Ok(header)
}

fn new_enough(migrations: Vec<i64>) -> Result<Vec<i64>, BackupError> {
    match migrations.contains(&STANDING_SCHEMA) {
        true => Ok(migrations),
        false => Err(BackupError::Older { found: migrations.last().copied().unwrap_or(0) }),
    }
}

async fn applied(tx: &mut Tx) -> Result<Vec<i64>, RegistryError> {
    let rows = tx.all(sqlx::query("SELECT version FROM _sqlx_migrations ORDER BY version")).await?;
    rows.iter().map(|row| column(row, "version")).collect()
}

/// Rows in the order of the primary key, page by page: the table may be longer than memory.
async fn copy_rows<W: Write>(tx: &mut Tx, table: &Table, lines: &mut Lines<W>) -> Result<(), BackupError> {
    let key = table.key();
    let mut last: Option<Vec<Value>> = None;
    loop {
        let sql = page_sql(table, &key, last.is_some());
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in last.iter().flatten().zip(&key) {
            let ((value, at), kinds) = (value, &table.columns);
            query = bind(query, value, kinds.get(*at).map_or(Kind::Text, |c| c.kind))?;
        }
        let rows = tx.all(query).await?;
        for row in &rows {
            let values = values(row, table)?;
            lines.line(&values)?;
            lines.rows += 1;
            last = Some(key.iter().filter_map(|at| values.get(*at).cloned()).collect());
        }
        if rows.len() < PAGE_ROWS {
            return Ok(());
        }
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn names(table: &Table, which: impl Iterator<Item = usize>) -> String {
    let names: Vec<String> = which.filter_map(|at| table.columns.get(at)).map(|c| quoted(&c.name)).collect();
    names.join(", ")
}

fn page_sql(table: &Table, key: &[usize], follows: bool) -> String {
    let (columns, keys) = (names(table, 0..table.columns.len()), names(table, key.iter().copied()));
    let marks: Vec<String> = (1..=key.len()).map(|n| format!("${n}")).collect();
    let from = if follows { format!("WHERE ({keys}) > ({}) ", marks.join(", ")) } else { String::new() };
    format!("SELECT {columns} FROM {} {from}ORDER BY {keys} LIMIT {PAGE_ROWS}", quoted(&table.name))
}

fn values(row: &AnyRow, table: &Table) -> Result<Vec<Value>, RegistryError> {
    let value = |(at, column): (usize, &catalog::Column)| {
        let failed =
            |e: sqlx::Error| RegistryError::malformed("row", format!("{}.{}: {e}", table.name, column.name));
        Ok(match column.kind {
            Kind::Int => row.try_get::<Option<i64>, _>(at).map_err(failed)?.map_or(Value::Null, Value::from),
            Kind::Text => {
                row.try_get::<Option<String>, _>(at).map_err(failed)?.map_or(Value::Null, Value::from)
            }
            Kind::Blob => {
                let bytes = row.try_get::<Option<Vec<u8>>, _>(at).map_err(failed)?;
                bytes.map_or(Value::Null, |b| Value::from(hex::encode(b)))
            }
        })
    };
    table.columns.iter().enumerate().map(value).collect()
}

/// Binds a value of a row; one that does not fit its column is an error.
fn bind<'q>(query: tx::Statement<'q>, value: &Value, kind: Kind) -> Result<tx::Statement<'q>, RegistryError> {
    let unfit =
        || RegistryError::malformed("backup", format!("a {kind:?} column holds another kind of value"));
    Ok(match (kind, value) {
        (Kind::Int, Value::Null) => query.bind(None::<i64>),
        (Kind::Text, Value::Null) => query.bind(None::<String>),
        (Kind::Blob, Value::Null) => query.bind(None::<Vec<u8>>),
        (Kind::Int, value) => query.bind(value.as_i64().ok_or_else(unfit)?),
        (Kind::Text, value) => query.bind(value.as_str().ok_or_else(unfit)?.to_owned()),
        (Kind::Blob, value) => {
            query.bind(hex::decode(value.as_str().ok_or_else(unfit)?).map_err(|_| unfit())?)
        }
    })
}

/// Reads lines, and remembers their digest.
struct Source<R> {
    input: R,
    hasher: blake3::Hasher,
    number: u64,
}

impl<R: BufRead> Source<R> {
    /// The next line; every line ends with a line feed.
    fn next(&mut self) -> Result<Vec<u8>, BackupError> {
        self.number += 1;
        let mut line = Vec::new();
        let limited = (&mut self.input).take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line);
        limited.map_err(|source| BackupError::Io { operation: "read", source })?;
        match line.last() {
            Some(b'\n') => Ok(line),
            Some(_) if line.len() as u64 > LINE_BYTES_MAX => Err(self.damaged("it is longer than any")),
            _ => Err(self.damaged("the file ends here, before its end")),
        }
    }

    fn damaged(&self, why: impl std::fmt::Display) -> BackupError {
        BackupError::Damaged { line: self.number, why: why.to_string() }
    }

    fn parsed<T: for<'de> Deserialize<'de>>(&self, line: &[u8]) -> Result<T, BackupError> {
        serde_json::from_slice(line).map_err(|e| self.damaged(e))
    }
}

/// Puts a backup into a database that holds nothing. The registry is marked as restored: no manager decides anything
/// new by it until it was reconciled from the hosts.
///
/// # Errors
/// Nothing of it is in the database then, but perhaps empty tables.
pub async fn restore(
    database: &Database,
    now_us: i64,
    actor: &str,
    input: impl Read,
) -> Result<BackupHeader, BackupError> {
    let mut source =
        Source { input: std::io::BufReader::new(input), hasher: blake3::Hasher::new(), number: 0 };
    let line = source.next()?;
    let header: BackupHeader = source.parsed(&line)?;
    source.hasher.update(&line);
    if header.outrider_backup != FORMAT || header.tables > TABLES_MAX {
        return Err(source.damaged("it is of no format that is known here"));
    }
    let newest = backend::newest(database);
    let unknown = header.migrations.iter().find(|m| !backend::knows(database, **m));
    if let Some(unknown) = unknown {
        return Err(BackupError::Newer { found: *unknown, known: newest });
    }
    new_enough(header.migrations.clone())?;
    let registry = Registry::open_up_to(database, &header.migrations).await?;
    let restored = restored(&registry, &header, now_us, actor, &mut source).await;
    registry.close().await;
    restored?;
    // The rest of the schema, and the tree of an older log.
    Registry::open(database).await?.close().await;
    Ok(header)
}

async fn restored<R: BufRead>(
    registry: &Registry,
    header: &BackupHeader,
    now_us: i64,
    actor: &str,
    source: &mut Source<R>,
) -> Result<(), BackupError> {
    let mut tx = registry.begin("restore", now_us).await?;
    let mut known = catalog::tables(&mut tx).await?;
    for table in &known {
        let sql = format!("SELECT 1 AS one FROM {} LIMIT 1", quoted(&table.name));
        if tx.optional(sqlx::query(AssertSqlSafe(sql))).await?.is_some() {
            return Err(BackupError::NotEmpty { table: table.name.clone() });
        }
    }
    let (mut table, mut rows, mut tables): (Option<Table>, u64, usize) = (None, 0, 0);
    loop {
        let line = source.next()?;
        if line.first() == Some(&b'[') {
            let table = table.as_ref().ok_or_else(|| source.damaged("a row of no table"))?;
            put_row(&mut tx, table, &source.parsed::<Vec<Value>>(&line)?, source).await?;
            rows += 1;
        } else if line.starts_with(b"{\"rows\"") {
            let trailer: Trailer = source.parsed(&line)?;
            let digest = Digest(*source.hasher.finalize().as_bytes());
            if (trailer.rows, trailer.blake3, tables) != (rows, digest, header.tables) {
                return Err(source.damaged("rows or digest are not those of the file"));
            }
            break;
        } else {
            let next: Table = source.parsed(&line)?;
            let at = known.iter().position(|t| *t == next);
            let at = at.ok_or_else(|| {
                source.damaged(format!("the table {:?} is not one of this schema", next.name))
            })?;
            known.remove(at);
            (table, tables) = (Some(next), tables + 1);
        }
        source.hasher.update(&line);
    }
    let mut more = [0; 1];
    let read = source.input.read(&mut more).map_err(|e| BackupError::Io { operation: "read", source: e })?;
    if read != 0 {
        return Err(source.damaged("something follows the end"));
    }
    if let Some(table) = known.first() {
        return Err(source.damaged(format!("the table {} is missing", table.name)));
    }
    if tx.audit_head().await? != (header.audit_entries, header.audit_head) {
        return Err(source.damaged("the audit log does not end as the first line says"));
    }
    mark(&mut tx, header, actor).await?;
    Ok(tx.commit().await?)
}

async fn put_row<R: BufRead>(
    tx: &mut Tx,
    table: &Table,
    row: &[Value],
    source: &Source<R>,
) -> Result<(), BackupError> {
    if row.len() != table.columns.len() {
        return Err(source.damaged("a row has another number of columns than its table"));
    }
    let marks: Vec<String> = (1..=row.len()).map(|n| format!("${n}")).collect();
    let columns = names(table, 0..table.columns.len());
    let sql = format!("INSERT INTO {} ({columns}) VALUES ({})", quoted(&table.name), marks.join(", "));
    let mut query = sqlx::query(AssertSqlSafe(sql));
    for (value, column) in row.iter().zip(&table.columns) {
        query = bind(query, value, column.kind).map_err(|e| source.damaged(e))?;
    }
    tx.execute(query).await?;
    Ok(())
}

/// The registry says of itself that it is old.
async fn mark(tx: &mut Tx, header: &BackupHeader, actor: &str) -> Result<(), BackupError> {
    let row = tx.audit_log().await?.unwrap_or_else(|| {
        // No manager ever ran on it, so that no host knows this log by an id.
        let mut log = [0; 16];
        log.copy_from_slice(header.audit_head.0.split_at(16).0);
        LogRow::new(Nonce::from_bytes(log), tx.now_us())
    });
    let why = format!("it was restored from a backup of {} audit entries", header.audit_entries);
    let (standing, since_us) = (Standing::Restored, tx.now_us());
    tx.put_audit_log(&LogRow { standing, why, since_us, ..row }).await?;
    let detail = json!({
        "created_us": header.created_us, "audit_entries": header.audit_entries, "audit_head": header.audit_head,
        "migrations": header.migrations,
    });
    Ok(tx.audit(actor, "registry.restore", "registry", detail).await?)
}
