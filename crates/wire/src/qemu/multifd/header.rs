//! The two kinds of header: the initial packet's and a page packet's, with all rules that need no block list.

use super::{INIT_BYTES, MAX_COMPRESSED_BYTES, MAX_PACKET_PAGE_BYTES, Method, MultifdOptions, Style};
use crate::qemu::{Blocks, Violation, be32, be64, printable};

const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
const SYNC: u32 = 0x01;
const METHODS: u32 = 0x3e;
const DEVICE_STATE: u32 = 0x40;

const NAME: std::ops::Range<usize> = 64..320;
const OFFSETS: usize = NAME.end;
/// Magic, version and flags: enough to refuse what is no page packet.
pub(super) const PREFIX_BYTES: usize = 12;

/// Length of a page packet's header.
pub(super) fn header_bytes(options: &MultifdOptions) -> usize {
    OFFSETS + 8 * max_pages(options) as usize
}

/// How many pages a packet may have.
pub(super) fn max_pages(options: &MultifdOptions) -> u32 {
    MAX_PACKET_PAGE_BYTES / options.page_size_bytes.max(1)
}

/// Where a header is, for the report on it.
#[derive(Clone, Copy)]
pub(super) struct At(pub(super) u64);

impl At {
    pub(super) fn refuse(
        self,
        rule: &'static str,
        expected: impl Into<String>,
        found: impl AsRef<str>,
    ) -> Violation {
        Violation::new(rule, self.0, "multifd packet", expected, found)
    }
}

/// Reads the initial packet: the channel's id and the VM's UUID.
pub(super) fn read_init(bytes: &[u8], options: &MultifdOptions, at: At) -> Result<(u8, [u8; 16]), Violation> {
    let uuid = bytes.get(8..24).and_then(|uuid| <[u8; 16]>::try_from(uuid).ok());
    let (Some(uuid), Some(&id), Some(reserved)) = (uuid, bytes.get(24), bytes.get(25..INIT_BYTES)) else {
        return Err(at.refuse("INV-M1", format!("{INIT_BYTES} bytes"), "fewer"));
    };
    check_magic("INV-M1", bytes, at)?;
    if !is_zero(reserved) {
        return Err(at.refuse("INV-M1", "zero in the reserved bytes", "another value"));
    }
    if id >= options.channels {
        return Err(at.refuse("INV-M1", format!("an id below {}", options.channels), format!("id {id}")));
    }
    Ok((id, uuid))
}

fn check_magic(rule: &'static str, bytes: &[u8], at: At) -> Result<(), Violation> {
    let (magic, version) = (be32(bytes, 0).unwrap_or_default(), be32(bytes, 4).unwrap_or_default());
    if (magic, version) == (MAGIC, VERSION) {
        return Ok(());
    }
    Err(at.refuse(rule, "magic 11223344, version 1", format!("magic {magic:08x}, version {version}")))
}

/// Checks the first [`PREFIX_BYTES`] of a page packet.
pub(super) fn check_prefix(bytes: &[u8], at: At) -> Result<(), Violation> {
    let flags = be32(bytes, 8).unwrap_or_default();
    check_magic("INV-M2", bytes, at)?;
    if flags & DEVICE_STATE != 0 {
        return Err(at.refuse("INV-M10", "no device-state packet", format!("flags {flags:#x}")));
    }
    if flags & !(SYNC | METHODS) != 0 {
        return Err(at.refuse("INV-M2", "known flags", format!("flags {flags:#x}")));
    }
    Ok(())
}

/// A page packet's header.
#[derive(Debug)]
pub(super) struct Header<'a> {
    flags: u32,
    pages_alloc: u32,
    normal: u32,
    zero: u32,
    next_packet_size: u32,
    packet_num: u64,
    reserved: &'a [u8],
    name: &'a [u8],
    offsets: &'a [u8],
}

impl<'a> Header<'a> {
    /// Reads it and checks everything but the packet's number and what needs the block list.
    pub(super) fn read(bytes: &'a [u8], options: &MultifdOptions, at: At) -> Result<Self, Violation> {
        check_prefix(bytes, at)?;
        let Some(header) = Self::split(bytes, header_bytes(options)) else {
            return Err(at.refuse("INV-M2", "a whole header", format!("{} bytes", bytes.len())));
        };
        header.check_flags(options, at)?;
        header.check_counts(options, at)?;
        header.check_size(options, at)?;
        header.check_unused(options, at)?;
        Ok(header)
    }

    fn split(bytes: &'a [u8], len: usize) -> Option<Self> {
        Some(Self {
            flags: be32(bytes, 8)?,
            pages_alloc: be32(bytes, 12)?,
            normal: be32(bytes, 16)?,
            next_packet_size: be32(bytes, 20)?,
            packet_num: be64(bytes, 24)?,
            zero: be32(bytes, 32)?,
            reserved: bytes.get(36..NAME.start)?,
            name: bytes.get(NAME)?,
            offsets: bytes.get(OFFSETS..len)?,
        })
    }

    /// Whether the SYNC flag is set.
    pub(super) fn is_sync(&self) -> bool {
        self.flags & SYNC != 0
    }

    /// How many pages have content.
    pub(super) fn normal(&self) -> usize {
        self.normal as usize
    }

    /// The length of the payload on the wire, as QEMU's receiver takes it.
    pub(super) fn payload_bytes(&self, options: &MultifdOptions) -> usize {
        match options.method {
            Method::Plain => self.normal() * options.page_size_bytes as usize,
            _ if self.normal == 0 => 0,
            _ => self.next_packet_size as usize,
        }
    }

    /// The packet's number, which must rise, or for older sources not fall.
    pub(super) fn number(&self, last: Option<u64>, style: Style, at: At) -> Result<u64, Violation> {
        let fits = match last {
            None => true,
            Some(last) if style.is_strict() => self.packet_num > last,
            Some(last) => self.packet_num >= last,
        };
        if fits {
            return Ok(self.packet_num);
        }
        let last = last.unwrap_or_default();
        Err(at.refuse("INV-M9", format!("a packet number after {last}"), format!("{}", self.packet_num)))
    }

    /// The block's name up to its NUL; empty where the packet has none.
    pub(super) fn name(&self) -> &'a [u8] {
        self.name.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// The block that the pages are in; nothing where the packet has no name.
    pub(super) fn block(&self, blocks: &Blocks, at: At) -> Result<Option<usize>, Violation> {
        let name = self.name();
        if name.is_empty() {
            return Ok(None);
        }
        match blocks.find(name) {
            Some(block) => Ok(Some(block)),
            None => Err(at.refuse("INV-M4", "a block of the list", printable(name))),
        }
    }

    /// Reads the offsets of all pages into `offsets`, those with content first, and checks them against the block.
    pub(super) fn offsets(
        &self,
        block_bytes: u64,
        page_size_bytes: u32,
        offsets: &mut Vec<u64>,
        at: At,
    ) -> Result<(), Violation> {
        let page = u64::from(page_size_bytes);
        offsets.clear();
        offsets.extend(self.used_offsets());
        for &offset in offsets.iter() {
            let inside = offset.checked_add(page).is_some_and(|end| end <= block_bytes);
            if !inside || !offset.is_multiple_of(page) {
                let expected = format!("page offsets inside {block_bytes} bytes");
                return Err(at.refuse("INV-M5", expected, format!("{offset:#x}")));
            }
        }
        if let Some(offset) = duplicate(offsets) {
            return Err(at.refuse("INV-M5", "each page once in a packet", format!("{offset:#x} again")));
        }
        Ok(())
    }

    fn pages(&self) -> usize {
        self.normal as usize + self.zero as usize
    }

    fn used_offsets(&self) -> impl Iterator<Item = u64> {
        (0..self.pages()).filter_map(|index| be64(self.offsets, 8 * index))
    }

    /// Pages need exactly the permitted method; empty packets of older sources, and every SYNC of newer ones, have
    /// none.
    fn check_flags(&self, options: &MultifdOptions, at: At) -> Result<(), Violation> {
        let (method, permitted) = (self.flags & METHODS, options.method.flags());
        let fits = match (method == permitted, method == 0) {
            (_, true) if options.style.is_strict() => self.is_sync() || permitted == 0,
            (_, true) => self.pages() == 0 || permitted == 0,
            (true, false) => !(options.style.is_strict() && self.is_sync()),
            (false, false) => false,
        };
        if !fits {
            let expected = format!("SYNC or method {permitted:#x}");
            return Err(at.refuse("INV-M2", expected, format!("flags {:#x}", self.flags)));
        }
        if !is_zero(self.reserved) {
            return Err(at.refuse("INV-M2", "zero in the reserved bytes", "another value"));
        }
        Ok(())
    }

    fn check_counts(&self, options: &MultifdOptions, at: At) -> Result<(), Violation> {
        let (max, strict) = (max_pages(options), options.style.is_strict());
        let zero_max = if strict { max.saturating_sub(self.normal) } else { 0 };
        if self.normal > max || self.zero > zero_max {
            let expected = format!("at most {max} pages, {zero_max} of them zero");
            return Err(at.refuse("INV-M3", expected, format!("{} and {} zero", self.normal, self.zero)));
        }
        let empty_sync = self.is_sync() && self.pages() == 0;
        let fits = match (self.pages_alloc == max, self.pages_alloc == 0) {
            (true, _) => !(empty_sync && options.style == Style::Strict),
            (_, true) => empty_sync,
            _ => false,
        };
        if strict && self.is_sync() && !empty_sync {
            return Err(at.refuse("INV-M9", "no page in a SYNC packet", format!("{}", self.pages())));
        }
        if !fits {
            return Err(at.refuse(
                "INV-M3",
                format!("room for {max} pages"),
                format!("{}", self.pages_alloc),
            ));
        }
        if strict && self.pages() == 0 && !empty_sync {
            return Err(at.refuse("INV-M3", "pages or SYNC", "an empty packet"));
        }
        Ok(())
    }

    fn check_size(&self, options: &MultifdOptions, at: At) -> Result<(), Violation> {
        let size = self.next_packet_size;
        let (fits, expected) = match (self.normal, options.method) {
            // Stale in older sources' empty packets, and never looked at.
            (0, _) if self.may_be_stale(options.style) && !options.style.is_strict() => return Ok(()),
            (0, _) => (size == 0, "no payload".to_owned()),
            (normal, Method::Plain) => {
                let bytes = normal.saturating_mul(options.page_size_bytes);
                (size == bytes, format!("{bytes} bytes of payload"))
            }
            _ => {
                let fits = (1..=MAX_COMPRESSED_BYTES).contains(&size);
                (fits, format!("1 to {MAX_COMPRESSED_BYTES} bytes of payload"))
            }
        };
        if fits { Ok(()) } else { Err(at.refuse("INV-M6", expected, format!("{size} bytes"))) }
    }

    /// The name and the offsets behind the last page's.
    fn check_unused(&self, options: &MultifdOptions, at: At) -> Result<(), Violation> {
        let name = self.name();
        let padding = self.name.get(name.len()..).unwrap_or_default();
        if padding.is_empty() || !is_zero(padding) {
            return Err(at.refuse("INV-M4", "a name padded with NUL", printable(name)));
        }
        let stale = self.may_be_stale(options.style);
        if self.pages() > 0 && name.is_empty() {
            return Err(at.refuse("INV-M4", "a block's name", "none"));
        }
        if self.pages() == 0 && !name.is_empty() && !stale {
            return Err(at.refuse("INV-M4", "no name without pages", printable(name)));
        }
        let unused = self.offsets.get(8 * self.pages()..).unwrap_or_default();
        if !stale && !is_zero(unused) {
            return Err(at.refuse("INV-M5", "zero in unused offsets", "another value"));
        }
        Ok(())
    }

    /// Whether fields without a meaning may keep what an earlier packet had there: a QEMU that clears its packets
    /// shows it by room for no page.
    fn may_be_stale(&self, style: Style) -> bool {
        style != Style::Strict && self.pages_alloc != 0
    }
}

/// A value that is there twice. Honest sources mostly send rising offsets.
fn duplicate(offsets: &[u64]) -> Option<u64> {
    if offsets.is_sorted_by(|a, b| a < b) {
        return None;
    }
    let mut sorted = offsets.to_vec();
    sorted.sort_unstable();
    sorted.windows(2).find(|pair| pair.first() == pair.last()).and_then(|pair| pair.first().copied())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |all, byte| all | byte) == 0
}
