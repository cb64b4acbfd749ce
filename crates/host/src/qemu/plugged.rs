//! What was plugged into a running VM, or unplugged from it, behind Outrider's back. The target's QEMU is started from
//! the VM's spec: a stream of other devices fits neither it nor the enrolment, and would be refused after all memory
//! has travelled. Asked before anything moves, the answer names the device.

use crate::qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use types::vm::VmSpec;
use types::{ErrorCode, Problem};

/// Where QEMU keeps devices of `-device` and `device_add`: those with an id, and those without.
const NAMED: &str = "/machine/peripheral";
const UNNAMED: &str = "/machine/peripheral-anon";
const LIST: &str = "qom-list";
/// For each list. QEMU answers in a millisecond; the manager waits 5 s for the agent that is spawned after the look.
const LIMIT: Duration = Duration::from_secs(1);
/// Enough to know what happened.
const NAMES_MAX: usize = 8;
const NAME_CHARS_MAX: usize = 64;

/// Devices by id (of those that have one) and type, with their number.
type Devices = BTreeMap<(String, String), usize>;

/// Every difference between a VM's devices and its spec, as a short text; nothing when they agree.
///
/// # Errors
/// The monitor fails.
pub async fn differences(qmp: &Qmp, spec: &VmSpec) -> Result<Vec<String>, QmpError> {
    let list = async |path: &str| qmp.execute_within(LIST, json!({"path": path}), LIMIT).await;
    let live = devices(&list(NAMED).await?, &list(UNNAMED).await?).ok_or_else(|| QmpError::Refused {
        command: LIST.to_owned(),
        class: "GenericError".to_owned(),
        description: "the list of devices could not be read".to_owned(),
    })?;
    Ok(compare(&of_spec(spec), &live))
}

/// The problem of a VM with other devices than its spec says.
#[must_use]
pub fn problem(spec: &VmSpec, differences: &[String]) -> Problem {
    let text = format!("VM {} does not have the devices of its spec: {}", spec.name, differences.join(", "));
    Problem::new(ErrorCode::DevicesDiffer, text)
        .hint("undo it, or stop the VM and define it with these devices: the target is started from the spec")
}

/// What the command line of a spec makes.
fn of_spec(spec: &VmSpec) -> Devices {
    let mut devices = Devices::new();
    for index in 0..spec.disks.len() {
        devices.insert((super::command::disk_id(index), super::command::DISK_DEVICE.to_owned()), 1);
    }
    if !spec.nics.is_empty() {
        devices.insert((String::new(), super::command::NIC_DEVICE.to_owned()), spec.nics.len());
    }
    devices
}

/// Reads QEMU's two lists: each child is `{"name": …, "type": "child<TYPE>"}`. What is no list is not taken for an empty one.
fn devices(named: &Value, unnamed: &Value) -> Option<Devices> {
    let mut devices = Devices::new();
    for (list, has_id) in [(named, true), (unnamed, false)] {
        for entry in list.as_array()? {
            let text = |key: &str| entry[key].as_str().unwrap_or_default();
            let Some(kind) = text("type").strip_prefix("child<").and_then(|rest| rest.strip_suffix('>'))
            else {
                continue;
            };
            let id = if has_id { text("name") } else { "" };
            *devices.entry((id.to_owned(), kind.to_owned())).or_default() += 1;
        }
    }
    Some(devices)
}

fn compare(expected: &Devices, live: &Devices) -> Vec<String> {
    let surplus = |these: &Devices, those: &Devices, how: &str| {
        let more = these.iter().filter_map(|(device, count)| {
            let other = those.get(device).copied().unwrap_or_default();
            (*count > other).then(|| named(device, count - other, how))
        });
        more.collect::<Vec<_>>()
    };
    let mut all = surplus(live, expected, "was plugged in");
    all.extend(surplus(expected, live, "was unplugged"));
    let more = all.len().saturating_sub(NAMES_MAX);
    all.truncate(NAMES_MAX);
    if more > 0 {
        all.push(format!("and {more} more"));
    }
    all
}

fn named((id, kind): &(String, String), count: usize, how: &str) -> String {
    let bounded = |text: &str| text.chars().take(NAME_CHARS_MAX).collect::<String>();
    let id = if id.is_empty() { String::new() } else { format!(" {:?}", bounded(id)) };
    let times = if count > 1 { format!(" ({count} times)") } else { String::new() };
    format!("{}{id} {how}{times}", bounded(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(&str, &str)]) -> Value {
        let own = json!({"name": "type", "type": "string"});
        let children =
            entries.iter().map(|(name, kind)| json!({"name": name, "type": format!("child<{kind}>")}));
        std::iter::once(own).chain(children).collect()
    }

    fn spec() -> VmSpec {
        let nic = |n: u8| json!({"mac": format!("52:54:00:00:00:0{n}"), "bridge": "br0"});
        let value = json!({"uuid": "11111111-2222-3333-4444-555555555555", "name": "web-1", "vcpus": 1,
            "memory_bytes": 64 << 20, "nics": [nic(1), nic(2)],
            "disks": [{"path": "/d", "format": "raw", "volume": "v", "shared": true}]});
        serde_json::from_value(value).expect("a spec")
    }

    fn found(named: &[(&str, &str)], unnamed: &[(&str, &str)]) -> Vec<String> {
        compare(&of_spec(&spec()), &devices(&list(named), &list(unnamed)).expect("two lists"))
    }

    const DISK: (&str, &str) = ("vd0", "virtio-blk-pci");
    const NICS: [(&str, &str); 2] = [("device[0]", "virtio-net-pci"), ("device[1]", "virtio-net-pci")];

    #[test]
    fn what_is_more_or_less_than_the_spec_is_named() {
        assert_eq!(found(&[DISK], &NICS), [""; 0]);
        let rng = found(&[DISK, ("rng1", "virtio-rng-pci")], &NICS);
        assert_eq!(rng, ["virtio-rng-pci \"rng1\" was plugged in"]);
        let more = [NICS[0], NICS[1], ("device[2]", "virtio-net-pci"), ("device[3]", "virtio-net-pci")];
        assert_eq!(found(&[DISK], &more), ["virtio-net-pci was plugged in (2 times)"]);
        let less = found(&[], &NICS[..1]);
        assert_eq!(less, ["virtio-net-pci was unplugged", "virtio-blk-pci \"vd0\" was unplugged"]);
        let other = found(&[("vd0", "nvme")], &NICS);
        assert_eq!(other, ["nvme \"vd0\" was plugged in", "virtio-blk-pci \"vd0\" was unplugged"]);
    }

    #[test]
    fn any_number_of_names_of_any_length_stays_short() {
        let long = "x".repeat(10_000);
        let names: Vec<_> = (0..500).map(|n| format!("{n}{long}")).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), long.as_str())).collect();
        let found = found(&many, &NICS);
        assert_eq!((found.len(), found[NAMES_MAX].as_str()), (NAMES_MAX + 1, "and 493 more"));
        assert!(problem(&spec(), &found).detail.len() < 2_000);
        let nonsense = json!({"a": [1, null]});
        assert!(
            devices(&nonsense, &list(&NICS)).is_none() && devices(&list(&[DISK]), &Value::Null).is_none()
        );
        let odd = json!([1, null, {"name": 7, "type": "child<"}]);
        assert_eq!(devices(&odd, &list(&[])), Some(Devices::new()));
    }
}
