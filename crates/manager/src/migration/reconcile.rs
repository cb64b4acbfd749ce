//! One task per open migration. It works from the row: what the row says is not done yet is done (again), with a
//! deadline; a wake-up carries nothing, so that a restarted manager does exactly what a woken one does.

use crate::clock;
use crate::core::Manager;
use crate::fleet::order_text;
use crate::leases;
use crate::migration::facts::reason_of;
use crate::migration::handover::Addressed;
use crate::migration::{Facts, convergence, gates, handover, permit};
use api::fleet::{Control, Decline, Forget, Intent, PrepareTarget, Renounce, StartSource, reply, to_host};
use engine::handover::decider::{Continuity, Event, HandoverRow, RowState};
use engine::handover::{RESEND_MS, SOURCE_SILENCE_MS};
use registry::MigrationRow;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use types::handover::{NoVote, Statement};
use types::migration::MigrationState;
use types::{ErrorCode, HostName, MigrationId, Problem, Side};

/// The source answers an intent by signing: milliseconds, unless it is gone.
pub(crate) const REQUEST_LIMIT_US: i64 = 10_000_000;
/// Everything between the signed request and the permit.
const DECISION_LIMIT: Duration = Duration::from_secs(15);
/// Preparing a target starts a QEMU with all of the guest's memory.
pub(crate) const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// Starting the source connects two agents and shakes hands.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(20);
/// Agents report at least once a second while they relay; a stream that stands this long does not end by itself.
pub(crate) const NO_PROGRESS_LIMIT_US: i64 = 15_000_000;
/// From the guest's STOP to both votes; the hosts' own limits are shorter and come first.
pub(crate) const SWITCHOVER_LIMIT_US: i64 = 10_000_000;
/// How long a finished migration tells its hosts so; after that they hear it when they next speak of it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(10);

/// Runs until the migration is closed or the manager ends.
pub(crate) async fn run(manager: Arc<Manager>, id: MigrationId) {
    let notify = manager.watch.notify(id);
    loop {
        let next = match leases::ours(&manager, id).await {
            Ok(true) => step(&manager, id).await,
            Ok(false) => Ok(Step::Wait(leases::LOOK_AGAIN)),
            Err(problem) => Err(problem),
        };
        let pause = match next {
            Ok(Step::Closed) => break,
            Ok(Step::Again) => Duration::ZERO,
            Ok(Step::Wait(pause)) => pause,
            Err(problem) => {
                // The registry fails closed; the migration stands where it stands, and is looked at again.
                tracing::warn!(migration = %id, code = %problem.code, "cannot reconcile: {}", problem.detail);
                Duration::from_millis(RESEND_MS)
            }
        };
        tokio::select! {
            () = manager.shutdown.cancelled() => return,
            () = notify.notified(), if !pause.is_zero() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
    farewell(&manager, id).await;
    manager.watch.leave(id);
}

/// What comes next for a migration.
pub(crate) enum Step {
    /// It is closed.
    Closed,
    /// The row changed: look again at once.
    Again,
    /// Nothing more to do until something changes, or for so long.
    Wait(Duration),
}

async fn step(manager: &Arc<Manager>, id: MigrationId) -> Result<Step, Problem> {
    let row = manager.registry.read("reconcile").await?.migration(id).await?;
    let row = row.ok_or_else(|| handover::unknown(id))?;
    if !row.open {
        return Ok(Step::Closed);
    }
    let facts = Facts::of(&row)?;
    match row.state {
        MigrationState::Requested => request(manager, &row).await,
        MigrationState::Deciding => decide(manager, &row).await,
        _ => match handover::read(&row)? {
            None => permit::sign(manager, &row).await.map(|()| Step::Again),
            Some(held) => hand_over(manager, &row, &facts, &held).await,
        },
    }
}

/// Hands the operator's intent to the source, which answers with its signed request.
async fn request(manager: &Arc<Manager>, row: &MigrationRow) -> Result<Step, Problem> {
    let left_us = row.requested_at_us + REQUEST_LIMIT_US - clock::now_us();
    if left_us <= 0 {
        let detail = format!("host {} did not sign the request in time", row.source);
        return refuse(manager, row, Problem::new(ErrorCode::HostUnreachable, detail)).await;
    }
    let order =
        Intent { intent: row.intent.to_string(), vm: row.vm.to_string(), target: row.target.to_string() };
    let body = to_host::Body::Intent(order);
    send(manager, row.id, Addressed { side: Side::Source, host: row.source.clone(), body });
    Ok(Step::Wait(Duration::from_millis(RESEND_MS)))
}

async fn decide(manager: &Arc<Manager>, row: &MigrationRow) -> Result<Step, Problem> {
    let decision = tokio::time::timeout(DECISION_LIMIT, gates::decide(manager, row)).await;
    let refusal = match decision {
        Ok(Ok(())) => return Ok(Step::Again),
        Ok(Err(problem)) if problem.code == ErrorCode::RegistryUnavailable => return Err(problem),
        // Somebody ended it meanwhile.
        Ok(Err(problem)) if problem.code == ErrorCode::WrongState => return Ok(Step::Again),
        Ok(Err(problem)) => problem,
        Err(_) => {
            let detail = format!("no decision within {} s", DECISION_LIMIT.as_secs());
            Problem::new(ErrorCode::HostUnreachable, detail)
        }
    };
    refuse(manager, row, refusal).await
}

/// Ends a migration before its permit.
pub(crate) async fn refuse(
    manager: &Arc<Manager>,
    row: &MigrationRow,
    problem: Problem,
) -> Result<Step, Problem> {
    let mut tx = manager.begin("refuse a migration").await?;
    let Some(mut row) = tx.migration(row.id).await? else { return Ok(Step::Closed) };
    if !matches!(row.state, MigrationState::Requested | MigrationState::Deciding) {
        return Ok(Step::Again);
    }
    let mut facts = Facts::of(&row)?;
    let detail = json!({ "migration": row.id, "code": problem.code, "detail": problem.detail });
    row.state = match problem.code {
        ErrorCode::Terminated => MigrationState::Terminated,
        _ => MigrationState::Refused,
    };
    facts.blame(problem);
    (row.open, row.ended_at_us, row.facts) = (false, Some(tx.now_us()), facts.text());
    tx.save_migration(&row).await?;
    tx.audit(&manager.actor(), "migration.refuse", row.vm_name.as_str(), detail).await?;
    tx.commit().await?;
    super::events::tell(manager, &row, "refused", &facts);
    Ok(Step::Closed)
}

/// Everything after the permit: prepare, start, watch, and what the decider says is outstanding.
async fn hand_over(
    manager: &Arc<Manager>,
    row: &MigrationRow,
    facts: &Facts,
    held: &HandoverRow,
) -> Result<Step, Problem> {
    if let RowState::Open(open) = &held.state
        && open.abort.is_none()
    {
        if facts.data_address.is_none() {
            return prepare(manager, row).await;
        }
        if facts.started_us.is_none() {
            return start(manager, row, facts).await;
        }
        if let Some(problem) = overdue(manager, row, facts, clock::now_us()) {
            return abort(manager, row.id, problem).await;
        }
        if let Err(problem) = convergence::watch_over(manager, row, facts) {
            return abort(manager, row.id, problem).await;
        }
    }
    if held.is_final() {
        return Ok(match handover::close_reported(manager, row.id).await? {
            true => Step::Again,
            false => Step::Wait(Duration::from_millis(100)),
        });
    }
    if let Some(event) = presumed(facts, held) {
        handover::apply(manager, &manager.actor(), row.id, event).await?;
        return Ok(Step::Again);
    }
    let silence_us = i64::try_from(SOURCE_SILENCE_MS * 1_000).unwrap_or(i64::MAX);
    if held.awaits_source() && facts.awaits_source_us.is_some_and(|at| clock::now_us() - at > silence_us) {
        handover::apply(manager, &manager.actor(), row.id, Event::SourceSilent).await?;
        return Ok(Step::Again);
    }
    let target_key = target_key(manager, row).await?;
    for order in handover::orders(held, &target_key) {
        send(manager, row.id, order);
    }
    Ok(Step::Wait(Duration::from_millis(RESEND_MS)))
}

/// What the manager itself is the proof of: a side that was never sent the permit can neither vote nor run.
fn presumed(facts: &Facts, held: &HandoverRow) -> Option<Event> {
    if held.continuity != Continuity::Proven {
        // H10: a registry that was set back has forgotten what it sent.
        return None;
    }
    match &held.state {
        RowState::Open(open) if facts.start_sent_us.is_none() => {
            let reason = open.abort.clone()?;
            let statement = Statement::NoVote(NoVote { key: held.key, reason });
            Some(Event::Statement { from: Side::Source, statement })
        }
        RowState::Voided(voided) if !voided.target_settled && facts.prepare_sent_us.is_none() => {
            Some(Event::TargetFenced)
        }
        _ => None,
    }
}

async fn target_key(manager: &Manager, row: &MigrationRow) -> Result<Vec<u8>, Problem> {
    let permit = manager.registry.read("target key").await?.permit(row.id).await?;
    Ok(permit.map(|p| p.claims.target.daemon_key).unwrap_or_default())
}

/// Passes the frozen source's signed ask on to the target: once for each time that the source says it. It is never
/// kept: it holds only while the source has its copy, which is known only from the source still asking.
pub(crate) fn relay_ask(manager: &Arc<Manager>, held: &HandoverRow, token: Vec<u8>) {
    let (RowState::Open(_), Some(session)) = (&held.state, manager.fleet.session(&held.target)) else {
        return;
    };
    let id = held.key.migration;
    if !manager.watch.may_send(id, (Side::Target, "renounce"), Duration::from_millis(RESEND_MS / 2)) {
        return;
    }
    let order = Renounce {
        key_json: serde_json::to_string(&held.key).unwrap_or_default(),
        reason: "the frozen source asks for it".to_owned(),
        request: token,
    };
    manager.tasks.spawn(async move {
        let answer = session.order(to_host::Body::Renounce(order), Duration::from_millis(RESEND_MS)).await;
        if let Err(problem) = answer {
            tracing::debug!(migration = %id, "the ask to renounce was not taken: {problem}");
        }
    });
}

/// What took too long, if anything. Never past the commit: only open rows come here.
fn overdue(manager: &Manager, row: &MigrationRow, facts: &Facts, now_us: i64) -> Option<Problem> {
    let exceeded = |detail: String| Some(Problem::new(ErrorCode::BudgetExceeded, detail));
    let run_us = i64::try_from(manager.config.budgets.run_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    if facts.permit_us.is_some_and(|at| now_us - at > run_us) {
        return exceeded(format!("the transfer took longer than {} s", manager.config.budgets.run_s));
    }
    if let Some(stopped) = facts.stopped_us {
        if now_us - stopped > SWITCHOVER_LIMIT_US {
            return exceeded(format!(
                "the switchover took longer than {} s",
                SWITCHOVER_LIMIT_US / 1_000_000
            ));
        }
        return None;
    }
    if row.suspended {
        return None;
    }
    let moved_us = manager.watch.progress(row.id).moved_us;
    let since = moved_us.max(facts.started_us.unwrap_or(0)).max(facts.connected_us.unwrap_or(0));
    // A manager that just started has heard nothing yet: it waits as long as for a new transfer.
    let since = since.max(manager.started_us);
    if now_us - since > NO_PROGRESS_LIMIT_US {
        let detail = format!("the stream did not move for {} s", NO_PROGRESS_LIMIT_US / 1_000_000);
        return Some(Problem::new(ErrorCode::ChannelFailed, detail));
    }
    None
}

/// Asks for the end; the decider says what that means.
async fn abort(manager: &Arc<Manager>, id: MigrationId, problem: Problem) -> Result<Step, Problem> {
    let event = Event::AbortRequested(reason_of(&problem));
    handover::apply(manager, &manager.actor(), id, event).await?;
    Ok(Step::Again)
}

async fn prepare(manager: &Arc<Manager>, row: &MigrationRow) -> Result<Step, Problem> {
    let mut tx = manager.registry.read("prepare").await?;
    let (Some(permit), Some(vm), Some(source)) =
        (tx.permit(row.id).await?, tx.vm(row.vm).await?, tx.host(&row.source).await?)
    else {
        return Err(handover::unknown(row.id));
    };
    drop(tx);
    let token = permit.token.ok_or_else(|| {
        Problem::new(ErrorCode::Internal, format!("the permit of {} is not signed", row.id))
    })?;
    mark(manager, row.id, |facts, now_us| {
        facts.prepare_sent_us.get_or_insert(now_us);
    })
    .await?;
    let order = PrepareTarget {
        migration: row.id.to_string(),
        permit: token,
        spec_json: serde_json::to_string(&vm.spec).unwrap_or_default(),
        inventory_json: serde_json::to_string(&vm.inventory).unwrap_or_default(),
        source_migration_address: source.spec.migration_address.to_string(),
        source_daemon_key: permit.claims.source.daemon_key,
    };
    let done = ask(manager, row, &row.target, to_host::Body::Prepare(order), PREPARE_LIMIT).await;
    let prepared = match done {
        Ok(reply::Result::Prepared(prepared)) => prepared,
        Ok(other) => {
            return abort(manager, row.id, gates::unexpected(&row.target, "prepare-target", &other)).await;
        }
        Err(problem) => return abort(manager, row.id, as_code(problem, ErrorCode::TargetFailed)).await,
    };
    if !is_address(&prepared.data_address) || !is_address(&prepared.peer_address) {
        let detail = format!("host {} prepared at no address: {:?}", row.target, prepared.data_address);
        return abort(manager, row.id, Problem::new(ErrorCode::TargetFailed, detail)).await;
    }
    let mut tx = manager.begin("target prepared").await?;
    tx.permit_consumed(row.id).await?;
    let Some(mut row) = tx.migration(row.id).await? else { return Ok(Step::Closed) };
    let mut facts = Facts::of(&row)?;
    facts.data_address = Some(prepared.data_address);
    facts.peer_address = Some(prepared.peer_address);
    row.facts = facts.text();
    tx.save_migration(&row).await?;
    tx.audit(
        &format!("host/{}", row.target),
        "permit.consume",
        row.vm_name.as_str(),
        json!({ "migration": row.id }),
    )
    .await?;
    tx.commit().await?;
    Ok(Step::Again)
}

/// `host:port`, short: it goes to the other host.
fn is_address(text: &str) -> bool {
    text.parse::<std::net::SocketAddr>().is_ok()
}

async fn start(manager: &Arc<Manager>, row: &MigrationRow, facts: &Facts) -> Result<Step, Problem> {
    let mut tx = manager.registry.read("start").await?;
    let (Some(permit), Some(vm)) = (tx.permit(row.id).await?, tx.vm(row.vm).await?) else {
        return Err(handover::unknown(row.id));
    };
    drop(tx);
    mark(manager, row.id, |facts, now_us| {
        facts.start_sent_us.get_or_insert(now_us);
    })
    .await?;
    let order = StartSource {
        migration: row.id.to_string(),
        permit: permit.token.unwrap_or_default(),
        inventory_json: serde_json::to_string(&vm.inventory).unwrap_or_default(),
        data_address: facts.data_address.clone().unwrap_or_default(),
        peer_address: facts.peer_address.clone().unwrap_or_default(),
    };
    match ask(manager, row, &row.source, to_host::Body::Start(order), START_LIMIT).await {
        Ok(reply::Result::Done(_)) => {
            mark(manager, row.id, |facts, now_us| {
                facts.started_us.get_or_insert(now_us);
            })
            .await?;
            Ok(Step::Again)
        }
        Ok(other) => abort(manager, row.id, gates::unexpected(&row.source, "start-source", &other)).await,
        Err(problem) => abort(manager, row.id, as_code(problem, ErrorCode::SourceFailed)).await,
    }
}

/// A host's own code stands; that it could not be reached means, here, that its side failed.
fn as_code(problem: Problem, code: ErrorCode) -> Problem {
    match problem.code {
        ErrorCode::HostUnreachable | ErrorCode::Internal => Problem { code, ..problem },
        _ => problem,
    }
}

/// Orders and waits, but not past an operator's wish to end.
async fn ask(
    manager: &Arc<Manager>,
    row: &MigrationRow,
    host: &HostName,
    body: to_host::Body,
    limit: Duration,
) -> Result<reply::Result, Problem> {
    let deadline = Instant::now() + limit;
    let notify = manager.watch.notify(row.id);
    // A host that is reconnecting gets its time: the order is idempotent, and asked again in its new session.
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let detail = format!("host {host} did not do {} in time", order_text(&body));
            return Err(Problem::new(ErrorCode::HostUnreachable, detail));
        }
        let Ok(session) = manager.fleet.require(host) else {
            tokio::time::sleep(left.min(Duration::from_millis(100))).await;
            if wants_end(manager, row.id).await? {
                return Err(Problem::new(ErrorCode::Terminated, "ended while it waited"));
            }
            continue;
        };
        let order = session.order(body.clone(), left);
        tokio::pin!(order);
        let result = loop {
            tokio::select! {
                result = &mut order => break result,
                () = notify.notified() => {
                    if wants_end(manager, row.id).await? {
                        return Err(Problem::new(ErrorCode::Terminated, "ended while it waited"));
                    }
                }
            }
        };
        match result {
            Err(problem) if problem.code == ErrorCode::HostUnreachable && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => return other,
        }
    }
}

async fn wants_end(manager: &Manager, id: MigrationId) -> Result<bool, Problem> {
    let row = manager.registry.read("wants end").await?.migration(id).await?;
    let Some(row) = row else { return Ok(true) };
    Ok(match handover::read(&row)?.map(|h| h.state) {
        Some(RowState::Open(open)) => open.abort.is_some(),
        _ => true,
    })
}

/// Changes the facts of an open migration.
pub(crate) async fn mark(
    manager: &Manager,
    id: MigrationId,
    change: impl FnOnce(&mut Facts, i64),
) -> Result<(), Problem> {
    let mut tx = manager.begin("mark").await?;
    let mut row = tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    let mut facts = Facts::of(&row)?;
    change(&mut facts, tx.now_us());
    row.facts = facts.text();
    if let Some(held) = handover::read(&row)? {
        row.state = handover::state_of(&held, &facts, &row);
    }
    tx.save_migration(&row).await?;
    Ok(tx.commit().await?)
}

/// Sends an order unless it went out less than [`RESEND_MS`] ago; what the host says against it is looked at.
pub(crate) fn send(manager: &Arc<Manager>, id: MigrationId, order: Addressed) {
    let Addressed { side, host, body } = order;
    let kind = order_text(&body);
    let Some(session) = manager.fleet.session(&host) else { return };
    if !manager.watch.may_send(id, (side, kind), Duration::from_millis(RESEND_MS)) {
        return;
    }
    let manager = Arc::clone(manager);
    manager.tasks.clone().spawn(async move {
        if let Err(problem) = session.order(body, Duration::from_millis(2 * RESEND_MS)).await {
            tracing::debug!(migration = %id, %host, order = kind, "{problem}");
            if let Err(error) = objected(&manager, id, side, kind, &problem).await {
                tracing::warn!(migration = %id, "cannot act on {host}'s answer: {error}");
            }
        }
    });
}

/// What a host's refusal of an order tells.
async fn objected(
    manager: &Arc<Manager>,
    id: MigrationId,
    side: Side,
    order: &'static str,
    problem: &Problem,
) -> Result<(), Problem> {
    let row = manager.registry.read("objection").await?.migration(id).await?;
    let Some(row) = row.filter(|r| r.open) else { return Ok(()) };
    if order == "intent" && problem.code != ErrorCode::HostUnreachable {
        refuse(manager, &row, problem.clone()).await?;
        return Ok(());
    }
    if problem.code != ErrorCode::UnknownMigration {
        return Ok(());
    }
    let Some(held) = handover::read(&row)? else { return Ok(()) };
    // "I know nothing of it" proves nothing (H3): the host is asked to write down, and sign, that it never will.
    let reason = match (&held.state, order) {
        (RowState::Open(open), "abort") => open.abort.clone(),
        (RowState::Voided(voided), "abort" | "void" | "renounced" | "fenced") => Some(voided.reason.clone()),
        _ => None,
    };
    let permit = manager.registry.read("objection").await?.permit(id).await?;
    let (Some(reason), Some(permit)) = (reason, permit) else { return Ok(()) };
    let attempt = permit::attempt(&permit.claims, held.permit);
    let decline = Decline {
        attempt_json: serde_json::to_string(&attempt).unwrap_or_default(),
        side: side.to_string(),
        code: reason.code.to_string(),
        detail: reason.detail,
    };
    let host = if side == Side::Source { &row.source } else { &row.target };
    let session = manager.fleet.require(host)?;
    session.order(to_host::Body::Decline(decline), Duration::from_millis(2 * RESEND_MS)).await.map(|_| ())
}

/// Tells both hosts that it is over, so that they clean up (I12), and that agents end that were never permitted.
async fn farewell(manager: &Arc<Manager>, id: MigrationId) {
    let Ok(mut tx) = manager.registry.read("farewell").await else { return };
    let Ok(Some(row)) = tx.migration(id).await else { return };
    drop(tx);
    let say = async |side: Side, host: &HostName| {
        // The end of the hand-over may have said so a moment ago.
        if !manager.watch.may_send(id, (side, "forget"), Duration::from_millis(RESEND_MS)) {
            return;
        }
        let forget = || to_host::Body::Forget(Forget { migration: id.to_string() });
        while let Some(session) = manager.fleet.session(host) {
            match session.order(forget(), Duration::from_millis(2 * RESEND_MS)).await {
                Err(problem) if problem.code == ErrorCode::HostUnreachable => {
                    tokio::time::sleep(Duration::from_millis(RESEND_MS)).await;
                }
                _ => break,
            }
        }
    };
    let both = async { tokio::join!(say(Side::Source, &row.source), say(Side::Target, &row.target)) };
    tokio::select! {
        () = manager.shutdown.cancelled() => {}
        _ = tokio::time::timeout(FAREWELL_LIMIT, both) => {}
    }
}

/// An operator's suspend, resume or throttle, to one host.
pub(crate) fn control_body(id: MigrationId, order: &str) -> to_host::Body {
    to_host::Body::Control(Control {
        migration: id.to_string(),
        order: order.to_owned(),
        bytes_per_second: 0,
    })
}
