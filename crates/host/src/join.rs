//! `outrider host join`: one use of a join token gives this host its certificate and pins its manager.

use crate::checkpoints::Checkpoints;
use crate::config::JoinConfig;
use crate::error::chain;
use crate::folders::private_folder;
use crate::identity::{IdentityFolder, Joined, certificate_pem};
use crate::journal::Journal;
use crate::migration::source::fresh_nonce;
use crate::rpc::{client, interfaces, link_problem, status_problem};
use api::fleet::{JoinReply, JoinRequest};
use link::control::connect_pinned;
use link::identity::IdentityKey;
use permit::JoinToken;
use std::time::Duration;
use types::{ErrorCode, HostName, Problem};

/// The manager decides on a join in milliseconds.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);

/// Joins; gives this host's name.
///
/// # Errors
/// The token is malformed, the manager refuses it, or the state folder can't be written.
pub async fn join(config: &JoinConfig) -> Result<HostName, Problem> {
    let token = JoinToken::from_text(config.token.trim())
        .map_err(|e| Problem::new(ErrorCode::BadRequest, chain(&e)).hint("copy the whole token, ojt1.…"))?;
    let folder = IdentityFolder::new(&config.state_folder);
    private_folder(&config.state_folder).map_err(|e| e.problem())?;
    let signing = folder.signing_key()?;
    let fresh = fresh_nonce().map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?;
    let (journal, _) = Journal::open(&config.state_folder.join("journal"), signing.clone(), fresh)
        .map_err(|e| Problem::new(ErrorCode::WrongState, chain(&e)))?;
    let key = IdentityKey::generate().map_err(|e| Problem::new(ErrorCode::Internal, chain(&e)))?;
    let request = JoinRequest {
        host: token.host.to_string(),
        token_secret: hex::encode(token.secret.expose()),
        csr_der: key.signing_request().map_err(|e| Problem::new(ErrorCode::Internal, chain(&e)))?,
        signing_key: signing.verifying_key().as_bytes().to_vec(),
        journal: journal.id().to_string(),
        interfaces: interfaces().await?,
    };
    let manager = config.manager.clone().unwrap_or_else(|| token.manager_address.clone());
    let (connection, ca) =
        connect_pinned(&manager, &token.ca_fingerprint).await.map_err(|e| link_problem(&e))?;
    let mut client = client(connection).await?;
    let reply = tokio::time::timeout(JOIN_TIMEOUT, client.join(request))
        .await
        .map_err(|_| {
            Problem::new(ErrorCode::ManagerUnreachable, format!("{manager} did not answer in time"))
        })?
        .map_err(|status| status_problem(&status))?
        .into_inner();
    // An admin let this host in anew: what it remembers of a log may be another manager's.
    Checkpoints::forget(&config.state_folder)?;
    let joined = joined(&token.host, manager, &reply);
    folder.store(&joined, &key, &chain_pem(&reply), ca.pem())?;
    Ok(token.host)
}

/// What a reply says besides the certificate.
pub(crate) fn joined(name: &HostName, manager: String, reply: &JoinReply) -> Joined {
    Joined {
        name: name.clone(),
        manager,
        trust_domain: reply.trust_domain.clone(),
        permit_keys: reply
            .permit_keys
            .iter()
            .map(|key| (key.key_id.clone(), hex::encode(&key.public_key)))
            .collect(),
    }
}

/// Leaf and CA, as this host presents them.
pub(crate) fn chain_pem(reply: &JoinReply) -> String {
    let mut pem = certificate_pem(&reply.certificate_der);
    for ca in &reply.ca_der {
        pem.push_str(&certificate_pem(ca));
    }
    pem
}
