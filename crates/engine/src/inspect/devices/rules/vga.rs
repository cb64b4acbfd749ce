//! Display adapters.

use crate::inspect::devices::rule::Expect::{AtMost, Check, OneOf, Pinned};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, number, required};

/// The rules on the standard adapter and on Cirrus.
pub const RULES: &[ValueRule] = &[
    // Eight sequencer and sixteen graphics registers.
    ValueRule::index("vga", "sr_index", AtMost(7)),
    ValueRule::index("vga", "gr_index", AtMost(15)),
    // Which of a colour's three bytes comes next: added to an index that already reaches the palette's end.
    ValueRule::index("vga", "dac_sub_index", AtMost(2)),
    ValueRule::state("vga", "dac_state", OneOf(&[0, 3])),
    // The window's 64 KiB bank, and the mask that stands for the size of the video memory (CVE-2016-3710).
    ValueRule::shape("vga", "is_vbe_vmstate", Pinned),
    ValueRule::identity("vga", "vbe_bank_mask", Pinned),
    ValueRule::index("vga", "bank_offset", Check(bank_in_memory)),
    // The picture's first byte, its lines and their number, which together stay in the video memory.
    ValueRule::index("vga", "vbe_start_addr", Check(picture_in_memory)),
    ValueRule::index("vga", "vbe_line_offset", Check(picture_in_memory)),
    ValueRule::index("vga", "vbe_regs", Check(picture_in_memory)),
    // As above; Cirrus has no such bank, and its registers fill arrays of 256.
    ValueRule::index("cirrus_vga", "vga.dac_sub_index", AtMost(2)),
    ValueRule::state("cirrus_vga", "vga.dac_state", OneOf(&[0, 3])),
    ValueRule::index("cirrus_vga", "vga.bank_offset", AtMost(0)),
    // Eleven bits of place for the pointer.
    ValueRule::index("cirrus_vga", "vga.hw_cursor_x", AtMost(0x7ff)),
    ValueRule::index("cirrus_vga", "vga.hw_cursor_y", AtMost(0x7ff)),
];

fn video_memory_bytes(fields: &Fields<'_, '_>) -> Result<u64, Breach> {
    Ok((required(fields, "vbe_bank_mask")? + 1) << 16)
}

fn bank_in_memory(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let (offset, memory) = (required(fields, "bank_offset")?, video_memory_bytes(fields)?);
    if offset < memory && offset.trailing_zeros() >= 16 {
        return Ok(());
    }
    Err(Breach::by_number(format!("a 64 KiB bank within {memory}"), offset))
}

/// Places in `vbe_regs`, 16 bits each.
const WIDTH: usize = 1;
const HEIGHT: usize = 2;
const ENABLE: usize = 4;
const MOST_WIDTH: u64 = 16_000;
const MOST_HEIGHT: u64 = 12_000;

/// While the mode is on, the adapter keeps these in step with each other; while it is off, a guest may write anything.
fn picture_in_memory(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let register = |index: usize| {
        let bytes = fields.bytes("vbe_regs").and_then(|regs| regs.get(2 * index..2 * index + 2));
        bytes.and_then(number).ok_or_else(|| Breach::by_number("the registers of the mode", "too few"))
    };
    if register(ENABLE)? & 1 == 0 {
        return Ok(());
    }
    let (width, height) = (register(WIDTH)?, register(HEIGHT)?);
    if width > MOST_WIDTH || height > MOST_HEIGHT {
        let expected = format!("a picture of at most {MOST_WIDTH} by {MOST_HEIGHT}");
        return Err(Breach::by_number(expected, format!("{width} by {height}")));
    }
    let start = 4 * required(fields, "vbe_start_addr")?;
    let end = start + height * required(fields, "vbe_line_offset")?;
    let memory = video_memory_bytes(fields)?;
    if end <= memory {
        return Ok(());
    }
    Err(Breach::by_number(format!("a picture within {memory}"), end))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASK: [u8; 4] = 255u32.to_be_bytes();

    #[test]
    fn a_bank_is_whole_and_in_the_memory() {
        let judge = |offset: i32| {
            let offset = offset.to_be_bytes();
            bank_in_memory(&Fields { fields: &[("bank_offset", &offset), ("vbe_bank_mask", &MASK)] }).is_ok()
        };
        assert!(judge(0));
        assert!(judge(255 << 16));
        assert!(!judge(256 << 16));
        assert!(!judge(-65536));
        assert!(!judge(1));
        assert!(bank_in_memory(&Fields { fields: &[("bank_offset", &[0])] }).is_err());
    }

    fn picture(on: u16, width: u16, height: u16, start: u32, line: u32) -> bool {
        let regs: Vec<u8> =
            [0, width, height, 32, on, 0, 0, 0, 0, 0].iter().flat_map(|r: &u16| r.to_be_bytes()).collect();
        let (start, line) = (start.to_be_bytes(), line.to_be_bytes());
        let fields = [
            ("vbe_regs", &regs[..]),
            ("vbe_start_addr", &start),
            ("vbe_line_offset", &line),
            ("vbe_bank_mask", &MASK),
        ];
        picture_in_memory(&Fields { fields: &fields }).is_ok()
    }

    #[test]
    fn a_picture_that_is_shown_ends_in_the_memory() {
        assert!(picture(1, 1024, 768, 0, 4096));
        assert!(picture(1, 1024, 4096, 0, 4096));
        assert!(!picture(1, 1024, 4096, 1, 4096));
        assert!(!picture(1, 1024, 768, u32::MAX, 4096));
        assert!(!picture(1, 1024, 768, 0, u32::MAX));
        assert!(!picture(1, 16_001, 1, 0, 0));
        assert!(!picture(1, 8, 12_001, 0, 0));
        assert!(picture(0, u16::MAX, u16::MAX, 0, u32::MAX), "a mode that is off may hold anything");
        assert!(picture_in_memory(&Fields { fields: &[("vbe_regs", &[0; 4])] }).is_err());
    }
}
