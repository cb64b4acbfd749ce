//! The built command against a scripted manager: what it asks, what it prints, how it ends.

#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::{FakeManager, Reply, TOKEN, outrider};

const ID: &str = "m-6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c";

fn migration(state: &str) -> Value {
    json!({
        "id": ID, "vm": "web-1", "source": "host-a", "target": "host-b", "state": state, "suspended": false,
        "mode": "precopy", "multifd_channels": 0, "compression": "", "requested_by": "admin", "requested_at": "2026-11-23T14:02:11Z", "ended_at": null,
        "vm_runs_on": "host-a", "awaiting": "the end of the memory transfer",
        "next": {"act": "give up", "at": "2026-11-23T14:07:11Z"}, "attestation": "unattested", "problem": null,
        "downtime_ms": null, "total_ms": null, "request_to_running_ms": null, "time_to_responsiveness_ms": null,
        "responsiveness_basis": null, "transferred_bytes": 0, "permit_decision_ms": null, "stages": [],
        "downtime_parts": [], "channel": null, "permit": null, "digests": null, "findings": [],
    })
}

struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ended {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {:?}", self.stdout))
    }
}

fn run(mut command: assert_cmd::Command, arguments: &[&str]) -> Ended {
    let output = command.args(arguments).output().unwrap();
    Ended {
        code: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn a_problem_of_the_manager_becomes_the_exit_code_of_its_code() {
    for (status, code, exit) in [
        (401, "unauthenticated", 3),
        (403, "policy-denied", 3),
        (404, "unknown-host", 2),
        (409, "wrong-state", 4),
        (409, "stream-rejected", 5),
        (503, "registry-unavailable", 4),
    ] {
        let manager = FakeManager::start(move |_, _| Reply::problem(status, code, "because", "do this"));
        let text = run(manager.outrider(), &["host", "list"]);
        assert_eq!((text.code, text.stdout.as_str()), (exit, ""), "{code}");
        assert_eq!(text.stderr, format!("error: because [{code}]\nwhat to do: do this\n"));
        let json = run(manager.outrider(), &["host", "list", "--output", "json"]);
        assert_eq!((json.code, json.stderr.as_str()), (exit, ""), "{code}");
        assert_eq!(json.json(), json!({"error": {"code": code, "detail": "because", "hint": "do this"}}));
    }
}

#[test]
fn an_unknown_manager_is_exit_code_6_and_says_what_to_do() {
    // A listener that was just closed: nobody is there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let manager = FakeManager::start(|_, _| Reply::Never);
    let url = format!("https://{free}");
    let ended = run(manager.outrider(), &["host", "list", "--manager", &url]);
    assert_eq!(ended.code, 6, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("[manager-unreachable]") && ended.stderr.contains("outrider doctor"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("refused"), "the cause is named: {}", ended.stderr);
}

#[test]
fn a_manager_of_another_ca_is_refused_before_the_token_is_sent() {
    let right = FakeManager::start(|_, _| Reply::ok("[]"));
    let wrong = FakeManager::start(|_, _| Reply::ok("[]"));
    let ended = run(right.outrider(), &["host", "list", "--manager", &wrong.url]);
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(ended.stderr.contains("does not verify") && ended.stderr.contains("--ca"), "{}", ended.stderr);
    assert!(wrong.asked().is_empty(), "nothing is sent to a stranger");
}

#[test]
fn a_manager_that_never_answers_is_given_up() {
    let manager = FakeManager::start(|_, _| Reply::Never);
    let ended = run(manager.outrider(), &["vm", "list", "--output", "json"]);
    assert_eq!(ended.code, 6);
    assert!(ended.json()["error"]["detail"].as_str().unwrap().contains("did not answer within 10 s"));
}

#[test]
fn a_migrate_without_an_answer_says_that_it_may_have_been_accepted() {
    let manager = FakeManager::start(|_, _| Reply::Never);
    let ended = run(manager.outrider(), &["migrate", "web-1", "--to", "host-b"]);
    assert_eq!(ended.code, 6);
    assert!(ended.stderr.contains("outrider migration list --vm web-1"), "{}", ended.stderr);
    assert_eq!(manager.asked().len(), 1, "a request whose fate is unknown is never repeated");
}

#[test]
fn what_is_no_document_is_refused() {
    let manager = FakeManager::start(|_, _| Reply::Text(200, "<html>".to_owned()));
    let ended = run(manager.outrider(), &["vm", "list"]);
    assert_eq!(ended.code, 4);
    assert!(ended.stderr.contains("GET /v1/vms is not understood"), "{}", ended.stderr);
    let manager = FakeManager::start(|_, _| Reply::Text(502, "\u{1b}[2Jgateway".to_owned()));
    let ended = run(manager.outrider(), &["vm", "list"]);
    assert_eq!(ended.code, 4);
    assert!(ended.stderr.contains("502") && !ended.stderr.contains('\u{1b}'), "{}", ended.stderr);
}

#[test]
fn missing_settings_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("none").display().to_string();
    let no_ca = run(outrider(), &["host", "list", "--ca", &absent]);
    assert_eq!(no_ca.code, 2);
    assert!(
        no_ca.stderr.contains("CA certificate") && no_ca.stderr.contains("OUTRIDER_CA"),
        "{}",
        no_ca.stderr
    );
    let manager = FakeManager::start(|_, _| Reply::ok("[]"));
    let no_token = run(manager.outrider(), &["host", "list", "--token-file", &absent]);
    assert_eq!(no_token.code, 3);
    assert!(no_token.stderr.contains("OUTRIDER_TOKEN_FILE"), "{}", no_token.stderr);
    let http = run(manager.outrider(), &["host", "list", "--manager", "http://127.0.0.1"]);
    assert_eq!(http.code, 2);
    assert!(http.stderr.contains("only https"), "{}", http.stderr);
    let typo = run(outrider(), &["migrate", "web-1", "--too", "host-b"]);
    assert_eq!(typo.code, 2);
    assert!(typo.stderr.contains("--to"), "{}", typo.stderr);
}

#[test]
fn vm_inspect_shows_and_saves_the_enrolment() {
    let enrolment = json!({"inventory": {"machine": "pc-q35-10.0", "page_size_bytes": 4096,
        "hypervisor": "qemu/10.0.2", "ram_blocks": [{"name": "pc.ram", "length_bytes": 1 << 26}],
        "devices": [{"name": "timer", "instance": 0, "version": 2}]}, "catalogue": null});
    let answer =
        json!({"vm": "web-1", "host": null, "enrolment": enrolment, "catalogue_missing": "it is off"});
    let manager = FakeManager::start(move |_, _| Reply::ok(&answer));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.json");
    let arguments = ["vm", "inspect", "web-1", "--save", file.to_str().unwrap()];
    let ended = run(manager.outrider(), &arguments);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stdout.contains("timer") && ended.stdout.contains("it is off"), "{}", ended.stdout);
    assert_eq!(manager.asked()[0].line, "GET /v1/vms/web-1/inspection");
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(saved, enrolment);
    let shown = run(manager.outrider(), &["vm", "inspect", "web-1", "--output", "json"]);
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(shown["enrolment"], enrolment);
    let nowhere = run(manager.outrider(), &["vm", "inspect", "web-1", "--save", "/no/such/folder/vm.json"]);
    assert_eq!(nowhere.code, 2, "{}", nowhere.stderr);
    assert!(nowhere.stderr.contains("cannot write /no/such/folder/vm.json"), "{}", nowhere.stderr);
}

#[test]
fn the_token_goes_with_every_request() {
    let manager = FakeManager::start(|_, _| Reply::ok("[]"));
    assert_eq!(
        run(manager.outrider(), &["vm", "list"]).stdout,
        "no VMs yet; record one with: outrider vm define FILE\n"
    );
    assert_eq!(run(manager.outrider(), &["vm", "list", "--output", "json"]).stdout, "[]\n");
    for asked in manager.asked() {
        assert_eq!(asked.line, "GET /v1/vms");
        assert_eq!(asked.authorization, format!("Bearer {TOKEN}"));
    }
}

#[test]
fn host_add_sends_the_record_and_shows_the_token_once() {
    let manager = FakeManager::start(|asked, _| {
        let spec: Value = serde_json::from_str(&asked.body).unwrap();
        let host = json!({"name": spec["name"], "spiffe_id": "spiffe://test/host/host-a", "state": "enrolled",
            "attestation": "unattested", "control_address": spec["control_address"],
            "migration_address": spec["migration_address"], "macs": spec["macs"], "capacity": spec["capacity"],
            "zone": spec["zone"], "vms": [], "load": null, "interfaces": [], "version": null, "last_seen": null});
        Reply::Json(201, json!({"host": host, "join_token": "ojt1.abc"}).to_string())
    });
    let arguments = [
        "host",
        "add",
        "host-a",
        "--control-address",
        "10.81.0.11",
        "--migration-address",
        "10.82.0.11",
        "--mac",
        "02:81:00:00:00:0B,02:82:00:00:00:0b",
        "--memory",
        "8GiB",
        "--vcpus",
        "4",
    ];
    let ended = run(manager.outrider(), &arguments);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stdout.contains("\n  outrider host join ojt1.abc\n"), "{}", ended.stdout);
    let sent: Value = serde_json::from_str(&manager.asked()[0].body).unwrap();
    let expected = json!({"name": "host-a", "control_address": "10.81.0.11", "migration_address": "10.82.0.11",
        "macs": ["02:81:00:00:00:0b", "02:82:00:00:00:0b"],
        "capacity": {"memory_bytes": 8_589_934_592_u64, "vcpus": 4, "vms": 100}, "zone": ""});
    assert_eq!(sent, expected);
    let bad = run(manager.outrider(), &["host", "add", "Host_A"]);
    assert_eq!(bad.code, 2);
}

/// The script of one migration: accepted, a stream of events, two views on the way, then `last`.
fn one_migration(last: Value) -> FakeManager {
    let looks = std::sync::atomic::AtomicUsize::new(0);
    FakeManager::start(move |asked, _| match asked.line.as_str() {
        "POST /v1/migrations" => Reply::Json(202, json!({"id": ID}).to_string()),
        line if line.ends_with("/events") => {
            let event = |kind: &str, detail: Value| {
                let data =
                    json!({"migration": ID, "at": "2026-11-23T14:02:12Z", "kind": kind, "detail": detail});
                format!("event: migration\ndata: {data}\n\n")
            };
            let counters =
                json!({"ram_total_bytes": 268_435_456, "ram_remaining_bytes": 67_108_864, "mbps": 900.0});
            Reply::Events(vec![event("progress", counters), event("stopped", json!({}))])
        }
        "GET /v1/migrations" => Reply::ok(json!([migration("memory-transfer")])),
        _ => match looks.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Reply::ok(migration("setup")),
            1 => Reply::ok(migration("memory-transfer")),
            _ => Reply::ok(&last),
        },
    })
}

#[test]
fn migrate_watches_to_the_end_and_reports() {
    let mut done = migration("completed");
    done["vm_runs_on"] = json!("host-b");
    done["downtime_ms"] = json!(41.25);
    let manager = one_migration(done.clone());
    let ended = run(manager.outrider(), &["migrate", "web-1", "--to", "host-b", "--from", "host-a"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stdout.starts_with("web-1 moved from host-a to host-b: completed\n"), "{}", ended.stdout);
    assert!(ended.stdout.contains("unattested") && ended.stdout.contains("41.2 ms"), "{}", ended.stdout);
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert!(lines[0] == "setup" && lines[1].starts_with("memory-transfer"), "{lines:?}");
    assert!(ended.stderr.contains("192 MiB of 256 MiB"), "{lines:?}");
    assert_eq!(*lines.last().unwrap(), "completed", "{lines:?}");
    let sent: Value = serde_json::from_str(&manager.asked()[0].body).unwrap();
    assert_eq!(
        (&sent["vm"], &sent["target"], &sent["source"]),
        (&json!("web-1"), &json!("host-b"), &json!("host-a"))
    );
    assert!(sent.get("channels").is_none() && sent.get("compression").is_none(), "the manager's default");
    assert_eq!(sent["nonce"].as_str().unwrap().len(), 32);
    assert!(sent["timestamp_unix_ms"].as_u64().unwrap() > 1_700_000_000_000);

    let manager = one_migration(done.clone());
    let ended = run(manager.outrider(), &["migrate", "web-1", "--to", "host-b", "--output", "json"]);
    assert_eq!((ended.code, ended.json()), (0, done));
}

#[test]
fn channels_are_asked_for_and_shown() {
    let mut done = migration("completed");
    (done["multifd_channels"], done["compression"]) = (json!(4), json!("zstd"));
    let manager = one_migration(done);
    let asked = ["migrate", "web-1", "--to", "host-b", "--channels", "4", "--compression", "zstd"];
    let ended = run(manager.outrider(), &asked);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stdout.contains("4 channels beside the main one, zstd"), "{}", ended.stdout);
    let sent: Value = serde_json::from_str(&manager.asked()[0].body).unwrap();
    assert_eq!((&sent["channels"], &sent["compression"]), (&json!(4), &json!("zstd")));
}

#[test]
fn the_exit_code_of_migrate_is_the_outcome() {
    for (state, code, exit) in [
        ("refused", "insufficient-capacity", 3),
        ("failed", "hypervisor-failed", 4),
        ("failed", "stream-rejected", 5),
        ("terminated", "terminated", 5),
        ("needs-operator", "target-failed", 4),
    ] {
        let mut last = migration(state);
        last["problem"] = json!({"code": code, "detail": "because of it", "hint": "do this"});
        let manager = one_migration(last);
        let ended = run(manager.outrider(), &["migrate", "web-1", "--to", "host-b"]);
        assert_eq!(ended.code, exit, "{state} {code}");
        assert!(ended.stdout.contains(&format!("because of it [{code}]")), "{}", ended.stdout);
        assert!(ended.stdout.contains("do this"), "{}", ended.stdout);
    }
}

#[test]
fn nonces_are_never_the_same() {
    let manager = FakeManager::start(|_, _| Reply::Json(202, json!({"id": ID}).to_string()));
    for _ in 0..3 {
        let ended =
            run(manager.outrider(), &["migrate", "web-1", "--to", "host-b", "--detach", "--output", "json"]);
        assert_eq!((ended.code, ended.json()), (0, json!({"id": ID})));
    }
    let nonces: std::collections::BTreeSet<String> = manager
        .asked()
        .iter()
        .map(|a| serde_json::from_str::<Value>(&a.body).unwrap()["nonce"].to_string())
        .collect();
    assert_eq!(nonces.len(), 3);
}

#[test]
fn ctrl_c_detaches_and_says_how_to_go_on() {
    let manager = FakeManager::start(|asked, _| match asked.line.as_str() {
        "POST /v1/migrations" => Reply::Json(202, json!({"id": ID}).to_string()),
        line if line.ends_with("/events") => Reply::Never,
        _ => Reply::ok(migration("memory-transfer")),
    });
    let command = manager.outrider();
    let mut child = std::process::Command::new(command.get_program())
        .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .args(["migrate", "web-1", "--to", "host-b"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Once it asks for events it has been watching, and its handler for Ctrl-C is in place.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !manager.asked().iter().any(|a| a.line.ends_with("/events")) {
        assert!(std::time::Instant::now() < limit, "it never asked for events");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
        .unwrap();
    let status = child.wait().unwrap();
    let mut stderr = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut stderr).unwrap();
    assert_eq!(status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("outrider migration watch m-6c6c6c6c"), "{stderr}");
    assert!(stderr.contains("outrider migration terminate m-6c6c6c6c"), "{stderr}");
    assert!(!manager.asked().iter().any(|a| a.line.contains("terminate")), "detaching is not stopping");
}

#[test]
fn a_manager_that_restarts_does_not_end_the_watch() {
    let looks = std::sync::atomic::AtomicUsize::new(0);
    let manager = FakeManager::start(move |asked, _| {
        if asked.line.ends_with("/events") {
            return Reply::problem(503, "registry-unavailable", "starting", "wait");
        }
        match looks.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Reply::ok(migration("switchover")),
            1 => Reply::problem(503, "registry-unavailable", "starting", "wait"),
            _ => Reply::ok(migration("completed")),
        }
    });
    let ended = run(manager.outrider(), &["migration", "watch", ID]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("does not answer") && ended.stderr.contains("answers again"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_migration_is_found_by_prefix_and_by_vm() {
    for reference in [ID, "m-6c6c", "6c6c6c", "web-1"] {
        let manager = one_migration(migration("memory-transfer"));
        let ended = run(manager.outrider(), &["migration", "suspend", reference]);
        assert_eq!(ended.code, 0, "{reference}: {}", ended.stderr);
        let wanted = format!("POST /v1/migrations/{ID}/suspend");
        assert!(manager.asked().iter().any(|a| a.line == wanted), "{reference}");
    }
    let manager = one_migration(migration("memory-transfer"));
    let ended = run(manager.outrider(), &["migration", "terminate", "db"]);
    assert_eq!(ended.code, 2);
    assert!(
        ended.stderr.contains("unknown-migration") && ended.stderr.contains("migration list"),
        "{}",
        ended.stderr
    );
}

#[test]
fn the_audit_list_shows_the_end_of_a_log_of_many_pages() {
    let manager = FakeManager::start(|asked, _| {
        let number = |key: &str| -> u64 {
            let rest = asked.line.split(&format!("{key}=")).nth(1).unwrap();
            rest.split('&').next().unwrap().parse().unwrap()
        };
        let (after, limit) = (number("after"), number("limit"));
        let entry = |sequence| {
            json!({"sequence": sequence, "at": "2026-11-23T14:02:11Z", "actor": "a", "action": "b", "subject": "c",
                "detail": null, "hash": "ab"})
        };
        Reply::ok(Value::from((after + 1..=(after + limit).min(12_000)).map(entry).collect::<Vec<_>>()))
    });
    let ended = run(manager.outrider(), &["audit", "list", "--limit", "3", "--output", "json"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let sequences: Vec<_> = ended.json().as_array().unwrap().iter().map(|e| e["sequence"].clone()).collect();
    assert_eq!(sequences, [11_998, 11_999, 12_000]);
}

#[test]
fn a_side_is_called_dead_only_in_so_many_words() {
    let manager = one_migration(migration("needs-operator"));
    let ended = run(manager.outrider(), &["migration", "resolve", ID]);
    assert_eq!((ended.code, manager.asked().len()), (2, 0), "{}", ended.stderr);
    let both = run(manager.outrider(), &["migration", "resolve", ID, "--target-fenced", "--source-fenced"]);
    assert_eq!((both.code, manager.asked().len()), (2, 0), "{}", both.stderr);
    run(manager.outrider(), &["migration", "resolve", ID, "--target-fenced"]);
    let asked = &manager.asked()[0];
    assert_eq!(asked.line, format!("POST /v1/migrations/{ID}/resolve"));
    assert_eq!(asked.body, r#"{"fenced":"target"}"#);
}

#[test]
fn a_broken_audit_log_is_exit_code_1() {
    for (verified, exit) in [(true, 0), (false, 1)] {
        let manager = FakeManager::start(move |_, _| {
            let bad = (!verified).then_some(7);
            Reply::ok(
                json!({"verified": verified, "entries": 9, "head": "ab", "first_bad": bad, "detail": null}),
            )
        });
        let ended = run(manager.outrider(), &["audit", "verify"]);
        assert_eq!(ended.code, exit);
        assert_eq!(ended.stdout.contains("BROKEN"), !verified, "{}", ended.stdout);
        assert_eq!(
            run(manager.outrider(), &["audit", "verify", "--output", "json"]).json()["verified"],
            verified
        );
    }
}

#[test]
fn the_example_configurations_are_good_and_mistakes_name_the_line() {
    let packaging = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    for (noun, file) in [("manager", "manager.toml"), ("host", "host.toml")] {
        let text = std::fs::read_to_string(packaging.join(file)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(file);
        let lines = text.lines().count();
        // In front of any table, so that the key is the daemon's own.
        std::fs::write(&path, format!("{}\n", text.replacen("\n\n", "\nunknown_key = 1\n", 1))).unwrap();
        let ended = run(outrider(), &[noun, "run", "--config", path.to_str().unwrap()]);
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        assert!(ended.stderr.contains("unknown field `unknown_key`"), "{}", ended.stderr);
        let line = 1 + std::fs::read_to_string(&path)
            .unwrap()
            .lines()
            .position(|l| l.starts_with("unknown_key"))
            .unwrap();
        assert!(ended.stderr.contains(&format!("{file}:{line}:")), "{lines} lines: {}", ended.stderr);
    }
}

#[test]
fn doctor_for_an_operator_needs_the_manager() {
    let manager = FakeManager::start(|asked, _| match asked.line.as_str() {
        "GET /healthz" | "GET /readyz" => Reply::Text(200, "ok".to_owned()),
        _ => Reply::ok("[]"),
    });
    let good = run(manager.outrider(), &["doctor", "--role", "operator", "--output", "json"]);
    assert_eq!(good.code, 0, "{}", good.stdout);
    let checks = good.json()["checks"].as_array().unwrap().clone();
    let names: Vec<_> = checks.iter().map(|c| c["check"].as_str().unwrap()).collect();
    assert_eq!(names, ["manager", "ready", "clock", "token"]);
    assert!(checks.iter().all(|c| c["status"] == "ok"), "{checks:?}");

    let sick = FakeManager::start(|asked, _| match asked.line.as_str() {
        "GET /healthz" => Reply::Text(200, "ok".to_owned()),
        "GET /readyz" => Reply::Text(503, "the registry cannot write".to_owned()),
        _ => Reply::problem(401, "unauthenticated", "unknown token", "ask for one"),
    });
    let bad = run(sick.outrider(), &["doctor", "--role", "operator"]);
    assert_eq!(bad.code, 1, "{}", bad.stdout);
    assert!(
        bad.stdout.contains("the registry cannot write") && bad.stdout.contains("not ready: 2 failures"),
        "{}",
        bad.stdout
    );
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ended = run(outrider(), &["completions", shell]);
        assert_eq!(ended.code, 0);
        assert!(ended.stdout.contains("migration") && ended.stdout.contains("terminate"), "{shell}");
    }
}
