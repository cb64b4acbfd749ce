//! The tree over the audit log: proofs from the stored nodes, damage, logs of an older version; on both databases.

use crate::place::{Place, append, on_both, whole};
use outrider_registry::{AuditVerdict, LogRow, ManagerKey, Registry, Standing};
use permit::merkle;
use types::Nonce;

on_both!(
    every_entry_and_every_earlier_log_is_proven,
    damage_to_the_tree_is_found,
    a_log_of_an_older_version_is_hashed_when_it_is_opened,
    the_log_s_row_and_keys_are_kept,
);

async fn entries(registry: &Registry) -> Vec<outrider_registry::AuditRecord> {
    registry.read("entries").await.unwrap().audit_entries(0, 10_000).await.unwrap()
}

async fn every_entry_and_every_earlier_log_is_proven(place: Place) {
    let (registry, _) = place.furnished().await;
    let mut tips = vec![registry.read("tip").await.unwrap().audit_tip().await.unwrap().unwrap()];
    for n in 0..20 {
        append(&registry, &format!("s{n}")).await.unwrap();
        tips.push(registry.read("tip").await.unwrap().audit_tip().await.unwrap().unwrap());
    }
    let last = *tips.last().unwrap();
    assert_eq!(last.size, 25);
    for entry in entries(&registry).await {
        let leaf = merkle::leaf(&entry.canonical().unwrap());
        for tip in tips.iter().filter(|tip| tip.size >= entry.sequence) {
            let mut tx = registry.read("proof").await.unwrap();
            let proof = tx.audit_inclusion(entry.sequence, tip.size).await.unwrap().unwrap();
            assert!(merkle::includes(leaf, entry.sequence - 1, tip.size, &proof, tip.root), "{entry:?}");
        }
    }
    for tip in &tips {
        let mut tx = registry.read("proof").await.unwrap();
        let extension = tx.audit_extension(tip.size, last.size).await.unwrap().unwrap();
        assert!(merkle::extends((tip.size, tip.root), (last.size, last.root), &extension.proof));
        assert_eq!(tx.audit_extension(last.size + 1, last.size).await.unwrap(), None);
        assert_eq!(tx.audit_inclusion(0, last.size).await.unwrap(), None);
    }
    whole(&registry).await;
}

async fn damage_to_the_tree_is_found(place: Place) {
    let broken = async |sql: &'static str, expect: u64| {
        let place = place.another();
        let (registry, _) = place.furnished().await;
        let changed = sqlx::query(sql).execute(&mut place.intruder().await).await.unwrap();
        assert_eq!(changed.rows_affected(), 1, "{sql}");
        match registry.read("verify").await.unwrap().verify_audit(None).await.unwrap() {
            AuditVerdict::Broken { first_bad, .. } => assert_eq!(first_bad, expect, "{sql}"),
            whole @ AuditVerdict::Whole { .. } => panic!("{sql} went unseen: {whole:?}"),
        }
        (place, registry)
    };
    broken("UPDATE audit SET nodes = (SELECT nodes FROM audit WHERE sequence = 1) WHERE sequence = 3", 3)
        .await;
    broken("UPDATE audit SET nodes = NULL WHERE sequence = 2", 3).await;
    broken("UPDATE audit_head SET frontier = (SELECT nodes FROM audit WHERE sequence = 2)", 5).await;
    // With a frontier that can't be right nothing is signed, and the log goes on.
    let (_place, registry) = broken("UPDATE audit_head SET tree_size = 4", 5).await;
    assert_eq!(registry.read("tip").await.unwrap().audit_tip().await.unwrap(), None);
    append(&registry, "later").await.unwrap();
    assert_eq!(entries(&registry).await.len(), 6);
}

async fn a_log_of_an_older_version_is_hashed_when_it_is_opened(place: Place) {
    let (registry, _) = place.furnished().await;
    for n in 0..1_100 {
        let mut tx = registry.begin("append", 2).await.unwrap();
        tx.audit("x", "append", &format!("s{n}"), serde_json::json!({})).await.unwrap();
        tx.commit().await.unwrap();
        if n == 20 {
            // From here on as an older version leaves it.
            let mut intruder = place.intruder().await;
            for sql in
                ["UPDATE audit SET nodes = NULL", "UPDATE audit_head SET tree_size = NULL, frontier = NULL"]
            {
                sqlx::query(sql).execute(&mut intruder).await.unwrap();
            }
        }
    }
    let expect = {
        let mut tree = merkle::Frontier::default();
        for entry in entries(&registry).await {
            tree.push(merkle::leaf(&entry.canonical().unwrap()));
        }
        tree
    };
    assert_eq!(registry.read("tip").await.unwrap().audit_tip().await.unwrap(), None);
    whole(&registry).await;
    drop(registry);
    let registry = place.open().await;
    let tip = registry.read("tip").await.unwrap().audit_tip().await.unwrap().unwrap();
    assert_eq!((tip.size, tip.root), (expect.size(), expect.root()));
    assert_eq!(whole(&registry).await, 1_105);
    append(&registry, "later").await.unwrap();
    assert_eq!(whole(&registry).await, 1_106);
}

async fn the_log_s_row_and_keys_are_kept(place: Place) {
    let registry = place.open().await;
    let mut tx = registry.begin("log", 5).await.unwrap();
    assert_eq!(tx.audit_log().await.unwrap(), None);
    let mut row = LogRow {
        log: Nonce::from_bytes([3; 16]),
        generation: 0,
        standing: Standing::Trusted,
        why: String::new(),
        since_us: 0,
        first_bad: None,
        accepted_at_us: 0,
    };
    tx.put_audit_log(&row).await.unwrap();
    assert_eq!(tx.audit_log().await.unwrap(), Some(row.clone()));
    (row.standing, row.first_bad, row.generation) = (Standing::Distrusted, Some(7), 2);
    tx.put_audit_log(&row).await.unwrap();
    let key = ManagerKey { key_id: "k".to_owned(), manager: "m".to_owned(), public_key: vec![1; 32] };
    assert!(tx.note_manager_key(&key).await.unwrap());
    assert!(!tx.note_manager_key(&key).await.unwrap());
    tx.commit().await.unwrap();
    let mut tx = registry.read("log").await.unwrap();
    assert_eq!(tx.audit_log().await.unwrap(), Some(row));
    assert_eq!(tx.manager_key("k").await.unwrap(), Some(key));
    assert_eq!(tx.manager_key("other").await.unwrap(), None);
}
