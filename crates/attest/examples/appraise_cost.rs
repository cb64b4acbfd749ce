//! What one appraisal costs the manager, in CPU time: `cargo run -p outrider-attest --release --example
//! appraise_cost`.
//!
//! Evidence of a real swtpm: 24 registers, each key that is accepted, an event log of about 64 KiB. Cold is
//! the first appraisal in a process that did nothing before; each is made in a process of its own. Promised
//! are less than 5 ms.

use std::process::{Command, ExitCode};
use std::time::Duration;

use attest::testkit::{FirmwareLog, Forge, KeyShape, Swtpm};
use attest::verify::{EVIDENCE_LIMIT_BYTES, Expectation, LastSeen, appraise};
use attest::{Bank, Binding, Bounded, Enrolled, Evidence, PcrIndex, PcrSelection, Purpose, ReferenceValues};
use rustix::time::{ClockId, clock_gettime};
use types::{Digest, Nonce};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const PROMISED: Duration = Duration::from_millis(5);
const COLD_ROUNDS: usize = 21;
const WARM_ROUNDS: usize = 501;
const LOG_BYTES: usize = 64 * 1024;

/// What a manager has when a host answers.
#[derive(serde::Serialize, serde::Deserialize)]
struct Case {
    enrolled: Enrolled,
    reference: ReferenceValues,
    binding: Binding,
    /// The encoding that travels.
    evidence: Bounded<EVIDENCE_LIMIT_BYTES>,
}

fn main() -> Outcome<ExitCode> {
    if let Some(path) = std::env::args().nth(1) {
        return one_process(&path).map(|()| ExitCode::SUCCESS);
    }
    let mut kept = true;
    for shape in [KeyShape::Usual, KeyShape::RsaSsa, KeyShape::RsaPss] {
        kept &= measure(shape)?;
    }
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn measure(shape: KeyShape) -> Outcome<bool> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("case");
    let case = make_case(shape)?;
    std::fs::write(&path, serde_json::to_vec(&case)?)?;
    let mut cold = Vec::new();
    for _ in 0..COLD_ROUNDS {
        let output = Command::new(std::env::current_exe()?).arg(&path).output()?;
        let text = String::from_utf8(output.stdout)?;
        cold.push(Duration::from_nanos(text.trim().parse()?));
    }
    let warm = (0..WARM_ROUNDS).map(|_| cost(&case)).collect::<Outcome<Vec<_>>>()?;
    let bytes = case.evidence.as_slice().len();
    let (cold, slowest) = median_and_most(cold);
    let (warm, _) = median_and_most(warm);
    println!("{shape:?}: {bytes} bytes; cold {cold:?} (slowest {slowest:?}), warm {warm:?} of CPU");
    Ok(slowest < PROMISED)
}

fn make_case(shape: KeyShape) -> Outcome<Case> {
    let swtpm = Swtpm::start()?;
    let mut tpm = swtpm.tpm()?;
    let ak = tpm.load_key(shape)?;
    // As a manager keeps it; how it comes to that is not what is measured.
    let record = serde_json::json!({"ek_name": tpm.ek()?.name(), "ak": ak.public()});
    let all = PcrSelection::of(Bank::Sha256, PcrIndex::all());
    let binding = Binding {
        nonce: Nonce::from_bytes([7; 16]),
        purpose: Purpose::HostCheck,
        host: "spiffe://lab/host/host-a".to_owned().try_into()?,
        host_spki: Digest::of(b"key"),
    };
    let mut log = FirmwareLog::default();
    while log.to_bytes().len() < LOG_BYTES {
        log = log.measure(PcrIndex::try_from(4)?, 0x8000_0003, &[0x41; 400]);
    }
    let event_log = Some(Bounded::new(log.to_bytes())?);
    let evidence = tpm.evidence(&ak, &all, &binding.qualifying_data(), event_log)?;
    Ok(Case {
        enrolled: serde_json::from_value(record)?,
        reference: ReferenceValues::recorded(&evidence.pcrs, None)?,
        binding,
        evidence: Bounded::new(evidence.to_bytes())?,
    })
}

/// The first appraisal of this process: prints its nanoseconds.
fn one_process(path: &str) -> Outcome<()> {
    let case: Case = serde_json::from_slice(&std::fs::read(path)?)?;
    println!("{}", cost(&case)?.as_nanos());
    Ok(())
}

/// Reading the evidence, appraising it and taking the digest of the record.
fn cost(case: &Case) -> Outcome<Duration> {
    let expected = Expectation {
        enrolled: &case.enrolled,
        reference: &case.reference,
        binding: &case.binding,
        last_seen: LastSeen::Never,
        now_unix_s: 1_800_000_000,
    };
    let before = clock_gettime(ClockId::ThreadCPUTime);
    let evidence = Evidence::from_bytes(case.evidence.as_slice())?;
    let appraised = appraise(&expected, &evidence)?;
    std::hint::black_box(appraised.appraisal().digest());
    let after = clock_gettime(ClockId::ThreadCPUTime);
    Ok(Duration::try_from(after)?.saturating_sub(Duration::try_from(before)?))
}

fn median_and_most(mut all: Vec<Duration>) -> (Duration, Duration) {
    all.sort_unstable();
    let at = |index: usize| all.get(index).copied().unwrap_or_default();
    (at(all.len() / 2), at(all.len().saturating_sub(1)))
}
