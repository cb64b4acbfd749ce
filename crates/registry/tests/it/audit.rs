//! The audit chain: what is done to it behind the registry's back is found, on both databases.

use crate::place::{Place, on_both};
use outrider_registry::AuditVerdict;

on_both!(any_edit_removal_or_reordering_of_the_audit_log_is_found,);

/// What an intruder does to the tables, and the first entry that must be named.
async fn check_tamper(place: &Place, sql: &'static [&'static str], with_anchor: bool, expect_first_bad: u64) {
    let place = place.another();
    let (registry, _) = place.furnished().await;
    let mut tx = registry.read("anchor").await.unwrap();
    let anchor = tx.audit_head().await.unwrap();
    drop(tx);
    let mut intruder = place.intruder().await;
    for statement in sql {
        let done = sqlx::query(*statement).execute(&mut intruder).await.unwrap();
        assert!(done.rows_affected() > 0, "{statement} changed nothing");
    }
    let mut tx = registry.read("verify").await.unwrap();
    match tx.verify_audit(with_anchor.then_some(anchor)).await.unwrap() {
        AuditVerdict::Broken { first_bad, .. } => assert_eq!(first_bad, expect_first_bad, "{sql:?}"),
        whole @ AuditVerdict::Whole { .. } => panic!("{sql:?} went unseen: {whole:?}"),
    }
}

async fn any_edit_removal_or_reordering_of_the_audit_log_is_found(place: Place) {
    check_tamper(&place, &["UPDATE audit SET actor = 'mallory' WHERE sequence = 3"], false, 3).await;
    check_tamper(&place, &["UPDATE audit SET detail = '{\"n\":9}' WHERE sequence = 1"], false, 1).await;
    check_tamper(&place, &["UPDATE audit SET at_us = 7 WHERE sequence = 5"], false, 5).await;
    check_tamper(&place, &["DELETE FROM audit WHERE sequence = 2"], false, 2).await;
    check_tamper(&place, &["DELETE FROM audit WHERE sequence = 5"], false, 5).await;
    check_tamper(&place, &["DELETE FROM audit"], false, 1).await;
    check_tamper(&place, &["DELETE FROM audit", "DELETE FROM audit_head"], true, 1).await;
    let swap: &[&str] = &[
        "UPDATE audit SET sequence = 99 WHERE sequence = 2",
        "UPDATE audit SET sequence = 2 WHERE sequence = 3",
        "UPDATE audit SET sequence = 3 WHERE sequence = 99",
    ];
    check_tamper(&place, swap, false, 2).await;
    // The tail cut off together with the head row: only the anchor outside knows.
    let cut: &[&str] = &[
        "DELETE FROM audit WHERE sequence = 5",
        "UPDATE audit_head SET sequence = 4, hash = (SELECT hash FROM audit WHERE sequence = 4)",
    ];
    check_tamper(&place, cut, true, 5).await;
}
