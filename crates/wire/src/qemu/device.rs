//! The device state: everything from the first device section to the last byte of the description.
//!
//! Device sections have no length on the wire. The description at the end of the stream has the lengths, but the
//! sender wrote it and QEMU does not read it, so it is no authority. What makes the reading sound is the
//! **unique cut**: QEMU consumes some number of bytes for a section and then demands the footer with that
//! section's id and a known type byte behind it. When, in all the bytes that QEMU will ever get, only one place
//! looks like that, QEMU either stops exactly there or gives up before it reads anything else. Where a section's
//! own state may contain such a place by chance, its length must be known from its layout alone: from a
//! catalogue ([`DeviceState::read_with`]), or because it is one of the few with a [`fixed_length`]. Anything else is
//! refused.

use super::parser::{SectionHeader, command_name};
use super::*;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The longest description that is looked at.
pub const MAX_DESCRIPTION_BYTES: usize = 2 << 20;
/// The most device sections; real machines have under a hundred.
pub const MAX_DEVICE_SECTIONS: usize = 4096;
/// Section ids are small; below this bound an id's footer holds a NUL, which a description can't contain.
const MAX_SECTION_ID: u32 = 1 << 24;
const MAX_JSON_DEPTH: usize = 64;
/// End mark, type byte and length before the description.
const DESCRIPTION_HEADER_BYTES: usize = 6;
const FOOTER_BYTES: usize = 5;
/// The list's end, the IP id, and the DHCP leases.
const SLIRP_WITHOUT_SOCKETS_BYTES: usize = 1 + 2 + 16 * 8;

/// One device section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSection<'a> {
    /// Section id, chosen by the sender.
    pub id: u32,
    /// Its idstr: printable ASCII.
    pub name: &'a str,
    /// Its instance.
    pub instance: u32,
    /// Its version.
    pub version: u32,
    /// Where its header starts in the blob.
    pub start: usize,
    /// Its state.
    pub payload: std::ops::Range<usize>,
    /// Whether its layout alone gave its length; otherwise its end is the only possible one.
    pub exact: bool,
}

/// A section whose state is about to be read.
#[derive(Debug, Clone, Copy)]
pub struct SectionStart<'a> {
    /// Its idstr: printable ASCII.
    pub name: &'a str,
    /// Its instance.
    pub instance: u32,
    /// Its version.
    pub version: u32,
    /// Where its header starts in the blob.
    pub start: usize,
    /// Where its state starts in the blob.
    pub payload: usize,
    /// Where all sections end at the latest: at the end mark.
    pub limit: usize,
}

/// Tells the length of a section's state as the destination derives it, or nothing where that can't be told.
pub type LengthOf<'f, 'a> = &'f mut dyn FnMut(&SectionStart<'a>) -> Result<Option<usize>, Violation>;

/// A complete device state, cut into sections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState<'a> {
    /// The sections in stream order.
    pub sections: Vec<DeviceSection<'a>>,
    /// Where the end mark is.
    pub end_mark: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    page_size: u64,
    devices: Vec<DescribedDevice>,
    #[serde(default, rename = "configuration")]
    _configuration: serde::de::IgnoredAny,
}

#[derive(Deserialize)]
struct DescribedDevice {
    name: String,
    instance_id: u64,
    #[serde(default)]
    version: Option<u64>,
    #[serde(default)]
    fields: Vec<DescribedField>,
    #[serde(default)]
    subsections: Vec<DescribedSubsection>,
}

#[derive(Deserialize)]
struct DescribedField {
    size: u64,
    #[serde(default)]
    array_len: Option<u64>,
}

#[derive(Deserialize)]
struct DescribedSubsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<DescribedField>,
    #[serde(default)]
    subsections: Vec<DescribedSubsection>,
}

/// Type, name length and version around a subsection's name and body.
const SUBSECTION_HEADER_BYTES: u64 = 6;

fn described_length(fields: &[DescribedField], subsections: &[DescribedSubsection]) -> Option<u64> {
    let mut total = 0u64;
    for field in fields {
        total = total.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?)?;
    }
    for sub in subsections {
        let body = described_length(&sub.fields, &sub.subsections)?;
        let name = sub.vmsd_name.len() as u64;
        total = total.checked_add(SUBSECTION_HEADER_BYTES)?.checked_add(name)?.checked_add(body)?;
    }
    Some(total)
}

/// The length of the few sections whose layout is known without a catalogue.
///
/// `timer` is three 64-bit integers; its id is 0, whose footer is a common pattern in other devices' state. The
/// TPM emulator's state is three blobs, each behind its own size, and full of arbitrary bytes. `slirp`, whose id is
/// small as well, is a list of guest-forwarded sockets, which ends with a zero byte, then 16-bit and 16 entries of 8
/// bytes (version 4 of libslirp's state); with a socket in the list its length is not told.
#[must_use]
pub fn fixed_length(section: &SectionStart<'_>, blob: &[u8]) -> Option<usize> {
    match (section.name, section.version) {
        ("timer", 2) => Some(24),
        // A size past the end is no length at all: nothing there can be its footer.
        ("tpm-emulator", 0) => {
            let state = blob.get(section.payload..section.limit).unwrap_or_default();
            Some(tpm_emulator_length(state).unwrap_or(usize::MAX))
        }
        ("slirp", 4) if blob.get(section.payload) == Some(&0) => Some(SLIRP_WITHOUT_SOCKETS_BYTES),
        _ => None,
    }
}

fn tpm_emulator_length(payload: &[u8]) -> Option<usize> {
    let mut at = 0usize;
    for _blob in 0..3 {
        let size = be32(payload, at.checked_add(4)?)? as usize;
        at = at.checked_add(8)?.checked_add(size)?;
    }
    Some(at)
}

/// Whether a description that starts at `at` (its end mark) is declared to end at `end`.
fn declared_end(blob: &[u8], at: usize) -> Option<usize> {
    if *blob.get(at)? != SECTION_EOF || *blob.get(at + 1)? != VM_DESCRIPTION {
        return None;
    }
    let len = be32(blob, at + 2)? as usize;
    (len <= MAX_DESCRIPTION_BYTES).then(|| at + DESCRIPTION_HEADER_BYTES + len)
}

/// Finds the ends that descriptions declare, as the bytes come in. Keeps only their offsets.
#[derive(Debug, Clone, Default)]
pub struct DescriptionScanner {
    /// Where scanning goes on.
    next: usize,
    /// Declared ends that are still ahead, and where their text starts: few in honest streams, capped against
    /// hostile ones.
    ends: BTreeMap<usize, usize>,
}

impl DescriptionScanner {
    const MAX_ENDS: usize = 1024;

    /// Looks at what was added to `blob`; true when a description is declared to end at its last byte, and is text.
    pub fn at_end(&mut self, blob: &[u8]) -> bool {
        let whole = blob.len().saturating_sub(DESCRIPTION_HEADER_BYTES);
        while self.next < whole {
            // The text has to be a description when its end comes; an opening brace is enough to skip chance hits.
            if blob.get(self.next + DESCRIPTION_HEADER_BYTES) == Some(&b'{')
                && let Some(end) = declared_end(blob, self.next)
                && self.ends.len() < Self::MAX_ENDS
            {
                self.ends.insert(end, self.next + DESCRIPTION_HEADER_BYTES);
            }
            self.next += 1;
        }
        self.ends = self.ends.split_off(&blob.len());
        let text = self.ends.get(&blob.len()).and_then(|start| blob.get(*start..));
        text.is_some_and(|text| json_trouble(text).is_none() && text.ends_with(b"}"))
    }
}

struct Reader<'a> {
    blob: &'a [u8],
    base: u64,
}

impl<'a> Reader<'a> {
    fn violation(
        &self,
        rule: &'static str,
        at: usize,
        section: &str,
        expected: impl Into<String>,
        found: impl AsRef<str>,
    ) -> Violation {
        Violation::new(rule, self.base + at as u64, section, expected, found)
    }

    /// The end mark whose description ends exactly at the last byte.
    fn end_mark(&self) -> Result<usize, Violation> {
        let blob = self.blob;
        let last = blob.len().saturating_sub(DESCRIPTION_HEADER_BYTES);
        let mut exact = None;
        let mut junk_behind = None;
        for at in 0..=last {
            let Some(end) = declared_end(blob, at) else { continue };
            let footer_before = at >= FOOTER_BYTES && blob.get(at - FOOTER_BYTES) == Some(&FOOTER);
            if end == blob.len() {
                if exact.is_some() {
                    return Err(self.violation(
                        "INV-E2",
                        at,
                        "description",
                        "one description",
                        "two readings",
                    ));
                }
                exact = Some(at);
            } else if end < blob.len() && footer_before && blob.get(end - 1) == Some(&b'}') {
                junk_behind = Some((at, end));
            }
        }
        match (exact, junk_behind) {
            (Some(at), _) => Ok(at),
            (None, Some((_, end))) => {
                let found = format!("{} more bytes", blob.len() - end);
                Err(self.violation("INV-E3", end, "description", "nothing behind the description", found))
            }
            (None, None) => {
                let expected = "an end mark and a description that ends at the last byte";
                Err(self.violation("INV-E2", blob.len(), "description", expected, "none"))
            }
        }
    }

    fn description(&self, end_mark: usize, page_size: u32) -> Result<Description, Violation> {
        let start = end_mark + DESCRIPTION_HEADER_BYTES;
        let json = self.blob.get(start..).unwrap_or_default();
        let bad =
            |found: String| self.violation("INV-E2", start, "description", "a strict description", found);
        if let Some(what) = json_trouble(json) {
            return Err(bad(what.to_owned()));
        }
        // The parser's own message could quote the sender's text; its place is enough.
        let description: Description = serde_json::from_slice(json)
            .map_err(|e| bad(format!("malformed JSON at column {}", e.column())))?;
        if description.page_size != u64::from(page_size) {
            return Err(bad(format!("page size {}", description.page_size)));
        }
        if description.devices.len() > MAX_DEVICE_SECTIONS {
            return Err(bad(format!("{} devices", description.devices.len())));
        }
        Ok(description)
    }

    /// Type byte of the section at `at`, which must be a device.
    fn expect_device(&self, at: usize) -> Result<SectionHeader<'a>, Violation> {
        let bytes = self.blob.get(at..).unwrap_or_default();
        let (rule, found) = match bytes.first() {
            Some(&SECTION_FULL) => {
                return SectionHeader::read(bytes).ok_or_else(|| {
                    self.violation("INV-S1", at, "devices", "a whole section header", "the end of the stream")
                });
            }
            Some(&SECTION_START) => match SectionHeader::read(bytes) {
                Some(header) if header.name == b"ram" => ("INV-S6", "START of ram again".to_owned()),
                _ => ("INV-S8", "START".to_owned()),
            },
            Some(&SECTION_PART) => ("INV-S9", "PART after END".to_owned()),
            Some(&SECTION_END) => ("INV-S11", "END after END".to_owned()),
            Some(&COMMAND) => match be16(bytes, 1) {
                Some(8) => ("INV-C2", "ENABLE_COLO".to_owned()),
                Some(command @ 3..=7) => ("INV-C3", command_name(command)),
                Some(11) => ("INV-C9", "SWITCHOVER_START".to_owned()),
                command => ("INV-C1", command_name(command.unwrap_or(0))),
            },
            Some(&SECTION_EOF) => ("INV-S10", "the end mark".to_owned()),
            Some(other) => ("INV-S1", format!("{other:#04x}")),
            None => ("INV-E3", "the end of the stream".to_owned()),
        };
        Err(self.violation(rule, at, "devices", "a device section", found))
    }

    fn section(
        &self,
        at: usize,
        limit: usize,
        described: &DescribedDevice,
        seen: &mut Seen<'a>,
        length_of: LengthOf<'_, 'a>,
    ) -> Result<DeviceSection<'a>, Violation> {
        let header = self.expect_device(at)?;
        let shown = printable(header.name);
        let name = std::str::from_utf8(header.name)
            .ok()
            .filter(|name| !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b)))
            .ok_or_else(|| self.violation("INV-S5", at, &shown, "a printable name", &shown))?;
        seen.check(self, at, name, &header)?;
        if described.name != name
            || described.instance_id != u64::from(header.instance)
            || described.version.is_some_and(|version| version != u64::from(header.version))
        {
            let expected = format!("{:?}, instance {}", described.name, described.instance_id);
            let found = format!("{name:?}, instance {}", header.instance);
            return Err(self.violation(
                "INV-E2",
                at,
                name,
                expected.chars().take(120).collect::<String>(),
                found,
            ));
        }
        let start = at + header.len;
        let section = SectionStart {
            name,
            instance: header.instance,
            version: header.version,
            start: at,
            payload: start,
            limit,
        };
        let by_layout = length_of(&section)?;
        let described = described_length(&described.fields, &described.subsections)
            .and_then(|length| usize::try_from(length).ok());
        let length =
            by_layout.or(described).filter(|length| *length <= limit.saturating_sub(start)).ok_or_else(
                || self.violation("INV-D2", at, name, "a length inside the stream", "a larger one"),
            )?;
        let payload = start..start + length;
        self.footer(payload.end, name, header.id, by_layout.is_some())?;
        if described != Some(length) {
            let expected = format!("the length that the layout gives, {length} bytes");
            let found = format!("{} bytes described", described.unwrap_or(0));
            return Err(self.violation("INV-E2", at, name, expected, found));
        }
        Ok(DeviceSection {
            id: header.id,
            name,
            instance: header.instance,
            version: header.version,
            start: at,
            payload,
            exact: by_layout.is_some(),
        })
    }

    /// The footer where the state ends; with another id, where the layout is sure that it is the footer (INV-S4).
    fn footer(&self, at: usize, name: &str, id: u32, exact: bool) -> Result<(), Violation> {
        let footer = self.blob.get(at) == Some(&FOOTER);
        match be32(self.blob, at + 1) {
            Some(found) if footer && found == id => Ok(()),
            Some(found) if footer && exact => {
                let expected = format!("a footer of section {id}");
                Err(self.violation("INV-S4", at, name, expected, format!("of section {found}")))
            }
            _ => {
                let expected = "its own footer where its state ends";
                Err(self.violation("INV-D2", at, name, expected, "something else"))
            }
        }
    }

    /// One candidate end only for every section without a layout (see the module's documentation).
    fn unique_cuts(&self, sections: &[DeviceSection<'a>]) -> Result<(), Violation> {
        let by_id: BTreeMap<_, _> = sections.iter().filter(|s| !s.exact).map(|s| (s.id, s)).collect();
        if by_id.is_empty() {
            return Ok(());
        }
        let next_is_type = |byte: Option<&u8>| matches!(byte, Some(0..=4 | 8));
        let mut at = 0;
        while let Some(found) = self.blob.get(at..).and_then(|rest| memchr::memchr(FOOTER, rest)) {
            at += found;
            let section = be32(self.blob, at + 1).and_then(|id| by_id.get(&id));
            if let Some(section) = section
                && at >= section.payload.start
                && at != section.payload.end
                && next_is_type(self.blob.get(at + FOOTER_BYTES))
            {
                return Err(self.violation("INV-D3", at, section.name, "one possible end", "a second one"));
            }
            at += 1;
        }
        Ok(())
    }
}

/// Names and ids that have come.
struct Seen<'a> {
    names: BTreeSet<(&'a str, u32)>,
    ids: BTreeSet<u32>,
}

impl<'a> Seen<'a> {
    fn check(
        &mut self,
        reader: &Reader<'a>,
        at: usize,
        name: &'a str,
        header: &SectionHeader<'a>,
    ) -> Result<(), Violation> {
        if name == "ram" {
            return Err(reader.violation("INV-S8", at, name, "ram as START only", "FULL"));
        }
        if header.id >= MAX_SECTION_ID {
            let expected = format!("an id below {MAX_SECTION_ID}");
            return Err(reader.violation("INV-S2", at, name, expected, header.id.to_string()));
        }
        if !self.names.insert((name, header.instance)) {
            let found = format!("{name:?}, instance {} again", header.instance);
            return Err(reader.violation("INV-S6", at, name, "each device once", found));
        }
        if !self.ids.insert(header.id) {
            return Err(reader.violation(
                "INV-S2",
                at,
                name,
                "an id of its own",
                format!("id {} again", header.id),
            ));
        }
        Ok(())
    }
}

/// What keeps a description from being looked at, if anything: NULs (a footer could hide in it) and depth.
fn json_trouble(json: &[u8]) -> Option<&'static str> {
    if json.first() != Some(&b'{') {
        return Some("no JSON object");
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in json {
        match byte {
            0..0x20 | 0x7f.. => return Some("a byte outside printable ASCII"),
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_JSON_DEPTH {
            return Some("too many levels");
        }
    }
    None
}

impl<'a> DeviceState<'a> {
    /// The text of the description in `blob`, which this was read from.
    #[must_use]
    pub fn description<'t>(&self, blob: &'t [u8]) -> &'t [u8] {
        blob.get(self.end_mark + DESCRIPTION_HEADER_BYTES..).unwrap_or_default()
    }

    /// Reads a complete device state. `base` is the blob's offset in the stream, `ram_id` the id that `ram` has.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn read(blob: &'a [u8], base: u64, ram_id: u32, page_size: u32) -> Result<Self, Violation> {
        Self::read_with(blob, base, ram_id, page_size, &mut |section| Ok(fixed_length(section, blob)))
    }

    /// The same, with lengths from elsewhere: a section whose length `length_of` knows needs no unique end.
    ///
    /// # Errors
    /// The first broken rule, or what `length_of` found.
    pub fn read_with(
        blob: &'a [u8],
        base: u64,
        ram_id: u32,
        page_size: u32,
        length_of: LengthOf<'_, 'a>,
    ) -> Result<Self, Violation> {
        let reader = Reader { blob, base };
        // Name what comes first before the end is looked for: a RAM section after END is that, not a missing end.
        if blob.first() != Some(&SECTION_FULL) {
            reader.expect_device(0)?;
        }
        let end_mark = reader.end_mark()?;
        let description = reader.description(end_mark, page_size)?;
        let mut seen = Seen { names: BTreeSet::new(), ids: BTreeSet::from([ram_id]) };
        let mut sections = Vec::with_capacity(description.devices.len());
        let mut at = 0;
        for described in &description.devices {
            let section = reader.section(at, end_mark, described, &mut seen, length_of)?;
            at = section.payload.end + FOOTER_BYTES;
            sections.push(section);
        }
        if at != end_mark {
            if blob.get(at) == Some(&SECTION_EOF) {
                return Err(reader.violation("INV-E1", at, "devices", "one end mark", "an earlier one"));
            }
            reader.expect_device(at)?;
            return Err(reader.violation("INV-E2", at, "devices", "as many devices as described", "more"));
        }
        reader.unique_cuts(&sections)?;
        Ok(Self { sections, end_mark })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SLIRP_ID: u32 = 1;

    fn section(id: u32, name: &str, version: u32, state: &[u8]) -> Vec<u8> {
        let (id, length) = (id.to_be_bytes(), u8::try_from(name.len()).unwrap());
        let version = version.to_be_bytes();
        let header = [&[SECTION_FULL][..], &id, &[length], name.as_bytes(), &[0; 4], &version].concat();
        [&header[..], state, &[FOOTER], &id].concat()
    }

    /// A device state of slirp and of another section, whose bytes look like slirp's footer.
    fn judged(slirp: &[u8]) -> Result<Vec<usize>, &'static str> {
        let other = [&[0, FOOTER][..], &SLIRP_ID.to_be_bytes(), &[SECTION_FULL]].concat();
        let device = |name: &str, version: u32, size: usize| {
            let field = serde_json::json!({"size": size});
            serde_json::json!({"name": name, "instance_id": 0, "version": version, "fields": [field]})
        };
        let devices = [device("slirp", 4, slirp.len()), device("other", 1, other.len())];
        let text = serde_json::json!({"page_size": 4096, "devices": devices}).to_string();
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        let end = [&[SECTION_EOF, VM_DESCRIPTION][..], &length, text.as_bytes()].concat();
        let blob = [section(SLIRP_ID, "slirp", 4, slirp), section(9, "other", 1, &other), end].concat();
        let state = DeviceState::read(&blob, 0, 2, 4096).map_err(|violation| violation.rule)?;
        Ok(state.sections.iter().map(|s| s.payload.len()).collect())
    }

    #[test]
    fn a_chance_footer_of_slirp_elsewhere_is_none_while_its_length_is_known() {
        let without = vec![0; SLIRP_WITHOUT_SOCKETS_BYTES];
        assert_eq!(judged(&without), Ok(vec![131, 7]));
        // One socket: then nothing but the cut tells where it ends, and there are two.
        let mut with = without.clone();
        with[0] = 42;
        assert_eq!(judged(&with), Err("INV-D3"));
        // QEMU reads 131 bytes, whatever is described.
        assert_eq!(judged(&without[..130]), Err("INV-D2"));
        assert_eq!(judged(&[&without[..], &[0]].concat()), Err("INV-D2"));
    }
}
