//! Suspend, resume, terminate, and the operator's word that a host is dead.

use crate::clock;
use crate::core::Manager;
use crate::http::Caller;
use crate::migration::facts::reason_of;
use crate::migration::{Facts, handover, reconcile};
use engine::handover::decider::{Event, HandoverRow};
use registry::{MigrationRow, Tx};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use types::migration::MigrationState;
use types::{ErrorCode, HostName, MigrationId, Problem, Side};

/// A host acts on a control order at once; the promise is one second in all.
const CONTROL_LIMIT: Duration = Duration::from_millis(900);

/// A manager that said nothing for this long has no hosts any more: they look for another one after three heartbeats.
const MANAGER_SILENT_US: i64 = 30_000_000;

/// What an operator may tell a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Suspend,
    Resume,
    Terminate,
}

impl Order {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Terminate => "terminate",
        }
    }
}

/// Carries out an operator's order.
///
/// # Errors
/// `too-late` past the commit, `wrong-state`, or what the hosts say.
pub(crate) async fn order(
    manager: &Arc<Manager>,
    caller: &Caller,
    id: MigrationId,
    order: Order,
) -> Result<(), Problem> {
    let mut tx = manager.begin("order").await?;
    let row = tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    let held = handover::read(&row)?;
    stoppable(&row, held.as_ref())?;
    // The order is in the audit log before its effect (I6).
    let action = format!("migration.{}", order.as_str());
    tx.audit(&caller.audit_name(), &action, row.vm_name.as_str(), json!({ "migration": id })).await?;
    tx.commit().await?;
    match order {
        Order::Suspend => suspend(manager, caller, &row).await,
        Order::Resume => resume(manager, &row).await,
        Order::Terminate => terminate(manager, caller, &row, "an operator terminated it").await,
    }
}

fn stoppable(row: &MigrationRow, held: Option<&HandoverRow>) -> Result<(), Problem> {
    if held.is_some_and(HandoverRow::is_past_commit) {
        let detail = format!("migration {} is committed: the target owns VM {}", row.id, row.vm_name);
        return Err(Problem::new(ErrorCode::TooLate, detail));
    }
    if !row.open || row.state == MigrationState::Aborting {
        return Err(Problem::new(ErrorCode::WrongState, format!("migration {} is {}", row.id, row.state)));
    }
    Ok(())
}

/// Before the guest stops, suspending holds the relay and the guest runs on. From its STOP onward it means abort: a
/// held relay would hold the guest.
async fn suspend(manager: &Arc<Manager>, caller: &Caller, row: &MigrationRow) -> Result<(), Problem> {
    let facts = Facts::of(row)?;
    if facts.stopped_us.is_some() {
        return terminate(manager, caller, row, "suspended after the guest had stopped").await;
    }
    if facts.started_us.is_none() {
        let detail = format!("migration {} is {}: nothing moves yet", row.id, row.state);
        return Err(
            Problem::new(ErrorCode::WrongState, detail).hint("terminate it, or wait until memory moves")
        );
    }
    // Durable first: a manager that restarts must not take the silence for a stall.
    set_suspended(manager, row.id, true).await?;
    let held = control(manager, row, &row.source, "suspend").await;
    // The target's agent only learns that silence is meant; the source holds alone if the target is away.
    drop(control(manager, row, &row.target, "suspend").await);
    match held {
        Ok(()) => Ok(()),
        Err(problem) => {
            // The guest's STOP may have come first; then the source says so and ends the attempt by itself.
            set_suspended(manager, row.id, false).await?;
            Err(problem)
        }
    }
}

async fn resume(manager: &Arc<Manager>, row: &MigrationRow) -> Result<(), Problem> {
    if !row.suspended {
        return Err(Problem::new(ErrorCode::WrongState, format!("migration {} is not suspended", row.id)));
    }
    control(manager, row, &row.target, "resume").await?;
    control(manager, row, &row.source, "resume").await?;
    set_suspended(manager, row.id, false).await
}

async fn set_suspended(manager: &Arc<Manager>, id: MigrationId, suspended: bool) -> Result<(), Problem> {
    let mut tx = manager.begin("suspended").await?;
    let mut row = tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    let mut facts = Facts::of(&row)?;
    facts.suspended_us = suspended.then(|| tx.now_us());
    (row.suspended, row.facts) = (suspended, facts.text());
    tx.save_migration(&row).await?;
    tx.commit().await?;
    // A transfer that was held starts its time without progress anew.
    manager.watch.update(id, |p| p.moved_us = clock::now_us());
    manager.wake(id);
    Ok(())
}

async fn control(manager: &Manager, row: &MigrationRow, host: &HostName, order: &str) -> Result<(), Problem> {
    let session = manager.fleet.require(host)?;
    session.order(reconcile::control_body(row.id, order), CONTROL_LIMIT).await.map(|_| ())
}

async fn terminate(
    manager: &Arc<Manager>,
    caller: &Caller,
    row: &MigrationRow,
    why: &str,
) -> Result<(), Problem> {
    let problem = Problem::new(ErrorCode::Terminated, format!("{why} ({})", caller.principal.name));
    if matches!(row.state, MigrationState::Requested | MigrationState::Deciding) {
        reconcile::refuse(manager, row, problem.clone()).await?;
        let now = manager.registry.read("terminated").await?.migration(row.id).await?;
        if now.is_none_or(|r| !r.open) {
            manager.wake(row.id);
            return Ok(());
        }
    }
    // Between the grant and the signed permit there is no hand-over yet; it comes within milliseconds.
    for _ in 0..50 {
        let event = Event::AbortRequested(reason_of(&problem));
        match handover::apply(manager, &caller.audit_name(), row.id, event).await {
            Ok(handover::Applied::Taken(_)) => return Ok(()),
            Ok(handover::Applied::Refused(refusal)) => {
                let detail = format!("migration {} cannot be terminated: {refusal}", row.id);
                return Err(Problem::new(ErrorCode::TooLate, detail));
            }
            Err(e) if e.code == ErrorCode::WrongState => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(e) => return Err(e),
        }
    }
    Err(Problem::new(ErrorCode::WrongState, format!("migration {} has no permit yet", row.id)))
}

/// Another manager that was there a moment ago. Which hosts are connected to it only it knows.
async fn another_manager(manager: &Manager, tx: &mut Tx) -> Result<Option<String>, Problem> {
    let own = &manager.config.name;
    let others = tx.managers().await?.into_iter().filter(|row| row.holder.manager != *own);
    let mut there = others.filter(|row| row.silent_us < MANAGER_SILENT_US);
    Ok(there.next().map(|row| row.holder.manager.to_string()))
}

/// The operator's word that a host is dead and will stay so. Break-glass: audited, an admin's act.
///
/// # Errors
/// `wrong-state` where the word changes nothing.
pub(crate) async fn fenced(
    manager: &Arc<Manager>,
    caller: &Caller,
    id: MigrationId,
    side: Side,
) -> Result<(), Problem> {
    let row = manager.registry.read("resolve").await?.migration(id).await?;
    let row = row.filter(|r| r.open).ok_or_else(|| handover::unknown(id))?;
    let host = if side == Side::Source { &row.source } else { &row.target };
    if manager.fleet.session(host).is_some() {
        let detail = format!("host {host} is connected: it is not fenced");
        return Err(Problem::new(ErrorCode::WrongState, detail)
            .hint("make sure that it is powered off, and try again"));
    }
    let mut tx = manager.begin("resolve").await?;
    if let Some(other) = another_manager(manager, &mut tx).await? {
        let detail = format!(
            "manager {other} shares the registry: {host} may be connected to it, and then is not fenced"
        );
        return Err(Problem::new(ErrorCode::WrongState, detail)
            .hint("stop the other managers for half a minute, and try again"));
    }
    let detail = json!({ "migration": id, "fenced": side, "host": host });
    tx.audit(&caller.audit_name(), "migration.resolve", row.vm_name.as_str(), detail).await?;
    tx.commit().await?;
    let event = if side == Side::Source { Event::SourceFenced } else { Event::TargetFenced };
    match handover::apply(manager, &caller.audit_name(), id, event).await? {
        handover::Applied::Taken(_) => Ok(()),
        handover::Applied::Refused(refusal) => {
            Err(Problem::new(ErrorCode::WrongState, format!("the word changes nothing: {refusal}")))
        }
    }
}
