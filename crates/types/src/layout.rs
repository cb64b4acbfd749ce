//! What a VM's device sections look like on the target's own QEMU: compiled from a dry run, read by the inspector.
//!
//! A catalogue says where fields are and what may be absent. It never says what is allowed in them, except where a
//! value must be what the target's own QEMU wrote: then it brings the bytes.

use serde::{Deserialize, Serialize};

/// The longest catalogue as a JSON document.
pub const MAX_CATALOGUE_BYTES: usize = 4 << 20;
/// Most layouts of one catalogue; a machine with fifty devices has about 300.
pub const MAX_LAYOUTS: usize = 16 * 1024;
/// Most sections of one catalogue; real machines have under a hundred.
pub const MAX_SECTIONS: usize = 4096;
/// Most fields and subsections of one layout, taken together; the largest real one has under 200.
pub const MAX_FIELDS: usize = 4096;
/// Most elements of one array; the longest real one is 131,076 bytes.
pub const MAX_ELEMENTS: u32 = 1 << 20;
/// Deepest nesting; the deepest real one is 7.
pub const MAX_DEPTH: usize = 16;
/// Longest element; the longest real one is the framebuffer of a graphics card's cursor.
pub const MAX_ELEMENT_BYTES: u32 = 64 << 20;

/// The device sections of one VM on one QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogue {
    /// Hypervisor and version that made the dry run, e.g. `qemu/10.0.2`.
    pub hypervisor: String,
    /// The exact machine type, e.g. `pc-q35-10.0`.
    pub machine: String,
    /// Every layout that sections refer to by index. A layout refers only to ones before it, so there are no cycles.
    pub layouts: Vec<Layout>,
    /// The sections in stream order.
    pub sections: Vec<SectionLayout>,
}

/// One device section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionLayout {
    /// Its idstr.
    #[serde(rename = "n")]
    pub name: String,
    /// Its instance.
    #[serde(rename = "i", default, skip_serializing_if = "is_zero")]
    pub instance: u32,
    /// Its version.
    #[serde(rename = "v")]
    pub version: u32,
    /// Index of its layout; nothing where its length can't be derived as the destination derives it.
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<u32>,
    /// Why there is no layout.
    #[serde(rename = "w", default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

/// One VMState description, as this VM has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Name of the description.
    #[serde(rename = "n")]
    pub vmsd: String,
    /// Its version.
    #[serde(rename = "v", default, skip_serializing_if = "is_zero")]
    pub version: u32,
    /// The oldest version that has the same fields; nothing means its version.
    #[serde(rename = "m", default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<u32>,
    /// Whether the destination knows it, but its fields can't be told: it is then never read exactly.
    #[serde(rename = "o", default, skip_serializing_if = "is_false")]
    pub opaque: bool,
    /// Its fields in wire order.
    #[serde(rename = "f", default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<Field>,
    /// Indices of the subsections' layouts, in the order that the destination declares.
    #[serde(rename = "s", default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<u32>,
}

/// One field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// Its name.
    #[serde(rename = "n")]
    pub name: String,
    /// What is on the wire.
    #[serde(rename = "k")]
    pub kind: Kind,
    /// When it is there; nothing means always.
    #[serde(rename = "w", default, skip_serializing_if = "Option::is_none")]
    pub when: Option<When>,
    /// What it held in the dry run, where a rule asks for the same.
    #[serde(rename = "p", default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<HexBytes>,
}

/// What a field is on the wire.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// That many bytes.
    #[serde(rename = "b")]
    Bytes(u32),
    /// Scalars: size of one in bytes, and how many.
    #[serde(rename = "a")]
    Array(u32, u32),
    /// Scalars that an earlier field of the same description counts.
    #[serde(rename = "v")]
    Counted(Counted),
    /// Structs: index of the layout, and how many.
    #[serde(rename = "s")]
    Structs(u32, u32),
    /// Structs that an earlier field counts; the size is the layout's index.
    #[serde(rename = "d")]
    CountedStructs(Counted),
    /// The configuration space of a PCI device: as the dry run had it, without the zeros at its end, and its size.
    #[serde(rename = "pci")]
    PciConfig(HexBytes, u32),
    /// What virtio writes by hand.
    #[serde(rename = "virtio")]
    Virtio(Box<Virtio>),
    /// Requests in flight on a SCSI device. Only an empty list can be read exactly.
    #[serde(rename = "scsi")]
    ScsiRequests,
}

/// A count that comes from an earlier field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counted {
    /// Size of one scalar in bytes, or index of the struct's layout.
    #[serde(rename = "s")]
    pub element: u32,
    /// The field.
    #[serde(rename = "f")]
    pub field: String,
    /// The least that it may hold.
    #[serde(rename = "l", default, skip_serializing_if = "is_zero")]
    pub least: u32,
    /// The most that it may hold.
    #[serde(rename = "m")]
    pub most: u32,
    /// How many of those it counts are written elsewhere.
    #[serde(rename = "e", default, skip_serializing_if = "is_zero")]
    pub elsewhere: u32,
}

/// A condition on a field's presence, as the destination tests it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum When {
    /// An earlier field of the same description is not zero.
    #[serde(rename = "nz")]
    NotZero(String),
    /// The virtio device's guest took this feature, one of the first 32.
    #[serde(rename = "vf")]
    VirtioFeature(u8),
}

/// A virtio device on PCI, as the dry run had it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Virtio {
    /// Layout of its PCI device.
    #[serde(rename = "p")]
    pub pci: u32,
    /// Entries of its MSI-X table; none if it has no MSI-X.
    #[serde(rename = "x", default, skip_serializing_if = "Option::is_none")]
    pub msix_entries: Option<u16>,
    /// Length of its configuration in bytes.
    #[serde(rename = "c")]
    pub config_bytes: u32,
    /// Its queues; a network device may have its smallest number instead.
    #[serde(rename = "q")]
    pub queues: u32,
    /// Whether its queues may be packed.
    #[serde(rename = "k", default, skip_serializing_if = "is_false")]
    pub packed: bool,
    /// What its device writes by hand, behind the queues.
    #[serde(rename = "d")]
    pub device: VirtioDevice,
    /// Layout of its device's own description, if it has one.
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<u32>,
    /// Layout of what comes last, with virtio's subsections.
    #[serde(rename = "s")]
    pub subsections: u32,
}

/// The part of a virtio device that is written by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum VirtioDevice {
    /// Nothing.
    #[serde(rename = "none")]
    None,
    /// A network device: nothing, but the number of queues depends on what the guest took.
    #[serde(rename = "net")]
    Net,
    /// A disk: requests in flight.
    #[serde(rename = "blk")]
    Blk,
    /// A serial bus with so many ports at most.
    #[serde(rename = "serial")]
    Serial(u32),
}

/// Bytes, written in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct HexBytes(pub Vec<u8>);

impl Serialize for HexBytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        hex::decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
const fn is_zero(value: &u32) -> bool {
    *value == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// Why a catalogue can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogueError {
    /// Something is larger than any real machine needs.
    #[error("the catalogue has too many {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
    },
    /// A layout refers to itself, to a later one, or to none.
    #[error("layout {layout} of the catalogue refers to one that does not come before it")]
    Reference {
        /// The layout.
        layout: usize,
    },
    /// An array has elements without bytes, so that nothing would bound the work.
    #[error("layout {layout} of the catalogue has an array of nothing")]
    Empty {
        /// The layout.
        layout: usize,
    },
}

impl Catalogue {
    /// The section of that name and instance.
    #[must_use]
    pub fn section(&self, name: &str, instance: u32) -> Option<&SectionLayout> {
        self.sections.iter().find(|section| section.name == name && section.instance == instance)
    }

    /// Checks the bounds that keep the reading of a stream by this catalogue finite and shallow.
    ///
    /// # Errors
    /// The first bound that does not hold.
    pub fn validate(&self) -> Result<(), CatalogueError> {
        let too_many = |what| Err(CatalogueError::TooMany { what });
        if self.layouts.len() > MAX_LAYOUTS {
            return too_many("layouts");
        }
        if self.sections.len() > MAX_SECTIONS {
            return too_many("sections");
        }
        let mut known: Vec<Bounds> = Vec::with_capacity(self.layouts.len());
        for layout in &self.layouts {
            let bounds = Bounds::of(layout, &known)?;
            if bounds.depth > MAX_DEPTH {
                return too_many("levels");
            }
            known.push(bounds);
        }
        match self.sections.iter().filter_map(|s| s.layout).find(|l| *l as usize >= known.len()) {
            Some(layout) => Err(CatalogueError::Reference { layout: layout as usize }),
            None => Ok(()),
        }
    }
}

/// What a layout costs.
#[derive(Clone, Copy)]
struct Bounds {
    depth: usize,
    /// Bytes that are always there.
    least_bytes: u64,
}

impl Bounds {
    fn of(layout: &Layout, known: &[Self]) -> Result<Self, CatalogueError> {
        if layout.fields.len() + layout.subsections.len() > MAX_FIELDS {
            return Err(CatalogueError::TooMany { what: "fields" });
        }
        let mut bounds = Self { depth: 1, least_bytes: 0 };
        for field in &layout.fields {
            let least = bounds.field(field, known)?;
            if field.when.is_none() {
                bounds.least_bytes = bounds.least_bytes.saturating_add(least);
            }
        }
        for subsection in &layout.subsections {
            bounds.refer(*subsection, known)?;
        }
        Ok(bounds)
    }

    /// Takes a reference in; the bytes that the layout has at least.
    fn refer(&mut self, index: u32, known: &[Self]) -> Result<u64, CatalogueError> {
        let bounds = known.get(index as usize).ok_or(CatalogueError::Reference { layout: known.len() })?;
        self.depth = self.depth.max(bounds.depth + 1);
        Ok(bounds.least_bytes)
    }

    fn field(&mut self, field: &Field, known: &[Self]) -> Result<u64, CatalogueError> {
        let (count, least, element) = match &field.kind {
            Kind::Bytes(size) | Kind::PciConfig(_, size) => (1, 1, u64::from(*size)),
            Kind::Array(size, count) => (*count, *count, u64::from(*size)),
            Kind::Counted(c) => (c.most, c.least.saturating_sub(c.elsewhere), u64::from(c.element)),
            Kind::Structs(layout, count) => (*count, *count, self.refer(*layout, known)?),
            Kind::CountedStructs(c) => {
                (c.most, c.least.saturating_sub(c.elsewhere), self.refer(c.element, known)?)
            }
            Kind::Virtio(virtio) => {
                for layout in
                    [Some(virtio.pci), virtio.layout, Some(virtio.subsections)].into_iter().flatten()
                {
                    self.refer(layout, known)?;
                }
                (1, 1, 1)
            }
            Kind::ScsiRequests => (1, 1, 1),
        };
        if count > MAX_ELEMENTS || element > u64::from(MAX_ELEMENT_BYTES) {
            return Err(CatalogueError::TooMany { what: "elements" });
        }
        if count > 1 && element == 0 {
            return Err(CatalogueError::Empty { layout: known.len() });
        }
        Ok(element.saturating_mul(u64::from(least)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn layout(fields: Vec<Kind>) -> Layout {
        let field = |kind| Field { name: "f".to_owned(), kind, when: None, pinned: None };
        Layout { vmsd: "v".to_owned(), fields: fields.into_iter().map(field).collect(), ..Layout::default() }
    }

    fn check(layouts: Vec<Layout>, expect: Result<(), CatalogueError>) {
        let catalogue = Catalogue { layouts, ..Catalogue::default() };
        assert_eq!(catalogue.validate(), expect, "{catalogue:?}");
    }

    #[test]
    fn layouts_refer_only_to_earlier_ones() {
        let byte = layout(vec![Kind::Bytes(1)]);
        check(vec![byte.clone(), layout(vec![Kind::Structs(0, 3)])], Ok(()));
        let reference = |layout| Err(CatalogueError::Reference { layout });
        check(vec![layout(vec![Kind::Structs(0, 1)])], reference(0));
        check(vec![layout(vec![Kind::Structs(1, 1)]), byte.clone()], reference(0));
        check(vec![Layout { subsections: vec![7], ..byte }], reference(0));
    }

    #[test]
    fn arrays_of_nothing_and_great_depth_are_refused() {
        let empty = layout(Vec::new());
        check(vec![empty.clone(), layout(vec![Kind::Structs(0, 1)])], Ok(()));
        check(vec![empty, layout(vec![Kind::Structs(0, 2)])], Err(CatalogueError::Empty { layout: 1 }));
        let maybe = Counted { element: 1, field: "n".to_owned(), least: 0, most: 9, elsewhere: 0 };
        let layouts = vec![layout(vec![Kind::Counted(maybe)]), layout(vec![Kind::Structs(0, 2)])];
        check(layouts, Err(CatalogueError::Empty { layout: 1 }));
        let nested = |depth: u32| {
            let mut layouts = vec![layout(vec![Kind::Bytes(1)])];
            layouts.extend((1..depth).map(|n| layout(vec![Kind::Structs(n - 1, 1)])));
            layouts
        };
        check(nested(16), Ok(()));
        check(nested(17), Err(CatalogueError::TooMany { what: "levels" }));
        let too_long = layout(vec![Kind::Array(1, MAX_ELEMENTS + 1)]);
        check(vec![too_long], Err(CatalogueError::TooMany { what: "elements" }));
    }

    #[test]
    fn sections_refer_to_layouts_that_are_there() {
        let section = |layout| SectionLayout {
            name: "timer".to_owned(),
            instance: 0,
            version: 2,
            layout: Some(layout),
            why: String::new(),
        };
        let layouts = vec![layout(vec![Kind::Bytes(24)])];
        let good = Catalogue { layouts, sections: vec![section(0)], ..Catalogue::default() };
        assert_eq!(good.validate(), Ok(()));
        let bad = Catalogue { sections: vec![section(1)], ..good };
        assert_eq!(bad.validate(), Err(CatalogueError::Reference { layout: 1 }));
    }

    #[test]
    fn json_is_short_and_comes_back_the_same() {
        let pinned = Some(HexBytes(vec![3]));
        let count = Field { name: "n".to_owned(), kind: Kind::Bytes(1), when: None, pinned };
        let when = Some(When::NotZero("n".to_owned()));
        let more = Field { name: "m".to_owned(), kind: Kind::Array(8, 4), when, pinned: None };
        let layout =
            Layout { vmsd: "v".to_owned(), version: 1, fields: vec![count, more], ..Layout::default() };
        let json = serde_json::to_string(&layout).unwrap();
        let expect = r#"{"n":"v","v":1,"f":[{"n":"n","k":{"b":1},"p":"03"},{"n":"m","k":{"a":[8,4]},"w":{"nz":"n"}}]}"#;
        assert_eq!(json, expect);
        assert_eq!(serde_json::from_str::<Layout>(&json).unwrap(), layout);
        assert!(serde_json::from_str::<Layout>(r#"{"n":"v","x":1}"#).is_err());
    }
}
