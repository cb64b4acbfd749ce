//! IDE and AHCI.

use crate::inspect::devices::rule::Expect::{AtMost, Check, OneOf, Pinned, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on the drives, their buses and both kinds of controller.
pub const RULES: &[ValueRule] = &[
    // A bus has two places; 255 says that nothing is to be tried again.
    ValueRule::index("ide_bus", "unit", AtMost(1)),
    ValueRule::index("ide_bus/error", "retry_unit", OneOf(&[0, 1, 255])),
    ValueRule::index("ide bmdma", "migration_retry_unit", OneOf(&[0, 1, 255])),
    // Sectors of one transfer, of the 16 that the drive announces; the buffer has room for 256.
    ValueRule::index("ide_drive", "mult_sectors", SignedWithin(0, 16)),
    ValueRule::index("ide_drive/pio_state", "req_nb_sectors", SignedWithin(0, 16)),
    // Where the rest of a transfer lies in the buffer.
    ValueRule::index("ide_drive/pio_state", "cur_io_buffer_offset", Check(rest_in_buffer)),
    ValueRule::index("ide_drive/pio_state", "cur_io_buffer_len", Check(rest_in_buffer)),
    // One of six functions that end a transfer.
    ValueRule::index("ide_drive/pio_state", "end_transfer_fn_idx", AtMost(5)),
    // What is left of a packet command: signed numbers that move a place in the buffer.
    ValueRule::index("ide_drive/pio_state", "elementary_transfer_size", SignedWithin(0, 0xffff)),
    ValueRule::index("ide_drive/pio_state", "packet_transfer_size", SignedWithin(0, i32::MAX as i64)),
    // A flag that says whether 512 bytes follow.
    ValueRule::shape("ide_drive", "identify_set", SignedWithin(0, 1)),
    // How many ports there are, and the bits that say which (CVE-2013-4526).
    ValueRule::shape("ahci", "ports", Pinned),
    ValueRule::identity("ahci", "control_regs.impl", Pinned),
    // An offset in the 4 KiB of registers, a multiple of four.
    ValueRule::index("ahci", "idp_index", AtMost(0xffc)),
    // Command slots: 32; -1 says none.
    ValueRule::index("ahci port", "busy_slot", SignedWithin(-1, 31)),
    ValueRule::index("ncq state", "tag", AtMost(31)),
    ValueRule::index("ncq state", "slot", AtMost(31)),
    // A count of zero in the command means 65536.
    ValueRule::index("ncq state", "sector_count", AtMost(0x1_0000)),
];

/// 256 sectors and four bytes.
const BUFFER_BYTES: u64 = 256 * 512 + 4;

fn rest_in_buffer(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let offset = required(fields, "cur_io_buffer_offset")?;
    let length = required(fields, "cur_io_buffer_len")?;
    if offset.checked_add(length).is_some_and(|end| end <= BUFFER_BYTES) {
        return Ok(());
    }
    Err(Breach::by_number(
        format!("an offset and a length within {BUFFER_BYTES}"),
        format!("{offset} + {length}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_a_transfer_ends_in_the_buffer() {
        let judge = |offset: i32, length: i32| {
            let (offset, length) = (offset.to_be_bytes(), length.to_be_bytes());
            let fields = [("cur_io_buffer_offset", &offset[..]), ("cur_io_buffer_len", &length[..])];
            rest_in_buffer(&Fields { fields: &fields }).is_ok()
        };
        assert!(judge(0, 512));
        assert!(judge(131_076, 0));
        assert!(!judge(131_076, 1));
        assert!(!judge(-512, 1024));
        assert!(!judge(512, -512));
        assert!(rest_in_buffer(&Fields { fields: &[("cur_io_buffer_offset", &[0])] }).is_err());
    }
}
