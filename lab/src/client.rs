//! The guest's user: one TCP connection, a request every few milliseconds, and what it felt like.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::net::{self, Node};

/// The guest daemon's port.
pub const GUEST_PORT: u16 = 7;
/// Pause between an answer and the next request.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long the first connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// An answer that takes longer means that the connection is dead.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// A blocked read looks this often whether it should stop.
const READ_SLICE: Duration = Duration::from_millis(100);
/// Longest answer, in bytes.
const MAX_ANSWER_BYTES: usize = 4096;

/// What the client felt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Every request on the one connection was answered, in order.
    pub connection_survived: bool,
    /// Requests answered.
    pub requests: u64,
    /// Longest time between a request and its answer, in milliseconds.
    pub max_gap_ms: f64,
    /// What went wrong, if anything.
    pub error: Option<String>,
}

/// A client at work in the background.
#[derive(Debug)]
pub struct Client {
    stop: Arc<AtomicBool>,
    summary: Arc<Mutex<Summary>>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects from a machine of the lab and begins.
    pub fn start(node: &Node, address: SocketAddr) -> Result<Self> {
        Self::begin(connect_from(node, address)?)
    }

    /// Connects from where this process is and begins.
    pub fn start_here(address: SocketAddr) -> Result<Self> {
        Self::begin(connect(address)?)
    }

    fn begin(stream: TcpStream) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let summary = Arc::new(Mutex::new(Summary { connection_survived: true, ..Summary::default() }));
        let (stops, notes) = (Arc::clone(&stop), Arc::clone(&summary));
        let work = move || {
            let mut connection = Connection::new(stream, stops);
            if let Err(error) = connection.converse(&notes) {
                let mut summary = lock(&notes);
                summary.connection_survived = false;
                summary.error = Some(format!("{error:#}"));
            }
        };
        let thread = thread::Builder::new().name("client".to_owned()).spawn(work);
        Ok(Self { stop, summary, thread: Some(thread.context("starting the client")?) })
    }

    /// What was felt so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        lock(&self.summary).clone()
    }

    /// Ends the conversation. A request without an answer so far counts with the time waited.
    pub fn finish(mut self) -> Summary {
        self.end();
        self.summary()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic has been printed and shows as requests that stopped.
            let _printed = thread.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end();
    }
}

/// One request and its answer on a connection of their own, from a machine of the lab.
pub fn ask(node: &Node, address: SocketAddr, request: &str) -> Result<String> {
    let mut connection = Connection::new(connect_from(node, address)?, Arc::default());
    connection.send(request)?;
    connection.answer()?.context("stopped before the answer")
}

/// The guest's planted secret.
pub fn secret(node: &Node, address: SocketAddr) -> Result<String> {
    let answer = ask(node, address, "secret")?;
    let secret = answer.strip_prefix("secret ").context("the guest did not answer with its secret")?;
    ensure!(secret.len() >= 16, "a secret of {} bytes proves nothing when it is not found", secret.len());
    Ok(secret.to_owned())
}

/// The guest's address in the lab.
#[must_use]
pub fn guest_address() -> SocketAddr {
    let address = net::GUEST_ADDRESS.parse().expect("a constant that is an address");
    SocketAddr::new(address, GUEST_PORT)
}

fn connect_from(node: &Node, address: SocketAddr) -> Result<TcpStream> {
    net::inside(node.namespace(), move || connect(address))
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)
        .with_context(|| format!("connecting to the guest at {address}"))?;
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    stream.set_read_timeout(Some(READ_SLICE)).context("setting the read timeout")?;
    stream.set_write_timeout(Some(ANSWER_LIMIT)).context("setting the write timeout")?;
    Ok(stream)
}

struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
    stop: Arc<AtomicBool>,
}

impl Connection {
    fn new(stream: TcpStream, stop: Arc<AtomicBool>) -> Self {
        Self { stream, received: Vec::new(), stop }
    }

    fn converse(&mut self, summary: &Mutex<Summary>) -> Result<()> {
        for number in 1_u64.. {
            if self.stop.load(Ordering::Acquire) {
                break;
            }
            let asked = Instant::now();
            self.send(&format!("ping {number}"))?;
            let answer = self.answer()?;
            let mut summary = lock(summary);
            summary.max_gap_ms = summary.max_gap_ms.max(asked.elapsed().as_secs_f64() * 1000.0);
            let Some(answer) = answer else { break };
            ensure!(
                answer == format!("pong {number} {number}"),
                "request {number} was answered with {answer:?}"
            );
            summary.requests = number;
            drop(summary);
            thread::sleep(INTERVAL);
        }
        Ok(())
    }

    fn send(&mut self, request: &str) -> Result<()> {
        let line = format!("{request}\n");
        self.stream.write_all(line.as_bytes()).context("sending a request to the guest")
    }

    /// The next line; `None` when asked to stop.
    fn answer(&mut self) -> Result<Option<String>> {
        let start = Instant::now();
        let mut bytes = [0; 512];
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            ensure!(self.received.len() < MAX_ANSWER_BYTES, "the guest's answer never ends");
            match self.stream.read(&mut bytes) {
                Ok(0) => bail!("the guest closed the connection"),
                Ok(length) => self.received.extend_from_slice(&bytes[..length]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error).context("waiting for the guest's answer"),
            }
            if self.stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            ensure!(start.elapsed() < ANSWER_LIMIT, "no answer within {} s", ANSWER_LIMIT.as_secs());
        }
    }
}

fn lock(summary: &Mutex<Summary>) -> std::sync::MutexGuard<'_, Summary> {
    summary.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::process;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    /// A server that answers `good` requests and then does something else.
    fn serve(good: u64, then: fn(TcpStream)) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for (line, count) in lines.map_while(Result::ok).zip(1..=good) {
                let number = line.strip_prefix("ping ").unwrap();
                stream.write_all(format!("pong {number} {count}\n").as_bytes()).unwrap();
            }
            then(stream);
        });
        address
    }

    #[test]
    fn answered_requests_are_counted_and_the_connection_survives() {
        let client = Client::start_here(serve(u64::MAX, drop)).unwrap();
        process::wait_for("20 answers", Duration::from_secs(20), || {
            Ok((client.summary().requests >= 20).then_some(()))
        })
        .unwrap();
        let summary = client.finish();
        assert!(summary.connection_survived && summary.error.is_none(), "{summary:?}");
        assert!(summary.max_gap_ms > 0.0);
    }

    #[test]
    fn a_closed_connection_and_a_wrong_answer_are_told() {
        for then in [drop, |mut stream: TcpStream| stream.write_all(b"pong 1 1\n").unwrap()] {
            let client = Client::start_here(serve(3, then)).unwrap();
            process::wait_for("the end", Duration::from_secs(20), || {
                Ok((!client.summary().connection_survived).then_some(()))
            })
            .unwrap();
            let summary = client.finish();
            assert!(summary.error.is_some() && summary.requests >= 3, "{summary:?}");
        }
    }
}
