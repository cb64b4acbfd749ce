//! SCSI devices and the controllers that keep lengths of their own. Requests in flight have their own codec.

use crate::inspect::devices::rule::Expect::{AtMost, Check, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on SCSI.
pub const RULES: &[ValueRule] = &[
    // Used bytes of the 252 of sense data.
    ValueRule::index("SCSIDevice", "sense_len", AtMost(252)),
    // Used bytes of the eight of a message.
    ValueRule::index("lsiscsi", "msg_len", SignedWithin(0, 8)),
    // The next word of a command's data.
    ValueRule::index("pvscsi", "curr_cmd_data_cntr", Check(next_word_in_command)),
];

fn next_word_in_command(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let next = required(fields, "curr_cmd_data_cntr")?;
    let words = fields.bytes("curr_cmd_data").map_or(0, |data| data.len() as u64 / 4);
    if next < words {
        return Ok(());
    }
    Err(Breach::by_number(format!("less than {words}"), next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_word_is_one_of_the_command() {
        let judge = |next: u32| {
            let fields = [("curr_cmd_data_cntr", &next.to_be_bytes()[..]), ("curr_cmd_data", &[0; 40])];
            next_word_in_command(&Fields { fields: &fields }).is_ok()
        };
        assert!(judge(9));
        assert!(!judge(10));
        assert!(next_word_in_command(&Fields { fields: &[("curr_cmd_data_cntr", &[0])] }).is_err());
    }
}
