//! Frames inside the TLS channel between two VM agents: type `u8`, big-endian length `u32`, payload.
//!
//! The version is in the channel's ALPN value. DATA and RETURN are handed out piece by piece, so that a reader keeps
//! at most one control frame ([`MAX_CONTROL_BYTES`]).

use types::ErrorCode;
use types::handover::{Digest, StreamEvidence};

/// The largest payload of DATA or RETURN.
pub const MAX_PAYLOAD_BYTES: usize = 256 * 1024;
/// The largest payload of any other frame.
pub const MAX_CONTROL_BYTES: usize = 280;
/// Type and length.
pub const HEADER_BYTES: usize = 5;
/// The longest text of an ABORT.
pub const MAX_ABORT_TEXT_BYTES: usize = 200;

const DATA: u8 = 1;
const RETURN: u8 = 2;
const END: u8 = 3;
const ACCEPTED: u8 = 4;
const RUNNING: u8 = 5;
const PING: u8 = 6;
const PONG: u8 = 7;
const SUSPENDED: u8 = 8;
const RESUMED: u8 = 9;
const ABORT: u8 = 10;

/// A frame without a payload of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Source: the whole stream is out.
    End(StreamEvidence),
    /// Target: inspected, released, digests equal.
    Accepted(StreamEvidence),
    /// Target: the guest runs.
    Running,
    /// Answered by [`Control::Pong`] with the same number.
    Ping(u64),
    /// See [`Control::Ping`].
    Pong(u64),
    /// The sender relays nothing for now.
    Suspended,
    /// The sender relays again.
    Resumed,
    /// The sender gives up.
    Abort {
        /// Why, for scripts.
        code: ErrorCode,
        /// Why, for people; at most [`MAX_ABORT_TEXT_BYTES`].
        text: String,
    },
}

/// What a reader found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A piece of QEMU's stream.
    Data(&'a [u8]),
    /// A piece of QEMU's return path.
    Return(&'a [u8]),
    /// Anything else.
    Control(Control),
}

/// Why a peer's frames were refused. The channel is then dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No such type in this version.
    #[error("frame of unknown type {kind}")]
    UnknownType {
        /// Its type.
        kind: u8,
    },
    /// A length that the type can't have.
    #[error("frame of type {kind} with a length of {len} bytes")]
    BadLength {
        /// Its type.
        kind: u8,
        /// Its length.
        len: u32,
    },
    /// A payload that does not parse.
    #[error("frame of type {kind} with a malformed payload")]
    BadPayload {
        /// Its type.
        kind: u8,
    },
}

/// The header of a DATA frame with `len` bytes of payload behind it.
///
/// # Panics
/// When `len` is above [`MAX_PAYLOAD_BYTES`]: the caller reads with buffers of that size.
#[must_use]
pub fn data_header(len: usize) -> [u8; HEADER_BYTES] {
    header(DATA, len)
}

/// The header of a RETURN frame with `len` bytes of payload behind it.
///
/// # Panics
/// As [`data_header`].
#[must_use]
pub fn return_header(len: usize) -> [u8; HEADER_BYTES] {
    header(RETURN, len)
}

fn header(kind: u8, len: usize) -> [u8; HEADER_BYTES] {
    assert!(len <= MAX_PAYLOAD_BYTES, "a frame of {len} bytes");
    let len = u32::try_from(len).expect("bounded above").to_be_bytes();
    [kind, len[0], len[1], len[2], len[3]]
}

impl Control {
    /// Appends the frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, payload) = match self {
            Self::End(evidence) => (END, evidence_bytes(evidence)),
            Self::Accepted(evidence) => (ACCEPTED, evidence_bytes(evidence)),
            Self::Running => (RUNNING, Vec::new()),
            Self::Ping(number) => (PING, number.to_be_bytes().to_vec()),
            Self::Pong(number) => (PONG, number.to_be_bytes().to_vec()),
            Self::Suspended => (SUSPENDED, Vec::new()),
            Self::Resumed => (RESUMED, Vec::new()),
            Self::Abort { code, text } => (ABORT, abort_bytes(*code, text)),
        };
        out.extend_from_slice(&header(kind, payload.len()));
        out.extend_from_slice(&payload);
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, FrameError> {
        let bad = || FrameError::BadPayload { kind };
        let number = || payload.try_into().map(u64::from_be_bytes).map_err(|_| bad());
        Ok(match kind {
            END => Self::End(read_evidence(payload).ok_or_else(bad)?),
            ACCEPTED => Self::Accepted(read_evidence(payload).ok_or_else(bad)?),
            RUNNING => Self::Running,
            PING => Self::Ping(number()?),
            PONG => Self::Pong(number()?),
            SUSPENDED => Self::Suspended,
            RESUMED => Self::Resumed,
            _ => read_abort(payload).ok_or_else(bad)?,
        })
    }
}

fn evidence_bytes(evidence: &StreamEvidence) -> Vec<u8> {
    [&evidence.stream_bytes.to_be_bytes()[..], &evidence.digest.0].concat()
}

fn read_evidence(payload: &[u8]) -> Option<StreamEvidence> {
    let (bytes, digest) = payload.split_first_chunk::<8>()?;
    Some(StreamEvidence { stream_bytes: u64::from_be_bytes(*bytes), digest: Digest(digest.try_into().ok()?) })
}

fn abort_bytes(code: ErrorCode, text: &str) -> Vec<u8> {
    let mut end = text.len().min(MAX_ABORT_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let code = code.as_str().as_bytes();
    let code_len = u8::try_from(code.len()).expect("codes are short");
    [&[code_len], code, text.get(..end).unwrap_or_default().as_bytes()].concat()
}

fn read_abort(payload: &[u8]) -> Option<Control> {
    let (len, rest) = payload.split_first()?;
    let code = std::str::from_utf8(rest.get(..*len as usize)?).ok()?.parse().ok()?;
    let text = std::str::from_utf8(rest.get(*len as usize..)?).ok()?;
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    (text.len() <= MAX_ABORT_TEXT_BYTES).then_some(Control::Abort { code, text: printable })
}

fn check_length(kind: u8, len: u32) -> Result<usize, FrameError> {
    let legal = match kind {
        DATA | RETURN => (1..=MAX_PAYLOAD_BYTES).contains(&(len as usize)),
        END | ACCEPTED => len == 40,
        PING | PONG => len == 8,
        RUNNING | SUSPENDED | RESUMED => len == 0,
        ABORT => (1..=MAX_CONTROL_BYTES).contains(&(len as usize)),
        _ => return Err(FrameError::UnknownType { kind }),
    };
    if legal { Ok(len as usize) } else { Err(FrameError::BadLength { kind, len }) }
}

/// Incremental reader. Memory: one header and one control payload.
#[derive(Debug, Clone, Default)]
pub struct Reader {
    held: Vec<u8>,
    /// Kind and what is left of a DATA or RETURN frame.
    open: Option<(u8, usize)>,
}

impl Reader {
    /// Takes the next plaintext and gives its frames to `each`, in order; stops at the first error of either.
    ///
    /// # Errors
    /// A frame that breaks the format, or what `each` gave.
    pub fn feed<E: From<FrameError>>(
        &mut self,
        input: &[u8],
        mut each: impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = input;
        while !rest.is_empty() {
            if let Some((kind, left)) = self.open {
                let piece = rest.get(..left).unwrap_or(rest);
                rest = rest.get(piece.len()..).unwrap_or_default();
                self.open = Some((kind, left - piece.len())).filter(|(_, left)| *left > 0);
                each(if kind == DATA { Frame::Data(piece) } else { Frame::Return(piece) })?;
                continue;
            }
            rest = self.control(rest, &mut each)?;
        }
        Ok(())
    }

    /// Whether the last frame is complete.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        self.open.is_none() && self.held.is_empty()
    }

    /// Collects a header, and the payload of a control frame; gives what is left of `input`.
    fn control<'a, E: From<FrameError>>(
        &mut self,
        input: &'a [u8],
        each: &mut impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<&'a [u8], E> {
        let mut rest = input;
        self.collect(&mut rest, HEADER_BYTES);
        let Some(header) = self.held.first_chunk::<HEADER_BYTES>() else { return Ok(rest) };
        let [kind, len @ ..] = *header;
        let len = check_length(kind, u32::from_be_bytes(len))?;
        if matches!(kind, DATA | RETURN) {
            self.held.clear();
            self.open = Some((kind, len));
            return Ok(rest);
        }
        self.collect(&mut rest, HEADER_BYTES + len);
        if self.held.len() == HEADER_BYTES + len {
            let control = Control::decode(kind, self.held.get(HEADER_BYTES..).unwrap_or_default())?;
            self.held.clear();
            each(Frame::Control(control))?;
        }
        Ok(rest)
    }

    fn collect(&mut self, rest: &mut &[u8], want: usize) {
        let taken = want.saturating_sub(self.held.len()).min(rest.len());
        let (head, tail) = rest.split_at(taken);
        self.held.extend_from_slice(head);
        *rest = tail;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn evidence() -> StreamEvidence {
        StreamEvidence { stream_bytes: 77, digest: Digest([9; 32]) }
    }

    fn every_control() -> Vec<Control> {
        vec![
            Control::End(evidence()),
            Control::Accepted(evidence()),
            Control::Running,
            Control::Ping(1),
            Control::Pong(u64::MAX),
            Control::Suspended,
            Control::Resumed,
            Control::Abort { code: ErrorCode::StreamRejected, text: "x".repeat(200) },
        ]
    }

    #[derive(Debug, PartialEq, Default)]
    struct Collected {
        data: Vec<u8>,
        back: Vec<u8>,
        control: Vec<Control>,
    }

    fn collect(chunks: &[&[u8]]) -> Result<Collected, FrameError> {
        let (mut reader, mut all) = (Reader::default(), Collected::default());
        for chunk in chunks {
            reader.feed(chunk, |frame| {
                match frame {
                    Frame::Data(piece) => all.data.extend_from_slice(piece),
                    Frame::Return(piece) => all.back.extend_from_slice(piece),
                    Frame::Control(control) => all.control.push(control),
                }
                Ok::<_, FrameError>(())
            })?;
        }
        Ok(all)
    }

    fn sample() -> (Vec<u8>, Collected) {
        let mut bytes = Vec::new();
        for (index, control) in every_control().iter().enumerate() {
            control.encode(&mut bytes);
            bytes.extend_from_slice(&data_header(index + 1));
            bytes.extend(std::iter::repeat_n(index as u8, index + 1));
        }
        bytes.extend_from_slice(&return_header(2));
        bytes.extend_from_slice(b"ab");
        let data = (0..every_control().len()).flat_map(|i| vec![i as u8; i + 1]).collect();
        (bytes, Collected { data, back: b"ab".to_vec(), control: every_control() })
    }

    #[test]
    fn every_frame_round_trips() {
        let (bytes, expect) = sample();
        assert_eq!(collect(&[&bytes]), Ok(expect));
    }

    #[test]
    fn bad_frames_are_named() {
        let check = |bytes: &[u8], expect| assert_eq!(collect(&[bytes]), Err(expect));
        check(&[0, 0, 0, 0, 0], FrameError::UnknownType { kind: 0 });
        check(&[DATA, 0, 0, 0, 0], FrameError::BadLength { kind: DATA, len: 0 });
        check(&[DATA, 0, 4, 0, 1], FrameError::BadLength { kind: DATA, len: 0x40001 });
        check(&[PING, 0, 0, 0, 9], FrameError::BadLength { kind: PING, len: 9 });
        check(&[ABORT, 0, 0, 0, 2, 1, b'x'], FrameError::BadPayload { kind: ABORT });
    }

    proptest! {
        #[test]
        fn splits_do_not_matter(cuts in prop::collection::vec(0usize..600, 0..12)) {
            let (bytes, expect) = sample();
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let chunks: Vec<_> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(collect(&chunks), Ok(expect));
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let whole = collect(&[&bytes]);
            let single: Vec<_> = bytes.chunks(1).collect();
            prop_assert_eq!(whole.is_ok(), collect(&single).is_ok());
        }
    }
}
