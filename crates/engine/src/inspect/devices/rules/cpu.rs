//! Processors: what leads QEMU or KVM past an array of the processor's state, or into a state that no x86 has.

use crate::inspect::devices::rule::Expect::{AtMost, Check, OneOf, SignedWithin, Within};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on `cpu_common`, `cpu` and its subsections.
pub const RULES: &[ValueRule] = &[
    // A flag in a 32-bit field.
    ValueRule::state("cpu_common", "halted", AtMost(1)),
    // The form of the x87 registers: only this one is read today.
    ValueRule::shape("cpu", "env.fpregs_format_vmstate", AtMost(0)),
    // The mask is all ones, or all ones without address line 20.
    ValueRule::state("cpu", "env.a20_mask", OneOf(&[0xffff_ffff, 0xffef_ffff])),
    // Vectors: the interrupt table has 256, -1 says none.
    ValueRule::index("cpu", "env.interrupt_injected", SignedWithin(-1, 255)),
    ValueRule::index("cpu", "env.exception_nr", SignedWithin(-1, 255)),
    ValueRule::index("cpu", "env.sipi_vector", AtMost(255)),
    // KVM's run states of a processor.
    ValueRule::state("cpu", "env.mp_state", AtMost(10)),
    // The low byte says how many machine check banks there are; the array has ten.
    ValueRule::index("cpu", "env.mcg_cap", Check(machine_check_banks)),
    // How many of the 32 branch records are handed to KVM.
    ValueRule::index("cpu/arch_lbr", "env.msr_lbr_depth", AtMost(LBR_RECORDS)),
    // How many bytes of the nested state KVM is told to read: its header, and up to two pages.
    ValueRule::index(
        "cpu/kvm_nested_state",
        "size",
        Within(NESTED_HEADER_BYTES, NESTED_HEADER_BYTES + 2 * 4096),
    ),
    ValueRule::state("cpu/kvm_nested_state", "format", AtMost(1)),
];

const BANKS: u64 = 10;
const LBR_RECORDS: u64 = 32;
const NESTED_HEADER_BYTES: u64 = 128;

fn machine_check_banks(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let banks = required(fields, "env.mcg_cap")? & 0xff;
    if banks <= BANKS {
        return Ok(());
    }
    Err(Breach::by_number(format!("at most {BANKS} machine check banks"), banks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_low_byte_counts_banks() {
        let judge =
            |cap: u64| machine_check_banks(&Fields { fields: &[("env.mcg_cap", &cap.to_be_bytes())] });
        assert_eq!(judge(0x0100_010a), Ok(()));
        assert!(judge(0x0100_010b).is_err());
        assert!(machine_check_banks(&Fields { fields: &[] }).is_err());
    }
}
