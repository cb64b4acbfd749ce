//! How fast the inspector is, beside memcpy of the same bytes: interleaved rounds, medians, one core.
//!
//! `cargo run --release -p outrider-engine --example inspect_speed [-- ROUNDS]` prints one JSON object.

#[path = "../tests/support/dry_run.rs"]
mod dry_run;

use outrider_engine::inspect::devices::{Unvouched, compile, judge};
use outrider_engine::inspect::{Inspector, Learner, Limits};
use std::hint::black_box;
use std::time::{Duration, Instant};
use types::handover::Digest;
use types::inventory::{Inventory, RamBlock};

const PAGE_BYTES: u64 = 4096;
const BIOS_BYTES: u64 = 256 << 10;
const GUEST_BYTES: u64 = 256 << 20;
/// What a channel's reader gives at a time.
const PIECE_BYTES: usize = 256 << 10;
/// Where memcpy copies to: larger than the cache, as a queue to QEMU would be.
const SINK_BYTES: usize = 32 << 20;

fn inventory() -> Inventory {
    let block = |name: &str, length_bytes, content| RamBlock { name: name.to_owned(), length_bytes, content };
    // With a pinned block, as a real VM has.
    let bios = block("pc.bios", BIOS_BYTES, Some(Digest::of(&[])));
    Inventory {
        machine: "pc-q35-10.0".to_owned(),
        page_size_bytes: 4096,
        ram_blocks: vec![block("pc.ram", GUEST_BYTES, None), bios],
        devices: Vec::new(),
        hypervisor: "qemu/bench".to_owned(),
    }
}

fn head() -> Vec<u8> {
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec();
    stream.extend_from_slice(&[8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 0, 0, 0, 1]);
    stream.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    stream.extend_from_slice(&((GUEST_BYTES + BIOS_BYTES) | 4).to_be_bytes());
    stream.extend_from_slice(b"\x06pc.ram");
    stream.extend_from_slice(&GUEST_BYTES.to_be_bytes());
    stream.extend_from_slice(b"\x07pc.bios");
    stream.extend_from_slice(&BIOS_BYTES.to_be_bytes());
    stream.extend_from_slice(&16u64.to_be_bytes());
    stream.extend_from_slice(b"\x7e\0\0\0\x01\x02\0\0\0\x01");
    stream.extend_from_slice(&2u64.to_be_bytes());
    stream.extend_from_slice(b"\x06pc.ram\0");
    stream
}

fn pages() -> Vec<u8> {
    let mut stream = Vec::with_capacity(usize::try_from(GUEST_BYTES + GUEST_BYTES / 256).expect("fits"));
    for page in 0..GUEST_BYTES / PAGE_BYTES {
        stream.extend_from_slice(&((page * PAGE_BYTES) | 0x28).to_be_bytes());
        stream.extend(
            (0..512u64).flat_map(|word| (page ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes()),
        );
    }
    stream
}

fn zeros() -> Vec<u8> {
    let record = |page: u64| {
        let [a, b, c, d, e, f, g, h] = ((page * PAGE_BYTES) | 0x22).to_be_bytes();
        [a, b, c, d, e, f, g, h, 0]
    };
    (0..GUEST_BYTES / PAGE_BYTES).flat_map(record).collect()
}

fn inspector() -> Inspector {
    let limits = Limits { page_records: Some(u64::MAX), page_records_each: u32::MAX, ..Limits::default() };
    let mut inspector = Inspector::new(&inventory(), None, &limits).expect("a sound inventory");
    inspector.feed(0, &head(), &mut |_, _: &[u8]| {}).expect("a sound head");
    inspector
}

fn inspect(inspector: &mut Inspector, stream: &[u8]) -> Duration {
    let mut released = 0usize;
    let begin = Instant::now();
    for piece in stream.chunks(PIECE_BYTES) {
        inspector
            .feed(0, piece, &mut |_, bytes: &[u8]| released += black_box(bytes).len())
            .expect("a sound stream");
    }
    let took = begin.elapsed();
    assert!(released + PIECE_BYTES > stream.len(), "the stream was released");
    took
}

fn copy(stream: &[u8], sink: &mut [u8]) -> Duration {
    let begin = Instant::now();
    let mut at = 0;
    for piece in stream.chunks(PIECE_BYTES) {
        if at + piece.len() > sink.len() {
            at = 0;
        }
        sink[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
        black_box(&mut *sink);
    }
    begin.elapsed()
}

/// Forty devices, 700 KB of state: how long it takes to judge them by their layouts. Nothing without a QEMU to ask.
fn devices(rounds: usize) -> Option<serde_json::Value> {
    let qemu = dry_run::qemus().into_iter().next()?;
    let words: Vec<String> = (0..15)
        .flat_map(|n| ["-device".to_owned(), format!("virtio-rng-pci,addr={:#x}", n + 2)])
        .chain(["-device", "qemu-xhci,addr=0x12", "-device", "VGA,addr=0x13"].map(str::to_owned))
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let stream = qemu.dry_run("q35", &words)?;
    let catalogue = compile(&stream, qemu.dump("q35").as_deref(), "qemu/bench").expect("a sound dry run");
    let mut learner = Learner::default();
    learner.feed(&stream).expect("a sound dry run");
    let learned = learner.finish("qemu/bench").expect("a sound dry run");
    let blob = &learned.device_state;
    let judged = || judge(blob, 0, u32::MAX, 4096, &learned.inventory, Some(&catalogue), Unvouched::Refuse);
    let timed = |_| {
        let begin = Instant::now();
        let judged = black_box(judged()).expect("the dry run itself");
        (begin.elapsed(), judged.sections.len())
    };
    let (times, counts): (Vec<_>, Vec<_>) = (0..rounds.max(1)).map(timed).unzip();
    let (milliseconds, sections) = (median(times) * 1e3, counts.first().copied().unwrap_or(0));
    Some(serde_json::json!({"bytes": blob.len(), "sections": sections, "judged_in_ms": milliseconds}))
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

#[allow(clippy::cast_precision_loss)]
fn main() {
    let rounds: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(15);
    let (pages, zeros) = (pages(), zeros());
    let mut sink = vec![0u8; SINK_BYTES];
    let (mut copies, mut inspections, mut records) = (Vec::new(), Vec::new(), Vec::new());
    let mut zero_inspector = inspector();
    for _ in 0..rounds {
        copies.push(copy(&pages, &mut sink));
        inspections.push(inspect(&mut inspector(), &pages));
        let several = (0..20).map(|_| inspect(&mut zero_inspector, &zeros)).sum::<Duration>();
        records.push(several / 20);
    }
    let (copied, inspected, recorded) = (median(copies), median(inspections), median(records));
    let gigabytes = pages.len() as f64 / 1e9;
    let report = serde_json::json!({
        "pages": {
            "memcpy_gb_per_s": gigabytes / copied,
            "inspector_gb_per_s": gigabytes / inspected,
            "ratio_to_memcpy": copied / inspected,
        },
        "zero_records": {"million_per_s": (zeros.len() / 9) as f64 / recorded / 1e6},
        "devices": devices(rounds),
        "rounds": rounds,
    });
    println!("{report:#}");
}
