//! Starting a VM: whatever the host answers, or does not, it is never started on two hosts.

use crate::world::{World, vm_spec};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use types::VmId;

const VM: VmId = VmId::from_bytes([1; 16]);

async fn start(world: &World, host: &str) -> crate::world::Answer {
    world.post("/v1/vms/vm/start", &json!({ "host": host })).await
}

async fn is(world: &World, state: &str, host: Option<&str>) {
    let view = world.get("/v1/vms/vm").await;
    assert_eq!((&view["state"], &view["host"]), (&json!(state), &json!(host)), "{view}");
}

fn starts(host: &crate::fake_host::FakeHost) -> usize {
    host.seen.lock().unwrap().iter().filter(|order| **order == "start-vm").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_leaves_open_whether_it_runs_keeps_the_vm_where_it_is() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.ok("/v1/vms", &vm_spec("vm", 1)).await;
    for code in ["vm-already-running", "internal", "wrong-state", "source-failed", "of-a-later-version"] {
        a.manners.lock().unwrap().refuses = vec![("start-vm", code)];
        assert!(!start(&world, "host-a").await.status.is_success());
        is(&world, "starting", Some("host-a")).await;
        assert_eq!(start(&world, "host-b").await.code(), "vm-already-running", "after {code}");
        world.ok("/v1/vms/vm/stop", &json!({})).await;
        is(&world, "defined", None).await;
    }
    assert_eq!(starts(&b), 0);
    // It says that it started it, but not how: it runs there.
    a.manners.lock().unwrap().refuses.clear();
    a.manners.lock().unwrap().mumbles = true;
    let answer = start(&world, "host-a").await;
    assert!(!answer.status.is_success() && answer.body["hint"].as_str().unwrap().contains("vm stop"));
    is(&world, "starting", Some("host-a")).await;
    // A retry that is refused outright does not speak for the order before it.
    a.manners.lock().unwrap().refuses = vec![("start-vm", "bad-request")];
    assert_eq!(start(&world, "host-a").await.code(), "bad-request");
    is(&world, "starting", Some("host-a")).await;
    a.manners.lock().unwrap().refuses.clear();
    a.manners.lock().unwrap().mumbles = false;
    assert!(start(&world, "host-a").await.status.is_success());
    is(&world, "running", Some("host-a")).await;
    world.check_settled(VM, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_failed_is_gone_when_the_host_has_confirmed_it() {
    let world = World::new();
    let a = world.host("host-a").await;
    world.ok("/v1/vms", &vm_spec("vm", 1)).await;
    a.manners.lock().unwrap().refuses = vec![("start-vm", "hypervisor-failed"), ("stop-vm", "internal")];
    assert_eq!(start(&world, "host-a").await.code(), "hypervisor-failed");
    is(&world, "starting", Some("host-a")).await;
    a.manners.lock().unwrap().refuses = vec![];
    world.ok("/v1/vms/vm/stop", &json!({})).await;
    a.manners.lock().unwrap().refuses = vec![("start-vm", "hypervisor-failed")];
    assert_eq!(start(&world, "host-a").await.code(), "hypervisor-failed");
    is(&world, "defined", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_hangs_up_does_not_stop_the_start() {
    let world = World::new();
    let a = world.host("host-a").await;
    world.ok("/v1/vms", &vm_spec("vm", 1)).await;
    a.manners.lock().unwrap().delays = vec!["start-vm"];
    let (path, body) = ("/v1/vms/vm/start", json!({ "host": "host-a" }));
    tokio::select! {
        answer = world.post(path, &body) => panic!("answered already: {}", answer.body),
        () = world.until("the order is there", async || starts(&a) == 1) => {}
    }
    // The second order does not go out while the first is not answered, nor does an end.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(start(&world, "host-a").await.code(), "wrong-state");
    assert_eq!(world.post("/v1/vms/vm/stop", &json!({})).await.code(), "wrong-state");
    assert_eq!(starts(&a), 1);
    a.manners.lock().unwrap().delays.clear();
    world.until("it runs", async || world.get("/v1/vms/vm").await["state"] == "running").await;
    world.check_settled(VM, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_another_host_reports_is_not_started() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.ok("/v1/vms", &vm_spec("vm", 1)).await;
    b.vanish();
    world.until("b is gone", async || world.get("/v1/hosts/host-b").await["state"] == "lost").await;
    b.found(VM, 7);
    Arc::clone(&b).attach();
    world.until("b is back", async || world.get("/v1/hosts/host-b").await["state"] == "connected").await;
    let answer = start(&world, "host-a").await;
    assert_eq!(answer.code(), "vm-already-running", "{}", answer.body);
    assert!(answer.body["detail"].as_str().unwrap().contains("host-b"), "{}", answer.body);
    assert_eq!((starts(&a), world.get("/v1/vms/vm").await["host"].clone()), (0, Value::Null));
    // The way out that the hint names.
    assert!(start(&world, "host-b").await.status.is_success());
    world.ok("/v1/vms/vm/stop", &json!({})).await;
    assert!(start(&world, "host-a").await.status.is_success());
    world.check_settled(VM, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_moved_away_is_not_thought_to_be_there_still() {
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let id = world.migrate("vm", "host-b").await;
    assert_eq!(world.ended(&id).await["state"], "completed");
    world.ok("/v1/vms/vm/stop", &json!({})).await;
    let _c = world.host("host-c").await;
    let answer = start(&world, "host-c").await;
    assert!(answer.status.is_success(), "{}", answer.body);
    world.check_settled(vm, "host-c").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inspection_asks_the_vms_host_and_says_why_when_that_does_not_know() {
    let world = World::new();
    let a = world.host("host-a").await;
    world.ok("/v1/vms", &vm_spec("vm", 1)).await;
    let path = "/v1/vms/vm/inspection";
    let early = world.request("GET", path, &world.token(), "").await;
    assert_eq!(early.code(), "vm-not-running", "{}", early.body);
    assert!(start(&world, "host-a").await.status.is_success());
    let shown = world.get(path).await;
    assert_eq!(shown["enrolment"]["catalogue"]["machine"], "pc-q35-10.0", "{shown}");
    assert_eq!((&shown["host"], &shown["catalogue_missing"]), (&json!("host-a"), &Value::Null));
    a.manners.lock().unwrap().refuses = vec![("inspect-vm", "hypervisor-failed")];
    let shown = world.get(path).await;
    assert_eq!(shown["enrolment"]["catalogue"], Value::Null);
    assert!(shown["catalogue_missing"].as_str().unwrap().contains("host-a"), "{shown}");
    // Where it stands still it is told from the record alone.
    world.ok("/v1/vms/vm/stop", &json!({})).await;
    let shown = world.get(path).await;
    assert!(shown["enrolment"]["inventory"]["ram_blocks"].is_array(), "{shown}");
    assert!(shown["catalogue_missing"].as_str().unwrap().contains("no host"), "{shown}");
}
