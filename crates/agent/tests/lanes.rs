//! Two agent processes with several connections each: the test is both daemons and both QEMUs.

#![allow(clippy::unwrap_used)]

#[path = "support/lanes.rs"]
mod lanes;
#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use lanes::{Lanes, Streams};
use rustix::event::PollFlags;
use std::net::Shutdown;
use std::time::{Duration, Instant};
use support::{PATIENCE, ready};
use types::Nonce;
use types::agent::{EndedBy, FromAgent, ToAgent};

const NONCE: Nonce = Nonce::from_bytes([9; 16]);

fn ended(what: EndedBy) -> impl Fn(&FromAgent) -> bool {
    move |m| matches!(m, FromAgent::Ended { what: w, .. } if *w == what)
}

fn is_closed(socket: &std::os::unix::net::UnixStream) -> bool {
    !ready(socket, PollFlags::RDHUP, PATIENCE).is_empty()
}

/// A complete hand-over of `lanes` lanes, up to the proof.
fn moved(lanes: u16, streams: &Streams) -> Lanes {
    let mut all = Lanes::connect(lanes, &streams.inventory(), |_| {});
    let writers = all.write_all(streams);
    all.give_all();
    all.expect_all(streams);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert_eq!(all.end_of_stream(), streams.evidence());
    all
}

#[test]
fn memory_arrives_on_all_lanes_and_both_sides_agree() {
    for lanes in [1, 2, 16] {
        let streams = Streams::new(lanes, 6, 10);
        // Sixteen channels share eight pages: two of them would send the same one in an epoch.
        let streams = if lanes == 16 { Streams::new(16, 0, 10) } else { streams };
        let mut all = moved(lanes, &streams);
        assert_eq!(all.wanted[0], 0, "the main connection is QEMU's first: {:?}", all.wanted);
        assert_eq!(all.accepted(), streams.evidence());
        all.pair.source.send(&ToAgent::Prove { nonce: NONCE });
        let proof =
            all.pair.source.wait(|m| matches!(m, FromAgent::Proven { .. } | FromAgent::NotProven { .. }));
        assert_eq!(proof, FromAgent::Proven { nonce: NONCE });
        all.pair.source.send(&ToAgent::Frozen);
        // QEMU is done with its multifd connections once it has read the end.
        all.to.truncate(1);
        all.pair.target.send(&ToAgent::AnnounceRunning);
        all.pair.source.wait(|m| matches!(m, FromAgent::PeerRunning { .. }));
        for agent in [&mut all.pair.source, &mut all.pair.target] {
            agent.send(&ToAgent::Terminate);
            assert!(agent.exit().success());
        }
    }
}

/// QEMU stands still from the moment it has a connection until it has its first bytes.
#[test]
fn qemu_is_connected_when_its_first_bytes_are_there_and_the_main_one_first() {
    let streams = Streams::new(2, 1, 5);
    let mut all = Lanes::connect(2, &streams.inventory(), |_| {});
    let early = [all.write(2, &streams.0[2]), all.write(1, &streams.0[1])];
    for _ in 0..3 {
        all.pair.target.progress();
    }
    assert!(!all.pair.target.said.iter().any(|m| matches!(m, FromAgent::HypervisorWanted { .. })));
    let main = all.write(0, &streams.0[0]);
    assert_eq!(all.give_next(), 0);
    assert!(!ready(all.to(0), PollFlags::IN, PATIENCE).is_empty());
    all.give_next();
    all.give_next();
    all.expect_all(&streams);
    early.into_iter().chain([main]).for_each(|writer| writer.join().unwrap());
    assert_eq!(all.accepted(), streams.evidence());
}

/// I3: as long as one lane's peer has not proved its key, nothing is read from any of QEMU's sockets.
#[test]
fn nothing_moves_before_every_lane_stands() {
    let streams = Streams::new(2, 1, 5);
    let mut all = Lanes::armed(2, &streams.inventory(), |_| {});
    all.connect_lane(0, 0);
    all.connect_lane(1, 1);
    all.attach_source();
    let writers = all.write_all(&streams);
    for _ in 0..4 {
        assert_eq!(all.pair.source.progress(), 0);
    }
    all.connect_lane(2, 2);
    all.pair.source.wait(|m| matches!(m, FromAgent::Connected { .. }));
    all.give_all();
    all.expect_all(&streams);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert_eq!(all.accepted(), streams.evidence());
}

#[test]
fn a_lane_that_never_comes_ends_both() {
    let streams = Streams::new(2, 1, 5);
    let mut all = Lanes::armed(2, &streams.inventory(), |_| {});
    all.connect_lane(0, 0);
    all.connect_lane(1, 1);
    for agent in [&mut all.pair.source, &mut all.pair.target] {
        agent.wait(ended(EndedBy::Handshake));
        agent.exit();
    }
}

/// The channel's number is bound by the handshake: lanes can't be swapped.
#[test]
fn a_lane_at_another_lanes_place_is_refused() {
    let streams = Streams::new(2, 1, 5);
    let mut all = Lanes::armed(2, &streams.inventory(), |_| {});
    all.attach_source();
    all.connect_lane(0, 0);
    all.connect_lane(1, 2);
    all.pair.target.wait(ended(EndedBy::Handshake));
    all.pair.source.wait(|m| matches!(m, FromAgent::Ended { .. }));
    all.pair.source.exit();
    assert!(all.from.iter().all(is_closed));
}

/// A QEMU that does not read one lane stops that lane, and those that must not get ahead of it; never the main one.
#[test]
fn a_lane_that_stalls_stalls_no_other() {
    let streams = Streams::new(2, 2_000, 4_000);
    let mut all = Lanes::connect(2, &streams.inventory(), |_| {});
    let writers = all.write_all(&streams);
    all.give_all();
    // 15 MiB pass on the main lane while nobody reads the first of the others.
    assert!(all.expect(0, &streams.0[0][..15 << 20]).join().unwrap());
    assert!(!writers[1].is_finished() && !writers[2].is_finished());
    let rest = Streams(vec![streams.0[0][15 << 20..].to_vec(), streams.0[1].clone(), streams.0[2].clone()]);
    all.expect_all(&rest);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert_eq!(all.accepted(), streams.evidence());
}

#[test]
fn a_lane_whose_connection_breaks_ends_both() {
    let streams = Streams::new(2, 2_000, 10);
    let mut all = Lanes::connect(2, &streams.inventory(), |_| {});
    let writers = all.write_all(&streams);
    all.give_all();
    assert!(all.expect(1, &streams.0[1][..100_000]).join().unwrap());
    all.wires[2].shutdown(Shutdown::Both).unwrap();
    for agent in [&mut all.pair.source, &mut all.pair.target] {
        agent.wait(ended(EndedBy::Peer));
        agent.exit();
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert!(all.from.iter().all(is_closed), "QEMU's sockets stayed open");
}

#[test]
fn a_suspended_target_holds_every_lane() {
    let streams = Streams::new(2, 500, 500);
    let mut all = Lanes::connect(2, &streams.inventory(), |_| {});
    let writers = all.write_all(&streams);
    all.give_all();
    for lane in 0..3 {
        assert!(all.expect(lane, &streams.0[lane][..1_000]).join().unwrap());
    }
    all.pair.target.send(&ToAgent::Suspend);
    let settle = |all: &mut Lanes| {
        let mut last = u64::MAX;
        // What was on its way to QEMU stays in its sockets; the source is told, and stops.
        loop {
            let now = all.pair.source.progress();
            if now == last {
                return now;
            }
            last = now;
        }
    };
    let held = settle(&mut all);
    for _ in 0..3 {
        assert_eq!(all.pair.source.progress(), held, "bytes moved while suspended");
    }
    all.pair.target.send(&ToAgent::Resume);
    let rest = Streams(streams.0.iter().map(|stream| stream[1_000..].to_vec()).collect());
    all.expect_all(&rest);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert_eq!(all.accepted(), streams.evidence());
}

/// The throttle is over the sum of all lanes, and none of them starves.
#[test]
fn the_throttle_holds_the_rate_of_all_lanes() {
    let streams = Streams::new(2, 100, 20);
    let total: usize = streams.0.iter().map(Vec::len).sum();
    let mut all = Lanes::connect(2, &streams.inventory(), |_| {});
    all.pair.source.send(&ToAgent::Throttle { bytes_per_second: 1_000_000 });
    all.pair.source.send(&ToAgent::Prove { nonce: NONCE });
    all.pair.source.wait(|m| matches!(m, FromAgent::NotProven { .. }));
    let begin = Instant::now();
    let writers = all.write_all(&streams);
    all.give_all();
    all.expect_all(&streams);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let least = Duration::from_secs_f64((total as f64 - 100_000.0) / 1_000_000.0 * 0.9);
    assert!(begin.elapsed() >= least, "{total} bytes in {:?}", begin.elapsed());
}

#[test]
fn the_byte_budget_is_over_all_lanes() {
    let streams = Streams::new(2, 100, 20);
    let mut all = Lanes::connect(2, &streams.inventory(), |claims| claims.byte_budget = 300_000);
    let writers = all.write_all(&streams);
    all.pair.source.wait(ended(EndedBy::Budget));
    writers.into_iter().for_each(|writer| writer.join().unwrap());
}

/// A channel that lacks a SYNC would leave QEMU waiting for ever: the end of the main one shows it.
#[test]
fn a_lane_out_of_step_is_refused_at_the_end() {
    let streams = Streams::new(2, 3, 5);
    for (lane, cut) in [(1, 1344), (2, 1344), (2, 2 * 1344 + 4096)] {
        let mut short = streams.clone();
        let len = short.0[lane].len() - cut;
        short.0[lane].truncate(len);
        let mut all = Lanes::connect(2, &streams.inventory(), |_| {});
        all.write_all(&short).into_iter().for_each(|writer| writer.join().unwrap());
        let rejected = all.pair.target.wait(|m| matches!(m, FromAgent::Rejected { .. }));
        assert!(
            matches!(&rejected, FromAgent::Rejected { finding } if finding.rule == "INV-M8"),
            "{rejected:?}"
        );
        all.pair.source.wait(ended(EndedBy::Peer));
    }
}

#[test]
fn what_a_lane_does_after_the_end_spoils_the_proof() {
    let streams = Streams::new(2, 2, 5);
    let mut all = moved(2, &streams);
    all.write(2, b"x").join().unwrap();
    all.pair.source.send(&ToAgent::Prove { nonce: NONCE });
    let proof = all.pair.source.wait(|m| matches!(m, FromAgent::Proven { .. } | FromAgent::NotProven { .. }));
    assert!(
        matches!(&proof, FromAgent::NotProven { detail, .. } if detail.contains("channel 2")),
        "{proof:?}"
    );

    let mut all = moved(2, &streams);
    all.from.pop();
    all.pair.source.wait(ended(EndedBy::Hypervisor));
    assert!(all.from.iter().all(is_closed));
}

/// Once FROZEN is journalled only the daemon may close any of QEMU's sockets.
#[test]
fn a_frozen_source_keeps_every_lane_of_its_qemu() {
    let streams = Streams::new(2, 2, 5);
    let mut all = moved(2, &streams);
    all.pair.source.send(&ToAgent::Frozen);
    all.pair.source.send(&ToAgent::Prove { nonce: NONCE });
    all.pair.source.wait(|m| matches!(m, FromAgent::Proven { .. }));
    all.pair.target.kill();
    for _ in 0..8 {
        all.pair.source.progress();
    }
    for socket in &all.from {
        assert!(ready(socket, PollFlags::IN | PollFlags::RDHUP, Duration::ZERO).is_empty());
    }
    all.pair.source.send(&ToAgent::Terminate);
    assert!(all.pair.source.exit().success());
    assert!(all.from.iter().all(is_closed));
}
