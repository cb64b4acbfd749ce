//! Records for the tests of the renderers. Only tests see them.

use serde_json::json;
use types::MigrationId;
use types::migration::{MigrationState, MigrationView};

/// A migration early in its life.
pub(crate) fn view(byte: u8, vm: &str, state: MigrationState) -> MigrationView {
    serde_json::from_value(json!({
        "id": MigrationId::from_bytes([byte; 16]), "vm": vm, "source": "host-a", "target": "host-b",
        "state": state, "suspended": false, "mode": "precopy",
        "requested_by": "admin (10.81.0.100)", "requested_at": "2026-11-23T14:02:11Z", "ended_at": null,
        "vm_runs_on": "host-a", "awaiting": "the end of the memory transfer",
        "next": {"act": "terminate, because the run deadline is past", "at": "2026-11-23T14:07:11Z"},
        "attestation": "unattested", "problem": null, "downtime_ms": null, "total_ms": null,
        "request_to_running_ms": null, "time_to_responsiveness_ms": null, "responsiveness_basis": null,
        "transferred_bytes": 0, "permit_decision_ms": null, "stages": [], "downtime_parts": [],
        "channel": null, "permit": null, "digests": null, "findings": [],
    }))
    .expect("a sample of the document")
}

/// A migration that went well, with every field set.
pub(crate) fn completed() -> MigrationView {
    let mut value = serde_json::to_value(view(0x6c, "web-1", MigrationState::Completed)).expect("serialises");
    let digest = "9f".repeat(32);
    let facts = json!({
        "ended_at": "2026-11-23T14:02:14Z", "vm_runs_on": "host-b", "awaiting": "nothing", "next": null,
        "downtime_ms": 41.25, "total_ms": 2410.0, "request_to_running_ms": 2290.5,
        "time_to_responsiveness_ms": 3.5, "responsiveness_basis": "first packet of the guest on its tap",
        "transferred_bytes": 281_018_368, "permit_decision_ms": 11.5,
        "stages": [
            {"name": "setup", "duration_ms": 402.0}, {"name": "memory-transfer", "duration_ms": 1800.0},
            {"name": "switchover", "duration_ms": 41.25}, {"name": "network-cleanup", "duration_ms": 166.75},
        ],
        "downtime_parts": [
            {"name": "stop-to-end-of-stream", "duration_ms": 12.0}, {"name": "freeze-and-votes", "duration_ms": 9.0},
            {"name": "commit-to-running", "duration_ms": 20.25},
        ],
        "channel": {"protocol": "TLSv1.3", "cipher_suite": "TLS_AES_256_GCM_SHA384",
            "key_exchange": "X25519MLKEM768", "channels": 1},
        "permit": {"id": "3f".repeat(32), "issued_at": "2026-11-23T14:02:11Z", "not_after": "2026-11-23T14:03:11Z"},
        "digests": {"source": digest, "target": digest, "match": true},
    });
    for (key, fact) in facts.as_object().expect("an object") {
        value[key] = fact.clone();
    }
    serde_json::from_value(value).expect("a sample of the document")
}
