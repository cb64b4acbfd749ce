//! The bundle of one migration: what was asked, permitted, voted and received, and the log's entries about it, each with the
//! proof that it is in the log of a signed checkpoint. One canonical JSON document, which is verified without a manager.

mod verify;

pub use verify::{BUNDLE_BYTES_MAX, verify};

use crate::attestation::Stage;
use crate::checkpoints;
use crate::core::Manager;
use crate::migration::handover;
use api::http::{Bundle, BundleAttestation, BundleEntry, BundleQuote};
use registry::Tx;
use types::{ErrorCode, MigrationId, Problem, Side};

/// Version of the format.
const FORMAT: u32 = 1;
/// Entries about one migration: a few dozen, and repetitions of what was refused.
const ENTRIES_MAX: u32 = 2_000;
/// Statements of one migration: a dozen.
const STATEMENTS_MAX: usize = 256;

/// The bundle's one form.
///
/// # Errors
/// `internal`: it can't be written.
pub fn to_text(bundle: &impl serde::Serialize) -> Result<Vec<u8>, Problem> {
    serde_json_canonicalizer::to_vec(bundle)
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("the bundle cannot be written: {e}")))
}

/// Makes the bundle of a migration.
///
/// # Errors
/// `unknown-migration`; `audit-broken` when nothing can be signed of the log.
pub(crate) async fn make(manager: &Manager, id: MigrationId) -> Result<Bundle, Problem> {
    let mut tx = manager.registry.read("bundle").await?;
    tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    let signed = checkpoints::sign(manager, &mut tx).await?;
    let mut entries = Vec::new();
    for record in tx.audit_of(id, ENTRIES_MAX).await? {
        let proof = tx.audit_inclusion(record.sequence, signed.checkpoint.size).await?.ok_or_else(|| {
            let detail = format!("entry {} of the audit log lacks its place in the tree", record.sequence);
            Problem::new(ErrorCode::AuditBroken, detail).hint("see `outrider audit verify`")
        })?;
        entries.push(BundleEntry {
            sequence: record.sequence,
            at_us: record.at_us,
            actor: record.actor,
            action: record.action,
            subject: record.subject,
            detail: record.detail,
            proof: proof.iter().map(ToString::to_string).collect(),
        });
    }
    let permit = tx.permit(id).await?.and_then(|permit| permit.token);
    // Whose signature a statement bears only a permit tells.
    let statements = match permit {
        Some(_) => tx.statements(id).await?,
        None => Vec::new(),
    };
    let mut keys = vec![hex::encode(manager.authority.permit_key().1)];
    if let Some(token) = &permit {
        for key in tx.manager_keys().await? {
            let key_hex = hex::encode(&key.public_key);
            if !keys.contains(&key_hex) && verify::signed_by(token, &key.public_key) {
                keys.push(key_hex);
            }
        }
    }
    let attestation = quotes(&mut tx, id).await?;
    Ok(Bundle {
        outrider_bundle: FORMAT,
        migration: id,
        keys,
        certificate: None,
        checkpoint: hex::encode(&signed.token),
        permit: permit.map(hex::encode),
        statements: statements.into_iter().take(STATEMENTS_MAX).map(|s| hex::encode(s.token)).collect(),
        attestation,
        entries,
    })
}

/// The quotes on which the permit rests. Those of the transfer are named by nothing that is signed.
async fn quotes(tx: &mut Tx, id: MigrationId) -> Result<BundleAttestation, Problem> {
    let mut held = BundleAttestation::default();
    for quote in tx.quotes(id).await?.into_iter().filter(|quote| quote.stage == Stage::Permit.as_str()) {
        let binding = serde_json::from_str(&quote.binding)
            .map_err(|e| Problem::new(ErrorCode::Internal, format!("a quote's binding: {e}")))?;
        let quoted = BundleQuote { binding, evidence: hex::encode(quote.evidence) };
        match quote.side {
            Side::Source => held.source = Some(quoted),
            Side::Target => held.target = Some(quoted),
        }
    }
    Ok(held)
}
