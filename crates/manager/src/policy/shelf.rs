//! The policy set in force: the last one that was applied, kept in the registry, or else the one that this manager was
//! configured with. Whoever decides holds one set from beginning to end, and the grant's transaction looks whether it is
//! still in force.

use super::table::{self, Table};
use super::{Policy, bad};
use crate::clock;
use crate::core::Manager;
use crate::http::Caller;
use api::http::{PolicyContent, PolicyItem, PolicySetView};
use registry::{PolicyVersion, Registry, Tx};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use types::{ErrorCode, Problem};

/// Sets that a history shows.
const HISTORY_LIMIT: u32 = 1_000;
/// The beginning of a digest that is enough to name it.
const DIGEST_MIN: usize = 8;
/// A request has 256 KiB at most; what is kept must fit one, to be shown and sent again.
const CONTENT_BYTES_MAX: usize = 200 << 10;

/// A loaded set with its number.
pub(crate) struct InForce {
    pub(crate) sequence: u64,
    pub(crate) policy: Policy,
    applied_by: String,
    applied_at_us: Option<i64>,
}

/// Holds the set in force.
pub(crate) struct Shelf {
    held: RwLock<Arc<InForce>>,
}

impl Shelf {
    /// With the set that the manager was configured with, until the registry has another.
    ///
    /// # Errors
    /// The registry fails, or holds a set that this version cannot use.
    pub(crate) async fn open(configured: Policy, registry: &Registry) -> Result<Self, Problem> {
        let configured = InForce {
            sequence: 0,
            policy: configured,
            applied_by: "the manager's configuration".to_owned(),
            applied_at_us: None,
        };
        let held = match registry.read("policy in force").await?.policy_in_force().await? {
            Some(version) => loaded(&version)?,
            None => configured,
        };
        Ok(Self { held: RwLock::new(Arc::new(held)) })
    }

    /// The set that this manager knows to be in force.
    pub(crate) fn in_force(&self) -> Arc<InForce> {
        Arc::clone(&self.held.read().expect("no holder of this lock can panic: it only copies"))
    }

    /// Looks whether another manager applied a set, and takes it.
    ///
    /// # Errors
    /// The registry fails, or holds a set that this version cannot use: it is not passed over for an older one.
    pub(crate) async fn refresh(&self, tx: &mut Tx) -> Result<Arc<InForce>, Problem> {
        let held = self.in_force();
        if tx.policy_sequence().await? == held.sequence {
            return Ok(held);
        }
        let Some(version) = tx.policy_in_force().await? else { return Ok(held) };
        let fresh = Arc::new(loaded(&version)?);
        self.put(&fresh);
        tracing::info!(sequence = fresh.sequence, digest = version.digest, "another policy set is in force");
        Ok(fresh)
    }

    fn put(&self, fresh: &Arc<InForce>) {
        let mut held = self.held.write().expect("no holder of this lock can panic: it only copies");
        // Of two that load at once the newer one stays.
        if fresh.sequence > held.sequence {
            *held = Arc::clone(fresh);
        }
    }
}

fn loaded(version: &PolicyVersion) -> Result<InForce, Problem> {
    let unusable = |why: String| {
        let detail = format!("the policy set in force (number {}) cannot be used: {why}", version.sequence);
        Problem::new(ErrorCode::BadConfiguration, detail)
            .hint("apply a set that this version can use from a manager of the version that applied this one")
    };
    let content: PolicyContent =
        serde_json::from_str(&version.content).map_err(|e| unusable(e.to_string()))?;
    Ok(InForce {
        sequence: version.sequence,
        policy: Policy::of_content(&content).map_err(|problem| unusable(problem.detail))?,
        applied_by: version.applied_by.clone(),
        applied_at_us: Some(version.applied_at_us),
    })
}

/// Puts a set into force: it is validated, every expectation must hold, and row and audit entry are one transaction.
/// Whatever has to come before that (a second person's word) comes before this is called.
///
/// # Errors
/// `bad-configuration` for a set that cannot be used, `bad-request` for expectations that do not hold; the set in force
/// stays then.
pub(crate) async fn apply(
    manager: &Manager,
    caller: &Caller,
    content: &PolicyContent,
) -> Result<PolicySetView, Problem> {
    let policy = Policy::of_content(content)?;
    if let Some(expectations) = &content.expectations {
        expect(&policy, expectations)?;
    }
    keeps_the_door_open(&policy, caller)?;
    let text = serde_json::to_string(content)
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("the policy set does not serialise: {e}")))?;
    if text.len() > CONTENT_BYTES_MAX {
        return Err(bad(format!("the policy set has {} bytes, {CONTENT_BYTES_MAX} are allowed", text.len())));
    }
    let digest = policy.digest().to_string();
    let mut tx = manager.begin("apply policies").await?;
    let before = tx.policy_sequence().await?;
    let sequence = tx.apply_policy(&digest, &text, &caller.audit_name()).await?;
    let detail = json!({ "sequence": sequence, "before": before, "digest": digest });
    tx.audit(&caller.audit_name(), "policy.apply", &digest, detail).await?;
    let now_us = tx.now_us();
    tx.commit().await?;
    let fresh = InForce { sequence, policy, applied_by: caller.audit_name(), applied_at_us: Some(now_us) };
    let fresh = Arc::new(fresh);
    manager.policies.put(&fresh);
    Ok(view(&fresh))
}

fn expect(policy: &Policy, expectations: &str) -> Result<(), Problem> {
    let table: Table = toml::from_str(expectations).map_err(|e| {
        Problem::new(ErrorCode::BadRequest, format!("the expectations: {}", e.to_string().trim_end()))
    })?;
    let report = table::run(policy, &table)?;
    let Some(failed) = report.cases.iter().find(|case| !case.passed) else { return Ok(()) };
    let by = if failed.by.is_empty() { "the default".to_owned() } else { failed.by.join(", ") };
    let detail = format!(
        "{} of {} expectations do not hold; the first is {:?} ({}): expected {}, found {} by {by}",
        report.failed,
        report.cases.len(),
        failed.name,
        failed.question,
        failed.expected,
        failed.found
    );
    Err(Problem::new(ErrorCode::BadRequest, detail).hint("`outrider policy test` shows every case"))
}

/// A set under which nobody like the caller could apply another one would be in force for ever.
fn keeps_the_door_open(policy: &Policy, caller: &Caller) -> Result<(), Problem> {
    policy.fleet(&caller.principal, super::Action::ApplyPolicy).map(|_| ()).map_err(|problem| {
        let detail = format!("under this set you could not apply another one: {}", problem.detail);
        Problem::new(ErrorCode::BadRequest, detail).hint("permit \"apply-policy\" to those who are to do it")
    })
}

/// Puts a set into force again that was before.
///
/// # Errors
/// `bad-request` when no set, or more than one, has that digest; as [`apply`].
pub(crate) async fn roll_back(
    manager: &Manager,
    caller: &Caller,
    digest: &str,
) -> Result<PolicySetView, Problem> {
    let bad = |detail: String| {
        Problem::new(ErrorCode::BadRequest, detail)
            .hint("`outrider policy history` shows every set that was in force")
    };
    if digest.len() < DIGEST_MIN {
        return Err(bad(format!("{DIGEST_MIN} characters of a digest are needed at least")));
    }
    let mut tx = manager.registry.read("find a policy set").await?;
    let history = tx.policy_history(HISTORY_LIMIT).await?;
    let mut found: Vec<_> = history.into_iter().filter(|v| v.digest.starts_with(digest)).collect();
    found.dedup_by(|a, b| a.digest == b.digest);
    let digests: std::collections::BTreeSet<_> = found.iter().map(|v| v.digest.clone()).collect();
    let (Some(version), 1) = (found.first(), digests.len()) else {
        return Err(bad(format!("{} policy sets that were in force have a digest {digest}…", digests.len())));
    };
    let content: PolicyContent = serde_json::from_str(&version.content)
        .map_err(|e| bad(format!("the set {} cannot be read any more: {e}", version.digest)))?;
    drop(tx);
    apply(manager, caller, &content).await
}

/// The set in force.
///
/// # Errors
/// The registry fails.
pub(crate) async fn show(manager: &Manager) -> Result<PolicySetView, Problem> {
    let mut tx = manager.registry.read("show policies").await?;
    Ok(view(&*manager.policies.refresh(&mut tx).await?))
}

/// Every set that was applied, newest first.
///
/// # Errors
/// The registry fails.
pub(crate) async fn history(manager: &Manager) -> Result<Vec<PolicySetView>, Problem> {
    let rows = manager.registry.read("policy history").await?.policy_history(HISTORY_LIMIT).await?;
    let of = |row: PolicyVersion| PolicySetView {
        sequence: row.sequence,
        digest: row.digest,
        applied_by: row.applied_by,
        applied_at: Some(clock::rfc3339(row.applied_at_us)),
        policies: Vec::new(),
        files: BTreeMap::new(),
    };
    Ok(rows.into_iter().map(of).collect())
}

fn view(held: &InForce) -> PolicySetView {
    let item = |view: table::PolicyView| PolicyItem {
        id: view.id,
        effect: view.effect.to_owned(),
        reason: view.reason,
    };
    PolicySetView {
        sequence: held.sequence,
        digest: held.policy.digest().to_string(),
        applied_by: held.applied_by.clone(),
        applied_at: held.applied_at_us.map(clock::rfc3339),
        policies: held.policy.list().into_iter().map(item).collect(),
        files: held.policy.files().clone(),
    }
}
