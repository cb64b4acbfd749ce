//! The micro-probe: the manager asks whether this host can do a moment's work. It is done by a process of its own among
//! the guests' cgroups, started ahead: starting one, and moving it into its cgroups, takes longer than the work.

use crate::agents::AgentSpawner;
use crate::cgroup::Group;
use crate::daemon::lock;
use crate::error::HostError;
use crate::process::{Process, Spawn};
use crate::sweep;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use types::host::Probe;
use types::{ErrorCode, Problem};

/// The work takes some 20 ms; one that is not done by then will not be.
const WORK_LIMIT: Duration = Duration::from_millis(450);
/// Whoever asks this soon after another gets the same answer: many decisions at once must not be a load.
const GOOD_FOR: Duration = Duration::from_millis(50);
/// The next process is started this long after the last was used: not beside the decision that used it.
const AHEAD_PAUSE: Duration = Duration::from_secs(1);
/// Five numbers.
const ANSWER_BYTES_MAX: u64 = 1024;
/// Most that is asked of a probe.
pub const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// Most microseconds that a probe computes.
pub const WORK_US_MAX: u32 = 20_000;

/// Asks for micro-probes, one at a time.
#[derive(Debug, Clone)]
pub struct Prober {
    spawner: AgentSpawner,
    group: Group,
    last: Arc<tokio::sync::Mutex<Option<Last>>>,
    ahead: Arc<Mutex<Option<Waiting>>>,
}

#[derive(Debug)]
struct Last {
    asked: (u64, u32),
    at: Instant,
    found: Probe,
}

/// A process that waits for its order; it ends when its socket is closed.
#[derive(Debug)]
struct Waiting {
    process: Process,
    socket: UnixStream,
}

impl Prober {
    /// Runs the agent's program in `group`.
    #[must_use]
    pub fn new(spawner: AgentSpawner, group: Group) -> Self {
        Self { spawner, group, last: Arc::default(), ahead: Arc::default() }
    }

    /// Touches so much memory and computes for so long.
    ///
    /// # Errors
    /// `bad-request` beyond the limits, `missing-program`; `insufficient-capacity` when it is not done in time, or the
    /// process did not live to do it.
    pub async fn probe(&self, memory_bytes: u64, work_us: u32) -> Result<Probe, Problem> {
        if memory_bytes > MEMORY_BYTES_MAX || work_us > WORK_US_MAX {
            let text =
                format!("a probe touches {MEMORY_BYTES_MAX} bytes and computes {WORK_US_MAX} us at most");
            return Err(Problem::new(ErrorCode::BadRequest, text));
        }
        let mut last = self.last.lock().await;
        if let Some(fresh) =
            last.as_ref().filter(|l| l.asked == (memory_bytes, work_us) && l.at.elapsed() < GOOD_FOR)
        {
            return Ok(fresh.found);
        }
        let found = tokio::time::timeout(WORK_LIMIT, self.work(memory_bytes, work_us)).await;
        self.refill();
        let weak = |text: String| Problem::new(ErrorCode::InsufficientCapacity, text);
        let found = found.map_err(|_| {
            weak(format!("a micro-probe was not done within {} ms", WORK_LIMIT.as_millis()))
        })??;
        *last = Some(Last { asked: (memory_bytes, work_us), at: Instant::now(), found });
        Ok(found)
    }

    async fn work(&self, memory_bytes: u64, work_us: u32) -> Result<Probe, Problem> {
        let ahead = lock(&self.ahead).take().filter(|waiting| waiting.process.is_alive());
        let mut waiting = match ahead {
            Some(waiting) => waiting,
            None => self.start()?,
        };
        let mut order = Vec::from(memory_bytes.to_le_bytes());
        order.extend_from_slice(&u64::from(work_us).to_le_bytes());
        let mut answer = Vec::new();
        let asked = async {
            waiting.socket.write_all(&order).await?;
            (&mut waiting.socket).take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await
        };
        let died = |why: String| {
            let text = format!("the process of a micro-probe came to nothing: {why}");
            Problem::new(ErrorCode::InsufficientCapacity, text)
        };
        asked.await.map_err(|e| died(e.to_string()))?;
        serde_json::from_slice(&answer).map_err(|_| match self.group.ran_out_of_memory() {
            true => died("out of memory".to_owned()),
            false => died("it ended without an answer".to_owned()),
        })
    }

    fn start(&self) -> Result<Waiting, Problem> {
        let program = self.spawner.locate()?;
        self.started(&program).map_err(|e| e.problem())
    }

    fn started(&self, program: &Path) -> Result<Waiting, HostError> {
        self.group.create()?;
        let system = |e: std::io::Error| HostError::system("cannot make a socket pair", e);
        let (ours, theirs) = StdUnixStream::pair().map_err(system)?;
        ours.set_nonblocking(true).map_err(system)?;
        let process = Spawn {
            program,
            arguments: vec!["--probe".to_owned()],
            environment: vec![],
            group: &self.group,
            user: None,
            input: std::os::fd::OwnedFd::from(theirs).into(),
            log: Path::new("/dev/null"),
        }
        .start()?;
        Ok(Waiting { process, socket: UnixStream::from_std(ours).map_err(system)? })
    }

    /// Has a process started ahead in a while.
    pub fn refill(&self) {
        let own = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(AHEAD_PAUSE).await;
            let alive = lock(&own.ahead).as_ref().is_some_and(|waiting| waiting.process.is_alive());
            if alive {
                return;
            }
            match own.start() {
                Ok(waiting) => drop(lock(&own.ahead).replace(waiting)),
                Err(problem) => tracing::warn!(%problem, "no micro-probe could be started ahead"),
            }
        });
    }

    /// Lets go of the process that waits, and removes the group once it is empty. Nothing has to be killed, also not what an
    /// earlier daemon left: a probe ends when its socket closes, at the latest after its moment of work.
    pub async fn sweep(&self) {
        drop(lock(&self.ahead).take());
        sweep::remove_group(&self.group).await;
    }
}
