//! Operators' tokens: made, listed, revoked. Only a hash is kept; the token itself is shown once.

use crate::authority::token_hash;
use crate::clock;
use crate::core::Manager;
use crate::http::Caller;
use crate::policy::Principal;
use api::http::{AddToken, TokenAdded, TokenView};
use registry::ApiToken;
use serde_json::json;
use types::{ErrorCode, Name, Problem};

/// Ten years: longer is no expiry.
const DAYS_MAX: u32 = 3_650;
const DAY_US: i64 = 24 * 3_600 * 1_000_000;
/// More than these are all.
const TENANTS_MAX: usize = 1_000;
/// Enough for every person and program of a fleet.
const TOKENS_MAX: usize = 10_000;

/// Makes a token for an operator.
///
/// # Errors
/// `bad-request`, `already-exists`, `limit-reached`.
pub(crate) async fn add(manager: &Manager, caller: &Caller, order: AddToken) -> Result<TokenAdded, Problem> {
    expect_no_managers_own(&order.name)?;
    if order.expires_in_days == 0 || order.expires_in_days > DAYS_MAX {
        let detail = format!("expires_in_days is {}, must be 1 to {DAYS_MAX}", order.expires_in_days);
        return Err(Problem::new(ErrorCode::BadRequest, detail));
    }
    if order.tenants.as_ref().is_some_and(|t| t.len() > TENANTS_MAX) {
        let detail = format!("a token names {TENANTS_MAX} tenants at most");
        return Err(Problem::new(ErrorCode::BadRequest, detail).hint("`all` stands for all of them"));
    }
    let tenants: Option<Vec<String>> =
        order.tenants.as_ref().map(|names| names.iter().map(ToString::to_string).collect());
    let token = hex::encode(clock::random::<32>()?);
    let mut tx = manager.begin("add a token").await?;
    let held = tx.api_tokens().await?;
    if held.iter().any(|held| held.name == order.name.as_str()) {
        let detail = format!("{} has a token already", order.name);
        return Err(
            Problem::new(ErrorCode::AlreadyExists, detail).hint("revoke it first, or take another name")
        );
    }
    if held.len() >= TOKENS_MAX {
        return Err(Problem::new(ErrorCode::LimitReached, format!("there are {} tokens", held.len())));
    }
    let row = ApiToken {
        name: order.name.to_string(),
        role: order.role.to_string(),
        expires_at_us: Some(tx.now_us() + i64::from(order.expires_in_days) * DAY_US),
        tenants: tenants.clone(),
    };
    tx.put_api_token(&token_hash(&token), &row).await?;
    let token_view = view(row);
    let detail = json!({
        "role": token_view.role, "expires_at": token_view.expires_at, "tenants": token_view.tenants,
    });
    tx.audit(&caller.audit_name(), "token.add", order.name.as_str(), detail).await?;
    tx.commit().await?;
    let who = Principal { name: order.name.to_string(), role: order.role.to_string(), tenants };
    Ok(TokenAdded { may: manager.policies.in_force().policy.fleet_actions(&who), token_view, token })
}

/// Every token, by name.
///
/// # Errors
/// The registry fails.
pub(crate) async fn list(manager: &Manager) -> Result<Vec<TokenView>, Problem> {
    let held = manager.registry.read("list tokens").await?.api_tokens().await?;
    Ok(held.into_iter().map(view).collect())
}

/// Revokes a token: from the answer on it opens nothing, and event streams that it opened end within a second.
///
/// # Errors
/// `bad-request` when there is none, or it is a manager's own.
pub(crate) async fn revoke(manager: &Manager, caller: &Caller, name: &Name) -> Result<(), Problem> {
    expect_no_managers_own(name)?;
    let mut tx = manager.begin("revoke a token").await?;
    if !tx.remove_api_token(name.as_str()).await? {
        let detail = format!("{name} has no token");
        return Err(Problem::new(ErrorCode::BadRequest, detail).hint("`outrider token list` shows all"));
    }
    tx.audit(&caller.audit_name(), "token.revoke", name.as_str(), json!({})).await?;
    Ok(tx.commit().await?)
}

/// Each manager has an admin token of its own in its state folder, and would put it back when it starts.
fn expect_no_managers_own(name: &Name) -> Result<(), Problem> {
    if name.as_str() != "admin" && !name.as_str().starts_with("admin-") {
        return Ok(());
    }
    let detail = format!("{name} is the name of a manager's own token");
    Err(Problem::new(ErrorCode::BadRequest, detail).hint(
        "to change that one, remove admin.token from the manager's state folder and restart the manager",
    ))
}

fn view(token: ApiToken) -> TokenView {
    let expired = token.expires_at_us.is_some_and(|at| at <= clock::now_us());
    let expires_at = token.expires_at_us.map(clock::rfc3339);
    TokenView { name: token.name, role: token.role, expires_at, expired, tenants: token.tenants }
}
