//! See the file above.

mod support;

use outrider_signature::frame::{MAX_RUN_BYTES, Run};
use outrider_signature::{Answer, Cause, Outcome, Policy, Request, Response, Scan, Trouble, WhenLate};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};
use support::{PATIENCE, Scanner, drive, self_test};

const PAGE: usize = 4096;
const MARK: &str = "rule planted { strings: $a = \"outrider-planted-mark\" condition: $a }";

fn patient() -> Policy {
    Policy { verdict_budget: PATIENCE, require_complete: true, ..Policy::default() }
}

/// Ordinary memory: no zeros, no marks.
fn memory(pages: usize) -> Vec<u8> {
    (0..pages * PAGE).map(|at| (at * 31 / 7).to_le_bytes()[0] | 1).collect()
}

fn plant(memory: &mut [u8], at: usize) {
    memory[at..at + 21].copy_from_slice(b"outrider-planted-mark");
}

#[test]
fn hits_name_the_places_and_nothing_else() {
    let rules = format!(
        "{MARK} rule seen {{ meta: response = \"report\" strings: $a = {{ 6d 61 72 6b [2-6] 21 }} condition: $a }}"
    );
    let rules = rules.replace("rule planted {", "rule planted { meta: response = \"report\"");
    let mut scanner = Scanner::ready(&rules);
    let mut scan = Scan::new(patient());
    let seam = MAX_RUN_BYTES;
    let mut long = memory(3 * MAX_RUN_BYTES / PAGE);
    // Across a page, across the seam of two batches, and within one page.
    for at in [PAGE - 10, seam - 3, 2 * seam + 5000] {
        plant(&mut long, at);
    }
    let mut single = memory(1);
    plant(&mut single, 77);
    // The long run comes page by page in pieces, and single pages of another block come in between.
    for (number, page) in long.chunks(PAGE).enumerate() {
        let offset = (number * PAGE) as u64;
        scan.page(0, offset, &page[..1000]);
        if number == 40 {
            scan.page(1, 9 * PAGE as u64, &single);
        }
        scan.page(0, offset + 1000, &page[1000..]);
    }
    let verdict = drive(&mut scan, &mut scanner);
    assert_eq!(verdict.outcome, Outcome::Release, "{verdict:?}");
    let mut places: Vec<_> = verdict.hits.iter().map(|hit| (hit.block, hit.offset)).collect();
    places.sort_unstable();
    let expected = [(0, 4086), (0, seam as u64 - 3), (0, 2 * seam as u64 + 5000), (1, 9 * 4096 + 77)];
    assert_eq!(places, expected, "{verdict:?}");
    assert!(verdict.hits.iter().all(|hit| hit.rule == "planted" && hit.response == Response::Report));
    assert_eq!((verdict.hits_total, verdict.skipped_bytes), (4, 0));
    assert!(scanner.ended().success());
}

#[test]
fn pages_that_are_not_contiguous_make_no_match_together() {
    let mut scanner = Scanner::ready(MARK);
    let mut scan = Scan::new(patient());
    let mut bytes = memory(2);
    plant(&mut bytes, PAGE - 10);
    scan.page(0, 0, &bytes[..PAGE]);
    scan.page(0, 5 * PAGE as u64, &bytes[PAGE..]);
    let verdict = drive(&mut scan, &mut scanner);
    assert_eq!((verdict.outcome, verdict.hits_total), (Outcome::Release, 0));
}

#[test]
fn a_rule_that_refuses_ends_it_before_the_end() {
    let mut scanner = Scanner::ready(MARK);
    let mut scan = Scan::new(patient());
    let mut bytes = memory(MAX_RUN_BYTES / PAGE);
    plant(&mut bytes, 10_000);
    scan.page(0, 1 << 32, &bytes);
    let deadline = Instant::now() + PATIENCE;
    while scan.verdict().is_none() && Instant::now() < deadline {
        scanner.exchange(&mut scan);
    }
    let verdict = scan.verdict().unwrap();
    assert_eq!(verdict.outcome, Outcome::Refuse(Cause::Hit));
    assert_eq!(verdict.hits[0].offset, (1 << 32) + 10_000);
}

/// Goes round and round over whatever it is given.
const ENDLESS: &str =
    "rule endless { condition: for any i in (0..2000000000) : (uint8(i % filesize) == 256 + (i % 7)) }";

#[test]
fn an_endless_rule_runs_into_the_budget() {
    for (on_timeout, expect) in
        [(WhenLate::Refuse, Outcome::Refuse(Cause::Late)), (WhenLate::Accept, Outcome::Release)]
    {
        let mut scanner = Scanner::start(ENDLESS);
        // Its first look is at zeros already: it starts when that has been given up, or is refused.
        let answer = scanner.answer();
        assert!(
            matches!(&answer, Some(Answer::Refused { why }) if why.contains("does not start")),
            "{answer:?}"
        );
        let mut scanner = Scanner::ready(&format!(
            "{MARK} {}",
            ENDLESS.replace("condition:", "condition: filesize > 4096 and")
        ));
        let mut scan = Scan::new(Policy { on_timeout, ..Policy::default() });
        scan.page(0, 0, &memory(16));
        let begun = Instant::now();
        let verdict = drive(&mut scan, &mut scanner);
        assert_eq!((verdict.outcome, verdict.trouble), (expect, Some(Trouble::Late)));
        assert_eq!(verdict.skipped_bytes, 16 * 4096);
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}

#[test]
fn a_run_that_takes_too_long_is_skipped_and_the_next_is_not() {
    let endless = ENDLESS.replace("condition:", "condition: filesize > 4096 and");
    let mut scanner = Scanner::ready(&format!(
        "{} {endless}",
        MARK.replace("{ strings", "{ meta: response = \"report\" strings")
    ));
    let mut scan = Scan::new(Policy { require_complete: false, ..patient() });
    let mut page = memory(1);
    plant(&mut page, 50);
    scan.page(0, 0, &memory(MAX_RUN_BYTES / PAGE));
    scan.page(2, 1 << 20, &page);
    let verdict = drive(&mut scan, &mut scanner);
    assert_eq!(verdict.outcome, Outcome::Release, "{verdict:?}");
    assert_eq!(verdict.skipped_bytes, MAX_RUN_BYTES as u64);
    assert_eq!(
        verdict.hits.iter().map(|hit| (hit.block, hit.offset)).collect::<Vec<_>>(),
        [(2, (1 << 20) + 50)]
    );
}

#[test]
fn rules_that_can_not_be_used_are_refused_with_the_reason() {
    for (rules, says) in [
        ("rule a { condition: nothing }", "unknown identifier"),
        ("rule a { condition: nothing }", "given.yar:1:21"),
        ("include \"/etc/passwd\"", "include"),
        ("import \"pe\" rule a { condition: pe.is_pe }", "unknown module"),
        ("", "no rule"),
        ("rule a { meta: response = \"maybe\" condition: true }", "rule a is neither"),
        ("rule a { condition: true } rule a { condition: true }", "duplicate"),
    ] {
        let mut scanner = Scanner::start(rules);
        let Some(Answer::Refused { why }) = scanner.answer() else { panic!("{rules} was taken") };
        assert!(why.contains(says), "{rules}: {why}");
        assert_eq!(scanner.ended().code(), Some(4));
    }
}

#[test]
fn a_flood_of_matches_is_bounded() {
    let rules: String = (0..20)
        .map(|n| {
            format!(
                "rule flood{n} {{ meta: response = \"report\" strings: $a = \"AAAA\" condition: #a > 100 }} "
            )
        })
        .collect();
    let mut scanner = Scanner::ready(&rules);
    let mut scan = Scan::new(Policy { require_complete: false, ..patient() });
    for number in 0..4 {
        scan.page(0, (number * MAX_RUN_BYTES) as u64, &vec![b'A'; MAX_RUN_BYTES]);
    }
    let verdict = drive(&mut scan, &mut scanner);
    assert_eq!(verdict.outcome, Outcome::Release, "{verdict:?}");
    assert!((20..=64).contains(&verdict.hits.len()), "{verdict:?}");
    assert!((0..20).all(|n| verdict.hits.iter().any(|hit| hit.rule == format!("flood{n}"))), "{verdict:?}");
}

#[test]
fn garbage_ends_the_scanner() {
    for garbage in [&b"garbage"[..], &[3, 255, 255, 255, 255], &[1, 0, 0, 0, 2, 0, 0], &[2, 0, 0, 0, 0]] {
        let mut scanner = Scanner::ready(MARK);
        scanner.socket.write_all(garbage).unwrap();
        assert_eq!(scanner.ended().code(), Some(4), "{garbage:?}");
    }
    let mut scanner = Scanner::ready(MARK);
    scanner.close();
    assert_eq!(scanner.ended().code(), Some(4), "the agent's end");
}

#[test]
fn a_scanner_that_dies_is_a_finding() {
    let mut scanner = Scanner::ready(MARK);
    let mut scan = Scan::new(Policy::default());
    scan.page(0, 0, &memory(200));
    scanner.child.kill().unwrap();
    let verdict = drive(&mut scan, &mut scanner);
    assert_eq!(verdict.outcome, Outcome::Refuse(Cause::Lost));
    assert!(matches!(verdict.trouble, Some(Trouble::Lost(_))));
}

const SIGSYS: i32 = 31;

#[test]
fn the_sandbox_holds() {
    let (status, text) = self_test("nothing");
    assert!(status.success() && text.contains("refused"), "{text}");
    for part in ["no-new-privs", "not-dumpable", "rlimits", "landlock", "seccomp"] {
        assert!(text.contains(part), "{part} is not in force on this machine: {text}");
    }
    for act in ["open", "create", "connect", "bind", "exec", "thread", "ptrace"] {
        let (status, text) = self_test(act);
        assert!(!text.contains("ESCAPED"), "{act}");
        assert_eq!(status.signal(), Some(SIGSYS), "{act}: {text}");
        let (status, text) = self_test(&format!("landlock-{act}"));
        // Landlock knows files, sockets and other processes; a thread is as confined as its maker.
        assert!(act == "thread" || status.success() && text.contains("refused"), "landlock-{act}: {text}");
    }
}

/// Figures, for a release build: `cargo test --release … -- --ignored --nocapture throughput`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    let rules: String = (0..50).map(support::rule).collect();
    let begun = Instant::now();
    let mut scanner = Scanner::ready(&rules);
    println!("50 rules: ready after {:?}", begun.elapsed());
    let content = support::noise(MAX_RUN_BYTES);
    let mut id = 0;
    for size in [4 << 10, 64 << 10, 256 << 10] {
        let total = 512usize << 20;
        let bytes = &content[..size];
        let run = Run { block: 0, offset: 0, length: u32::try_from(size).unwrap() };
        let begun = Instant::now();
        let window = (1 << 20) / size;
        for sent in 0..total / size + window {
            if sent < total / size {
                let batch = Request::Batch { id, runs: vec![run], bytes };
                scanner.socket.write_all(&batch.encode().unwrap()).unwrap();
                id += 1;
            }
            if sent >= window {
                assert!(matches!(scanner.answer(), Some(Answer::Scanned { .. })));
            }
        }
        let rate = total as f64 / begun.elapsed().as_secs_f64() / 1e9;
        println!("runs of {} KiB: {rate:.2} GB/s; {}", size >> 10, scanner.memory());
    }
    let pages = 64usize;
    let runs: Vec<Run> =
        (0..pages as u64).map(|n| Run { block: 0, offset: n * 8192, length: 4096 }).collect();
    let begun = Instant::now();
    for _ in 0..512 {
        let batch = Request::Batch { id, runs: runs.clone(), bytes: &content[..pages * PAGE] };
        scanner.socket.write_all(&batch.encode().unwrap()).unwrap();
        assert!(matches!(scanner.answer(), Some(Answer::Scanned { .. })));
        id += 1;
    }
    let rate = (512 * pages * PAGE) as f64 / begun.elapsed().as_secs_f64() / 1e9;
    println!("64 scattered pages a batch: {rate:.2} GB/s");
    let mut scan = Scan::new(patient());
    for page in 0..512u64 {
        scan.page(0, page * 4096, &content[..PAGE]);
    }
    let begun = Instant::now();
    let verdict = drive(&mut scan, &mut scanner);
    println!("the last 2 MiB to the verdict: {:?}, {} bytes skipped", begun.elapsed(), verdict.skipped_bytes);
}
