//! The real scanner, as a host daemon would start it; a test without it is skipped, and says so.

#![allow(dead_code, unreachable_pub)]

use rustix::process::{Pid, Signal, kill_process};
use signature::frame::{HEADER_BYTES, Header};
use signature::{Answer, Request};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

/// A scanner that has its rules, and the socket that its agent is to have.
pub struct Scanner {
    pub process: Child,
    pub socket: UnixStream,
}

impl Scanner {
    /// Nothing when it is not built: its engine takes minutes, so ordinary builds are without.
    pub fn start(rules: &str) -> Option<Self> {
        let Some(binary) = binary() else {
            skip("outrider-scanner is not built beside the agent (`cargo xtask test` builds it)");
            return None;
        };
        let (mut socket, theirs) = UnixStream::pair().unwrap();
        let process = Command::new(binary).stdin(Stdio::from(OwnedFd::from(theirs))).spawn().unwrap();
        for request in [Request::Rules { name: "given.yar", source: rules.as_bytes() }, Request::Start] {
            socket.write_all(&request.encode().unwrap()).unwrap();
        }
        let mut header = [0; HEADER_BYTES];
        socket.read_exact(&mut header).unwrap();
        let header = Header::of_answer(header).unwrap();
        let mut payload = vec![0; header.length];
        socket.read_exact(&mut payload).unwrap();
        let answer = Answer::decode(header, &payload).unwrap();
        assert!(matches!(answer, Answer::Ready { .. }), "{answer:?}");
        Some(Self { process, socket })
    }

    /// Stops it, or lets it go on.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Scanner {
    fn drop(&mut self) {
        let _may_have_ended = self.process.kill();
        let _status = self.process.wait();
    }
}

/// Finds nothing, and takes its time for each batch.
pub struct SlowScanner {
    pub socket: UnixStream,
    thread: JoinHandle<usize>,
}

impl SlowScanner {
    pub fn start(each: Duration) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        Self { socket, thread: std::thread::spawn(move || answer(theirs, each)) }
    }

    /// How many batches it looked at until its agent was gone.
    pub fn end(self) -> usize {
        drop(self.socket);
        self.thread.join().unwrap()
    }
}

fn answer(mut socket: UnixStream, each: Duration) -> usize {
    let (mut batches, mut header) = (0, [0; HEADER_BYTES]);
    while socket.read_exact(&mut header).is_ok() {
        let header = Header::of_request(header).unwrap();
        let mut payload = vec![0; header.length];
        if socket.read_exact(&mut payload).is_err() {
            break;
        }
        let answer = match Request::decode(header, &payload).unwrap() {
            Request::Batch { id, .. } => Answer::Scanned { id, skipped_bytes: 0 },
            Request::Finish => Answer::Done { scanned_bytes: 0, skipped_bytes: 0, hits_total: 0 },
            other => panic!("{other:?}"),
        };
        batches += usize::from(matches!(answer, Answer::Scanned { .. }));
        std::thread::sleep(each);
        if socket.write_all(&answer.encode().unwrap()).is_err() {
            break;
        }
    }
    batches
}

fn binary() -> Option<PathBuf> {
    let mut path = PathBuf::from(env!("CARGO_BIN_EXE_outrider-agent"));
    path.set_file_name("outrider-scanner");
    path.is_file().then_some(path)
}

/// What `cargo xtask test` counts.
fn skip(reason: &str) {
    println!("SKIPPED: {reason}");
    if let Some(list) = std::env::var_os("OUTRIDER_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(list).unwrap();
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        writeln!(file, "outrider-agent::signatures {test}: {reason}").unwrap();
    }
}
