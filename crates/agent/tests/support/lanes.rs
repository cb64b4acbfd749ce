//! Multifd streams made by hand, and two agents between fake QEMUs with several connections.

#![allow(dead_code, unreachable_pub)]

use super::streams;
use super::support::{PATIENCE, Pair, tcp};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use types::agent::{Descriptor, FromAgent};
use types::handover::StreamEvidence;
use types::inventory::Inventory;
use types::permit::PermitClaims;
use types::{Digest, VmId};

const PAGE: usize = 4096;

/// What every channel of a migration carries, the main one first.
#[derive(Clone)]
pub struct Streams(pub Vec<Vec<u8>>);

impl Streams {
    /// Each of `lanes` multifd channels carries its own page of `pc.ram` once in each of `epochs`; the main one has the
    /// markers, and `pages` more pages of its own behind them.
    pub fn new(lanes: u16, epochs: u64, pages: usize) -> Self {
        let main = streams::handmade();
        let marks = streams::Marks::of(&main);
        let mut page = 8u64.to_be_bytes().to_vec();
        page.extend_from_slice(b"\x06pc.ram");
        page.extend(std::iter::repeat_n(0x5a, PAGE));
        let flush = 0x200u64.to_be_bytes().repeat(usize::try_from(epochs).unwrap());
        let main = streams::splice(&main, marks.part + 5, 0, &[flush, page.repeat(pages)].concat());
        let lanes = (0..lanes).map(|id| lane(id, epochs));
        Self(std::iter::once(main).chain(lanes).collect())
    }

    pub fn evidence(&self) -> StreamEvidence {
        let of = |stream: &Vec<u8>| StreamEvidence {
            stream_bytes: stream.len() as u64,
            digest: Digest::of(stream),
        };
        StreamEvidence::of_channels(&self.0.iter().map(of).collect::<Vec<_>>())
    }

    pub fn inventory(&self) -> Inventory {
        engine::inspect::learn(&streams::handmade(), "qemu/test").unwrap()
    }
}

fn lane(id: u16, epochs: u64) -> Vec<u8> {
    let mut stream = init(id);
    for epoch in 0..epochs {
        stream.extend(packet(2 * epoch + 1, Some(u64::from(id % 8))));
        stream.extend(packet(2 * epoch + 2, None));
    }
    stream
}

/// A channel's first packet.
pub fn init(id: u16) -> Vec<u8> {
    let mut bytes = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
    bytes.extend_from_slice(VmId::from_bytes([7; 16]).as_bytes());
    bytes.push(u8::try_from(id).unwrap());
    bytes.resize(64, 0);
    bytes
}

/// A packet with one page, or a SYNC.
pub fn packet(number: u64, page: Option<u64>) -> Vec<u8> {
    let mut bytes = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
    let fields: [u32; 4] = if page.is_some() { [0, 128, 1, 4096] } else { [1, 0, 0, 0] };
    fields.iter().for_each(|field| bytes.extend_from_slice(&field.to_be_bytes()));
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.resize(64, 0);
    if let Some(page) = page {
        bytes.extend_from_slice(b"pc.ram");
        bytes.resize(320, 0);
        bytes.extend_from_slice(&(page * 4096).to_be_bytes());
    }
    bytes.resize(1344, 0);
    if page.is_some() {
        bytes.resize(1344 + PAGE, 0xb7);
    }
    bytes
}

/// A packet of pages with content and pages of zeros.
pub fn wide_packet(number: u64, normal: &[u64], zero: &[u64]) -> Vec<u8> {
    let mut bytes = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
    let (count, zeros) = (u32::try_from(normal.len()).unwrap(), u32::try_from(zero.len()).unwrap());
    for field in [0, 128, count, count * 4096] {
        bytes.extend_from_slice(&field.to_be_bytes());
    }
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&zeros.to_be_bytes());
    bytes.resize(64, 0);
    bytes.extend_from_slice(b"pc.ram");
    bytes.resize(320, 0);
    normal.iter().chain(zero).for_each(|page| bytes.extend_from_slice(&(page * 4096).to_be_bytes()));
    bytes.resize(1344, 0);
    bytes.resize(1344 + normal.len() * PAGE, 0xb7);
    bytes
}

/// Two agents, connected on every lane, with the test as both QEMUs.
pub struct Lanes {
    pub pair: Pair,
    /// The test's copies of the connections between the agents.
    pub wires: Vec<TcpStream>,
    pub from: Vec<UnixStream>,
    /// The target's QEMU; nothing until it is asked for.
    pub to: Vec<Option<UnixStream>>,
    /// Lanes in the order in which the target asked for them.
    pub wanted: Vec<u16>,
}

impl Lanes {
    pub fn armed(lanes: u16, inventory: &Inventory, adjust: impl Fn(&mut PermitClaims)) -> Self {
        let pair = Pair::armed(inventory, |claims| {
            claims.features.multifd_channels = lanes;
            adjust(claims);
        });
        let to = (0..=lanes).map(|_| None).collect();
        Self { pair, wires: Vec::new(), from: Vec::new(), to, wanted: Vec::new() }
    }

    /// Armed, connected, and the source's QEMU there.
    pub fn connect(lanes: u16, inventory: &Inventory, adjust: impl Fn(&mut PermitClaims)) -> Self {
        let mut all = Self::armed(lanes, inventory, adjust);
        all.meet();
        all
    }

    /// Connects the agents to each other on every lane, and the source's QEMU.
    pub fn meet(&mut self) {
        let lanes = u16::try_from(self.to.len()).unwrap();
        for lane in 0..lanes {
            self.connect_lane(lane, lane);
        }
        for agent in [&mut self.pair.source, &mut self.pair.target] {
            let FromAgent::Connected { channel } = agent.wait(|m| matches!(m, FromAgent::Connected { .. }))
            else {
                unreachable!("waited for it")
            };
            assert_eq!(channel.channels, lanes);
        }
        self.attach_source();
    }

    pub fn connect_lane(&mut self, at_source: u16, at_target: u16) {
        let (dialled, accepted) = tcp();
        self.pair.target.attach_lane(at_target, Descriptor::Peer, &accepted);
        self.pair.source.attach_lane(at_source, Descriptor::Peer, &dialled);
        self.wires.push(dialled);
    }

    pub fn attach_source(&mut self) {
        for lane in 0..self.to.len() {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.pair.source.attach_lane(u16::try_from(lane).unwrap(), Descriptor::Hypervisor, &theirs);
            self.from.push(ours);
        }
    }

    /// Writes as the source's QEMU, in a thread of its own.
    pub fn write(&self, lane: usize, bytes: &[u8]) -> JoinHandle<()> {
        let (mut socket, bytes) = (self.from[lane].try_clone().unwrap(), bytes.to_vec());
        std::thread::spawn(move || {
            // The agent may close in the middle: that is what some tests are about.
            let _may_break = socket.write_all(&bytes);
        })
    }

    /// Writes on all lanes at once; the end of the main one when all of the others are written, as QEMU does.
    pub fn write_all(&self, streams: &Streams) -> Vec<JoinHandle<()>> {
        let (main, end) = streams.0[0].split_at(streams.0[0].len() - 1);
        let (written, others) = std::sync::mpsc::channel();
        let mut writers = Vec::new();
        for (lane, bytes) in streams.0.iter().enumerate().skip(1) {
            let (mut socket, bytes) = (self.from[lane].try_clone().unwrap(), bytes.clone());
            let written = written.clone();
            writers.push(std::thread::spawn(move || {
                let _may_break = socket.write_all(&bytes);
                drop(written);
            }));
        }
        drop::<std::sync::mpsc::Sender<()>>(written);
        let mut socket = self.from[0].try_clone().unwrap();
        let (main, end) = (main.to_vec(), end.to_vec());
        let main = std::thread::spawn(move || {
            let _may_break = socket.write_all(&main);
            let _all_are_written = others.recv();
            let _may_break = socket.write_all(&end);
        });
        writers.insert(0, main);
        writers
    }

    /// Gives the target the next connection to QEMU that it asks for.
    pub fn give_next(&mut self) -> u16 {
        let wanted = self.pair.target.wait(|m| matches!(m, FromAgent::HypervisorWanted { .. }));
        let FromAgent::HypervisorWanted { channel } = wanted else { unreachable!("waited for it") };
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.pair.target.attach_lane(channel, Descriptor::Hypervisor, &theirs);
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        self.to[usize::from(channel)] = Some(ours);
        self.wanted.push(channel);
        channel
    }

    pub fn give_all(&mut self) {
        for _ in 0..self.to.len() {
            self.give_next();
        }
    }

    pub fn to(&self, lane: usize) -> &UnixStream {
        self.to[lane].as_ref().unwrap()
    }

    /// Reads exactly what a lane must carry, in a thread of its own; true when it was that.
    pub fn expect(&self, lane: usize, bytes: &[u8]) -> JoinHandle<bool> {
        let (mut socket, bytes) = (self.to(lane).try_clone().unwrap(), bytes.to_vec());
        std::thread::spawn(move || {
            let mut read = vec![0; bytes.len()];
            socket.read_exact(&mut read).is_ok() && read == bytes
        })
    }

    pub fn expect_all(&self, streams: &Streams) {
        let readers: Vec<_> =
            streams.0.iter().enumerate().map(|(lane, bytes)| self.expect(lane, bytes)).collect();
        for (lane, reader) in readers.into_iter().enumerate() {
            assert!(reader.join().unwrap(), "lane {lane} changed on its way");
        }
    }

    pub fn end_of_stream(&mut self) -> StreamEvidence {
        match self.pair.source.wait(|m| matches!(m, FromAgent::EndOfStream { .. })) {
            FromAgent::EndOfStream { evidence, .. } => evidence,
            _ => unreachable!("waited for it"),
        }
    }

    pub fn accepted(&mut self) -> StreamEvidence {
        match self.pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. })) {
            FromAgent::Accepted { evidence, .. } => evidence,
            _ => unreachable!("waited for it"),
        }
    }
}
