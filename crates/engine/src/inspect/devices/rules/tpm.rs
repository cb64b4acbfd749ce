//! TPM interfaces. The TPM's own state is the emulator's and has its own codec.

use crate::inspect::devices::rule::Expect::{AtMost, Check, OneOf};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, number};

/// The rules on both register interfaces.
pub const RULES: &[ValueRule] = &[
    // Register values that the guest cannot write: its locality and the size of the buffer.
    ValueRule::state("tpm-crb", "regs", Check(command_buffer_registers)),
    // Five localities; 255 says none.
    ValueRule::index("tpm-tis", "state.active_locty", OneOf(LOCALITIES)),
    ValueRule::index("tpm-tis", "state.aborting_locty", OneOf(LOCALITIES)),
    ValueRule::index("tpm-tis", "state.next_locty", OneOf(LOCALITIES)),
    // A place in the 4096 bytes of the buffer.
    ValueRule::index("tpm-tis", "state.rw_offset", AtMost(4096)),
];

const LOCALITIES: &[u64] = &[0, 1, 2, 3, 4, 255];

/// Offsets of the registers.
const LOCALITY_STATE: usize = 0x00;
const COMMAND_SIZE: usize = 0x58;
const RESPONSE_SIZE: usize = 0x64;
/// One page less the registers.
const BUFFER_BYTES: u64 = 4096 - 0x80;

/// Commands of a guest run at locality 0: a higher one could reset registers that an attestation rests on.
fn command_buffer_registers(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let register = |at: usize| {
        let bytes = fields.bytes("regs").and_then(|regs| regs.get(at..at + 4));
        bytes.and_then(number).ok_or_else(|| Breach::by_number("the registers of the interface", "too few"))
    };
    let locality = (register(LOCALITY_STATE)? >> 2) & 7;
    if locality != 0 {
        return Err(Breach::by_number("locality 0", locality));
    }
    for at in [COMMAND_SIZE, RESPONSE_SIZE] {
        let size = register(at)?;
        if size > BUFFER_BYTES {
            return Err(Breach::by_number(format!("a buffer of at most {BUFFER_BYTES}"), size));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(change: impl FnOnce(&mut [u8])) -> bool {
        let mut regs = [0; 0x80];
        for at in [COMMAND_SIZE, RESPONSE_SIZE] {
            regs[at..at + 4].copy_from_slice(&3968u32.to_be_bytes());
        }
        change(&mut regs);
        command_buffer_registers(&Fields { fields: &[("regs", &regs)] }).is_ok()
    }

    #[test]
    fn the_guest_has_locality_0_and_one_buffer() {
        assert!(judge(|_| ()));
        assert!(judge(|regs| regs[3] = 0b11), "assigned, established");
        assert!(!judge(|regs| regs[3] = 0b1_0000), "locality 4");
        assert!(!judge(|regs| regs[COMMAND_SIZE + 2] = 0xff));
        assert!(!judge(|regs| regs[RESPONSE_SIZE] = 0x80));
        assert!(command_buffer_registers(&Fields { fields: &[("regs", &[0; 0x40])] }).is_err());
    }
}
