//! Joining: the token is good once, for one host, in time; the interfaces are those of the record; the signing request
//! proves the key. A host that holds its certificate may come again without a token for a fresh one.

use super::service::{Caller, interfaces};
use crate::attestation::enrolment;
use crate::clock;
use crate::core::Manager;
use crate::migration::gates;
use api::fleet::{ChallengeReply, ChallengeRequest, JoinReply, JoinRequest, PermitKey};
use link::identity::key_digest_of;
use permit::VerifyingKey;
use permit::join::JoinSecret;
use registry::{Enrolment, HostRow, TokenUse, Tx};
use serde_json::json;
use types::{ErrorCode, HostName, Nonce, Problem};

/// Refusals of one address that are audited in a window: what follows says nothing new, and the log is not anybody's to
/// fill.
const AUDITED_REFUSALS: u32 = 5;

/// Lets a host join, or renews its certificate.
///
/// # Errors
/// What is wrong with the token, the record or the keys.
pub(super) async fn join(
    manager: &Manager,
    caller: &Caller,
    request: JoinRequest,
) -> Result<JoinReply, Problem> {
    let host: HostName = request
        .host
        .parse()
        .map_err(|e: types::id::MalformedId| Problem::new(ErrorCode::BadRequest, e.to_string()))?;
    let address = caller.address.ip().to_canonical();
    let renews = caller.peer.as_ref().and_then(|p| p.expect_host().ok()).is_some_and(|p| p.host == host);
    if !renews && manager.door.is_barred(address, clock::now_us()) {
        let detail = "too many failed joins from this address";
        return Err(Problem::new(ErrorCode::LimitReached, detail).hint("wait a minute"));
    }
    if let Err(problem) = presented(manager, renews, &host, &request).await {
        return Err(refused(manager, caller, &host, problem).await);
    }
    let mut tx = manager.begin("join").await?;
    match joined(manager, &mut tx, caller, &host, &request).await {
        Ok(reply) => {
            // The certificate leaves only after its audit entry is durable (I6).
            tx.commit().await?;
            tracing::info!(%host, "host joined");
            Ok(reply)
        }
        Err(problem) => {
            drop(tx);
            Err(refused(manager, caller, &host, problem).await)
        }
    }
}

/// A challenge for the TPM of a host that is about to join.
///
/// # Errors
/// What is wrong with the token or the TPM.
pub(super) async fn challenge(
    manager: &Manager,
    caller: &Caller,
    request: ChallengeRequest,
) -> Result<ChallengeReply, Problem> {
    let host: HostName = request
        .host
        .parse()
        .map_err(|e: types::id::MalformedId| Problem::new(ErrorCode::BadRequest, e.to_string()))?;
    let address = caller.address.ip().to_canonical();
    if manager.door.is_barred(address, clock::now_us()) {
        let detail = "too many failed joins from this address";
        return Err(Problem::new(ErrorCode::LimitReached, detail).hint("wait a minute"));
    }
    let challenged = async {
        let secret = secret(&request.token_secret)?;
        let mut tx = manager.registry.read("look at a join token").await?;
        usable(tx.check_join_token(&secret.hash().0, &host, clock::now_us()).await?, &host)?;
        let row = tx.host(&host).await?;
        drop(tx);
        let unknown = || Problem::new(ErrorCode::UnknownHost, format!("no host is named {host}"));
        enrolment::challenge(manager, &row.ok_or_else(unknown)?, &request.application_json).await
    };
    match challenged.await {
        Ok(reply) => Ok(reply),
        Err(problem) => Err(refused(manager, caller, &host, problem).await),
    }
}

/// Whether what is shown may be good, before anything is written: anybody may ask.
async fn presented(
    manager: &Manager,
    renews: bool,
    host: &HostName,
    request: &JoinRequest,
) -> Result<(), Problem> {
    if request.token_secret.is_empty() {
        return if renews { Ok(()) } else { Err(nothing_shown()) };
    }
    let secret = secret(&request.token_secret)?;
    let mut tx = manager.registry.read("look at a join token").await?;
    usable(tx.check_join_token(&secret.hash().0, host, clock::now_us()).await?, host)
}

/// Counts a refusal; the first ones of an address in a window are audited.
async fn refused(manager: &Manager, caller: &Caller, host: &HostName, problem: Problem) -> Problem {
    if problem.code == ErrorCode::RegistryUnavailable {
        return problem;
    }
    let address = caller.address.ip().to_canonical();
    tracing::debug!(%host, %address, "join refused: {}", problem.detail);
    if manager.door.failed(address, clock::now_us()) > AUDITED_REFUSALS {
        return problem;
    }
    tracing::warn!(%host, %address, "join refused: {}", problem.detail);
    let audited = async {
        let mut tx = manager.begin("refuse a join").await?;
        let detail = json!({ "code": problem.code, "detail": problem.detail, "address": address });
        tx.audit(&format!("host/{host}"), "host.join-refused", host.as_str(), detail).await?;
        tx.commit().await
    };
    match audited.await {
        Ok(()) => problem,
        Err(error) => error.into(),
    }
}

async fn joined(
    manager: &Manager,
    tx: &mut Tx,
    caller: &Caller,
    host: &HostName,
    request: &JoinRequest,
) -> Result<JoinReply, Problem> {
    let malformed =
        |what: &str| Problem::new(ErrorCode::BadRequest, format!("the join's {what} is malformed"));
    let signing_key = VerifyingKey::from_bytes(&request.signing_key).map_err(|_| malformed("signing key"))?;
    let journal: Nonce = request.journal.parse().map_err(|_| malformed("journal id"))?;
    let reported = interfaces(&request.interfaces);
    let row = if request.token_secret.is_empty() {
        renewing(tx, caller, host, &signing_key, journal).await?
    } else {
        enrolling(tx, host, &request.token_secret).await?
    };
    gates::matches_record(&row, caller.address.ip(), &reported)?;
    let issued = manager.authority.certify_host(host, &request.csr_der)?;
    let attestation = match request.token_secret.is_empty() {
        // Renewed is a certificate, not the trust in a platform: each migration asks it anew.
        true => serde_json::Value::Null,
        false => {
            let key = key_digest_of(&issued.certificate_der)
                .map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?;
            enrolment::joined(manager, tx, &row, request.tpm.as_ref(), key).await?
        }
    };
    tx.host_joined(host, signing_key.as_bytes(), journal, &issued.digest, &reported).await?;
    if row.state == Enrolment::Quarantined {
        tx.set_host_state(host, Enrolment::Quarantined).await?;
    }
    let action = if request.token_secret.is_empty() { "host.renew" } else { "host.join" };
    let detail = json!({
        "address": caller.address.ip(), "signing_key": signing_key.to_hex(), "journal": journal,
        "certificate": issued.digest, "attestation": attestation,
    });
    tx.audit(&format!("host/{host}"), action, host.as_str(), detail).await?;
    let (key_id, public_key) = manager.authority.permit_key();
    Ok(JoinReply {
        certificate_der: issued.certificate_der,
        ca_der: vec![issued.ca_der],
        permit_keys: vec![PermitKey { key_id, public_key }],
        certificate_not_after_unix_s: issued.not_after_unix_s,
        trust_domain: manager.config.trust_domain.clone(),
    })
}

fn secret(text: &str) -> Result<JoinSecret, Problem> {
    let bytes = hex::decode(text).ok().and_then(|b| JoinSecret::from_bytes(&b));
    bytes.ok_or_else(|| Problem::new(ErrorCode::Unauthenticated, "the join token is malformed"))
}

fn usable(found: TokenUse, host: &HostName) -> Result<(), Problem> {
    let refused = |detail: String| Problem::new(ErrorCode::Unauthenticated, detail);
    match found {
        TokenUse::Used => Ok(()),
        TokenUse::Unknown => Err(refused(format!("the join token is not one for host {host}"))),
        TokenUse::UsedBefore => Err(refused(format!("the join token of host {host} was used before"))
            .hint("if that was not you, quarantine the host and look at the audit log")),
        TokenUse::Expired => Err(refused(format!("the join token of host {host} is expired"))),
    }
}

fn nothing_shown() -> Problem {
    let detail = "joining needs a token, or the host's own certificate to renew it";
    Problem::new(ErrorCode::Unauthenticated, detail)
}

async fn enrolling(tx: &mut Tx, host: &HostName, token: &str) -> Result<HostRow, Problem> {
    usable(tx.use_join_token(&secret(token)?.hash().0, host).await?, host)?;
    tx.host(host)
        .await?
        .ok_or_else(|| Problem::new(ErrorCode::UnknownHost, format!("no host is named {host}")))
}

/// A fresh certificate for a host that proves the one it has, and shows the same key and journal.
async fn renewing(
    tx: &mut Tx,
    caller: &Caller,
    host: &HostName,
    signing_key: &VerifyingKey,
    journal: Nonce,
) -> Result<HostRow, Problem> {
    let peer = caller.peer.as_ref().and_then(|p| p.expect_host().ok());
    if peer.is_none_or(|p| p.host != *host) {
        return Err(nothing_shown());
    }
    let row = tx.host(host).await?;
    let row = row.ok_or_else(|| Problem::new(ErrorCode::UnknownHost, format!("no host is named {host}")))?;
    if row.signing_key.as_deref() != Some(&signing_key.as_bytes()[..]) || row.journal != Some(journal) {
        let detail = format!("host {host} shows another key or journal than it joined with");
        return Err(Problem::new(ErrorCode::HostMismatch, detail));
    }
    Ok(row)
}
