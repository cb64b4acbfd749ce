//! The two halves without sockets: what a compromised other agent could try.

#![allow(clippy::unwrap_used)]

#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use engine::inspect::learn;
use link::channel::EphemeralKey;
use outrider_agent::arm::{Armed, Identity, arm};
use outrider_agent::effect::{Effect, End};
use outrider_agent::source::Source;
use outrider_agent::target::Target;
use std::time::Instant;
use support::{NOW_UNIX_S, claims, migration, sign};
use types::agent::FromAgent;
use types::handover::{Side, StreamEvidence};
use types::{Digest, ErrorCode};
use wire::frame::Control;

const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

fn armed() -> Armed {
    let (ours, theirs) = (EphemeralKey::generate().unwrap(), EphemeralKey::generate().unwrap());
    let permit = sign(&claims(ours.spki(), theirs.spki()));
    let identity = Identity { side: Side::Source, migration: migration(), key: ours };
    let inventory = learn(&streams::handmade(), "qemu/test").unwrap();
    arm(&identity, &permit.token, &permit.keys, NOW_UNIX_S, (inventory, None)).unwrap()
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
    target.data(0, stream, Instant::now(), &mut |_, piece| released.extend_from_slice(piece)).unwrap();
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
        assert_eq!(rule(&target.control(0, Control::End(claimed), Instant::now())), Some("INV-E4"));
        assert_eq!(released.len(), streams::Marks::of(&stream).devices);
    }
    let (mut target, released) = target_with(&stream);
    let effects = target.control(0, Control::End(good), Instant::now());
    let [Effect::ToHypervisor(held)] = &effects[..] else { panic!("{effects:?}") };
    assert!([released, held.clone()].concat() == stream);
}

#[test]
fn bytes_behind_the_end_are_dropped_with_the_peer() {
    let stream = streams::handmade();
    let (mut target, _) = target_with(&stream);
    let good = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    target.control(0, Control::End(good), Instant::now());
    let mut released = 0;
    let late = target.data(0, b"x", Instant::now(), &mut |_, piece| released += piece.len());
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
        assert_eq!(rule(&target.control(0, Control::End(claimed), Instant::now())), Some(expect));
    }
}
