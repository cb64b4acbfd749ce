//! QEMU's migration stream, main channel, pre-copy: the outer grammar, with every record header checked before
//! the bytes behind it count as valid.
//!
//! ```text
//! MAGIC → CONFIGURATION → PRE (OPEN_RETURN_PATH, PING 1)
//!   –START ram→ SETUP –PART*→ ITERATE –[SWITCHOVER_START]→ –END ram→ DEVICES (opaque until complete)
//! ```
//!
//! [`Parser`] knows the stream up to the last footer of the RAM section, record by record, and never keeps more
//! than [`MAX_ITEM_BYTES`] of it. Device sections have no length on the wire: they are handed out as opaque bytes,
//! and [`device::DeviceState`] reads the whole of them once the description at the end of the stream is there.
//!
//! What only the VM's record can tell (which machine, blocks, devices) is compared by `engine::inspect`.

mod blocks;
pub mod device;
pub mod multifd;
mod parser;
pub mod return_path;

pub use blocks::Blocks;
pub use parser::{Parser, ParserOptions, SyncMarkers};

/// The longest record header the parser has to hold: a section header with a name of 255 bytes.
pub const MAX_ITEM_BYTES: usize = 320;
/// The longest machine name that is looked at.
pub const MAX_MACHINE_BYTES: usize = 64;
/// The most RAM blocks a stream may list; real machines have under twenty.
pub const MAX_RAM_BLOCKS: usize = 256;

pub(crate) const SECTION_EOF: u8 = 0x00;
pub(crate) const SECTION_START: u8 = 0x01;
pub(crate) const SECTION_PART: u8 = 0x02;
pub(crate) const SECTION_END: u8 = 0x03;
pub(crate) const SECTION_FULL: u8 = 0x04;
pub(crate) const SUBSECTION: u8 = 0x05;
pub(crate) const VM_DESCRIPTION: u8 = 0x06;
pub(crate) const CONFIGURATION: u8 = 0x07;
pub(crate) const COMMAND: u8 = 0x08;
pub(crate) const FOOTER: u8 = 0x7e;

/// A rule of the stream was broken. Nothing from `offset` on may be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rule} at byte {offset} ({section}): expected {expected}, found {found}")]
pub struct Violation {
    /// The rule, e.g. `INV-R4`.
    pub rule: &'static str,
    /// Offset in the channel's stream of the record that broke it.
    pub offset: u64,
    /// The section or element at hand.
    pub section: String,
    /// What the rule asks for.
    pub expected: String,
    /// What came. Never guest memory: numbers and printable names only.
    pub found: String,
}

impl Violation {
    /// A violation; `found` and `section` are cut to a length that is safe to log.
    pub fn new(
        rule: &'static str,
        offset: u64,
        section: impl AsRef<str>,
        expected: impl Into<String>,
        found: impl AsRef<str>,
    ) -> Self {
        let cut = |text: &str| text.chars().take(120).collect::<String>();
        Self {
            rule,
            offset,
            section: cut(section.as_ref()),
            expected: expected.into(),
            found: cut(found.as_ref()),
        }
    }
}

/// Printable form of a name from the wire, cut to what is safe to log.
pub fn printable(name: &[u8]) -> String {
    let text: String =
        name.iter().take(80).flat_map(|b| std::ascii::escape_default(*b)).map(char::from).collect();
    if name.len() > 80 { format!("{text}…") } else { text }
}

/// The kind of section a RAM record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The setup: the block list.
    Start,
    /// One round of pages.
    Iterate,
    /// The last pages, guest stopped.
    End,
}

/// What the parser found. Offsets come beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// Magic and version 3.
    Header,
    /// The configuration section.
    Configuration {
        /// Machine type.
        machine: &'a [u8],
    },
    /// A subsection of the configuration that carries the VM's UUID.
    ConfigurationUuid {
        /// 16 bytes.
        uuid: [u8; 16],
    },
    /// OPEN_RETURN_PATH.
    OpenReturnPath,
    /// PING.
    Ping {
        /// Its value.
        value: u32,
    },
    /// SWITCHOVER_START.
    SwitchoverStart,
    /// The `ram` section was opened.
    RamStart {
        /// Section id, chosen by the sender.
        id: u32,
    },
    /// One entry of the block list.
    Block {
        /// Index by order of arrival; later events name it by this.
        index: usize,
        /// Name.
        name: &'a [u8],
        /// Used length in bytes; a non-zero multiple of the page size.
        length_bytes: u64,
    },
    /// The block list ended where its total says.
    BlocksEnd {
        /// Sum of the lengths.
        total_bytes: u64,
    },
    /// A PART or END section of `ram` was opened.
    RamSection {
        /// Which.
        part: Part,
    },
    /// A page whose content follows.
    Page {
        /// Block index.
        block: usize,
        /// Offset in the block; aligned and inside.
        offset: u64,
    },
    /// A piece of the page's content.
    PageBytes(&'a [u8]),
    /// A page of zeros.
    ZeroPage {
        /// Block index.
        block: usize,
        /// Offset in the block; aligned and inside.
        offset: u64,
    },
    /// The sending side has synchronised its multifd channels: each of them sends one SYNC packet for this.
    SyncMarker,
    /// The section's payload ended.
    RamEnd {
        /// Which section.
        part: Part,
    },
    /// A section's footer.
    Footer {
        /// Its id.
        id: u32,
    },
    /// The last END's footer is behind: everything from here on is device state, the end mark and the description.
    DevicesBegin,
    /// A piece of that.
    DeviceBytes(&'a [u8]),
}

/// Takes the parser's events; an error stops the parser for good.
pub trait Sink {
    /// One event, found at `offset`.
    ///
    /// # Errors
    /// The rule that it breaks.
    fn event(&mut self, offset: u64, event: Event<'_>) -> Result<(), Violation>;
}

impl<F: FnMut(u64, Event<'_>) -> Result<(), Violation>> Sink for F {
    fn event(&mut self, offset: u64, event: Event<'_>) -> Result<(), Violation> {
        self(offset, event)
    }
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
