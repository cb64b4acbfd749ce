//! Verifies a bundle without a manager. Pure: bytes and the keys that the reader trusts in, a verdict out.
//!
//! What is claimed of a good one: every entry shown is in the log of the checkpoint; the permit was signed by a manager;
//! every statement was signed by the daemon that the permit names, is about exactly that attempt and permit, and the
//! entries of the log say the same, in an order that a hand-over can have. Not claimed: that no entry was left out.

use super::{ENTRIES_MAX, FORMAT, STATEMENTS_MAX};
use api::http::{Bundle, BundleAttestation, BundleEntry, BundleQuote, BundleVerified};
use attest::{Binding, Evidence, Purpose};
use permit::checkpoint::{self, Checkpoint};
use permit::merkle::{self, LEVELS_MAX, TreeHash};
use permit::permit::verify_past;
use permit::{KeyRing, PermitToken, SignedStatement, VerifyingKey, statement};
use registry::AuditRecord;
use serde_json::{Value, json};
use types::handover::{HandoverKey, Statement, StreamEvidence};
use types::permit::PermitClaims;
use types::{Digest, Side};

/// No bundle is longer.
pub const BUNDLE_BYTES_MAX: u64 = 16 << 20;
/// Managers that had a hand in one migration.
const KEYS_MAX: usize = 8;

/// Verifies a bundle. `trusted`: the managers' keys that the reader knows, raw Ed25519 in hexadecimal; where none is given,
/// the verdict names the keys that it rests on.
#[must_use]
pub fn verify(bytes: &[u8], trusted: &[String]) -> BundleVerified {
    let mut verdict = BundleVerified { trusted: !trusted.is_empty(), ..BundleVerified::default() };
    match checked(bytes, trusted, &mut verdict) {
        Ok(()) => verdict.verified = true,
        Err(why) => verdict.first_wrong = Some(why),
    }
    verdict
}

/// Whether a permit bears this key's signature.
pub(super) fn signed_by(token: &[u8], key: &[u8]) -> bool {
    let Ok(key) = VerifyingKey::from_bytes(key) else { return false };
    let mut ring = KeyRing::new();
    let taken = ring.insert(&key.id(), key);
    taken && PermitToken::from_bytes(token.to_vec()).is_ok_and(|token| verify_past(&token, &ring).is_ok())
}

type Check<T = ()> = Result<T, String>;

fn require(holds: bool, otherwise: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn checked(bytes: &[u8], trusted: &[String], verdict: &mut BundleVerified) -> Check {
    let bundle = parsed(bytes)?;
    verdict.migration = Some(bundle.migration);
    let ring = keys(&bundle, trusted)?;
    let signed_checkpoint = unhex(&bundle.checkpoint, "the checkpoint")?;
    let mut signer = None;
    let checkpoint = checkpoint::verify(&signed_checkpoint, |id| {
        signer = ring.find(id).copied();
        signer
    });
    let checkpoint = checkpoint.map_err(|e| format!("the checkpoint: {e}"))?;
    let mut used: Vec<String> = signer.map(|key| key.to_hex()).into_iter().collect();
    entries(&bundle, &checkpoint)?;
    require(bundle.certificate.is_none(), || "the certificate: none is known in this version".to_owned())?;
    match &bundle.permit {
        Some(token) => {
            let key = permitted(&bundle, token, &ring)?;
            if !used.contains(&key) {
                used.push(key);
            }
        }
        None => {
            let unpermitted = bundle.statements.is_empty() && find(&bundle, "permit.issue").is_none();
            require(unpermitted && bundle.attestation == BundleAttestation::default(), || {
                "the permit: it is missing".to_owned()
            })?;
        }
    }
    require(bundle.keys == used, || "the keys: not exactly those that signed, in their order".to_owned())?;
    verdict.keys = used;
    verdict.entries = bundle.entries.len() as u64;
    verdict.statements = bundle.statements.len() as u64;
    (verdict.log, verdict.log_entries) = (Some(checkpoint.log), checkpoint.size);
    Ok(())
}

/// The document in its one form: another spelling of the same is not it.
fn parsed(bytes: &[u8]) -> Check<Bundle> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    require(bytes.len() as u64 <= BUNDLE_BYTES_MAX, || "the bundle is longer than any".to_owned())?;
    let value: Value = serde_json::from_slice(bytes).map_err(|e| format!("the bundle is no JSON: {e}"))?;
    let canonical = serde_json_canonicalizer::to_vec(&value).map_err(|e| format!("the bundle: {e}"))?;
    require(canonical == bytes, || "the bundle is not in its canonical form".to_owned())?;
    let bundle: Bundle = serde_json::from_value(value).map_err(|e| format!("the bundle: {e}"))?;
    require(bundle.outrider_bundle == FORMAT, || {
        format!("the bundle is of format {}, {FORMAT} is known", bundle.outrider_bundle)
    })?;
    let fits = bundle.entries.len() <= ENTRIES_MAX as usize && bundle.statements.len() <= STATEMENTS_MAX;
    require(fits && bundle.keys.len() <= KEYS_MAX, || "the bundle holds more than any".to_owned())?;
    Ok(bundle)
}

/// Lower case only: each value has one text.
fn unhex(text: &str, what: &str) -> Check<Vec<u8>> {
    let bytes = hex::decode(text).map_err(|_| format!("{what} is no hexadecimal text"))?;
    require(hex::encode(&bytes) == text, || format!("{what} is not in lower case"))?;
    Ok(bytes)
}

fn keys(bundle: &Bundle, trusted: &[String]) -> Check<KeyRing> {
    let mut ring = KeyRing::new();
    for text in &bundle.keys {
        let key = VerifyingKey::from_hex(text).map_err(|e| format!("the manager's key {text}: {e}"))?;
        require(trusted.is_empty() || trusted.iter().any(|t| t.eq_ignore_ascii_case(text)), || {
            format!("the manager's key {text} is not one that is trusted")
        })?;
        require(key.to_hex() == *text, || format!("the manager's key {text} is not in lower case"))?;
        require(ring.insert(&key.id(), key), || "the managers' keys: too many".to_owned())?;
    }
    Ok(ring)
}

fn entries(bundle: &Bundle, checkpoint: &Checkpoint) -> Check {
    require(!bundle.entries.is_empty(), || "the log's entries: none is shown".to_owned())?;
    let mut before = 0;
    for entry in &bundle.entries {
        let number = entry.sequence;
        let wrong = |why: &str| format!("entry {number} of the log: {why}");
        require(number > before, || wrong("it is not behind the one before it"))?;
        before = number;
        require(names(entry, bundle), || wrong("it is about another migration"))?;
        require(entry.proof.len() <= LEVELS_MAX, || wrong("its proof is longer than any"))?;
        let hash = |text: &String| {
            let bytes = unhex(text, "a hash of its proof")?;
            TreeHash::try_from(&bytes[..]).map_err(|_| "a hash of its proof has not 32 bytes".to_owned())
        };
        let proof = entry.proof.iter().map(hash).collect::<Check<Vec<_>>>().map_err(|e| wrong(&e))?;
        let leaf = merkle::leaf(&record(entry).canonical().map_err(|e| wrong(&e.to_string()))?);
        let included = merkle::includes(leaf, number - 1, checkpoint.size, &proof, checkpoint.root);
        require(included, || wrong("it is not in the log of the checkpoint"))?;
    }
    order(bundle)
}

fn names(entry: &BundleEntry, bundle: &Bundle) -> bool {
    let id = bundle.migration.to_string();
    entry.detail.get("migration").and_then(Value::as_str) == Some(&id)
}

fn record(entry: &BundleEntry) -> AuditRecord {
    AuditRecord {
        sequence: entry.sequence,
        at_us: entry.at_us,
        actor: entry.actor.clone(),
        action: entry.action.clone(),
        subject: entry.subject.clone(),
        detail: entry.detail.clone(),
        // Not covered by the tree, and not needed for it.
        hash: Digest([0; 32]),
    }
}

/// What must not come before what.
const ORDER: [&str; 7] = [
    "migration.request",
    "migration.sign-request",
    "permit.issue",
    "permit.consume",
    "handover.commit",
    "handover.running",
    "handover.completed",
];

fn find<'a>(bundle: &'a Bundle, action: &str) -> Option<&'a BundleEntry> {
    bundle.entries.iter().find(|e| e.action == action)
}

fn order(bundle: &Bundle) -> Check {
    let mut before: Option<&BundleEntry> = None;
    for entry in ORDER.iter().filter_map(|action| find(bundle, action)) {
        if let Some(before) = before.filter(|b| b.sequence > entry.sequence) {
            return Err(format!(
                "entry {} of the log: {} comes before {}",
                entry.sequence, entry.action, before.action
            ));
        }
        before = Some(entry);
    }
    Ok(())
}

/// The permit and everything that rests on it. The key that signed it.
fn permitted(bundle: &Bundle, token: &str, ring: &KeyRing) -> Check<String> {
    let token =
        PermitToken::from_bytes(unhex(token, "the permit")?).map_err(|e| format!("the permit: {e}"))?;
    let permit = verify_past(&token, ring).map_err(|e| format!("the permit: {e}"))?;
    let claims = permit.claims();
    require(claims.key.migration == bundle.migration, || {
        format!("the permit is of migration {}", claims.key.migration)
    })?;
    let issued =
        find(bundle, "permit.issue").ok_or("the log's entries: none says that the permit was issued")?;
    let same = |name: &str, value: Value| {
        require(issued.detail.get(name) == Some(&value), || {
            format!("entry {} of the log: its {name} is not that of the permit", issued.sequence)
        })
    };
    same("nonce", json!(claims.nonce))?;
    same("epochs", json!([claims.key.source_epoch, claims.key.target_epoch]))?;
    same("spec_digest", json!(claims.spec_digest))?;
    same("source", json!(claims.source.host))?;
    same("target", json!(claims.target.host))?;
    same("features", json!(claims.features))?;
    same("attestation", json!({ "source": claims.source.quote, "target": claims.target.quote }))?;
    quoted(bundle, claims, Side::Source, bundle.attestation.source.as_ref())?;
    quoted(bundle, claims, Side::Target, bundle.attestation.target.as_ref())?;
    let mut said = Said::default();
    let mut seen = std::collections::BTreeSet::new();
    for (n, text) in bundle.statements.iter().enumerate() {
        let wrong = |why: String| format!("statement {}: {why}", n + 1);
        require(seen.insert(text), || wrong("it is shown twice".to_owned()))?;
        said.hear(bundle, claims, permit.digest(), text).map_err(wrong)?;
    }
    said.complete(bundle)?;
    let key = ring.find(permit.key_id()).map(VerifyingKey::to_hex);
    key.ok_or_else(|| "the permit: its key is not in the bundle".to_owned())
}

/// The quote that the permit names for a side, and no other: sound by itself, about this migration, host and VM agent.
fn quoted(bundle: &Bundle, claims: &PermitClaims, side: Side, quote: Option<&BundleQuote>) -> Check {
    let wrong = |why: &str| format!("the quote of the {side}: {why}");
    let part = claims.part(side);
    let (named, quote) = match (part.quote, quote) {
        (None, None) => return Ok(()),
        (None, Some(_)) => return Err(wrong("the permit names none")),
        (Some(_), None) => return Err(wrong("it is missing")),
        (Some(named), Some(quote)) => (named, quote),
    };
    let evidence = Evidence::from_bytes(&unhex(&quote.evidence, "it").map_err(|e| wrong(&e))?);
    let evidence = evidence.map_err(|e| wrong(&e.to_string()))?;
    require(evidence.digest() == named, || wrong("it is not the one that the permit names"))?;
    let binding: Binding =
        serde_json::from_value(quote.binding.clone()).map_err(|e| wrong(&format!("its binding: {e}")))?;
    require(json!(binding) == quote.binding, || wrong("its binding is not in its one form"))?;
    let agent_spki = Digest::of(&part.agent_spki);
    let purpose = Purpose::Migration { migration: bundle.migration, side, agent_spki };
    require(binding.purpose == purpose, || wrong("it is about another migration, side or VM agent"))?;
    let is_host = binding.host.as_str().rsplit('/').next() == Some(part.host.as_str());
    require(is_host, || wrong("it is of another host"))?;
    attest::verify::is_sound(&binding, &evidence)
        .map_err(|reasons| wrong(&reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))
}

/// What the statements say together.
#[derive(Default)]
struct Said {
    kinds: Vec<&'static str>,
    evidence: Option<StreamEvidence>,
    /// The sides speak of different streams: no fault of the bundle, unless it was committed all the same.
    differing: bool,
}

impl Said {
    fn hear(&mut self, bundle: &Bundle, claims: &PermitClaims, permit: Digest, text: &str) -> Check {
        let signed = SignedStatement::from_bytes(unhex(text, "it")?).map_err(|e| e.to_string())?;
        let (side, statement) = signer(&signed, claims)?;
        let kind = crate::migration::handover::kind_of(&statement);
        let by = |expected: Side, key: &HandoverKey, digest: Option<Digest>| {
            require(side == expected, || format!("{kind} is not the {side}'s to say"))?;
            require(*key == claims.key, || format!("{kind} is about another attempt"))?;
            require(digest.is_none_or(|digest| digest == permit), || {
                format!("{kind} is about another permit")
            })
        };
        match &statement {
            Statement::Request(request) => {
                require(side == Side::Source, || "the request is not the target's to make".to_owned())?;
                let same = (request.vm, &request.source, &request.target)
                    == (claims.key.vm, &claims.source.host, &claims.target.host);
                require(same, || "the request asks for another move than was permitted".to_owned())?;
                let entry = find(bundle, "migration.sign-request");
                let nonce = entry.and_then(|e| e.detail.get("nonce"));
                require(nonce == Some(&json!(request.nonce)), || {
                    "no entry of the log says that this request was taken".to_owned()
                })?;
            }
            Statement::Frozen(vote) => {
                by(Side::Source, &vote.key, Some(vote.permit))?;
                self.note(vote.evidence);
            }
            Statement::Prepared(vote) => {
                by(Side::Target, &vote.key, Some(vote.permit))?;
                self.note(vote.evidence);
            }
            Statement::Running(receipt) => {
                by(Side::Target, &receipt.key, Some(receipt.permit))?;
                self.note(receipt.evidence);
            }
            Statement::Released(receipt) => {
                by(Side::Source, &receipt.key, None)?;
                self.note(receipt.evidence);
            }
            Statement::NoVote(no) => by(Side::Source, &no.key, None)?,
            Statement::Thawed(receipt) => by(Side::Source, &receipt.key, None)?,
            Statement::AskRenounce(ask) => by(Side::Source, &ask.key, Some(ask.permit))?,
            Statement::Renounced(no) => by(Side::Target, &no.key, Some(no.permit))?,
        }
        if matches!(kind, "frozen" | "prepared" | "running" | "released") {
            let event = json!({ "from": side, "statement": statement });
            let logged = bundle.entries.iter().any(|e| e.detail.get("event") == Some(&event));
            require(logged, || format!("no entry of the log says that this {kind} was taken"))?;
        }
        self.kinds.push(kind);
        Ok(())
    }

    fn note(&mut self, evidence: StreamEvidence) {
        self.differing |= *self.evidence.get_or_insert(evidence) != evidence;
    }

    fn has(&self, kind: &str) -> bool {
        self.kinds.contains(&kind)
    }

    /// What the log says happened must have been said by those who had to.
    fn complete(&self, bundle: &Bundle) -> Check {
        let needs = |action: &str, kinds: &[&str]| {
            let Some(entry) = find(bundle, action) else { return Ok(()) };
            let missing = kinds.iter().find(|kind| !self.has(kind));
            missing.map_or(Ok(()), |kind| {
                Err(format!(
                    "entry {} of the log: {action} rests on a statement that is missing: {kind}",
                    entry.sequence
                ))
            })
        };
        needs("migration.sign-request", &["request"])?;
        needs("handover.commit", &["frozen", "prepared"])?;
        needs("handover.running", &["running"])?;
        needs("handover.completed", &["running", "released"])?;
        let committed = find(bundle, "handover.commit").is_some();
        require(!(committed && self.differing), || {
            "the statements: both sides speak of different streams, and it was committed".to_owned()
        })
    }
}

fn signer(signed: &SignedStatement, claims: &PermitClaims) -> Check<(Side, Statement)> {
    for side in [Side::Source, Side::Target] {
        let key = VerifyingKey::from_bytes(&claims.part(side).daemon_key);
        if let Some(statement) = key.ok().and_then(|key| statement::verify(signed, &key).ok()) {
            return Ok((side, statement));
        }
    }
    Err("neither of the daemons that the permit names signed it".to_owned())
}
