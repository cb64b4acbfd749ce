//! A client of QEMU's monitor: commands with deadlines, events with the monotonic time at which they came.
//!
//! One task owns the socket. Commands are matched to answers by id; events go to whoever listens. A listener that
//! falls behind is told so ([`Events::next`] says [`Heard::Lost`]), because "no RESUME since STOP" is a proof that
//! a gap would void.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use wire::qmp::{LineReader, Message};

/// Commands in flight: the daemon sends one at a time, the watch of a migration another.
const REQUESTS_MAX: usize = 32;
/// Events that a slow listener may have outstanding.
const EVENTS_MAX: usize = 1024;
/// What an ordinary command may take. QEMU answers in milliseconds, unless a stalled `device` state blocks it.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket is not there or does not answer.
    #[error("cannot connect to {}: {detail}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// QEMU closed the connection, or sent what is not QMP.
    #[error("the connection is closed ({command} was sent)")]
    Closed {
        /// The command that was waiting.
        command: String,
    },
    /// QEMU did not answer in time. Whether the command was executed is unknown.
    #[error("{command} was not answered within {timeout_ms} ms")]
    Deadline {
        /// The command.
        command: String,
        /// How long it had.
        timeout_ms: u128,
    },
    /// QEMU refused.
    #[error("{command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's words.
        description: String,
    },
}

/// An event and when it came.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its name, e.g. `STOP`.
    pub name: String,
    /// Its data.
    pub data: Value,
    /// Monotonic time of receipt.
    pub at: Instant,
}

/// What a listener hears.
#[derive(Debug, Clone)]
pub enum Heard {
    /// An event.
    Event(Event),
    /// Some were lost.
    Lost,
    /// The connection is closed; no more will come.
    Closed,
}

/// Events since the subscription.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Event>);

/// A connection. Cloning shares it; it closes with the last clone.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::Sender<Request>,
    events: broadcast::WeakSender<Event>,
}

#[derive(Debug)]
enum Request {
    Command {
        name: String,
        arguments: Value,
        out_of_band: bool,
        answer: Answer,
    },
    /// Answered when everything that QEMU had written by then has been read and dispatched.
    Barrier(oneshot::Sender<()>),
}

impl Qmp {
    /// Connects, negotiates, and enables `oob` if asked for (then commands may overtake a blocked monitor).
    ///
    /// # Errors
    /// Nothing listens there, or it does not speak QMP within `timeout`.
    pub async fn connect(path: &Path, oob: bool, timeout: Duration) -> Result<(Self, Events), QmpError> {
        let failed = |detail: String| QmpError::Connect { path: path.to_owned(), detail };
        let work = async {
            let stream = UnixStream::connect(path).await.map_err(|e| failed(e.to_string()))?;
            let (read, write) = stream.into_split();
            let (requests, queue) = mpsc::channel(REQUESTS_MAX);
            let (events, listener) = broadcast::channel(EVENTS_MAX);
            let qmp = Self { requests, events: events.downgrade() };
            let (greeted, greeting) = oneshot::channel();
            let reader = Reader { stream: read, lines: LineReader::default() };
            let task =
                Task { reader, write, queue, events, waiting: BTreeMap::new(), greeted: Some(greeted) };
            tokio::spawn(task.run());
            greeting.await.map_err(|_| failed("no greeting".to_owned()))?;
            let enable = if oob { json!({"enable": ["oob"]}) } else { json!({}) };
            qmp.execute_within("qmp_capabilities", enable, timeout).await?;
            Ok((qmp, Events(listener)))
        };
        tokio::time::timeout(timeout, work).await.map_err(|_| failed("no answer".to_owned()))?
    }

    /// Hears events from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        match self.events.upgrade() {
            Some(sender) => Events(sender.subscribe()),
            None => Events(broadcast::channel(1).1),
        }
    }

    /// Whether the connection stands.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.requests.is_closed()
    }

    /// Executes a command with the usual deadline.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_TIMEOUT).await
    }

    /// Executes a command.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, false, timeout).await
    }

    /// Executes a command out of band: it is answered even while the monitor is blocked.
    ///
    /// # Errors
    /// See [`QmpError`].
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.send(command, arguments, true, COMMAND_TIMEOUT).await
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        out_of_band: bool,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        let closed = || QmpError::Closed { command: command.to_owned() };
        let work = async {
            let (answer, answered) = oneshot::channel();
            let request = Request::Command { name: command.to_owned(), arguments, out_of_band, answer };
            self.requests.send(request).await.map_err(|_| closed())?;
            match answered.await.map_err(|_| closed())? {
                Ok(value) => Ok(value),
                Err((class, description)) => {
                    Err(QmpError::Refused { command: command.to_owned(), class, description })
                }
            }
        };
        tokio::time::timeout(timeout, work).await.map_err(|_| QmpError::Deadline {
            command: command.to_owned(),
            timeout_ms: timeout.as_millis(),
        })?
    }

    /// Returns when everything that QEMU had written before the call has been dispatched to the listeners. With a
    /// frozen QEMU: nothing more can come.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn drained(&self) -> Result<(), QmpError> {
        let closed = || QmpError::Closed { command: "(drain)".to_owned() };
        let (done, waiting) = oneshot::channel();
        self.requests.send(Request::Barrier(done)).await.map_err(|_| closed())?;
        waiting.await.map_err(|_| closed())
    }
}

impl Events {
    /// The next one.
    pub async fn next(&mut self) -> Heard {
        match self.0.recv().await {
            Ok(event) => Heard::Event(event),
            Err(broadcast::error::RecvError::Lagged(_)) => Heard::Lost,
            Err(broadcast::error::RecvError::Closed) => Heard::Closed,
        }
    }

    /// The next one that is there already.
    pub fn ready(&mut self) -> Option<Heard> {
        match self.0.try_recv() {
            Ok(event) => Some(Heard::Event(event)),
            Err(broadcast::error::TryRecvError::Lagged(_)) => Some(Heard::Lost),
            Err(broadcast::error::TryRecvError::Closed) => Some(Heard::Closed),
            Err(broadcast::error::TryRecvError::Empty) => None,
        }
    }
}

type Answer = oneshot::Sender<Result<Value, (String, String)>>;

struct Task {
    reader: Reader,
    write: OwnedWriteHalf,
    queue: mpsc::Receiver<Request>,
    events: broadcast::Sender<Event>,
    waiting: BTreeMap<u64, Answer>,
    greeted: Option<oneshot::Sender<()>>,
}

struct Reader {
    stream: OwnedReadHalf,
    lines: LineReader,
}

/// The connection can't be used any more.
#[derive(Debug)]
struct Broken(String);

impl Task {
    async fn run(mut self) {
        let mut next_id = 0;
        loop {
            let step = tokio::select! {
                readable = self.reader.stream.readable() => match readable {
                    Ok(()) => self.read_available(),
                    Err(e) => Err(Broken(e.to_string())),
                },
                request = self.queue.recv() => match request {
                    Some(request) => { next_id += 1; self.request(next_id, request).await }
                    None => return,
                },
            };
            if let Err(Broken(detail)) = step {
                tracing::debug!(detail, "monitor closed");
                return;
            }
        }
    }

    async fn request(&mut self, id: u64, request: Request) -> Result<(), Broken> {
        match request {
            Request::Command { name, arguments, out_of_band, answer } => {
                // A caller that gave up leaves its entry behind; QEMU answers in order, so few can pile up.
                self.waiting.retain(|_, waiting| !waiting.is_closed());
                self.waiting.insert(id, answer);
                let line = if out_of_band { wire::qmp::out_of_band } else { wire::qmp::command };
                let bytes = line(&name, &arguments, id);
                self.write.write_all(&bytes).await.map_err(|e| Broken(e.to_string()))
            }
            Request::Barrier(done) => {
                self.read_available()?;
                // The asker may have given up; nothing is lost then.
                done.send(()).ok();
                Ok(())
            }
        }
    }

    /// Reads until the socket has nothing more.
    fn read_available(&mut self) -> Result<(), Broken> {
        let mut chunk = [0; 16 * 1024];
        loop {
            match self.reader.stream.try_read(&mut chunk) {
                Ok(0) => return Err(Broken("end of file".to_owned())),
                Ok(n) => {
                    let at = Instant::now();
                    let messages =
                        self.reader.lines.feed(&chunk[..n]).map_err(|e| Broken(crate::error::chain(&e)))?;
                    for message in messages {
                        self.dispatch(message, at);
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(Broken(e.to_string())),
            }
        }
    }

    /// Nobody need listen, and a caller may have given up: a failed send loses nothing.
    fn dispatch(&mut self, message: Message, at: Instant) {
        match message {
            Message::Event { name, data, .. } => {
                self.events.send(Event { name, data, at }).ok();
            }
            Message::Greeting { .. } => {
                self.greeted.take().map(|greeted| greeted.send(()));
            }
            Message::Return { id, value } => self.answer(id, Ok(value)),
            Message::Error { id, class, description } => {
                self.answer(id, Err((bounded(&class), bounded(&description))));
            }
        }
    }

    fn answer(&mut self, id: Option<u64>, result: Result<Value, (String, String)>) {
        if let Some(answer) = id.and_then(|id| self.waiting.remove(&id)) {
            answer.send(result).ok();
        }
    }
}

fn bounded(text: &str) -> String {
    text.chars().take(400).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    /// A monitor that greets, answers the negotiation, then says `rest` and closes.
    async fn fake(rest: Vec<u8>) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            write.write_all(b"{\"QMP\":{}}\n").await.unwrap();
            let mut lines = BufReader::new(read).lines();
            let line: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
            write.write_all(format!("{{\"return\":{{}},\"id\":{}}}\n", line["id"]).as_bytes()).await.unwrap();
            lines.next_line().await.unwrap();
            write.write_all(&rest).await.ok();
        });
        (folder, path)
    }

    #[tokio::test]
    async fn answers_events_and_errors_are_told_apart() {
        let rest =
            b"{\"event\":\"STOP\",\"data\":{}}\n{\"error\":{\"class\":\"C\",\"desc\":\"D\"},\"id\":2}\n"
                .to_vec();
        let (_folder, path) = fake(rest).await;
        let (qmp, mut events) = Qmp::connect(&path, false, COMMAND_TIMEOUT).await.unwrap();
        match qmp.execute("x", json!({})).await {
            Err(QmpError::Refused { class, description, .. }) => {
                assert_eq!((&*class, &*description), ("C", "D"))
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(events.next().await, Heard::Event(e) if e.name == "STOP"));
        assert!(matches!(events.next().await, Heard::Closed));
    }

    #[tokio::test]
    async fn garbage_closes_and_never_hangs() {
        for rest in [
            b"garbage\n".to_vec(),
            vec![b'x'; wire::qmp::MAX_LINE_BYTES + 20_000],
            b"\xff\xfe\n".to_vec(),
            vec![],
            b"[]\n".to_vec(),
        ] {
            let (_folder, path) = fake(rest).await;
            let (qmp, _) = Qmp::connect(&path, false, COMMAND_TIMEOUT).await.unwrap();
            assert!(matches!(qmp.execute("x", json!({})).await, Err(QmpError::Closed { .. })));
        }
    }

    #[tokio::test]
    async fn silence_meets_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = Qmp::connect(&path, false, Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("no answer"));
    }
}
