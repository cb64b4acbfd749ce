//! USB devices and their host controllers.

use crate::inspect::devices::rule::Expect::{
    AtMost, AtMostField, Check, OneOf, Pinned, SignedWithin, Within,
};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on USB.
pub const RULES: &[ValueRule] = &[
    // A control transfer's place in its buffer of 4096 bytes (CVE-2013-4541, CVE-2014-3461).
    ValueRule::index("USBDevice", "setup_len", SignedWithin(0, 4096)),
    ValueRule::index("USBDevice", "setup_index", AtMostField("setup_len")),
    ValueRule::state("USBDevice", "setup_state", SignedWithin(0, 4)),
    // Not attached, attached, default, suspended; seven bits of address.
    ValueRule::state("USBDevice", "state", OneOf(&[0, 1, 3, 6])),
    ValueRule::index("USBDevice", "addr", AtMost(127)),
    // Queues of 16 events, and up to 16 keys held down.
    ValueRule::index("HIDPointerDevice", "head", AtMost(15)),
    ValueRule::index("HIDPointerDevice", "n", AtMost(16)),
    ValueRule::index("HIDKeyboardDevice", "head", AtMost(15)),
    ValueRule::index("HIDKeyboardDevice", "n", AtMost(16)),
    ValueRule::index("HIDKeyboardDevice", "kbd.keys", SignedWithin(0, 16)),
    // Command, data out, data in, status; what is left of the request's own buffer, at most 128 KiB.
    ValueRule::state("usb-storage", "mode", AtMost(3)),
    ValueRule::index("usb-storage", "scsi_off", Check(rest_in_request)),
    ValueRule::index("usb-storage", "scsi_len", Check(rest_in_request)),
    // A ring segment of up to 4096 entries; the flag stands for a queue that no source sends any more.
    ValueRule::index("xhci-intr", "er_size", AtMost(4096)),
    ValueRule::index("xhci-intr", "er_ep_idx", AtMostField("er_size")),
    ValueRule::shape("xhci-intr", "er_full_unused", AtMost(0)),
    // How many ports follow.
    ValueRule::shape("uhci", "num_ports_vmstate", Pinned),
    // Steps of the two schedules; any other ends the process.
    ValueRule::state("ehci-core", "astate", Within(1000, 1013)),
    ValueRule::state("ehci-core", "pstate", Within(1000, 1013)),
];

const REQUEST_BYTES: u64 = 128 * 1024;

fn rest_in_request(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let (offset, length) = (required(fields, "scsi_off")?, required(fields, "scsi_len")?);
    if offset.checked_add(length).is_some_and(|end| end <= REQUEST_BYTES) {
        return Ok(());
    }
    Err(Breach::by_number(
        format!("an offset and a length within {REQUEST_BYTES}"),
        format!("{offset} + {length}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_a_request_ends_in_its_buffer() {
        let judge = |offset: u32, length: u32| {
            let (offset, length) = (offset.to_be_bytes(), length.to_be_bytes());
            rest_in_request(&Fields { fields: &[("scsi_off", &offset), ("scsi_len", &length)] }).is_ok()
        };
        assert!(judge(0, 131_072));
        assert!(judge(131_072, 0));
        assert!(!judge(1, 131_072));
        assert!(!judge(u32::MAX, u32::MAX));
        assert!(rest_in_request(&Fields { fields: &[("scsi_off", &[0])] }).is_err());
    }
}
