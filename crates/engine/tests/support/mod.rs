//! Streams for tests: recorded from the QEMU of this machine, from the corpus where it is there, or made by hand;
//! and the hand-made violations of each row of the table of what stock QEMU accepts.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use wire::qemu::device::DeviceState;
use wire::qemu::{Event, Parser, ParserOptions, Part};

pub const RETURN_PATH: [u8; 14] = [8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 0, 0, 0, 1];

/// A named stream.
pub struct Sample {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// The plain pre-copy main channels of the corpus; nothing when it is not there.
pub fn corpus() -> Vec<Sample> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let Ok(entries) = std::fs::read_dir(&root) else { return Vec::new() };
    let mut samples: Vec<_> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            // Pages are elsewhere (multifd), or the order is another (post-copy): other issues' grammars.
            if name.contains("mfd") || name.contains("postcopy") {
                return None;
            }
            let gz = entry.path().join("ch0.fwd.gz");
            let mut bytes = Vec::new();
            if let Ok(file) = std::fs::File::open(&gz) {
                flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
            } else {
                let file = std::fs::File::open(entry.path().join("ch0.fwd.xz")).unwrap();
                xz2::read::XzDecoder::new(file).read_to_end(&mut bytes).unwrap();
            }
            Some(Sample { name, bytes })
        })
        .collect();
    samples.sort_by(|a, b| a.name.cmp(&b.name));
    samples
}

pub const QEMU: &str = "qemu-system-x86_64";

/// The QEMU arguments of the VM that tests record and receive: paused, bare.
pub fn qemu_args(machine: &str, memory_mib: u32) -> Vec<String> {
    let memory = memory_mib.to_string();
    let args = [
        "-accel",
        "tcg",
        "-machine",
        machine,
        "-m",
        &memory,
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-no-user-config",
    ];
    args.iter().map(|a| (*a).to_owned()).collect()
}

/// Records a fresh, paused VM's stream; nothing when there is no QEMU.
pub fn record(machine: &str, memory_mib: u32) -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stream");
    let mut qemu = Command::new(QEMU)
        .args(qemu_args(machine, memory_mib))
        .args(["-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut to_qemu = qemu.stdin.take().unwrap();
    let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
    // QEMU may say that it is done before `cat` is: the name appears when the file is whole.
    let uri = format!("exec:cat > {0}.part && mv {0}.part {0}", file.display());
    let migrate = serde_json::json!({"execute": "migrate", "arguments": {"uri": uri}, "id": 2});
    writeln!(to_qemu, r#"{{"execute":"qmp_capabilities","id":0}}"#).unwrap();
    let events = r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]},"id":1}"#;
    writeln!(to_qemu, "{events}\n{migrate}").unwrap();
    let done = lines.by_ref().map_while(Result::ok).find(|line| {
        line.contains("\"MIGRATION\"") && (line.contains("completed") || line.contains("failed"))
    });
    writeln!(to_qemu, r#"{{"execute":"quit"}}"#).unwrap();
    drop(to_qemu);
    lines.for_each(drop);
    qemu.wait().unwrap();
    assert!(done.is_some_and(|line| line.contains("completed")), "QEMU could not record its stream");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !file.exists() {
        assert!(std::time::Instant::now() < deadline, "QEMU's stream was never written");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Some(std::fs::read(&file).unwrap())
}

/// The same stream as a source with its return path on would send it.
pub fn with_return_path(stream: &[u8]) -> Vec<u8> {
    let marks = Marks::of(stream);
    if stream[marks.configuration_end..].starts_with(&RETURN_PATH) {
        return stream.to_vec();
    }
    splice(stream, marks.configuration_end, 0, &RETURN_PATH)
}

/// A small stream, made by hand: two blocks of 8 and 2 pages, four devices.
pub fn handmade() -> Vec<u8> {
    let mut s = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec();
    s.extend_from_slice(&RETURN_PATH);
    s.extend_from_slice(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    s.extend_from_slice(&((10u64 * 4096) | 4).to_be_bytes());
    for (name, pages) in [("pc.ram", 8u64), ("pc.rom", 2)] {
        s.push(name.len() as u8);
        s.extend_from_slice(name.as_bytes());
        s.extend_from_slice(&(pages * 4096).to_be_bytes());
    }
    let eos = |s: &mut Vec<u8>| {
        s.extend_from_slice(&16u64.to_be_bytes());
        s.extend_from_slice(&[0x7e, 0, 0, 0, 1]);
    };
    eos(&mut s);
    s.extend_from_slice(&[2, 0, 0, 0, 1]);
    for page in 0..8u64 {
        let named = page == 0;
        let flags = if page == 3 { 8u64 } else { 2 } | if named { 0 } else { 0x20 };
        s.extend_from_slice(&((page * 4096) | flags).to_be_bytes());
        if named {
            s.extend_from_slice(b"\x06pc.ram");
        }
        if page == 3 {
            s.extend(std::iter::repeat_n(0xa5, 4096));
        } else {
            s.push(0);
        }
    }
    eos(&mut s);
    s.extend_from_slice(&[8, 0, 11, 0, 0, 3, 0, 0, 0, 1]);
    for page in 0..2u64 {
        s.extend_from_slice(&((page * 4096) | 2).to_be_bytes());
        s.extend_from_slice(b"\x06pc.rom\0");
    }
    eos(&mut s);
    let devices = [
        ("timer", 0u32, 2u32, 24usize),
        ("cpu", 12, 12, 60),
        ("0000:00:01.0/virtio-net", 30, 11, 200),
        ("globalstate", 41, 1, 104),
    ];
    for (name, id, version, len) in devices {
        s.push(4);
        s.extend_from_slice(&id.to_be_bytes());
        s.push(name.len() as u8);
        s.extend_from_slice(name.as_bytes());
        s.extend_from_slice(&[0, 0, 0, 0]);
        s.extend_from_slice(&version.to_be_bytes());
        s.extend((0..len).map(|i| (i % 100) as u8));
        s.push(0x7e);
        s.extend_from_slice(&id.to_be_bytes());
    }
    let described: Vec<_> = devices
        .iter()
        .map(|(name, _, version, len)| {
            serde_json::json!({"name": name, "instance_id": 0, "vmsd_name": name, "version": version,
                "fields": [{"name": "a", "type": "buffer", "size": len}]})
        })
        .collect();
    push_description(&mut s, &serde_json::json!({"page_size": 4096, "devices": described}));
    s
}

fn push_description(stream: &mut Vec<u8>, description: &serde_json::Value) {
    let json = description.to_string();
    stream.extend_from_slice(&[0, 6]);
    stream.extend_from_slice(&(json.len() as u32).to_be_bytes());
    stream.extend_from_slice(json.as_bytes());
}

/// Replaces `len` bytes at `at`.
pub fn splice(stream: &[u8], at: usize, len: usize, with: &[u8]) -> Vec<u8> {
    [&stream[..at], with, &stream[at + len..]].concat()
}

/// Where things are in a stream.
#[derive(Debug, Default)]
pub struct Marks {
    pub configuration_end: usize,
    pub ram_id: u32,
    pub ram_start: usize,
    pub blocks: Vec<(usize, String, u64)>,
    /// The first PART, and its payload's first record.
    pub part: usize,
    pub end: usize,
    pub end_eos: usize,
    pub pages: Vec<(usize, u64)>,
    pub zeros: Vec<(usize, u64)>,
    pub devices: usize,
    /// Start, id and payload of each device section, absolute.
    pub sections: Vec<(usize, u32, String, std::ops::Range<usize>)>,
    pub end_mark: usize,
}

impl Marks {
    pub fn of(stream: &[u8]) -> Self {
        let mut marks = Self::default();
        let mut parser =
            Parser::new(ParserOptions { return_path_required: false, ..ParserOptions::default() });
        let mut parts = Vec::new();
        parser
            .feed(stream, &mut |at: u64, event: Event<'_>| {
                let at = at as usize;
                match event {
                    Event::Configuration { machine } => marks.configuration_end = at + 5 + machine.len(),
                    Event::RamStart { id } => (marks.ram_start, marks.ram_id) = (at, id),
                    Event::Block { name, length_bytes, .. } => {
                        marks.blocks.push((at, String::from_utf8(name.to_vec()).unwrap(), length_bytes));
                    }
                    Event::RamSection { part: Part::Iterate } => parts.push(at),
                    Event::RamSection { .. } => marks.end = at,
                    Event::Page { offset, .. } => marks.pages.push((at, offset)),
                    Event::ZeroPage { offset, .. } => marks.zeros.push((at, offset)),
                    Event::RamEnd { part: Part::End } => marks.end_eos = at,
                    Event::DevicesBegin => marks.devices = at,
                    _ => {}
                }
                Ok(())
            })
            .unwrap();
        marks.part = parts[0];
        let blob = &stream[marks.devices..];
        let base = marks.devices;
        let state = DeviceState::read(blob, base as u64, marks.ram_id, 4096).unwrap();
        marks.end_mark = base + state.end_mark;
        for s in &state.sections {
            let payload = base + s.payload.start..base + s.payload.end;
            marks.sections.push((base + s.start, s.id, s.name.to_owned(), payload));
        }
        marks
    }

    fn section(&self, name: &str) -> &(usize, u32, String, std::ops::Range<usize>) {
        self.sections.iter().find(|(_, _, n, _)| n == name).unwrap()
    }
}

/// A violation of one row of the table, and the rule that must refuse it.
pub struct Mutation {
    pub row: &'static str,
    pub rule: &'static str,
    pub bytes: Vec<u8>,
}

/// Rows whose stream has no end that a source could see: they run into a budget instead.
pub const ENDLESS: [&str; 7] = [
    "deep description",
    "11 absent",
    "11 other bytes",
    "11 other type",
    "NUL in the description",
    "truncated",
    "stops in the ram section",
];
/// Rows with bytes behind a good end, which spoil the source's proof.
pub const MORE_BEHIND_THE_END: [&str; 2] = ["12", "two streams"];

fn description(stream: &[u8], marks: &Marks) -> serde_json::Value {
    serde_json::from_slice(&stream[marks.end_mark + 6..]).unwrap()
}

/// The stream with one more change to its description, so that the lie is consistent.
fn redescribed(stream: &[u8], end_mark: usize, description: &serde_json::Value) -> Vec<u8> {
    let mut bytes = stream[..end_mark].to_vec();
    push_description(&mut bytes, description);
    bytes
}

/// Every row of the table that the outer grammar can see, made from a good stream with a return path.
pub fn mutations(stream: &[u8]) -> Vec<Mutation> {
    let marks = Marks::of(stream);
    let mut all = Vec::new();
    let mut add = |row, rule, bytes: Vec<u8>| all.push(Mutation { row, rule, bytes });
    header_rows(stream, &marks, &mut add);
    command_rows(stream, &marks, &mut add);
    ram_rows(stream, &marks, &mut add);
    page_rows(stream, &marks, &mut add);
    device_rows(stream, &marks, &mut add);
    description_rows(stream, &marks, &mut add);
    all
}

type Add<'a> = &'a mut dyn FnMut(&'static str, &'static str, Vec<u8>);

fn header_rows(stream: &[u8], marks: &Marks, add: Add<'_>) {
    let machine_len = marks.configuration_end - 13;
    let machine = &stream[13..marks.configuration_end];
    let named = |name: &[u8]| {
        let with = [&(name.len() as u32).to_be_bytes()[..], name].concat();
        splice(stream, 9, 4 + machine_len, &with)
    };
    add("2", "INV-S10", [&stream[..marks.ram_start], &[0]].concat());
    add("3", "INV-S9", [&stream[..marks.ram_start], &stream[marks.devices..]].concat());
    add("7", "INV-S9", splice(stream, marks.ram_start, 0, &stream[marks.devices..marks.end_mark]));
    add("8", "INV-H2", named(b"pc"));
    add("9", "INV-H2", named(b""));
    add("10", "INV-H2", named(&[machine, b"\0junk"].concat()));
    add("49", "INV-H2", splice(stream, 8, 5 + machine_len, &[]));
    add("50", "INV-H1", splice(stream, 7, 1, &[2]));
    add("cpr", "INV-T4", splice(stream, 0, 4, b"QCPR"));
    add("unknown section type", "INV-S1", splice(stream, marks.ram_start, 0, &[0x55]));
    add("a footer out of place", "INV-S1", splice(stream, marks.ram_start, 0, &[0x7e, 0, 0, 0, 1]));
    let capabilities = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared";
    add("config subsection", "INV-H3", splice(stream, marks.configuration_end, 0, capabilities));
    let uuid = b"\x05\x12configuration/uuid\0\0\0\x01................";
    add("another VM's uuid", "INV-H4", splice(stream, marks.configuration_end, 0, uuid));
    add("no return path", "INV-T3", splice(stream, marks.configuration_end, RETURN_PATH.len(), &[]));
}

fn command_rows(stream: &[u8], marks: &Marks, add: Add<'_>) {
    let mut at_start =
        |row, rule, command: &[u8]| add(row, rule, splice(stream, marks.ram_start, 0, command));
    at_start("28", "INV-C2", &[8, 0, 8, 0, 0]);
    at_start("29", "INV-C3", &[8, 0, 3, 0, 0]);
    at_start("30", "INV-C3", &[8, 0, 4, 0, 0]);
    at_start("32", "INV-C9", &[8, 0, 11, 0, 0]);
    at_start("33", "INV-C3", &[8, 0, 7, 0, 4, 0, 0, 0, 1, 0]);
    at_start("47", "INV-C8", &[8, 0, 10, 0, 2, 1, b'x']);
    at_start("48", "INV-C8", &[8, 0, 9, 0, 0]);
    at_start("second ping", "INV-C1", &RETURN_PATH[5..]);
    add("31", "INV-C4", splice(stream, marks.configuration_end, RETURN_PATH.len(), &RETURN_PATH[5..]));
    add("28 at the end", "INV-C2", splice(stream, marks.end_mark, 0, &[8, 0, 8, 0, 0]));
}

fn ram_rows(stream: &[u8], marks: &Marks, add: Add<'_>) {
    let id = marks.ram_id.to_be_bytes();
    let part = [&[2][..], &id, &16u64.to_be_bytes(), &[0x7e], &id].concat();
    let (list, (_, last_name, last_len)) = (marks.blocks[0].0 - 8, marks.blocks.last().unwrap());
    let list_end = marks.blocks.last().unwrap().0 + 1 + last_name.len() + 8;
    let first_end = marks.blocks.get(1).map_or(list_end, |b| b.0);
    let total: u64 = marks.blocks.iter().map(|b| b.2).sum();
    let word = |total: u64| (total | 4).to_be_bytes();
    add("14", "INV-S9", splice(stream, marks.end_mark, 0, &part));
    add("15", "INV-S3", splice(stream, marks.ram_start, 0, &part));
    add("35", "INV-S3", splice(stream, marks.ram_start, 0, &[2, 0, 0, 0, 0]));
    add("16", "INV-R2", splice(stream, marks.part + 5, 0, &stream[list..list_end]));
    let one = [&word(marks.blocks[0].2)[..], &stream[list + 8..first_end]].concat();
    add("17", "INV-R4", splice(stream, list, list_end - list, &one));
    let resized = |total: u64, at: usize, len: u64, name: &str| {
        let bytes = splice(stream, at + 1 + name.len(), 8, &len.to_be_bytes());
        splice(&bytes, list, 8, &word(total))
    };
    let at = marks.blocks.last().unwrap().0;
    add("18", "INV-R4", resized(total + 4096, at, last_len + 4096, last_name));
    let in_part = [
        &word(last_len + 4096)[..],
        &[last_name.len() as u8],
        last_name.as_bytes(),
        &(last_len + 4096).to_be_bytes(),
    ]
    .concat();
    add("18 in a part", "INV-R2", splice(stream, marks.part + 5, 0, &in_part));
    let (first_at, first_name, first_len) = &marks.blocks[0];
    add("19", "INV-R4", resized(total - 4096, *first_at, first_len - 4096, first_name));
    add("total", "INV-R3", splice(stream, list, 8, &word(marks.blocks[0].2 - 4096)));
    let wrapping = [&[1, b'x'][..], &(u64::MAX - 4095).to_be_bytes()].concat();
    add("wrapping total", "INV-R3", splice(stream, list + 8, 0, &wrapping));
    let zero = [&[first_name.len() as u8], first_name.as_bytes(), &[0; 8]].concat();
    add("46", "INV-R4", splice(stream, list + 8, 0, &zero));
    add("block twice", "INV-R4", splice(stream, first_end, 0, &stream[list + 8..first_end]));
    add("39", "INV-S6", splice(stream, marks.part, 0, b"\x01\0\0\0\x63\x03ram\0\0\0\0\0\0\0\x04"));
    add("38", "INV-S9", splice(stream, marks.ram_start, 1, &[4]));
    add("ram version", "INV-R1", splice(stream, marks.ram_start + 16, 1, &[3]));
    add("other iterable", "INV-S8", splice(stream, marks.ram_start + 6, 3, b"rom"));
    add("26", "INV-S4", splice(stream, marks.end_eos + 8 + 4, 1, &[0x55]));
    add("no footer", "INV-S4", splice(stream, marks.end_eos + 8, 5, &[]));
    add("45", "INV-S9", splice(stream, marks.devices, 0, &part));
    add("second end", "INV-S11", splice(stream, marks.devices, 0, &splice(&part, 0, 1, &[3])));
}

fn page_rows(stream: &[u8], marks: &Marks, add: Add<'_>) {
    let name = &marks.blocks[0].1;
    let record = |word: u64, name: &str, tail: &[u8]| {
        [&word.to_be_bytes()[..], &[name.len() as u8], name.as_bytes(), tail].concat()
    };
    let mut at_part = |row, rule, bytes: &[u8]| add(row, rule, splice(stream, marks.part + 5, 0, bytes));
    at_part("13", "INV-R10", &record(2, name, &[0xaa]));
    at_part("20", "INV-R9", &record(2, "no.such", &[0]));
    at_part("21", "INV-R7", &record(marks.blocks[0].2 | 2, name, &[0]));
    at_part("offset near the top", "INV-R7", &record((u64::MAX - 4095) | 2, name, &[0]));
    at_part("22", "INV-R6", &record(10, name, &[0]));
    at_part("23", "INV-R6", &record(0x400, name, &[0]));
    at_part("25", "INV-R12", &(0x5000u64 | 0x30).to_be_bytes());
    at_part("end mark with an address", "INV-R12", &(0x5000u64 | 0x10).to_be_bytes());
    at_part("42", "INV-R6", &0x200u64.to_be_bytes());
    at_part("43", "INV-R6", &0x80u64.to_be_bytes());
    at_part("44", "INV-R6", &record(0x40, name, &[1, 0, 1, 0]));
    at_part("compressed page", "INV-R6", &record(0x100, name, &[0, 0, 0, 1, 0]));
    at_part("nothing named yet", "INV-R8", &(0x22u64).to_be_bytes());
    // A page of zeros that carries no name is left out: the record is 9 bytes.
    if let Some((at, _)) = marks.zeros.iter().find(|(at, _)| stream[at + 7] & 0x20 != 0) {
        add("page never sent", "INV-R13", splice(stream, *at, 9, &[]));
    }
}

fn device_rows(stream: &[u8], marks: &Marks, add: Add<'_>) {
    let described = description(stream, marks);
    let devices = described["devices"].as_array().unwrap();
    let index = devices.iter().position(|d| d["name"] == "globalstate").unwrap();
    let (start, id, _, payload) = marks.section("globalstate");
    let end = payload.end + 5;
    let with_devices = |bytes: &[u8], end_mark: usize, devices: Vec<serde_json::Value>| {
        let mut described = described.clone();
        described["devices"] = devices.into();
        redescribed(bytes, end_mark, &described)
    };
    let mut without = devices.clone();
    without.remove(index);
    let removed = splice(stream, *start, end - start, &[]);
    add("4/5", "INV-S10", with_devices(&removed, marks.end_mark - (end - start), without));
    add("4/5 with the old description", "INV-S10", removed);
    let mut twice = devices.clone();
    twice.push(devices[index].clone());
    let doubled = splice(stream, marks.end_mark, 0, &stream[*start..end]);
    add("6", "INV-S6", with_devices(&doubled, marks.end_mark + (end - start), twice.clone()));
    add("6 with the old description", "INV-E2", doubled);
    let mut renamed = devices.clone();
    renamed[index]["name"] = "globalstatX".into();
    add("24", "INV-S5", with_devices(&splice(stream, start + 6 + 10, 1, b"X"), marks.end_mark, renamed));
    let mut unprintable = devices.clone();
    unprintable[index]["name"] = "globalstat".into();
    add(
        "a NUL in a name",
        "INV-S5",
        with_devices(&splice(stream, start + 6 + 10, 1, &[0]), marks.end_mark, unprintable),
    );
    add("36", "INV-S8", splice(stream, *start, 1, &[1]));
    let again = [&[2][..], &id.to_be_bytes(), &stream[payload.start..end]].concat();
    add("37", "INV-S9", splice(stream, marks.end_mark, 0, &again));
    let mut version = devices.clone();
    version[index]["version"] = 0x99.into();
    add(
        "device version",
        "INV-S7",
        with_devices(&splice(stream, payload.start - 1, 1, &[0x99]), marks.end_mark, version),
    );
    add("26 of a device", "INV-D2", splice(stream, payload.end + 4, 1, &[0x77]));
    let stray = [&[0x7e][..], &id.to_be_bytes(), &[4]].concat();
    add("a second possible end", "INV-D3", splice(stream, payload.end - 50, 6, &stray));
    let ids = splice(stream, start + 1, 4, &marks.ram_id.to_be_bytes());
    add("ram's id again", "INV-S2", splice(&ids, payload.end + 1, 4, &marks.ram_id.to_be_bytes()));
    let timer = devices.iter().position(|d| d["name"] == "timer").unwrap();
    let mut longer = devices.clone();
    longer[timer]["fields"][0]["size"] = 16.into();
    longer[timer]["fields"].as_array_mut().unwrap().truncate(1);
    let (_, _, _, timer_payload) = marks.section("timer");
    let cut = timer_payload.len() - 16;
    let shorter = splice(stream, timer_payload.end - cut, cut, &[]);
    add("a shorter timer", "INV-D2", with_devices(&shorter, marks.end_mark - cut, longer));
}

fn description_rows(stream: &[u8], marks: &Marks, add: Add<'_>) {
    let at = marks.end_mark;
    let json_len = stream.len() - at - 6;
    add("11 absent", "INV-E2", stream[..=at].to_vec());
    add("11 other bytes", "INV-E2", splice(stream, at + 6, json_len, &vec![b'x'; json_len]));
    add("11 other type", "INV-E2", splice(stream, at + 1, 1, &[9]));
    add("12", "INV-E3", [stream, b"junk"].concat());
    add("two streams", "INV-E1", [stream, stream].concat());
    add("NUL in the description", "INV-E2", splice(stream, stream.len() - 1, 1, &[0]));
    let deep = "[".repeat(70);
    let deep = format!("{{\"page_size\":4096,\"configuration\":{deep}{},\"devices\":[]}}", "]".repeat(70));
    let mut bytes = stream[..at].to_vec();
    bytes.extend_from_slice(&[0, 6]);
    bytes.extend_from_slice(&(deep.len() as u32).to_be_bytes());
    bytes.extend_from_slice(deep.as_bytes());
    add("deep description", "INV-E2", bytes);
    add("truncated", "INV-E2", stream[..stream.len() - 1].to_vec());
    add("stops in the ram section", "INV-S10", stream[..marks.end].to_vec());
}
