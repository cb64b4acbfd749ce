//! Hosts prove their platforms: what is asked of whom, and what came of it.
//!
//! ```text
//!  record names a TPM? ──no──▶ unattested: policy decides whether that will do
//!        │ yes
//!        ▼
//!  Standing (enrolled keys, reference values, last clock) ──question──▶ host's TPM ──▶ attest::verify::appraise
//!        │ anything missing, late, malformed, not as expected                                  │
//!        ▼                                                                                     ▼
//!  the host is flagged, with the reason; no permit                              Proof, which a permit demands
//! ```
//! The last clock is read before the question goes out, so that quotes which overtake each other never look like a TPM
//! that was set back: each is younger than what was known when it was asked for.

pub(crate) mod enrolment;
pub(crate) mod reference;

use crate::clock;
use crate::core::Manager;
use crate::fleet::Session;
use crate::http::Caller;
use crate::migration::gates;
use api::fleet::{Quote, reply, to_host};
use api::http::{AttestationView, PcrView};
use attest::verify::{Expectation, LastSeen, appraise};
use attest::{
    Appraisal, Appraised, Binding, ClockInfo, Enrolled, Evidence, HostId, PcrSelection, Purpose,
    ReferenceValues,
};
use registry::{HostRow, PlatformVerdict, QuoteRow, Tx};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use types::{Digest, ErrorCode, HostName, MigrationId, Nonce, Problem, Side};

/// A discrete TPM signs in less than a second; a few questions may stand before this one.
const QUOTE_LIMIT: Duration = Duration::from_secs(6);
/// A host that goes on failing for the same reason is written down once in this time: looks are cheap to ask for.
const SAME_REASON_US: i64 = 60_000_000;
/// Text of a reason that is kept and shown.
const REASON_LIMIT_CHARS: usize = 2_000;

/// What a host's quote is held against, as the registry says now.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Standing {
    enrolled: Enrolled,
    reference: ReferenceValues,
    clock: Option<ClockInfo>,
}

fn failed(detail: impl Into<String>) -> Problem {
    Problem::new(ErrorCode::AttestationFailed, detail.into())
}

/// A document of the registry that can't be read is no reason to let anybody pass.
fn read<T: serde::de::DeserializeOwned>(what: &str, text: &str) -> Result<T, Problem> {
    serde_json::from_str(text).map_err(|e| failed(format!("{what} in the registry cannot be read: {e}")))
}

/// What a host is held against; `None`: its record names no TPM.
///
/// # Errors
/// `attestation-failed`: it has proved none, or nothing says what it should measure.
pub(crate) async fn standing(tx: &mut Tx, host: &HostRow) -> Result<Option<Standing>, Problem> {
    let Some(tpm) = &host.spec.tpm else { return Ok(None) };
    let name = host.name();
    let Some(row) = tx.platform(name).await? else {
        return Err(failed(format!("host {name} has not proved the TPM of its record"))
            .hint("set `tpm` in its host.toml and join it with a new token"));
    };
    let reference = reference::of_host(tx, name, tpm.class.as_ref()).await?.ok_or_else(|| {
        failed(format!("there are no reference values for host {name}")).hint(format!(
            "`outrider reference record {name} --pcrs …` takes its present state, if you trust that"
        ))
    })?;
    let clock = row.clock.as_deref().map(|text| read("the TPM's last clock", text)).transpose()?;
    Ok(Some(Standing { enrolled: read("the enrolled platform", &row.enrolled)?, reference, clock }))
}

/// Looks at hosts outside migrations, one at a time for each host: whoever asks for many keeps himself waiting, and not the
/// TPM from the migrations.
#[derive(Default)]
pub(crate) struct Looks(Mutex<BTreeMap<HostName, Arc<tokio::sync::Mutex<()>>>>);

impl Looks {
    async fn turn(&self, host: &HostName) -> tokio::sync::OwnedMutexGuard<()> {
        let turns = {
            let mut all =
                self.0.lock().expect("no holder of this lock can panic: it only moves values in a map");
            Arc::clone(all.entry(host.clone()).or_default())
        };
        turns.lock_owned().await
    }
}

/// The proof that a host's platform is as it should be, for one purpose.
#[derive(Debug)]
pub(crate) struct Proof {
    host: HostName,
    binding: Binding,
    evidence: Evidence,
    appraised: Appraised,
    enrolled: Enrolled,
}

/// When in a migration a quote was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Before its permit.
    Permit,
    /// While the stream flows, before the guest is stopped.
    Convergence,
}

impl Stage {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Permit => "permit",
            Self::Convergence => "convergence",
        }
    }
}

impl Proof {
    /// The digest that the permit names.
    pub(crate) fn quote(&self) -> Digest {
        self.appraised.appraisal().evidence
    }

    /// Demands that nothing it rests on has changed, and that it is fresh: inside the transaction that relies on it.
    ///
    /// # Errors
    /// `attestation-failed`.
    pub(crate) async fn expect_current(&self, tx: &mut Tx, host: &HostRow) -> Result<(), Problem> {
        let changed = || {
            failed(format!("what host {} is held against was changed during the decision", self.host))
                .hint("ask again")
        };
        let now = standing(tx, host).await?.ok_or_else(changed)?;
        let same = now.enrolled == self.enrolled
            && now.reference.digest() == self.appraised.appraisal().reference
            && *host.name() == self.host
            && self.appraised.is_about(&self.binding);
        if !same {
            return Err(changed());
        }
        if !self.appraised.counts_at(clock::now_s()) {
            return Err(failed(format!("the quote of host {} is too old", self.host)).hint("ask again"));
        }
        Ok(())
    }

    /// Writes down that the host proved itself.
    ///
    /// # Errors
    /// The registry fails.
    pub(crate) async fn record(&self, tx: &mut Tx) -> Result<(), Problem> {
        let appraisal = self.appraised.appraisal();
        let clock = appraisal.clock.as_ref().and_then(|clock| serde_json::to_string(clock).ok());
        let verdict = verdict(true, None, Some(appraisal));
        Ok(tx.platform_appraised(&self.host, &verdict, clock.as_deref()).await?)
    }

    /// Keeps the quote of a migration, for whoever looks at it later.
    ///
    /// # Errors
    /// The registry fails.
    pub(crate) async fn keep(
        &self,
        tx: &mut Tx,
        id: MigrationId,
        side: Side,
        stage: Stage,
    ) -> Result<(), Problem> {
        let text = |e: serde_json::Error| Problem::new(ErrorCode::Internal, e.to_string());
        let row = QuoteRow {
            side,
            stage: stage.as_str().to_owned(),
            binding: serde_json::to_string(&self.binding).map_err(text)?,
            evidence: self.evidence.to_bytes(),
            appraisal: serde_json::to_string(self.appraised.appraisal()).map_err(text)?,
            taken_at_us: clock::now_us(),
        };
        Ok(tx.put_quote(id, &row).await?)
    }
}

fn verdict(trusted: bool, reason: Option<String>, appraisal: Option<&Appraisal>) -> PlatformVerdict {
    PlatformVerdict {
        trusted,
        at_us: clock::now_us(),
        reason: reason.map(|text| text.chars().take(REASON_LIMIT_CHARS).collect()),
        appraisal: appraisal.and_then(|a| serde_json::to_string(a).ok()),
    }
}

/// How a host's platform did not prove itself.
struct Failed {
    problem: Problem,
    appraisal: Option<Box<Appraisal>>,
}

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Self {
        Self { problem, appraisal: None }
    }
}

/// Has a host prove its platform; `None`: its record names no TPM. One that does not is flagged.
///
/// # Errors
/// `attestation-failed`, with every reason found.
pub(crate) async fn prove(
    manager: &Manager,
    host: &HostRow,
    session: &Session,
    purpose: Purpose,
) -> Result<Option<Proof>, Problem> {
    prove_since(manager, host, session, purpose, None).await
}

/// The same; with a clock, the TPM must not have been started anew since.
async fn prove_since(
    manager: &Manager,
    host: &HostRow,
    session: &Session,
    purpose: Purpose,
    start: Option<ClockInfo>,
) -> Result<Option<Proof>, Problem> {
    let _turn = match purpose {
        Purpose::HostCheck => Some(manager.looks.turn(host.name()).await),
        Purpose::Join | Purpose::Migration { .. } => None,
    };
    let asked = async {
        let mut tx = manager.registry.read("platform").await.map_err(Problem::from)?;
        let Some(standing) = standing(&mut tx, host).await? else { return Ok(None) };
        drop(tx);
        question(manager, session, standing, purpose, start).await.map(Some)
    };
    match asked.await {
        Ok(proof) => Ok(proof),
        Err(Failed { problem, .. }) if problem.code == ErrorCode::RegistryUnavailable => Err(problem),
        Err(failed) => {
            flag(manager, host.name(), &failed).await?;
            Err(failed.problem)
        }
    }
}

/// One question: a nonce that is drawn for it alone, an order, an appraisal.
async fn question(
    manager: &Manager,
    session: &Session,
    standing: Standing,
    purpose: Purpose,
    start: Option<ClockInfo>,
) -> Result<Proof, Failed> {
    // A log explains a mismatch to people: where they look. In a migration it would be bytes for nothing.
    let with_log = matches!(purpose, Purpose::HostCheck);
    let binding = binding(manager, session, purpose)?;
    let evidence = ask(session, &binding, &standing.reference.selection(), with_log).await?;
    let expectation = Expectation {
        enrolled: &standing.enrolled,
        reference: &standing.reference,
        binding: &binding,
        last_seen: match start {
            Some(clock) => LastSeen::SameStart(clock),
            None => standing.clock.map_or(LastSeen::Never, LastSeen::Earlier),
        },
        now_unix_s: clock::now_s(),
    };
    match appraise(&expectation, &evidence) {
        Ok(appraised) => Ok(Proof {
            host: session.host.clone(),
            binding,
            evidence,
            appraised,
            enrolled: standing.enrolled,
        }),
        Err(refusal) => {
            let hint = format!("`outrider host attest {}` shows expected against found", session.host);
            let problem = failed(cut(&refusal.to_string())).hint(hint);
            Err(Failed { problem, appraisal: Some(Box::new(refusal.appraisal().clone())) })
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(REASON_LIMIT_CHARS).collect()
}

fn binding(manager: &Manager, session: &Session, purpose: Purpose) -> Result<Binding, Problem> {
    Ok(Binding {
        nonce: Nonce::from_bytes(clock::random()?),
        purpose,
        host: host_id(manager, &session.host)?,
        host_spki: session.key,
    })
}

fn host_id(manager: &Manager, host: &HostName) -> Result<HostId, Problem> {
    let id = format!("spiffe://{}/host/{host}", manager.config.trust_domain);
    id.try_into().map_err(|e: &str| Problem::new(ErrorCode::Internal, e))
}

async fn ask(
    session: &Session,
    binding: &Binding,
    selection: &PcrSelection,
    event_log: bool,
) -> Result<Evidence, Problem> {
    let (migration, side) = match &binding.purpose {
        Purpose::Migration { migration, side, .. } => (migration.to_string(), side.to_string()),
        Purpose::Join | Purpose::HostCheck => (String::new(), String::new()),
    };
    let selection_json = serde_json::to_string(selection)
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("a selection of PCRs: {e}")))?;
    let order = Quote { nonce: binding.nonce.to_string(), migration, side, selection_json, event_log };
    let answer = session.order(to_host::Body::Quote(order), QUOTE_LIMIT).await;
    match answer.map_err(|problem| as_failure(&session.host, problem))? {
        reply::Result::Quoted(quoted) => {
            Evidence::from_bytes(&quoted.evidence).map_err(|e| malformed(&session.host, &e))
        }
        other => Err(failed(gates::unexpected(&session.host, "quote", &other).detail)),
    }
}

fn malformed(host: &HostName, error: &dyn std::error::Error) -> Problem {
    failed(format!("host {host} sent malformed evidence (attest-malformed-evidence): {error}"))
}

/// Whatever a host says instead of a quote, it has not proved itself.
fn as_failure(host: &HostName, problem: Problem) -> Problem {
    match problem.code {
        ErrorCode::AttestationFailed => problem,
        _ => {
            let detail = format!("host {host} gave no quote: {}", problem.detail);
            Problem { code: ErrorCode::AttestationFailed, detail, hint: problem.hint }
        }
    }
}

async fn flag(manager: &Manager, host: &HostName, failed: &Failed) -> Result<(), Problem> {
    let problem = &failed.problem;
    tracing::warn!(%host, "not trusted: {}", problem.detail);
    let mut tx = manager.begin("platform refused").await?;
    let verdict = verdict(false, Some(problem.detail.clone()), failed.appraisal.as_deref());
    let last = tx.platform(host).await?.and_then(|row| row.verdict);
    if last.is_some_and(|last| {
        !last.trusted && last.reason == verdict.reason && verdict.at_us - last.at_us < SAME_REASON_US
    }) {
        // Said already; what is shown stays as it is, with its time, so that it is said again after a while.
        return Ok(());
    }
    tx.platform_appraised(host, &verdict, None).await?;
    let mut detail = json!({ "trusted": false, "detail": cut(&problem.detail) });
    if let Some(appraisal) = &failed.appraisal {
        detail["appraisal"] = json!(appraisal.digest());
        detail["reasons"] = json!(appraisal.reasons.iter().map(|r| r.code).collect::<Vec<_>>());
    }
    tx.audit(&manager.actor(), "host.attest", host.as_str(), detail).await?;
    Ok(tx.commit().await?)
}

/// Both hosts of a migration prove themselves over the keys of their VM agents.
///
/// # Errors
/// `attestation-failed`.
pub(crate) async fn for_permit(
    manager: &Manager,
    id: MigrationId,
    [source, target]: [(&HostRow, &Session, &[u8]); 2],
) -> Result<[Option<Proof>; 2], Problem> {
    let purpose = |side, spki| Purpose::Migration { migration: id, side, agent_spki: Digest::of(spki) };
    let (source, target) = tokio::try_join!(
        prove(manager, source.0, source.1, purpose(Side::Source, source.2)),
        prove(manager, target.0, target.1, purpose(Side::Target, target.2)),
    )?;
    Ok([source, target])
}

/// What the grant of a permit rests on, in its own transaction: each host that must has proved itself, just now, against
/// what still stands. Gives the digests that the permit names.
///
/// # Errors
/// `attestation-failed`.
pub(crate) async fn granted(
    tx: &mut Tx,
    id: MigrationId,
    hosts: [&HostRow; 2],
    proofs: &[Option<Proof>; 2],
) -> Result<[Option<Digest>; 2], Problem> {
    let mut quotes = [None, None];
    let sides = [Side::Source, Side::Target];
    for (((side, host), proof), quote) in sides.into_iter().zip(hosts).zip(proofs).zip(&mut quotes) {
        match proof {
            Some(proof) => {
                proof.expect_current(tx, host).await?;
                proof.record(tx).await?;
                proof.keep(tx, id, side, Stage::Permit).await?;
                *quote = Some(proof.quote());
            }
            None if host.spec.tpm.is_none() => {}
            None => return Err(failed(format!("host {} must prove itself, and was not asked", host.name()))),
        }
    }
    Ok(quotes)
}

/// While the stream flows, both hosts prove themselves again, as the same machines that were not started anew since the
/// permit. Nothing to ask where neither record names a TPM.
///
/// # Errors
/// `host-unreachable`; `attestation-failed`, as for a permit.
pub(crate) async fn again(manager: &Manager, id: MigrationId, hosts: [&HostRow; 2]) -> Result<(), Problem> {
    if hosts.iter().all(|host| host.spec.tpm.is_none()) {
        return Ok(());
    }
    let mut tx = manager.registry.read("quotes of a permit").await?;
    let (permit, quotes) = (tx.permit(id).await?, tx.quotes(id).await?);
    drop(tx);
    let permit = permit.ok_or_else(|| failed(format!("migration {id} has no permit on record")))?;
    let one = async |side: Side, host: &HostRow| {
        let spki = &permit.claims.part(side).agent_spki;
        let purpose = Purpose::Migration { migration: id, side, agent_spki: Digest::of(spki) };
        let first = quotes.iter().find(|q| q.side == side && q.stage == Stage::Permit.as_str());
        let appraisal: Option<Appraisal> = first.and_then(|q| serde_json::from_str(&q.appraisal).ok());
        let start = appraisal.and_then(|appraisal| appraisal.clock);
        if host.spec.tpm.is_some() && start.is_none() {
            let detail = format!("the quote of host {} for the permit is not on record", host.name());
            return Err(failed(detail));
        }
        let session = gates::live(manager, host)?;
        Ok::<_, Problem>(
            prove_since(manager, host, &session, purpose, start).await?.map(|proof| (side, proof)),
        )
    };
    let [source, target] = hosts;
    let (source, target) = tokio::try_join!(one(Side::Source, source), one(Side::Target, target))?;
    let mut tx = manager.begin("quoted again").await?;
    for ((side, proof), host) in [source, target].into_iter().zip(hosts).filter_map(|(p, h)| Some((p?, h))) {
        proof.expect_current(&mut tx, host).await?;
        proof.record(&mut tx).await?;
        proof.keep(&mut tx, id, side, Stage::Convergence).await?;
    }
    Ok(tx.commit().await?)
}

/// A look at a host outside any migration, as `outrider host attest` shows it.
///
/// # Errors
/// It can't be asked at all: no TPM in its record, or the host is not connected. That it is not trusted is an answer.
pub(crate) async fn check(
    manager: &Manager,
    caller: &Caller,
    host: &HostRow,
) -> Result<AttestationView, Problem> {
    let name = host.name();
    if host.spec.tpm.is_none() {
        return Err(Problem::new(ErrorCode::WrongState, format!("the record of host {name} names no TPM"))
            .hint("`outrider host add` takes --ek-name or --ek-vendor-root"));
    }
    let session = gates::live(manager, host)?;
    match prove(manager, host, &session, Purpose::HostCheck).await {
        Ok(Some(proof)) => {
            let mut tx = manager.begin("platform looked at").await?;
            proof.expect_current(&mut tx, host).await?;
            proof.record(&mut tx).await?;
            let detail = json!({ "trusted": true, "appraisal": proof.appraised.appraisal().digest() });
            tx.audit(&caller.audit_name(), "host.attest", name.as_str(), detail).await?;
            tx.commit().await?;
        }
        Ok(None) => {}
        Err(problem) if problem.code == ErrorCode::AttestationFailed => {}
        Err(problem) => return Err(problem),
    }
    let mut tx = manager.registry.read("platform").await?;
    let view = view(&mut tx, host).await?;
    view.ok_or_else(|| failed(format!("host {name} has not proved the TPM of its record")))
}

/// What is known of a host's platform, for people. `None`: its record names no TPM.
///
/// # Errors
/// The registry fails.
pub(crate) async fn view(tx: &mut Tx, host: &HostRow) -> Result<Option<AttestationView>, Problem> {
    let Some(tpm) = &host.spec.tpm else { return Ok(None) };
    let row = tx.platform(host.name()).await?;
    let enrolled: Option<Enrolled> = row.as_ref().and_then(|row| serde_json::from_str(&row.enrolled).ok());
    let reference = reference::scope_of(tx, host.name(), tpm.class.as_ref()).await?;
    let last = row.and_then(|row| row.verdict);
    let appraisal: Option<Appraisal> =
        last.as_ref().and_then(|v| v.appraisal.as_deref()).and_then(|text| serde_json::from_str(text).ok());
    let verdict = match &last {
        None => "unproved",
        Some(verdict) if verdict.trusted => "trusted",
        Some(_) => "refused",
    };
    Ok(Some(AttestationView {
        host: host.name().clone(),
        verdict: verdict.to_owned(),
        at: last.as_ref().map(|v| clock::rfc3339(v.at_us)),
        reason: last.and_then(|v| v.reason),
        reasons: appraisal.iter().flat_map(|a| &a.reasons).map(|r| r.code.to_string()).collect(),
        ek_name: enrolled.as_ref().map(|e| e.ek_name().to_string()),
        ak_name: enrolled.as_ref().map(|e| e.ak().name().to_string()),
        reference,
        firmware_version: appraisal.as_ref().and_then(|a| a.firmware_version.clone()),
        notes: appraisal.as_ref().map(|a| a.notes.clone()).unwrap_or_default(),
        pcrs: appraisal.map(pcr_views).unwrap_or_default(),
    }))
}

fn pcr_views(appraisal: Appraisal) -> Vec<PcrView> {
    let bank = appraisal.bank;
    let view = |pcr: attest::verify::PcrAppraisal| PcrView {
        pcr: pcr.index.into(),
        bank: bank.to_string(),
        matches: pcr.matches,
        expected: pcr.expected.iter().map(|allowed| allowed.digest.to_string()).collect(),
        notes: pcr.expected.into_iter().map(|allowed| allowed.note).collect(),
        found: pcr.found.to_string(),
        explanation: pcr.explanation,
    };
    appraisal.pcrs.into_iter().map(view).collect()
}
