//! The incremental parser of the main channel, up to the device state.

use super::*;

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;

const COMMAND_OPEN_RETURN_PATH: u16 = 1;
const COMMAND_PING: u16 = 2;
const COMMAND_SWITCHOVER_START: u16 = 11;

const RAM_ZERO: u64 = 0x002;
const RAM_MEM_SIZE: u64 = 0x004;
const RAM_PAGE: u64 = 0x008;
const RAM_EOS: u64 = 0x010;
const RAM_CONTINUE: u64 = 0x020;

/// Settings that come from the VM's record and the permit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParserOptions {
    /// Guest page size; a power of two.
    pub page_size_bytes: u32,
    /// Whether OPEN_RETURN_PATH must be the first command (INV-T3). Only a recording made for enrolment goes
    /// without: a migration that loses its target would leave the guest stopped on both sides.
    pub return_path_required: bool,
}

impl Default for ParserOptions {
    fn default() -> Self {
        Self { page_size_bytes: 4096, return_path_required: true }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Configuration,
    /// Between the configuration's name and whatever follows: a subsection would come here.
    AfterConfiguration {
        uuid_seen: bool,
    },
    /// Between sections.
    Top(Phase),
    /// At the start of a RAM record.
    Record(Part),
    /// Inside the block list.
    Blocks {
        total: u64,
        seen: u64,
    },
    /// Inside a page.
    PageBytes {
        part: Part,
        left: usize,
    },
    /// Before a section's footer.
    Footer(Part),
    /// Device state: opaque.
    Devices,
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Before the RAM section.
    Pre,
    /// Between START and END.
    Iterating,
    /// SWITCHOVER_START is behind: only END may follow.
    Final,
}

/// Incremental parser of a pre-copy main channel. Memory: [`MAX_ITEM_BYTES`] and the block list (at most
/// [`MAX_RAM_BLOCKS`] names).
#[derive(Debug, Clone)]
pub struct Parser {
    options: ParserOptions,
    state: State,
    /// Bytes of an item that is not complete yet.
    pending: Vec<u8>,
    /// Stream offset behind the last complete item (or piece of payload).
    validated: u64,
    return_path: bool,
    pinged: bool,
    ram_id: Option<u32>,
    block_list_done: bool,
    blocks: Blocks,
    /// Last named block: state of the channel, it survives sections.
    current: Option<usize>,
    failure: Option<Violation>,
}

/// One attempt at the item at the front of the bytes.
enum Step {
    Incomplete,
    Item(usize),
}

impl Parser {
    /// A parser at the first byte of a channel.
    #[must_use]
    pub fn new(options: ParserOptions) -> Self {
        Self {
            options,
            state: State::Header,
            pending: Vec::with_capacity(MAX_ITEM_BYTES),
            validated: 0,
            return_path: false,
            pinged: false,
            ram_id: None,
            block_list_done: false,
            blocks: Blocks::default(),
            current: None,
            failure: None,
        }
    }

    /// Everything before this offset was validated. What lies behind it and was fed is in [`Self::pending`].
    #[must_use]
    pub fn validated(&self) -> u64 {
        self.validated
    }

    /// The incomplete item at the end of what was fed; at most [`MAX_ITEM_BYTES`].
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Whether the RAM section has ended and the rest is device state.
    #[must_use]
    pub fn in_devices(&self) -> bool {
        self.state == State::Devices
    }

    /// The block list, once it is complete: what the records of every channel name their pages by.
    #[must_use]
    pub fn blocks(&self) -> Option<&Blocks> {
        self.block_list_done.then_some(&self.blocks)
    }

    /// The section id that the sender chose for `ram`.
    #[must_use]
    pub fn ram_id(&self) -> Option<u32> {
        self.ram_id
    }

    /// What was expected next, for the report on a stream that stopped too early.
    #[must_use]
    pub fn awaiting(&self) -> &'static str {
        match self.state {
            State::Header => "the header",
            State::Configuration | State::AfterConfiguration { .. } => "the configuration section",
            State::Top(Phase::Pre) => "the ram section",
            State::Top(_) => "the end of the ram section",
            State::Record(_) | State::Blocks { .. } | State::PageBytes { .. } => "ram records",
            State::Footer(_) => "a footer",
            State::Devices => "device state",
            State::Failed => "nothing, the stream was refused",
        }
    }

    /// Takes the next bytes of the channel and gives their events to `sink`, in order.
    ///
    /// # Errors
    /// The first broken rule, of the grammar or of the sink. The parser then takes nothing more: every later call
    /// gives the same error.
    pub fn feed<S: Sink + ?Sized>(&mut self, input: &[u8], sink: &mut S) -> Result<(), Violation> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.feed_inner(input, sink).inspect_err(|violation| {
            self.state = State::Failed;
            self.failure = Some(violation.clone());
        })
    }

    fn feed_inner<S: Sink + ?Sized>(&mut self, input: &[u8], sink: &mut S) -> Result<(), Violation> {
        let mut rest = input;
        while !rest.is_empty() {
            let taken = match self.state {
                State::PageBytes { part, left } => self.page_bytes(part, left, rest, sink)?,
                State::Devices => {
                    sink.event(self.validated, Event::DeviceBytes(rest))?;
                    self.validated += rest.len() as u64;
                    rest.len()
                }
                _ => self.item(rest, sink)?,
            };
            rest = rest.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    fn page_bytes<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        left: usize,
        rest: &[u8],
        sink: &mut S,
    ) -> Result<usize, Violation> {
        let piece = rest.get(..left).unwrap_or(rest);
        sink.event(self.validated, Event::PageBytes(piece))?;
        self.validated += piece.len() as u64;
        self.state = match left - piece.len() {
            0 => State::Record(part),
            left => State::PageBytes { part, left },
        };
        Ok(piece.len())
    }

    /// Completes one item from the front of `rest`; gives how many bytes of `rest` were used.
    fn item<S: Sink + ?Sized>(&mut self, rest: &[u8], sink: &mut S) -> Result<usize, Violation> {
        if self.pending.is_empty() {
            return Ok(match self.step(rest, sink)? {
                Step::Item(len) => {
                    self.validated += len as u64;
                    len
                }
                Step::Incomplete => {
                    self.hold(rest)?;
                    rest.len()
                }
            });
        }
        let held = self.pending.len();
        let room = MAX_ITEM_BYTES.saturating_sub(held);
        let taken = rest.len().min(room);
        self.pending.extend_from_slice(rest.get(..taken).unwrap_or(rest));
        let pending = std::mem::take(&mut self.pending);
        let step = self.step(&pending, sink);
        self.pending = pending;
        match step? {
            Step::Item(len) => {
                self.pending.clear();
                self.validated += len as u64;
                Ok(len.saturating_sub(held))
            }
            Step::Incomplete if taken == rest.len() => Ok(taken),
            Step::Incomplete => Err(self.oversized()),
        }
    }

    fn hold(&mut self, rest: &[u8]) -> Result<(), Violation> {
        if rest.len() > MAX_ITEM_BYTES {
            return Err(self.oversized());
        }
        self.pending.extend_from_slice(rest);
        Ok(())
    }

    fn oversized(&self) -> Violation {
        self.violation("INV-S1", "a record header", "a longer one than any that is legal")
    }

    fn violation(
        &self,
        rule: &'static str,
        expected: impl Into<String>,
        found: impl AsRef<str>,
    ) -> Violation {
        let section = match self.state {
            State::Header => "header",
            State::Configuration | State::AfterConfiguration { .. } => "configuration",
            State::Top(_) => "section header",
            State::Record(_) | State::Blocks { .. } | State::PageBytes { .. } | State::Footer(_) => "ram",
            State::Devices => "devices",
            State::Failed => "none",
        };
        Violation::new(rule, self.validated, section, expected, found)
    }

    fn step<S: Sink + ?Sized>(&mut self, bytes: &[u8], sink: &mut S) -> Result<Step, Violation> {
        let step = match self.state {
            State::Header => self.header(bytes, sink)?,
            State::Configuration => self.configuration(bytes, sink)?,
            State::AfterConfiguration { uuid_seen } => self.after_configuration(uuid_seen, bytes, sink)?,
            State::Top(phase) => self.top(phase, bytes, sink)?,
            State::Record(part) => self.record(part, bytes, sink)?,
            State::Blocks { total, seen } => self.block(total, seen, bytes, sink)?,
            State::Footer(part) => self.footer(part, bytes, sink)?,
            State::PageBytes { .. } | State::Devices | State::Failed => None,
        };
        Ok(step.map_or(Step::Incomplete, Step::Item))
    }

    fn header<S: Sink + ?Sized>(&mut self, bytes: &[u8], sink: &mut S) -> Result<Option<usize>, Violation> {
        let (Some(magic), Some(version)) = (be32(bytes, 0), be32(bytes, 4)) else { return Ok(None) };
        if magic != MAGIC || version != VERSION {
            let found = format!("magic {magic:08x}, version {version}");
            return Err(self.violation("INV-H1", "magic 5145564d, version 3", found));
        }
        sink.event(self.validated, Event::Header)?;
        self.state = State::Configuration;
        Ok(Some(8))
    }

    fn configuration<S: Sink + ?Sized>(
        &mut self,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(&kind) = bytes.first() else { return Ok(None) };
        if kind != CONFIGURATION {
            return Err(self.violation(
                "INV-H2",
                "the configuration section",
                format!("section type {kind:#04x}"),
            ));
        }
        let Some(len) = be32(bytes, 1) else { return Ok(None) };
        let len = len as usize;
        if len > MAX_MACHINE_BYTES {
            let expected = format!("a machine name of at most {MAX_MACHINE_BYTES} bytes");
            return Err(self.violation("INV-H2", expected, format!("{len} bytes")));
        }
        let Some(machine) = bytes.get(5..5 + len) else { return Ok(None) };
        sink.event(self.validated, Event::Configuration { machine })?;
        self.state = State::AfterConfiguration { uuid_seen: false };
        Ok(Some(5 + len))
    }

    /// The only subsection of the configuration that pre-copy without shared memory can have is the VM's UUID.
    fn after_configuration<S: Sink + ?Sized>(
        &mut self,
        uuid_seen: bool,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        const NAME: &[u8] = b"configuration/uuid";
        if bytes.first() != Some(&SUBSECTION) {
            self.state = State::Top(Phase::Pre);
            return self.top(Phase::Pre, bytes, sink);
        }
        let Some(&name_len) = bytes.get(1) else { return Ok(None) };
        let name_end = 2 + name_len as usize;
        let Some(name) = bytes.get(2..name_end) else { return Ok(None) };
        if name != NAME || uuid_seen {
            return Err(self.violation("INV-H3", "at most configuration/uuid, once", printable(name)));
        }
        let Some(version) = be32(bytes, name_end) else { return Ok(None) };
        if version != 1 {
            return Err(self.violation(
                "INV-H3",
                "configuration/uuid version 1",
                format!("version {version}"),
            ));
        }
        let Some(uuid) = bytes.get(name_end + 4..name_end + 20).and_then(|b| b.try_into().ok()) else {
            return Ok(None);
        };
        sink.event(self.validated, Event::ConfigurationUuid { uuid })?;
        self.state = State::AfterConfiguration { uuid_seen: true };
        Ok(Some(name_end + 20))
    }

    fn top<S: Sink + ?Sized>(
        &mut self,
        phase: Phase,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(&kind) = bytes.first() else { return Ok(None) };
        match kind {
            COMMAND => self.command(phase, bytes, sink),
            SECTION_START => self.section_start(phase, bytes, sink),
            SECTION_PART | SECTION_END => self.section_go_on(phase, kind, bytes, sink),
            SECTION_FULL if phase == Phase::Pre => {
                Err(self.violation("INV-S9", "the ram section before any device", "a device section"))
            }
            SECTION_FULL => {
                Err(self.violation("INV-S9", "the end of ram before any device", "a device section"))
            }
            SECTION_EOF => Err(self.violation("INV-S10", "the ram section and every device", "the end mark")),
            other => Err(self.violation("INV-S1", "a legal section type", format!("{other:#04x}"))),
        }
    }

    fn command<S: Sink + ?Sized>(
        &mut self,
        phase: Phase,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let (Some(command), Some(len)) = (be16(bytes, 1), be16(bytes, 3)) else { return Ok(None) };
        let expected_len = match (phase, command) {
            (Phase::Pre, COMMAND_OPEN_RETURN_PATH) if !self.return_path && !self.pinged => 0,
            (Phase::Pre, COMMAND_PING) if self.return_path && !self.pinged => 4,
            (Phase::Iterating, COMMAND_SWITCHOVER_START) => 0,
            (Phase::Pre, COMMAND_PING) if !self.pinged => {
                return Err(self.violation("INV-C4", "OPEN_RETURN_PATH before PING", "PING"));
            }
            (_, COMMAND_SWITCHOVER_START) => {
                let expected = "SWITCHOVER_START once, between the last PART and END";
                return Err(self.violation("INV-C9", expected, "it elsewhere"));
            }
            (_, 8) => return Err(self.violation("INV-C2", "no ENABLE_COLO", "ENABLE_COLO")),
            (_, 3..=7) => {
                return Err(self.violation("INV-C3", "no postcopy command", format!("command {command}")));
            }
            (_, 9 | 10) => {
                return Err(self.violation("INV-C8", "no recovery command", format!("command {command}")));
            }
            _ => {
                return Err(self.violation(
                    "INV-C1",
                    "a command legal at this point",
                    format!("command {command}, length {len}"),
                ));
            }
        };
        if len != expected_len {
            let found = format!("command {command}, length {len}");
            return Err(self.violation("INV-C1", format!("length {expected_len}"), found));
        }
        match command {
            COMMAND_OPEN_RETURN_PATH => {
                self.return_path = true;
                sink.event(self.validated, Event::OpenReturnPath)?;
                Ok(Some(5))
            }
            COMMAND_PING => {
                let Some(value) = be32(bytes, 5) else { return Ok(None) };
                if value != 1 {
                    return Err(self.violation("INV-C4", "PING 1", format!("PING {value}")));
                }
                self.pinged = true;
                sink.event(self.validated, Event::Ping { value })?;
                Ok(Some(9))
            }
            _ => {
                sink.event(self.validated, Event::SwitchoverStart)?;
                self.state = State::Top(Phase::Final);
                Ok(Some(5))
            }
        }
    }

    fn section_start<S: Sink + ?Sized>(
        &mut self,
        phase: Phase,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(header) = SectionHeader::read(bytes) else { return Ok(None) };
        if phase != Phase::Pre {
            let rule = if header.name == b"ram" { "INV-S6" } else { "INV-S8" };
            return Err(self.violation(rule, "one START, of ram", printable(header.name)));
        }
        if header.name != b"ram" {
            return Err(self.violation("INV-S8", "ram as the only iterable section", printable(header.name)));
        }
        if self.options.return_path_required && !self.return_path {
            return Err(self.violation("INV-T3", "OPEN_RETURN_PATH as the first command", "the ram section"));
        }
        if header.instance != 0 {
            return Err(self.violation("INV-S5", "ram, instance 0", format!("instance {}", header.instance)));
        }
        if header.version != 4 {
            return Err(self.violation("INV-R1", "ram, version 4", format!("version {}", header.version)));
        }
        sink.event(self.validated, Event::RamStart { id: header.id })?;
        self.ram_id = Some(header.id);
        self.state = State::Record(Part::Start);
        Ok(Some(header.len))
    }

    fn section_go_on<S: Sink + ?Sized>(
        &mut self,
        phase: Phase,
        kind: u8,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(id) = be32(bytes, 1) else { return Ok(None) };
        if self.ram_id != Some(id) {
            return Err(self.violation(
                "INV-S3",
                "the id of a section that START opened",
                format!("id {id}"),
            ));
        }
        let part = if kind == SECTION_END { Part::End } else { Part::Iterate };
        if phase == Phase::Final && part == Part::Iterate {
            return Err(self.violation("INV-S9", "END after SWITCHOVER_START", "PART"));
        }
        sink.event(self.validated, Event::RamSection { part })?;
        self.state = State::Record(part);
        Ok(Some(5))
    }

    fn record<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(word) = be64(bytes, 0) else { return Ok(None) };
        let mask = u64::from(self.options.page_size_bytes) - 1;
        let (high, flags) = (word & !mask, word & mask);
        if part == Part::Start && !self.block_list_done && flags != RAM_MEM_SIZE {
            return Err(self.violation(
                "INV-R2",
                "the block list as the first record",
                format!("flags {flags:#x}"),
            ));
        }
        match flags & !RAM_CONTINUE {
            RAM_MEM_SIZE if flags == RAM_MEM_SIZE => self.block_list_begin(part, high),
            RAM_EOS if flags == RAM_EOS => self.ram_end(part, high, sink),
            RAM_ZERO | RAM_PAGE => self.page(part, high, flags, bytes, sink),
            // Only EOS with CONTINUE, or with an address, passes QEMU's own check and would be read differently.
            _ if flags == RAM_EOS | RAM_CONTINUE => Err(self.violation(
                "INV-R12",
                "an end mark without address or flags",
                format!("flags {flags:#x}"),
            )),
            _ => Err(self.violation("INV-R6", "flags that the permit allows", format!("flags {flags:#x}"))),
        }
    }

    fn block_list_begin(&mut self, part: Part, total: u64) -> Result<Option<usize>, Violation> {
        if part != Part::Start || self.block_list_done {
            return Err(self.violation(
                "INV-R2",
                "the block list exactly once, in START",
                "another block list",
            ));
        }
        if total == 0 {
            return Err(self.violation("INV-R3", "a total above zero", "zero"));
        }
        self.state = State::Blocks { total, seen: 0 };
        Ok(Some(8))
    }

    fn ram_end<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        high: u64,
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        if high != 0 {
            return Err(self.violation(
                "INV-R12",
                "an end mark without address",
                format!("address {high:#x}"),
            ));
        }
        sink.event(self.validated, Event::RamEnd { part })?;
        self.state = State::Footer(part);
        Ok(Some(8))
    }

    fn block<S: Sink + ?Sized>(
        &mut self,
        total: u64,
        seen: u64,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(&name_len) = bytes.first() else { return Ok(None) };
        let end = 1 + name_len as usize;
        let (Some(name), Some(length)) = (bytes.get(1..end), be64(bytes, end)) else { return Ok(None) };
        let mask = u64::from(self.options.page_size_bytes) - 1;
        if name.is_empty() || length == 0 || length & mask != 0 {
            let expected = "a named block of whole pages";
            return Err(self.violation("INV-R4", expected, format!("{:?}, {length} bytes", printable(name))));
        }
        if self.blocks.find(name).is_some() {
            return Err(self.violation("INV-R4", "each block once", format!("{:?} again", printable(name))));
        }
        if self.blocks.len() == MAX_RAM_BLOCKS {
            return Err(self.violation("INV-R4", format!("at most {MAX_RAM_BLOCKS} blocks"), "more"));
        }
        let sum = seen.checked_add(length).filter(|sum| *sum <= total);
        let Some(sum) = sum else {
            let found = format!("{:?} of {length} bytes after {seen}", printable(name));
            return Err(self.violation("INV-R3", format!("lengths that add up to {total}"), found));
        };
        sink.event(self.validated, Event::Block { index: self.blocks.len(), name, length_bytes: length })?;
        self.blocks.push(name, length);
        self.state = State::Blocks { total, seen: sum };
        if sum == total {
            sink.event(self.validated, Event::BlocksEnd { total_bytes: total })?;
            self.block_list_done = true;
            self.state = State::Record(Part::Start);
        }
        Ok(Some(end + 8))
    }

    fn page<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        offset: u64,
        flags: u64,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        if part == Part::Start {
            return Err(self.violation("INV-R6", "no page in START", format!("flags {flags:#x}")));
        }
        let Some((block, len)) = self.named_block(flags, bytes)? else { return Ok(None) };
        let length = self.blocks.length_bytes(block);
        let page = u64::from(self.options.page_size_bytes);
        if offset.checked_add(page).is_none_or(|end| end > length) {
            return Err(self.violation(
                "INV-R7",
                format!("an offset inside {length} bytes"),
                format!("{offset:#x}"),
            ));
        }
        if flags & RAM_PAGE != 0 {
            sink.event(self.validated, Event::Page { block, offset })?;
            self.current = Some(block);
            self.state = State::PageBytes { part, left: self.options.page_size_bytes as usize };
            return Ok(Some(len));
        }
        let Some(&fill) = bytes.get(len) else { return Ok(None) };
        if fill != 0 {
            return Err(self.violation("INV-R10", "a zero page filled with zero", "another fill byte"));
        }
        sink.event(self.validated, Event::ZeroPage { block, offset })?;
        self.current = Some(block);
        Ok(Some(len + 1))
    }

    /// Which block a page record means, and how long its header is.
    fn named_block(&self, flags: u64, bytes: &[u8]) -> Result<Option<(usize, usize)>, Violation> {
        if flags & RAM_CONTINUE != 0 {
            return match self.current {
                Some(block) => Ok(Some((block, 8))),
                None => Err(self.violation("INV-R8", "a named block before CONTINUE", "CONTINUE")),
            };
        }
        let Some(&name_len) = bytes.get(8) else { return Ok(None) };
        let end = 9 + name_len as usize;
        let Some(name) = bytes.get(9..end) else { return Ok(None) };
        match self.blocks.find(name) {
            Some(block) => Ok(Some((block, end))),
            None => Err(self.violation("INV-R9", "a block of the list", printable(name))),
        }
    }

    fn footer<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(&kind) = bytes.first() else { return Ok(None) };
        if kind != FOOTER {
            return Err(self.violation("INV-S4", "a footer", format!("{kind:#04x}")));
        }
        let Some(id) = be32(bytes, 1) else { return Ok(None) };
        if Some(id) != self.ram_id {
            return Err(self.violation("INV-S4", "the section's own id in its footer", format!("id {id}")));
        }
        sink.event(self.validated, Event::Footer { id })?;
        self.state = State::Top(Phase::Iterating);
        if part == Part::End {
            sink.event(self.validated + 5, Event::DevicesBegin)?;
            self.state = State::Devices;
        }
        Ok(Some(5))
    }
}

/// The header of a START or FULL section.
pub(crate) struct SectionHeader<'a> {
    pub(crate) id: u32,
    pub(crate) name: &'a [u8],
    pub(crate) instance: u32,
    pub(crate) version: u32,
    /// Length of the header itself.
    pub(crate) len: usize,
}

impl<'a> SectionHeader<'a> {
    /// Reads it, type byte included; nothing when bytes are missing.
    pub(crate) fn read(bytes: &'a [u8]) -> Option<Self> {
        let id = be32(bytes, 1)?;
        let name_end = 6 + *bytes.get(5)? as usize;
        let name = bytes.get(6..name_end)?;
        let instance = be32(bytes, name_end)?;
        let version = be32(bytes, name_end + 4)?;
        Some(Self { id, name, instance, version, len: name_end + 8 })
    }
}
