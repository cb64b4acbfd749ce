//! Firmware blocks are what they were when the VM was enrolled (INV-R14): no boot kit comes with a stream.
//!
//! A copy of each pinned block is kept, written as the target's QEMU will write its own, and hashed before the device
//! state is released.

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
}

/// The copies, by the block's index in the stream; most blocks have none.
#[derive(Debug, Default)]
pub(super) struct Firmware(Vec<Option<Shadow>>);

impl Firmware {
    pub(super) fn pin(&mut self, index: usize, name: &str, length_bytes: u64, expected: Digest) {
        // Bounded: the inventory's total of pinned blocks was checked.
        let bytes = vec![0; usize::try_from(length_bytes).unwrap_or(0)];
        // Blocks come in order, and are at most as many as a list may have.
        self.0.resize_with(index, || None);
        self.0.push(Some(Shadow { name: name.to_owned(), expected, bytes }));
    }

    /// A piece of a page's content.
    #[inline]
    pub(super) fn write(&mut self, block: usize, offset: u64, piece: &[u8]) {
        if let Some(place) = self.place(block, offset, piece.len()) {
            place.copy_from_slice(piece);
        }
    }

    /// A page of zeros.
    #[inline]
    pub(super) fn clear(&mut self, block: usize, offset: u64, page_bytes: usize) {
        if let Some(place) = self.place(block, offset, page_bytes) {
            place.fill(0);
        }
    }

    #[inline]
    fn place(&mut self, block: usize, offset: u64, len: usize) -> Option<&mut [u8]> {
        let shadow = self.0.get_mut(block)?.as_mut()?;
        let start = usize::try_from(offset).ok()?;
        shadow.bytes.get_mut(start..start.checked_add(len)?)
    }

    /// The first block that is not what was enrolled.
    pub(super) fn changed(&self) -> Option<&str> {
        let differs = |shadow: &&Shadow| Digest::of(&shadow.bytes) != shadow.expected;
        self.0.iter().flatten().find(differs).map(|shadow| shadow.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_what_was_written_last() {
        let bytes = [[1u8; 4096], [0; 4096]].concat();
        let mut firmware = Firmware::default();
        firmware.pin(2, "pc.bios", 8192, Digest::of(&bytes));
        assert_eq!(firmware.changed(), Some("pc.bios"));
        firmware.write(2, 0, &bytes[..1000]);
        firmware.write(2, 1000, &bytes[1000..4096]);
        assert_eq!(firmware.changed(), None);
        firmware.write(2, 4096, &[7]);
        firmware.write(0, 0, &[7]);
        firmware.write(2, 8192, &[7]);
        assert_eq!(firmware.changed(), Some("pc.bios"));
        firmware.clear(2, 4096, 4096);
        assert_eq!(firmware.changed(), None);
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
