//! Firmware blocks are what they were when the VM was enrolled (INV-R14): no boot kit comes with a stream.
//!
//! The first copy of each page of a pinned block is kept, and all of it is hashed before the device state is released.
//! Every later copy must equal the first: on several channels nobody can tell which of two QEMU will write last.

use types::handover::Digest;

/// Most bytes of firmware that are kept: two flash devices of 4 MiB, or a dozen option ROMs.
pub const MAX_FIRMWARE_BYTES: u64 = 8 << 20;

/// Whether a RAM block of that name is firmware that no guest and no host changes: the BIOS and option ROMs. ACPI
/// tables and their loader are left out, since the guest's own firmware makes the host rewrite them.
#[must_use]
pub fn is_firmware(block: &str) -> bool {
    matches!(block, "pc.bios" | "pc.rom" | "isa-bios")
        || block.ends_with(".rom")
        || block.starts_with("/rom@genroms/")
}

#[derive(Debug)]
struct Shadow {
    name: String,
    expected: Digest,
    bytes: Vec<u8>,
    /// Which pages have come.
    came: Vec<bool>,
    /// Whether a page came in two versions.
    torn: bool,
}

/// The copies, by the block's index in the stream; most blocks have none.
#[derive(Debug, Default)]
pub(super) struct Firmware(Vec<Option<Shadow>>);

impl Firmware {
    pub(super) fn pin(&mut self, index: usize, block: (&str, u64), page_bytes: u64, expected: Digest) {
        let (name, length_bytes) = block;
        // Bounded: the inventory's total of pinned blocks was checked.
        let bytes = vec![0; usize::try_from(length_bytes).unwrap_or(0)];
        let came = vec![false; usize::try_from(length_bytes / page_bytes.max(1)).unwrap_or(0)];
        // Blocks come in order, and are at most as many as a list may have.
        self.0.resize_with(index, || None);
        self.0.push(Some(Shadow { name: name.to_owned(), expected, bytes, came, torn: false }));
    }

    /// Whether pages of the block are to be kept.
    #[inline]
    pub(super) fn is_pinned(&self, block: usize) -> bool {
        self.0.get(block).is_some_and(Option::is_some)
    }

    /// A whole page.
    pub(super) fn page(&mut self, block: usize, offset: u64, page: &[u8]) {
        let Some(shadow) = self.0.get_mut(block).and_then(Option::as_mut) else { return };
        let Ok(start) = usize::try_from(offset) else { return };
        let place = start.checked_add(page.len()).and_then(|end| shadow.bytes.get_mut(start..end));
        let came = shadow.came.get_mut(start / page.len().max(1));
        if let (Some(place), Some(came)) = (place, came) {
            if *came {
                shadow.torn |= place != page;
            } else {
                place.copy_from_slice(page);
                *came = true;
            }
        }
    }

    /// The first block that is not what was enrolled.
    pub(super) fn changed(&self) -> Option<&str> {
        let differs = |shadow: &&Shadow| shadow.torn || Digest::of(&shadow.bytes) != shadow.expected;
        self.0.iter().flatten().find(differs).map(|shadow| shadow.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_whole_and_each_page_of_it_one_thing() {
        let pages = [[1u8; 4096], [0; 4096]];
        let pinned = || {
            let mut firmware = Firmware::default();
            firmware.pin(2, ("pc.bios", 8192), 4096, Digest::of(&pages.concat()));
            firmware
        };
        let mut firmware = pinned();
        assert!(firmware.is_pinned(2) && !firmware.is_pinned(0) && !firmware.is_pinned(3));
        assert_eq!(firmware.changed(), Some("pc.bios"));
        firmware.page(2, 0, &pages[0]);
        firmware.page(2, 4096, &pages[1]);
        firmware.page(2, 0, &pages[0]);
        firmware.page(0, 0, &[7; 4096]);
        firmware.page(2, 8192, &[7; 4096]);
        assert_eq!(firmware.changed(), None);
        // Whichever of the two comes first.
        for order in [[1u8, 9], [9, 1]] {
            let mut firmware = pinned();
            firmware.page(2, 4096, &pages[1]);
            for byte in order {
                firmware.page(2, 0, &[byte; 4096]);
            }
            assert_eq!(firmware.changed(), Some("pc.bios"), "{order:?}");
        }
    }

    #[test]
    fn the_names_of_firmware() {
        let firmware =
            ["pc.bios", "pc.rom", "0000:00:02.0/virtio-net-pci.rom", "/rom@genroms/linuxboot_dma.bin"];
        assert!(firmware.into_iter().all(is_firmware));
        let others =
            ["pc.ram", "/rom@etc/acpi/tables", "/rom@etc/table-loader", "0000:00:02.0/vga.vram", "tpm-ppi"];
        assert!(!others.into_iter().any(is_firmware));
    }
}
