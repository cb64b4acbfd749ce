//! Platforms, reference values and quotes: the same on both databases.

use crate::place::{Place, host_spec, migration, name, on_both};
use outrider_registry::{PlatformVerdict, QuoteRow};
use types::Side;

on_both!(
    a_platform_is_enrolled_appraised_and_enrolled_anew,
    reference_values_are_set_replaced_and_listed,
    the_last_quote_of_a_stage_is_kept,
);

fn verdict(trusted: bool, at_us: i64) -> PlatformVerdict {
    let reason = (!trusted).then(|| "PCR 4 differs\0".to_owned());
    PlatformVerdict { trusted, at_us, reason, appraisal: Some("{}".to_owned()) }
}

async fn a_platform_is_enrolled_appraised_and_enrolled_anew(place: Place) {
    let registry = place.open().await;
    let host = name("host-a");
    let mut tx = registry.begin("enrol", 5).await.unwrap();
    tx.add_host(&host_spec("host-a")).await.unwrap();
    assert_eq!(tx.platform(&host).await.unwrap(), None);
    // Nothing is enrolled yet: nothing is recorded.
    tx.platform_appraised(&host, &verdict(true, 6), None).await.unwrap();
    assert_eq!(tx.platform(&host).await.unwrap(), None);
    tx.enrol_platform(&host, "{\"ek\":1}").await.unwrap();
    tx.platform_appraised(&host, &verdict(true, 7), Some("clock 1")).await.unwrap();
    tx.commit().await.unwrap();
    registry.close().await;

    let registry = place.open().await;
    let mut tx = registry.begin("appraise", 8).await.unwrap();
    let row = tx.platform(&host).await.unwrap().unwrap();
    assert_eq!((row.enrolled_at_us, row.clock.as_deref()), (5, Some("clock 1")));
    assert!(row.verdict.unwrap().trusted);
    // A refusal leaves the last good clock.
    tx.platform_appraised(&host, &verdict(false, 9), None).await.unwrap();
    let row = tx.platform(&host).await.unwrap().unwrap();
    assert_eq!(row.clock.as_deref(), Some("clock 1"));
    let last = row.verdict.unwrap();
    assert_eq!((last.trusted, last.at_us, last.reason.as_deref()), (false, 9, Some("PCR 4 differs\u{fffd}")));
    tx.enrol_platform(&host, "{\"ek\":2}").await.unwrap();
    let row = tx.platform(&host).await.unwrap().unwrap();
    assert_eq!((row.enrolled.as_str(), row.clock, row.verdict), ("{\"ek\":2}", None, None));
}

async fn reference_values_are_set_replaced_and_listed(place: Place) {
    let registry = place.open().await;
    let mut tx = registry.begin("set", 5).await.unwrap();
    for (scope, document) in [("host/b", "1"), ("class/rack", "2"), ("host/a", "3"), ("host/b", "4")] {
        tx.set_reference(scope, document, "admin\0").await.unwrap();
    }
    let all = tx.references().await.unwrap();
    let seen: Vec<_> = all.iter().map(|row| (row.scope.as_str(), row.document.as_str())).collect();
    assert_eq!(seen, [("class/rack", "2"), ("host/a", "3"), ("host/b", "4")]);
    assert_eq!((all[0].set_at_us, all[0].set_by.as_str()), (5, "admin\u{fffd}"));
    assert!(tx.remove_reference("host/a").await.unwrap());
    assert!(!tx.remove_reference("host/a").await.unwrap());
    assert_eq!(tx.reference("host/a").await.unwrap(), None);
    assert_eq!(tx.reference("host/b").await.unwrap().unwrap().document, "4");
}

async fn the_last_quote_of_a_stage_is_kept(place: Place) {
    let (registry, vm) = place.furnished().await;
    let row = migration(7, &vm);
    let mut tx = registry.begin("keep", 5).await.unwrap();
    tx.add_migration(&row).await.unwrap();
    let quote = |side, stage: &str, byte: u8| QuoteRow {
        side,
        stage: stage.to_owned(),
        binding: "{}".to_owned(),
        evidence: vec![byte; 3],
        appraisal: "{}".to_owned(),
        taken_at_us: byte.into(),
    };
    let kept = [
        quote(Side::Source, "permit", 1),
        quote(Side::Target, "permit", 2),
        quote(Side::Target, "convergence", 3),
        quote(Side::Target, "convergence", 4),
    ];
    for quote in &kept {
        tx.put_quote(row.id, quote).await.unwrap();
    }
    assert_eq!(tx.quotes(row.id).await.unwrap(), [kept[0].clone(), kept[1].clone(), kept[3].clone()]);
    assert_eq!(tx.quotes(types::MigrationId::from_bytes([9; 16])).await.unwrap(), []);
}
