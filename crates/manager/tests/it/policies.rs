//! Policy sets that are applied while the manager runs, tenants of tokens, and plans of maintenance.

use crate::fake_host::Manners;
use crate::postgres::Cluster;
use crate::skip;
use crate::world::{World, host_spec, intent, now_ms, vm_spec};
use serde_json::{Value, json};
use std::sync::Arc;

const DEFAULT: &str = include_str!("../../policy/default.cedar");
const STOP: &str = "@id(\"nothing-moves\")\n@reason(\"the fleet is frozen for the audit\")\n\
    forbid (principal, action == Action::\"migrate\", resource);\n";

fn set(extra: &str) -> Value {
    json!({ "files": { "10-default.cedar": DEFAULT, "20-own.cedar": extra } })
}

fn database() -> Option<Cluster> {
    let cluster = Cluster::start().inspect_err(|why| skip::skip(why)).ok()?;
    cluster.sql("postgres", "CREATE DATABASE registry");
    Some(cluster)
}

async fn pair(world: &Arc<World>) -> [Arc<crate::fake_host::FakeHost>; 2] {
    let hosts = [world.host("host-a").await, world.host("host-b").await];
    world.vm("vm", 1, "host-a").await;
    hosts
}

async fn applied_and_rolled_back(world: Arc<World>) {
    let _hosts = pair(&world).await;
    let configured = world.get("/v1/policy").await;
    assert_eq!((&configured["sequence"], &configured["applied_at"]), (&json!(0), &Value::Null));
    let first = world.ok("/v1/policy", &set("")).await;
    assert_eq!(first["sequence"], 1);
    let stop = world.ok("/v1/policy", &set(STOP)).await;
    assert_ne!(first["digest"], stop["digest"]);
    assert!(stop["policies"].as_array().unwrap().iter().any(|p| p["id"] == "nothing-moves"));
    let refused = world.ended(&world.migrate("vm", "host-b").await).await;
    assert_eq!(refused["problem"]["code"], "policy-denied");
    let detail = refused["problem"]["detail"].as_str().unwrap();
    assert!(
        detail.contains("\"nothing-moves\" denies migrate: the fleet is frozen for the audit"),
        "{detail}"
    );
    // What cannot be used changes nothing.
    for (body, code, part) in [
        (set("permit (principal, action, resource"), "bad-configuration", "20-own.cedar"),
        (json!({ "files": { "x.txt": "" } }), "bad-configuration", "neither a *.cedar file nor zones.toml"),
        (json!({ "files": { "../x.cedar": DEFAULT } }), "bad-configuration", "../x.cedar"),
        (json!({ "files": { "zones.toml": "" } }), "bad-configuration", "no *.cedar file"),
        (
            json!({ "files": { "a.cedar": DEFAULT, "zones.toml": "[zones.x]\nsize = 1" } }),
            "bad-configuration",
            "size",
        ),
        (
            set("forbid (principal, action == Action::\"apply-policy\", resource);"),
            "bad-request",
            "could not apply another",
        ),
    ] {
        let answer = world.post("/v1/policy", &body).await;
        assert_eq!(answer.code(), code, "{}", answer.body);
        assert!(answer.body["detail"].as_str().unwrap().contains(part), "{}", answer.body);
    }
    let case = |expect: &str| {
        format!(
            "[hosts.a]\n[hosts.b]\n[vms.v]\n[[case]]\nname = 'ops move'\nrole = 'admin'\naction = 'migrate'\nvm = 'v'\n\
             source = 'a'\ntarget = 'b'\nexpect = '{expect}'\n"
        )
    };
    let mut expecting = set(STOP);
    expecting["expectations"] = json!(case("allow"));
    let answer = world.post("/v1/policy", &expecting).await;
    let detail = answer.body["detail"].as_str().unwrap();
    assert!(detail.contains("\"ops move\"") && detail.contains("found deny by nothing-moves"), "{detail}");
    assert_eq!(world.get("/v1/policy").await["sequence"], 2);
    expecting["expectations"] = json!(case("deny"));
    assert_eq!(world.ok("/v1/policy", &expecting).await["sequence"], 3);
    // Back to the first set, by the beginning of its digest.
    let digest = first["digest"].as_str().unwrap();
    for (digest, part) in [("0000000000", "0 policy sets"), ("ab", "8 characters")] {
        let answer = world.post("/v1/policy/rollback", &json!({ "digest": digest })).await;
        assert!(answer.body["detail"].as_str().unwrap().contains(part), "{}", answer.body);
    }
    let back = world.ok("/v1/policy/rollback", &json!({ "digest": digest[..12] })).await;
    assert_eq!((&back["sequence"], &back["digest"]), (&json!(4), &first["digest"]));
    let moved = world.ended(&world.migrate("vm", "host-b").await).await;
    assert_eq!(moved["state"], "completed", "{moved}");
    // It is in force after a restart, and what was is on record.
    tokio::task::block_in_place(|| {
        world.kill();
        world.start();
    });
    assert_eq!(world.get("/v1/policy").await["digest"], first["digest"]);
    let history = world.get("/v1/policy/history").await;
    let numbers: Vec<_> =
        history.as_array().unwrap().iter().map(|v| v["sequence"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [4, 3, 2, 1]);
    assert!(history[0]["applied_by"].as_str().unwrap().starts_with("operator/admin"), "{history}");
    let audit = world.get("/v1/audit").await;
    let told = audit.as_array().unwrap().iter().filter(|e| e["action"] == "policy.apply").count();
    assert_eq!(told, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_is_applied_whole_or_not_and_an_older_one_comes_back() {
    applied_and_rolled_back(World::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_is_applied_on_postgresql_and_another_manager_goes_by_it_at_once() {
    let Some(cluster) = database() else { return };
    let url = cluster.url("registry");
    applied_and_rolled_back(World::sharing("one", &url)).await;
    let two = World::sharing("two", &url);
    assert_eq!(two.get("/v1/policy").await["sequence"], 4);
    let one = World::sharing("one", &url);
    two.ok("/v1/policy", &set(STOP)).await;
    assert_eq!(one.get("/v1/policy").await["sequence"], 5);
}

/// A set comes into force between a decision and its grant: the decision is made anew, under the new set.
async fn switched_under_a_decision(world: Arc<World>) {
    let [a, b] = pair(&world).await;
    for host in [&a, &b] {
        host.manners.lock().unwrap().delays = vec!["spawn-agent"];
    }
    let m = world.migrate("vm", "host-b").await;
    world.until("it is decided", async || b.seen.lock().unwrap().contains(&"spawn-agent")).await;
    world.ok("/v1/policy", &set(STOP)).await;
    for host in [&a, &b] {
        *host.manners.lock().unwrap() = Manners::default();
    }
    let view = world.ended(&m).await;
    assert_eq!(
        (&view["state"], &view["problem"]["code"]),
        (&json!("refused"), &json!("policy-denied")),
        "{view}"
    );
    let audit = world.get("/v1/audit").await;
    assert!(!audit.as_array().unwrap().iter().any(|e| e["action"] == "permit.issue"), "no permit was issued");
    // One that permits it lets the decision go on.
    for host in [&a, &b] {
        host.manners.lock().unwrap().delays = vec!["spawn-agent"];
        host.seen.lock().unwrap().clear();
    }
    world.ok("/v1/policy", &set("")).await;
    let m = world.migrate("vm", "host-b").await;
    world.until("it is decided", async || b.seen.lock().unwrap().contains(&"spawn-agent")).await;
    world.ok("/v1/policy", &set("// the same, said anew\n")).await;
    for host in [&a, &b] {
        *host.manners.lock().unwrap() = Manners::default();
    }
    assert_eq!(world.ended(&m).await["state"], "completed");
    let audit = world.get("/v1/audit").await;
    let issued: Vec<_> = audit.as_array().unwrap().iter().filter(|e| e["action"] == "permit.issue").collect();
    assert_eq!((issued.len(), &issued[0]["detail"]["policy_sequence"]), (1, &json!(3)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_permit_rests_on_a_set_that_is_no_longer_in_force() {
    switched_under_a_decision(World::new()).await;
    let Some(cluster) = database() else { return };
    switched_under_a_decision(World::sharing("one", &cluster.url("registry"))).await;
}

async fn token(world: &World, name: &str, role: &str, tenants: Option<&[&str]>) -> String {
    let mut body = json!({ "name": name, "role": role, "expires_in_days": 1 });
    if let Some(tenants) = tenants {
        body["tenants"] = json!(tenants);
    }
    let made = world.ok("/v1/tokens", &body).await;
    assert_eq!(made["tenants"], json!(tenants));
    made["token"].as_str().unwrap().to_owned()
}

async fn tenant_vm(world: &World, name: &str, number: u8, tenant: &str) {
    let mut spec = vm_spec(name, number);
    spec["tenant"] = json!(tenant);
    world.ok("/v1/vms", &spec).await;
    world.ok(&format!("/v1/vms/{name}/start"), &json!({ "host": "host-a" })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_a_tenant_sees_and_moves_the_vms_of_that_tenant_alone() {
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    tenant_vm(&world, "shop-1", 1, "shop").await;
    tenant_vm(&world, "bank-1", 2, "bank").await;
    let of_bank = world.migrate("bank-1", "host-b").await;
    world.ended(&of_bank).await;
    let shop = token(&world, "ann", "operator", Some(&["shop"])).await;
    let none = token(&world, "bob", "operator", None).await;
    let every = token(&world, "eve", "operator", Some(&["all"])).await;
    let seen = async |token: &str, path: &str| {
        let answer = world.request("GET", path, token, "").await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.body.as_array().unwrap().len()
    };
    for (token, vms, migrations) in [(&shop, 1, 0), (&none, 0, 0), (&every, 2, 1)] {
        assert_eq!((seen(token, "/v1/vms").await, seen(token, "/v1/migrations").await), (vms, migrations));
    }
    let denied = async |method: &str, path: &str, token: &str, body: &Value, code: &str| {
        let text = if method == "GET" { String::new() } else { body.to_string() };
        let answer = world.request(method, path, token, &text).await;
        assert_eq!(answer.code(), code, "{method} {path}: {}", answer.body);
    };
    let empty = json!({});
    denied("GET", "/v1/vms/bank-1", &shop, &empty, "unknown-vm").await;
    denied("GET", "/v1/vms/bank-1/inspection", &shop, &empty, "unknown-vm").await;
    denied("POST", "/v1/vms/bank-1/stop", &shop, &empty, "unknown-vm").await;
    denied("POST", "/v1/migrations", &shop, &intent("bank-1", "host-a"), "unknown-vm").await;
    denied("POST", "/v1/migrations/explain", &shop, &intent("bank-1", "host-a"), "unknown-vm").await;
    denied("GET", &format!("/v1/migrations/{of_bank}"), &shop, &empty, "unknown-migration").await;
    denied("GET", &format!("/v1/migrations/{of_bank}/events"), &shop, &empty, "unknown-migration").await;
    denied("POST", &format!("/v1/migrations/{of_bank}/terminate"), &shop, &empty, "unknown-migration").await;
    denied("GET", "/v1/events", &shop, &empty, "forbidden").await;
    denied("POST", "/v1/migrations", &none, &intent("shop-1", "host-b"), "unknown-vm").await;
    let mut spec = vm_spec("bank-2", 3);
    spec["tenant"] = json!("bank");
    denied("POST", "/v1/vms", &shop, &spec, "forbidden").await;
    // A host's page names no VM of others.
    let host = world.request("GET", "/v1/hosts/host-b", &shop, "").await.body;
    assert_eq!(host["vms"], json!([]));
    assert!(host["load"]["running"].is_null());
    // Its own moves.
    let answer =
        world.request("POST", "/v1/migrations", &shop, &intent("shop-1", "host-b").to_string()).await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    let view = world.ended(answer.body["id"].as_str().unwrap()).await;
    assert_eq!(view["state"], "completed", "{view}");
    assert_eq!(seen(&shop, "/v1/migrations").await, 1);
    let audit = world.get("/v1/audit").await;
    let added = audit.as_array().unwrap().iter().find(|e| e["action"] == "token.add").unwrap();
    assert_eq!(added["detail"]["tenants"], json!(["shop"]));
}

/// Two zones, an operator who may not cross them, and a VM that runs in the first.
async fn two_zones(world: &Arc<World>) -> ([Arc<crate::fake_host::FakeHost>; 2], String) {
    let mut far = host_spec("host-b");
    far["zone"] = json!("far");
    let hosts = [world.host("host-a").await, world.host_of("host-b", far).await];
    world.vm("vm", 1, "host-a").await;
    (hosts, token(world, "ann", "operator", Some(&["all"])).await)
}

async fn ask(world: &World, token: &str, target: &str, plan: Option<&str>) -> Value {
    let mut body = intent("vm", target);
    if let Some(plan) = plan {
        body["plan"] = json!(plan);
    }
    let explained = world.request("POST", "/v1/migrations/explain", token, &body.to_string()).await.body;
    let answer = world.request("POST", "/v1/migrations", token, &body.to_string()).await;
    assert_eq!(answer.status, 202, "{}", answer.body);
    let view = world.ended(answer.body["id"].as_str().unwrap()).await;
    assert_eq!(explained["allowed"].as_bool().unwrap(), view["state"] == "completed", "{explained} {view}");
    view
}

async fn planned(world: Arc<World>) {
    let (_hosts, ann) = two_zones(&world).await;
    let now_s = now_ms() / 1_000;
    let plan = async |body: Value| world.ok("/v1/plans", &body).await["id"].as_str().unwrap().to_owned();
    let denied = async |plan: Option<&str>, part: &str| {
        let view = ask(&world, &ann, "host-b", plan).await;
        let problem = &view["problem"];
        assert_eq!(problem["code"], "policy-denied", "{view}");
        assert!(problem["detail"].as_str().unwrap().contains(part), "{problem} does not say {part:?}");
    };
    denied(None, "\"zones-are-left-by-admins-only\"").await;
    denied(Some(&"ab".repeat(16)), "there is none").await;
    let body = |host: &str, not_after: u64| json!({ "host": host, "not_after_unix_s": not_after });
    denied(Some(&plan(body("host-b", now_s + 600)).await), "it is about host host-b, not host-a").await;
    let mut narrow = body("host-a", now_s + 600);
    narrow["zones"] = json!(["near"]);
    denied(Some(&plan(narrow).await), "does not allow targets in zone \"far\"").await;
    let mut later = body("host-a", now_s + 600);
    later["not_before_unix_s"] = json!(now_s + 300);
    denied(Some(&plan(later).await), "has not begun").await;
    let short = plan(body("host-a", now_ms() / 1_000 + 2)).await;
    let revoked = plan(body("host-a", now_s + 600)).await;
    world.ok(&format!("/v1/plans/{revoked}/revoke"), &json!({})).await;
    denied(Some(&revoked), "it was taken back").await;
    world
        .until("the short plan is over", async || {
            let plans = world.get("/v1/plans").await;
            plans.as_array().unwrap().iter().any(|p| p["id"] == short.as_str() && p["state"] == "over")
        })
        .await;
    denied(Some(&short), "its window is over").await;
    // One that covers it lets the operator cross, and is named in the permit's audit entry.
    let mut good = body("host-a", now_s + 600);
    good["targets"] = json!(["host-b"]);
    let good = plan(good).await;
    let view = ask(&world, &ann, "host-b", Some(&good)).await;
    assert_eq!(view["state"], "completed", "{view}");
    let audit = world.get("/v1/audit").await;
    let of =
        |action: &str| audit.as_array().unwrap().iter().rfind(|e| e["action"] == action).cloned().unwrap();
    assert_eq!(of("permit.issue")["detail"]["plan"], good.as_str());
    assert_eq!(of("plan.revoke")["detail"]["plan"], revoked.as_str());
    // Only those who may plan make plans, and no plan makes sense that cannot.
    let answer = world.request("POST", "/v1/plans", &ann, &body("host-a", now_s + 600).to_string()).await;
    assert_eq!(answer.code(), "forbidden");
    for (body, code) in [
        (body("nowhere", now_s + 600), "unknown-host"),
        (body("host-a", now_s - 1), "bad-request"),
        (body("host-a", now_s + 40 * 86_400), "bad-request"),
        (json!({ "host": "host-a", "targets": ["host-a"], "not_after_unix_s": now_s + 600 }), "bad-request"),
    ] {
        assert_eq!(world.post("/v1/plans", &body).await.code(), code, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_of_maintenance_covers_what_it_says_and_nothing_else() {
    planned(World::new()).await;
}

/// Whoever writes into the registry makes no plan: what counts is what this manager signed under that id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_and_foreign_plans_are_refused_on_postgresql() {
    let Some(cluster) = database() else { return };
    let url = cluster.url("registry");
    let world = World::sharing("one", &url);
    let (_hosts, ann) = two_zones(&world).await;
    let body = |host: &str| json!({ "host": host, "not_after_unix_s": now_ms() / 1_000 + 600 });
    let made = async |world: &World, host: &str| {
        world.ok("/v1/plans", &body(host)).await["id"].as_str().unwrap().to_owned()
    };
    let denied = async |plan: &str, part: &str| {
        let view = ask(&world, &ann, "host-b", Some(plan)).await;
        let detail = view["problem"]["detail"].as_str().unwrap_or_default().to_owned();
        assert!(detail.contains(part), "{view} does not say {part:?}");
    };
    let (one, two) = (made(&world, "host-a").await, made(&world, "host-a").await);
    let sql = |text: String| cluster.sql("registry", &text);
    // Another signed plan under this one's id.
    sql(format!(
        "UPDATE maintenance_plans SET token = (SELECT token FROM maintenance_plans WHERE id = '{two}') WHERE id = '{one}'"
    ));
    denied(&one, &format!("what is signed is plan {two}")).await;
    // A flipped bit.
    sql(format!(
        "UPDATE maintenance_plans SET token = set_byte(token, length(token) - 1, get_byte(token, length(token) - 1) # 1) \
         WHERE id = '{two}'"
    ));
    denied(&two, "this manager did not sign it").await;
    // One that another manager signed, with a key of its own.
    let other = World::sharing("two", &url);
    let foreign = made(&other, "host-a").await;
    denied(&foreign, "this manager did not sign it").await;
    let plans = world.get("/v1/plans").await;
    assert!(plans.as_array().unwrap().iter().all(|p| p["state"] == "not-signed-here"), "{plans}");
}
