//! For the tests of channels: the corpus where it is there, streams made by hand, and fresh recordings.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod packets;
pub mod recorder;

use outrider_wire::qemu::multifd::{MultifdEvent, MultifdOptions, MultifdParser, Style};
use outrider_wire::qemu::{Blocks, Event, Parser, ParserOptions, SyncMarkers, Violation};
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::io::Read;
use std::path::{Path, PathBuf};

pub const PAGE: usize = 4096;

/// The folders of the corpus; nothing when it is not there.
pub fn corpus() -> Vec<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let mut folders: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    folders.sort();
    folders
}

/// One channel of a recording, unpacked; nothing when the recording has no such channel.
pub fn channel(folder: &Path, name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(folder.join(format!("{name}.gz"))) {
        flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    } else {
        let file = std::fs::File::open(folder.join(format!("{name}.xz"))).ok()?;
        xz2::read::XzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    }
    Some(bytes)
}

/// The block list of a main channel. What comes behind the list is not looked at.
pub fn blocks(main: &[u8]) -> Blocks {
    let mut parser = Parser::new(ParserOptions { return_path_required: false, ..ParserOptions::default() });
    let (mut blocks, mut complete) = (Blocks::default(), false);
    let result = parser.feed(main, &mut |_, event: Event<'_>| {
        match event {
            Event::Block { name, length_bytes, .. } => blocks.push(name, length_bytes),
            Event::BlocksEnd { .. } => complete = true,
            _ => {}
        }
        Ok(())
    });
    assert!(complete, "no block list: {result:?}");
    blocks
}

/// How many RAM end marks a main channel has.
pub fn end_marks(main: &[u8]) -> u64 {
    let mut parser = Parser::new(ParserOptions { return_path_required: false, ..ParserOptions::default() });
    let mut count = 0;
    parser
        .feed(main, &mut |_, event: Event<'_>| {
            count += u64::from(matches!(event, Event::RamEnd { .. }));
            Ok(())
        })
        .unwrap();
    count
}

/// How many SYNCs a main channel marks.
pub fn marks(style: Style, main: &[u8], blocks: &Blocks) -> u64 {
    match style.markers() {
        SyncMarkers::FlushWords => flush_words(main, blocks),
        SyncMarkers::EveryPayload => end_marks(main),
    }
}

/// How many MULTIFD_FLUSH words a main channel has, whose own pages are all zero.
fn flush_words(main: &[u8], blocks: &Blocks) -> u64 {
    let last = blocks.name(blocks.len() - 1).unwrap();
    let entry = [&[last.len() as u8], last, &blocks.length_bytes(blocks.len() - 1).to_be_bytes()].concat();
    let mut at = main.windows(entry.len()).position(|w| w == entry).unwrap() + entry.len();
    let mut count = 0;
    loop {
        match u64::from_be_bytes(main[at..at + 8].try_into().unwrap()) {
            0x200 => (count, at) = (count + 1, at + 8),
            0x10 => {
                // End mark and footer; then commands, and the next section's type and id.
                at += 8 + 5;
                while main[at] == 8 {
                    at += 5 + usize::from(main[at + 4]);
                }
                if !matches!(main[at], 2 | 3) {
                    return count;
                }
                at += 5;
            }
            // A zero page, with or without its block's name.
            word if word & 0xfff == 0x22 => at += 9,
            word if word & 0xfff == 2 => at += 10 + usize::from(main[at + 8]),
            other => panic!("word {other:#x} at {at}"),
        }
    }
}

/// An event that outlives its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Init { id: u8, uuid: [u8; 16] },
    Page { block: usize, offset: u64, len: usize, hash: u64 },
    Zero { block: usize, offset: u64 },
    Sync,
}

/// Collects events; the pieces of a page become one.
#[derive(Default)]
pub struct Collector {
    pub seen: Vec<(u64, Seen)>,
    content: DefaultHasher,
}

impl Collector {
    pub fn event(&mut self, at: u64, event: MultifdEvent<'_>) {
        let seen = match event {
            MultifdEvent::Init { id, uuid } => Seen::Init { id, uuid },
            MultifdEvent::Page { block, offset } => {
                self.content = DefaultHasher::new();
                Seen::Page { block, offset, len: 0, hash: 0 }
            }
            MultifdEvent::PageBytes(bytes) => return self.bytes(bytes),
            MultifdEvent::ZeroPage { block, offset } => Seen::Zero { block, offset },
            MultifdEvent::Sync => Seen::Sync,
        };
        self.seen.push((at, seen));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        self.content.write(bytes);
        let Some((_, Seen::Page { len, hash, .. })) = self.seen.last_mut() else { panic!("no page") };
        *len += bytes.len();
        assert!(*len <= PAGE);
        *hash = self.content.finish();
    }
}

/// What a whole channel gave.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub seen: Vec<(u64, Seen)>,
    pub verdict: Result<(), Violation>,
    pub syncs: u64,
    pub may_end: bool,
}

impl Outcome {
    pub fn count(&self, which: fn(&Seen) -> bool) -> u64 {
        self.seen.iter().filter(|(_, seen)| which(seen)).count() as u64
    }

    pub fn pages(&self) -> u64 {
        self.count(|seen| matches!(seen, Seen::Page { .. }))
    }

    pub fn zeros(&self) -> u64 {
        self.count(|seen| matches!(seen, Seen::Zero { .. }))
    }
}

/// Reads a channel in the given pieces, as a caller does that has the block list from the start, and checks what
/// may be released and what is held at each step.
pub fn read(options: MultifdOptions, blocks: &Blocks, pieces: &[&[u8]]) -> Outcome {
    let mut parser = MultifdParser::new(options);
    let mut collector = Collector::default();
    let mut taken = 0u64;
    let mut feed = |parser: &mut MultifdParser, piece: &[u8]| {
        let mut rest = piece;
        while !rest.is_empty() {
            let syncs = parser.syncs();
            let before = parser.validated();
            let result = parser.feed(rest, Some(blocks), &mut |at: u64, event: MultifdEvent<'_>| {
                collector.event(at, event);
                Ok(())
            });
            let used = match result {
                Ok(used) => used,
                Err(violation) => {
                    assert!(parser.validated() >= before);
                    let again = parser.feed(&[], Some(blocks), &mut |_, _: MultifdEvent<'_>| Ok(()));
                    assert_eq!(again.as_ref(), Err(&violation));
                    return Err(violation);
                }
            };
            taken += used as u64;
            assert_eq!(parser.validated() + parser.pending_bytes() as u64, taken);
            rest = &rest[used..];
            assert!(rest.is_empty() || parser.syncs() == syncs + 1, "stopped without a SYNC");
        }
        Ok(())
    };
    let verdict = pieces.iter().try_for_each(|piece| feed(&mut parser, piece));
    let (syncs, may_end) = (parser.syncs(), parser.at_packet_boundary());
    Outcome { seen: collector.seen, verdict, syncs, may_end }
}
