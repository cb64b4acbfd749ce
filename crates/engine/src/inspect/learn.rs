//! Enrolment: the inventory of a VM from a recording of its own, trusted QEMU.

use types::inventory::{DeviceSection, Inventory, RamBlock};
use wire::qemu::device::DeviceState;
use wire::qemu::{Event, Parser, ParserOptions, Violation, printable};

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

/// The inventory that a whole recording shows. It need not have a return path.
///
/// # Errors
/// A recording that is no complete pre-copy main channel.
pub fn learn(recording: &[u8], hypervisor: &str) -> Result<Inventory, LearnError> {
    const PAGE_SIZE_BYTES: u32 = 4096;
    let options = ParserOptions { page_size_bytes: PAGE_SIZE_BYTES, return_path_required: false };
    let mut parser = Parser::new(options);
    let (mut machine, mut blocks, mut held, mut begin) = (Vec::new(), Vec::new(), Vec::new(), None);
    parser.feed(recording, &mut |at: u64, event: Event<'_>| {
        match event {
            Event::Configuration { machine: name } => machine = name.to_vec(),
            Event::Block { name, length_bytes, .. } => blocks.push((name.to_vec(), length_bytes)),
            Event::DevicesBegin => begin = Some(at),
            Event::DeviceBytes(bytes) => held.extend_from_slice(bytes),
            _ => {}
        }
        Ok(())
    })?;
    let (Some(base), Some(ram_id)) = (begin, parser.ram_id()) else {
        return Err(LearnError::Incomplete { awaiting: parser.awaiting() });
    };
    let state = DeviceState::read(&held, base, ram_id, PAGE_SIZE_BYTES)?;
    let device = |s: &wire::qemu::device::DeviceSection<'_>| DeviceSection {
        name: s.name.to_owned(),
        instance: s.instance,
        version: s.version,
    };
    let block = |(name, length_bytes): (Vec<u8>, u64)| Ok(RamBlock { name: text(&name)?, length_bytes });
    Ok(Inventory {
        machine: text(&machine)?,
        page_size_bytes: PAGE_SIZE_BYTES,
        ram_blocks: blocks.into_iter().map(block).collect::<Result<_, LearnError>>()?,
        devices: state.sections.iter().map(device).collect(),
        hypervisor: hypervisor.to_owned(),
    })
}
