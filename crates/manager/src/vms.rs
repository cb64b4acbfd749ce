//! VMs: define, start, stop, show, and agree with what hosts say that they run.

use crate::core::Manager;
use crate::http::Caller;
use crate::migration::gates::unexpected;
use crate::migration::handover;
use crate::migration::request::{require_host, state_text, unknown_vm};
use api::fleet::{RunningVm, StartVm, StopVm, VmEvent, reply, to_host};
use api::http::VmView;
use registry::{Enrolment, Location, Tx, VmRow};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use types::inventory::Inventory;
use types::vm::{VmSpec, VmState};
use types::{Epoch, ErrorCode, HostName, Name, Problem, VmId};

/// Starting a VM checks digests of its files and allocates its memory.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Stopping ends a process.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Enough for every guest that fits a machine.
const REPORTED_LIMIT: usize = 4_096;
/// An inventory has some hundred sections.
const INVENTORY_LIMIT_BYTES: usize = 1 << 20;

/// Records a VM.
///
/// # Errors
/// `bad-request`, or `already-exists`.
pub(crate) async fn define(manager: &Manager, caller: &Caller, spec: VmSpec) -> Result<VmView, Problem> {
    spec.validate().map_err(|rule| Problem::new(ErrorCode::BadRequest, rule))?;
    let mut tx = manager.begin("define a VM").await?;
    tx.add_vm(&spec).await?;
    let detail = json!({ "uuid": spec.uuid, "spec_digest": spec.digest(), "tenant": spec.tenant });
    tx.audit(&caller.audit_name(), "vm.define", spec.name.as_str(), detail).await?;
    let row = tx.vm(spec.uuid).await?.ok_or_else(|| unknown_vm(&spec.name))?;
    let view = view(&mut tx, row).await?;
    tx.commit().await?;
    Ok(view)
}

/// Starts a VM on a host: placed under a fresh epoch first, told second, running when the host says so.
///
/// # Errors
/// Why not; then no host holds it, or it is known to be failed there.
pub(crate) async fn start(
    manager: &Arc<Manager>,
    caller: &Caller,
    name: &Name,
    host: &HostName,
) -> Result<VmView, Problem> {
    let mut tx = manager.begin("place a VM").await?;
    let row = tx.vm_named(name).await?.ok_or_else(|| unknown_vm(name))?;
    let target = require_host(&mut tx, host).await?;
    if target.state == Enrolment::Quarantined {
        return Err(Problem::new(ErrorCode::PolicyDenied, format!("host {host} is quarantined")));
    }
    let session = manager.fleet.require(host)?;
    let epoch = match (&row.host, row.state) {
        (None, _) => tx.place_vm(row.spec.uuid, host).await?,
        // The answer to an earlier order may have been lost: the same order again is answered the same.
        (Some(at), VmState::Starting | VmState::Failed) if at == host => Some(row.epoch),
        _ => None,
    };
    let epoch = epoch.ok_or_else(|| already(&row))?;
    let at = Location { host: host.clone(), epoch };
    tx.set_vm_state(row.spec.uuid, &at, VmState::Starting).await?;
    let detail = json!({ "host": host, "epoch": epoch });
    tx.audit(&caller.audit_name(), "vm.start", name.as_str(), detail).await?;
    tx.commit().await?;

    let spec_json = serde_json::to_string(&row.spec)
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("the spec does not serialise: {e}")))?;
    let order = to_host::Body::StartVm(StartVm { spec_json, epoch: epoch.0 });
    let outcome = match session.order(order, START_LIMIT).await {
        Ok(reply::Result::Started(started)) => parse_started(host, &started),
        Ok(other) => Err(unexpected(host, "start-vm", &other)),
        Err(problem) => Err(problem),
    };
    let mut tx = manager.begin("VM started").await?;
    match outcome {
        Ok((inventory, machine)) => {
            tx.enrol_inventory(row.spec.uuid, &inventory, &machine).await?;
            tx.set_vm_state(row.spec.uuid, &at, VmState::Running).await?;
            let detail = json!({ "host": host, "machine": machine, "hypervisor": inventory.hypervisor });
            tx.audit(&format!("host/{host}"), "vm.started", name.as_str(), detail).await?;
        }
        Err(problem) => {
            // A host that answered "no" has none of it. One that did not answer may have it: then it stays placed,
            // and only that host (or its word) can change it.
            if problem.code != ErrorCode::HostUnreachable {
                tx.unplace_vm(row.spec.uuid, &at, VmState::Defined).await?;
            }
            let detail = json!({ "host": host, "code": problem.code, "detail": problem.detail });
            tx.audit(&manager.actor(), "vm.start-failed", name.as_str(), detail).await?;
            tx.commit().await?;
            return Err(problem);
        }
    }
    let row = tx.vm(row.spec.uuid).await?.ok_or_else(|| unknown_vm(name))?;
    let view = view(&mut tx, row).await?;
    tx.commit().await?;
    Ok(view)
}

fn already(row: &VmRow) -> Problem {
    let at = row.host.as_ref().map_or_else(String::new, |h| format!(" on {h}"));
    let detail = format!("VM {} is {}{at}", row.spec.name, state_text(row.state));
    if row.state == VmState::Failed {
        // Its host must say that nothing of it is left, or it could run twice.
        let hint = format!(
            "`outrider vm stop {}` has its host confirm that it is gone; then start it",
            row.spec.name
        );
        return Problem::new(ErrorCode::WrongState, detail).hint(hint);
    }
    Problem::new(ErrorCode::VmAlreadyRunning, detail)
}

fn parse_started(host: &HostName, started: &api::fleet::Started) -> Result<(Inventory, String), Problem> {
    let bad = |detail: String| Problem::new(ErrorCode::HypervisorFailed, format!("host {host}: {detail}"));
    if started.inventory_json.len() > INVENTORY_LIMIT_BYTES {
        return Err(bad("the inventory is longer than any real one".to_owned()));
    }
    let inventory: Inventory = serde_json::from_str(&started.inventory_json)
        .map_err(|e| bad(format!("the inventory cannot be read: {e}")))?;
    if inventory.ram_blocks.is_empty() {
        return Err(bad("the inventory names no RAM block".to_owned()));
    }
    Ok((inventory, started.machine.chars().take(64).collect()))
}

/// Stops a VM.
///
/// # Errors
/// Why not.
pub(crate) async fn stop(manager: &Arc<Manager>, caller: &Caller, name: &Name) -> Result<VmView, Problem> {
    let mut tx = manager.begin("stop a VM").await?;
    let row = tx.vm_named(name).await?.ok_or_else(|| unknown_vm(name))?;
    if let Some(open) = tx.open_migration_of(row.spec.uuid).await? {
        let detail = format!("VM {name} has an open migration, {} ({})", open.id, open.state);
        return Err(Problem::new(ErrorCode::MigrationInFlight, detail).hint("terminate the migration first"));
    }
    let at = row.location().ok_or_else(|| {
        Problem::new(ErrorCode::VmNotRunning, format!("VM {name} is {}", state_text(row.state)))
    })?;
    let session = manager.fleet.require(&at.host)?;
    tx.audit(&caller.audit_name(), "vm.stop", name.as_str(), json!({ "host": at.host, "epoch": at.epoch }))
        .await?;
    tx.commit().await?;
    let order = StopVm { vm: row.spec.uuid.to_string(), epoch: at.epoch.0 };
    match session.order(to_host::Body::StopVm(order), STOP_LIMIT).await {
        Ok(_) => {}
        // It is gone there already.
        Err(problem) if matches!(problem.code, ErrorCode::UnknownVm | ErrorCode::VmNotRunning) => {}
        Err(problem) => return Err(problem),
    }
    let mut tx = manager.begin("VM stopped").await?;
    if tx.unplace_vm(row.spec.uuid, &at, VmState::Defined).await? {
        tx.audit(&format!("host/{}", at.host), "vm.stopped", name.as_str(), json!({})).await?;
    }
    let row = tx.vm(row.spec.uuid).await?.ok_or_else(|| unknown_vm(name))?;
    let view = view(&mut tx, row).await?;
    tx.commit().await?;
    Ok(view)
}

/// A VM as the API shows it.
///
/// # Errors
/// The registry fails.
pub(crate) async fn view(tx: &mut Tx, row: VmRow) -> Result<VmView, Problem> {
    let migration = tx.open_migration_of(row.spec.uuid).await?.map(|m| m.id);
    Ok(VmView {
        spec_digest: row.spec_digest.to_string(),
        state: row.state,
        host: row.host,
        epoch: row.epoch.0,
        migration,
        inventory: row.inventory,
        spec: row.spec,
    })
}

/// A host says that one of its VMs changed. While a migration is open, its statements say what counts.
///
/// # Errors
/// A malformed event, or the registry.
pub(crate) async fn reported(manager: &Manager, host: &HostName, event: &VmEvent) -> Result<(), Problem> {
    let id: VmId =
        event.vm.parse().map_err(|_| Problem::new(ErrorCode::BadRequest, "a VM event names no VM"))?;
    let state = match event.state.as_str() {
        "running" | "paused" => VmState::Running,
        "failed" | "dead" | "crashed" => VmState::Failed,
        "stopped" | "shutdown" => VmState::Defined,
        _ => return Ok(()),
    };
    let mut tx = manager.begin("VM event").await?;
    let Some(row) = tx.vm(id).await? else { return Ok(()) };
    if let Some(open) = tx.open_migration_of(id).await? {
        if state == VmState::Failed && (open.source == *host || open.target == *host) {
            handover::note_death(&mut tx, open, host).await?;
            tx.commit().await?;
        }
        return Ok(());
    }
    let Some(at) = row.location().filter(|at| at.host == *host) else { return Ok(()) };
    if row.state == state || row.state == VmState::Starting {
        return Ok(());
    }
    if state == VmState::Defined {
        tx.unplace_vm(id, &at, VmState::Defined).await?;
    } else {
        tx.set_vm_state(id, &at, state).await?;
    }
    let detail: String = event.detail.chars().take(1_000).collect();
    let detail = json!({ "state": state, "detail": detail });
    tx.audit(&format!("host/{host}"), "vm.state", row.spec.name.as_str(), detail).await?;
    Ok(tx.commit().await?)
}

/// What a host runs against what the registry places there. Nothing is ever stopped on this: a copy that looks stale
/// may be the rightful one (handover rule 8).
///
/// # Errors
/// The registry fails.
pub(crate) async fn reconcile(
    manager: &Manager,
    host: &HostName,
    reported: &[RunningVm],
) -> Result<(), Problem> {
    let there: Vec<(VmId, Epoch)> = reported
        .iter()
        .take(REPORTED_LIMIT)
        .filter(|vm| matches!(vm.state.as_str(), "running" | "paused"))
        .filter_map(|vm| Some((vm.vm.parse().ok()?, Epoch(vm.epoch))))
        .collect();
    let mut tx = manager.begin("reconcile VMs").await?;
    let placed = tx.vms_on(host).await?;
    for row in &placed {
        let Some(at) = row.location() else { continue };
        if tx.open_migration_of(row.spec.uuid).await?.is_some() {
            continue;
        }
        let runs = there.iter().any(|(vm, _)| *vm == row.spec.uuid);
        let state = match (row.state, runs) {
            (VmState::Failed | VmState::Migrating, true) => VmState::Running,
            // Without its inventory a VM that runs is still "starting": the same start order enrols it.
            (VmState::Starting, true) if row.inventory.is_some() => VmState::Running,
            (VmState::Running | VmState::Migrating, false) => VmState::Failed,
            _ => continue,
        };
        tx.set_vm_state(row.spec.uuid, &at, state).await?;
        let detail = json!({ "state": state, "reported": runs });
        tx.audit(&format!("host/{host}"), "vm.reconcile", row.spec.name.as_str(), detail).await?;
    }
    for (vm, epoch) in &there {
        if !placed.iter().any(|row| row.spec.uuid == *vm) {
            tracing::warn!(%host, vm = %vm, epoch = epoch.0, "runs a VM that the registry places elsewhere");
        }
    }
    Ok(tx.commit().await?)
}
