//! Enrolment: the inventory of a VM from a recording of its own, trusted QEMU.

use super::firmware::{MAX_FIRMWARE_BYTES, is_firmware};
use std::collections::BTreeMap;
use types::handover::Digest;
use types::inventory::{DeviceSection, Inventory, RamBlock};
use wire::qemu::device::DeviceState;
use wire::qemu::{Event, Parser, ParserOptions, Sink, SyncMarkers, Violation, printable};

const PAGE_SIZE_BYTES: u32 = 4096;
/// Most bytes of device state that a recording may hold: more than any machine has.
pub const MAX_HELD_BYTES: usize = 64 << 20;

/// Why nothing was learned.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The recording breaks a rule, so it is no stream that could be migrated.
    #[error("the recording is no migratable stream: {0}")]
    Broken(Violation),
    /// It stops too early.
    #[error("the recording ends too early, at {awaiting}")]
    Incomplete {
        /// What was missing.
        awaiting: &'static str,
    },
    /// A name in it is no text.
    #[error("the recording has a name that is no text: {name}")]
    NotText {
        /// The name.
        name: String,
    },
}

impl From<Violation> for LearnError {
    fn from(violation: Violation) -> Self {
        Self::Broken(violation)
    }
}

fn text(name: &[u8]) -> Result<String, LearnError> {
    String::from_utf8(name.to_vec()).map_err(|_| LearnError::NotText { name: printable(name) })
}

/// The inventory that a whole main channel shows, in one piece. See [`Learner`].
///
/// # Errors
/// A recording that is no complete pre-copy main channel.
pub fn learn(recording: &[u8], hypervisor: &str) -> Result<Inventory, LearnError> {
    let mut learner = Learner::default();
    learner.feed(recording)?;
    Ok(learner.finish(hypervisor)?.inventory)
}

/// Learns an inventory from a recorded main channel, piece by piece. It need not have a return path. Firmware is pinned by
/// its content where the main channel carries it (with multifd the other channels do).
///
/// Memory: the firmware (at most [`MAX_FIRMWARE_BYTES`]) and the device state (at most [`MAX_HELD_BYTES`]).
#[derive(Debug)]
pub struct Learner {
    parser: Parser,
    seen: Seen,
}

/// What a recording taught.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Learned {
    /// The VM's inventory.
    pub inventory: Inventory,
    /// The device state, from its first section to the last byte of the description.
    pub device_state: Vec<u8>,
    /// Whether OPEN_RETURN_PATH came.
    pub return_path: bool,
}

impl Default for Learner {
    fn default() -> Self {
        let options = ParserOptions {
            page_size_bytes: PAGE_SIZE_BYTES,
            return_path_required: false,
            // The recording may be of a migration with multifd.
            multifd_markers: Some(SyncMarkers::FlushWords),
        };
        Self { parser: Parser::new(options), seen: Seen::default() }
    }
}

impl Learner {
    /// The next bytes of the main channel.
    ///
    /// # Errors
    /// They break the grammar.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), LearnError> {
        Ok(self.parser.feed(bytes, &mut self.seen)?)
    }

    /// The recording is complete.
    ///
    /// # Errors
    /// It is not, or its device state is not sound.
    pub fn finish(self, hypervisor: &str) -> Result<Learned, LearnError> {
        let Self { parser, seen } = self;
        let (Some(base), Some(ram_id)) = (seen.begin, parser.ram_id()) else {
            return Err(LearnError::Incomplete { awaiting: parser.awaiting() });
        };
        let state = DeviceState::read(&seen.held, base, ram_id, PAGE_SIZE_BYTES)?;
        let device = |s: &wire::qemu::device::DeviceSection<'_>| DeviceSection {
            name: s.name.to_owned(),
            instance: s.instance,
            version: s.version,
        };
        let devices = state.sections.iter().map(device).collect();
        let mut ram_blocks = Vec::with_capacity(seen.blocks.len());
        for (index, (name, length_bytes)) in seen.blocks.iter().enumerate() {
            let content = seen.firmware.get(&index).and_then(Copy::content);
            ram_blocks.push(RamBlock { name: text(name)?, length_bytes: *length_bytes, content });
        }
        let inventory = Inventory {
            machine: text(&seen.machine)?,
            page_size_bytes: PAGE_SIZE_BYTES,
            ram_blocks,
            devices,
            hypervisor: hypervisor.to_owned(),
        };
        Ok(Learned { inventory, device_state: seen.held, return_path: seen.return_path })
    }
}

/// A firmware block as the recording writes it.
#[derive(Debug)]
struct Copy {
    bytes: Vec<u8>,
    pages_missing: u64,
}

impl Copy {
    /// Its digest, if every page of it was there.
    fn content(&self) -> Option<Digest> {
        (self.pages_missing == 0).then(|| Digest::of(&self.bytes))
    }

    fn write(&mut self, offset: u64, piece: &[u8]) {
        let place = usize::try_from(offset)
            .ok()
            .and_then(|start| self.bytes.get_mut(start..start.checked_add(piece.len())?));
        if let Some(place) = place {
            place.copy_from_slice(piece);
        }
    }
}

/// What came so far.
#[derive(Debug, Default)]
struct Seen {
    machine: Vec<u8>,
    blocks: Vec<(Vec<u8>, u64)>,
    firmware: BTreeMap<usize, Copy>,
    firmware_bytes: u64,
    cursor: (usize, u64),
    begin: Option<u64>,
    held: Vec<u8>,
    return_path: bool,
}

impl Seen {
    fn block(&mut self, index: usize, name: &[u8], length_bytes: u64) {
        self.blocks.push((name.to_vec(), length_bytes));
        let firmware = std::str::from_utf8(name).is_ok_and(is_firmware);
        let total = self.firmware_bytes.saturating_add(length_bytes);
        if firmware && total <= MAX_FIRMWARE_BYTES {
            self.firmware_bytes = total;
            let bytes = vec![0; usize::try_from(length_bytes).unwrap_or(0)];
            let pages_missing = length_bytes / u64::from(PAGE_SIZE_BYTES);
            self.firmware.insert(index, Copy { bytes, pages_missing });
        }
    }

    fn page(&mut self, block: usize) {
        if let Some(copy) = self.firmware.get_mut(&block) {
            copy.pages_missing = copy.pages_missing.saturating_sub(1);
        }
    }
}

impl Sink for Seen {
    fn event(&mut self, at: u64, event: Event<'_>) -> Result<(), Violation> {
        match event {
            Event::Configuration { machine } => self.machine = machine.to_vec(),
            Event::Block { index, name, length_bytes } => self.block(index, name, length_bytes),
            Event::Page { block, offset } => {
                self.page(block);
                self.cursor = (block, offset);
            }
            Event::PageBytes(piece) => {
                let (block, offset) = self.cursor;
                if let Some(copy) = self.firmware.get_mut(&block) {
                    copy.write(offset, piece);
                }
                self.cursor.1 += piece.len() as u64;
            }
            Event::ZeroPage { block, .. } => self.page(block),
            Event::DevicesBegin => self.begin = Some(at),
            Event::OpenReturnPath => self.return_path = true,
            Event::DeviceBytes(bytes) if self.held.len() + bytes.len() > MAX_HELD_BYTES => {
                let expected = format!("at most {MAX_HELD_BYTES} bytes of device state");
                return Err(Violation::new("INV-D9", at, "devices", expected, "more"));
            }
            Event::DeviceBytes(bytes) => self.held.extend_from_slice(bytes),
            _ => {}
        }
        Ok(())
    }
}
