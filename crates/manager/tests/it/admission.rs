//! Room on a target: who gets it when many ask at once, and that a grant is whole or not there.

use crate::fake_host::{FakeHost, Manners};
use crate::postgres::Cluster;
use crate::skip;
use crate::world::{VM_BYTES, World, host_spec, intent};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use types::VmId;

/// Requests at once.
const REQUESTS: u8 = 12;
/// For how many of them the target has room.
const ROOM: usize = 3;

/// Twelve VMs on one host, and a target that holds three of them.
async fn crowd(world: &Arc<World>) -> [Arc<FakeHost>; 2] {
    crowd_on(world, ROOM).await
}

async fn crowd_on(world: &Arc<World>, vms: usize) -> [Arc<FakeHost>; 2] {
    let mut wide = host_spec("host-a");
    wide["capacity"] = json!({ "memory_bytes": 64_u64 << 30, "vcpus": 64, "vms": 64 });
    let mut narrow = host_spec("host-b");
    narrow["capacity"] = json!({ "memory_bytes": 64_u64 << 30, "vcpus": 64, "vms": vms });
    let hosts = [world.host_of("host-a", wide).await, world.host_of("host-b", narrow).await];
    for host in &hosts {
        host.manners.lock().unwrap().flows = false;
    }
    for number in 1..=REQUESTS {
        world.vm(&format!("vm-{number}"), number, "host-a").await;
    }
    hosts
}

async fn ask_at_once(world: &Arc<World>) {
    let names: Vec<_> = (1..=REQUESTS).map(|number| format!("vm-{number}")).collect();
    let asked = names.iter().map(|vm| world.post_owned("/v1/migrations", intent(vm, "host-b")));
    for answer in futures::future::join_all(asked).await {
        assert_eq!(answer.status, 202, "{}", answer.body);
    }
}

/// How many migrations are in each state, with the code of their problem.
async fn tally(world: &Arc<World>) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for view in world.get("/v1/migrations").await.as_array().unwrap() {
        let code = view["problem"]["code"].as_str().unwrap_or("-");
        *tally.entry(format!("{} {code}", view["state"].as_str().unwrap())).or_default() += 1;
    }
    tally
}

async fn decided(world: &Arc<World>) -> BTreeMap<String, usize> {
    let undecided = ["requested", "deciding", "setup"];
    world
        .until("all are decided", async || {
            let tally = tally(world).await;
            tally.values().sum::<usize>() == usize::from(REQUESTS)
                && !tally.keys().any(|k| undecided.iter().any(|u| k.starts_with(u)))
        })
        .await;
    tally(world).await
}

/// Permit, reservation and audit entry are there together, for exactly as many as there is room.
async fn check_whole(world: &Arc<World>) {
    let audit = world.get("/v1/audit").await;
    let issued = audit.as_array().unwrap().iter().filter(|e| e["action"] == "permit.issue").count();
    let migrations = world.get("/v1/migrations").await;
    let permits = migrations.as_array().unwrap().iter().filter(|m| m["permit"]["id"].is_string()).count();
    let metrics = world.get("/metrics").await;
    assert_eq!((issued, permits), (ROOM, ROOM));
    let reserved = format!("outrider_reservations {ROOM}\n");
    assert!(metrics.as_str().unwrap().contains(&reserved), "{metrics}");
    assert_eq!(world.get("/v1/audit/verify").await["verified"], true);
}

async fn twelve_for_three(world: Arc<World>) {
    let _hosts = crowd(&world).await;
    ask_at_once(&world).await;
    let expect = BTreeMap::from([
        ("memory-transfer -".to_owned(), ROOM),
        ("refused insufficient-capacity".to_owned(), usize::from(REQUESTS) - ROOM),
    ]);
    assert_eq!(decided(&world).await, expect);
    check_whole(&world).await;
    // Those that were refused say why, and each of them may be asked for again once there is room.
    let migrations = world.get("/v1/migrations").await;
    let refused = |m: &&Value| m["state"] == "refused";
    for view in migrations.as_array().unwrap().iter().filter(refused) {
        let detail = view["problem"]["detail"].as_str().unwrap();
        assert!(detail.contains("it carries 3 guests, 3 are enrolled"), "{detail}");
    }
    let open = migrations.as_array().unwrap().iter().find(|m| m["state"] == "memory-transfer").unwrap();
    let id = open["id"].as_str().unwrap().to_owned();
    world.ok(&format!("/v1/migrations/{id}/terminate"), &json!({})).await;
    world.ended(&id).await;
    let again = migrations.as_array().unwrap().iter().find(refused).unwrap()["vm"].as_str().unwrap();
    let id = world.migrate(again, "host-b").await;
    let path = format!("/v1/migrations/{id}");
    world.until("it moves", async || world.get(&path).await["state"] == "memory-transfer").await;
}

/// The manager is killed in the middle of the decisions: what it left is whole, and the room is not given out twice.
async fn killed_meanwhile(world: Arc<World>, after_ms: u64) {
    let _hosts = crowd(&world).await;
    ask_at_once(&world).await;
    tokio::time::sleep(std::time::Duration::from_millis(after_ms)).await;
    tokio::task::block_in_place(|| {
        world.kill();
        world.start();
    });
    let decided = decided(&world).await;
    let granted: usize =
        decided.iter().filter(|(k, _)| k.starts_with("memory-transfer")).map(|(_, n)| n).sum();
    let short = decided.get("refused insufficient-capacity").copied().unwrap_or_default();
    println!("killed {after_ms} ms after the requests: {decided:?}");
    // A decision that found no hosts, because they had not come back, is refused for that.
    assert!(granted <= ROOM && short <= usize::from(REQUESTS) - ROOM, "{decided:?}");
    let audit = world.get("/v1/audit").await;
    let issued = audit.as_array().unwrap().iter().filter(|e| e["action"] == "permit.issue").count();
    let metrics = world.get("/metrics").await;
    assert!(issued <= ROOM && granted <= issued, "{decided:?}, {issued} issued");
    assert!(metrics.as_str().unwrap().contains(&format!("outrider_reservations {granted}\n")), "{metrics}");
    assert_eq!(world.get("/v1/audit/verify").await["verified"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twelve_requests_for_a_host_that_fits_three_exactly_three_get_a_permit() {
    twelve_for_three(World::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_twelve_requests_three_get_a_permit_also_on_postgresql() {
    let Ok(cluster) = Cluster::start().inspect_err(|why| skip::skip(why)) else { return };
    cluster.sql("postgres", "CREATE DATABASE registry");
    twelve_for_three(World::sharing("one", &cluster.url("registry"))).await;
    let held = |sql: &str| cluster.sql("registry", sql);
    // One transaction: none of the four without the others (the one that was terminated kept its permit).
    assert_eq!(held("SELECT count(*) FROM reservations"), "3");
    assert_eq!(held("SELECT count(*) FROM permits"), "4");
    assert_eq!(held("SELECT count(*) FROM audit WHERE action = 'permit.issue'"), "4");
    assert_eq!(held("SELECT count(*) FROM migrations WHERE is_open = 1"), "3");
    let unpaired = "SELECT count(*) FROM reservations r LEFT JOIN permits p ON p.migration = r.migration \
                    LEFT JOIN migrations m ON m.id = r.migration AND m.is_open = 1 \
                    WHERE p.nonce IS NULL OR m.id IS NULL";
    assert_eq!(held(unpaired), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_is_killed_in_its_decisions_gives_no_room_out_twice() {
    for after_ms in [1, 15, 60] {
        killed_meanwhile(World::new(), after_ms).await;
    }
}

/// Room by measurement alone: what is reserved is not there for others, before and after it is taken.
#[tokio::test(flavor = "multi_thread")]
async fn of_twelve_requests_for_measured_memory_of_three_exactly_three_get_a_permit() {
    let world = World::new();
    let [a, b] = crowd_on(&world, 64).await;
    for host in [&a, &b] {
        host.manners.lock().unwrap().takes_memory = true;
    }
    // Three guests with their tenth of head-room, and less than a fourth.
    b.manners.lock().unwrap().available_bytes = VM_BYTES * 36 / 10;
    ask_at_once(&world).await;
    let expect = BTreeMap::from([
        ("memory-transfer -".to_owned(), ROOM),
        ("refused insufficient-capacity".to_owned(), usize::from(REQUESTS) - ROOM),
    ]);
    assert_eq!(decided(&world).await, expect);
    check_whole(&world).await;
}

/// A claim of the target that is refused, with part of the reason.
async fn check_claim(change: impl Fn(&FakeHost), part: &str) {
    let world = World::new();
    let (_a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    world.vm("there", 2, "host-b").await;
    change(&b);
    let explained = world.ok("/v1/migrations/explain", &intent("vm", "host-b")).await;
    let refused = |gate: &&Value| gate["outcome"] == "refused";
    let gate = explained["gates"].as_array().unwrap().iter().find(refused).expect("a gate refuses").clone();
    let m = world.migrate("vm", "host-b").await;
    let view = world.ended(&m).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("refused"), &json!("insufficient-capacity"))
    );
    for detail in [&view["problem"]["detail"], &gate["detail"]] {
        assert!(detail.as_str().unwrap().contains(part), "{detail} does not say {part:?}");
    }
    assert!(!b.seen.lock().unwrap().contains(&"spawn-agent"), "nothing was started for it");
}

fn claims(key: &'static str, value: Value) -> impl Fn(&FakeHost) {
    move |host| host.manners.lock().unwrap().claims.push((key, value.clone()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_contradicts_its_record_or_the_registry_is_not_believed() {
    let twice = VmId::from_bytes([9; 16]);
    check_claim(claims("memory_available_bytes", json!(64_u64 << 30)), "more than 1000 % of the 4294967296")
        .await;
    check_claim(|b| b.found(twice, 1), "runs 1 guests that the registry does not place there").await;
    let hides = |b: &FakeHost| b.manners.lock().unwrap().hides.push(VmId::from_bytes([2; 16]));
    check_claim(hides, "does not run 1 of the guests that the registry places there").await;
    check_claim(claims("running", Value::Null), "does not say which guests run there").await;
    check_claim(claims("cpu_cores_used", json!(99.0)), "claims to use 99.0 of 4.0 CPUs").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_strained_or_does_not_measure_takes_no_guest() {
    check_claim(claims("memory_pressure_percent", json!(40.0)), "memory pressure is 40 %").await;
    check_claim(claims("cpu_pressure_percent", json!(91.0)), "CPU pressure is 91 %").await;
    check_claim(claims("cpu_cores_used", json!(4.0)), "use of its CPUs is 100 %").await;
    check_claim(claims("cpu_pressure_percent", Value::Null), "does not measure the CPU pressure").await;
    check_claim(claims("link", Value::Null), "does not measure the use of its migration link").await;
    let link = json!({
        "interface": "eth0", "received_bytes_per_s": 120e6, "sent_bytes_per_s": 1.0, "capacity_bytes_per_s": 125e6,
    });
    check_claim(claims("link", link), "use of its migration link is 96 %").await;
}

/// A guest that is being stopped while the target is asked is no contradiction.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_come_and_go_meanwhile_contradict_nothing() {
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    world.ok("/v1/vms", &crate::world::vm_spec("there", 2)).await;
    let churn = async {
        for _ in 0..30 {
            world.ok("/v1/vms/there/start", &json!({ "host": "host-b" })).await;
            world.ok("/v1/vms/there/stop", &json!({})).await;
        }
    };
    let moves = async {
        for target in ["host-b", "host-a"].into_iter().cycle().take(10) {
            let m = world.migrate("vm", target).await;
            let view = world.ended(&m).await;
            assert_eq!(view["state"], "completed", "{view}");
        }
    };
    tokio::join!(churn, moves);
}

/// What the target does in its probe is refused, with part of the reason.
async fn check_probe(change: impl Fn(&mut Manners), part: &str) {
    let world = World::new();
    let (_a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    change(&mut b.manners.lock().unwrap());
    let view = world.ended(&world.migrate("vm", "host-b").await).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("refused"), &json!("insufficient-capacity"))
    );
    let detail = view["problem"]["detail"].as_str().unwrap();
    assert!(detail.contains(part), "{detail} does not say {part:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_cannot_do_a_moments_work_gets_no_permit() {
    check_probe(|m| m.probe["touch_us"] = json!(900_000), "touched memory at 36 MiB/s").await;
    check_probe(|m| m.probe["cpu_us"] = json!(100), "it got 2 % of a CPU").await;
    check_probe(|m| m.probe["touched_bytes"] = json!(4096), "touched 4096 of the 33554432 bytes").await;
    check_probe(|m| m.probe = json!("x".repeat(9_999)), "longer than five numbers").await;
    check_probe(|m| m.probe = json!({}), "cannot be read").await;
    check_probe(|m| m.refuses = vec![("micro-probe", "bad-request")], "micro-probe of host host-b").await;
    check_probe(|m| m.ignores = vec!["micro-probe"], "did not answer micro-probe within").await;
}

/// A probe that lost its CPU to the scheduler is repeated.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_was_unlucky_once_is_asked_again() {
    let world = World::new();
    let (_a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    b.manners.lock().unwrap().probe["cpu_us"] = json!(2);
    let (seen, own) = (Arc::new(AtomicUsize::new(0)), Arc::downgrade(&b));
    let count = Arc::clone(&seen);
    *b.on_step.lock().unwrap() = Some(Box::new(move |step| {
        if step == "micro-probe" && count.fetch_add(1, Ordering::Relaxed) == 1 {
            own.upgrade().unwrap().manners.lock().unwrap().probe["cpu_us"] = json!(4_900);
        }
    }));
    assert_eq!(world.ended(&world.migrate("vm", "host-b").await).await["state"], "completed");
    assert_eq!(seen.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_is_held_against_what_it_did_before() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    for target in ["host-b", "host-a"].into_iter().cycle().take(12) {
        assert_eq!(world.ended(&world.migrate("vm", target).await).await["state"], "completed");
    }
    for host in [&a, &b] {
        host.manners.lock().unwrap().probe["work_units"] = json!(100);
    }
    let view = world.ended(&world.migrate("vm", "host-b").await).await;
    let detail = view["problem"]["detail"].as_str().unwrap();
    assert!(detail.contains("it did 20 units of work per millisecond; it did 1000 before"), "{detail}");
}

/// A transfer that goes on.
async fn transfer(world: &Arc<World>) -> (Arc<FakeHost>, Arc<FakeHost>, String) {
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    a.manners.lock().unwrap().flows = false;
    let m = world.migrate("vm", "host-b").await;
    let path = format!("/v1/migrations/{m}");
    world.until("it moves", async || world.get(&path).await["state"] == "memory-transfer").await;
    (a, b, m)
}

/// The source's word that the stream is near its end.
async fn near_end(source: &FakeHost, m: &str) {
    let (total, left) = (VM_BYTES, VM_BYTES / 8);
    let detail =
        json!({ "stream_bytes": total - left, "ram_total_bytes": total, "ram_remaining_bytes": left });
    source.event(m.parse().unwrap(), "progress", detail).await;
}

fn asked(host: &FakeHost) -> usize {
    host.seen.lock().unwrap().iter().filter(|order| **order == "query-load").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn near_the_end_the_target_is_looked_at_again_and_never_in_the_downtime() {
    let world = World::new();
    let (a, b, m) = transfer(&world).await;
    a.manners.lock().unwrap().source_votes = false;
    world.until("it is looked at once more as the stream flows", async || asked(&b) == 2).await;
    near_end(&a, &m).await;
    world.until("it is looked at again", async || asked(&b) == 3).await;
    // Fresh: not again at once.
    near_end(&a, &m).await;
    a.flow(m.parse().unwrap()).await;
    let path = format!("/v1/migrations/{m}");
    world.until("the guest has stopped", async || world.get(&path).await["state"] == "switchover").await;
    // Strain that comes now ends nothing, and nobody asks.
    b.manners.lock().unwrap().claims = vec![("memory_pressure_percent", json!(99.0))];
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(asked(&b), 3, "the guest stands still: nothing is asked");
    a.vote(m.parse().unwrap()).await;
    assert_eq!(world.ended(&m).await["state"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_cannot_hold_the_guest_any_more_loses_it_before_the_freeze() {
    for (claim, part) in [
        (("memory_available_bytes", json!(1 << 20)), "by measurement"),
        (("memory_full_pressure_percent", json!(50.0)), "full memory pressure is above"),
        (("cpu_pressure_percent", json!(96.0)), "CPU pressure is 96 %, 95 % is the limit"),
        (("running", json!([VmId::from_bytes([7; 16])])), "is not believed"),
    ] {
        let world = World::new();
        let (a, b, m) = transfer(&world).await;
        b.manners.lock().unwrap().claims = vec![claim];
        near_end(&a, &m).await;
        let view = world.ended(&m).await;
        assert_eq!(
            (&view["state"], &view["problem"]["code"]),
            (&json!("failed"), &json!("insufficient-capacity"))
        );
        assert!(view["problem"]["detail"].as_str().unwrap().contains(part), "{view}");
        assert!(!b.seen.lock().unwrap().contains(&"commit"), "it was never told to run");
        let audit = world.get("/v1/audit").await;
        assert!(audit.as_array().unwrap().iter().any(|e| e["action"] == "migration.look-again"), "{audit}");
        world.check_settled(VmId::from_bytes([1; 16]), "host-a").await;
    }
}

/// A transfer keeps the target's CPUs and link busy: that alone ends none.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_transfer_itself_takes_does_not_end_it() {
    let world = World::new();
    let (a, b, m) = transfer(&world).await;
    let link = json!({
        "interface": "eth0", "received_bytes_per_s": 125e6, "sent_bytes_per_s": 1.0, "capacity_bytes_per_s": 125e6,
    });
    b.manners.lock().unwrap().claims =
        vec![("cpu_cores_used", json!(4.0)), ("cpu_pressure_percent", json!(94.0)), ("link", link)];
    near_end(&a, &m).await;
    world.until("it is looked at again", async || asked(&b) == 2).await;
    a.flow(m.parse().unwrap()).await;
    assert_eq!(world.ended(&m).await["state"], "completed");
}
