//! What the fuzzers run: one function for each parser that reads what a peer sent. Each takes any bytes, and panics
//! when an invariant is broken. The fuzzers (in `fuzz/`) look for such bytes; `tests/corpora.rs` replays what they kept.
//!
//! | target | reads | invariant beside "no panic, no hang, bounded memory" |
//! |---|---|---|
//! | `main_channel` | a main channel | what is released is a prefix; any split gives the same verdict; what is accepted reads back as the enrolled VM |
//! | `whole_stream` | edits of a good stream | the same |
//! | `multifd` | a multifd channel | any split gives the same events |
//! | `return_path` | a return path | any split gives the same messages |
//! | `device_state` | a device state | what is accepted is cut into the enrolled devices |
//! | `catalogue` | a catalogue, a dump | what is read is sound |
//! | `frames` | frames between agents | any split gives the same frames |
//! | `qmp` | a monitor's line | |
//! | `evidence` | what a host says of its platform | what is read writes back; what is not signed is not trusted |
//! | `event_log` | a firmware's event log | a log does not differ from itself |
//! | `tpm_structures` | an attestation, a key, a signature | a key writes back |

#[path = "../../../crates/engine/tests/support/mod.rs"]
#[allow(missing_docs)]
mod support;

mod attestation;
mod channels;
mod streams;

/// A target by its name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("main_channel", streams::main_channel),
    ("whole_stream", streams::whole_stream),
    ("device_state", streams::device_state),
    ("catalogue", streams::catalogue),
    ("multifd", channels::multifd),
    ("return_path", channels::return_path),
    ("frames", channels::frames),
    ("qmp", channels::qmp),
    ("evidence", attestation::evidence),
    ("event_log", attestation::event_log),
    ("tpm_structures", attestation::structures),
];

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<fn(&[u8])> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, run)| *run)
}

/// Good inputs to begin from, for the corpora.
#[must_use]
pub fn seeds(name: &str) -> Vec<Vec<u8>> {
    match name {
        "main_channel" => vec![[&[7][..], &streams::base().stream].concat()],
        "whole_stream" => vec![vec![0; 8], (0..64).collect()],
        "device_state" => vec![streams::base().device_state.clone()],
        "catalogue" => vec![streams::catalogue_seed()],
        "multifd" => channels::multifd_seeds(),
        "return_path" => vec![vec![3, 0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0]],
        "frames" => vec![vec![5, 1, 0, 0, 0, 3, b'a', b'b', b'c', 6, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]],
        "qmp" => vec![
            br#"{"return": {}, "id": 1}"#.to_vec(),
            br#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}"#.to_vec(),
        ],
        "evidence" => vec![attestation::evidence_seed()],
        "event_log" => vec![attestation::event_log_seed()],
        "tpm_structures" => attestation::structure_seeds(),
        _ => Vec::new(),
    }
}

/// Pieces of `bytes`, as long as `seed` says; all of it at once when that is 0.
fn pieces(bytes: &[u8], seed: u8) -> impl Iterator<Item = &[u8]> {
    const LENGTHS: [usize; 8] = [usize::MAX, 1, 2, 3, 7, 64, 1000, 4093];
    let length = LENGTHS.get(usize::from(seed % 8)).copied().unwrap_or(usize::MAX);
    bytes.chunks(length.min(bytes.len().max(1)))
}
