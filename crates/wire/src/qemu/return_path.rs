//! The return path: what the destination's QEMU says to the source's, on the same socket.
//!
//! [`Decoder`] frames all seven messages (INV-P1, INV-P5 and the end of a bitmap, INV-P4). What may be said when is
//! for [`PrecopyReturn`], and what a post-copy destination may ask for is for [`PostcopyRequests`].

use super::{Blocks, be16, be32, be64};
use std::collections::BTreeSet;

/// QEMU's bound on a message's data.
pub const MAX_MESSAGE_BYTES: usize = 512;
/// The longest bitmap that is framed: 16 TiB of 4 KiB pages.
pub const MAX_BITMAP_BYTES: u64 = 1 << 29;
/// How many PINGs may wait for their answer; a source sends four in all.
pub const MAX_PINGS: usize = 4;
const HEADER_BYTES: usize = 4;
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The final acknowledgement; 0 is success.
    Shut(u32),
    /// Answer to PING.
    Pong(u32),
    /// Post-copy: pages by block name.
    RequestPagesOfBlock {
        /// Offset in the block.
        start: u64,
        /// How many bytes.
        length_bytes: u32,
        /// The block's name; 1 to 255 bytes.
        block: Vec<u8>,
    },
    /// Post-copy: pages of the last block.
    RequestPages {
        /// Offset in the block.
        start: u64,
        /// How many bytes.
        length_bytes: u32,
    },
    /// Post-copy recovery: the received bitmap. It comes before the bitmap itself, which the decoder passes over.
    ReceivedBitmap {
        /// The block's name; 1 to 255 bytes.
        block: Vec<u8>,
        /// How long the bitmap is; a multiple of 8.
        bitmap_bytes: u64,
    },
    /// Post-copy recovery.
    ResumeAcknowledged(u32),
    /// The destination is ready for the switchover.
    SwitchoverAcknowledged,
}

impl Message {
    /// Whether pre-copy knows it.
    #[must_use]
    pub fn legal_in_precopy(&self) -> bool {
        matches!(self, Self::Shut(_) | Self::Pong(_) | Self::SwitchoverAcknowledged)
    }

    /// Its type on the wire.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Self::Shut(_) => 1,
            Self::Pong(_) => 2,
            Self::RequestPagesOfBlock { .. } => 3,
            Self::RequestPages { .. } => 4,
            Self::ReceivedBitmap { .. } => 5,
            Self::ResumeAcknowledged(_) => 6,
            Self::SwitchoverAcknowledged => 7,
        }
    }

    /// Its bytes on the wire; nothing for the messages of post-copy, which are never made here.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let data: Option<u32> = match self {
            Self::Shut(value) | Self::Pong(value) => Some(*value),
            Self::SwitchoverAcknowledged => None,
            _ => return None,
        };
        let mut bytes = self.kind().to_be_bytes().to_vec();
        bytes.extend_from_slice(if data.is_some() { &[0, 4] } else { &[0, 0] });
        bytes.extend(data.into_iter().flat_map(u32::to_be_bytes));
        Some(bytes)
    }
}

/// Why a return path was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReturnPathError {
    /// The type is none of the seven.
    #[error("INV-P1: return-path message of unknown type {kind}")]
    UnknownType {
        /// Its type.
        kind: u16,
    },
    /// A length that the type can't have, or a name that doesn't fill it.
    #[error("INV-P1: return-path message of type {kind} with length {len}")]
    BadLength {
        /// Its type.
        kind: u16,
        /// Its length.
        len: u16,
    },
    /// A message that pre-copy has no place for.
    #[error(
        "INV-P1: return-path message of type {kind} in pre-copy, which knows only PONG, SHUT and, where allowed, one SWITCHOVER_ACK"
    )]
    NotInPrecopy {
        /// Its type.
        kind: u16,
    },
    /// A PONG that no PING asked for.
    #[error("INV-P2: PONG {value} on the return path answers no PING")]
    UnaskedPong {
        /// Its value.
        value: u32,
    },
    /// A request for pages that aren't there.
    #[error(
        "INV-P3: request for {length_bytes} bytes at {start:#x} is not inside a known block, or not whole pages"
    )]
    BadRequest {
        /// Offset in the block.
        start: u64,
        /// How many bytes.
        length_bytes: u32,
    },
    /// A bitmap that its block can't have.
    #[error("INV-P4: a received bitmap of {bitmap_bytes} bytes does not fit its block")]
    BadBitmap {
        /// Its length.
        bitmap_bytes: u64,
    },
    /// A bitmap without its end mark.
    #[error("INV-P4: a received bitmap ends with {mark:#018x}, not with its end mark")]
    BadBitmapEnd {
        /// What came.
        mark: u64,
    },
    /// A message after SHUT.
    #[error("INV-P5: return-path message of type {kind} after SHUT")]
    AfterShut {
        /// Its type.
        kind: u16,
    },
}

impl ReturnPathError {
    /// The rule that was broken.
    #[must_use]
    pub fn rule(&self) -> &'static str {
        match self {
            Self::UnknownType { .. } | Self::BadLength { .. } | Self::NotInPrecopy { .. } => "INV-P1",
            Self::UnaskedPong { .. } => "INV-P2",
            Self::BadRequest { .. } => "INV-P3",
            Self::BadBitmap { .. } | Self::BadBitmapEnd { .. } => "INV-P4",
            Self::AfterShut { .. } => "INV-P5",
        }
    }
}

/// Where the decoder stands.
#[derive(Debug, Clone, Default)]
enum State {
    #[default]
    Message,
    /// The name of a bitmap is behind, its length comes.
    BitmapLength {
        block: Vec<u8>,
    },
    /// Inside the bitmap.
    Bitmap {
        left: u64,
    },
    BitmapEnd,
}

/// Incremental decoder. Memory: one message, at most [`MAX_MESSAGE_BYTES`] and its header.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    state: State,
    pending: Vec<u8>,
    shut: bool,
    failure: Option<ReturnPathError>,
}

impl Decoder {
    /// Takes the next bytes and gives complete messages to `each`, in order.
    ///
    /// # Errors
    /// A message that breaks the grammar; the caller drops the connection. Every later call gives the same error.
    pub fn feed(&mut self, input: &[u8], mut each: impl FnMut(Message)) -> Result<(), ReturnPathError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.feed_inner(input, &mut each).inspect_err(|error| self.failure = Some(error.clone()))
    }

    /// Whether the return path may end here: between two messages.
    #[must_use]
    pub fn at_message_boundary(&self) -> bool {
        self.pending.is_empty() && matches!(self.state, State::Message)
    }

    fn feed_inner(&mut self, input: &[u8], each: &mut dyn FnMut(Message)) -> Result<(), ReturnPathError> {
        let mut rest = input;
        while let Some((&byte, behind)) = rest.split_first() {
            if let State::Bitmap { left } = self.state {
                rest = self.pass_over(left, rest);
                continue;
            }
            rest = behind;
            self.pending.push(byte);
            if let Some(message) = self.item()? {
                self.shut |= matches!(message, Message::Shut(_));
                each(message);
            }
        }
        Ok(())
    }

    fn pass_over<'a>(&mut self, left: u64, rest: &'a [u8]) -> &'a [u8] {
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
        self.state = match left - count as u64 {
            0 => State::BitmapEnd,
            left => State::Bitmap { left },
        };
        rest.get(count..).unwrap_or_default()
    }

    /// Completes what is pending, if its last byte has come.
    fn item(&mut self) -> Result<Option<Message>, ReturnPathError> {
        match std::mem::take(&mut self.state) {
            State::BitmapLength { block } => self.bitmap_length(block),
            State::BitmapEnd => self.bitmap_end(),
            State::Message | State::Bitmap { .. } => self.message(),
        }
    }

    fn bitmap_length(&mut self, block: Vec<u8>) -> Result<Option<Message>, ReturnPathError> {
        let Some(bitmap_bytes) = be64(&self.pending, 0) else {
            self.state = State::BitmapLength { block };
            return Ok(None);
        };
        if !(1..=MAX_BITMAP_BYTES).contains(&bitmap_bytes) || !bitmap_bytes.is_multiple_of(8) {
            return Err(ReturnPathError::BadBitmap { bitmap_bytes });
        }
        self.pending.clear();
        self.state = State::Bitmap { left: bitmap_bytes };
        Ok(Some(Message::ReceivedBitmap { block, bitmap_bytes }))
    }

    fn bitmap_end(&mut self) -> Result<Option<Message>, ReturnPathError> {
        match be64(&self.pending, 0) {
            None => self.state = State::BitmapEnd,
            Some(BITMAP_END) => self.pending.clear(),
            Some(mark) => return Err(ReturnPathError::BadBitmapEnd { mark }),
        }
        Ok(None)
    }

    fn message(&mut self) -> Result<Option<Message>, ReturnPathError> {
        let (Some(kind), Some(len)) = (be16(&self.pending, 0), be16(&self.pending, 2)) else {
            return Ok(None);
        };
        if self.shut {
            return Err(ReturnPathError::AfterShut { kind });
        }
        check_length(kind, len)?;
        let Some(data) = self.pending.get(HEADER_BYTES..HEADER_BYTES + len as usize) else {
            return Ok(None);
        };
        let bad_length = ReturnPathError::BadLength { kind, len };
        let message = match kind {
            1 => Message::Shut(be32(data, 0).ok_or(bad_length)?),
            2 => Message::Pong(be32(data, 0).ok_or(bad_length)?),
            3 => {
                let (start, length_bytes) = range(data).ok_or(bad_length.clone())?;
                let block = name(data, 12).ok_or(bad_length)?;
                Message::RequestPagesOfBlock { start, length_bytes, block }
            }
            4 => {
                let (start, length_bytes) = range(data).ok_or(bad_length)?;
                Message::RequestPages { start, length_bytes }
            }
            5 => {
                self.state = State::BitmapLength { block: name(data, 0).ok_or(bad_length)? };
                self.pending.clear();
                return Ok(None);
            }
            6 => Message::ResumeAcknowledged(be32(data, 0).ok_or(bad_length)?),
            _ => Message::SwitchoverAcknowledged,
        };
        self.pending.clear();
        Ok(Some(message))
    }
}

fn check_length(kind: u16, len: u16) -> Result<(), ReturnPathError> {
    let legal = match kind {
        1 | 2 | 6 => len == 4,
        3 => (14..=268).contains(&len),
        4 => len == 12,
        5 => (2..=256).contains(&len),
        7 => len == 0,
        _ => return Err(ReturnPathError::UnknownType { kind }),
    };
    if legal { Ok(()) } else { Err(ReturnPathError::BadLength { kind, len }) }
}

fn range(data: &[u8]) -> Option<(u64, u32)> {
    Some((be64(data, 0)?, be32(data, 8)?))
}

/// The name with its length byte at `at`, which must end where the data end.
fn name(data: &[u8], at: usize) -> Option<Vec<u8>> {
    let (len, name) = data.get(at..)?.split_first()?;
    (usize::from(*len) == name.len()).then(|| name.to_vec())
}

/// What a destination may say in pre-copy: the answer to each PING once, SWITCHOVER_ACK at most once and only
/// where the permit allows it, SHUT once and last.
#[derive(Debug, Clone, Default)]
pub struct PrecopyReturn {
    switchover_ack_allowed: bool,
    pings: BTreeSet<u32>,
    shut: bool,
}

impl PrecopyReturn {
    /// The rules of a migration.
    #[must_use]
    pub fn new(switchover_ack_allowed: bool) -> Self {
        Self { switchover_ack_allowed, ..Self::default() }
    }

    /// The source has sent a PING. Of more than [`MAX_PINGS`] without an answer, no further one may be answered.
    pub fn ping(&mut self, value: u32) {
        if self.pings.len() < MAX_PINGS {
            self.pings.insert(value);
        }
    }

    /// Checks the next message.
    ///
    /// # Errors
    /// The rule that it breaks; the caller drops the connection.
    pub fn check(&mut self, message: &Message) -> Result<(), ReturnPathError> {
        let kind = message.kind();
        if self.shut {
            return Err(ReturnPathError::AfterShut { kind });
        }
        match message {
            Message::Pong(value) if self.pings.remove(value) => Ok(()),
            Message::Pong(value) => Err(ReturnPathError::UnaskedPong { value: *value }),
            Message::SwitchoverAcknowledged if std::mem::take(&mut self.switchover_ack_allowed) => Ok(()),
            Message::Shut(_) => {
                self.shut = true;
                Ok(())
            }
            _ => Err(ReturnPathError::NotInPrecopy { kind }),
        }
    }

    /// Whether SHUT has come.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.shut
    }
}

/// What a post-copy destination may ask for: whole host pages inside known blocks (INV-P3), and bitmaps of the
/// length that their block needs (INV-P4).
#[derive(Debug, Clone)]
pub struct PostcopyRequests {
    blocks: Blocks,
    host_page_bytes: u64,
    target_page_bytes: u64,
    last: Option<usize>,
}

impl PostcopyRequests {
    /// The rules of a migration; both page sizes are powers of two.
    #[must_use]
    pub fn new(blocks: Blocks, host_page_bytes: u32, target_page_bytes: u32) -> Self {
        let [host_page_bytes, target_page_bytes] =
            [host_page_bytes, target_page_bytes].map(|bytes| u64::from(bytes.max(1)));
        Self { blocks, host_page_bytes, target_page_bytes, last: None }
    }

    /// Checks a request or a bitmap; other messages have no rule here.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub fn check(&mut self, message: &Message) -> Result<(), ReturnPathError> {
        match message {
            Message::RequestPagesOfBlock { start, length_bytes, block } => {
                self.last = self.blocks.find(block);
                self.check_request(*start, *length_bytes)
            }
            Message::RequestPages { start, length_bytes } => self.check_request(*start, *length_bytes),
            Message::ReceivedBitmap { block, bitmap_bytes } => {
                let length_bytes = self.blocks.find(block).map(|index| self.blocks.length_bytes(index));
                let words = length_bytes.map(|bytes| bytes.div_ceil(self.target_page_bytes).div_ceil(64));
                match words == Some(bitmap_bytes / 8) && bitmap_bytes.is_multiple_of(8) {
                    true => Ok(()),
                    false => Err(ReturnPathError::BadBitmap { bitmap_bytes: *bitmap_bytes }),
                }
            }
            _ => Ok(()),
        }
    }

    fn check_request(&self, start: u64, length_bytes: u32) -> Result<(), ReturnPathError> {
        let block_bytes = self.last.map_or(0, |index| self.blocks.length_bytes(index));
        let whole = |bytes: u64| bytes.is_multiple_of(self.host_page_bytes);
        let inside = start.checked_add(u64::from(length_bytes)).is_some_and(|end| end <= block_bytes);
        if inside && length_bytes > 0 && whole(start) && whole(u64::from(length_bytes)) {
            return Ok(());
        }
        Err(ReturnPathError::BadRequest { start, length_bytes })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> (Vec<Message>, Result<(), ReturnPathError>) {
        let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
        let result = decoder.feed(bytes, |message| seen.push(message));
        (seen, result)
    }

    fn message(kind: u16, data: &[u8]) -> Vec<u8> {
        let len = u16::try_from(data.len()).unwrap();
        [&kind.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
    }

    fn request(start: u64, length_bytes: u32, name: Option<&[u8]>) -> Vec<u8> {
        let mut data = [&start.to_be_bytes()[..], &length_bytes.to_be_bytes()].concat();
        let Some(name) = name else { return message(4, &data) };
        data.push(u8::try_from(name.len()).unwrap());
        message(3, &[&data, name].concat())
    }

    fn bitmap(bitmap_bytes: u64, bits: usize, mark: u64) -> Vec<u8> {
        let name = message(5, b"\x06pc.ram");
        [&name[..], &bitmap_bytes.to_be_bytes(), &vec![0xff; bits], &mark.to_be_bytes()].concat()
    }

    #[test]
    fn the_recorded_return_path_reads_and_round_trips() {
        let bytes = [0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0];
        let expect = vec![Message::Pong(1), Message::Shut(0)];
        assert_eq!(decode(&bytes), (expect.clone(), Ok(())));
        assert_eq!(expect.iter().flat_map(|m| m.encode().unwrap_or_default()).collect::<Vec<_>>(), bytes);
    }

    #[test]
    fn illegal_messages_are_named() {
        assert_eq!(decode(&[0, 9, 0, 0]).1, Err(ReturnPathError::UnknownType { kind: 9 }));
        assert_eq!(decode(&[0, 1, 0, 5]).1, Err(ReturnPathError::BadLength { kind: 1, len: 5 }));
        assert_eq!(decode(&[0, 3, 2, 1]).1, Err(ReturnPathError::BadLength { kind: 3, len: 0x201 }));
        let after = [0, 1, 0, 4, 0, 0, 0, 0, 0, 2, 0, 4];
        assert_eq!(decode(&after).1, Err(ReturnPathError::AfterShut { kind: 2 }));
    }

    #[test]
    fn a_name_fills_its_message() {
        let mut short = request(0, 4096, Some(b"pc.ram"));
        short[16] = 5;
        assert_eq!(decode(&short).1, Err(ReturnPathError::BadLength { kind: 3, len: 19 }));
        let long = message(5, b"\x07pc.ram");
        assert_eq!(decode(&long).1, Err(ReturnPathError::BadLength { kind: 5, len: 7 }));
    }

    #[test]
    fn the_messages_of_post_copy_are_framed() {
        let bytes = [
            request(0x5000, 4096, Some(b"pc.ram")),
            request(0x6000, 8192, None),
            bitmap(3072, 3072, BITMAP_END),
            message(6, &[0, 0, 0, 1]),
            message(7, &[]),
            message(1, &[0; 4]),
        ];
        let block = b"pc.ram".to_vec();
        let expect = vec![
            Message::RequestPagesOfBlock { start: 0x5000, length_bytes: 4096, block: block.clone() },
            Message::RequestPages { start: 0x6000, length_bytes: 8192 },
            Message::ReceivedBitmap { block, bitmap_bytes: 3072 },
            Message::ResumeAcknowledged(1),
            Message::SwitchoverAcknowledged,
            Message::Shut(0),
        ];
        assert_eq!(decode(&bytes.concat()), (expect, Ok(())));
    }

    #[test]
    fn a_bitmap_is_announced_before_it_comes_and_must_end_with_its_mark() {
        let whole = bitmap(16, 16, BITMAP_END);
        let (seen, result) = decode(&whole[..whole.len() - 24]);
        assert_eq!((seen.len(), result), (1, Ok(())));
        assert_eq!(decode(&bitmap(16, 16, 1)).1, Err(ReturnPathError::BadBitmapEnd { mark: 1 }));
        for bitmap_bytes in [0, 12, MAX_BITMAP_BYTES + 8, u64::MAX] {
            let expect = Err(ReturnPathError::BadBitmap { bitmap_bytes });
            assert_eq!(decode(&bitmap(bitmap_bytes, 0, 0)).1, expect, "{bitmap_bytes}");
        }
    }

    #[test]
    fn pre_copy_hears_answers_and_one_end() {
        let check = |ack: bool, pings: &[u32], messages: &[Message]| {
            let mut rules = PrecopyReturn::new(ack);
            pings.iter().for_each(|value| rules.ping(*value));
            messages.iter().try_for_each(|message| rules.check(message))
        };
        let (pong, ack, shut) = (Message::Pong(1), Message::SwitchoverAcknowledged, Message::Shut(0));
        assert_eq!(check(true, &[1], &[ack.clone(), pong.clone(), shut.clone()]), Ok(()));
        assert_eq!(check(false, &[1], &[pong.clone(), Message::Shut(1)]), Ok(()));
        let unasked = |value| Err(ReturnPathError::UnaskedPong { value });
        assert_eq!(check(false, &[], std::slice::from_ref(&pong)), unasked(1));
        assert_eq!(check(false, &[1], &[pong.clone(), pong.clone()]), unasked(1));
        assert_eq!(check(false, &[1], &[Message::Pong(2)]), unasked(2));
        assert_eq!(check(false, &[1, 2, 3, 4, 5], &[Message::Pong(5)]), unasked(5));
        let not = |kind| Err(ReturnPathError::NotInPrecopy { kind });
        assert_eq!(check(false, &[], std::slice::from_ref(&ack)), not(7));
        assert_eq!(check(true, &[], &[ack.clone(), ack.clone()]), not(7));
        assert_eq!(check(true, &[], &[Message::RequestPages { start: 0, length_bytes: 4096 }]), not(4));
        assert_eq!(check(true, &[], &[Message::ResumeAcknowledged(1)]), not(6));
        let after = |kind| Err(ReturnPathError::AfterShut { kind });
        assert_eq!(check(true, &[1], &[shut.clone(), pong.clone()]), after(2));
        assert_eq!(check(true, &[1], &[shut.clone(), shut.clone()]), after(1));
    }

    #[test]
    fn post_copy_requests_stay_inside_blocks() {
        let mut blocks = Blocks::default();
        blocks.push(b"pc.ram", 96 << 20);
        blocks.push(b"pc.rom", 0x2000);
        let named = |start, length_bytes, name: &[u8]| Message::RequestPagesOfBlock {
            start,
            length_bytes,
            block: name.to_vec(),
        };
        let bitmap =
            |name: &[u8], bitmap_bytes| Message::ReceivedBitmap { block: name.to_vec(), bitmap_bytes };
        let bare = |start, length_bytes| Message::RequestPages { start, length_bytes };
        let check = |messages: &[Message]| {
            let mut rules = PostcopyRequests::new(blocks.clone(), 4096, 4096);
            messages.iter().try_for_each(|message| rules.check(message))
        };
        assert_eq!(check(&[named(0x1000, 4096, b"pc.rom"), bare(0, 0x2000)]), Ok(()));
        assert_eq!(check(&[bitmap(b"pc.ram", 3072), bitmap(b"pc.rom", 8)]), Ok(()));
        for (start, length_bytes) in
            [(0x2000, 4096), (0x800, 4096), (0, 2048), (0, 0), (u64::MAX - 4095, 4096)]
        {
            let bad = Err(ReturnPathError::BadRequest { start, length_bytes });
            assert_eq!(check(&[named(start, length_bytes, b"pc.rom")]), bad, "{start:#x} {length_bytes}");
        }
        let bad = Err(ReturnPathError::BadRequest { start: 0, length_bytes: 4096 });
        assert_eq!(check(&[named(0, 4096, b"other")]), bad);
        assert_eq!(check(&[bare(0, 4096)]), bad);
        for (name, bitmap_bytes) in [(&b"pc.ram"[..], 3080), (b"pc.rom", 12), (b"other", 8)] {
            assert_eq!(
                check(&[bitmap(name, bitmap_bytes)]),
                Err(ReturnPathError::BadBitmap { bitmap_bytes })
            );
        }
    }

    proptest! {
        #[test]
        fn any_split_reads_alike_and_garbage_never_panics(
            mut bytes in prop::collection::vec(prop_oneof![0u8..8, any::<u8>()], 0..80),
            honest in any::<bool>(),
            cuts in prop::collection::vec(0usize..120, 0..6),
        ) {
            if honest {
                bytes.splice(0..0, bitmap(8, 8, BITMAP_END));
            }
            let whole = decode(&bytes);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
            let result = cuts.windows(2).try_for_each(|c| decoder.feed(&bytes[c[0]..c[1]], |m| seen.push(m)));
            prop_assert_eq!((seen, result), whole);
        }
    }
}
