//! Searching a capture: in each frame, and across frames in every TCP stream put together again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use memchr::memmem::Finder;
use serde::Serialize;
use uuid::Uuid;

/// Largest frame that is read; a capture of ours holds none.
const MAX_FRAME_BYTES: usize = 1 << 20;
/// TCP streams followed at once.
const MAX_STREAMS: usize = 4096;
/// Bytes of a stream kept while an earlier piece is missing.
const MAX_PENDING_BYTES: usize = 16 << 20;
const FILE_HEADER_BYTES: usize = 24;
const RECORD_HEADER_BYTES: usize = 16;

/// Something to look for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needle {
    /// What it is called in the report.
    pub name: String,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Needle {
    /// A needle. Short ones are found in random bytes by chance: below 7 bytes a hit proves nothing.
    #[must_use]
    pub fn new(name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self { name: name.to_owned(), bytes: bytes.into() }
    }

    /// The beginning of QEMU's migration stream: magic and version 3.
    #[must_use]
    pub fn qemu_magic() -> Self {
        Self::new("qemu_magic", *b"QEVM\0\0\0\x03")
    }

    /// A VM's identity: its name, and its UUID as text and as bytes.
    #[must_use]
    pub fn vm_identity(name: &str, uuid: Uuid) -> [Self; 4] {
        [
            Self::new("vm_name", name),
            Self::new("vm_uuid_text", uuid.to_string()),
            Self::new("vm_uuid_upper_text", uuid.to_string().to_uppercase()),
            Self::new("vm_uuid_bytes", uuid.into_bytes()),
        ]
    }
}

/// What a search found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SearchReport {
    /// Names of the needles that are in the capture.
    pub found: BTreeSet<String>,
    /// Frames searched.
    pub frames: u64,
    /// Bytes searched.
    pub bytes: u64,
    /// TCP payload searched, in bytes.
    pub tcp_payload_bytes: u64,
    /// TCP payload that the capture missed, in bytes.
    pub tcp_missing_bytes: u64,
}

impl SearchReport {
    /// Whether this needle is in the capture.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.found.contains(name)
    }

    /// Whether a needle of [`Needle::vm_identity`] is.
    #[must_use]
    pub fn has_vm_identity(&self) -> bool {
        self.found.iter().any(|name| name.starts_with("vm_"))
    }
}

/// Searches the pcap file for the needles.
pub fn search(path: &Path, needles: &[Needle]) -> Result<SearchReport> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut header = [0; FILE_HEADER_BYTES];
    reader.read_exact(&mut header).context("reading the capture's header")?;
    let mut search = Search::new(needles);
    let mut frame = Vec::new();
    while next_frame(&mut reader, &mut frame)? {
        search.frame(&frame);
    }
    Ok(search.finish())
}

fn next_frame(reader: &mut impl Read, frame: &mut Vec<u8>) -> Result<bool> {
    let mut header = [0; RECORD_HEADER_BYTES];
    match reader.read_exact(&mut header) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
        other => other.context("reading the capture")?,
    }
    let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    ensure!(length <= MAX_FRAME_BYTES, "a frame of {length} bytes: this is not our capture");
    frame.resize(length, 0);
    reader.read_exact(frame).context("reading the capture")?;
    Ok(true)
}

struct Search<'a> {
    needles: Vec<(&'a Needle, Finder<'a>)>,
    streams: BTreeMap<StreamKey, Stream>,
    report: SearchReport,
    /// Bytes at a border between two pieces that can hold the beginning of a needle.
    border_bytes: usize,
}

/// Addresses and ports of one direction.
type StreamKey = Vec<u8>;

#[derive(Default)]
struct Stream {
    next: Option<u32>,
    tail: Vec<u8>,
    /// Pieces ahead of the next one, by distance from it when they came; small and few.
    pending: Vec<(u32, Vec<u8>)>,
    pending_bytes: usize,
}

impl<'a> Search<'a> {
    fn new(needles: &'a [Needle]) -> Self {
        let longest = needles.iter().map(|needle| needle.bytes.len()).max().unwrap_or(0);
        Self {
            needles: needles.iter().map(|needle| (needle, Finder::new(&needle.bytes))).collect(),
            streams: BTreeMap::new(),
            report: SearchReport::default(),
            border_bytes: longest.saturating_sub(1),
        }
    }

    fn frame(&mut self, frame: &[u8]) {
        self.report.frames += 1;
        self.report.bytes += frame.len() as u64;
        self.look(frame);
        let Some(segment) = Segment::parse(frame) else {
            return;
        };
        if self.streams.len() >= MAX_STREAMS && !self.streams.contains_key(&segment.key) {
            return; // its frames are searched one by one all the same
        }
        let mut stream = self.streams.remove(&segment.key).unwrap_or_default();
        self.follow(&mut stream, segment.sequence, segment.payload, segment.opens);
        self.streams.insert(segment.key, stream);
    }

    fn finish(mut self) -> SearchReport {
        for mut stream in std::mem::take(&mut self.streams).into_values() {
            while self.skip_hole(&mut stream) {}
        }
        self.report
    }

    fn look(&mut self, bytes: &[u8]) {
        self.needles.retain(|(needle, finder)| {
            let found = finder.find(bytes).is_some();
            if found {
                self.report.found.insert(needle.name.clone());
            }
            !found // once is enough
        });
    }

    fn follow(&mut self, stream: &mut Stream, sequence: u32, payload: &[u8], opens: bool) {
        if opens {
            *stream = Stream { next: Some(sequence.wrapping_add(1)), ..Stream::default() };
            return;
        }
        if payload.is_empty() {
            return;
        }
        let next = *stream.next.get_or_insert(sequence);
        if is_ahead(sequence, next) {
            stream.pending_bytes += payload.len();
            stream.pending.push((sequence, payload.to_vec()));
            while stream.pending_bytes > MAX_PENDING_BYTES && self.skip_hole(stream) {}
            return;
        }
        self.append(stream, sequence, payload);
        self.append_pending(stream);
    }

    /// Adds a piece that begins at or before the next byte; what was seen before is cut off.
    fn append(&mut self, stream: &mut Stream, sequence: u32, payload: &[u8]) {
        let next = stream.next.unwrap_or(sequence);
        let seen = usize::try_from(next.wrapping_sub(sequence)).unwrap_or(usize::MAX);
        let Some(fresh) = payload.get(seen..).filter(|fresh| !fresh.is_empty()) else {
            return;
        };
        self.report.tcp_payload_bytes += fresh.len() as u64;
        // The inside of a piece was searched with its frame; only the border is left.
        let mut border = std::mem::take(&mut stream.tail);
        border.extend_from_slice(&fresh[..fresh.len().min(self.border_bytes)]);
        self.look(&border);
        if fresh.len() >= self.border_bytes {
            border.clear();
            border.extend_from_slice(&fresh[fresh.len() - self.border_bytes..]);
        } else {
            border.drain(..border.len().saturating_sub(self.border_bytes));
        }
        stream.tail = border;
        let length = u32::try_from(fresh.len()).unwrap_or(0);
        stream.next = Some(next.wrapping_add(length));
    }

    fn append_pending(&mut self, stream: &mut Stream) {
        while let Some(next) = stream.next {
            let fits = stream.pending.iter().position(|(sequence, _)| !is_ahead(*sequence, next));
            let Some(index) = fits else { break };
            let (sequence, payload) = stream.pending.swap_remove(index);
            stream.pending_bytes -= payload.len();
            self.append(stream, sequence, &payload);
        }
    }

    /// Gives up on a missing piece and goes on behind it; false when nothing is waiting.
    fn skip_hole(&mut self, stream: &mut Stream) -> bool {
        let next = stream.next.unwrap_or(0);
        let distance = |(sequence, _): &&(u32, Vec<u8>)| sequence.wrapping_sub(next);
        let Some(first) = stream.pending.iter().min_by_key(distance).map(|(sequence, _)| *sequence) else {
            return false;
        };
        self.report.tcp_missing_bytes += u64::from(first.wrapping_sub(next));
        stream.next = Some(first);
        stream.tail.clear();
        self.append_pending(stream);
        true
    }
}

fn is_ahead(sequence: u32, next: u32) -> bool {
    sequence != next && sequence.wrapping_sub(next) < 1 << 31
}

/// A TCP segment inside a frame.
struct Segment<'a> {
    key: StreamKey,
    sequence: u32,
    payload: &'a [u8],
    opens: bool,
}

impl<'a> Segment<'a> {
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let kind = frame.get(12..14)?;
        let packet = frame.get(14..)?;
        match kind {
            [0x08, 0x00] => Self::parse_v4(packet),
            [0x86, 0xdd] => Self::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &'a [u8]) -> Option<Self> {
        let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
        if *packet.get(9)? != 6 {
            return None;
        }
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        // Offload leaves 0 in frames beyond 64 KiB; shorter frames are padded at the end.
        let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
        Self::parse_tcp(packet.get(12..20)?, packet.get(header_bytes..end)?)
    }

    fn parse_v6(packet: &'a [u8]) -> Option<Self> {
        if *packet.get(6)? != 6 {
            return None;
        }
        Self::parse_tcp(packet.get(8..40)?, packet.get(40..)?)
    }

    fn parse_tcp(addresses: &[u8], segment: &'a [u8]) -> Option<Self> {
        let header_bytes = usize::from(segment.get(12)? >> 4) * 4;
        let sequence = segment.get(4..8)?;
        Some(Self {
            key: [addresses, segment.get(..4)?].concat(),
            sequence: u32::from_be_bytes(sequence.try_into().ok()?),
            payload: segment.get(header_bytes..)?,
            opens: segment.get(13)? & 0x02 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frame(sequence: u32, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(40 + payload.len()).unwrap();
        let mut frame = vec![0; 12];
        frame.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
        frame.extend_from_slice(&total.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0, 10, 82, 0, 11, 10, 82, 0, 12]);
        frame.extend_from_slice(&[0x1d, 0x3a, 0x1d, 0x3a]);
        frame.extend_from_slice(&sequence.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        frame.extend_from_slice(payload);
        frame
    }

    fn check(pieces: &[(u32, &[u8])], expect_found: bool, expect_missing: u64) {
        let needles = [Needle::new("secret", *b"the-secret-text")];
        let mut search = Search::new(&needles);
        for (sequence, payload) in pieces {
            search.frame(&frame(*sequence, payload));
        }
        let report = search.finish();
        assert_eq!(report.has("secret"), expect_found, "{pieces:?}");
        assert_eq!(report.tcp_missing_bytes, expect_missing, "{pieces:?}");
    }

    #[test]
    fn a_needle_is_found_in_one_frame_and_across_frames_in_any_order() {
        check(&[(10, b"xx the-secret-text yy")], true, 0);
        check(&[(10, b"xx the-sec"), (20, b"ret-text yy")], true, 0);
        check(&[(10, b"the-"), (14, b"sec"), (17, b"ret-te"), (23, b"xt")], true, 0);
        check(&[(5, b"start"), (20, b"ret-text yy"), (10, b"xx the-sec")], true, 0);
        check(&[(10, b"xx the-sec"), (10, b"xx the-sec"), (15, b"e-secret-text")], true, 0);
        check(&[(u32::MAX - 3, b"the-"), (0, b"secret-text")], true, 0);
    }

    #[test]
    fn what_is_not_there_is_not_found_and_holes_are_counted() {
        check(&[(10, b"the-secret-tex")], false, 0);
        check(&[(10, b"the-secret"), (25, b"-text")], false, 5);
        check(&[(10, b"the-sec"), (18, b"ret-text")], false, 1);
    }

    #[test]
    fn an_odd_frame_is_searched_but_not_followed() {
        let needles = [Needle::qemu_magic()];
        let mut search = Search::new(&needles);
        for odd in [&b""[..], b"short", b"............\x08\x00\x4f", b"junk QEVM\0\0\0\x03"] {
            search.frame(odd);
        }
        assert!(search.finish().has("qemu_magic"));
    }
}
