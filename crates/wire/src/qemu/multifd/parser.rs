//! The incremental parser of a multifd channel.

use super::codec::Codec;
use super::header::{self, At, Header};
use super::{INIT_BYTES, MultifdEvent, MultifdOptions, MultifdSink};
use crate::qemu::{Blocks, Violation};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before or in the initial packet.
    Init,
    /// Before or in a page packet's header.
    Header,
    /// Inside the payload: so many bytes of the wire are left of it.
    Payload { left: usize },
}

/// The packet whose payload is being read.
#[derive(Debug, Default)]
struct Packet {
    at: u64,
    sync: bool,
    block: usize,
    /// Offsets of its pages, those with content first.
    offsets: Vec<u64>,
    /// How many pages have content, and how many of them are begun.
    normal: usize,
    begun: usize,
    /// Bytes that the last begun page still lacks.
    page_left: usize,
}

/// Incremental parser of one multifd channel. The module's text says how much memory it needs.
#[derive(Debug)]
pub struct MultifdParser {
    options: MultifdOptions,
    state: State,
    /// Bytes of a header that is not complete, or that waits for the block list.
    pending: Vec<u8>,
    validated: u64,
    packet: Packet,
    codec: Option<Codec>,
    last_number: Option<u64>,
    syncs: u64,
    failure: Option<Violation>,
}

/// How one step ended.
enum Step {
    /// So many bytes of the input were used; go on.
    Used(usize),
    /// So many bytes were used, and then the caller's turn has come.
    Stop(usize),
}

/// What became of a complete header.
enum Read {
    Done,
    Synced,
    NeedsBlocks,
}

impl MultifdParser {
    /// A parser at the first byte of a channel.
    #[must_use]
    pub fn new(options: MultifdOptions) -> Self {
        Self {
            state: State::Init,
            pending: Vec::with_capacity(header::header_bytes(&options)),
            validated: 0,
            packet: Packet::default(),
            codec: Codec::new(options.method),
            last_number: None,
            syncs: 0,
            failure: None,
            options,
        }
    }

    /// Takes the next bytes of the channel, gives their events to `sink`, in order, and returns how many bytes it
    /// took. It stops early
    /// - behind a SYNC packet, right after its [`MultifdEvent::Sync`], so that the caller can hold the channel
    ///   until the main channel's marker has come;
    /// - before a packet that names a block while `blocks` is `None`. It then takes nothing more until it gets the
    ///   list; a header that it holds complete goes on with the next call, even one without input;
    /// - behind a header or packet when the sink is full: a packet has 512 KiB of content at most, whatever little
    ///   came of it.
    ///
    /// # Errors
    /// The first broken rule, of the grammar or of the sink. Nothing of this call's bytes may be released then, and
    /// every later call gives the same error.
    pub fn feed<S: MultifdSink + ?Sized>(
        &mut self,
        input: &[u8],
        blocks: Option<&Blocks>,
        sink: &mut S,
    ) -> Result<usize, Violation> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        self.feed_inner(input, blocks, sink).inspect_err(|violation| self.failure = Some(violation.clone()))
    }

    /// Everything before this offset was validated and may be released. What was taken and lies behind it is in
    /// [`Self::pending`].
    #[must_use]
    pub fn validated(&self) -> u64 {
        self.validated
    }

    /// The header at the end of what was taken that is not complete, or waits for the block list.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// How many bytes were taken and are not validated; at most one header.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// Whether the channel may end here: behind its initial packet, between two packets.
    #[must_use]
    pub fn at_packet_boundary(&self) -> bool {
        self.failure.is_none() && self.state == State::Header && self.pending.is_empty()
    }

    /// How many SYNC packets are behind.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.syncs
    }

    fn feed_inner<S: MultifdSink + ?Sized>(
        &mut self,
        input: &[u8],
        blocks: Option<&Blocks>,
        sink: &mut S,
    ) -> Result<usize, Violation> {
        let mut taken = 0;
        loop {
            let rest = input.get(taken..).unwrap_or_default();
            let step = match self.state {
                State::Init | State::Header => self.head(rest, blocks, sink)?,
                State::Payload { .. } if rest.is_empty() => Step::Stop(0),
                State::Payload { left } if self.codec.is_some() => self.compressed(left, rest, sink)?,
                State::Payload { left } => self.plain(left, rest, sink)?,
            };
            match step {
                Step::Used(used) => taken += used,
                Step::Stop(used) => return Ok(taken + used),
            }
        }
    }

    /// Completes one header from what is held and the front of `rest`.
    fn head<S: MultifdSink + ?Sized>(
        &mut self,
        rest: &[u8],
        blocks: Option<&Blocks>,
        sink: &mut S,
    ) -> Result<Step, Violation> {
        let len = match self.state {
            State::Init => INIT_BYTES,
            _ => header::header_bytes(&self.options),
        };
        if let (true, Some(bytes)) = (self.pending.is_empty(), rest.get(..len)) {
            let read = self.read(bytes, blocks, sink)?;
            return Ok(Self::stepped(&read, len, 0, sink));
        }
        let used = rest.len().min(len.saturating_sub(self.pending.len()));
        self.pending.extend_from_slice(rest.get(..used).unwrap_or_default());
        if self.pending.len() < len {
            self.check_begun_header()?;
            return Ok(Step::Stop(used));
        }
        let pending = std::mem::take(&mut self.pending);
        let read = self.read(&pending, blocks, sink);
        self.pending = pending;
        let read = read?;
        if !matches!(read, Read::NeedsBlocks) {
            self.pending.clear();
        }
        Ok(Self::stepped(&read, used, used, sink))
    }

    /// A packet that is no page packet may be shorter than a header, and is refused by its first bytes.
    fn check_begun_header(&self) -> Result<(), Violation> {
        if self.state == State::Header && self.pending.len() >= header::PREFIX_BYTES {
            header::check_prefix(&self.pending, At(self.validated))?;
        }
        Ok(())
    }

    fn stepped<S: MultifdSink + ?Sized>(
        read: &Read,
        used: usize,
        used_when_waiting: usize,
        sink: &S,
    ) -> Step {
        match read {
            Read::Done if !sink.is_full() => Step::Used(used),
            Read::Done | Read::Synced => Step::Stop(used),
            Read::NeedsBlocks => Step::Stop(used_when_waiting),
        }
    }

    fn read<S: MultifdSink + ?Sized>(
        &mut self,
        bytes: &[u8],
        blocks: Option<&Blocks>,
        sink: &mut S,
    ) -> Result<Read, Violation> {
        match self.state {
            State::Init => self.init(bytes, sink),
            _ => self.packet(bytes, blocks, sink),
        }
    }

    fn init<S: MultifdSink + ?Sized>(&mut self, bytes: &[u8], sink: &mut S) -> Result<Read, Violation> {
        let at = self.validated;
        let (id, uuid) = header::read_init(bytes, &self.options, At(at))?;
        sink.event(at, MultifdEvent::Init { id, uuid })?;
        self.validated += bytes.len() as u64;
        self.state = State::Header;
        Ok(Read::Done)
    }

    fn packet<S: MultifdSink + ?Sized>(
        &mut self,
        bytes: &[u8],
        blocks: Option<&Blocks>,
        sink: &mut S,
    ) -> Result<Read, Violation> {
        let at = At(self.validated);
        let header = Header::read(bytes, &self.options, at)?;
        let number = header.number(self.last_number, self.options.style, at)?;
        let block = match blocks {
            None if !header.name().is_empty() => return Ok(Read::NeedsBlocks),
            None => None,
            Some(blocks) => header.block(blocks, at)?.map(|block| (block, blocks.length_bytes(block))),
        };
        let (block, block_bytes) = block.unwrap_or_default();
        let page_size_bytes = self.options.page_size_bytes;
        header.offsets(block_bytes, page_size_bytes, &mut self.packet.offsets, at)?;
        for &offset in self.packet.offsets.get(header.normal()..).unwrap_or_default() {
            sink.event(at.0, MultifdEvent::ZeroPage { block, offset })?;
        }
        self.last_number = Some(number);
        self.packet = Packet {
            at: at.0,
            sync: header.is_sync(),
            block,
            offsets: std::mem::take(&mut self.packet.offsets),
            normal: header.normal(),
            begun: 0,
            page_left: 0,
        };
        self.validated += bytes.len() as u64;
        match header.payload_bytes(&self.options) {
            0 => self.packet_end(sink),
            left => {
                self.state = State::Payload { left };
                Ok(Read::Done)
            }
        }
    }

    fn packet_end<S: MultifdSink + ?Sized>(&mut self, sink: &mut S) -> Result<Read, Violation> {
        self.state = State::Header;
        if !self.packet.sync {
            return Ok(Read::Done);
        }
        sink.event(self.packet.at, MultifdEvent::Sync)?;
        self.syncs += 1;
        Ok(Read::Synced)
    }

    /// Passes a piece of a plain page on.
    fn plain<S: MultifdSink + ?Sized>(
        &mut self,
        left: usize,
        rest: &[u8],
        sink: &mut S,
    ) -> Result<Step, Violation> {
        let at = self.validated;
        let page_size_bytes = self.options.page_size_bytes;
        self.packet.begin_page(at, page_size_bytes, sink)?;
        let piece = rest.get(..self.packet.page_left).unwrap_or(rest);
        self.packet.page_bytes(at, piece, sink)?;
        self.validated += piece.len() as u64;
        self.behind(left, piece.len(), sink)
    }

    /// Decodes a piece of a compressed payload.
    fn compressed<S: MultifdSink + ?Sized>(
        &mut self,
        left: usize,
        rest: &[u8],
        sink: &mut S,
    ) -> Result<Step, Violation> {
        let piece = rest.get(..left).unwrap_or(rest);
        self.decode(piece, sink)?;
        let lacking = self.packet.lacking(self.options.page_size_bytes as usize);
        if piece.len() == left && lacking > 0 {
            return Err(self.undecodable(format!("{lacking} bytes too few")));
        }
        self.validated += piece.len() as u64;
        self.behind(left, piece.len(), sink)
    }

    fn decode<S: MultifdSink + ?Sized>(&mut self, piece: &[u8], sink: &mut S) -> Result<(), Violation> {
        let page_size_bytes = self.options.page_size_bytes;
        let (mut input, at) = (piece, At(self.packet.at));
        let Some(codec) = &mut self.codec else { return Ok(()) };
        loop {
            let lacking = self.packet.lacking(page_size_bytes as usize);
            // Room for one byte more than may come, so that it shows.
            let step = codec.step(input, lacking.saturating_add(1)).map_err(|why| undecodable(at, why))?;
            if step.output.len() > lacking {
                return Err(undecodable(at, "more bytes than the pages have"));
            }
            self.packet.spread(step.output, page_size_bytes, sink)?;
            input = input.get(step.taken..).unwrap_or_default();
            if input.is_empty() && !step.full {
                return Ok(());
            }
        }
    }

    fn undecodable(&self, found: impl AsRef<str>) -> Violation {
        undecodable(At(self.packet.at), found)
    }

    /// So many bytes of the payload's `left` are behind.
    fn behind<S: MultifdSink + ?Sized>(
        &mut self,
        left: usize,
        used: usize,
        sink: &mut S,
    ) -> Result<Step, Violation> {
        match left.saturating_sub(used) {
            0 => {
                let read = self.packet_end(sink)?;
                Ok(Self::stepped(&read, used, used, sink))
            }
            left => {
                self.state = State::Payload { left };
                Ok(Step::Used(used))
            }
        }
    }
}

fn undecodable(at: At, found: impl AsRef<str>) -> Violation {
    at.refuse("INV-M7", "a payload that decompresses to its pages, exactly", found)
}

impl Packet {
    /// Announces the next page when the last one is complete.
    fn begin_page<S: MultifdSink + ?Sized>(
        &mut self,
        at: u64,
        page_size_bytes: u32,
        sink: &mut S,
    ) -> Result<(), Violation> {
        if self.page_left > 0 {
            return Ok(());
        }
        let Some(&offset) = self.offsets.get(self.begun) else { return Ok(()) };
        sink.event(at, MultifdEvent::Page { block: self.block, offset })?;
        self.begun += 1;
        self.page_left = page_size_bytes as usize;
        Ok(())
    }

    fn page_bytes<S: MultifdSink + ?Sized>(
        &mut self,
        at: u64,
        piece: &[u8],
        sink: &mut S,
    ) -> Result<(), Violation> {
        sink.event(at, MultifdEvent::PageBytes(piece))?;
        self.page_left = self.page_left.saturating_sub(piece.len());
        Ok(())
    }

    /// Deals decompressed bytes out to the pages that they belong to; at most as many as the packet lacks.
    fn spread<S: MultifdSink + ?Sized>(
        &mut self,
        mut bytes: &[u8],
        page_size_bytes: u32,
        sink: &mut S,
    ) -> Result<(), Violation> {
        while !bytes.is_empty() {
            self.begin_page(self.at, page_size_bytes, sink)?;
            if self.page_left == 0 {
                return Err(undecodable(At(self.at), "more bytes than the pages have"));
            }
            let (piece, rest) = bytes.split_at_checked(self.page_left).unwrap_or((bytes, &[]));
            self.page_bytes(self.at, piece, sink)?;
            bytes = rest;
        }
        Ok(())
    }

    /// How many bytes of content are still to come.
    fn lacking(&self, page_size_bytes: usize) -> usize {
        self.normal.saturating_sub(self.begun) * page_size_bytes + self.page_left
    }
}
