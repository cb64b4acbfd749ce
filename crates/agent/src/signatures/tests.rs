#![allow(clippy::unwrap_used)]
use super::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use signature::frame::{HEADER_BYTES, Header};
use signature::{Answer, Request, WhenLate};
use std::time::Duration;
use types::inventory::RamBlock;

fn inventory() -> Inventory {
    let ram = RamBlock { name: "pc.ram".to_owned(), length_bytes: 4 << 30, content: None };
    Inventory { machine: "pc-q35-10.0".to_owned(), ram_blocks: vec![ram], ..Inventory::default() }
}

fn pair(policy: Policy) -> (Signatures, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    (Signatures::new(ours, policy, &inventory()), theirs)
}

fn names(block: u16) -> Option<String> {
    (block == 0).then(|| "pc.ram".to_owned())
}

fn say(scanner: &OwnedFd, answer: &Answer) {
    send(scanner, &answer.encode().unwrap(), SendFlags::empty()).unwrap();
}

/// Reads requests until FINISH and answers each batch.
fn serve(scanner: &OwnedFd, signatures: &mut Signatures) {
    let mut bytes = Vec::new();
    loop {
        signatures.ready(PollFlags::OUT, Instant::now());
        let mut buffer = vec![0; 1 << 20];
        if let Ok((_, count)) = recv(scanner, &mut buffer[..], RecvFlags::DONTWAIT) {
            bytes.extend_from_slice(&buffer[..count]);
        }
        while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::of_request(*header).unwrap();
            if rest.len() < header.length {
                break;
            }
            match Request::decode(header, &rest[..header.length]).unwrap() {
                Request::Batch { id, .. } => say(scanner, &Answer::Scanned { id, skipped_bytes: 0 }),
                Request::Finish => {
                    return say(scanner, &Answer::Done { scanned_bytes: 0, skipped_bytes: 0, hits_total: 0 });
                }
                other => panic!("{other:?}"),
            }
            bytes.drain(..HEADER_BYTES + header.length);
        }
    }
}

#[test]
fn clean_pages_release() {
    let (mut signatures, scanner) = pair(Policy { require_complete: true, ..Policy::default() });
    for page in 0..250u64 {
        signatures.page(0, page * 4096, &[1; 4096]);
        if page == 100 {
            assert!(signatures.interest().unwrap().1.contains(PollFlags::OUT));
        }
    }
    signatures.finish(Instant::now());
    assert!(signatures.deadline().is_some() && signatures.judgement(names).is_none());
    serve(&scanner, &mut signatures);
    signatures.ready(PollFlags::IN, Instant::now());
    let judgement = signatures.judgement(names).unwrap();
    assert_eq!(judgement, Judgement { refusal: None, findings: vec![] });
    assert!(signatures.interest().is_none(), "nothing is asked of the scanner any more");
}

#[test]
fn a_hit_names_rule_and_address() {
    let (mut signatures, scanner) = pair(Policy::default());
    let above = (2u64 << 30) + 4096;
    signatures.page(0, above, &vec![1; 256 * 1024]);
    signatures.ready(PollFlags::empty(), Instant::now());
    let hit = |response| Answer::Hit { rule: "EICAR".to_owned(), response, block: 0, offset: above + 7 };
    say(&scanner, &hit(Response::Report));
    say(&scanner, &hit(Response::Refuse));
    signatures.ready(PollFlags::IN, Instant::now());
    let judgement = signatures.judgement(names).unwrap();
    let refusal = judgement.refusal.unwrap();
    assert_eq!((refusal.rule.as_str(), refusal.found.as_str()), ("SIG-1", "rule EICAR"));
    assert_eq!(refusal.section, "pc.ram at 0x80001007, guest-physical 0x100001007");
    assert_eq!((refusal.severity, refusal.response.as_str()), (Severity::Critical, "terminated"));
}

#[test]
fn a_lost_or_late_scanner_is_a_finding() {
    let now = Instant::now();
    for (on_timeout, refuses) in [(WhenLate::Refuse, true), (WhenLate::Accept, false)] {
        let policy = Policy { on_timeout, ..Policy::default() };
        let (mut signatures, scanner) = pair(policy);
        signatures.page(0, 0, &[1; 4096]);
        drop(scanner);
        signatures.ready(PollFlags::HUP, now);
        signatures.finish(now);
        let judgement = signatures.judgement(names).unwrap();
        assert_eq!(judgement.refusal.map(|finding| finding.rule), refuses.then(|| "SIG-4".to_owned()));

        let (mut signatures, _silent) = pair(policy);
        signatures.page(0, 0, &[1; 4096]);
        signatures.finish(now);
        signatures.ready(PollFlags::empty(), now + Duration::from_millis(200));
        let judgement = signatures.judgement(names).unwrap();
        assert_eq!(judgement.refusal.map(|finding| finding.rule), refuses.then(|| "SIG-3".to_owned()));
        let others: Vec<_> = judgement.findings.iter().map(|finding| finding.rule.as_str()).collect();
        assert_eq!(others, if refuses { vec!["SIG-2"] } else { vec!["SIG-3", "SIG-2"] });
    }
}

#[test]
fn nonsense_ends_the_scan_and_not_the_agent() {
    let (mut signatures, scanner) = pair(Policy::default());
    send(&scanner, b"nonsense", SendFlags::empty()).unwrap();
    signatures.ready(PollFlags::IN, Instant::now());
    assert_eq!(signatures.judgement(names).unwrap().refusal.unwrap().rule, "SIG-4");
    signatures.page(0, 0, &[1; 4096]);
    signatures.ready(PollFlags::IN, Instant::now());
}
