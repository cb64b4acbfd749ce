//! The inspector over several channels, and its budgets.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod support;

use outrider_engine::inspect::{Inspector, Limits, Multifd, Output, Refused, learn};
use std::io::Read;
use std::path::PathBuf;
use types::VmId;
use types::inventory::Inventory;
use wire::qemu::multifd::Method;

const PAGES: u64 = 8;

/// The folders of the corpus with several channels, and their streams; nothing when it is not there.
fn recorded() -> Vec<(String, Vec<Vec<u8>>)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let folders = entries.filter_map(Result::ok).filter(|e| e.file_name().to_string_lossy().contains("mfd"));
    folders
        .map(|entry| {
            let channels = (0..).map_while(|n| unpack(&entry.path().join(format!("ch{n}.fwd")))).collect();
            (entry.file_name().into_string().unwrap(), channels)
        })
        .collect()
}

fn unpack(path: &std::path::Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path.with_extension("fwd.gz")) {
        flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    } else {
        let file = std::fs::File::open(path.with_extension("fwd.xz")).ok()?;
        xz2::read::XzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    }
    Some(bytes)
}

/// One channel's packets for the hand-made VM.
#[derive(Clone, Default)]
struct Packets {
    bytes: Vec<u8>,
    number: u64,
}

impl Packets {
    fn init(id: u8, uuid: [u8; 16]) -> Self {
        let mut bytes = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1];
        bytes.extend_from_slice(&uuid);
        bytes.push(id);
        bytes.extend_from_slice(&[0; 39]);
        Self { bytes, number: 0 }
    }

    fn packet(mut self, flags: u32, alloc: u32, zero: &[u64]) -> Self {
        self.number += 1;
        let start = self.bytes.len();
        for word in [0x1122_3344, 1, flags, alloc, 0, 0] {
            self.bytes.extend_from_slice(&u32::to_be_bytes(word));
        }
        self.bytes.extend_from_slice(&self.number.to_be_bytes());
        self.bytes.extend_from_slice(&(zero.len() as u32).to_be_bytes());
        self.bytes.extend_from_slice(&[0; 28]);
        if !zero.is_empty() {
            self.bytes.extend_from_slice(b"pc.ram");
        }
        self.bytes.resize(start + 320, 0);
        for page in zero {
            self.bytes.extend_from_slice(&(page * 4096).to_be_bytes());
        }
        self.bytes.resize(start + 1344, 0);
        self
    }

    fn zeros(self, pages: &[u64]) -> Self {
        self.packet(0, 128, pages)
    }

    fn sync(self) -> Self {
        self.packet(1, 0, &[])
    }
}

/// The hand-made stream with a flush word in its part and in its end.
fn main_channel() -> Vec<u8> {
    let stream = support::handmade();
    let marks = support::Marks::of(&stream);
    let flush = 0x200u64.to_be_bytes();
    let stream = support::splice(&stream, marks.end_eos, 0, &flush);
    support::splice(&stream, marks.part + 5, 0, &flush)
}

fn limits() -> Limits {
    let multifd = Multifd { channels: 2, method: Method::Plain };
    Limits { multifd: Some(multifd), vm: Some(VmId::from_bytes([7; 16])), ..Limits::default() }
}

/// Feeds all channels in pieces, in an order that the seed decides; gives what was released on each, and the verdict.
fn run(
    inventory: &Inventory,
    limits: &Limits,
    channels: &[Vec<u8>],
    piece: usize,
    seed: u64,
) -> (Vec<Vec<u8>>, Result<Vec<u8>, Refused>) {
    let mut inspector = Inspector::new(inventory, None, limits).unwrap();
    let mut released = vec![Vec::new(); channels.len()];
    let mut rest: Vec<&[u8]> = channels.iter().map(Vec::as_slice).collect();
    let mut state = seed | 1;
    loop {
        let ready: Vec<usize> =
            (0..rest.len()).filter(|n| !rest[*n].is_empty() && inspector.wants(*n as u16)).collect();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let Some(&chosen) = ready.get((state >> 33) as usize % ready.len().max(1)) else { break };
        let (now, later) = rest[chosen].split_at(piece.min(rest[chosen].len()));
        rest[chosen] = later;
        let mut out = |channel: u16, bytes: &[u8]| {
            if let Some(place) = released.get_mut(usize::from(channel)) {
                place.extend_from_slice(bytes);
            }
        };
        if let Err(refused) = inspector.feed(chosen as u16, now, &mut out) {
            return (released, Err(refused));
        }
    }
    (released, inspector.finish().map(|held| held.bytes))
}

fn check(channels: &[Vec<u8>], expect: Result<(), (&str, u16)>) {
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    for (piece, seed) in [(1 << 20, 1), (1000, 2), (61, 3), (7, 4)] {
        let (released, verdict) = run(&inventory, &limits(), channels, piece, seed);
        for (given, out) in channels.iter().zip(&released) {
            assert!(given.starts_with(out), "something else was released than came");
        }
        match (verdict, expect) {
            (Ok(held), Ok(())) => {
                assert!([&released[0][..], &held].concat() == channels[0], "not all of the main channel");
                assert!(released[1..] == channels[1..], "not all of the others");
            }
            (Err(refused), Err((rule, channel))) => {
                assert_eq!((refused.violation.rule, refused.channel), (rule, channel), "{refused}");
            }
            (verdict, expect) => panic!("{verdict:?} instead of {expect:?}"),
        }
    }
}

fn good() -> Vec<Vec<u8>> {
    let uuid = [7; 16];
    let first = Packets::init(0, uuid).zeros(&[1, 2]).sync().zeros(&[1]).sync();
    let second = Packets::init(1, uuid).sync().zeros(&[2]).sync();
    vec![main_channel(), first.bytes, second.bytes]
}

#[test]
fn recorded_channels_are_accepted_in_any_order() {
    let samples = recorded();
    println!("{} recordings with several channels", samples.len());
    for (name, channels) in samples {
        let inventory = learn(&channels[0], "qemu/test").unwrap();
        let count = channels.len() as u16 - 1;
        let limits = Limits {
            multifd: Some(Multifd { channels: count, method: Method::Plain }),
            return_path_required: false,
            ..Limits::default()
        };
        for (piece, seed) in [(256 << 10, 1), (256 << 10, 2), (10_000, 3), (4093, 4)] {
            let (released, verdict) = run(&inventory, &limits, &channels, piece, seed);
            let held = verdict.unwrap_or_else(|refused| panic!("{name}: {refused}"));
            assert!([&released[0][..], &held].concat() == channels[0], "{name}");
            assert!(released[1..] == channels[1..], "{name}");
        }
    }
}

#[test]
fn channels_in_step_are_accepted() {
    check(&good(), Ok(()));
}

#[test]
fn a_vm_without_a_uuid_says_zeros() {
    let mut channels = good();
    for channel in &mut channels[1..] {
        channel[8..24].fill(0);
    }
    check(&channels, Ok(()));
}

/// INV-H4, INV-M1: whose channel it is, and which.
#[test]
fn anothers_channel_and_a_second_of_the_same_number_are_refused() {
    let mut channels = good();
    channels[1][8] = 1;
    check(&channels, Err(("INV-H4", 1)));
    let mut channels = good();
    channels[2][24] = 0;
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    let (_, verdict) = run(&inventory, &limits(), &channels, 1 << 20, 1);
    assert_eq!(verdict.unwrap_err().violation.rule, "INV-M1");
}

/// INV-M8: what stops or hangs QEMU when one channel synchronises more or less often than the others.
#[test]
fn channels_out_of_step_are_refused() {
    let uuid = [7; 16];
    let seconds = [
        Packets::init(1, uuid).sync(),
        Packets::init(1, uuid),
        Packets::default(),
        Packets::init(1, uuid).zeros(&[3]),
    ];
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    for second in seconds {
        let mut channels = good();
        channels[2] = second.bytes;
        let (_, verdict) = run(&inventory, &limits(), &channels, 1000, 1);
        assert_eq!(verdict.unwrap_err().violation.rule, "INV-M8");
    }
    let mut channels = good();
    channels[1].extend_from_slice(&[0x11; 100]);
    assert!(run(&inventory, &limits(), &channels, 1 << 20, 1).1.is_err());
}

/// INV-M9: two channels must not write a page at once.
#[test]
fn a_page_comes_once_between_two_synchronisations() {
    let uuid = [7; 16];
    let mut channels = good();
    channels[2] = Packets::init(1, uuid).zeros(&[2]).sync().sync().bytes;
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    for seed in 1..20 {
        let (_, verdict) = run(&inventory, &limits(), &channels, 200, seed);
        assert_eq!(verdict.unwrap_err().violation.rule, "INV-M9", "seed {seed}");
    }
}

/// INV-T2: exactly the permitted channels.
#[test]
fn a_channel_that_is_not_permitted_is_refused() {
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    let mut inspector = Inspector::new(&inventory, None, &limits()).unwrap();
    let refused = inspector.feed(3, b"x", &mut |_: u16, _: &[u8]| {}).unwrap_err();
    assert_eq!((refused.violation.rule, refused.channel), ("INV-T2", 3));
    assert!(inspector.feed(0, &main_channel(), &mut |_: u16, _: &[u8]| {}).is_err(), "it ended there");
}

/// INV-T5 and INV-R15: budgets hold over all channels.
#[test]
fn budgets_hold_over_all_channels() {
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    let total: usize = good().iter().map(Vec::len).sum();
    let rule = |limits: Limits| run(&inventory, &limits, &good(), 500, 9).1.unwrap_err().violation.rule;
    assert_eq!(rule(Limits { stream_bytes: total as u64 - 1, ..limits() }), "INV-T5");
    let records = PAGES + 2 + 4;
    assert!(run(&inventory, &Limits { page_records: Some(records), ..limits() }, &good(), 500, 9).1.is_ok());
    assert_eq!(rule(Limits { page_records: Some(records - 1), ..limits() }), "INV-R15");
    assert_eq!(rule(Limits { page_records_each: 2, ..limits() }), "INV-R15");
}

/// INV-R14: firmware is what was enrolled, whichever way it comes.
#[test]
fn other_firmware_is_refused() {
    let stream = support::handmade();
    let mut inventory = learn(&stream, "qemu/test").unwrap();
    let rom = inventory.ram_blocks.iter_mut().find(|block| block.name == "pc.rom").unwrap();
    assert_eq!(rom.content, Some(types::Digest::of(&[0; 2 * 4096])), "it was learned");
    rom.content = Some(types::Digest::of(b"another"));
    let mut inspector = Inspector::new(&inventory, None, &Limits::default()).unwrap();
    let fed = inspector.feed(0, &stream, &mut |_: u16, _: &[u8]| {});
    assert_eq!(fed.unwrap_err().violation.rule, "INV-R14");
}

/// INV-R14: of two versions of a firmware page nobody can tell which QEMU will write last.
#[test]
fn firmware_in_two_versions_is_refused_in_any_order() {
    let stream = support::handmade();
    let marks = support::Marks::of(&stream);
    let inventory = learn(&stream, "qemu/test").unwrap();
    let evil = [&8u64.to_be_bytes()[..], b"\x06pc.rom", &[0x66; 4096]].concat();
    for at in [marks.part + 5, marks.end_eos] {
        let mutated = support::splice(&stream, at, 0, &evil);
        let mut inspector = Inspector::new(&inventory, None, &Limits::default()).unwrap();
        let fed =
            mutated.chunks(777).try_for_each(|piece| inspector.feed(0, piece, &mut |_: u16, _: &[u8]| {}));
        assert_eq!(fed.unwrap_err().violation.rule, "INV-R14");
    }
    let mut channels = good();
    channels[0] = {
        let main = main_channel();
        support::splice(&main, marks.part + 5 + 8, 0, &evil)
    };
    let (_, verdict) = run(&inventory, &limits(), &channels, 500, 3);
    assert_eq!(verdict.unwrap_err().violation.rule, "INV-R14");
}

/// INV-M8: QEMU may never read what comes behind the last SYNC.
#[test]
fn pages_behind_the_last_synchronisation_are_refused() {
    let mut channels = good();
    let first = Packets { bytes: channels[1].clone(), number: 4 };
    channels[1] = first.zeros(&[4]).bytes;
    check(&channels, Err(("INV-M8", 1)));
}

/// A header that is whole before the block list is there is released when it is, and not lost.
#[test]
fn a_packet_that_came_before_the_block_list_is_released() {
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    let channels = good();
    let mut inspector = Inspector::new(&inventory, None, &limits()).unwrap();
    let mut released = vec![Vec::new(); 3];
    let mut feed = |inspector: &mut Inspector, channel: u16, bytes: &[u8]| {
        let mut out = |channel: u16, bytes: &[u8]| released[usize::from(channel)].extend_from_slice(bytes);
        inspector.feed(channel, bytes, &mut out).unwrap();
    };
    let first_packet = 64 + 1344;
    for piece in channels[1][..first_packet].chunks(100) {
        feed(&mut inspector, 1, piece);
    }
    feed(&mut inspector, 0, &channels[0]);
    let mut at = [0, first_packet, 0];
    while let Some(n) = (1..3).find(|n| at[*n] < channels[*n].len() && inspector.wants(*n as u16)) {
        let end = (at[n] + 10).min(channels[n].len());
        feed(&mut inspector, n as u16, &channels[n][at[n]..end]);
        at[n] = end;
    }
    inspector.finish().unwrap();
    assert!(released[1] == channels[1] && released[2] == channels[2]);
    assert_eq!(inspector.finish().unwrap_err().violation.rule, "INV-E3");
}

/// QEMU's flag for packets that zlib compressed.
const ZLIB: u32 = 2;

/// A channel of compressed packets, each of them four pages with content.
fn compressed(id: u8, first: u64, packets: usize) -> Vec<u8> {
    let mut channel = Packets::init(id, [7; 16]);
    let mut stream = flate2::Compress::new(flate2::Compression::best(), true);
    for _ in 0..packets {
        let mut payload = Vec::with_capacity(4096);
        stream.compress_vec(&[0x5a; 4 * 4096], &mut payload, flate2::FlushCompress::Sync).unwrap();
        let start = channel.bytes.len();
        channel = channel.packet(ZLIB, 128, &[]);
        let mut put = |at: usize, bytes: &[u8]| {
            channel.bytes[start + at..start + at + bytes.len()].copy_from_slice(bytes);
        };
        put(16, &4u32.to_be_bytes());
        put(20, &(payload.len() as u32).to_be_bytes());
        put(64, b"pc.ram");
        (0..4).for_each(|n| put(320 + 8 * n, &((first + n as u64) * 4096).to_be_bytes()));
        channel.bytes.extend_from_slice(&payload);
        channel = channel.sync();
    }
    channel.bytes
}

/// Takes a page, and then has no room until it is emptied.
#[derive(Default)]
struct Small {
    released: Vec<Vec<u8>>,
    page_bytes: usize,
    total: usize,
}

impl Output for Small {
    fn release(&mut self, channel: u16, bytes: &[u8]) {
        self.released[usize::from(channel)].extend_from_slice(bytes);
    }

    fn page(&mut self, _block: usize, _offset: u64, piece: &[u8]) {
        self.page_bytes += piece.len();
        self.total += piece.len();
    }

    fn has_room(&self) -> bool {
        self.page_bytes < 4096
    }
}

/// What was given in one piece comes packet by packet, and no page of it is lost (the scanner sees every
/// page).
#[test]
fn an_output_without_room_holds_channels_behind_the_packet_that_they_are_at() {
    let packets = 20;
    let main = support::handmade();
    let flush = 0x200u64.to_be_bytes().repeat(packets);
    let main = support::splice(&main, support::Marks::of(&main).part + 5, 0, &flush);
    let channels = [main, compressed(0, 0, packets), compressed(1, 4, packets)];
    let limits = Limits { multifd: Some(Multifd { channels: 2, method: Method::Zlib }), ..limits() };
    let inventory = learn(&support::handmade(), "qemu/test").unwrap();
    let mut inspector = Inspector::new(&inventory, None, &limits).unwrap();
    let mut out = Small { released: vec![Vec::new(); 3], ..Small::default() };
    let mut resumed = 0;
    for (number, bytes) in (0u16..).zip(&channels) {
        inspector.feed(number, bytes, &mut out).unwrap();
    }
    // A page of the main channel's own has filled it.
    let of_main = out.total;
    assert!(inspector.is_held_back() && !inspector.wants(1) && !inspector.wants(2));
    while inspector.is_held_back() {
        out.page_bytes = 0;
        inspector.resume(&mut out).unwrap();
        assert!(out.page_bytes <= 4 * 4096, "{} bytes of pages at once", out.page_bytes);
        resumed += 1;
    }
    assert!(resumed >= 2 * packets - 2, "{resumed} times");
    let held = inspector.finish().unwrap().bytes;
    assert!([&out.released[0][..], &held].concat() == channels[0]);
    assert!(out.released[1..] == channels[1..]);
    assert_eq!(out.total, of_main + 2 * packets * 4 * 4096);
}
