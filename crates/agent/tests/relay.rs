//! Two agent processes over loopback, with the test as both daemons and both QEMUs.

#![allow(clippy::unwrap_used)]

#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use engine::inspect::learn;
use rustix::event::PollFlags;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Agent, NOW_UNIX_S, PATIENCE, Pair, Permit, claims, migration, ready, sign, tcp};
use types::agent::{Descriptor, EndedBy, FromAgent, ToAgent};
use types::handover::{Side, StreamEvidence};
use types::inventory::Inventory;
use types::{Digest, ErrorCode, Nonce};

const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// A stream of several reads: the hand-made one with many rounds of pages.
fn long_stream(extra_pages: usize) -> Vec<u8> {
    let stream = streams::handmade();
    let marks = streams::Marks::of(&stream);
    let mut page = 8u64.to_be_bytes().to_vec();
    page.extend_from_slice(b"\x06pc.ram");
    page.extend(std::iter::repeat_n(0x5a, 4096));
    streams::splice(&stream, marks.part + 5, 0, &page.repeat(extra_pages))
}

fn inventory(stream: &[u8]) -> Inventory {
    learn(stream, "qemu/test").unwrap()
}

fn evidence_of(stream: &[u8]) -> StreamEvidence {
    StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(stream) }
}

fn ended(what: EndedBy) -> impl Fn(&FromAgent) -> bool {
    move |m| matches!(m, FromAgent::Ended { what: w, .. } if *w == what)
}

fn end_of_stream(agent: &mut Agent) -> StreamEvidence {
    match agent.wait(|m| matches!(m, FromAgent::EndOfStream { .. })) {
        FromAgent::EndOfStream { evidence, .. } => evidence,
        _ => unreachable!("waited for it"),
    }
}

#[test]
fn a_stream_arrives_identical_and_the_acknowledgement_is_held() {
    let stream = long_stream(2000);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    let writer = pair.write(&stream);
    let header = pair.read(40);
    pair.to_qemu.as_ref().unwrap().write_all(&PONG).unwrap();
    let rest = pair.read(stream.len() - header.len());
    assert!([header, rest].concat() == stream, "the stream changed on its way");
    writer.join().unwrap();
    pair.to_qemu.as_ref().unwrap().write_all(&SHUT).unwrap();

    assert_eq!(end_of_stream(&mut pair.source), evidence_of(&stream));
    let accepted = pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
    assert!(matches!(accepted, FromAgent::Accepted { evidence, .. } if evidence == evidence_of(&stream)));
    pair.target.wait(|m| matches!(m, FromAgent::AcknowledgementHeld { status: 0 }));
    let nonce = Nonce::from_bytes([9; 16]);
    pair.source.send(&ToAgent::Prove { nonce });
    assert_eq!(
        pair.source.wait(|m| matches!(m, FromAgent::Proven { .. } | FromAgent::NotProven { .. })),
        FromAgent::Proven { nonce }
    );
    pair.source.send(&ToAgent::Frozen);
    pair.target.send(&ToAgent::AnnounceRunning);
    let running = pair.source.wait(|m| matches!(m, FromAgent::PeerRunning { .. }));
    assert!(matches!(running, FromAgent::PeerRunning { round_trip_us } if round_trip_us > 0));

    // RUNNING came after SHUT on the same channel: had SHUT been passed on, it would be here.
    let mut from_qemu = pair.from_qemu.take().unwrap();
    let mut back = [0; 64];
    let count = from_qemu.read(&mut back).unwrap();
    assert_eq!(&back[..count], PONG);
    assert!(ready(&from_qemu, PollFlags::IN, Duration::ZERO).is_empty(), "more than PONG came back");
    for agent in [&mut pair.source, &mut pair.target] {
        agent.send(&ToAgent::Terminate);
        assert!(agent.exit().success());
    }
}

fn refusal(side: Side, arm: impl Fn(&Agent)) -> String {
    let mut agent = Agent::start(side, migration());
    arm(&agent);
    match agent.wait(|m| matches!(m, FromAgent::Refused { .. } | FromAgent::Armed)) {
        FromAgent::Refused { code, detail } => {
            agent.exit();
            format!("{code}: {detail}")
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn permits_that_are_not_for_this_agent_are_refused() {
    let inventory = inventory(&streams::handmade());
    let other =
        [&[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00][..], &[8; 32]].concat();
    let check = |expect: &str, permit: &dyn Fn(&[u8]) -> Permit| {
        let found = refusal(Side::Source, |agent| agent.arm(&permit(&agent.spki), &inventory));
        assert!(found.contains(expect), "expected {expect}, found {found}");
    };
    check("bad-signature", &|us| {
        let good = sign(&claims(us, &other));
        let last = if good.token.ends_with('0') { "1" } else { "0" };
        Permit { token: format!("{}{last}", &good.token[..good.token.len() - 1]), ..good }
    });
    check("expired", &|us| {
        let mut late = claims(us, &other);
        (late.issued_at_unix_s, late.not_after_unix_s) = (NOW_UNIX_S - 100, NOW_UNIX_S - 50);
        sign(&late)
    });
    check("wrong-key", &|us| sign(&claims(&other, us)));
    check("wrong-migration", &|us| {
        let mut another = claims(us, &other);
        another.key.migration = types::MigrationId::from_bytes([1; 16]);
        sign(&another)
    });
    check("unknown-key-id", &|us| Permit { keys: Vec::new(), ..sign(&claims(us, &other)) });
    check("more channels", &|us| {
        let mut wide = claims(us, &other);
        wide.features.multifd_channels = 17;
        sign(&wide)
    });
    check("compression", &|us| {
        let mut odd = claims(us, &other);
        (odd.features.multifd_channels, odd.features.compression) = (2, "qpl".to_owned());
        sign(&odd)
    });
    let early = refusal(Side::Source, |agent| agent.attach(Descriptor::Peer, tcp().0));
    assert!(early.starts_with("wrong-state"), "{early}");
}

/// I3: with a peer that does not hold the permitted key, not a byte leaves QEMU's socket.
#[test]
fn a_peer_without_the_permitted_key_gets_nothing() {
    let stream = long_stream(10);
    let inventory = inventory(&stream);
    let mut source = Agent::start(Side::Source, migration());
    let mut target = Agent::start(Side::Target, migration());
    let stranger = Agent::start(Side::Source, migration());
    source.arm(&sign(&claims(&source.spki, &target.spki)), &inventory);
    target.arm(&sign(&claims(&stranger.spki, &target.spki)), &inventory);
    for agent in [&mut source, &mut target] {
        agent.wait(|m| matches!(m, FromAgent::Armed));
    }
    let mut pair = Pair { source, target, from_qemu: None, to_qemu: None };
    pair.attach_fake_source();
    pair.attach_fake_target();
    let writer = pair.write(&stream[..20_000]);
    writer.join().unwrap();
    let (dialled, accepted) = tcp();
    pair.target.attach(Descriptor::Peer, &accepted);
    pair.source.attach(Descriptor::Peer, &dialled);
    pair.target.wait(ended(EndedBy::Handshake));
    pair.source.wait(|m| matches!(m, FromAgent::Ended { .. }));
    assert!(pair.read_to_close().is_empty());
    pair.source.exit();
    // A UNIX socket that is closed with unread bytes in it resets its peer: they were all still there.
    let error = pair.from_qemu.take().unwrap().read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(!pair.source.said.iter().any(|m| matches!(m, FromAgent::Progress { stream_bytes: 1.., .. })));
}

#[test]
fn garbage_instead_of_a_peer_is_refused() {
    let inventory = inventory(&streams::handmade());
    let mut target = Agent::start(Side::Target, migration());
    let stranger = Agent::start(Side::Source, migration());
    target.arm(&sign(&claims(&stranger.spki, &target.spki)), &inventory);
    target.wait(|m| matches!(m, FromAgent::Armed));
    let (mut dialled, accepted) = tcp();
    target.attach(Descriptor::Peer, &accepted);
    dialled.write_all(b"QEVM\0\0\0\x03 this is a plain migration stream, not TLS").unwrap();
    target.wait(ended(EndedBy::Handshake));
    target.exit();
}

/// I5: the target's QEMU gets nothing from the violation on, whatever it is.
#[test]
fn violations_end_the_migration_and_reach_no_qemu() {
    let good = long_stream(50);
    let devices = streams::Marks::of(&good).devices;
    let inventory = inventory(&good);
    for mutation in streams::mutations(&good) {
        let row = mutation.row;
        if streams::MORE_BEHIND_THE_END.contains(&row) {
            continue;
        }
        let endless = streams::ENDLESS.contains(&row);
        let mut pair = Pair::with_fake_qemus(&inventory, |claims| {
            if endless {
                (claims.duration_budget_ms, claims.downtime_budget_ms) = (800, 300);
            }
        });
        let writer = pair.write(&mutation.bytes);
        let mut last = devices;
        if endless {
            // Whichever side looks at its clock first.
            pair.source.wait(|m| {
                matches!(m, FromAgent::Ended { what: EndedBy::Budget | EndedBy::Peer, detail, .. }
                    if detail.contains("downtime budget") || detail.contains("longer than the permit allows"))
            });
        } else {
            let rejected = pair.target.wait(|m| matches!(m, FromAgent::Rejected { .. }));
            let FromAgent::Rejected { finding } = rejected else { unreachable!("waited for it") };
            assert_eq!(finding.rule, mutation.rule, "row {row}: {finding:?}");
            last = usize::try_from(finding.offset).unwrap();
            let told = pair.source.wait(ended(EndedBy::Peer));
            assert!(
                matches!(told, FromAgent::Ended { detail, .. } if detail.contains(mutation.rule)),
                "row {row}"
            );
        }
        let received = pair.read_to_close();
        assert!(mutation.bytes.starts_with(&received), "row {row}");
        assert!(received.len() <= last, "row {row}: {} bytes reached QEMU", received.len());
        writer.join().unwrap();
        pair.target.exit();
        pair.source.exit();
    }
}

#[test]
fn a_byte_after_the_end_spoils_the_proof() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.write(&stream).join().unwrap();
    assert_eq!(end_of_stream(&mut pair.source), evidence_of(&stream));
    pair.write(b"x").join().unwrap();
    let nonce = Nonce::from_bytes([9; 16]);
    pair.source.send(&ToAgent::Prove { nonce });
    let answer = pair.source.wait(|m| matches!(m, FromAgent::Proven { .. } | FromAgent::NotProven { .. }));
    assert!(matches!(answer, FromAgent::NotProven { nonce: n, .. } if n == nonce), "{answer:?}");
}

#[test]
fn a_proof_before_the_end_fails() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.source.send(&ToAgent::Prove { nonce: Nonce::from_bytes([9; 16]) });
    pair.source.wait(|m| matches!(m, FromAgent::NotProven { .. }));
}

#[test]
fn a_qemu_that_closes_after_the_end_ends_the_source() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.write(&stream).join().unwrap();
    end_of_stream(&mut pair.source);
    pair.from_qemu = None;
    pair.source.wait(ended(EndedBy::Hypervisor));
}

#[test]
fn without_frozen_the_guard_lets_the_guest_go_on() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.write(&stream).join().unwrap();
    end_of_stream(&mut pair.source);
    let begin = Instant::now();
    let message = pair.source.wait(ended(EndedBy::FreezeGuard));
    assert!(begin.elapsed() >= Duration::from_millis(900), "the guard fired early");
    let digest = Some(evidence_of(&stream).digest);
    assert!(matches!(message, FromAgent::Ended { digest: d, .. } if d == digest));
    assert!(!ready(pair.from_qemu.as_ref().unwrap(), PollFlags::RDHUP, PATIENCE).is_empty());
    pair.source.exit();
}

/// Once FROZEN is journalled only the daemon may close QEMU's socket.
#[test]
fn a_frozen_source_outlives_its_peer() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.write(&stream).join().unwrap();
    end_of_stream(&mut pair.source);
    pair.source.send(&ToAgent::Frozen);
    // In order on one socket: the answer shows that FROZEN was taken.
    pair.source.send(&ToAgent::Prove { nonce: Nonce::from_bytes([9; 16]) });
    pair.source.wait(|m| matches!(m, FromAgent::Proven { .. }));
    pair.target.kill();
    for _ in 0..8 {
        pair.source.progress();
    }
    let from_qemu = pair.from_qemu.as_ref().unwrap();
    assert!(
        ready(from_qemu, PollFlags::IN | PollFlags::RDHUP, Duration::ZERO).is_empty(),
        "QEMU's socket closed"
    );
    pair.source.hang_up();
    pair.source.exit();
    assert!(!ready(pair.from_qemu.as_ref().unwrap(), PollFlags::RDHUP, PATIENCE).is_empty());
}

#[test]
fn either_agents_death_ends_the_other() {
    let stream = long_stream(200);
    let part = &stream[..stream.len() / 2];
    for target_dies in [true, false] {
        let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
        let writer = pair.write(part);
        pair.read(1000);
        let (dies, lives) = if target_dies {
            (&mut pair.target, &mut pair.source)
        } else {
            (&mut pair.source, &mut pair.target)
        };
        dies.kill();
        lives.wait(ended(EndedBy::Peer));
        lives.exit();
        writer.join().unwrap();
        let qemu = if target_dies { &pair.from_qemu } else { &pair.to_qemu };
        assert!(
            !ready(qemu.as_ref().unwrap(), PollFlags::RDHUP, PATIENCE).is_empty(),
            "QEMU's socket stayed open"
        );
    }
}

#[test]
fn a_dead_daemon_or_qemu_ends_the_agent() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.source.hang_up();
    assert!(pair.source.exit().success());
    pair.target.wait(ended(EndedBy::Peer));

    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.to_qemu = None;
    pair.target.wait(ended(EndedBy::Hypervisor));
    let ended = pair.source.wait(ended(EndedBy::Peer));
    assert!(matches!(ended, FromAgent::Ended { detail, .. } if detail.contains("target-failed")));
}

#[test]
fn a_suspended_source_relays_nothing_and_goes_on_when_resumed() {
    let stream = long_stream(500);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.source.send(&ToAgent::Suspend);
    let writer = pair.write(&stream);
    for _ in 0..4 {
        assert_eq!(pair.source.progress(), 0, "bytes moved while suspended");
    }
    assert!(ready(pair.to_qemu.as_ref().unwrap(), PollFlags::IN, Duration::ZERO).is_empty());
    pair.source.send(&ToAgent::Resume);
    assert!(pair.read(stream.len()) == stream);
    writer.join().unwrap();
    end_of_stream(&mut pair.source);
}

#[test]
fn a_suspended_target_stops_the_source_and_goes_on_when_resumed() {
    let stream = long_stream(5000);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.target.send(&ToAgent::Suspend);
    // In order on one socket: with this heartbeat the command was taken.
    pair.target.progress();
    pair.target.progress();
    let writer = pair.write(&stream);
    for _ in 0..4 {
        pair.target.progress();
    }
    assert!(
        ready(pair.to_qemu.as_ref().unwrap(), PollFlags::IN, Duration::ZERO).is_empty(),
        "QEMU got bytes"
    );
    assert_eq!(pair.source.progress(), 0, "the source was not told");
    pair.target.send(&ToAgent::Resume);
    assert!(pair.read(stream.len()) == stream);
    writer.join().unwrap();
    pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
}

#[test]
fn the_throttle_holds_the_rate() {
    let stream = long_stream(200);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    pair.source.send(&ToAgent::Throttle { bytes_per_second: 800_000 });
    pair.source.send(&ToAgent::Prove { nonce: Nonce::from_bytes([9; 16]) });
    pair.source.wait(|m| matches!(m, FromAgent::NotProven { .. }));
    let begin = Instant::now();
    let writer = pair.write(&stream);
    assert!(pair.read(stream.len()) == stream);
    writer.join().unwrap();
    // 826 KB at 800 KB/s, less one burst of 80 KB.
    assert!(begin.elapsed() >= Duration::from_millis(900), "{:?}", begin.elapsed());
}

#[test]
fn the_byte_budget_holds() {
    let stream = long_stream(200);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |claims| claims.byte_budget = 100_000);
    let writer = pair.write(&stream);
    pair.source.wait(ended(EndedBy::Budget));
    assert!(pair.read_to_close().len() <= 100_000);
    writer.join().unwrap();
}

/// A target's QEMU that asks for what pre-copy does not know attacks the source.
#[test]
fn a_return_path_that_is_none_is_refused() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |_| {});
    let request_pages = [0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0];
    pair.to_qemu.as_ref().unwrap().write_all(&request_pages).unwrap();
    let rejected = pair.target.wait(|m| matches!(m, FromAgent::Rejected { .. }));
    assert!(matches!(rejected, FromAgent::Rejected { finding } if finding.rule == "INV-P1"));
    pair.source.wait(ended(EndedBy::Peer));
    assert!(ready(pair.from_qemu.as_ref().unwrap(), PollFlags::IN, PATIENCE).intersects(PollFlags::HUP));
}

fn self_test(act: &str) -> (std::process::ExitStatus, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_outrider-agent"))
        .args(["--self-test-sandbox", act])
        .output()
        .unwrap();
    (output.status, String::from_utf8(output.stdout).unwrap())
}

const SIGSYS: i32 = 31;

#[test]
fn the_sandbox_holds() {
    let (status, text) = self_test("nothing");
    assert!(status.success() && text.contains("refused"), "{text}");
    for part in ["no-new-privs", "not-dumpable", "rlimits", "landlock", "seccomp"] {
        assert!(text.contains(part), "{part} is not in force on this machine: {text}");
    }
    for act in ["open", "create", "connect", "bind", "exec", "thread"] {
        let (status, text) = self_test(act);
        assert!(!text.contains("ESCAPED"), "{act}");
        assert_eq!(status.signal(), Some(SIGSYS), "{act}: {text}");
    }
    for act in ["landlock-open", "landlock-create", "landlock-connect", "landlock-bind", "landlock-exec"] {
        let (status, text) = self_test(act);
        assert!(status.success() && text.contains("refused"), "{act}: {text}");
    }
}

#[test]
fn the_run_deadline_holds() {
    let stream = long_stream(5);
    let mut pair = Pair::with_fake_qemus(&inventory(&stream), |claims| {
        (claims.not_after_unix_s, claims.run_deadline_unix_s) = (NOW_UNIX_S + 1, NOW_UNIX_S + 1);
    });
    pair.source.wait(ended(EndedBy::Budget));
}

#[test]
fn the_control_socket_may_have_any_number() {
    let (ours, theirs) = support::packet_pair();
    let agent = env!("CARGO_BIN_EXE_outrider-agent");
    let process = Command::new("sh")
        .args(["-c", "exec 7<&0 </dev/null; OUTRIDER_AGENT_FD=7 exec \"$0\"", agent])
        .stdin(std::process::Stdio::from(theirs))
        .spawn()
        .unwrap();
    let mut agent = Agent::adopt(process, ours, Side::Source);
    agent.greet(migration());
    agent.hang_up();
    assert!(agent.exit().success());
}

#[test]
fn nonsense_from_the_daemon_ends_the_agent() {
    let mut agent = Agent::start(Side::Source, migration());
    agent.send(&ToAgent::Hello { side: Side::Source, migration: migration() });
    let refused = agent.wait(|m| matches!(m, FromAgent::Refused { .. }));
    assert!(matches!(refused, FromAgent::Refused { code: ErrorCode::WrongState, .. }));
    agent.exit();
}
