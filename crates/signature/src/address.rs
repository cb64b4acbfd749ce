//! Guest-physical addresses of `pc.ram` on QEMU's two x86 boards: what lies above the PCI hole begins at 4 GiB.
//! Checked against `info mtree` of a real QEMU in `tests/address.rs`.

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A board of QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// `pc-q35-*`.
    Q35,
    /// `pc-i440fx-*`.
    I440fx,
}

impl Board {
    /// The board of an exact machine type, such as `pc-q35-10.0`.
    #[must_use]
    pub fn of_machine(machine: &str) -> Option<Self> {
        let is = |name: &str| machine.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'));
        if is("pc-q35") {
            Some(Self::Q35)
        } else if is("pc-i440fx") {
            Some(Self::I440fx)
        } else {
            None
        }
    }

    /// How much of `pc.ram` lies below 4 GiB. Memory that nearly fills the room below the hole is split lower, at a
    /// whole GiB, so that huge pages fit.
    #[must_use]
    pub fn below_4g_bytes(self, ram_bytes: u64) -> u64 {
        let (room, split) = match self {
            Self::Q35 => (2 * GIB + 768 * MIB, 2 * GIB),
            Self::I440fx => (3 * GIB + 512 * MIB, 3 * GIB),
        };
        if ram_bytes >= room { split } else { ram_bytes }
    }
}

/// The guest-physical address of an offset in a RAM block. Only `pc.ram` has one that does not depend on what the
/// guest has programmed.
#[must_use]
pub fn gpa(block: &str, offset: u64, below_4g_bytes: u64) -> Option<u64> {
    if block != "pc.ram" {
        return None;
    }
    match offset.checked_sub(below_4g_bytes) {
        None => Some(offset),
        Some(above) => above.checked_add(4 * GIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_hole_begins_at_4_gib() {
        let check = |board: Board, ram_mib: u64, offset_mib: u64, expect_mib: u64| {
            let below = board.below_4g_bytes(ram_mib * MIB);
            let address = gpa("pc.ram", offset_mib * MIB, below);
            assert_eq!(address, Some(expect_mib * MIB), "{board:?} {ram_mib} MiB at {offset_mib} MiB");
        };
        check(Board::Q35, 2815, 2814, 2814);
        check(Board::Q35, 2816, 2047, 2047);
        check(Board::Q35, 2816, 2048, 4096);
        check(Board::I440fx, 3583, 3582, 3582);
        check(Board::I440fx, 3584, 3071, 3071);
        check(Board::I440fx, 3584, 3072, 4096);
        assert_eq!(gpa("pc.bios", 0, 0), None);
        assert_eq!(gpa("pc.ram", u64::MAX, 0), None);
    }

    #[test]
    fn boards_are_told_by_the_machine_type() {
        assert_eq!(Board::of_machine("pc-q35-10.0"), Some(Board::Q35));
        assert_eq!(Board::of_machine("pc-i440fx-7.2"), Some(Board::I440fx));
        for other in ["pc-q351", "microvm", "virt-10.0", ""] {
            assert_eq!(Board::of_machine(other), None);
        }
    }
}
