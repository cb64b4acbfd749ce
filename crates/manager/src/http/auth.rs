//! Who calls: a bearer token whose hash the registry holds. Failed attempts are limited per address.

use super::problem::Failure;
use super::{App, CallerAddress};
use crate::authority::token_hash;
use crate::clock;
use crate::migration::request::unknown_vm;
use crate::policy::{Action, Principal, VmAction};
use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::{header, request::Parts};
use registry::ApiToken;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;
use types::vm::VmSpec;
use types::{ErrorCode, Problem};

/// Failures of one address before it has to wait.
const FAILURES_LIMIT: u32 = 10;
/// For how long they count.
const FAILURES_WINDOW_US: i64 = 60_000_000;
/// Addresses that are remembered: an attacker with more of them gains nothing by being forgotten.
const ADDRESSES_LIMIT: usize = 10_000;
/// How often a long answer looks at whether its token still holds: two seconds are promised.
const REVOCATION_POLL: Duration = Duration::from_secs(1);
const HINT: &str = "send `Authorization: Bearer …` with the token that the manager's first run wrote, or with one of \
                    `outrider token add` that has neither expired nor been revoked";
/// Tokens are 64 characters.
const TOKEN_LIMIT_BYTES: usize = 512;

/// An authenticated caller.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) principal: Principal,
    pub(crate) address: IpAddr,
    /// Hash of its token, which may be revoked while a long answer goes on.
    token: [u8; 32],
}

impl Caller {
    /// As the audit log names it: who, and from where.
    pub(crate) fn audit_name(&self) -> String {
        format!("operator/{} from {}", self.principal.name, self.address)
    }

    /// Returns once its token opens nothing any more: revoked, expired, or of another role. While the registry can't be
    /// asked nobody can say so, and nothing new is decided either.
    pub(crate) async fn until_revoked(self, app: App) {
        loop {
            tokio::time::sleep(REVOCATION_POLL).await;
            match valid(&app, &self.token).await {
                Ok(Some(held))
                    if held.role == self.principal.role && held.tenants == self.principal.tenants => {}
                Ok(_) => return,
                Err(problem) => tracing::debug!(%problem, "cannot look at a token"),
            }
        }
    }

    /// Demands that policy permits an action on the fleet.
    ///
    /// # Errors
    /// `forbidden`, with the reason.
    pub(crate) fn may(&self, app: &App, action: Action) -> Result<(), Failure> {
        app.manager.policies.in_force().policy.fleet(&self.principal, action)?;
        Ok(())
    }

    /// Demands that policy permits an action on a VM. A VM that the caller may not even see is unknown to it.
    ///
    /// # Errors
    /// `unknown-vm`, or `forbidden` with the reason.
    pub(crate) fn may_with(&self, app: &App, action: VmAction, vm: &VmSpec) -> Result<(), Failure> {
        let held = app.manager.policies.in_force();
        if held.policy.on_vm(&self.principal, VmAction::View, vm).is_err() {
            return Err(unknown_vm(&vm.name).into());
        }
        held.policy.on_vm(&self.principal, action, vm)?;
        Ok(())
    }

    /// Whether it may see a VM.
    pub(crate) fn sees(&self, app: &App, vm: &VmSpec) -> bool {
        app.manager.policies.in_force().policy.on_vm(&self.principal, VmAction::View, vm).is_ok()
    }

    /// Whether it sees the VMs of some tenants only: what tells of all VMs at once is not for it.
    pub(crate) fn is_of_some_tenants(&self) -> bool {
        self.principal.tenants.as_ref().is_some_and(|tenants| !tenants.iter().any(|t| t == "all"))
    }
}

/// Counts failed attempts.
#[derive(Default)]
pub(crate) struct Doorkeeper {
    failures: Mutex<BTreeMap<IpAddr, (u32, i64)>>,
}

impl Doorkeeper {
    /// Whether this address must wait.
    pub(crate) fn is_barred(&self, address: IpAddr, now_us: i64) -> bool {
        let failures = self.failures.lock().expect("no holder of this lock can panic: it only counts");
        failures
            .get(&address)
            .is_some_and(|(count, since)| *count >= FAILURES_LIMIT && now_us - since < FAILURES_WINDOW_US)
    }

    /// Counts a failure; which one it is of this address in the window.
    pub(crate) fn failed(&self, address: IpAddr, now_us: i64) -> u32 {
        let mut failures = self.failures.lock().expect("no holder of this lock can panic: it only counts");
        if failures.len() >= ADDRESSES_LIMIT {
            failures.retain(|_, (_, since)| now_us - *since < FAILURES_WINDOW_US);
        }
        if failures.len() >= ADDRESSES_LIMIT && !failures.contains_key(&address) {
            return u32::MAX;
        }
        let entry = failures.entry(address).or_insert((0, now_us));
        if now_us - entry.1 >= FAILURES_WINDOW_US {
            *entry = (0, now_us);
        }
        entry.0 = entry.0.saturating_add(1);
        entry.0
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let address = parts.extensions.get::<ConnectInfo<CallerAddress>>().map(|c| c.0.0.ip().to_canonical());
        let address =
            address.ok_or_else(|| Problem::new(ErrorCode::Internal, "the caller has no address"))?;
        let now_us = clock::now_us();
        if app.door.is_barred(address, now_us) {
            let detail = "too many failed attempts from this address";
            return Err(Problem::new(ErrorCode::LimitReached, detail).hint("wait a minute").into());
        }
        match authenticate(parts, app, address).await? {
            Some(caller) => Ok(caller),
            None => {
                app.door.failed(address, now_us);
                let detail = "the request carries no valid token";
                Err(Problem::new(ErrorCode::Unauthenticated, detail).hint(HINT).into())
            }
        }
    }
}

async fn authenticate(parts: &Parts, app: &App, address: IpAddr) -> Result<Option<Caller>, Failure> {
    let header = parts.headers.get(header::AUTHORIZATION).and_then(|h| h.to_str().ok());
    let token = header.and_then(|h| h.strip_prefix("Bearer ")).map(str::trim);
    let Some(token) = token.filter(|t| !t.is_empty() && t.len() <= TOKEN_LIMIT_BYTES) else {
        return Ok(None);
    };
    let token = token_hash(token);
    let mut tx = app.manager.registry.read("policy in force").await?;
    // What this request may is asked of the set in force, also where another manager applied it.
    app.manager.policies.refresh(&mut tx).await?;
    drop(tx);
    let held = valid(app, &token).await?;
    let principal = |t: ApiToken| Principal { name: t.name, role: t.role, tenants: t.tenants };
    Ok(held.map(|t| Caller { principal: principal(t), address, token }))
}

/// The token, unless it is unknown, revoked or expired.
async fn valid(app: &App, token: &[u8; 32]) -> Result<Option<ApiToken>, Problem> {
    let held = app.manager.registry.read("authenticate").await?.api_token(token).await?;
    let now_us = clock::now_us();
    Ok(held.filter(|t| t.expires_at_us.is_none_or(|at| at > now_us)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_fails_often_waits_and_others_do_not() {
        let door = Doorkeeper::default();
        let (bad, good) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        for _ in 0..FAILURES_LIMIT {
            assert!(!door.is_barred(bad, 1));
            door.failed(bad, 1);
        }
        assert!(door.is_barred(bad, 2) && !door.is_barred(good, 2));
        assert!(!door.is_barred(bad, 1 + FAILURES_WINDOW_US));
        door.failed(bad, 1 + FAILURES_WINDOW_US);
        assert!(!door.is_barred(bad, 2 + FAILURES_WINDOW_US), "the count starts anew");
    }
}
