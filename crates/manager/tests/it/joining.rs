//! Who may join and attach.

use crate::fake_host::{FakeHost, Join, interfaces};
use crate::world::{World, host_spec};
use permit::SigningKey;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;
use types::Nonce;

async fn token(world: &World, name: &str) -> String {
    world.ok("/v1/hosts", &host_spec(name)).await["join_token"].as_str().unwrap().to_owned()
}

async fn refused_join(world: &World, join: &Join, code: Code, part: &str) {
    let port = world.hosts_port.lock().unwrap().unwrap();
    let status = join.send(port).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(status.message().contains(part), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_once_for_its_host_with_its_interfaces() {
    let world = World::new();
    let (token_a, token_b) = (token(&world, "host-a").await, token(&world, "host-b").await);
    let mut crossed = Join::new("host-b", &token_a);
    refused_join(&world, &crossed, Code::Unauthenticated, "not one for host host-b").await;
    crossed.name = "host-z".to_owned();
    refused_join(&world, &crossed, Code::Unauthenticated, "not one for host host-z").await;

    let mut wrong_mac = Join::new("host-a", &token_a);
    wrong_mac.mac = "02:00:00:00:00:ff".to_owned();
    refused_join(&world, &wrong_mac, Code::PermissionDenied, "does not report the MAC").await;

    // The failed tries did not use it up; the good one does.
    FakeHost::join(&world, "host-a", &token_a).await.unwrap();
    refused_join(&world, &Join::new("host-a", &token_a), Code::Unauthenticated, "used before").await;
    FakeHost::join(&world, "host-b", &token_b).await.unwrap();

    let audit = world.get("/v1/audit").await;
    let actions: Vec<_> = audit.as_array().unwrap().iter().map(|e| e["action"].as_str().unwrap()).collect();
    assert_eq!(actions.iter().filter(|a| **a == "host.join-refused").count(), 4, "{actions:?}");
    assert_eq!(actions.iter().filter(|a| **a == "host.join").count(), 2, "{actions:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_and_a_wrong_address_are_refused() {
    let world = World::new();
    let expired = token(&world, "host-a").await;
    let mut elsewhere = host_spec("host-b");
    elsewhere["control_address"] = json!("127.0.0.77");
    let added = world.ok("/v1/hosts", &elsewhere).await;
    let elsewhere = Join::new("host-b", added["join_token"].as_str().unwrap());
    refused_join(&world, &elsewhere, Code::PermissionDenied, "connects from 127.0.0.1").await;

    // Time passes: the token's row is put into the past while the manager is down.
    world.kill();
    expire_tokens(&world).await;
    world.start();
    refused_join(&world, &Join::new("host-a", &expired), Code::Unauthenticated, "expired").await;
}

async fn expire_tokens(world: &World) {
    use sqlx::Connection as _;
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", world.state().join("registry.db").display());
    let mut connection = sqlx::AnyConnection::connect(&url).await.unwrap();
    sqlx::query("UPDATE join_tokens SET expires_at_us = 1").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn refused_attach(host: &FakeHost, hello: api::fleet::Hello, part: &str) {
    let status = host.session(hello).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{}", status.message());
    assert!(status.message().contains(part), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_attaches_as_the_one_that_joined_or_not_at_all() {
    let world = World::new();
    let token = token(&world, "host-a").await;
    let host = FakeHost::join(&world, "host-a", &token).await.unwrap();
    let mut hello = host.hello();
    hello.interfaces = interfaces("02:00:00:00:00:ee");
    refused_attach(&host, hello, "does not report the MAC").await;
    let mut hello = host.hello();
    hello.interfaces[0].addresses.pop();
    refused_attach(&host, hello, "does not report the address 10.7.0.1").await;
    let mut hello = host.hello();
    hello.signing_key = SigningKey::generate().unwrap().verifying_key().as_bytes().to_vec();
    refused_attach(&host, hello, "another signing key").await;
    let mut hello = host.hello();
    hello.journal = Nonce::from_bytes([9; 16]).to_string();
    refused_attach(&host, hello, "another journal").await;
    let audit = world.get("/v1/audit").await;
    let refused = audit.as_array().unwrap().iter().filter(|e| e["action"] == "host.attach-refused").count();
    assert_eq!(refused, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_session_replaces_the_first_and_a_lost_host_is_shown() {
    let world = World::new();
    let host = world.host("host-a").await;
    let second = Arc::clone(&host);
    let session = tokio::spawn(async move { second.session(second.hello()).await });
    world
        .until("two attaches are on record", async || {
            let audit = world.get("/v1/audit").await;
            audit.as_array().unwrap().iter().filter(|e| e["action"] == "host.attach").count() >= 2
        })
        .await;
    session.abort();
    host.vanish();
    world.until("the host is lost", async || world.get("/v1/hosts/host-a").await["state"] == "lost").await;
}

/// A host hangs up at any moment of its greeting: no session of it stays behind that nobody reads.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_hangs_up_while_it_is_greeted_is_lost() {
    let world = World::new();
    let host = world.host("host-a").await;
    host.vanish();
    for round in 0..80_u64 {
        let own = Arc::clone(&host);
        let session = tokio::spawn(async move { own.session(own.hello()).await });
        tokio::time::sleep(Duration::from_micros(round * 250)).await;
        session.abort();
        drop(session.await);
        host.vanish();
        world
            .until(format!("it is lost, round {round}"), async || {
                world.get("/v1/hosts/host-a").await["state"] == "lost"
            })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_guesses_tokens_neither_fills_the_log_nor_goes_on_for_long() {
    let world = World::new();
    let (token_a, token_b) = (token(&world, "host-a").await, token(&world, "host-b").await);
    let wrong = Join::new("host-b", &token_a);
    for _ in 0..10 {
        refused_join(&world, &wrong, Code::Unauthenticated, "not one for host host-b").await;
    }
    refused_join(&world, &wrong, Code::FailedPrecondition, "too many failed joins").await;
    refused_join(&world, &Join::new("host-b", &token_b), Code::FailedPrecondition, "too many").await;
    let audit = world.get("/v1/audit").await;
    let refused = audit.as_array().unwrap().iter().filter(|e| e["action"] == "host.join-refused").count();
    assert_eq!(refused, 5);
}
