//! Quotes of a real software TPM, appraised: one row for each way in which evidence can be wrong.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use attest::structure::Attest;
use attest::testkit::{Forge, KeyShape, digest};
use attest::verify::{AllowedDigest, Expectation, LastSeen, ReferencePcr, Verdict, appraise};
use attest::{
    Appraisal, Bank, Bounded, ClockInfo, Enrolled, Evidence, PcrSelection, PcrValues, Purpose,
    ReferenceValues,
};
use support::{NOW, PCRS, Platform, binding, codes, pcr, ready, selection};
use types::Digest;

#[test]
fn a_fresh_quote_of_an_enrolled_platform_is_trusted() {
    if !ready(&[]) {
        return;
    }
    for shape in [KeyShape::Usual, KeyShape::RsaSsa, KeyShape::RsaPss] {
        let mut platform = Platform::with_key(shape);
        let question = binding("host-a", 1);
        let evidence = platform.evidence(&question);
        let outcome = platform.appraise(&question, &evidence);
        let appraised = outcome.unwrap_or_else(|refusal| panic!("{shape:?}: {refusal}"));
        let record = appraised.appraisal();
        assert_eq!((record.verdict, record.evidence), (Verdict::Trusted, evidence.digest()));
        assert_eq!((record.pcrs.len(), record.qualifying_data), (PCRS.len(), question.qualifying_data()));
        assert!(record.pcrs.iter().all(|pcr| pcr.matches) && record.clock.is_some());
        let counts = [NOW - 1, NOW, NOW + 60, NOW + 61].map(|now| appraised.counts_at(now));
        assert_eq!(counts, [false, true, true, false]);
        assert!(appraised.is_about(&question) && !appraised.is_about(&binding("host-a", 2)));
        let json = serde_json::to_string(record).unwrap();
        let again: Appraisal = serde_json::from_str(&json).unwrap();
        assert_eq!((&again, again.digest()), (record, record.digest()));
    }
}

#[test]
fn a_sha384_bank_is_quoted_and_trusted() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let asked = PcrSelection::of(Bank::Sha384, (0..24).map(pcr));
    let values = platform.tpm.pcr_read(&asked).unwrap();
    assert_eq!(values.values().len(), 24, "three responses of eight values each");
    platform.reference = ReferenceValues::recorded(&values, None).unwrap();
    let question = binding("host-a", 1);
    let evidence = platform.evidence(&question);
    assert_eq!(codes(&platform.appraise(&question, &evidence)), Vec::<&str>::new());
}

/// threats.md HC-02.
#[test]
fn a_quote_about_something_else_is_refused() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let asked = binding("host-a", 1);
    let evidence = platform.evidence(&asked);
    let mut other_agent = binding("host-a", 1);
    if let Purpose::Migration { agent_spki, .. } = &mut other_agent.purpose {
        *agent_spki = Digest::of(b"another VM agent's key");
    }
    let mut check = binding("host-a", 1);
    check.purpose = Purpose::HostCheck;
    let mut other_key = binding("host-a", 1);
    other_key.host_spki = Digest::of(b"the TLS key of a host that relays the question");
    for question in [binding("host-a", 2), binding("host-b", 1), other_agent, check, other_key] {
        let outcome = platform.appraise(&question, &evidence);
        assert_eq!(codes(&outcome), ["attest-wrong-binding"], "{question:?}");
    }
    let refusal = platform.appraise(&binding("host-a", 2), &evidence).unwrap_err();
    let text = refusal.to_string();
    assert!(text.starts_with("spiffe://lab/host/host-a is not trusted: the quote is about"), "{text}");
    assert!(text.contains(&asked.qualifying_data().to_string()), "{text}");
    assert!(refusal.appraisal().pcrs.is_empty(), "nothing is known of registers whose quote is not good");
}

#[test]
fn a_quote_by_another_key_is_refused() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let mut stranger = Platform::new();
    let question = binding("host-a", 1);
    // Another machine, asked by the attacker who relays our question to it.
    let relayed = stranger.evidence(&question);
    let all = ["attest-ak-not-enrolled", "attest-bad-signature", "attest-wrong-signer"];
    assert_eq!(codes(&platform.appraise(&question, &relayed)), all);
    // The same, under the name of the enrolled key.
    let renamed = Evidence { ak_public: platform.evidence(&question).ak_public, ..relayed };
    assert_eq!(codes(&platform.appraise(&question, &renamed)), all[1..]);
    // Another key of the same TPM.
    let own = std::mem::replace(&mut platform.ak, platform.tpm.load_key(KeyShape::RsaSsa).unwrap());
    assert_eq!(codes(&platform.appraise(&question, &stranger.evidence(&question))), all);
    let other = platform.evidence(&question);
    assert_eq!(codes(&platform.appraise(&question, &other)), all);
    platform.ak = own;
    let good = platform.evidence(&question);
    assert_eq!(codes(&platform.appraise(&question, &good)), Vec::<&str>::new());
}

#[test]
fn a_key_that_is_unfit_or_lies_elsewhere_is_refused_even_if_its_record_says_otherwise() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    for (shape, expect, why) in [
        (KeyShape::Unrestricted, "attest-ak-unfit", "restricted is not set"),
        (KeyShape::NotFixed, "attest-ak-unfit", "fixedTPM is not set"),
        (KeyShape::OwnerPrimary, "attest-wrong-signer", "below the enrolled endorsement key"),
    ] {
        let key = platform.tpm.load_key(shape).unwrap();
        let before = std::mem::replace(&mut platform.ak, key);
        platform.tpm.unload_ak(before).unwrap();
        // A record that was altered: no enrolment gives it.
        let record = serde_json::json!({"ek_name": platform.enrolled.ek_name(), "ak": platform.ak.public()});
        platform.enrolled = serde_json::from_value::<Enrolled>(record).unwrap();
        let evidence = platform.evidence(&question);
        let outcome = platform.appraise(&question, &evidence);
        assert_eq!(codes(&outcome), [expect], "{shape:?}");
        // Outside the endorsement hierarchy the counters are masked: "back" could not be told.
        let counted = Attest::parse(evidence.attest.as_slice()).unwrap().clock.reset_count;
        let masked = counted != platform.tpm.read_clock().unwrap().reset_count;
        assert_eq!(masked, shape == KeyShape::OwnerPrimary, "{shape:?}");
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains(why), "{text}");
    }
}

/// threats.md HC-04.
#[test]
fn what_no_quote_is_is_refused() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    let good = platform.evidence(&question);
    // A true statement of the same TPM by the same key, about the key instead of the registers.
    let certified = platform.tpm.certify(&platform.ak, &question.qualifying_data().0).unwrap();
    let certified = Evidence { attest: certified.attest, signature: certified.signature, ..good.clone() };
    assert_eq!(codes(&platform.appraise(&question, &certified)), ["attest-not-a-quote"]);
    // Composed outside: a restricted key does not sign it …
    let composed = good.attest.as_slice().to_vec();
    assert!(platform.tpm.sign(&platform.ak, &composed).is_err());
    // … an unrestricted one does not either while it begins as the TPM's own do, and signs what begins
    // otherwise.
    let loose = platform.tpm.load_key(KeyShape::Unrestricted).unwrap();
    let mut composed = composed;
    *composed.first_mut().unwrap() ^= 1;
    let signature = platform.tpm.sign(&loose, &composed).unwrap();
    let forged = Evidence {
        attest: Bounded::new(composed).unwrap(),
        signature: Bounded::new(signature).unwrap(),
        ..good.clone()
    };
    let outcome = platform.appraise(&question, &forged);
    assert_eq!(codes(&outcome), ["attest-not-tpm-generated", "attest-bad-signature"]);
    // Cut, lengthened, emptied, too long for any quote.
    let attest = good.attest.as_slice();
    for bytes in [&attest[..attest.len() - 1], &[attest, &[0]].concat(), &attest[..6], &[], &[0xff; 512]] {
        let edited = Evidence { attest: Bounded::new(bytes.to_vec()).unwrap(), ..good.clone() };
        let found = codes(&platform.appraise(&question, &edited));
        assert!(
            found.contains(&"attest-bad-signature") && found.len() == 2,
            "{} bytes: {found:?}",
            bytes.len()
        );
    }
    let signature = good.signature.as_slice();
    for bytes in [&signature[..signature.len() - 1], &[signature, &[0]].concat(), &[]] {
        let edited = Evidence { signature: Bounded::new(bytes.to_vec()).unwrap(), ..good.clone() };
        assert_eq!(codes(&platform.appraise(&question, &edited)), ["attest-malformed-evidence"]);
    }
    assert!(Bounded::<512>::new(vec![0; 513]).is_err());
}

#[test]
fn another_selection_than_asked_is_refused() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    let both = ["attest-wrong-selection", "attest-wrong-values"];
    let more = [&PCRS[..], &[15]].concat();
    let missing = selection(&PCRS[..3]);
    let other_bank = PcrSelection::of(Bank::Sha384, PCRS.map(pcr));
    for asked in [missing, selection(&more), selection(&[1, 4, 7, 14]), other_bank] {
        let data = question.qualifying_data();
        let evidence = platform.tpm.evidence(&platform.ak, &asked, &data, None).unwrap();
        assert_eq!(codes(&platform.appraise(&question, &evidence)), both, "{asked}");
        // The same quote with the values that were asked for.
        let dressed = Evidence { pcrs: platform.evidence(&question).pcrs, ..evidence };
        assert_eq!(codes(&platform.appraise(&question, &dressed)), both[..1], "{asked}");
    }
    // A quote of nothing at all is a quote to the TPM.
    let nothing = PcrSelection::of(Bank::Sha256, []);
    let quote = platform.tpm.quote(&platform.ak, &nothing, &question.qualifying_data()).unwrap();
    let good = platform.evidence(&question);
    let nothing = Evidence { attest: quote.attest, signature: quote.signature, ..good };
    assert_eq!(codes(&platform.appraise(&question, &nothing)), ["attest-malformed-evidence"]);
}

#[test]
fn values_that_were_not_signed_are_refused() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    platform.tpm.extend(pcr(4), &digest(Bank::Sha256, b"an implant")).unwrap();
    let evidence = platform.evidence(&question);
    // The host claims the good values instead of its own.
    let claimed =
        platform.reference.pcrs().iter().map(|(index, pcr)| (*index, pcr.allowed[0].digest.clone()));
    let claimed = PcrValues::new(Bank::Sha256, claimed.collect()).unwrap();
    let lie = Evidence { pcrs: claimed, ..evidence.clone() };
    let outcome = platform.appraise(&question, &lie);
    assert_eq!(codes(&outcome), ["attest-pcr-digest-differs"]);
    let mut fewer = evidence.pcrs.values().clone();
    fewer.pop_first();
    let fewer = Evidence { pcrs: PcrValues::new(Bank::Sha256, fewer).unwrap(), ..evidence };
    assert_eq!(codes(&platform.appraise(&question, &fewer)), ["attest-wrong-values"]);
}

/// threats.md HC-01, HC-05.
#[test]
fn an_extended_register_is_named_with_expected_and_found() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    let good = platform.reference.clone();
    platform.tpm.extend(pcr(4), &digest(Bank::Sha256, b"an implant")).unwrap();
    platform.tpm.extend(pcr(14), &digest(Bank::Sha256, b"another")).unwrap();
    let evidence = platform.evidence(&question);
    let refusal = platform.appraise(&question, &evidence).unwrap_err();
    assert_eq!(codes(&Err(refusal.clone())), ["attest-pcr-mismatch"; 2]);
    let rows = &refusal.appraisal().pcrs;
    let wrong: Vec<_> = rows.iter().filter(|row| !row.matches).map(|row| row.index).collect();
    assert_eq!(wrong, [pcr(4), pcr(14)]);
    let found = evidence.pcrs.values().get(&pcr(4)).unwrap();
    let expect = format!("PCR 4: expected {}, found {found}", good.pcrs()[&pcr(4)].allowed[0].digest);
    assert_eq!(refusal.reasons()[0].detail, expect);
    assert_eq!(
        refusal.appraisal().clock,
        Some(platform.tpm.read_clock().unwrap())
            .map(|now| ClockInfo { clock_ms: refusal.appraisal().clock.unwrap().clock_ms, ..now })
    );
    // A register that is not asked for may hold anything.
    let mut calm = Platform::new();
    calm.tpm.extend(pcr(16), &digest(Bank::Sha256, b"whatever")).unwrap();
    let evidence = calm.evidence(&question);
    assert_eq!(codes(&calm.appraise(&question, &evidence)), Vec::<&str>::new());
}

/// threats.md B-23: a kernel update whose value was registered ahead.
#[test]
fn a_planned_change_is_trusted_in_its_time_beside_the_present_value() {
    if !ready(&[]) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 1);
    let before = platform.evidence(&question);
    platform.tpm.extend(pcr(4), &digest(Bank::Sha256, b"the new kernel")).unwrap();
    let after = platform.evidence(&question);
    let planned = AllowedDigest {
        digest: after.pcrs.values().get(&pcr(4)).unwrap().clone(),
        note: "kernel 6.1.148, change 4711".to_owned(),
        not_before_unix_s: Some(NOW),
        not_after_unix_s: Some(NOW + 3600),
    };
    let mut pcrs: BTreeMap<_, ReferencePcr> = platform.reference.pcrs().clone();
    pcrs.get_mut(&pcr(4)).unwrap().allowed.push(planned);
    platform.reference = ReferenceValues::new(Bank::Sha256, pcrs).unwrap();
    let at = |now_unix_s, evidence| {
        let (enrolled, reference, binding) = (&platform.enrolled, &platform.reference, &question);
        let last_seen = LastSeen::Never;
        let expected = Expectation { enrolled, reference, binding, last_seen, now_unix_s };
        appraise(&expected, evidence)
    };
    for (now, evidence, trusted) in [
        (NOW - 1, &before, true),
        (NOW - 1, &after, false),
        (NOW, &before, true),
        (NOW, &after, true),
        (NOW + 3600, &after, true),
        (NOW + 3601, &after, false),
    ] {
        assert_eq!(at(now, evidence).is_ok(), trusted, "at {now}");
    }
    let refusal = at(NOW - 1, &after).unwrap_err();
    assert!(refusal.to_string().contains("does not count at this time"), "{refusal}");
}

#[test]
fn a_reset_is_seen_and_an_older_copy_of_the_tpm_is_refused() {
    if !ready(&[]) {
        return;
    }
    let (mut platform, blobs) = Platform::with_kept_key();
    let question = binding("host-a", 1);
    let clock = |platform: &mut Platform| {
        let evidence = platform.evidence(&question);
        platform.appraise(&question, &evidence).unwrap().appraisal().clock.unwrap()
    };
    let reboot = |platform: &mut Platform| {
        platform.swtpm.power_on().unwrap();
        platform.tpm = platform.swtpm.tpm().unwrap();
        platform.ak = platform.tpm.load_ak(&blobs).unwrap();
    };
    let first = clock(&mut platform);
    let old = platform.swtpm.folder().join("old");
    platform.swtpm.power_off();
    platform.swtpm.copy_state(&old).unwrap();
    reboot(&mut platform);
    reboot(&mut platform);
    let later = clock(&mut platform);
    assert_eq!(later.reset_count, first.reset_count + 2);
    assert!(!later.safe, "the power was cut");
    let evidence = platform.evidence(&question);
    let after = |platform: &Platform, evidence: &Evidence, last_seen| {
        codes(&platform.appraise_after(&question, evidence, last_seen))
    };
    assert_eq!(after(&platform, &evidence, LastSeen::SameStart(first)), ["attest-restarted"]);
    assert_eq!(after(&platform, &evidence, LastSeen::Earlier(first)), Vec::<&str>::new());
    assert_eq!(after(&platform, &evidence, LastSeen::SameStart(later)), Vec::<&str>::new());
    let ahead = ClockInfo { clock_ms: later.clock_ms + 3_600_000, ..later };
    assert_eq!(after(&platform, &evidence, LastSeen::SameStart(ahead)), ["attest-clock-backwards"]);
    let noted = platform.appraise(&question, &evidence).unwrap();
    assert!(noted.appraisal().notes.iter().any(|note| note.contains("without notice")));
    // The state of then, put back: the same keys, the same registers, and counters that were seen further on.
    platform.swtpm.power_off();
    platform.swtpm.put_state_back(&old).unwrap();
    reboot(&mut platform);
    let evidence = platform.evidence(&question);
    for last_seen in [LastSeen::SameStart(later), LastSeen::Earlier(later)] {
        assert_eq!(after(&platform, &evidence, last_seen), ["attest-counter-backwards"]);
    }
}
