//! A log that was rolled back is found by what hosts remember of it; and a registry that was set back decides again only
//! after every host has said what it holds and an operator has accepted the loss. Never do two copies run.

use crate::fake_host::FakeHost;
use crate::postgres::Cluster;
use crate::skip;
use crate::world::{Answer, World, intent, nonce, now_ms, vm_spec};
use outrider_manager::{Config, backup};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use types::ErrorCode;

/// A registry that can be put back to how it was, by hand: without anybody being told.
enum Store {
    Sqlite,
    Postgres(Cluster),
}

impl Store {
    async fn both(test: impl AsyncFn(&Self, Arc<World>)) {
        test(&Self::Sqlite, World::new()).await;
        match Cluster::start() {
            Ok(cluster) => {
                cluster.sql("postgres", "CREATE DATABASE registry");
                let url = cluster.url("registry");
                let store = Self::Postgres(cluster);
                test(&store, World::sharing("one", &url)).await;
            }
            Err(why) => skip::skip(&why),
        }
    }

    fn saved(world: &World) -> PathBuf {
        world.state().join("saved.db")
    }

    /// With the manager stopped.
    fn save(&self, world: &World) {
        match self {
            Self::Sqlite => {
                std::fs::copy(world.state().join("registry.db"), Self::saved(world)).unwrap();
            }
            Self::Postgres(cluster) => {
                cluster.sql("postgres", "CREATE DATABASE saved TEMPLATE registry");
            }
        }
    }

    fn put_back(&self, world: &World) {
        match self {
            Self::Sqlite => {
                for ending in ["-wal", "-shm"] {
                    drop(std::fs::remove_file(world.state().join(format!("registry.db{ending}"))));
                }
                std::fs::copy(Self::saved(world), world.state().join("registry.db")).unwrap();
            }
            Self::Postgres(cluster) => {
                cluster.sql("postgres", "DROP DATABASE registry");
                cluster.sql("postgres", "CREATE DATABASE registry TEMPLATE saved");
            }
        }
    }
}

fn stopped(world: &World, act: impl FnOnce()) {
    tokio::task::block_in_place(|| {
        world.end().unwrap();
        act();
        world.start();
    });
}

/// The anchor goes: only the hosts can know.
fn forget_anchor(world: &World) {
    std::fs::remove_file(world.state().join("audit.anchor")).unwrap();
}

async fn connected(world: &World, hosts: &[&str]) {
    for host in hosts {
        world
            .until(format!("{host} is back"), async || {
                world.get(&format!("/v1/hosts/{host}")).await["state"] == "connected"
            })
            .await;
    }
}

async fn decides(world: &World) -> Answer {
    world.post("/v1/vms/vm/start", &json!({ "host": "host-b" })).await
}

async fn reconcile(world: &World, lost: &[&str], accept: bool) -> Answer {
    world.post("/v1/audit/reconcile", &json!({ "lost": lost, "accept": accept })).await
}

async fn remembers(world: &World, host: &FakeHost, size: u64) {
    world.until("the host remembers", async || host.remembers().is_some_and(|c| c.size >= size)).await;
}

async fn entries(world: &World) -> u64 {
    world.get("/v1/audit/verify").await["entries"].as_u64().unwrap()
}

fn log_of(audit: &Value, action: &str) -> Option<Value> {
    audit.as_array().unwrap().iter().rfind(|e| e["action"] == action).cloned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_remember_checkpoints_that_extend_each_other() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    remembers(&world, &a, 1).await;
    world.vm("vm", 1, "host-a").await;
    // Within a period everybody has what is there now, each with a proof from where it stood.
    let now = entries(&world).await;
    remembers(&world, &a, now).await;
    remembers(&world, &b, now).await;
    assert!(!world.get("/v1/audit").await.to_string().contains("checkpoint.refuse"));
    assert_eq!(world.request("GET", "/readyz", "", "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolled_back_log_is_found_by_the_first_host_that_remembers_it() {
    Store::both(async |store, world| {
        let (_a, b) = (world.host("host-a").await, world.host("host-b").await);
        world.vm("vm", 1, "host-a").await;
        stopped(&world, || store.save(&world));
        connected(&world, &["host-a", "host-b"]).await;
        world.ok("/v1/vms", &vm_spec("other", 2)).await;
        let lost_at = entries(&world).await;
        remembers(&world, &b, lost_at).await;
        let held = b.remembers().unwrap();
        stopped(&world, || {
            store.put_back(&world);
            forget_anchor(&world);
        });
        connected(&world, &["host-b"]).await;
        let answer = decides(&world).await;
        assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
        assert!(
            answer.body["detail"].as_str().unwrap().contains("holds a checkpoint that a manager signed"),
            "{}",
            answer.body
        );
        let ready = world.request("GET", "/readyz", "", "").await;
        assert_eq!((ready.status.is_success(), ready.code()), (false, "audit-broken"), "{}", ready.body);
        let verdict = world.get("/v1/audit/verify").await;
        assert_eq!(verdict["verified"], false, "{verdict}");
        let first_bad = verdict["first_bad"].as_u64().unwrap();
        assert!(first_bad <= held.size && first_bad > held.size - 10, "{verdict} {held:?}");
        let audit = world.get("/v1/audit").await;
        assert!(log_of(&audit, "registry.distrust").is_some());
        // A fork is never signed: the host holds what it held.
        assert_eq!(b.remembers(), Some(held));
        // And a restart forgets nothing.
        b.remember(None);
        stopped(&world, || {});
        connected(&world, &["host-b"]).await;
        assert_eq!(decides(&world).await.code(), "audit-broken");
    })
    .await;
}

/// A host's word alone proves nothing: only what a manager signed does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_can_t_make_a_log_look_rolled_back() {
    let world = World::new();
    let (a, _b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    let now = entries(&world).await;
    remembers(&world, &a, now).await;
    let (mut forged, honest) = a.memory().unwrap();
    forged.size += 1_000;
    let own = permit::checkpoint::sign(&permit::SigningKey::generate().unwrap(), &forged).unwrap();
    let mut bent = honest.clone();
    bent[60] ^= 1;
    for token in [own, bent, vec![0; 100], vec![1; 100_000]] {
        a.vanish();
        a.remember(Some((forged.clone(), token)));
        a.attach();
        connected(&world, &["host-a"]).await;
        assert_eq!(decides(&world).await.code(), "vm-already-running");
    }
    assert_eq!(world.get("/v1/audit/verify").await["verified"], true);
}

/// A host that is shown a fork, by a manager that does not know better, refuses it, says so, and takes no permit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_shown_a_fork_says_so_and_the_manager_distrusts_itself() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    stopped(&world, || Store::Sqlite.save(&world));
    connected(&world, &["host-a", "host-b"]).await;
    for n in 10..60 {
        world.ok("/v1/vms", &vm_spec(&format!("a-{n}"), n)).await;
    }
    let later = entries(&world).await;
    remembers(&world, &a, later).await;
    let memory = a.memory();
    for host in [&a, &b] {
        host.vanish();
        host.remember(None);
    }
    stopped(&world, || {
        Store::Sqlite.put_back(&world);
        forget_anchor(&world);
    });
    for n in 70..75 {
        world.ok("/v1/vms", &vm_spec(&format!("b-{n}"), n)).await;
    }
    // It attaches as one that remembers nothing, then remembers: as a host whose manager was exchanged meanwhile.
    a.attach();
    connected(&world, &["host-a"]).await;
    world.until("it was told", async || a.remembers().is_some()).await;
    a.remember(memory);
    world.ok("/v1/vms", &vm_spec("one-more", 80)).await;
    world.until("nothing is decided", async || decides(&world).await.code() == "audit-broken").await;
    let refused = async || log_of(&world.get("/v1/audit").await, "checkpoint.refuse");
    world.until("it is written down", async || refused().await.is_some()).await;
    let refused = refused().await.unwrap();
    assert!(refused["detail"]["why"].as_str().unwrap().contains("rolled back"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_from_before_a_migration_is_reconciled_and_the_vm_is_where_it_runs() {
    Store::both(async |store, world| {
        let (a, _b) = (world.host("host-a").await, world.host("host-b").await);
        let vm = world.vm("vm", 1, "host-a").await;
        stopped(&world, || store.save(&world));
        connected(&world, &["host-a", "host-b"]).await;
        let stale =
            json!({ "vm": "vm", "target": "host-a", "nonce": nonce(), "timestamp_unix_ms": now_ms() });
        let m = world.migrate("vm", "host-b").await;
        assert_eq!(world.ended(&m).await["state"], "completed");
        world.check_settled(vm, "host-b").await;
        let epoch = world.get("/v1/vms/vm").await["epoch"].as_u64().unwrap();
        // One that was defined and started since: the registry will not know of it.
        world.vm("new", 2, "host-a").await;
        let now = entries(&world).await;
        remembers(&world, &a, now).await;
        stopped(&world, || store.put_back(&world));
        connected(&world, &["host-a", "host-b"]).await;
        assert_eq!(world.get("/v1/vms/vm").await["host"], "host-a", "it remembers the past");
        for answer in [decides(&world).await, world.post("/v1/migrations", &intent("vm", "host-b")).await] {
            assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
        }
        // What would be done, and nothing of it is.
        let plan = reconcile(&world, &[], false).await;
        assert_eq!(plan.body["blocking"], json!([]), "{}", plan.body);
        assert!(plan.body.to_string().contains("is on host-b under epoch"), "{}", plan.body);
        assert_eq!(world.get("/v1/vms/vm").await["host"], "host-a");
        assert_eq!(decides(&world).await.code(), "audit-broken");

        let done = reconcile(&world, &[], true).await;
        assert_eq!(
            (done.body["accepted"].clone(), done.body["generation"].clone()),
            (json!(true), json!(1)),
            "{}",
            done.body
        );
        let view = world.get("/v1/vms/vm").await;
        assert_eq!(
            (view["host"].clone(), view["state"].clone()),
            (json!("host-b"), json!("running")),
            "{view}"
        );
        let forgotten = world.get("/v1/vms/new").await;
        assert_eq!(
            (forgotten["host"].clone(), forgotten["state"].clone()),
            (json!("host-a"), json!("starting"))
        );
        assert_eq!(world.get("/v1/audit/verify").await["verified"], true);
        // Hosts follow the new generation, although its log is shorter than what they remember.
        world.until("a follows", async || a.remembers().is_some_and(|c| c.generation == 1)).await;
        // A request that was made before, and may have been used, is burned.
        assert_eq!(world.post("/v1/migrations", &stale).await.code(), "stale-request");
        // It decides again, under epochs that nobody saw; also after a restart.
        stopped(&world, || {});
        connected(&world, &["host-a", "host-b"]).await;
        world.ok("/v1/vms/new/start", &json!({ "host": "host-a" })).await;
        let m = world.migrate("vm", "host-a").await;
        assert_eq!(world.ended(&m).await["state"], "completed");
        world.until("it settles", async || world.physical.lock().unwrap().on(vm) == ["host-a"]).await;
        world.check_settled(vm, "host-a").await;
        assert!(world.get("/v1/vms/vm").await["epoch"].as_u64().unwrap() > epoch + 1_000);
        assert_eq!(reconcile(&world, &[], true).await.code(), "wrong-state");
        let entry = log_of(&world.get("/v1/audit").await, "registry.reconcile").unwrap();
        assert_eq!(entry["detail"]["told"], json!(["host-a", "host-b"]), "{entry}");
    })
    .await;
}

/// The hand-over of which the restored registry knows nothing is taken up again from its permit, wherever it stood.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_over_that_was_forgotten_on_its_way_is_taken_up_and_ends_with_one_copy() {
    // Votes of source and target; whether the target ran before the registry was set back.
    for (source_votes, target_votes) in [(true, true), (true, false), (false, false)] {
        Store::both(async |store, world| {
            let (a, b) = (world.host("host-a").await, world.host("host-b").await);
            let vm = world.vm("vm", 1, "host-a").await;
            stopped(&world, || store.save(&world));
            connected(&world, &["host-a", "host-b"]).await;
            a.manners.lock().unwrap().source_votes = source_votes;
            a.manners.lock().unwrap().ignores = vec!["release"];
            a.manners.lock().unwrap().flows = source_votes;
            b.manners.lock().unwrap().target_votes = target_votes;
            let m = world.migrate("vm", "host-b").await;
            let path = format!("/v1/migrations/{m}");
            if target_votes {
                world
                    .until("it runs at the target", async || {
                        world.physical.lock().unwrap().on(vm) == ["host-b"]
                    })
                    .await;
            } else if source_votes {
                world
                    .until("the source voted", async || {
                        world.get(&path).await["digests"]["source"].is_string()
                    })
                    .await;
            } else {
                world.until("it flows", async || world.get(&path).await["state"] == "memory-transfer").await;
            }
            stopped(&world, || store.put_back(&world));
            connected(&world, &["host-a", "host-b"]).await;
            a.manners.lock().unwrap().ignores.clear();
            assert_eq!(world.request("GET", &path, &world.token(), "").await.code(), "unknown-migration");
            world.until("it is in doubt", async || decides(&world).await.code() == "audit-broken").await;
            let done = reconcile(&world, &[], true).await;
            assert_eq!(done.body["accepted"], true, "{}", done.body);
            let view = world.ended(&m).await;
            let on = if target_votes { "host-b" } else { "host-a" };
            println!("votes {source_votes} {target_votes}: {} {}", view["state"], view["problem"]);
            world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == [on]).await;
            world.check_settled(vm, on).await;
            assert_eq!(world.get("/v1/vms/vm").await["host"], on, "{view}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_person_can_settle_is_named_and_stands_in_the_way() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let now = entries(&world).await;
    stopped(&world, || Store::Sqlite.save(&world));
    connected(&world, &["host-a", "host-b"]).await;
    world.ok("/v1/vms", &vm_spec("other", 2)).await;
    let c = world.host("host-c").await;
    remembers(&world, &a, now + 1).await;
    stopped(&world, || Store::Sqlite.put_back(&world));
    connected(&world, &["host-a", "host-b"]).await;
    let in_the_way = async |lost: &[&str], what: &str| {
        let answer = reconcile(&world, lost, true).await;
        assert_eq!(answer.code(), "wrong-state", "{}", answer.body);
        let plan = reconcile(&world, lost, false).await.body;
        assert!(plan["blocking"].to_string().contains(what), "{plan}");
    };
    // A host that was enrolled since comes with a good certificate, and nobody knows what it holds.
    world
        .until("c knocks", async || {
            reconcile(&world, &[], false).await.body["blocking"]
                .to_string()
                .contains("host host-c holds a certificate")
        })
        .await;
    in_the_way(&[], "host-c").await;
    c.vanish();
    // A host that does not say what it holds.
    b.manners.lock().unwrap().ignores = vec!["report-holdings"];
    let answer = reconcile(&world, &["host-b"], true).await;
    assert!(answer.body["detail"].as_str().unwrap().contains("is connected"), "{}", answer.body);
    let answer = reconcile(&world, &["host-z"], true).await;
    assert_eq!(answer.code(), "bad-request", "{}", answer.body);
    b.vanish();
    world.until("b is gone", async || world.get("/v1/hosts/host-b").await["state"] != "connected").await;
    in_the_way(&["host-c"], "host host-b has not told").await;
    b.manners.lock().unwrap().ignores.clear();
    // Two copies, and no hand-over between them.
    b.found(vm, 9);
    b.attach();
    connected(&world, &["host-b"]).await;
    in_the_way(&["host-c"], "VM vm is held by host-a and host-b").await;
    // An epoch beyond any would leave no room above it.
    b.vm_died(vm).await;
    b.found(types::VmId::from_bytes([1; 16]), u64::MAX);
    in_the_way(&["host-c"], "which can't be").await;
    b.vm_died(vm).await;
    let auditor =
        world.ok("/v1/tokens", &json!({ "name": "eve", "role": "operator", "expires_in_days": 1 })).await;
    let order = json!({ "lost": ["host-c"], "accept": true }).to_string();
    let token = auditor["token"].as_str().unwrap();
    let answer = world.request("POST", "/v1/audit/reconcile", token, &order).await;
    assert_eq!(answer.code(), "forbidden", "{}", answer.body);
    let done = reconcile(&world, &["host-c"], true).await;
    assert_eq!(done.body["accepted"], true, "{}", done.body);
    world.physical.lock().unwrap().stop(vm, "host-b");
    let entry = log_of(&world.get("/v1/audit").await, "registry.reconcile").unwrap();
    assert_eq!(entry["detail"]["lost"], json!(["host-c"]), "{entry}");
    assert!(entry["actor"].as_str().unwrap().contains("admin"), "{entry}");
}

/// A VM on a host that is lost, by the operator's word, may be started elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_of_a_lost_host_can_be_started_elsewhere() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    stopped(&world, || Store::Sqlite.save(&world));
    connected(&world, &["host-a", "host-b"]).await;
    world.ok("/v1/vms", &vm_spec("other", 2)).await;
    let now = entries(&world).await;
    remembers(&world, &b, now).await;
    a.vanish();
    world.physical.lock().unwrap().stop(vm, "host-a");
    stopped(&world, || Store::Sqlite.put_back(&world));
    connected(&world, &["host-b"]).await;
    let done = reconcile(&world, &["host-a"], true).await;
    assert_eq!(done.body["accepted"], true, "{}", done.body);
    let view = world.ok("/v1/vms/vm/start", &json!({ "host": "host-b" })).await;
    assert_eq!(view["state"], "running");
    world.check_settled(vm, "host-b").await;
}

/// The commands: a backup while the manager runs, a restore while it does not, and everything in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_backup_decides_nothing_until_it_is_reconciled() {
    Store::both(async |store, world| {
        let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
        let vm = world.vm("vm", 1, "host-a").await;
        let (config, file) = (world.config(), world.state().join("backup.outrider"));
        let made = backup::back_up(&config, &file).await.unwrap();
        assert!(made.bytes > 1_000 && made.header.audit_entries > 5, "{made:?}");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(!text.contains(&world.token()) && !text.contains("PRIVATE"), "no secrets");
        assert_eq!(backup::back_up(&config, &file).await.unwrap_err().code, ErrorCode::AlreadyExists);
        let m = world.migrate("vm", "host-b").await;
        assert_eq!(world.ended(&m).await["state"], "completed");
        world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == ["host-b"]).await;

        let refused = backup::restore(&config, &file).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");
        tokio::task::block_in_place(|| world.end().unwrap());
        if let Store::Postgres(cluster) = store {
            let refused = backup::restore(&config, &file).await.unwrap_err();
            assert!(refused.detail.contains("not empty"), "{refused}");
            cluster.sql("postgres", "ALTER DATABASE registry RENAME TO before");
            cluster.sql("postgres", "CREATE DATABASE registry");
        }
        let damaged = world.state().join("damaged");
        std::fs::write(&damaged, text.replacen("host-a", "host-x", 1)).unwrap();
        assert_eq!(backup::restore(&config, &damaged).await.unwrap_err().code, ErrorCode::BadRequest);
        let restored = backup::restore(&config, &file).await.unwrap();
        assert_eq!(restored.header, made.header);
        if let Store::Sqlite = store {
            assert!(restored.kept.unwrap().exists());
            let leftovers = std::fs::read_dir(world.state()).unwrap().filter(|entry| {
                let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
                name.contains(".restoring") || name.contains(".part")
            });
            assert_eq!(leftovers.count(), 0);
        }
        // Not even a manager without a memory of its own decides.
        forget_anchor(&world);
        tokio::task::block_in_place(|| world.start());
        connected(&world, &["host-a", "host-b"]).await;
        let answer = decides(&world).await;
        assert_eq!(answer.code(), "audit-broken", "{}", answer.body);
        assert!(
            answer.body["detail"].as_str().unwrap().contains("restored from a backup"),
            "{}",
            answer.body
        );
        assert_eq!(world.post("/v1/migrations", &intent("vm", "host-b")).await.code(), "audit-broken");
        assert_eq!(world.physical.lock().unwrap().on(vm), ["host-b"], "what runs is left alone");

        let done = reconcile(&world, &[], true).await;
        assert_eq!(done.body["accepted"], true, "{}", done.body);
        assert_eq!(world.get("/v1/vms/vm").await["host"], "host-b");
        let m = world.migrate("vm", "host-a").await;
        assert_eq!(world.ended(&m).await["state"], "completed");
        world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == ["host-a"]).await;
        world.check_settled(vm, "host-a").await;
    })
    .await;
}

/// From a file to a server, and no VM notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_moves_a_registry_from_sqlite_to_postgresql() {
    let cluster = match Cluster::start() {
        Ok(cluster) => cluster,
        Err(why) => return skip::skip(&why),
    };
    cluster.sql("postgres", "CREATE DATABASE registry");
    let world = World::new();
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    tokio::task::block_in_place(|| world.end().unwrap());
    let (old, file) = (world.config(), world.state().join("moving"));
    let made = backup::back_up(&old, &file).await.unwrap();
    let config = Config { registry: Some(cluster.url("registry").parse().unwrap()), ..old };
    assert_eq!(backup::restore(&config, &file).await.unwrap().header, made.header);
    world.share(&cluster.url("registry"));
    tokio::task::block_in_place(|| world.start());
    connected(&world, &["host-a", "host-b"]).await;
    let done = reconcile(&world, &[], true).await;
    assert_eq!(done.body["accepted"], true, "{}", done.body);
    let m = world.migrate("vm", "host-b").await;
    assert_eq!(world.ended(&m).await["state"], "completed");
    world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == ["host-b"]).await;
    world.check_settled(vm, "host-b").await;
}

/// Entries that are gone can be accepted; entries that were changed can't be made whole by anybody's word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_with_changed_entries_is_not_reconciled() {
    use sqlx::Connection as _;
    let world = World::new();
    let _a = world.host("host-a").await;
    tokio::task::block_in_place(|| world.end().unwrap());
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", world.state().join("registry.db").display());
    let mut intruder = sqlx::AnyConnection::connect(&url).await.unwrap();
    sqlx::query("UPDATE audit SET actor = 'nobody' WHERE sequence = 3").execute(&mut intruder).await.unwrap();
    intruder.close().await.unwrap();
    tokio::task::block_in_place(|| world.start());
    connected(&world, &["host-a"]).await;
    let answer = reconcile(&world, &[], true).await;
    assert_eq!(answer.code(), "wrong-state", "{}", answer.body);
    assert!(answer.body["detail"].as_str().unwrap().contains("damaged at entry 3"), "{}", answer.body);
    let verdict = world.get("/v1/audit/verify").await;
    assert_eq!(
        (verdict["verified"].clone(), verdict["first_bad"].clone()),
        (json!(false), json!(3)),
        "{verdict}"
    );
}
