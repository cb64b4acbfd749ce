//! Two folders of migrations, one schema.

use crate::place::Place;
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
