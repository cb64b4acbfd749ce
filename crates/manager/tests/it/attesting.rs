//! Hosts with a TPM: who is let in, what a permit demands of them, and what is said of those that fail.

use crate::fake_host::{FakeHost, Join};
use crate::fake_tpm::{Candour, FakeTpm};
use crate::skip::skip;
use crate::world::{World, host_spec, intent};
use serde_json::{Value, json};
use std::sync::Arc;
use tonic::Code;

pub(crate) fn ready() -> bool {
    match attest::testkit::missing() {
        None => true,
        Some(reason) => {
            skip(&reason);
            false
        }
    }
}

fn spec(name: &str, tpm: &Value) -> Value {
    let mut spec = host_spec(name);
    spec["tpm"] = tpm.clone();
    spec
}

async fn token(world: &World, name: &str, tpm: &Value) -> String {
    world.ok("/v1/hosts", &spec(name, tpm)).await["join_token"].as_str().unwrap().to_owned()
}

/// A host that joined with its TPM, whose state then became its reference.
pub(crate) async fn attested(world: &Arc<World>, name: &str) -> Arc<FakeHost> {
    let tpm = Arc::new(FakeTpm::start());
    let record = json!({ "ek_name": tpm.ek_name(), "record_pcrs": [0, 4, 7] });
    let token = token(world, name, &record).await;
    let host = FakeHost::join_as(world, Join::with_tpm(name, &token, &tpm)).await.unwrap();
    host.attach();
    world
        .until(format!("{name} is connected"), async || {
            world.get(&format!("/v1/hosts/{name}")).await["state"] == "connected"
        })
        .await;
    host
}

async fn refused_join(world: &World, join: &Join, code: Code, part: &str) {
    let port = world.hosts_port.lock().unwrap().unwrap();
    let status = join.send(port).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(status.message().contains(part), "expected {part:?}: {}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_tpm_of_the_record_joins() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (own, other) = (Arc::new(FakeTpm::start()), Arc::new(FakeTpm::start()));
    let record = json!({ "ek_name": own.ek_name(), "record_pcrs": [0, 7] });
    let token = token(&world, "host-a", &record).await;

    let bare = Join::new("host-a", &token);
    refused_join(&world, &bare, Code::PermissionDenied, "names a TPM, and the host shows none").await;
    let stranger = Join::with_tpm("host-a", &token, &other);
    refused_join(&world, &stranger, Code::PermissionDenied, "not the one of the host's record").await;
    // It shows the right key, which it does not have.
    let mut pretender = Join::with_tpm("host-a", &token, &own);
    pretender.answers = Some(Arc::clone(&other));
    refused_join(&world, &pretender, Code::PermissionDenied, "did not open the credential").await;
    let mut relayed = Join::with_tpm("host-a", &token, &own);
    relayed.relayed = true;
    refused_join(&world, &relayed, Code::PermissionDenied, "attest-wrong-binding").await;
    assert_eq!(world.get("/v1/hosts/host-a").await["attestation"], "unproved");

    // None of that used the token up.
    FakeHost::join_as(&world, Join::with_tpm("host-a", &token, &own)).await.unwrap();
    let host = world.get("/v1/hosts/host-a").await;
    assert_eq!(
        (&host["attestation"], &host["platform"]["ek_name"]),
        (&json!("trusted"), &json!(own.ek_name()))
    );
    assert_eq!(world.get("/v1/references").await[0]["scope"], "host/host-a");
    let audit = world.get("/v1/audit").await;
    let refused = audit.as_array().unwrap().iter().filter(|e| e["action"] == "host.join-refused").count();
    assert_eq!(refused, 4, "{audit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_can_not_work_is_refused_at_once() {
    let world = World::new();
    for (tpm, part) in [
        (json!({}), "either ek_name or vendor_roots"),
        (json!({ "ek_name": "00", "vendor_roots": ["AA=="] }), "either ek_name or vendor_roots"),
        (json!({ "ek_name": "zz" }), "tpm:"),
        (json!({ "ek_name": "000b" }), "tpm:"),
        (json!({ "vendor_roots": ["!"] }), "tpm:"),
        (json!({ "ek_name": format!("000b{}", "ab".repeat(32)), "record_pcrs": [24] }), "no PCR 24"),
    ] {
        let answer = world.post("/v1/hosts", &spec("host-a", &tpm)).await;
        assert_eq!(answer.code(), "bad-request", "{tpm}: {}", answer.body);
        assert!(answer.body["detail"].as_str().unwrap().contains(part), "{tpm}: {}", answer.body);
    }
    let name = format!("000b{}", "ab".repeat(32));
    let token = token(&world, "host-a", &json!({ "ek_name": name, "class": "rack" })).await;
    if !ready() {
        return;
    }
    let join = Join::with_tpm("host-a", &token, &Arc::new(FakeTpm::start()));
    refused_join(&world, &join, Code::PermissionDenied, "no reference values for host host-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permit_names_the_quotes_of_both_hosts() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (_a, _b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    let vm = world.vm("vm-1", 1, "host-a").await;
    let dry = world.ok("/v1/migrations/explain", &intent("vm-1", "host-b")).await;
    assert_eq!(dry["allowed"], true, "{dry}");
    let id = world.migrate("vm-1", "host-b").await;
    let view = world.ended(&id).await;
    assert_eq!((&view["state"], &view["attestation"]), (&json!("completed"), &json!("attested")), "{view}");
    world.check_settled(vm, "host-b").await;
    let audit = world.get("/v1/audit").await;
    let issued = audit.as_array().unwrap().iter().find(|e| e["action"] == "permit.issue").unwrap();
    for side in ["source", "target"] {
        assert_eq!(issued["detail"]["attestation"][side].as_str().unwrap().len(), 64, "{issued}");
    }
    // The fake hosts demand that the permit names what they gave, so it is these digests.
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_about_a_platform_is_a_refusal_that_names_it() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (a, b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    let vm = world.vm("vm-1", 1, "host-a").await;
    let lies = [
        (Candour::OldNonce, "attest-wrong-binding"),
        (Candour::OtherConnection, "attest-wrong-binding"),
        (Candour::OtherAgent, "attest-wrong-binding"),
        (Candour::Garbage, "attest-malformed-evidence"),
        (Candour::FewerRegisters, "attest-wrong-selection"),
        (Candour::Busy, "TPM is busy"),
    ];
    for (n, (candour, part)) in lies.into_iter().enumerate() {
        // Neither side gets away with it.
        let liar = if n % 2 == 0 { &a } else { &b };
        liar.manners.lock().unwrap().candour = candour;
        let id = world.migrate("vm-1", "host-b").await;
        let view = world.ended(&id).await;
        assert_eq!(view["state"], "refused", "{candour:?}: {view}");
        assert_eq!(view["problem"]["code"], "attestation-failed", "{candour:?}: {view}");
        assert!(view["problem"]["detail"].as_str().unwrap().contains(part), "{candour:?}: {view}");
        let host = world.get(&format!("/v1/hosts/{}", liar.name)).await;
        assert_eq!(host["attestation"], "refused", "{candour:?}: {host}");
        assert!(host["platform"]["reason"].as_str().unwrap().contains(part), "{candour:?}: {host}");
        liar.manners.lock().unwrap().candour = Candour::Honest;
    }
    // An honest answer is believed again.
    let seen = world.ok("/v1/hosts/host-b/attest", &json!({})).await;
    assert_eq!(seen["verdict"], "trusted", "{seen}");
    let id = world.migrate("vm-1", "host-b").await;
    assert_eq!(world.ended(&id).await["state"], "completed");
    world.check_settled(vm, "host-b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_platform_moves_nothing_until_its_value_is_allowed() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (a, _b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    let vm = world.vm("vm-1", 1, "host-a").await;
    a.tpm.as_ref().unwrap().extend(4);

    let seen = world.ok("/v1/hosts/host-a/attest", &json!({})).await;
    assert_eq!((&seen["verdict"], &seen["reasons"]), (&json!("refused"), &json!(["attest-pcr-mismatch"])));
    let pcr = seen["pcrs"].as_array().unwrap().iter().find(|p| p["pcr"] == 4).unwrap();
    assert_eq!((&pcr["matches"], &pcr["expected"][0]), (&json!(false), &json!("00".repeat(32))), "{pcr}");
    let dry = world.ok("/v1/migrations/explain", &intent("vm-1", "host-b")).await;
    let gate = dry["gates"].as_array().unwrap().iter().find(|g| g["name"] == "source-platform").unwrap();
    assert_eq!((&dry["allowed"], &gate["code"]), (&json!(false), &json!("attestation-failed")), "{dry}");
    let id = world.migrate("vm-1", "host-b").await;
    assert_eq!(world.ended(&id).await["problem"]["code"], "attestation-failed");
    assert!(!a.seen.lock().unwrap().contains(&"start-source"), "nothing moved");

    // A change that was planned is registered; one that is not due yet does not count.
    let found = pcr["found"].as_str().unwrap();
    let allow = |from: u64| json!({ "pcr": 4, "digest": found, "note": "kernel", "not_before_unix_s": from });
    world.ok("/v1/references/host/host-a/allow", &allow(4_000_000_000)).await;
    assert_eq!(world.ok("/v1/hosts/host-a/attest", &json!({})).await["verdict"], "refused");
    world.ok("/v1/references/host/host-a/allow", &allow(1)).await;
    assert_eq!(world.ok("/v1/hosts/host-a/attest", &json!({})).await["verdict"], "trusted");
    let id = world.migrate("vm-1", "host-b").await;
    assert_eq!(world.ended(&id).await["state"], "completed");
    world.check_settled(vm, "host-b").await;

    // Recorded anew, as a class; what is malformed is refused.
    let class = json!({ "pcrs": [0, 7], "class": "rack" });
    assert_eq!(world.ok("/v1/hosts/host-a/reference", &class).await["scope"], "class/rack");
    // Without values of its own, and without a class, it is held against nothing, and that is no pass.
    world.ok("/v1/references/host/host-a/remove", &json!({})).await;
    assert_eq!(world.post("/v1/references/host/host-a/remove", &json!({})).await.code(), "bad-request");
    let seen = world.ok("/v1/hosts/host-a/attest", &json!({})).await;
    assert_eq!((&seen["verdict"], &seen["reference"]), (&json!("refused"), &json!(null)), "{seen}");
    let mine = json!({ "pcrs": [0, 4, 7] });
    world.ok("/v1/hosts/host-a/reference", &mine).await;
    assert_eq!(world.ok("/v1/hosts/host-a/attest", &json!({})).await["verdict"], "trusted");
    for (path, body, part) in [
        ("/v1/hosts/host-a/reference", json!({ "pcrs": [] }), "no PCR"),
        ("/v1/hosts/host-a/reference", json!({ "pcrs": [77] }), "no PCR 77"),
        ("/v1/references/host/host-a", json!({ "bank": "sha256", "pcrs": {} }), "reference values"),
        ("/v1/references/rack/x", json!({}), "neither"),
        ("/v1/references/class/none/allow", allow(1), "no reference values"),
        ("/v1/references/host/host-a/allow", json!({ "pcr": 4, "digest": "00" }), "is 32 (sha256)"),
        ("/v1/references/host/host-a/allow", json!({ "pcr": 9, "digest": found }), "PCR 9"),
    ] {
        let answer = world.post(path, &body).await;
        assert_eq!(answer.code(), "bad-request", "{path} {body}: {}", answer.body);
        assert!(answer.body["detail"].as_str().unwrap().contains(part), "{path} {body}: {}", answer.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_tpm_is_gone_or_set_back_is_not_trusted() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (a, _b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    world.vm("vm-1", 1, "host-a").await;
    a.manners.lock().unwrap().refuses = vec![("quote", "internal")];
    let id = world.migrate("vm-1", "host-b").await;
    let view = world.ended(&id).await;
    assert_eq!(view["problem"]["code"], "attestation-failed", "{view}");
    assert!(view["problem"]["detail"].as_str().unwrap().contains("gave no quote"), "{view}");
    // A restarted manager still knows the clock of the last good quote.
    a.manners.lock().unwrap().refuses.clear();
    let tpm = a.tpm.as_ref().unwrap();
    let yesterday = tpm.copy_state();
    tpm.power_cycle(None);
    assert_eq!(
        world.ok("/v1/hosts/host-a/attest", &json!({})).await["verdict"],
        "trusted",
        "it may be restarted"
    );
    world.kill();
    world.start();
    world
        .until("both are back", async || {
            let hosts = world.get("/v1/hosts").await;
            hosts.as_array().unwrap().iter().all(|h| h["state"] == "connected")
        })
        .await;
    assert_eq!(world.ok("/v1/hosts/host-a/attest", &json!({})).await["verdict"], "trusted");
    tpm.power_cycle(Some(&yesterday));
    let seen = world.ok("/v1/hosts/host-a/attest", &json!({})).await;
    assert_eq!(seen["verdict"], "refused", "{seen}");
    let backwards = |code: &Value| code.as_str().unwrap().ends_with("-backwards");
    assert!(seen["reasons"].as_array().unwrap().iter().any(backwards), "{seen}");
}

/// A migration of the VM fails in its transfer, for this reason.
async fn ends_failed(world: &World, part: &str) {
    let id = world.migrate("vm-1", "host-b").await;
    let view = world.ended(&id).await;
    let seen = (&view["state"], &view["problem"]["code"]);
    assert_eq!(seen, (&json!("failed"), &json!("attestation-failed")), "{view}");
    assert!(view["problem"]["detail"].as_str().unwrap().contains(part), "{view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_platform_that_changes_under_a_transfer_ends_it() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (a, b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    let vm = world.vm("vm-1", 1, "host-a").await;
    a.manners.lock().unwrap().flows = false;
    // After its permit, and before its stream flows, the target is started anew: what it showed is gone.
    let tpm = Arc::clone(b.tpm.as_ref().unwrap());
    *a.on_step.lock().unwrap() = Some(Box::new(move |step| {
        if step == "start" {
            tpm.power_cycle(None);
        }
    }));
    ends_failed(&world, "attest-restarted").await;
    world.check_settled(vm, "host-a").await;
    *a.on_step.lock().unwrap() = None;

    // A changed register of the source, likewise.
    let tpm = Arc::clone(a.tpm.as_ref().unwrap());
    *b.on_step.lock().unwrap() = Some(Box::new(move |step| {
        if step == "prepare" {
            tpm.extend(7);
        }
    }));
    ends_failed(&world, "PCR 7").await;
    world.check_settled(vm, "host-a").await;
}

/// Looks at a host that fails: many at once take turns at its TPM, and the audit log is nobody's to fill.
#[tokio::test(flavor = "multi_thread")]
async fn many_looks_at_a_failing_host_are_one_entry_and_keep_no_migration_from_the_tpm() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (a, _b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    world.vm("vm-1", 1, "host-a").await;
    let none = json!({});
    let looks = async || {
        let many = (0..40).map(|_| world.ok("/v1/hosts/host-a/attest", &none));
        futures::future::join_all(many).await
    };
    assert!(looks().await.iter().all(|seen| seen["verdict"] == "trusted"));
    a.tpm.as_ref().unwrap().extend(4);
    let entries = async || {
        let audit = world.get("/v1/audit").await;
        let refused = |e: &&Value| e["action"] == "host.attest" && e["detail"]["trusted"] == false;
        audit.as_array().unwrap().iter().filter(refused).count()
    };
    assert_eq!(entries().await, 0);
    assert!(looks().await.iter().all(|seen| seen["verdict"] == "refused"));
    assert_eq!(entries().await, 1);
    // Another reason is news, and so is what comes after a good answer.
    a.tpm.as_ref().unwrap().extend(7);
    looks().await;
    assert_eq!(entries().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn reference_values_with_all_their_events_go_out_and_in_again() {
    let world = World::new();
    let event = json!({ "kind": 0x8000_0003_u32, "digest": "ab".repeat(32) });
    let digest = "00".repeat(32);
    let pcr = json!({ "allowed": [{ "digest": digest }], "events": vec![event; 500] });
    let pcrs: serde_json::Map<String, Value> = (0..24).map(|n| (n.to_string(), pcr.clone())).collect();
    let values = json!({ "bank": "sha256", "pcrs": pcrs });
    assert!(values.to_string().len() > 512 << 10, "more than other documents may have");
    world.ok("/v1/references/class/rack", &values).await;
    let listed = world.get("/v1/references").await;
    assert_eq!((&listed[0]["scope"], &listed[0]["values"]), (&json!("class/rack"), &Value::Null));
    let shown = world.get("/v1/references/class/rack").await;
    assert_eq!(shown["digest"], listed[0]["digest"]);
    let again = world.ok("/v1/references/class/copy", &shown["values"]).await;
    assert_eq!(again["digest"], shown["digest"]);
    let huge = json!({ "bank": "sha256", "pcrs": {}, "x": "y".repeat(5 << 20) });
    assert_eq!(world.post("/v1/references/class/rack", &huge).await.code(), "bad-request");
    let absent = world.request("GET", "/v1/references/class/none", &world.token(), "").await;
    assert_eq!(absent.code(), "bad-request");
}
