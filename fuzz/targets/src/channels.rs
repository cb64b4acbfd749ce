//! Multifd channels, return paths, frames, monitors.

use crate::pieces;
use wire::frame::{Frame, FrameError, Reader};
use wire::qemu::multifd::{Method, MultifdEvent, MultifdOptions, MultifdParser, Style};
use wire::qemu::return_path::{Decoder, Message, ReturnPathError};
use wire::qemu::{Blocks, Violation};

fn blocks() -> Blocks {
    let mut blocks = Blocks::default();
    blocks.push(b"pc.ram", 256 * 4096);
    blocks.push(b"pc.bios", 64 * 4096);
    blocks
}

fn options(choice: u8) -> MultifdOptions {
    let method = match choice % 3 {
        0 => Method::Plain,
        1 => Method::Zlib,
        _ => Method::Zstd,
    };
    let machine = if choice & 4 == 0 { "pc-q35-10.0" } else { "pc-q35-7.2" };
    MultifdOptions { page_size_bytes: 4096, channels: 2, method, style: Style::of_machine(machine) }
}

/// What a channel said, with page contents joined.
#[derive(Debug, PartialEq)]
struct Said {
    events: Vec<(u64, String)>,
    content: Vec<u8>,
    verdict: Result<(), Violation>,
}

fn read_channel(choice: u8, bytes: &[u8], split: u8) -> Said {
    let (blocks, mut parser) = (blocks(), MultifdParser::new(options(choice)));
    let (mut events, mut content) = (Vec::new(), Vec::new());
    let mut sink = |at: u64, event: MultifdEvent<'_>| {
        match event {
            MultifdEvent::PageBytes(piece) => content.extend_from_slice(piece),
            other => events.push((at, format!("{other:?}"))),
        }
        Ok(())
    };
    let mut verdict = Ok(());
    'all: for piece in pieces(bytes, split) {
        let mut rest = piece;
        while !rest.is_empty() {
            match parser.feed(rest, Some(&blocks), &mut sink) {
                Ok(taken) => rest = rest.get(taken..).unwrap_or_default(),
                Err(violation) => {
                    verdict = Err(violation);
                    break 'all;
                }
            }
        }
    }
    Said { events, content, verdict }
}

/// The first byte chooses method and style, the second the split.
pub(crate) fn multifd(data: &[u8]) {
    let [choice, split, bytes @ ..] = data else { return };
    let (whole, parts) = (read_channel(*choice, bytes, 0), read_channel(*choice, bytes, *split));
    assert_eq!(whole.verdict, parts.verdict, "another split, another verdict");
    if whole.verdict.is_ok() {
        assert!(whole == parts, "another split, other events");
    }
}

fn packet(
    flags: u32,
    alloc: u32,
    normal: u32,
    zero: u32,
    number: u64,
    name: &[u8],
    pages: &[u64],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [0x1122_3344, 1, flags, alloc, normal, normal * 4096] {
        bytes.extend_from_slice(&u32::to_be_bytes(word));
    }
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&zero.to_be_bytes());
    bytes.extend_from_slice(&[0; 28]);
    bytes.extend_from_slice(name);
    bytes.resize(320, 0);
    for page in pages {
        bytes.extend_from_slice(&(page * 4096).to_be_bytes());
    }
    bytes.resize(1344, 0);
    bytes.extend(std::iter::repeat_n(0x5a, normal as usize * 4096));
    bytes
}

/// A plain channel with pages, zero pages and a SYNC.
pub(crate) fn multifd_seeds() -> Vec<Vec<u8>> {
    let mut first = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1];
    first.extend_from_slice(&[0; 56]);
    let data = packet(0, 128, 2, 3, 1, b"pc.ram", &[0, 5, 7, 8, 9]);
    let sync = packet(1, 0, 0, 0, 2, b"", &[]);
    vec![[&[0, 5][..], &first, &data, &sync].concat(), [&[4, 6][..], &first, &sync].concat()]
}

/// The first byte says how the rest is split.
pub(crate) fn return_path(data: &[u8]) {
    let Some((split, bytes)) = data.split_first() else { return };
    let read = |split: u8| -> (Vec<Message>, Result<(), ReturnPathError>) {
        let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
        for piece in pieces(bytes, split) {
            if let Err(error) = decoder.feed(piece, |message| messages.push(message)) {
                return (messages, Err(error));
            }
        }
        (messages, Ok(()))
    };
    assert_eq!(read(0), read(*split), "another split, other messages");
}

/// The first byte says how the rest is split.
pub(crate) fn frames(data: &[u8]) {
    let Some((split, bytes)) = data.split_first() else { return };
    let read = |split: u8| {
        let (mut reader, mut said, mut content) = (Reader::default(), Vec::new(), Vec::new());
        for piece in pieces(bytes, split) {
            let fed = reader.feed(piece, |frame| {
                match frame {
                    Frame::Data(piece) | Frame::Return(piece) => content.extend_from_slice(piece),
                    Frame::Control(control) => said.push(control),
                }
                Ok::<_, FrameError>(())
            });
            if let Err(error) = fed {
                return (said, Vec::new(), Err(error));
            }
        }
        (said, content, Ok(()))
    };
    assert_eq!(read(0), read(*split), "another split, other frames");
}

/// A line of a monitor.
pub(crate) fn qmp(data: &[u8]) {
    drop(wire::qmp::Message::parse(data));
}
