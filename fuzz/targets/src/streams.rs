//! Main channels, whole streams, device states.

use crate::{pieces, support};
use engine::inspect::devices::{Unvouched, compile, judge};
use engine::inspect::{EndDetector, Inspector, Learner, Limits, Refused};
use std::sync::LazyLock;
use types::inventory::Inventory;
use types::layout::Catalogue;

/// A good stream, and what was enrolled from it.
pub(crate) struct Base {
    pub(crate) stream: Vec<u8>,
    pub(crate) inventory: Inventory,
    pub(crate) device_state: Vec<u8>,
    pub(crate) catalogue: Catalogue,
}

pub(crate) fn base() -> &'static Base {
    static BASE: LazyLock<Base> = LazyLock::new(|| {
        let stream = support::handmade();
        let mut learner = Learner::default();
        learner.feed(&stream).expect("the hand-made stream is good");
        let learned = learner.finish("qemu/fuzz").expect("the hand-made stream is whole");
        let catalogue = compile(&stream, None, "qemu/fuzz").expect("its devices are described");
        Base { stream, inventory: learned.inventory, device_state: learned.device_state, catalogue }
    });
    &BASE
}

/// What came out, and the verdict.
#[derive(Debug, PartialEq)]
struct Outcome {
    released: Vec<u8>,
    verdict: Result<Vec<u8>, Refused>,
}

fn inspect(stream: &[u8], split: u8) -> Outcome {
    let base = base();
    let mut inspector = Inspector::new(&base.inventory, None, &Limits::default()).expect("a sound inventory");
    let mut released = Vec::new();
    for piece in pieces(stream, split) {
        let fed = inspector.feed(0, piece, &mut |_: u16, bytes: &[u8]| released.extend_from_slice(bytes));
        if let Err(refused) = fed {
            return Outcome { released, verdict: Err(refused) };
        }
    }
    Outcome { released, verdict: inspector.finish().map(|held| held.bytes) }
}

fn check(stream: &[u8], split: u8) {
    let base = base();
    let (whole, split) = (inspect(stream, 0), inspect(stream, split));
    assert_eq!(whole.verdict, split.verdict, "another split, another verdict");
    for outcome in [&whole, &split] {
        assert!(stream.starts_with(&outcome.released), "something else was released than came");
        match &outcome.verdict {
            Ok(held) => {
                assert!([&outcome.released[..], held].concat() == stream, "not all of it was released");
                let read = engine::inspect::learn(stream, "qemu/fuzz").expect("accepted, so it reads");
                assert_eq!(read, base.inventory, "another VM was accepted");
            }
            Err(refused) => {
                assert!(
                    outcome.released.len() as u64 <= refused.violation.offset,
                    "released past the violation"
                );
            }
        }
    }
    let mut detector = EndDetector::new(&base.inventory, 1 << 20, false);
    detector.feed(stream);
}

/// The first byte says how the rest is split.
pub(crate) fn main_channel(data: &[u8]) {
    if let Some((split, stream)) = data.split_first() {
        check(stream, *split);
    }
}

/// The bytes are a list of edits of the good stream, seven bytes each: where, what, with what.
pub(crate) fn whole_stream(data: &[u8]) {
    let mut stream = base().stream.clone();
    for edit in data.chunks_exact(7).take(16) {
        apply(&mut stream, edit);
    }
    check(&stream, data.first().copied().unwrap_or(0));
}

fn apply(stream: &mut Vec<u8>, edit: &[u8]) {
    let byte = |at: usize| edit.get(at).copied().unwrap_or(0);
    let number = |at: usize| usize::from(u16::from_be_bytes([byte(at), byte(at + 1)]));
    if stream.is_empty() {
        return;
    }
    let at = ((number(0) << 8) | usize::from(byte(2))) % stream.len();
    let length = number(4) % 512;
    let end = (at + length).min(stream.len());
    match byte(3) % 8 {
        0 => stream[at] = byte(6),
        1 => stream[at] ^= 1 << (byte(6) % 8),
        2 => drop(stream.drain(at..end)),
        3 => {
            let piece = stream[at..end].to_vec();
            let to = (at + usize::from(byte(6)) * 16) % (stream.len() + 1);
            stream.splice(to..to, piece);
        }
        4 => stream.truncate(at),
        5 => stream.extend(std::iter::repeat_n(byte(6), length)),
        6 => {
            let word = u32::from_be_bytes([byte(4), byte(5), byte(6), byte(6)]).to_be_bytes();
            let end = (at + 4).min(stream.len());
            stream.splice(at..end, word);
        }
        _ => stream.insert(at, byte(6)),
    }
}

/// A device state against the catalogue of the good stream, with what nobody vouches for refused and reported.
pub(crate) fn device_state(data: &[u8]) {
    let base = base();
    for (catalogue, unvouched) in [
        (Some(&base.catalogue), Unvouched::Refuse),
        (Some(&base.catalogue), Unvouched::Report),
        (None, Unvouched::Report),
    ] {
        if let Ok(judged) = judge(data, 0, 1, 4096, &base.inventory, catalogue, unvouched) {
            assert_eq!(judged.sections.len(), base.inventory.devices.len(), "another VM was accepted");
        }
    }
}

pub(crate) fn catalogue_seed() -> Vec<u8> {
    serde_json::to_vec(&base().catalogue).expect("a catalogue is a document")
}

/// A catalogue as the agent reads it, and used at once.
pub(crate) fn catalogue(data: &[u8]) {
    let base = base();
    let Ok(catalogue) = serde_json::from_slice::<Catalogue>(data) else { return };
    if catalogue.validate().is_err() {
        return;
    }
    drop(judge(&base.device_state, 0, 1, 4096, &base.inventory, Some(&catalogue), Unvouched::Report));
}
