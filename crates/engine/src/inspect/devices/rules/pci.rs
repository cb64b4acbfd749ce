//! PCI buses and what a function keeps beside its configuration space, which has its own codec.

use crate::inspect::devices::rule::Expect::{AtMostField, Check, Pinned, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on PCI.
pub const RULES: &[ValueRule] = &[
    // How many lines follow, and how many functions pull each: at most all functions of 256 buses.
    ValueRule::shape("PCIBUS", "nirq", Pinned),
    ValueRule::index("PCIBUS", "irq_count", SignedWithin(0, 0x1_0000)),
    // The form of the configuration space that follows.
    ValueRule::identity("PCIDevice", "version_id", Pinned),
    // Its four lines, a word of 0 or 1 each.
    ValueRule::index("PCIDevice", "irq_state", Check(lines_are_high_or_low)),
    // How many error records follow, of how many there is room for (CVE-2013-4529).
    ValueRule::shape("PCIE_AER_ERROR_LOG", "log_max", Pinned),
    ValueRule::shape("PCIE_AER_ERROR_LOG", "log_num", AtMostField("log_max")),
];

fn lines_are_high_or_low(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let Some(lines) = fields.bytes("irq_state").filter(|lines| lines.len() == 16) else {
        let length = fields.bytes("irq_state").map_or(0, <[u8]>::len);
        return Err(Breach::by_number("four words in irq_state", format!("{length} bytes")));
    };
    for line in lines.chunks_exact(4) {
        let level = required(&Fields { fields: &[("level", line)] }, "level")?;
        if level > 1 {
            return Err(Breach::by_number("each interrupt line 0 or 1", level));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_lines_each_high_or_low() {
        let judge = |lines: &[u8]| lines_are_high_or_low(&Fields { fields: &[("irq_state", lines)] }).is_ok();
        let mut lines = [0; 16];
        assert!(judge(&lines));
        lines[7] = 1;
        assert!(judge(&lines));
        lines[8] = 1;
        assert!(!judge(&lines));
        assert!(!judge(&[0; 15]));
        assert!(!judge(&[]));
    }
}
