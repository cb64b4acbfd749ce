//! Two folders of migrations, one schema.

use crate::place::{Place, whole};
use sqlx::Row;
use std::collections::BTreeMap;

/// Table → columns with type and whether they may be empty.
type Schema = BTreeMap<String, Vec<(String, String, bool)>>;

#[tokio::test]
async fn both_databases_have_the_same_tables_and_columns() {
    let Some(postgres) = Place::postgres() else { return };
    let sqlite = Place::sqlite().unwrap();
    let mut found = Vec::new();
    for place in [&sqlite, &postgres] {
        drop(place.open().await);
        let tables = if place.url().starts_with("postgres") {
            "SELECT c.table_name || '' AS t, c.column_name || '' AS c, c.data_type || '' AS k, \
             CAST((c.is_nullable = 'YES') AS BIGINT) AS n FROM information_schema.columns c \
             WHERE c.table_schema = 'public'"
                .replace(
                    "CAST((c.is_nullable = 'YES') AS BIGINT)",
                    "CASE c.is_nullable WHEN 'YES' THEN 1::BIGINT ELSE 0 END",
                )
        } else {
            "SELECT m.name AS t, p.name AS c, p.type AS k, 1 - p.\"notnull\" AS n FROM sqlite_master m \
             JOIN pragma_table_info(m.name) p WHERE m.type = 'table'"
                .to_owned()
        };
        found.push(schema(place, tables).await);
    }
    let [sqlite, postgres] = found.try_into().unwrap();
    assert!(sqlite.len() >= 14, "{:?}", sqlite.keys());
    assert_eq!(sqlite, postgres);
}

/// A registry of the version before there were several managers, with records in it, is brought up to date and keeps them.
#[tokio::test]
async fn a_registry_of_the_first_version_is_brought_up_to_date_with_what_is_in_it() {
    let place = Place::sqlite().unwrap();
    sqlx::any::install_default_drivers();
    let (now, full) = (place.furnished().await, "SELECT name FROM sqlite_master WHERE type = 'table'");
    drop(now);
    // Back to the first version: what the second one added goes, also from the list of those that were applied.
    let mut connection = place.intruder().await;
    let added = include_str!("../../migrations/sqlite/0002_managers.sql");
    let names = |kind: &str| -> Vec<String> {
        let lines = added.lines().filter_map(|line| line.strip_prefix(kind));
        lines.filter_map(|rest| rest.split([' ', '(']).next().map(str::to_owned)).collect()
    };
    let tables = names("CREATE TABLE ");
    assert!(tables.len() >= 2, "{tables:?}");
    for table in &tables {
        let drop = format!("DROP TABLE {table}");
        sqlx::query(sqlx::AssertSqlSafe(drop)).execute(&mut connection).await.unwrap();
    }
    sqlx::query("DELETE FROM _sqlx_migrations WHERE version = 2").execute(&mut connection).await.unwrap();
    let before = sqlx::query(full).fetch_all(&mut connection).await.unwrap().len();
    let registry = place.open().await;
    let after = sqlx::query(full).fetch_all(&mut connection).await.unwrap().len();
    assert_eq!(after, before + tables.len());
    let mut tx = registry.read("what is left").await.unwrap();
    assert_eq!((tx.vms().await.unwrap().len(), tx.managers().await.unwrap().len()), (1, 0));
    drop(tx);
    whole(&registry).await;
}

async fn schema(place: &Place, sql: String) -> Schema {
    let mut connection = place.intruder().await;
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
    let mut schema = Schema::new();
    for row in rows {
        let text = |name: &str| row.get::<String, _>(name);
        let table = text("t");
        // Those of the migrations' own, and what only PostgreSQL needs.
        if table.starts_with("_sqlx") || table.starts_with("sqlite_") || table == "commit_marks" {
            continue;
        }
        let kind = match text("k").to_uppercase().as_str() {
            "BYTEA" | "BLOB" => "BLOB".to_owned(),
            other => other.to_owned(),
        };
        schema.entry(table).or_default().push((text("c"), kind, row.get::<i64, _>("n") != 0));
    }
    schema.values_mut().for_each(|columns| columns.sort());
    schema
}
