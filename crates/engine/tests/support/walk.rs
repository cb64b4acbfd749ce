//! Finds the fields of an honest stream by its own description: sizes and nesting, from the end backwards.

use serde_json::Value;

/// One struct of the device state.
#[derive(Clone)]
pub struct Instance {
    /// Section, and the fields and indexes that lead to the struct: the same in each stream of one VM.
    pub path: String,
    pub vmsd: String,
    pub fields: Vec<Field>,
}

#[derive(Clone)]
/// A field that is no struct; an array of scalars is one field.
pub struct Field {
    pub name: String,
    pub bytes: Vec<u8>,
    /// Of one element.
    pub width: usize,
}

/// Every struct of the stream, or nothing when it has no description (post-copy).
pub fn instances(stream: &[u8]) -> Vec<Instance> {
    let mut found = Vec::new();
    let Some((mut end, description)) = description(stream) else { return found };
    for device in description["devices"].as_array().unwrap().iter().rev() {
        let name = device["name"].as_str().unwrap();
        let len = device.get("vmsd_name").map_or_else(|| number(&device["size"]), |_| body_len(device));
        let payload = end - 5 - len;
        assert_eq!(stream[end - 5], 0x7e, "no footer behind {name}");
        let header = payload - (1 + 4 + 1 + name.len() + 4 + 4);
        assert_eq!(stream[header], 4, "no section of {name}");
        if device.get("vmsd_name").is_some() {
            let path = format!("{name}/{}", device["instance_id"]);
            let mut walk = Walk { stream, found: &mut found };
            assert_eq!(
                walk.body(device, payload, path),
                payload + len,
                "{name} is longer or shorter than described"
            );
        }
        end = header;
    }
    found
}

/// The offset of the byte that ends the sections, and the description behind it.
fn description(stream: &[u8]) -> Option<(usize, Value)> {
    let starts = [&br#"{"configuration""#[..], br#"{"page_size""#];
    let at =
        starts.iter().find_map(|start| stream.windows(start.len()).rposition(|window| window == *start))?;
    assert_eq!(stream[at - 6..at - 4], [0, 6], "no description");
    Some((at - 6, serde_json::from_slice(&stream[at..]).unwrap()))
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap().try_into().unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A list has a byte before each element, and a description that has one key for all of them.
fn is_list(field: &Value) -> bool {
    ["qtailq", "qlist", "gtree"].contains(&field["type"].as_str().unwrap_or_default())
}

fn count(field: &Value) -> usize {
    field.get("array_len").map_or(1, number)
}

fn body_len(description: &Value) -> usize {
    let fields: usize = list(&description["fields"]).iter().map(|f| number(&f["size"]) * count(f)).sum();
    let subsections = list(&description["subsections"]).iter();
    fields + subsections.map(|s| 2 + s["vmsd_name"].as_str().unwrap().len() + 4 + body_len(s)).sum::<usize>()
}

struct Walk<'a> {
    stream: &'a [u8],
    found: &'a mut Vec<Instance>,
}

impl Walk<'_> {
    fn body(&mut self, description: &Value, mut at: usize, path: String) -> usize {
        let mut fields: Vec<Field> = Vec::new();
        for field in list(&description["fields"]) {
            let (name, width) = (field["name"].as_str().unwrap(), number(&field["size"]));
            // A struct of a chosen version is described in place.
            let inner = field.get("struct").unwrap_or(field);
            if inner.get("vmsd_name").is_some() && !is_list(field) {
                for n in 0..count(field) {
                    let index = field.get("index").map_or(n, number);
                    self.body(inner, at, format!("{path}/{name}[{index}]"));
                    at += width;
                }
                continue;
            }
            let bytes = &self.stream[at..at + width * count(field)];
            at += bytes.len();
            match fields.last_mut() {
                Some(last) if last.name == name => last.bytes.extend_from_slice(bytes),
                _ => fields.push(Field { name: name.into(), bytes: bytes.to_vec(), width }),
            }
        }
        for subsection in list(&description["subsections"]) {
            let name = subsection["vmsd_name"].as_str().unwrap();
            assert_eq!(self.stream[at], 5, "no subsection {name}");
            at = self.body(subsection, at + 2 + name.len() + 4, format!("{path}/{name}"));
        }
        let vmsd = description["vmsd_name"].as_str().unwrap().to_owned();
        self.found.push(Instance { path, vmsd, fields });
        at
    }
}
