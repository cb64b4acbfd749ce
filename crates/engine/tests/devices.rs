//! Device state against catalogues: of QEMU's own dry runs, of the corpus, and changed in every way that counts.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "support/dry_run.rs"]
mod dry_run;
#[path = "support/skip.rs"]
mod skip;

use dry_run::{Blob, Qemu, corpus, device_state, machine, qemus};
use outrider_engine::inspect::devices::{Judged, Unvouched, Vouched, compile, judge};
use std::sync::OnceLock;
use std::time::Instant;
use types::inventory::Inventory;
use types::layout::Catalogue;
use wire::qemu::Violation;

const RAM_ID: u32 = 0xff_ffff;

/// No backend: nothing on the host is needed.
const DEVICES: &[&str] = &[
    "-object",
    "rng-random,id=rng,filename=/dev/urandom",
    "-device",
    "virtio-rng-pci,rng=rng",
    "-blockdev",
    "driver=null-co,node-name=disk,size=1048576,read-zeroes=on",
    "-device",
    "virtio-blk-pci,drive=disk",
    "-netdev",
    "hubport,id=net,hubid=0",
    "-device",
    "virtio-net-pci,netdev=net,romfile=",
    "-device",
    "virtio-balloon-pci",
    "-device",
    "virtio-scsi-pci,id=scsi",
    "-blockdev",
    "driver=null-co,node-name=lun,size=1048576,read-zeroes=on",
    "-device",
    "scsi-hd,drive=lun,bus=scsi.0",
    "-device",
    "virtio-serial-pci",
    "-chardev",
    "null,id=port",
    "-device",
    "virtserialport,chardev=port,name=port",
    "-device",
    "qemu-xhci",
    "-device",
    "usb-tablet",
    "-device",
    "VGA",
];

fn check(blob: &[u8], base: u64, catalogue: &Catalogue, unvouched: Unvouched) -> Result<Judged, Violation> {
    let inventory = Inventory { machine: catalogue.machine.clone(), ..Inventory::default() };
    judge(blob, base, RAM_ID, 4096, &inventory, Some(catalogue), unvouched)
}

/// Accepts a stream, prints what it took; the names of the sections that no layout vouched for.
fn accept(name: &str, stream: &[u8], catalogue: &Catalogue) -> Vec<String> {
    let (base, blob) = device_state(stream);
    let begin = Instant::now();
    let judged = check(blob, base, catalogue, Unvouched::Report).unwrap_or_else(|v| panic!("{name}: {v}"));
    let took = begin.elapsed();
    let weak = judged.sections.iter().filter(|s| s.vouched != Vouched::Layout).map(|s| s.name.clone());
    let weak: Vec<_> = weak.collect();
    println!(
        "{name}: {} bytes in {took:?}, {} of {} sections exact",
        blob.len(),
        judged.sections.len() - weak.len(),
        judged.sections.len()
    );
    weak
}

#[test]
fn every_section_of_a_dry_run_reads_exactly() {
    let qemus = qemus();
    if qemus.is_empty() {
        skip::skip("no QEMU on this machine to record from");
    }
    for qemu in &qemus {
        for kind in ["pc", "q35"] {
            let stream = qemu.dry_run(kind, DEVICES).unwrap();
            let dump = qemu.dump(kind).unwrap();
            let catalogue = compile(&stream, Some(&dump), "qemu/test").unwrap();
            let json = serde_json::to_vec(&catalogue).unwrap();
            assert!(json.len() < 256 << 10, "{kind}: {} bytes of catalogue", json.len());
            assert_eq!(serde_json::from_slice::<Catalogue>(&json).unwrap(), catalogue);
            let why: Vec<_> = catalogue.sections.iter().filter(|s| s.layout.is_none()).collect();
            assert_eq!(why, Vec::<&types::layout::SectionLayout>::new());
            let name = format!("{} {kind}", qemu.binary);
            assert_eq!(accept(&name, &stream, &catalogue), Vec::<String>::new());
            let (base, blob) = device_state(&stream);
            check(blob, base, &catalogue, Unvouched::Refuse).unwrap();
        }
    }
}

/// The catalogue of a dry run by the dump of the QEMU here that fits it best: the one that made it, if it is here.
fn best_catalogue(qemus: &[Qemu], dry_run: &[u8]) -> Option<Catalogue> {
    let dumps = qemus.iter().filter_map(|qemu| qemu.dump(&machine(dry_run)));
    let compiled = dumps.map(|dump| compile(dry_run, Some(&dump), "qemu/test").unwrap());
    compiled.min_by_key(|catalogue| catalogue.sections.iter().filter(|s| s.layout.is_none()).count())
}

#[test]
fn a_fresh_vm_tells_how_a_booted_one_looks() {
    let qemus = qemus();
    let pairs = [
        ("7.2-q35-fresh", "7.2-q35-booted"),
        ("10.0-q35-fresh", "10.0-q35-booted-mfd2"),
        ("10.0-pc-fresh", "10.0-pc-fresh"),
        ("7.2-pc-fresh", "7.2-pc-fresh"),
        ("10.0-q35-vtpm-crb", "10.0-q35-vtpm-crb"),
    ];
    for (fresh, booted) in pairs {
        let (Some(dry_run), Some(stream)) = (corpus(fresh), corpus(booted)) else {
            println!("skipped: {fresh} and {booted} are not on this machine");
            continue;
        };
        let Some(catalogue) = best_catalogue(&qemus, &dry_run) else {
            skip::skip(&format!("no QEMU here knows {}", machine(&dry_run)));
            continue;
        };
        if catalogue.sections.iter().any(|s| s.layout.is_none() && s.name != "slirp") {
            skip::skip(&format!("no QEMU here is of the version that made {fresh}"));
            continue;
        }
        let weak = accept(booted, &stream, &catalogue);
        // The user network's state is written by its library, in a form of its own.
        assert!(weak.iter().all(|name| name == "slirp"), "{booted}: {weak:?}");
    }
}

const CORPUS_DEVICES: &[&str] = &[
    "-netdev",
    "user,id=n0",
    "-device",
    "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,romfile=",
    "-blockdev",
    "driver=null-co,node-name=d0,size=1048576,read-zeroes=on",
    "-object",
    "rng-random,id=r0,filename=/dev/urandom",
    "-device",
    "virtio-blk-pci,drive=d0",
    "-device",
    "virtio-rng-pci,rng=r0",
    "-chardev",
    "null,id=serial",
    "-serial",
    "chardev:serial",
];

#[test]
fn a_dry_run_of_this_machines_qemu_tells_how_the_corpus_looks() {
    let qemus = qemus();
    for name in ["10.0-q35-fresh", "10.0-q35-booted-mfd2", "10.0-pc-fresh", "7.2-q35-booted", "7.2-pc-fresh"]
    {
        let Some(stream) = corpus(name) else {
            println!("skipped: {name} is not on this machine");
            continue;
        };
        let machine = machine(&stream);
        let recorded =
            qemus.iter().find_map(|q| Some((q.dry_run(&machine, CORPUS_DEVICES)?, q.dump(&machine)?)));
        let Some((dry_run, dump)) = recorded else {
            skip::skip(&format!("no QEMU here can make a {machine} with a user network"));
            continue;
        };
        let catalogue = compile(&dry_run, Some(&dump), "qemu/test").unwrap();
        let weak = accept(name, &stream, &catalogue);
        assert!(weak.iter().all(|name| name == "slirp"), "{name}: {weak:?}");
        let (base, blob) = device_state(&stream);
        let refused = check(blob, base, &catalogue, Unvouched::Refuse).unwrap_err();
        assert_eq!((refused.rule, refused.section.as_str()), ("INV-D2", "slirp"));
        assert!(refused.expected.contains("policy"), "{refused}");
    }
}

/// A good device state of this machine's QEMU, and its catalogue.
fn sample() -> Option<&'static (Blob, Catalogue)> {
    static SAMPLE: OnceLock<Option<(Blob, Catalogue)>> = OnceLock::new();
    let sample = SAMPLE.get_or_init(|| {
        let qemu = qemus().into_iter().next()?;
        let stream = qemu.dry_run("q35", DEVICES)?;
        let catalogue = compile(&stream, qemu.dump("q35").as_deref(), "qemu/test").unwrap();
        Some((Blob::of(&stream), catalogue))
    });
    if sample.is_none() {
        skip::skip("no QEMU on this machine to record from");
    }
    sample.as_ref()
}

/// Changes the sample, and expects a rule to refuse it.
fn refuse(what: &str, rule: &str, change: impl FnOnce(&mut Blob)) {
    let Some((blob, catalogue)) = sample() else { return };
    let mut blob = blob.clone();
    change(&mut blob);
    match check(&blob.to_bytes(), 1000, catalogue, Unvouched::Refuse) {
        Ok(_) => panic!("{what} was accepted"),
        Err(violation) => assert_eq!(violation.rule, rule, "{what}: {violation}"),
    }
}

/// Overwrites bytes behind `skip` bytes of a section's state.
fn refuse_bytes(section: &str, skip: usize, bytes: &[u8], rule: &str) {
    refuse(&format!("{section} with {bytes:?} at {skip}"), rule, |blob| {
        let at = blob.section(section).2.start + skip;
        blob.splice(at..at + bytes.len(), bytes);
    });
}

/// PCI device of a virtio device on a q35 machine's root bus: version, configuration, interrupts.
const PCI_BYTES: usize = 4 + 256 + 16;

/// Where the transport's part of a virtio device with so many MSI-X vectors starts.
fn transport(entries: usize) -> usize {
    PCI_BYTES + entries * 16 + entries.div_ceil(8)
}

#[test]
fn values_that_shape_the_load_are_refused() {
    let rng = transport(2);
    refuse_bytes("virtio-rng", 4, &[0x86, 0x80], "INV-D7");
    refuse_bytes("virtio-rng", 4 + 0x10, &[0], "INV-D7");
    refuse_bytes("virtio-rng", 4 + 0x34, &[0], "INV-D7");
    refuse_bytes("virtio-rng", 0, &[0, 0, 0, 3], "INV-D7");
    refuse_bytes("virtio-rng", 4 + 256, &[0, 0, 0, 2], "INV-D6");
    refuse_bytes("virtio-rng", rng, &[0, 2], "INV-D6");
    refuse_bytes("virtio-rng", rng + 3, &[0x55], "INV-D6");
    refuse_bytes("virtio-rng", rng + 4, &[4, 0], "INV-D6");
    refuse_bytes("virtio-rng", rng + 10, &[0, 0, 0, 1], "INV-D5");
    refuse_bytes("virtio-rng", rng + 10, &[0xff; 4], "INV-D5");
    refuse_bytes("virtio-rng", rng + 14, &[0, 0, 4, 1], "INV-D5");
    refuse_bytes("virtio-rng", rng + 18, &[0, 0, 0, 3], "INV-D5");
    refuse_bytes("virtio-rng", rng + 18, &[0, 0, 8, 0], "INV-D5");
    refuse_bytes("virtio-rng", rng + 30, &[0, 1], "INV-D6");
    refuse_bytes("virtio-rng", rng + 32, &[0, 9], "INV-D6");
    refuse_bytes("hpet", 24, &[32], "INV-D5");
    refuse_bytes("globalstate", 4, b"colo\0", "INV-D8");
    refuse_bytes("globalstate", 0, &[0, 0, 0, 101], "INV-D8");
}

/// A request in flight on a disk, as QEMU dumps it, with so many pieces each way.
fn request(out: u32, incoming: u32) -> Vec<u8> {
    let mut request = vec![1u8, 0, 0, 0, 0];
    request.extend_from_slice(&out.to_le_bytes());
    request.extend_from_slice(&incoming.to_le_bytes());
    request.resize(1 + 49_168, 0);
    request
}

/// Puts a request in front of the zero that ends the list: the last byte before virtio's subsections.
fn add_request(blob: &mut Blob, request: &[u8]) {
    let end_of_requests = blob.find("virtio-blk", b"\x05\x15virtio/64bit_features") - 1;
    blob.splice(end_of_requests..end_of_requests, request);
}

#[test]
fn a_disk_request_in_flight_is_read() {
    let Some((good, catalogue)) = sample() else { return };
    let mut blob = good.clone();
    let length = blob.section("virtio-blk").2.len();
    add_request(&mut blob, &request(1, 1));
    blob.redescribe("virtio-blk", length + 1 + 49_168);
    check(&blob.to_bytes(), 0, catalogue, Unvouched::Refuse).unwrap();
}

#[test]
fn counts_that_the_stream_brings_are_bounded() {
    refuse("more MAC addresses than fit", "INV-D5", |blob| {
        // The address, then four fields of 4, 4, 2 and 1 + 1 bytes.
        let mac = blob.find("virtio-net", &[0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0, 0, 0, 0]);
        blob.splice(mac + 18..mac + 22, &[0, 0, 0, 65]);
    });
    refuse("a request in flight with too many pieces", "INV-D5", |blob| {
        add_request(blob, &request(1000, 1000));
    });
    refuse("a request in flight that is none", "INV-D6", |blob| add_request(blob, &[2]));
    refuse("a SCSI request", "INV-D2", |blob| {
        let (_, _, state) = blob.section("scsi-disk");
        let place = 1 + 1 + 1 + 1 + 96 + 4;
        blob.splice(state.start + place..state.start + place + 1, &[2]);
    });
}

#[test]
fn subsections_come_known_in_order_and_once() {
    let poll = b"\x05\x14cpu/poll_control_msr";
    let whole = 2 + 20 + 4 + 8;
    refuse("a version that the target does not know", "INV-D4", |blob| {
        let at = blob.find("cpu", poll) + 2 + 20 + 3;
        blob.splice(at..at + 1, &[2]);
    });
    refuse("a name that the target does not know", "INV-D4", |blob| {
        let at = blob.find("cpu", poll) + 2 + 19;
        blob.splice(at..at + 1, b"x");
    });
    refuse("a subsection twice", "INV-D4", |blob| {
        let at = blob.find("cpu", poll);
        let again = blob.bytes[at..at + whole].to_vec();
        blob.splice(at..at, &again);
    });
    refuse("subsections in another order", "INV-D4", |blob| {
        let at = blob.find("cpu", poll);
        blob.splice(at..at, b"\x05\x10cpu/triple_fault\0\0\0\x01\x01");
    });
    refuse("a subsection of another device", "INV-D4", |blob| {
        let at = blob.find("cpu", poll);
        let other = [&[5u8, 10][..], b"cpuhp/oops\0\0\0\x01\0"].concat();
        blob.splice(at..at, &other);
    });
    refuse("a subsection inside an array", "INV-D4", |blob| {
        let state = b"virtio_pci/modern_state";
        let name = b"virtio_pci/modern_queue_state/x";
        let nested = [&[5, name.len() as u8][..], name, &[0, 0, 0, 1]].concat();
        // Behind the version, the four words before the queues, and the first queue.
        let inside = blob.find("virtio-rng", state) + state.len() + 4 + 16 + 28;
        blob.splice(inside..inside, &nested);
    });
}

#[test]
fn an_optional_subsection_of_a_running_guest_is_read() {
    let Some((blob, catalogue)) = sample() else { return };
    let mut blob = blob.clone();
    let end = blob.section("cpu").2.end;
    let fpop = b"\x05\x0ecpu/fpop_ip_dp\0\0\0\x01abcdefghijklmnopqr";
    let poll = blob.find("cpu", b"\x05\x14cpu/poll_control_msr");
    blob.splice(poll + 34..poll + 34, fpop);
    let length = end + fpop.len() - blob.section_start("cpu");
    blob.redescribe("cpu", length);
    check(&blob.to_bytes(), 0, catalogue, Unvouched::Refuse).unwrap();
    // The description has to agree, although it decides nothing.
    blob.redescribe("cpu", length - 1);
    assert_eq!(check(&blob.to_bytes(), 0, catalogue, Unvouched::Refuse).unwrap_err().rule, "INV-E2");
}

#[test]
fn lengths_ids_and_the_list_of_devices_hold() {
    refuse("a byte less", "INV-D2", |blob| {
        let end = blob.section("port92").2.end;
        blob.splice(end - 1..end, &[]);
    });
    refuse("a byte more", "INV-D2", |blob| {
        let end = blob.section("port92").2.end;
        blob.splice(end..end, &[1]);
    });
    refuse("another footer", "INV-S4", |blob| {
        let end = blob.section("port92").2.end;
        blob.splice(end + 4..end + 5, &[0x77]);
    });
    refuse("another instance", "INV-E2", |blob| {
        let start = blob.section("port92").2.start;
        blob.splice(start - 5..start - 4, &[7]);
    });
    refuse("another version", "INV-E2", |blob| {
        let start = blob.section("port92").2.start;
        blob.splice(start - 1..start, &[9]);
    });
    refuse("a device less", "INV-S10", |blob| {
        let (_, whole, _) = blob.section("port92");
        blob.splice(whole, &[]);
        blob.edit_devices(|devices| devices.retain(|d| d["name"] != "port92"));
    });
    refuse("a device twice", "INV-S6", |blob| {
        let (_, whole, _) = blob.section("port92");
        let again = blob.bytes[whole].to_vec();
        let end = blob.bytes.len();
        blob.splice(end..end, &again);
        blob.edit_devices(|devices| {
            let again = devices.iter().find(|d| d["name"] == "port92").unwrap().clone();
            devices.push(again);
        });
    });
    refuse("a device that the target does not have", "INV-S5", |blob| {
        let start = blob.section("port92").2.start;
        blob.splice(start - 9..start - 8, b"3");
        blob.edit_devices(|devices| {
            devices.iter_mut().find(|d| d["name"] == "port92").unwrap()["name"] = "port93".into();
        });
    });
}

/// A subsection of version 1.
fn subsection(name: &str, body: &[u8]) -> Vec<u8> {
    [&[5, name.len() as u8], name.as_bytes(), &[0, 0, 0, 1], body].concat()
}

/// What KVM keeps of a guest that runs guests: the target knows it, and no layout tells its fields.
fn nested_state() -> Vec<u8> {
    subsection("cpu/nested_state", &[0x11; 700])
}

fn tsx_control() -> Vec<u8> {
    subsection("cpu/msr_tsx_ctrl", &[0, 0, 0, 2])
}

/// The registers of branch records, so many of them.
fn branch_records(depth: u64) -> Vec<u8> {
    subsection("cpu/arch_lbr", &[&[0; 8][..], &depth.to_be_bytes(), &[0; 32 * 24]].concat())
}

/// A sample whose processor's state has these subsections at its end.
fn with_subsections(blob: &Blob, subsections: &[Vec<u8>]) -> Blob {
    let (_, _, state) = blob.section("cpu");
    let (mut blob, more) = (blob.clone(), subsections.concat());
    blob.splice(state.end..state.end, &more);
    blob.redescribe("cpu", state.len() + more.len());
    blob
}

fn how_vouched(judged: &Judged, name: &str) -> Vouched {
    judged.sections.iter().find(|section| section.name == name).unwrap().vouched
}

#[test]
fn a_part_that_no_layout_tells_passes_only_where_that_is_permitted() {
    let Some((good, catalogue)) = sample() else { return };
    let honest = [
        vec![nested_state()],
        vec![nested_state(), tsx_control(), branch_records(32)],
        vec![nested_state(), subsection("cpu/xen_vcpu", &[7; 48]), tsx_control()],
    ];
    for subsections in honest {
        let blob = with_subsections(good, &subsections).to_bytes();
        let judged = check(&blob, 0, catalogue, Unvouched::Report).unwrap();
        assert_eq!(how_vouched(&judged, "cpu"), Vouched::Partly);
        assert_eq!(how_vouched(&judged, "port92"), Vouched::Layout);
        let refused = check(&blob, 0, catalogue, Unvouched::Refuse).unwrap_err();
        assert_eq!((refused.rule, refused.section.as_str()), ("INV-D2", "cpu"), "{refused}");
    }
}

/// Which devices are judged is the catalogue's word: a part that can't be read gains a source nothing (MM-07).
#[test]
fn nothing_hides_before_or_behind_a_part_that_no_layout_tells() {
    let Some((good, catalogue)) = sample() else { return };
    let refuse = |what: &str, rule: &str, blob: &Blob| match check(
        &blob.to_bytes(),
        0,
        catalogue,
        Unvouched::Report,
    ) {
        Ok(judged) => panic!("{what} was accepted, {:?}", how_vouched(&judged, "cpu")),
        Err(violation) => assert_eq!(violation.rule, rule, "{what}: {violation}"),
    };
    let (nested, unknown) = (nested_state(), subsection("cpu/xen_vcpu", &[7; 48]));
    let misplaced = [&[1, 2, 3][..], &branch_records(33)].concat();
    let behind = [
        ("an index past its array", "INV-D6", vec![nested.clone(), branch_records(33)]),
        ("one behind another", "INV-D6", vec![nested.clone(), tsx_control(), branch_records(33)]),
        ("one behind two such parts", "INV-D6", vec![nested.clone(), unknown, branch_records(33)]),
        ("one that an honest part could hold", "INV-D6", vec![nested.clone(), misplaced]),
        ("one inside of another", "INV-D6", vec![nested.clone(), vec![9; 5], branch_records(33), vec![9; 5]]),
        ("a subsection twice", "INV-D4", vec![nested.clone(), tsx_control(), tsx_control()]),
        ("the part twice", "INV-D4", vec![nested.clone(), nested.clone()]),
        ("one that belongs before", "INV-D4", vec![nested.clone(), subsection("cpu/pkru", &[0; 4])]),
        (
            "a version unknown here",
            "INV-D4",
            vec![nested.clone(), b"\x05\x10cpu/msr_tsx_ctrl\0\0\0\x02".to_vec()],
        ),
        ("a name that only a C string ends", "INV-D4", vec![nested.clone(), c_string_name()]),
        ("half a subsection", "INV-D2", vec![nested.clone(), branch_records(32)[..100].to_vec()]),
        ("a subsection with more behind it", "INV-D2", vec![nested.clone(), tsx_control(), vec![1, 2, 3]]),
        ("a part that ends in its head", "INV-D4", vec![b"\x05\x10cpu/nested_state\0\0".to_vec()]),
    ];
    for (what, rule, subsections) in behind {
        refuse(what, rule, &with_subsections(good, &subsections));
    }
    let mut before = with_subsections(good, &[nested]);
    let mask = before.find("cpu", &[0xff, 0xff, 0xff, 0xff]);
    let poll = before.find("cpu", b"\x05\x14cpu/poll_control_msr");
    assert!(mask < poll, "the mask of the address line is a field, not a subsection's");
    before.splice(mask..mask + 4, &[0x12, 0x34, 0x56, 0x78]);
    refuse("a mask that no processor has", "INV-D8", &before);
    let mut request = good.clone();
    let (_, _, state) = request.section("scsi-disk");
    let place = state.start + 1 + 1 + 1 + 1 + 96 + 4;
    request.splice(place..place + 1, &[2]);
    refuse("a SCSI request in front of the rest of its disk", "INV-D2", &request);
}

/// `branch_records(33)` under a name with a NUL behind it, which QEMU reads as the known one.
fn c_string_name() -> Vec<u8> {
    let plain = branch_records(33);
    let name = b"cpu/arch_lbr";
    assert_eq!(plain[..2 + name.len()], *b"\x05\x0ccpu/arch_lbr");
    [b"\x05\x0d", &name[..], b"\0", &plain[2 + name.len()..]].concat()
}

/// The same pseudo-random numbers on every run.
fn numbers(mut state: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state)
    })
}

#[test]
fn no_change_makes_it_panic_or_run_away() {
    let Some((blob, catalogue)) = sample() else { return };
    let good = blob.to_bytes();
    let mut random = numbers(0x9e37_79b9_7f4a_7c15);
    let mut next = |below: usize| random.next().unwrap() as usize % below;
    let mut accepted = 0;
    let rounds = if cfg!(debug_assertions) { 300 } else { 5_000 };
    for round in 0..rounds {
        let mut bytes = good.clone();
        for _ in 0..=next(4) {
            let at = next(blob.bytes.len());
            match next(4) {
                0 => bytes[at] = next(256) as u8,
                1 => bytes[at] ^= 1 << next(8),
                2 => drop(bytes.splice(at..(at + next(64)).min(bytes.len()), [])),
                _ => drop(bytes.splice(at..at, [5, next(40) as u8, b'v', b'i', b'r'])),
            }
        }
        if round % 16 == 0 {
            bytes.truncate(next(bytes.len()));
        }
        for unvouched in [Unvouched::Refuse, Unvouched::Report] {
            accepted += u32::from(check(&bytes, 0, catalogue, unvouched).is_ok());
        }
    }
    println!("{accepted} of {} changed states were accepted", 2 * rounds);
}

#[test]
fn without_a_catalogue_one_possible_end_counts() {
    let Some((blob, catalogue)) = sample() else { return };
    let inventory = Inventory { machine: catalogue.machine.clone(), ..Inventory::default() };
    let judged = judge(&blob.to_bytes(), 0, RAM_ID, 4096, &inventory, None, Unvouched::Refuse).unwrap();
    assert!(judged.sections.iter().all(|s| s.vouched != Vouched::Layout), "there is none");
    let exact: Vec<_> = judged.sections.iter().filter(|s| s.vouched == Vouched::FixedLength).collect();
    assert_eq!(exact.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["timer"]);
}

#[test]
fn a_catalogue_of_another_machine_is_no_use() {
    let Some((blob, catalogue)) = sample() else { return };
    let inventory = Inventory { machine: "pc-i440fx-2.4".to_owned(), ..Inventory::default() };
    let refused = judge(&blob.to_bytes(), 0, RAM_ID, 4096, &inventory, Some(catalogue), Unvouched::Refuse);
    assert_eq!(refused.unwrap_err().section, "catalogue");
}
