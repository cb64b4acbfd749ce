//! The real scanner, as a host daemon would start it; a test without it is skipped, and says so.

#![allow(dead_code, unreachable_pub)]

use signature::frame::{HEADER_BYTES, Header};
use signature::{Answer, Request};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

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
