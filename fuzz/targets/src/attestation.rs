//! What a host says of its platform. A good answer was recorded (`crates/attest/examples/record_question.rs`); bytes that
//! differ from it where they are signed must not be trusted.

use attest::event_log::EventLog;
use attest::structure::{Attest, Public, Signature};
use attest::verify::{Expectation, LastSeen, appraise};
use attest::{Bank, Binding, Enrolled, Evidence, ReferenceValues};
use serde::Deserialize;
use std::sync::OnceLock;

#[derive(Deserialize)]
struct Recorded {
    enrolled: Enrolled,
    reference: ReferenceValues,
    binding: Binding,
    evidence: String,
    event_log: String,
}

fn recorded() -> &'static Recorded {
    static RECORDED: OnceLock<Recorded> = OnceLock::new();
    RECORDED.get_or_init(|| {
        serde_json::from_str(include_str!("../recorded/attestation.json"))
            .expect("it was written by the project's own command, and a test reads it")
    })
}

fn bytes(text: &str) -> Vec<u8> {
    hex::decode(text).expect("it was written by the project's own command, and a test reads it")
}

/// The recorded evidence.
pub(crate) fn evidence_seed() -> Vec<u8> {
    bytes(&recorded().evidence)
}

/// The recorded event log.
pub(crate) fn event_log_seed() -> Vec<u8> {
    bytes(&recorded().event_log)
}

/// Attestation, key and signature of the recorded evidence, each behind its kind.
pub(crate) fn structure_seeds() -> Vec<Vec<u8>> {
    let evidence = Evidence::from_bytes(&evidence_seed()).expect("it was recorded whole");
    let parts = [evidence.attest.as_slice(), evidence.ak_public.as_slice(), evidence.signature.as_slice()];
    (0_u8..).zip(parts).map(|(kind, part)| [&[kind], part].concat()).collect()
}

/// Evidence: what is read writes back the same, and only the signed bytes are trusted.
pub(crate) fn evidence(bytes: &[u8]) {
    let Ok(evidence) = Evidence::from_bytes(bytes) else { return };
    assert!(evidence.to_bytes() == bytes, "what was read does not write back");
    let recorded = recorded();
    let expectation = Expectation {
        enrolled: &recorded.enrolled,
        reference: &recorded.reference,
        binding: &recorded.binding,
        last_seen: LastSeen::Never,
        now_unix_s: 1_800_000_000,
    };
    let outcome = appraise(&expectation, &evidence);
    let good = Evidence::from_bytes(&evidence_seed()).expect("it was recorded whole");
    let signed = |e: &Evidence| (e.attest.clone(), e.pcrs.clone(), e.ak_public.clone());
    // ECDSA has more than one signature of a message; nothing else may differ.
    assert!(outcome.is_err() || signed(&evidence) == signed(&good), "made-up evidence is trusted");
}

/// An event log: it replays, and explains, within its bounds.
pub(crate) fn event_log(bytes: &[u8]) {
    let Ok(log) = EventLog::parse(bytes) else { return };
    for bank in [Bank::Sha256, Bank::Sha384] {
        for index in log.replay(bank).into_keys() {
            let events = log.recorded(index, bank);
            assert!(log.first_difference(index, bank, &events).is_none(), "a log differs from itself");
        }
    }
}

/// The TPM's structures: total, and written back byte for byte where they are kept.
pub(crate) fn structures(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => drop(Attest::parse(bytes)),
        1 => {
            if let Ok(public) = Public::parse(bytes) {
                assert!(public.as_bytes() == bytes, "what was read does not write back");
                let _verdicts = (public.may_attest(), public.may_endorse(), public.name());
            }
        }
        _ => drop(Signature::parse(bytes)),
    }
}
