//! The layout of the counter page, shared by the guest that writes it and the observer that reads it.
//!
//! The page is found from outside by its magic, which is unique per VM, at the start of a 4 KiB page.
//! All numbers are little-endian.

/// Size and alignment of the page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Length of the magic at the start of the page, in bytes.
pub const MAGIC_BYTES: usize = 32;
/// Offset of the counter, in bytes.
pub const COUNTER_OFFSET_BYTES: usize = 32;
/// Offset of the counter's bitwise inverse, in bytes.
pub const INVERSE_OFFSET_BYTES: usize = 40;
/// Number of bytes an observer reads: magic, counter, inverse.
pub const HEADER_BYTES: usize = 48;

/// First half of the magic; the VM's UUID is the second half.
const PREFIX: &[u8; 16] = b"outrider-counter";

/// The magic of the VM with this UUID.
#[must_use]
pub fn magic(uuid: [u8; 16]) -> [u8; MAGIC_BYTES] {
    let mut magic = [0; MAGIC_BYTES];
    magic[..16].copy_from_slice(PREFIX);
    magic[16..].copy_from_slice(&uuid);
    magic
}

/// Parses a UUID's text (hyphens optional, either case).
#[must_use]
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    parse_hex(&text.trim().replace('-', ""))
}

/// Parses exactly `2 * N` hexadecimal digits.
#[must_use]
pub fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    Some(bytes)
}

/// What one read of the page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// The counter, read whole.
    Counter(u64),
    /// Counter and inverse disagree: the write was caught half done, or the page is being loaded.
    Torn,
    /// This is not the page.
    NotThePage,
}

/// Interprets the first [`HEADER_BYTES`] of a page.
///
/// The guest writes the counter first and its inverse after it, so a vCPU that stopped between the two
/// leaves a counter one ahead of its inverse; that is a valid state, not a torn read.
#[must_use]
pub fn read(header: &[u8; HEADER_BYTES], magic: &[u8; MAGIC_BYTES]) -> Reading {
    if header[..MAGIC_BYTES] != magic[..] {
        return Reading::NotThePage;
    }
    let word = |offset: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[offset..offset + 8]);
        u64::from_le_bytes(bytes)
    };
    let (counter, expected) = (word(COUNTER_OFFSET_BYTES), !word(INVERSE_OFFSET_BYTES));
    if counter == expected || counter == expected.wrapping_add(1) {
        Reading::Counter(counter)
    } else {
        Reading::Torn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(magic: [u8; 32], counter: u64, inverse: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..32].copy_from_slice(&magic);
        bytes[32..40].copy_from_slice(&counter.to_le_bytes());
        bytes[40..].copy_from_slice(&inverse.to_le_bytes());
        bytes
    }

    #[test]
    fn a_page_is_read_whole_half_written_torn_or_not_at_all() {
        let ours = magic([7; 16]);
        let check = |bytes, expect| assert_eq!(read(&bytes, &ours), expect);
        check(header(ours, 5, !5), Reading::Counter(5));
        check(header(ours, 6, !5), Reading::Counter(6));
        check(header(ours, 9, !5), Reading::Torn);
        check(header(magic([8; 16]), 5, !5), Reading::NotThePage);
    }

    #[test]
    fn uuids_parse_with_and_without_hyphens_and_nothing_else_does() {
        let bytes = parse_uuid("00112233-4455-6677-8899-AABBCCDDEEFF\n");
        assert_eq!(bytes.map(|b| (b[0], b[15])), Some((0x00, 0xff)));
        assert_eq!(parse_uuid("00112233445566778899aabbccddeeff"), bytes);
        assert_eq!(parse_uuid("00112233445566778899aabbccddeef"), None);
        assert_eq!(parse_uuid("zz112233445566778899aabbccddeeff"), None);
    }
}
