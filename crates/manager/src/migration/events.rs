//! What hosts tell of a migration while it happens: facts for the report, the watch, and, where something broke, the
//! wish to end. Nothing here commits, releases or frees anything: that rests on signed statements alone.

use crate::clock;
use crate::core::Manager;
use crate::migration::facts::reason_of;
use crate::migration::{Facts, handover};
use api::http::MigrationEvent;
use engine::handover::decider::{Event, RowState};
use registry::{EventRow, MigrationRow};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use types::migration::{ChannelView, Finding, Severity, StageView};
use types::{ErrorCode, HostName, MigrationId, Problem, Side};

/// Events that are kept of one migration; progress is not among them.
const EVENTS_LIMIT: u64 = 1_000;
/// Details of one event.
const DETAIL_LIMIT_BYTES: usize = 16 * 1024;
/// Parts of a downtime that are kept.
const PARTS_LIMIT: usize = 32;

#[derive(Debug, Deserialize)]
struct ProgressDetail {
    #[serde(default)]
    stream_bytes: u64,
    #[serde(default)]
    wire_bytes: u64,
    #[serde(default)]
    ram_total_bytes: u64,
    #[serde(default)]
    ram_remaining_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct AcceptedDetail {
    #[serde(default)]
    wire_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct PeerRunningDetail {
    downtime_ms: f64,
    #[serde(default)]
    parts: Vec<StageView>,
}

#[derive(Debug, Deserialize)]
struct ResponsiveDetail {
    ms: f64,
    #[serde(default)]
    basis: String,
}

#[derive(Debug, Deserialize)]
struct FailedDetail {
    code: String,
    #[serde(default)]
    detail: String,
}

#[derive(Debug, Deserialize)]
struct EndedDetail {
    what: String,
    #[serde(default)]
    detail: String,
}

/// A validated event.
type Seen = (MigrationId, EventRow);

/// Events of one host, in the order in which they came; those that are kept share one transaction. Statements do not
/// wait here: a vote must not stand behind the news about it.
pub(crate) async fn received(
    manager: &Arc<Manager>,
    from: &HostName,
    events: Vec<(i64, api::fleet::MigrationEvent)>,
) {
    let mut kept = Vec::new();
    for (heard_us, event) in events {
        let taken = read(from, event).and_then(|(id, seen)| {
            if seen.kind == "progress" {
                return progress(manager, from, id, &seen);
            }
            kept.push((heard_us, id, seen));
            Ok(())
        });
        if let Err(problem) = taken {
            tracing::warn!(host = %from, code = %problem.code, "event not taken: {}", problem.detail);
        }
    }
    if kept.is_empty() {
        return;
    }
    if let Err(problem) = keep_all(manager, from, kept).await {
        tracing::warn!(host = %from, code = %problem.code, "events not kept: {}", problem.detail);
    }
}

fn read(from: &HostName, event: api::fleet::MigrationEvent) -> Result<Seen, Problem> {
    let malformed = |what: &str| {
        Problem::new(ErrorCode::BadRequest, format!("host {from} sent an event with a malformed {what}"))
    };
    let id: MigrationId = event.migration.parse().map_err(|_| malformed("migration id"))?;
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if event.kind.is_empty() || event.kind.len() > 40 || !event.kind.bytes().all(plain) {
        return Err(malformed("kind"));
    }
    if event.json.len() > DETAIL_LIMIT_BYTES {
        return Err(malformed("detail: too long"));
    }
    let detail: Value = match event.json.as_str() {
        "" => json!({}),
        text => serde_json::from_str(text).map_err(|_| malformed("detail"))?,
    };
    let at_us = i64::try_from(event.at_unix_us).unwrap_or(i64::MAX);
    Ok((id, EventRow { sequence: 0, at_us, host: from.to_string(), kind: event.kind, detail }))
}

/// Counters move too fast for the registry: they stay in memory and go to those who watch.
fn progress(manager: &Manager, from: &HostName, id: MigrationId, seen: &EventRow) -> Result<(), Problem> {
    let detail: ProgressDetail = parse(from, seen)?;
    let now_us = clock::now_us();
    manager.watch.update(id, |p| {
        if detail.stream_bytes > p.stream_bytes {
            p.stream_bytes = detail.stream_bytes;
            p.moved_us = now_us;
        }
        // The source counts what it sent, the target what it received; never more than a channel's overhead apart.
        p.wire_bytes = p.wire_bytes.max(detail.wire_bytes);
        // Of the source alone.
        if detail.ram_total_bytes > 0 {
            (p.memory_bytes, p.remaining_bytes) = (detail.ram_total_bytes, detail.ram_remaining_bytes);
        }
    });
    publish(manager, id, seen);
    Ok(())
}

async fn keep_all(
    manager: &Arc<Manager>,
    from: &HostName,
    kept: Vec<(i64, MigrationId, EventRow)>,
) -> Result<(), Problem> {
    let mut tx = manager.begin("events").await?;
    let mut told = Vec::new();
    for (heard_us, id, seen) in kept {
        match keep(&mut tx, from, id, &seen, heard_us).await {
            Ok(open) => told.push((id, seen, open)),
            Err(problem) if problem.code == ErrorCode::RegistryUnavailable => return Err(problem),
            // Refused before anything of it was written.
            Err(problem) => {
                tracing::warn!(host = %from, code = %problem.code, "event not taken: {}", problem.detail);
            }
        }
    }
    tx.commit().await?;
    for (id, seen, open) in told {
        publish(manager, id, &seen);
        if open {
            manager.wake(id);
        }
    }
    Ok(())
}

/// Keeps one event; returns whether its migration is open.
async fn keep(
    tx: &mut registry::Tx,
    from: &HostName,
    id: MigrationId,
    seen: &EventRow,
    heard_us: i64,
) -> Result<bool, Problem> {
    let Some(mut row) = tx.migration(id).await? else { return Err(handover::unknown(id)) };
    let side = match () {
        () if row.source == *from => Side::Source,
        () if row.target == *from => Side::Target,
        () => {
            let detail = format!("host {from} takes no part in migration {id}");
            return Err(Problem::new(ErrorCode::Forbidden, detail));
        }
    };
    let mut facts = Facts::of(&row)?;
    let wish = absorb(&mut facts, from, side, seen, heard_us)?;
    row.facts = facts.text();
    if row.open
        && let Some(held) = handover::read(&row)?
    {
        row.state = handover::state_of(&held, &facts, &row);
    }
    tx.save_migration(&row).await?;
    tx.add_event(id, seen, EVENTS_LIMIT).await?;
    if let Some(problem) = wish.filter(|_| row.open) {
        wish_end(tx, from, &row, problem).await?;
    }
    Ok(row.open)
}

/// Something broke on one side: the attempt is to end, unless both sides have voted.
async fn wish_end(
    tx: &mut registry::Tx,
    from: &HostName,
    row: &MigrationRow,
    problem: Problem,
) -> Result<(), Problem> {
    let Some(held) = handover::read(row)? else { return Ok(()) };
    let RowState::Open(open) = &held.state else { return Ok(()) };
    if open.abort.is_some() || (open.source_vote.is_some() && open.target_vote.is_some()) {
        return Ok(());
    }
    let event = Event::AbortRequested(reason_of(&problem));
    handover::apply_in(tx, &format!("host/{from}"), row.id, event).await.map(|_| ())
}

fn parse<T: serde::de::DeserializeOwned>(from: &HostName, seen: &EventRow) -> Result<T, Problem> {
    serde_json::from_value(seen.detail.clone()).map_err(|e| {
        let detail = format!("host {from} sent a malformed {} event: {e}", seen.kind);
        Problem::new(ErrorCode::BadRequest, detail)
    })
}

/// Takes an event into the facts; returns the problem for which the migration should end.
fn absorb(
    facts: &mut Facts,
    from: &HostName,
    side: Side,
    seen: &EventRow,
    now_us: i64,
) -> Result<Option<Problem>, Problem> {
    match seen.kind.as_str() {
        "connected" => {
            let channel: ChannelView = parse(from, seen)?;
            facts.connected_us.get_or_insert(now_us);
            facts.channel.get_or_insert(channel);
        }
        "stopped" if side == Side::Source => {
            facts.stopped_us.get_or_insert(now_us);
        }
        "thawed" | "resumed" if side == Side::Source && facts.frozen_us.is_none() => {
            // The guest runs on: a later STOP begins the downtime anew.
            facts.stopped_us = None;
        }
        "accepted" if side == Side::Target => {
            facts.transferred_bytes = parse::<AcceptedDetail>(from, seen)?.wire_bytes;
        }
        "running" if side == Side::Target => {
            facts.running_us.get_or_insert(now_us);
        }
        "peer-running" if side == Side::Source => {
            let detail: PeerRunningDetail = parse(from, seen)?;
            facts.downtime_ms = Some(detail.downtime_ms);
            facts.downtime_parts = detail.parts.into_iter().take(PARTS_LIMIT).collect();
        }
        "responsive" if side == Side::Target => {
            let detail: ResponsiveDetail = parse(from, seen)?;
            facts.time_to_responsiveness_ms = Some(detail.ms);
            facts.responsiveness_basis = Some(detail.basis.chars().take(200).collect());
        }
        "finding" => return Ok(found(facts, parse(from, seen)?)),
        "failed" => {
            let detail: FailedDetail = parse(from, seen)?;
            let code = detail.code.parse().unwrap_or(ErrorCode::Internal);
            let text: String = detail.detail.chars().take(1_000).collect();
            return Ok(Some(Problem::new(code, format!("host {from}: {text}"))));
        }
        "ended" => return Ok(ended(from, &parse(from, seen)?)),
        // Kept and shown; nothing rests on them.
        _ => {}
    }
    Ok(None)
}

fn found(facts: &mut Facts, finding: Finding) -> Option<Problem> {
    let problem = (finding.severity == Severity::Critical).then(|| {
        let detail = format!(
            "rule {}: expected {}, found {} (channel {}, byte {}, {})",
            finding.rule, finding.expected, finding.found, finding.channel, finding.offset, finding.section
        );
        Problem::new(ErrorCode::StreamRejected, detail)
    });
    facts.find(finding);
    problem
}

/// An agent ended. That its daemon ended it is no news: then the daemon's own statement says what happened.
fn ended(from: &HostName, detail: &EndedDetail) -> Option<Problem> {
    let code = match detail.what.as_str() {
        "hypervisor" => ErrorCode::HypervisorFailed,
        "peer" | "handshake" | "freeze-guard" | "agent" => ErrorCode::ChannelFailed,
        "budget" => ErrorCode::BudgetExceeded,
        "internal" => ErrorCode::Internal,
        _ => return None,
    };
    let text: String = detail.detail.chars().take(1_000).collect();
    Some(Problem::new(code, format!("the VM agent on {from} ended ({}): {text}", detail.what)))
}

/// Tells those who watch.
pub(crate) fn publish(manager: &Manager, id: MigrationId, seen: &EventRow) {
    let mut detail = seen.detail.clone();
    if let Value::Object(map) = &mut detail {
        map.insert("host".to_owned(), json!(seen.host));
    }
    manager.feed.publish(MigrationEvent {
        migration: id,
        at: clock::rfc3339(seen.at_us),
        kind: seen.kind.clone(),
        detail,
    });
}

/// Tells those who watch what the manager itself did.
pub(crate) fn tell(manager: &Manager, row: &MigrationRow, kind: &str, facts: &Facts) {
    let detail = json!({ "state": row.state, "problem": facts.problem, "host": "manager" });
    let at = clock::rfc3339(clock::now_us());
    manager.feed.publish(MigrationEvent { migration: row.id, at, kind: kind.to_owned(), detail });
}
