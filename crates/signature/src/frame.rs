//! Frames on the stream socket between a VM agent (at first: the host daemon) and a scanner: type `u8`, big-endian
//! length `u32`, payload. Both ends start from the same build, so there is no version.
//!
//! ```text
//! daemon → RULES* START   → READY or REFUSED
//! agent  → BATCH* FINISH  → (HIT* SCANNED)* DONE
//! ```

use std::fmt;

/// Type and length.
pub const HEADER_BYTES: usize = 5;
/// New bytes of one contiguous run: the engine is at its best from 64 KiB on, and a page's bytes wait no longer.
pub const MAX_RUN_BYTES: usize = 256 * 1024;
/// Bytes of a run that are looked at again at the head of the next: a pattern up to this long is seen wherever it lies.
pub const OVERLAP_BYTES: usize = 4096;
/// Bytes of the runs of one batch.
pub const MAX_BATCH_BYTES: usize = MAX_RUN_BYTES + OVERLAP_BYTES;
/// Runs of one batch: 64 single pages of 4 KiB, and as many tails of runs.
pub const MAX_RUNS: usize = 128;
/// One file of rules.
pub const MAX_SOURCE_BYTES: usize = 4 << 20;
/// All files of rules.
pub const MAX_RULES_BYTES: usize = 16 << 20;
/// Name of a file of rules, and of a rule (the language's own limit).
pub const MAX_NAME_BYTES: usize = 128;
/// Why rules were refused, what of a sandbox is in force.
pub const MAX_TEXT_BYTES: usize = 2048;
/// Hits that are named for one batch; the others are counted.
pub const MAX_HITS_PER_BATCH: usize = 64;

const RUN_HEADER_BYTES: usize = 14;
const MAX_ANSWER_BYTES: usize = 4 + MAX_TEXT_BYTES;

const RULES: u8 = 1;
const START: u8 = 2;
const BATCH: u8 = 3;
const FINISH: u8 = 4;
const READY: u8 = 65;
const REFUSED: u8 = 66;
const HIT: u8 = 67;
const SCANNED: u8 = 68;
const DONE: u8 = 69;

/// Contiguous bytes of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the RAM block, in the order of the VM's inventory.
    pub block: u16,
    /// Where in the block it begins.
    pub offset: u64,
    /// Its length.
    pub length: u32,
}

impl Run {
    /// Whether the place lies in it.
    #[must_use]
    pub fn contains(&self, block: u16, offset: u64) -> bool {
        block == self.block && offset.checked_sub(self.offset).is_some_and(|at| at < u64::from(self.length))
    }
}

/// To the scanner.
#[derive(PartialEq, Eq)]
pub enum Request<'a> {
    /// A file of rules, before [`Request::Start`].
    Rules {
        /// Its name, for messages.
        name: &'a str,
        /// Its text.
        source: &'a [u8],
    },
    /// That were all rules.
    Start,
    /// Memory to look at, each run on its own.
    Batch {
        /// Counts up by one.
        id: u64,
        /// The runs, whose lengths add up to those of the bytes.
        runs: Vec<Run>,
        /// Their bytes, one after the other.
        bytes: &'a [u8],
    },
    /// That were all batches.
    Finish,
}

/// Never shows guest memory or rules (I10).
impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rules { name, source } => write!(f, "Rules({name:?}, {} bytes)", source.len()),
            Self::Start => f.write_str("Start"),
            Self::Batch { id, runs, bytes } => write!(f, "Batch({id}, {runs:?}, {} bytes)", bytes.len()),
            Self::Finish => f.write_str("Finish"),
        }
    }
}

/// What a rule asks for when it matches: its metadata `response = "report"`, or the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Response {
    /// The migration goes on, and the finding is reported.
    Report,
    /// The migration ends.
    Refuse,
}

/// From the scanner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The rules are compiled, the sandbox is entered.
    Ready {
        /// How many rules.
        rules: u32,
        /// What of the sandbox is in force.
        sandbox: String,
    },
    /// The rules do not compile.
    Refused {
        /// Why, for people.
        why: String,
    },
    /// A rule matches.
    Hit {
        /// Its identifier, printable, at most [`MAX_NAME_BYTES`].
        rule: String,
        /// What it asks for.
        response: Response,
        /// Block of the match.
        block: u16,
        /// Offset of the match.
        offset: u64,
    },
    /// A batch is done, and its hits are told.
    Scanned {
        /// Which.
        id: u64,
        /// Bytes of it that took too long and were given up.
        skipped_bytes: u32,
    },
    /// Every batch is done.
    Done {
        /// Bytes looked at.
        scanned_bytes: u64,
        /// Bytes given up.
        skipped_bytes: u64,
        /// Hits, including those that were only counted.
        hits_total: u64,
    },
}

/// Why the other end's frames were refused. Nothing more of it is read then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No such type in this direction.
    #[error("a frame of unknown type {kind}")]
    UnknownType {
        /// Its type.
        kind: u8,
    },
    /// A length that the type can't have.
    #[error("a frame of type {kind} with a length of {length} bytes")]
    BadLength {
        /// Its type.
        kind: u8,
        /// Its length.
        length: u32,
    },
    /// A payload that does not parse.
    #[error("a frame of type {kind} with a malformed payload")]
    BadPayload {
        /// Its type.
        kind: u8,
    },
}

/// What a header says of the payload behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: u8,
    /// Bytes of payload.
    pub length: usize,
}

impl Header {
    /// Of a request.
    ///
    /// # Errors
    /// An unknown type, or a length that it can't have.
    pub fn of_request(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        Self::read(bytes, |kind| match kind {
            RULES => Some(2 + MAX_NAME_BYTES + MAX_SOURCE_BYTES),
            BATCH => Some(10 + MAX_RUNS * RUN_HEADER_BYTES + MAX_BATCH_BYTES),
            START | FINISH => Some(0),
            _ => None,
        })
    }

    /// Of an answer.
    ///
    /// # Errors
    /// As [`Header::of_request`].
    pub fn of_answer(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        Self::read(bytes, |kind| match kind {
            READY | REFUSED => Some(MAX_ANSWER_BYTES),
            HIT => Some(11 + MAX_NAME_BYTES),
            SCANNED => Some(12),
            DONE => Some(24),
            _ => None,
        })
    }

    fn read(bytes: [u8; HEADER_BYTES], most: impl Fn(u8) -> Option<usize>) -> Result<Self, FrameError> {
        let [kind, a, b, c, d] = bytes;
        let length = u32::from_be_bytes([a, b, c, d]);
        let most = most(kind).ok_or(FrameError::UnknownType { kind })?;
        let fits = usize::try_from(length).ok().filter(|length| *length <= most);
        fits.map(|length| Self { kind, length }).ok_or(FrameError::BadLength { kind, length })
    }
}

impl<'a> Request<'a> {
    /// The whole frame.
    ///
    /// # Errors
    /// It is larger than a frame may be.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        match self {
            Self::Rules { name, source } => {
                let mut payload = Vec::with_capacity(2 + name.len() + source.len());
                let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
                payload.extend_from_slice(&length.to_be_bytes());
                payload.extend_from_slice(name.as_bytes());
                payload.extend_from_slice(source);
                let fits = name.len() <= MAX_NAME_BYTES && source.len() <= MAX_SOURCE_BYTES;
                frame(RULES, &payload, fits)
            }
            Self::Start => frame(START, &[], true),
            Self::Batch { id, runs, bytes } => encode_batch(*id, runs, bytes),
            Self::Finish => frame(FINISH, &[], true),
        }
    }

    /// The request of a header and its payload.
    ///
    /// # Errors
    /// A payload that does not parse.
    pub fn decode(header: Header, payload: &'a [u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(payload);
        let request = match header.kind {
            RULES => fields.rules(),
            START => Some(Self::Start),
            BATCH => fields.batch(),
            FINISH => Some(Self::Finish),
            _ => None,
        };
        let request = request.filter(|_| fields.0.is_empty() && payload.len() == header.length);
        request.ok_or(FrameError::BadPayload { kind: header.kind })
    }
}

/// The frame of a batch, whose bytes are copied once.
fn encode_batch(id: u64, runs: &[Run], bytes: &[u8]) -> Result<Vec<u8>, FrameError> {
    let length = 10 + runs.len() * RUN_HEADER_BYTES + bytes.len();
    let bad = FrameError::BadPayload { kind: BATCH };
    let sum = runs.iter().map(|run| run.length as usize).sum::<usize>();
    if runs.len() > MAX_RUNS || bytes.len() > MAX_BATCH_BYTES || sum != bytes.len() {
        return Err(bad);
    }
    let (Ok(length32), Ok(count)) = (u32::try_from(length), u16::try_from(runs.len())) else {
        return Err(bad);
    };
    let mut out = Vec::with_capacity(HEADER_BYTES + length);
    out.push(BATCH);
    out.extend_from_slice(&length32.to_be_bytes());
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&count.to_be_bytes());
    for run in runs {
        out.extend_from_slice(&run.block.to_be_bytes());
        out.extend_from_slice(&run.offset.to_be_bytes());
        out.extend_from_slice(&run.length.to_be_bytes());
    }
    out.extend_from_slice(bytes);
    Ok(out)
}

impl Answer {
    /// The whole frame; a text that is too long is cut.
    ///
    /// # Errors
    /// A rule's name that is too long.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        match self {
            Self::Ready { rules, sandbox } => {
                let mut payload = rules.to_be_bytes().to_vec();
                payload.extend_from_slice(cut(sandbox).as_bytes());
                frame(READY, &payload, true)
            }
            Self::Refused { why } => frame(REFUSED, cut(why).as_bytes(), true),
            Self::Hit { rule, response, block, offset } => {
                let mut payload = vec![u8::from(*response == Response::Refuse)];
                payload.extend_from_slice(&block.to_be_bytes());
                payload.extend_from_slice(&offset.to_be_bytes());
                payload.extend_from_slice(rule.as_bytes());
                frame(HIT, &payload, rule.len() <= MAX_NAME_BYTES)
            }
            Self::Scanned { id, skipped_bytes } => {
                let mut payload = id.to_be_bytes().to_vec();
                payload.extend_from_slice(&skipped_bytes.to_be_bytes());
                frame(SCANNED, &payload, true)
            }
            Self::Done { scanned_bytes, skipped_bytes, hits_total } => {
                let numbers = [scanned_bytes, skipped_bytes, hits_total];
                let payload: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
                frame(DONE, &payload, true)
            }
        }
    }

    /// The answer of a header and its payload.
    ///
    /// # Errors
    /// A payload that does not parse; among them texts that are not printable.
    pub fn decode(header: Header, payload: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(payload);
        let answer = match header.kind {
            READY => fields.ready(),
            REFUSED => fields.text().map(|why| Self::Refused { why }),
            HIT => fields.hit(),
            SCANNED => fields.scanned(),
            DONE => fields.done(),
            _ => None,
        };
        let answer = answer.filter(|_| fields.0.is_empty() && payload.len() == header.length);
        answer.ok_or(FrameError::BadPayload { kind: header.kind })
    }
}

/// Answers out of bytes that come in any pieces; holds one frame at most.
#[derive(Debug, Default)]
pub struct AnswerReader {
    bytes: Vec<u8>,
}

impl AnswerReader {
    /// Takes bytes and hands out the answers that are complete.
    ///
    /// # Errors
    /// The first frame that is none.
    pub fn feed(&mut self, mut input: &[u8], mut take: impl FnMut(Answer)) -> Result<(), FrameError> {
        while !input.is_empty() {
            let wanted = match self.bytes.first_chunk::<HEADER_BYTES>() {
                Some(header) => HEADER_BYTES + Header::of_answer(*header)?.length,
                None => HEADER_BYTES,
            };
            let count = wanted.saturating_sub(self.bytes.len()).min(input.len());
            let (now, later) = input.split_at(count);
            self.bytes.extend_from_slice(now);
            input = later;
            if let Some(answer) = self.complete()? {
                take(answer);
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<Option<Answer>, FrameError> {
        let Some((header, payload)) = self.bytes.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::of_answer(*header)?;
        if payload.len() < header.length {
            return Ok(None);
        }
        let answer = Answer::decode(header, payload)?;
        self.bytes.clear();
        Ok(Some(answer))
    }
}

fn frame(kind: u8, payload: &[u8], fits: bool) -> Result<Vec<u8>, FrameError> {
    let length = u32::try_from(payload.len()).ok().filter(|_| fits);
    let length = length.ok_or(FrameError::BadPayload { kind })?;
    let mut out = Vec::with_capacity(HEADER_BYTES + payload.len());
    out.push(kind);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(payload);
    Ok(out)
}

/// At most [`MAX_TEXT_BYTES`] of printable ASCII and line ends: what a terminal or a log can take.
fn cut(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' || c == '\n' { c } else { '?' };
    text.chars().take(MAX_TEXT_BYTES).map(plain).collect()
}

/// What is left of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn text(&mut self) -> Option<String> {
        let text = std::str::from_utf8(self.rest()).ok()?;
        (text.len() <= MAX_TEXT_BYTES && cut(text) == text).then(|| text.to_owned())
    }

    fn rules(&mut self) -> Option<Request<'a>> {
        let length = usize::from(self.u16()?);
        let name = std::str::from_utf8(self.bytes(length)?).ok().filter(|n| n.len() <= MAX_NAME_BYTES)?;
        let source = Some(self.rest()).filter(|source| source.len() <= MAX_SOURCE_BYTES)?;
        Some(Request::Rules { name, source })
    }

    fn batch(&mut self) -> Option<Request<'a>> {
        let (id, count) = (self.u64()?, usize::from(self.u16()?));
        if count > MAX_RUNS {
            return None;
        }
        let mut runs = Vec::with_capacity(count);
        for _ in 0..count {
            runs.push(Run { block: self.u16()?, offset: self.u64()?, length: self.u32()? });
        }
        let bytes = Some(self.rest()).filter(|bytes| bytes.len() <= MAX_BATCH_BYTES)?;
        let sum: u64 = runs.iter().map(|run| u64::from(run.length)).sum();
        let whole = runs.iter().all(|run| run.offset.checked_add(u64::from(run.length)).is_some());
        (whole && sum == bytes.len() as u64).then_some(Request::Batch { id, runs, bytes })
    }

    fn ready(&mut self) -> Option<Answer> {
        Some(Answer::Ready { rules: self.u32()?, sandbox: self.text()? })
    }

    fn hit(&mut self) -> Option<Answer> {
        let response = match self.array()? {
            [0] => Response::Report,
            [1] => Response::Refuse,
            _ => return None,
        };
        let (block, offset) = (self.u16()?, self.u64()?);
        let rule = self.text()?;
        let good = !rule.is_empty() && rule.len() <= MAX_NAME_BYTES && !rule.contains(['\n', ' ']);
        good.then_some(Answer::Hit { rule, response, block, offset })
    }

    fn scanned(&mut self) -> Option<Answer> {
        Some(Answer::Scanned { id: self.u64()?, skipped_bytes: self.u32()? })
    }

    fn done(&mut self) -> Option<Answer> {
        Some(Answer::Done { scanned_bytes: self.u64()?, skipped_bytes: self.u64()?, hits_total: self.u64()? })
    }
}

#[cfg(test)]
mod tests;
