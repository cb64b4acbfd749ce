//! What an agent process is resident with in its worst cases: always below 64 MiB.

#![allow(clippy::unwrap_used)]

#[path = "support/lanes.rs"]
mod lanes;
#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use lanes::{Lanes, Streams};
use link::channel::EphemeralKey;
use outrider_agent::arm::{Identity, arm, channel_config};
use outrider_agent::peer::Peer;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use support::{Agent, NOW_UNIX_S, PATIENCE, Pair, claims, migration, sign, tcp};
use types::agent::{Descriptor, FromAgent, ToAgent};
use types::handover::Side;
use types::inventory::{Inventory, RamBlock};
use wire::frame::{HEADER_BYTES, MAX_PAYLOAD_BYTES};

const LIMIT_KIB: u64 = 64 << 10;
/// The largest guest that is promised.
const GUEST_BYTES: u64 = 256 << 30;
const PAGE: u64 = 4096;

/// The greatest resident size that an agent ever had, in KiB.
fn peak_kib(agent: &Agent) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", agent.process.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

fn check(what: &str, agents: &[&Agent]) {
    for agent in agents {
        let peak = peak_kib(agent);
        println!("{what}: the {} agent's peak is {} KiB", agent.side, peak);
        assert!(peak < LIMIT_KIB, "{what}: the {} agent was resident with {peak} KiB", agent.side);
    }
}

/// A device of so many bytes, and a description that is padded to its size, behind a guest of 256 GiB all of whose pages
/// came: `zero_pages` of them as records.
struct Guest {
    inventory: Inventory,
    /// Up to the first PART's records.
    head: Vec<u8>,
    tail: Vec<u8>,
}

fn guest(device_bytes: usize, description_bytes: usize) -> Guest {
    let small = streams::handmade();
    let mut inventory = engine::inspect::learn(&small, "qemu/test").unwrap();
    inventory.ram_blocks = vec![
        RamBlock { name: "pc.ram".to_owned(), length_bytes: GUEST_BYTES, content: None },
        RamBlock { name: "pc.rom".to_owned(), length_bytes: 2 * PAGE, content: None },
    ];
    inventory.devices.retain(|device| device.name.ends_with("virtio-net"));
    let marks = streams::Marks::of(&small);
    let mut head = small[..marks.part + 5].to_vec();
    let list = [("pc.ram", GUEST_BYTES), ("pc.rom", 2 * PAGE)];
    let total = (GUEST_BYTES + 2 * PAGE) | 4;
    let mut blocks = total.to_be_bytes().to_vec();
    for (name, bytes) in list {
        blocks.push(u8::try_from(name.len()).unwrap());
        blocks.extend_from_slice(name.as_bytes());
        blocks.extend_from_slice(&bytes.to_be_bytes());
    }
    let old = 8 + 2 * (1 + 6 + 8);
    let at = head.windows(7).position(|w| w == b"\x06pc.ram").unwrap() - 8;
    head = streams::splice(&head, at, old, &blocks);
    Guest { inventory, head, tail: tail(device_bytes, description_bytes) }
}

fn tail(device_bytes: usize, description_bytes: usize) -> Vec<u8> {
    let mut tail = vec![8, 0, 11, 0, 0, 3, 0, 0, 0, 1];
    for page in 0..2u64 {
        tail.extend_from_slice(&((page * PAGE) | 2).to_be_bytes());
        tail.extend_from_slice(b"\x06pc.rom\0");
    }
    tail.extend_from_slice(&16u64.to_be_bytes());
    tail.extend_from_slice(&[0x7e, 0, 0, 0, 1]);
    let name = b"0000:00:01.0/virtio-net";
    tail.extend_from_slice(&[4, 0, 0, 0, 30, u8::try_from(name.len()).unwrap()]);
    tail.extend_from_slice(name);
    tail.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 11]);
    tail.extend((0..device_bytes).map(|i| u8::try_from(i % 100).unwrap()));
    tail.extend_from_slice(&[0x7e, 0, 0, 0, 30, 0, 6]);
    let fields = r#"{"page_size":4096,"devices":[{"name":"0000:00:01.0/virtio-net","instance_id":0,"vmsd_name":"x","version":11,"fields":["#;
    let mut json = fields.to_owned();
    let field = format!(r#"{{"name":"a","type":"buffer","size":{device_bytes}}}"#);
    json.push_str(&field);
    let mut number = 0;
    while json.len() + 100 < description_bytes {
        json.push_str(&format!(r#",{{"name":"b{number}","type":"buffer","size":0}}"#));
        number += 1;
    }
    json.push_str("]}]}");
    tail.extend_from_slice(&u32::try_from(json.len()).unwrap().to_be_bytes());
    tail.extend_from_slice(json.as_bytes());
    tail
}

/// Every page of `pc.ram`, once, as a record of zeros. Nothing of it is kept in memory.
fn every_page(mut write: impl FnMut(&[u8])) {
    let mut piece = Vec::with_capacity(9 << 16);
    for page in 0..GUEST_BYTES / PAGE {
        let named = page == 0;
        piece.extend_from_slice(&((page * PAGE) | if named { 2 } else { 0x22 }).to_be_bytes());
        if named {
            piece.extend_from_slice(b"\x06pc.ram");
        }
        piece.push(0);
        if piece.len() >= 9 << 15 {
            write(&piece);
            piece.clear();
        }
    }
    write(&piece);
}

/// 256 GiB of page maps, 8 MiB of device state, 2 MiB of them its description, held whole, judged and released.
#[test]
fn the_largest_guest_and_device_state_fit() {
    let guest = guest((6 << 20) - 8192, 2 << 20);
    let mut pair = Pair::with_fake_qemus(&guest.inventory, |claims| {
        claims.byte_budget = u64::MAX;
        claims.duration_budget_ms = 600_000;
    });
    let mut socket = pair.from_qemu.as_ref().unwrap().try_clone().unwrap();
    let reader = pair.to_qemu.take().unwrap();
    let drain = std::thread::spawn(move || std::io::copy(&mut &reader, &mut std::io::sink()));
    let (head, tail) = (guest.head.clone(), guest.tail.clone());
    let writer = std::thread::spawn(move || {
        socket.write_all(&head).unwrap();
        every_page(|piece| socket.write_all(piece).unwrap());
        socket.write_all(&end_of_payload()).unwrap();
        socket.write_all(&tail).unwrap();
    });
    pair.source.wait_long(|m| matches!(m, FromAgent::EndOfStream { .. }));
    pair.source.send(&ToAgent::Frozen);
    pair.target.wait_long(|m| matches!(m, FromAgent::Accepted { .. }));
    writer.join().unwrap();
    check("256 GiB, all device state", &[&pair.source, &pair.target]);
    drop(pair);
    drain.join().unwrap().unwrap();
}

/// The test as a source's agent that stops for nothing, and as the target's QEMU that reads nothing.
struct Flood {
    target: Agent,
    peers: Vec<Peer>,
    qemu: Vec<UnixStream>,
}

impl Flood {
    fn connect(lanes: u16, inventory: &Inventory) -> Self {
        Self::connect_beside(lanes, inventory, None)
    }

    /// With a scanner that is to see everything.
    fn connect_beside(lanes: u16, inventory: &Inventory, scanner: Option<&UnixStream>) -> Self {
        let mut target = Agent::start(Side::Target, migration());
        let key = EphemeralKey::generate().unwrap();
        let mut claims = claims(key.spki(), &target.spki);
        claims.byte_budget = u64::MAX;
        claims.features.multifd_channels = lanes;
        if scanner.is_some() {
            claims.inspection_profile = "strict+signatures-complete+report-unvouched".to_owned();
            claims.downtime_budget_ms = 60_000;
        }
        let permit = sign(&claims);
        target.arm(&permit, inventory);
        target.wait(|m| matches!(m, FromAgent::Armed));
        if let Some(scanner) = scanner {
            target.attach(Descriptor::Scanner, scanner);
        }
        let identity = Identity { side: Side::Source, migration: migration(), key };
        let armed =
            arm(&identity, &permit.token, &permit.keys, NOW_UNIX_S, (inventory.clone(), None)).unwrap();
        let mut peers = Vec::new();
        for lane in 0..=lanes {
            let (dialled, accepted) = tcp();
            target.attach_lane(lane, Descriptor::Peer, &accepted);
            let config = channel_config(&identity, &armed, lane).unwrap();
            let deadline = Instant::now() + PATIENCE;
            peers.push(Peer::open(dialled.into(), &config, Side::Source, deadline).unwrap().0);
        }
        target.wait(|m| matches!(m, FromAgent::Connected { .. }));
        Self { target, peers, qemu: Vec::new() }
    }

    /// Gives the target every connection to QEMU, whether it asks or not.
    fn attach_all(&mut self) {
        for lane in 0..self.peers.len() {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.target.attach_lane(u16::try_from(lane).unwrap(), Descriptor::Hypervisor, &theirs);
            self.qemu.push(ours);
        }
    }

    /// Sends on all lanes at once until nothing is taken any more.
    fn pour(&mut self, streams: &[Vec<u8>]) {
        let mut sent = vec![0; streams.len()];
        let mut frame = vec![0; HEADER_BYTES + MAX_PAYLOAD_BYTES];
        let (mut last, mut since) = (0, Instant::now());
        while since.elapsed() < Duration::from_secs(1) {
            for ((peer, stream), sent) in self.peers.iter_mut().zip(streams).zip(&mut sent) {
                let piece = &stream[*sent..stream.len().min(*sent + MAX_PAYLOAD_BYTES)];
                if !piece.is_empty() && peer.waiting_bytes() < MAX_PAYLOAD_BYTES {
                    frame[HEADER_BYTES..HEADER_BYTES + piece.len()].copy_from_slice(piece);
                    peer.data(&mut frame, piece.len()).unwrap();
                    *sent += piece.len();
                }
                peer.flush().unwrap();
            }
            let now = self.peers.iter().map(|peer| peer.wire_bytes().0).sum::<u64>();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!self.target.has_ended(), "the target did not endure it");
    }
}

/// A record of zeros for one page in each piece of the page maps.
fn touch_maps() -> Vec<u8> {
    let touched = (0..GUEST_BYTES / PAGE).step_by(1 << 15);
    touched.flat_map(|page| [&((page * PAGE) | 2).to_be_bytes()[..], b"\x06pc.ram\0"].concat()).collect()
}

fn pages(count: usize) -> Vec<u8> {
    let mut page = 8u64.to_be_bytes().to_vec();
    page.extend_from_slice(b"\x06pc.ram");
    page.extend(std::iter::repeat_n(0x5a, 4096));
    page.repeat(count)
}

fn end_of_payload() -> Vec<u8> {
    [&16u64.to_be_bytes()[..], &[0x7e, 0, 0, 0, 1]].concat()
}

/// A channel that is full of pages, and ahead of the others.
fn full_lane(id: u16) -> Vec<u8> {
    let own = u64::from(id) << 20;
    let mut stream = lanes::init(id);
    // The map of pages since the last synchronisation.
    let touched: Vec<u64> =
        (0..2048u64 / 16).map(|n| (n * 16 + u64::from(id)) << 15).map(|page| page + 1).collect();
    stream.extend(lanes::wide_packet(1, &[], &touched));
    for number in 0..3 {
        let all: Vec<u64> = (0..128).map(|page| own + 128 * number + page + 2).collect();
        stream.extend(lanes::wide_packet(2 + number, &all, &[]));
    }
    if id != 15 {
        stream.extend(lanes::packet(5, None));
    }
    for number in 0..4 {
        let all: Vec<u64> = (0..128).map(|page| own + 128 * (3 + number) + page + 2).collect();
        stream.extend(lanes::wide_packet(6 + number, &all, &[]));
    }
    stream
}

#[test]
fn a_suspended_target_of_a_flooding_source_fits() {
    let guest = guest(0, 0);
    let mut flood = Flood::connect(0, &guest.inventory);
    flood.target.send(&ToAgent::Suspend);
    flood.attach_all();
    flood.pour(&[[guest.head.clone(), touch_maps(), pages(20_000)].concat()]);
    check("suspended, one lane", &[&flood.target]);

    let mut flood = Flood::connect(16, &guest.inventory);
    flood.target.send(&ToAgent::Suspend);
    flood.attach_all();
    let main = [guest.head.clone(), touch_maps(), pages(20_000)].concat();
    let streams: Vec<_> = std::iter::once(main).chain((0..16).map(full_lane)).collect();
    flood.pour(&streams);
    check("suspended, 17 lanes", &[&flood.target]);
}

/// All lanes full, and all of the device state held at the same time.
#[test]
fn a_target_whose_qemu_stands_still_fits() {
    let guest = guest((6 << 20) - 8192, 2 << 20);
    let mut flood = Flood::connect(16, &guest.inventory);
    flood.attach_all();
    let main = [guest.head, touch_maps(), end_of_payload(), guest.tail].concat();
    let streams: Vec<_> = std::iter::once(main).chain((0..16).map(full_lane)).collect();
    flood.pour(&streams);
    check("stalled, 17 lanes, device state", &[&flood.target]);
}

/// All lanes full behind a scanner that answers nothing, and QEMU reading nothing either.
#[test]
fn a_target_whose_scanner_stands_still_fits() {
    let guest = guest(0, 0);
    for lanes in [0, 16] {
        let (_scanner, its_end) = UnixStream::pair().unwrap();
        let mut flood = Flood::connect_beside(lanes, &guest.inventory, Some(&its_end));
        flood.attach_all();
        let main = [guest.head.clone(), touch_maps(), pages(20_000)].concat();
        let streams: Vec<_> = std::iter::once(main).chain((0..lanes).map(full_lane)).collect();
        flood.pour(&streams);
        check(&format!("a scanner that stands still, {} lanes", lanes + 1), &[&flood.target]);
    }
}

/// A source's agent whose network takes nothing.
#[test]
fn a_source_whose_network_stands_still_fits() {
    let guest = guest(0, 0);
    let mut all = Lanes::connect(16, &guest.inventory, |claims| claims.byte_budget = u64::MAX);
    // The target gets no connection to its QEMU, and so takes in little.
    let main = [guest.head, touch_maps(), pages(5_000)].concat();
    let lanes = (0..16).map(|id| full_lane(id).repeat(4));
    let streams = std::iter::once(main).chain(lanes).collect();
    let _writers = all.write_all(&Streams(streams));
    let mut last = u64::MAX;
    for _ in 0..50 {
        let now = all.pair.source.progress();
        if now == last {
            break;
        }
        last = now;
    }
    check("stalled, 17 lanes", &[&all.pair.source]);
}
