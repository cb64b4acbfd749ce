//! A migration as people see it, and the answer to "what is awaited, and what happens next by itself".

use crate::clock::{between_ms, now_us, rfc3339};
use crate::core::Manager;
use crate::migration::{Facts, handover, reconcile};
use engine::handover::SOURCE_SILENCE_MS;
use engine::handover::decider::{Grounds, HandoverRow, RowState, Voided};
use registry::{MigrationRow, PermitRow, Tx};
use types::migration::{MigrationState, MigrationView, NextAct, PermitView, StageView};
use types::{Problem, Side};

/// The view of a migration.
///
/// # Errors
/// The registry fails.
pub(crate) async fn view(
    manager: &Manager,
    tx: &mut Tx,
    row: &MigrationRow,
) -> Result<MigrationView, Problem> {
    let facts = Facts::of(row)?;
    let held = handover::read(row)?;
    let permit = tx.permit(row.id).await?;
    let vm = tx.vm(row.vm).await?;
    let now = row.ended_at_us.unwrap_or_else(now_us);
    let progress = manager.watch.progress(row.id);
    let (awaiting, next) = waiting(manager, row, &facts, held.as_ref());
    let vm_runs_on = runs_on(row, held.as_ref(), vm.and_then(|v| v.host).map(|h| h.to_string()));
    let since_request = |at: Option<i64>| at.map(|at| between_ms(row.requested_at_us, at));
    Ok(MigrationView {
        id: row.id,
        vm: row.vm_name.clone(),
        source: row.source.clone(),
        target: row.target.clone(),
        state: row.state,
        suspended: row.suspended,
        mode: "precopy".to_owned(),
        multifd_channels: facts.features.multifd_channels,
        compression: facts.features.compression.clone(),
        requested_by: row.requested_by.clone(),
        requested_at: rfc3339(row.requested_at_us),
        ended_at: row.ended_at_us.map(rfc3339),
        vm_runs_on,
        awaiting,
        next,
        attestation: attestation(permit.as_ref()).to_owned(),
        problem: facts.problem.clone().filter(|_| row.state != MigrationState::Completed),
        downtime_ms: facts.downtime_ms,
        total_ms: since_request(facts.released_us),
        request_to_running_ms: since_request(facts.running_us),
        time_to_responsiveness_ms: facts.time_to_responsiveness_ms,
        responsiveness_basis: facts.responsiveness_basis.clone(),
        transferred_bytes: facts.transferred_bytes.max(progress.wire_bytes),
        permit_decision_ms: facts.permit_decision_ms,
        stages: stages(row, &facts, now),
        downtime_parts: facts.downtime_parts.clone(),
        channel: facts.channel.clone(),
        permit: permit.as_ref().and_then(permit_view),
        digests: facts.digests.clone(),
        findings: facts.findings.clone(),
    })
}

/// Which of the two hosts proved its platform for the permit.
fn attestation(permit: Option<&PermitRow>) -> &'static str {
    let proved = |side| permit.is_some_and(|p| p.claims.part(side).quote.is_some());
    match (proved(Side::Source), proved(Side::Target)) {
        (true, true) => "attested",
        (true, false) => "source-attested",
        (false, true) => "target-attested",
        (false, false) => "unattested",
    }
}

fn permit_view(permit: &PermitRow) -> Option<PermitView> {
    let seconds = |s: u64| rfc3339(i64::try_from(s.saturating_mul(1_000_000)).unwrap_or(i64::MAX));
    Some(PermitView {
        id: permit.digest?.to_string(),
        issued_at: seconds(permit.claims.issued_at_unix_s),
        not_after: seconds(permit.claims.not_after_unix_s),
    })
}

/// Where the guest runs: by the decision, and by the receipts, which may be a moment apart.
fn runs_on(row: &MigrationRow, held: Option<&HandoverRow>, place: Option<String>) -> String {
    match held.map(|h| &h.state) {
        Some(RowState::Committed(_)) => format!("{} (committed, not confirmed yet)", row.target),
        Some(RowState::Running { .. }) => row.target.to_string(),
        Some(RowState::Voided(Voided { source_settled: false, .. })) => {
            format!("{} (not confirmed yet)", row.source)
        }
        _ => place.unwrap_or_else(|| "nowhere".to_owned()),
    }
}

/// The paper's stages, by the manager's clock.
fn stages(row: &MigrationRow, facts: &Facts, now: i64) -> Vec<StageView> {
    let marks = [
        ("setup", Some(row.requested_at_us), facts.connected_us),
        ("memory-transfer", facts.connected_us, facts.stopped_us),
        ("switchover", facts.stopped_us, facts.running_us),
        ("network-cleanup", facts.running_us, facts.released_us),
    ];
    let refused = row.state == MigrationState::Refused;
    marks
        .into_iter()
        .filter(|_| !refused)
        .filter_map(|(name, from, to)| {
            let from = from?;
            Some(StageView {
                name: name.to_owned(),
                duration_ms: between_ms(from, to.unwrap_or(now)).max(0.0),
            })
        })
        .collect()
}

fn next(act: &str, at_us: i64) -> Option<NextAct> {
    Some(NextAct { act: act.to_owned(), at: rfc3339(at_us) })
}

fn micros(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// What is awaited, in words, and what happens next by itself.
fn waiting(
    manager: &Manager,
    row: &MigrationRow,
    facts: &Facts,
    held: Option<&HandoverRow>,
) -> (String, Option<NextAct>) {
    if !row.open {
        return ("nothing: it has ended".to_owned(), None);
    }
    match (row.state, held.map(|h| &h.state)) {
        (MigrationState::Requested, _) => {
            let at = row.requested_at_us + reconcile::REQUEST_LIMIT_US;
            (format!("{} to sign the request", row.source), next("it is refused", at))
        }
        (_, None) => ("the gates: hosts, policy, load, agents, permit".to_owned(), None),
        (_, Some(RowState::Open(open))) if open.abort.is_some() => aborting(row, facts, held),
        (_, Some(RowState::Open(_))) => open(manager, row, facts),
        (_, Some(RowState::Committed(_))) => {
            (format!("{} to run the VM and say so (signed)", row.target), None)
        }
        (_, Some(RowState::Running { .. })) => {
            (format!("{} to destroy its frozen copy and say so (signed)", row.source), None)
        }
        (_, Some(RowState::Voided(voided))) => (settling(row, voided), None),
        (_, Some(RowState::Discarded { .. })) => {
            (format!("{} to discard its frozen copy; then start the VM again", row.source), None)
        }
        (_, Some(RowState::Completed { .. })) => {
            let at = facts.running_us.unwrap_or(row.requested_at_us) + handover::RESPONSIVE_LIMIT_US;
            ("the guest's first answer, for the report".to_owned(), next("it is reported without", at))
        }
    }
}

fn open(manager: &Manager, row: &MigrationRow, facts: &Facts) -> (String, Option<NextAct>) {
    if facts.data_address.is_none() {
        let at = facts.prepare_sent_us.map(|at| at + micros(reconcile::PREPARE_LIMIT));
        return (format!("{} to prepare", row.target), at.and_then(|at| next("it is given up", at)));
    }
    if facts.started_us.is_none() {
        let at = facts.start_sent_us.map(|at| at + micros(reconcile::START_LIMIT));
        return (format!("{} to start", row.source), at.and_then(|at| next("it is given up", at)));
    }
    if let Some(stopped) = facts.stopped_us {
        let at = stopped + reconcile::SWITCHOVER_LIMIT_US;
        return ("both votes".to_owned(), next("it is given up", at));
    }
    if row.suspended {
        let run_us =
            i64::try_from(manager.config.budgets.run_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
        let at = facts.permit_us.unwrap_or(row.requested_at_us).saturating_add(run_us);
        return ("an operator to resume or terminate it".to_owned(), next("it is given up", at));
    }
    let moved =
        manager.watch.progress(row.id).moved_us.max(facts.started_us.unwrap_or(0)).max(manager.started_us);
    let at = moved + reconcile::NO_PROGRESS_LIMIT_US;
    ("the memory to be transferred".to_owned(), next("without progress it is given up", at))
}

fn aborting(row: &MigrationRow, facts: &Facts, held: Option<&HandoverRow>) -> (String, Option<NextAct>) {
    let voted = matches!(held.map(|h| &h.state), Some(RowState::Open(o)) if o.source_vote.is_some());
    if !voted {
        return (format!("{} to give up and say so (signed)", row.source), None);
    }
    let what = format!("{} to renounce (signed); until then the source stays frozen", row.target);
    let both = held.is_some_and(HandoverRow::awaits_source);
    let silence_us = i64::try_from(SOURCE_SILENCE_MS * 1_000).unwrap_or(i64::MAX);
    let at = facts.awaits_source_us.filter(|_| both).map(|at| at + silence_us);
    (what, at.and_then(|at| next("both have voted: without a renunciation it is committed", at)))
}

fn settling(row: &MigrationRow, voided: &Voided) -> String {
    let mut parts = Vec::new();
    if !voided.source_settled {
        let how = match voided.grounds {
            Grounds::Renunciation { .. } => "to let the guest run, on the target's renunciation,",
            _ => "to let the guest run",
        };
        parts.push(format!("{} {how} and say so (signed)", row.source));
    }
    if !voided.target_settled {
        parts.push(format!("{} to give up its copy and say so (signed)", row.target));
    }
    parts.join("; ")
}
