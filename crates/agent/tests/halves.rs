//! The two halves without sockets: what a compromised other agent could try.

#![allow(clippy::unwrap_used)]

#[path = "support/lanes.rs"]
mod lanes;
#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use engine::inspect::{Violation, finding, learn};
use lanes::Streams;
use link::channel::EphemeralKey;
use outrider_agent::arm::{Armed, Identity, arm};
use outrider_agent::effect::{Effect, End};
use outrider_agent::signatures::Judgement;
use outrider_agent::source::Source;
use outrider_agent::target::Target;
use signature::Policy;
use std::time::{Duration, Instant};
use support::{NOW_UNIX_S, claims, migration, sign};
use types::agent::{EndedBy, FromAgent};
use types::handover::{Side, StreamEvidence};
use types::migration::Finding;
use types::profile::SignatureSearch;
use types::{Digest, ErrorCode};
use wire::frame::Control;

const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

fn armed() -> Armed {
    armed_with(0)
}

fn armed_with(lanes: u16) -> Armed {
    let (ours, theirs) = (EphemeralKey::generate().unwrap(), EphemeralKey::generate().unwrap());
    let mut claims = claims(ours.spki(), theirs.spki());
    claims.features.multifd_channels = lanes;
    let permit = sign(&claims);
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
    target
        .data(0, stream, Instant::now(), &mut |_: u16, piece: &[u8]| released.extend_from_slice(piece))
        .unwrap();
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
    let held = held_of(&effects);
    assert!([released, held.clone()].concat() == stream);
}

/// The device state that is released, in one write; behind it, and nothing else, a report on each device of the handmade
/// stream: the target of these tests has no catalogue that would vouch for any.
fn held_of(effects: &[Effect]) -> &Vec<u8> {
    let [Effect::ToHypervisor(held), reports @ ..] = effects else { panic!("{effects:?}") };
    let named = reports.iter().map(|effect| match effect {
        Effect::Report(report) => match &**report {
            FromAgent::Observed { finding } => (finding.rule.as_str(), finding.section.as_str()),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    });
    let devices = ["timer", "cpu", "0000:00:01.0/virtio-net", "globalstate"];
    assert_eq!(named.collect::<Vec<_>>(), devices.map(|device| ("INV-D2", device)));
    held
}

fn judging() -> (Target, Vec<u8>) {
    let stream = streams::handmade();
    let mut armed = armed();
    armed.profile.signatures = SignatureSearch::BestEffort;
    let mut target = Target::new(&armed, Instant::now()).unwrap();
    target.data(0, &stream, Instant::now(), &mut |_: u16, _: &[u8]| {}).unwrap();
    let evidence = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    assert_eq!(target.control(0, Control::End(evidence), Instant::now()), []);
    assert!(target.is_judging());
    (target, stream)
}

/// The permit's downtime budget holds while the verdict is awaited.
#[test]
fn a_verdict_that_does_not_come_runs_into_the_downtime_budget() {
    let begin = Instant::now();
    let (mut target, _) = judging();
    assert_eq!(target.tick(begin + Duration::from_secs(4)), []);
    assert!(is_end_by(&target.tick(begin + Duration::from_secs(6)), EndedBy::Budget));
}

/// A scanner that gets stuck is named before the downtime budget ends, and long before the stream counts as
/// silent.
#[test]
fn a_scanner_has_half_of_the_downtime_budget_where_the_stream_waits_for_it() {
    let mut armed = armed();
    assert_eq!(armed.downtime_budget(), Duration::from_secs(5));
    for (search, expect) in [
        (SignatureSearch::Off, Policy::default()),
        (SignatureSearch::BestEffort, Policy::default()),
        (SignatureSearch::Complete, Policy::complete(Duration::from_millis(2_500))),
    ] {
        armed.profile.signatures = search;
        assert_eq!(armed.signature_policy(), expect, "{search:?}");
    }
    armed.time_left = Duration::from_secs(2);
    assert_eq!(armed.signature_policy(), Policy::complete(Duration::from_secs(1)));
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
    let [Effect::Report(observed), behind @ ..] = &effects[..] else { panic!("{effects:?}") };
    assert!(
        matches!(&**observed, FromAgent::Observed { finding } if finding.rule == "SIG-1"),
        "{observed:?}"
    );
    let held = held_of(behind);
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
    target.control(0, Control::End(good), Instant::now());
    let mut released = 0;
    let late = target.data(0, b"x", Instant::now(), &mut |_: u16, piece: &[u8]| released += piece.len());
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

/// A target that took two multifd channels and the main one, and no end of any yet.
fn target_with_lanes(streams: &Streams) -> Target {
    let mut target = Target::new(&armed_with(2), Instant::now()).unwrap();
    for (lane, bytes) in (0u16..).zip(&streams.0) {
        target.data(lane, bytes, Instant::now(), &mut |_: u16, _: &[u8]| ()).unwrap();
    }
    target
}

fn evidence(bytes: &[u8]) -> StreamEvidence {
    StreamEvidence { stream_bytes: bytes.len() as u64, digest: Digest::of(bytes) }
}

fn end(target: &mut Target, streams: &Streams, lane: u16) -> Vec<Effect> {
    target.control(lane, Control::End(evidence(&streams.0[usize::from(lane)])), Instant::now())
}

fn is_end_by(effects: &[Effect], by: EndedBy) -> bool {
    matches!(effects, [Effect::End(End { report: Some(report), .. })]
        if matches!(**report, FromAgent::Ended { what, .. } if what == by))
}

#[test]
fn every_lanes_end_is_needed_in_any_order() {
    let streams = Streams::new(2, 0, 5);
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let mut target = target_with_lanes(&streams);
        assert_eq!(end(&mut target, &streams, order[0]), []);
        assert_eq!(end(&mut target, &streams, order[1]), []);
        assert_eq!(target.flushed(0), []);
        let effects = end(&mut target, &streams, order[2]);
        held_of(&effects);
        let accepted = target.flushed(0);
        let all = streams.evidence();
        assert!(accepted.contains(&Effect::Frame(Control::Accepted(all))), "{accepted:?}");
    }
}

#[test]
fn a_lane_whose_digests_differ_is_named() {
    let streams = Streams::new(2, 0, 5);
    for lane in 0..3 {
        let mut target = target_with_lanes(&streams);
        let other =
            StreamEvidence { digest: Digest::of(b"another"), ..evidence(&streams.0[usize::from(lane)]) };
        let effects = target.control(lane, Control::End(other), Instant::now());
        assert_eq!(rule(&effects), Some("INV-E4"));
        let [Effect::End(End { report: Some(report), .. })] = &effects[..] else { unreachable!("as above") };
        assert!(matches!(&**report, FromAgent::Rejected { finding } if finding.channel == lane));
    }
}

#[test]
fn a_missing_end_runs_into_the_downtime_budget() {
    let streams = Streams::new(2, 0, 5);
    let (mut target, begin) = (target_with_lanes(&streams), Instant::now());
    end(&mut target, &streams, 1);
    assert_eq!(target.tick(begin + Duration::from_secs(50)), [], "the guest still runs");
    end(&mut target, &streams, 0);
    assert_eq!(target.tick(begin + Duration::from_secs(4)), []);
    assert!(is_end_by(&target.tick(begin + Duration::from_secs(6)), EndedBy::Budget));
}

#[test]
fn bytes_or_another_end_behind_a_lanes_end_end_it() {
    let streams = Streams::new(2, 0, 5);
    let mut target = target_with_lanes(&streams);
    end(&mut target, &streams, 1);
    let late = target.data(1, b"x", Instant::now(), &mut |_: u16, _: &[u8]| panic!("released")).unwrap_err();
    assert!(is_end_by(&late, EndedBy::Peer), "{late:?}");
    let mut target = target_with_lanes(&streams);
    end(&mut target, &streams, 1);
    assert!(is_end_by(&end(&mut target, &streams, 1), EndedBy::Peer));
}

#[test]
fn only_the_main_lane_speaks() {
    let streams = Streams::new(2, 0, 5);
    for control in [Control::Ping(1), Control::Running, Control::Suspended, Control::Accepted(evidence(b""))]
    {
        let mut target = target_with_lanes(&streams);
        assert!(is_end_by(&target.control(1, control.clone(), Instant::now()), EndedBy::Peer));
        let mut source = Source::new(&armed_with(2), Instant::now());
        assert!(is_end_by(&source.control(2, control, Instant::now()), EndedBy::Peer));
    }
}

#[test]
fn qemu_answers_on_its_main_connection_only() {
    let mut target = target_with_lanes(&Streams::new(2, 0, 5));
    assert_eq!(rule(&target.from_hypervisor(1, &PONG)), Some("INV-P1"));
}

#[test]
fn a_qemu_that_closes_a_lane_before_the_end_ends_it() {
    let streams = Streams::new(2, 0, 5);
    let mut target = target_with_lanes(&streams);
    assert!(is_end_by(&target.hypervisor_gone(1, true), EndedBy::Hypervisor));
    let mut target = target_with_lanes(&streams);
    (0..3).for_each(|lane| drop(end(&mut target, &streams, lane)));
    assert!(is_end_by(&target.hypervisor_gone(1, false), EndedBy::Hypervisor), "it had not taken all");
    assert_eq!(target.hypervisor_gone(1, true), []);
}

/// The main lane's end alone is none: what QEMU wrote on the others is still in their sockets.
#[test]
fn a_source_ends_when_every_lane_is_drained() {
    let streams = Streams::new(2, 0, 5);
    let (mut source, now) = (Source::new(&armed_with(2), Instant::now()), Instant::now());
    source.stream(1, &streams.0[1], now).unwrap();
    source.drained(1);
    source.stream(0, &streams.0[0], now).unwrap();
    assert!(!source.wants_stream(0) && source.wants_stream(1) && source.wants_stream(2));
    assert_eq!(source.end_frames(now), []);
    source.drained(1);
    source.stream(2, &streams.0[2], now).unwrap();
    assert_eq!(source.end_frames(now), []);
    source.drained(2);
    let effects = source.end_frames(now);
    for (lane, bytes) in (0u16..).zip(&streams.0) {
        assert_eq!(effects[usize::from(lane)], Effect::EndOfLane(lane, evidence(bytes)));
    }
    assert_eq!(source.end_frames(now), [], "once");
    let reported = source.flushed(now);
    assert!(matches!(&reported[..], [Effect::Report(report)]
        if matches!(**report, FromAgent::EndOfStream { evidence, .. } if evidence == streams.evidence())));
}

/// INV-T5: a stream that stands still ends, unless somebody holds it.
#[test]
fn a_silent_stream_is_ended_and_a_suspended_one_is_not() {
    let begin = Instant::now();
    let at = |seconds| begin + Duration::from_secs(seconds);
    let mut target = Target::new(&armed(), begin).unwrap();
    assert!(target.tick(at(59)).is_empty());
    assert_eq!(rule(&target.tick(at(61))), Some("INV-T5"));
    let mut held = Target::new(&armed(), begin).unwrap();
    held.control(0, Control::Suspended, at(50));
    assert!(held.tick(at(100)).is_empty());
    held.control(0, Control::Resumed, at(101));
    assert!(held.tick(at(115)).is_empty());
}

/// A target that has nowhere to put what comes does not call the other side silent.
#[test]
fn silence_is_not_blamed_on_the_other_side_while_nothing_is_read() {
    let begin = Instant::now();
    let at = |seconds| begin + Duration::from_secs(seconds);
    let mut target = Target::new(&armed(), begin).unwrap();
    for second in [20, 40, 50] {
        target.not_reading(at(second));
        assert!(target.tick(at(second)).is_empty());
    }
    assert_eq!(rule(&target.tick(at(111))), Some("INV-T5"));
}

/// While frozen nothing but the daemon ends anything, and nothing reaches QEMU.
#[test]
fn a_frozen_source_is_not_ended_by_the_return_path() {
    let stream = streams::handmade();
    for bytes in [PONG.repeat(9), vec![0, 2, 0, 4, 0, 0, 0, 2], vec![0xff; 8], PONG.to_vec(), SHUT.to_vec()] {
        let mut source = Source::new(&armed(), Instant::now());
        assert!(source.stream(0, &stream, Instant::now()).is_ok());
        source.end_frames(Instant::now());
        source.flushed(Instant::now());
        source.frozen();
        let effects = source.return_path(&bytes);
        assert!(effects.iter().all(|effect| *effect == Effect::DropPeer), "{effects:?}");
    }
}
