//! The two halves without sockets: what a compromised other agent could try.

#![allow(clippy::unwrap_used)]

#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use engine::inspect::{Violation, finding, learn};
use link::channel::EphemeralKey;
use outrider_agent::arm::{Armed, Identity, arm};
use outrider_agent::effect::{Effect, End};
use outrider_agent::signatures::Judgement;
use outrider_agent::source::Source;
use outrider_agent::target::Target;
use std::time::Instant;
use support::{NOW_UNIX_S, claims, migration, sign};
use types::agent::FromAgent;
use types::handover::{Side, StreamEvidence};
use types::migration::Finding;
use types::{Digest, ErrorCode};
use wire::frame::Control;

const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

fn armed() -> Armed {
    let (ours, theirs) = (EphemeralKey::generate().unwrap(), EphemeralKey::generate().unwrap());
    let permit = sign(&claims(ours.spki(), theirs.spki()));
    let identity = Identity { side: Side::Source, migration: migration(), key: ours };
    let inventory = learn(&streams::handmade(), "qemu/test").unwrap();
    arm(&identity, &permit.token, &permit.keys, NOW_UNIX_S, inventory).unwrap()
}

fn rule(effects: &[Effect]) -> Option<&str> {
    match effects {
        [Effect::End(End { report: Some(report), abort: Some((ErrorCode::StreamRejected, _)) })] => {
            match &**report {
                FromAgent::Rejected { finding } => Some(&finding.rule),
                _ => None,
            }
        }
        _ => None,
    }
}

#[test]
fn an_acknowledgement_that_the_other_agent_lets_through_stops_at_the_source() {
    let mut source = Source::new(&armed(), Instant::now());
    let effects = source.return_path(&[PONG, SHUT].concat());
    assert_eq!(effects, [Effect::ToHypervisor(PONG.to_vec())]);
}

#[test]
fn a_flood_of_answers_ends_the_source() {
    let mut source = Source::new(&armed(), Instant::now());
    let effects = source.return_path(&PONG.repeat(100));
    assert_eq!(rule(&effects), Some("INV-P1"));
}

#[test]
fn an_answer_to_a_ping_that_was_never_sent_ends_the_source() {
    let mut source = Source::new(&armed(), Instant::now());
    let effects = source.return_path(&[0, 2, 0, 4, 0, 0, 0, 2]);
    assert_eq!(rule(&effects), Some("INV-P1"));
}

fn target_with(stream: &[u8]) -> (Target, Vec<u8>) {
    let mut target = Target::new(&armed(), Instant::now()).unwrap();
    let mut released = Vec::new();
    target.data(stream, Instant::now(), &mut |piece| released.extend_from_slice(piece)).unwrap();
    (target, released)
}

/// What left the source and what arrived must be the same bytes.
#[test]
fn digests_that_differ_release_no_device_state() {
    let stream = streams::handmade();
    let good = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    for claimed in [
        StreamEvidence { digest: Digest::of(b"another"), ..good },
        StreamEvidence { stream_bytes: good.stream_bytes + 1, ..good },
    ] {
        let (mut target, released) = target_with(&stream);
        assert_eq!(rule(&target.control(Control::End(claimed), Instant::now())), Some("INV-E4"));
        assert_eq!(released.len(), streams::Marks::of(&stream).devices);
    }
    let (mut target, released) = target_with(&stream);
    let effects = target.control(Control::End(good), Instant::now());
    let [Effect::ToHypervisor(held)] = &effects[..] else { panic!("{effects:?}") };
    assert!([released, held.clone()].concat() == stream);
}

fn judging() -> (Target, Vec<u8>) {
    let stream = streams::handmade();
    let mut armed = armed();
    armed.profile.signatures = true;
    let mut target = Target::new(&armed, Instant::now()).unwrap();
    target.data(&stream, Instant::now(), &mut |_| {}).unwrap();
    let evidence = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    assert_eq!(target.control(Control::End(evidence), Instant::now()), []);
    assert!(target.is_judging());
    (target, stream)
}

fn signature_finding() -> Finding {
    let violation = Violation::new("SIG-1", 0, "pc.ram at 0x1000", "no signature", "rule EICAR");
    finding(&violation, 0, "terminated")
}

/// Signatures: the verdict comes before the device state is released.
#[test]
fn the_device_state_waits_for_the_verdict() {
    let (mut target, stream) = judging();
    assert_eq!(target.flushed(0), [], "nothing is accepted yet");
    let clean = Judgement { refusal: None, findings: vec![signature_finding()] };
    let effects = target.judged(clean.clone(), Instant::now());
    let [Effect::Report(observed), Effect::ToHypervisor(held)] = &effects[..] else { panic!("{effects:?}") };
    assert!(matches!(&**observed, FromAgent::Observed { .. }));
    assert!(stream.ends_with(held) && held.len() == stream.len() - streams::Marks::of(&stream).devices);
    assert_eq!(target.judged(clean, Instant::now()), [], "it is judged once");
    assert_eq!(target.flushed(0).len(), 2);
}

#[test]
fn a_verdict_that_refuses_releases_nothing() {
    let refusing = Judgement { refusal: Some(signature_finding()), findings: vec![] };
    let (mut target, _) = judging();
    assert_eq!(rule(&target.judged(refusing.clone(), Instant::now())), Some("SIG-1"));
    // Before the end as well; a clean one counts only then.
    let (mut target, _) = target_with(&streams::handmade());
    assert_eq!(target.judged(Judgement { refusal: None, findings: vec![] }, Instant::now()), []);
    assert_eq!(rule(&target.judged(refusing, Instant::now())), Some("SIG-1"));
}

#[test]
fn bytes_behind_the_end_are_dropped_with_the_peer() {
    let stream = streams::handmade();
    let (mut target, _) = target_with(&stream);
    let good = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    target.control(Control::End(good), Instant::now());
    let mut released = 0;
    let late = target.data(b"x", Instant::now(), &mut |piece| released += piece.len());
    assert_eq!(late, Err(vec![Effect::DropPeer]));
    assert_eq!(released, 0);
}

#[test]
fn an_end_without_a_complete_stream_is_refused() {
    let stream = streams::handmade();
    let devices = streams::Marks::of(&stream).devices;
    for (len, expect) in [(devices - 30, "INV-S10"), (devices + 40, "INV-E2")] {
        let (mut target, _) = target_with(&stream[..len]);
        let claimed = StreamEvidence { stream_bytes: len as u64, digest: Digest::of(&stream[..len]) };
        assert_eq!(rule(&target.control(Control::End(claimed), Instant::now())), Some(expect));
    }
}
