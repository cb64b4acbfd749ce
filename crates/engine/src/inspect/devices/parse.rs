//! Reads one section's state exactly as the destination will: fields in order, then whatever subsections come.
//!
//! The stream's own description is never asked. Counts come from the catalogue, or from an earlier field where the
//! destination takes them from there, too. The work is bounded by the bytes at hand: a catalogue that passed
//! `validate` has no arrays of nothing, no cycles and little depth.

use super::codecs::pci;
use super::rule::{Breach, Fields, number};
use super::values::{self, Tables};
use types::layout::{Counted, Field, Kind, Layout, When};
use wire::qemu::{Violation, printable};

/// Why a section could not be read.
#[derive(Debug)]
pub(super) enum Stop {
    /// It does not fit its layout.
    Layout(Violation),
    /// A value in it breaks a rule.
    Value(Violation),
    /// It has a part that no layout tells the length of.
    Unknown(String),
}

/// Type byte of a subsection.
const SUBSECTION: u8 = 5;

/// Where the reading is.
#[derive(Debug)]
pub(super) struct Reader<'t, 'b> {
    tables: &'t Tables<'t>,
    blob: &'b [u8],
    base: u64,
    section: &'b str,
    at: usize,
    end: usize,
    /// Whether `end` is known to be where the section's state ends.
    cut: bool,
    /// Structs that are being read, the section's own included.
    depth: usize,
    /// The fields of the structs that are being read, the innermost one's last: name and bytes.
    stack: Vec<(&'t str, &'b [u8])>,
    /// Beside it: where each starts, and its index in its layout.
    places: Vec<(usize, usize)>,
    /// The first 32 features that a virtio device's guest took.
    pub(super) features: u32,
}

impl<'t, 'b> Reader<'t, 'b> {
    /// Reads `section` from `at`, never past `end`; `base` is the blob's offset in the stream.
    pub(super) fn new(
        tables: &'t Tables<'t>,
        blob: &'b [u8],
        base: u64,
        section: &'b str,
        range: std::ops::Range<usize>,
    ) -> Self {
        let (stack, places) = (Vec::with_capacity(64), Vec::with_capacity(64));
        let (at, end) = (range.start, range.end.min(blob.len()));
        Self { tables, blob, base, section, at, end, cut: false, depth: 0, stack, places, features: 0 }
    }

    /// The same of a section whose state is known to end where the reading has to, whatever is in it: parts that
    /// can't be read are left out, where everything else still can be.
    pub(super) fn of_cut(self) -> Self {
        Self { cut: true, ..self }
    }

    /// Where the reading is.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// A violation of a value at `at`.
    pub(super) fn value(&self, rule: &'static str, at: usize, field: &str, breach: Breach) -> Stop {
        Stop::Value(self.violation(rule, at, field, breach.expected, &breach.found))
    }

    fn violation(
        &self,
        rule: &'static str,
        at: usize,
        field: &str,
        expected: impl Into<String>,
        found: &str,
    ) -> Violation {
        let place = format!("{}/{field}", self.section);
        Violation::new(rule, self.base + at as u64, place, expected, found)
    }

    /// The next bytes.
    pub(super) fn take(&mut self, bytes: usize, field: &str) -> Result<&'b [u8], Stop> {
        let end = self.at.checked_add(bytes).filter(|end| *end <= self.end);
        let piece = end.and_then(|end| self.blob.get(self.at..end));
        let (Some(piece), Some(end)) = (piece, end) else {
            let expected = format!("{bytes} more bytes, by its layout");
            return Err(Stop::Layout(self.violation("INV-D2", self.at, field, expected, "the end")));
        };
        self.at = end;
        Ok(piece)
    }

    /// The next bytes as a number.
    pub(super) fn take_number(&mut self, bytes: usize, field: &str) -> Result<u64, Stop> {
        Ok(number(self.take(bytes, field)?).unwrap_or(0))
    }

    /// One struct: its fields, what they hold, then its subsections.
    pub(super) fn layout(&mut self, index: u32) -> Result<(), Stop> {
        let tables = self.tables;
        let Some(layout) = tables.layout(index) else {
            return Err(Stop::Unknown(format!("layout {index} is not in the catalogue")));
        };
        if layout.opaque {
            return Err(Stop::Unknown(format!("the fields of {:?} can't be told", layout.vmsd)));
        }
        self.depth += 1;
        let frame = self.stack.len();
        for (place, field) in layout.fields.iter().enumerate() {
            if self.is_present(field, frame) {
                self.field(layout, place, field, frame)?;
            }
        }
        self.values(index, layout, frame)?;
        self.stack.truncate(frame);
        self.places.truncate(frame);
        self.subsections(layout)?;
        self.depth -= 1;
        Ok(())
    }

    fn is_present(&self, field: &Field, frame: usize) -> bool {
        match &field.when {
            None => true,
            Some(When::NotZero(other)) => {
                self.bytes_of(other, frame).is_some_and(|bytes| bytes.iter().any(|b| *b != 0))
            }
            Some(When::VirtioFeature(bit)) => {
                self.features.checked_shr(u32::from(*bit)).unwrap_or(0) & 1 == 1
            }
        }
    }

    fn bytes_of(&self, name: &str, frame: usize) -> Option<&'b [u8]> {
        let fields = self.stack.get(frame..).unwrap_or_default();
        Fields { fields }.bytes(name)
    }

    fn field(
        &mut self,
        layout: &'t Layout,
        place: usize,
        field: &'t Field,
        frame: usize,
    ) -> Result<(), Stop> {
        let start = self.at;
        let bytes = match &field.kind {
            Kind::Bytes(size) => self.take(*size as usize, &field.name)?,
            Kind::Array(size, count) => {
                self.take((*size as usize).saturating_mul(*count as usize), &field.name)?
            }
            Kind::Counted(counted) => {
                let count = self.count(layout, counted, frame)?;
                self.take((counted.element as usize).saturating_mul(count as usize), &field.name)?
            }
            Kind::PciConfig(expected, size) => {
                let config = self.take(*size as usize, &field.name)?;
                pci::check(config, &expected.0).map_err(|(rule, offset, breach)| {
                    self.value(rule, start + offset, &format!("{}.{}", layout.vmsd, field.name), breach)
                })?;
                config
            }
            Kind::Structs(index, count) => return self.structs(*index, *count),
            Kind::CountedStructs(counted) => {
                let count = self.count(layout, counted, frame)?;
                return self.structs(counted.element, count);
            }
            Kind::Virtio(virtio) => return self.virtio(virtio),
            Kind::ScsiRequests => return self.scsi_requests(),
        };
        self.stack.push((&field.name, bytes));
        self.places.push((start, place));
        Ok(())
    }

    fn structs(&mut self, index: u32, count: u32) -> Result<(), Stop> {
        (0..count).try_for_each(|_| self.layout(index))
    }

    fn count(&self, layout: &Layout, counted: &Counted, frame: usize) -> Result<u32, Stop> {
        let held = self.bytes_of(&counted.field, frame).and_then(number);
        let within = |n: &u64| (u64::from(counted.least)..=u64::from(counted.most)).contains(n);
        match held.filter(within).and_then(|n| u32::try_from(n).ok()) {
            Some(count) => Ok(count.saturating_sub(counted.elsewhere)),
            None => {
                let expected = format!("a count from {} to {}", counted.least, counted.most);
                let found = held.map_or_else(|| "none".to_owned(), |n| n.to_string());
                let field = format!("{}.{}", layout.vmsd, counted.field);
                Err(self.value("INV-D5", self.at, &field, Breach { expected, found }))
            }
        }
    }

    /// What the struct that was just read holds.
    fn values(&self, index: u32, layout: &Layout, frame: usize) -> Result<(), Stop> {
        if !self.tables.watches(index) {
            return Ok(());
        }
        let fields = Fields { fields: self.stack.get(frame..).unwrap_or_default() };
        let places = self.places.get(frame..).unwrap_or_default();
        for ((_, bytes), (at, place)) in fields.fields.iter().zip(places) {
            let Some(field) = layout.fields.get(*place) else { continue };
            for rule in self.tables.rules(index, *place) {
                values::check(rule, field, bytes, &fields).map_err(|breach| {
                    self.value(rule.rule, *at, &format!("{}.{}", layout.vmsd, field.name), breach)
                })?;
            }
        }
        Ok(())
    }

    /// Subsections, by the destination's own test: one byte of type, and a name that begins with the parent's.
    fn subsections(&mut self, layout: &'t Layout) -> Result<(), Stop> {
        let mut next = 0;
        while let Some(name) = self.subsection_name(&layout.vmsd, self.at) {
            let index = self.subsection_head(layout, name, &mut next)?;
            if self.cut && self.depth == 1 && self.is_opaque(index) {
                return self.behind_opaque(layout, next);
            }
            self.layout(index)?;
        }
        Ok(())
    }

    /// A subsection's type, name and version: one that the layout has, at `next` or behind it. Its index.
    fn subsection_head(&mut self, layout: &'t Layout, name: &[u8], next: &mut usize) -> Result<u32, Stop> {
        let start = self.at;
        let refuse = |expected: String, found: &str| {
            Err(Stop::Layout(self.violation("INV-D4", start, &layout.vmsd, expected, found)))
        };
        let Some((place, index, sub)) = self.subsection_of(layout, name) else {
            return refuse(
                "a subsection that the target knows".to_owned(),
                &format!("{:?}", printable(name)),
            );
        };
        if place < *next {
            let found = format!("{:?} out of order or again", sub.vmsd);
            return refuse("subsections in their order, each once".to_owned(), &found);
        }
        *next = place + 1;
        self.take(2 + name.len(), &sub.vmsd)?;
        let version = self.take_number(4, &sub.vmsd)?;
        let oldest = u64::from(sub.minimum.unwrap_or(sub.version));
        if !(oldest..=u64::from(sub.version)).contains(&version) {
            let expected = format!("version {} of {:?}", sub.version, sub.vmsd);
            let found = format!("version {version}");
            return Err(Stop::Layout(self.violation("INV-D4", start, &layout.vmsd, expected, &found)));
        }
        Ok(index)
    }

    /// What may come behind a subsection of the section's own layout that can't be read. Wherever that ends, the
    /// destination goes on with another subsection that it knows, or is at the section's end. So every place
    /// that begins one is read as one: whichever the destination takes, it was judged (MM-07). An honest section
    /// has them in their order, each up to the next one or the end.
    fn behind_opaque(&mut self, layout: &'t Layout, mut next: usize) -> Result<(), Stop> {
        let mut from = self.at;
        while let Some((at, name)) = (from..self.end).find_map(|at| Some((at, self.known_at(layout, at)?))) {
            self.at = at;
            let index = self.subsection_head(layout, name, &mut next)?;
            if !self.is_opaque(index) {
                self.layout(index)?;
                if self.at != self.end && self.known_at(layout, self.at).is_none() {
                    let (expected, found) = ("another subsection or the end", "something else");
                    return Err(Stop::Layout(self.violation(
                        "INV-D2",
                        self.at,
                        &layout.vmsd,
                        expected,
                        found,
                    )));
                }
            }
            from = at + 1;
        }
        self.at = self.end;
        Ok(())
    }

    fn is_opaque(&self, index: u32) -> bool {
        self.tables.layout(index).is_some_and(|layout| layout.opaque)
    }

    /// A subsection by its name: its place, its layout's index, its layout.
    fn subsection_of(&self, layout: &'t Layout, name: &[u8]) -> Option<(usize, u32, &'t Layout)> {
        layout.subsections.iter().enumerate().find_map(|(place, index)| {
            let sub = self.tables.layout(*index)?;
            (sub.vmsd.as_bytes() == name).then_some((place, *index, sub))
        })
    }

    /// The name of the subsection of `layout` that starts at `at`, if one does.
    fn known_at(&self, layout: &'t Layout, at: usize) -> Option<&'b [u8]> {
        // The destination compares C strings: a name with a NUL inside is the known one to it. It begins one here as well,
        // and `subsection_head`, which compares whole names, then refuses it.
        let as_c = |name: &&'b [u8]| name.split(|byte| *byte == 0).next().unwrap_or_default();
        self.subsection_name(&layout.vmsd, at).filter(|name| self.subsection_of(layout, as_c(name)).is_some())
    }

    /// The name of the subsection that starts at `at`, if one does.
    fn subsection_name(&self, parent: &str, at: usize) -> Option<&'b [u8]> {
        let rest = self.blob.get(at..self.end)?;
        let (&kind, rest) = rest.split_first()?;
        if kind != SUBSECTION {
            return None;
        }
        let (&length, rest) = rest.split_first()?;
        let name = rest.get(..usize::from(length))?;
        (name.len() > parent.len() && name.starts_with(parent.as_bytes())).then_some(name)
    }
}
