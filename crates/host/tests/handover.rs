//! Two host daemons, real QEMUs and real agents, over loopback: the whole hand-over, given up, and cut by kill -9.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../engine/tests/support/skip.rs"]
mod skip;
mod support;

use api::fleet::{self, to_host};
use engine::handover::decider::RowState;
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use support::Manager;
use support::host::{Host, missing, run_child, scanner};
use types::ErrorCode;
use types::inventory::Inventory;
use types::permit::StreamFeatures;
use types::vm::VmSpec;

/// Not a test of its own: the daemons of the other tests run here, in processes of their own.
#[tokio::test(flavor = "multi_thread")]
async fn host_process() {
    run_child().await;
}

struct Lab {
    manager: Manager,
    a: Host,
    b: Host,
    spec: VmSpec,
    inventory: Inventory,
    /// Last: the hosts' logs are in it, and are shown when a test fails.
    _folder: tempfile::TempDir,
}

/// With a shared disk under QEMU's default locking: the two copies contend for it at every hand-over.
fn spec(folder: &Path) -> VmSpec {
    let disk = folder.join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    serde_json::from_value(serde_json::json!({
        "uuid": "11111111-2222-3333-4444-555555555555", "name": "tiny", "accel": "tcg", "vcpus": 1,
        "memory_bytes": 64 << 20,
        "disks": [{"path": disk, "format": "raw", "volume": "v", "shared": true}],
    }))
    .unwrap()
}

/// Hosts share ports and cgroup names per process; the tests of one process take turns.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn lab() -> Option<Lab> {
    lab_of("q35").await
}

async fn lab_of(machine: &str) -> Option<Lab> {
    if let Some(reason) = missing() {
        skip::skip(&reason);
        return None;
    }
    let folder = tempfile::Builder::new().prefix("oht").tempdir().unwrap();
    let manager = Manager::start(folder.path()).await;
    let a = Host::start(&manager, folder.path(), "host-a", "127.0.0.1").await;
    let b = Host::start(&manager, folder.path(), "host-b", "127.0.0.2").await;
    let spec = VmSpec { machine: machine.to_owned(), ..spec(folder.path()) };
    let inventory = manager.start_vm("host-a", &spec, 1).await;
    Some(Lab { manager, a, b, spec, inventory, _folder: folder })
}

impl Lab {
    async fn migrate(&self, epoch: u64, from: &str, to: &str) -> types::permit::PermitClaims {
        self.manager.migrate(&self.spec, &self.inventory, epoch, from, to).await
    }

    /// The source never hears of a migration, and promises to take no part in it.
    async fn decline_source(&self, claims: &types::permit::PermitClaims) {
        let row = self.manager.world.lock().unwrap().rows[&claims.key.migration].clone();
        let attempt = json!({
            "key": row.key, "permit": row.permit, "nonce": claims.nonce, "source": row.source,
            "target": row.target, "target_journal": row.target_journal,
            "run_budget_ms": claims.duration_budget_ms,
        });
        let decline = fleet::Decline {
            attempt_json: attempt.to_string(),
            side: "source".to_owned(),
            code: "terminated".to_owned(),
            detail: "by the test".to_owned(),
        };
        self.manager.order("host-a", to_host::Body::Decline(decline)).await.unwrap();
    }

    /// A migration that is met in the middle.
    async fn held(&self) -> types::permit::PermitClaims {
        self.manager.migrate_held(&self.spec, &self.inventory, 1, "host-a", "host-b").await
    }
}

fn completed(row: &engine::handover::decider::HandoverRow) -> bool {
    matches!(row.state, RowState::Completed { .. })
}

fn given_up(row: &engine::handover::decider::HandoverRow) -> bool {
    matches!(row.state, RowState::Voided(_)) && row.is_final()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_there_and_back() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let there = lab.migrate(1, "host-a", "host-b").await.key;
    lab.manager.row("completed", there.migration, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
    lab.b.runs().await;
    let running = lab.manager.event(there.migration, "peer-running").await;
    let downtime = running["downtime_ms"].as_f64().unwrap();
    let parts: f64 =
        running["parts"].as_array().unwrap().iter().map(|p| p["duration_ms"].as_f64().unwrap()).sum();
    assert!(downtime > 0.0 && (parts - downtime).abs() < 1.0, "{running}");
    for kind in
        ["prepared", "connected", "stopped", "end-of-stream", "frozen", "accepted", "running", "released"]
    {
        lab.manager.event(there.migration, kind).await;
    }
    let inspect = || to_host::Body::InspectVm(fleet::InspectVm { vm: lab.spec.uuid.to_string() });
    match lab.manager.order("host-b", inspect()).await.unwrap() {
        fleet::reply::Result::Inspected(inspected) => {
            let catalogue: types::layout::Catalogue =
                serde_json::from_str(&inspected.catalogue_json).unwrap();
            assert_eq!(catalogue.machine, lab.inventory.machine);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(lab.manager.order("host-a", inspect()).await.unwrap_err().code, "vm-not-running");
    // A→B→A: the same hosts, the same VM, later epochs.
    let back = lab.migrate(3, "host-b", "host-a").await.key;
    lab.manager.row("completed", back.migration, completed).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    assert!(lab.manager.world.lock().unwrap().vm_events.is_empty(), "ordered ends are no news");
}

impl Lab {
    /// From now on permits allow multifd.
    fn allow(&self, multifd_channels: u16, compression: &str) {
        self.manager.world.lock().unwrap().features = StreamFeatures {
            multifd_channels,
            compression: compression.to_owned(),
            ..StreamFeatures::default()
        };
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_over_several_connections() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let hosts = [("host-a", "host-b"), ("host-b", "host-a")];
    let ways = [(2, ""), (4, "zstd"), (1, "zlib"), (0, ""), (16, "")];
    for ((channels, compression), number) in ways.into_iter().zip(0u64..) {
        lab.allow(channels, compression);
        let (from, to) = hosts[usize::try_from(number % 2).unwrap()];
        let key = lab.migrate(1 + 2 * number, from, to).await.key;
        lab.manager.row("completed", key.migration, completed).await;
        let connected = lab.manager.event(key.migration, "connected").await;
        assert_eq!(connected["channels"], channels + 1, "{connected}");
        let (here, there) = if number % 2 == 0 { (&lab.a, &lab.b) } else { (&lab.b, &lab.a) };
        here.only(0).await;
        there.only(1).await;
        assert_eq!(there.guest().await, "running");
    }
}

/// Given up in the middle, on all connections; then again on one.
#[tokio::test(flavor = "multi_thread")]
async fn several_connections_are_all_given_up() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    lab.allow(3, "");
    let id = lab.held().await.key.migration;
    lab.manager.event(id, "connected").await;
    lab.manager.abort(id, ErrorCode::Terminated);
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;
    lab.allow(0, "");
    let again = lab.migrate(4, "host-a", "host-b").await.key;
    lab.manager.row("completed", again.migration, completed).await;
    lab.b.only(1).await;
    lab.b.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_targets_qemu_dies_with_several_connections() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    lab.allow(2, "");
    let id = lab.held().await.key.migration;
    lab.b.kill_qemu();
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspended_resumed_and_terminated_in_mid_flight() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let claims = lab.held().await;
    let id = claims.key.migration;
    lab.manager.control("host-a", id, "suspend", 0).await;
    lab.manager.event(id, "suspended").await;
    lab.manager.control("host-a", id, "resume", 0).await;
    lab.manager.event(id, "resumed").await;
    let before = std::time::Instant::now();
    lab.manager.abort(id, ErrorCode::Terminated);
    lab.manager.event(id, "failed").await;
    assert!(before.elapsed() < Duration::from_secs(1), "effect within a second: {:?}", before.elapsed());
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;
    // It can move afterwards, under epochs above the burnt ones.
    let again = lab.migrate(4, "host-a", "host-b").await.key;
    lab.manager.row("completed", again.migration, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_source_that_hears_nothing_asks_the_target_directly() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    // A manager that neither hears statements nor commits: the two daemons are on their own.
    lab.manager.hold(&["commit"], true);
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    lab.manager.event(id, "frozen").await;
    lab.a.until("frozen", |a| a.unfrozen() == 0).await;
    lab.manager.event(id, "thawed").await;
    lab.a.until("thawed", |a| a.unfrozen() == 1).await;
    lab.b.until("the target's copy is dead", |b| b.qemus().is_empty()).await;
    lab.a.runs().await;
    // The proof is adopted when the manager is back.
    lab.manager.hold(&[], false);
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_daemon_dies_in_the_transfer() {
    let _turn = TURN.lock().await;
    let Some(mut lab) = lab().await else { return };
    let id = lab.held().await.key.migration;
    let qemu = lab.a.qemus();
    lab.a.kill();
    lab.a.until("its agent ends with it", |a| a.agents().is_empty()).await;
    assert_eq!((lab.a.qemus(), lab.a.unfrozen()), (qemu.clone(), 1), "the guest runs on");
    lab.a.launch();
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    assert_eq!(lab.a.qemus(), qemu);
    lab.a.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_daemon_dies_after_its_vote() {
    let _turn = TURN.lock().await;
    let Some(mut lab) = lab().await else { return };
    lab.manager.hold(&["commit"], false);
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    lab.manager.row("both votes", id, |row| matches!(row.state, RowState::Committed(_))).await;
    lab.a.kill();
    assert_eq!((lab.a.qemus().len(), lab.a.unfrozen()), (1, 0), "the frozen copy stays frozen");
    lab.a.launch();
    lab.manager.hold(&[], false);
    lab.manager.row("completed", id, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_target_daemon_dies_between_its_vote_and_the_commit() {
    let _turn = TURN.lock().await;
    let Some(mut lab) = lab().await else { return };
    lab.manager.hold(&["commit"], false);
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    lab.manager.row("both votes", id, |row| matches!(row.state, RowState::Committed(_))).await;
    lab.b.kill();
    lab.manager.hold(&[], false);
    lab.b.launch();
    lab.manager.row("completed", id, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permit_is_used_once_and_only_by_whom_it_names() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let (token, claims) = lab.manager.permit(&lab.spec, 1, "host-a", "host-b").await;
    // Another spec than the permit's: consumed, and renounced.
    let other = VmSpec { vcpus: 2, ..lab.spec.clone() };
    let refused = lab.manager.prepare(&token, &claims, &other, &lab.inventory).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::PermitRefused.as_str(), "{refused:?}");
    let refused = lab.manager.prepare(&token, &claims, &lab.spec, &lab.inventory).await.unwrap_err();
    assert!(
        ["permit-refused", "wrong-state", "replayed-request"].contains(&refused.code.as_str()),
        "{refused:?}"
    );
    let mut garbled = token.clone();
    let last = garbled.len() - 1;
    garbled[last] ^= 1;
    let (_, fresh) = lab.manager.permit(&lab.spec, 3, "host-a", "host-b").await;
    let refused = lab.manager.prepare(&garbled, &fresh, &lab.spec, &lab.inventory).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::PermitRefused.as_str(), "{refused:?}");
    assert!(lab.b.qemus().is_empty(), "nothing was started");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_stops_while_suspended_runs_on() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let id = lab.held().await.key.migration;
    lab.manager.control("host-a", id, "suspend", 0).await;
    lab.manager.event(id, "suspended").await;
    lab.a.qmp("stop").await;
    lab.manager.event(id, "failed").await;
    lab.manager.row("given up", id, given_up).await;
    lab.a.runs().await;
    lab.a.only(1).await;
    lab.b.only(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_its_user_paused_stays_paused() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    lab.a.qmp("stop").await;
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    lab.manager.row("completed", id, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
    assert_eq!(lab.b.guest().await, "paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_targets_qemu_dies_in_the_transfer() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let id = lab.held().await.key.migration;
    lab.b.kill_qemu();
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_a_catalogue_takes_a_vm_only_where_the_permit_says_so() {
    let _turn = TURN.lock().await;
    let Some(mut lab) = lab().await else { return };
    let qemu = lab._folder.path().join("qemu");
    let script = "#!/bin/sh\ncase \"$*\" in *guest=dry-run*) exit 7 ;; esac\n\
                  exec /usr/bin/qemu-system-x86_64 \"$@\"\n";
    std::fs::write(&qemu, script).unwrap();
    std::fs::set_permissions(&qemu, std::fs::Permissions::from_mode(0o755)).unwrap();
    let hellos = lab.manager.world.lock().unwrap().hellos.len();
    lab.b.restart_with(&qemu);
    lab.manager.until("host-b is back", |w| (w.hellos.len() > hellos).then_some(())).await;
    let (token, claims) = lab.manager.permit(&lab.spec, 1, "host-a", "host-b").await;
    let refused = lab.manager.prepare(&token, &claims, &lab.spec, &lab.inventory).await.unwrap_err();
    assert_eq!(refused.code, "hypervisor-failed", "{refused:?}");
    assert!(refused.detail.contains("no catalogue of the VM's devices"), "{refused:?}");
    assert!(refused.detail.contains("exit code 7"), "{refused:?}");
    lab.decline_source(&claims).await;
    lab.manager.row("given up", claims.key.migration, given_up).await;
    lab.b.only(0).await;
    lab.manager.world.lock().unwrap().profile = Some("strict+report-unvouched");
    let id = lab.migrate(3, "host-a", "host-b").await.key.migration;
    lab.manager.row("completed", id, completed).await;
    // The report says which devices nothing vouched for.
    let finding = lab.manager.event(id, "finding").await;
    assert_eq!((&finding["rule"], &finding["severity"]), (&json!("INV-D2"), &json!("warning")), "{finding}");
    assert_eq!(finding["section"], "timer", "{finding}");
    lab.a.only(0).await;
    lab.b.only(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permit_that_asks_for_signatures_is_refused_without_a_scanner() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    for (epoch, profile) in [(1, "strict+signatures"), (3, "strict+signatures-complete")] {
        lab.manager.world.lock().unwrap().profile = Some(profile);
        let (token, claims) = lab.manager.permit(&lab.spec, epoch, "host-a", "host-b").await;
        let refused = lab.manager.prepare(&token, &claims, &lab.spec, &lab.inventory).await.unwrap_err();
        assert_eq!(refused.code, "missing-program", "{refused:?}");
        assert!(refused.detail.contains("the permit asks for signatures"), "{refused:?}");
        lab.decline_source(&claims).await;
        lab.manager.row("given up", claims.key.migration, given_up).await;
    }
    lab.a.only(1).await;
    lab.b.only(0).await;
}

/// Real QEMUs, both agents and the scanner; the firmware stands for what a rule looks for.
#[tokio::test(flavor = "multi_thread")]
async fn a_signature_keeps_a_vm_where_it_is_and_a_clean_one_moves() {
    let _turn = TURN.lock().await;
    let scanner = match scanner() {
        Ok(scanner) => scanner,
        Err(reason) => return skip::skip(&reason),
    };
    let Some(mut lab) = lab().await else { return };
    let rules = lab._folder.path().join("rules.yar");
    let rule = |text: &str| format!("rule looked_for {{ strings: $a = \"{text}\" condition: $a }}");
    std::fs::write(&rules, rule("SeaBIOS")).unwrap();
    let hellos = lab.manager.world.lock().unwrap().hellos.len();
    lab.b.restart_with_scanner(&scanner, &rules);
    lab.manager.until("host-b is back", |w| (w.hellos.len() > hellos).then_some(())).await;
    lab.manager.world.lock().unwrap().profile = Some("strict+signatures");
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    let finding = lab.manager.event(id, "finding").await;
    assert_eq!((&finding["rule"], &finding["threat"]), (&json!("SIG-1"), &json!("MM-10")), "{finding}");
    assert_eq!(finding["found"], "rule looked_for", "{finding}");
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;

    // Where every page is to be seen, every page was.
    std::fs::write(&rules, rule("nothing holds this text")).unwrap();
    lab.manager.world.lock().unwrap().profile = Some("strict+signatures-complete");
    let id = lab.migrate(3, "host-a", "host-b").await.key.migration;
    lab.manager.row("completed", id, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
    lab.b.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_targets_agent_is_killed_in_the_transfer() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let id = lab.held().await.key.migration;
    lab.b.kill_agents();
    let finding = lab.manager.event(id, "finding").await;
    assert_eq!(finding["rule"], "agent-lost", "{finding}");
    assert_eq!(finding["found"], "it was killed by signal 9 (SIGKILL)", "{finding}");
    let ended = lab.manager.event(id, "ended").await;
    assert!(ended["what"] == "agent" || ended["what"] == "peer", "{ended}");
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sources_qemu_dies_after_both_votes() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    lab.manager.hold(&["commit"], false);
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    lab.manager.row("both votes", id, |row| matches!(row.state, RowState::Committed(_))).await;
    // Not even by order, while the hand-over may need it.
    let stop = fleet::StopVm { vm: lab.spec.uuid.to_string(), epoch: 99 };
    let refused = lab.manager.order("host-a", to_host::Body::StopVm(stop)).await.unwrap_err();
    assert_eq!(refused.code, "migration-in-flight");
    lab.a.kill_qemu();
    lab.manager.hold(&[], false);
    lab.manager.row("completed", id, completed).await;
    lab.a.only(0).await;
    lab.b.only(1).await;
    lab.b.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_targets_qemu_dies_before_the_commit() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    lab.manager.hold(&["commit"], false);
    let id = lab.migrate(1, "host-a", "host-b").await.key.migration;
    lab.manager.row("both votes", id, |row| matches!(row.state, RowState::Committed(_))).await;
    lab.b.kill_qemu();
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
    lab.a.runs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_closed_and_unknown_attempts_declined() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let (token, claims) = lab.manager.permit(&lab.spec, 1, "host-a", "host-b").await;
    let prepared = lab.manager.prepare(&token, &claims, &lab.spec, &lab.inventory).await.unwrap();
    let again = lab.manager.prepare(&token, &claims, &lab.spec, &lab.inventory).await.unwrap();
    assert_eq!(prepared, again, "a repeated order is answered the same");
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.3:0".parse().unwrap()).unwrap();
    let _stranger = socket.connect(prepared.data_address.parse().unwrap()).await.unwrap();
    let id = claims.key.migration;
    assert_eq!(lab.manager.event(id, "finding").await["rule"], "stray-connection");
    // The source never heard of it.
    let key_json = serde_json::to_string(&claims.key).unwrap();
    let abort = fleet::Abort { key_json, code: "terminated".to_owned(), detail: String::new() };
    let unknown = lab.manager.order("host-a", to_host::Body::Abort(abort)).await.unwrap_err();
    assert_eq!(unknown.code, "unknown-migration");
    lab.decline_source(&claims).await;
    lab.manager.row("given up", id, given_up).await;
    lab.a.only(1).await;
    lab.b.only(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intent_becomes_a_signed_request_and_a_dead_vm_is_told() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab().await else { return };
    let intent = |vm: String| {
        to_host::Body::Intent(fleet::Intent { intent: "ab".repeat(16), vm, target: "host-b".to_owned() })
    };
    lab.manager.order("host-a", intent(lab.spec.uuid.to_string())).await.unwrap();
    let request = lab.manager.until("a request", |w| w.requests.pop()).await;
    assert!(matches!(request, types::handover::Statement::Request(r) if r.source.as_str() == "host-a"));
    let elsewhere = lab.manager.order("host-b", intent(lab.spec.uuid.to_string())).await.unwrap_err();
    assert_eq!(elsewhere.code, "vm-not-on-source");
    lab.a.kill_qemu();
    lab.manager
        .until("the VM's end", |w| w.vm_events.iter().find(|(_, state)| state == "dead").cloned())
        .await;
    lab.a.only(0).await;
}

/// On `pc`, whose PCI bus takes a device at any time.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_plugged_in_behind_the_daemon_is_named_before_anything_moves() {
    let _turn = TURN.lock().await;
    let Some(lab) = lab_of("pc").await else { return };
    let inspect = async || {
        let order = fleet::InspectVm { vm: lab.spec.uuid.to_string() };
        match lab.manager.order("host-a", to_host::Body::InspectVm(order)).await.unwrap() {
            fleet::reply::Result::Inspected(inspected) => inspected.differences,
            other => panic!("{other:?}"),
        }
    };
    let agent = async |id: &[u8; 16], host: &str, side| {
        let id = types::MigrationId::from_bytes(*id);
        lab.manager.agent(host, id, lab.spec.uuid, side).await
    };
    assert_eq!(inspect().await, [""; 0]);
    let before = agent(b"before it was in", "host-a", types::Side::Source).await.unwrap();
    lab.a.runs().await;
    lab.a.qmp_with("device_add", json!({"driver": "virtio-rng-pci", "id": "x"})).await;
    assert_eq!(inspect().await, ["virtio-rng-pci \"x\" was plugged in"]);
    let refused = agent(b"after it was in.", "host-a", types::Side::Source).await.unwrap_err();
    assert_eq!(refused.code, "devices-differ", "{refused:?}");
    assert!(refused.detail.contains("VM tiny") && refused.detail.contains("virtio-rng-pci"), "{refused:?}");
    assert!(refused.hint.contains("undo it"), "{refused:?}");
    // A repeated order is answered as before.
    assert_eq!(agent(b"before it was in", "host-a", types::Side::Source).await.unwrap(), before);
    // A target's agent is not about a VM that runs there.
    agent(b"after it was in.", "host-b", types::Side::Target).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_before_it_ends() {
    if let Some(reason) = missing() {
        skip::skip(&reason);
        return;
    }
    let folder = tempfile::Builder::new().prefix("ohr").tempdir().unwrap();
    let manager = Manager::start(folder.path()).await;
    // Backdated for clocks that are behind: half of its life is over when it is issued.
    manager.world.lock().unwrap().certificate_life = Some(Duration::from_secs(60));
    let mut host = Host::start(&manager, folder.path(), "host-a", "127.0.0.1").await;
    manager.until("a renewal", |w| (w.renewals > 0).then_some(())).await;
    // What was renewed is what the next life of the daemon uses.
    host.kill();
    manager.world.lock().unwrap().certificate_life = None;
    host.launch();
    manager.until("another hello", |w| (w.hellos.len() > 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_is_not_answered_holds_nothing_up() {
    if let Some(reason) = missing() {
        skip::skip(&reason);
        return;
    }
    let folder = tempfile::Builder::new().prefix("ohw").tempdir().unwrap();
    let manager = Manager::start(folder.path()).await;
    {
        let mut world = manager.world.lock().unwrap();
        world.certificate_life = Some(Duration::from_secs(60));
        world.renewals_stall = true;
    }
    let host = Host::start(&manager, folder.path(), "host-a", "127.0.0.1").await;
    manager.until("a renewal is asked for", |w| (w.renewals > 0).then_some(())).await;
    // The session serves orders meanwhile.
    let load = manager.order("host-a", to_host::Body::QueryLoad(fleet::QueryLoad {})).await;
    assert!(matches!(load, Ok(fleet::reply::Result::Load(_))), "{load:?}");
    host.until("the renewal is given up", |h| h.log().contains("issues no certificate")).await;
    assert_eq!(manager.world.lock().unwrap().hellos.len(), 1, "in the same session");
}

/// A moment's work among the guests' cgroups: done, bounded, shared by those who ask at once, and gone afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_proves_that_it_can_do_a_moments_work() {
    if let Some(reason) = missing() {
        skip::skip(&reason);
        return;
    }
    let folder = tempfile::Builder::new().prefix("ohp").tempdir().unwrap();
    let manager = Manager::start(folder.path()).await;
    let host = Host::start(&manager, folder.path(), "host-a", "127.0.0.1").await;
    let ask = async |memory_bytes: u64, work_us: u32| {
        let order = to_host::Body::MicroProbe(fleet::MicroProbe { memory_bytes, work_us });
        let began = std::time::Instant::now();
        match manager.order("host-a", order).await {
            Ok(fleet::reply::Result::Probed(said)) => {
                println!("{} in {:.1} ms", said.probe_json, began.elapsed().as_secs_f64() * 1e3);
                Ok(serde_json::from_str::<types::host::Probe>(&said.probe_json).unwrap())
            }
            other => Err(format!("{other:?}")),
        }
    };
    let first = ask(32 << 20, 5_000).await.unwrap();
    assert_eq!(first.touched_bytes, 32 << 20);
    assert!(first.work_us >= 5_000 && first.cpu_us > 0 && first.work_units > 0, "{first:?}");
    let (one, two) = tokio::join!(ask(8 << 20, 1_000), ask(8 << 20, 1_000));
    assert_eq!(one.unwrap(), two.unwrap(), "asked at once, done once");
    for (memory_bytes, work_us) in [((64 << 20) + 1, 1_000), (1 << 20, 20_001)] {
        assert!(ask(memory_bytes, work_us).await.unwrap_err().contains("bad-request"));
    }
    // The next process waits; one that is killed there costs a start, not the answer. The one that answered last may
    // still be on its way out: what counts is one that waits.
    let probes = host.group().child("probes");
    let waiting = || {
        let waits = |pid: &u32| command(*pid).contains("--probe") && state(*pid) == Some('S');
        probes.processes().into_iter().filter(waits).collect::<Vec<_>>()
    };
    host.until("one is started ahead", |_| waiting().len() == 1).await;
    for pid in waiting() {
        std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    }
    assert_eq!(ask(1 << 20, 1_000).await.unwrap().touched_bytes, 1 << 20);
    host.until("one is started ahead", |_| waiting().len() == 1).await;
    assert_eq!(ask(1 << 20, 2_000).await.unwrap().touched_bytes, 1 << 20);
}

fn command(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

fn state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
