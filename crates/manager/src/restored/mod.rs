//! A registry that was set back (restored from a backup, or found to lack what was signed) is reconciled from the hosts,
//! and then decides again: every host says what it holds, the registry follows, everything that may have been used since
//! counts as used, and an operator accepts the loss. One transaction; see docs/runbooks/restore.md.

mod ask;
mod plan;

use crate::checkpoints;
use crate::core::Manager;
use crate::http::Caller;
use crate::migration::{Facts, handover};
use crate::trust;
use api::http::{Reconcile, ReconciledHost, ReconciledVm, Reconciliation};
use ask::Heard;
use engine::handover::decider::{Continuity, HandoverRow, Open, RowState};
use permit::checkpoint::Checkpoint;
use plan::{Known, Plan, Report, Step};
use registry::{AuditVerdict, Enrolment, Location, LogRow, MigrationRow, Standing, Tx};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use types::migration::MigrationState;
use types::permit::PermitClaims;
use types::vm::{VmSpec, VmState};
use types::{Digest, ErrorCode, HostName, MigrationId, Nonce, Problem, VmId};

/// Hosts that may be declared lost at once.
const LOST_LIMIT: usize = 1_000;

/// Says what a reconciliation would do; with `accept`, does it.
///
/// # Errors
/// `wrong-state`: nothing is to be reconciled, or something is in the way. `bad-request`: a lost host that is not.
pub(crate) async fn reconcile(
    manager: &Arc<Manager>,
    caller: &Caller,
    order: &Reconcile,
) -> Result<Reconciliation, Problem> {
    let mut tx = manager.registry.read("reconcile").await?;
    let row = tx.audit_log().await?.filter(|row| row.standing != Standing::Trusted);
    let row = row.ok_or_else(|| {
        Problem::new(ErrorCode::WrongState, "the registry is trusted; there is nothing to reconcile")
    })?;
    let hosts = expected(&mut tx).await?;
    // Entries that were lost can be accepted; entries that were changed stay changed.
    let damage = match tx.verify_audit(None).await? {
        AuditVerdict::Whole { .. } => None,
        AuditVerdict::Broken { first_bad, detail, .. } => Some(format!(
            "the audit log itself is damaged at entry {first_bad} ({detail}): restore a backup from before that"
        )),
    };
    let moving: BTreeSet<VmId> = tx.open_migrations().await?.into_iter().map(|row| row.vm).collect();
    drop(tx);
    let lost = lost(manager, &hosts, &order.lost)?;
    let asked: Vec<HostName> = hosts.iter().filter(|h| !lost.contains(*h)).cloned().collect();
    let heard = ask::all(manager, &asked).await?;
    let missing: Vec<HostName> = asked.iter().filter(|h| !heard.contains_key(*h)).cloned().collect();

    let mut tx = match order.accept {
        true => manager.begin("reconcile the registry").await?,
        false => manager.registry.read("plan a reconciliation").await?,
    };
    let now = tx.audit_log().await?;
    if now.as_ref().is_none_or(|now| (now.standing, now.since_us) != (row.standing, row.since_us)) {
        let detail = "the registry was reconciled, or set back again, in the meantime";
        return Err(Problem::new(ErrorCode::WrongState, detail).hint("ask again"));
    }
    let reports: BTreeMap<HostName, Report> =
        heard.iter().map(|(host, heard)| (host.clone(), heard.report.clone())).collect();
    let ground = ground(&mut tx, &reports).await?;
    let mut plan = plan::plan(&ground.vms, &ground.migrations, &ground.hosts, &reports, &lost);
    plan.blocking.extend(damage);
    plan.blocking.extend(missing.iter().map(|host| {
        format!("host {host} has not told what it holds: let it connect, or declare it lost (its power must be cut)")
    }));
    plan.blocking.extend(manager.forgetful.strangers().into_iter().filter(|h| !lost.contains(h)).filter_map(
        |host| {
            (!ground.hosts.contains(&host)).then(|| {
                format!("host {host} holds a certificate and is not in the registry: enrol it again")
            })
        },
    ));
    // What its hosts said was said before it ended.
    let ended = ground.vms.iter().filter(|(vm, known)| moving.contains(vm) && known.migration.is_none());
    plan.blocking.extend(
        ended.map(|(_, known)| format!("a migration of VM {} has just ended: ask again", known.name)),
    );
    let answer = answer(&row, &hosts, &lost, &missing, &ground, &plan);
    if !order.accept {
        return Ok(answer);
    }
    if let Some(first) = plan.blocking.first() {
        let more = plan.blocking.len() - 1;
        let detail = if more == 0 { first.clone() } else { format!("{first} (and {more} more)") };
        return Err(Problem::new(ErrorCode::WrongState, detail)
            .hint("`outrider audit reconcile` without --accept lists everything that is in the way"));
    }
    let accepted = accept(manager, caller, tx, row, &plan, &heard, &lost).await?;
    Ok(Reconciliation { accepted: true, generation: accepted, ..answer })
}

/// Hosts that may hold something: those that ever joined.
async fn expected(tx: &mut Tx) -> Result<BTreeSet<HostName>, Problem> {
    let joined = |row: &registry::HostRow| row.state != Enrolment::Enrolled || row.signing_key.is_some();
    Ok(tx.hosts().await?.into_iter().filter(joined).map(|row| row.name().clone()).collect())
}

/// The operator's word that hosts are dead. One that is connected is not.
fn lost(
    manager: &Manager,
    hosts: &BTreeSet<HostName>,
    named: &[HostName],
) -> Result<BTreeSet<HostName>, Problem> {
    let bad = |detail: String| Err(Problem::new(ErrorCode::BadRequest, detail));
    if named.len() > LOST_LIMIT {
        return bad(format!("more than {LOST_LIMIT} hosts are declared lost"));
    }
    let strangers = manager.forgetful.strangers();
    for host in named {
        if !hosts.contains(host) && !strangers.contains(host) {
            return bad(format!("no host that ever joined is named {host}"));
        }
        if manager.fleet.session(host).is_some() {
            return bad(format!("host {host} is connected: it is not lost"));
        }
    }
    Ok(named.iter().cloned().collect())
}

/// What the registry remembers.
struct Ground {
    vms: BTreeMap<VmId, Known>,
    migrations: BTreeSet<MigrationId>,
    hosts: BTreeSet<HostName>,
}

async fn ground(tx: &mut Tx, reports: &BTreeMap<HostName, Report>) -> Result<Ground, Problem> {
    let mut migrations = BTreeSet::new();
    let shown: Vec<MigrationId> =
        reports.values().flat_map(|r| r.attempts.iter().map(|a| a.migration)).collect();
    for id in shown {
        if tx.migration(id).await?.is_some() {
            migrations.insert(id);
        }
    }
    let open: BTreeMap<VmId, MigrationId> =
        tx.open_migrations().await?.into_iter().map(|row| (row.vm, row.id)).collect();
    let known = |row: registry::VmRow| {
        let known = Known {
            name: row.spec.name.clone(),
            at: row.location(),
            state: row.state,
            enrolled: row.inventory.is_some(),
            migration: open.get(&row.spec.uuid).copied(),
        };
        (row.spec.uuid, known)
    };
    Ok(Ground {
        vms: tx.vms().await?.into_iter().map(known).collect(),
        migrations,
        hosts: tx.hosts().await?.into_iter().map(|row| row.name().clone()).collect(),
    })
}

async fn accept(
    manager: &Arc<Manager>,
    caller: &Caller,
    mut tx: Tx,
    row: LogRow,
    plan: &Plan,
    heard: &BTreeMap<HostName, Heard>,
    lost: &BTreeSet<HostName>,
) -> Result<u64, Problem> {
    for (vm, step) in &plan.steps {
        apply(&mut tx, *vm, step).await?;
    }
    for (vm, next) in &plan.next_epochs {
        tx.raise_next_epoch(*vm, *next).await?;
    }
    let (permits, join_tokens) = tx.burn_everything().await?;
    let (log, generation) = next_log(&row, heard.values().filter_map(|h| h.checkpoint.as_ref()));
    let fresh = LogRow {
        log,
        generation,
        standing: Standing::Trusted,
        why: String::new(),
        since_us: tx.now_us(),
        first_bad: None,
        accepted_at_us: tx.now_us(),
    };
    tx.put_audit_log(&fresh).await?;
    let remembered: BTreeMap<&HostName, _> = heard
        .iter()
        .filter_map(|(host, h)| Some((host, checkpoints::name_of(h.checkpoint.as_ref()?))))
        .collect();
    let detail = json!({
        "why": row.why, "was": row.standing, "first_bad": row.first_bad, "log": log, "generation": generation,
        "told": heard.keys().collect::<Vec<_>>(), "lost": lost, "remembered": remembered,
        "permits_burned": permits, "join_tokens_burned": join_tokens, "vms": changed(plan),
    });
    tx.audit(&caller.audit_name(), "registry.reconcile", manager.config.name.as_str(), detail).await?;
    tx.commit().await?;
    trust::reconciled(manager, &fresh).await;
    manager.wake_all().await?;
    checkpoints::tell_all(manager).await;
    Ok(generation)
}

/// What is written down of each VM that changes.
fn changed(plan: &Plan) -> BTreeMap<String, String> {
    let told = plan.steps.iter().filter(|(_, step)| !matches!(step, Step::Keep | Step::Leave));
    told.map(|(vm, step)| (vm.to_string(), describe(step))).collect()
}

fn describe(step: &Step) -> String {
    match step {
        Step::Keep => "as the registry has it".to_owned(),
        Step::Leave => "its open migration decides".to_owned(),
        Step::Adopt { at, .. } => format!("is on {} under epoch {}", at.host, at.epoch.0),
        Step::Add { spec, at } => {
            format!("{} was forgotten; it is on {} under epoch {}", spec.name, at.host, at.epoch.0)
        }
        Step::Gone { at } => format!("is not on {} any more", at.host),
        Step::Unplace => "was on a host that is lost".to_owned(),
        Step::TakeUp { claims, .. } => {
            let key = &claims.key.migration;
            format!("hand-over {key} from {} to {} is taken up again", claims.source.host, claims.target.host)
        }
    }
}

async fn apply(tx: &mut Tx, vm: VmId, step: &Step) -> Result<(), Problem> {
    match step {
        Step::Keep | Step::Leave => {}
        Step::Adopt { at, state } => tx.adopt_location(vm, Some(at), *state).await?,
        Step::Add { spec, at } => {
            add(tx, spec).await?;
            tx.adopt_location(vm, Some(at), VmState::Starting).await?;
        }
        Step::Gone { at } => tx.adopt_location(vm, Some(at), VmState::Failed).await?,
        Step::Unplace => tx.adopt_location(vm, None, VmState::Failed).await?,
        Step::TakeUp { claims, permit, token, spec } => {
            if let Some(spec) = spec {
                add(tx, spec).await?;
            }
            take_up(tx, claims, *permit, token).await?;
        }
    }
    Ok(())
}

async fn add(tx: &mut Tx, spec: &VmSpec) -> Result<(), Problem> {
    let known = tx.vm_named(&spec.name).await?;
    if known.is_some() {
        let detail = format!("VM {} ({}) was forgotten, and another VM has its name", spec.name, spec.uuid);
        return Err(Problem::new(ErrorCode::WrongState, detail));
    }
    Ok(tx.add_vm(spec).await?)
}

/// Makes the row of a hand-over that the registry forgot. Nothing of it is proven, nothing new begins, and both sides say
/// where they stand: the hand-over's own rules then find out whether it was committed.
async fn take_up(tx: &mut Tx, claims: &PermitClaims, permit: Digest, token: &[u8]) -> Result<(), Problem> {
    let (id, vm) = (claims.key.migration, claims.key.vm);
    let row = tx.vm(vm).await?.ok_or_else(|| {
        Problem::new(ErrorCode::Internal, format!("VM {vm} of the hand-over {id} is not in the registry"))
    })?;
    let issued_us = i64::try_from(claims.issued_at_unix_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    let facts = Facts {
        features: claims.features.clone(),
        principal: "reconciliation".to_owned(),
        request_us: Some(issued_us),
        permit_us: Some(issued_us),
        // It may have been sent: nothing may be presumed.
        prepare_sent_us: Some(issued_us),
        start_sent_us: Some(issued_us),
        ..Facts::default()
    };
    let attempt = crate::migration::permit::attempt(claims, permit);
    let abort = Some(types::handover::AbortReason {
        code: ErrorCode::AuditBroken,
        detail: "the registry was set back and had forgotten this migration".to_owned(),
    });
    let held = HandoverRow {
        continuity: Continuity::Unproven,
        state: RowState::Open(Open { abort, ..Open::default() }),
        ..HandoverRow::new(&attempt)
    };
    let at = Location { host: claims.source.host.clone(), epoch: claims.key.source_epoch };
    tx.adopt_location(vm, Some(&at), VmState::Migrating).await?;
    tx.raise_next_epoch(vm, claims.key.target_epoch.0.saturating_add(2)).await?;
    tx.add_migration(&MigrationRow {
        id,
        vm,
        vm_name: row.spec.name.clone(),
        source: claims.source.host.clone(),
        target: claims.target.host.clone(),
        state: MigrationState::Aborting,
        open: true,
        suspended: false,
        requested_by: "reconciliation".to_owned(),
        requested_at_us: issued_us,
        ended_at_us: None,
        // Nobody knows the intent any more; the permit's nonce is as unique.
        intent: claims.nonce,
        handover: Some(handover::text(&held)),
        facts: facts.text(),
    })
    .await?;
    tx.add_permit(claims).await?;
    tx.permit_signed(id, permit, token).await?;
    tx.reserve(id, &claims.target.host, vm, row.spec.memory_bytes, row.spec.vcpus).await?;
    Ok(())
}

/// The log goes on under the id that most hosts remember, in a generation above every one that was seen.
fn next_log<'a>(row: &LogRow, remembered: impl Iterator<Item = &'a Checkpoint>) -> (Nonce, u64) {
    let (mut votes, mut highest) = (BTreeMap::<Nonce, usize>::new(), row.generation);
    for checkpoint in remembered {
        *votes.entry(checkpoint.log).or_default() += 1;
        highest = highest.max(checkpoint.generation);
    }
    let own = votes.get(&row.log).copied().unwrap_or(0);
    let most = votes.into_iter().max_by_key(|(_, count)| *count).filter(|(_, count)| *count > own);
    (most.map_or(row.log, |(log, _)| log), highest.saturating_add(1))
}

fn answer(
    row: &LogRow,
    hosts: &BTreeSet<HostName>,
    lost: &BTreeSet<HostName>,
    missing: &[HostName],
    ground: &Ground,
    plan: &Plan,
) -> Reconciliation {
    let state = |host: &HostName| match () {
        () if lost.contains(host) => "lost",
        () if missing.contains(host) => "missing",
        () => "told",
    };
    let name = |vm: &VmId, step: &Step| match (ground.vms.get(vm), step) {
        (Some(known), _) => known.name.to_string(),
        (None, Step::Add { spec, .. }) => spec.name.to_string(),
        (None, _) => vm.to_string(),
    };
    Reconciliation {
        standing: registry_word(row.standing).to_owned(),
        why: row.why.clone(),
        since: crate::clock::rfc3339(row.since_us),
        accepted: false,
        generation: row.generation,
        hosts: hosts
            .iter()
            .map(|host| ReconciledHost { name: host.clone(), state: state(host).to_owned() })
            .collect(),
        vms: plan
            .steps
            .iter()
            .map(|(vm, step)| ReconciledVm { name: name(vm, step), outcome: describe(step) })
            .collect(),
        blocking: plan.blocking.clone(),
    }
}

fn registry_word(standing: Standing) -> &'static str {
    match standing {
        Standing::Trusted => "trusted",
        Standing::Restored => "restored",
        Standing::Distrusted => "distrusted",
    }
}
