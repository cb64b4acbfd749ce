//! Backups: from and into both kinds of database, while others write, damaged, and of other versions.

use crate::place::{Place, append, on_both, whole};
use outrider_registry::{BackupError, LogRow, Registry, Standing, back_up, restore};
use sqlx::Row as _;
use std::collections::BTreeMap;
use types::Nonce;

on_both!(
    everything_is_in_a_backup_and_comes_back_on_either_database,
    a_damaged_backup_is_refused_and_leaves_nothing,
    nothing_is_restored_over_what_is_there,
    a_backup_is_one_picture_while_others_write,
    only_known_versions_are_restored,
);

async fn furnished(place: &Place) -> Registry {
    let (registry, vm) = place.furnished().await;
    let mut tx = registry.begin("more", 3).await.unwrap();
    tx.put_audit_log(&LogRow::new(Nonce::from_bytes([9; 16]), 3)).await.unwrap();
    tx.add_migration(&crate::place::migration(7, &vm)).await.unwrap();
    tx.use_nonce(Nonce::from_bytes([5; 16]), "x").await.unwrap();
    tx.put_api_token(
        &[7; 32],
        &outrider_registry::ApiToken {
            name: "t\u{1F600}\"\\".to_owned(),
            role: "r".to_owned(),
            expires_at_us: None,
            tenants: Some(vec!["a".to_owned()]),
        },
    )
    .await
    .unwrap();
    tx.commit().await.unwrap();
    for n in 0..1_200 {
        append(&registry, &format!("entry {n}")).await.unwrap();
    }
    registry
}

async fn backup(place: &Place) -> Vec<u8> {
    let mut bytes = Vec::new();
    back_up(&place.database(), 77, &mut bytes).await.unwrap();
    bytes
}

/// Every table, as a backup writes it.
fn tables(backup: &[u8]) -> BTreeMap<String, Vec<String>> {
    let (mut tables, mut table) = (BTreeMap::<String, Vec<String>>::new(), String::new());
    for line in std::str::from_utf8(backup).unwrap().lines().skip(1) {
        if line.starts_with('[') {
            tables.get_mut(&table).unwrap().push(line.to_owned());
        } else if let Some(rest) = line.strip_prefix("{\"name\":\"") {
            table = rest.split('"').next().unwrap().to_owned();
            tables.insert(table.clone(), Vec::new());
        }
    }
    tables
}

async fn everything_is_in_a_backup_and_comes_back_on_either_database(place: Place) {
    let registry = furnished(&place).await;
    let bytes = backup(&place).await;
    let before = tables(&bytes);
    for table in ["hosts", "vms", "migrations", "audit", "audit_log", "api_tokens", "request_nonces"] {
        assert!(!before[table].is_empty(), "{table}");
    }
    // Every table of the schema is there, whoever made it.
    let count = match place.url().starts_with("postgres") {
        true => {
            "SELECT count(*) AS n FROM pg_tables WHERE schemaname = 'public' AND tablename NOT LIKE '\\_sqlx%' \
                 AND tablename <> 'commit_marks'"
        }
        false => {
            "SELECT count(*) AS n FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' \
                  AND name NOT LIKE '\\_sqlx%' ESCAPE '\\'"
        }
    };
    let row = sqlx::query(count).fetch_one(&mut place.intruder().await).await.unwrap();
    assert_eq!(row.get::<i64, _>("n"), i64::try_from(before.len()).unwrap(), "{:?}", before.keys());
    assert!(!bytes.windows(9).any(|w| w == b"PRIVATE K"));

    for target in [Place::sqlite(), Place::postgres()].into_iter().flatten() {
        let header = restore(&target.database(), 99, "operator/test", &bytes[..]).await.unwrap();
        assert_eq!(header.audit_entries, 1_205);
        let mut again = tables(&backup(&target).await);
        let log = again.remove("audit_log").unwrap();
        assert!(log[0].contains("\"restored\""), "{log:?}");
        // One entry more, which says what was done; all else is as it was.
        let audit = again.remove("audit").unwrap();
        assert_eq!(audit[..1_205], before["audit"][..]);
        assert!(audit[1_205].contains("registry.restore") && audit.len() == 1_206);
        again.remove("audit_head").unwrap();
        for (table, rows) in again {
            assert_eq!(rows, before[&table], "{table}");
        }
        let restored = target.open().await;
        assert_eq!(whole(&restored).await, 1_206);
        let row = restored.read("log").await.unwrap().audit_log().await.unwrap().unwrap();
        assert_eq!((row.standing, row.log), (Standing::Restored, Nonce::from_bytes([9; 16])));
        assert_eq!(restored.read("tip").await.unwrap().audit_tip().await.unwrap().unwrap().size, 1_206);
        append(&restored, "later").await.unwrap();
    }
    drop(registry);
}

async fn a_damaged_backup_is_refused_and_leaves_nothing(place: Place) {
    furnished(&place).await;
    let good = backup(&place).await;
    let target = place.another();
    let refused = async |bytes: &[u8], what: &str| {
        let error = restore(&target.database(), 99, "x", bytes).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, BackupError::Damaged { .. } | BackupError::Registry(_)), "{what}: {text}");
    };
    refused(b"", "nothing").await;
    refused(b"{}\n", "no header").await;
    refused(&vec![b'x'; 20 << 20], "a line without an end").await;
    for cut in [good.len() - 1, good.len() - 40, good.len() / 2, 300] {
        refused(&good[..cut], &format!("cut at {cut}")).await;
    }
    let mut more = good.clone();
    more.push(b'\n');
    refused(&more, "something behind the end").await;
    // One byte anywhere.
    for n in 0..60 {
        let mut bent = good.clone();
        let at = n * (good.len() - 1) / 60;
        bent[at] ^= 1;
        refused(&bent, &format!("byte {at}")).await;
    }
    let text = String::from_utf8(good.clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let without = |n: usize| {
        let kept: Vec<&str> = lines.iter().enumerate().filter(|(at, _)| *at != n).map(|(_, l)| *l).collect();
        kept.join("\n") + "\n"
    };
    for n in [1, 2, 3, lines.len() / 2, lines.len() - 2] {
        refused(without(n).as_bytes(), &format!("without line {n}")).await;
    }
    // Nothing of all that is there: the good one goes in.
    restore(&target.database(), 99, "x", &good[..]).await.unwrap();
}

async fn nothing_is_restored_over_what_is_there(place: Place) {
    furnished(&place).await;
    let bytes = backup(&place).await;
    let error = restore(&place.database(), 99, "x", &bytes[..]).await.unwrap_err();
    assert!(matches!(error, BackupError::NotEmpty { .. }), "{error}");
    assert_eq!(whole(&place.open().await).await, 1_205);
}

async fn a_backup_is_one_picture_while_others_write(place: Place) {
    let registry = furnished(&place).await;
    let writer = {
        let registry = registry.clone();
        tokio::spawn(async move {
            for n in 0..200 {
                append(&registry, &format!("meanwhile {n}")).await.unwrap();
            }
        })
    };
    let mut sizes = Vec::new();
    for _ in 0..4 {
        let bytes = backup(&place).await;
        let target = place.another();
        let header = restore(&target.database(), 99, "x", &bytes[..]).await.unwrap();
        sizes.push(header.audit_entries);
        assert_eq!(whole(&target.open().await).await, header.audit_entries + 1);
    }
    writer.await.unwrap();
    assert!(sizes.is_sorted(), "{sizes:?}");
    assert_eq!(whole(&registry).await, 1_405);
}

async fn only_known_versions_are_restored(place: Place) {
    furnished(&place).await;
    let text = String::from_utf8(backup(&place).await).unwrap();
    let target = place.another();
    let with = |versions: &[i64]| {
        let (first, rest) = text.split_once('\n').unwrap();
        let mut header: serde_json::Value = serde_json::from_str(first).unwrap();
        header["migrations"] = versions.into();
        format!("{header}\n{rest}")
    };
    let error = restore(&target.database(), 99, "x", with(&[1, 2, 4, 999]).as_bytes()).await.unwrap_err();
    assert!(matches!(error, BackupError::Newer { found: 999, .. }), "{error}");
    let error = restore(&target.database(), 99, "x", with(&[1, 2]).as_bytes()).await.unwrap_err();
    assert!(matches!(error, BackupError::Older { found: 2 }), "{error}");
    let other = text.replacen("\"outrider_backup\":1", "\"outrider_backup\":2", 1);
    let error = restore(&target.database(), 99, "x", other.as_bytes()).await.unwrap_err();
    assert!(matches!(error, BackupError::Damaged { line: 1, .. }), "{error}");
    // Refused before anything was made of the target.
    restore(&target.database(), 99, "x", text.as_bytes()).await.unwrap();
}
