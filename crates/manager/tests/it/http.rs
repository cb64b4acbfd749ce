//! What the operators' port lets in, and how it says no.

use crate::fake_host::{FakeHost, Manners};
use crate::skip::skip;
use crate::world::{World, config, host_spec, intent, now_ms, try_run, vm_spec};
use hyper::StatusCode;
use serde_json::{Value, json};
use types::ErrorCode;

/// Refused with this status and code, as a problem document.
async fn refused(world: &World, method: &str, path: &str, token: &str, body: &str, status: u16, code: &str) {
    let answer = world.request(method, path, token, body).await;
    assert_eq!(
        (answer.status.as_u16(), answer.code()),
        (status, code),
        "{method} {path} {body}: {}",
        answer.body
    );
    assert_eq!(answer.kind, "application/problem+json");
    assert!(!answer.body["detail"].as_str().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_health_is_open_and_everything_else_wants_a_token() {
    let world = World::new();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(world.request("GET", path, "", "").await.status, StatusCode::OK, "{path}");
    }
    for path in ["/v1/hosts", "/v1/vms", "/v1/migrations", "/v1/audit", "/v1/audit/verify", "/v1/events"] {
        refused(&world, "GET", path, "wrong", "", 401, "unauthenticated").await;
    }
    // Ten failures of one address, and it has to wait, whatever it sends.
    for _ in 0..4 {
        refused(&world, "POST", "/v1/vms", "", "{}", 401, "unauthenticated").await;
    }
    refused(&world, "GET", "/v1/hosts", &world.token(), "", 429, "limit-reached").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_documents_are_named() {
    let world = World::new();
    let token = world.token();
    let mut extra = host_spec("host-a");
    extra["colour"] = json!("red");
    refused(&world, "POST", "/v1/hosts", &token, &extra.to_string(), 400, "bad-request").await;
    let mut name = host_spec("host-a");
    name["name"] = json!("Host A");
    refused(&world, "POST", "/v1/hosts", &token, &name.to_string(), 400, "bad-request").await;
    let mut mac = host_spec("host-a");
    mac["macs"] = json!(["nonsense"]);
    refused(&world, "POST", "/v1/hosts", &token, &mac.to_string(), 400, "bad-request").await;
    let mut vm = vm_spec("vm", 1);
    vm["cpu_model"] = json!("host");
    refused(&world, "POST", "/v1/vms", &token, &vm.to_string(), 400, "bad-request").await;
    let mut vm = vm_spec("vm", 1);
    vm["qemu_args"] = json!("-snapshot");
    refused(&world, "POST", "/v1/vms", &token, &vm.to_string(), 400, "bad-request").await;
    refused(&world, "POST", "/v1/vms", &token, "{", 400, "bad-request").await;
    let long = format!("{{\"name\":\"{}\"}}", "x".repeat(300 * 1024));
    refused(&world, "POST", "/v1/vms", &token, &long, 400, "bad-request").await;
    refused(&world, "GET", "/v1/hosts/nobody", &token, "", 404, "unknown-host").await;
    refused(&world, "GET", "/v1/vms/..%2f..", &token, "", 404, "unknown-vm").await;
    refused(&world, "GET", "/v1/migrations/m-1", &token, "", 404, "unknown-migration").await;
    refused(&world, "GET", "/v2", &token, "", 400, "bad-request").await;
    refused(&world, "DELETE", "/v1/hosts", &token, "", 400, "bad-request").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_gate_of_a_request_has_its_own_code() {
    let world = World::new();
    let token = world.token();
    let (a, _b) = (world.host("host-a").await, world.host("host-b").await);
    world.ok("/v1/hosts", &host_spec("host-c")).await;
    world.vm("vm", 1, "host-a").await;
    world.ok("/v1/vms", &vm_spec("cold", 2)).await;
    let check = async |body: Value, status: u16, code: &str| {
        refused(&world, "POST", "/v1/migrations", &token, &body.to_string(), status, code).await;
    };
    check(intent("nothing", "host-b"), 404, "unknown-vm").await;
    check(intent("cold", "host-b"), 409, "vm-not-running").await;
    check(intent("vm", "nowhere"), 404, "unknown-host").await;
    check(intent("vm", "host-a"), 409, "target-is-source").await;
    check(intent("vm", "host-c"), 409, "host-unreachable").await;
    let mut wrong = intent("vm", "host-b");
    wrong["source"] = json!("host-b");
    check(wrong, 409, "vm-not-on-source").await;
    let mut stale = intent("vm", "host-b");
    stale["timestamp_unix_ms"] = json!(now_ms() - 31_000);
    check(stale, 409, "stale-request").await;
    let mut future = intent("vm", "host-b");
    future["timestamp_unix_ms"] = json!(now_ms() + 31_000);
    check(future, 409, "stale-request").await;
    let mut unknown = intent("vm", "host-b");
    unknown["force"] = json!(true);
    check(unknown, 400, "bad-request").await;
    // A refused request's nonce is used as well, also after a restart.
    let replay = intent("vm", "host-a");
    check(replay.clone(), 409, "target-is-source").await;
    world.kill();
    world.start();
    check(replay, 409, "replayed-request").await;
    // What was refused is on record, with its reason.
    let list = world.get("/v1/migrations").await;
    let codes: Vec<_> = list.as_array().unwrap().iter().map(|m| m["problem"]["code"].clone()).collect();
    assert!(codes.contains(&json!("target-is-source")), "{codes:?}");
    assert!(
        a.seen.lock().unwrap().iter().all(|order| *order != "intent"),
        "nothing was sent for any of them"
    );
}

/// What each gate says of a request, as `name answer code`, and whether it would be allowed.
async fn explained(world: &World, body: &Value) -> (bool, Vec<String>) {
    let answer = world.ok("/v1/migrations/explain", body).await;
    let gates = answer["gates"].as_array().unwrap().iter();
    let text = |gate: &Value, key: &str| gate[key].as_str().unwrap_or_default().to_owned();
    let gates = gates.map(|g| format!("{} {} {}", text(g, "name"), text(g, "outcome"), text(g, "code")));
    (answer["allowed"].as_bool().unwrap(), gates.map(|gate| gate.trim_end().to_owned()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_explained_gate_by_gate_and_nothing_is_done() {
    const GATES: [&str; 11] = [
        "stream",
        "request",
        "source-identity",
        "target-identity",
        "source-platform",
        "target-platform",
        "policy",
        "devices",
        "compatibility",
        "load",
        "capacity",
    ];
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.ok("/v1/hosts", &host_spec("host-c")).await;
    world.vm("vm", 1, "host-a").await;
    let audit = world.get("/v1/audit").await.as_array().unwrap().len();
    let all = |answer: &str| GATES.map(|gate| format!("{gate} {answer}")).to_vec();
    let body = intent("vm", "host-b");
    assert_eq!(explained(&world, &body).await, (true, all("passed")));
    // Every later gate still answers when one refuses that they do not need.
    a.manners.lock().unwrap().plugged = vec!["virtio-rng-pci was plugged in".to_owned()];
    b.manners.lock().unwrap().available_bytes = 1 << 20;
    let (allowed, gates) = explained(&world, &body).await;
    assert!(!allowed);
    assert_eq!(gates[7], "devices refused devices-differ");
    let rest = ["compatibility passed", "load passed", "capacity refused insufficient-capacity"];
    assert_eq!(gates[8..], rest);
    let inspection = world.get("/v1/vms/vm/inspection").await;
    assert_eq!(inspection["differences"], json!(["virtio-rng-pci was plugged in"]), "{inspection}");
    // That it can't be known is neither "nothing" nor a lack of the catalogue.
    a.manners.lock().unwrap().blind = "the monitor is busy".to_owned();
    assert_eq!(explained(&world, &body).await.1[7], "devices refused hypervisor-failed");
    let inspection = world.get("/v1/vms/vm/inspection").await;
    assert!(
        inspection["differences_missing"].as_str().unwrap().ends_with("the monitor is busy"),
        "{inspection}"
    );
    assert_eq!((&inspection["differences"], &inspection["catalogue_missing"]), (&json!([]), &Value::Null));
    b.manners.lock().unwrap().refuses = vec![("query-load", "internal")];
    let (_, gates) = explained(&world, &body).await;
    assert_eq!(gates[8..], ["compatibility passed", "load refused internal", "capacity not-asked"]);
    for (vm, target, code) in [
        ("nothing", "host-b", "unknown-vm"),
        ("vm", "host-a", "target-is-source"),
        ("vm", "host-c", "host-unreachable"),
    ] {
        let (allowed, gates) = explained(&world, &intent(vm, target)).await;
        assert!(!allowed);
        assert_eq!(gates[..2], ["stream passed".to_owned(), format!("request refused {code}")]);
        assert!(gates[2..].iter().all(|gate| gate.ends_with(" not-asked")), "{gates:?}");
    }
    let mut many = body.clone();
    many["channels"] = json!(999);
    assert_eq!(explained(&world, &many).await.1[0], "stream refused limit-reached");
    let mut unknown = body.clone();
    unknown["force"] = json!(true);
    assert_eq!(world.post("/v1/migrations/explain", &unknown).await.code(), "bad-request");
    // Nothing was recorded, spawned or used up.
    assert_eq!(world.get("/v1/migrations").await, json!([]));
    assert_eq!(world.get("/v1/audit").await.as_array().unwrap().len(), audit);
    let agents = |host: &FakeHost| host.seen.lock().unwrap().iter().filter(|o| **o == "spawn-agent").count();
    assert_eq!((agents(&a), agents(&b)), (0, 0));
    *a.manners.lock().unwrap() = Manners::default();
    *b.manners.lock().unwrap() = Manners::default();
    let id = world.ok("/v1/migrations", &body).await["id"].as_str().unwrap().to_owned();
    assert_eq!(world.ended(&id).await["state"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_shown_once_open_what_their_role_may_and_are_revoked() {
    let world = World::new();
    let add = |name: &str, role: &str, days: u32| json!({ "name": name, "role": role, "expires_in_days": days, "tenants": ["all"] });
    let made = world.ok("/v1/tokens", &add("ann", "operator", 30)).await;
    let token = made["token"].as_str().unwrap().to_owned();
    assert_eq!(made["may"], json!(["define-vm", "start-vm", "stop-vm", "control-migration", "view"]));
    let admin = world.token();
    for (body, status, code) in [
        (add("ann", "viewer", 30), 409, "already-exists"),
        (add("bob", "viewer", 0), 400, "bad-request"),
        (add("bob", "viewer", 3651), 400, "bad-request"),
        (add("admin", "admin", 30), 400, "bad-request"),
        (add("admin-m2", "viewer", 30), 400, "bad-request"),
        (add("a\u{202e}b", "viewer", 30), 400, "bad-request"),
        (add("b'; DROP TABLE vms; --", "viewer", 30), 400, "bad-request"),
        (json!({ "name": "bob", "role": "viewer" }), 400, "bad-request"),
    ] {
        refused(&world, "POST", "/v1/tokens", &admin, &body.to_string(), status, code).await;
    }
    // It opens what its role may, and nothing else.
    assert_eq!(world.request("GET", "/v1/vms", &token, "").await.status, StatusCode::OK);
    let body = add("eve", "admin", 30).to_string();
    refused(&world, "POST", "/v1/tokens", &token, &body, 403, "forbidden").await;
    refused(&world, "GET", "/v1/tokens", &token, "", 403, "forbidden").await;
    refused(&world, "POST", "/v1/tokens/ann/revoke", &token, "", 403, "forbidden").await;
    let spec = vm_spec("vm", 1).to_string();
    assert_eq!(world.request("POST", "/v1/vms", &token, &spec).await.status, StatusCode::CREATED);
    let log = world.get("/v1/audit").await.to_string();
    assert!(log.contains("operator/ann from "), "{log}");
    // Neither it nor its hash is shown again, anywhere.
    let shown = world.get("/v1/tokens").await.to_string();
    assert!(shown.contains("ann") && !shown.contains("hash"), "{shown}");
    assert!(!shown.contains(&token) && !log.contains(&token));
    // It outlives the manager.
    world.kill();
    world.start();
    assert_eq!(world.request("GET", "/v1/vms", &token, "").await.status, StatusCode::OK);
    // Event streams that it opened end when it is revoked.
    let (stream, _connection) = world.open_events("/v1/events", &token).await;
    let left = world.ok("/v1/tokens/ann/revoke", &json!({})).await;
    assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
    refused(&world, "GET", "/v1/vms", &token, "", 401, "unauthenticated").await;
    World::told(stream, |_| false).await;
    for name in ["ann", "admin"] {
        let path = format!("/v1/tokens/{name}/revoke");
        refused(&world, "POST", &path, &admin, "", 400, "bad-request").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_are_defined_once_started_once_and_stopped() {
    let world = World::new();
    let token = world.token();
    let a = world.host("host-a").await;
    let vm = world.vm("vm", 1, "host-a").await;
    refused(&world, "POST", "/v1/vms", &token, &vm_spec("vm", 7).to_string(), 409, "already-exists").await;
    let start = json!({ "host": "host-a" }).to_string();
    refused(&world, "POST", "/v1/vms/vm/start", &token, &start, 409, "vm-already-running").await;
    world.ok("/v1/vms/vm/stop", &json!({})).await;
    assert!(world.physical.lock().unwrap().on(vm).is_empty());
    refused(&world, "POST", "/v1/vms/vm/stop", &token, "", 409, "vm-not-running").await;
    // A host that says no has none of it.
    a.manners.lock().unwrap().refuses = vec![("start-vm", "missing-program")];
    refused(&world, "POST", "/v1/vms/vm/start", &token, &start, 500, "missing-program").await;
    let view = world.get("/v1/vms/vm").await;
    assert_eq!((&view["state"], &view["host"]), (&json!("defined"), &Value::Null));
    a.manners.lock().unwrap().refuses.clear();
    let epoch = view["epoch"].as_u64().unwrap();
    let view = world.ok("/v1/vms/vm/start", &json!({ "host": "host-a" })).await;
    assert!(view["epoch"].as_u64().unwrap() > epoch, "every start has a fresh epoch");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_folder_a_taken_port_and_a_bad_policy_are_named() {
    let world = World::new();
    let other = tempfile::tempdir().unwrap();
    let folder = tokio::task::block_in_place(|| try_run(config(&world.state()))).unwrap_err();
    assert_eq!(folder.code, ErrorCode::WrongState);
    assert!(folder.detail.contains("another manager"), "{folder}");
    // Also by another folder's manager: a file has no leases that would tell them apart.
    let mut thief = config(&other.path().join("thief"));
    thief.registry = Some(world.state().join("registry.db").as_path().into());
    let file = tokio::task::block_in_place(|| try_run(thief)).unwrap_err();
    assert_eq!(file.code, ErrorCode::WrongState);
    assert!(file.detail.contains("another manager runs on the registry"), "{file}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config(&other.path().join("m"));
    config.hosts_listen = taken.local_addr().unwrap();
    let port = tokio::task::block_in_place(|| try_run(config.clone())).unwrap_err();
    assert_eq!(port.code, ErrorCode::AddressInUse);
    assert!(port.detail.contains(&taken.local_addr().unwrap().to_string()), "{port}");

    std::fs::write(
        other.path().join("p.cedar"),
        "permit (principal, action, resource) when { principal.rol == \"x\" };",
    )
    .unwrap();
    config.policy_folder = Some(other.path().to_owned());
    let policy = tokio::task::block_in_place(|| try_run(config)).unwrap_err();
    assert_eq!(policy.code, ErrorCode::BadConfiguration);
    assert!(policy.detail.contains("rol"), "{policy}");
    tokio::task::block_in_place(|| world.end()).unwrap();
}

/// The state folder on a file system that runs full: the manager stays up, refuses what it cannot write down, still
/// shows what it knows, and goes on when there is room again.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let mount = folder.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mut command = std::process::Command::new("mount");
    let mounted = command.args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&mount).status();
    if !mounted.is_ok_and(|s| s.success()) {
        skip("this user may not mount a tmpfs");
        return;
    }
    let unmount = Unmount(mount.clone());
    // The folder of the mount goes after it.
    let world = World::at(tempfile::tempdir().unwrap(), mount.join("m"));
    world.ok("/v1/vms", &vm_spec("vm", 1)).await;
    let ballast = mount.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    // What the write-ahead log has room for still goes in; then it is refused.
    let mut number = 1;
    let refused = loop {
        number += 1;
        let answer = world.post("/v1/vms", &vm_spec(&format!("vm-{number}"), number)).await;
        if !answer.status.is_success() {
            break answer;
        }
        assert!(number < 250, "the disk never filled");
    };
    assert_eq!((refused.status.as_u16(), refused.code()), (503, "registry-unavailable"), "{}", refused.body);
    assert!(refused.body["hint"].as_str().unwrap().contains("make room"));
    assert_eq!(world.request("GET", "/readyz", "", "").await.status, 503);
    assert_eq!(world.request("GET", "/healthz", "", "").await.status, 200);
    assert_eq!(world.get("/v1/vms").await.as_array().unwrap().len(), usize::from(number) - 1);
    std::fs::remove_file(&ballast).unwrap();
    drop(file);
    world.ok("/v1/vms", &vm_spec(&format!("vm-{number}"), number)).await;
    assert_eq!(world.get("/v1/audit/verify").await["verified"], true);
    drop(world);
    drop(unmount);
    folder.close().unwrap();
}

struct Unmount(std::path::PathBuf);
impl Drop for Unmount {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(done.is_ok_and(|s| s.success()), "cannot unmount {}", self.0.display());
    }
}
