//! The micro-probe of a target, and what it is judged by. docs/admission.md says what it is worth: it finds a host that
//! is overloaded now, not one that lies.

use crate::core::Manager;
use crate::fleet::Session;
use crate::migration::gates::unexpected;
use api::fleet::{MicroProbe, reply, to_host};
use engine::admission::{Weakness, judge_probe};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use types::host::Probe;
use types::{ErrorCode, HostName, Problem};

/// From the first order to the last answer. The work takes some 30 ms; a host that needs this long has no room.
const PROBE_LIMIT: Duration = Duration::from_millis(500);
/// The scheduler may take the CPU away for as long as a probe computes: what is weak once may have been unlucky.
const TRIES: u32 = 3;
/// A host gives the same answer again for less than this.
const PAUSE: Duration = Duration::from_millis(60);
/// Earlier probes of one host that count.
const HISTORY: usize = 15;
/// Five numbers.
const ANSWER_BYTES_MAX: usize = 1_024;

/// What hosts did in earlier probes that they passed, units of work per millisecond. Gone with the process: the first
/// probes after a start are judged by the demands alone.
#[derive(Debug, Default)]
pub(crate) struct History(Mutex<BTreeMap<HostName, VecDeque<f64>>>);

impl History {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostName, VecDeque<f64>>> {
        self.0.lock().expect("no holder of this lock can panic: it only moves values in a map")
    }

    fn of(&self, host: &HostName) -> Vec<f64> {
        self.lock().get(host).map(|rates| rates.iter().copied().collect()).unwrap_or_default()
    }

    /// Only known hosts get here, so that the map is no longer than the fleet.
    fn add(&self, host: &HostName, rate: f64) {
        let mut all = self.lock();
        let rates = all.entry(host.clone()).or_default();
        if rates.len() >= HISTORY {
            rates.pop_front();
        }
        rates.push_back(rate);
    }
}

/// Has the target prove that it can do a moment's work, unless this manager's configuration leaves that out.
///
/// # Errors
/// `insufficient-capacity`: it is too slow, or does not do it in time.
pub(crate) async fn passed(manager: &Manager, target: &Session) -> Result<(), Problem> {
    let admission = &manager.config.admission;
    if admission.probe_mib == 0 {
        return Ok(());
    }
    let deadline = Instant::now() + PROBE_LIMIT;
    let mut tried = 0;
    loop {
        tried += 1;
        let again = match tried_once(manager, target, deadline).await? {
            Ok(()) => return Ok(()),
            Err(why) => why,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if tried == TRIES || left <= 2 * PAUSE {
            return Err(weak(target, again.to_string()));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One probe; the inner error may be bad luck.
async fn tried_once(
    manager: &Manager,
    target: &Session,
    deadline: Instant,
) -> Result<Result<(), Weakness>, Problem> {
    let admission = &manager.config.admission;
    let asked_bytes = u64::from(admission.probe_mib) << 20;
    let limit = deadline.saturating_duration_since(Instant::now());
    let found = ask(target, (asked_bytes, admission.probe_work_us), limit).await?;
    let history = manager.probes.of(&target.host);
    let judged = judge_probe(asked_bytes, &found, &history, admission.probe_demands());
    if let (Ok(()), Some(rate)) = (&judged, found.units_per_ms()) {
        manager.probes.add(&target.host, rate);
    }
    Ok(judged)
}

async fn ask(
    target: &Session,
    (memory_bytes, work_us): (u64, u32),
    limit: Duration,
) -> Result<Probe, Problem> {
    let order = to_host::Body::MicroProbe(MicroProbe { memory_bytes, work_us });
    match target.order(order, limit).await {
        Ok(reply::Result::Probed(said)) if said.probe_json.len() <= ANSWER_BYTES_MAX => {
            serde_json::from_str(&said.probe_json)
                .map_err(|e| weak(target, format!("it cannot be read: {e}")))
        }
        Ok(reply::Result::Probed(_)) => Err(weak(target, "it is longer than five numbers can be".to_owned())),
        Ok(other) => Err(unexpected(&target.host, "micro-probe", &other)),
        Err(problem) if problem.code == ErrorCode::HostUnreachable => Err(weak(target, problem.detail)),
        // A daemon of an earlier version does not know the order.
        Err(problem) if problem.code == ErrorCode::BadRequest => Err(weak(target, problem.detail)
            .hint("bring the host's daemon up to date, or leave the probe out: [admission] probe_mib = 0")),
        Err(problem) => Err(problem),
    }
}

fn weak(target: &Session, why: String) -> Problem {
    let detail = format!("the micro-probe of host {}: {why}", target.host);
    Problem::new(ErrorCode::InsufficientCapacity, detail)
}
