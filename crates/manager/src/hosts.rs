//! Hosts: enrol and show.

use crate::attestation::{self, enrolment};
use crate::clock;
use crate::core::Manager;
use crate::http::Caller;
use api::http::{HostAdded, HostView};
use permit::JoinToken;
use registry::{Enrolment, HostRow, Tx};
use serde_json::json;
use types::host::{HostSpec, HostState};
use types::{ErrorCode, Problem};

/// Zones are words.
const ZONE_LIMIT_BYTES: usize = 63;
/// A host has a handful of interfaces on the two networks.
const MACS_LIMIT: usize = 16;

/// Enrols a host: the record, and a join token that is shown this once.
///
/// # Errors
/// `bad-request`, or `already-exists`.
pub(crate) async fn add(
    manager: &Manager,
    caller: &Caller,
    mut spec: HostSpec,
) -> Result<HostAdded, Problem> {
    validate(&mut spec)?;
    let fingerprint = manager.authority.ca().fingerprint();
    let token = JoinToken::generate(&manager.advertised, fingerprint, spec.name.clone())
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("no join token: {e}")))?;
    let text =
        token.to_text().map_err(|e| Problem::new(ErrorCode::Internal, format!("no join token: {e}")))?;
    let lifetime_us = i64::from(manager.config.join_token_minutes) * 60 * 1_000_000;
    let mut tx = manager.begin("add a host").await?;
    tx.add_host(&spec).await?;
    let expires_at_us = tx.now_us() + lifetime_us;
    tx.add_join_token(&token.secret.hash().0, &spec.name, expires_at_us).await?;
    let detail = json!({ "spec": spec, "token_expires_at": clock::rfc3339(expires_at_us) });
    tx.audit(&caller.audit_name(), "host.add", spec.name.as_str(), detail).await?;
    let row = tx.host(&spec.name).await?;
    let row = row.ok_or_else(|| Problem::new(ErrorCode::Internal, "the host was not recorded"))?;
    let host = view(manager, &mut tx, row).await?;
    tx.commit().await?;
    Ok(HostAdded { host, join_token: text.to_string() })
}

fn validate(spec: &mut HostSpec) -> Result<(), Problem> {
    let bad = |detail: String| Err(Problem::new(ErrorCode::BadRequest, detail));
    if spec.macs.is_empty() || spec.macs.len() > MACS_LIMIT {
        return bad(format!(
            "macs must name 1 to {MACS_LIMIT} interfaces of the control and migration networks"
        ));
    }
    for mac in &mut spec.macs {
        mac.make_ascii_lowercase();
        let octets: Vec<_> = mac.split(':').collect();
        let hex2 = |o: &&str| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit());
        if octets.len() != 6 || !octets.iter().all(hex2) {
            return bad(format!("mac {mac:?} is not six octets"));
        }
    }
    for address in [spec.control_address, spec.migration_address] {
        if address.is_unspecified() || address.is_multicast() {
            return bad(format!("{address} is not the address of a host"));
        }
    }
    if spec.zone.len() > ZONE_LIMIT_BYTES || spec.zone.bytes().any(|b| b < 0x20) {
        return bad(format!("zone must be a word of at most {ZONE_LIMIT_BYTES} bytes"));
    }
    if spec.capacity.memory_bytes == 0 || spec.capacity.vcpus == 0 || spec.capacity.vms == 0 {
        return bad("capacity must name memory, virtual CPUs and guests, each at least 1".to_owned());
    }
    spec.tpm.as_ref().map_or(Ok(()), enrolment::validate)
}

/// A host as the API shows it.
///
/// # Errors
/// The registry fails.
pub(crate) async fn view(manager: &Manager, tx: &mut Tx, row: HostRow) -> Result<HostView, Problem> {
    let vms = tx.vms_on(row.name()).await?.into_iter().map(|vm| vm.spec.name).collect();
    let platform = attestation::view(tx, &row).await?;
    let live = manager.fleet.live(row.name());
    let state = match (row.state, &live) {
        (Enrolment::Enrolled, _) => HostState::Enrolled,
        (Enrolment::Quarantined, _) => HostState::Quarantined,
        (Enrolment::Joined, Some(_)) => HostState::Connected,
        (Enrolment::Joined, None) => HostState::Lost,
    };
    let last_seen_us = live.as_ref().map(|l| l.last_seen_us).or(row.last_seen_us);
    let (load, interfaces) = match live {
        Some(live) => (live.load, live.interfaces),
        None => (None, row.interfaces),
    };
    Ok(HostView {
        spiffe_id: format!("spiffe://{}/host/{}", manager.config.trust_domain, row.spec.name),
        state,
        attestation: platform.as_ref().map_or_else(|| "unattested".to_owned(), |p| p.verdict.clone()),
        platform,
        control_address: row.spec.control_address.to_string(),
        migration_address: row.spec.migration_address.to_string(),
        macs: row.spec.macs,
        capacity: row.spec.capacity,
        zone: row.spec.zone,
        vms,
        load,
        interfaces,
        version: row.version,
        last_seen: last_seen_us.map(clock::rfc3339),
        name: row.spec.name,
    })
}
