//! RAM records: the block list, pages, end marks.

use super::*;

const RAM_ZERO: u64 = 0x002;
const RAM_MEM_SIZE: u64 = 0x004;
const RAM_PAGE: u64 = 0x008;
const RAM_EOS: u64 = 0x010;
const RAM_CONTINUE: u64 = 0x020;
const RAM_XBZRLE: u64 = 0x040;
const RAM_HOOK: u64 = 0x080;
const RAM_COMPRESS: u64 = 0x100;
const RAM_FLUSH: u64 = 0x200;

const ZERO_HERE: u64 = RAM_ZERO | RAM_CONTINUE;
const PAGE_HERE: u64 = RAM_PAGE | RAM_CONTINUE;

/// A record without a name, up to its content.
const WORD_BYTES: usize = 8;
/// A zero page without a name: the word and the fill byte.
const ZERO_RECORD_BYTES: usize = WORD_BYTES + 1;

/// Flags as an operator can look them up: what a permit would have to allow has a name.
fn flags_name(flags: u64) -> String {
    let name = match flags & !RAM_CONTINUE {
        RAM_XBZRLE => "XBZRLE",
        RAM_HOOK => "HOOK, which RDMA uses",
        RAM_COMPRESS => "COMPRESS_PAGE",
        RAM_FLUSH => "MULTIFD_FLUSH",
        _ => return format!("flags {flags:#x}"),
    };
    format!("flags {flags:#x}: {name}")
}

impl Parser {
    /// The fast way through what a stream mostly is: records of the block named last, whole and in a row. Takes those at
    /// the front and gives their length; anything else, and anything doubtful, is left to [`Self::record`].
    pub(super) fn page_run<S: Sink + ?Sized>(
        &mut self,
        input: &[u8],
        sink: &mut S,
    ) -> Result<usize, Violation> {
        let Some(block) = self.current else { return Ok(0) };
        let page = u64::from(self.options.page_size_bytes);
        let page_bytes = self.options.page_size_bytes as usize;
        let mask = page - 1;
        let Some(last_offset) = self.blocks.length_bytes(block).checked_sub(page) else { return Ok(0) };
        let mut rest = input;
        while let Some((word, behind)) = rest.split_first_chunk::<WORD_BYTES>() {
            let word = u64::from_be_bytes(*word);
            let offset = word & !mask;
            if offset > last_offset {
                break;
            }
            let taken = match word & mask {
                ZERO_HERE if behind.first() == Some(&0) => {
                    sink.event(self.validated, Event::ZeroPage { block, offset })?;
                    ZERO_RECORD_BYTES
                }
                PAGE_HERE => {
                    let Some(content) = behind.get(..page_bytes) else { break };
                    sink.event(self.validated, Event::Page { block, offset })?;
                    sink.event(self.validated + WORD_BYTES as u64, Event::PageBytes(content))?;
                    WORD_BYTES + page_bytes
                }
                _ => break,
            };
            self.validated += taken as u64;
            rest = rest.get(taken..).unwrap_or_default();
        }
        Ok(input.len() - rest.len())
    }

    pub(super) fn record<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(word) = be64(bytes, 0) else { return Ok(None) };
        let mask = u64::from(self.options.page_size_bytes) - 1;
        let (high, flags) = (word & !mask, word & mask);
        if part == Part::Start && !self.block_list_done && flags != RAM_MEM_SIZE {
            return Err(self.violation(
                "INV-R2",
                "the block list as the first record",
                format!("flags {flags:#x}"),
            ));
        }
        match flags & !RAM_CONTINUE {
            RAM_MEM_SIZE if flags == RAM_MEM_SIZE => self.block_list_begin(part, high),
            RAM_EOS if flags == RAM_EOS => self.ram_end(part, high, sink),
            RAM_FLUSH if flags == RAM_FLUSH && self.flush_words() => self.flush(high, sink),
            RAM_ZERO | RAM_PAGE => self.page(part, high, flags, bytes, sink),
            // Only EOS with CONTINUE, or with an address, passes QEMU's own check and would be read differently.
            _ if flags == RAM_EOS | RAM_CONTINUE => Err(self.violation(
                "INV-R12",
                "an end mark without address or flags",
                format!("flags {flags:#x}"),
            )),
            _ => Err(self.violation("INV-R6", "flags that the permit allows", flags_name(flags))),
        }
    }

    fn block_list_begin(&mut self, part: Part, total: u64) -> Result<Option<usize>, Violation> {
        if part != Part::Start || self.block_list_done {
            return Err(self.violation(
                "INV-R2",
                "the block list exactly once, in START",
                "another block list",
            ));
        }
        if total == 0 {
            return Err(self.violation("INV-R3", "a total above zero", "zero"));
        }
        self.state = State::Blocks { total, seen: 0 };
        Ok(Some(8))
    }

    fn ram_end<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        high: u64,
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        if high != 0 {
            return Err(self.violation(
                "INV-R12",
                "an end mark without address",
                format!("address {high:#x}"),
            ));
        }
        if self.options.multifd_markers == Some(SyncMarkers::EveryPayload) {
            sink.event(self.validated, Event::SyncMarker)?;
        }
        sink.event(self.validated, Event::RamEnd { part })?;
        self.state = State::Footer(part);
        Ok(Some(8))
    }

    fn flush_words(&self) -> bool {
        self.options.multifd_markers == Some(SyncMarkers::FlushWords)
    }

    fn flush<S: Sink + ?Sized>(&mut self, high: u64, sink: &mut S) -> Result<Option<usize>, Violation> {
        if high != 0 {
            let found = format!("address {high:#x}");
            return Err(self.violation("INV-R12", "a MULTIFD_FLUSH word without address", found));
        }
        sink.event(self.validated, Event::SyncMarker)?;
        Ok(Some(8))
    }

    pub(super) fn block<S: Sink + ?Sized>(
        &mut self,
        total: u64,
        seen: u64,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        let Some(&name_len) = bytes.first() else { return Ok(None) };
        let end = 1 + name_len as usize;
        let (Some(name), Some(length)) = (bytes.get(1..end), be64(bytes, end)) else { return Ok(None) };
        let mask = u64::from(self.options.page_size_bytes) - 1;
        if name.is_empty() || length == 0 || length & mask != 0 {
            let expected = "a named block of whole pages";
            return Err(self.violation("INV-R4", expected, format!("{:?}, {length} bytes", printable(name))));
        }
        if self.blocks.find(name).is_some() {
            return Err(self.violation("INV-R4", "each block once", format!("{:?} again", printable(name))));
        }
        if self.blocks.len() == MAX_RAM_BLOCKS {
            return Err(self.violation("INV-R4", format!("at most {MAX_RAM_BLOCKS} blocks"), "more"));
        }
        let sum = seen.checked_add(length).filter(|sum| *sum <= total);
        let Some(sum) = sum else {
            let found = format!("{:?} of {length} bytes after {seen}", printable(name));
            return Err(self.violation("INV-R3", format!("lengths that add up to {total}"), found));
        };
        sink.event(self.validated, Event::Block { index: self.blocks.len(), name, length_bytes: length })?;
        self.blocks.push(name, length);
        self.state = State::Blocks { total, seen: sum };
        if sum == total {
            sink.event(self.validated, Event::BlocksEnd { total_bytes: total })?;
            self.block_list_done = true;
            self.state = State::Record(Part::Start);
        }
        Ok(Some(end + 8))
    }

    fn page<S: Sink + ?Sized>(
        &mut self,
        part: Part,
        offset: u64,
        flags: u64,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<Option<usize>, Violation> {
        if part == Part::Start {
            return Err(self.violation("INV-R6", "no page in START", format!("flags {flags:#x}")));
        }
        let Some((block, len)) = self.named_block(flags, bytes)? else { return Ok(None) };
        let length = self.blocks.length_bytes(block);
        let page = u64::from(self.options.page_size_bytes);
        if offset.checked_add(page).is_none_or(|end| end > length) {
            return Err(self.violation(
                "INV-R7",
                format!("an offset inside {length} bytes"),
                format!("{offset:#x}"),
            ));
        }
        if flags & RAM_PAGE != 0 {
            sink.event(self.validated, Event::Page { block, offset })?;
            self.current = Some(block);
            self.state = State::PageBytes { part, left: self.options.page_size_bytes as usize };
            return Ok(Some(len));
        }
        let Some(&fill) = bytes.get(len) else { return Ok(None) };
        if fill != 0 {
            return Err(self.violation("INV-R10", "a zero page filled with zero", "another fill byte"));
        }
        sink.event(self.validated, Event::ZeroPage { block, offset })?;
        self.current = Some(block);
        Ok(Some(len + 1))
    }

    /// Which block a page record means, and how long its header is.
    fn named_block(&self, flags: u64, bytes: &[u8]) -> Result<Option<(usize, usize)>, Violation> {
        if flags & RAM_CONTINUE != 0 {
            return match self.current {
                Some(block) => Ok(Some((block, 8))),
                None => Err(self.violation("INV-R8", "a named block before CONTINUE", "CONTINUE")),
            };
        }
        let Some(&name_len) = bytes.get(8) else { return Ok(None) };
        let end = 9 + name_len as usize;
        let Some(name) = bytes.get(9..end) else { return Ok(None) };
        match self.blocks.find(name) {
            Some(block) => Ok(Some((block, end))),
            None => Err(self.violation("INV-R9", "a block of the list", printable(name))),
        }
    }
}
