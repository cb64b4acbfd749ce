//! The permit, as the agent sees it: it trusts its daemon for the clock and the managers' keys, and checks the rest
//! itself, so that a daemon can't be talked into a channel that the permit does not name.

use engine::inspect::devices::Unvouched;
use engine::inspect::{Inspector, Limits, Unsupported};
use link::channel::{ChannelConfig, ChannelError, EphemeralKey};
use permit::{KeyError, KeyRing, PermitRefusal, PermitToken, VerifiedPermit, VerifyingKey};
use signature::Policy;
use std::time::Duration;
use types::handover::Side;
use types::inventory::Inventory;
use types::layout::Catalogue;
use types::permit::{MAX_MULTIFD_CHANNELS, PermitClaims};
use types::profile::{InspectionProfile, SignatureSearch, UnknownProfile};
use types::{ErrorCode, MigrationId};

/// What [`types::agent::ToAgent::Hello`] settled.
#[derive(Debug)]
pub struct Identity {
    /// Our side.
    pub side: Side,
    /// The migration.
    pub migration: MigrationId,
    /// Our single-use key.
    pub key: EphemeralKey,
}

/// Everything a session needs to relay under a permit.
#[derive(Debug)]
pub struct Armed {
    /// The permit.
    pub permit: VerifiedPermit,
    /// What the permit allows of the stream.
    pub limits: Limits,
    /// The main channel and the multifd ones.
    pub lanes: usize,
    /// What the stream must look like.
    pub inventory: Inventory,
    /// How the stream is looked at.
    pub profile: InspectionProfile,
    /// What the target's own QEMU makes of its devices; the source needs none.
    pub catalogue: Option<Catalogue>,
    /// How long the transfer may take from now: the duration budget or the run deadline, whichever is shorter.
    pub time_left: Duration,
}

/// The longest that a scanner may take for a batch of pages, or for the verdict: a fifth of a millisecond is
/// usual, and it gives up on a run of pages after 2 s.
const MAX_SCANNER_PATIENCE: Duration = Duration::from_secs(10);

impl Armed {
    /// How long the guest may stand still until its stream is accepted.
    #[must_use]
    pub fn downtime_budget(&self) -> Duration {
        Duration::from_millis(self.permit.claims().downtime_budget_ms).min(self.time_left)
    }

    /// What the permit's profile asks of the scanner. One that gets stuck while the guest is stopped is to be
    /// named before the downtime budget ends, which would not name it.
    #[must_use]
    pub fn signature_policy(&self) -> Policy {
        match self.profile.signatures {
            SignatureSearch::Off | SignatureSearch::BestEffort => Policy::default(),
            SignatureSearch::Complete => {
                Policy::complete((self.downtime_budget() / 2).min(MAX_SCANNER_PATIENCE))
            }
        }
    }
}

/// A day: longer budgets than this are as good as none, and can't overflow the clock.
const MAX_TIME: Duration = Duration::from_secs(24 * 3600);

fn time_left(claims: &PermitClaims, now_unix_s: u64) -> Duration {
    let budget = Duration::from_millis(claims.duration_budget_ms);
    let deadline = Duration::from_secs(claims.run_deadline_unix_s.saturating_sub(now_unix_s));
    budget.min(deadline).min(MAX_TIME)
}

/// Why an agent will not serve.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The permit itself.
    #[error("{}: {}", .0.code(), .0)]
    Permit(PermitRefusal),
    /// A manager's key is none.
    #[error("the key {key_id:?} of a manager is unusable: {reason}")]
    ManagerKey {
        /// Its id.
        key_id: String,
        /// Why.
        reason: KeyError,
    },
    /// A manager's key has no usable id.
    #[error("the key id {key_id:?} of a manager is unusable, or there are too many")]
    ManagerKeyId {
        /// Its id.
        key_id: String,
    },
    /// It is for another migration than this agent was started for.
    #[error("wrong-migration: the permit is for migration {named}, this agent serves {ours}")]
    WrongMigration {
        /// In the permit.
        named: MigrationId,
        /// Of this agent.
        ours: MigrationId,
    },
    /// It allows what can't be inspected, or the inventory is unusable.
    #[error("{0}")]
    Unsupported(Unsupported),
    /// It asks for an inspection that this version does not know.
    #[error("{0}")]
    Profile(UnknownProfile),
    /// Devices would be refused one by one.
    #[error("the permit asks for devices that a catalogue vouches for, and no catalogue was given")]
    NoCatalogue,
    /// The other agent's key can't be used.
    #[error("{0}")]
    PeerKey(ChannelError),
}

impl Refusal {
    /// Its public code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::ManagerKey { .. } | Self::ManagerKeyId { .. } => ErrorCode::BadRequest,
            _ => ErrorCode::PermitRefused,
        }
    }
}

/// Verifies a permit for this agent.
///
/// # Errors
/// Why it is not good for it.
pub fn arm(
    identity: &Identity,
    token_hex: &str,
    keys: &[(String, String)],
    now_unix_s: u64,
    (inventory, catalogue): (Inventory, Option<Catalogue>),
) -> Result<Armed, Refusal> {
    let token = PermitToken::from_hex(token_hex).map_err(Refusal::Permit)?;
    let ring = key_ring(keys)?;
    let permit =
        permit::verify(&token, &ring, now_unix_s, permit::permit::DEFAULT_SKEW_S).map_err(Refusal::Permit)?;
    permit.expect_agent_key(identity.side, identity.key.spki()).map_err(Refusal::Permit)?;
    let named = permit.claims().key.migration;
    if named != identity.migration {
        return Err(Refusal::WrongMigration { named, ours: identity.migration });
    }
    let limits = Limits::of_permit(permit.claims()).map_err(Refusal::Unsupported)?;
    let profile: InspectionProfile = permit.claims().inspection_profile.parse().map_err(Refusal::Profile)?;
    let lanes = usize::from(limits.multifd.map_or(0, |multifd| multifd.channels)) + 1;
    if lanes > usize::from(MAX_MULTIFD_CHANNELS) + 1 {
        return Err(Refusal::Unsupported(Unsupported::Feature {
            feature: "more channels than an agent can hold",
        }));
    }
    if identity.side == Side::Target && catalogue.is_none() && limits.unvouched == Unvouched::Refuse {
        return Err(Refusal::NoCatalogue);
    }
    Inspector::new(&inventory, catalogue.as_ref(), &limits).map_err(Refusal::Unsupported)?;
    let time_left = time_left(permit.claims(), now_unix_s);
    Ok(Armed { permit, limits, lanes, inventory, profile, catalogue, time_left })
}

fn key_ring(keys: &[(String, String)]) -> Result<KeyRing, Refusal> {
    let mut ring = KeyRing::new();
    for (key_id, key) in keys {
        let key = VerifyingKey::from_hex(key)
            .map_err(|reason| Refusal::ManagerKey { key_id: key_id.clone(), reason })?;
        if !ring.insert(key_id, key) {
            return Err(Refusal::ManagerKeyId { key_id: key_id.clone() });
        }
    }
    Ok(ring)
}

/// The channel that a permit names, from our side.
///
/// # Errors
/// The other agent's key is unusable.
pub fn channel_config(
    identity: &Identity,
    armed: &Armed,
    channel: u16,
) -> Result<ChannelConfig, ChannelError> {
    let other = match identity.side {
        Side::Source => Side::Target,
        Side::Target => Side::Source,
    };
    let peer = &armed.permit.claims().part(other).agent_spki;
    ChannelConfig::new(&identity.key, peer, &armed.permit.digest(), channel)
}
