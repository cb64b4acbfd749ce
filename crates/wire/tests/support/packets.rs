//! Packets made by hand.

use super::PAGE;
use outrider_wire::qemu::Blocks;
use outrider_wire::qemu::multifd::{Method, MultifdOptions, Style};
use std::io::Write;
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer};

pub const HEADER: usize = 1344;
pub const NAME: &str = "pc.ram";
pub const UUID: [u8; 16] = *b"0123456789abcdef";

pub fn options(method: Method, style: Style) -> MultifdOptions {
    MultifdOptions { page_size_bytes: PAGE as u32, channels: 2, method, style }
}

/// Two blocks: 256 pages and 2.
pub fn two_blocks() -> Blocks {
    let mut blocks = Blocks::default();
    blocks.push(b"pc.ram", 256 * PAGE as u64);
    blocks.push(b"pc.rom", 2 * PAGE as u64);
    blocks
}

pub fn init(id: u8) -> Vec<u8> {
    let mut bytes = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
    bytes.extend_from_slice(&UUID);
    bytes.push(id);
    bytes.resize(64, 0);
    bytes
}

/// A page packet. The offsets are of the pages with content, then of the zero pages.
#[derive(Debug, Clone)]
pub struct Packet {
    pub flags: u32,
    pub alloc: u32,
    pub normal: u32,
    pub zero: u32,
    pub size: u32,
    pub number: u64,
    pub name: String,
    pub offsets: Vec<u64>,
    pub payload: Vec<u8>,
}

impl Packet {
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
        for field in [self.flags, self.alloc, self.normal, self.size] {
            bytes.extend_from_slice(&field.to_be_bytes());
        }
        bytes.extend_from_slice(&self.number.to_be_bytes());
        bytes.extend_from_slice(&self.zero.to_be_bytes());
        bytes.resize(64, 0);
        bytes.extend_from_slice(self.name.as_bytes());
        bytes.resize(320, 0);
        self.offsets.iter().for_each(|offset| bytes.extend_from_slice(&offset.to_be_bytes()));
        bytes.resize(HEADER, 0);
        [bytes, self.payload.clone()].concat()
    }
}

/// A SYNC packet as a QEMU that clears its packets sends it.
pub fn sync(number: u64) -> Packet {
    Packet {
        flags: 1,
        alloc: 0,
        normal: 0,
        zero: 0,
        size: 0,
        number,
        name: String::new(),
        offsets: Vec::new(),
        payload: Vec::new(),
    }
}

/// One stream of a channel's compressor.
pub enum Compressor {
    Plain,
    Zlib(flate2::write::ZlibEncoder<Vec<u8>>),
    Zstd(CCtx<'static>),
}

impl Compressor {
    pub fn new(method: Method) -> Self {
        match method {
            Method::Plain => Self::Plain,
            Method::Zlib => {
                Self::Zlib(flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast()))
            }
            Method::Zstd => {
                let mut context = CCtx::create();
                // As QEMU at level 1: its window.
                context.set_parameter(CParameter::WindowLog(19)).unwrap();
                Self::Zstd(context)
            }
        }
    }

    pub fn flush(&mut self, content: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => content.to_vec(),
            Self::Zlib(encoder) => {
                encoder.write_all(content).unwrap();
                encoder.flush().unwrap();
                std::mem::take(encoder.get_mut())
            }
            Self::Zstd(context) => {
                let mut room = vec![0; 2 * content.len() + 1024];
                let (mut input, mut output) =
                    (InBuffer::around(content), OutBuffer::around(room.as_mut_slice()));
                let flush = ZSTD_EndDirective::ZSTD_e_flush;
                let left = context.compress_stream2(&mut output, &mut input, flush).unwrap();
                assert_eq!((left, input.pos()), (0, content.len()));
                let written = output.pos();
                room.truncate(written);
                room
            }
        }
    }
}

pub fn method_flags(method: Method) -> u32 {
    match method {
        Method::Plain => 0,
        Method::Zlib => 2,
        Method::Zstd => 4,
    }
}

/// Content that compresses to something: a little of it per page.
pub fn content(seed: u64, pages: usize) -> Vec<u8> {
    (0..pages * PAGE).map(|i| (i as u64 / 7 * 31 + seed * 17 + (i as u64 % 13)) as u8).collect()
}

/// A packet of pages of [`NAME`], its payload compressed.
pub fn pages(
    compressor: &mut Compressor,
    method: Method,
    number: u64,
    normal: &[u64],
    zero: &[u64],
) -> Packet {
    let payload = match normal.len() {
        0 => Vec::new(),
        count => compressor.flush(&content(number, count)),
    };
    Packet {
        flags: method_flags(method),
        alloc: 128,
        normal: normal.len() as u32,
        zero: zero.len() as u32,
        size: payload.len() as u32,
        number,
        name: NAME.to_owned(),
        offsets: normal.iter().chain(zero).map(|page| page * PAGE as u64).collect(),
        payload,
    }
}

/// A whole channel of the strict style.
pub fn strict(method: Method) -> Vec<u8> {
    let mut compressor = Compressor::new(method);
    let mut pack =
        |number, normal: &[u64], zero: &[u64]| pages(&mut compressor, method, number, normal, zero).bytes();
    let all: Vec<u64> = (128..256).collect();
    [
        init(1),
        sync(1).bytes(),
        pack(2, &[0, 2, 1], &[5, 9]),
        pack(4, &[], &[10, 11]),
        pack(5, &all, &[]),
        sync(7).bytes(),
        pack(9, &[2], &[]),
        sync(11).bytes(),
    ]
    .concat()
}

/// A whole channel of the legacy style: stale fields, a SYNC packet with pages, repeated numbers.
pub fn legacy(method: Method) -> Vec<u8> {
    let mut compressor = Compressor::new(method);
    let first = pages(&mut compressor, method, 2, &[0, 1, 2], &[]);
    let with_sync = pages(&mut compressor, method, 6, &[3, 4], &[]);
    let stale = |flags, of: &Packet| Packet { flags, normal: 0, payload: Vec::new(), ..of.clone() };
    [
        init(0),
        Packet { alloc: 128, ..sync(0) }.bytes(),
        first.bytes(),
        stale(0, &first).bytes(),
        stale(1, &first).bytes(),
        Packet { flags: with_sync.flags | 1, ..with_sync.clone() }.bytes(),
        stale(1, &with_sync).bytes(),
        sync(6).bytes(),
    ]
    .concat()
}
