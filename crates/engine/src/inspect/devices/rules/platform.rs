//! What the chipset brings: firmware configuration, DMA, SMBus, hot-plug, watchdog, floppy, IOMMU, IPMI, UEFI variables.

use crate::inspect::devices::rule::Expect::{AtMost, AtMostField, Check, OneOf, Pinned, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on the chipset.
pub const RULES: &[ValueRule] = &[
    // An entry of the table of files, or the mark for none.
    ValueRule::index("fw_cfg", "cur_entry", Check(entry_in_table)),
    // Sizes that three memory regions are set to: their most.
    ValueRule::shape("fw_cfg/acpi_mr", "table_mr_size", AtMost(0x20_0000)),
    ValueRule::shape("fw_cfg/acpi_mr", "linker_mr_size", AtMost(0x1_0000)),
    ValueRule::shape("fw_cfg/acpi_mr", "rsdp_mr_size", AtMost(0x1000)),
    // Shifts: bytes or words, and the low or the high byte next.
    ValueRule::identity("dma", "dshift", Pinned),
    ValueRule::index("dma", "flip_flop", AtMost(1)),
    // Address and count of a channel: 16 bits and one, doubled for words. A device copies as much as is left.
    ValueRule::index("dma_regs", "now", SignedWithin(0, 0x2_0000)),
    // The next of 32 bytes of a block; 32 itself starts anew.
    ValueRule::index("pmsmb", "smb_index", AtMost(32)),
    // Used bytes of the 34 of a message.
    ValueRule::index("smbus-device", "data_len", SignedWithin(0, 34)),
    // One of four commands. The selector is free: each use of it is checked against the number of processors.
    ValueRule::state("CPU hotplug state", "command", AtMost(3)),
    // Two stages, 20 bits of time each; a shift and a multiplication follow.
    ValueRule::state("i6300esb_wdt", "stage", OneOf(&[1, 2])),
    ValueRule::index("i6300esb_wdt", "timer1_preload", AtMost(0xf_ffff)),
    ValueRule::index("i6300esb_wdt", "timer2_preload", AtMost(0xf_ffff)),
    // How many drives; the phase of a command; how many of four answers after a reset are due.
    ValueRule::shape("fdc", "num_floppies", Pinned),
    ValueRule::state("fdc/phase", "phase", AtMost(3)),
    ValueRule::index("fdc/reset_sensei", "reset_sensei", SignedWithin(0, 4)),
    // There is one register for faults.
    ValueRule::index("iommu-intel", "next_frcd_reg", AtMost(0)),
    // Messages of up to 300 bytes each way.
    ValueRule::index("ipmi-interface-kcs", "outlen", AtMost(300)),
    ValueRule::index("ipmi-interface-kcs", "outpos", AtMost(300)),
    ValueRule::index("ipmi-interface-kcs", "inlen", AtMost(300)),
    ValueRule::index("ipmi-interface-bt", "outlen", AtMost(300)),
    ValueRule::index("ipmi-interface-bt", "outpos", AtMost(300)),
    ValueRule::index("ipmi-interface-bt", "inlen", AtMost(300)),
    // Buffers that the load allocates: 64 KiB is the most that the device lets a guest ask for (CVE-2026-61404).
    ValueRule::shape("uefi-vars", "buf_size", AtMost(UEFI_BYTES)),
    ValueRule::index("uefi-vars", "pio_xfer_offset", AtMostField("buf_size")),
    ValueRule::shape("uefi-variable", "name_size", AtMost(UEFI_BYTES)),
    ValueRule::shape("uefi-variable", "data_size", AtMost(UEFI_BYTES)),
    ValueRule::shape("uefi-var-policy", "entry_size", AtMost(UEFI_BYTES)),
];

const UEFI_BYTES: u64 = 64 * 1024;

const NO_ENTRY: u64 = 0xffff;
/// Without the bits for the architecture's own table and for writing.
const ENTRY: u64 = 0x3fff;
/// 32 fixed entries and the 32 files that a machine has room for unless it is told otherwise.
const ENTRIES: u64 = 0x40;

fn entry_in_table(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let entry = required(fields, "cur_entry")?;
    if entry == NO_ENTRY || entry & ENTRY < ENTRIES {
        return Ok(());
    }
    Err(Breach::by_number(format!("one of {ENTRIES} entries, or none"), entry & ENTRY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_in_either_table_or_none() {
        let judge =
            |entry: u16| entry_in_table(&Fields { fields: &[("cur_entry", &entry.to_be_bytes())] }).is_ok();
        assert!(judge(0) && judge(0x3f) && judge(0x803f) && judge(0xc000) && judge(0xffff));
        assert!(!judge(0x40) && !judge(0x3fff) && !judge(0x8040) && !judge(0xfffe));
        assert!(entry_in_table(&Fields { fields: &[] }).is_err());
    }
}
