//! The way from one QEMU to another, with the inspector on it: a UNIX socket that the source connects to, one that
//! the target listens at, and nothing in between but what the inspector releases.
//!
//! Each channel has a thread that reads and one that writes, so that a channel which waits holds up no other. The
//! target's answers go back unchanged. The device state leaves only after the whole was accepted.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::RecvFlags;

use super::gate::{Gate, MAIN, Violation};

const CHUNK_BYTES: usize = 256 << 10;
const POLL: Duration = Duration::from_millis(2);
/// From a connection to its first bytes.
const FIRST_BYTES_LIMIT: Duration = Duration::from_secs(30);
const MAIN_MAGIC: [u8; 4] = *b"QEVM";
const MULTIFD_MAGIC: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

/// An open way for one migration. Dropping it cuts every connection.
#[derive(Debug)]
pub(super) struct Passage {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// What went on.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Whether the inspector accepted the whole, refused, or was still waiting.
    pub(super) verdict: Option<Result<(), Violation>>,
    /// What broke on the way, other than a refusal.
    pub(super) trouble: Option<String>,
    /// From the first byte of device state to its release.
    pub(super) hold: Option<Duration>,
    /// Bytes of device state, end mark and description.
    pub(super) held_bytes: usize,
    /// What the source sent, by channel.
    pub(super) taken: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Shared {
    core: Mutex<Core>,
    changed: Condvar,
    ended: AtomicBool,
    target: PathBuf,
}

#[derive(Debug)]
struct Core {
    gate: Gate,
    report: Report,
    holding_since: Option<Instant>,
    /// Ways to the target's connections, by channel. No bound: a stream has one, and the source waits for nothing.
    to_target: Vec<Sender<Vec<u8>>>,
    connections: Vec<UnixStream>,
    /// The source's connections, by channel.
    sources: Vec<UnixStream>,
    main_ended: bool,
}

impl Passage {
    /// Listens at `source` for the main channel and `multifd_channels` more; `target` is where the target listens.
    pub(super) fn open(source: &Path, target: &Path, gate: Gate, multifd_channels: u16) -> Result<Self> {
        let listener =
            UnixListener::bind(source).with_context(|| format!("listening at {}", source.display()))?;
        listener.set_nonblocking(true).context("making the listener non-blocking")?;
        let core = Core {
            gate,
            report: Report::default(),
            holding_since: None,
            to_target: Vec::new(),
            connections: Vec::new(),
            sources: Vec::new(),
            main_ended: false,
        };
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
            target: target.to_owned(),
        });
        let for_acceptor = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("acceptor".to_owned())
            .spawn(move || for_acceptor.accept_all(&listener, multifd_channels))
            .context("starting the acceptor")?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// Cuts what is still connected and tells what went on.
    pub(super) fn close(mut self) -> Report {
        self.end();
        std::mem::take(&mut self.shared.core().report)
    }

    fn end(&mut self) {
        self.shared.cut();
        if let Some(acceptor) = self.acceptor.take() {
            // The acceptor joins the threads of the channels; a panic of theirs shows as a missing verdict.
            let _panicked = acceptor.join();
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    /// The state stays usable whatever a thread did.
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn cut(&self) {
        self.ended.store(true, Ordering::Release);
        let mut core = self.core();
        for connection in core.connections.drain(..) {
            let _closed = connection.shutdown(Shutdown::Both);
        }
        core.to_target.clear();
        core.sources.clear();
        self.changed.notify_all();
    }

    fn accept_all(self: &Arc<Self>, listener: &UnixListener, multifd_channels: u16) {
        let mut threads = Vec::new();
        let mut channel = MAIN;
        while channel <= multifd_channels && !self.is_ended() {
            match listener.accept() {
                Ok((source, _)) => match self.channel(source, channel) {
                    Ok(started) => {
                        threads.extend(started);
                        channel += 1;
                    }
                    Err(error) => self.trouble(&error),
                },
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => thread::sleep(POLL),
                Err(error) => self.trouble(&anyhow::Error::new(error).context("accepting the source")),
            }
        }
        for thread in threads {
            let _panicked = thread.join();
        }
    }

    fn trouble(&self, error: &anyhow::Error) {
        if !self.is_ended() {
            self.core().report.trouble.get_or_insert(format!("{error:#}"));
        }
        self.cut();
    }

    /// Joins a connection of the source to one of the target.
    ///
    /// The source opens its main channel first, and a target of 7.2 tells them apart by order alone.
    fn channel(self: &Arc<Self>, mut source: UnixStream, channel: u16) -> Result<Vec<JoinHandle<()>>> {
        source.set_nonblocking(false).context("making the connection blocking")?;
        let first = first_bytes(&mut source)?;
        let expected = if channel == MAIN { MAIN_MAGIC } else { MULTIFD_MAGIC };
        ensure!(first == expected, "channel {channel} begins with {first:02x?}");
        let target = UnixStream::connect(&self.target)
            .with_context(|| format!("connecting to {}", self.target.display()))?;
        let (sender, receiver) = mpsc::channel();
        {
            let mut core = self.core();
            core.connections.extend([share(&source)?, share(&target)?]);
            core.sources.push(share(&source)?);
            core.to_target.push(sender);
            core.report.taken.push(Vec::new());
        }
        let mut threads = Vec::new();
        let (to, shared) = (share(&target)?, Arc::clone(self));
        threads.push(start("giver", move || shared.run(give(&receiver, to)))?);
        if channel == MAIN {
            let (from, to) = (target, share(&source)?);
            threads.push(start("answers", move || answers(from, to))?);
        }
        let shared = Arc::clone(self);
        threads.push(start("taker", move || shared.run(shared.take(channel, source, first.to_vec())))?);
        Ok(threads)
    }

    fn run(&self, result: Result<()>) {
        if let Err(error) = result {
            self.trouble(&error);
        }
    }

    fn take(&self, channel: u16, mut source: UnixStream, first: Vec<u8>) -> Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut length = first.len();
        chunk[..length].copy_from_slice(&first);
        loop {
            let mut core = self.wanted(channel);
            if length == 0 {
                // There are bytes, so this does not wait. What is read is judged under the same lock: whoever finds the
                // sockets empty knows that everything sent so far was judged.
                length = source.read(&mut chunk).context("reading from the source")?;
            }
            let verdict = core.take(channel, &chunk[..length]);
            self.changed.notify_all();
            if let Err(violation) = verdict? {
                core.report.verdict.get_or_insert(Err(violation));
                drop(core);
                self.cut();
                return Ok(());
            }
            if channel == MAIN && core.main_ended {
                self.finish(core)?;
            } else {
                drop(core);
            }
            length = 0;
            if !wait_readable(&source) {
                return Ok(());
            }
        }
    }

    /// The state, once the inspector wants more of this channel.
    fn wanted(&self, channel: u16) -> MutexGuard<'_, Core> {
        let mut core = self.core();
        while !core.gate.wants(channel) && !self.is_ended() {
            core = self.wait(core);
        }
        core
    }

    fn wait<'a>(&self, core: MutexGuard<'a, Core>) -> MutexGuard<'a, Core> {
        let waited = self.changed.wait_timeout(core, POLL);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    /// The main channel is complete: judges the whole once the others have no more bytes under way. QEMU sends its last
    /// synchronisation on each of them before it ends the RAM section.
    fn finish(&self, mut core: MutexGuard<'_, Core>) -> Result<()> {
        while core.has_unread()? && !self.is_ended() {
            core = self.wait(core);
        }
        if core.report.verdict.is_none() && core.finish()?.is_err() {
            drop(core);
            self.cut();
        }
        Ok(())
    }
}

impl Core {
    /// Judges a piece of a channel and sends on what is released.
    fn take(&mut self, channel: u16, piece: &[u8]) -> Result<Result<(), Violation>> {
        if let Some(taken) = self.report.taken.get_mut(usize::from(channel)) {
            taken.extend_from_slice(piece);
        }
        let mut released = Vec::new();
        let verdict =
            self.gate.feed(channel, piece, &mut |channel, bytes| released.push((channel, bytes.to_vec())));
        for (channel, bytes) in released {
            self.send(channel, bytes)?;
        }
        if self.gate.is_holding() {
            self.holding_since.get_or_insert_with(Instant::now);
        }
        self.main_ended |= channel == MAIN && verdict.is_ok() && self.gate.at_end(piece);
        Ok(verdict)
    }

    fn has_unread(&self) -> Result<bool> {
        for source in self.sources.iter().skip(1) {
            if rustix::io::ioctl_fionread(source).context("asking for unread bytes")? > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn finish(&mut self) -> Result<Result<(), ()>> {
        match self.gate.finish() {
            Err(violation) => {
                self.report.verdict = Some(Err(violation));
                Ok(Err(()))
            }
            Ok(held) => {
                self.report.held_bytes = held.len();
                self.send(MAIN, held)?;
                self.report.hold = self.holding_since.map(|since| since.elapsed());
                self.report.verdict = Some(Ok(()));
                Ok(Ok(()))
            }
        }
    }

    fn send(&self, channel: u16, bytes: Vec<u8>) -> Result<()> {
        let Some(way) = self.to_target.get(usize::from(channel)) else {
            bail!("channel {channel} is not connected");
        };
        way.send(bytes).ok().with_context(|| format!("the target has closed channel {channel}"))
    }
}

/// Waits for bytes of the source; false at its end. QEMU resets what it has not read to the end.
fn wait_readable(source: &UnixStream) -> bool {
    loop {
        match rustix::net::recv(source, &mut [0; 1], RecvFlags::PEEK) {
            Ok((_, 1..)) => return true,
            Err(rustix::io::Errno::INTR) => {}
            _ => return false,
        }
    }
}

fn first_bytes(source: &mut UnixStream) -> Result<[u8; 4]> {
    let mut first = [0; 4];
    source.set_read_timeout(Some(FIRST_BYTES_LIMIT)).context("limiting the first read")?;
    source.read_exact(&mut first).context("reading a channel's first bytes")?;
    source.set_read_timeout(None).context("lifting the limit of the first read")?;
    Ok(first)
}

fn share(stream: &UnixStream) -> Result<UnixStream> {
    stream.try_clone().context("sharing a connection")
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.with_context(|| format!("starting {name}"))
}

fn give(queue: &Receiver<Vec<u8>>, mut target: UnixStream) -> Result<()> {
    while let Ok(piece) = queue.recv() {
        target.write_all(&piece).context("writing to the target")?;
    }
    let _closed = target.shutdown(Shutdown::Write);
    Ok(())
}

/// What the target says goes back as it is.
fn answers(mut target: UnixStream, mut source: UnixStream) {
    let mut chunk = [0; 512];
    while let Ok(length @ 1..) = target.read(&mut chunk) {
        if source.write_all(&chunk[..length]).is_err() {
            return;
        }
    }
    let _closed = source.shutdown(Shutdown::Both);
}
