#![allow(clippy::unwrap_used)]
use proptest::prelude::*;
use types::MigrationId;
use types::handover::{Epoch, Statement};
use types::permit::StreamFeatures;

use super::*;
use crate::statement;

const NOW: u64 = 1_800_000_000;

struct World {
    key: SigningKey,
    ring: KeyRing,
    claims: PermitClaims,
}

fn public() -> VerifyingKey {
    *SigningKey::generate().unwrap().verifying_key()
}

fn part(host: &str) -> HostPart {
    HostPart {
        host: host.parse().unwrap(),
        agent_spki: public().to_spki_der(),
        daemon_key: public().as_bytes().to_vec(),
        quote: None,
    }
}

fn world() -> World {
    let key = SigningKey::generate().unwrap();
    let mut ring = KeyRing::new();
    assert!(ring.insert("manager-1", *key.verifying_key()));
    let claims = PermitClaims {
        version: 1,
        key: HandoverKey {
            migration: MigrationId::from_bytes([1; 16]),
            vm: VmId::from_bytes([2; 16]),
            source_epoch: Epoch(6),
            target_epoch: Epoch(7),
        },
        spec_digest: Digest::of(b"spec"),
        source: part("host-a"),
        target: part("host-b"),
        target_journal: Nonce::from_bytes([3; 16]),
        nonce: Nonce::from_bytes([4; 16]),
        issued_at_unix_s: NOW,
        not_after_unix_s: NOW + 60,
        run_deadline_unix_s: NOW + 3600,
        byte_budget: 1 << 40,
        duration_budget_ms: 3_600_000,
        downtime_budget_ms: 5_000,
        features: StreamFeatures::default(),
        inspection_profile: "strict".into(),
        compatibility: "qemu/10.0.2/pc-q35-10.0".into(),
    };
    World { key, ring, claims }
}

impl World {
    fn token(&self) -> PermitToken {
        issue(&self.key, "manager-1", &self.claims).unwrap()
    }

    fn verify_at(&self, now: u64) -> Result<VerifiedPermit, PermitRefusal> {
        verify(&self.token(), &self.ring, now, DEFAULT_SKEW_S)
    }
}

#[test]
fn a_permit_says_what_was_issued_and_is_deterministic() {
    let world = world();
    let permit = world.verify_at(NOW + 1).unwrap();
    assert_eq!(permit.claims(), &world.claims);
    assert_eq!(permit.digest(), Digest::of(world.token().as_bytes()));
    assert_eq!(permit.token(), &world.token());
    assert_eq!(permit.key_id(), "manager-1");
    assert_eq!(PermitToken::from_hex(&permit.token().to_hex()).as_ref(), Ok(permit.token()));
    assert!(world.token().as_bytes().len() < 1700, "{} bytes", world.token().as_bytes().len());
}

#[test]
fn what_a_permit_does_not_name_is_refused_by_name() {
    let world = world();
    let permit = world.verify_at(NOW).unwrap();
    let (a, b): (HostName, HostName) = ("host-a".parse().unwrap(), "host-b".parse().unwrap());
    let claims = &world.claims;
    permit
        .expect_source(&a)
        .and_then(|permit| permit.expect_target(&b))
        .and_then(|permit| permit.expect_agent_key(Side::Source, &claims.source.agent_spki))
        .and_then(|permit| permit.expect_daemon_key(Side::Target, &permit.daemon_key(Side::Target)))
        .and_then(|permit| permit.expect_vm(&claims.key.vm, &claims.spec_digest))
        .and_then(|permit| permit.expect_attempt(&claims.key))
        .and_then(|permit| permit.expect_target_journal(&claims.target_journal))
        .and_then(|permit| permit.expect_within_budget(claims.byte_budget, claims.duration_budget_ms))
        .and_then(|permit| permit.expect_running(claims.run_deadline_unix_s, 0))
        .unwrap();
    let check = |refused: Result<&VerifiedPermit, PermitRefusal>, code: &str| {
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), code);
        assert!(refused.problem().detail.starts_with(code));
    };
    check(permit.expect_target(&a), "wrong-host");
    check(permit.expect_source(&b), "wrong-host");
    check(permit.expect_agent_key(Side::Target, &claims.source.agent_spki), "wrong-key");
    check(permit.expect_daemon_key(Side::Source, &permit.daemon_key(Side::Target)), "wrong-key");
    check(permit.expect_vm(&VmId::from_bytes([9; 16]), &claims.spec_digest), "wrong-vm");
    check(permit.expect_vm(&claims.key.vm, &Digest::of(b"edited spec")), "wrong-vm");
    let attempt = |change: fn(&mut HandoverKey)| {
        let mut key = claims.key;
        change(&mut key);
        key
    };
    check(permit.expect_attempt(&attempt(|key| key.vm = VmId::from_bytes([9; 16]))), "wrong-vm");
    check(
        permit.expect_attempt(&attempt(|key| key.migration = MigrationId::from_bytes([9; 16]))),
        "wrong-vm",
    );
    check(permit.expect_attempt(&attempt(|key| key.source_epoch.0 += 1)), "wrong-epoch");
    check(permit.expect_attempt(&attempt(|key| key.target_epoch.0 += 1)), "wrong-epoch");
    check(permit.expect_target_journal(&Nonce::from_bytes([9; 16])), "wrong-journal");
    check(permit.expect_within_budget(claims.byte_budget + 1, 0), "over-budget");
    check(permit.expect_within_budget(0, claims.duration_budget_ms + 1), "over-budget");
    check(permit.expect_running(claims.run_deadline_unix_s + 1, 0), "expired");
    assert_eq!(PermitRefusal::Replayed.code(), "replayed");
}

#[test]
fn the_start_window_ends_exactly_at_the_skew() {
    let world = world();
    let check = |now: u64, expect: Result<(), &str>| {
        assert_eq!(world.verify_at(now).map(|_| ()).map_err(|refusal| refusal.code()), expect, "{now}");
    };
    check(NOW - DEFAULT_SKEW_S - 1, Err("not-yet-valid"));
    check(NOW - DEFAULT_SKEW_S, Ok(()));
    check(NOW + 60 + DEFAULT_SKEW_S, Ok(()));
    check(NOW + 60 + DEFAULT_SKEW_S + 1, Err("expired"));
    check(0, Err("not-yet-valid"));
    check(u64::MAX, Err("expired"));
}

#[test]
fn strangers_and_impostors_are_told_apart() {
    let world = world();
    let token = world.token();
    let refused = |ring: &KeyRing| verify(&token, ring, NOW, 0).unwrap_err().code();
    assert_eq!(refused(&KeyRing::new()), "unknown-key-id");
    let mut ring = KeyRing::new();
    assert!(ring.insert("manager-1", public()));
    assert_eq!(refused(&ring), "bad-signature");
    let forged = issue(&SigningKey::generate().unwrap(), "manager-1", &world.claims).unwrap();
    assert_eq!(verify(&forged, &world.ring, NOW, 0).unwrap_err().code(), "bad-signature");
}

#[test]
fn a_key_ring_is_bounded_and_refuses_nameless_keys() {
    let key = public();
    let mut ring = KeyRing::new();
    assert!(!ring.insert("", key) && !ring.insert(&"k".repeat(65), key));
    assert!((0..KEY_RING_LIMIT).all(|at| ring.insert(&format!("k{at}"), key)));
    assert!(!ring.insert("one-too-many", key) && ring.insert("k0", key));
}

#[test]
fn a_signature_of_another_kind_is_no_permit_and_the_reverse() {
    let world = world();
    let request = Statement::Request(types::handover::MigrationRequest {
        vm: world.claims.key.vm,
        source: "host-a".parse().unwrap(),
        target: "host-b".parse().unwrap(),
        nonce: world.claims.nonce,
        timestamp_unix_ms: NOW * 1000,
        intent: String::new(),
    });
    let signed = statement::sign(&world.key, &request).unwrap();
    let token = PermitToken::from_bytes(signed.as_bytes().to_vec()).unwrap();
    assert_eq!(verify(&token, &world.ring, NOW, 0).unwrap_err().code(), "wrong-domain");
    // The same payload under the manager's own key, but signed as a statement.
    let payload = encode_claims(&world.claims).unwrap();
    let bytes = envelope::seal(&world.key, "manager-1", Domain::Frozen, payload, PERMIT_LIMIT_BYTES).unwrap();
    assert_eq!(verify(&PermitToken(bytes), &world.ring, NOW, 0).unwrap_err().code(), "wrong-domain");
}

#[test]
fn claims_that_contradict_themselves_are_neither_issued_nor_believed() {
    let check = |change: fn(&mut PermitClaims), code: &str| {
        let mut world = world();
        change(&mut world.claims);
        let refused = issue(&world.key, "manager-1", &world.claims).unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
        // A manager gone wrong, whose signature is good.
        let payload = encode_claims(&world.claims).unwrap();
        if let Ok(bytes) =
            envelope::seal(&world.key, "manager-1", Domain::Permit, payload, PERMIT_LIMIT_BYTES)
        {
            assert_eq!(verify(&PermitToken(bytes), &world.ring, NOW, 0).unwrap_err().code(), code);
        }
    };
    check(|claims| claims.version = 2, "unsupported-version");
    check(|claims| claims.target.host = claims.source.host.clone(), "malformed");
    check(|claims| claims.target.agent_spki = claims.source.agent_spki.clone(), "malformed");
    check(|claims| claims.source.agent_spki.truncate(43), "malformed");
    check(|claims| claims.source.daemon_key = vec![0; 32], "malformed");
    check(|claims| claims.key.target_epoch = claims.key.source_epoch, "malformed");
    check(|claims| claims.not_after_unix_s = claims.issued_at_unix_s, "malformed");
    check(|claims| claims.run_deadline_unix_s = claims.issued_at_unix_s, "malformed");
    check(|claims| claims.byte_budget = 0, "malformed");
    check(|claims| claims.inspection_profile = "p".repeat(129), "malformed");
    check(|claims| claims.features.storage_exports = vec!["x".repeat(200); 16], "too-large");
}

#[test]
fn a_signed_payload_in_any_other_spelling_is_refused() {
    let world = world();
    let good = encode_claims(&world.claims).unwrap();
    let read = |payload: Vec<u8>| {
        let bytes =
            envelope::seal(&world.key, "manager-1", Domain::Permit, payload, PERMIT_LIMIT_BYTES).unwrap();
        verify(&PermitToken(bytes), &world.ring, NOW, 0).map(|_| ()).map_err(|refusal| refusal.code())
    };
    assert_eq!(read(good.clone()), Ok(()));
    let trailing = [&good[..], &[0]].concat();
    assert_eq!(read(trailing), Err("malformed"));
    let Value::Map(fields) = ciborium::from_reader::<Value, _>(&good[..]).unwrap() else { panic!("a map") };
    let encode = |fields: Vec<(Value, Value)>| {
        let mut bytes = Vec::new();
        ciborium::into_writer(&Value::Map(fields), &mut bytes).unwrap();
        bytes
    };
    let mut reordered = fields.clone();
    reordered.rotate_left(1);
    assert_eq!(read(encode(reordered)), Err("malformed"));
    let mut later = fields.clone();
    later[0].1 = Value::from(NOW + 6000);
    assert_eq!(read(encode(later)), Err("malformed"), "exp must agree with our claim");
    let mut extra = fields.clone();
    extra.push((Value::from("more"), Value::from(1)));
    assert_eq!(read(encode(extra)), Err("malformed"));
    let mut without = fields;
    without.pop();
    assert_eq!(read(encode(without)), Err("malformed"));
}

#[test]
fn every_flipped_bit_and_every_truncation_is_refused() {
    let world = world();
    let good = world.token();
    for bit in 0..good.as_bytes().len() * 8 {
        let mut bytes = good.as_bytes().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let refused = verify(&PermitToken(bytes), &world.ring, NOW, 0);
        assert!(refused.is_err(), "bit {bit}");
    }
    for length in 0..good.as_bytes().len() {
        let cut = PermitToken(good.as_bytes()[..length].to_vec());
        assert!(verify(&cut, &world.ring, NOW, 0).is_err(), "{length} bytes");
    }
    let longer = PermitToken([good.as_bytes(), &[0]].concat());
    assert!(verify(&longer, &world.ring, NOW, 0).is_err());
}

#[test]
fn a_second_signature_form_and_an_unprotected_header_are_refused() {
    let world = world();
    let good = world.token();
    // S + L: the same signature to a careless verifier. L is the order of the base point, little endian.
    let order: [u8; 32] = hex::decode("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010")
        .unwrap()
        .try_into()
        .unwrap();
    let mut bytes = good.as_bytes().to_vec();
    let at = bytes.len() - 32;
    let mut carry = 0u16;
    for (byte, add) in bytes[at..].iter_mut().zip(order) {
        let sum = u16::from(*byte) + u16::from(add) + carry;
        *byte = sum.to_le_bytes()[0];
        carry = sum >> 8;
    }
    assert_eq!(verify(&PermitToken(bytes), &world.ring, NOW, 0).unwrap_err().code(), "bad-signature");
    // d2 84 <protected bstr> a0 …: the empty unprotected map becomes one with an entry.
    let mut bytes = good.as_bytes().to_vec();
    let empty_map = bytes.iter().position(|byte| *byte == 0xa0).unwrap();
    bytes.splice(empty_map..=empty_map, [0xa1, 0x18, 0x63, 0x00]);
    let refused = verify(&PermitToken(bytes), &world.ring, NOW, 0).unwrap_err();
    assert_eq!(refused, PermitRefusal::Malformed { rule: "the canonical encoding" });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let world = world();
        let refused = PermitToken::from_bytes(bytes).and_then(|token| verify(&token, &world.ring, NOW, 0));
        prop_assert!(refused.is_err());
    }

    #[test]
    fn garbage_in_a_good_envelope_is_refused_without_a_panic(
        payload in proptest::collection::vec(any::<u8>(), 0..1800),
    ) {
        let world = world();
        let bytes = envelope::seal(&world.key, "manager-1", Domain::Permit, payload, PERMIT_LIMIT_BYTES).unwrap();
        prop_assert!(verify(&PermitToken(bytes), &world.ring, NOW, 0).is_err());
    }

    #[test]
    fn a_damaged_permit_is_refused(at in any::<prop::sample::Index>(), value: u8) {
        let world = world();
        let mut bytes = world.token().0;
        let at = at.index(bytes.len());
        prop_assume!(bytes[at] != value);
        bytes[at] = value;
        prop_assert!(verify(&PermitToken(bytes), &world.ring, NOW, 0).is_err());
    }
}
