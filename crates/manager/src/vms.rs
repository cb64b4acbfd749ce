//! VMs: define, start, stop, show, and agree with what hosts say that they run.

use crate::core::{Manager, Ordering};
use crate::fleet::Session;
use crate::http::Caller;
use crate::migration::gates::unexpected;
use crate::migration::handover;
use crate::migration::request::{require_host, state_text, unknown_vm};
use api::fleet::{InspectVm, RunningVm, StartVm, StopVm, VmEvent, reply, to_host};
use api::http::{VmInspection, VmView};
use registry::{Enrolment, Location, Tx, VmRow};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use types::inventory::Inventory;
use types::layout::{Catalogue, MAX_CATALOGUE_BYTES};
use types::vm::{VmSpec, VmState};
use types::{Epoch, ErrorCode, HostName, Name, Problem, VmId};

/// Starting a VM checks digests of its files and allocates its memory.
const START_LIMIT: Duration = Duration::from_secs(60);
/// The host may have to make the catalogue first: a dry run has 20 s.
const INSPECT_LIMIT: Duration = Duration::from_secs(25);
/// A host names a few and counts the rest.
const DIFFERENCES_MAX: usize = 16;
const DIFFERENCE_CHARS_MAX: usize = 400;
/// Stopping ends a process.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Enough for every guest that fits a machine.
pub(crate) const REPORTED_LIMIT: usize = 4_096;
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

/// Starts a VM on a host: placed under a fresh epoch first, told second, running when the host says so. It runs to its
/// end in a task of its own, whatever becomes of whoever asked.
///
/// # Errors
/// Why not. The VM stays placed on the host, unless the host's answer means that nothing of it was started there.
pub(crate) async fn start(
    manager: &Arc<Manager>,
    caller: &Caller,
    name: &Name,
    host: &HostName,
) -> Result<VmView, Problem> {
    let (own, caller, name, host) = (Arc::clone(manager), caller.clone(), name.clone(), host.clone());
    in_own_task(manager, async move { started(&own, &caller, &name, &host).await }).await
}

/// An operator who hangs up must not leave an order half done: its answer would be heard by nobody.
async fn in_own_task<T: Send + 'static>(
    manager: &Manager,
    work: impl Future<Output = Result<T, Problem>> + Send + 'static,
) -> Result<T, Problem> {
    let done = manager.tasks.spawn(work).await;
    done.map_err(|e| Problem::new(ErrorCode::Internal, format!("the order was not carried out: {e}")))?
}

/// A start that is on its way.
struct Start {
    row: VmRow,
    at: Location,
    /// No order was ever given under this epoch before, so that the answer to this one is the whole truth.
    fresh: bool,
}

async fn started(
    manager: &Arc<Manager>,
    caller: &Caller,
    name: &Name,
    host: &HostName,
) -> Result<VmView, Problem> {
    manager.must_remember()?;
    let session = manager.fleet.require(host)?;
    let _ordering = ordering(manager, name)?;
    let start = place(manager, caller, name, host).await?;
    let spec_json = serde_json::to_string(&start.row.spec)
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("the spec does not serialise: {e}")))?;
    let order = to_host::Body::StartVm(StartVm { spec_json, epoch: start.at.epoch.0 });
    let outcome = match session.order(order, START_LIMIT).await {
        Ok(reply::Result::Started(started)) => {
            session.holds(start.row.spec.uuid);
            parse_started(host, &started)
        }
        Ok(other) => Err(unexpected(host, "start-vm", &other)),
        Err(problem) if start.fresh && nothing_is_left(&session, &start, &problem).await => {
            return not_started(manager, &start, problem, true).await;
        }
        Err(problem) => Err(problem),
    };
    let (inventory, machine) = match outcome {
        Ok(learned) => learned,
        Err(problem) => return not_started(manager, &start, problem, false).await,
    };
    let mut tx = manager.begin("VM started").await?;
    tx.enrol_inventory(start.row.spec.uuid, &inventory, &machine).await?;
    exactly(tx.set_vm_state(start.row.spec.uuid, &start.at, VmState::Running).await?, &start)?;
    let detail = json!({ "host": host, "machine": machine, "hypervisor": inventory.hypervisor });
    tx.audit(&format!("host/{host}"), "vm.started", name.as_str(), detail).await?;
    let row = tx.vm(start.row.spec.uuid).await?.ok_or_else(|| unknown_vm(name))?;
    let view = view(&mut tx, row).await?;
    tx.commit().await?;
    Ok(view)
}

/// One order about a VM at a time: of two at once, neither answer would say what the other came to.
fn ordering(manager: &Manager, name: &Name) -> Result<Ordering, Problem> {
    manager.ordered.enter(name).ok_or_else(|| {
        let detail = format!("VM {name} is being started or stopped at this moment");
        Problem::new(ErrorCode::WrongState, detail).hint("`outrider vm show` tells when that is done")
    })
}

/// Places the VM, or finds it placed by an order whose answer was lost.
async fn place(manager: &Manager, caller: &Caller, name: &Name, host: &HostName) -> Result<Start, Problem> {
    let mut tx = manager.begin("place a VM").await?;
    crate::trust::must_be_trusted(&mut tx).await?;
    let row = tx.vm_named(name).await?.ok_or_else(|| unknown_vm(name))?;
    let target = require_host(&mut tx, host).await?;
    if target.state == Enrolment::Quarantined {
        return Err(Problem::new(ErrorCode::PolicyDenied, format!("host {host} is quarantined")));
    }
    let epoch = match (&row.host, row.state) {
        (None, _) => {
            not_elsewhere(manager, &row, host)?;
            tx.place_vm(row.spec.uuid, host).await?
        }
        // The answer to an earlier order may have been lost: the same order again is answered the same.
        (Some(at), VmState::Starting | VmState::Failed) if at == host => {
            not_elsewhere(manager, &row, host)?;
            Some(row.epoch)
        }
        _ => None,
    };
    let epoch = epoch.ok_or_else(|| already(&row))?;
    let (at, fresh) = (Location { host: host.clone(), epoch }, row.host.is_none());
    let start = Start { row, at, fresh };
    exactly(tx.set_vm_state(start.row.spec.uuid, &start.at, VmState::Starting).await?, &start)?;
    let detail = json!({ "host": host, "epoch": epoch });
    tx.audit(&caller.audit_name(), "vm.start", name.as_str(), detail).await?;
    tx.commit().await?;
    Ok(start)
}

/// A copy that another host reports may run, whatever the registry says.
fn not_elsewhere(manager: &Manager, row: &VmRow, host: &HostName) -> Result<(), Problem> {
    let Some(other) = manager.fleet.holder_beside(row.spec.uuid, host) else { return Ok(()) };
    let name = &row.spec.name;
    let detail =
        format!("host {other} reports that it holds VM {name}, which the registry does not place there");
    let hint =
        format!("`outrider vm start {name} --on {other}`, then `outrider vm stop {name}`, ends that copy");
    Err(Problem::new(ErrorCode::VmAlreadyRunning, detail).hint(hint))
}

fn exactly(changed: bool, start: &Start) -> Result<(), Problem> {
    if changed {
        return Ok(());
    }
    let Location { host, epoch } = &start.at;
    let detail = format!("VM {} is not on {host} under epoch {} any more", start.row.spec.name, epoch.0);
    Err(Problem::new(ErrorCode::WrongState, detail))
}

/// Whether the host's refusal means that nothing of the VM is there. A closed list: whatever else it says, or that it
/// says nothing, leaves open that it runs.
async fn nothing_is_left(session: &Session, start: &Start, refusal: &Problem) -> bool {
    match refusal.code {
        // Found wrong before anything is started.
        ErrorCode::BadRequest
        | ErrorCode::BadConfiguration
        | ErrorCode::MissingProgram
        | ErrorCode::InsufficientCapacity => true,
        // A hypervisor was started: the host must say that it is gone.
        ErrorCode::HypervisorFailed => {
            let stop = StopVm { vm: start.row.spec.uuid.to_string(), epoch: start.at.epoch.0 };
            matches!(session.order(to_host::Body::StopVm(stop), STOP_LIMIT).await, Ok(reply::Result::Done(_)))
        }
        _ => false,
    }
}

async fn not_started(
    manager: &Manager,
    start: &Start,
    problem: Problem,
    nothing_left: bool,
) -> Result<VmView, Problem> {
    let (name, Location { host, .. }) = (&start.row.spec.name, &start.at);
    let mut tx = manager.begin("VM not started").await?;
    if nothing_left {
        exactly(tx.unplace_vm(start.row.spec.uuid, &start.at, VmState::Defined).await?, start)?;
    }
    let detail =
        json!({ "host": host, "code": problem.code, "detail": problem.detail, "placed": !nothing_left });
    tx.audit(&manager.actor(), "vm.start-failed", name.as_str(), detail).await?;
    tx.commit().await?;
    if nothing_left || problem.hint.is_some() {
        return Err(problem);
    }
    Err(problem.hint(format!(
        "it may run on {host}: start it there again to ask, or `outrider vm stop {name}` to have {host} end it"
    )))
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
    let (own, caller, name) = (Arc::clone(manager), caller.clone(), name.clone());
    in_own_task(manager, async move { stopped(&own, &caller, &name).await }).await
}

async fn stopped(manager: &Arc<Manager>, caller: &Caller, name: &Name) -> Result<VmView, Problem> {
    let _ordering = ordering(manager, name)?;
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
    session.holds_no_more(row.spec.uuid);
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

/// What a VM's stream is compared with: the record, and what the QEMU of the host that runs it makes of its devices.
///
/// # Errors
/// It was never enrolled.
pub(crate) async fn inspect(manager: &Manager, name: &Name) -> Result<VmInspection, Problem> {
    let mut tx = manager.registry.read("inspect a VM").await?;
    let row = tx.vm_named(name).await?.ok_or_else(|| unknown_vm(name))?;
    drop(tx);
    let inventory = row.inventory.ok_or_else(|| {
        Problem::new(ErrorCode::VmNotRunning, format!("VM {name} was never started, so it is not enrolled"))
            .hint(format!("start it: outrider vm start {name} --on HOST"))
    })?;
    let looked = match &row.host {
        Some(host) => look_at(manager, host, row.spec.uuid).await,
        None => Err(Problem::new(
            ErrorCode::VmNotRunning,
            "it runs on no host whose QEMU could describe its devices",
        )),
    };
    let (catalogue, differences) = match looked {
        Ok(look) => (look.catalogue, look.differences),
        Err(problem) => (Err(problem.clone()), Err(problem)),
    };
    let (catalogue, catalogue_missing) = or_why(catalogue);
    let (differences, differences_missing) = or_why(differences);
    Ok(VmInspection {
        vm: name.clone(),
        host: row.host,
        enrolment: types::inventory::Enrolment { inventory, catalogue },
        catalogue_missing,
        differences: differences.unwrap_or_default(),
        differences_missing,
    })
}

fn or_why<T>(answer: Result<T, Problem>) -> (Option<T>, Option<String>) {
    match answer {
        Ok(value) => (Some(value), None),
        Err(problem) => (None, Some(problem.detail)),
    }
}

/// What a host says of a VM that runs there; neither answer stands for the other.
pub(crate) struct Look {
    /// What its QEMU makes of the VM's devices.
    pub(crate) catalogue: Result<Catalogue, Problem>,
    /// How the VM's devices differ from its spec.
    pub(crate) differences: Result<Vec<String>, Problem>,
}

/// Has a host look at one of its VMs.
///
/// # Errors
/// The host is not connected or does not answer.
pub(crate) async fn look_at(manager: &Manager, host: &HostName, vm: VmId) -> Result<Look, Problem> {
    let session = manager.fleet.require(host)?;
    let order = to_host::Body::InspectVm(InspectVm { vm: vm.to_string() });
    let said = match session.order(order, INSPECT_LIMIT).await? {
        reply::Result::Inspected(inspected) => inspected,
        other => return Err(unexpected(host, "inspect-vm", &other)),
    };
    let bad = |detail: &str| Problem::new(ErrorCode::HypervisorFailed, format!("host {host}: {detail}"));
    let bounded = |text: &str| text.chars().take(DIFFERENCE_CHARS_MAX).collect::<String>();
    let catalogue = match said.catalogue_missing.as_str() {
        "" if said.catalogue_json.len() > MAX_CATALOGUE_BYTES => {
            Err(bad("the catalogue is longer than any real one"))
        }
        "" => serde_json::from_str(&said.catalogue_json)
            .map_err(|e| bad(&format!("the catalogue cannot be read: {e}"))),
        why => Err(bad(&bounded(why))),
    };
    let differences = match said.differences_missing.as_str() {
        "" => Ok(said.differences.iter().take(DIFFERENCES_MAX).map(|text| bounded(text)).collect()),
        why => Err(bad(&bounded(why))),
    };
    Ok(Look { catalogue, differences })
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
