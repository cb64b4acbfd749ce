//! The demo is true, and each of its claims can fail.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use outrider_lab::require;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Runs the demo; its exit code and its document.
fn demo(sabotage: &[&str]) -> (Option<i32>, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outrider-lab"));
    command.args(["demo", "--output", "json"]);
    for what in sabotage {
        command.args(["--sabotage", what]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    (output.status.code(), document)
}

fn failed(document: &Value) -> BTreeSet<String> {
    let list = document["claims"]["failed"].as_array().unwrap();
    list.iter().map(|key| key.as_str().unwrap().to_owned()).collect()
}

/// These acts of sabotage flip at least these claims.
fn flips(sabotage: &[&str], claims: &[&str]) {
    if require::skip(require::missing()) {
        return;
    }
    let (code, document) = demo(sabotage);
    let failed = failed(&document);
    for claim in claims {
        assert!(failed.contains(*claim), "{claim} still holds after {sabotage:?}; failed: {failed:?}");
    }
    assert_eq!(code, Some(4), "a false claim must show in the exit code");
}

#[test]
fn every_claim_holds() {
    if require::skip(require::missing()) {
        return;
    }
    let (code, document) = demo(&[]);
    assert_eq!(failed(&document), BTreeSet::new(), "{document:#}");
    assert_eq!(code, Some(0));
    let present =
        |path: &str| assert!(!document.pointer(path).unwrap_or(&Value::Null).is_null(), "no {path}");
    for path in [
        "/migration/id",
        "/migration/vm",
        "/migration/source",
        "/migration/target",
        "/migration/downtime_ms",
        "/migration/total_ms",
        "/migration/time_to_responsiveness_ms",
        "/migration/transferred_bytes",
        "/migration/stages/0/name",
        "/migration/stages/0/duration_ms",
        "/migration/channel/cipher_suite",
        "/migration/channel/key_exchange",
        "/migration/channel/channels",
        "/migration/permit/id",
        "/migration/permit/issued_at",
        "/migration/permit/not_after",
        "/migration/digests/source",
        "/migration/digests/target",
        "/client/requests",
        "/client/max_gap_ms",
        "/capture/bytes",
        "/audit/entries",
    ] {
        present(path);
    }
    let is = |path: &str, value: Value| assert_eq!(document.pointer(path), Some(&value), "{path}");
    is("/migration/state", "completed".into());
    is("/migration/mode", "precopy".into());
    is("/migration/attestation", "attested".into());
    is("/migration/channel/protocol", "TLSv1.3".into());
    is("/migration/digests/match", true.into());
    is("/client/connection_survived", true.into());
    is("/guest/running_on", "host-b".into());
    is("/guest/copies", 1.into());
    is("/guest/counter_monotonic", true.into());
    is("/capture/secret_found", false.into());
    is("/capture/qemu_magic_found", false.into());
    is("/capture/vm_identity_found", false.into());
    is("/audit/verified", true.into());
    is("/leftovers", Value::Array(Vec::new()));
}

#[test]
fn what_crosses_in_clear_is_found_and_what_is_left_is_told() {
    let acts = ["secret-in-clear", "stream-in-clear", "name-in-clear", "client", "audit", "leftovers"];
    let claims = [
        "capture.secret_found",
        "capture.qemu_magic_found",
        "capture.vm_identity_found",
        "client.connection_survived",
        "audit.verified",
        "leftovers",
    ];
    flips(&acts, &claims);
}

#[test]
fn a_second_copy_is_seen() {
    flips(&["second-copy"], &["guest.running_on", "guest.copies", "guest.counter_monotonic"]);
}

#[test]
fn a_guest_that_does_not_run_and_a_capture_that_is_not_there_are_seen() {
    flips(&["stopped-target", "no-capture"], &["guest.running_on", "guest.secret_intact", "capture.bytes"]);
}

#[test]
fn a_migration_that_fails_is_told() {
    let claims = ["migration.state", "migration.downtime_ms", "migration.stages", "migration.digests.match"];
    flips(&["killed-target"], &claims);
}

#[test]
fn a_host_without_a_tpm_is_told() {
    flips(&["no-tpm"], &["migration.attestation"]);
}

#[test]
fn a_migration_that_is_refused_has_neither_permit_nor_channel() {
    flips(&["lost-target"], &["migration.state", "migration.permit.id", "migration.channel.protocol"]);
}

#[test]
fn ctrl_c_in_the_middle_leaves_nothing() {
    if require::skip(require::missing()) {
        return;
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_outrider-lab"))
        .args(["demo", "--output", "json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let prefix = format!("or{}", child.id());
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let reached = lines.by_ref().map_while(Result::ok).any(|line| line.contains("memory-transfer"));
    assert!(reached, "the demo never came to its transfer");
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::INT).unwrap();
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{rest:?}");
    assert_eq!(outrider_lab::net::leftovers(&prefix), Vec::<String>::new());
}

/// What the demo says to somebody who lacks something, and that it says so at once.
fn lacking(privileges: &[&str], word: &str) {
    if require::skip(require::missing()) {
        return;
    }
    let output = Command::new("setpriv")
        .args(privileges)
        .arg(env!("CARGO_BIN_EXE_outrider-lab"))
        .args(["demo", "--output", "json"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("cannot run here") && said.contains(word), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn without_root_it_says_so() {
    lacking(&["--reuid=65534", "--regid=65534", "--clear-groups"], "root");
}

#[test]
fn without_namespaces_it_says_so() {
    lacking(&["--inh-caps=-all", "--bounding-set=-sys_admin"], "namespaces");
}
