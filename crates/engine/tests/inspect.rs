//! The inspector against recorded, hand-made and mutated streams.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "support/skip.rs"]
mod skip;
mod support;

use outrider_engine::inspect::{EndDetector, Inspector, Limits, Violation, learn};
use proptest::prelude::*;
use support::{Sample, corpus, handmade, mutations, record, with_return_path};
use types::inventory::Inventory;

const MIB: usize = 1 << 20;

fn limits() -> Limits {
    Limits { stream_bytes: 1 << 40, ..Limits::default() }
}

/// What came out, and the verdict.
#[derive(Debug, PartialEq)]
struct Outcome {
    released: Vec<u8>,
    verdict: Result<Vec<u8>, Violation>,
}

fn inspect<'a>(inventory: &Inventory, limits: &Limits, chunks: impl Iterator<Item = &'a [u8]>) -> Outcome {
    let mut inspector = Inspector::new(inventory, None, limits).unwrap();
    let mut released = Vec::new();
    for chunk in chunks {
        if let Err(refused) =
            inspector.feed(0, chunk, &mut |_, bytes: &[u8]| released.extend_from_slice(bytes))
        {
            return Outcome { released, verdict: Err(refused.violation) };
        }
    }
    Outcome {
        released,
        verdict: inspector.finish().map(|held| held.bytes).map_err(|refused| refused.violation),
    }
}

fn accept(name: &str, inventory: &Inventory, stream: &[u8], chunk: usize) {
    let outcome = inspect(inventory, &limits(), stream.chunks(chunk));
    let held = outcome.verdict.unwrap_or_else(|violation| panic!("{name}: {violation}"));
    assert!([outcome.released, held].concat() == stream, "{name}: released bytes differ");
    let mut detector = EndDetector::new(inventory, 16 * MIB, false);
    let (head, last) = stream.split_at(stream.len() - 1);
    for piece in head.chunks(chunk) {
        assert!(!detector.feed(piece), "{name}: an end before the end");
    }
    assert!(detector.feed(last), "{name}: the end was not seen ({:?})", detector.lost());
    assert!(!detector.feed(b"x"), "{name}: bytes behind the end went unseen");
}

fn recorded() -> Vec<Sample> {
    let machines = ["pc", "q35"];
    machines
        .iter()
        .filter_map(|m| Some(Sample { name: format!("recorded {m}"), bytes: record(m, 32)? }))
        .collect()
}

#[test]
fn recorded_streams_are_accepted_and_their_end_is_found() {
    let mut samples = recorded();
    if samples.is_empty() {
        skip::skip(&format!("no {} on this machine to record from", support::QEMU));
    }
    let from_corpus = corpus();
    println!("{} recorded here, {} from the corpus", samples.len(), from_corpus.len());
    samples.extend(from_corpus);
    samples.push(Sample { name: "handmade".into(), bytes: handmade() });
    for sample in samples {
        let inventory = learn(&sample.bytes, "qemu/test").unwrap_or_else(|e| panic!("{}: {e}", sample.name));
        let stream = with_return_path(&sample.bytes);
        accept(&sample.name, &inventory, &stream, 256 * 1024);
        accept(&sample.name, &inventory, &stream, 4093);
        let lost_return_path = inspect(&inventory, &limits(), std::iter::once(&sample.bytes[..]));
        if stream != sample.bytes {
            assert_eq!(lost_return_path.verdict.unwrap_err().rule, "INV-T3");
        }
    }
}

fn check_mutations(name: &str, good: &[u8]) {
    let stream = with_return_path(good);
    let inventory = learn(&stream, "qemu/test").unwrap();
    for mutation in mutations(&stream) {
        let outcome = inspect(&inventory, &limits(), mutation.bytes.chunks(1000));
        let violation = match outcome.verdict {
            Err(violation) => violation,
            Ok(_) => panic!("{name}: row {} was accepted", mutation.row),
        };
        assert_eq!(violation.rule, mutation.rule, "{name}: row {}: {violation}", mutation.row);
        assert!(outcome.released.len() as u64 <= violation.offset, "{name}: row {}", mutation.row);
        assert!(mutation.bytes.starts_with(&outcome.released), "{name}: row {}", mutation.row);
    }
}

#[test]
fn every_row_of_the_table_is_refused_by_its_rule() {
    check_mutations("handmade", &handmade());
    for sample in recorded() {
        check_mutations(&sample.name, &sample.bytes);
    }
}

#[test]
fn renumbered_sections_are_the_same_stream() {
    let stream = handmade();
    let inventory = learn(&stream, "qemu/test").unwrap();
    let (start, _, _, payload) = support::Marks::of(&stream).sections[1].clone();
    let renumbered = support::splice(&stream, start + 1, 4, &[0, 0, 9, 9]);
    let renumbered = support::splice(&renumbered, payload.end + 1, 4, &[0, 0, 9, 9]);
    accept("renumbered", &inventory, &renumbered, 100);
}

#[test]
fn without_a_list_of_devices_the_streams_own_consistency_counts() {
    let stream = handmade();
    let inventory = Inventory { devices: Vec::new(), ..learn(&stream, "qemu/test").unwrap() };
    accept("no device list", &inventory, &stream, 100);
}

#[test]
fn budgets_hold() {
    let stream = handmade();
    let inventory = learn(&stream, "qemu/test").unwrap();
    let rule = |limits: &Limits| inspect(&inventory, limits, stream.chunks(64)).verdict.unwrap_err().rule;
    assert_eq!(rule(&Limits { stream_bytes: 1000, ..limits() }), "INV-T5");
    assert_eq!(rule(&Limits { device_state_bytes: 100, ..limits() }), "INV-D9");
}

#[test]
fn nothing_is_released_after_a_violation() {
    let stream = handmade();
    let inventory = learn(&stream, "qemu/test").unwrap();
    let mut inspector = Inspector::new(&inventory, None, &limits()).unwrap();
    let mut released = 0;
    let first = inspector.feed(0, b"QEVX0000", &mut |_, bytes: &[u8]| released += bytes.len()).unwrap_err();
    assert_eq!(
        inspector.feed(0, &stream, &mut |_, bytes: &[u8]| released += bytes.len()).unwrap_err(),
        first
    );
    assert_eq!(inspector.finish().unwrap_err(), first);
    assert_eq!(released, 0);
}

#[test]
fn every_truncation_is_refused() {
    let stream = handmade();
    let inventory = learn(&stream, "qemu/test").unwrap();
    for len in 0..stream.len() {
        let outcome = inspect(&inventory, &limits(), std::iter::once(&stream[..len]));
        assert!(outcome.verdict.is_err(), "accepted after {len} of {} bytes", stream.len());
        assert!(stream.starts_with(&outcome.released));
    }
}

/// A small generator, so that a failing case is known by its number.
struct Rng(u64);

impl Rng {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % below.max(1)
    }
}

fn mutate(stream: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    for _ in 0..=rng.next(4) {
        let at = rng.next(bytes.len());
        match rng.next(6) {
            0 => bytes.truncate(at + 1),
            1 => bytes.insert(at, rng.next(256) as u8),
            2 => {
                bytes.remove(at);
            }
            3 => {
                let (from, len) = (rng.next(bytes.len()), rng.next(64));
                let piece = bytes[from..(from + len).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            4 => bytes[at] = [0, 1, 2, 3, 4, 6, 8, 0x10, 0x20, 0x7e, 0xff][rng.next(11)],
            _ => bytes[at] ^= 1 << rng.next(8),
        }
        if bytes.is_empty() {
            bytes.push(0);
        }
    }
    bytes
}

/// Whatever is accepted reads back as exactly the enrolled VM; nothing panics; nothing past a violation gets out.
#[test]
fn three_hundred_thousand_mutations_are_judged_soundly() {
    let stream = handmade();
    let inventory = learn(&stream, "qemu/test").unwrap();
    let mut accepted = 0;
    for seed in 1..=300_000u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let bytes = mutate(&stream, &mut rng);
        let chunk = 1 + rng.next(6000);
        let outcome = inspect(&inventory, &limits(), bytes.chunks(chunk));
        assert!(bytes.starts_with(&outcome.released), "seed {seed}");
        match outcome.verdict {
            Ok(held) => {
                accepted += 1;
                assert!([outcome.released, held].concat() == bytes, "seed {seed}");
                assert_eq!(learn(&bytes, "qemu/test").unwrap(), inventory, "seed {seed}");
            }
            Err(violation) => assert!(outcome.released.len() as u64 <= violation.offset, "seed {seed}"),
        }
        let mut detector = EndDetector::new(&inventory, MIB, false);
        for piece in bytes.chunks(chunk) {
            detector.feed(piece);
        }
    }
    // Changed page contents and device payloads are no business of the outer grammar.
    assert!(accepted > 1000, "the mutations hit almost nothing that is legal: {accepted}");
}

proptest! {
    #[test]
    fn any_split_gives_the_same_result(
        seed in any::<u64>(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let good = handmade();
        let inventory = learn(&good, "qemu/test").unwrap();
        let stream = if seed % 2 == 0 { good } else { mutate(&good, &mut Rng(seed)) };
        let whole = inspect(&inventory, &limits(), std::iter::once(&stream[..]));
        let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(stream.len() + 1)).chain([0, stream.len()]).collect();
        cuts.sort_unstable();
        let split = inspect(&inventory, &limits(), cuts.windows(2).map(|w| &stream[w[0]..w[1]]));
        prop_assert_eq!(&whole.verdict, &split.verdict);
        if whole.verdict.is_ok() {
            prop_assert_eq!(whole.released, split.released);
        }
    }

    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let inventory = learn(&handmade(), "qemu/test").unwrap();
        prop_assert!(inspect(&inventory, &limits(), std::iter::once(&bytes[..])).verdict.is_err());
    }
}
