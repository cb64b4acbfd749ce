//! What a VM's stream is compared with.

use super::layout::{Facts, columns};
use super::text::bold;
use crate::size::format_bytes;
use api::http::VmInspection;
use types::inventory::{DeviceSection, RamBlock};
use types::layout::Catalogue;

/// One VM.
pub(crate) fn vm(v: &VmInspection, width: usize) -> String {
    let inventory = &v.enrolment.inventory;
    let mut facts = Facts::new(format!("{}: {}", bold(v.vm.as_str()), inventory.machine));
    facts
        .add("Enrolled on", &inventory.hypervisor)
        .add("Host", v.host.as_ref().map_or("-", |host| host.as_str()))
        .add("Page size", format_bytes(u64::from(inventory.page_size_bytes)))
        .add_some("No catalogue", v.catalogue_missing.as_ref());
    if !v.differences.is_empty() {
        facts.add("Not as enrolled", format!("{}; it cannot be moved so", v.differences.join(", ")));
    }
    if v.differences_missing != v.catalogue_missing {
        facts.add_some("Not compared", v.differences_missing.as_ref());
    }
    let blocks = columns(
        &["MEMORY", "LENGTH", "CONTENT"],
        inventory.ram_blocks.iter().map(block).collect(),
        width,
        "no memory is enrolled",
    );
    let catalogue = v.enrolment.catalogue.as_ref();
    let devices = columns(
        &["DEVICE", "INSTANCE", "VERSION", "VOUCHED BY"],
        inventory.devices.iter().map(|d| device(d, catalogue)).collect(),
        width,
        "no devices are enrolled; the VM is enrolled anew when it is stopped and started",
    );
    format!("{}\n{blocks}\n{devices}", facts.render(width))
}

fn block(b: &RamBlock) -> Vec<String> {
    let content =
        b.content.map_or_else(|| "-".to_owned(), |digest| format!("pinned {:.12}", digest.to_string()));
    vec![b.name.clone(), format_bytes(b.length_bytes), content]
}

fn device(d: &DeviceSection, catalogue: Option<&Catalogue>) -> Vec<String> {
    vec![d.name.clone(), d.instance.to_string(), d.version.to_string(), vouched(d, catalogue)]
}

/// What proves where a device's state ends, and that its values are sane, on the host that runs the VM.
fn vouched(device: &DeviceSection, catalogue: Option<&Catalogue>) -> String {
    let Some(catalogue) = catalogue else { return "-".to_owned() };
    match catalogue.section(&device.name, device.instance) {
        Some(section) if section.layout.is_some() => "layout".to_owned(),
        Some(section) => format!("unique cut only: {}", section.why),
        None => "nothing: that host's QEMU has no such device".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;
    use types::layout::SectionLayout;

    fn inspection(catalogue: bool) -> VmInspection {
        let inventory = json!({"machine": "pc-q35-10.0", "page_size_bytes": 4096, "hypervisor": "qemu/10.0.2",
            "ram_blocks": [{"name": "pc.ram", "length_bytes": 268_435_456},
                {"name": "pc.bios", "length_bytes": 262_144, "content": "9f".repeat(32)}],
            "devices": [{"name": "timer", "instance": 0, "version": 2},
                {"name": "0000:00:02.0/virtio-net", "instance": 0, "version": 11}]});
        let mut shown: VmInspection = serde_json::from_value(json!({"vm": "web-1", "host": "host-a",
            "enrolment": {"inventory": inventory, "catalogue": null}, "catalogue_missing": null, "differences": [], "differences_missing": null}))
        .unwrap();
        if catalogue {
            let section = |name: &str, version, layout: Option<u32>, why: &str| {
                let (name, why) = (name.to_owned(), why.to_owned());
                SectionLayout { name, instance: 0, version, layout, why }
            };
            let sections = vec![
                section("timer", 2, Some(0), ""),
                section("0000:00:02.0/virtio-net", 11, None, "no layout of \"virtio\""),
            ];
            shown.enrolment.catalogue = Some(Catalogue { sections, ..Catalogue::default() });
            shown.differences = vec!["virtio-rng-pci \"rng1\" was plugged in".to_owned()];
        } else {
            shown.catalogue_missing = Some("host host-a is not connected".to_owned());
            shown.differences_missing = Some("host host-a: qom-list was not answered".to_owned());
        }
        shown
    }

    #[test]
    fn memory_and_devices_at_80_columns() {
        let (with, without) = (vm(&inspection(true), 80), vm(&inspection(false), 80));
        let plain = anstream::adapter::strip_str(&format!("{with}---\n{without}")).to_string();
        insta::assert_snapshot!("inspection-80", plain);
    }
}
