//! Whole migrations between hosts without hypervisors.

use crate::fake_host::{FakeHost, Manners, abilities};
use crate::world::{World, intent};
use serde_json::{Value, json};
use std::sync::Arc;
use types::{MigrationId, VmId};

struct Pair {
    world: Arc<World>,
    a: Arc<FakeHost>,
    b: Arc<FakeHost>,
    vm: VmId,
}

async fn pair() -> Pair {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    Pair { world, a, b, vm }
}

impl Pair {
    fn manners(&self, change: impl Fn(&mut Manners)) {
        for host in [&self.a, &self.b] {
            change(&mut host.manners.lock().unwrap());
        }
    }

    async fn state_is(&self, id: &str, state: &str) {
        let path = format!("/v1/migrations/{id}");
        self.world
            .until(format!("{id} is {state}"), async || self.world.get(&path).await["state"] == state)
            .await;
    }

    async fn saw(&self, host: &FakeHost, order: &'static str) {
        self.world
            .until(format!("{} sees {order}", host.name), async || host.seen.lock().unwrap().contains(&order))
            .await;
    }
}

fn id(text: &str) -> MigrationId {
    text.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_moves_there_and_back_and_the_report_is_whole() {
    let p = pair().await;
    let since = std::time::Instant::now();
    for host in [&p.a, &p.b] {
        let name = host.name.clone();
        *host.on_step.lock().unwrap() = Some(Box::new(move |step| {
            println!("{:7.1} ms {name} {step}", since.elapsed().as_secs_f64() * 1000.0)
        }));
    }
    let m = p.world.migrate("vm", "host-b").await;
    let view = p.world.ended(&m).await;
    assert_eq!(view["state"], "completed", "{view}");
    p.world.check_settled(p.vm, "host-b").await;
    assert_eq!((&view["vm_runs_on"], &view["attestation"]), (&json!("host-b"), &json!("unattested")));
    assert_eq!(view["downtime_ms"], 12.5);
    assert_eq!(view["time_to_responsiveness_ms"], 1.5);
    assert_eq!(view["transferred_bytes"], 1100);
    assert_eq!(view["digests"]["match"], true);
    assert_eq!(view["channel"]["protocol"], "TLSv1.3");
    assert_eq!(view["downtime_parts"][0]["name"], "freeze");
    let stages: Vec<_> =
        view["stages"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(stages, ["setup", "memory-transfer", "switchover", "network-cleanup"]);
    assert!(view["total_ms"].as_f64().unwrap() >= view["request_to_running_ms"].as_f64().unwrap());
    assert!(view["permit_decision_ms"].as_f64().unwrap() > 0.0);
    println!("permit decision {} ms, stages {}", view["permit_decision_ms"], view["stages"]);
    assert!(view["permit"]["id"].as_str().unwrap().len() == 64);
    let back = p.world.migrate("vm", "host-a").await;
    assert_eq!(p.world.ended(&back).await["state"], "completed");
    p.world.check_settled(p.vm, "host-a").await;
    // The permit's audit entry is before anything that the permit let happen.
    let audit = p.world.get("/v1/audit").await;
    let of: Vec<_> =
        audit.as_array().unwrap().iter().filter(|e| e["detail"]["migration"] == m.as_str()).collect();
    let at =
        |action: &str| of.iter().position(|e| e["action"] == action).unwrap_or_else(|| panic!("{action}"));
    let order =
        ["migration.request", "migration.sign-request", "permit.issue", "permit.consume", "handover.commit"];
    assert!(order.windows(2).all(|w| at(w[0]) < at(w[1])), "{of:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_that_are_asked_for_are_in_the_permit_and_shown() {
    let p = pair().await;
    let ask = |channels: u16, compression: &str| {
        let mut body = intent("vm", "host-b");
        (body["channels"], body["compression"]) = (json!(channels), json!(compression));
        body
    };
    let too_many = p.world.post_owned("/v1/migrations", ask(17, "zstd")).await;
    assert_eq!(too_many.code(), "limit-reached");
    let unknown = p.world.post_owned("/v1/migrations", ask(2, "qpl")).await;
    assert_eq!(unknown.code(), "bad-request");
    let accepted = p.world.post_owned("/v1/migrations", ask(4, "zstd")).await;
    assert_eq!(accepted.status, 202);
    let m = accepted.body["id"].as_str().unwrap().to_owned();
    let view = p.world.ended(&m).await;
    assert_eq!(view["state"], "completed", "{view}");
    assert_eq!((&view["multifd_channels"], &view["compression"]), (&json!(4), &json!("zstd")));
    let audit = p.world.get("/v1/audit").await;
    let issued = audit.as_array().unwrap().iter().find(|e| e["action"] == "permit.issue").unwrap();
    let features = &issued["detail"]["features"];
    assert_eq!((&features["multifd_channels"], &features["compression"]), (&json!(4), &json!("zstd")));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twenty_requests_at_once_one_is_let_in() {
    let p = pair().await;
    p.manners(|m| m.flows = false);
    let tries = (0..20).map(|_| p.world.post_owned("/v1/migrations", intent("vm", "host-b")));
    let answers = futures::future::join_all(tries).await;
    let accepted = answers.iter().filter(|a| a.status == 202).count();
    let in_flight = answers.iter().filter(|a| a.code() == "migration-in-flight").count();
    assert_eq!((accepted, in_flight), (1, 19));
}

/// Either vote may come first.
async fn check_vote_order(first: fn(&Pair) -> &Arc<FakeHost>, second: fn(&Pair) -> &Arc<FakeHost>) {
    let p = pair().await;
    p.manners(|m| (m.source_votes, m.target_votes) = (false, false));
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "switchover").await;
    first(&p).vote(id(&m)).await;
    // One vote is not a decision.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(p.world.get(&format!("/v1/migrations/{m}")).await["state"], "switchover");
    second(&p).vote(id(&m)).await;
    assert_eq!(p.world.ended(&m).await["state"], "completed");
    p.world.check_settled(p.vm, "host-b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_votes_count_in_either_order() {
    check_vote_order(|p| &p.a, |p| &p.b).await;
    check_vote_order(|p| &p.b, |p| &p.a).await;
}

/// A gate behind the request refuses; nothing is left, and the VM runs where it ran.
async fn check_refusal(change: impl Fn(&mut Manners), state: &str, code: &str) -> Value {
    let p = pair().await;
    p.manners(&change);
    let m = p.world.migrate("vm", "host-b").await;
    let view = p.world.ended(&m).await;
    assert_eq!((&view["state"], &view["problem"]["code"]), (&json!(state), &json!(code)), "{view}");
    p.world.check_settled(p.vm, "host-a").await;
    p.saw(&p.b, "forget").await;
    // The VM is free for another try.
    p.manners(|m| *m = Manners::default());
    let again = p.world.migrate("vm", "host-b").await;
    assert_eq!(p.world.ended(&again).await["state"], "completed");
    p.world.check_settled(p.vm, "host-b").await;
    view
}

#[tokio::test(flavor = "multi_thread")]
async fn no_room_on_the_target_refuses() {
    let view = check_refusal(|m| m.available_bytes = 1 << 20, "refused", "insufficient-capacity").await;
    assert!(view["problem"]["detail"].as_str().unwrap().contains("by measurement"), "{view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_cannot_run_the_vm_refuses_before_anything_is_spawned() {
    let check = async |change: fn(&mut Manners), code: &str, part: &str| {
        let view = check_refusal(change, "refused", code).await;
        let detail = view["problem"]["detail"].as_str().unwrap();
        assert!(detail.contains(part), "{detail}");
    };
    check(
        |m| m.abilities = abilities("7.2.22", &["pc-q35-7.2", "pc-q35-6.2"], &["fpu", "sse2"]),
        "incompatible-target",
        "host host-b cannot run VM vm: machine pc-q35-10.0 is not known to its qemu/7.2.22; newest it knows: pc-q35-7.2",
    )
    .await;
    let unsaid = |m: &mut Manners| {
        m.abilities["cpu_features"] = Value::Null;
        m.abilities["cpu_missing"] = json!("it has no /dev/kvm");
    };
    check(unsaid, "incompatible-target", "the source cannot say which CPU features").await;
    check(|m| m.abilities = json!("none"), "incompatible-target", "cannot be read").await;
    check(
        |m| m.abilities["machines"] = json!(["m".repeat(300_000)]),
        "incompatible-target",
        "more of its QEMU than any QEMU can",
    )
    .await;
    // A daemon of an earlier version answers every unknown order so.
    check(|m| m.refuses = vec![("describe-hypervisor", "bad-request")], "incompatible-target", "cannot say")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cpu_features_that_only_the_source_has_are_named_by_the_dry_run_too() {
    let p = pair().await;
    p.a.manners.lock().unwrap().abilities =
        abilities("10.0.2", &["pc-q35-10.0"], &["fpu", "sse2", "sha-ni", "rdseed"]);
    let explained = p.world.ok("/v1/migrations/explain", &intent("vm", "host-b")).await;
    let gate = explained["gates"].as_array().unwrap().iter().find(|g| g["name"] == "compatibility").unwrap();
    assert_eq!((&gate["outcome"], &gate["code"]), (&json!("refused"), &json!("incompatible-target")));
    let text = "CPU qemu64 lacks features there that the guest has now: rdseed, sha-ni";
    assert!(gate["detail"].as_str().unwrap().contains(text), "{gate}");
    let m = p.world.migrate("vm", "host-b").await;
    assert_eq!(p.world.ended(&m).await["problem"]["code"], "incompatible-target");
    let spawned = |host: &FakeHost| host.seen.lock().unwrap().contains(&"spawn-agent");
    assert!(!spawned(&p.a) && !spawned(&p.b), "nothing was started for it");
    // The other way it fits: more on the target does no harm.
    p.world.vm("other", 2, "host-b").await;
    let m = p.world.migrate("other", "host-a").await;
    assert_eq!(p.world.ended(&m).await["state"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_does_not_measure_refuses() {
    check_refusal(|m| m.ignores = vec!["query-load"], "refused", "host-unreachable").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_agent_refuses() {
    check_refusal(|m| m.refuses = vec![("spawn-agent", "missing-program")], "refused", "missing-program")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_cannot_prepare_ends_it_on_the_source() {
    check_refusal(|m| m.refuses = vec![("prepare", "hypervisor-failed")], "failed", "hypervisor-failed")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_start_ends_it_on_the_source() {
    check_refusal(|m| m.refuses = vec![("start", "permit-refused")], "failed", "permit-refused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminate_in_flight_leaves_the_vm_on_the_source_within_a_second() {
    let p = pair().await;
    p.manners(|m| m.flows = false);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "memory-transfer").await;
    let since = std::time::Instant::now();
    p.world.ok(&format!("/v1/migrations/{m}/terminate"), &json!({})).await;
    p.saw(&p.a, "abort").await;
    assert!(since.elapsed().as_millis() < 1_000);
    let view = p.world.ended(&m).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("terminated"), &json!("terminated")),
        "{view}"
    );
    p.world.check_settled(p.vm, "host-a").await;
    let again = p.world.post(&format!("/v1/migrations/{m}/terminate"), &json!({})).await;
    assert_eq!(again.code(), "wrong-state");
}

#[tokio::test(flavor = "multi_thread")]
async fn suspend_holds_resume_goes_on_and_after_the_stop_suspend_means_abort() {
    let p = pair().await;
    p.manners(|m| m.flows = false);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "memory-transfer").await;
    let view = p.world.ok(&format!("/v1/migrations/{m}/suspend"), &json!({})).await;
    assert_eq!(view["suspended"], true);
    assert!(view["awaiting"].as_str().unwrap().contains("operator"), "{view}");
    let view = p.world.ok(&format!("/v1/migrations/{m}/resume"), &json!({})).await;
    assert_eq!(view["suspended"], false);
    p.manners(|m| m.source_votes = false);
    p.a.flow(id(&m)).await;
    p.state_is(&m, "switchover").await;
    p.world.ok(&format!("/v1/migrations/{m}/suspend"), &json!({})).await;
    assert_eq!(p.world.ended(&m).await["state"], "terminated");
    p.world.check_settled(p.vm, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_commit_it_is_too_late() {
    let p = pair().await;
    p.manners(|m| m.ignores = vec!["commit"]);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "committed").await;
    for order in ["terminate", "suspend"] {
        let answer = p.world.post(&format!("/v1/migrations/{m}/{order}"), &json!({})).await;
        assert_eq!(answer.code(), "too-late");
    }
    p.manners(|m| m.ignores.clear());
    assert_eq!(p.world.ended(&m).await["state"], "completed");
    p.world.check_settled(p.vm, "host-b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renunciation_frees_the_frozen_source_even_after_the_commit() {
    let p = pair().await;
    p.manners(|m| m.ignores = vec!["commit"]);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "committed").await;
    p.b.renounce(id(&m)).await;
    let view = p.world.ended(&m).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("failed"), &json!("target-failed")),
        "{view}"
    );
    p.world.check_settled(p.vm, "host-a").await;
    assert_eq!(p.world.get("/v1/vms/vm").await["host"], "host-a");
    // And it moves again, under fresh epochs.
    p.manners(|m| m.ignores.clear());
    let again = p.world.migrate("vm", "host-b").await;
    assert_eq!(p.world.ended(&again).await["state"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn terminate_after_the_source_s_vote_waits_for_the_renunciation() {
    let p = pair().await;
    p.manners(|m| m.target_votes = false);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "switchover").await;
    p.world
        .until("the vote is in", async || {
            p.world.get(&format!("/v1/migrations/{m}")).await["digests"]["source"].is_string()
        })
        .await;
    p.world.ok(&format!("/v1/migrations/{m}/terminate"), &json!({})).await;
    assert_eq!(p.world.ended(&m).await["state"], "terminated");
    assert!(p.a.seen.lock().unwrap().contains(&"renounced"), "the source was shown the proof");
    p.world.check_settled(p.vm, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ask_to_renounce_is_passed_on_only_while_the_source_asks() {
    let p = pair().await;
    p.manners(|m| m.target_votes = false);
    p.b.manners.lock().unwrap().ignores = vec!["abort"];
    let m = p.world.migrate("vm", "host-b").await;
    p.world
        .until("the vote is in", async || {
            p.world.get(&format!("/v1/migrations/{m}")).await["digests"]["source"].is_string()
        })
        .await;
    p.world.ok(&format!("/v1/migrations/{m}/terminate"), &json!({})).await;
    p.saw(&p.b, "renounce").await;
    p.a.vanish();
    p.world
        .until("the source is lost", async || p.world.get("/v1/hosts/host-a").await["state"] == "lost")
        .await;
    let count = |kind: &str| p.b.seen.lock().unwrap().iter().filter(|k| **k == kind).count();
    let (asks, aborts) = (count("renounce"), count("abort"));
    // The manager goes on with what the row says.
    p.world.until("the abort is repeated", async || count("abort") >= aborts + 3).await;
    assert_eq!(count("renounce"), asks, "nobody holds a copy that would be freed");
    p.a.attach();
    p.b.manners.lock().unwrap().ignores.clear();
    assert_eq!(p.world.ended(&m).await["state"], "terminated");
    p.world.check_settled(p.vm, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finding_of_the_inspector_terminates() {
    let p = pair().await;
    p.manners(|m| m.flows = false);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "memory-transfer").await;
    let finding = json!({
        "rule": "INV-R4", "threat": "MM-02", "severity": "critical", "channel": 0, "offset": 77, "section": "ram",
        "expected": "pc.ram", "found": "evil.ram", "response": "terminate",
    });
    p.b.event(id(&m), "finding", finding).await;
    let view = p.world.ended(&m).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("terminated"), &json!("stream-rejected")),
        "{view}"
    );
    assert_eq!(view["findings"][0]["rule"], "INV-R4");
    p.world.check_settled(p.vm, "host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_takes_no_part_cannot_speak_for_a_migration() {
    let p = pair().await;
    let stranger = p.world.host("host-c").await;
    p.manners(|m| m.flows = false);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "memory-transfer").await;
    stranger.event(id(&m), "failed", json!({ "code": "terminated", "detail": "no" })).await;
    stranger.event(id(&m), "stopped", json!({})).await;
    // What the stranger says after is handled after: its load is in.
    p.world.until("c is heard", async || p.world.get("/v1/hosts/host-c").await["state"] == "connected").await;
    p.a.flow(id(&m)).await;
    let view = p.world.ended(&m).await;
    assert_eq!(view["state"], "completed", "{view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_request_is_good_once_also_after_a_restart() {
    let p = pair().await;
    let m = p.world.migrate("vm", "host-b").await;
    assert_eq!(p.world.ended(&m).await["state"], "completed");
    p.world.kill();
    p.world.start();
    p.world.until("a is back", async || p.world.get("/v1/hosts/host-a").await["state"] == "connected").await;
    p.world
        .until("the replay is on record", async || {
            // The manager shows it as connected a moment before it can send.
            p.a.replay_request().await;
            let audit = p.world.get("/v1/audit").await;
            let refused = |e: &Value| {
                e["action"] == "migration.request-refused" && e["detail"]["code"] == "replayed-request"
            };
            audit.as_array().unwrap().iter().any(refused)
        })
        .await;
    assert_eq!(p.world.get("/v1/migrations").await.as_array().unwrap().len(), 1);
    p.world.check_settled(p.vm, "host-b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_hears_what_happens_and_who_comes_late_hears_what_happened() {
    let p = pair().await;
    let watching = Arc::clone(&p.world);
    let all = tokio::spawn(async move {
        watching.events("/v1/events", |text| text.contains("\"kind\":\"running\"")).await
    });
    // The stream is open before anything happens.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let m = p.world.migrate("vm", "host-b").await;
    p.world.ended(&m).await;
    let all = all.await.unwrap();
    for kind in ["connected", "progress", "stopped", "running"] {
        assert!(all.contains(&format!("\"kind\":\"{kind}\"")), "{kind}: {all}");
    }
    let path = format!("/v1/migrations/{m}/events");
    let late = p.world.events(&path, |text| text.contains("\"kind\":\"responsive\"")).await;
    assert!(late.contains("\"kind\":\"connected\"") && late.contains("event: migration"), "{late}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_meanwhile_is_failed_in_the_end() {
    let p = pair().await;
    p.manners(|m| m.flows = false);
    let m = p.world.migrate("vm", "host-b").await;
    p.state_is(&m, "memory-transfer").await;
    p.a.vm_died(p.vm).await;
    p.a.event(id(&m), "failed", json!({ "code": "hypervisor-failed", "detail": "QEMU died" })).await;
    let view = p.world.ended(&m).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("failed"), &json!("hypervisor-failed")),
        "{view}"
    );
    assert_eq!(p.world.get("/v1/vms/vm").await["state"], "failed");
}
