//! The built command as a real control manager, and as its operator.

#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use support::outrider;

/// A running `outrider manager run` on free ports of the loopback.
struct Manager {
    child: Child,
    url: String,
    state: PathBuf,
}

impl Manager {
    fn start(state: &Path) -> Self {
        let mut child = run_command(state).spawn().unwrap();
        // It says where it listens once both ports are open.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        let url = loop {
            let line = lines.next().unwrap_or_else(|| panic!("it ended: {said:?}")).unwrap();
            if let Some(url) = line.strip_prefix("operators: ") {
                break url.to_owned();
            }
            said.push(line);
        };
        // Keeps the pipe from filling up.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, url, state: state.to_owned() }
    }

    fn ask(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = outrider();
        command.env("OUTRIDER_MANAGER", &self.url);
        command.env("OUTRIDER_TOKEN_FILE", self.state.join("admin.token"));
        command.env("OUTRIDER_CA", self.state.join("ca.pem"));
        let output = command.args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let (code, out, err) = self.ask(&[arguments, &["--output", "json"]].concat());
        assert_eq!(code, 0, "{arguments:?}: {out}{err}");
        serde_json::from_str(&out).unwrap()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn run_command(state: &Path) -> Command {
    let mut command = Command::new(outrider().get_program());
    command.args([
        "manager",
        "run",
        "--operator-listen",
        "127.0.0.1:0",
        "--hosts-listen",
        "127.0.0.1:0",
        "--state",
    ]);
    command.arg(state).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // An administrator's own file must not change what is tested.
    command.arg("--config").arg(empty_config(state));
    command
}

fn empty_config(state: &Path) -> PathBuf {
    let path = state.with_extension("toml");
    std::fs::write(&path, "").unwrap();
    path
}

const SPEC: &str =
    "uuid = '6f1e2d3c-0000-4000-8000-000000000001'\nname = 'web-1'\nvcpus = 1\nmemory_bytes = 268435456\n";

const ADD: [&str; 13] = [
    "host",
    "add",
    "host-a",
    "--control-address",
    "127.0.0.11",
    "--migration-address",
    "127.0.0.11",
    "--mac",
    "02:81:00:00:00:0b",
    "--memory",
    "8GiB",
    "--vcpus",
    "4",
];

#[test]
fn an_operator_enrols_defines_and_reads_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let manager = Manager::start(&state);
    let added = manager.json(&ADD);
    assert!(added["join_token"].as_str().unwrap().starts_with("ojt1."));
    let (code, _, err) = manager.ask(&ADD);
    assert_eq!(code, 2, "a host is enrolled once: {err}");
    assert_eq!(manager.json(&["host", "show", "host-a"])["state"], "enrolled");
    assert_eq!(manager.json(&["host", "list"])[0]["attestation"], "unattested");

    let spec = folder.path().join("web-1.toml");
    std::fs::write(&spec, SPEC).unwrap();
    assert_eq!(manager.json(&["vm", "define", spec.to_str().unwrap()])["state"], "defined");
    let (code, _, err) = manager.ask(&["vm", "start", "web-1", "--on", "host-a"]);
    assert_eq!(code, 3, "a host that never joined starts nothing: {err}");
    let (code, _, err) = manager.ask(&["migrate", "web-1", "--to", "host-a"]);
    assert_eq!(code, 3, "what does not run is not moved: {err}");
    assert!(err.contains("[vm-not-running]"), "{err}");
    assert_eq!(manager.ask(&["vm", "show", "web-2"]).0, 2, "an unknown name is a usage error");
    let (code, out, _) = manager.ask(&["migrate", "web-1", "--to", "host-a", "--dry-run"]);
    assert!(code == 3 && out.contains("REFUSED") && out.contains("[vm-not-running]"), "{code}: {out}");

    let verified = manager.json(&["audit", "verify"]);
    assert_eq!(verified["verified"], true);
    let entries = manager.json(&["audit", "list", "--limit", "1000"]);
    assert_eq!(verified["entries"], entries.as_array().unwrap().len());
    assert!(!entries.to_string().contains(added["join_token"].as_str().unwrap()), "tokens are never logged");
    let (code, out, _) = manager.ask(&["doctor", "--role", "operator"]);
    assert_eq!(code, 0, "{out}");
}

#[test]
fn an_exported_log_is_verified_without_a_manager_and_every_change_of_it_shows() {
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::start(&folder.path().join("state"));
    manager.json(&ADD);
    for name in ["ann", "bob"] {
        manager.json(&["token", "add", name, "--role", "operator", "--days", "7"]);
    }
    let file = folder.path().join("audit.jsonl");
    let (export, verify) = (["audit", "export", "--out", file.to_str().unwrap()], folder.path().join("x"));
    assert_eq!(manager.ask(&export).0, 0);
    let (code, _, err) = manager.ask(&export);
    assert!(code == 2 && err.contains("cannot write"), "nothing is overwritten: {err}");
    let whole = std::fs::read_to_string(&file).unwrap();
    // A log that could not be written whole is not there at all.
    let lost = folder.path().join("lost");
    std::fs::create_dir(&lost).unwrap();
    let (out, bad) = (lost.join("audit.jsonl"), lost.join("no-such-folder/audit.jsonl"));
    assert_eq!(manager.ask(&["audit", "export", "--out", bad.to_str().unwrap()]).0, 2);
    let nobody = ["--manager", "https://127.0.0.1:9", "--out", out.to_str().unwrap()];
    assert_eq!(manager.ask(&[&["audit", "export"][..], &nobody].concat()).0, 6);
    assert_eq!(std::fs::read_dir(&lost).unwrap().count(), 0);
    let (_, out, _) = manager.ask(&["audit", "export"]);
    assert_eq!(out, whole);
    let own = manager.json(&["audit", "verify"]);
    drop(manager);
    let check = |text: &str| {
        std::fs::write(&verify, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_outrider"));
        command.args(["audit", "verify", "--output", "json", "--file", verify.to_str().unwrap()]);
        let output = command.output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code().unwrap(), answer)
    };
    let (code, answer) = check(&whole);
    assert_eq!((code, &answer["entries"], &answer["head"]), (0, &own["entries"], &own["head"]), "{answer}");
    let lines: Vec<&str> = whole.lines().collect();
    let last = lines.len() - 1;
    let joined = |lines: &[&str]| lines.join("\n");
    let edited = lines[last].replace("bob", "eve");
    for (changed, first_bad) in [
        ([&lines[..last], &[edited.as_str()]].concat(), last + 1),
        ([&lines[..1], &lines[2..]].concat(), 2),
        ([&lines[..last - 1], &[lines[last], lines[last - 1]]].concat(), last),
        ([&lines[..2], &lines[1..]].concat(), 3),
        ([&["garbage"], &lines[..]].concat(), 1),
        (lines[1..].to_vec(), 1),
    ] {
        let (code, answer) = check(&joined(&changed));
        assert_eq!((code, answer["first_bad"].as_u64()), (1, Some(first_bad as u64)), "{answer}");
        assert!(!answer["detail"].as_str().unwrap().is_empty());
    }
}

#[test]
fn a_restart_keeps_everything_and_a_second_manager_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let manager = Manager::start(&state);
    manager.json(&ADD);
    let second = run_command(&state).output().unwrap();
    let err = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(4), "{err}");
    assert!(err.contains("error: "), "{err}");
    let token = std::fs::read(state.join("admin.token")).unwrap();
    drop(manager);
    let manager = Manager::start(&state);
    assert_eq!(manager.json(&["host", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(std::fs::read(state.join("admin.token")).unwrap(), token);
    assert_eq!(manager.json(&["audit", "verify"])["verified"], true);
}

#[test]
fn an_occupied_port_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = Command::new(outrider().get_program())
        .args(["manager", "run", "--operator-listen", &address, "--hosts-listen", "127.0.0.1:0", "--state"])
        .arg(folder.path().join("state"))
        .arg("--config")
        .arg(empty_config(&folder.path().join("state")))
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{err}");
    assert!(err.contains(&address) && err.contains("[address-in-use]"), "{err}");
}

#[test]
fn a_manager_ends_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let mut manager = Manager::start(&folder.path().join("state"));
    let pid = rustix::process::Pid::from_child(&manager.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(manager.child.wait().unwrap().code(), Some(0));
}

/// A backup of a manager that runs, put back when it does not; the manager then says what is to be done.
#[test]
fn a_registry_is_backed_up_restored_and_reconciled_by_command() {
    let folder = tempfile::tempdir().unwrap();
    let (state, file) = (folder.path().join("state"), folder.path().join("backup"));
    let config = empty_config(&state);
    let by_hand = |arguments: &[&str]| {
        let mut command = outrider();
        command.args(arguments).arg("--state").arg(&state).arg("--config").arg(&config);
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let file = file.to_str().unwrap();
    let manager = Manager::start(&state);
    manager.json(&ADD);
    let (code, out, err) = by_hand(&["backup", "--to", file]);
    assert!(code == 0 && out.contains("holds no keys"), "{out}{err}");
    let (code, _, err) = by_hand(&["backup", "--to", file]);
    assert!(code != 0 && err.contains("[already-exists]"), "{err}");
    let (code, _, err) = by_hand(&["restore", "--from", file]);
    assert!(code != 0 && err.contains("[wrong-state]"), "{err}");
    let (code, _, err) = manager.ask(&["audit", "reconcile"]);
    assert!(code != 0 && err.contains("nothing to reconcile"), "{err}");
    drop(manager);
    let (code, out, err) = by_hand(&["restore", "--from", file]);
    assert!(code == 0 && out.contains("audit reconcile"), "{out}{err}");
    let manager = Manager::start(&state);
    let (code, out, _) = manager.ask(&["audit", "verify"]);
    assert!(code == 1 && out.contains("restored from a backup"), "{out}");
    let (code, out, err) = manager.ask(&["audit", "reconcile"]);
    assert!(code == 0 && out.contains("--accept"), "{out}{err}");
    let (code, out, err) = manager.ask(&["audit", "reconcile", "--accept"]);
    assert!(code == 0 && out.contains("decides again"), "{out}{err}");
    assert_eq!(manager.json(&["audit", "verify"])["verified"], true);
    assert_eq!(manager.json(&["host", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn what_is_no_bundle_is_exit_code_1_without_a_manager() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bundle");
    for text in ["", "{}", "{\"outrider_bundle\":1}", "no JSON"] {
        std::fs::write(&file, text).unwrap();
        let output = outrider().args(["audit", "verify", "--bundle"]).arg(&file).output().unwrap();
        let out = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{out}");
        assert!(out.contains("DOES NOT HOLD"), "{out}");
    }
}
