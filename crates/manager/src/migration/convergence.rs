//! Before the stream converges: what the permit rested on is looked at once more, while the guest still runs on the
//! source. Whatever has to be fresh when the guest is frozen plugs in at [`before_convergence`].
//!
//! ```text
//!  grant ── looked at ──────────── again every recheck_s, and near the end ──────────── STOP ── commit
//!             └── counts for 60 s; older than that in the transfer: abort                 └── never asked in here
//! ```
//!
//! It goes on beside the reconciler, which never waits for it. What comes back after the guest has stopped changes
//! nothing: the look before it still counts. So the guest is frozen within 60 s of a look that was good.

use crate::attestation;
use crate::clock;
use crate::core::{Manager, Progress};
use crate::migration::facts::reason_of;
use crate::migration::gates::{self, Grounds};
use crate::migration::{Facts, handover, reconcile};
use engine::admission;
use engine::handover::decider::{Event, RowState};
use registry::MigrationRow;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use types::{ErrorCode, MigrationId, Problem, Side};

/// A look counts for this long.
const COUNTS_FOR_US: i64 = 60_000_000;
/// The stream is near its end when so much of the guest's memory, or less, is left of a pass: a quarter.
const NEAR_DIVISOR: u64 = 4;
/// Near the end a look that is older than this is made anew.
const NEAR_AGE_US: i64 = 3_000_000;
/// Between two tries, where a host did not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Every check that has to be good, and at most a minute old, when the guest is frozen: add further ones here. Each may
/// take seconds, and is never waited for by anything that the guest waits for.
///
/// # Errors
/// `host-unreachable` where a host does not answer: asked again until the last good look is too old. Anything else
/// ends the migration, and the guest goes on at the source.
pub(crate) async fn before_convergence(manager: &Arc<Manager>, row: &MigrationRow) -> Result<(), Problem> {
    target_still_holds(manager, row).await?;
    platforms_still_hold(manager, row).await
}

/// Both hosts' platforms, as at the decision: the same machines, in an allowed state, not started anew since.
async fn platforms_still_hold(manager: &Arc<Manager>, row: &MigrationRow) -> Result<(), Problem> {
    let grounds = Grounds::read(&mut manager.registry.read("look again").await?, row).await?;
    attestation::again(manager, row.id, [&grounds.source, &grounds.target]).await
}

/// The target's load, as at the decision; but it has taken the guest's memory meanwhile, and the transfer itself keeps
/// its CPUs and its link busy.
async fn target_still_holds(manager: &Arc<Manager>, row: &MigrationRow) -> Result<(), Problem> {
    let grounds = Grounds::read(&mut manager.registry.read("look again").await?, row).await?;
    let target = gates::live(manager, &grounds.target)?;
    let measured = gates::trusted(manager, &grounds, &target).await?;
    let mut head_room = gates::head_room(manager);
    head_room.limits.cpu_pressure_percent = manager.config.admission.convergence_cpu_pressure_percent;
    (head_room.limits.cpu_used_percent, head_room.limits.link_used_percent) = (u32::MAX, u32::MAX);
    admission::still_holds(gates::demand(&grounds), &measured.load, head_room).map_err(|shortage| {
        let detail = format!("host {} cannot hold VM {} any more: {shortage}", row.target, row.vm_name);
        Problem::new(ErrorCode::InsufficientCapacity, detail)
    })
}

/// What the reconciler does in the transfer: has it looked at anew where that is due.
///
/// # Errors
/// The last good look is older than it may be.
pub(crate) fn watch_over(manager: &Arc<Manager>, row: &MigrationRow, facts: &Facts) -> Result<(), Problem> {
    // Not before the stream moves, never again once the guest has stopped, and not while an operator holds it.
    let in_transfer = facts.connected_us.is_some() && facts.stopped_us.is_none() && facts.frozen_us.is_none();
    if !in_transfer {
        return Ok(());
    }
    let looked_us = facts.looked_us.or(facts.permit_us).unwrap_or(row.requested_at_us);
    let age_us = clock::now_us() - looked_us;
    // A stream that is held does not converge, and a manager that just started has to be given the time to look.
    if !row.suspended && age_us > COUNTS_FOR_US && clock::now_us() - manager.started_us > COUNTS_FOR_US {
        return Err(too_old(row, age_us));
    }
    let every_us = i64::from(manager.config.admission.recheck_s) * 1_000_000;
    let progress = manager.watch.progress(row.id);
    // One is due as soon as the stream flows: short transfers get it as well.
    let first = facts.connected_us > facts.looked_us;
    let due = first || age_us >= every_us || (is_near_end(&progress) && age_us >= NEAR_AGE_US);
    if due && manager.watch.may_send(row.id, (Side::Target, "look-again"), PAUSE) {
        let (own, id) = (Arc::clone(manager), row.id);
        manager.tasks.spawn(async move {
            if let Err(problem) = look_again(&own, id).await {
                tracing::warn!(migration = %id, code = %problem.code, "not looked at again: {}", problem.detail);
            }
        });
    }
    Ok(())
}

fn too_old(row: &MigrationRow, age_us: i64) -> Problem {
    let (age_s, limit_s) = (age_us / 1_000_000, COUNTS_FOR_US / 1_000_000);
    let detail = format!("the last good look at host {} is {age_s} s old, {limit_s} are allowed", row.target);
    Problem::new(ErrorCode::HostUnreachable, detail)
}

const fn is_near_end(progress: &Progress) -> bool {
    progress.memory_bytes > 0 && progress.remaining_bytes <= progress.memory_bytes / NEAR_DIVISOR
}

async fn look_again(manager: &Arc<Manager>, id: MigrationId) -> Result<(), Problem> {
    let row = manager.registry.read("look again").await?.migration(id).await?;
    let Some(row) = row.filter(|row| row.open) else { return Ok(()) };
    let began_us = clock::now_us();
    match before_convergence(manager, &row).await {
        Ok(()) => {
            reconcile::mark(manager, id, |facts, _| facts.looked_us = facts.looked_us.max(Some(began_us)))
                .await
        }
        Err(problem)
            if matches!(problem.code, ErrorCode::HostUnreachable | ErrorCode::RegistryUnavailable) =>
        {
            Err(problem)
        }
        Err(problem) => end(manager, id, &problem).await,
    }
}

/// Ends it, unless the guest has stopped meanwhile: then the look before this one still counts.
async fn end(manager: &Arc<Manager>, id: MigrationId, problem: &Problem) -> Result<(), Problem> {
    let mut tx = manager.begin("end before convergence").await?;
    let Some(row) = tx.migration(id).await?.filter(|row| row.open) else { return Ok(()) };
    let facts = Facts::of(&row)?;
    let wanted = |held: &RowState| matches!(held, RowState::Open(open) if open.abort.is_none());
    let in_transfer = facts.stopped_us.is_none()
        && facts.frozen_us.is_none()
        && handover::read(&row)?.is_some_and(|held| wanted(&held.state));
    if !in_transfer {
        return Ok(());
    }
    let detail = json!({ "migration": id, "code": problem.code, "detail": problem.detail });
    tx.audit(&manager.actor(), "migration.look-again", row.vm_name.as_str(), detail).await?;
    handover::apply_in(&mut tx, &manager.actor(), id, Event::AbortRequested(reason_of(problem))).await?;
    tx.commit().await?;
    manager.wake(id);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_near_when_a_quarter_is_left_and_unknown_is_not_near() {
        let near = |remaining_bytes, memory_bytes| {
            is_near_end(&Progress { remaining_bytes, memory_bytes, ..Progress::default() })
        };
        assert!(near(0, 100) && near(25, 100));
        assert!(!near(26, 100) && !near(0, 0));
    }
}
