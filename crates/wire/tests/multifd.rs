//! The codec of multifd channels: recordings read to the last byte, and every broken rule is named.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../engine/tests/support/skip.rs"]
mod skip;
mod support;

use outrider_wire::qemu::Blocks;
use outrider_wire::qemu::multifd::{Method, MultifdEvent, MultifdOptions, MultifdParser, Style};
use outrider_wire::qemu::return_path::{Decoder, Message, PrecopyReturn};
use proptest::prelude::*;
use std::collections::BTreeMap;
use support::packets::*;
use support::recorder::{Guest, Qemu, record};
use support::*;

const METHODS: [(Method, &str); 3] =
    [(Method::Plain, "none"), (Method::Zlib, "zlib"), (Method::Zstd, "zstd")];
const STYLES: [Style; 4] = [Style::Legacy, Style::LegacyFlush, Style::StrictStale, Style::Strict];

/// Reads all channels of a migration to the last byte.
fn read_all(options: MultifdOptions, blocks: &Blocks, channels: &[Vec<u8>]) -> Vec<Outcome> {
    let outcomes: Vec<_> = channels.iter().map(|bytes| read(options, blocks, &[bytes])).collect();
    for outcome in &outcomes {
        assert_eq!(outcome.verdict, Ok(()), "{options:?}");
        assert!(outcome.may_end);
        assert_eq!(outcome.syncs, outcomes[0].syncs, "as many SYNCs on every channel");
        for (_, seen) in &outcome.seen {
            assert!(!matches!(seen, Seen::Page { len, .. } if *len != PAGE), "{seen:?}");
        }
    }
    let mut ids: Vec<_> = outcomes.iter().filter_map(|o| o.seen.first()).map(|(_, seen)| seen).collect();
    ids.sort_by_key(|seen| format!("{seen:?}"));
    assert_eq!(ids.len(), usize::from(options.channels));
    for (id, seen) in ids.iter().enumerate() {
        assert!(matches!(seen, Seen::Init { id: found, .. } if usize::from(*found) == id));
    }
    outcomes
}

fn sum(outcomes: &[Outcome], of: fn(&Outcome) -> u64) -> u64 {
    outcomes.iter().map(of).sum()
}

#[test]
fn the_corpus_reads_to_the_last_byte() {
    // Pages with content and zero pages on the channels, and SYNCs per channel, as the recordings' notes and main
    // channels say.
    let expect = [
        ("7.2-q35-fresh-mfd4-rp", Style::Legacy, 51, 0, 3),
        ("10.0-q35-fresh-mfd4-rp", Style::Strict, 52, 16_462, 3),
        ("10.0-q35-booted-mfd2", Style::Strict, 13_203, 11_569, 4),
    ];
    let folders = corpus();
    if folders.is_empty() {
        return println!("skipped: no corpus");
    }
    for (name, style, pages, zeros, syncs) in expect {
        let folder = folders.iter().find(|folder| folder.ends_with(name)).unwrap();
        let main = channel(folder, "ch0.fwd").unwrap();
        let blocks = blocks(&main);
        let channels: Vec<_> = (1..).map_while(|k| channel(folder, &format!("ch{k}.fwd"))).collect();
        let of_channels = MultifdOptions { channels: channels.len() as u8, ..options(Method::Plain, style) };
        let outcomes = read_all(of_channels, &blocks, &channels);
        let found = (sum(&outcomes, Outcome::pages), sum(&outcomes, Outcome::zeros), outcomes[0].syncs);
        assert_eq!(found, (pages, zeros, syncs), "{name}");
        assert_eq!(marks(style, &main, &blocks), syncs, "{name}");
        println!("{name}: {pages} pages, {zeros} zero pages, {syncs} SYNCs per channel");
    }
}

#[test]
fn the_return_paths_of_the_corpus_read_to_the_last_byte() {
    let folders = corpus();
    if folders.is_empty() {
        return println!("skipped: no corpus");
    }
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let Some(bytes) = channel(&folder, "ch0.rev") else { continue };
        let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
        decoder.feed(&bytes, |message| messages.push(message)).unwrap();
        assert!(decoder.at_message_boundary(), "{name}");
        println!("{name}: {} bytes, {} messages", bytes.len(), messages.len());
        let mut rules = PrecopyReturn::new(false);
        rules.ping(1);
        let verdict = messages.iter().try_for_each(|message| rules.check(message));
        if !name.contains("postcopy") {
            assert_eq!((verdict, rules.is_shut()), (Ok(()), !messages.is_empty()), "{name}");
        } else if messages.iter().any(|message| !message.legal_in_precopy()) {
            assert!(verdict.is_err(), "{name}");
        }
        assert!(!matches!(messages.last(), Some(Message::Shut(status)) if *status != 0), "{name}");
    }
}

/// The guest's memory at the end, by block and offset: a hash of each page, 0 for zero pages.
fn memory(outcomes: &[Outcome]) -> BTreeMap<(usize, u64), u64> {
    let seen = outcomes.iter().flat_map(|outcome| &outcome.seen);
    seen.filter_map(|(_, seen)| match seen {
        Seen::Page { block, offset, hash, .. } => Some(((*block, *offset), *hash)),
        Seen::Zero { block, offset } => Some(((*block, *offset), 0)),
        _ => None,
    })
    .collect()
}

fn check_recordings(qemu: Qemu, machine: &str, guest: Guest) {
    if qemu.find().is_none() {
        return skip::skip(&qemu.missing().to_string());
    }
    if guest == Guest::Booted && Guest::files().is_none() {
        return skip::skip("the lab's guest is not built");
    }
    let style = Style::of_machine(machine);
    let mut memories = Vec::new();
    for (method, name) in METHODS {
        let recording = record(qemu, machine, guest, name);
        let blocks = blocks(&recording.main);
        let outcomes = read_all(options(method, style), &blocks, &recording.channels);
        assert_eq!(outcomes[0].syncs, marks(style, &recording.main, &blocks));
        let wire: usize = recording.channels.iter().map(Vec::len).sum();
        let (pages, zeros) = (sum(&outcomes, Outcome::pages), sum(&outcomes, Outcome::zeros));
        println!(
            "{qemu:?} {machine} {guest:?} {name}: {wire} bytes, {pages} pages, {zeros} zero pages, {} SYNCs",
            outcomes[0].syncs
        );
        assert!(pages > 0);
        memories.push(memory(&outcomes));
        refuse_by_other_methods(method, style, &blocks, &recording.channels);
    }
    if guest == Guest::Fresh {
        assert_eq!(memories[0], memories[1], "zlib");
        assert_eq!(memories[0], memories[2], "zstd");
    }
}

/// A channel compressed otherwise than the permit says is refused at its first packet with pages.
fn refuse_by_other_methods(method: Method, style: Style, blocks: &Blocks, channels: &[Vec<u8>]) {
    for (other, _) in METHODS.iter().filter(|(other, _)| *other != method) {
        for bytes in channels {
            let outcome = read(options(*other, style), blocks, &[bytes]);
            let pages = outcome.pages() + outcome.zeros();
            match outcome.verdict {
                Err(violation) => assert_eq!((violation.rule, pages), ("INV-M2", 0)),
                // A channel of an older source may have had no page at all.
                Ok(()) => assert!(!matches!(style, Style::Strict) && pages == 0),
            }
        }
    }
}

#[test]
fn fresh_recordings_of_today_read_and_agree() {
    check_recordings(Qemu::Distribution, "pc-q35-10.0", Guest::Fresh);
}

#[test]
fn fresh_recordings_with_old_machine_types_read_and_agree() {
    for machine in ["pc-q35-7.2", "pc-q35-8.0", "pc-q35-8.1", "pc-q35-8.2", "pc-q35-9.0", "pc-q35-9.1"] {
        check_recordings(Qemu::Distribution, machine, Guest::Fresh);
    }
}

#[test]
fn fresh_recordings_of_an_old_qemu_read_and_agree() {
    check_recordings(Qemu::Old, "pc-q35-7.2", Guest::Fresh);
}

#[test]
fn recordings_of_a_booted_guest_read() {
    check_recordings(Qemu::Distribution, "pc-q35-10.0", Guest::Booted);
    check_recordings(Qemu::Old, "pc-q35-7.2", Guest::Booted);
}

#[test]
fn handmade_channels_read() {
    for (method, _) in METHODS {
        for style in STYLES {
            let strict_style = matches!(style, Style::Strict | Style::StrictStale);
            let bytes = if strict_style { strict(method) } else { legacy(method) };
            let outcome = read(options(method, style), &two_blocks(), &[&bytes]);
            assert_eq!(outcome.verdict, Ok(()), "{method:?} {style:?}");
            let found = (outcome.pages(), outcome.zeros(), outcome.syncs, outcome.may_end);
            let expect = if strict_style { (132, 4, 3, true) } else { (5, 0, 5, true) };
            assert_eq!(found, expect, "{method:?} {style:?}");
            let other = if strict_style { Style::Legacy } else { Style::Strict };
            let refused = read(options(method, other), &two_blocks(), &[&bytes]).verdict;
            assert!(refused.is_err(), "{method:?} {style:?} as {other:?}");
        }
    }
}

fn rule(style: Style, method: Method, packets: &[Vec<u8>]) -> Option<&'static str> {
    let bytes = [&[init(0)], packets].concat().concat();
    read(options(method, style), &two_blocks(), &[&bytes]).verdict.err().map(|violation| violation.rule)
}

#[test]
fn every_field_of_the_initial_packet_is_checked() {
    let check = |bytes: &[u8]| {
        let outcome = read(options(Method::Plain, Style::Strict), &two_blocks(), &[bytes]);
        outcome.verdict.err().map(|violation| (violation.rule, violation.offset))
    };
    assert_eq!(check(&init(0)), None);
    assert_eq!(check(&init(1)), None);
    assert_eq!(check(&init(2)), Some(("INV-M1", 0)), "one past the last channel");
    assert_eq!(check(&init(255)), Some(("INV-M1", 0)));
    for at in (0..8).chain(25..64) {
        let mut bytes = init(0);
        bytes[at] ^= 1;
        assert_eq!(check(&bytes), Some(("INV-M1", 0)), "byte {at}");
    }
}

#[test]
fn every_field_of_a_page_packet_is_checked() {
    let plain = || pages(&mut Compressor::Plain, Method::Plain, 5, &[0, 2], &[7]);
    let check = |packet: Packet| rule(Style::Strict, Method::Plain, &[packet.bytes()]);
    let page = PAGE as u64;
    assert_eq!(check(plain()), None);
    assert_eq!(check(sync(0)), None);
    type Change = fn(&mut Packet);
    let changes: &[(&str, &str, Change)] = &[
        ("method of zlib", "INV-M2", |p| p.flags = 2),
        ("method of zstd", "INV-M2", |p| p.flags = 4),
        ("two methods", "INV-M2", |p| p.flags = 6),
        ("a method that is not known", "INV-M2", |p| p.flags = 0x20),
        ("an unknown flag", "INV-M2", |p| p.flags = 0x80),
        ("device state", "INV-M10", |p| p.flags = 0x40),
        ("device state and SYNC", "INV-M10", |p| p.flags = 0x41),
        ("SYNC with pages", "INV-M9", |p| p.flags = 1),
        ("no room", "INV-M3", |p| p.alloc = 0),
        ("less room", "INV-M3", |p| p.alloc = 127),
        ("more room", "INV-M3", |p| p.alloc = 129),
        ("too many pages", "INV-M3", |p| p.normal = 129),
        ("far too many pages", "INV-M3", |p| p.normal = u32::MAX),
        ("too many zero pages", "INV-M3", |p| p.zero = 127),
        ("counts that wrap", "INV-M3", |p| p.zero = u32::MAX),
        ("less payload", "INV-M6", |p| p.size -= 1),
        ("more payload", "INV-M6", |p| p.size += PAGE as u32),
        ("no payload", "INV-M6", |p| p.size = 0),
        ("another block", "INV-M4", |p| p.name = "pc.ra".to_owned()),
        ("a block with the name as its front", "INV-M4", |p| p.name = "pc.ram2".to_owned()),
        ("no block", "INV-M4", |p| p.name.clear()),
        ("a name without end", "INV-M4", |p| p.name = "x".repeat(256)),
        ("bytes behind the name", "INV-M4", |p| p.name = "pc.ram\0x".to_owned()),
        ("the last byte behind the name", "INV-M4", |p| p.name = format!("{:\0<255}x", "pc.ram")),
        ("an offset inside a page", "INV-M5", |p| p.offsets[0] = 1),
        ("a zero page inside a page", "INV-M5", |p| p.offsets[2] += 2048),
        ("a page outside", "INV-M5", |p| p.offsets[1] = 256 * 4096),
        ("a page far outside", "INV-M5", |p| p.offsets[1] = u64::MAX - 4095),
        ("a page twice", "INV-M5", |p| p.offsets[1] = 0),
        ("a page that is also zero", "INV-M5", |p| p.offsets[2] = 0),
        ("an offset of no page", "INV-M5", |p| p.offsets.push(9 * 4096)),
        ("the last offset of no page", "INV-M5", |p| {
            p.offsets.resize(127, 0);
            p.offsets.push(1);
        }),
    ];
    for (name, expect, change) in changes {
        let mut packet = plain();
        change(&mut packet);
        assert_eq!(check(packet), Some(*expect), "{name}");
    }
    for (at, expect) in (0..8).map(|at| (at, "INV-M2")).chain((36..64).map(|at| (at, "INV-M2"))) {
        let mut bytes = plain().bytes();
        bytes[at] ^= 0x10;
        assert_eq!(rule(Style::Strict, Method::Plain, &[bytes]), Some(expect), "byte {at}");
    }
    let rom = Packet { name: "pc.rom".to_owned(), ..plain() };
    assert_eq!(check(Packet { offsets: vec![0, page, 2 * page], ..rom }), Some("INV-M5"));
}

#[test]
fn empty_packets_are_empty() {
    let check = |style, packet: Packet| rule(style, Method::Plain, &[packet.bytes()]);
    type Change = fn(&mut Packet);
    // What each style says of a SYNC packet with one field set.
    let changes: &[(&str, Change, [Option<&str>; 4])] = &[
        ("room", |p| p.alloc = 128, [None, None, None, Some("INV-M3")]),
        ("other room", |p| p.alloc = 64, [Some("INV-M3"); 4]),
        ("a size", |p| p.size = 4096, [Some("INV-M6"); 4]),
        ("a name", |p| p.name = NAME.to_owned(), [Some("INV-M4"); 4]),
        ("an offset", |p| p.offsets = vec![4096], [Some("INV-M5"); 4]),
        ("no SYNC", |p| p.flags = 0, [Some("INV-M3"); 4]),
        ("room, no SYNC", |p| (p.alloc, p.flags) = (128, 0), [None, None, Some("INV-M3"), Some("INV-M3")]),
        ("stale size", |p| (p.alloc, p.size) = (128, 99), [None, None, Some("INV-M6"), Some("INV-M3")]),
        ("stale name", |p| (p.alloc, p.name) = (128, NAME.to_owned()), [None, None, None, Some("INV-M3")]),
        (
            "stale name of no block",
            |p| (p.alloc, p.name) = (128, "other".to_owned()),
            [Some("INV-M4"), Some("INV-M4"), Some("INV-M4"), Some("INV-M3")],
        ),
        ("stale offset", |p| (p.alloc, p.offsets) = (128, vec![1]), [None, None, None, Some("INV-M3")]),
        (
            "zero page",
            |p| (p.alloc, p.zero) = (128, 1),
            [Some("INV-M3"), Some("INV-M3"), Some("INV-M9"), Some("INV-M9")],
        ),
    ];
    for (name, change, expect) in changes {
        for (style, expect) in STYLES.into_iter().zip(*expect) {
            let mut packet = sync(3);
            change(&mut packet);
            assert_eq!(check(style, packet), expect, "{name}, {style:?}");
        }
    }
}

#[test]
fn packet_numbers_rise() {
    let check =
        |style, numbers: [u64; 2]| rule(style, Method::Plain, &numbers.map(|number| sync(number).bytes()));
    for style in STYLES {
        let strict = matches!(style, Style::Strict | Style::StrictStale);
        assert_eq!(check(style, [0, 1]), None);
        assert_eq!(check(style, [7, 7]), strict.then_some("INV-M9"));
        assert_eq!(check(style, [7, 6]), Some("INV-M9"));
        assert_eq!(check(style, [u64::MAX, 0]), Some("INV-M9"));
    }
}

#[test]
fn methods_are_as_permitted() {
    for method in [Method::Zlib, Method::Zstd] {
        let packet = || pages(&mut Compressor::new(method), method, 5, &[0, 2], &[]);
        let flagged =
            |style, flags, packet: Packet| rule(style, method, &[Packet { flags, ..packet }.bytes()]);
        let own = method_flags(method);
        for style in STYLES {
            let strict = matches!(style, Style::Strict | Style::StrictStale);
            assert_eq!(flagged(style, own, packet()), None);
            assert_eq!(flagged(style, 0, packet()), Some("INV-M2"), "pages without a method");
            assert_eq!(flagged(style, 6 - own, packet()), Some("INV-M2"));
            assert_eq!(flagged(style, 1, sync(0)), None);
            assert_eq!(flagged(style, 1 | own, sync(0)), strict.then_some("INV-M2"), "{style:?}");
            let size = |size| rule(style, method, &[Packet { size, ..packet() }.bytes()]);
            assert_eq!(size(0), Some("INV-M6"));
            assert_eq!(size((1 << 20) + 1), Some("INV-M6"));
            assert_eq!(size(u32::MAX), Some("INV-M6"));
        }
        let zeros = || pages(&mut Compressor::new(method), method, 5, &[], &[1, 2]);
        assert_eq!(flagged(Style::Strict, own, zeros()), None);
        assert_eq!(flagged(Style::Strict, 0, zeros()), Some("INV-M2"));
    }
}

/// A packet of so many pages whose payload is given.
fn with_payload(method: Method, count: u32, payload: Vec<u8>) -> Packet {
    Packet {
        normal: count,
        size: payload.len() as u32,
        offsets: (0..u64::from(count)).map(|page| page * PAGE as u64).collect(),
        payload,
        ..pages(&mut Compressor::Plain, method, 5, &[], &[])
    }
}

#[test]
fn payloads_decompress_to_their_pages_exactly() {
    for method in [Method::Zlib, Method::Zstd] {
        let fresh = |content: &[u8]| Compressor::new(method).flush(content);
        let check = |packet: Packet| rule(Style::Strict, method, &[packet.bytes()]);
        let two = fresh(&content(1, 2));
        assert_eq!(check(with_payload(method, 2, two.clone())), None);
        assert_eq!(check(with_payload(method, 3, two.clone())), Some("INV-M7"), "too little");
        assert_eq!(check(with_payload(method, 1, two.clone())), Some("INV-M7"), "too much");
        let short = two[..two.len() - 40].to_vec();
        assert_eq!(check(with_payload(method, 2, short)), Some("INV-M7"), "cut off");
        let trailing = [two.clone(), vec![0xa5; 9]].concat();
        assert_eq!(check(with_payload(method, 2, trailing)), Some("INV-M7"), "bytes behind");
        let one_more = fresh(&[content(1, 2), vec![1]].concat());
        assert_eq!(check(with_payload(method, 2, one_more)), Some("INV-M7"), "one byte more");
        assert_eq!(check(with_payload(method, 2, vec![0xa5; 300])), Some("INV-M7"), "no stream");
        let ended = match method {
            Method::Zlib => {
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
                std::io::Write::write_all(&mut encoder, &content(1, 2)).unwrap();
                encoder.finish().unwrap()
            }
            _ => {
                let mut room = vec![0; 1 << 16];
                let len = zstd_safe::compress(room.as_mut_slice(), &content(1, 2), 1).unwrap();
                room[..len].to_vec()
            }
        };
        assert_eq!(check(with_payload(method, 2, ended)), Some("INV-M7"), "the stream ends");
    }
    let preset_dictionary = [&[0x78, 0xbb, 0, 0, 0, 1][..], &[0; 32]].concat();
    let packet = with_payload(Method::Zlib, 1, preset_dictionary);
    assert_eq!(rule(Style::Strict, Method::Zlib, &[packet.bytes()]), Some("INV-M7"));
}

#[test]
fn a_context_lasts_as_long_as_its_channel() {
    for method in [Method::Zlib, Method::Zstd] {
        let mut compressor = Compressor::new(method);
        let mut packet = |number| pages(&mut compressor, method, number, &[1, 2], &[]).bytes();
        let packets = [packet(1), packet(2), packet(3)];
        assert_eq!(rule(Style::Strict, method, &packets), None);
        assert_eq!(rule(Style::Strict, method, &packets[1..]), Some("INV-M7"), "it begins with its head");
    }
}

#[test]
fn bombs_stop_at_the_first_byte_too_many() {
    for method in [Method::Zlib, Method::Zstd] {
        let bomb = Compressor::new(method).flush(&vec![0; 64 << 20]);
        let bomb = bomb[..bomb.len().min(1 << 20)].to_vec();
        let bytes = [init(0), with_payload(method, 1, bomb).bytes()].concat();
        let (mut out, mut parser) = (0, MultifdParser::new(options(method, Style::Strict)));
        let verdict = parser.feed(&bytes, Some(&two_blocks()), &mut |_, event: MultifdEvent<'_>| {
            if let MultifdEvent::PageBytes(bytes) = event {
                out += bytes.len();
            }
            Ok(())
        });
        assert_eq!(verdict.unwrap_err().rule, "INV-M7");
        assert!(out <= PAGE, "{out} bytes came out");
        assert_eq!(parser.validated(), (64 + HEADER) as u64, "nothing of the payload may be released");
    }
}

#[test]
fn zstd_windows_over_half_a_mebibyte_are_refused() {
    // Magic, no flags, the window's exponent less 10, a raw block of one page.
    let frame = |exponent: u8, mantissa: u8| {
        let block = ((PAGE as u32) << 3).to_le_bytes();
        [&[0x28, 0xb5, 0x2f, 0xfd, 0, (exponent - 10) << 3 | mantissa][..], &block[..3], &[7; PAGE]].concat()
    };
    let check =
        |payload| rule(Style::Strict, Method::Zstd, &[with_payload(Method::Zstd, 1, payload).bytes()]);
    assert_eq!(check(frame(19, 0)), None);
    assert_eq!(check(frame(19, 1)), Some("INV-M7"));
    assert_eq!(check(frame(23, 0)), Some("INV-M7"));
    assert_eq!(check(frame(41, 7)), Some("INV-M7"));
}

#[test]
fn what_is_no_page_packet_is_refused_before_a_whole_header_came() {
    let device_state = [&init(0)[..], b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40"].concat();
    let outcome = read(options(Method::Plain, Style::Strict), &two_blocks(), &[&device_state]);
    assert_eq!(outcome.verdict.unwrap_err().rule, "INV-M10");
}

#[test]
fn a_channel_may_end_only_between_packets() {
    for (method, _) in METHODS {
        let bytes = strict(method);
        let first = [init(1), sync(1).bytes()].concat().len();
        for (len, may_end) in [(0, false), (63, false), (64, true), (65, false), (first, true)] {
            let outcome = read(options(method, Style::Strict), &two_blocks(), &[&bytes[..len]]);
            assert_eq!((outcome.verdict, outcome.may_end), (Ok(()), may_end), "{len}");
        }
        let cut = read(options(method, Style::Strict), &two_blocks(), &[&bytes[..first + HEADER + 10]]);
        assert_eq!((cut.verdict, cut.may_end), (Ok(()), false));
    }
}

#[test]
fn pages_wait_for_the_block_list_and_a_sync_stops() {
    let bytes = strict(Method::Plain);
    let before = 64 + HEADER;
    let blocks = two_blocks();
    let mut count = 0;
    let mut sink = |_: u64, _: MultifdEvent<'_>| {
        count += 1;
        Ok(())
    };
    // In one piece: it stops behind the SYNC, then takes nothing.
    let mut parser = MultifdParser::new(options(Method::Plain, Style::Strict));
    assert_eq!(parser.feed(&bytes, None, &mut sink), Ok(before));
    assert_eq!((parser.syncs(), parser.validated()), (1, before as u64));
    assert_eq!(parser.feed(&bytes[before..], None, &mut sink), Ok(0));
    assert!(parser.at_packet_boundary());
    let to_the_next_sync = bytes.len() - before - 2 * HEADER - PAGE;
    assert_eq!(parser.feed(&bytes[before..], Some(&blocks), &mut sink), Ok(to_the_next_sync));
    // A header in two pieces: it is held whole, and goes on without input.
    let mut parser = MultifdParser::new(options(Method::Plain, Style::Strict));
    assert_eq!(parser.feed(&bytes[..before + 100], None, &mut sink), Ok(before));
    assert_eq!(parser.feed(&bytes[before..before + 100], None, &mut sink), Ok(100));
    assert_eq!(parser.feed(&bytes[before + 100..], None, &mut sink), Ok(HEADER - 100));
    assert_eq!(parser.feed(&bytes[before + HEADER..], None, &mut sink), Ok(0));
    assert_eq!((parser.pending_bytes(), parser.validated()), (HEADER, before as u64));
    assert_eq!(parser.pending(), &bytes[before..before + HEADER]);
    assert_eq!(parser.feed(&[], Some(&blocks), &mut sink), Ok(0));
    assert_eq!((parser.pending_bytes(), parser.validated()), (0, (before + HEADER) as u64));
    assert!(count > 0);
}

#[test]
fn a_header_is_refused_before_its_pages_come_out() {
    let mut packet = pages(&mut Compressor::Plain, Method::Plain, 5, &[0, 2], &[7]);
    packet.offsets[2] = 1;
    let bytes = [init(0), packet.bytes()].concat();
    let outcome = read(options(Method::Plain, Style::Strict), &two_blocks(), &[&bytes]);
    assert_eq!(outcome.verdict.as_ref().unwrap_err().offset, 64);
    assert_eq!((outcome.pages(), outcome.zeros()), (0, 0));
}

/// How fast plain packets go; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn throughput() {
    for (method, name) in METHODS {
        let mut compressor = Compressor::new(method);
        let all: Vec<u64> = (0..128).collect();
        let packets: Vec<u8> =
            (1..200).flat_map(|number| pages(&mut compressor, method, number, &all, &[]).bytes()).collect();
        let bytes = [init(0), packets].concat();
        let mut parser = MultifdParser::new(options(method, Style::Strict));
        let (begin, mut out) = (std::time::Instant::now(), 0);
        for piece in bytes.chunks(64 << 10) {
            let taken = parser.feed(piece, Some(&two_blocks()), &mut |_, event: MultifdEvent<'_>| {
                out += if let MultifdEvent::PageBytes(bytes) = event { bytes.len() } else { 0 };
                Ok(())
            });
            assert_eq!(taken, Ok(piece.len()));
        }
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "{name}: {:.2} GB/s of pages, {} bytes on the wire",
            out as f64 / seconds / 1e9,
            bytes.len()
        );
    }
}

/// Cuts bytes at the given places.
fn pieces<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect()
}

fn any_method() -> impl Strategy<Value = Method> {
    prop::sample::select(METHODS.map(|(method, _)| method).to_vec())
}

fn any_style() -> impl Strategy<Value = Style> {
    prop::sample::select(STYLES.to_vec())
}

fn indices(len: usize) -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 0..len)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_split_reads_alike(
        made in any_method(),
        legacy_made in any::<bool>(),
        style in any_style(),
        cuts in indices(12),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        in_headers in any::<bool>(),
    ) {
        let mut bytes = if legacy_made { legacy(made) } else { strict(made) };
        for (at, value) in flips {
            let range = if in_headers { bytes.len().min(64 + 2 * HEADER) } else { bytes.len() };
            bytes[at.index(range)] ^= value;
        }
        let options = options(made, style);
        let whole = read(options, &two_blocks(), &[&bytes]);
        let split = read(options, &two_blocks(), &pieces(&bytes, &cuts));
        prop_assert_eq!(&split.verdict, &whole.verdict);
        if whole.verdict.is_ok() {
            prop_assert_eq!(split, whole);
        }
        let short: Vec<_> = bytes[..bytes.len().min(3 * HEADER)].chunks(1).collect();
        let byte_by_byte = read(options, &two_blocks(), &short);
        let at_once = read(options, &two_blocks(), &[&bytes[..bytes.len().min(3 * HEADER)]]);
        prop_assert_eq!(byte_by_byte.verdict, at_once.verdict);
    }

    #[test]
    fn garbage_never_panics(
        method in any_method(),
        style in any_style(),
        garbage in prop::collection::vec(any::<u8>(), 0..6000),
        front in 0usize..4,
        cuts in indices(5),
    ) {
        let mut compressor = Compressor::new(method);
        let honest = [
            Vec::new(),
            init(1),
            [init(1), pages(&mut compressor, method, 3, &[1], &[]).bytes()].concat(),
            [init(1), with_payload(method, 9, garbage.clone()).bytes()].concat(),
        ];
        let bytes = [honest[front].clone(), garbage].concat();
        let outcome = read(options(method, style), &two_blocks(), &pieces(&bytes, &cuts));
        prop_assert!(outcome.pages() <= 128 * (1 + bytes.len() as u64 / HEADER as u64));
    }
}
