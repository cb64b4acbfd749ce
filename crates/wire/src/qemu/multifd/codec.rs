//! Decompression of a channel: one context over all its packets, as QEMU has it.

use super::{MAX_ZSTD_WINDOW_LOG, Method};
use miniz_oxide::inflate::stream::{InflateState, inflate};
use miniz_oxide::{DataFormat, MZError, MZFlush, MZStatus};
use std::fmt;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

/// How much output one step gives at most.
const OUTPUT_BYTES: usize = 16 << 10;

/// The decoder of a compressed channel.
pub(super) struct Codec {
    stream: Stream,
    output: Vec<u8>,
}

/// A pure-Rust decoder of zstd was tried first: it gives out no byte of the last window before the frame ends, and
/// a channel is one frame that never ends. Hence libzstd.
enum Stream {
    Zlib(Box<InflateState>),
    /// Nothing where libzstd got no memory.
    Zstd(Option<DCtx<'static>>),
}

/// What one step did.
pub(super) struct Step<'a> {
    /// Bytes of input used.
    pub(super) taken: usize,
    /// What came out.
    pub(super) output: &'a [u8],
    /// Whether more may come out without more input.
    pub(super) full: bool,
}

impl Codec {
    /// The decoder of a method; none for plain pages.
    pub(super) fn new(method: Method) -> Option<Self> {
        let stream = match method {
            Method::Plain => return None,
            Method::Zlib => Stream::Zlib(InflateState::new_boxed(DataFormat::Zlib)),
            Method::Zstd => Stream::Zstd(zstd()),
        };
        Some(Self { stream, output: vec![0; OUTPUT_BYTES] })
    }

    /// Decodes some of `input`, to at most `max` bytes.
    pub(super) fn step(&mut self, input: &[u8], max: usize) -> Result<Step<'_>, &'static str> {
        let room = max.min(self.output.len());
        let output = self.output.get_mut(..room).unwrap_or_default();
        let (taken, written) = match &mut self.stream {
            Stream::Zlib(state) => inflate_step(state, input, output)?,
            Stream::Zstd(Some(context)) => zstd_step(context, input, output)?,
            Stream::Zstd(None) => return Err("no memory for a decoder"),
        };
        if taken == 0 && written == 0 && !input.is_empty() {
            return Err("input that gets no further");
        }
        Ok(Step { taken, output: self.output.get(..written).unwrap_or_default(), full: written == room })
    }
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.stream {
            Stream::Zlib(_) => "Codec(zlib)",
            Stream::Zstd(_) => "Codec(zstd)",
        })
    }
}

fn zstd() -> Option<DCtx<'static>> {
    let mut context = DCtx::try_create()?;
    context.set_parameter(DParameter::WindowLogMax(MAX_ZSTD_WINDOW_LOG)).ok()?;
    Some(context)
}

fn inflate_step(
    state: &mut InflateState,
    input: &[u8],
    output: &mut [u8],
) -> Result<(usize, usize), &'static str> {
    let result = inflate(state, input, output, MZFlush::None);
    match result.status {
        Ok(MZStatus::Ok) | Err(MZError::Buf) => Ok((result.bytes_consumed, result.bytes_written)),
        Ok(_) => Err("the end of the stream"),
        Err(_) => Err("no zlib stream"),
    }
}

fn zstd_step(
    context: &mut DCtx<'static>,
    input: &[u8],
    output: &mut [u8],
) -> Result<(usize, usize), &'static str> {
    let mut input = InBuffer::around(input);
    let mut output = OutBuffer::around(output);
    match context.decompress_stream(&mut output, &mut input) {
        Ok(0) => Err("the end of the frame"),
        Ok(_) => Ok((input.pos(), output.pos())),
        Err(code) => Err(zstd_safe::get_error_name(code)),
    }
}
