//! The value rules, a file for each family of devices.
//!
//! A rule stands for a fact of the device model, the length of an array or the set of its states, never for what guests
//! usually do: what an honest source can send is not refused. Fields that every use in QEMU checks, and those that only
//! lead into guest memory, have no rule.

use super::rule::ValueRule;

pub mod apic;
pub mod audio;
pub mod clock;
pub mod cpu;
pub mod ide;
pub mod input;
pub mod net;
pub mod pci;
pub mod platform;
pub mod scsi;
pub mod serial;
pub mod tpm;
pub mod usb;
pub mod vga;
pub mod vm;

const FAMILIES: &[&[ValueRule]] = &[
    cpu::RULES,
    apic::RULES,
    clock::RULES,
    input::RULES,
    serial::RULES,
    ide::RULES,
    usb::RULES,
    vga::RULES,
    tpm::RULES,
    scsi::RULES,
    pci::RULES,
    net::RULES,
    audio::RULES,
    platform::RULES,
    vm::RULES,
];

/// Every rule.
pub fn all() -> impl Iterator<Item = &'static ValueRule> {
    FAMILIES.iter().copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_field_has_one_rule() {
        let mut seen = BTreeSet::new();
        for rule in all() {
            assert!(seen.insert((rule.vmsd, rule.field)), "two rules on {}.{}", rule.vmsd, rule.field);
        }
    }
}
