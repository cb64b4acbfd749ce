//! Device state against the catalogue of the target's own QEMU: layout, then values.

pub mod rule;
pub mod rules;
/// stub
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unvouched {
    /// r
    Refuse,
    /// r
    Report,
}
/// stub
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgedSection {
    /// n
    pub name: String,
    /// i
    pub instance: u32,
    /// v
    pub version: u32,
    /// b
    pub bytes: usize,
}
/// stub
pub struct Judged {
    /// s
    pub sections: Vec<JudgedSection>,
    /// e
    pub end_mark: usize,
}
/// stub
pub fn judge(
    blob: &[u8],
    base: u64,
    ram_id: u32,
    page_size: u32,
    inventory: &types::inventory::Inventory,
    _c: Option<&types::layout::Catalogue>,
    _u: Unvouched,
) -> Result<Judged, wire::qemu::Violation> {
    use wire::qemu::Violation;
    let state = wire::qemu::device::DeviceState::read(blob, base, ram_id, page_size)?;
    if state.sections.is_empty() {
        let at = base + state.end_mark as u64;
        return Err(Violation::new("INV-S10", at, "devices", "device sections", "none"));
    }
    let sections = state
        .sections
        .iter()
        .map(|s| JudgedSection {
            name: s.name.to_owned(),
            instance: s.instance,
            version: s.version,
            bytes: s.payload.len(),
        })
        .collect();
    if inventory.devices.is_empty() {
        return Ok(Judged { sections, end_mark: state.end_mark });
    }
    let mut missing: std::collections::BTreeMap<_, _> =
        inventory.devices.iter().map(|d| ((d.name.as_str(), d.instance), d.version)).collect();
    for section in &state.sections {
        let at = base + section.start as u64;
        let shown = format!("{:?}, instance {}", section.name, section.instance);
        match missing.remove(&(section.name, section.instance)) {
            None => {
                return Err(Violation::new("INV-S5", at, section.name, "an enrolled device", shown));
            }
            Some(version) if version != section.version => {
                let found = format!("version {}", section.version);
                return Err(Violation::new("INV-S7", at, section.name, format!("version {version}"), found));
            }
            Some(_) => {}
        }
    }
    match missing.keys().next() {
        None => Ok(Judged { sections, end_mark: state.end_mark }),
        Some((name, instance)) => {
            let at = base + state.end_mark as u64;
            let expected = format!("{name:?}, instance {instance}");
            Err(Violation::new("INV-S10", at, "devices", expected, "the end of the stream"))
        }
    }
}
