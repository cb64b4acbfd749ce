#![allow(clippy::unwrap_used)]
use super::*;
use crate::frame::{HEADER_BYTES, Header, MAX_RUN_BYTES};

const PAGE: usize = 4096;

/// The other end: takes what is written, and answers.
struct Scanner {
    scan: Scan,
    now: Instant,
    received: Vec<u8>,
}

fn with(policy: Policy) -> Scanner {
    Scanner { scan: Scan::new(policy), now: Instant::now(), received: Vec::new() }
}

impl Scanner {
    fn pages(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            self.scan.page(0, page * PAGE as u64, &[0; PAGE]);
        }
    }

    /// The ids of batches that came since; `None` stands for FINISH.
    fn take(&mut self) -> Vec<Option<u64>> {
        while !self.scan.output().is_empty() {
            let count = self.scan.output().len().min(100_000);
            self.received.extend_from_slice(&self.scan.output()[..count]);
            self.scan.wrote(count);
        }
        let (mut all, mut rest) = (Vec::new(), &self.received[..]);
        while let Some((header, behind)) = rest.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::of_request(*header).unwrap();
            let (payload, next) = behind.split_at(header.length);
            all.push(match Request::decode(header, payload).unwrap() {
                Request::Batch { id, .. } => Some(id),
                Request::Finish => None,
                other => panic!("{other:?}"),
            });
            rest = next;
        }
        self.received.clear();
        all
    }

    fn says(&mut self, answer: &Answer) {
        self.scan.input(&answer.encode().unwrap(), self.now);
    }

    fn scans(&mut self, id: u64) {
        self.says(&Answer::Scanned { id, skipped_bytes: 0 });
    }

    fn hits(&mut self, rule: &str, response: Response, offset: u64) {
        self.says(&Answer::Hit { rule: rule.to_owned(), response, block: 0, offset });
    }

    fn is_done(&mut self) {
        self.says(&Answer::Done { scanned_bytes: 0, skipped_bytes: 0, hits_total: 0 });
    }

    fn passes(&mut self, time: Duration) {
        self.now += time;
        self.scan.tick(self.now);
    }

    /// Finishes, and answers every batch that is still open.
    fn ends(&mut self) -> Verdict {
        self.scan.finish(self.now);
        for id in self.take() {
            match id {
                Some(id) => self.scans(id),
                None => self.is_done(),
            }
        }
        self.verdict()
    }

    fn verdict(&self) -> Verdict {
        self.scan.verdict().expect("a verdict").clone()
    }
}

const MS: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(3);

fn accepting() -> Policy {
    Policy { on_timeout: WhenLate::Accept, ..Policy::default() }
}

#[test]
fn clean_memory_is_released() {
    let mut scanner = with(Policy { require_complete: true, ..Policy::default() });
    scanner.pages(0, 200);
    assert_eq!(scanner.scan.verdict(), None);
    let verdict = scanner.ends();
    assert_eq!(verdict.outcome, Outcome::Release);
    assert_eq!((verdict.scanned_bytes, verdict.skipped_bytes), (200 * 4096, 0));
}

#[test]
fn a_hit_that_refuses_ends_it_at_once() {
    let mut scanner = with(Policy::default());
    scanner.pages(0, 128);
    scanner.hits("known", Response::Report, 4096);
    scanner.hits("EICAR", Response::Refuse, 8192);
    let verdict = scanner.verdict();
    assert_eq!(verdict.outcome, Outcome::Refuse(Cause::Hit));
    let names: Vec<_> = verdict.hits.iter().map(|hit| (hit.rule.as_str(), hit.offset)).collect();
    assert_eq!(names, [("EICAR", 8192), ("known", 4096)]);
}

#[test]
fn a_hit_that_reports_is_reported_once() {
    let mut scanner = with(Policy::default());
    scanner.pages(0, 128);
    for _ in 0..3 {
        scanner.hits("known", Response::Report, 4096);
    }
    let verdict = scanner.ends();
    assert_eq!(verdict.outcome, Outcome::Release);
    assert_eq!((verdict.hits.len(), verdict.hits_total), (1, 1));
}

#[test]
fn a_scanner_that_falls_behind_is_skipped_or_waited_for() {
    for (when_behind, require_complete, expect) in [
        (WhenBehind::Skip, false, Outcome::Release),
        (WhenBehind::Skip, true, Outcome::Refuse(Cause::Incomplete)),
    ] {
        let mut scanner = with(Policy { when_behind, require_complete, ..Policy::default() });
        scanner.pages(0, 2048);
        assert!(scanner.scan.has_room(), "never stalls the stream");
        assert!(scanner.scan.in_flight_bytes <= MAX_IN_FLIGHT_BYTES);
        let verdict = scanner.ends();
        assert_eq!(verdict.outcome, expect);
        assert_eq!(verdict.scanned_bytes + verdict.skipped_bytes, 2048 * 4096);
        assert!(verdict.skipped_bytes > 6 << 20, "{verdict:?}");
    }
    let mut scanner = with(Policy::complete(PATIENCE));
    for page in 0..2048 {
        while !scanner.scan.has_room() {
            let ids = scanner.take();
            assert!(!ids.is_empty());
            ids.into_iter().flatten().for_each(|id| scanner.scans(id));
        }
        scanner.pages(page, 1);
    }
    assert_eq!(scanner.ends().outcome, Outcome::Release);
}

/// A stream that waits is held early enough for what is on its way, and nothing of that is skipped.
#[test]
fn what_was_on_its_way_when_the_stream_is_held_is_not_skipped() {
    let mut scanner = with(Policy::complete(PATIENCE));
    let mut page = 0;
    while scanner.scan.has_room() {
        scanner.pages(page, 1);
        page += 1;
    }
    let held_at = scanner.scan.in_flight_bytes;
    // More than one read of the network and a compressed packet, in scattered pages.
    for number in 0..320 {
        scanner.pages(10_000 + 2 * number, 1);
    }
    assert!(scanner.scan.in_flight_bytes > held_at && !scanner.scan.has_room());
    let verdict = scanner.ends();
    assert_eq!((verdict.outcome, verdict.skipped_bytes), (Outcome::Release, 0));
    assert_eq!(verdict.scanned_bytes, (page + 320) * PAGE as u64);
}

/// What is held is bounded, whoever goes on giving pages.
#[test]
fn a_stream_that_does_not_wait_is_refused_and_holds_no_more() {
    let mut scanner = with(Policy::complete(PATIENCE));
    scanner.pages(0, 4096);
    assert!(scanner.scan.in_flight_bytes <= MAX_WAITED_FOR_BYTES);
    assert_eq!(scanner.ends().outcome, Outcome::Refuse(Cause::Incomplete));
}

#[test]
fn a_scanner_may_take_long_for_all_and_not_for_one_batch() {
    let mut scanner = with(Policy::complete(PATIENCE));
    scanner.scan.tick(scanner.now);
    scanner.passes(100 * PATIENCE);
    for round in 0..50u64 {
        scanner.pages(round * 64, 64);
        scanner.scan.tick(scanner.now);
        scanner.passes(PATIENCE - MS);
        let ids = scanner.take();
        ids.into_iter().flatten().for_each(|id| scanner.scans(id));
    }
    assert_eq!(scanner.scan.verdict(), None, "it was never late");
    scanner.pages(100_000, 192);
    scanner.scan.tick(scanner.now);
    let first = scanner.take()[0].unwrap();
    scanner.passes(PATIENCE - MS);
    // Hits are no progress, an answer is: the next batch has its own time.
    scanner.hits("known", Response::Report, 100_000 * PAGE as u64);
    scanner.scans(first);
    scanner.passes(PATIENCE - MS);
    assert_eq!(scanner.scan.verdict(), None);
    scanner.passes(MS);
    let verdict = scanner.verdict();
    assert_eq!(verdict.outcome, Outcome::Refuse(Cause::Late));
    assert_eq!(verdict.trouble, Some(Trouble::Late));
    let mut accepting =
        with(Policy { on_timeout: WhenLate::Accept, require_complete: false, ..Policy::complete(PATIENCE) });
    accepting.pages(0, 64);
    accepting.scan.tick(accepting.now);
    accepting.passes(PATIENCE);
    assert_eq!(
        (accepting.scan.verdict(), accepting.scan.has_room()),
        (None, true),
        "it passes unseen from here"
    );
    accepting.scan.finish(accepting.now);
    assert_eq!(accepting.verdict().outcome, Outcome::Release);
    let mut other = with(Policy::default());
    other.pages(0, 64);
    other.scan.tick(other.now);
    other.passes(100 * PATIENCE);
    assert_eq!(other.scan.verdict(), None, "a stream that does not wait has no such limit");
}

/// A page that the scanner gave up on was not seen, whatever else it was.
#[test]
fn what_the_scanner_skips_refuses_where_everything_is_to_be_seen() {
    for (policy, expect) in [
        (Policy::complete(PATIENCE), Outcome::Refuse(Cause::Incomplete)),
        (Policy::default(), Outcome::Release),
    ] {
        let mut scanner = with(policy);
        scanner.pages(0, 64);
        let first = scanner.take()[0].unwrap();
        scanner.says(&Answer::Scanned { id: first, skipped_bytes: 4096 });
        assert_eq!(scanner.ends().outcome, expect);
    }
}

#[test]
fn a_late_verdict_is_refused_or_accepted() {
    for (on_timeout, expect) in
        [(WhenLate::Refuse, Outcome::Refuse(Cause::Late)), (WhenLate::Accept, Outcome::Release)]
    {
        let mut scanner = with(Policy { on_timeout, ..Policy::default() });
        scanner.pages(0, 10);
        scanner.scan.finish(scanner.now);
        assert_eq!(scanner.scan.deadline(), Some(scanner.now + 200 * MS));
        scanner.passes(199 * MS);
        assert_eq!(scanner.scan.verdict(), None);
        scanner.passes(MS);
        let verdict = scanner.verdict();
        assert_eq!((verdict.outcome, verdict.trouble), (expect, Some(Trouble::Late)));
        assert_eq!(verdict.skipped_bytes, 40_960);
        scanner.is_done();
        assert_eq!(scanner.verdict().outcome, expect, "it is judged once");
    }
}

#[test]
fn the_scan_budget_holds() {
    let mut scanner = with(Policy { scan_budget: 50 * MS, ..Policy::default() });
    scanner.pages(0, 64);
    let first = scanner.take();
    scanner.passes(MS);
    scanner.passes(60 * MS);
    scanner.scans(first[0].unwrap());
    scanner.pages(1000, 640);
    assert_eq!(scanner.take(), [], "nothing is scanned beyond the budget");
    let verdict = scanner.ends();
    assert_eq!((verdict.outcome, verdict.scanned_bytes), (Outcome::Release, MAX_RUN_BYTES as u64));
    assert_eq!(verdict.skipped_bytes, 640 * 4096);
}

#[test]
fn an_idle_scanner_uses_no_budget() {
    let mut scanner = with(Policy { scan_budget: 50 * MS, ..Policy::default() });
    scanner.passes(MS);
    scanner.passes(1000 * MS);
    scanner.pages(0, 64);
    assert_eq!(scanner.take(), [Some(0)]);
}

#[test]
fn a_lost_scanner_ends_it_or_is_counted() {
    let mut scanner = with(Policy::default());
    scanner.scan.lost("it closed its socket");
    assert_eq!(scanner.verdict().outcome, Outcome::Refuse(Cause::Lost));

    let mut scanner = with(accepting());
    scanner.pages(0, 64);
    scanner.scan.lost("it closed its socket");
    assert_eq!(scanner.scan.verdict(), None, "what still comes is counted");
    assert!(scanner.scan.output().is_empty());
    scanner.pages(64, 64);
    scanner.scan.finish(scanner.now);
    let verdict = scanner.verdict();
    assert_eq!((verdict.outcome, verdict.skipped_bytes), (Outcome::Release, 128 * 4096));
    assert_eq!(verdict.trouble, Some(Trouble::Lost("it closed its socket".to_owned())));

    let mut scanner = with(Policy { require_complete: true, ..accepting() });
    scanner.pages(0, 1);
    scanner.scan.lost("it closed its socket");
    scanner.scan.finish(scanner.now);
    assert_eq!(scanner.verdict().outcome, Outcome::Refuse(Cause::Incomplete));
}

#[test]
fn nonsense_is_a_lost_scanner() {
    let hit = |block, offset| Answer::Hit { rule: "r".to_owned(), response: Response::Report, block, offset };
    let done = Answer::Done { scanned_bytes: 0, skipped_bytes: 0, hits_total: 0 };
    let ready = Answer::Ready { rules: 1, sandbox: String::new() };
    let wrong_batch = Answer::Scanned { id: 9, skipped_bytes: 0 };
    for answer in [hit(1, 0), hit(0, 64 * 4096), done, ready, wrong_batch] {
        let mut scanner = with(Policy::default());
        scanner.pages(0, 64);
        scanner.says(&answer);
        assert_eq!(scanner.verdict().outcome, Outcome::Refuse(Cause::Lost), "{answer:?}");
    }
    let mut scanner = with(Policy::default());
    scanner.scan.input(b"garbage", scanner.now);
    assert_eq!(scanner.verdict().outcome, Outcome::Refuse(Cause::Lost));
    let mut scanner = with(Policy::default());
    scanner.pages(0, 64);
    for at in 0..=MAX_HITS_PER_BATCH as u64 {
        scanner.hits("r", Response::Report, at);
    }
    assert_eq!(scanner.verdict().outcome, Outcome::Refuse(Cause::Lost), "more hits than a batch may have");
}
