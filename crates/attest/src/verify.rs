//! Appraises evidence: bytes in, proof or refusal out.
//!
//! ```text
//!  1 authentic   attest is a quote ── AK is the enrolled one, and fit ── signature ── signer ── binding
//!                     │ nothing after this line is looked at unless all of it holds
//!  2 complete    selection as asked ── values of exactly these registers ── digest as signed
//!  3 good        each value allowed now ── counters and clock ── event log well formed
//! ```
//! Within a step every condition is looked at, so that an operator sees all reasons at once. Values are not
//! compared with the reference before they are proved to be signed: an explanation of made-up values would
//! mislead.

mod appraisal;
mod binding;
mod clock;
mod evidence;
mod reason;
mod reference;
mod signature;

use serde::Serialize;
use types::Digest;

pub use appraisal::{Appraisal, Appraised, PcrAppraisal, Refusal, VALID_S, Verdict};
pub use binding::{Binding, HostId, Purpose};
pub use clock::LastSeen;
pub use evidence::{EVIDENCE_LIMIT_BYTES, Evidence};
pub use reason::{Reason, ReasonCode};
pub use reference::{AllowedDigest, EVENTS_LIMIT, ReferenceFault, ReferencePcr, ReferenceValues};

use crate::enrol::Enrolled;
use crate::event_log::{EventLog, LogFault};
use crate::pcr::{PcrDigest, PcrIndex, PcrSelection};
use crate::structure::{Attest, AttestFault, Public, Signature};

/// What evidence is held against. All of it is the manager's own.
#[derive(Debug, Clone, Copy)]
pub struct Expectation<'a> {
    /// The platform, as it was enrolled.
    pub enrolled: &'a Enrolled,
    /// What it is to measure.
    pub reference: &'a ReferenceValues,
    /// What the quote is to be about. Its nonce was drawn for this one quote, and is forgotten afterwards.
    pub binding: &'a Binding,
    /// The clock of the last good quote.
    pub last_seen: LastSeen,
    /// Now, in seconds since 1970.
    pub now_unix_s: u64,
}

/// Appraises evidence.
///
/// # Errors
/// [`Refusal`], with every reason found, if anything is not as expected.
pub fn appraise(expected: &Expectation<'_>, evidence: &Evidence) -> Result<Appraised, Refusal> {
    let mut appraisal = Appraisal::begin(
        expected.binding,
        expected.enrolled.ak().name(),
        expected.reference.bank(),
        evidence.digest(),
        expected.reference.digest(),
        expected.now_unix_s,
    );
    let attest = match authentic(expected, evidence) {
        Ok(attest) => attest,
        Err(reasons) => {
            appraisal.reasons = reasons;
            return appraisal.conclude(false);
        }
    };
    appraisal.clock = Some(attest.clock);
    appraisal.firmware_version = Some(format!("{:016x}", attest.firmware_version));
    appraisal.reasons = complete(expected.reference.selection(), evidence, &attest);
    if !appraisal.reasons.is_empty() {
        return appraisal.conclude(false);
    }
    let log = evidence.event_log.as_ref().map(|log| EventLog::parse(log.as_slice()));
    appraisal.pcrs = appraise_pcrs(expected, evidence, log.as_ref().and_then(|log| log.as_ref().ok()));
    appraisal.reasons = mismatches(&appraisal.pcrs);
    appraisal.reasons.extend(log.and_then(malformed_log));
    appraisal.reasons.extend(clock::check(&expected.last_seen, &attest.clock));
    if !attest.clock.safe {
        appraisal.notes.push(UNSAFE_CLOCK.to_owned());
    }
    appraisal.conclude(true)
}

/// What evidence shows by itself, to whoever has no record of the platform: a fit key signed these very values, about this
/// binding. Whose key that is, and whether the values are good ones, it does not show.
///
/// # Errors
/// Every reason found.
pub fn is_sound(binding: &Binding, evidence: &Evidence) -> Result<(), Vec<Reason>> {
    let mut reasons = Vec::new();
    let malformed = |what: &str, fault: &dyn std::fmt::Display| {
        vec![Reason::new(ReasonCode::MalformedEvidence, format_args!("{what} can't be read: {fault}"))]
    };
    let attest = Attest::parse(evidence.attest.as_slice()).map_err(|fault| vec![not_a_quote(&fault)])?;
    let ak = Public::parse(evidence.ak_public.as_slice())
        .map_err(|fault| malformed("the attestation key", &fault))?;
    if let Err(fault) = ak.may_attest() {
        reasons.push(Reason::new(ReasonCode::AkUnfit, format_args!("the attestation key is unfit: {fault}")));
    }
    check_signature(&ak, evidence, &mut reasons);
    check_binding(binding, &attest, &mut reasons);
    reasons.extend(complete(attest.selection, evidence, &attest));
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

const UNSAFE_CLOCK: &str = "the TPM was shut down without notice, so its clock may repeat times; freshness \
                            rests on the nonce, not on it";

/// Step 1: it is a quote by the enrolled key of the enrolled TPM about this binding (threats.md HC-02,
/// HC-04).
fn authentic(expected: &Expectation<'_>, evidence: &Evidence) -> Result<Attest, Vec<Reason>> {
    let mut reasons = Vec::new();
    let attest =
        Attest::parse(evidence.attest.as_slice()).map_err(|fault| reasons.push(not_a_quote(&fault))).ok();
    check_key(expected.enrolled, evidence, &mut reasons);
    check_signature(expected.enrolled.ak(), evidence, &mut reasons);
    if let Some(attest) = &attest {
        check_signer(expected.enrolled, attest, &mut reasons);
        check_binding(expected.binding, attest, &mut reasons);
    }
    attest.filter(|_| reasons.is_empty()).ok_or(reasons)
}

fn not_a_quote(fault: &AttestFault) -> Reason {
    let code = match fault {
        AttestFault::NotTpmGenerated(_) => ReasonCode::NotTpmGenerated,
        AttestFault::NotAQuote(_) => ReasonCode::NotAQuote,
        AttestFault::Malformed(_) => ReasonCode::MalformedEvidence,
    };
    Reason::new(code, format_args!("the attestation can't be a quote: {fault}"))
}

fn check_key(enrolled: &Enrolled, evidence: &Evidence, reasons: &mut Vec<Reason>) {
    let sent = evidence.ak_public.as_slice();
    if sent != enrolled.ak().as_bytes() {
        let found = Public::parse(sent).map_or_else(|fault| fault.to_string(), |key| key.name().to_string());
        let detail = format!(
            "the attestation key is not the enrolled one: expected {}, found {found}; if the TPM was \
             cleared or exchanged, an admin must enrol the host again",
            enrolled.ak().name()
        );
        reasons.push(Reason::new(ReasonCode::AkNotEnrolled, detail));
    }
    // The enrolled one is looked at again: a record that was altered must not lower the bar.
    if let Err(fault) = enrolled.ak().may_attest() {
        let detail =
            format!("the attestation key is unfit: {fault}; the host must be enrolled again with a fit one");
        reasons.push(Reason::new(ReasonCode::AkUnfit, detail));
    }
}

fn check_signature(ak: &Public, evidence: &Evidence, reasons: &mut Vec<Reason>) {
    match Signature::parse(evidence.signature.as_slice()) {
        Err(fault) => reasons.push(Reason::new(
            ReasonCode::MalformedEvidence,
            format_args!("the signature can't be read: {fault}"),
        )),
        Ok(signature) if signature::verifies(ak, evidence.attest.as_slice(), &signature) => {}
        Ok(_) => reasons.push(Reason::new(
            ReasonCode::BadSignature,
            "the signature is not by the enrolled attestation key over this quote",
        )),
    }
}

fn check_signer(enrolled: &Enrolled, attest: &Attest, reasons: &mut Vec<Reason>) {
    let expected = enrolled.qualified_ak_name();
    if attest.qualified_signer != expected.as_bytes() {
        let found = hex::encode(&attest.qualified_signer);
        let detail = format!(
            "the quote's signer is not the enrolled key below the enrolled endorsement key: expected \
             {expected}, found {found}"
        );
        reasons.push(Reason::new(ReasonCode::WrongSigner, detail));
    }
}

fn check_binding(binding: &Binding, attest: &Attest, reasons: &mut Vec<Reason>) {
    let expected = binding.qualifying_data();
    if attest.extra_data != expected.0 {
        let found = hex::encode(&attest.extra_data);
        let detail = format!(
            "the quote is about something else than nonce, purpose, migration, host and keys of this \
             question (a replayed or relayed quote is): expected {expected}, found {found}"
        );
        reasons.push(Reason::new(ReasonCode::WrongBinding, detail));
    }
}

/// Step 2: exactly the registers asked for, with the values that were signed.
fn complete(asked: PcrSelection, evidence: &Evidence, attest: &Attest) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if attest.selection != asked {
        let detail = format!("the quote is of {}, asked was {asked}", attest.selection);
        reasons.push(Reason::new(ReasonCode::WrongSelection, detail));
    }
    let sent = PcrSelection::of(evidence.pcrs.bank(), evidence.pcrs.values().keys().copied());
    if sent != asked {
        let detail = format!("values were sent of {sent}, asked was {asked}");
        reasons.push(Reason::new(ReasonCode::WrongValues, detail));
    }
    if reasons.is_empty() && evidence.pcrs.quote_digest() != attest.pcr_digest {
        let detail = "the PCR values sent are not those that the quote signs: they changed while the host \
                      quoted, or were altered";
        reasons.push(Reason::new(ReasonCode::PcrDigestDiffers, detail));
    }
    reasons
}

/// Step 3: what is expected of each register against what it holds (threats.md HC-01, HC-05). `complete` has
/// shown that both name the same.
fn appraise_pcrs(
    expected: &Expectation<'_>,
    evidence: &Evidence,
    log: Option<&EventLog>,
) -> Vec<PcrAppraisal> {
    let replayed = log.map(|log| log.replay(expected.reference.bank())).unwrap_or_default();
    let appraise = |(index, found): (&PcrIndex, &PcrDigest)| {
        let reference = expected.reference.pcrs().get(index);
        let allowed = reference.map(|pcr| pcr.allowed.as_slice()).unwrap_or_default();
        let now: Vec<_> =
            allowed.iter().filter(|allowed| allowed.counts_at(expected.now_unix_s)).cloned().collect();
        let matches = now.iter().any(|allowed| allowed.digest == *found);
        let explain = || explain(*index, found, reference?, log.map(|log| (log, replayed.get(index))));
        let explanation = if matches { None } else { explain() };
        PcrAppraisal { index: *index, matches, expected: now, found: found.clone(), explanation }
    };
    evidence.pcrs.values().iter().map(appraise).collect()
}

/// Why a register holds another value, as far as the log tells.
fn explain(
    index: PcrIndex,
    found: &PcrDigest,
    reference: &ReferencePcr,
    log: Option<(&EventLog, Option<&PcrDigest>)>,
) -> Option<String> {
    if reference.allowed.iter().any(|allowed| allowed.digest == *found) {
        return Some("this value is in the reference, but does not count at this time".to_owned());
    }
    let (log, replayed) = log?;
    match replayed {
        Some(value) if value == found => {}
        Some(value) => {
            return Some(format!(
                "the event log does not lead to this value (it leads to {value}): the register was \
                 extended outside the log, or the log was altered"
            ));
        }
        None => return Some("the event log says nothing of this register".to_owned()),
    }
    if reference.events.is_empty() {
        return Some(
            "the event log leads to this value; the reference keeps no events to compare it with".to_owned(),
        );
    }
    log.first_difference(index, found.bank(), &reference.events)
}

fn mismatches(pcrs: &[PcrAppraisal]) -> Vec<Reason> {
    let mismatch = |pcr: &PcrAppraisal| {
        let expected: Vec<String> = pcr.expected.iter().map(|allowed| allowed.digest.to_string()).collect();
        let expected =
            if expected.is_empty() { "nothing at this time".to_owned() } else { expected.join(" or ") };
        let why = pcr.explanation.as_ref().map(|text| format!(": {text}")).unwrap_or_default();
        Reason::new(
            ReasonCode::PcrMismatch,
            format_args!("{}: expected {expected}, found {}{why}", pcr.index, pcr.found),
        )
    };
    pcrs.iter().filter(|pcr| !pcr.matches).map(mismatch).collect()
}

fn malformed_log(log: Result<EventLog, LogFault>) -> Option<Reason> {
    let fault = log.err()?;
    Some(Reason::new(ReasonCode::MalformedEventLog, format_args!("the event log can't be read: {fault}")))
}

/// The digest of a record over its RFC 8785 JSON. Numbers in records are below 2^53, so that it exists.
fn json_digest(record: &impl Serialize) -> Digest {
    // A record of ours always serialises: its keys are texts and its numbers small. Were it not so, the
    // digest would be that of nothing, which matches no record.
    Digest::of(&serde_json_canonicalizer::to_vec(record).unwrap_or_default())
}
