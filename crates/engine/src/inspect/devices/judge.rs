//! Judges a whole device state: every section's length, every value with a rule, and that nothing is missing.

use super::parse::{Reader, Stop};
use super::values::Tables;
use std::collections::{BTreeMap, BTreeSet};
use types::inventory::{self, Inventory};
use types::layout::{Catalogue, SectionLayout};
use wire::qemu::Violation;
use wire::qemu::device::{DeviceSection, DeviceState, SectionStart, fixed_length};

/// What to do with a section whose length the catalogue can't derive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unvouched {
    /// Refuse the stream.
    Refuse,
    /// Accept it where it has one possible end only, and say so. What the catalogue has a layout of is judged
    /// all the same, up to the parts that no layout tells: a source can't choose to be judged less.
    Report,
}

/// How a section's length was proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vouched {
    /// Derived as the destination derives it; its values were looked at.
    Layout,
    /// It is one of the few whose length is fixed or told by itself; its values are unknown.
    FixedLength,
    /// It has one possible end only; its values were looked at, except those of subsections that no layout
    /// tells.
    Partly,
    /// It has one possible end only; its values are unknown.
    UniqueCut,
}

/// One accepted section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgedSection {
    /// Its idstr.
    pub name: String,
    /// Its instance.
    pub instance: u32,
    /// Its version.
    pub version: u32,
    /// Where its header starts in the stream of its channel.
    pub offset: u64,
    /// Length of its state in bytes.
    pub bytes: usize,
    /// How its length was proved.
    pub vouched: Vouched,
}

/// An accepted device state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The sections in stream order.
    pub sections: Vec<JudgedSection>,
    /// Where the end mark is in the blob.
    pub end_mark: usize,
}

/// Judges the device state in `blob`, whose first byte is at `base` in the stream, from the first device section to
/// the last byte of the description. `ram_id` is the section id that `ram` has, `page_size` in bytes.
///
/// Without a catalogue a section is accepted where it has one possible end only, or is one of the few with a fixed
/// length; `unvouched` does not matter then.
///
/// # Errors
/// The first broken rule. Nothing of the blob may be released then.
pub fn judge(
    blob: &[u8],
    base: u64,
    ram_id: u32,
    page_size: u32,
    inventory: &Inventory,
    catalogue: Option<&Catalogue>,
    unvouched: Unvouched,
) -> Result<Judged, Violation> {
    let Some(catalogue) = catalogue else {
        let mut fixed = |section: &SectionStart<'_>| Ok(fixed_length(section, blob));
        let state = DeviceState::read_with(blob, base, ram_id, page_size, &mut fixed)?;
        check_complete(&state, base, &inventory.devices)?;
        return Ok(judged(&state, base, |section| match section.exact {
            true => Vouched::FixedLength,
            false => Vouched::UniqueCut,
        }));
    };
    catalogue.validate().map_err(|error| unusable(base, &error.to_string()))?;
    if catalogue.machine != inventory.machine {
        return Err(unusable(base, &format!("one of {:?}", catalogue.machine)));
    }
    let lengths = Lengths {
        blob,
        base,
        tables: &Tables::new(&catalogue.layouts),
        unvouched,
        sections: by_name(catalogue),
    };
    let state = DeviceState::read_with(blob, base, ram_id, page_size, &mut |section| lengths.of(section))?;
    let partly = lengths.judge_cut(&state)?;
    if inventory.devices.is_empty() {
        check_complete(&state, base, &devices(catalogue))?;
    } else {
        check_complete(&state, base, &inventory.devices)?;
    }
    Ok(judged(&state, base, |section| match (lengths.has_layout(section), section.exact) {
        (true, true) => Vouched::Layout,
        (false, true) => Vouched::FixedLength,
        (_, false) if partly.contains(&section.id) => Vouched::Partly,
        (_, false) => Vouched::UniqueCut,
    }))
}

fn unusable(base: u64, found: &str) -> Violation {
    Violation::new("INV-D2", base, "catalogue", "a catalogue of this VM", found)
}

fn by_name(catalogue: &Catalogue) -> BTreeMap<(&str, u32), &SectionLayout> {
    catalogue.sections.iter().map(|section| ((section.name.as_str(), section.instance), section)).collect()
}

fn devices(catalogue: &Catalogue) -> Vec<inventory::DeviceSection> {
    let device = |s: &SectionLayout| inventory::DeviceSection {
        name: s.name.clone(),
        instance: s.instance,
        version: s.version,
    };
    catalogue.sections.iter().map(device).collect()
}

fn judged(state: &DeviceState<'_>, base: u64, vouched: impl Fn(&DeviceSection<'_>) -> Vouched) -> Judged {
    let section = |section: &DeviceSection<'_>| JudgedSection {
        name: section.name.to_owned(),
        instance: section.instance,
        version: section.version,
        offset: base + section.start as u64,
        bytes: section.payload.len(),
        vouched: vouched(section),
    };
    Judged { sections: state.sections.iter().map(section).collect(), end_mark: state.end_mark }
}

/// Derives the length of each section from the catalogue.
struct Lengths<'c, 'b> {
    blob: &'b [u8],
    base: u64,
    tables: &'c Tables<'c>,
    unvouched: Unvouched,
    sections: BTreeMap<(&'c str, u32), &'c SectionLayout>,
}

impl<'b> Lengths<'_, 'b> {
    fn of(&self, section: &SectionStart<'b>) -> Result<Option<usize>, Violation> {
        let at = self.base + section.start as u64;
        let Some(known) = self.sections.get(&(section.name, section.instance)) else {
            let found = format!("{:?}, instance {}", section.name, section.instance);
            return Err(Violation::new("INV-S5", at, section.name, "a device of the target", found));
        };
        if known.version != section.version {
            let (expected, found) =
                (format!("version {}", known.version), format!("version {}", section.version));
            return Err(Violation::new("INV-S7", at, section.name, expected, found));
        }
        let Some(layout) = known.layout else {
            return match self.unvouched {
                Unvouched::Report => Ok(fixed_length(section, self.blob)),
                Unvouched::Refuse => Err(self.unknown(section.name, section.start, &known.why)),
            };
        };
        let mut reader = self.reader(section.name, section.payload..section.limit);
        match (reader.layout(layout), self.unvouched) {
            (Ok(()), _) => Ok(Some(reader.at().saturating_sub(section.payload))),
            (Err(Stop::Layout(violation) | Stop::Value(violation)), _) => Err(violation),
            (Err(Stop::Unknown(why)), Unvouched::Refuse) => {
                Err(self.unknown(section.name, section.start, &why))
            }
            // Its end has to be the only possible one; then it is read again.
            (Err(Stop::Unknown(_)), Unvouched::Report) => Ok(None),
        }
    }

    fn has_layout(&self, section: &DeviceSection<'_>) -> bool {
        let known = self.sections.get(&(section.name, section.instance));
        known.is_some_and(|known| known.layout.is_some())
    }

    /// Judges sections that have a layout and a part that no layout tells the length of; their ids. Which
    /// devices are not judged is the catalogue's word, never the source's: all but that part keeps its rules.
    fn judge_cut(&self, state: &DeviceState<'b>) -> Result<BTreeSet<u32>, Violation> {
        let mut partly = BTreeSet::new();
        for section in state.sections.iter().filter(|section| !section.exact) {
            let known = self.sections.get(&(section.name, section.instance));
            let Some(layout) = known.and_then(|known| known.layout) else { continue };
            let mut reader = self.reader(section.name, section.payload.clone()).of_cut();
            match reader.layout(layout) {
                Ok(()) if reader.at() == section.payload.end => drop(partly.insert(section.id)),
                // The part that can't be read begins in the cut and ends outside of it.
                Ok(()) => return Err(self.unknown(section.name, section.start, "it ends inside of a part")),
                Err(Stop::Layout(violation) | Stop::Value(violation)) => return Err(violation),
                Err(Stop::Unknown(why)) => return Err(self.unknown(section.name, section.start, &why)),
            }
        }
        Ok(partly)
    }

    fn reader(&self, section: &'b str, range: std::ops::Range<usize>) -> Reader<'_, 'b> {
        Reader::new(self.tables, self.blob, self.base, section, range)
    }

    fn unknown(&self, section: &str, start: usize, why: &str) -> Violation {
        let expected = match self.unvouched {
            Unvouched::Refuse => "a device whose state can be vouched for; the VM's policy can allow others",
            Unvouched::Report => "a device that is read by its layout, where the target has one",
        };
        let found = format!("{section:?}: {why}");
        Violation::new("INV-D2", self.base + start as u64, section, expected, found)
    }
}

/// Every enrolled section came, in its version, and no other (INV-S5, S7, S10). No list means that none was enrolled.
fn check_complete(
    state: &DeviceState<'_>,
    base: u64,
    enrolled: &[inventory::DeviceSection],
) -> Result<(), Violation> {
    let end = base + state.end_mark as u64;
    if state.sections.is_empty() {
        return Err(Violation::new("INV-S10", end, "devices", "device sections", "none"));
    }
    if enrolled.is_empty() {
        return Ok(());
    }
    let mut missing: BTreeSet<_> =
        enrolled.iter().map(|d| (d.name.as_str(), d.instance, d.version)).collect();
    for section in &state.sections {
        let at = base + section.start as u64;
        if missing.remove(&(section.name, section.instance, section.version)) {
            continue;
        }
        let other =
            missing.iter().find(|(name, instance, _)| (*name, *instance) == (section.name, section.instance));
        return Err(match other {
            Some((_, _, version)) => {
                let found = format!("version {}", section.version);
                Violation::new("INV-S7", at, section.name, format!("version {version}"), found)
            }
            None => {
                let found = format!("{:?}, instance {}", section.name, section.instance);
                Violation::new("INV-S5", at, section.name, "an enrolled device", found)
            }
        });
    }
    match missing.first() {
        None => Ok(()),
        Some((name, instance, _)) => {
            let expected = format!("{name:?}, instance {instance}");
            Err(Violation::new("INV-S10", end, "devices", expected, "the end of the stream"))
        }
    }
}
