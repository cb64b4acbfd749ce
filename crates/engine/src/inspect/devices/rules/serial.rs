//! Serial lines, and the byte queue that they share with other devices.

use crate::inspect::devices::rule::Expect::{AtMost, Check, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on `serial` and on `Fifo8`.
pub const RULES: &[ValueRule] = &[
    // Places in the queue's own data, whose length the target knows (the class of CVE-2013-4530).
    ValueRule::index("Fifo8", "head", Check(head_in_data)),
    ValueRule::index("Fifo8", "num", Check(num_in_data)),
    // Four tries for a byte.
    ValueRule::index("serial/tsr", "tsr_retry", AtMost(4)),
    // Flags; -1 says unknown, or no line to poll.
    ValueRule::state("serial/thr_ipending", "thr_ipending", SignedWithin(-1, 1)),
    ValueRule::state("serial/timeout_ipending", "timeout_ipending", SignedWithin(0, 1)),
    ValueRule::state("serial/poll", "poll_msl", SignedWithin(-1, 1)),
];

fn capacity(fields: &Fields<'_, '_>) -> Result<u64, Breach> {
    let data = fields.bytes("data").ok_or_else(|| Breach::by_number("a queue with data", "none"))?;
    Ok(data.len() as u64)
}

fn head_in_data(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let (head, capacity) = (required(fields, "head")?, capacity(fields)?);
    if head < capacity {
        return Ok(());
    }
    Err(Breach::by_number(format!("less than {capacity}"), head))
}

fn num_in_data(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let (num, capacity) = (required(fields, "num")?, capacity(fields)?);
    if num <= capacity {
        return Ok(());
    }
    Err(Breach::by_number(format!("at most {capacity}"), num))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(head: u32, num: u32) -> (bool, bool) {
        let (head, num) = (head.to_be_bytes(), num.to_be_bytes());
        let fields = Fields { fields: &[("data", &[0; 16]), ("head", &head), ("num", &num)] };
        (head_in_data(&fields).is_ok(), num_in_data(&fields).is_ok())
    }

    #[test]
    fn a_full_queue_is_legal_and_a_head_behind_its_end_is_not() {
        assert_eq!(judge(0, 0), (true, true));
        assert_eq!(judge(15, 16), (true, true));
        assert_eq!(judge(16, 17), (false, false));
        assert_eq!(judge(u32::MAX, u32::MAX), (false, false));
        let no_data = Fields { fields: &[("head", &[0]), ("num", &[0])] };
        assert!(head_in_data(&no_data).is_err() && num_in_data(&no_data).is_err());
    }
}
