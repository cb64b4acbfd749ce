//! Builds layouts: from a dry run's description and bytes beside what is declared, or from declarations alone.

use super::codecs::{pci, virtio};
use super::describe::{Declared, DeclaredField, Dump, Node, NodeField};
use super::known::{self, Condition, Hand, Part};
use super::rule::Expect;
use super::values;
use super::{align, parse};
use std::collections::{BTreeMap, BTreeSet};
use types::layout::{Counted, Field, HexBytes, Kind, Layout, MAX_LAYOUTS};

/// Why a description has no layout.
pub(super) type Why = String;

/// Collects layouts, each once.
#[derive(Debug)]
pub(super) struct Builder<'d> {
    pub(super) layouts: Vec<Layout>,
    index: BTreeMap<Layout, u32>,
    pins: BTreeSet<(&'static str, &'static str)>,
    dump: Option<&'d Dump>,
    /// Declarations by name, as they were asked for.
    dumped: BTreeMap<String, Vec<&'d Declared>>,
    /// CPUs that the machine can have.
    cpus: u32,
}

/// What is known of a description besides the dry run.
#[derive(Debug, Clone, Copy)]
enum Known<'d> {
    /// Its declaration.
    Declared(&'d Declared),
    /// Its subsections, by hand; its fields are the dry run's.
    Hand(&'static [Hand]),
}

impl<'d> Builder<'d> {
    pub(super) fn new(dump: Option<&'d Dump>, cpus: u32) -> Self {
        let pinned = values::all_rules().filter(|r| matches!(r.expect, Expect::Pinned));
        let pins = pinned.map(|rule| (rule.vmsd, rule.field)).collect();
        Self { layouts: Vec::new(), index: BTreeMap::new(), pins, dump, dumped: BTreeMap::new(), cpus }
    }

    /// The index of a layout.
    pub(super) fn intern(&mut self, layout: Layout) -> Result<u32, Why> {
        if let Some(index) = self.index.get(&layout) {
            return Ok(*index);
        }
        let index = u32::try_from(self.layouts.len()).unwrap_or(u32::MAX);
        if self.layouts.len() >= MAX_LAYOUTS {
            return Err("the machine has too many descriptions".to_owned());
        }
        self.index.insert(layout.clone(), index);
        self.layouts.push(layout);
        Ok(index)
    }

    /// Drops the layouts from `length` on, after a try that failed.
    pub(super) fn forget(&mut self, length: usize) {
        self.layouts.truncate(length);
        self.index.retain(|_, index| (*index as usize) < length);
    }

    /// A section's layout, from its description and state in the dry run.
    pub(super) fn section(&mut self, node: &Node, state: &[u8]) -> Result<u32, Why> {
        let vmsd = node.vmsd_name.as_deref().ok_or("it is written by hand, without a description")?;
        if let Some(hand) = known::whole(vmsd) {
            return self.by_hand(hand);
        }
        let candidates = self.dumped(vmsd);
        if let (Some(hand), []) = (known::root(vmsd), candidates.as_slice()) {
            return self.node(node, state, Known::Hand(hand.subs));
        }
        if self.dump.is_none() {
            return Err("no dump of descriptions came with the dry run".to_owned());
        }
        let mut found: Option<u32> = None;
        let mut why = format!("{vmsd:?} is not in the dump of descriptions");
        for declared in candidates {
            let mark = self.layouts.len();
            match self.node(node, state, Known::Declared(declared)) {
                Ok(index) if found.is_some_and(|other| other != index) => {
                    return Err(format!("several descriptions are called {vmsd:?}"));
                }
                Ok(index) => found = Some(index),
                Err(reason) => {
                    self.forget(mark);
                    why = reason;
                }
            }
        }
        found.ok_or(why)
    }

    fn node(&mut self, node: &Node, state: &[u8], known: Known<'d>) -> Result<u32, Why> {
        let vmsd = node.vmsd_name.clone().unwrap_or_default();
        self.pieces(&vmsd, node.version, &node.fields, &node.subsections, state, known)
            .map(|(index, _)| index)
    }

    /// A description in the dry run: its layout, and the bytes that it took.
    fn pieces(
        &mut self,
        vmsd: &str,
        version: u32,
        fields: &[NodeField],
        subsections: &[Node],
        state: &[u8],
        known: Known<'d>,
    ) -> Result<(u32, usize), Why> {
        let mut layout = Layout { vmsd: vmsd.to_owned(), version, ..Layout::default() };
        let mut at = 0usize;
        match known {
            Known::Hand(_) => {
                for field in fields {
                    let bytes = piece(state, at, field.bytes())?;
                    let name = field.name.clone();
                    let run = std::slice::from_ref(field);
                    self.push(&mut layout, &name, run, bytes, None)?;
                    at += field.bytes();
                }
            }
            Known::Declared(declared) => {
                layout.minimum = minimum(declared);
                for (declaration, run) in align::align(declared, fields)? {
                    at += self.declared_field(&mut layout, declaration, run, state, at)?;
                }
            }
        }
        let mut left: Vec<_> = subsections.iter().collect();
        let declared_subs: Vec<(&str, Known<'d>, Result<&Declared, &'static Hand>)> = match known {
            Known::Hand(subs) => subs.iter().map(|h| (h.vmsd, Known::Hand(h.subs), Err(h))).collect(),
            Known::Declared(d) => {
                d.subsections.iter().map(|d| (d.name.as_str(), Known::Declared(d), Ok(d))).collect()
            }
        };
        // Bytes follow the order in the stream, layouts the order of declaration: the same, or the stream is odd.
        for (name, known, alone) in declared_subs {
            let index = if left.first().is_some_and(|sub| sub.vmsd_name.as_deref() == Some(name)) {
                let sub = left.remove(0);
                let head = 6 + name.len();
                let rest = state.get(at + head..).unwrap_or_default();
                let (index, length) =
                    self.pieces(name, sub.version, &sub.fields, &sub.subsections, rest, known)?;
                at += head + length;
                index
            } else {
                match alone {
                    Ok(declared) => self.declared(declared)?,
                    Err(hand) => self.by_hand(hand)?,
                }
            };
            layout.subsections.push(index);
        }
        if let Some(sub) = left.first() {
            let name = sub.vmsd_name.clone().unwrap_or_default();
            return Err(format!("the subsection {name:?} is not declared there"));
        }
        Ok((self.intern(layout)?, at))
    }

    /// One declared field with its entries in the dry run; the bytes that it took.
    fn declared_field(
        &mut self,
        layout: &mut Layout,
        declaration: &'d DeclaredField,
        run: &[NodeField],
        state: &[u8],
        at: usize,
    ) -> Result<usize, Why> {
        let (vmsd, name) = (layout.vmsd.clone(), &declaration.name);
        let total = run.iter().map(NodeField::bytes).fold(0usize, usize::saturating_add);
        if known::counted(&vmsd, name).is_some() {
            let kind = self.declared_kind(&vmsd, declaration)?;
            layout.fields.push(plain_field(name, kind));
            return Ok(total);
        }
        let condition = if declaration.conditional {
            Some(known::condition(&vmsd, name).ok_or(format!("when {vmsd:?} has {name:?} is not known"))?)
        } else {
            None
        };
        if run.is_empty() {
            return match condition {
                Some(Condition::State(when)) => {
                    let kind = self.declared_kind(&vmsd, declaration)?;
                    layout.fields.push(Field { name: name.clone(), kind, when: Some(when), pinned: None });
                    Ok(0)
                }
                Some(Condition::Fixed) => Ok(0),
                // The alignment made sure that it may be empty.
                None => Ok(0),
            };
        }
        if declaration.size == 0
            && declaration.node.is_none()
            && run.iter().all(|f| known::is_plain(&f.kind))
            && !known::sized_by_properties(&vmsd, name)
        {
            return Err(format!("what sizes {name:?} of {vmsd:?} is not known"));
        }
        let bytes = piece(state, at, total)?;
        let before = layout.fields.len();
        self.push(layout, name, run, bytes, declaration.node.as_deref())?;
        if let Some(Condition::State(when)) = condition {
            for field in layout.fields.iter_mut().skip(before) {
                field.when = Some(when.clone());
            }
        }
        Ok(total)
    }

    /// Adds a field that the dry run has, in one entry or an entry for each element.
    fn push(
        &mut self,
        layout: &mut Layout,
        name: &str,
        run: &[NodeField],
        bytes: &[u8],
        declared: Option<&'d Declared>,
    ) -> Result<(), Why> {
        let mut at = 0usize;
        let first = layout.fields.len();
        for entry in run {
            let own = piece(bytes, at, entry.bytes())?;
            at += entry.bytes();
            if entry.is_struct() {
                self.structs(layout, name, entry, own, declared, first)?;
                continue;
            }
            let kind = self.plain(&layout.vmsd, entry, own)?;
            let pinned = self.pins.contains(&(layout.vmsd.as_str(), name)).then(|| HexBytes(own.to_vec()));
            layout.fields.push(Field { name: name.to_owned(), kind, when: None, pinned });
        }
        Ok(())
    }

    /// Adds the structs of an entry; elements that are alike share a field.
    fn structs(
        &mut self,
        layout: &mut Layout,
        name: &str,
        entry: &NodeField,
        bytes: &[u8],
        declared: Option<&'d Declared>,
        first: usize,
    ) -> Result<(), Why> {
        let vmsd =
            entry.node.as_ref().map_or(&entry.vmsd_name, |node| &node.vmsd_name).clone().unwrap_or_default();
        let known = declared.map_or_else(|| self.nested(&vmsd), |declared| Ok(Known::Declared(declared)))?;
        let size = entry.size as usize;
        for element in 0..entry.array_len.unwrap_or(1) as usize {
            let own = piece(bytes, element * size, size)?;
            let (index, length) = match &entry.node {
                Some(node) => {
                    self.pieces(&vmsd, node.version, &node.fields, &node.subsections, own, known)?
                }
                None => self.pieces(&vmsd, entry.version, &entry.fields, &entry.subsections, own, known)?,
            };
            if length != size {
                return Err(format!("{name:?} is {size} bytes, its fields {length}"));
            }
            let alike = layout.fields.len() > first;
            match layout.fields.last_mut().map(|field| &mut field.kind) {
                Some(Kind::Structs(last, count)) if alike && *last == index => *count += 1,
                _ => layout.fields.push(plain_field(name, Kind::Structs(index, 1))),
            }
        }
        Ok(())
    }

    /// What is known of a struct inside a description by hand: like the outer one, or by the dump.
    fn nested(&mut self, vmsd: &str) -> Result<Known<'d>, Why> {
        if let Some(hand) = known::root(vmsd) {
            return Ok(Known::Hand(hand.subs));
        }
        match self.dumped(vmsd).as_slice() {
            [] => Ok(Known::Hand(&[])),
            [declared] => Ok(Known::Declared(declared)),
            _ => Err(format!("several descriptions are called {vmsd:?}")),
        }
    }

    fn dumped(&mut self, vmsd: &str) -> Vec<&'d Declared> {
        let Some(dump) = self.dump else { return Vec::new() };
        self.dumped.entry(vmsd.to_owned()).or_insert_with(|| dump.named(vmsd)).clone()
    }

    fn plain(&mut self, vmsd: &str, entry: &NodeField, bytes: &[u8]) -> Result<Kind, Why> {
        match (entry.kind.as_str(), entry.array_len) {
            ("virtio", None) => self.virtio(vmsd, bytes),
            ("scsi-requests", None) => Ok(Kind::ScsiRequests),
            ("pci config", None) => Ok(pci_config(bytes)),
            ("pci irq state", None) if entry.size == 16 => Ok(Kind::Array(4, 4)),
            (kind, _) if !known::is_plain(kind) => Err(format!("fields of type {kind:?} are not known")),
            (_, Some(count)) => Ok(Kind::Array(entry.size, count)),
            (_, None) => Ok(Kind::Bytes(entry.size)),
        }
    }

    /// A subsection that the dry run does not have; opaque where the declaration does not tell enough.
    fn declared(&mut self, declared: &'d Declared) -> Result<u32, Why> {
        let mark = self.layouts.len();
        let layout = self.declared_layout(declared).unwrap_or_else(|_| {
            self.forget(mark);
            Layout { opaque: true, ..named(&declared.name, declared.version_id) }
        });
        self.intern(layout)
    }

    fn declared_layout(&mut self, declared: &'d Declared) -> Result<Layout, Why> {
        let mut layout = named(&declared.name, declared.version_id);
        layout.minimum = minimum(declared);
        for field in declared.fields.iter().filter(|f| f.version_id <= declared.version_id) {
            let when = match (field.conditional, known::condition(&declared.name, &field.name)) {
                (false, _) => None,
                (true, Some(Condition::State(when))) => Some(when),
                (true, _) => return Err(format!("{:?} may be absent", field.name)),
            };
            let kind = self.declared_kind(&declared.name, field)?;
            layout.fields.push(Field { name: field.name.clone(), kind, when, pinned: None });
        }
        for sub in &declared.subsections {
            layout.subsections.push(self.declared(sub)?);
        }
        Ok(layout)
    }

    fn declared_kind(&mut self, vmsd: &str, field: &'d DeclaredField) -> Result<Kind, Why> {
        let count = match field.num.or_else(|| known::count(vmsd, &field.name)) {
            None if known::one_for_each_cpu(vmsd, &field.name) => Some(self.cpus),
            count => count,
        };
        if let Some(node) = &field.node {
            let layout = self.declared_layout(node)?;
            let element = self.intern(layout)?;
            return Ok(match known::counted(vmsd, &field.name) {
                Some((by, most)) => {
                    let field = by.to_owned();
                    Kind::CountedStructs(Counted { element, field, least: 0, most, elsewhere: 0 })
                }
                None => Kind::Structs(element, count.unwrap_or(1)),
            });
        }
        match (field.size.max(u32::from(count.is_some())), count) {
            (0, _) => Err(format!("the size of {:?} is not known", field.name)),
            (size, Some(count)) => Ok(Kind::Array(size, count)),
            (size, None) => Ok(Kind::Bytes(size)),
        }
    }

    /// A description by hand.
    pub(super) fn by_hand(&mut self, hand: &'static Hand) -> Result<u32, Why> {
        let mut layout = Layout { opaque: hand.opaque, ..named(hand.vmsd, hand.version) };
        for part in hand.parts {
            let field = match part {
                Part::Bytes(name, size) => plain_field(name, Kind::Bytes(*size)),
                Part::Array(name, size, count) => plain_field(name, Kind::Array(*size, *count)),
                Part::Structs(name, of, count) => plain_field(name, Kind::Structs(self.by_hand(of)?, *count)),
                Part::Counted(name, field, most) => {
                    let (element, field, most) = (1, (*field).to_owned(), *most);
                    plain_field(name, Kind::Counted(Counted { element, field, least: 0, most, elsewhere: 0 }))
                }
            };
            layout.fields.push(field);
        }
        for sub in hand.subs {
            layout.subsections.push(self.by_hand(sub)?);
        }
        self.intern(layout)
    }

    /// The virtio device whose state the bytes are: the only reading that takes them all.
    fn virtio(&mut self, vmsd: &str, bytes: &[u8]) -> Result<Kind, Why> {
        let mark = self.layouts.len();
        for shape in virtio::shapes(vmsd, bytes)? {
            let kind = shape.build(self, bytes)?;
            if self.reads(&kind, bytes) {
                return Ok(kind);
            }
            self.forget(mark);
        }
        Err(format!("its state is not what a {vmsd:?} is known to write"))
    }

    /// Whether a field takes exactly these bytes.
    fn reads(&self, kind: &Kind, bytes: &[u8]) -> bool {
        let Kind::Virtio(device) = kind else { return false };
        let tables = values::Tables::new(&self.layouts);
        let mut reader = parse::Reader::new(&tables, bytes, 0, "dry run", 0..bytes.len());
        reader.virtio(device).is_ok() && reader.at() == bytes.len()
    }
}

/// The oldest version with the same fields.
fn minimum(declared: &Declared) -> Option<u32> {
    let oldest = declared.minimum_version_id;
    let same = declared.fields.iter().all(|f| f.version_id <= oldest);
    (same && oldest < declared.version_id).then_some(oldest)
}

fn piece(state: &[u8], at: usize, length: usize) -> Result<&[u8], Why> {
    let end = at.saturating_add(length);
    state.get(at..end).ok_or_else(|| "its description is longer than its state".to_owned())
}

pub(super) fn named(vmsd: &str, version: u32) -> Layout {
    Layout { vmsd: vmsd.to_owned(), version, ..Layout::default() }
}

pub(super) fn plain_field(name: &str, kind: Kind) -> Field {
    Field { name: name.to_owned(), kind, when: None, pinned: None }
}

/// A PCI configuration space, to be compared with this one.
pub(super) fn pci_config(bytes: &[u8]) -> Kind {
    let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    Kind::PciConfig(HexBytes(bytes.get(..used).unwrap_or_default().to_vec()), size)
}

/// Entries of the MSI-X table of a configuration space.
pub(super) fn msix_entries(config: &[u8]) -> Option<u16> {
    pci::msix_entries(config)
}
