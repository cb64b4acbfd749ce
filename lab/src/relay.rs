//! A relay between two QEMUs that an attacker on the path could be: it can drop one direction, and hold bytes back.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

const CHUNK_BYTES: usize = 256 << 10;
/// Bytes on their way through in ordinary times; more and the sender waits.
const MAX_QUEUED_BYTES: u64 = 4 << 20;
/// Bytes taken while forwarding is held: a whole small guest, so that the sender believes all is well.
const MAX_HELD_BYTES: u64 = 1 << 30;
const POLL: Duration = Duration::from_millis(1);

/// A relay for one connection.
#[derive(Debug)]
pub struct Relay {
    controls: Arc<Controls>,
}

#[derive(Debug, Default)]
struct Controls {
    drop_reverse: AtomicBool,
    hold_forward: AtomicBool,
    taken_bytes: AtomicU64,
    given_bytes: AtomicU64,
    end: AtomicBool,
}

impl Relay {
    /// Listens at `from`; the first connection is relayed to `to`.
    pub fn start(from: &Path, to: &Path) -> Result<Self> {
        let listener =
            UnixListener::bind(from).with_context(|| format!("listening at {}", from.display()))?;
        let controls = Arc::new(Controls::default());
        let (shared, to) = (Arc::clone(&controls), to.to_owned());
        thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || {
                if let Err(error) = relay(&listener, &to, &shared) {
                    eprintln!("relay: {error:#}");
                }
            })
            .context("starting the relay")?;
        Ok(Self { controls })
    }

    /// From now on nothing from the target reaches the source.
    pub fn drop_reverse(&self) {
        self.controls.drop_reverse.store(true, Ordering::Release);
    }

    /// From now on bytes of the source are taken and kept.
    pub fn hold_forward(&self) {
        self.controls.hold_forward.store(true, Ordering::Release);
    }

    /// Sends what was kept.
    pub fn release_forward(&self) {
        self.controls.hold_forward.store(false, Ordering::Release);
    }

    /// Bytes taken from the source.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        self.controls.taken_bytes.load(Ordering::Acquire)
    }

    /// Bytes taken and not given to the target.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.taken_bytes() - self.controls.given_bytes.load(Ordering::Acquire)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.controls.end.store(true, Ordering::Release);
    }
}

fn relay(listener: &UnixListener, to: &Path, controls: &Arc<Controls>) -> Result<()> {
    let (source, _) = listener.accept().context("accepting the source")?;
    let target = UnixStream::connect(to).with_context(|| format!("connecting to {}", to.display()))?;
    let (sender, receiver) = mpsc::channel();
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
        thread.with_context(|| format!("starting the relay's {name}"))
    };
    let (from, shared) = (clone(&source)?, Arc::clone(controls));
    spawn("taker", Box::new(move || take(from, &sender, &shared)))?;
    let (into, shared) = (clone(&target)?, Arc::clone(controls));
    spawn("giver", Box::new(move || give(&receiver, into, &shared)))?;
    reverse(target, source, controls);
    Ok(())
}

fn clone(stream: &UnixStream) -> Result<UnixStream> {
    stream.try_clone().context("sharing the relay's connection")
}

fn take(mut from: UnixStream, queue: &Sender<Vec<u8>>, controls: &Controls) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let length = match from.read(&mut chunk) {
            Ok(0) | Err(_) => return, // dropping the queue tells the giver
            Ok(length) => length,
        };
        controls.taken_bytes.fetch_add(length as u64, Ordering::AcqRel);
        if queue.send(chunk[..length].to_vec()).is_err() {
            return;
        }
        while controls.queued_bytes() > controls.max_queued_bytes() && !controls.ended() {
            thread::sleep(POLL);
        }
    }
}

fn give(queue: &Receiver<Vec<u8>>, mut into: UnixStream, controls: &Controls) {
    while let Ok(chunk) = queue.recv() {
        while controls.hold_forward.load(Ordering::Acquire) {
            if controls.ended() {
                return;
            }
            thread::sleep(POLL);
        }
        if into.write_all(&chunk).is_err() {
            return;
        }
        controls.given_bytes.fetch_add(chunk.len() as u64, Ordering::AcqRel);
    }
    // Fails where the target has already closed.
    let _closed = into.shutdown(Shutdown::Write);
}

fn reverse(mut from: UnixStream, mut into: UnixStream, controls: &Controls) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let length = match from.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        let dropped = controls.drop_reverse.load(Ordering::Acquire);
        if !dropped && into.write_all(&chunk[..length]).is_err() {
            break;
        }
    }
    // The source sees the connection end, as it would when a router resets it.
    let _closed = into.shutdown(Shutdown::Both);
}

impl Controls {
    fn queued_bytes(&self) -> u64 {
        self.taken_bytes.load(Ordering::Acquire) - self.given_bytes.load(Ordering::Acquire)
    }

    fn max_queued_bytes(&self) -> u64 {
        if self.hold_forward.load(Ordering::Acquire) { MAX_HELD_BYTES } else { MAX_QUEUED_BYTES }
    }

    fn ended(&self) -> bool {
        self.end.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::process;

    struct Ends {
        relay: Relay,
        source: UnixStream,
        target: UnixStream,
        _folder: tempfile::TempDir,
    }

    fn ends() -> Ends {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let listener = UnixListener::bind(&to).unwrap();
        let relay = Relay::start(&from, &to).unwrap();
        let source = UnixStream::connect(&from).unwrap();
        let (target, _) = listener.accept().unwrap();
        Ends { relay, source, target, _folder: folder }
    }

    #[test]
    fn bytes_pass_both_ways_and_held_bytes_come_after_the_release() {
        let mut ends = ends();
        let mut byte = [0];
        ends.source.write_all(b"a").unwrap();
        ends.target.read_exact(&mut byte).unwrap();
        ends.target.write_all(b"b").unwrap();
        ends.source.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"b");
        ends.relay.hold_forward();
        ends.source.write_all(b"tail").unwrap();
        process::wait_for("held bytes", Duration::from_secs(5), || {
            Ok((ends.relay.held_bytes() == 4).then_some(()))
        })
        .unwrap();
        drop(ends.source);
        ends.relay.release_forward();
        let mut rest = String::new();
        ends.target.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "tail", "also after the source has closed");
    }

    #[test]
    fn a_dropped_direction_shows_as_a_closed_connection_only() {
        let mut ends = ends();
        ends.source.write_all(b"a").unwrap();
        ends.target.read_exact(&mut [0]).unwrap();
        ends.relay.drop_reverse();
        ends.target.write_all(b"the acknowledgement").unwrap();
        drop(ends.target);
        let mut got = Vec::new();
        // The relay closes both directions; a reset is as good as an end.
        let _reset = ends.source.read_to_end(&mut got);
        assert!(got.is_empty());
    }
}
