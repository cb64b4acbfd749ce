//! The single acts of the mutator, and how often each is tried.

use serde_json::Value;

use super::super::marks::{Area, Field, Kind, Unit};
use super::super::rng::Rng;
use super::{Base, Edit};

type Act = fn(&Base, &mut Rng) -> Vec<Edit>;

const ACTS: [(usize, Act); 19] = [
    (14, number),
    (6, name),
    (5, repeat),
    (5, omit),
    (5, swap),
    (5, insert_command),
    (4, insert_record),
    (3, insert_section),
    (3, nest),
    (3, add_behind),
    (2, truncate),
    (18, device_field),
    (4, device_length),
    (3, page_content),
    (3, description_text),
    (4, renumber),
    (5, omit_device_consistently),
    (5, reorder_devices_consistently),
    (3, scatter),
];

/// One act's edits; none where it found nothing to act on.
pub(super) fn act(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    rng.weighted(&ACTS).map_or_else(Vec::new, |act| act(base, rng))
}

const FIELD_AREAS: [(usize, Area); 7] = [
    (2, Area::Header),
    (3, Area::Command),
    (5, Area::Blocks),
    (5, Area::Record),
    (4, Area::RamPart),
    (8, Area::Device),
    (2, Area::End),
];
const UNIT_AREAS: [(usize, Area); 7] = [
    (1, Area::Header),
    (3, Area::Command),
    (3, Area::Blocks),
    (4, Area::Record),
    (3, Area::RamPart),
    (6, Area::Device),
    (1, Area::End),
];

fn field<'a>(base: &'a Base, rng: &mut Rng, kind: fn(&Kind) -> bool) -> Option<(Area, &'a Field)> {
    let area = *rng.weighted(&FIELD_AREAS)?;
    let fields: Vec<&Field> = base.marks.fields(area).iter().filter(|field| kind(&field.kind)).collect();
    rng.pick(&fields).map(|field| (area, *field))
}

fn unit<'a>(base: &'a Base, rng: &mut Rng) -> Option<(Area, &'a Unit)> {
    let area = *rng.weighted(&UNIT_AREAS)?;
    rng.pick(base.marks.units(area)).map(|unit| (area, unit))
}

fn hex(bytes: &[u8]) -> String {
    let shown: String = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() > 16 { format!("{shown}… ({} bytes)", bytes.len()) } else { shown }
}

fn number(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some((area, field)) = field(base, rng, |kind| *kind == Kind::Number) else { return Vec::new() };
    let peers = base.marks.fields(area).iter().filter(|peer| peer.range.len() == field.range.len());
    let peers: Vec<&Field> = peers.collect();
    let peer = rng.pick(&peers).map(|peer| base.bytes(&peer.range).to_vec());
    vec![other_number(base, rng, field, peer)]
}

/// Another number in the field's place: a limit, a neighbour, or what stands elsewhere.
fn other_number(base: &Base, rng: &mut Rng, field: &Field, peer: Option<Vec<u8>>) -> Edit {
    let old_bytes = base.bytes(&field.range);
    let width = old_bytes.len().min(8);
    let old = old_bytes.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    let bit = 1u64 << rng.below(width * 8);
    let value = match rng.below(13) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => old.wrapping_add(1),
        4 => old.wrapping_sub(1),
        5 | 6 => old ^ bit,
        7 => bit,
        8 => old.wrapping_add(0x1000),
        9 => old.wrapping_sub(0x1000),
        10 => rng.next_u64() & 0xf,
        11 => rng.next_u64(),
        _ => peer.map_or(old ^ 1, |peer| peer.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))),
    };
    let cut = |value: u64| value.to_be_bytes().get(8 - width..).unwrap_or_default().to_vec();
    let mut new = cut(value);
    if new == old_bytes {
        new = cut(old ^ 1);
    }
    let what = format!("{} became {}", hex(old_bytes), hex(&new));
    Edit::new(field.range.clone(), new, &field.name, what)
}

fn name(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some((area, field)) = field(base, rng, |kind| matches!(kind, Kind::Name { .. })) else {
        return Vec::new();
    };
    let Kind::Name { length } = &field.kind else { return Vec::new() };
    let old = base.bytes(&field.range);
    let mut new = old.to_vec();
    let at = rng.below(new.len());
    match rng.below(7) {
        0 => new.clear(),
        1 => new.truncate(at),
        2 => new.push(0),
        3 => new.insert(at, rng.byte()),
        4 => {
            let names = base.marks.fields(area).iter().filter(|peer| matches!(peer.kind, Kind::Name { .. }));
            let names: Vec<&Field> = names.collect();
            new = rng.pick(&names).map_or_else(Vec::new, |peer| base.bytes(&peer.range).to_vec());
        }
        5 => new.resize(255, b'x'),
        _ => {
            if let Some(byte) = new.get_mut(at) {
                *byte ^= 1 << rng.below(8);
            }
        }
    }
    let count = (new.len() as u64).to_be_bytes();
    let mut bytes = count.get(8 - length.len()..).unwrap_or_default().to_vec();
    bytes.extend_from_slice(&new);
    let what = format!("{:?} became {:?}", String::from_utf8_lossy(old), String::from_utf8_lossy(&new));
    vec![Edit::new(length.start..field.range.end, bytes, &field.name, what)]
}

fn repeat(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let (Some((_, from)), Some((_, to))) = (unit(base, rng), unit(base, rng)) else { return Vec::new() };
    let at = if rng.one_in(2) { from.range.end } else { to.range.start };
    vec![Edit::new(at..at, base.bytes(&from.range).to_vec(), &from.name, format!("again at {at}"))]
}

fn omit(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some((_, unit)) = unit(base, rng) else { return Vec::new() };
    vec![Edit::new(unit.range.clone(), Vec::new(), &unit.name, "left out")]
}

fn swap(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some((area, first)) = unit(base, rng) else { return Vec::new() };
    let other =
        if rng.one_in(3) { unit(base, rng).map(|(_, unit)| unit) } else { rng.pick(base.marks.units(area)) };
    let Some(second) = other else { return Vec::new() };
    let overlap = first.range.start < second.range.end && second.range.start < first.range.end;
    if overlap {
        return Vec::new();
    }
    let edit = |at: &Unit, by: &Unit| {
        let what = format!("replaced by {}", by.name);
        Edit::new(at.range.clone(), base.bytes(&by.range).to_vec(), &at.name, what)
    };
    vec![edit(first, second), edit(second, first)]
}

fn command(number: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    [&[8][..], &number.to_be_bytes(), &length.to_be_bytes(), payload].concat()
}

fn insert_command(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some((_, before)) = unit(base, rng) else { return Vec::new() };
    let number = u16::try_from(rng.below(13)).unwrap_or(0);
    let honest: &[u8] = match number {
        2 => &[0, 0, 0, 2],
        3 if rng.one_in(2) => &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0],
        6 => {
            &[0, 6, b'p', b'c', b'.', b'r', b'a', b'm', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0]
        }
        7 => &[0, 0, 0, 1],
        10 => &[6, b'p', b'c', b'.', b'r', b'a', b'm'],
        _ => &[],
    };
    let mut bytes = command(number, honest);
    if number == 7 {
        bytes.push(0);
    }
    if rng.one_in(4) {
        let at = 3 + rng.below(2);
        bytes[at] ^= 1 << rng.below(8);
    }
    let at = before.range.start;
    vec![Edit::new(at..at, bytes, &format!("command {number}"), format!("put before {}", before.name))]
}

fn insert_record(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    const FLAGS: [u64; 12] =
        [0x002, 0x008, 0x008, 0x022, 0x028, 0x004, 0x010, 0x030, 0x040, 0x080, 0x200, 0x400];
    let (Some(before), Some((block, length))) =
        (rng.pick(base.marks.units(Area::Record)), rng.pick(&base.marks.blocks))
    else {
        return Vec::new();
    };
    let flags = *rng.pick(&FLAGS).unwrap_or(&2);
    let pages = usize::try_from(length / 4096).unwrap_or(1);
    let page = match rng.below(6) {
        0 => *length,
        1 => u64::MAX << 12,
        _ => rng.below(pages) as u64 * 4096,
    };
    let mut bytes = (page | flags).to_be_bytes().to_vec();
    if flags & 0x20 == 0 && flags & 0x04a != 0 {
        bytes.push(u8::try_from(block.len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(block);
    }
    match flags & 0x04a {
        0x002 => bytes.push(if rng.one_in(4) { rng.byte() } else { 0 }),
        0x008 => bytes.extend(std::iter::repeat_n(rng.byte(), 4096)),
        0x040 => bytes.extend([1, 0, 3, 4, 1, 0xaa]),
        _ => {}
    }
    let at = before.range.start;
    let what = format!("put before {}: page {page:#x}, flags {flags:#x}", before.name);
    vec![Edit::new(at..at, bytes, "record", what)]
}

/// A section that nobody enrolled, at the top level or in the middle of something.
fn insert_section(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    const NAMES: [&str; 6] = ["ide", "dirty-bitmap", "block", "slirp", "timer", "ram"];
    let Some((_, before)) = unit(base, rng) else { return Vec::new() };
    let name = *rng.pick(&NAMES).unwrap_or(&"ram");
    let kind = u8::try_from(1 + rng.below(7)).unwrap_or(4);
    let id = [0, 0, 0, rng.byte()];
    let mut bytes = vec![kind];
    bytes.extend(id);
    if kind == 1 || kind == 4 {
        bytes.push(u8::try_from(name.len()).unwrap_or(0));
        bytes.extend(name.as_bytes());
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
    }
    bytes.extend(std::iter::repeat_n(0, rng.below(32)));
    bytes.push(0x7e);
    bytes.extend(id);
    let at = before.range.start;
    vec![Edit::new(
        at..at,
        bytes,
        &format!("section {name}"),
        format!("type {kind}, put before {}", before.name),
    )]
}

/// A run of sections inside a PACKAGED command.
fn nest(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let area = if rng.one_in(3) { Area::RamPart } else { Area::Device };
    let units = base.marks.units(area);
    let first = rng.below(units.len());
    let last = (first + rng.below(4)).min(units.len().saturating_sub(1));
    let (Some(first), Some(last)) = (units.get(first), units.get(last)) else { return Vec::new() };
    let range = first.range.start..last.range.end;
    let inner = base.bytes(&range);
    let end: &[u8] = if rng.one_in(2) { &[0] } else { &[] };
    let size = u32::try_from(inner.len() + end.len()).unwrap_or(u32::MAX);
    let bytes = [&command(7, &size.to_be_bytes())[..], inner, end].concat();
    vec![Edit::new(range, bytes, &first.name, format!("packaged, up to {}", last.name))]
}

fn add_behind(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let end = base.stream.len();
    let (bytes, what) = match rng.below(4) {
        0 => (vec![0], "an end mark".to_owned()),
        1 => (base.stream.clone(), "the whole stream again".to_owned()),
        2 => {
            let Some(unit) = rng.pick(base.marks.units(Area::Device)) else { return Vec::new() };
            (base.bytes(&unit.range).to_vec(), format!("{} again", unit.name))
        }
        _ => ((0..=rng.below(64)).map(|_| rng.byte()).collect(), "random bytes".to_owned()),
    };
    vec![Edit::new(end..end, bytes, "behind the description", what)]
}

fn truncate(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let end = base.stream.len();
    let at = match unit(base, rng) {
        Some((_, unit)) if rng.one_in(2) => unit.range.end,
        _ => rng.below(end),
    };
    vec![Edit::new(at..end, Vec::new(), base.marks.name_of(at).unwrap_or("stream"), "cut off from here")]
}

/// A value of device state.
fn device_field(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    // A device with many fields must not hide the others.
    let Some(section) = rng.pick(base.marks.units(Area::Device)) else { return Vec::new() };
    let inside = |field: &&Field| section.range.contains(&field.range.start);
    let fields: Vec<&Field> = base.marks.fields(Area::Payload).iter().filter(inside).collect();
    let Some(field) = rng.pick(&fields) else { return Vec::new() };
    if field.kind == Kind::Number {
        return vec![other_number(base, rng, field, None)];
    }
    vec![one_byte(base, rng, field)]
}

fn one_byte(base: &Base, rng: &mut Rng, field: &Field) -> Edit {
    // What matters is mostly at the front.
    let reach = if rng.one_in(2) { field.range.len().min(64) } else { field.range.len() };
    let inside = rng.below(reach);
    let at = field.range.start + inside;
    let old = base.stream.get(at).copied().unwrap_or(0);
    let random = rng.byte();
    let new = *rng.pick(&[0, 0xff, old ^ 1, old ^ 0x80, old.wrapping_add(1), random]).unwrap_or(&0);
    let new = if new == old { !old } else { new };
    let what = format!("byte {inside}: {old:02x} became {new:02x}");
    Edit::new(at..at + 1, vec![new], &field.name, what)
}

/// Bytes put into, or taken from, device state.
fn device_length(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some(field) = rng.pick(base.marks.fields(Area::Payload)) else { return Vec::new() };
    if rng.one_in(2) {
        let bytes: Vec<u8> = (0..=rng.below(16)).map(|_| rng.byte()).collect();
        let what = format!("{} put before it", hex(&bytes));
        return vec![Edit::new(field.range.start..field.range.start, bytes, &field.name, what)];
    }
    vec![Edit::new(field.range.clone(), Vec::new(), &field.name, "left out")]
}

/// Legal: memory may hold anything.
fn page_content(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let pages = base.marks.fields(Area::Record).iter().filter(|field| field.range.len() == 4096);
    let pages: Vec<&Field> = pages.collect();
    rng.pick(&pages).map_or_else(Vec::new, |page| vec![one_byte(base, rng, page)])
}

fn description_text(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let range = &base.marks.description;
    let at = range.start + rng.below(range.len());
    let old = base.stream.get(at).copied().unwrap_or(b' ');
    let new = if old.is_ascii_digit() && rng.one_in(2) {
        b'0' + (old - b'0' + 1) % 10
    } else {
        *rng.pick(b" 0\"{}[],x\\\x00\xff").unwrap_or(&b' ')
    };
    vec![Edit::new(at..at + 1, vec![new], "description: text", format!("byte {old:02x} became {new:02x}"))]
}

/// Legal where the number is not taken: ids are the sender's choice.
fn renumber(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let Some(section) = rng.pick(base.marks.units(Area::Device)) else { return Vec::new() };
    let id = if rng.one_in(4) { rng.next_u64() } else { 200 + rng.below(50) as u64 };
    let id = id.to_be_bytes().get(4..).unwrap_or_default().to_vec();
    let edit =
        |at: usize| Edit::new(at..at + 4, id.clone(), &section.name, format!("renumbered {}", hex(&id)));
    vec![edit(section.range.start + 1), edit(section.range.end - 4)]
}

fn described(base: &Base) -> Vec<Value> {
    base.description["devices"].as_array().cloned().unwrap_or_default()
}

/// The description with another list of devices, and its length.
fn redescribe(base: &Base, devices: Vec<Value>, what: &str) -> Edit {
    let mut description = base.description.clone();
    description["devices"] = devices.into();
    let text = description.to_string();
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let bytes = [&length.to_be_bytes()[..], text.as_bytes()].concat();
    let range = base.marks.description.start - 4..base.marks.description.end;
    Edit::new(range, bytes, "description: devices", what)
}

fn omit_device_consistently(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let sections = base.marks.units(Area::Device);
    let index = rng.below(sections.len());
    let Some(section) = sections.get(index) else { return Vec::new() };
    let mut devices = described(base);
    if index >= devices.len() {
        return Vec::new();
    }
    devices.remove(index);
    vec![
        Edit::new(section.range.clone(), Vec::new(), &section.name, "left out"),
        redescribe(base, devices, "consistently"),
    ]
}

fn reorder_devices_consistently(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let sections = base.marks.units(Area::Device);
    let (first, second) = (rng.below(sections.len()), rng.below(sections.len()));
    let (Some(a), Some(b)) = (sections.get(first), sections.get(second)) else { return Vec::new() };
    let mut devices = described(base);
    if first == second || first.max(second) >= devices.len() {
        return Vec::new();
    }
    devices.swap(first, second);
    let edit = |at: &Unit, by: &Unit| {
        let what = format!("replaced by {}", by.name);
        Edit::new(at.range.clone(), base.bytes(&by.range).to_vec(), &at.name, what)
    };
    vec![edit(a, b), edit(b, a), redescribe(base, devices, "consistently")]
}

/// Without regard for structure.
fn scatter(base: &Base, rng: &mut Rng) -> Vec<Edit> {
    let at = rng.below(base.stream.len());
    let field = base.marks.name_of(at).unwrap_or("stream").to_owned();
    let old = base.stream.get(at).copied().unwrap_or(0);
    let new = old ^ (1 << rng.below(8));
    let what = format!("{old:02x} became {new:02x}");
    match rng.below(4) {
        0 => vec![Edit::new(at..at + 1, Vec::new(), &field, "a byte left out")],
        1 => vec![Edit::new(at..at, vec![rng.byte()], &field, "a byte put in")],
        _ => vec![Edit::new(at..at + 1, vec![new], &field, what)],
    }
}
