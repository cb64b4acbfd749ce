//! The two trusted descriptions that a catalogue is compiled from, as QEMU writes them.

use serde::Deserialize;
use std::collections::BTreeMap;

/// The description at the end of a dry run.
#[derive(Debug, Deserialize)]
pub(super) struct Description {
    pub(super) devices: Vec<Device>,
}

/// One section.
#[derive(Debug, Deserialize)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) instance_id: u32,
    #[serde(flatten)]
    pub(super) node: Node,
}

/// One description, as it was written.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Node {
    pub(super) vmsd_name: Option<String>,
    #[serde(default)]
    pub(super) version: u32,
    #[serde(default)]
    pub(super) fields: Vec<NodeField>,
    #[serde(default)]
    pub(super) subsections: Vec<Node>,
}

/// One field, or one element of an array of structs that differ.
#[derive(Debug, Deserialize)]
pub(super) struct NodeField {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) size: u32,
    pub(super) array_len: Option<u32>,
    pub(super) index: Option<u32>,
    #[serde(rename = "struct")]
    pub(super) node: Option<Node>,
    /// Of a field that is written by way of a helper struct: the struct's own keys.
    pub(super) vmsd_name: Option<String>,
    #[serde(default)]
    pub(super) version: u32,
    #[serde(default)]
    pub(super) fields: Vec<NodeField>,
    #[serde(default)]
    pub(super) subsections: Vec<Node>,
}

impl NodeField {
    /// Bytes of the whole field.
    pub(super) fn bytes(&self) -> usize {
        (self.size as usize).saturating_mul(self.array_len.unwrap_or(1) as usize)
    }

    /// Whether this is the field `name`; QEMU 10 numbers the fields of the same name.
    pub(super) fn is(&self, name: &str) -> bool {
        self.name == name || self.name.strip_suffix(']').and_then(unnumbered) == Some(name)
    }

    /// Whether it is a struct.
    pub(super) fn is_struct(&self) -> bool {
        self.node.is_some() || self.vmsd_name.is_some()
    }
}

fn unnumbered(name: &str) -> Option<&str> {
    let (name, number) = name.rsplit_once('[')?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

/// A dump of every description that a QEMU has.
#[derive(Debug, Default)]
pub(super) struct Dump {
    /// The machine type that it was made for.
    pub(super) machine: Option<String>,
    types: Vec<Declared>,
}

/// A description, as it is declared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Declared {
    pub(super) name: String,
    pub(super) version_id: u32,
    #[serde(default)]
    pub(super) minimum_version_id: u32,
    #[serde(default, rename = "Fields")]
    pub(super) fields: Vec<DeclaredField>,
    #[serde(default, rename = "Subsections")]
    pub(super) subsections: Vec<Declared>,
}

/// A field, as it is declared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct DeclaredField {
    #[serde(rename = "field")]
    pub(super) name: String,
    pub(super) version_id: u32,
    #[serde(rename = "field_exists")]
    pub(super) conditional: bool,
    /// Size of the C field, or of one element.
    pub(super) size: u32,
    #[serde(default)]
    pub(super) num: Option<u32>,
    #[serde(rename = "Description")]
    pub(super) node: Option<Box<Declared>>,
}

#[derive(Deserialize)]
struct DumpedType {
    #[serde(rename = "Name")]
    name: Option<String>,
    #[serde(rename = "Description")]
    description: Option<Declared>,
}

impl Dump {
    /// Reads what `-dump-vmstate` wrote.
    pub(super) fn read(json: &[u8]) -> Result<Self, serde_json::Error> {
        const MACHINE: &str = "vmschkmachine";
        let types: BTreeMap<String, DumpedType> = serde_json::from_slice(json)?;
        let machine = types.get(MACHINE).and_then(|t| t.name.clone());
        Ok(Self { machine, types: types.into_values().filter_map(|t| t.description).collect() })
    }

    /// Every description of that name, wherever it is used; each once.
    pub(super) fn named<'d>(&'d self, name: &str) -> Vec<&'d Declared> {
        let mut found = Vec::new();
        self.types.iter().for_each(|t| t.collect(name, &mut found));
        found
    }
}

impl Declared {
    fn collect<'d>(&'d self, name: &str, found: &mut Vec<&'d Self>) {
        if self.name == name && !found.contains(&self) {
            found.push(self);
        }
        self.fields.iter().filter_map(|f| f.node.as_deref()).for_each(|d| d.collect(name, found));
        self.subsections.iter().for_each(|d| d.collect(name, found));
    }
}
