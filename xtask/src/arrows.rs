//! The arrows between rooms: who may depend on whom, and what must be absent from a room.
//!
//! ARCHITECTURE.md draws them; this is the drawing that is enforced.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::run::{self, Workspace};

/// A room, the rooms that it may name, and crates that must be absent from everything that it is linked with.
struct Room {
    name: &'static str,
    sees: &'static [&'static str],
    never_linked: &'static [&'static str],
}

/// What pure rooms must not be linked with: no runtime, TLS, SQL, sockets or random numbers.
const IMPURE: &[&str] = &["tokio", "rustls", "aws-lc-rs", "sqlx", "socket2", "rand", "getrandom", "rustix"];
/// What the sandboxed agent must not be linked with.
const NO_AGENT: &[&str] = &["tokio", "sqlx", "tonic", "hyper", "axum", "yara-x"];

const ROOMS: [Room; 16] = [
    room("outrider-types", &[], IMPURE),
    room("outrider-wire", &["outrider-types"], IMPURE),
    room("outrider-engine", &["outrider-types", "outrider-wire"], IMPURE),
    room(
        "outrider-fuzz-targets",
        &["outrider-types", "outrider-wire", "outrider-engine", "outrider-attest"],
        &["tokio", "sqlx"],
    ),
    room("outrider-sandbox", &[], NO_AGENT),
    // The library is pure; its program, behind a feature, is not.
    room("outrider-signature", &["outrider-sandbox"], IMPURE),
    room("outrider-permit", &["outrider-types"], &["tokio", "rustls", "sqlx"]),
    // What the manager sees of it; the host's half, behind a feature, adds sockets and nothing else.
    room("outrider-attest", &["outrider-types"], &["tokio", "rustls", "sqlx", "rustix", "socket2"]),
    room("outrider-api", &["outrider-types"], &["sqlx", "rustls"]),
    room("outrider-registry", &["outrider-types", "outrider-permit"], &["tonic", "axum"]),
    room("outrider-link", &["outrider-types", "outrider-permit"], &["sqlx"]),
    room(
        "outrider-agent",
        &[
            "outrider-types",
            "outrider-wire",
            "outrider-engine",
            "outrider-permit",
            "outrider-link",
            "outrider-sandbox",
            "outrider-signature",
        ],
        NO_AGENT,
    ),
    room(
        "outrider-manager",
        &[
            "outrider-types",
            "outrider-engine",
            "outrider-permit",
            "outrider-attest",
            "outrider-api",
            "outrider-registry",
            "outrider-link",
        ],
        &[],
    ),
    room(
        "outrider-host",
        &[
            "outrider-types",
            "outrider-wire",
            "outrider-engine",
            "outrider-permit",
            "outrider-attest",
            "outrider-api",
            "outrider-link",
            "outrider-signature",
        ],
        &["sqlx"],
    ),
    room(
        "outrider",
        &[
            "outrider-types",
            "outrider-wire",
            "outrider-engine",
            "outrider-api",
            "outrider-link",
            "outrider-manager",
            "outrider-host",
            "outrider-permit",
        ],
        &[],
    ),
    // It drives the built programs from outside, and knows only the shapes of what they print; the inspector alone
    // it also puts between real QEMUs by itself.
    room(
        "outrider-lab",
        &["outrider-lab-guest", "outrider-types", "outrider-wire", "outrider-engine"],
        &["tokio", "sqlx"],
    ),
];

const fn room(
    name: &'static str,
    sees: &'static [&'static str],
    never_linked: &'static [&'static str],
) -> Room {
    Room { name, sees, never_linked }
}

/// The only room that names the TLS library.
const TLS_ROOM: &str = "outrider-link";
const TLS_CRATES: [&str; 2] = ["rustls", "tokio-rustls"];

/// Compares the workspace with the rooms.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let metadata = run::quiet(workspace.cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).context("reading cargo's metadata")?;
    let packages = metadata["packages"].as_array().context("cargo's metadata has no packages")?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut wrong = Vec::new();
    for package in packages {
        wrong.extend(wrong_names(package, &ours));
    }
    for room in ROOMS.iter().filter(|room| ours.contains(room.name) && !room.never_linked.is_empty()) {
        wrong.extend(wrong_links(workspace, room)?);
    }
    ensure!(wrong.is_empty(), "\n  {}", wrong.join("\n  "));
    Ok(())
}

/// Direct dependencies (those of tests aside) that the room may not name.
fn wrong_names(package: &Value, ours: &BTreeSet<&str>) -> Vec<String> {
    let name = package["name"].as_str().unwrap_or_default();
    let named = package["dependencies"].as_array().into_iter().flatten();
    let named = named.filter(|dependency| dependency["kind"].is_null());
    let named: Vec<&str> = named.filter_map(|dependency| dependency["name"].as_str()).collect();
    let mut wrong = Vec::new();
    for other in named {
        if TLS_CRATES.contains(&other) && name != TLS_ROOM {
            wrong.push(format!("{name} names {other}: only {TLS_ROOM} may"));
        }
        if ours.contains(other) && !may_see(name, other) {
            wrong.push(format!("{name} sees {other}: there is no such arrow"));
        }
    }
    wrong
}

fn may_see(name: &str, other: &str) -> bool {
    ROOMS.iter().any(|room| room.name == name && room.sees.contains(&other))
}

/// Crates that the room is linked with and must not be.
fn wrong_links(workspace: &Workspace, room: &Room) -> Result<Vec<String>> {
    let tree = ["tree", "--edges", "normal", "--prefix", "none", "--format", "{p}", "--package", room.name];
    let linked = run::quiet(workspace.cargo().args(tree))?;
    let linked: BTreeSet<&str> = linked.lines().filter_map(|line| line.split(' ').next()).collect();
    let wrong = room.never_linked.iter().filter(|name| linked.contains(*name));
    Ok(wrong.map(|name| format!("{} is linked with {name}", room.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_arrow_that_is_not_drawn_and_a_stray_tls_crate_are_found() {
        let ours = BTreeSet::from(["outrider-types", "outrider-host", "outrider-wire"]);
        let check = |name: &str, other: &str, kind: Value, expect: usize| {
            let package = json!({"name": name, "dependencies": [{"name": other, "kind": kind}]});
            assert_eq!(wrong_names(&package, &ours).len(), expect, "{name} → {other}");
        };
        check("outrider-wire", "outrider-types", Value::Null, 0);
        check("outrider-types", "outrider-wire", Value::Null, 1);
        check("outrider-types", "outrider-wire", json!("dev"), 0);
        check("outrider-host", "rustls", Value::Null, 1);
        check("outrider-link", "rustls", Value::Null, 0);
        check("unknown-room", "outrider-types", Value::Null, 1);
    }
}
