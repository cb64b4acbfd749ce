//! What virtio devices on PCI write by hand: the transport, the queues, and some devices' requests in flight.
//!
//! Then come the device's own description and virtio's subsections, which are layouts like any other (see
//! `virtio_layouts`).

use super::VIRTQUEUE_MAX;
use super::virtio_layouts::{IRQ_STATE_BYTES, Shape};
use crate::inspect::devices::build::{Why, msix_entries};
use crate::inspect::devices::parse::{Reader, Stop};
use crate::inspect::devices::rule::Breach;
use types::layout::{Virtio, VirtioDevice};

/// No vector: interrupts of this kind are off.
const NO_VECTOR: u64 = 0xffff;
/// A queue element in flight, as the 64-bit struct that QEMU dumps: indices, then addresses and host vectors.
const ELEMENT_BYTES: usize = 49_168;
/// Queues of a network device whose guest did not take more: receive, transmit, control.
const LEAST_NET_QUEUES: u64 = 3;

/// Entries of a network device's table of MAC addresses.
pub(super) const NET_MAC_ENTRIES: u32 = 64;

/// The devices whose state is known, by the name of their description.
const DEVICES: [&str; 7] = [
    "virtio-net",
    "virtio-blk",
    "virtio-rng",
    "virtio-balloon",
    "virtio-scsi",
    "virtio-console",
    "virtio-input",
];

/// The ways to read a dry run's virtio device: with a small or a large configuration space, with one pair of queues
/// or several. At most one takes all its bytes.
pub(in crate::inspect::devices) fn shapes(vmsd: &str, state: &[u8]) -> Result<Vec<Shape>, Why> {
    let known = DEVICES.iter().find(|known| **known == vmsd);
    let vmsd = *known.ok_or_else(|| format!("what {vmsd:?} writes is not known"))?;
    let mut shapes = Vec::new();
    for config_space in [256, 4096] {
        let Some(shape) = shape(vmsd, state, config_space) else { continue };
        if let Some(pairs) = shape.net_pairs(state) {
            // Two queues for each pair and one for control; a guest that has not asked for them has one pair.
            shapes.push(Shape { pairs: Some(pairs), queues: 2 * u32::from(pairs) + 1, ..shape.clone() });
        }
        shapes.push(shape);
    }
    Ok(shapes)
}

fn shape(vmsd: &'static str, state: &[u8], config_space: usize) -> Option<Shape> {
    let word = |at: usize| Some(u32::from_be_bytes(state.get(at..at + 4)?.try_into().ok()?));
    let msix = msix_entries(state.get(4..4 + config_space)?);
    let msix_bytes = msix.map_or(0, |n| usize::from(n) * 16 + usize::from(n).div_ceil(8) + 2);
    // Status, interrupt status, selected queue and features come before the configuration.
    let at = 4 + config_space + IRQ_STATE_BYTES + msix_bytes + 8;
    let config_bytes = word(at)?;
    let config_end = (at + 4).checked_add(config_bytes as usize)?;
    let queues = word(config_end).filter(|n| u64::from(*n) <= VIRTQUEUE_MAX)?;
    let device = match vmsd {
        "virtio-net" => VirtioDevice::Net,
        "virtio-blk" => VirtioDevice::Blk,
        // Two queues for each port, and two for control. The configuration would say it, but is empty until read.
        "virtio-console" => VirtioDevice::Serial((queues / 2).saturating_sub(1)),
        _ => VirtioDevice::None,
    };
    let needle = b"virtio/packed_virtqueues";
    let packed = state.windows(needle.len()).any(|window| window == needle);
    let device_at = config_end + 4 + queues as usize * (4 + 8 + if msix.is_some() { 4 } else { 2 });
    Some(Shape { vmsd, config_space, config_bytes, queues, packed, device, pairs: None, device_at })
}

impl Reader<'_, '_> {
    /// A whole virtio device.
    pub(in crate::inspect::devices) fn virtio(&mut self, virtio: &Virtio) -> Result<(), Stop> {
        self.layout(virtio.pci)?;
        if let Some(entries) = virtio.msix_entries {
            let entries = usize::from(entries);
            self.take(entries * 16 + entries.div_ceil(8), "msix")?;
        }
        self.vector(virtio, "config_vector")?;
        self.take_number(1, "status")?;
        self.bounded(1, "isr", "INV-D6", 3)?;
        self.bounded(2, "queue_sel", "INV-D6", VIRTQUEUE_MAX - 1)?;
        let features = self.take_number(4, "features")?;
        self.features = u32::try_from(features).unwrap_or(0);
        self.exactly(4, "config_len", u64::from(virtio.config_bytes))?;
        self.take(virtio.config_bytes as usize, "config")?;
        let queues = self.queue_count(virtio)?;
        (0..queues).try_for_each(|_| self.queue(virtio))?;
        match virtio.device {
            VirtioDevice::None | VirtioDevice::Net => {}
            VirtioDevice::Blk => self.disk_requests(virtio)?,
            VirtioDevice::Serial(ports) => self.serial_ports(virtio, ports)?,
        }
        if let Some(layout) = virtio.layout {
            self.layout(layout)?;
        }
        self.layout(virtio.subsections)
    }

    /// A number that must hold.
    fn hold(
        &self,
        holds: bool,
        at: usize,
        field: &str,
        rule: &'static str,
        breach: (String, u64),
    ) -> Result<(), Stop> {
        if holds {
            return Ok(());
        }
        let (expected, found) = breach;
        let field = format!("virtio.{field}");
        Err(self.value(rule, at, &field, Breach { expected, found: found.to_string() }))
    }

    fn bounded(&mut self, bytes: usize, field: &str, rule: &'static str, most: u64) -> Result<u64, Stop> {
        let at = self.at();
        let held = self.take_number(bytes, field)?;
        self.hold(held <= most, at, field, rule, (format!("at most {most}"), held))?;
        Ok(held)
    }

    fn exactly(&mut self, bytes: usize, field: &str, expected: u64) -> Result<(), Stop> {
        let at = self.at();
        let held = self.take_number(bytes, field)?;
        self.hold(held == expected, at, field, "INV-D5", (format!("{expected}, as on the target"), held))
    }

    fn vector(&mut self, virtio: &Virtio, field: &str) -> Result<(), Stop> {
        let Some(entries) = virtio.msix_entries else { return Ok(()) };
        let at = self.at();
        let held = self.take_number(2, field)?;
        let good = held == NO_VECTOR || held < u64::from(entries);
        self.hold(good, at, field, "INV-D6", (format!("a vector below {entries}, or none"), held))
    }

    fn queue_count(&mut self, virtio: &Virtio) -> Result<u64, Stop> {
        let at = self.at();
        let (held, all) = (self.take_number(4, "num_queues")?, u64::from(virtio.queues));
        let least = if virtio.device == VirtioDevice::Net { LEAST_NET_QUEUES.min(all) } else { all };
        self.hold(held == all || held == least, at, "num_queues", "INV-D5", (format!("{all} queues"), held))?;
        Ok(held)
    }

    fn queue(&mut self, virtio: &Virtio) -> Result<(), Stop> {
        let at = self.at();
        let size = self.take_number(4, "vring.num")?;
        let good = size <= VIRTQUEUE_MAX && (virtio.packed || size == 0 || size.is_power_of_two());
        let expected = format!("a power of two up to {VIRTQUEUE_MAX}, or zero");
        self.hold(good, at, "vring.num", "INV-D5", (expected, size))?;
        let descriptors = self.take_number(8, "vring.desc")?;
        let at = self.at();
        let last = self.take_number(2, "last_avail_idx")?;
        let good = descriptors != 0 || last == 0;
        self.hold(
            good,
            at,
            "last_avail_idx",
            "INV-D6",
            ("zero for a queue without memory".to_owned(), last),
        )?;
        self.vector(virtio, "vector")
    }

    /// Requests in flight on a disk: a one before each, a zero behind the last.
    fn disk_requests(&mut self, virtio: &Virtio) -> Result<(), Stop> {
        let most = VIRTQUEUE_MAX * u64::from(virtio.queues);
        for _ in 0..=most {
            if self.bounded(1, "request", "INV-D6", 1)? == 0 {
                return Ok(());
            }
            if virtio.queues > 1 {
                self.bounded(4, "request.queue", "INV-D6", u64::from(virtio.queues) - 1)?;
            }
            self.element(virtio)?;
        }
        let breach = (format!("at most {most} requests"), most + 1);
        self.hold(false, self.at(), "request", "INV-D5", breach)
    }

    /// A queue element; QEMU writes its struct as the host has it, little-endian here.
    fn element(&mut self, virtio: &Virtio) -> Result<(), Stop> {
        let at = self.at();
        let bytes = self.take(ELEMENT_BYTES, "element")?;
        let word = |at: usize| {
            let word = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            u64::from(word.map_or(u32::MAX, u32::from_le_bytes))
        };
        let (index, out, incoming) = (word(0), word(4), word(8));
        let most = VIRTQUEUE_MAX;
        self.hold(index < most, at, "element.index", "INV-D6", (format!("below {most}"), index))?;
        let vectors = out + incoming;
        self.hold(vectors <= most, at, "element.num", "INV-D5", (format!("at most {most}"), vectors))?;
        if virtio.packed {
            self.bounded(4, "element.ndescs", "INV-D6", most)?;
        }
        Ok(())
    }

    fn serial_ports(&mut self, virtio: &Virtio, ports: u32) -> Result<(), Stop> {
        self.take(8, "config")?;
        self.take(ports.div_ceil(32) as usize * 4, "ports_map")?;
        let active = self.bounded(4, "nr_active_ports", "INV-D5", u64::from(ports))?;
        for _ in 0..active {
            self.bounded(4, "port.id", "INV-D6", u64::from(ports).saturating_sub(1))?;
            self.bounded(1, "port.guest_connected", "INV-D6", 1)?;
            self.bounded(1, "port.host_connected", "INV-D6", 1)?;
            if self.bounded(4, "port.elem_popped", "INV-D6", 1)? == 1 {
                self.bounded(4, "port.iov_idx", "INV-D6", VIRTQUEUE_MAX)?;
                self.take(8, "port.iov_offset")?;
                self.element(virtio)?;
            }
        }
        Ok(())
    }
}
