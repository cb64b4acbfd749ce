//! What every channel is compared with, and what came so far on all of them together.

use super::coverage::{Coverage, TooOften};
use super::firmware::Firmware;
use super::limits::{Limits, pages};
use super::{Output, Pages};
use std::collections::BTreeMap;
use types::VmId;
use types::handover::Digest;
use types::inventory::Inventory;
use wire::qemu::multifd::Style;
use wire::qemu::{Event, Part, Sink, Violation, printable};

#[derive(Debug)]
struct EnrolledBlock {
    length_bytes: u64,
    content: Option<Digest>,
}

/// The VM's record and the permit as the stream meets them.
#[derive(Debug)]
pub(super) struct Record {
    machine: String,
    switchover_start_known: bool,
    vm: Option<VmId>,
    blocks: BTreeMap<Vec<u8>, EnrolledBlock>,
    total_bytes: u64,
    page_size_bytes: u64,
    coverage: Coverage,
    firmware: Firmware,
    pub(super) pages: Pages,
    records: u64,
    max_records: u64,
    max_stream_bytes: u64,
    fed_bytes: u64,
    /// Markers on the main channel.
    pub(super) markers: u64,
    /// What multifd channels were told to synchronise by; nothing without multifd.
    multifd: bool,
}

impl Record {
    pub(super) fn new(inventory: &Inventory, limits: &Limits) -> Self {
        let enrolled = |b: &types::inventory::RamBlock| {
            (b.name.clone().into_bytes(), EnrolledBlock { length_bytes: b.length_bytes, content: b.content })
        };
        let blocks: BTreeMap<_, _> = inventory.ram_blocks.iter().map(enrolled).collect();
        let pages = pages(inventory);
        let epochs = limits.multifd.is_some() && Style::of_machine(&inventory.machine).is_strict();
        Self {
            switchover_start_known: knows_switchover_start(&inventory.machine),
            machine: inventory.machine.clone(),
            vm: limits.vm,
            total_bytes: inventory.ram_blocks.iter().map(|b| b.length_bytes).sum(),
            blocks,
            page_size_bytes: u64::from(inventory.page_size_bytes),
            coverage: Coverage::new(pages, limits.page_records_each, epochs),
            firmware: Firmware::default(),
            pages: Pages::default(),
            records: 0,
            max_records: limits.page_records_of(pages),
            max_stream_bytes: limits.stream_bytes,
            fed_bytes: 0,
            markers: 0,
            multifd: limits.multifd.is_some(),
        }
    }

    /// So many more bytes came, on whatever channel; `at` is where they end on it.
    pub(super) fn spend(&mut self, bytes: usize, at: u64) -> Result<(), Violation> {
        self.fed_bytes = self.fed_bytes.saturating_add(bytes as u64);
        if self.fed_bytes <= self.max_stream_bytes {
            return Ok(());
        }
        let expected = format!("at most {} bytes on all channels", self.max_stream_bytes);
        Err(Violation::new("INV-T5", at, "stream", expected, "more"))
    }

    pub(super) fn fed_bytes(&self) -> u64 {
        self.fed_bytes
    }

    /// A UUID that the stream names (INV-H4).
    pub(super) fn uuid(&self, at: u64, section: &str, uuid: &[u8; 16]) -> Result<(), Violation> {
        if self.vm.is_some_and(|vm| vm.as_bytes() == uuid) {
            return Ok(());
        }
        Err(Violation::new("INV-H4", at, section, "the permitted VM's UUID", "another UUID"))
    }

    /// A multifd channel's first packet names the VM. A VM that was started without a UUID says zeros.
    pub(super) fn channel_uuid(&self, at: u64, uuid: &[u8; 16]) -> Result<(), Violation> {
        if self.vm.is_none() || *uuid == [0; 16] {
            return Ok(());
        }
        self.uuid(at, "multifd", uuid)
    }

    fn block(&mut self, at: u64, index: usize, name: &[u8], length: u64) -> Result<(), Violation> {
        let shown = printable(name);
        match self.blocks.get(name) {
            Some(enrolled) if enrolled.length_bytes == length => {
                self.coverage.add_block(length / self.page_size_bytes);
                if let Some(expected) = enrolled.content {
                    self.firmware.pin(index, (&shown, length), self.page_size_bytes, expected);
                }
                Ok(())
            }
            Some(enrolled) => Err(Violation::new(
                "INV-R4",
                at,
                format!("ram block {shown:?}"),
                format!("{} bytes", enrolled.length_bytes),
                format!("{length} bytes"),
            )),
            None => {
                Err(Violation::new("INV-R4", at, "ram block list", "an enrolled block", format!("{shown:?}")))
            }
        }
    }

    fn blocks_end(&self, at: u64, total: u64) -> Result<(), Violation> {
        let (seen, expected) = (self.coverage.blocks(), self.blocks.len());
        if seen != expected {
            let (expected, found) = (format!("all {expected} blocks"), format!("{seen} blocks"));
            return Err(Violation::new("INV-R4", at, "ram block list", expected, found));
        }
        if total != self.total_bytes {
            let expected = format!("{} bytes in all", self.total_bytes);
            return Err(Violation::new("INV-R3", at, "ram block list", expected, format!("{total} bytes")));
        }
        Ok(())
    }

    #[inline]
    fn page(&mut self, at: u64, place: (usize, u64), in_epoch: bool) -> Result<(), Violation> {
        self.records += 1;
        if self.records > self.max_records {
            return Err(self.too_many(at));
        }
        self.coverage
            .mark(place.0, place.1 / self.page_size_bytes, in_epoch)
            .map_err(|why| Self::too_often(at, place, why))
    }

    #[cold]
    fn too_many(&self, at: u64) -> Violation {
        Violation::new("INV-R15", at, "ram", format!("at most {} page records", self.max_records), "more")
    }

    #[cold]
    fn too_often(at: u64, (block, offset): (usize, u64), why: TooOften) -> Violation {
        let found = format!("block {block}, offset {offset:#x} again");
        match why {
            TooOften::Resent => {
                Violation::new("INV-R15", at, "ram", "a page no oftener than the permit allows", found)
            }
            TooOften::InEpoch => {
                let expected = "a page once between two synchronisations";
                Violation::new("INV-M9", at, "multifd", expected, found)
            }
        }
    }

    pub(super) fn next_epoch(&mut self) {
        self.coverage.next_epoch();
    }

    /// Whether memory is complete and its firmware the enrolled one (INV-R13, R14).
    pub(super) fn check_memory(&self, at: u64) -> Result<(), Violation> {
        if self.coverage.missing() != 0 {
            let found = format!("{} pages never sent", self.coverage.missing());
            return Err(Violation::new("INV-R13", at, "ram", "every page at least once", found));
        }
        match self.firmware.changed() {
            None => Ok(()),
            Some(name) => {
                let section = format!("ram block {name:?}");
                Err(Violation::new("INV-R14", at, section, "the firmware that was enrolled", "other content"))
            }
        }
    }
}

/// The page whose content a channel is in.
#[derive(Debug, Clone, Default)]
pub(super) struct Cursor {
    block: usize,
    offset: u64,
    /// What came of it, where it is firmware.
    firmware: Option<Vec<u8>>,
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Takes what one channel's parser finds.
pub(super) struct Judge<'r> {
    pub(super) record: &'r mut Record,
    pub(super) cursor: &'r mut Cursor,
    pub(super) out: &'r mut dyn Output,
}

impl Judge<'_> {
    #[inline]
    pub(super) fn page(
        &mut self,
        at: u64,
        block: usize,
        offset: u64,
        channel: bool,
    ) -> Result<(), Violation> {
        self.record.page(at, (block, offset), channel)?;
        self.cursor.block = block;
        self.cursor.offset = offset;
        self.cursor.firmware = self.record.firmware.is_pinned(block).then(Vec::new);
        self.record.pages.normal += 1;
        Ok(())
    }

    #[inline]
    pub(super) fn content(&mut self, piece: &[u8]) {
        let (block, offset) = (self.cursor.block, self.cursor.offset);
        if self.cursor.firmware.is_some() {
            self.firmware(piece);
        }
        self.out.page(block, offset, piece);
        self.cursor.offset += piece.len() as u64;
    }

    /// A piece of a page of firmware: it counts once it is whole, since pieces of other channels come between.
    #[cold]
    fn firmware(&mut self, piece: &[u8]) {
        let page_bytes = usize::try_from(self.record.page_size_bytes).unwrap_or(0);
        let Some(page) = &mut self.cursor.firmware else { return };
        page.extend_from_slice(piece);
        if page.len() >= page_bytes {
            let begin = (self.cursor.offset + piece.len() as u64).saturating_sub(page.len() as u64);
            self.record.firmware.page(self.cursor.block, begin, page);
            self.cursor.firmware = None;
        }
    }

    #[inline]
    pub(super) fn zero_page(
        &mut self,
        at: u64,
        block: usize,
        offset: u64,
        channel: bool,
    ) -> Result<(), Violation> {
        self.record.page(at, (block, offset), channel)?;
        if self.record.firmware.is_pinned(block) {
            // A page is at most 64 KiB (the inventory was checked).
            let page_bytes = usize::try_from(self.record.page_size_bytes).unwrap_or(0);
            self.record.firmware.page(block, offset, ZEROS.get(..page_bytes).unwrap_or(&ZEROS));
        }
        self.record.pages.zero += 1;
        Ok(())
    }
}

/// What the main channel's parser finds beyond the pages.
pub(super) struct MainSink<'r> {
    pub(super) judge: Judge<'r>,
    pub(super) held: &'r mut Held,
}

/// The device state, and where it began.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) begin: Option<u64>,
    pub(super) bytes: Vec<u8>,
    pub(super) max_bytes: usize,
}

impl Held {
    fn push(&mut self, at: u64, bytes: &[u8]) -> Result<(), Violation> {
        if self.bytes.is_empty() {
            first_device_byte(at, bytes)?;
        }
        if self.bytes.len() + bytes.len() > self.max_bytes {
            let expected = format!("at most {} bytes", self.max_bytes);
            return Err(Violation::new("INV-D9", at, "devices", expected, "more"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

/// A section that can't follow END is refused as soon as its type byte is there.
fn first_device_byte(at: u64, bytes: &[u8]) -> Result<(), Violation> {
    let (rule, found) = match bytes.first() {
        Some(0x01) => ("INV-S6", "START"),
        Some(0x02) => ("INV-S9", "PART"),
        Some(0x03) => ("INV-S11", "END"),
        _ => return Ok(()),
    };
    Err(Violation::new(rule, at, "devices", "a device section after the end of ram", found))
}

impl Sink for MainSink<'_> {
    #[inline]
    fn event(&mut self, at: u64, event: Event<'_>) -> Result<(), Violation> {
        match event {
            Event::Page { block, offset } => self.judge.page(at, block, offset, false),
            Event::ZeroPage { block, offset } => self.judge.zero_page(at, block, offset, false),
            Event::PageBytes(piece) => {
                self.judge.content(piece);
                Ok(())
            }
            Event::DeviceBytes(bytes) => self.held.push(at, bytes),
            rare => self.rare(at, rare),
        }
    }
}

impl MainSink<'_> {
    #[cold]
    fn rare(&mut self, at: u64, event: Event<'_>) -> Result<(), Violation> {
        let record = &mut *self.judge.record;
        match event {
            Event::Configuration { machine } if machine != record.machine.as_bytes() => {
                let (expected, found) =
                    (format!("{:?}", record.machine), format!("{:?}", printable(machine)));
                Err(Violation::new("INV-H2", at, "configuration", expected, found))
            }
            Event::ConfigurationUuid { uuid } => record.uuid(at, "configuration", &uuid),
            Event::SwitchoverStart if !record.switchover_start_known => {
                let expected = "no SWITCHOVER_START for a machine type before 10.0";
                Err(Violation::new("INV-C9", at, "command", expected, "SWITCHOVER_START"))
            }
            Event::Block { index, name, length_bytes } => record.block(at, index, name, length_bytes),
            Event::BlocksEnd { total_bytes } => record.blocks_end(at, total_bytes),
            Event::SyncMarker => {
                record.markers += 1;
                Ok(())
            }
            // With multifd the last pages may still be on their way: `finish` looks again.
            Event::RamEnd { part: Part::End } if !record.multifd => record.check_memory(at),
            Event::DevicesBegin => {
                self.held.begin = Some(at);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// SWITCHOVER_START came with the machine types of 10.0; older types never send it, and types without a version
/// (`microvm`) follow their QEMU.
fn knows_switchover_start(machine: &str) -> bool {
    let version =
        machine.rsplit('-').next().and_then(|v| v.split_once('.')).and_then(|(v, _)| v.parse::<u32>().ok());
    version.is_none_or(|major| major >= 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_machine_types_from_10_0_announce_the_switchover() {
        for (machine, expect) in [
            ("pc-q35-10.0", true),
            ("pc-q35-11.1", true),
            ("microvm", true),
            ("pc-q35-9.2", false),
            ("pc-i440fx-7.2", false),
        ] {
            assert_eq!(knows_switchover_start(machine), expect, "{machine}");
        }
    }
}
