//! A host's TPM at its join: the challenge, and what is made of the answer.
//!
//! A challenge is answered once, within a minute, on whatever connection; it is kept in this process's memory, because a
//! host asks and answers on one connection.

use super::{failed, host_id, malformed, reference};
use crate::clock;
use crate::core::Manager;
use api::fleet::{ChallengeReply, TpmProof};
use attest::enrol::{Application, Candidate, EkRule, EnrolRefusal, Pending};
use attest::event_log::EventLog;
use attest::verify::{Expectation, LastSeen, appraise};
use attest::{Bank, Binding, Evidence, PcrIndex, PcrSelection, Purpose, ReferenceValues};
use registry::{HostRow, PlatformVerdict, Tx};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use types::host::TpmSpec;
use types::{Digest, ErrorCode, HostName, Nonce, Problem};

/// A host answers in seconds; a discrete TPM that makes a key takes half a minute before it asks.
const CHALLENGE_LIFE_US: i64 = 60_000_000;
/// Each costs a valid join token; hosts join one by one.
const CHALLENGES_MAX: usize = 256;
/// An application has four keys and certificates of some kilobytes.
const APPLICATION_LIMIT_BYTES: usize = 64 * 1024;

/// Challenges that wait for their answer.
#[derive(Default)]
pub(crate) struct Challenges(Mutex<BTreeMap<String, Waiting>>);

struct Waiting {
    host: HostName,
    pending: Pending,
    nonce: Nonce,
    selection: PcrSelection,
    since_us: i64,
}

impl Challenges {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Waiting>> {
        self.0.lock().expect("no holder of this lock can panic: it only moves values in a map")
    }

    fn put(&self, id: String, waiting: Waiting) -> Result<(), Problem> {
        let mut held = self.lock();
        held.retain(|_, w| waiting.since_us - w.since_us < CHALLENGE_LIFE_US);
        if held.len() >= CHALLENGES_MAX {
            return Err(
                Problem::new(ErrorCode::LimitReached, "too many hosts join at once").hint("wait a minute")
            );
        }
        held.insert(id, waiting);
        Ok(())
    }

    fn take(&self, id: &str, host: &HostName, now_us: i64) -> Result<Waiting, Problem> {
        let waiting = self.lock().remove(id);
        waiting
            .filter(|w| w.host == *host && now_us - w.since_us < CHALLENGE_LIFE_US)
            .ok_or_else(|| failed("the challenge is unknown, answered already, or more than a minute old"))
    }
}

/// What is wrong with the TPM of a host's record, before it is one.
///
/// # Errors
/// `bad-request`.
pub(crate) fn validate(tpm: &TpmSpec) -> Result<(), Problem> {
    rule(tpm)?;
    pcrs(&tpm.record_pcrs)?;
    Ok(())
}

/// Which endorsement key the record accepts.
fn rule(tpm: &TpmSpec) -> Result<EkRule, Problem> {
    let bad = |detail: String| Problem::new(ErrorCode::BadRequest, detail);
    let rule = match (&tpm.ek_name, tpm.vendor_roots.is_empty()) {
        (Some(name), true) => json!({ "name": name.to_ascii_lowercase() }),
        (None, false) => json!({ "vendor_roots": tpm.vendor_roots }),
        _ => return Err(bad("tpm must name either ek_name or vendor_roots".to_owned())),
    };
    serde_json::from_value(rule).map_err(|e| bad(format!("tpm: {e}")))
}

/// Registers by their numbers.
///
/// # Errors
/// `bad-request`.
pub(crate) fn pcrs(numbers: &[u8]) -> Result<Vec<PcrIndex>, Problem> {
    let bad = |n: &u8| Problem::new(ErrorCode::BadRequest, format!("there is no PCR {n}: they are 0 to 23"));
    numbers.iter().map(|n| PcrIndex::try_from(*n).map_err(|_| bad(n))).collect()
}

/// A challenge for a host whose join token was looked at. Without a TPM in its record there is nothing to ask.
///
/// # Errors
/// `attestation-failed`: another TPM, or unfit keys; `bad-request`.
pub(crate) async fn challenge(
    manager: &Manager,
    host: &HostRow,
    application_json: &str,
) -> Result<ChallengeReply, Problem> {
    let Some(tpm) = &host.spec.tpm else { return Ok(ChallengeReply::default()) };
    if application_json.len() > APPLICATION_LIMIT_BYTES {
        return Err(Problem::new(ErrorCode::BadRequest, "the application is too long"));
    }
    let application: Application = serde_json::from_str(application_json)
        .map_err(|e| Problem::new(ErrorCode::BadRequest, format!("the application is malformed: {e}")))?;
    let mut tx = manager.registry.read("reference of a join").await?;
    let (selection, _) = expected(&mut tx, host, tpm).await?;
    drop(tx);
    let refused = |e: EnrolRefusal| failed(e.to_string());
    let candidate = Candidate::check(application, &rule(tpm)?, clock::now_s()).map_err(refused)?;
    let (challenge, pending) = candidate.challenge().map_err(refused)?;
    let id = hex::encode(clock::random::<16>()?);
    let nonce = Nonce::from_bytes(clock::random()?);
    let internal = |e: serde_json::Error| Problem::new(ErrorCode::Internal, e.to_string());
    let reply = ChallengeReply {
        id: id.clone(),
        challenge_json: serde_json::to_string(&challenge).map_err(internal)?,
        nonce: nonce.to_string(),
        selection_json: serde_json::to_string(&selection).map_err(internal)?,
        trust_domain: manager.config.trust_domain.clone(),
    };
    let since_us = clock::now_us();
    let waiting = Waiting { host: host.name().clone(), pending, nonce, selection, since_us };
    manager.challenges.put(id, waiting)?;
    Ok(reply)
}

/// Which registers a join quotes, and the reference values where there are some already.
async fn expected(
    tx: &mut Tx,
    host: &HostRow,
    tpm: &TpmSpec,
) -> Result<(PcrSelection, Option<ReferenceValues>), Problem> {
    if let Some(reference) = reference::of_host(tx, host.name(), tpm.class.as_ref()).await? {
        return Ok((reference.selection(), Some(reference)));
    }
    if tpm.record_pcrs.is_empty() {
        let detail = format!("there are no reference values for host {}", host.name());
        return Err(failed(detail).hint(
            "set them with `outrider reference set`, or enrol the host with --record-pcrs to take those of its join",
        ));
    }
    Ok((PcrSelection::of(Bank::Sha256, pcrs(&tpm.record_pcrs)?), None))
}

/// In the transaction of a join: the host opened the challenge and proves its state over the key that was just certified.
/// Gives what the audit entry says of it.
///
/// # Errors
/// `attestation-failed`.
pub(crate) async fn joined(
    manager: &Manager,
    tx: &mut Tx,
    host: &HostRow,
    proof: Option<&TpmProof>,
    host_spki: Digest,
) -> Result<Value, Problem> {
    let name = host.name();
    let Some(tpm) = &host.spec.tpm else { return Ok(json!("unattested")) };
    let proof = proof.ok_or_else(|| {
        failed(format!("the record of host {name} names a TPM, and the host shows none"))
            .hint("set `tpm` in its host.toml, or give `outrider host join` --tpm")
    })?;
    let waiting = manager.challenges.take(&proof.id, name, clock::now_us())?;
    let enrolled = waiting.pending.confirm(&proof.secret).map_err(|e| failed(e.to_string()))?;
    let evidence = Evidence::from_bytes(&proof.evidence).map_err(|e| malformed(name, &e))?;
    let (selection, reference) = expected(tx, host, tpm).await?;
    if selection != waiting.selection {
        return Err(failed("the reference values were changed during the join").hint("join again"));
    }
    let recorded = reference.is_none();
    let reference = match reference {
        Some(reference) => reference,
        None => record(&evidence)?,
    };
    let binding =
        Binding { nonce: waiting.nonce, purpose: Purpose::Join, host: host_id(manager, name)?, host_spki };
    let expectation = Expectation {
        enrolled: &enrolled,
        reference: &reference,
        binding: &binding,
        last_seen: LastSeen::Never,
        now_unix_s: clock::now_s(),
    };
    let appraised = appraise(&expectation, &evidence).map_err(|refusal| failed(refusal.to_string()))?;
    let text = |e: serde_json::Error| Problem::new(ErrorCode::Internal, e.to_string());
    tx.enrol_platform(name, &serde_json::to_string(&enrolled).map_err(text)?).await?;
    let appraisal = appraised.appraisal();
    let verdict = PlatformVerdict {
        trusted: true,
        at_us: tx.now_us(),
        reason: None,
        appraisal: Some(serde_json::to_string(appraisal).map_err(text)?),
    };
    let clock = appraisal.clock.as_ref().map(serde_json::to_string).transpose().map_err(text)?;
    tx.platform_appraised(name, &verdict, clock.as_deref()).await?;
    if recorded {
        let document = serde_json::to_string(&reference).map_err(text)?;
        tx.set_reference(&reference::host_scope(name), &document, &format!("host/{name}, at its join"))
            .await?;
    }
    Ok(json!({
        "ek": enrolled.ek_name(), "ak": enrolled.ak().name(), "appraisal": appraisal.digest(),
        "reference": reference.digest(), "reference_recorded": recorded,
    }))
}

/// The state of now as reference, with what its event log tells.
///
/// # Errors
/// `attestation-failed`.
pub(crate) fn record(evidence: &Evidence) -> Result<ReferenceValues, Problem> {
    let log = evidence.event_log.as_ref().and_then(|log| EventLog::parse(log.as_slice()).ok());
    ReferenceValues::recorded(&evidence.pcrs, log.as_ref()).map_err(|e| failed(e.to_string()))
}
