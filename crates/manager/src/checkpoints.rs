//! Checkpoints of the audit log: signed, told to every host, and asked back from it. A host that shows one which the log
//! does not contain proves that the log was rolled back or forked: it can only show what a manager signed.

use crate::clock;
use crate::core::Manager;
use crate::fleet::Session;
use crate::migration::handover;
use api::fleet::{self, to_host};
use permit::VerifyingKey;
use permit::checkpoint::{self, Checkpoint, Extension};
use registry::{LogRow, Tx};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use types::{Digest, ErrorCode, HostName, Problem};

/// A checkpoint with its signature.
pub(crate) struct Signed {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) token: Vec<u8>,
}

/// Signs where the log stands in this transaction.
///
/// # Errors
/// `audit-broken`: it may have lost entries, or its tree does not stand. Signing it would vouch for a fork.
pub(crate) async fn sign(manager: &Manager, tx: &mut Tx) -> Result<Signed, Problem> {
    manager.must_remember()?;
    crate::trust::must_be_trusted(tx).await?;
    let (row, tip) = (tx.audit_log().await?, tx.audit_tip().await?);
    let (Some(row), Some(tip)) = (row, tip) else {
        let detail = "the audit log's tree does not match its chain, so nothing can be signed of it";
        return Err(Problem::new(ErrorCode::AuditBroken, detail).hint("see `outrider audit verify`"));
    };
    let checkpoint = Checkpoint {
        log: row.log,
        generation: row.generation,
        size: tip.size,
        head: tip.head,
        root: tip.root,
        at_us: clock::now_us(),
    };
    let token = manager.authority.sign_checkpoint(&checkpoint)?;
    Ok(Signed { checkpoint, token })
}

/// Tells every connected host where the log stands, if that is news to it.
pub(crate) async fn tell_all(manager: &Manager) {
    let sessions = manager.fleet.sessions();
    tell(manager, &sessions).await;
}

/// Tells these hosts.
pub(crate) async fn tell(manager: &Manager, sessions: &[Arc<Session>]) {
    if sessions.is_empty() || manager.forgetful.get().is_some() {
        return;
    }
    if let Err(problem) = told(manager, sessions).await {
        tracing::warn!(code = %problem.code, "no checkpoint for the hosts: {}", problem.detail);
    }
}

async fn told(manager: &Manager, sessions: &[Arc<Session>]) -> Result<(), Problem> {
    let mut tx = manager.registry.read("checkpoint").await?;
    let signed = sign(manager, &mut tx).await?;
    let mut extensions: BTreeMap<u64, Option<Extension>> = BTreeMap::new();
    for session in sessions {
        let from = match session.checkpoint() {
            Some(held)
                if held.size == signed.checkpoint.size && held.generation == signed.checkpoint.generation =>
            {
                continue;
            }
            Some(held) if held.generation == signed.checkpoint.generation => Some(held.size),
            _ => None,
        };
        let extension = match from {
            None => None,
            Some(from) => match extensions.get(&from) {
                Some(known) => known.clone(),
                None => {
                    let made = tx.audit_extension(from, signed.checkpoint.size).await?;
                    extensions.insert(from, made.clone());
                    made
                }
            },
        }
        .unwrap_or_default();
        let order = fleet::Checkpoint {
            token: signed.token.clone(),
            from_size: extension.from_size,
            extension: extension.proof.iter().map(|hash| hash.0.to_vec()).collect(),
        };
        if session.tell(to_host::Body::Checkpoint(order)).is_ok() {
            session.keeps_checkpoint(Some(signed.checkpoint.clone()));
        }
    }
    Ok(())
}

/// What a host shows of the log, in its hello or because it does not take a checkpoint. Where the log does not contain it,
/// nothing new is decided from here on.
///
/// # Errors
/// The registry fails.
pub(crate) async fn shown(
    manager: &Manager,
    host: &HostName,
    token: &[u8],
) -> Result<Option<Checkpoint>, Problem> {
    if token.is_empty() {
        return Ok(None);
    }
    let mut tx = manager.registry.read("checkpoint of a host").await?;
    let Some(checkpoint) = verified(manager, &mut tx, host, token).await? else { return Ok(None) };
    let (head, _) = tx.audit_head().await?;
    let holds = tx.audit_holds(checkpoint.size, checkpoint.head).await?;
    let row = tx.audit_log().await?;
    drop(tx);
    let Some(doubt) = row.and_then(|row| missing(&row, head, holds, &checkpoint)) else {
        return Ok(Some(checkpoint));
    };
    let why = format!("host {host} holds a checkpoint that a manager signed, and {}", doubt.why);
    tracing::error!(%host, size = checkpoint.size, "the audit log was set back: {why}");
    if manager.forgetful.get().is_none() {
        handover::distrust(manager, &why, doubt.first_bad).await?;
    }
    Ok(Some(checkpoint))
}

/// Reads what a host shows. What nobody known signed proves nothing, and is said.
async fn verified(
    manager: &Manager,
    tx: &mut Tx,
    host: &HostName,
    token: &[u8],
) -> Result<Option<Checkpoint>, Problem> {
    let (own_id, own_key) = manager.authority.permit_key();
    let mut wanted = None;
    let found = checkpoint::verify(token, |id| {
        wanted = Some(id.to_owned());
        (id == own_id).then(|| VerifyingKey::from_bytes(&own_key).ok()).flatten()
    });
    let error = match found {
        Ok(checkpoint) => return Ok(Some(checkpoint)),
        Err(error) => error,
    };
    let known = match &wanted {
        Some(id) => tx.manager_key(id).await?,
        None => None,
    };
    let key = known.and_then(|key| VerifyingKey::from_bytes(&key.public_key).ok());
    match key.map(|key| checkpoint::verify(token, |_| Some(key))) {
        Some(Ok(checkpoint)) => Ok(Some(checkpoint)),
        _ => {
            tracing::warn!(%host, "shows a checkpoint that no known manager signed: {error}");
            Ok(None)
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Doubt {
    why: String,
    first_bad: Option<u64>,
}

/// What the log lacks of a checkpoint, if anything. `holds`: whether it has that entry with that hash.
fn missing(row: &LogRow, size: u64, holds: bool, shown: &Checkpoint) -> Option<Doubt> {
    let doubt = |why: String, first_bad| Some(Doubt { why, first_bad });
    if shown.log != row.log {
        return doubt("it is of another log than this one".to_owned(), None);
    }
    if shown.generation > row.generation {
        let why = format!(
            "it is of the log's generation {}, this registry knows {}",
            shown.generation, row.generation
        );
        return doubt(why, None);
    }
    if shown.generation < row.generation {
        // From before a loss that an operator accepted.
        return None;
    }
    if shown.size > size {
        return doubt(format!("the log had {} entries then, it has {size}", shown.size), Some(size + 1));
    }
    if !holds {
        let why = format!("its entry {} is another one than the log has there", shown.size);
        return doubt(why, Some(shown.size));
    }
    None
}

/// A host did not take a checkpoint.
///
/// # Errors
/// The registry fails.
pub(crate) async fn not_taken(
    manager: &Manager,
    session: &Session,
    kept: &fleet::CheckpointKept,
) -> Result<(), Problem> {
    let host = &session.host;
    let held = shown(manager, host, &kept.token).await?;
    session.keeps_checkpoint(held);
    refused(manager, session, &kept.contradicts).await
}

/// A host says that what this manager signed contradicts what it holds; once for each session it is written down.
///
/// # Errors
/// The registry fails.
pub(crate) async fn refused(manager: &Manager, session: &Session, why: &str) -> Result<(), Problem> {
    if why.is_empty() || !session.first_contradiction() {
        return Ok(());
    }
    let (host, why) = (&session.host, why.chars().take(400).collect::<String>());
    tracing::error!(%host, "takes no permit of this manager: {why}");
    let mut tx = manager.begin("checkpoint refused").await?;
    tx.audit(&format!("host/{host}"), "checkpoint.refuse", host.as_str(), json!({ "why": why })).await?;
    Ok(tx.commit().await?)
}

/// The digest by which a checkpoint is named in the audit log.
pub(crate) fn name_of(checkpoint: &Checkpoint) -> serde_json::Value {
    let Checkpoint { log, generation, size, head, .. } = checkpoint;
    let head: &Digest = head;
    json!({ "log": log, "generation": generation, "size": size, "head": head })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use registry::Standing;
    use types::Nonce;

    fn row(generation: u64) -> LogRow {
        LogRow {
            log: Nonce::from_bytes([1; 16]),
            generation,
            standing: Standing::Trusted,
            why: String::new(),
            since_us: 0,
            first_bad: None,
            accepted_at_us: 0,
        }
    }

    #[test]
    fn a_log_must_contain_what_was_signed() {
        let check = |generation: u64, shown_size: u64, holds: bool, expect: Option<Option<u64>>| {
            let shown = Checkpoint {
                log: Nonce::from_bytes([1; 16]),
                generation,
                size: shown_size,
                head: Digest([0; 32]),
                root: permit::merkle::empty_root(),
                at_us: 0,
            };
            assert_eq!(missing(&row(2), 10, holds, &shown).map(|d| d.first_bad), expect);
            let other = Checkpoint { log: Nonce::from_bytes([2; 16]), ..shown };
            assert!(missing(&row(2), 10, holds, &other).is_some());
        };
        check(2, 10, true, None);
        check(2, 3, true, None);
        check(2, 3, false, Some(Some(3)));
        check(2, 11, false, Some(Some(11)));
        check(1, 99, false, None);
        check(3, 1, true, Some(None));
    }
}
