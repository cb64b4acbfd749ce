//! Bundles of migrations: they verify without the manager, and nothing in them can be changed unnoticed.

use crate::attesting::{attested, ready};
use crate::world::World;
use outrider_manager::bundle;
use serde_json::{Value, json};

async fn made(world: &World, id: &str) -> Vec<u8> {
    bundle::to_text(&world.get(&format!("/v1/migrations/{id}/bundle")).await).unwrap()
}

fn refused(bytes: &[u8], what: impl std::fmt::Display) -> String {
    let verdict = bundle::verify(bytes, &[]);
    assert!(!verdict.verified, "{what} went unseen");
    verdict.first_wrong.unwrap()
}

/// Every leaf and every list of a document, by its pointer.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                pointers(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found);
            }
        }
        Value::Array(list) => {
            found.push(at.to_owned());
            for (n, value) in list.iter().enumerate() {
                pointers(value, &format!("{at}/{n}"), found);
            }
        }
        _ => found.push(at.to_owned()),
    }
}

fn changed(value: &Value) -> Vec<Value> {
    let other_digit = |text: &str| {
        let middle = text.len() / 2;
        let mut bytes = text.as_bytes().to_vec();
        if let Some(byte) = bytes.get_mut(middle) {
            *byte = if *byte == b'0' { b'1' } else { b'0' };
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    match value {
        Value::String(text) => {
            vec![json!(other_digit(text)), json!(format!("{text}0")), json!(text.to_uppercase()), Value::Null]
        }
        Value::Number(n) => vec![json!(n.as_f64().unwrap() + 1.0), json!(-1), Value::Null, json!("x")],
        Value::Null => vec![json!("x"), json!(1)],
        Value::Bool(b) => vec![json!(!b)],
        Value::Array(list) => {
            let mut all = vec![Value::Null];
            if !list.is_empty() {
                all.push(json!(list[1..]));
                all.push(json!(list[..list.len() - 1]));
                all.push(json!(list.iter().chain(list.first()).collect::<Vec<_>>()));
                all.push(list.iter().rev().cloned().collect());
            }
            all
        }
        Value::Object(_) => Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bundle_verifies_offline_and_nothing_in_it_can_be_changed() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (_a, _b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    let vm = world.vm("vm", 1, "host-a").await;
    let m = world.migrate("vm", "host-b").await;
    assert_eq!(world.ended(&m).await["state"], "completed");
    world.check_settled(vm, "host-b").await;
    let good = made(&world, &m).await;
    let verdict = bundle::verify(&good, &[]);
    assert_eq!((verdict.verified, verdict.first_wrong.clone()), (true, None));
    assert!(verdict.statements >= 5 && verdict.entries >= 8, "{verdict:?}");
    // With the manager's key, and with another.
    assert!(bundle::verify(&good, &verdict.keys).verified);
    let other = permit::SigningKey::generate().unwrap().verifying_key().to_hex();
    assert!(bundle::verify(&good, &[other]).first_wrong.unwrap().contains("not one that is trusted"));
    assert!(!String::from_utf8(good.clone()).unwrap().contains(&world.token()));

    // Every field.
    let document: Value = serde_json::from_slice(&good).unwrap();
    let mut all = Vec::new();
    pointers(&document, "", &mut all);
    assert!(all.len() > 150, "{}", all.len());
    let mut count = 0;
    for pointer in &all {
        for change in changed(document.pointer(pointer).unwrap()) {
            let mut bent = document.clone();
            let old = std::mem::replace(bent.pointer_mut(pointer).unwrap(), change.clone());
            // Lists of one thing are the same in reverse; leaving out what nothing rests on is not claimed to show.
            let entries_left_out = pointer == "/entries" && change.is_array();
            if old == change || entries_left_out {
                continue;
            }
            let statements_moved = pointer == "/statements"
                && change.as_array().is_some_and(|c| c.len() == old.as_array().unwrap().len());
            if statements_moved {
                continue;
            }
            count += 1;
            refused(&bundle::to_text(&bent).unwrap(), format!("{pointer}: {old} as {change}"));
        }
    }
    // Bytes all over it, one of their bits each; which ones differs from run to run.
    let offset = usize::try_from(crate::world::now_ms() % 7).unwrap();
    println!("every 7th byte from {offset}");
    for at in (offset..good.len()).step_by(7) {
        let mut bent = good.clone();
        bent[at] ^= 1 << (at % 8);
        refused(&bent, format!("byte {at}"));
    }
    println!("{} bytes, {count} changed fields of {}", good.len(), all.len());
    // What is left out of the entries, and something rests on it.
    let entries = document["entries"].as_array().unwrap();
    for (n, entry) in entries.iter().enumerate() {
        let rests = ["permit.issue", "migration.sign-request"].contains(&entry["action"].as_str().unwrap())
            || entry["detail"]["event"]["statement"]["kind"] == "running";
        let mut bent = document.clone();
        bent["entries"].as_array_mut().unwrap().remove(n);
        if rests {
            refused(&bundle::to_text(&bent).unwrap(), format!("without {entry}"));
        }
    }
    for missing in 0..document["statements"].as_array().unwrap().len() {
        let mut bent = document.clone();
        bent["statements"].as_array_mut().unwrap().remove(missing);
        let why = refused(&bundle::to_text(&bent).unwrap(), format!("without statement {missing}"));
        assert!(why.contains("rests on a statement that is missing"), "{why}");
    }
    for bytes in [&b""[..], b"{}", b"[]", b"null", b"{\"entries\":[]}", &good[..good.len() - 1]] {
        refused(bytes, "no bundle");
    }
    assert!(refused(&[b' '; 20 << 20], "too long").contains("longer"));
}

/// Parts of one bundle in another: each is good, and they do not belong together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_two_bundles_do_not_make_one() {
    if !ready() {
        return;
    }
    let world = World::new();
    let (_a, _b) = (attested(&world, "host-a").await, attested(&world, "host-b").await);
    world.vm("vm", 1, "host-a").await;
    let mut bundles = Vec::new();
    for target in ["host-b", "host-a"] {
        let m = world.migrate("vm", target).await;
        assert_eq!(world.ended(&m).await["state"], "completed");
        bundles.push(serde_json::from_slice::<Value>(&made(&world, &m).await).unwrap());
    }
    for part in ["permit", "statements", "entries", "migration", "checkpoint", "attestation"] {
        let mut mixed = bundles[1].clone();
        mixed[part] = bundles[0][part].clone();
        refused(&bundle::to_text(&mixed).unwrap(), part);
    }
    // Another manager's log, with all of its signatures good.
    let other = World::new();
    let (_c, _d) = (other.host("host-a").await, other.host("host-b").await);
    other.vm("vm", 1, "host-a").await;
    let m = other.migrate("vm", "host-b").await;
    assert_eq!(other.ended(&m).await["state"], "completed");
    let foreign: Value = serde_json::from_slice(&made(&other, &m).await).unwrap();
    for part in ["checkpoint", "keys", "permit", "statements", "entries"] {
        let mut mixed = bundles[0].clone();
        mixed[part] = foreign[part].clone();
        refused(&bundle::to_text(&mixed).unwrap(), format!("a foreign {part}"));
    }
    let keys = bundles[0]["keys"][0].as_str().unwrap().to_owned();
    assert!(!bundle::verify(&bundle::to_text(&foreign).unwrap(), &[keys]).verified);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrations_that_were_refused_or_ended_have_bundles_too() {
    let world = World::new();
    let (a, b) = (world.host("host-a").await, world.host("host-b").await);
    world.vm("vm", 1, "host-a").await;
    b.manners.lock().unwrap().available_bytes = 0;
    let refused = world.migrate("vm", "host-b").await;
    assert_eq!(world.ended(&refused).await["state"], "refused");
    let verdict = bundle::verify(&made(&world, &refused).await, &[]);
    assert!(verdict.verified, "{verdict:?}");
    b.manners.lock().unwrap().available_bytes = 2 << 30;
    a.manners.lock().unwrap().flows = false;
    let ended = world.migrate("vm", "host-b").await;
    let path = format!("/v1/migrations/{ended}");
    world.until("it flows", async || world.get(&path).await["state"] == "memory-transfer").await;
    // Of one that is under way as well.
    let verdict = bundle::verify(&made(&world, &ended).await, &[]);
    assert!(verdict.verified, "{verdict:?}");
    world.ok(&format!("{path}/terminate"), &json!({})).await;
    assert_eq!(world.ended(&ended).await["state"], "terminated");
    let verdict = bundle::verify(&made(&world, &ended).await, &[]);
    assert!(verdict.verified, "{verdict:?}");
    let unknown = world.request("GET", "/v1/migrations/m-00/bundle", &world.token(), "").await;
    assert_eq!(unknown.code(), "unknown-migration");
    let viewer =
        world.ok("/v1/tokens", &json!({ "name": "eve", "role": "viewer", "expires_in_days": 1 })).await;
    let answer = world.request("GET", &format!("{path}/bundle"), viewer["token"].as_str().unwrap(), "").await;
    assert_eq!(answer.code(), "forbidden");
}
