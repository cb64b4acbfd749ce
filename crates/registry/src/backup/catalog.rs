//! Which tables there are, as the database itself says: a table that was added later is in the next backup without
//! anybody thinking of it.

use crate::backend::Backend;
use crate::error::RegistryError;
use crate::tx::{Tx, column};
use serde::{Deserialize, Serialize};
use sqlx::AssertSqlSafe;
use std::collections::{BTreeMap, BTreeSet};

/// What a column holds: nothing else is used on either database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Int,
    Text,
    Blob,
}

impl Kind {
    fn of(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "bigint" | "integer" => Some(Self::Int),
            "text" => Some(Self::Text),
            "blob" | "bytea" => Some(Self::Blob),
            _ => None,
        }
    }
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Its place in the primary key, from 1; 0: none.
    pub(super) key: i64,
}

/// A table with its columns, in the order of their names: the two databases may have them in another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    pub(super) name: String,
    pub(super) columns: Vec<Column>,
}

impl Table {
    /// Indices of the columns of its primary key, in the key's order.
    pub(super) fn key(&self) -> Vec<usize> {
        let mut key: Vec<(i64, usize)> =
            self.columns.iter().enumerate().filter(|(_, c)| c.key > 0).map(|(at, c)| (c.key, at)).collect();
        key.sort_unstable();
        key.into_iter().map(|(_, at)| at).collect()
    }
}

const SQLITE_COLUMNS: &str = "SELECT m.name AS t, p.name AS c, p.type AS k, p.pk AS n FROM sqlite_master m \
    JOIN pragma_table_info(m.name) p WHERE m.type = 'table' ORDER BY m.name, p.name";
const SQLITE_REFERENCES: &str = "SELECT m.name AS t, f.\"table\" AS r FROM sqlite_master m \
    JOIN pragma_foreign_key_list(m.name) f WHERE m.type = 'table'";
const POSTGRES_COLUMNS: &str = "SELECT CAST(c.relname AS TEXT) AS t, CAST(a.attname AS TEXT) AS c, \
    format_type(a.atttypid, a.atttypmod) AS k, \
    CAST(COALESCE(array_position(CAST(i.indkey AS int2[]), a.attnum), -1) + 1 AS BIGINT) AS n \
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace AND s.nspname = current_schema() \
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
    LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary WHERE c.relkind = 'r' ORDER BY 1, 2";
const POSTGRES_REFERENCES: &str = "SELECT CAST(c.relname AS TEXT) AS t, CAST(r.relname AS TEXT) AS r \
    FROM pg_constraint f JOIN pg_class c ON c.oid = f.conrelid JOIN pg_class r ON r.oid = f.confrelid \
    JOIN pg_namespace s ON s.oid = c.relnamespace AND s.nspname = current_schema() WHERE f.contype = 'f'";

/// The databases' own, the migrations', and what is worth nothing outside of the process that wrote it.
fn is_bookkeeping(table: &str) -> bool {
    table.starts_with("_sqlx") || table.starts_with("sqlite_") || table == "commit_marks"
}

/// Every table, those that others refer to first.
///
/// # Errors
/// Those of the database; one that has a column that can't be carried over.
pub(super) async fn tables(tx: &mut Tx) -> Result<Vec<Table>, RegistryError> {
    let (columns, references) = match tx.backend() {
        Backend::Sqlite => (SQLITE_COLUMNS, SQLITE_REFERENCES),
        Backend::Postgres(_) => (POSTGRES_COLUMNS, POSTGRES_REFERENCES),
    };
    let mut tables: BTreeMap<String, Vec<Column>> = BTreeMap::new();
    for row in tx.all(sqlx::query(AssertSqlSafe(columns))).await? {
        let (table, name): (String, String) = (column(&row, "t")?, column(&row, "c")?);
        if is_bookkeeping(&table) {
            continue;
        }
        let kind: String = column(&row, "k")?;
        let kind = Kind::of(&kind).ok_or_else(|| {
            RegistryError::malformed("schema", format!("{table}.{name} is of the unknown type {kind}"))
        })?;
        tables.entry(table).or_default().push(Column { name, kind, key: column(&row, "n")? });
    }
    let mut needs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in tx.all(sqlx::query(AssertSqlSafe(references))).await? {
        let (table, refers): (String, String) = (column(&row, "t")?, column(&row, "r")?);
        if table != refers {
            needs.entry(table).or_default().insert(refers);
        }
    }
    sorted(tables, &needs)
}

fn sorted(
    mut tables: BTreeMap<String, Vec<Column>>,
    needs: &BTreeMap<String, BTreeSet<String>>,
) -> Result<Vec<Table>, RegistryError> {
    let mut sorted = Vec::with_capacity(tables.len());
    while !tables.is_empty() {
        let free =
            |name: &&String| needs.get(*name).is_none_or(|n| n.iter().all(|r| !tables.contains_key(r)));
        let next = tables.keys().find(free).cloned();
        let next =
            next.ok_or_else(|| RegistryError::malformed("schema", "tables that refer to each other"))?;
        let columns = tables.remove(&next).unwrap_or_default();
        let table = Table { name: next, columns };
        if table.key().is_empty() {
            return Err(RegistryError::malformed("schema", format!("{} has no primary key", table.name)));
        }
        sorted.push(table);
    }
    Ok(sorted)
}
