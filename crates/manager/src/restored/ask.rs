//! Asks every host what it holds. What they say is bounded, and parsed before anything is made of it.

use super::plan::{Copy, Held, Report, Shown};
use crate::checkpoints;
use crate::core::Manager;
use crate::fleet::Session;
use api::fleet;
use permit::checkpoint::Checkpoint;
use permit::{PermitToken, VerifyingKey};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use types::permit::PermitClaims;
use types::vm::VmSpec;
use types::{Digest, Epoch, ErrorCode, HostName, Problem};

/// A host answers from memory and its journal.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Far beyond what a request to the manager may hold.
const SPEC_BYTES_MAX: usize = 256 * 1024;

/// What a host said.
pub(super) struct Heard {
    pub(super) report: Report,
    pub(super) checkpoint: Option<Checkpoint>,
}

/// Asks these hosts at once. Those that are not connected, or do not answer, are not in the answer.
///
/// # Errors
/// The registry fails, or a host says what can't be read.
pub(super) async fn all(
    manager: &Arc<Manager>,
    hosts: &[HostName],
) -> Result<BTreeMap<HostName, Heard>, Problem> {
    let sessions: Vec<Arc<Session>> = hosts.iter().filter_map(|host| manager.fleet.session(host)).collect();
    let asked: Vec<_> = sessions.into_iter().map(one).collect();
    let mut heard = BTreeMap::new();
    for (session, parts) in futures::future::join_all(asked).await {
        match parts {
            Ok(parts) => drop(heard.insert(session.host.clone(), read(manager, &session, parts).await?)),
            Err(problem) => tracing::warn!(host = %session.host, "does not say what it holds: {problem}"),
        }
    }
    Ok(heard)
}

async fn one(session: Arc<Session>) -> (Arc<Session>, Result<Vec<fleet::Holdings>, Problem>) {
    let parts = session.ask_holdings(ANSWER_LIMIT).await;
    (session, parts)
}

async fn read(manager: &Manager, session: &Session, parts: Vec<fleet::Holdings>) -> Result<Heard, Problem> {
    let host = &session.host;
    let token = parts.first().map(|p| p.checkpoint.clone()).unwrap_or_default();
    let checkpoint = checkpoints::shown(manager, host, &token).await?;
    let mut report = Report::default();
    for part in parts {
        for vm in &part.vms {
            report.held.push(held(host, vm)?);
        }
        for seen in &part.epochs {
            let vm = seen.vm.parse().map_err(|_| unreadable(host, "a VM id"))?;
            let epoch = report.epochs.entry(vm).or_insert(Epoch(0));
            *epoch = (*epoch).max(Epoch(seen.epoch));
        }
        for attempt in part.attempts {
            let migration = attempt.migration.parse().map_err(|_| unreadable(host, "a migration id"))?;
            let permit = permitted(manager, &attempt.permit).await?;
            let permit = permit.filter(|(claims, _)| claims.key.migration == migration);
            let permit = permit.map(|(claims, digest)| (claims, digest, attempt.permit));
            report.attempts.push(Shown { migration, permit });
        }
    }
    Ok(Heard { report, checkpoint })
}

fn unreadable(host: &HostName, what: &str) -> Problem {
    Problem::new(
        ErrorCode::BadRequest,
        format!("host {host} says what it holds with {what} that cannot be read"),
    )
}

fn held(host: &HostName, vm: &fleet::HeldVm) -> Result<Held, Problem> {
    let state = match vm.state.as_str() {
        "incoming" | "starting" => Copy::Empty,
        // Whatever else it says: a guest may be in it.
        _ => Copy::Whole,
    };
    let uuid = vm.vm.parse().map_err(|_| unreadable(host, "a VM id"))?;
    let spec: Option<VmSpec> = match vm.spec_json.len() {
        0 => None,
        length if length > SPEC_BYTES_MAX => return Err(unreadable(host, "a spec")),
        _ => Some(serde_json::from_str(&vm.spec_json).map_err(|_| unreadable(host, "a spec"))?),
    };
    if spec.as_ref().is_some_and(|s| s.uuid != uuid || s.validate().is_err()) {
        return Err(unreadable(host, "a spec"));
    }
    Ok(Held { vm: uuid, epoch: Epoch(vm.epoch), state, spec })
}

/// What a manager permitted, by its own signature; the time of the permit is long past.
async fn permitted(manager: &Manager, token: &[u8]) -> Result<Option<(PermitClaims, Digest)>, Problem> {
    let Ok(token) = PermitToken::from_bytes(token.to_vec()) else { return Ok(None) };
    let mut tx = manager.registry.read("keys").await?;
    let mut keys = permit::KeyRing::new();
    let (own_id, own_key) = manager.authority.permit_key();
    let known = tx.manager_keys().await?.into_iter().map(|key| (key.key_id, key.public_key));
    for (id, key) in [(own_id, own_key)].into_iter().chain(known) {
        let taken = VerifyingKey::from_bytes(&key).is_ok_and(|key| keys.insert(&id, key));
        if !taken {
            tracing::warn!(key_id = id, "a manager's key is not usable");
        }
    }
    Ok(permit::permit::verify_past(&token, &keys).ok().map(|p| (p.claims().clone(), p.digest())))
}
