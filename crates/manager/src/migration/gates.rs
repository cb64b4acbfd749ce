//! From the source's signed request to the durable grant.
//!
//! Gates in order, cheapest first: both live sessions against their records, policy, the target's measured load,
//! admission; then the VM agents are spawned and give their keys, and the hosts' TPMs quote over them; then reservation, burned epochs, permit and audit
//! entry are **one transaction**. Only after it is the permit signed. Whatever is missing, stale or unreachable
//! refuses (I7).

use crate::attestation::{self, Proof};
use crate::clock;
use crate::config::Demanded;
use crate::core::Manager;
use crate::fleet::Session;
use crate::migration::{Facts, compatibility, permit, probe, request};
use crate::policy::{HostFacts, PlanFacts, Policy, Principal, plans};
use api::fleet::{QueryLoad, SpawnAgent, reply, to_host};
use engine::admission::{self, Demand, HeadRoom, Placed, Promised};
use registry::{Enrolment, HostRow, Location, MigrationRow, Tx, VmRow};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use types::handover::{MigrationRequest, Side};
use types::host::Load;
use types::migration::MigrationState;
use types::permit::HostPart;
use types::vm::VmState;
use types::{Digest, Epoch, ErrorCode, HandoverKey, HostName, Problem};

/// The target measures itself all the time: an answer takes a round trip.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// A guest that is being started or stopped shows in the registry within this.
const CROSS_CHECK_PAUSE: Duration = Duration::from_millis(150);
const CROSS_CHECK_TRIES: u32 = 4;
/// Spawning a process and making a key take milliseconds, except on a loaded host.
const AGENT_LIMIT: Duration = Duration::from_secs(5);

/// The source's signed request came; `statement` is verified to be the source's own. Puts the migration into
/// `deciding`.
///
/// # Errors
/// What is wrong with the request.
pub(crate) async fn requested(
    manager: &Manager,
    tx: &mut Tx,
    from: &HostName,
    statement: &MigrationRequest,
) -> Result<MigrationRow, Problem> {
    let intent = statement.intent.parse().map_err(|_| {
        let detail = "the request answers no operator's intent";
        Problem::new(ErrorCode::Forbidden, detail).hint("hosts do not move VMs on their own in this version")
    })?;
    request::fresh(statement.timestamp_unix_ms)?;
    manager.forgetful.not_burned(statement.timestamp_unix_ms)?;
    if !tx.use_nonce(statement.nonce, from.as_str()).await? {
        return Err(request::replayed(statement.nonce));
    }
    let unknown =
        || Problem::new(ErrorCode::UnknownMigration, "the request answers an intent that is not known");
    let mut row = tx.migration_of_intent(intent).await?.ok_or_else(unknown)?;
    let same = (&row.source, &row.target, row.vm) == (&statement.source, &statement.target, statement.vm);
    if !same || *from != row.source {
        let detail = "the signed request differs from the intent that it answers";
        return Err(Problem::new(ErrorCode::HostMismatch, detail));
    }
    if row.state != MigrationState::Requested || !row.open {
        return Err(Problem::new(ErrorCode::WrongState, format!("migration {} is {}", row.id, row.state)));
    }
    let mut facts = Facts::of(&row)?;
    facts.request_us = Some(tx.now_us());
    (row.state, row.facts) = (MigrationState::Deciding, facts.text());
    tx.save_migration(&row).await?;
    let detail = json!({ "migration": row.id, "nonce": statement.nonce });
    tx.audit(&format!("host/{from}"), "migration.sign-request", row.vm_name.as_str(), detail).await?;
    manager.watch.update(row.id, |_| {});
    Ok(row)
}

/// What a decision rests on.
pub(crate) struct Grounds {
    pub(crate) vm: VmRow,
    pub(crate) source: HostRow,
    pub(crate) target: HostRow,
}

impl Grounds {
    pub(crate) async fn read(tx: &mut Tx, row: &MigrationRow) -> Result<Self, Problem> {
        let vm = tx.vm(row.vm).await?.ok_or_else(|| request::unknown_vm(&row.vm_name))?;
        let source = request::require_host(tx, &row.source).await?;
        let target = request::require_host(tx, &row.target).await?;
        Ok(Self { vm, source, target })
    }

    /// The VM's location, which must be the source, running.
    fn location(&self) -> Result<Location, Problem> {
        let name = &self.vm.spec.name;
        let on_source = self.vm.location().filter(|l| l.host == self.source.spec.name);
        let at = on_source.ok_or_else(|| {
            Problem::new(
                ErrorCode::VmNotOnSource,
                format!("VM {name} is not on {} any more", self.source.name()),
            )
        })?;
        if self.vm.state != VmState::Running {
            return Err(Problem::new(ErrorCode::VmNotRunning, format!("VM {name} is not running any more")));
        }
        Ok(at)
    }
}

/// Passes every gate and grants, or says why not.
///
/// # Errors
/// The refusal.
pub(crate) async fn decide(manager: &Arc<Manager>, row: &MigrationRow) -> Result<(), Problem> {
    manager.must_remember()?;
    let facts = Facts::of(row)?;
    let mut tx = manager.registry.read("grounds of a decision").await?;
    let grounds = Grounds::read(&mut tx, row).await?;
    let policies = manager.policies.refresh(&mut tx).await?;
    let plan = plans::covering(manager, &mut tx, &facts, &grounds).await?;
    drop(tx);
    grounds.location()?;
    let source = live(manager, &grounds.source)?;
    let target = live(manager, &grounds.target)?;
    let by = authorise(manager, &policies.policy, &facts, &grounds, plan.as_ref())?;
    compatibility::check(manager, &grounds).await?;
    let load = trusted(manager, &grounds, &target).await?;
    let promised = promised_on(&mut manager.registry.read("promised").await?, row, load.asked_us).await?;
    admit(manager, &grounds, promised, &load.load)?;
    // The probe goes on while the agents are spawned.
    let (source_key, target_key, ()) = tokio::try_join!(
        spawn(&source, row, Side::Source),
        spawn(&target, row, Side::Target),
        probe::passed(manager, &target)
    )?;
    let sides = [(&grounds.source, &*source, &source_key[..]), (&grounds.target, &*target, &target_key[..])];
    let proofs = attestation::for_permit(manager, row.id, sides).await?;
    // Looked at again: the hosts may have gone, or come back as others, while the agents were spawned.
    live(manager, &grounds.source)?;
    live(manager, &grounds.target)?;
    grant(manager, row, &load, (policies.sequence, &by), [source_key, target_key], &proofs).await
}

/// A load, and when it was asked for (microseconds since the Unix epoch): it shows nothing that came later.
pub(crate) struct Measured {
    pub(crate) load: Load,
    pub(crate) asked_us: i64,
}

/// The target's load, once it contradicts neither its record nor the registry. What a change that is under way may have
/// made is looked at again.
pub(crate) async fn trusted(
    manager: &Manager,
    grounds: &Grounds,
    target: &Session,
) -> Result<Measured, Problem> {
    let mut tries_left = CROSS_CHECK_TRIES;
    loop {
        let asked_us = clock::now_us();
        let load = measured(target).await?;
        let placed = placed_on(manager, target).await?;
        let admission = &manager.config.admission;
        let trust = (admission.claim_percent, admission.demands(Demanded::RunningVms));
        let Err(contradiction) = admission::cross_check(grounds.target.spec.capacity, &placed, &load, trust)
        else {
            return Ok(Measured { load, asked_us });
        };
        tries_left -= 1;
        if tries_left == 0 || !contradiction.may_pass() {
            let detail = format!("host {} is not believed: {contradiction}", target.host);
            return Err(Problem::new(ErrorCode::InsufficientCapacity, detail).hint(
                "compare what runs on the host with `outrider vm list`, and its record with the machine",
            ));
        }
        tokio::time::sleep(CROSS_CHECK_PAUSE).await;
    }
}

/// What the registry knows of a host's guests.
async fn placed_on(manager: &Manager, target: &Session) -> Result<Placed, Problem> {
    let mut tx = manager.registry.read("guests of a target").await?;
    let rows = tx.vms_on(&target.host).await?;
    let open = tx.open_migrations().await?;
    let moving = open.iter().filter(|m| m.source == target.host || m.target == target.host).map(|m| m.vm);
    let moving: BTreeSet<_> = moving.collect();
    let settled = |row: &&VmRow| {
        row.state == VmState::Running
            && !moving.contains(&row.spec.uuid)
            && !manager.ordered.is_under_way(&row.spec.name)
    };
    let must_run = rows.iter().filter(settled).map(|row| row.spec.uuid).collect();
    let may_run = rows.iter().map(|row| row.spec.uuid).chain(moving.iter().copied()).collect();
    Ok(Placed { must_run, may_run })
}

/// The session of a host, checked against its record once more: identity by its certificate, address and MACs.
pub(crate) fn live(manager: &Manager, host: &HostRow) -> Result<Arc<Session>, Problem> {
    let session = manager.fleet.require(host.name())?;
    matches_record(host, session.address, &session.interfaces)?;
    Ok(session)
}

/// Whether a host's address and interfaces are those of its record.
///
/// # Errors
/// `host-mismatch`, naming what differs.
pub(crate) fn matches_record(
    host: &HostRow,
    address: std::net::IpAddr,
    interfaces: &[types::host::Interface],
) -> Result<(), Problem> {
    let name = host.name();
    let mismatch = |detail: String| Err(Problem::new(ErrorCode::HostMismatch, detail));
    if address.to_canonical() != host.spec.control_address.to_canonical() {
        let expected = host.spec.control_address;
        return mismatch(format!("host {name} connects from {address}, its record says {expected}"));
    }
    for mac in &host.spec.macs {
        if !interfaces.iter().any(|i| i.mac.eq_ignore_ascii_case(mac)) {
            return mismatch(format!("host {name} does not report the MAC {mac} of its record"));
        }
    }
    for expected in [host.spec.control_address, host.spec.migration_address] {
        if !interfaces.iter().any(|i| i.addresses.contains(&expected)) {
            return mismatch(format!("host {name} does not report the address {expected} of its record"));
        }
    }
    Ok(())
}

pub(crate) fn authorise(
    manager: &Manager,
    policy: &Policy,
    facts: &Facts,
    grounds: &Grounds,
    plan: Option<&PlanFacts>,
) -> Result<Vec<String>, Problem> {
    let who =
        Principal { name: facts.principal.clone(), role: facts.role.clone(), tenants: facts.tenants.clone() };
    let host = |row: &HostRow| HostFacts {
        name: row.name().clone(),
        zone: row.spec.zone.clone(),
        connected: manager.fleet.session(row.name()).is_some(),
        quarantined: row.state == Enrolment::Quarantined,
        // Its record names a TPM: what follows demands that it proves itself with it.
        attested: row.spec.tpm.is_some(),
    };
    let (source, target) = (host(&grounds.source), host(&grounds.target));
    Ok(policy.migrate(&who, &grounds.vm.spec, (&source, &target), plan)?.by)
}

pub(crate) async fn measured(target: &Session) -> Result<Load, Problem> {
    match target.order(to_host::Body::QueryLoad(QueryLoad {}), LOAD_LIMIT).await? {
        reply::Result::Load(reply) => {
            let load: Load = serde_json::from_str(&reply.load_json).map_err(|e| {
                let detail = format!("host {} reports a load that cannot be read: {e}", target.host);
                Problem::new(ErrorCode::InsufficientCapacity, detail)
            })?;
            target.loaded(load.clone());
            Ok(load)
        }
        other => Err(unexpected(&target.host, "query-load", &other)),
    }
}

/// The problem of a reply of the wrong kind.
pub(crate) fn unexpected(host: &HostName, order: &str, reply: &reply::Result) -> Problem {
    let kind = match reply {
        reply::Result::Error(_) => "error",
        reply::Result::Done(_) => "done",
        reply::Result::Agent(_) => "agent",
        reply::Result::Prepared(_) => "prepared",
        reply::Result::Load(_) => "load",
        reply::Result::Started(_) => "started",
        reply::Result::Inspected(_) => "inspected",
        reply::Result::Quoted(_) => "quoted",
        reply::Result::Hypervisor(_) => "hypervisor",
        reply::Result::Probed(_) => "probed",
    };
    Problem::new(ErrorCode::Internal, format!("host {host} answered {order} with {kind:?}"))
}

/// What is promised on the target, as a load that was asked for at this time shows it.
pub(crate) async fn promised_on(tx: &mut Tx, row: &MigrationRow, asked_us: i64) -> Result<Promised, Problem> {
    let totals = tx.promised_on(&row.target).await?;
    Ok(Promised {
        memory_bytes: totals.memory_bytes,
        vcpus: totals.vcpus,
        vms: totals.vms,
        pending_bytes: tx.pending_on(&row.target, row.id, asked_us).await?,
    })
}

pub(crate) fn admit(
    manager: &Manager,
    grounds: &Grounds,
    promised: Promised,
    load: &Load,
) -> Result<(), Problem> {
    let capacity = grounds.target.spec.capacity;
    admission::admit(demand(grounds), capacity, promised, load, head_room(manager)).map_err(|shortage| {
        let detail =
            format!("host {} has no room for VM {}: {shortage}", grounds.target.name(), grounds.vm.spec.name);
        Problem::new(ErrorCode::InsufficientCapacity, detail)
    })
}

pub(crate) const fn demand(grounds: &Grounds) -> Demand {
    Demand { memory_bytes: grounds.vm.spec.memory_bytes, vcpus: grounds.vm.spec.vcpus }
}

pub(crate) fn head_room(manager: &Manager) -> HeadRoom {
    let config = &manager.config;
    HeadRoom {
        memory_percent: config.head_room_memory_percent,
        limits: config.admission.limits(config.head_room_cpu_pressure_percent),
    }
}

async fn spawn(session: &Session, row: &MigrationRow, side: Side) -> Result<Vec<u8>, Problem> {
    let order = SpawnAgent { migration: row.id.to_string(), side: side.to_string(), vm: row.vm.to_string() };
    match session.order(to_host::Body::SpawnAgent(order), AGENT_LIMIT).await? {
        // An Ed25519 SPKI has 44 bytes; nothing near a kilobyte is a key.
        reply::Result::Agent(agent) if agent.spki_der.len() <= 256 => Ok(agent.spki_der),
        other => Err(unexpected(&session.host, "spawn-agent", &other)),
    }
}

/// The grant: reservation, burned epochs, permit, audit entry, in one transaction; everything that a concurrent
/// decision could have changed is checked in it once more.
async fn grant(
    manager: &Arc<Manager>,
    row: &MigrationRow,
    measured: &Measured,
    (policy_sequence, by): (u64, &[String]),
    agents: [Vec<u8>; 2],
    proofs: &[Option<Proof>; 2],
) -> Result<(), Problem> {
    let mut tx = manager.begin("grant a permit").await?;
    crate::trust::must_be_trusted(&mut tx).await?;
    let mut row = tx
        .migration(row.id)
        .await?
        .ok_or_else(|| Problem::new(ErrorCode::UnknownMigration, format!("migration {} is gone", row.id)))?;
    if row.state != MigrationState::Deciding {
        return Err(Problem::new(ErrorCode::WrongState, format!("migration {} is {}", row.id, row.state)));
    }
    let grounds = Grounds::read(&mut tx, &row).await?;
    still_permitted(manager, &mut tx, &row, &grounds, policy_sequence).await?;
    let at = grounds.location()?;
    let load = &measured.load;
    admit(manager, &grounds, promised_on(&mut tx, &row, measured.asked_us).await?, load)?;
    let (source_epoch, target_epoch) = tx.burn_epochs(row.vm, &at).await?.ok_or_else(|| {
        Problem::new(ErrorCode::VmNotRunning, format!("VM {} is not running where it was", row.vm_name))
    })?;
    let key = HandoverKey { migration: row.id, vm: row.vm, source_epoch, target_epoch };
    let spec = &grounds.vm.spec;
    tx.reserve(row.id, &row.target, row.vm, spec.memory_bytes, spec.vcpus).await?;
    let [source_spki, target_spki] = agents;
    let hosts = [&grounds.source, &grounds.target];
    let [source_quote, target_quote] = attestation::granted(&mut tx, row.id, hosts, proofs).await?;
    let parts = (
        part(&grounds.source, source_spki, source_quote)?,
        part(&grounds.target, target_spki, target_quote)?,
    );
    let features = Facts::of(&row)?.features;
    let claims =
        permit::claims(&manager.config, key, &grounds.vm, parts, journal(&grounds.target)?, features)?;
    tx.add_permit(&claims).await?;
    let mut facts = Facts::of(&row)?;
    facts.looked_us = Some(measured.asked_us);
    (row.state, row.facts) = (MigrationState::Setup, facts.text());
    tx.save_migration(&row).await?;
    let detail = json!({
        "migration": row.id, "vm": row.vm_name, "source": row.source, "target": row.target,
        "epochs": [source_epoch, target_epoch], "nonce": claims.nonce, "spec_digest": claims.spec_digest,
        "policies": by, "policy_sequence": policy_sequence, "plan": facts.plan, "requested_by": row.requested_by,
        "attestation": { "source": source_quote, "target": target_quote },
        "features": claims.features,
        "load": { "memory_available_bytes": load.memory_available_bytes, "scope": load.scope },
    });
    tx.audit(&manager.actor(), "permit.issue", row.vm_name.as_str(), detail).await?;
    tx.commit().await?;
    debug_assert!(source_epoch > Epoch(0), "epoch 0 is the one of VMs that were never placed");
    Ok(())
}

/// The policy set is the one that permitted it, and the plan that it rests on still holds. A decision under another set
/// is made anew.
async fn still_permitted(
    manager: &Manager,
    tx: &mut Tx,
    row: &MigrationRow,
    grounds: &Grounds,
    policy_sequence: u64,
) -> Result<(), Problem> {
    let now = tx.policy_sequence().await?;
    // 0: none was ever applied, and the one of the configuration does not change while the manager runs.
    if now != policy_sequence {
        let detail = format!("policy set {now} came into force while set {policy_sequence} was asked");
        return Err(Problem::new(ErrorCode::WrongState, detail));
    }
    plans::covering(manager, tx, &Facts::of(row)?, grounds).await.map(|_| ())
}

fn part(host: &HostRow, agent_spki: Vec<u8>, quote: Option<Digest>) -> Result<HostPart, Problem> {
    let daemon_key = host.signing_key.clone().ok_or_else(|| not_joined(host))?;
    Ok(HostPart { host: host.name().clone(), agent_spki, daemon_key, quote })
}

fn journal(host: &HostRow) -> Result<types::Nonce, Problem> {
    host.journal.ok_or_else(|| not_joined(host))
}

fn not_joined(host: &HostRow) -> Problem {
    Problem::new(ErrorCode::HostUnreachable, format!("host {} has not joined", host.name()))
}
