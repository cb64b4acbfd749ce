//! One attempt as its permit describes it: verified, and remembered beside the journal for as long as it is open.

use crate::daemon::{Daemon, lock, now_unix_s};
use crate::error::HostError;
use crate::folders::{remove_file, write_durably};
use engine::handover::Attempt;
use permit::permit::DEFAULT_SKEW_S;
use permit::{PermitToken, SigningKey, VerifiedPermit, VerifyingKey};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use types::handover::Side;
use types::permit::PermitClaims;
use types::{Digest, ErrorCode, MigrationId, Problem};

/// What a restarted daemon needs of an attempt besides its journal entries. None of it decides, but it holds the key
/// of the other daemon: a target that has lost it can't verify its source's request to renounce, neither directly nor
/// through the manager, and a source asks only through the manager. Then the manager's own orders (ABORT, VOID) end
/// the attempt.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttemptFile {
    /// What the permit says.
    pub claims: PermitClaims,
    /// Digest of its token.
    pub permit: Digest,
    /// Where the target's daemon can be asked to renounce.
    pub peer_address: Option<SocketAddr>,
    /// The token: what shows the attempt to a manager whose registry was set back.
    #[serde(default, with = "types::permit::hex_bytes")]
    pub token: Vec<u8>,
}

impl AttemptFile {
    /// Of a verified permit.
    #[must_use]
    pub fn new(permit: &VerifiedPermit, peer_address: Option<SocketAddr>) -> Self {
        let token = permit.token().as_bytes().to_vec();
        Self { claims: permit.claims().clone(), permit: permit.digest(), peer_address, token }
    }

    fn path(daemon: &Daemon, migration: MigrationId) -> PathBuf {
        daemon.folders.state.join("migrations").join(format!("{migration}.json"))
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// The state folder can't be written.
    pub fn save(&self, daemon: &Daemon) -> Result<(), HostError> {
        let path = Self::path(daemon, self.claims.key.migration);
        let bytes = serde_json::to_vec(self).map_err(|e| HostError::file("cannot encode", &path, e))?;
        write_durably(&path, &bytes)
    }

    /// Of an open migration, when it is still there.
    #[must_use]
    pub fn load(daemon: &Daemon, migration: MigrationId) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Self::path(daemon, migration)).ok()?).ok()
    }

    /// When the attempt has ended.
    pub fn remove(daemon: &Daemon, migration: MigrationId) {
        remove_file(&Self::path(daemon, migration));
    }

    /// The key with which the daemon of that side signs.
    #[must_use]
    pub fn daemon_key(&self, side: Side) -> Option<VerifyingKey> {
        VerifyingKey::from_bytes(&self.claims.part(side).daemon_key).ok()
    }
}

/// A permit whose signature and time are good, and which names this daemon (host and signing key) for `side`.
///
/// # Errors
/// Why it is refused here.
pub fn verify(
    daemon: &Daemon,
    token: &[u8],
    side: Side,
    migration: MigrationId,
) -> Result<VerifiedPermit, Problem> {
    daemon.checkpoints.may_accept()?;
    let token = PermitToken::from_bytes(token.to_vec()).map_err(|e| e.problem())?;
    let keys = lock(&daemon.permit_keys).clone();
    let permit =
        permit::verify(&token, &keys, now_unix_s(), DEFAULT_SKEW_S).map_err(|refusal| refusal.problem())?;
    named_here(daemon, &daemon.key, &permit, side).map_err(|refusal| refusal.problem())?;
    if permit.claims().key.migration != migration {
        return Err(Problem::new(
            ErrorCode::PermitRefused,
            format!("the permit is for migration {}, not {migration}", permit.claims().key.migration),
        ));
    }
    Ok(permit)
}

/// The permit names the quote that this host gave for it, and one of the other host where this one demands that. Asked
/// once for each permit, after it is known not to be a replay: what was given is forgotten.
///
/// # Errors
/// `permit-refused`, saying `wrong-quote`.
pub fn expect_quotes(daemon: &Daemon, permit: &VerifiedPermit, side: Side) -> Result<(), Problem> {
    let claims = permit.claims();
    let given = daemon.platform.as_ref().and_then(|p| p.given_for(claims.key.migration, side));
    let refused = |why: &str| Err(Problem::new(ErrorCode::PermitRefused, format!("wrong-quote: {why}")));
    if claims.part(side).quote != given {
        return refused("the permit does not name the quote that this host gave for it");
    }
    if daemon.require_attested_peer && claims.part(side.other()).quote.is_none() {
        return refused(
            "the permit says that the other host did not prove its platform, and this host demands it",
        );
    }
    Ok(())
}

fn named_here(
    daemon: &Daemon,
    key: &SigningKey,
    permit: &VerifiedPermit,
    side: Side,
) -> Result<(), permit::PermitRefusal> {
    permit.expect_host(side, &daemon.name)?.expect_daemon_key(side, key.verifying_key())?;
    Ok(())
}

/// The part of a permit that the hand-over's machines care about.
#[must_use]
pub fn attempt(permit: &VerifiedPermit) -> Attempt {
    let claims = permit.claims();
    Attempt {
        key: claims.key,
        permit: permit.digest(),
        nonce: claims.nonce,
        source: claims.source.host.clone(),
        target: claims.target.host.clone(),
        target_journal: claims.target_journal,
        run_budget_ms: claims.duration_budget_ms,
    }
}

/// The managers' keys as the agent's `Arm` wants them.
#[must_use]
pub fn keys_for_agent(daemon: &Daemon) -> Vec<(String, String)> {
    lock(&daemon.permit_keys).iter().map(|(id, key)| (id.to_owned(), key.to_hex())).collect()
}
