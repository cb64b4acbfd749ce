//! The incremental parser of the main channel, up to the device state.

mod ram;

use super::*;

const MAGIC: u32 = 0x5145_564d;
const CPR_MAGIC: u32 = 0x5143_5052;
const VERSION: u32 = 3;

const COMMAND_OPEN_RETURN_PATH: u16 = 1;
const COMMAND_PING: u16 = 2;
const COMMAND_SWITCHOVER_START: u16 = 11;

/// Settings that come from the VM's record and the permit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParserOptions {
    /// Guest page size; a power of two.
    pub page_size_bytes: u32,
    /// Whether OPEN_RETURN_PATH must be the first command (INV-T3). Only a recording made for enrolment goes
    /// without: a migration that loses its target would leave the guest stopped on both sides.
    pub return_path_required: bool,
    /// How the main channel marks that multifd channels are to synchronise; nothing without multifd.
    pub multifd_markers: Option<SyncMarkers>,
}

/// What on the main channel each SYNC packet of a multifd channel belongs to (it depends on the machine type).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncMarkers {
    /// The end mark of every RAM payload: machine types up to 8.0.
    EveryPayload,
    /// The MULTIFD_FLUSH word: machine types from 8.1.
    FlushWords,
}

impl Default for ParserOptions {
    fn default() -> Self {
        Self { page_size_bytes: 4096, return_path_required: true, multifd_markers: None }
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
                State::Record(Part::Iterate | Part::End) if self.pending.is_empty() => {
                    match self.page_run(rest, sink)? {
                        0 => self.item(rest, sink)?,
                        taken => taken,
                    }
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
        if magic == CPR_MAGIC {
            return Err(self.violation("INV-T4", "no cpr channel", "the magic of cpr-transfer"));
        }
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

    /// The only subsection of the configuration that pre-copy without shared memory can have is the VM's UUID. The
    /// capabilities that would be listed here change the format, and are refused by name.
    fn after_configuration<S: Sink + ?Sized>(
        &mut self,
        uuid_seen: bool,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        const NAME: &[u8] = b"configuration/uuid";
        const CAPABILITIES: &[u8] = b"configuration/capabilities";
        if bytes.first() != Some(&SUBSECTION) {
            self.state = State::Top(Phase::Pre);
            return self.top(Phase::Pre, bytes, sink);
        }
        let Some(&name_len) = bytes.get(1) else { return Ok(None) };
        let name_end = 2 + name_len as usize;
        let Some(name) = bytes.get(2..name_end) else { return Ok(None) };
        if name == CAPABILITIES {
            let Some(&len) = bytes.get(name_end + 8) else { return Ok(None) };
            let Some(capability) = bytes.get(name_end + 9..name_end + 9 + len as usize) else {
                return Ok(None);
            };
            let found = format!("capability {}", printable(capability));
            return Err(self.violation("INV-H3", "no capability that changes the format", found));
        }
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
                return Err(self.violation("INV-C3", "no postcopy command", command_name(command)));
            }
            (_, 9 | 10) => {
                return Err(self.violation("INV-C8", "no recovery command", command_name(command)));
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
            // vfio, block migration and dirty bitmaps open here too.
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

/// A command by the name that operators find in QEMU's own documentation.
pub(crate) fn command_name(command: u16) -> String {
    let name = match command {
        1 => "OPEN_RETURN_PATH",
        2 => "PING",
        3 => "POSTCOPY_ADVISE",
        4 => "POSTCOPY_LISTEN",
        5 => "POSTCOPY_RUN",
        6 => "POSTCOPY_RAM_DISCARD",
        7 => "PACKAGED",
        8 => "ENABLE_COLO",
        9 => "POSTCOPY_RESUME",
        10 => "RECV_BITMAP",
        11 => "SWITCHOVER_START",
        _ => return format!("command {command}"),
    };
    name.to_owned()
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
