//! Layouts of what follows the queues of a virtio device: its own description, and virtio's subsections. No dump
//! has them.

use super::{VIRTQUEUE_MAX, virtio::NET_MAC_ENTRIES};
use crate::inspect::devices::build::{Builder, Why, msix_entries, named, pci_config, plain_field};
use types::layout::{Counted, Field, HexBytes, Kind, Layout, Virtio, VirtioDevice, When};

/// Size of the state of PCI interrupts.
pub(super) const IRQ_STATE_BYTES: usize = 16;
/// Feature bit of a network device with offloads that its guest controls.
const CTRL_GUEST_OFFLOADS: u8 = 2;
const MAX_QUEUE_PAIRS: u16 = 511;
const MAC_BYTES: usize = 6;
/// Address, waiting packets, merging, status and two modes come before the number of addresses in the filter.
const NET_FILTER_AT: usize = 6 + 4 + 4 + 2 + 1 + 1;
/// VLANs, header, six modes and offload come between the filter and the pairs of queues.
const NET_PAIRS_BEHIND_MACS: usize = 512 + 4 + 6 + 1;
const MAX_RSS_ENTRIES: u32 = 128;
/// Virtio's tables have a slot for each queue that a device could have.
#[expect(clippy::cast_possible_truncation, reason = "1024")]
const SLOTS: u32 = VIRTQUEUE_MAX as u32;

/// One way to read a virtio device's state.
#[derive(Debug, Clone)]
pub(in crate::inspect::devices) struct Shape {
    pub(super) vmsd: &'static str,
    pub(super) config_space: usize,
    pub(super) config_bytes: u32,
    pub(super) queues: u32,
    pub(super) packed: bool,
    pub(super) device: VirtioDevice,
    /// Pairs of queues that a network device can have, where it can have several.
    pub(super) pairs: Option<u16>,
    /// Where the state behind the queues starts.
    pub(super) device_at: usize,
}

fn bytes(name: &str, size: u32) -> Field {
    plain_field(name, Kind::Bytes(size))
}

fn array(name: &str, size: u32, count: u32) -> Field {
    plain_field(name, Kind::Array(size, count))
}

fn with(vmsd: &str, version: u32, fields: Vec<Field>) -> Layout {
    Layout { fields, ..named(vmsd, version) }
}

impl Shape {
    /// The field of this shape; the dry run's bytes bring the configuration space.
    pub(in crate::inspect::devices) fn build(
        &self,
        builder: &mut Builder<'_>,
        state: &[u8],
    ) -> Result<Kind, Why> {
        let config = state.get(4..4 + self.config_space).unwrap_or_default();
        let space = plain_field("config", pci_config(config));
        let version = state.get(..4).map(|version| HexBytes(version.to_vec()));
        let version = Field { pinned: version, ..bytes("version_id", 4) };
        let fields = vec![version, space, array("irq_state", 4, 4)];
        let pci = builder.intern(with("PCIDevice", 2, fields))?;
        let layout = match self.vmsd {
            "virtio-net" => Some(self.net(builder)?),
            "virtio-balloon" => Some(balloon(builder)?),
            _ => None,
        };
        Ok(Kind::Virtio(Box::new(Virtio {
            pci,
            msix_entries: msix_entries(config),
            config_bytes: self.config_bytes,
            queues: self.queues,
            packed: self.packed,
            device: self.device,
            layout,
            subsections: subsections(builder)?,
        })))
    }

    /// The pairs that a network device's dry run names, if this is one with several.
    pub(super) fn net_pairs(&self, state: &[u8]) -> Option<u16> {
        let filter = self.device_at + NET_FILTER_AT;
        let macs = u32::from_be_bytes(state.get(filter..filter + 4)?.try_into().ok()?).min(NET_MAC_ENTRIES);
        let at = filter + 4 + macs as usize * MAC_BYTES + NET_PAIRS_BEHIND_MACS;
        let pairs = u16::from_be_bytes(state.get(at..at + 2)?.try_into().ok()?);
        (self.device == VirtioDevice::Net && (2..=MAX_QUEUE_PAIRS).contains(&pairs)).then_some(pairs)
    }

    fn net(&self, builder: &mut Builder<'_>) -> Result<u32, Why> {
        let rss = rss(builder)?;
        let waiting = with("virtio-net-queue-tx_waiting", 0, vec![bytes("tx_waiting", 4)]);
        let waiting = builder.intern(waiting)?;
        let vnet = builder.intern(with("virtio-net-vnet", 0, vec![bytes("has_vnet_hdr", 4)]))?;
        let ufo = builder.intern(with("virtio-net-ufo", 0, vec![bytes("has_ufo", 1)]))?;
        let macs = counted(6, "mac_table.in_use", 0, NET_MAC_ENTRIES, 0);
        let mut fields = vec![
            array("mac", 1, 6),
            plain_field("vqs", Kind::Structs(waiting, 1)),
            bytes("mergeable_rx_bufs", 4),
            bytes("status", 2),
            bytes("promisc", 1),
            bytes("allmulti", 1),
            bytes("mac_table.in_use", 4),
            plain_field("mac_table.macs", Kind::Counted(macs)),
            bytes("vlans", 512),
            plain_field("tmp", Kind::Structs(vnet, 1)),
            bytes("mac_table.multi_overflow", 1),
            bytes("mac_table.uni_overflow", 1),
            bytes("alluni", 1),
            bytes("nomulti", 1),
            bytes("nouni", 1),
            bytes("nobcast", 1),
            plain_field("tmp", Kind::Structs(ufo, 1)),
        ];
        if let Some(pairs) = self.pairs {
            let others = counted(4, "curr_queue_pairs", 1, u32::from(pairs), 1);
            let pinned = Some(HexBytes(pairs.to_be_bytes().to_vec()));
            fields.push(Field { pinned, ..bytes("max_queue_pairs", 2) });
            fields.push(bytes("curr_queue_pairs", 2));
            fields.push(plain_field("tx_waiting", Kind::Counted(others)));
        }
        let when = Some(When::VirtioFeature(CTRL_GUEST_OFFLOADS));
        fields.push(Field { when, ..bytes("curr_guest_offloads", 8) });
        let layout = Layout { subsections: vec![rss], ..with("virtio-net-device", 11, fields) };
        builder.intern(layout)
    }
}

fn counted(element: u32, field: &str, least: u32, most: u32, elsewhere: u32) -> Counted {
    Counted { element, field: field.to_owned(), least, most, elsewhere }
}

fn rss(builder: &mut Builder<'_>) -> Result<u32, Why> {
    let table = counted(2, "rss_data.indirections_len", 1, MAX_RSS_ENTRIES, 0);
    let fields = vec![
        bytes("rss_data.enabled", 1),
        bytes("rss_data.redirect", 1),
        bytes("rss_data.populate_hash", 1),
        bytes("rss_data.hash_types", 4),
        bytes("rss_data.indirections_len", 2),
        bytes("rss_data.default_queue", 2),
        array("rss_data.key", 1, 40),
        plain_field("rss_data.indirections_table", Kind::Counted(table)),
    ];
    builder.intern(with("virtio-net-device/rss", 1, fields))
}

fn balloon(builder: &mut Builder<'_>) -> Result<u32, Why> {
    let hint = vec![bytes("free_page_hint_cmd_id", 4), bytes("free_page_hint_status", 4)];
    let hint = builder.intern(with("virtio-balloon-device/free-page-report", 1, hint))?;
    let poison = vec![bytes("poison_val", 4)];
    let poison = builder.intern(with("virtio-balloon-device/page-poison", 1, poison))?;
    let fields = vec![bytes("num_pages", 4), bytes("actual", 4)];
    let layout = Layout { subsections: vec![hint, poison], ..with("virtio-balloon-device", 1, fields) };
    builder.intern(layout)
}

/// The description with virtio's subsections, in their order.
fn subsections(builder: &mut Builder<'_>) -> Result<u32, Why> {
    let mut slots = |name: &str, slot: Layout| {
        let slot = builder.intern(slot)?;
        builder.intern(with(name, 1, vec![plain_field("vq", Kind::Structs(slot, SLOTS))]))
    };
    let rings = slots(
        "virtio/virtqueues",
        with("virtqueue_state", 1, vec![bytes("vring.avail", 8), bytes("vring.used", 8)]),
    )?;
    let sizes = slots("virtio/ringsize", with("ringsize_state", 1, vec![bytes("vring.num_default", 4)]))?;
    let packed = vec![
        bytes("last_avail_idx", 2),
        bytes("last_avail_wrap_counter", 1),
        bytes("used_idx", 2),
        bytes("used_wrap_counter", 1),
        bytes("inuse", 4),
    ];
    let packed = slots("virtio/packed_virtqueues", with("packed_virtqueue_state", 1, packed))?;
    let transport = transport(builder)?;
    let extra = with("virtio/extra_state", 1, vec![plain_field("extra_state", Kind::Structs(transport, 1))]);
    let mut one = |name: &str, field: &str, size| builder.intern(with(name, 1, vec![bytes(field, size)]));
    let endian = one("virtio/device_endian", "device_endian", 1)?;
    let features = one("virtio/64bit_features", "guest_features", 8)?;
    let broken = one("virtio/broken", "broken", 1)?;
    let started = one("virtio/started", "started", 1)?;
    let disabled = one("virtio/disabled", "disabled", 1)?;
    let extra = builder.intern(extra)?;
    let subsections = vec![endian, features, rings, sizes, broken, extra, started, packed, disabled];
    builder.intern(Layout { subsections, ..named("virtio", 1) })
}

/// The state of a modern PCI transport.
fn transport(builder: &mut Builder<'_>) -> Result<u32, Why> {
    let queue = vec![
        bytes("num", 2),
        bytes("unused", 1),
        bytes("enabled", 1),
        array("desc", 4, 2),
        array("avail", 4, 2),
        array("used", 4, 2),
    ];
    let queue = builder.intern(with("virtio_pci/modern_queue_state", 1, queue))?;
    let fields = vec![
        bytes("dfselect", 4),
        bytes("gfselect", 4),
        array("guest_features", 4, 2),
        plain_field("vqs", Kind::Structs(queue, SLOTS)),
    ];
    let modern = builder.intern(with("virtio_pci/modern_state", 1, fields))?;
    builder.intern(Layout { subsections: vec![modern], ..named("virtio_pci", 1) })
}
