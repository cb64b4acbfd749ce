#![allow(clippy::unwrap_used)]
use std::collections::BTreeSet;

use proptest::prelude::*;
use types::handover::{
    AbortReason, Epoch, HandoverKey, MigrationRequest, NoVote, PriorRunState, ReleaseReceipt,
    RenounceRequest, Renunciation, RunningReceipt, SourceVote, StreamEvidence, TargetVote, ThawReceipt,
};
use types::{Digest, ErrorCode, MigrationId, Nonce, VmId};

use super::*;

fn every_kind() -> Vec<Statement> {
    let key = HandoverKey {
        migration: MigrationId::from_bytes([1; 16]),
        vm: VmId::from_bytes([2; 16]),
        source_epoch: Epoch(6),
        target_epoch: Epoch(u64::MAX),
    };
    let permit = Digest::of(b"permit");
    let evidence = StreamEvidence { stream_bytes: u64::MAX, digest: Digest::of(b"stream") };
    let (source, target) = ("host-a".parse().unwrap(), "host-b".parse().unwrap());
    let reason = AbortReason { code: ErrorCode::HypervisorFailed, detail: "the freeze failed".into() };
    vec![
        Statement::Request(MigrationRequest {
            vm: key.vm,
            source,
            target,
            nonce: Nonce::from_bytes([5; 16]),
            timestamp_unix_ms: 1_800_000_000_123,
            intent: "00".repeat(16),
        }),
        Statement::Frozen(SourceVote { key, permit, evidence, prior: PriorRunState::Running }),
        Statement::NoVote(NoVote { key, reason }),
        Statement::Prepared(TargetVote { key, permit, evidence }),
        Statement::Running(RunningReceipt { key, permit, evidence, state: PriorRunState::Paused }),
        Statement::Renounced(Renunciation {
            key,
            permit,
            source: "host-a".parse().unwrap(),
            target: "host-b".parse().unwrap(),
            journal: Nonce::from_bytes([7; 16]),
        }),
        Statement::AskRenounce(RenounceRequest { key, permit }),
        Statement::Released(ReleaseReceipt { key, evidence }),
        Statement::Thawed(ThawReceipt { key, had_voted: true }),
    ]
}

#[test]
fn every_kind_is_read_back_as_it_was_said() {
    let key = SigningKey::generate().unwrap();
    for statement in every_kind() {
        let signed = sign(&key, &statement).unwrap();
        assert_eq!(sign(&key, &statement).unwrap(), signed, "deterministic");
        assert_eq!(verify(&signed, key.verifying_key()), Ok(statement));
        assert_eq!(SignedStatement::from_hex(&signed.to_hex()), Ok(signed));
    }
}

#[test]
fn every_kind_has_a_domain_of_its_own() {
    let domains: BTreeSet<Domain> = every_kind().iter().map(Domain::of).collect();
    assert_eq!(domains, DOMAINS.into_iter().collect());
    let texts: BTreeSet<&str> = Domain::ALL.iter().map(|domain| domain.as_str()).collect();
    assert_eq!(texts.len(), Domain::ALL.len());
}

#[test]
fn a_payload_of_one_kind_signed_as_another_is_refused() {
    let key = SigningKey::generate().unwrap();
    for statement in every_kind() {
        let payload = envelope::to_cbor(&statement).unwrap();
        for domain in DOMAINS.into_iter().filter(|domain| *domain != Domain::of(&statement)) {
            let bytes = envelope::seal(
                &key,
                &key.verifying_key().id(),
                domain,
                payload.clone(),
                STATEMENT_LIMIT_BYTES,
            );
            let refused = verify(&SignedStatement(bytes.unwrap()), key.verifying_key()).unwrap_err();
            assert_eq!(refused.code(), "malformed");
        }
    }
}

#[test]
fn another_daemon_s_statement_is_refused_even_under_a_borrowed_key_id() {
    let (key, other) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
    let statement = &every_kind()[5];
    let signed = sign(&other, statement).unwrap();
    assert_eq!(verify(&signed, key.verifying_key()).unwrap_err().code(), "unknown-key-id");
    let payload = envelope::to_cbor(statement).unwrap();
    let borrowed = key.verifying_key().id();
    let bytes = envelope::seal(&other, &borrowed, Domain::Renounced, payload, STATEMENT_LIMIT_BYTES).unwrap();
    let refused = verify(&SignedStatement(bytes), key.verifying_key()).unwrap_err();
    assert_eq!(refused, SignatureError::BadSignature);
}

#[test]
fn what_is_too_long_is_neither_signed_nor_taken() {
    let key = SigningKey::generate().unwrap();
    let Statement::NoVote(mut vote) = every_kind().remove(2) else { panic!("the third is a no-vote") };
    vote.reason.detail = "x".repeat(STATEMENT_LIMIT_BYTES);
    assert_eq!(sign(&key, &Statement::NoVote(vote)).unwrap_err().code(), "too-large");
    assert_eq!(
        SignedStatement::from_bytes(vec![0; STATEMENT_LIMIT_BYTES + 1]).unwrap_err().code(),
        "too-large"
    );
    assert_eq!(SignedStatement::from_hex("no hex").unwrap_err().code(), "malformed");
}

#[test]
fn unknown_fields_and_trailing_bytes_are_refused_though_well_signed() {
    use ciborium::value::Value;
    let key = SigningKey::generate().unwrap();
    for statement in every_kind() {
        let good = envelope::to_cbor(&statement).unwrap();
        let Value::Map(mut fields) = ciborium::from_reader::<Value, _>(&good[..]).unwrap() else {
            panic!("a map")
        };
        fields.push((Value::from("more"), Value::from(1)));
        let extra = envelope::to_cbor(&Value::Map(fields)).unwrap();
        for payload in [extra, [&good[..], &[0xf6]].concat()] {
            let bytes = envelope::seal(
                &key,
                &key.verifying_key().id(),
                Domain::of(&statement),
                payload,
                STATEMENT_LIMIT_BYTES,
            );
            let refused = verify(&SignedStatement(bytes.unwrap()), key.verifying_key()).unwrap_err();
            assert_eq!(refused.code(), "malformed");
        }
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_is_refused() {
    let key = SigningKey::generate().unwrap();
    for statement in every_kind() {
        let good = sign(&key, &statement).unwrap().0;
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(
                verify(&SignedStatement(bytes), key.verifying_key()).is_err(),
                "{statement:?}, bit {bit}"
            );
        }
        for length in 0..good.len() {
            assert!(verify(&SignedStatement(good[..length].to_vec()), key.verifying_key()).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_is_refused_without_a_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..5000),
        kind in 0..DOMAINS.len(),
    ) {
        let key = SigningKey::generate().unwrap();
        let bare = SignedStatement::from_bytes(bytes.clone()).and_then(|signed| verify(&signed, key.verifying_key()));
        prop_assert!(bare.is_err());
        let enveloped =
            envelope::seal(&key, &key.verifying_key().id(), DOMAINS[kind], bytes, STATEMENT_LIMIT_BYTES);
        if let Ok(bytes) = enveloped {
            prop_assert!(verify(&SignedStatement(bytes), key.verifying_key()).is_err());
        }
    }
}
