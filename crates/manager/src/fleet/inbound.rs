//! What a host says in its session.

use super::Session;
use crate::checkpoints;
use crate::clock;
use crate::core::Manager;
use crate::migration::{events, gates, handover, reconcile};
use crate::vms;
use api::fleet::{AskRenounce, Hello, MigrationEvent, StatementStored, ToManager, to_host, to_manager};
use engine::handover::RenunciationProof;
use engine::handover::decider::{Event, HandoverRow};
use permit::SignatureError;
use permit::{SignedStatement, VerifyingKey, statement};
use registry::Tx;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use types::handover::Statement;
use types::{Digest, ErrorCode, HostName, Problem, Side};

/// Statements that a hello may present: far more than a host has open hand-overs.
const OPEN_STATEMENTS_LIMIT: usize = 1_024;
/// Events of a host that wait to be taken in.
pub(super) const NEWS_BACKLOG_EVENTS: usize = 512;
/// How long a final statement waits for the news before it.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(2);
/// News is gathered for this long before it is written down.
const NEWS_MOMENT: Duration = Duration::from_millis(20);
/// Events that share a transaction.
const NEWS_BATCH_EVENTS: usize = 64;

/// One message. What it is about may be wrong; the session goes on.
pub(super) async fn message(
    manager: &Arc<Manager>,
    session: &Arc<Session>,
    news: &mpsc::Sender<News>,
    message: ToManager,
) {
    use to_manager::Body as B;
    let host = &session.host;
    let result = match message.body {
        Some(B::Reply(reply)) => {
            session.answered(reply);
            Ok(())
        }
        Some(B::Heartbeat(beat)) => heartbeat(session, &beat.load_json),
        Some(B::Statement(signed)) => stated(manager, session, Some(news), signed.token).await,
        Some(B::Event(event)) => {
            // A full queue holds the host back rather than losing what it says.
            drop(news.send(News::Event(clock::now_us(), event)).await);
            Ok(())
        }
        Some(B::VmEvent(event)) => {
            match (event.vm.parse(), event.state.as_str()) {
                (Ok(vm), "running" | "paused") => session.holds(vm),
                (Ok(vm), "dead" | "stopped" | "shutdown") => session.holds_no_more(vm),
                _ => {}
            }
            vms::reported(manager, host, &event).await
        }
        Some(B::AskRenounce(ask)) => asked(manager, session, news, ask).await,
        Some(B::CheckpointKept(kept)) => checkpoints::not_taken(manager, session, &kept).await,
        Some(B::Holdings(holdings)) => {
            session.told_holdings(holdings);
            Ok(())
        }
        Some(B::Hello(_)) => Err(Problem::new(ErrorCode::BadRequest, "a second hello in one session")),
        // From a newer host: not understood, not harmful.
        None => Ok(()),
    };
    if let Err(problem) = result {
        tracing::warn!(%host, code = %problem.code, "message not taken: {}", problem.detail);
    }
}

/// What waits to be taken in.
pub(super) enum News {
    /// What happened, and when it was heard of.
    Event(i64, MigrationEvent),
    /// Everything before it is taken in.
    Caught(oneshot::Sender<()>),
}

/// Takes a session's events in, many at a time while they come faster than they are written.
pub(super) async fn take_news(manager: Arc<Manager>, host: HostName, mut news: mpsc::Receiver<News>) {
    while let Some(first) = news.recv().await {
        let mut batch = gather(first, &mut news).await;
        let (mut happened, mut waiting) = (Vec::new(), Vec::new());
        for item in batch.drain(..) {
            match item {
                News::Event(heard_us, event) => happened.push((heard_us, event)),
                News::Caught(waiter) => waiting.push(waiter),
            }
        }
        manager.hurry.over().await;
        events::received(&manager, &host, happened).await;
        for waiter in waiting {
            // Whoever waited may have gone.
            waiter.send(()).unwrap_or_default();
        }
    }
}

/// What comes within a moment of the first: a vote follows the news about it by less, and goes first. Whoever waits for
/// the news ends the moment.
async fn gather(first: News, news: &mut mpsc::Receiver<News>) -> Vec<News> {
    let mut batch = vec![first];
    let more = async {
        while batch.len() < NEWS_BATCH_EVENTS && !matches!(batch.last(), Some(News::Caught(_))) {
            match news.recv().await {
                Some(item) => batch.push(item),
                None => break,
            }
        }
    };
    drop(tokio::time::timeout(NEWS_MOMENT, more).await);
    batch
}

/// Statements that end something come after the news about it, so that a report is whole when it is final. Votes and
/// the running receipt are in a hurry: the guest stands still.
async fn catch_up(news: &mpsc::Sender<News>) {
    let (caught, waiting) = oneshot::channel();
    if news.send(News::Caught(caught)).await.is_ok() {
        drop(tokio::time::timeout(CATCH_UP_LIMIT, waiting).await);
    }
}

fn heartbeat(session: &Session, load_json: &str) -> Result<(), Problem> {
    if load_json.is_empty() {
        return Ok(());
    }
    let load = serde_json::from_str(load_json)
        .map_err(|e| Problem::new(ErrorCode::BadRequest, format!("malformed load: {e}")))?;
    session.loaded(load);
    Ok(())
}

/// A host came (back): what it runs, what it had stated and nobody confirmed, and whoever waits for it.
pub(super) async fn greeted(manager: &Arc<Manager>, session: &Arc<Session>, hello: Hello) {
    let host = &session.host;
    if let Err(problem) = vms::reconcile(manager, host, &hello.vms).await {
        tracing::warn!(%host, "cannot reconcile its VMs: {problem}");
    }
    for token in hello.open_statements.into_iter().take(OPEN_STATEMENTS_LIMIT) {
        if let Err(problem) = stated(manager, session, None, token).await {
            tracing::warn!(%host, code = %problem.code, "statement not taken: {}", problem.detail);
        }
    }
    if let Err(problem) = checkpoints::refused(manager, session, &hello.checkpoint_refused).await {
        tracing::warn!(%host, "cannot record that it takes no permit: {problem}");
    }
    checkpoints::tell(manager, std::slice::from_ref(session)).await;
    manager.watch.resend_all();
    if let Err(problem) = manager.wake_all().await {
        tracing::warn!("cannot wake the open migrations: {problem}");
    }
}

/// A host went away.
pub(super) async fn lost(manager: &Arc<Manager>, host: &HostName, why: &str) {
    let audited = async {
        let mut tx = manager.begin("host lost").await?;
        tx.audit(&manager.actor(), "host.lost", host.as_str(), serde_json::json!({ "why": why })).await?;
        tx.commit().await
    };
    if let Err(error) = audited.await {
        tracing::warn!(%host, "cannot record that it was lost: {error}");
    }
}

/// A signed statement: verified, then stored and applied in one transaction, then confirmed.
async fn stated(
    manager: &Arc<Manager>,
    session: &Arc<Session>,
    news: Option<&mpsc::Sender<News>>,
    token: Vec<u8>,
) -> Result<(), Problem> {
    let heard_us = clock::now_us();
    let digest = Digest::of(&token);
    let signed = SignedStatement::from_bytes(token)
        .map_err(|e| Problem::new(ErrorCode::BadRequest, format!("not a statement: {e}")))?;
    let (signer, key, statement) = verified(manager, session, &signed).await?;
    match (&statement, news) {
        (Statement::Frozen(_) | Statement::Prepared(_), _) => manager.hurry.begin(),
        (Statement::Running(_), _) | (_, None) => {}
        (_, Some(news)) => catch_up(news).await,
    }
    let mut tx = manager.begin("statement").await?;
    let taken = match &statement {
        Statement::Request(request) => match gates::requested(manager, &mut tx, &signer, request).await {
            Ok(row) => {
                tx.add_statement(row.id, "request", &signer, digest, signed.as_bytes()).await?;
                tx.commit().await?;
                manager.wake(row.id);
                true
            }
            Err(problem) => {
                drop(tx);
                return refused_request(manager, session, request, digest, problem).await;
            }
        },
        other => {
            let applied = apply(&mut tx, &signer, &key, other, digest, &signed).await?;
            tx.commit().await?;
            if applied.is_some() && signer == session.host {
                holds_since(session, other);
            }
            tracing::trace!(
                kind = handover::kind_of(other),
                took_us = clock::now_us() - heard_us,
                "statement"
            );
            let taken = applied.is_some();
            if let (Some((held, _)), Statement::AskRenounce(_), Some(_)) = (&applied, other, news)
                && manager.fleet.is_current(session)
            {
                reconcile::relay_ask(manager, held, signed.as_bytes().to_vec());
            }
            if let Some(key) = handover::key_of(other) {
                // At once, inside the downtime; the reconciler repeats what gets lost.
                for order in applied.map(|(_, orders)| orders).unwrap_or_default() {
                    manager.hurry.end();
                    reconcile::send(manager, key.migration, order);
                }
                manager.wake(key.migration);
            }
            taken
        }
    };
    if taken {
        let stored = StatementStored { digest: digest.0.to_vec() };
        session.tell(to_host::Body::StatementStored(stored))?;
    }
    Ok(())
}

/// What a host's own statement tells of the copies that it holds.
fn holds_since(session: &Session, statement: &Statement) {
    match statement {
        Statement::Running(receipt) => session.holds(receipt.key.vm),
        // Both are signed when the copy is dead, and not before.
        Statement::Released(receipt) => session.holds_no_more(receipt.key.vm),
        Statement::Renounced(renunciation) => session.holds_no_more(renunciation.key.vm),
        _ => {}
    }
}

/// Who signed, with which key, and what. A host shows its own statements, and the other side's renunciation.
async fn verified(
    manager: &Manager,
    session: &Session,
    signed: &SignedStatement,
) -> Result<(HostName, VerifyingKey, Statement), Problem> {
    let host = &session.host;
    let forged = |detail: String| Problem::new(ErrorCode::Forbidden, detail);
    match statement::verify(signed, &session.signing_key) {
        Ok(statement) => return Ok((host.clone(), session.signing_key, statement)),
        Err(SignatureError::UnknownKeyId { .. }) => {}
        Err(error) => {
            return Err(forged(format!("host {host} shows a statement that does not verify: {error}")));
        }
    }
    for other in manager.registry.read("signer").await?.hosts().await? {
        let key = other.signing_key.as_ref().and_then(|k| VerifyingKey::from_bytes(k).ok());
        let Some(key) = key else { continue };
        if let Ok(statement @ Statement::Renounced(_)) = statement::verify(signed, &key) {
            return Ok((other.name().clone(), key, statement));
        }
    }
    Err(forged(format!("host {host} shows a statement of nobody known")))
}

/// Applies a hand-over's statement: the orders that follow. `None`: not now, to be shown again.
async fn apply(
    tx: &mut Tx,
    signer: &HostName,
    key: &VerifyingKey,
    statement: &Statement,
    digest: Digest,
    signed: &SignedStatement,
) -> Result<Option<(Box<HandoverRow>, Vec<handover::Addressed>)>, Problem> {
    let Some(attempt) = handover::key_of(statement) else { return Ok(None) };
    let row = tx.migration(attempt.migration).await?.ok_or_else(|| handover::unknown(attempt.migration))?;
    let permit = tx.permit(row.id).await?.ok_or_else(|| handover::unknown(row.id))?;
    let side = match () {
        () if *signer == row.source => Side::Source,
        () if *signer == row.target => Side::Target,
        () => {
            let detail = format!("host {signer} takes no part in migration {}", row.id);
            return Err(Problem::new(ErrorCode::Forbidden, detail));
        }
    };
    // The key that the permit names, not whatever the host has on record since.
    if permit.claims.part(side).daemon_key != key.as_bytes() {
        let detail = format!("host {signer} signed with another key than the permit of {} names", row.id);
        return Err(Problem::new(ErrorCode::Forbidden, detail));
    }
    let event = match statement {
        Statement::Renounced(renunciation) => Event::Renounced(RenunciationProof {
            renunciation: renunciation.clone(),
            token: signed.as_bytes().to_vec(),
        }),
        other => Event::Statement { from: side, statement: other.clone() },
    };
    let actor = format!("host/{signer}");
    match handover::apply_in(tx, &actor, row.id, event).await? {
        handover::Applied::Taken(held) => {
            let kind = handover::kind_of(statement);
            tx.add_statement(row.id, kind, signer, digest, signed.as_bytes()).await?;
            let orders = handover::orders(&held, &permit.claims.target.daemon_key);
            Ok(Some((held, orders)))
        }
        handover::Applied::Refused(refusal) => {
            tracing::debug!(migration = %row.id, host = %signer, "statement refused: {refusal}");
            Ok(None)
        }
    }
}

/// A request that is refused ends its migration, so that `migration show` explains it, and is confirmed: there is
/// nothing to repeat.
async fn refused_request(
    manager: &Arc<Manager>,
    session: &Arc<Session>,
    request: &types::handover::MigrationRequest,
    digest: Digest,
    problem: Problem,
) -> Result<(), Problem> {
    if problem.code == ErrorCode::RegistryUnavailable {
        return Err(problem);
    }
    let mut tx = manager.begin("refused request").await?;
    let subject = request.vm.to_string();
    let detail = serde_json::json!({
        "code": problem.code, "detail": problem.detail, "nonce": request.nonce, "intent": request.intent,
    });
    tx.audit(&format!("host/{}", session.host), "migration.request-refused", &subject, detail).await?;
    let row = match request.intent.parse() {
        Ok(intent) => tx.migration_of_intent(intent).await?,
        Err(_) => None,
    };
    tx.commit().await?;
    // A replay must not end the migration that the first copy began.
    if let Some(row) = row.filter(|r| r.source == session.host && problem.code != ErrorCode::ReplayedRequest)
    {
        reconcile::refuse(manager, &row, problem.clone()).await?;
        manager.wake(row.id);
    }
    session.tell(to_host::Body::StatementStored(StatementStored { digest: digest.0.to_vec() }))?;
    Err(problem)
}

/// The frozen source asks for a renunciation through the manager. With its signed ask it is a statement; without one
/// it is only a reason to look.
async fn asked(
    manager: &Arc<Manager>,
    session: &Arc<Session>,
    news: &mpsc::Sender<News>,
    ask: AskRenounce,
) -> Result<(), Problem> {
    if !ask.request.is_empty() {
        return stated(manager, session, Some(news), ask.request).await;
    }
    let key: types::HandoverKey = serde_json::from_str(&ask.key_json)
        .map_err(|e| Problem::new(ErrorCode::BadRequest, format!("malformed key: {e}")))?;
    manager.wake(key.migration);
    Ok(())
}
