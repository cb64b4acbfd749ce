//! The handlers: authenticate, ask policy, act, answer.

use super::problem::{Body, Failure};
use super::{App, Caller};
use crate::migration::{control, explain, handover, request, view};
use crate::policy::{Action, VmAction};
use crate::{bundle, clock, hosts, restored, tokens, vms};
use api::http::{
    AddToken, AuditEntry, AuditVerified, Explanation, HostAdded, HostView, Migrate, MigrateAccepted,
    Reconcile, Reconciliation, StartVm, TokenAdded, TokenView, VmInspection, VmView,
};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use registry::AuditVerdict;
use serde::Deserialize;
use std::fmt::Write as _;
use std::time::{Duration, Instant};
use types::host::HostSpec;
use types::migration::{MigrationState, MigrationView};
use types::vm::VmSpec;
use types::{ErrorCode, MigrationId, Problem, Side};

pub(super) type Answer<T> = Result<Json<T>, Failure>;

/// Migrations that one listing shows.
const LIST_LIMIT: u32 = 1_000;
/// Audit entries that one listing shows.
const AUDIT_LIMIT: u32 = 10_000;

/// For how long the answer to "ready?" is good.
const READY_MEMORY: Duration = Duration::from_secs(1);

pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Ready is who can decide: the registry takes writes. Whoever asks needs no token, so the answer is kept for a moment:
/// asking must not keep decisions from being written.
pub(super) async fn readyz(State(app): State<App>) -> Result<&'static str, Failure> {
    let mut held = app.ready.lock().await;
    let answer = match &*held {
        Some((at, answer)) if at.elapsed() < READY_MEMORY => answer.clone(),
        _ => {
            let writes = app.manager.registry.probe(clock::now_us()).await.map_err(Problem::from);
            let answer = writes.and_then(|()| app.manager.must_remember());
            *held = Some((Instant::now(), answer.clone()));
            answer
        }
    };
    answer.map(|()| "ready\n").map_err(Failure)
}

pub(super) async fn not_found(uri: Uri) -> Failure {
    Failure(Problem::new(ErrorCode::BadRequest, format!("there is nothing at {}", uri.path())))
}

pub(super) async fn method_not_allowed(uri: Uri) -> Failure {
    Failure(Problem::new(ErrorCode::BadRequest, format!("{} does not take this method", uri.path())))
}

/// A name or id in a path; one that is malformed names nothing.
pub(super) fn parsed<T: std::str::FromStr>(text: &str, code: ErrorCode) -> Result<T, Failure>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e: T::Err| Failure(Problem::new(code, e.to_string())))
}

pub(super) async fn hosts(State(app): State<App>, caller: Caller) -> Answer<Vec<HostView>> {
    caller.may(&app, Action::View)?;
    let mut tx = app.manager.registry.read("list hosts").await?;
    let mut views = Vec::new();
    for row in tx.hosts().await? {
        let view = hosts::view(&app.manager, &mut tx, row).await?;
        views.push(with_seen_vms(&app, &caller, &mut tx, view).await?);
    }
    Ok(Json(views))
}

pub(super) async fn host(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<HostView> {
    caller.may(&app, Action::View)?;
    let name = parsed(&name, ErrorCode::UnknownHost)?;
    let mut tx = app.manager.registry.read("show a host").await?;
    let row = request::require_host(&mut tx, &name).await?;
    let view = hosts::view(&app.manager, &mut tx, row).await?;
    Ok(Json(with_seen_vms(&app, &caller, &mut tx, view).await?))
}

/// A host without the VMs that the caller does not see.
async fn with_seen_vms(
    app: &App,
    caller: &Caller,
    tx: &mut registry::Tx,
    mut view: HostView,
) -> Result<HostView, Failure> {
    let placed = tx.vms_on(&view.name).await?;
    let all = placed.len();
    let seen = placed.into_iter().filter(|row| caller.sees(app, &row.spec));
    view.vms = seen.map(|row| row.spec.name).collect();
    if let Some(load) = view.load.as_mut().filter(|_| view.vms.len() < all || caller.is_of_some_tenants()) {
        load.running = None;
    }
    Ok(view)
}

/// A VM of this name that policy permits the caller to act on.
async fn permitted_vm(
    app: &App,
    caller: &Caller,
    name: &types::Name,
    action: VmAction,
) -> Result<(), Failure> {
    let row = app.manager.registry.read("permitted VM").await?.vm_named(name).await?;
    let row = row.ok_or_else(|| request::unknown_vm(name))?;
    caller.may_with(app, action, &row.spec)
}

/// A migration of a VM that policy permits the caller to act on.
async fn permitted_migration(app: &App, caller: &Caller, id: &str, action: VmAction) -> Result<(), Failure> {
    let id: MigrationId = parsed(id, ErrorCode::UnknownMigration)?;
    let mut tx = app.manager.registry.read("permitted migration").await?;
    let row = tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    let vm = tx.vm(row.vm).await?.ok_or_else(|| handover::unknown(id))?;
    if !caller.sees(app, &vm.spec) {
        return Err(handover::unknown(id).into());
    }
    caller.may_with(app, action, &vm.spec)
}

pub(super) async fn add_host(
    State(app): State<App>,
    caller: Caller,
    Body(spec): Body<HostSpec>,
) -> Result<(StatusCode, Json<HostAdded>), Failure> {
    caller.may(&app, Action::AddHost)?;
    Ok((StatusCode::CREATED, Json(hosts::add(&app.manager, &caller, spec).await?)))
}

pub(super) async fn tokens(State(app): State<App>, caller: Caller) -> Answer<Vec<TokenView>> {
    caller.may(&app, Action::ManageTokens)?;
    Ok(Json(tokens::list(&app.manager).await?))
}

pub(super) async fn add_token(
    State(app): State<App>,
    caller: Caller,
    Body(order): Body<AddToken>,
) -> Result<(StatusCode, Json<TokenAdded>), Failure> {
    caller.may(&app, Action::ManageTokens)?;
    Ok((StatusCode::CREATED, Json(tokens::add(&app.manager, &caller, order).await?)))
}

pub(super) async fn revoke_token(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<Vec<TokenView>> {
    caller.may(&app, Action::ManageTokens)?;
    let name = parsed(&name, ErrorCode::BadRequest)?;
    tokens::revoke(&app.manager, &caller, &name).await?;
    Ok(Json(tokens::list(&app.manager).await?))
}

pub(super) async fn vms(State(app): State<App>, caller: Caller) -> Answer<Vec<VmView>> {
    caller.may(&app, Action::View)?;
    let mut tx = app.manager.registry.read("list VMs").await?;
    let mut views = Vec::new();
    for row in tx.vms().await? {
        if caller.sees(&app, &row.spec) {
            views.push(vms::view(&mut tx, row).await?);
        }
    }
    Ok(Json(views))
}

pub(super) async fn vm(State(app): State<App>, caller: Caller, Path(name): Path<String>) -> Answer<VmView> {
    caller.may(&app, Action::View)?;
    let name = parsed(&name, ErrorCode::UnknownVm)?;
    let mut tx = app.manager.registry.read("show a VM").await?;
    let row = tx.vm_named(&name).await?.ok_or_else(|| request::unknown_vm(&name))?;
    caller.may_with(&app, VmAction::View, &row.spec)?;
    Ok(Json(vms::view(&mut tx, row).await?))
}

pub(super) async fn inspect_vm(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<VmInspection> {
    caller.may(&app, Action::View)?;
    let name = parsed(&name, ErrorCode::UnknownVm)?;
    permitted_vm(&app, &caller, &name, VmAction::View).await?;
    Ok(Json(vms::inspect(&app.manager, &name).await?))
}

pub(super) async fn define_vm(
    State(app): State<App>,
    caller: Caller,
    Body(spec): Body<VmSpec>,
) -> Result<(StatusCode, Json<VmView>), Failure> {
    caller.may(&app, Action::DefineVm)?;
    // Of a tenant that the caller does not see it would be unknown to its maker.
    app.manager.policies.in_force().policy.on_vm(&caller.principal, VmAction::Use, &spec)?;
    Ok((StatusCode::CREATED, Json(vms::define(&app.manager, &caller, spec).await?)))
}

pub(super) async fn start_vm(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(order): Body<StartVm>,
) -> Answer<VmView> {
    caller.may(&app, Action::StartVm)?;
    let name = parsed(&name, ErrorCode::UnknownVm)?;
    permitted_vm(&app, &caller, &name, VmAction::Use).await?;
    Ok(Json(vms::start(&app.manager, &caller, &name, &order.host).await?))
}

pub(super) async fn stop_vm(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<VmView> {
    caller.may(&app, Action::StopVm)?;
    let name = parsed(&name, ErrorCode::UnknownVm)?;
    permitted_vm(&app, &caller, &name, VmAction::Use).await?;
    Ok(Json(vms::stop(&app.manager, &caller, &name).await?))
}

pub(super) async fn migrate(
    State(app): State<App>,
    caller: Caller,
    Body(order): Body<Migrate>,
) -> Result<(StatusCode, Json<MigrateAccepted>), Failure> {
    let id = request::accept(&app.manager, &caller, &order).await?;
    Ok((StatusCode::ACCEPTED, Json(MigrateAccepted { id })))
}

pub(super) async fn explain(
    State(app): State<App>,
    caller: Caller,
    Body(order): Body<Migrate>,
) -> Answer<Explanation> {
    caller.may(&app, Action::View)?;
    Ok(Json(explain::explain(&app.manager, &caller, &order).await?))
}

pub(super) async fn migrations(State(app): State<App>, caller: Caller) -> Answer<Vec<MigrationView>> {
    caller.may(&app, Action::View)?;
    let mut tx = app.manager.registry.read("list migrations").await?;
    let mut views = Vec::new();
    for row in tx.migrations(LIST_LIMIT).await? {
        if !tx.vm(row.vm).await?.is_some_and(|vm| caller.sees(&app, &vm.spec)) {
            continue;
        }
        views.push(view::view(&app.manager, &mut tx, &row).await?);
    }
    Ok(Json(views))
}

pub(super) async fn migration(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<MigrationView> {
    caller.may(&app, Action::View)?;
    permitted_migration(&app, &caller, &id, VmAction::View).await?;
    shown(&app, &id).await
}

async fn shown(app: &App, id: &str) -> Answer<MigrationView> {
    let id: MigrationId = parsed(id, ErrorCode::UnknownMigration)?;
    let mut tx = app.manager.registry.read("show a migration").await?;
    let row = tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    Ok(Json(view::view(&app.manager, &mut tx, &row).await?))
}

async fn ordered(app: App, caller: Caller, id: String, order: control::Order) -> Answer<MigrationView> {
    caller.may(&app, Action::ControlMigration)?;
    permitted_migration(&app, &caller, &id, VmAction::Use).await?;
    let parsed_id = parsed(&id, ErrorCode::UnknownMigration)?;
    control::order(&app.manager, &caller, parsed_id, order).await?;
    shown(&app, &id).await
}

pub(super) async fn suspend(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<MigrationView> {
    ordered(app, caller, id, control::Order::Suspend).await
}

pub(super) async fn resume(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<MigrationView> {
    ordered(app, caller, id, control::Order::Resume).await
}

pub(super) async fn terminate(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<MigrationView> {
    ordered(app, caller, id, control::Order::Terminate).await
}

/// `POST /v1/migrations/{id}/resolve`: the operator's word that a side is dead and fenced.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Resolve {
    fenced: Side,
}

pub(super) async fn resolve(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    Body(order): Body<Resolve>,
) -> Answer<MigrationView> {
    // Break-glass, like enrolling a host: whoever may vouch for machines.
    caller.may(&app, Action::AddHost)?;
    let parsed_id = parsed(&id, ErrorCode::UnknownMigration)?;
    control::fenced(&app.manager, &caller, parsed_id, order.fenced).await?;
    shown(&app, &id).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    #[serde(default)]
    after: u64,
    limit: Option<u32>,
}

pub(super) async fn audit(
    State(app): State<App>,
    caller: Caller,
    page: Result<Query<Page>, axum::extract::rejection::QueryRejection>,
) -> Answer<Vec<AuditEntry>> {
    caller.may(&app, Action::Audit)?;
    let Query(page) = page.map_err(|e| Problem::new(ErrorCode::BadRequest, e.body_text()))?;
    let limit = page.limit.unwrap_or(AUDIT_LIMIT).min(AUDIT_LIMIT);
    let entries = app.manager.registry.read("list audit").await?.audit_entries(page.after, limit).await?;
    Ok(Json(
        entries
            .into_iter()
            .map(|e| AuditEntry {
                sequence: e.sequence,
                at: clock::rfc3339(e.at_us),
                actor: e.actor,
                action: e.action,
                subject: e.subject,
                detail: e.detail,
                hash: e.hash.to_string(),
            })
            .collect(),
    ))
}

pub(super) async fn verify_audit(State(app): State<App>, caller: Caller) -> Answer<AuditVerified> {
    caller.may(&app, Action::Audit)?;
    let anchor = app.manager.anchor.get();
    let mut tx = app.manager.registry.read("verify audit").await?;
    let verdict = tx.verify_audit(anchor).await?;
    let first_missing = tx.audit_log().await?.and_then(|row| row.first_bad);
    drop(tx);
    if let (AuditVerdict::Whole { entries, head }, None) = (&verdict, app.manager.forgetful.get()) {
        app.manager.anchor.advance(*entries, *head);
    }
    Ok(Json(match (verdict, app.manager.forgetful.get()) {
        (AuditVerdict::Whole { entries, head }, None) => {
            AuditVerified { verified: true, entries, head: head.to_string(), first_bad: None, detail: None }
        }
        // The chain is whole, but it is not the one that was seen.
        (AuditVerdict::Whole { entries, head }, Some(why)) => AuditVerified {
            verified: false,
            entries,
            head: head.to_string(),
            first_bad: first_missing,
            detail: Some(why),
        },
        (AuditVerdict::Broken { first_bad, detail, entries }, _) => AuditVerified {
            verified: false,
            entries,
            head: String::new(),
            first_bad: Some(first_bad),
            detail: Some(detail),
        },
    }))
}

pub(super) async fn bundle(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    caller.may(&app, Action::Audit)?;
    let made = bundle::make(&app.manager, parsed(&id, ErrorCode::UnknownMigration)?).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], bundle::to_text(&made)?).into_response())
}

/// Break-glass, like `resolve`: for whoever may vouch for machines.
pub(super) async fn reconcile(
    State(app): State<App>,
    caller: Caller,
    Body(order): Body<Reconcile>,
) -> Answer<Reconciliation> {
    caller.may(&app, Action::AddHost)?;
    Ok(Json(restored::reconcile(&app.manager, &caller, &order).await?))
}

/// Prometheus text: open to whoever reaches the port, so it names no VM and no host.
pub(super) async fn metrics(State(app): State<App>) -> Result<Response, Failure> {
    let mut tx = app.manager.registry.read("metrics").await?;
    let counts = tx.count_migrations().await?;
    let reservations = tx.count_reservations().await?;
    let (audit_entries, _) = tx.audit_head().await?;
    drop(tx);
    let mut text = String::from("# TYPE outrider_migrations gauge\n");
    for (state, count) in counts {
        let state: MigrationState = state;
        writeln!(text, "outrider_migrations{{state=\"{state}\"}} {count}").unwrap_or_default();
    }
    let connected = app.manager.fleet.connected().len();
    for (name, value) in [
        ("outrider_hosts_connected", connected as u64),
        ("outrider_reservations", reservations),
        ("outrider_audit_entries", audit_entries),
    ] {
        writeln!(text, "# TYPE {name} gauge\n{name} {value}").unwrap_or_default();
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
