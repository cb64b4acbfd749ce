//! What the hand-over asks of QEMU over its monitors.

use crate::daemon::{Daemon, lock};
use crate::error::HostError;
use crate::qmp::{Heard, Qmp, QmpError};
use crate::vms::instance::Instance;
use engine::handover::target::{QemuStatus, RunState};
use engine::handover::{QemuFacts, source, target};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use types::handover::PriorRunState;
use types::permit::StreamFeatures;
use types::{MigrationId, Nonce};

/// Guests' TCP peers do not notice; QEMU's own default.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// No limit of QEMU's: the agent throttles. (QEMU's default of 128 MiB/s would be the bottleneck.)
const BANDWIDTH_BYTES_PER_SECOND: u64 = 100 << 30;
/// A monitor that does not answer in this time is blocked by a stalled `device` state: `yank` is next.
const BLOCKED_AFTER: Duration = Duration::from_millis(700);
/// How long an ended migration may take to show as ended.
const ENDED_TIMEOUT: Duration = Duration::from_secs(3);
const ENDED_POLL: Duration = Duration::from_millis(3);

/// Capabilities and parameters of a source. No hold before the switchover: it would be downtime.
///
/// # Errors
/// QEMU lacks one, or does not answer.
pub async fn configure_source(qmp: &Qmp, features: &StreamFeatures) -> Result<(), QmpError> {
    let capabilities = [("events", true), ("return-path", true), ("pause-before-switchover", false)];
    set_capabilities(qmp, &capabilities).await?;
    set_multifd(qmp, features).await?;
    let parameters =
        json!({"max-bandwidth": BANDWIDTH_BYTES_PER_SECOND, "downtime-limit": DOWNTIME_LIMIT_MS});
    qmp.execute("migrate-set-parameters", parameters).await.map(|_| ())
}

/// What the permit says of multifd channels. Always said, also when there are none: an earlier attempt may have left
/// others. The capability comes first: some versions refuse the parameters without it.
async fn set_multifd(qmp: &Qmp, features: &StreamFeatures) -> Result<(), QmpError> {
    let channels = features.multifd_channels;
    set_capabilities(qmp, &[("multifd", channels > 0)]).await?;
    if channels == 0 {
        return Ok(());
    }
    // The levels are QEMU's defaults; a higher one would need larger windows in the target's agent.
    let parameters = json!({
        "multifd-channels": channels, "multifd-compression": features.multifd_compression(),
        "multifd-zlib-level": 1, "multifd-zstd-level": 1,
    });
    qmp.execute("migrate-set-parameters", parameters).await.map(|_| ())
}

/// Capabilities of a target, then `migrate-incoming` at a UNIX socket. `late-block-activate` leaves image locks to
/// the source until `cont`; `exit-on-error` off (where this QEMU knows it) keeps the process for the killing to us.
///
/// # Errors
/// QEMU lacks one, or does not answer.
pub async fn configure_target(qmp: &Qmp, socket: &str, features: &StreamFeatures) -> Result<(), QmpError> {
    set_capabilities(qmp, &[("events", true), ("return-path", true), ("late-block-activate", true)]).await?;
    set_multifd(qmp, features).await?;
    let uri = format!("unix:{socket}");
    match qmp.execute("migrate-incoming", json!({"uri": uri, "exit-on-error": false})).await {
        Err(QmpError::Refused { description, .. }) if description.contains("exit-on-error") => {
            qmp.execute("migrate-incoming", json!({"uri": uri})).await.map(|_| ())
        }
        other => other.map(|_| ()),
    }
}

async fn set_capabilities(qmp: &Qmp, wanted: &[(&str, bool)]) -> Result<(), QmpError> {
    let list: Vec<_> = wanted.iter().map(|(name, on)| json!({"capability": name, "state": on})).collect();
    qmp.execute("migrate-set-capabilities", json!({"capabilities": list})).await.map(|_| ())
}

/// The facts that name a QEMU in the journal.
#[must_use]
pub fn facts(instance: &Instance) -> QemuFacts {
    let id = instance.process().id();
    QemuFacts { pid: id.pid, start_time_ticks: id.start_ticks, boot: boot_nonce(&id.boot_id) }
}

fn boot_nonce(boot_id: &str) -> Nonce {
    let digits: String = boot_id.chars().filter(|c| *c != '-').collect();
    digits.parse().unwrap_or(Nonce::from_bytes([0; 16]))
}

/// How the guest stands, when it may be moved at all.
///
/// # Errors
/// The monitor failed.
pub async fn prior(instance: &Instance) -> Result<Option<PriorRunState>, QmpError> {
    Ok(match instance.status().await?.as_str() {
        "running" => Some(PriorRunState::Running),
        "paused" => Some(PriorRunState::Paused),
        _ => None,
    })
}

/// How a target's QEMU stands. What can't be learned counts as still migrating: nothing acts on that.
pub async fn target_status(instance: &Instance) -> QemuStatus {
    let work = async {
        let migration = instance.migration().await?;
        let completed = migration["status"] == "completed";
        let run = match instance.status().await?.as_str() {
            "running" => RunState::Running,
            "paused" => RunState::Paused,
            "prelaunch" if completed => RunState::Paused,
            _ => RunState::InMigrate,
        };
        Ok::<_, QmpError>(QemuStatus { completed, run })
    };
    work.await.unwrap_or_else(|error| {
        tracing::warn!(%error, "the target's QEMU does not say how it stands");
        QemuStatus { completed: false, run: RunState::InMigrate }
    })
}

/// What a recovering source sees of its QEMU.
pub fn source_seen(daemon: &Daemon, migration: MigrationId, instance: Option<&Instance>) -> source::QemuSeen {
    match instance {
        _ if lock(&daemon.journal).superseded(migration) => source::QemuSeen::Superseded,
        Some(i) if i.freezer().is_frozen() => source::QemuSeen::Frozen,
        Some(i) if i.process().is_alive() => source::QemuSeen::Running,
        _ => source::QemuSeen::Dead,
    }
}

/// What a recovering target sees of its QEMU. One that does not answer is asked again: taking a running guest for a
/// paused one, or the other way round, would be a lie.
pub async fn target_seen(
    daemon: &Daemon,
    migration: MigrationId,
    instance: Option<&Instance>,
) -> target::QemuSeen {
    if lock(&daemon.journal).superseded(migration) {
        return target::QemuSeen::Superseded;
    }
    loop {
        let Some(instance) = instance.filter(|i| i.process().is_alive()) else {
            return target::QemuSeen::Dead;
        };
        match instance.status().await {
            Ok(status) if status == "running" => return target::QemuSeen::Running,
            Ok(_) => return target::QemuSeen::Paused,
            Err(error) => {
                tracing::warn!(%error, "waiting for an adopted QEMU to answer");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Ends whatever migration QEMU has, and sees to it that the guest stands as before.
///
/// # Errors
/// It is not known to be so; try again.
pub async fn yank_or_cancel(instance: &Instance, prior: PriorRunState) -> Result<(), HostError> {
    let monitor = unblocked(instance).await?;
    let deadline = Instant::now() + ENDED_TIMEOUT;
    let mut cancelled = false;
    loop {
        let migration = monitor.execute("query-migrate", json!({})).await?;
        match migration["status"].as_str() {
            None | Some("none" | "completed" | "failed" | "cancelled") => break,
            _ if !cancelled => {
                // It may have ended in between: what counts is the status.
                monitor.execute("migrate_cancel", json!({})).await.ok();
                cancelled = true;
            }
            Some(status) if Instant::now() > deadline => {
                yank(instance).await?;
                return Err(HostError::system(
                    format!("QEMU's migration stays in {status}"),
                    std::io::ErrorKind::TimedOut,
                ));
            }
            _ => tokio::time::sleep(ENDED_POLL).await,
        }
    }
    stand_as_before(&monitor, prior, deadline).await
}

/// QEMU's own resume may still be on its way: `cont` only when it stays away, or never comes (`postmigrate`).
async fn stand_as_before(monitor: &Qmp, prior: PriorRunState, deadline: Instant) -> Result<(), HostError> {
    let patience = Instant::now() + Duration::from_millis(50);
    loop {
        let answer = monitor.execute("query-status", json!({})).await?;
        let status = answer["status"].as_str().unwrap_or_default().to_owned();
        match (prior, status.as_str()) {
            (PriorRunState::Running, "running") => return Ok(()),
            (PriorRunState::Paused, "paused" | "postmigrate" | "prelaunch") => return Ok(()),
            (PriorRunState::Running, "postmigrate") => {
                monitor.execute("cont", json!({})).await?;
            }
            (PriorRunState::Running, "paused") if Instant::now() > patience => {
                monitor.execute("cont", json!({})).await?;
            }
            _ if Instant::now() > deadline => {
                return Err(HostError::system(
                    format!("the guest stays in state {status}"),
                    std::io::ErrorKind::TimedOut,
                ));
            }
            _ => tokio::time::sleep(ENDED_POLL).await,
        }
    }
}

/// The first monitor, yanked free when a stalled migration blocks it.
async fn unblocked(instance: &Instance) -> Result<Qmp, QmpError> {
    let attempt = async {
        let monitor = instance.monitor().await?;
        monitor.execute("query-status", json!({})).await.map(|_| monitor)
    };
    match tokio::time::timeout(BLOCKED_AFTER, attempt).await {
        Ok(Ok(monitor)) => Ok(monitor),
        _ => {
            yank(instance).await?;
            let monitor = instance.monitor().await?;
            monitor.execute("query-status", json!({})).await.map(|_| monitor)
        }
    }
}

/// Breaks QEMU's migration connections, out of band. No migration to break is fine.
async fn yank(instance: &Instance) -> Result<(), QmpError> {
    let rescue = instance.rescue().await?;
    match rescue.execute_oob("yank", json!({"instances": [{"type": "migration"}]})).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Announces the guest's addresses: after a hold QEMU's own announcements leave in one millisecond.
///
/// # Errors
/// QEMU refused.
pub async fn announce(qmp: &Qmp) -> Result<(), QmpError> {
    qmp.execute("announce-self", json!({"initial": 50, "max": 550, "rounds": 5, "step": 100}))
        .await
        .map(|_| ())
}

/// Follows STOP and RESUME of a source: the proof rests on it.
#[derive(Debug, Default)]
pub struct RunLog {
    /// When the guest stopped, if it is stopped.
    pub stopped: Option<Instant>,
    resumes: u64,
    /// It resumed after a stop: whatever was sent in between is older than what it ran since.
    moved: bool,
    gap: bool,
}

impl RunLog {
    /// Takes note of what was heard.
    pub fn hear(&mut self, heard: &Heard) {
        match heard {
            Heard::Event(e) if e.name == "STOP" => self.stopped = Some(e.at),
            Heard::Event(e) if e.name == "RESUME" => {
                self.moved |= self.stopped.take().is_some();
                self.resumes += 1;
            }
            Heard::Event(_) => {}
            Heard::Lost | Heard::Closed => self.gap = true,
        }
    }

    /// Whether nothing but a stop happened.
    ///
    /// # Errors
    /// What did.
    pub fn proves_stopped(&self, prior: PriorRunState) -> Result<(), String> {
        if self.gap {
            return Err("the record of QEMU's events has a gap".to_owned());
        }
        match prior {
            _ if self.moved => Err("the guest resumed after it had stopped".to_owned()),
            PriorRunState::Running if self.stopped.is_none() => {
                Err("QEMU did not say that the guest stopped".to_owned())
            }
            PriorRunState::Paused if self.resumes > 0 => {
                Err("a guest that its user had paused was resumed".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Progress for people, from `query-migrate`.
#[must_use]
#[allow(clippy::cast_precision_loss)]
pub fn progress(migration: &Value, stream_bytes: u64, wire_bytes: u64) -> Value {
    let ram = &migration["ram"];
    json!({
        "stream_bytes": stream_bytes, "wire_bytes": wire_bytes,
        "ram_total_bytes": ram["total"].as_u64().unwrap_or(0),
        "ram_remaining_bytes": ram["remaining"].as_u64().unwrap_or(0),
        "dirty_sync_count": ram["dirty-sync-count"].as_u64().unwrap_or(0),
        "mbps": ram["mbps"].as_f64().unwrap_or(0.0),
    })
}

/// How long an earlier migration of the same QEMU may take to clear away behind its end.
const CLEARING_LIMIT: Duration = Duration::from_secs(2);
const CLEARING_PAUSE: Duration = Duration::from_millis(20);

/// Starts to send. A migration that was ended a moment ago may still hold its place in QEMU (with several channels it
/// takes longer): it is asked again for a while.
///
/// # Errors
/// The monitor's.
pub(crate) async fn start(monitor: &Qmp, uri: &str) -> Result<(), QmpError> {
    let deadline = Instant::now() + CLEARING_LIMIT;
    loop {
        match monitor.execute("migrate", json!({"uri": uri})).await {
            Err(QmpError::Refused { description, .. })
                if description.contains("duplicate yank instance") && Instant::now() < deadline =>
            {
                tokio::time::sleep(CLEARING_PAUSE).await;
            }
            outcome => return outcome.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::Event;

    fn check(names: &[&str], prior: PriorRunState, proven: bool) {
        let mut log = RunLog::default();
        for name in names {
            let event = Event { name: (*name).to_owned(), data: Value::Null, at: Instant::now() };
            log.hear(&if *name == "gap" { Heard::Lost } else { Heard::Event(event) });
        }
        assert_eq!(log.proves_stopped(prior).is_ok(), proven, "{names:?} {prior:?}");
    }

    #[test]
    fn only_a_stop_without_a_resume_proves() {
        use PriorRunState::{Paused, Running};
        check(&["MIGRATION", "STOP"], Running, true);
        check(&["STOP", "RESUME"], Running, false);
        check(&["STOP", "RESUME", "STOP"], Running, false);
        check(&[], Running, false);
        check(&["STOP", "gap"], Running, false);
        check(&[], Paused, true);
        check(&["RESUME"], Paused, false);
    }
}
