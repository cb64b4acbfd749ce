//! Plans of maintenance: who may be moved from a host, where to, and in which window, signed by the manager. A request
//! that names one shows it to policy, once it is found to be signed, in force and about this very move.

use super::PlanFacts;
use crate::clock;
use crate::core::Manager;
use crate::http::Caller;
use crate::migration::Facts;
use crate::migration::gates::Grounds;
use crate::migration::request::require_host;
use api::http::{AddPlan, PlanView};
use registry::{PlanRow, Tx};
use serde::{Deserialize, Serialize};
use serde_json::json;
use types::{ErrorCode, HostName, Nonce, Problem};

/// Plans that a list shows.
const LIST_LIMIT: u32 = 1_000;
/// The longest window: what takes longer is no maintenance, but the rule.
const WINDOW_S_MAX: u64 = 30 * 24 * 3_600;
/// Targets and zones that a plan names: it must fit a signed document.
const NAMED_MAX: usize = 64;
const ZONE_BYTES_MAX: usize = 64;

/// What is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    version: u16,
    id: Nonce,
    /// From which VMs are moved.
    host: HostName,
    /// Where to; any host when empty.
    targets: Vec<HostName>,
    /// Zones of the targets; any when empty.
    zones: Vec<String>,
    not_before_unix_s: u64,
    not_after_unix_s: u64,
    created_by: String,
}

impl Plan {
    /// What speaks against it covering a move, if anything.
    fn gap(&self, source: &HostName, (target, zone): (&HostName, &str), now_s: u64) -> Option<String> {
        if *source != self.host {
            return Some(format!("it is about host {}, not {source}", self.host));
        }
        if now_s < self.not_before_unix_s {
            return Some("its window has not begun".to_owned());
        }
        if now_s >= self.not_after_unix_s {
            return Some("its window is over".to_owned());
        }
        if !self.targets.is_empty() && !self.targets.contains(target) {
            return Some(format!("it does not name {target} as a target"));
        }
        if !self.zones.is_empty() && !self.zones.iter().any(|z| z == zone) {
            return Some(format!("it does not allow targets in zone {zone:?}"));
        }
        None
    }
}

/// The plan that a request names, if it names one, once it covers the move. The transaction says whether it is in force.
///
/// # Errors
/// `policy-denied`: a plan that is named and does not cover the move is no plan to fall back from.
pub(crate) async fn covering(
    manager: &Manager,
    tx: &mut Tx,
    facts: &Facts,
    grounds: &Grounds,
) -> Result<Option<PlanFacts>, Problem> {
    let Some(id) = facts.plan else { return Ok(None) };
    let refused =
        |why: String| Problem::new(ErrorCode::PolicyDenied, format!("plan {id} does not hold: {why}"));
    let row = tx.plan(&id.to_string()).await?.ok_or_else(|| refused("there is none".to_owned()))?;
    let plan = manager
        .authority
        .read_plan(&row.token)
        .map_err(|e| refused(format!("this manager did not sign it ({e})")))?;
    // A signed plan under another plan's id.
    if plan.id != id {
        return Err(refused(format!("what is signed is plan {}", plan.id)));
    }
    if row.revoked_at_us.is_some() {
        return Err(refused("it was taken back".to_owned()));
    }
    let target = (grounds.target.name(), grounds.target.spec.zone.as_str());
    match plan.gap(grounds.source.name(), target, clock::now_s()) {
        Some(why) => Err(refused(why)),
        None => Ok(Some(PlanFacts { id: id.to_string(), created_by: plan.created_by })),
    }
}

/// Makes a plan.
///
/// # Errors
/// `unknown-host`, `bad-request`.
pub(crate) async fn add(manager: &Manager, caller: &Caller, order: AddPlan) -> Result<PlanView, Problem> {
    let bad = |detail: String| Err(Problem::new(ErrorCode::BadRequest, detail));
    let now_s = clock::now_s();
    let not_before_unix_s = order.not_before_unix_s.unwrap_or(now_s);
    if order.not_after_unix_s <= now_s.max(not_before_unix_s) {
        return bad("the plan's window is over before it begins".to_owned());
    }
    if order.not_after_unix_s - not_before_unix_s > WINDOW_S_MAX {
        return bad(format!("the plan's window is longer than {} days", WINDOW_S_MAX / 86_400));
    }
    if order.targets.len() > NAMED_MAX || order.zones.len() > NAMED_MAX {
        return bad(format!("a plan names {NAMED_MAX} targets and {NAMED_MAX} zones at most"));
    }
    if order.zones.iter().any(|z| z.len() > ZONE_BYTES_MAX || z.bytes().any(|b| b < 0x20)) {
        return bad(format!("a zone is a word of at most {ZONE_BYTES_MAX} bytes"));
    }
    if order.targets.contains(&order.host) {
        return bad(format!("host {} cannot be its own target", order.host));
    }
    let plan = Plan {
        version: 1,
        id: Nonce::from_bytes(clock::random()?),
        host: order.host,
        targets: order.targets,
        zones: order.zones,
        not_before_unix_s,
        not_after_unix_s: order.not_after_unix_s,
        created_by: caller.principal.name.clone(),
    };
    let mut tx = manager.begin("make a plan").await?;
    for host in plan.targets.iter().chain([&plan.host]) {
        require_host(&mut tx, host).await?;
    }
    let row = PlanRow {
        id: plan.id.to_string(),
        host: plan.host.clone(),
        token: manager.authority.sign_plan(&plan)?,
        created_by: caller.audit_name(),
        created_at_us: tx.now_us(),
        revoked_at_us: None,
    };
    tx.add_plan(&row).await?;
    let detail = json!({
        "plan": plan.id, "host": plan.host, "targets": plan.targets, "zones": plan.zones,
        "not_before_unix_s": plan.not_before_unix_s, "not_after_unix_s": plan.not_after_unix_s,
    });
    tx.audit(&caller.audit_name(), "plan.create", plan.host.as_str(), detail).await?;
    tx.commit().await?;
    Ok(view(manager, &row))
}

/// Takes a plan back: nothing that is decided from then on rests on it.
///
/// # Errors
/// `bad-request` when there is none in force with that id.
pub(crate) async fn revoke(manager: &Manager, caller: &Caller, id: Nonce) -> Result<PlanView, Problem> {
    let mut tx = manager.begin("revoke a plan").await?;
    let none = || Problem::new(ErrorCode::BadRequest, format!("no plan {id} is in force"));
    if !tx.revoke_plan(&id.to_string()).await? {
        return Err(none());
    }
    let row = tx.plan(&id.to_string()).await?.ok_or_else(none)?;
    tx.audit(&caller.audit_name(), "plan.revoke", row.host.as_str(), json!({ "plan": id })).await?;
    tx.commit().await?;
    Ok(view(manager, &row))
}

/// The latest plans, newest first.
///
/// # Errors
/// The registry fails.
pub(crate) async fn list(manager: &Manager) -> Result<Vec<PlanView>, Problem> {
    let rows = manager.registry.read("list plans").await?.plans(LIST_LIMIT).await?;
    Ok(rows.iter().map(|row| view(manager, row)).collect())
}

fn view(manager: &Manager, row: &PlanRow) -> PlanView {
    let plan = manager.authority.read_plan(&row.token).ok().filter(|plan| plan.id.to_string() == row.id);
    let now_s = clock::now_s();
    let state = match &plan {
        None => "not-signed-here",
        Some(_) if row.revoked_at_us.is_some() => "revoked",
        Some(plan) if now_s < plan.not_before_unix_s => "waiting",
        Some(plan) if now_s >= plan.not_after_unix_s => "over",
        Some(_) => "in-force",
    };
    let at = |s: u64| clock::rfc3339(i64::try_from(s.saturating_mul(1_000_000)).unwrap_or(i64::MAX));
    PlanView {
        id: row.id.clone(),
        host: row.host.clone(),
        state: state.to_owned(),
        targets: plan.as_ref().map(|p| p.targets.clone()).unwrap_or_default(),
        zones: plan.as_ref().map(|p| p.zones.clone()).unwrap_or_default(),
        not_before: plan.as_ref().map(|p| at(p.not_before_unix_s)),
        not_after: plan.as_ref().map(|p| at(p.not_after_unix_s)),
        created_by: row.created_by.clone(),
        created_at: clock::rfc3339(row.created_at_us),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut Plan), now_s: u64, expect: Option<&str>) {
        let mut plan = Plan {
            version: 1,
            id: Nonce::from_bytes([1; 16]),
            host: "host-a".parse().unwrap(),
            targets: Vec::new(),
            zones: Vec::new(),
            not_before_unix_s: 100,
            not_after_unix_s: 200,
            created_by: "ann".to_owned(),
        };
        change(&mut plan);
        let (source, target) = ("host-a".parse().unwrap(), "host-b".parse().unwrap());
        let gap = plan.gap(&source, (&target, "berlin"), now_s);
        match (&gap, expect) {
            (None, None) => {}
            (Some(why), Some(part)) => assert!(why.contains(part), "{why}"),
            _ => panic!("{gap:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn a_plan_covers_its_host_in_its_window_to_its_targets() {
        check(|_| {}, 100, None);
        check(|_| {}, 199, None);
        check(|_| {}, 99, Some("has not begun"));
        check(|_| {}, 200, Some("is over"));
        check(|p| p.host = "host-c".parse().unwrap(), 150, Some("about host host-c, not host-a"));
        check(|p| p.targets = vec!["host-b".parse().unwrap()], 150, None);
        check(|p| p.targets = vec!["host-c".parse().unwrap()], 150, Some("does not name host-b"));
        check(|p| p.zones = vec!["berlin".to_owned()], 150, None);
        check(|p| p.zones = vec!["oslo".to_owned()], 150, Some("zone \"berlin\""));
    }
}
