//! Policy sets and plans of maintenance.

use super::problem::{Body, Failure};
use super::{App, Caller};
use crate::policy::{Action, plans, shelf};
use api::http::{AddPlan, PlanView, PolicyContent, PolicyRollback, PolicySetView};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use types::{ErrorCode, Nonce, Problem};

type Answer<T> = Result<Json<T>, Failure>;

pub(super) async fn show(State(app): State<App>, caller: Caller) -> Answer<PolicySetView> {
    caller.may(&app, Action::View)?;
    Ok(Json(shelf::show(&app.manager).await?))
}

pub(super) async fn history(State(app): State<App>, caller: Caller) -> Answer<Vec<PolicySetView>> {
    caller.may(&app, Action::View)?;
    Ok(Json(shelf::history(&app.manager).await?))
}

pub(super) async fn apply(
    State(app): State<App>,
    caller: Caller,
    Body(content): Body<PolicyContent>,
) -> Answer<PolicySetView> {
    caller.may(&app, Action::ApplyPolicy)?;
    Ok(Json(shelf::apply(&app.manager, &caller, &content).await?))
}

pub(super) async fn roll_back(
    State(app): State<App>,
    caller: Caller,
    Body(order): Body<PolicyRollback>,
) -> Answer<PolicySetView> {
    caller.may(&app, Action::ApplyPolicy)?;
    Ok(Json(shelf::roll_back(&app.manager, &caller, &order.digest).await?))
}

pub(super) async fn plans(State(app): State<App>, caller: Caller) -> Answer<Vec<PlanView>> {
    caller.may(&app, Action::View)?;
    Ok(Json(plans::list(&app.manager).await?))
}

pub(super) async fn add_plan(
    State(app): State<App>,
    caller: Caller,
    Body(order): Body<AddPlan>,
) -> Result<(StatusCode, Json<PlanView>), Failure> {
    caller.may(&app, Action::Plan)?;
    Ok((StatusCode::CREATED, Json(plans::add(&app.manager, &caller, order).await?)))
}

pub(super) async fn revoke_plan(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<PlanView> {
    caller.may(&app, Action::Plan)?;
    let id: Nonce = id
        .parse()
        .map_err(|_| Failure(Problem::new(ErrorCode::BadRequest, format!("{id:?} is no plan's id"))))?;
    Ok(Json(plans::revoke(&app.manager, &caller, id).await?))
}
