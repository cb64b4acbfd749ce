//! The inspector: decides which bytes of a stream may reach the target's QEMU, and the source's end detector.
//!
//! Zero trust in the source: a compromised source QEMU is the attacker that this defends against. The grammar of
//! the stream is checked by `wire::qemu`; here its content is compared with the VM's record (the [`Inventory`])
//! and the permit (the [`Limits`]):
//!
//! - RAM flows through: a byte is released as soon as the record header that it belongs to is validated.
//! - From the first byte behind the last END footer everything is held, until the whole device state, the end mark
//!   and the description are there and [`Inspector::finish`] accepts them; then it is released in one piece. QEMU
//!   can't start the guest before it has read the end mark, so a refusal at that point costs nothing.
//! - The first violation ends it: nothing more is released, whatever comes.
//!
//! Memory of one inspector: a bit for each guest page ([`coverage_bytes`]), the held device state
//! ([`Limits::device_state_bytes`]), and a few KiB.
//!
//! What it does not do yet: the values inside device sections (INV-D4 to D8), firmware hashes (R14), multifd,
//! post-copy and compression, all of which are refused by the grammar.

mod coverage;
pub mod devices;
mod end;
mod learn;

pub use end::EndDetector;
pub use learn::{LearnError, learn};
pub use wire::qemu::Violation;

use coverage::Coverage;
use std::collections::BTreeMap;
use types::VmId;
use types::inventory::{DeviceSection, Inventory};
use types::migration::{Finding, Severity};
use types::permit::PermitClaims;
use wire::qemu::device::DeviceState;
use wire::qemu::{Event, MAX_RAM_BLOCKS, Parser, ParserOptions, Sink, printable};

/// Device state of an ordinary machine is under 1 MiB; more has to be enrolled.
pub const DEFAULT_DEVICE_STATE_BYTES: usize = 16 << 20;
/// Guest memory above this needs more than 128 MiB for the coverage map and is refused.
pub const MAX_GUEST_BYTES: u64 = 4 << 40;

/// What the permit allows of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes, all told (INV-T5).
    pub stream_bytes: u64,
    /// Most bytes of device state and description, held in memory (INV-D9).
    pub device_state_bytes: usize,
    /// The VM's UUID, in case the stream names one (INV-H4).
    pub vm: Option<VmId>,
    /// Whether OPEN_RETURN_PATH must come first (INV-T3). Off only for enrolment.
    pub return_path_required: bool,
}

/// Why there can be no inspector for a record and permit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// The permit allows what this inspector can't judge.
    #[error("the permit allows {feature}, which this inspector can't judge")]
    Feature {
        /// The feature.
        feature: &'static str,
    },
    /// The inventory makes no sense.
    #[error("the VM's inventory is unusable: {why}")]
    Inventory {
        /// What is wrong with it.
        why: &'static str,
    },
}

impl Limits {
    /// The limits that a permit sets.
    ///
    /// # Errors
    /// A permit for features that can't be judged yet.
    pub fn of_permit(claims: &PermitClaims) -> Result<Self, Unsupported> {
        let features = &claims.features;
        let wanted = [
            (features.multifd_channels != 0, "multifd"),
            (features.postcopy, "post-copy"),
            (!features.compression.is_empty(), "compression"),
            (!features.storage_exports.is_empty(), "storage"),
        ];
        if let Some((_, feature)) = wanted.into_iter().find(|(on, _)| *on) {
            return Err(Unsupported::Feature { feature });
        }
        Ok(Self {
            stream_bytes: claims.byte_budget,
            device_state_bytes: DEFAULT_DEVICE_STATE_BYTES,
            vm: Some(claims.key.vm),
            return_path_required: true,
        })
    }
}

/// Bytes of memory that the coverage map of a VM takes.
#[must_use]
pub fn coverage_bytes(inventory: &Inventory) -> u64 {
    let total = inventory.ram_blocks.iter().fold(0u64, |sum, block| sum.saturating_add(block.length_bytes));
    total / u64::from(inventory.page_size_bytes.max(1)) / 8
}

/// A complete, accepted stream's last piece: to be released in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldState {
    /// Device state, end mark and description.
    pub bytes: Vec<u8>,
    /// Number of device sections.
    pub devices: usize,
}

/// Pages seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pages {
    /// With content.
    pub normal: u64,
    /// Of zeros.
    pub zero: u64,
}

/// The inspector of one main channel.
#[derive(Debug)]
pub struct Inspector {
    parser: Parser,
    rules: Rules,
    page_size_bytes: u32,
    max_stream_bytes: u64,
    fed: u64,
    failure: Option<Violation>,
}

impl Inspector {
    /// An inspector for a VM and a permit.
    ///
    /// # Errors
    /// An inventory that no stream could match.
    pub fn new(inventory: &Inventory, limits: &Limits) -> Result<Self, Unsupported> {
        check_inventory(inventory)?;
        let options = ParserOptions {
            page_size_bytes: inventory.page_size_bytes,
            return_path_required: limits.return_path_required,
        };
        Ok(Self {
            parser: Parser::new(options),
            rules: Rules::new(inventory, limits),
            page_size_bytes: inventory.page_size_bytes,
            max_stream_bytes: limits.stream_bytes,
            fed: 0,
            failure: None,
        })
    }

    /// Takes the next bytes of the channel and gives what may be released to `release`, in order and without gaps.
    /// What is not given is held, here.
    ///
    /// # Errors
    /// The first violation. Nothing of this call's bytes is released then, and every later call fails alike.
    pub fn feed(&mut self, input: &[u8], release: &mut dyn FnMut(&[u8])) -> Result<(), Violation> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.feed_inner(input, release).inspect_err(|violation| self.failure = Some(violation.clone()))
    }

    fn feed_inner(&mut self, input: &[u8], release: &mut dyn FnMut(&[u8])) -> Result<(), Violation> {
        let begin = self.fed;
        self.fed = self.fed.saturating_add(input.len() as u64);
        if self.fed > self.max_stream_bytes {
            let expected = format!("at most {} bytes", self.max_stream_bytes);
            return Err(Violation::new("INV-T5", self.max_stream_bytes, "stream", expected, "more"));
        }
        let carried = self.parser.pending().to_vec();
        self.parser.feed(input, &mut self.rules)?;
        let releasable = self.parser.validated().min(self.rules.devices_begin.unwrap_or(u64::MAX));
        // Carried bytes are an incomplete item: it was completed by this input, or still is none.
        if releasable > begin {
            if !carried.is_empty() {
                release(&carried);
            }
            let count = usize::try_from(releasable - begin).unwrap_or(usize::MAX).min(input.len());
            release(input.get(..count).unwrap_or(input));
        }
        Ok(())
    }

    /// The sender says that the stream is complete: judges the device state as a whole.
    ///
    /// # Errors
    /// What is missing or wrong; nothing of it may be released then.
    pub fn finish(&mut self) -> Result<HeldState, Violation> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.finish_inner().inspect_err(|violation| self.failure = Some(violation.clone()))
    }

    fn finish_inner(&mut self) -> Result<HeldState, Violation> {
        let (Some(base), Some(ram_id)) = (self.rules.devices_begin, self.parser.ram_id()) else {
            let awaiting = self.parser.awaiting();
            return Err(Violation::new("INV-S10", self.fed, "stream", awaiting, "the end of the stream"));
        };
        let bytes = std::mem::take(&mut self.rules.held);
        let state = DeviceState::read(&bytes, base, ram_id, self.page_size_bytes)?;
        self.rules.check_devices(&state, base)?;
        let devices = state.sections.len();
        Ok(HeldState { bytes, devices })
    }

    /// Bytes fed so far.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.fed
    }

    /// Bytes of device state held; nothing before the RAM section ended.
    #[must_use]
    pub fn held_bytes(&self) -> Option<usize> {
        self.rules.devices_begin.map(|_| self.rules.held.len())
    }

    /// The name of a RAM block by its index in the stream's own list, fit to be shown.
    #[must_use]
    pub fn block_name(&self, index: usize) -> Option<String> {
        self.parser.blocks()?.name(index).map(printable)
    }

    /// Pages so far.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.rules.pages
    }
}

fn check_inventory(inventory: &Inventory) -> Result<(), Unsupported> {
    let unusable = |why| Err(Unsupported::Inventory { why });
    let page = u64::from(inventory.page_size_bytes);
    if !page.is_power_of_two() || !(4096..=65536).contains(&page) {
        return unusable("the page size is no power of two from 4096 to 65536");
    }
    if inventory.ram_blocks.is_empty() || inventory.ram_blocks.len() > MAX_RAM_BLOCKS {
        return unusable("it has no RAM blocks, or too many");
    }
    let total = inventory.ram_blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.length_bytes));
    if total.is_none_or(|total| total > MAX_GUEST_BYTES) {
        return unusable("its RAM is larger than can be tracked");
    }
    let whole = |length: u64| length != 0 && length.is_multiple_of(page);
    if !inventory.ram_blocks.iter().all(|block| whole(block.length_bytes)) {
        return unusable("a RAM block is not a whole number of pages");
    }
    Ok(())
}

/// What the stream is compared with, and what came so far.
#[derive(Debug)]
struct Rules {
    machine: String,
    switchover_start_known: bool,
    vm: Option<VmId>,
    blocks: BTreeMap<Vec<u8>, u64>,
    total_bytes: u64,
    devices: Vec<DeviceSection>,
    page_size_bytes: u64,
    coverage: Coverage,
    pages: Pages,
    devices_begin: Option<u64>,
    held: Vec<u8>,
    max_held_bytes: usize,
}

impl Rules {
    fn new(inventory: &Inventory, limits: &Limits) -> Self {
        let blocks: BTreeMap<_, _> =
            inventory.ram_blocks.iter().map(|b| (b.name.clone().into_bytes(), b.length_bytes)).collect();
        Self {
            switchover_start_known: knows_switchover_start(&inventory.machine),
            machine: inventory.machine.clone(),
            vm: limits.vm,
            total_bytes: blocks.values().sum(),
            blocks,
            devices: inventory.devices.clone(),
            page_size_bytes: u64::from(inventory.page_size_bytes),
            coverage: Coverage::default(),
            pages: Pages::default(),
            devices_begin: None,
            held: Vec::new(),
            max_held_bytes: limits.device_state_bytes,
        }
    }

    fn block(&mut self, at: u64, name: &[u8], length: u64) -> Result<(), Violation> {
        let shown = printable(name);
        match self.blocks.get(name) {
            Some(expected) if *expected == length => {
                self.coverage.add_block(length / self.page_size_bytes);
                Ok(())
            }
            Some(expected) => Err(Violation::new(
                "INV-R4",
                at,
                format!("ram block {shown:?}"),
                format!("{expected} bytes"),
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
            let found = format!("{seen} blocks");
            return Err(Violation::new(
                "INV-R4",
                at,
                "ram block list",
                format!("all {expected} blocks"),
                found,
            ));
        }
        if total != self.total_bytes {
            let expected = format!("{} bytes in all", self.total_bytes);
            return Err(Violation::new("INV-R3", at, "ram block list", expected, format!("{total} bytes")));
        }
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64) {
        self.coverage.mark(block, offset / self.page_size_bytes);
    }

    fn hold(&mut self, at: u64, bytes: &[u8]) -> Result<(), Violation> {
        if self.held.len() + bytes.len() > self.max_held_bytes {
            let expected = format!("at most {} bytes", self.max_held_bytes);
            return Err(Violation::new("INV-D9", at, "devices", expected, "more"));
        }
        self.held.extend_from_slice(bytes);
        Ok(())
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

    fn check_devices(&self, state: &DeviceState<'_>, base: u64) -> Result<(), Violation> {
        if state.sections.is_empty() {
            let at = base + state.end_mark as u64;
            return Err(Violation::new("INV-S10", at, "devices", "device sections", "none"));
        }
        if self.devices.is_empty() {
            return Ok(());
        }
        let mut missing: BTreeMap<_, _> =
            self.devices.iter().map(|d| ((d.name.as_str(), d.instance), d.version)).collect();
        for section in &state.sections {
            let at = base + section.start as u64;
            let shown = format!("{:?}, instance {}", section.name, section.instance);
            match missing.remove(&(section.name, section.instance)) {
                None => {
                    return Err(Violation::new("INV-S5", at, section.name, "an enrolled device", shown));
                }
                Some(version) if version != section.version => {
                    let found = format!("version {}", section.version);
                    return Err(Violation::new(
                        "INV-S7",
                        at,
                        section.name,
                        format!("version {version}"),
                        found,
                    ));
                }
                Some(_) => {}
            }
        }
        match missing.keys().next() {
            None => Ok(()),
            Some((name, instance)) => {
                let at = base + state.end_mark as u64;
                let expected = format!("{name:?}, instance {instance}");
                Err(Violation::new("INV-S10", at, "devices", expected, "the end of the stream"))
            }
        }
    }
}

impl Sink for Rules {
    fn event(&mut self, at: u64, event: Event<'_>) -> Result<(), Violation> {
        match event {
            Event::Configuration { machine } if machine != self.machine.as_bytes() => {
                let (expected, found) = (format!("{:?}", self.machine), format!("{:?}", printable(machine)));
                Err(Violation::new("INV-H2", at, "configuration", expected, found))
            }
            Event::ConfigurationUuid { uuid } if self.vm.is_none_or(|vm| *vm.as_bytes() != uuid) => {
                Err(Violation::new("INV-H4", at, "configuration", "the permitted VM's UUID", "another UUID"))
            }
            Event::SwitchoverStart if !self.switchover_start_known => {
                let expected = "no SWITCHOVER_START for a machine type before 10.0";
                Err(Violation::new("INV-C9", at, "command", expected, "SWITCHOVER_START"))
            }
            Event::Block { name, length_bytes, .. } => self.block(at, name, length_bytes),
            Event::BlocksEnd { total_bytes } => self.blocks_end(at, total_bytes),
            Event::Page { block, offset } => {
                self.page(block, offset);
                self.pages.normal += 1;
                Ok(())
            }
            Event::ZeroPage { block, offset } => {
                self.page(block, offset);
                self.pages.zero += 1;
                Ok(())
            }
            Event::RamEnd { part: wire::qemu::Part::End } if self.coverage.missing() != 0 => {
                let found = format!("{} pages never sent", self.coverage.missing());
                Err(Violation::new("INV-R13", at, "ram", "every page at least once", found))
            }
            Event::DevicesBegin => {
                self.devices_begin = Some(at);
                Ok(())
            }
            Event::DeviceBytes(bytes) => {
                if self.held.is_empty() {
                    Self::first_device_byte(at, bytes)?;
                }
                self.hold(at, bytes)
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

/// The finding of a violation, as it is reported.
#[must_use]
pub fn finding(violation: &Violation, channel: u16, response: &str) -> Finding {
    Finding {
        rule: violation.rule.to_owned(),
        threat: threat(violation.rule).to_owned(),
        severity: Severity::Critical,
        channel,
        offset: violation.offset,
        section: violation.section.clone(),
        expected: violation.expected.clone(),
        found: violation.found.clone(),
        response: response.to_owned(),
    }
}

/// The threat that a rule stands against.
fn threat(rule: &str) -> &'static str {
    match rule {
        "INV-T5" | "INV-D9" => "MM-12",
        "INV-R3" | "INV-R4" | "INV-R6" | "INV-R7" | "INV-R8" | "INV-R9" => "MM-04",
        "INV-R2" | "INV-S2" | "INV-S6" | "INV-S9" | "INV-S11" | "INV-E3" => "MM-05",
        "INV-S5" | "INV-S7" | "INV-S10" => "MM-06",
        "INV-C2" | "INV-C3" | "INV-C8" => "MM-08",
        "INV-D2" | "INV-D3" | "INV-E2" => "MM-11",
        _ => "MM-01",
    }
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
