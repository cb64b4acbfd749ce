//! A small blocking QMP client for plain QEMU: one command at a time, events kept in order.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process;

/// How long QEMU may take to make its socket.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// How long a command may take; QEMU under emulation on a loaded machine is slow, but not this slow.
const REPLY_LIMIT: Duration = Duration::from_secs(30);
/// Events kept; older ones are dropped.
const MAX_EVENTS: usize = 1024;

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    partial: String,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, waiting for the socket to appear, and negotiates.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            process::wait_for("QEMU's monitor socket", CONNECT_LIMIT, || Ok(UnixStream::connect(path).ok()))?;
        Self::over(stream)
    }

    /// Negotiates over a connection that is already there.
    pub fn over(stream: UnixStream) -> Result<Self> {
        let lines = BufReader::new(stream.try_clone().context("sharing the monitor connection")?);
        let mut qmp = Self { stream, lines, partial: String::new(), events: VecDeque::new() };
        qmp.message(Instant::now() + REPLY_LIMIT)?.context("QEMU sent no greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its result.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.stream.write_all(line.as_bytes()).with_context(|| format!("sending {command} to QEMU"))?;
        let deadline = Instant::now() + REPLY_LIMIT;
        loop {
            let message = self
                .message(deadline)
                .with_context(|| format!("waiting for QEMU's reply to {command}"))?
                .with_context(|| format!("QEMU did not reply to {command} in time"))?;
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refused {command}: {}", error["desc"].as_str().unwrap_or("no reason given"));
            }
            self.keep(message);
        }
    }

    /// Waits for an event of this name (and takes it out of the queue).
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(index) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(index).context("the event was just found");
            }
            let message = self.message(deadline)?;
            self.keep(
                message
                    .with_context(|| format!("QEMU's event {name}: not within {} ms", limit.as_millis()))?,
            );
        }
    }

    /// `query-status`: `running`, `paused`, `inmigrate`, …
    pub fn status(&mut self) -> Result<String> {
        let reply = self.execute("query-status", json!({}))?;
        Ok(reply["status"].as_str().unwrap_or_default().to_owned())
    }

    /// `query-migrate`: the status word, empty before the first migration.
    pub fn migration_status(&mut self) -> Result<String> {
        let reply = self.execute("query-migrate", json!({}))?;
        Ok(reply["status"].as_str().unwrap_or_default().to_owned())
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next line; `None` when the deadline passes. A line broken by the deadline is continued later.
    fn message(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left)).context("setting the reply's deadline")?;
            match self.lines.read_line(&mut self.partial) {
                Ok(0) => bail!("QEMU closed its monitor"),
                Ok(_) => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(serde_json::from_str(&line).context("reading QEMU's line")?));
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("reading from QEMU"),
            }
        }
    }
}

/// The event's time in microseconds since 1970, by QEMU's clock.
#[must_use]
pub fn event_time_us(event: &Value) -> Option<i64> {
    let stamp = &event["timestamp"];
    Some(stamp["seconds"].as_i64()? * 1_000_000 + stamp["microseconds"].as_i64()?)
}
