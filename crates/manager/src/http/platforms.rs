//! Platforms and the values that they are measured against.

use super::handlers::{Answer, parsed};
use super::problem::Body;
use super::{App, Caller};
use crate::attestation::{self, reference};
use crate::migration::request;
use crate::policy::Action;
use api::http::{AllowValue, AttestationView, RecordReference, ReferenceView};
use axum::Json;
use axum::extract::{Path, State};
use types::ErrorCode;

/// Asks a host's TPM now. Whoever may look at hosts may have them looked at.
pub(super) async fn attest(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
) -> Answer<AttestationView> {
    caller.may(&app, Action::View)?;
    let name = parsed(&name, ErrorCode::UnknownHost)?;
    let row = request::require_host(&mut app.manager.registry.read("attest a host").await?, &name).await?;
    Ok(Json(attestation::check(&app.manager, &caller, &row).await?))
}

pub(super) async fn record(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    Body(order): Body<RecordReference>,
) -> Answer<ReferenceView> {
    caller.may(&app, Action::SetReference)?;
    let name = parsed(&name, ErrorCode::UnknownHost)?;
    let row = request::require_host(&mut app.manager.registry.read("record a host").await?, &name).await?;
    Ok(Json(reference::record(&app.manager, &caller, &row, order).await?))
}

pub(super) async fn references(State(app): State<App>, caller: Caller) -> Answer<Vec<ReferenceView>> {
    caller.may(&app, Action::View)?;
    Ok(Json(reference::list(&app.manager).await?))
}

pub(super) async fn reference(
    State(app): State<App>,
    caller: Caller,
    Path((kind, name)): Path<(String, String)>,
) -> Answer<ReferenceView> {
    caller.may(&app, Action::View)?;
    let scope = reference::scope(&kind, &name)?;
    Ok(Json(reference::show(&app.manager, &scope).await?))
}

pub(super) async fn set(
    State(app): State<App>,
    caller: Caller,
    Path((kind, name)): Path<(String, String)>,
    Body(values): Body<serde_json::Value>,
) -> Answer<ReferenceView> {
    caller.may(&app, Action::SetReference)?;
    let scope = reference::scope(&kind, &name)?;
    Ok(Json(reference::set(&app.manager, &caller, &scope, values).await?))
}

pub(super) async fn allow(
    State(app): State<App>,
    caller: Caller,
    Path((kind, name)): Path<(String, String)>,
    Body(order): Body<AllowValue>,
) -> Answer<ReferenceView> {
    caller.may(&app, Action::SetReference)?;
    let scope = reference::scope(&kind, &name)?;
    Ok(Json(reference::allow(&app.manager, &caller, &scope, order).await?))
}

pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path((kind, name)): Path<(String, String)>,
) -> Answer<Vec<ReferenceView>> {
    caller.may(&app, Action::SetReference)?;
    let scope = reference::scope(&kind, &name)?;
    Ok(Json(reference::remove(&app.manager, &caller, &scope).await?))
}
