//! Hosts prove their platforms with real TPMs: a good one moves a VM, one that was tampered with neither gives nor gets
//! one, and the guest is none the worse for it.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use attest::testkit::Forge;
use attest::tpm::{Address, Options, Tpm};
use attest::{PcrDigest, PcrIndex};
use outrider_lab::fault::Trial;
use outrider_lab::fleet::Fleet;
use outrider_lab::net::Machine::{self, HostA, HostB};
use outrider_lab::require;

const FILL_MIB: u32 = 16;
const ENDED: [&str; 4] = ["completed", "failed", "refused", "terminated"];
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);

fn run(test: impl FnOnce() -> Result<()>) {
    if require::skip(require::missing()) {
        return;
    }
    test().unwrap_or_else(|error| panic!("{error:?}"));
}

/// Measures something that was not there before, as a changed kernel does. The TPM serves one connection at a time: the
/// daemon is away meanwhile.
fn tamper(fleet: &mut Fleet, host: Machine) -> Result<()> {
    fleet.kill(host)?;
    let address = Address::Unix(fleet.tpm_socket(host));
    let mut tpm = Tpm::open(&address, Options::default())?;
    tpm.flush_stale()?;
    tpm.extend(PcrIndex::try_from(4).unwrap(), &PcrDigest::new(&[7; 32]).unwrap())?;
    drop(tpm);
    fleet.start(host)
}

fn ended(trial: &Trial, to: Machine) -> Result<serde_json::Value> {
    let id = trial.fleet.migrate(&trial.guest.name, to)?;
    trial.fleet.wait_migration(&id, &ENDED, MIGRATION_LIMIT)
}

#[test]
fn both_hosts_prove_themselves_and_a_changed_one_moves_nothing() {
    run(|| {
        let mut trial = Trial::start("attested", FILL_MIB)?;
        for host in [HostA, HostB] {
            let seen = trial.fleet.json(&["host", "attest", host.name()])?;
            ensure!(seen["verdict"] == "trusted", "{seen}");
        }
        let shown = ended(&trial, HostB)?;
        ensure!(shown["state"] == "completed" && shown["attestation"] == "attested", "{shown}");

        // The VM is on host-b now, whose platform changes; the VM runs on.
        tamper(&mut trial.fleet, HostB)?;
        let answer = trial.fleet.outrider(&["host", "attest", "host-b"])?;
        println!("{}", answer.stdout);
        ensure!(answer.code() == Some(1), "a negative verdict is exit code 1: {answer:?}");
        ensure!(
            answer.stdout.contains("DIFFERS") && answer.stdout.contains("attest-pcr-mismatch"),
            "{answer:?}"
        );
        let shown = ended(&trial, HostA)?;
        ensure!(shown["state"] == "refused" && shown["problem"]["code"] == "attestation-failed", "{shown}");
        let detail = shown["problem"]["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains("PCR 4"), "the register is named: {detail}");
        trial.observer.wait_running_on(&[HostB], Duration::from_secs(5))?;

        // The admin looks, finds that it was a planned change, and allows the value.
        let seen = trial.fleet.outrider(&["host", "attest", "host-b", "--output", "json"])?.json()?;
        let pcrs = seen["pcrs"].as_array().context("no PCRs")?;
        let pcr = pcrs.iter().find(|p| p["matches"] == false).context("every PCR matches")?;
        let found = pcr["found"].as_str().unwrap_or_default();
        let note = ["--note", "kernel update"];
        let allow = ["reference", "allow", "host/host-b", "--pcr", "4", "--digest", found];
        trial.fleet.json(&[&allow[..], &note].concat())?;
        let shown = ended(&trial, HostA)?;
        ensure!(shown["state"] == "completed" && shown["attestation"] == "attested", "{shown}");
        trial.observer.wait_running_on(&[HostA], Duration::from_secs(5))?;
        println!("{}", trial.fleet.outrider(&["host", "show", "host-b"])?.stdout);
        println!("{}", trial.fleet.outrider(&["reference", "list"])?.stdout);
        Ok(())
    });
}
