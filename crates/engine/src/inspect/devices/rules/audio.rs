//! Sound cards, which a desktop VM may have.

use crate::inspect::devices::rule::Expect::{AtMost, Check, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on Sound Blaster 16 and HDA.
pub const RULES: &[ValueRule] = &[
    // Places in the ten bytes that come in, the fifty that go out, and the 256 registers of the mixer.
    ValueRule::index("sb16", "in_index", SignedWithin(0, 10)),
    ValueRule::index("sb16", "needed_bytes", SignedWithin(0, 10)),
    ValueRule::index("sb16", "out_data_len", SignedWithin(0, 50)),
    ValueRule::index("sb16", "mixer_nreg", SignedWithin(0, 255)),
    // One of sixteen streams each way; a place in the stream's own buffer.
    ValueRule::index("hda-audio-stream", "stream", AtMost(15)),
    ValueRule::index("hda-audio-stream", "compat_bpos", Check(place_in_buffer)),
];

fn place_in_buffer(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let place = required(fields, "compat_bpos")?;
    let length = fields.bytes("compat_buf").map_or(0, <[u8]>::len) as u64;
    if length > 0 && place <= length {
        return Ok(());
    }
    Err(Breach::by_number(format!("at most {length}"), place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_may_be_the_end_of_the_buffer() {
        let judge = |place: u32| {
            let fields = [("compat_bpos", &place.to_be_bytes()[..]), ("compat_buf", &[0; 256])];
            place_in_buffer(&Fields { fields: &fields }).is_ok()
        };
        assert!(judge(256));
        assert!(!judge(257));
        assert!(place_in_buffer(&Fields { fields: &[("compat_bpos", &[0])] }).is_err());
    }
}
