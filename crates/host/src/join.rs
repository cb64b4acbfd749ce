//! `outrider host join`: one use of a join token gives this host its certificate and pins its manager.

use crate::checkpoints::Checkpoints;
use crate::config::JoinConfig;
use crate::error::chain;
use crate::folders::private_folder;
use crate::identity::{IdentityFolder, Joined, certificate_pem};
use crate::journal::Journal;
use crate::migration::source::fresh_nonce;
use crate::platform::Platform;
use crate::rpc::{client, interfaces, link_problem, status_problem};
use api::fleet::fleet_client::FleetClient;
use api::fleet::{ChallengeRequest, JoinReply, JoinRequest, TpmProof};
use attest::{Binding, Purpose};
use link::control::connect_pinned;
use link::identity::{IdentityKey, csr_key_digest};
use permit::JoinToken;
use std::time::Duration;
use tonic::transport::Channel;
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
    let mut request = JoinRequest {
        host: token.host.to_string(),
        token_secret: hex::encode(token.secret.expose()),
        csr_der: key.signing_request().map_err(|e| Problem::new(ErrorCode::Internal, chain(&e)))?,
        signing_key: signing.verifying_key().as_bytes().to_vec(),
        journal: journal.id().to_string(),
        interfaces: interfaces().await?,
        tpm: None,
    };
    let manager = config.manager.clone().unwrap_or_else(|| token.manager_address.clone());
    let (connection, ca) =
        connect_pinned(&manager, &token.ca_fingerprint).await.map_err(|e| link_problem(&e))?;
    let mut client = client(connection).await?;
    request.tpm = prove(config, &token, &request, &mut client).await?;
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

/// Proves this host's TPM, where its record names one.
async fn prove(
    config: &JoinConfig,
    token: &JoinToken,
    request: &JoinRequest,
    client: &mut FleetClient<Channel>,
) -> Result<Option<TpmProof>, Problem> {
    let Some(address) = config.tpm.clone() else { return Ok(None) };
    let platform = Platform::new(address, config.tpm_event_log.clone(), &config.state_folder);
    let application = platform.application().await?;
    let ask = ChallengeRequest {
        host: request.host.clone(),
        token_secret: request.token_secret.clone(),
        application_json: serde_json::to_string(&application).map_err(|e| malformed(&e))?,
    };
    let asked = tokio::time::timeout(JOIN_TIMEOUT, client.challenge(ask)).await;
    let reply = asked
        .map_err(|_| Problem::new(ErrorCode::ManagerUnreachable, "the manager sends no challenge in time"))?
        .map_err(|status| status_problem(&status))?
        .into_inner();
    if reply.id.is_empty() {
        tracing::warn!("this host's record names no TPM: it joins unattested");
        return Ok(None);
    }
    let challenge = serde_json::from_str(&reply.challenge_json).map_err(|e| malformed(&e))?;
    let selection = serde_json::from_str(&reply.selection_json).map_err(|e| malformed(&e))?;
    let nonce = reply.nonce.parse().map_err(|e: types::id::MalformedId| malformed(&e))?;
    let secret = platform.open_challenge(challenge).await?;
    let host_spki = csr_key_digest(&request.csr_der).map_err(|e| malformed(&e))?;
    let host = format!("spiffe://{}/host/{}", reply.trust_domain, token.host).try_into();
    let host = host.map_err(|e: &str| Problem::new(ErrorCode::BadRequest, e))?;
    let binding = Binding { nonce, purpose: Purpose::Join, host, host_spki };
    let evidence = platform.evidence(selection, binding.qualifying_data(), true).await?;
    Ok(Some(TpmProof { id: reply.id, secret, evidence: evidence.to_bytes() }))
}

fn malformed(error: &dyn std::fmt::Display) -> Problem {
    Problem::new(ErrorCode::BadRequest, format!("the challenge of the manager is malformed: {error}"))
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
