//! The shell around `engine::handover::decider`: each event is one transaction that holds the statement, the row, the
//! move of the VM's location (compare-and-swap) and the audit entry. Orders go out after it, from the row.

use crate::core::Manager;
use crate::migration::facts::problem_of;
use crate::migration::{Facts, request};
use api::fleet::{Abort, Commit, Fenced, Forget, Present, Release, Renounced, Void, to_host};
use engine::handover::decider::{
    self, Continuity, Decision, Event, HandoverRow, Move, Order, Outcome, Place, RowState,
};
use engine::handover::{Resolution, source, target};
use registry::{Location, MigrationRow, RegistryError, Tx};
use serde_json::{Value, json};
use std::sync::Arc;
use types::handover::{PriorRunState, Statement};
use types::migration::{DigestsView, MigrationState};
use types::vm::VmState;
use types::{ErrorCode, HandoverKey, HostName, MigrationId, Problem, Side};

/// How long a report waits for the guest's first answer; guests answer within some ten milliseconds.
pub(crate) const RESPONSIVE_LIMIT_US: i64 = 3_000_000;

/// The row as the registry holds it.
pub(crate) fn text(row: &HandoverRow) -> String {
    serde_json::to_string(row).expect("a hand-over row holds text, numbers and lists, all of which serialise")
}

/// The hand-over of a migration, once its permit is signed.
///
/// # Errors
/// A row that this version cannot read.
pub(crate) fn read(row: &MigrationRow) -> Result<Option<HandoverRow>, RegistryError> {
    let parse = |text: &String| {
        serde_json::from_str(text)
            .map_err(|e| RegistryError::Malformed { what: "handover", detail: e.to_string() })
    };
    row.handover.as_ref().map(parse).transpose()
}

/// The registry may have forgotten what it said: no open hand-over is decided by what it remembers any more (H10).
///
/// # Errors
/// The registry fails; then nothing of it is written, and this process decides nothing new all the same.
pub(crate) async fn distrust(manager: &Manager, why: &str, first_bad: Option<u64>) -> Result<(), Problem> {
    // At once: also where it can't be written down.
    manager.forgetful.doubt(why);
    let mut tx = manager.begin("distrust the registry").await?;
    let mut distrusted = Vec::new();
    for mut row in tx.open_migrations().await? {
        let Some(mut held) = read(&row)? else { continue };
        held.continuity = Continuity::Unproven;
        row.handover = Some(text(&held));
        tx.save_migration(&row).await?;
        distrusted.push(row.id);
    }
    let detail = json!({ "why": why, "migrations": distrusted });
    crate::trust::mark(&mut tx, why, first_bad).await?;
    tx.audit(&manager.actor(), "registry.distrust", manager.config.name.as_str(), detail).await?;
    Ok(tx.commit().await?)
}

/// What applying an event came to.
#[derive(Debug)]
pub(crate) enum Applied {
    /// It is durable (again); so the row stands now.
    Taken(Box<HandoverRow>),
    /// The rules refuse it.
    Refused(decider::Refusal),
}

/// Applies one event in one transaction and wakes the reconciler.
///
/// # Errors
/// The registry fails, or the location is not what the row says: then nothing happened.
pub(crate) async fn apply(
    manager: &Arc<Manager>,
    actor: &str,
    id: MigrationId,
    event: Event,
) -> Result<Applied, Problem> {
    let mut tx = manager.begin("hand-over").await?;
    let applied = apply_in(&mut tx, actor, id, event).await?;
    tx.commit().await?;
    manager.wake(id);
    Ok(applied)
}

/// The same inside a transaction.
///
/// # Errors
/// As [`apply`].
pub(crate) async fn apply_in(
    tx: &mut Tx,
    actor: &str,
    id: MigrationId,
    event: Event,
) -> Result<Applied, Problem> {
    let mut row = tx.migration(id).await?.ok_or_else(|| unknown(id))?;
    let Some(held) = read(&row)? else {
        let detail = format!("migration {id} has no hand-over yet");
        return Err(Problem::new(ErrorCode::WrongState, detail));
    };
    let what = describe(&event);
    let mut facts = Facts::of(&row)?;
    match decider::decide(&held, event.clone()) {
        Ok(outcome) => {
            note(&mut facts, &event, &outcome.row, tx.now_us());
            let after = Box::new(outcome.row.clone());
            settle(tx, actor, &mut row, facts, &held, outcome, &what).await?;
            Ok(Applied::Taken(after))
        }
        Err(refusal) => {
            // "Not yet" is said again every second; it is no news.
            if refusal != decider::Refusal::NotYet && row.open {
                let detail = json!({ "migration": id, "event": what, "refusal": refusal.to_string() });
                tx.audit(actor, "handover.refuse", row.vm_name.as_str(), detail).await?;
            }
            Ok(Applied::Refused(refusal))
        }
    }
}

/// Writes what the decider decided.
async fn settle(
    tx: &mut Tx,
    actor: &str,
    row: &mut MigrationRow,
    facts: Facts,
    held: &HandoverRow,
    outcome: Outcome,
    what: &Value,
) -> Result<(), Problem> {
    let was_open = row.open;
    move_location(tx, row, &outcome.decision).await?;
    row.state = state_of(&outcome.row, &facts, row);
    row.handover = Some(text(&outcome.row));
    row.facts = facts.text();
    if was_open && outcome.row.is_final() {
        close_when_reported(tx, row, &facts, &outcome.row).await?;
    }
    tx.save_migration(row).await?;
    if let Some(action) = audited(held, &outcome) {
        let detail = json!({
            "migration": row.id, "event": what, "key": held.key, "location": moved(&outcome.decision),
            "state": row.state,
        });
        tx.audit(actor, action, row.vm_name.as_str(), detail).await?;
    }
    Ok(())
}

fn location(place: &Place) -> Location {
    Location { host: place.host.clone(), epoch: place.epoch }
}

fn moved(decision: &Decision) -> Option<Value> {
    match decision {
        Decision::Keep => None,
        Decision::Commit(m) | Decision::Void(m) | Decision::Discard(m) | Decision::AdoptCommit(m) => {
            Some(json!({ "from": m.from, "to": m.to }))
        }
    }
}

async fn move_location(tx: &mut Tx, row: &MigrationRow, decision: &Decision) -> Result<(), Problem> {
    let (Decision::Commit(Move { from, to })
    | Decision::Void(Move { from, to })
    | Decision::Discard(Move { from, to })
    | Decision::AdoptCommit(Move { from, to })) = decision
    else {
        return Ok(());
    };
    // Exactly (host, epoch), or the whole transaction is dropped (H6, I1).
    if !tx.relocate_vm(row.vm, &location(from), &location(to), VmState::Migrating).await? {
        let detail = format!(
            "the location of VM {} is not {} under epoch {}, as migration {} has it",
            row.vm_name, from.host, from.epoch.0, row.id
        );
        return Err(Problem::new(ErrorCode::Internal, detail));
    }
    Ok(())
}

/// A VM that moved may still be answering the responsiveness probe: the report waits for it a little.
///
/// # Errors
/// The registry fails.
pub(crate) async fn close_when_reported(
    tx: &mut Tx,
    row: &mut MigrationRow,
    facts: &Facts,
    handover: &HandoverRow,
) -> Result<bool, Problem> {
    let moved = matches!(handover.state, RowState::Completed { .. });
    let waited_us = tx.now_us().saturating_sub(facts.running_us.unwrap_or(0));
    if moved && facts.time_to_responsiveness_ms.is_none() && waited_us < RESPONSIVE_LIMIT_US {
        row.state = MigrationState::NetworkCleanup;
        return Ok(false);
    }
    close(tx, row, facts, handover).await?;
    row.state = state_of(handover, facts, row);
    Ok(true)
}

/// Closes a migration whose hand-over is final, once its report is whole or the time for it is over.
///
/// # Errors
/// The registry fails.
pub(crate) async fn close_reported(manager: &Manager, id: MigrationId) -> Result<bool, Problem> {
    let mut tx = manager.begin("close a migration").await?;
    let mut row = tx.migration(id).await?.ok_or_else(|| unknown(id))?;
    let facts = Facts::of(&row)?;
    let Some(held) = read(&row)?.filter(|h| row.open && h.is_final()) else { return Ok(!row.open) };
    if !close_when_reported(&mut tx, &mut row, &facts, &held).await? {
        return Ok(false);
    }
    tx.save_migration(&row).await?;
    tx.commit().await?;
    Ok(true)
}

/// The end: reservation freed, VM no longer migrating, one-open-migration slot free.
async fn close(
    tx: &mut Tx,
    row: &mut MigrationRow,
    facts: &Facts,
    handover: &HandoverRow,
) -> Result<(), Problem> {
    row.open = false;
    row.suspended = false;
    row.ended_at_us = Some(tx.now_us());
    tx.free_reservation(row.id).await?;
    let vm = tx.vm(row.vm).await?.ok_or_else(|| request::unknown_vm(&row.vm_name))?;
    match handover.place() {
        Some(place) => {
            let dead = facts.died_on.as_deref() == Some(place.host.as_str());
            let state = if dead { VmState::Failed } else { VmState::Running };
            tx.set_vm_state(row.vm, &location(&place), state).await?;
        }
        None => {
            if let Some(at) = vm.location() {
                tx.unplace_vm(row.vm, &at, VmState::Failed).await?;
            }
        }
    }
    Ok(())
}

/// Where the migration stands, as people see it.
pub(crate) fn state_of(handover: &HandoverRow, facts: &Facts, row: &MigrationRow) -> MigrationState {
    match &handover.state {
        RowState::Open(open) if open.abort.is_some() => MigrationState::Aborting,
        RowState::Open(_) if facts.stopped_us.is_some() || facts.frozen_us.is_some() => {
            MigrationState::Switchover
        }
        RowState::Open(_) if facts.connected_us.is_some() => MigrationState::MemoryTransfer,
        RowState::Open(_) => MigrationState::Setup,
        RowState::Committed(_) => MigrationState::Committed,
        RowState::Running { .. } => MigrationState::NetworkCleanup,
        RowState::Completed { .. } if row.open => MigrationState::NetworkCleanup,
        RowState::Completed { .. } => MigrationState::Completed,
        RowState::Voided(_) | RowState::Discarded { .. } if !handover.is_final() => MigrationState::Aborting,
        RowState::Voided(_) | RowState::Discarded { .. } => match facts.problem.as_ref().map(|p| p.code) {
            Some(ErrorCode::Terminated | ErrorCode::StreamRejected) => MigrationState::Terminated,
            _ if row.state == MigrationState::Terminated => MigrationState::Terminated,
            _ => MigrationState::Failed,
        },
    }
}

/// What the event adds to the facts.
fn note(facts: &mut Facts, event: &Event, after: &HandoverRow, now_us: i64) {
    let digests = facts.digests.take().unwrap_or(DigestsView { source: None, target: None, matching: false });
    let mut digests = digests;
    match event {
        Event::Statement { statement: Statement::Frozen(vote), .. } => {
            facts.frozen_us.get_or_insert(now_us);
            digests.source = Some(vote.evidence.digest);
        }
        Event::Statement { statement: Statement::Prepared(vote), .. } => {
            digests.target = Some(vote.evidence.digest);
        }
        Event::Statement { statement: Statement::Running(_), .. } => {
            facts.running_us.get_or_insert(now_us);
        }
        Event::Statement { statement: Statement::Released(_), .. } => {
            facts.released_us.get_or_insert(now_us);
        }
        _ => {}
    }
    digests.matching = digests.source.is_some() && digests.source == digests.target;
    if digests.source.is_some() || digests.target.is_some() {
        facts.digests = Some(digests);
    }
    if after.awaits_source() {
        facts.awaits_source_us.get_or_insert(now_us);
    }
    match &after.state {
        RowState::Open(open) => {
            if let Some(reason) = &open.abort {
                facts.abort_us.get_or_insert(now_us);
                facts.blame(problem_of(reason));
            }
        }
        RowState::Committed(_) => {
            facts.committed_us.get_or_insert(now_us);
        }
        RowState::Voided(voided) => {
            facts.abort_us.get_or_insert(now_us);
            facts.blame(problem_of(&voided.reason));
        }
        RowState::Discarded { .. } => {
            let detail = "the target was fenced; the VM restarts from its disk";
            facts.blame(Problem::new(ErrorCode::HostUnreachable, detail));
        }
        RowState::Running { .. } | RowState::Completed { .. } => {}
    }
}

/// The audit entry's action, for what is news.
fn audited(held: &HandoverRow, outcome: &Outcome) -> Option<&'static str> {
    match (&outcome.decision, &outcome.row.state) {
        (Decision::Commit(_), _) => Some("handover.commit"),
        (Decision::Void(_), _) => Some("handover.void"),
        (Decision::Discard(_), _) => Some("handover.discard"),
        (Decision::AdoptCommit(_), _) => Some("handover.adopt-commit"),
        (Decision::Keep, _) if outcome.row == *held => None,
        (Decision::Keep, RowState::Open(_)) => Some("handover.vote-or-abort"),
        (Decision::Keep, RowState::Running { .. }) => Some("handover.running"),
        (Decision::Keep, RowState::Completed { .. }) => Some("handover.completed"),
        (Decision::Keep, _) => Some("handover.settle"),
    }
}

fn describe(event: &Event) -> Value {
    match event {
        Event::Statement { from, statement } => json!({ "from": from, "statement": statement }),
        Event::Renounced(proof) => json!({ "renounced": proof.renunciation }),
        Event::AbortRequested(reason) => json!({ "abort": reason }),
        Event::SourceSilent => json!("source-silent"),
        Event::TargetFenced => json!("target-fenced"),
        Event::SourceFenced => json!("source-fenced"),
    }
}

/// The key that a statement names; `None` for a request, which names none.
pub(crate) fn key_of(statement: &Statement) -> Option<HandoverKey> {
    Some(match statement {
        Statement::Request(_) => return None,
        Statement::Frozen(s) => s.key,
        Statement::NoVote(s) => s.key,
        Statement::Prepared(s) => s.key,
        Statement::Running(s) => s.key,
        Statement::Renounced(s) => s.key,
        Statement::AskRenounce(s) => s.key,
        Statement::Released(s) => s.key,
        Statement::Thawed(s) => s.key,
    })
}

/// The kind of a statement, as the registry names it.
pub(crate) fn kind_of(statement: &Statement) -> &'static str {
    match statement {
        Statement::Request(_) => "request",
        Statement::Frozen(_) => "frozen",
        Statement::NoVote(_) => "no-vote",
        Statement::Prepared(_) => "prepared",
        Statement::Running(_) => "running",
        Statement::Renounced(_) => "renounced",
        Statement::AskRenounce(_) => "ask-renounce",
        Statement::Released(_) => "released",
        Statement::Thawed(_) => "thawed",
    }
}

/// The problem of a migration that is not there.
pub(crate) fn unknown(id: MigrationId) -> Problem {
    Problem::new(ErrorCode::UnknownMigration, format!("no migration has the id {id}"))
}

/// An order of the decider as the host protocol carries it.
pub(crate) struct Addressed {
    /// To which side.
    pub(crate) side: Side,
    /// To whom.
    pub(crate) host: HostName,
    /// What.
    pub(crate) body: to_host::Body,
}

/// Every order that is outstanding, addressed.
pub(crate) fn orders(row: &HandoverRow, target_key: &[u8]) -> Vec<Addressed> {
    decider::outstanding(row).into_iter().map(|order| address(row, order, target_key)).collect()
}

fn address(row: &HandoverRow, order: Order, target_key: &[u8]) -> Addressed {
    let key_json = serde_json::to_string(&row.key).expect("a key holds ids and numbers, which serialise");
    let (side, body) = match order {
        Order::Source(order) => (Side::Source, source_body(row, order, key_json)),
        Order::Target(order) => (Side::Target, target_body(row, order, key_json)),
        Order::ShowRenunciation(proof) => {
            let renounced = Renounced { token: proof.token, target_daemon_key: target_key.to_vec() };
            (Side::Source, to_host::Body::Renounced(renounced))
        }
    };
    let host = match side {
        Side::Source => row.source.clone(),
        Side::Target => row.target.clone(),
    };
    Addressed { side, host, body }
}

fn source_body(row: &HandoverRow, order: source::Order, key_json: String) -> to_host::Body {
    use to_host::Body as B;
    match order {
        source::Order::Abort { reason } => {
            B::Abort(Abort { key_json, code: reason.code.to_string(), detail: reason.detail })
        }
        source::Order::Release => B::Release(Release { key_json }),
        source::Order::Fenced { resolution } => {
            let resolution = match resolution {
                Resolution::Thaw => "thaw",
                Resolution::Discard => "discard",
            };
            B::Fenced(Fenced { key_json, resolution: resolution.to_owned() })
        }
        source::Order::Present => B::Present(Present { key_json }),
        source::Order::Close => forget(row),
        // Not the decider's: an operator's suspend and resume go out as they are asked for.
        source::Order::Suspend | source::Order::Resume => B::Present(Present { key_json }),
    }
}

fn target_body(row: &HandoverRow, order: target::Order, key_json: String) -> to_host::Body {
    use to_host::Body as B;
    match order {
        target::Order::Commit { evidence, prior } => {
            let prior = match prior {
                PriorRunState::Running => "running",
                PriorRunState::Paused => "paused",
            };
            let evidence_json = serde_json::to_string(&evidence)
                .expect("evidence holds a number and a digest, which serialise");
            B::Commit(Commit { key_json, prior: prior.to_owned(), evidence_json })
        }
        target::Order::Abort { reason } => {
            B::Abort(Abort { key_json, code: reason.code.to_string(), detail: reason.detail })
        }
        target::Order::Void { reason } => {
            B::Void(Void { key_json, code: reason.code.to_string(), detail: reason.detail })
        }
        target::Order::Present => B::Present(Present { key_json }),
        target::Order::Close => forget(row),
    }
}

fn forget(row: &HandoverRow) -> to_host::Body {
    to_host::Body::Forget(Forget { migration: row.key.migration.to_string() })
}

/// Remembers that a QEMU of the VM died while the migration was open: what the end makes of it is the end's affair.
///
/// # Errors
/// The registry fails.
pub(crate) async fn note_death(tx: &mut Tx, mut row: MigrationRow, host: &HostName) -> Result<(), Problem> {
    let mut facts = Facts::of(&row)?;
    facts.died_on = Some(host.to_string());
    row.facts = facts.text();
    tx.save_migration(&row).await?;
    let detail = json!({ "migration": row.id });
    tx.audit(&format!("host/{host}"), "vm.died", row.vm_name.as_str(), detail).await?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use types::handover::{AbortReason, SourceVote, StreamEvidence, TargetVote};
    use types::{Digest, Epoch, Nonce, VmId};

    #[test]
    fn the_source_s_silence_counts_from_when_it_is_awaited() {
        let key = HandoverKey {
            migration: MigrationId::from_bytes([1; 16]),
            vm: VmId::from_bytes([2; 16]),
            source_epoch: Epoch(3),
            target_epoch: Epoch(4),
        };
        let permit = Digest::of(b"permit");
        let mut row = HandoverRow {
            key,
            permit,
            source: "a".parse().unwrap(),
            target: "b".parse().unwrap(),
            target_journal: Nonce::from_bytes([5; 16]),
            continuity: Continuity::Proven,
            state: RowState::Open(decider::Open::default()),
        };
        let evidence = StreamEvidence { stream_bytes: 1, digest: Digest::of(b"stream") };
        let reason = AbortReason { code: ErrorCode::Terminated, detail: String::new() };
        let frozen = SourceVote { key, permit, evidence, prior: PriorRunState::Running };
        let prepared = TargetVote { key, permit, evidence };
        let said = |from, statement| Event::Statement { from, statement };
        let events = [
            (10, Event::AbortRequested(reason.clone())),
            (20, said(Side::Source, Statement::Frozen(frozen))),
            (30, said(Side::Target, Statement::Prepared(prepared))),
            (40, Event::AbortRequested(reason)),
        ];
        let mut facts = Facts::default();
        for (at_us, event) in events {
            assert_eq!(facts.awaits_source_us, (at_us > 30).then_some(30));
            row = decider::decide(&row, event.clone()).unwrap().row;
            note(&mut facts, &event, &row, at_us);
        }
        assert_eq!((facts.abort_us, facts.awaits_source_us), (Some(10), Some(30)));
    }
}
