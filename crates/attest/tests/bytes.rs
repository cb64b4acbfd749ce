//! Evidence of a real TPM with every byte changed, cut at every length, and bytes of any kind: nothing
//! panics, and nothing that was signed can be changed.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::LazyLock;

use attest::event_log::EventLog;
use attest::structure::{Attest, Signature};
use attest::testkit::{FirmwareLog, KeyShape};
use attest::tpm::AkBlobs;
use attest::verify::{EVIDENCE_LIMIT_BYTES, Evidence};
use attest::{Binding, Bounded, Malformed, Public};
use proptest::prelude::*;
use support::{Platform, binding, pcr, ready};

/// A platform, a question to it, and its good answer with an event log.
fn answered(shape: KeyShape) -> (Platform, Binding, Evidence) {
    let mut platform = Platform::with_key(shape);
    let question = binding("host-a", 1);
    let log = FirmwareLog::default().measure(pcr(4), 4, &[0; 4]).measure(pcr(7), 0x8000_0001, b"SecureBoot");
    let event_log = Some(Bounded::new(log.to_bytes()).unwrap());
    let evidence = Evidence { event_log, ..platform.evidence(&question) };
    assert!(platform.appraise(&question, &evidence).is_ok());
    (platform, question, evidence)
}

#[test]
fn a_changed_bit_is_refused_or_changes_nothing_that_was_signed() {
    if !ready(&[]) {
        return;
    }
    for shape in [KeyShape::Usual, KeyShape::RsaSsa, KeyShape::RsaPss] {
        let (platform, question, good) = answered(shape);
        let bytes = good.to_bytes();
        let mut accepted = 0;
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                let Ok(evidence) = Evidence::from_bytes(&changed) else { continue };
                assert_eq!(evidence.to_bytes(), changed, "one encoding");
                assert_ne!(evidence.digest(), good.digest());
                if platform.appraise(&question, &evidence).is_ok() {
                    // The log explains; it is not signed, and decides nothing.
                    let unsigned = Evidence { event_log: good.event_log.clone(), ..evidence };
                    assert_eq!(unsigned, good, "{shape:?}: byte {at}, bit {bit}");
                    accepted += 1;
                }
            }
        }
        let log = 8 * good.event_log.as_ref().unwrap().as_slice().len();
        assert!((1..log).contains(&accepted), "{shape:?}: {accepted} of {log} bits of the log");
    }
}

#[test]
fn what_is_cut_or_followed_by_more_is_refused() {
    if !ready(&[]) {
        return;
    }
    let (platform, question, good) = answered(KeyShape::Usual);
    let bytes = good.to_bytes();
    assert_eq!(Evidence::from_bytes(&bytes).unwrap(), good);
    for length in 0..bytes.len() {
        assert!(Evidence::from_bytes(&bytes[..length]).is_err(), "{length} bytes");
    }
    let longer = Evidence::from_bytes(&[&bytes[..], &[0]].concat());
    assert!(matches!(longer, Err(Malformed::Trailing { bytes: 1, .. })), "{longer:?}");
    let huge = Evidence::from_bytes(&vec![0; EVIDENCE_LIMIT_BYTES + 1]);
    assert!(matches!(huge, Err(Malformed::TooLong { .. })), "{huge:?}");
    // Each part on its own, inside a well-formed whole.
    let attest = good.attest.as_slice();
    for length in 0..attest.len() {
        let part = Evidence { attest: Bounded::new(attest[..length].to_vec()).unwrap(), ..good.clone() };
        assert!(platform.appraise(&question, &part).is_err(), "{length} bytes of the attestation");
    }
    // A log that is not one is refused: threats.md HC-04.
    let log = good.event_log.as_ref().unwrap().as_slice();
    let cut =
        Evidence { event_log: Some(Bounded::new(log[..log.len() - 1].to_vec()).unwrap()), ..good.clone() };
    assert_eq!(support::codes(&platform.appraise(&question, &cut)), ["attest-malformed-event-log"]);
}

#[test]
fn json_reads_back_and_is_bounded() {
    if !ready(&[]) {
        return;
    }
    let (_, _, good) = answered(KeyShape::Usual);
    let json = serde_json::to_value(&good).unwrap();
    assert_eq!(serde_json::from_value::<Evidence>(json.clone()).unwrap(), good);
    for (key, value) in [
        ("attest", "A".repeat(2000).into()),
        ("signature", "A".repeat(2000).into()),
        ("event_log", "A".repeat(1_000_000).into()),
        ("ak_public", serde_json::json!([1, 2])),
        ("pcrs", serde_json::json!({"bank": "sha1", "values": {}})),
        ("unknown", serde_json::json!(1)),
    ] {
        let mut edited = json.clone();
        edited[key] = value;
        assert!(serde_json::from_value::<Evidence>(edited).is_err(), "{key}");
    }
}

/// Good evidence of one TPM for all cases of a property.
static GOOD: LazyLock<Option<Vec<u8>>> =
    LazyLock::new(|| ready(&[]).then(|| answered(KeyShape::Usual).2.to_bytes()));

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        if let Ok(evidence) = Evidence::from_bytes(&bytes) {
            prop_assert_eq!(evidence.to_bytes(), bytes.clone());
        }
        if let Ok(public) = Public::parse(&bytes) {
            prop_assert_eq!(public.as_bytes(), &bytes);
        }
        if let Ok(blobs) = AkBlobs::from_bytes(&bytes) {
            prop_assert_eq!(blobs.to_bytes().to_vec(), bytes.clone());
        }
        // A header that no TPM would write is seen before anything else.
        prop_assert!(Attest::parse(&bytes).is_err() || bytes.starts_with(b"\xffTCG"));
        prop_assert!(Signature::parse(&bytes).is_err() || bytes.get(2..4) == Some(&[0, 0x0b]));
        prop_assert!(EventLog::parse(&bytes).is_err() || bytes.len() >= 65);
    }

    #[test]
    fn several_changes_at_once_are_read_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in any::<prop::sample::Index>(),
        shorten in any::<bool>(),
    ) {
        let Some(good) = GOOD.as_ref() else { return Ok(()) };
        let mut bytes = good.clone();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(evidence) = Evidence::from_bytes(&bytes) {
            prop_assert_eq!(evidence.to_bytes(), bytes);
            let attest = evidence.attest.as_slice();
            prop_assert!(Attest::parse(attest).is_err() || attest.starts_with(b"\xffTCG"));
            if let Some(log) = &evidence.event_log {
                let events = EventLog::parse(log.as_slice()).map_or(0, |log| log.events().len());
                prop_assert!(events <= log.as_slice().len() / 16);
            }
        }
    }
}
