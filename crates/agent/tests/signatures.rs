//! Two agent processes and the real scanner: what a rule finds in a guest page never runs at the target (MM-10), and a
//! scan that is broken is no way around it (MM-12).

#![allow(clippy::unwrap_used)]

#[path = "support/lanes.rs"]
mod lanes;
#[path = "support/scanner.rs"]
mod scanner;
#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use engine::inspect::learn;
use lanes::{Lanes, Streams};
use rustix::event::PollFlags;
use rustix::process::Signal;
use scanner::{Scanner, SlowScanner};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use support::{Agent, PATIENCE, Pair, ready, tcp};
use types::agent::{Descriptor, EndedBy, FromAgent, ToAgent};
use types::handover::StreamEvidence;
use types::inventory::Inventory;
use types::migration::{Finding, Severity};
use types::permit::PermitClaims;
use types::{Digest, ErrorCode};

const PAGE: usize = 4096;
const MARK: &[u8; 21] = b"outrider-planted-mark";
const RULES: &str = "rule planted { strings: $a = \"outrider-planted-mark\" condition: $a }";
const REPORTING: &str =
    "rule planted { meta: response = \"report\" strings: $a = \"outrider-planted-mark\" condition: $a }";

fn with_signatures(claims: &mut PermitClaims) {
    claims.inspection_profile = "strict+signatures+report-unvouched".to_owned();
}

/// Everything is to be seen; the scanner may take ten seconds for a batch, half of the downtime budget at
/// most.
fn with_complete_signatures(claims: &mut PermitClaims) {
    claims.inspection_profile = "strict+signatures-complete+report-unvouched".to_owned();
    claims.downtime_budget_ms = 60_000;
}

fn inventory() -> Inventory {
    learn(&streams::handmade(), "qemu/test").unwrap()
}

/// A record of a page of `pc.ram`, with the mark where it is asked for.
fn page(number: u64, mark: Option<usize>) -> Vec<u8> {
    let mut record = ((number * PAGE as u64) | 8).to_be_bytes().to_vec();
    record.extend_from_slice(b"\x06pc.ram");
    let mut content = [0x5a; PAGE];
    if let Some(at) = mark {
        content[at..at + MARK.len()].copy_from_slice(MARK);
    }
    record.extend_from_slice(&content);
    record
}

/// The hand-made stream with these records in it.
fn stream_of(records: &[Vec<u8>]) -> Vec<u8> {
    let stream = streams::handmade();
    let part = streams::Marks::of(&stream).part;
    streams::splice(&stream, part + 5, 0, &records.concat())
}

fn clean_pages(count: usize) -> Vec<Vec<u8>> {
    (0..count as u64).map(|number| page(number % 8, None)).collect()
}

/// Two agents with a scanner of these rules and fake QEMUs; nothing where there is no scanner.
fn pair(rules: &str) -> Option<(Pair, Scanner)> {
    pair_with(rules, with_signatures)
}

fn pair_with(rules: &str, adjust: impl Fn(&mut PermitClaims)) -> Option<(Pair, Scanner)> {
    let scanner = Scanner::start(rules)?;
    let mut pair = Pair::armed(&inventory(), adjust);
    pair.target.attach(Descriptor::Scanner, &scanner.socket);
    pair.meet();
    pair.attach_fake_target();
    pair.attach_fake_source();
    Some((pair, scanner))
}

fn rejected(target: &mut Agent) -> Finding {
    match target.wait(|m| matches!(m, FromAgent::Rejected { .. } | FromAgent::Accepted { .. })) {
        FromAgent::Rejected { finding } => *finding,
        other => panic!("not rejected: {other:?}"),
    }
}

/// The source hears of it, and closes QEMU's socket: its guest goes on.
fn source_is_told(source: &mut Agent, from_qemu: &UnixStream, rule: &str) {
    let told = source.wait(|m| matches!(m, FromAgent::Ended { what: EndedBy::Peer, .. }));
    assert!(matches!(&told, FromAgent::Ended { detail, .. } if detail.contains(rule)), "{told:?}");
    assert!(!ready(from_qemu, PollFlags::RDHUP, PATIENCE).is_empty(), "QEMU's socket stayed open");
    source.exit();
}

/// I10: what a rule matched is never said, by either side.
fn names_no_content(agents: &[&Agent]) {
    for message in agents.iter().flat_map(|agent| &agent.said) {
        let text = serde_json::to_string(message).unwrap();
        assert!(!text.contains("planted-mark"), "{text}");
    }
}

/// Reads as the target's QEMU until its agent closes.
fn drain(pair: &Pair) -> JoinHandle<Vec<u8>> {
    let mut socket = pair.to_qemu.as_ref().unwrap().try_clone().unwrap();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// What reached the target's QEMU is a part of the stream that ends before the device state.
fn no_device_state(received: &[u8], stream: &[u8]) {
    assert!(stream.starts_with(received), "what reached QEMU is not the stream");
    assert!(received.len() <= streams::Marks::of(stream).devices, "device state reached QEMU");
}

fn refused(stream: &[u8], address: u64) {
    let Some((mut pair, _scanner)) = pair(RULES) else { return };
    let writer = pair.write(stream);
    let reader = drain(&pair);
    let finding = rejected(&mut pair.target);
    assert_eq!((finding.rule.as_str(), finding.threat.as_str()), ("SIG-1", "MM-10"));
    assert_eq!(finding.section, format!("pc.ram at {address:#x}, guest-physical {address:#x}"));
    assert_eq!((finding.found.as_str(), finding.response.as_str()), ("rule planted", "terminated"));
    no_device_state(&reader.join().unwrap(), stream);
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-1");
    names_no_content(&[&pair.source, &pair.target]);
    writer.join().unwrap();
}

#[test]
fn a_mark_in_the_last_page_refuses_before_the_device_state() {
    let records = [clean_pages(100), vec![page(5, Some(77))]].concat();
    refused(&stream_of(&records), 5 * 4096 + 77);
}

#[test]
fn a_mark_across_two_pages_is_seen() {
    let mut records = clean_pages(10);
    let (mut first, mut second) = (page(2, None), page(3, None));
    let end = first.len();
    first[end - 9..].copy_from_slice(&MARK[..9]);
    let begin = second.len() - PAGE;
    second[begin..begin + 12].copy_from_slice(&MARK[9..]);
    records.extend([first, second]);
    refused(&stream_of(&records), 3 * 4096 - 9);
}

/// Memory that was overwritten before the guest moved was malicious all the same, and a long stream ends early. The
/// mark is among the first pages: a scanner without optimization falls behind later, and pages pass it unseen.
#[test]
fn a_mark_in_the_middle_ends_a_stream_that_goes_on() {
    let records = [clean_pages(100), vec![page(1, Some(0))], clean_pages(2000)].concat();
    let Some((mut pair, _scanner)) = pair(RULES) else { return };
    let stream = stream_of(&records);
    // Without its end: no verdict is asked for.
    let writer = pair.write(&stream[..streams::Marks::of(&stream).devices]);
    let reader = drain(&pair);
    assert_eq!(rejected(&mut pair.target).rule, "SIG-1");
    no_device_state(&reader.join().unwrap(), &stream);
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-1");
    writer.join().unwrap();
}

#[test]
fn a_clean_stream_passes_unchanged() {
    let Some((mut pair, mut scanner)) = pair(RULES) else { return };
    let stream = stream_of(&clean_pages(5000));
    let writer = pair.write(&stream);
    assert!(pair.read(stream.len()) == stream, "the stream changed on its way");
    writer.join().unwrap();
    let accepted = pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
    let FromAgent::Accepted { evidence, held_us, .. } = accepted else { unreachable!("waited for it") };
    let good = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    assert_eq!(evidence, good);
    println!("device state held for {held_us} us beside a scan of {} bytes", stream.len());
    // Nothing more is asked of it.
    assert!(scanner.socket.set_nonblocking(true).is_ok() && scanner.process.wait().unwrap().success());
    // What was skipped is reported; nothing else is.
    assert!(observed(&pair.target).iter().all(|found| found.rule == "SIG-2"), "{:?}", pair.target.said);
}

#[test]
fn a_rule_that_only_reports_lets_the_stream_pass() {
    let Some((mut pair, _scanner)) = pair(REPORTING) else { return };
    let stream = stream_of(&[page(5, Some(77))]);
    let writer = pair.write(&stream);
    assert!(pair.read(stream.len()) == stream);
    writer.join().unwrap();
    pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
    let findings = pair.target.said.iter().filter(
        |m| matches!(m, FromAgent::Observed { finding } if finding.rule == "SIG-1" && finding.response == "reported"),
    );
    assert_eq!(findings.count(), 1, "{:?}", pair.target.said);
    names_no_content(&[&pair.source, &pair.target]);
}

/// Pages of all channels are looked at, however these take turns.
#[test]
fn a_mark_on_another_channel_refuses_and_clean_channels_pass() {
    for marked in [None, Some(1), Some(2)] {
        let Some(scanner) = Scanner::start(RULES) else { return };
        let mut streams = Streams::new(2, 6, 50);
        if let Some(lane) = marked {
            // In the first of the packets: the page is overwritten by each of the others.
            let at = 64 + 1344 + 100;
            streams.0[lane][at..at + MARK.len()].copy_from_slice(MARK);
        }
        let mut all = Lanes::armed(2, &streams.inventory(), with_signatures);
        all.pair.target.attach(Descriptor::Scanner, &scanner.socket);
        all.meet();
        let writers = all.write_all(&streams);
        all.give_next();
        let Some(lane) = marked else {
            all.give_next();
            all.give_next();
            all.expect_all(&streams);
            assert_eq!(all.accepted(), streams.evidence());
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            continue;
        };
        let reader = all.expect(0, &streams.0[0]);
        let finding = rejected(&mut all.pair.target);
        let address = (lane as u64 - 1) * 4096 + 100;
        assert_eq!(finding.section, format!("pc.ram at {address:#x}, guest-physical {address:#x}"));
        assert!(!reader.join().unwrap(), "the device state reached QEMU");
        source_is_told(&mut all.pair.source, &all.from[0], "SIG-1");
        names_no_content(&[&all.pair.source, &all.pair.target]);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    }
}

#[test]
fn a_scanner_that_dies_ends_the_migration() {
    let Some((mut pair, mut scanner)) = pair(RULES) else { return };
    let stream = stream_of(&clean_pages(2000));
    let writer = pair.write(&stream[..stream.len() / 2]);
    pair.read(stream.len() / 4);
    scanner.kill();
    let finding = rejected(&mut pair.target);
    assert_eq!((finding.rule.as_str(), finding.threat.as_str()), ("SIG-4", "MM-12"));
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-4");
    writer.join().unwrap();
}

/// The guest stands still while the verdict is awaited: that takes no longer than its budget.
#[test]
fn a_scanner_that_hangs_ends_the_migration_in_time() {
    let Some((mut pair, scanner)) = pair(RULES) else { return };
    scanner.signal(Signal::STOP);
    let stream = stream_of(&clean_pages(10));
    pair.write(&stream).join().unwrap();
    pair.source.wait(|m| matches!(m, FromAgent::EndOfStream { .. }));
    let begin = Instant::now();
    let finding = rejected(&mut pair.target);
    assert_eq!((finding.rule.as_str(), finding.threat.as_str()), ("SIG-3", "MM-12"));
    println!("refused {:?} after the end of the stream", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(5));
    no_device_state(&pair.read_to_close(), &stream);
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-3");
}

/// What the target has released when it goes no further: two heartbeats say the same, and it is not all.
fn held_at(target: &mut Agent, stream: &[u8]) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    let mut last = u64::MAX;
    loop {
        let now = target.progress();
        if now == last && now > 0 {
            assert!(now < streams::Marks::of(stream).devices as u64, "nothing was held back");
            return now;
        }
        assert!(Instant::now() < deadline, "the stream was never held");
        last = now;
    }
}

/// What was observed of signatures. The permits of these tests let the handmade stream's devices through, which is told
/// as well, at most once of each, and nothing else is.
fn observed(agent: &Agent) -> Vec<&Finding> {
    let said = agent.said.iter();
    let all = said.filter_map(|m| match m {
        FromAgent::Observed { finding } => Some(finding.as_ref()),
        _ => None,
    });
    let (unvouched, rest): (Vec<_>, Vec<_>) = all.partition(|finding| finding.rule == "INV-D2");
    assert!(unvouched.len() <= 4, "{unvouched:?}");
    rest
}

/// A scanner that is slow holds the stream back, and then has seen all of it.
#[test]
fn a_stream_waits_for_a_scanner_that_is_behind() {
    let Some((mut pair, scanner)) = pair_with(RULES, with_complete_signatures) else { return };
    scanner.signal(Signal::STOP);
    let stream = stream_of(&clean_pages(5000));
    let writer = pair.write(&stream);
    let reader = drain(&pair);
    let held = held_at(&mut pair.target, &stream);
    assert!(!writer.is_finished(), "the source's QEMU wrote all of it");
    println!("held after {held} of {} bytes", stream.len());
    // The source hears nothing either, and goes on all the same.
    pair.source.progress();
    scanner.signal(Signal::CONT);
    let accepted = pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
    let FromAgent::Accepted { evidence, .. } = accepted else { unreachable!("waited for it") };
    let good = StreamEvidence { stream_bytes: stream.len() as u64, digest: Digest::of(&stream) };
    assert_eq!(evidence, good);
    writer.join().unwrap();
    assert_eq!(observed(&pair.target), Vec::<&Finding>::new(), "nothing was left unseen");
    drop(pair);
    assert!(reader.join().unwrap() == stream, "the stream changed on its way");
}

/// What would have passed unseen beside a scanner that is behind is found: the mark is only in the very last
/// page.
#[test]
fn a_mark_behind_what_a_scanner_can_keep_up_with_is_seen() {
    let Some((mut pair, scanner)) = pair_with(RULES, with_complete_signatures) else { return };
    scanner.signal(Signal::STOP);
    let stream = stream_of(&[clean_pages(3000), vec![page(5, Some(77))]].concat());
    let writer = pair.write(&stream);
    let reader = drain(&pair);
    held_at(&mut pair.target, &stream);
    scanner.signal(Signal::CONT);
    assert_eq!(rejected(&mut pair.target).rule, "SIG-1");
    no_device_state(&reader.join().unwrap(), &stream);
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-1");
    writer.join().unwrap();
}

#[test]
fn a_scanner_that_dies_while_the_stream_waits_for_it_ends_the_migration() {
    let Some((mut pair, mut scanner)) = pair_with(RULES, with_complete_signatures) else { return };
    scanner.signal(Signal::STOP);
    let stream = stream_of(&clean_pages(3000));
    let writer = pair.write(&stream);
    let reader = drain(&pair);
    held_at(&mut pair.target, &stream);
    scanner.kill();
    let finding = rejected(&mut pair.target);
    assert_eq!((finding.rule.as_str(), finding.threat.as_str()), ("SIG-4", "MM-12"));
    assert_eq!(finding.response, "terminated");
    no_device_state(&reader.join().unwrap(), &stream);
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-4");
    writer.join().unwrap();
}

/// One that stops reading for ever ends it as well, within half of the downtime budget: no byte comes in the
/// meantime, and nobody calls the source silent.
#[test]
fn a_scanner_that_stops_reading_while_the_stream_waits_for_it_ends_the_migration_in_time() {
    let soon = |claims: &mut PermitClaims| {
        with_complete_signatures(claims);
        claims.downtime_budget_ms = 3_000;
    };
    let Some((mut pair, scanner)) = pair_with(RULES, soon) else { return };
    scanner.signal(Signal::STOP);
    let stream = stream_of(&clean_pages(3000));
    let writer = pair.write(&stream);
    let reader = drain(&pair);
    let begin = Instant::now();
    let finding = rejected(&mut pair.target);
    println!("refused {:?} after the stream began", begin.elapsed());
    assert_eq!((finding.rule.as_str(), finding.threat.as_str()), ("SIG-3", "MM-12"));
    assert_eq!((finding.severity, finding.response.as_str()), (Severity::Critical, "terminated"));
    no_device_state(&reader.join().unwrap(), &stream);
    source_is_told(&mut pair.source, pair.from_qemu.as_ref().unwrap(), "SIG-3");
    writer.join().unwrap();
}

/// The permit's time runs while the stream waits, however slow a scanner is that still answers.
#[test]
fn the_permits_time_ends_a_stream_that_waits_for_its_scanner() {
    let short = |claims: &mut PermitClaims| {
        with_complete_signatures(claims);
        claims.duration_budget_ms = 1_500;
    };
    let mut pair = Pair::armed(&inventory(), short);
    // Of 80 batches it looks at 15 in the permit's time.
    let scanner = SlowScanner::start(Duration::from_millis(100));
    pair.target.attach(Descriptor::Scanner, &scanner.socket);
    pair.meet();
    pair.attach_fake_target();
    pair.attach_fake_source();
    let stream = stream_of(&clean_pages(5000));
    let writer = pair.write(&stream);
    let reader = drain(&pair);
    let ended = pair.target.wait(|m| matches!(m, FromAgent::Ended { .. } | FromAgent::Rejected { .. }));
    // Either side's clock may be the first.
    let by_time = |what| matches!(what, EndedBy::Budget | EndedBy::Peer);
    assert!(matches!(&ended, FromAgent::Ended { what, .. } if by_time(*what)), "{ended:?}");
    no_device_state(&reader.join().unwrap(), &stream);
    writer.join().unwrap();
    drop(pair);
    println!("ended after {} batches", scanner.end());
}

/// On several channels, each held in the middle of its stream: nothing is lost, nothing is taken for the end.
#[test]
fn channels_wait_for_a_scanner_that_is_behind() {
    let Some(scanner) = Scanner::start(RULES) else { return };
    let streams = Streams::new(4, 200, 200);
    let mut all = Lanes::armed(4, &streams.inventory(), with_complete_signatures);
    all.pair.target.attach(Descriptor::Scanner, &scanner.socket);
    all.meet();
    scanner.signal(Signal::STOP);
    let writers = all.write_all(&streams);
    all.give_all();
    let readers: Vec<_> = streams.0.iter().enumerate().map(|(lane, bytes)| all.expect(lane, bytes)).collect();
    let total = streams.0.iter().map(Vec::len).sum::<usize>() as u64;
    let (deadline, mut last) = (Instant::now() + PATIENCE, u64::MAX);
    loop {
        let now = all.pair.target.progress();
        if now == last {
            break;
        }
        assert!(Instant::now() < deadline, "the channels were never held");
        last = now;
    }
    println!("held after {last} of {total} bytes");
    assert!(last < total / 2, "nothing was held back");
    scanner.signal(Signal::CONT);
    assert_eq!(all.accepted(), streams.evidence());
    for (lane, reader) in readers.into_iter().enumerate() {
        assert!(reader.join().unwrap(), "lane {lane} changed on its way");
    }
    assert_eq!(observed(&all.pair.target), Vec::<&Finding>::new(), "nothing was left unseen");
    writers.into_iter().for_each(|writer| writer.join().unwrap());
}

fn refusal(agent: &mut Agent) -> (ErrorCode, String) {
    match agent.wait(|m| matches!(m, FromAgent::Refused { .. })) {
        FromAgent::Refused { code, detail } => (code, detail),
        _ => unreachable!("waited for it"),
    }
}

/// A permit that asks for signatures is not served without them; nobody else gets guest memory to see.
#[test]
fn a_scanner_comes_before_the_peer_and_only_where_the_permit_asks() {
    let mut pair = Pair::armed(&inventory(), with_signatures);
    pair.target.attach(Descriptor::Peer, tcp().1);
    let (code, detail) = refusal(&mut pair.target);
    assert!(code == ErrorCode::WrongState && detail.contains("before the permit's scanner"), "{detail}");
    pair.source.attach(Descriptor::Scanner, UnixStream::pair().unwrap().0);
    assert_eq!(refusal(&mut pair.source).0, ErrorCode::WrongState);

    let mut pair = Pair::armed(&inventory(), |_| {});
    pair.target.attach(Descriptor::Scanner, UnixStream::pair().unwrap().0);
    assert_eq!(refusal(&mut pair.target).0, ErrorCode::WrongState);

    let mut pair = Pair::armed(&inventory(), with_signatures);
    for _ in 0..2 {
        pair.target.attach(Descriptor::Scanner, UnixStream::pair().unwrap().0);
    }
    assert_eq!(refusal(&mut pair.target).0, ErrorCode::WrongState);
    pair.source.send(&ToAgent::Terminate);
}
