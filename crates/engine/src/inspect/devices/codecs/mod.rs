//! Device state that QEMU writes by hand: no description names its fields, so the knowledge is ours.

pub(super) mod pci;
mod scsi;
pub(super) mod virtio;
mod virtio_layouts;

use super::rule::{Breach, Expect, Fields, ValueRule};

/// Largest number of entries of a virtqueue, and of queues of a device.
pub(super) const VIRTQUEUE_MAX: u64 = 1024;

/// Rules on the fields that codecs lay out, and on the counts that a layout can't be exact without.
pub(super) const RULES: &[ValueRule] = &[
    pinned("hpet", "num_timers"),
    pinned("hpet", "num_timers_save"),
    ValueRule { vmsd: "PCIDevice", field: "version_id", rule: "INV-D7", expect: Expect::Pinned },
    ValueRule { vmsd: "PCIDevice", field: "irq_state", rule: "INV-D6", expect: Expect::AtMost(1) },
    ValueRule { vmsd: "globalstate", field: "size", rule: "INV-D8", expect: Expect::AtMost(100) },
    ValueRule { vmsd: "globalstate", field: "runstate", rule: "INV-D8", expect: Expect::Check(run_state) },
    ValueRule {
        vmsd: "globalstate",
        field: "has_vm_was_suspended",
        rule: "INV-D8",
        expect: Expect::AtMost(1),
    },
    ValueRule { vmsd: "globalstate", field: "vm_was_suspended", rule: "INV-D8", expect: Expect::AtMost(1) },
    ValueRule { vmsd: "globalstate", field: "unused", rule: "INV-D8", expect: Expect::Check(unused_is_zero) },
    ValueRule {
        vmsd: "PCIE_AER_ERROR_LOG",
        field: "log_num",
        rule: "INV-D5",
        expect: Expect::AtMostField("log_max"),
    },
    pinned("PCIE_AER_ERROR_LOG", "log_max"),
    ValueRule {
        vmsd: "ringsize_state",
        field: "vring.num_default",
        rule: "INV-D5",
        expect: Expect::AtMost(VIRTQUEUE_MAX),
    },
    ValueRule {
        vmsd: "virtio_pci/modern_queue_state",
        field: "num",
        rule: "INV-D5",
        expect: Expect::AtMost(32 * VIRTQUEUE_MAX),
    },
    flag("virtio_pci/modern_queue_state", "enabled"),
    flag("virtio/broken", "broken"),
    flag("virtio/started", "started"),
    flag("virtio/disabled", "disabled"),
    ValueRule {
        vmsd: "virtio/device_endian",
        field: "device_endian",
        rule: "INV-D6",
        expect: Expect::AtMost(2),
    },
    flag("packed_virtqueue_state", "last_avail_wrap_counter"),
    flag("packed_virtqueue_state", "used_wrap_counter"),
    ValueRule {
        vmsd: "packed_virtqueue_state",
        field: "inuse",
        rule: "INV-D6",
        expect: Expect::AtMost(VIRTQUEUE_MAX),
    },
    ValueRule {
        vmsd: "virtio-net-device",
        field: "mac_table.in_use",
        rule: "INV-D6",
        expect: Expect::AtMost(64),
    },
    ValueRule {
        vmsd: "virtio-net-device",
        field: "curr_queue_pairs",
        rule: "INV-D6",
        expect: Expect::AtMostField("max_queue_pairs"),
    },
    pinned("virtio-net-device", "max_queue_pairs"),
    ValueRule {
        vmsd: "virtio-net-device/rss",
        field: "rss_data.indirections_len",
        rule: "INV-D5",
        expect: Expect::OneOf(&[1, 2, 4, 8, 16, 32, 64, 128]),
    },
];

const fn pinned(vmsd: &'static str, field: &'static str) -> ValueRule {
    ValueRule { vmsd, field, rule: "INV-D5", expect: Expect::Pinned }
}

const fn flag(vmsd: &'static str, field: &'static str) -> ValueRule {
    ValueRule { vmsd, field, rule: "INV-D6", expect: Expect::AtMost(1) }
}

/// Run states that a VM can be handed over in.
const RUN_STATES: [&[u8]; 10] = [
    b"running",
    b"paused",
    b"prelaunch",
    b"suspended",
    b"io-error",
    b"shutdown",
    b"guest-panicked",
    b"watchdog",
    b"internal-error",
    b"postmigrate",
];

fn run_state(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let breach =
        |expected: &str, found: &str| Err(Breach { expected: expected.to_owned(), found: found.to_owned() });
    let held = fields.bytes("runstate").unwrap_or_default();
    let Some(length) = held.iter().position(|b| *b == 0) else {
        return breach("a run state that ends", "one that does not");
    };
    let (name, padding) = held.split_at(length);
    if !RUN_STATES.contains(&name) {
        return breach("a run state to hand over in", &wire::qemu::printable(name));
    }
    if padding.iter().any(|b| *b != 0) {
        return breach("zeros behind the run state", "other bytes");
    }
    match fields.number("size") {
        Some(size) if size == length as u64 + 1 => Ok(()),
        size => breach("the length of the run state", &size.unwrap_or(0).to_string()),
    }
}

fn unused_is_zero(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    if fields.bytes("unused").unwrap_or_default().iter().all(|b| *b == 0) {
        return Ok(());
    }
    Err(Breach { expected: "zeros".to_owned(), found: "other bytes".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(size: u64, text: &[u8]) -> bool {
        let mut state = [0u8; 32];
        state[..text.len()].copy_from_slice(text);
        let size = size.to_be_bytes();
        run_state(&Fields { fields: &[("size", &size), ("runstate", &state)] }).is_ok()
    }

    #[test]
    fn a_run_state_is_one_of_the_known_with_zeros_behind() {
        assert!(check(8, b"running"));
        assert!(!check(7, b"running"));
        assert!(!check(5, b"colo"));
        assert!(!check(8, b"running\0x"));
        assert!(!check(33, &[b'r'; 32]));
        assert!(!check(1, b""));
    }
}
