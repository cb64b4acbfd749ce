//! What a permit says, and its signing: after the row is durable, the same bytes however often it is signed.

use crate::clock;
use crate::config::Config;
use crate::core::Manager;
use crate::migration::Facts;
use engine::handover::Attempt;
use engine::handover::decider::{Continuity, HandoverRow, Open, RowState};
use registry::{MigrationRow, VmRow};
use types::permit::{HostPart, PermitClaims, StreamFeatures};
use types::{Digest, ErrorCode, HandoverKey, Nonce, Problem};

/// On top of the multiple of the guest's memory: device state and headers of the smallest guest.
const STREAM_FLOOR_BYTES: u64 = 256 << 20;

/// The claims of a fresh permit.
///
/// # Errors
/// `vm-not-running` without an enrolled inventory; no random numbers.
pub(crate) fn claims(
    config: &Config,
    key: HandoverKey,
    vm: &VmRow,
    (source, target): (HostPart, HostPart),
    target_journal: Nonce,
    features: StreamFeatures,
) -> Result<PermitClaims, Problem> {
    let inventory = vm.inventory.as_ref().ok_or_else(|| {
        let detail =
            format!("VM {} has no inventory: nothing says what its stream must look like", vm.spec.name);
        Problem::new(ErrorCode::VmNotRunning, detail).hint("stop and start it, so that it is enrolled")
    })?;
    let budgets = &config.budgets;
    let issued = clock::now_s();
    Ok(PermitClaims {
        version: 1,
        key,
        spec_digest: vm.spec_digest,
        source,
        target,
        target_journal,
        nonce: Nonce::from_bytes(clock::random()?),
        issued_at_unix_s: issued,
        not_after_unix_s: issued + budgets.start_s,
        run_deadline_unix_s: issued + budgets.run_s,
        byte_budget: vm
            .spec
            .memory_bytes
            .saturating_mul(budgets.stream_memory_multiple)
            .saturating_add(STREAM_FLOOR_BYTES),
        duration_budget_ms: budgets.run_s.saturating_mul(1_000),
        downtime_budget_ms: budgets.downtime_ms,
        features,
        inspection_profile: config.inspection_profile.to_string(),
        compatibility: format!("{}/{}", inventory.hypervisor, inventory.machine),
    })
}

/// Signs the permit of a granted migration and opens its hand-over.
///
/// # Errors
/// A registry that fails, or claims that fit no permit.
pub(crate) async fn sign(manager: &Manager, row: &MigrationRow) -> Result<(), Problem> {
    let held = manager.registry.read("permit to sign").await?.permit(row.id).await?;
    let claims = held.ok_or_else(|| missing(row))?.claims;
    let token = manager.authority.issue(&claims)?;
    let digest = token.digest();
    let attempt = attempt(&claims, digest);
    let mut tx = manager.begin("keep a signed permit").await?;
    tx.permit_signed(row.id, digest, token.as_bytes()).await?;
    let mut row = tx.migration(row.id).await?.ok_or_else(|| missing(row))?;
    if row.handover.is_none() {
        let mut facts = Facts::of(&row)?;
        let now_us = clock::now_us();
        facts.permit_us = Some(now_us);
        facts.permit_decision_ms = facts.request_us.map(|from| clock::between_ms(from, now_us));
        let mut fresh = HandoverRow::new(&attempt);
        if let Err(problem) = manager.must_remember() {
            // It may have been signed, and come to something, before: both sides say so, and nothing new begins.
            let abort = Some(super::facts::reason_of(&problem));
            fresh.continuity = Continuity::Unproven;
            fresh.state = RowState::Open(Open { abort, ..Open::default() });
        }
        row.handover = Some(super::handover::text(&fresh));
        row.facts = facts.text();
        tx.save_migration(&row).await?;
    }
    Ok(tx.commit().await?)
}

/// What the hand-over's machines know of a permit.
pub(crate) fn attempt(claims: &PermitClaims, permit: Digest) -> Attempt {
    Attempt {
        key: claims.key,
        permit,
        nonce: claims.nonce,
        source: claims.source.host.clone(),
        target: claims.target.host.clone(),
        target_journal: claims.target_journal,
        run_budget_ms: claims.duration_budget_ms,
    }
}

fn missing(row: &MigrationRow) -> Problem {
    Problem::new(ErrorCode::Internal, format!("migration {} has no permit on record", row.id))
}
