//! The manager is killed at every step of a migration, and started again on the same folder. Whatever happens, one
//! copy runs in the end, never two, nothing is left over, and the audit log is whole.

use crate::fake_host::FakeHost;
use crate::world::{World, intent, vm_spec};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Kills the manager at the step of this number (orders and statements of both hosts, as they come); returns whether
/// there was one.
async fn check(step: usize) -> bool {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let (counter, reached) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    for host in [&a, &b] {
        hook(host, &counter, &reached, step);
    }
    let m = world.migrate("vm", "host-b").await;
    let path = format!("/v1/migrations/{m}");
    tokio::select! {
        () = reached.notified() => tokio::task::block_in_place(|| {
            world.kill();
            world.start();
        }),
        () = async { world.ended(&m).await; } => {}
    }
    let view = world.ended(&m).await;
    let state = view["state"].as_str().unwrap();
    let on = if state == "completed" { "host-b" } else { "host-a" };
    // The receipts are in; what a host still does with its answer takes a moment.
    world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == [on]).await;
    world.check_settled(vm, on).await;
    assert_eq!(world.get("/v1/vms/vm").await["host"], on, "step {step}: {view}");
    println!("step {step}: {state} {}", view["problem"]);
    // Every step but those of the decision itself is gone through by the restarted manager to the good end.
    if state != "completed" {
        assert_eq!(state, "refused", "step {step}: {view}");
    }
    assert!(world.get(&path).await["ended_at"].is_string());
    counter.load(Ordering::SeqCst) > step
}

/// Kills the manager this long after the request, wherever that is: also between two lines of a decision.
async fn check_moment(after: Duration) {
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let m = world.migrate("vm", "host-b").await;
    tokio::time::sleep(after).await;
    tokio::task::block_in_place(|| {
        world.kill();
        world.start();
    });
    let view = world.ended(&m).await;
    let on = if view["state"] == "completed" { "host-b" } else { "host-a" };
    world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == [on]).await;
    world.check_settled(vm, on).await;
    assert!(view["state"] == "completed" || view["state"] == "refused", "{after:?}: {view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_killed_at_any_moment_goes_on_where_the_rows_stand() {
    for moment in 0..20 {
        check_moment(Duration::from_millis(moment * 4)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_is_told_to_end_does_so_with_hosts_attached() {
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let since = Instant::now();
    tokio::task::block_in_place(|| world.end()).unwrap();
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_source_that_was_away_is_freed_when_it_is_back() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    b.manners.lock().unwrap().target_votes = false;
    let m = world.migrate("vm", "host-b").await;
    let path = format!("/v1/migrations/{m}");
    world.until("the source voted", async || world.get(&path).await["digests"]["source"].is_string()).await;
    a.vanish();
    world.ok(&format!("{path}/terminate"), &serde_json::json!({})).await;
    world
        .until("only the source is awaited", async || {
            world.get(&path).await["awaiting"].as_str().unwrap().starts_with("host-a to let the guest run")
        })
        .await;
    assert!(
        world.physical.lock().unwrap().on(vm).is_empty(),
        "it is frozen until it hears of the renunciation"
    );
    a.attach();
    assert_eq!(world.ended(&m).await["state"], "terminated");
    world.check_settled(vm, "host-a").await;
}

fn hook(host: &FakeHost, counter: &Arc<AtomicUsize>, reached: &Arc<Notify>, step: usize) {
    let (counter, reached) = (Arc::clone(counter), Arc::clone(reached));
    *host.on_step.lock().unwrap() = Some(Box::new(move |_| {
        if counter.fetch_add(1, Ordering::SeqCst) == step {
            reached.notify_one();
        }
    }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_killed_at_any_step_goes_on_where_the_rows_stand() {
    let mut step = 0;
    while check(step).await {
        step += 1;
        assert!(step < 60, "a migration has not so many steps");
    }
    assert!(step >= 10, "only {step} steps were seen");
}

/// The database is put back to an older one under the anchor: what it remembers decides nothing any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_was_set_back_grants_and_starts_nothing_new() {
    let world = World::new();
    let (a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    a.manners.lock().unwrap().flows = false;
    let m = world.migrate("vm", "host-b").await;
    let path = format!("/v1/migrations/{m}");
    world.until("it flows", async || world.get(&path).await["state"] == "memory-transfer").await;
    let (registry, backup) = (world.state().join("registry.db"), world.state().join("backup.db"));
    tokio::task::block_in_place(|| world.end()).unwrap();
    std::fs::copy(&registry, &backup).unwrap();
    tokio::task::block_in_place(|| world.start());
    world.ok("/v1/vms", &vm_spec("other", 2)).await;
    tokio::task::block_in_place(|| world.end()).unwrap();
    for ending in ["-wal", "-shm"] {
        drop(std::fs::remove_file(world.state().join(format!("registry.db{ending}"))));
    }
    std::fs::copy(&backup, &registry).unwrap();
    let anchor = std::fs::read(world.state().join("audit.anchor")).unwrap();

    // It stays so over restarts, however much is appended meanwhile.
    for _ in 0..2 {
        tokio::task::block_in_place(|| world.start());
        world.until("a is back", async || world.get("/v1/hosts/host-a").await["state"] == "connected").await;
        let answer = world.post("/v1/migrations", &intent("vm", "host-b")).await;
        assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
        assert!(answer.body["hint"].as_str().unwrap().contains("audit reconcile"), "{}", answer.body);
        let answer = world.post("/v1/vms/vm/start", &json!({ "host": "host-b" })).await;
        assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
        let audit = world.get("/v1/audit").await;
        let distrust =
            audit.as_array().unwrap().iter().rfind(|e| e["action"] == "registry.distrust").cloned();
        assert_eq!(distrust.unwrap()["detail"]["migrations"], json!([m]));
        assert_eq!(world.physical.lock().unwrap().on(vm), ["host-a"], "what runs is left alone");
        tokio::task::block_in_place(|| world.end()).unwrap();
        assert_eq!(std::fs::read(world.state().join("audit.anchor")).unwrap(), anchor);
    }
    // Not even without the anchor is it forgotten: the registry's own row says so.
    std::fs::remove_file(world.state().join("audit.anchor")).unwrap();
    tokio::task::block_in_place(|| world.start());
    let answer = world.post("/v1/vms/vm/start", &json!({ "host": "host-b" })).await;
    assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
}

/// An older state takes the database's place under a manager that runs: a replica that lagged behind, or a restored server.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_set_back_under_a_running_manager_is_noticed() {
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    // The manager has seen the log up to here.
    assert_eq!(world.get("/v1/audit/verify").await["verified"], true);
    cut_last_audit_entry(&world).await;
    // Others follow in the place of the one that is gone.
    world.ok("/v1/vms", &vm_spec("other", 2)).await;
    world.ok("/v1/vms", &vm_spec("third", 3)).await;
    let refused = async || {
        let answer = world.post("/v1/vms/other/start", &json!({ "host": "host-b" })).await;
        answer.code() == "audit-broken"
    };
    world.until("it decides nothing new", refused).await;
    let answer = world.post("/v1/migrations", &intent("vm", "host-b")).await;
    assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
    let noted = async || world.get("/v1/audit").await.to_string().contains("registry.distrust");
    world.until("it is written down", noted).await;
}

async fn cut_last_audit_entry(world: &World) {
    use sqlx::Connection as _;
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", world.state().join("registry.db").display());
    let mut connection = sqlx::AnyConnection::connect(&url).await.unwrap();
    for change in [
        "DELETE FROM audit WHERE sequence = (SELECT sequence FROM audit_head)",
        "UPDATE audit_head SET hash = (SELECT hash FROM audit ORDER BY sequence DESC LIMIT 1), \
         sequence = sequence - 1",
    ] {
        sqlx::query(change).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
}
