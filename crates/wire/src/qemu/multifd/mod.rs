//! One multifd channel, source → target: an initial packet, then packets of up to 512 KiB worth of pages.
//!
//! ```text
//! INIT (64 bytes) → HEADER –pages→ PAYLOAD –last byte→ HEADER …
//!                      └–none: [Sync]→ HEADER          the channel may end only before a HEADER
//! ```
//!
//! [`MultifdParser`] checks every header whole before any byte of its payload counts as valid. How long a payload
//! is follows from its number of pages, as in QEMU's receiver; `next_packet_size`, which older senders leave stale,
//! only counts where pages are compressed. A compressed packet is decoded as it comes, in the channel's one
//! context, and its last byte is not valid before all of it was found exact: QEMU decodes nothing before that byte.
//!
//! Memory per channel: one header (1344 bytes at 4 KiB pages), the offsets of one packet (1 KiB), and when
//! compressed 16 KiB of output and a decoder: about 45 KiB for zlib, at most [`MAX_ZSTD_WINDOW_BYTES`] and some
//! 400 KiB for zstd. Page contents are passed on by slice.
//!
//! What one channel can't know is the caller's: that ids are unique and the UUID is the VM's (INV-M1), the
//! lockstep of the SYNCs with the main channel (INV-M8), and pages that come twice within an epoch (INV-M9).

mod codec;
mod header;
mod parser;

pub use parser::MultifdParser;

use super::{SyncMarkers, Violation};

/// Length of the initial packet.
pub const INIT_BYTES: usize = 64;
/// How much a packet's pages may come to: QEMU's constant.
pub const MAX_PACKET_PAGE_BYTES: u32 = 512 << 10;
/// The most that a packet's compressed pages may take: the buffer that QEMU's receiver has for them.
pub const MAX_COMPRESSED_BYTES: u32 = 1 << 20;
/// The largest zstd window that is decoded, for each channel. Level 1, which the source is told to use, stays within
/// it; sixteen channels of it still fit the agent.
pub const MAX_ZSTD_WINDOW_BYTES: usize = 1 << MAX_ZSTD_WINDOW_LOG;
const MAX_ZSTD_WINDOW_LOG: u32 = 19;

/// How pages are compressed: what the permit allows on a migration, exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Not at all.
    Plain,
    /// One zlib stream per channel, flushed per packet.
    Zlib,
    /// One zstd stream per channel, flushed per packet.
    Zstd,
}

impl Method {
    /// Its bits in a packet's flags.
    fn flags(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Zlib => 0x02,
            Self::Zstd => 0x04,
        }
    }
}

/// How the source's QEMU fills its packets. It follows from the machine type, and where one machine type can come
/// from several versions of QEMU, their habits are all allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Machine types up to 8.0. Zero pages are on the main channel and every RAM end mark there is a SYNC here.
    /// SYNC packets may carry pages, empty packets keep fields of earlier ones, and `packet_num` may repeat; a
    /// newer QEMU with such a machine type sends empty, zeroed SYNC packets.
    Legacy,
    /// Machine types 8.1 and 8.2: packets as in [`Self::Legacy`], but a SYNC belongs to a MULTIFD_FLUSH word.
    LegacyFlush,
    /// Machine types 9.0 and 9.1: zero pages are listed in the packets, SYNC packets are empty, `packet_num` rises.
    /// QEMU 9.0 and 9.1 keep names and offsets of earlier packets where a packet has none.
    StrictStale,
    /// Machine types from 9.2: as [`Self::StrictStale`], and what a packet doesn't use is zero.
    Strict,
}

impl Style {
    /// The style of a machine type such as `pc-q35-10.0`. A name without a version gets the strictest.
    #[must_use]
    pub fn of_machine(machine: &str) -> Self {
        let version = machine.rsplit('-').next().and_then(|version| version.split_once('.'));
        let number = |text: &str| text.parse::<u32>().ok();
        match version.and_then(|(major, minor)| Some((number(major)?, number(minor)?))) {
            Some(version) if version <= (8, 0) => Self::Legacy,
            Some(version) if version < (9, 0) => Self::LegacyFlush,
            Some(version) if version < (9, 2) => Self::StrictStale,
            _ => Self::Strict,
        }
    }

    /// What on the main channel a SYNC belongs to.
    #[must_use]
    pub fn markers(self) -> SyncMarkers {
        if self == Self::Legacy { SyncMarkers::EveryPayload } else { SyncMarkers::FlushWords }
    }

    /// Whether packets list zero pages, SYNC packets are empty, `packet_num` rises, and a page comes once between two
    /// SYNCs.
    #[must_use]
    pub fn is_strict(self) -> bool {
        matches!(self, Self::StrictStale | Self::Strict)
    }
}

/// Settings that come from the VM's record and the permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MultifdOptions {
    /// Guest page size; a power of two up to 512 KiB.
    pub page_size_bytes: u32,
    /// How many multifd channels the migration has.
    pub channels: u8,
    /// How pages are compressed.
    pub method: Method,
    /// How the source fills its packets.
    pub style: Style,
}

/// What the parser found. Offsets come beside it: of the packet, and for plain pages their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MultifdEvent<'a> {
    /// The initial packet.
    Init {
        /// Channel number, below the number of channels.
        id: u8,
        /// The VM's UUID, zero if it has none.
        uuid: [u8; 16],
    },
    /// A page whose content follows, in [`Self::PageBytes`] that add up to it.
    Page {
        /// Block index.
        block: usize,
        /// Offset in the block; aligned and inside.
        offset: u64,
    },
    /// A piece of the page's content, decompressed.
    PageBytes(&'a [u8]),
    /// A page of zeros. A packet's zero pages come before its pages with content, as QEMU applies them.
    ZeroPage {
        /// Block index.
        block: usize,
        /// Offset in the block; aligned and inside.
        offset: u64,
    },
    /// The packet with the SYNC flag is behind, its pages included.
    Sync,
}

/// Takes the parser's events; an error stops the parser for good.
pub trait MultifdSink {
    /// One event, found at `offset` of the channel.
    ///
    /// # Errors
    /// The rule that it breaks.
    fn event(&mut self, offset: u64, event: MultifdEvent<'_>) -> Result<(), Violation>;

    /// Whether the parser is to stop behind the packet that it is at; the rest is given to it again later.
    fn is_full(&self) -> bool {
        false
    }
}

impl<F: FnMut(u64, MultifdEvent<'_>) -> Result<(), Violation>> MultifdSink for F {
    fn event(&mut self, offset: u64, event: MultifdEvent<'_>) -> Result<(), Violation> {
        self(offset, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_type_says_the_style() {
        for (machine, style) in [
            ("pc-i440fx-7.2", Style::Legacy),
            ("pc-q35-8.0", Style::Legacy),
            ("pc-q35-8.1", Style::LegacyFlush),
            ("virt-8.2", Style::LegacyFlush),
            ("pc-q35-9.0", Style::StrictStale),
            ("pc-q35-9.1", Style::StrictStale),
            ("pc-q35-9.2", Style::Strict),
            ("pc-q35-10.0", Style::Strict),
            ("microvm", Style::Strict),
            ("", Style::Strict),
        ] {
            assert_eq!(Style::of_machine(machine), style, "{machine}");
        }
    }
}
