//! Device state that QEMU writes by hand: no description names its fields, so the knowledge is ours.

pub(super) mod pci;
mod scsi;
pub(super) mod virtio;
mod virtio_layouts;

use super::rule::{Expect, ValueRule};

/// Largest number of entries of a virtqueue, and of queues of a device.
pub(super) const VIRTQUEUE_MAX: u64 = 1024;

/// Rules on the fields that codecs lay out, and on the counts that a layout can't be exact without.
pub(super) const RULES: &[ValueRule] = &[
    pinned("hpet", "num_timers"),
    pinned("hpet", "num_timers_save"),
    ValueRule { vmsd: "PCIDevice", field: "version_id", rule: "INV-D7", expect: Expect::Pinned },
    ValueRule { vmsd: "PCIDevice", field: "irq_state", rule: "INV-D6", expect: Expect::AtMost(1) },
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
