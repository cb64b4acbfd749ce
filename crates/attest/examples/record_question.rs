//! Asks a fresh swtpm one question and prints all that its appraisal needs, as JSON: what the fuzzers begin from
//! (`fuzz/targets/recorded/attestation.json`).

use attest::enrol::{Application, Candidate, EkRule};
use attest::event_log::EventLog;
use attest::testkit::{FirmwareLog, Forge, Swtpm, digest};
use attest::{Bank, Binding, Bounded, PcrIndex, PcrSelection, Purpose, ReferenceValues};
use std::error::Error;
use types::{Digest, MigrationId, Nonce, Side};

fn main() -> Result<(), Box<dyn Error>> {
    let swtpm = Swtpm::start()?;
    let mut tpm = swtpm.tpm()?;
    let blobs = tpm.create_ak()?;
    let ak = tpm.load_ak(&blobs)?;
    let pcr = PcrIndex::try_from(4)?;
    let log = FirmwareLog::default().started_from(0).measure(pcr, 0x8000_0003, b"a kernel").to_bytes();
    tpm.extend(pcr, &digest(Bank::Sha256, b"a kernel"))?;
    let ek = tpm.ek()?;
    let rule = EkRule::Name(ek.name());
    let application =
        Application { ek, ek_certificate: None, intermediates: Vec::new(), ak: ak.public().clone() };
    let (challenge, pending) = Candidate::check(application, &rule, 0)?.challenge()?;
    let enrolled = pending.confirm(&tpm.activate_credential(&ak, &challenge)?)?;
    let binding = Binding {
        nonce: Nonce::from_bytes([1; 16]),
        purpose: Purpose::Migration {
            migration: MigrationId::from_bytes([2; 16]),
            side: Side::Target,
            agent_spki: Digest::of(b"agent"),
        },
        host: "spiffe://lab/host/host-b".to_owned().try_into()?,
        host_spki: Digest::of(b"host"),
    };
    let selection = PcrSelection::of(Bank::Sha256, [PcrIndex::try_from(0)?, pcr]);
    let sent = Some(Bounded::new(log.clone())?);
    let evidence = tpm.evidence(&ak, &selection, &binding.qualifying_data(), sent)?;
    let reference = ReferenceValues::recorded(&evidence.pcrs, Some(&EventLog::parse(&log)?))?;
    let document = serde_json::json!({
        "enrolled": enrolled, "reference": reference, "binding": binding,
        "evidence": hex::encode(evidence.to_bytes()), "event_log": hex::encode(log),
    });
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}
