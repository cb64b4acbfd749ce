//! Interrupt controllers.

use crate::inspect::devices::rule::Expect::{AtMost, SignedWithin};
use crate::inspect::devices::rule::ValueRule;

/// The rules on the local APIC, the I/O APIC, the two i8259 and the option ROM that speeds up their use.
pub const RULES: &[ValueRule] = &[
    // A shift of the timer's 64-bit distance; the divider has eight settings.
    ValueRule::index("apic", "count_shift", SignedWithin(0, 7)),
    // A start-up vector is a byte.
    ValueRule::index("apic_sipi", "sipi_vector", SignedWithin(0, 255)),
    ValueRule::state("apic_sipi", "wait_for_sipi", SignedWithin(0, 1)),
    // Four bits of id; one pending bit for each of the 24 pins.
    ValueRule::index("ioapic", "id", AtMost(15)),
    ValueRule::index("ioapic", "irr", AtMost((1 << 24) - 1)),
    // The line that comes first, of eight; the step of the initialisation, of four.
    ValueRule::index("i8259", "priority_add", AtMost(7)),
    ValueRule::state("i8259", "init_state", AtMost(3)),
    // Inactive, active, standby: decides whether guest code is patched after the load.
    ValueRule::state("kvm-tpr-opt", "state", AtMost(2)),
];
