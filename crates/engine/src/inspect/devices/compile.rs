//! Compiles the catalogue of a VM from a dry run of the target's own QEMU and its dump of descriptions.
//!
//! The dry run is the same VM, started with `-S` and migrated to a file: it has every section, and at its end the
//! tree of fields with their sizes. The dump (`-dump-vmstate`) adds what a fresh VM does not show: subsections and
//! conditional fields. The result is tried on the dry run itself; a section that it does not read to the last byte
//! gets no layout.

use super::build::Builder;
use super::describe::{Description, Device, Dump};
use super::parse::{Reader, Stop};
use super::values::Tables;
use types::layout::{Catalogue, CatalogueError, SectionLayout};
use wire::qemu::device::{DeviceSection, DeviceState};
use wire::qemu::{Event, Parser, ParserOptions, SyncMarkers, Violation, printable};

/// Why there is no catalogue.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The dry run breaks a rule of the stream, so it is no recording of a migration.
    #[error("the dry run is no migratable stream: {0}")]
    Broken(Violation),
    /// It stops too early.
    #[error("the dry run ends too early, at {awaiting}")]
    Incomplete {
        /// What was missing.
        awaiting: &'static str,
    },
    /// A description can't be read.
    #[error("the {what} can't be read")]
    Description {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The dump was made for another machine type.
    #[error("the dump of descriptions is of {dump:?}, the dry run of {dry_run:?}")]
    Machine {
        /// The dump's.
        dump: String,
        /// The dry run's.
        dry_run: String,
    },
    /// The target's own QEMU writes a value that a rule refuses: no stream of this VM could be accepted.
    #[error("the dry run has a value that a rule refuses: {0}")]
    Value(Violation),
    /// The result is larger than a catalogue may be.
    #[error("the VM is too large for a catalogue")]
    TooLarge {
        /// The bound.
        #[source]
        source: CatalogueError,
    },
}

impl From<Violation> for CompileError {
    fn from(violation: Violation) -> Self {
        Self::Broken(violation)
    }
}

const PAGE_SIZE_BYTES: u32 = 4096;

/// The catalogue of the VM whose dry run this is; `dump` is what `-dump-vmstate` of the same QEMU and machine type
/// wrote. Without a dump only sections that need none get a layout.
///
/// # Errors
/// A dry run that is no complete pre-copy main channel, or a dump of another machine type.
pub fn compile(dry_run: &[u8], dump: Option<&[u8]>, hypervisor: &str) -> Result<Catalogue, CompileError> {
    let recording = Recording::read(dry_run)?;
    let unreadable = |what| move |source| CompileError::Description { what, source };
    let dump = dump.map(Dump::read).transpose().map_err(unreadable("dump of descriptions"))?;
    if let Some(machine) = dump.as_ref().and_then(|dump| dump.machine.as_deref())
        && machine != recording.machine
    {
        return Err(CompileError::Machine { dump: machine.to_owned(), dry_run: recording.machine });
    }
    let state = DeviceState::read(&recording.held, recording.base, recording.ram_id, PAGE_SIZE_BYTES)?;
    let description: Description = serde_json::from_slice(state.description(&recording.held))
        .map_err(unreadable("description in the dry run"))?;
    let cpus = recording.possible_cpus(&description);
    let mut builder = Builder::new(dump.as_ref(), cpus);
    let mut sections = Vec::with_capacity(state.sections.len());
    for (section, device) in state.sections.iter().zip(&description.devices) {
        sections.push(recording.section(&mut builder, section, device)?);
    }
    let catalogue = Catalogue {
        hypervisor: hypervisor.to_owned(),
        machine: recording.machine,
        layouts: builder.layouts,
        sections,
    };
    catalogue.validate().map_err(|source| CompileError::TooLarge { source })?;
    Ok(catalogue)
}

/// What a dry run shows.
struct Recording {
    machine: String,
    base: u64,
    ram_id: u32,
    /// Device state and description.
    held: Vec<u8>,
    /// The ACPI tables that the guest's firmware will load.
    acpi: Vec<u8>,
}

/// The block that QEMU writes ACPI tables to, and the most that is looked at.
const ACPI_BLOCK: &[u8] = b"/rom@etc/acpi/tables";
const MAX_ACPI_BYTES: usize = 2 << 20;

impl Recording {
    fn read(dry_run: &[u8]) -> Result<Self, CompileError> {
        let options = ParserOptions {
            page_size_bytes: PAGE_SIZE_BYTES,
            return_path_required: false,
            multifd_markers: Some(SyncMarkers::FlushWords),
        };
        let mut parser = Parser::new(options);
        let (mut machine, mut held, mut begin, mut acpi) = (Vec::new(), Vec::new(), None, Vec::new());
        let (mut acpi_block, mut acpi_at) = (None, None);
        parser.feed(dry_run, &mut |at: u64, event: Event<'_>| {
            match event {
                Event::Configuration { machine: name } => machine = name.to_vec(),
                Event::Block { index, name: ACPI_BLOCK, .. } => acpi_block = Some(index),
                Event::Page { block, offset } => {
                    acpi_at =
                        (Some(block) == acpi_block).then(|| usize::try_from(offset).unwrap_or(usize::MAX));
                }
                Event::PageBytes(bytes) => acpi_at = acpi_at.and_then(|at| write_at(&mut acpi, at, bytes)),
                Event::DevicesBegin => begin = Some(at),
                Event::DeviceBytes(bytes) => held.extend_from_slice(bytes),
                _ => {}
            }
            Ok(())
        })?;
        let (Some(base), Some(ram_id)) = (begin, parser.ram_id()) else {
            return Err(CompileError::Incomplete { awaiting: parser.awaiting() });
        };
        Ok(Self { machine: printable(&machine), base, ram_id, held, acpi })
    }

    /// CPUs that the machine can have: each has an entry in the ACPI table of interrupt controllers. Without ACPI,
    /// those that it has.
    fn possible_cpus(&self, description: &Description) -> u32 {
        let present = description.devices.iter().filter(|d| d.name == "cpu").count();
        let present = u32::try_from(present).unwrap_or(u32::MAX);
        let tables = self.acpi.windows(4).enumerate().filter(|(_, signature)| *signature == b"APIC");
        let counted = tables.filter_map(|(at, _)| madt_cpus(self.acpi.get(at..)?)).max();
        counted.unwrap_or(present).max(present)
    }

    fn section(
        &self,
        builder: &mut Builder<'_>,
        section: &DeviceSection<'_>,
        device: &Device,
    ) -> Result<SectionLayout, CompileError> {
        let state = self.held.get(section.payload.clone()).unwrap_or_default();
        let mark = builder.layouts.len();
        let (layout, why) = match builder.section(&device.node, state) {
            Ok(layout) => match self.try_out(builder, section, layout)? {
                None => (Some(layout), String::new()),
                Some(why) => (None, why),
            },
            Err(why) => (None, why),
        };
        if layout.is_none() {
            builder.forget(mark);
        }
        Ok(SectionLayout {
            name: section.name.to_owned(),
            instance: device.instance_id,
            version: section.version,
            layout,
            why,
        })
    }

    /// Reads the dry run's own section by its new layout; what is wrong with it, if anything.
    fn try_out(
        &self,
        builder: &Builder<'_>,
        section: &DeviceSection<'_>,
        layout: u32,
    ) -> Result<Option<String>, CompileError> {
        let tables = Tables::new(&builder.layouts);
        let range = section.payload.clone();
        let mut reader = Reader::new(&tables, &self.held, self.base, section.name, range);
        match reader.layout(layout) {
            Ok(()) if reader.at() == section.payload.end => Ok(None),
            Ok(()) => Ok(Some("its layout does not take all its bytes".to_owned())),
            Err(Stop::Layout(violation)) => Ok(Some(format!("its layout does not fit: {violation}"))),
            Err(Stop::Unknown(why)) => Ok(Some(why)),
            Err(Stop::Value(violation)) => Err(CompileError::Value(violation)),
        }
    }
}

/// Puts bytes where they belong; where the next ones go.
fn write_at(memory: &mut Vec<u8>, at: usize, bytes: &[u8]) -> Option<usize> {
    let end = at.checked_add(bytes.len()).filter(|end| *end <= MAX_ACPI_BYTES)?;
    if memory.len() < end {
        memory.resize(end, 0);
    }
    memory.get_mut(at..end)?.copy_from_slice(bytes);
    Some(end)
}

/// The processors in an ACPI table of interrupt controllers; nothing if it is none.
fn madt_cpus(table: &[u8]) -> Option<u32> {
    const HEADER_BYTES: usize = 44;
    const LOCAL_APIC: u8 = 0;
    const LOCAL_X2APIC: u8 = 9;
    let length = u32::from_le_bytes(table.get(4..8)?.try_into().ok()?) as usize;
    let mut entries = table.get(HEADER_BYTES..length)?;
    let mut cpus = 0;
    while let Some((&kind, rest)) = entries.split_first() {
        let length = usize::from(*rest.first()?);
        cpus += u32::from(matches!(kind, LOCAL_APIC | LOCAL_X2APIC));
        entries = entries.get(length.max(2)..)?;
    }
    (cpus > 0).then_some(cpus)
}
