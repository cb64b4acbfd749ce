//! Managers whose registry is on PostgreSQL, alone and two at once: who works on a migration, who takes over,
//! and that a server that goes away is survived.

use crate::postgres::Cluster;
use crate::skip;
use crate::world::{World, config, host_spec, try_run};
use std::time::{Duration, Instant};
use types::ErrorCode;

fn cluster() -> Option<Cluster> {
    Cluster::start().inspect_err(|why| skip::skip(why)).ok()
}

/// One column of one row, as the registry holds it.
fn held(cluster: &Cluster, sql: &str) -> String {
    cluster.sql("registry", sql)
}

fn registry(cluster: &Cluster) -> String {
    cluster.sql("postgres", "CREATE DATABASE registry");
    cluster.url("registry")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_moves_with_the_registry_on_postgresql_and_the_manager_may_be_killed_meanwhile() {
    let Some(cluster) = cluster() else { return };
    let world = World::sharing("one", &registry(&cluster));
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let mut at = "host-a";
    for after_ms in [None, Some(5), Some(20), Some(60)] {
        let target = if at == "host-a" { "host-b" } else { "host-a" };
        let m = world.migrate("vm", target).await;
        if let Some(after_ms) = after_ms {
            tokio::time::sleep(Duration::from_millis(after_ms)).await;
            tokio::task::block_in_place(|| {
                world.kill();
                world.start();
            });
        }
        let view = world.ended(&m).await;
        println!("killed after {after_ms:?} ms: {} {}", view["state"], view["problem"]);
        at = if view["state"] == "completed" { target } else { at };
        world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == [at]).await;
        world.check_settled(vm, at).await;
        if after_ms.is_none() {
            assert_eq!(view["state"], "completed", "{view}");
        }
    }
    world.end().unwrap();
    assert_eq!(
        held(
            &cluster,
            "SELECT count(*) FROM leases l JOIN migrations m ON m.id = l.migration WHERE is_open = 1"
        ),
        "0"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_restarted_in_a_migration_is_survived() {
    let Some(mut cluster) = cluster() else { return };
    let world = World::sharing("one", &registry(&cluster));
    let (_a, _b) = (world.host("host-a").await, world.host("host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let mut at = "host-a";
    for after_ms in [0, 10, 30] {
        let target = if at == "host-a" { "host-b" } else { "host-a" };
        let m = world.migrate("vm", target).await;
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        tokio::task::block_in_place(|| {
            cluster.kill();
            cluster.run();
        });
        let view = world.ended(&m).await;
        println!("server killed after {after_ms} ms: {} {}", view["state"], view["problem"]);
        at = if view["state"] == "completed" { target } else { at };
        world.until("the VM settles", async || world.physical.lock().unwrap().on(vm) == [at]).await;
        world.check_settled(vm, at).await;
    }
}

/// Two managers, hosts at the first one only. The second sees everything, works on nothing that is the first
/// one's, and takes over what the first one leaves behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_managers_one_works_on_a_migration_and_the_other_takes_over() {
    let Some(cluster) = cluster() else { return };
    let url = registry(&cluster);
    let (one, two) = (World::sharing("one", &url), World::sharing("two", &url));
    let (_a, _b) = (one.host("host-a").await, one.host("host-b").await);
    let vm = one.vm("vm", 1, "host-a").await;
    let m = one.migrate("vm", "host-b").await;
    let view = one.ended(&m).await;
    assert_eq!(view["state"], "completed", "{view}");
    one.until("the VM settles", async || one.physical.lock().unwrap().on(vm) == ["host-b"]).await;
    one.check_settled(vm, "host-b").await;
    assert_eq!(two.get("/v1/vms/vm").await["host"], "host-b");
    assert_eq!(two.get(&format!("/v1/migrations/{m}")).await["state"], "completed");
    assert_eq!(two.get("/v1/audit/verify").await["verified"], true);
    let acted = "SELECT count(*) FROM audit WHERE actor = 'manager/two' AND action <> 'manager.start'";
    assert_eq!(held(&cluster, acted), "0", "the second manager decided something");

    // A host that is not there keeps a migration open, and some manager at work on it.
    one.ok("/v1/hosts", &host_spec("host-c")).await;
    let stuck = "UPDATE migrations SET state = 'requested', source = 'host-c', target = 'host-c', \
                 is_open = 1, ended_at_us = NULL, handover = NULL, \
                 requested_at_us = CAST(EXTRACT(EPOCH FROM now()) * 1000000 AS BIGINT) + 3600000000";
    one.kill();
    held(&cluster, stuck);
    held(&cluster, "DELETE FROM leases");
    one.start();
    let holder = || held(&cluster, "SELECT manager FROM leases");
    one.until("somebody holds the lease", async || !holder().is_empty()).await;
    let first = holder();
    let term = || held(&cluster, "SELECT term FROM leases").parse::<u64>().unwrap_or(0);
    let before = term();
    let world = if first == "one" { &one } else { &two };
    world.kill();
    let (other, since) = (if first == "one" { "two" } else { "one" }, Instant::now());
    while holder() != other {
        assert!(since.elapsed() < Duration::from_secs(40), "{other} never took over from {first}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("{other} took over from {first} after {:?}", since.elapsed());
    assert!(term() > before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_of_the_same_name_ends_the_first() {
    let Some(cluster) = cluster() else { return };
    let url = registry(&cluster);
    let first = World::sharing("one", &url);
    let token = first.token();
    let second = World::sharing("one", &url);
    let problem = tokio::task::spawn_blocking(move || first.wait().unwrap_err()).await.unwrap();
    assert_eq!(problem.code, ErrorCode::WrongState, "{problem}");
    assert!(problem.detail.contains("manager one"), "{problem}");
    // The second goes on; and each manager has its own admin token.
    assert_ne!(second.token(), token);
    second.get("/v1/vms").await;
    let third = World::sharing("three", &url);
    third.get("/v1/vms").await;
    second.get("/v1/vms").await;
}

#[test]
fn a_manager_does_not_start_on_a_registry_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder.path().join("m"));
    config.registry =
        Some(format!("postgres://u:hunter2@localhost/d?host={}", folder.path().display()).parse().unwrap());
    let problem = try_run(config).unwrap_err();
    assert_eq!(problem.code, ErrorCode::RegistryUnavailable);
    assert!(!problem.to_string().contains("hunter2") && problem.hint.is_some(), "{problem}");
}
