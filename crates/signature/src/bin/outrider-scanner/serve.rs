//! The socket: rules at first, then batches in, hits out. Blocking, one thread.

use crate::engine::{Engine, Source};
use outrider_signature::frame::{
    FrameError, HEADER_BYTES, Header, MAX_HITS_PER_BATCH, MAX_RULES_BYTES, Request, Run,
};
use outrider_signature::{Answer, Response};
use rustix::fd::AsFd;
use rustix::io::{Errno, read, write};

/// Why the scanner ends early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The other end closed its socket before it was done.
    #[error("the other end closed its socket")]
    Closed,
    /// The socket failed.
    #[error("{operation} failed: {errno}")]
    Socket { operation: &'static str, errno: Errno },
    /// A frame that is none.
    #[error("the other end sent {0}")]
    Frame(#[source] FrameError),
    /// A frame that has no place.
    #[error("the other end sent a frame that has no place here")]
    Misplaced,
    /// Too many rules.
    #[error("the files of rules are larger than {MAX_RULES_BYTES} bytes")]
    TooManyRules,
}

/// Standard input, in both directions.
pub(crate) struct Socket {
    fd: std::io::Stdin,
    payload: Vec<u8>,
}

/// What was done so far.
#[derive(Default)]
struct Counts {
    scanned_bytes: u64,
    skipped_bytes: u64,
    hits: u64,
}

impl Socket {
    pub(crate) fn standard_input() -> Self {
        Self { fd: std::io::stdin(), payload: Vec::new() }
    }

    /// The files of rules.
    ///
    /// # Errors
    /// The other end is gone, talks nonsense, or sends too many.
    pub(crate) fn rules(&mut self) -> Result<Vec<Source>, ServeError> {
        let (mut sources, mut bytes) = (Vec::new(), 0);
        loop {
            match self.receive()? {
                Request::Rules { name, source } => {
                    bytes += source.len();
                    if bytes > MAX_RULES_BYTES {
                        return Err(ServeError::TooManyRules);
                    }
                    sources.push((name.to_owned(), source.to_vec()));
                }
                Request::Start => return Ok(sources),
                Request::Batch { .. } | Request::Finish => return Err(ServeError::Misplaced),
            }
        }
    }

    fn receive(&mut self) -> Result<Request<'_>, ServeError> {
        let mut header = [0; HEADER_BYTES];
        read_all(&self.fd, &mut header)?;
        let header = Header::of_request(header).map_err(ServeError::Frame)?;
        if self.payload.len() < header.length {
            self.payload.resize(header.length, 0);
        }
        let payload = self.payload.get_mut(..header.length).unwrap_or_default();
        read_all(&self.fd, payload)?;
        Request::decode(header, payload).map_err(ServeError::Frame)
    }

    pub(crate) fn send(&mut self, answer: &Answer) -> Result<(), ServeError> {
        write_all(&self.fd, &answer.encode().map_err(ServeError::Frame)?)
    }
}

/// Serves batches until FINISH.
///
/// # Errors
/// The other end is gone, or talks nonsense.
pub(crate) fn serve(socket: &mut Socket, engine: &mut Engine<'_>) -> Result<(), ServeError> {
    let mut counts = Counts::default();
    loop {
        let answers = match socket.receive()? {
            Request::Batch { id, runs, bytes } => batch(engine, &mut counts, id, &runs, bytes)?,
            Request::Finish => {
                let Counts { scanned_bytes, skipped_bytes, hits } = counts;
                return socket.send(&Answer::Done { scanned_bytes, skipped_bytes, hits_total: hits });
            }
            Request::Rules { .. } | Request::Start => return Err(ServeError::Misplaced),
        };
        write_all(&socket.fd, &answers)?;
    }
}

/// Looks at each run on its own: what is not contiguous in the guest's memory is no match. Gives the answers, encoded.
fn batch(
    engine: &mut Engine<'_>,
    counts: &mut Counts,
    id: u64,
    runs: &[Run],
    mut bytes: &[u8],
) -> Result<Vec<u8>, ServeError> {
    let (mut answers, mut named, mut skipped_bytes) = (Vec::new(), 0, 0u32);
    for run in runs {
        let (now, later) = bytes.split_at_checked(run.length as usize).ok_or(ServeError::Misplaced)?;
        bytes = later;
        let Some(places) = engine.scan(now).filter(|_| !now.is_empty()) else {
            skipped_bytes += run.length;
            continue;
        };
        counts.scanned_bytes += u64::from(run.length);
        counts.hits += places.len() as u64;
        // A hit that refuses is named even where reports have used up the room.
        for place in places {
            let last = named + 1 == MAX_HITS_PER_BATCH && place.response == Response::Report;
            if named == MAX_HITS_PER_BATCH || last {
                continue;
            }
            named += 1;
            let offset = run.offset + place.at;
            let hit = Answer::Hit { rule: place.rule, response: place.response, block: run.block, offset };
            answers.extend(hit.encode().map_err(ServeError::Frame)?);
        }
    }
    counts.skipped_bytes += u64::from(skipped_bytes);
    answers.extend(Answer::Scanned { id, skipped_bytes }.encode().map_err(ServeError::Frame)?);
    Ok(answers)
}

fn read_all(fd: &impl AsFd, mut room: &mut [u8]) -> Result<(), ServeError> {
    while !room.is_empty() {
        match read(fd, &mut *room) {
            Ok(0) | Err(Errno::CONNRESET) => return Err(ServeError::Closed),
            Ok(count) => room = room.get_mut(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(ServeError::Socket { operation: "reading", errno }),
        }
    }
    Ok(())
}

fn write_all(fd: &impl AsFd, mut bytes: &[u8]) -> Result<(), ServeError> {
    while !bytes.is_empty() {
        match write(fd, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ServeError::Closed),
            Err(errno) => return Err(ServeError::Socket { operation: "writing", errno }),
        }
    }
    Ok(())
}
