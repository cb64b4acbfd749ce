//! The operator's request. In this order, each with its own code: nonce and time, VM known, running, source
//! matches, target known, not the source, connected, nothing in flight; then the row and its audit entry, durable
//! before anything is sent.

use crate::clock;
use crate::config::Config;
use crate::core::Manager;
use crate::http::Caller;
use crate::migration::Facts;
use crate::policy::VmAction;
use api::http::Migrate;
use registry::{Enrolment, HostRow, MigrationRow, RegistryError, Tx, VmRow};
use serde_json::json;
use std::sync::Arc;
use types::migration::MigrationState;
use types::permit::StreamFeatures;
use types::vm::VmState;
use types::{ErrorCode, HostName, MigrationId, Nonce, Problem};

/// A request is good for this long before and after the manager's time.
pub(crate) const STALENESS_MS: u64 = 30_000;
/// Nonces are remembered for this long: far beyond the time in which a request is good.
pub(crate) const NONCE_MEMORY_US: i64 = 24 * 3_600 * 1_000_000;

/// Takes a request in.
///
/// # Errors
/// The first gate that it fails.
pub(crate) async fn accept(
    manager: &Arc<Manager>,
    caller: &Caller,
    request: &Migrate,
) -> Result<MigrationId, Problem> {
    fresh(request.timestamp_unix_ms)?;
    manager.forgetful.not_burned(request.timestamp_unix_ms)?;
    let features = features(&manager.config, request)?;
    manager.must_remember()?;
    let mut tx = manager.begin("request a migration").await?;
    crate::trust::must_be_trusted(&mut tx).await?;
    if !tx.use_nonce(request.nonce, &caller.principal.name).await? {
        return Err(replayed(request.nonce));
    }
    seen(manager, &mut tx, caller, &request.vm).await?;
    let gates = gates(manager, &mut tx, request).await;
    let row = match gates {
        Ok((vm, source, target)) => intent(caller, &vm, (source, target), features, request.plan)?,
        Err(problem) => {
            // The nonce stays used: a request that was refused is no more to be replayed than one that was not.
            record_refusal(&mut tx, caller, request, features, &problem).await?;
            let detail = json!({ "vm": request.vm, "target": request.target, "code": problem.code });
            tx.audit(&caller.audit_name(), "migration.refuse", request.vm.as_str(), detail).await?;
            tx.commit().await?;
            return Err(problem);
        }
    };
    tx.add_migration(&row).await.map_err(|e| in_flight(e, &row))?;
    let detail =
        json!({ "migration": row.id, "source": row.source, "target": row.target, "plan": request.plan });
    tx.audit(&caller.audit_name(), "migration.request", row.vm_name.as_str(), detail).await?;
    let lease = manager.leases.take_new(&mut tx, row.id).await?;
    tx.commit().await?;
    manager.leases.keep(lease);
    manager.wake(row.id);
    Ok(row.id)
}

/// A VM that policy does not let the caller see is unknown to it, and nothing is kept of the request.
///
/// # Errors
/// `unknown-vm`.
pub(crate) async fn seen(
    manager: &Manager,
    tx: &mut Tx,
    caller: &Caller,
    name: &types::Name,
) -> Result<(), Problem> {
    let Some(vm) = tx.vm_named(name).await? else { return Ok(()) };
    let held = manager.policies.in_force();
    held.policy.on_vm(&caller.principal, VmAction::View, &vm.spec).map(|_| ()).map_err(|_| unknown_vm(name))
}

/// Whether a time stamp is good.
///
/// # Errors
/// `stale-request`.
pub(crate) fn fresh(timestamp_unix_ms: u64) -> Result<(), Problem> {
    let now_ms = u64::try_from(clock::now_us() / 1_000).unwrap_or(0);
    let off_ms = now_ms.abs_diff(timestamp_unix_ms);
    if off_ms > STALENESS_MS {
        let detail =
            format!("the request is {off_ms} ms away from the manager's time, {STALENESS_MS} are allowed");
        return Err(Problem::new(ErrorCode::StaleRequest, detail).hint("compare the clocks of both machines"));
    }
    Ok(())
}

/// What the stream is to use: as asked, within what this manager allows.
///
/// # Errors
/// `limit-reached` for more channels than allowed, `bad-request` for what makes no sense.
pub(crate) fn features(config: &Config, request: &Migrate) -> Result<StreamFeatures, Problem> {
    let features = StreamFeatures {
        multifd_channels: request.channels.unwrap_or(config.multifd_channels),
        compression: request.compression.clone().unwrap_or_default(),
        ..StreamFeatures::default()
    };
    let (asked, most) = (features.multifd_channels, config.multifd_channels_max);
    if asked > most {
        let detail = format!("{asked} channels were asked for, this manager allows {most}");
        return Err(Problem::new(ErrorCode::LimitReached, detail).hint("see multifd_channels_max"));
    }
    features.check_channels().map_err(|why| Problem::new(ErrorCode::BadRequest, why))?;
    Ok(features)
}

/// The problem of a nonce that was used.
pub(crate) fn replayed(nonce: Nonce) -> Problem {
    Problem::new(ErrorCode::ReplayedRequest, format!("the nonce {nonce} was used before"))
}

fn in_flight(error: RegistryError, row: &MigrationRow) -> Problem {
    match error {
        RegistryError::Exists { .. } => {
            Problem::new(ErrorCode::MigrationInFlight, format!("VM {} has an open migration", row.vm_name))
        }
        other => other.into(),
    }
}

pub(crate) async fn gates(
    manager: &Manager,
    tx: &mut Tx,
    request: &Migrate,
) -> Result<(VmRow, HostName, HostName), Problem> {
    let vm = tx.vm_named(&request.vm).await?.ok_or_else(|| unknown_vm(&request.vm))?;
    // An open migration first: it says more than "not running".
    if let Some(open) = tx.open_migration_of(vm.spec.uuid).await? {
        let detail = format!("VM {} has an open migration, {} ({})", request.vm, open.id, open.state);
        return Err(Problem::new(ErrorCode::MigrationInFlight, detail));
    }
    let source = match (&vm.host, vm.state) {
        (Some(host), VmState::Running | VmState::Migrating) => host.clone(),
        (_, state) => {
            let detail = format!("VM {} is {}, only a running VM moves live", request.vm, state_text(state));
            return Err(Problem::new(ErrorCode::VmNotRunning, detail));
        }
    };
    if let Some(named) = request.source.as_ref().filter(|named| **named != source) {
        require_host(tx, named).await?;
        let detail = format!("VM {} runs on {source}, not on {named}", request.vm);
        return Err(Problem::new(ErrorCode::VmNotOnSource, detail));
    }
    let target = require_host(tx, &request.target).await?;
    if request.target == source {
        let detail = format!("VM {} runs on {source} already", request.vm);
        return Err(Problem::new(ErrorCode::TargetIsSource, detail));
    }
    if target.state == Enrolment::Enrolled {
        let detail = format!("host {} is enrolled, but has not joined", request.target);
        return Err(
            Problem::new(ErrorCode::HostUnreachable, detail).hint("use its join token: `outrider host join`")
        );
    }
    manager.fleet.require(&request.target)?;
    manager.fleet.require(&source)?;
    let open = tx.open_migrations().await?.len();
    if open >= usize::try_from(manager.config.concurrent_migrations).unwrap_or(usize::MAX) {
        let detail = format!("{open} migrations are open, which is the limit");
        return Err(Problem::new(ErrorCode::LimitReached, detail).hint("wait for one to end, then ask again"));
    }
    Ok((vm, source, request.target.clone()))
}

/// A host's record that must be there.
///
/// # Errors
/// `unknown-host`.
pub(crate) async fn require_host(tx: &mut Tx, name: &HostName) -> Result<HostRow, Problem> {
    tx.host(name)
        .await?
        .ok_or_else(|| Problem::new(ErrorCode::UnknownHost, format!("no host is named {name}")))
}

/// The problem of a VM that is not there.
pub(crate) fn unknown_vm(name: &types::Name) -> Problem {
    Problem::new(ErrorCode::UnknownVm, format!("no VM is named {name}"))
}

/// The text of a VM's state.
pub(crate) fn state_text(state: VmState) -> &'static str {
    match state {
        VmState::Defined => "not running",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Migrating => "migrating",
        VmState::Failed => "failed",
    }
}

/// Keeps a refused request as a migration that never opened, where its VM and hosts are known: `migration list`
/// shows what was asked and why it was refused.
async fn record_refusal(
    tx: &mut Tx,
    caller: &Caller,
    request: &Migrate,
    features: StreamFeatures,
    problem: &Problem,
) -> Result<(), Problem> {
    let Some(vm) = tx.vm_named(&request.vm).await? else { return Ok(()) };
    let (Some(source), Some(_)) = (vm.host.clone(), tx.host(&request.target).await?) else { return Ok(()) };
    let mut row = intent(caller, &vm, (source, request.target.clone()), features, request.plan)?;
    let mut facts = Facts::of(&row)?;
    facts.blame(problem.clone());
    row.facts = facts.text();
    (row.open, row.state, row.ended_at_us) = (false, MigrationState::Refused, Some(row.requested_at_us));
    Ok(tx.add_migration(&row).await?)
}

pub(crate) fn intent(
    caller: &Caller,
    vm: &VmRow,
    (source, target): (HostName, HostName),
    features: StreamFeatures,
    plan: Option<Nonce>,
) -> Result<MigrationRow, Problem> {
    let facts = Facts {
        features,
        plan,
        principal: caller.principal.name.clone(),
        role: caller.principal.role.clone(),
        tenants: caller.principal.tenants.clone(),
        ..Facts::default()
    };
    Ok(MigrationRow {
        id: MigrationId::from_bytes(clock::random()?),
        vm: vm.spec.uuid,
        vm_name: vm.spec.name.clone(),
        source,
        target,
        state: MigrationState::Requested,
        open: true,
        suspended: false,
        requested_by: caller.audit_name(),
        requested_at_us: clock::now_us(),
        ended_at_us: None,
        intent: Nonce::from_bytes(clock::random()?),
        handover: None,
        facts: facts.text(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(channels: Option<u16>, compression: Option<&str>, expect: Result<(u16, &str), ErrorCode>) {
        let config = Config { multifd_channels: 2, multifd_channels_max: 8, ..Config::default() };
        let request = Migrate {
            vm: "web-1".parse().unwrap(),
            target: "host-b".parse().unwrap(),
            source: None,
            channels,
            compression: compression.map(str::to_owned),
            plan: None,
            nonce: Nonce::from_bytes([1; 16]),
            timestamp_unix_ms: 0,
        };
        let found = features(&config, &request);
        let found = found.map(|f| (f.multifd_channels, f.compression)).map_err(|problem| problem.code);
        assert_eq!(found, expect.map(|(n, text)| (n, text.to_owned())), "{channels:?} {compression:?}");
    }

    #[test]
    fn channels_are_as_asked_within_the_limit() {
        check(None, None, Ok((2, "")));
        check(Some(0), None, Ok((0, "")));
        check(Some(8), Some("zstd"), Ok((8, "zstd")));
        check(Some(9), None, Err(ErrorCode::LimitReached));
        check(Some(0), Some("zlib"), Err(ErrorCode::BadRequest));
        check(Some(1), Some("qpl"), Err(ErrorCode::BadRequest));
    }
}
