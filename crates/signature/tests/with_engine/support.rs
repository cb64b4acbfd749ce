//! A scanner, and the agent's side of its socket.

use outrider_signature::frame::{HEADER_BYTES, Header};
use outrider_signature::{Answer, Request, Scan, Verdict};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Scanner {
    pub(crate) child: Child,
    pub(crate) socket: UnixStream,
}

impl Drop for Scanner {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Scanner {
    /// A scanner that was given these rules.
    pub(crate) fn start(rules: &str) -> Self {
        let (mut socket, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_outrider-scanner"))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        for request in [Request::Rules { name: "given.yar", source: rules.as_bytes() }, Request::Start] {
            socket.write_all(&request.encode().unwrap()).unwrap();
        }
        Self { child, socket }
    }

    /// And took them.
    pub(crate) fn ready(rules: &str) -> Self {
        let mut scanner = Self::start(rules);
        let answer = scanner.answer();
        assert!(
            matches!(&answer, Some(Answer::Ready { sandbox, .. }) if sandbox.contains("seccomp")),
            "{answer:?}"
        );
        scanner
    }

    /// Its next answer; nothing when it closed its socket.
    pub(crate) fn answer(&mut self) -> Option<Answer> {
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut header = [0; HEADER_BYTES];
        self.socket.read_exact(&mut header).ok()?;
        let header = Header::of_answer(header).unwrap();
        let mut payload = vec![0; header.length];
        self.socket.read_exact(&mut payload).ok()?;
        Some(Answer::decode(header, &payload).unwrap())
    }

    /// One turn of an agent's loop.
    pub(crate) fn exchange(&mut self, scan: &mut Scan) {
        while !scan.output().is_empty() {
            match self.socket.write(scan.output()) {
                Ok(count) => scan.wrote(count),
                Err(error) => return scan.lost(&error.to_string()),
            }
        }
        self.socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        let mut buffer = [0; 4096];
        match self.socket.read(&mut buffer) {
            Ok(0) => scan.lost("it closed its socket"),
            Ok(count) => scan.input(&buffer[..count], Instant::now()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => scan.lost(&error.to_string()),
        }
        scan.tick(Instant::now());
    }

    pub(crate) fn close(&self) {
        self.socket.shutdown(Shutdown::Both).unwrap();
    }

    pub(crate) fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the scanner lives on");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What it uses, in the kernel's words.
    pub(crate) fn memory(&self) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let lines = status.lines().filter(|line| line.starts_with("VmPeak") || line.starts_with("VmHWM"));
        lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
    }
}

/// The stream ends here; the verdict.
pub(crate) fn drive(scan: &mut Scan, scanner: &mut Scanner) -> Verdict {
    scan.finish(Instant::now());
    while scan.verdict().is_none() {
        scanner.exchange(scan);
    }
    scan.verdict().unwrap().clone()
}

pub(crate) fn self_test(act: &str) -> (ExitStatus, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_outrider-scanner"))
        .args(["--self-test-sandbox", act])
        .output()
        .unwrap();
    (output.status, String::from_utf8(output.stdout).unwrap())
}

/// Rules of the usual kinds: texts, bytes with gaps, a regular expression.
pub(crate) fn rule(number: usize) -> String {
    format!(
        "rule r{number} {{ strings: $text = \"family-{number}-configuration\" $wide = \"implant{number}\" wide nocase \
         $code = {{ 55 8b ec {number:02x} ?? 83 [2-4] e8 {number:02x} }} $expression = /key{number}=[a-f0-9]{{16,32}}/ \
         condition: any of them }}\n"
    )
}

/// Bytes as of a guest's memory: half of it machine code and text as of this program, half of it noise.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut bytes = std::fs::read(env!("CARGO_BIN_EXE_outrider-scanner")).unwrap();
    bytes.drain(..bytes.len() / 2);
    bytes.truncate(length);
    let mut state = 1u64;
    for byte in bytes.iter_mut().step_by(2).skip(length / 4) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
    bytes
}
