//! Where the fields of a good stream are, and what it is made of: what a mutator needs to hit something.
//!
//! The outer grammar comes from the parser's events; the fields inside device state from the description at the
//! stream's end. That is no authority on a hostile stream, but this one is our own recording.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use wire::qemu::device::DeviceState;
use wire::qemu::{Event, Parser, ParserOptions, Part, printable};

const PAGE_SIZE_BYTES: u32 = 4096;
const RAM_CONTINUE: u64 = 0x20;
/// Type byte, type byte and length before the description.
const DESCRIPTION_HEADER_BYTES: usize = 6;
const FOOTER_BYTES: usize = 5;

/// What a field or unit belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    /// Magic, version, configuration.
    Header,
    /// Commands.
    Command,
    /// Start of the RAM section, and the block list.
    Blocks,
    /// Records of the RAM section.
    Record,
    /// Heads, end words and footers of the RAM section's parts; as units, the whole parts.
    RamPart,
    /// Heads and footers of device sections; as units, the whole sections.
    Device,
    /// Device state.
    Payload,
    /// End mark and description.
    End,
}

/// What can be put in a field's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Another number of the same width.
    Number,
    /// Another name, whose length stands in these bytes before it.
    Name {
        /// Where the length is.
        length: Range<usize>,
    },
    /// Other bytes.
    Bytes,
}

/// A field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name, with a path.
    pub name: String,
    /// Where it is.
    pub range: Range<usize>,
    /// What it is.
    pub kind: Kind,
}

/// Something that can be left out, repeated, or moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub range: Range<usize>,
}

/// The marks of one stream.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    fields: BTreeMap<Area, Vec<Field>>,
    units: BTreeMap<Area, Vec<Unit>>,
    /// Names and lengths of the blocks.
    pub blocks: Vec<(Vec<u8>, u64)>,
    /// End of the configuration section.
    pub configuration_end: usize,
    /// First device section.
    pub devices_begin: usize,
    /// Where the end mark is.
    pub end_mark: usize,
    /// The description's text.
    pub description: Range<usize>,
}

impl Marks {
    /// The marks of a complete, good stream.
    pub fn of(stream: &[u8]) -> Result<Self> {
        let mut builder = Builder { stream, marks: Self::default(), open_part: 0, part_name: String::new() };
        let options = ParserOptions {
            page_size_bytes: PAGE_SIZE_BYTES,
            return_path_required: false,
            ..ParserOptions::default()
        };
        let mut parser = Parser::new(options);
        let mut events = |at: u64, event: Event<'_>| {
            builder.event(usize::try_from(at).unwrap_or(usize::MAX), &event);
            Ok(())
        };
        parser.feed(stream, &mut events).map_err(|violation| anyhow!("marking a stream: {violation}"))?;
        let ram_id = parser.ram_id().context("the stream has no RAM section")?;
        builder.devices(ram_id)?;
        Ok(builder.marks)
    }

    /// The fields of an area.
    #[must_use]
    pub fn fields(&self, area: Area) -> &[Field] {
        self.fields.get(&area).map_or(&[], Vec::as_slice)
    }

    /// The units of an area.
    #[must_use]
    pub fn units(&self, area: Area) -> &[Unit] {
        self.units.get(&area).map_or(&[], Vec::as_slice)
    }

    /// The name of the field at this offset.
    #[must_use]
    pub fn name_of(&self, offset: usize) -> Option<&str> {
        let mut fields = self.fields.values().flatten();
        fields.find(|field| field.range.contains(&offset)).map(|field| field.name.as_str())
    }
}

struct Builder<'a> {
    stream: &'a [u8],
    marks: Marks,
    open_part: usize,
    part_name: String,
}

impl Builder<'_> {
    fn field(&mut self, area: Area, name: &str, range: Range<usize>, kind: Kind) {
        self.marks.fields.entry(area).or_default().push(Field { name: name.to_owned(), range, kind });
    }

    fn number(&mut self, area: Area, name: &str, at: usize, width: usize) -> usize {
        self.field(area, name, at..at + width, Kind::Number);
        at + width
    }

    /// A name behind its length; gives where it ends.
    fn name(&mut self, area: Area, name: &str, at: usize, width: usize, length: usize) -> usize {
        let begin = at + width;
        self.number(area, &format!("{name} length"), at, width);
        self.field(area, name, begin..begin + length, Kind::Name { length: at..begin });
        begin + length
    }

    fn unit(&mut self, area: Area, name: &str, range: Range<usize>) {
        self.marks.units.entry(area).or_default().push(Unit { name: name.to_owned(), range });
    }

    fn event(&mut self, at: usize, event: &Event<'_>) {
        match event {
            Event::Header => {
                let version = self.number(Area::Header, "header: magic", at, 4);
                let end = self.number(Area::Header, "header: version", version, 4);
                self.unit(Area::Header, "header", at..end);
            }
            Event::Configuration { machine } => {
                let length = self.number(Area::Header, "configuration: type", at, 1);
                let end = self.name(Area::Header, "configuration: machine", length, 4, machine.len());
                self.unit(Area::Header, "configuration", at..end);
                self.marks.configuration_end = end;
            }
            Event::OpenReturnPath => self.command(at, "OPEN_RETURN_PATH", 0),
            Event::Ping { .. } => self.command(at, "PING", 4),
            Event::SwitchoverStart => self.command(at, "SWITCHOVER_START", 0),
            Event::RamStart { .. } => {
                let end = self.section_head(Area::Blocks, "ram START", at, b"ram".len());
                self.number(Area::Blocks, "ram: total of the block list", end, 8);
                (self.open_part, self.part_name) = (at, "ram START".to_owned());
            }
            Event::Block { name, length_bytes, .. } => {
                let shown = format!("block {}", printable(name));
                let length = self.name(Area::Blocks, &format!("{shown}: name"), at, 1, name.len());
                let end = self.number(Area::Blocks, &format!("{shown}: length"), length, 8);
                self.unit(Area::Blocks, &shown, at..end);
                self.marks.blocks.push((name.to_vec(), *length_bytes));
            }
            Event::RamSection { part } => {
                self.part_name = format!("ram {}", if *part == Part::End { "END" } else { "PART" });
                self.open_part = at;
                self.number(Area::RamPart, "ram part: type", at, 1);
                self.number(Area::RamPart, "ram part: id", at + 1, 4);
            }
            Event::Page { offset, .. } => self.record(at, "page", *offset, PAGE_SIZE_BYTES as usize),
            Event::ZeroPage { offset, .. } => self.record(at, "page of zeros", *offset, 1),
            Event::RamEnd { .. } => {
                self.number(Area::RamPart, "ram part: end word", at, 8);
            }
            Event::Footer { .. } => {
                let id = self.number(Area::RamPart, "ram part: footer", at, 1);
                let end = self.number(Area::RamPart, "ram part: footer's id", id, 4);
                let (begin, name) = (self.open_part, self.part_name.clone());
                self.unit(Area::RamPart, &name, begin..end);
            }
            Event::DevicesBegin => self.marks.devices_begin = at,
            _ => {}
        }
    }

    fn command(&mut self, at: usize, name: &str, payload: usize) {
        self.number(Area::Command, &format!("{name}: type"), at, 1);
        self.number(Area::Command, &format!("{name}: number"), at + 1, 2);
        self.number(Area::Command, &format!("{name}: length"), at + 3, 2);
        if payload > 0 {
            self.number(Area::Command, &format!("{name}: value"), at + 5, payload);
        }
        self.unit(Area::Command, name, at..at + 5 + payload);
    }

    /// Type, id, name, instance and version; gives where they end.
    fn section_head(&mut self, area: Area, name: &str, at: usize, name_length: usize) -> usize {
        let id = self.number(area, &format!("{name}: type"), at, 1);
        let length = self.number(area, &format!("{name}: id"), id, 4);
        let instance = self.name(area, &format!("{name}: name"), length, 1, name_length);
        let version = self.number(area, &format!("{name}: instance"), instance, 4);
        self.number(area, &format!("{name}: version"), version, 4)
    }

    fn record(&mut self, at: usize, name: &str, offset: u64, content: usize) {
        let word =
            self.stream.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let mut next = self.number(Area::Record, &format!("{name}: word"), at, 8);
        if word.is_some_and(|word| word & RAM_CONTINUE == 0) {
            let length = self.stream.get(next).copied().map_or(0, usize::from);
            next = self.name(Area::Record, &format!("{name}: block"), next, 1, length);
        }
        self.field(Area::Record, &format!("{name}: content"), next..next + content, Kind::Bytes);
        self.unit(Area::Record, &format!("{name} at {offset:#x}"), at..next + content);
    }

    fn devices(&mut self, ram_id: u32) -> Result<()> {
        let begin = self.marks.devices_begin;
        let blob = self.stream.get(begin..).unwrap_or_default();
        let state = DeviceState::read(blob, begin as u64, ram_id, PAGE_SIZE_BYTES)
            .map_err(|violation| anyhow!("marking device state: {violation}"))?;
        let end_mark = begin + state.end_mark;
        let text = end_mark + DESCRIPTION_HEADER_BYTES..self.stream.len();
        let description: Value = serde_json::from_slice(self.stream.get(text.clone()).unwrap_or_default())
            .context("reading the description")?;
        let described = description["devices"].as_array().context("no devices are described")?;
        for (section, described) in state.sections.iter().zip(described) {
            let name = format!("{}[{}]", section.name, section.instance);
            let payload = begin + section.payload.start..begin + section.payload.end;
            self.section_head(Area::Device, &name, begin + section.start, section.name.len());
            self.payload(&name, described, payload.clone());
            self.number(Area::Device, &format!("{name}: footer"), payload.end, 1);
            self.number(Area::Device, &format!("{name}: footer's id"), payload.end + 1, 4);
            self.unit(Area::Device, &name, begin + section.start..payload.end + FOOTER_BYTES);
        }
        self.number(Area::End, "end mark", end_mark, 1);
        self.number(Area::End, "description: type", end_mark + 1, 1);
        self.number(Area::End, "description: length", end_mark + 2, 4);
        self.field(Area::End, "description: text", text.clone(), Kind::Bytes);
        self.unit(Area::End, "end mark", end_mark..end_mark + 1);
        self.unit(Area::End, "description", end_mark + 1..text.end);
        (self.marks.end_mark, self.marks.description) = (end_mark, text);
        Ok(())
    }

    fn payload(&mut self, name: &str, described: &Value, payload: Range<usize>) {
        let mut walk = Walk { at: payload.start, end: payload.end, found: Vec::new() };
        walk.level(name, described);
        let (rest, found) = (walk.at.min(payload.end)..payload.end, walk.found);
        for (name, range) in found {
            // Up to eight bytes are a number to whoever reads them.
            let kind = if range.len() <= 8 { Kind::Number } else { Kind::Bytes };
            self.field(Area::Payload, &name, range, kind);
        }
        if !rest.is_empty() {
            self.field(Area::Payload, &format!("{name}: undescribed"), rest, Kind::Bytes);
        }
    }
}

/// A walk through a description, side by side with the bytes.
struct Walk {
    at: usize,
    end: usize,
    found: Vec<(String, Range<usize>)>,
}

impl Walk {
    fn level(&mut self, path: &str, level: &Value) {
        for field in level["fields"].as_array().into_iter().flatten() {
            self.field(path, field);
        }
        for subsection in level["subsections"].as_array().into_iter().flatten() {
            let name = subsection["vmsd_name"].as_str().unwrap_or_default();
            // Type, length, name, version.
            for (part, width) in [("type", 1), ("name length", 1), ("name", name.len()), ("version", 4)] {
                self.take(&format!("{path}/{name} {part}"), width);
            }
            self.level(&format!("{path}/{name}"), subsection);
        }
    }

    fn field(&mut self, path: &str, field: &Value) {
        let number = |key: &str| field[key].as_u64().and_then(|n| usize::try_from(n).ok());
        let (size, count) = (number("size").unwrap_or(0), number("array_len").unwrap_or(1));
        let name = format!("{path}: {}", field["name"].as_str().unwrap_or("unnamed"));
        for _ in 0..count {
            let begin = self.at;
            if field["struct"].is_object() {
                self.level(&name, &field["struct"]);
            }
            let left = (begin + size).saturating_sub(self.at);
            self.take(&name, left);
            // The size is what the reader goes by, whatever its parts add up to.
            self.at = (begin + size).min(self.end);
        }
    }

    fn take(&mut self, name: &str, width: usize) {
        let end = self.at.saturating_add(width);
        if width > 0 && end <= self.end {
            self.found.push((name.to_owned(), self.at..end));
        }
        self.at = end.min(self.end);
    }
}
