//! What the tests with a real TPM share.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

#[path = "../../../engine/tests/support/skip.rs"]
mod skip;

use attest::enrol::{Application, Candidate, EkRule};
use attest::testkit::{Forge, KeyShape, Swtpm};
use attest::tpm::{AkBlobs, LoadedAk, Tpm};
use attest::verify::{Expectation, LastSeen, appraise};
use attest::{
    Appraised, Bank, Binding, Enrolled, Evidence, PcrIndex, PcrSelection, Purpose, ReferenceValues, Refusal,
};
use types::{Digest, MigrationId, Nonce, Side};

/// The time of the tests, seconds since 1970.
pub const NOW: u64 = 1_800_000_000;
/// The registers of the tests.
pub const PCRS: [u8; 4] = [0, 4, 7, 14];

/// Whether there is a swtpm; says so, and has it counted, if not.
pub fn ready(tools: &[&str]) -> bool {
    let lacks = |tool: &&&str| std::process::Command::new(tool).arg("--version").output().is_err();
    let missing = attest::testkit::missing();
    let missing = missing.or_else(|| Some(format!("{} is not installed", tools.iter().find(lacks)?)));
    let Some(reason) = missing else { return true };
    skip::skip(&reason);
    false
}

pub fn pcr(index: u8) -> PcrIndex {
    PcrIndex::try_from(index).unwrap()
}

pub fn selection(indices: &[u8]) -> PcrSelection {
    PcrSelection::of(Bank::Sha256, indices.iter().copied().map(pcr))
}

/// The question of one migration to host `name`, with the nonce of that number.
pub fn binding(name: &str, nonce: u8) -> Binding {
    Binding {
        nonce: Nonce::from_bytes([nonce; 16]),
        purpose: Purpose::Migration {
            migration: MigrationId::from_bytes([1; 16]),
            side: Side::Target,
            agent_spki: Digest::of(b"key of the VM agent"),
        },
        host: format!("spiffe://lab/host/{name}").try_into().unwrap(),
        host_spki: Digest::of(format!("TLS key of {name}").as_bytes()),
    }
}

/// A platform that was enrolled, with its present state as reference.
pub struct Platform {
    pub swtpm: Swtpm,
    pub tpm: Tpm,
    pub ak: LoadedAk,
    pub enrolled: Enrolled,
    pub reference: ReferenceValues,
}

impl Platform {
    /// With a key that outlives the TPM's power, enrolled by it.
    pub fn with_kept_key() -> (Self, AkBlobs) {
        let mut platform = Self::new();
        let blobs = platform.tpm.create_ak().unwrap();
        platform.ak = platform.tpm.load_ak(&blobs).unwrap();
        platform.enrolled = enrol(&mut platform.tpm, &platform.ak);
        (platform, blobs)
    }

    pub fn new() -> Self {
        Self::with_key(KeyShape::Usual)
    }

    pub fn with_key(shape: KeyShape) -> Self {
        let swtpm = Swtpm::start().unwrap();
        let mut tpm = swtpm.tpm().unwrap();
        let ak = tpm.load_key(shape).unwrap();
        let enrolled = enrol(&mut tpm, &ak);
        let values = tpm.pcr_read(&selection(&PCRS)).unwrap();
        let reference = ReferenceValues::recorded(&values, None).unwrap();
        Self { swtpm, tpm, ak, enrolled, reference }
    }

    pub fn evidence(&mut self, binding: &Binding) -> Evidence {
        let asked = self.reference.selection();
        self.tpm.evidence(&self.ak, &asked, &binding.qualifying_data(), None).unwrap()
    }

    pub fn appraise(&self, binding: &Binding, evidence: &Evidence) -> Result<Appraised, Refusal> {
        self.appraise_after(binding, evidence, LastSeen::Never)
    }

    pub fn appraise_after(
        &self,
        binding: &Binding,
        evidence: &Evidence,
        last_seen: LastSeen,
    ) -> Result<Appraised, Refusal> {
        let expected = Expectation {
            enrolled: &self.enrolled,
            reference: &self.reference,
            binding,
            last_seen,
            now_unix_s: NOW,
        };
        appraise(&expected, evidence)
    }
}

/// The whole enrolment, as manager and host do it.
pub fn enrol(tpm: &mut Tpm, ak: &LoadedAk) -> Enrolled {
    let ek = tpm.ek().unwrap();
    let rule = EkRule::Name(ek.name());
    let application =
        Application { ek, ek_certificate: None, intermediates: Vec::new(), ak: ak.public().clone() };
    let (challenge, pending) = Candidate::check(application, &rule, NOW).unwrap().challenge().unwrap();
    let answer = tpm.activate_credential(ak, &challenge).unwrap();
    pending.confirm(&answer).unwrap()
}

/// The codes of a refusal.
pub fn codes(outcome: &Result<Appraised, Refusal>) -> Vec<&'static str> {
    match outcome {
        Ok(_) => Vec::new(),
        Err(refusal) => refusal.reasons().iter().map(|reason| reason.code.as_str()).collect(),
    }
}
