//! How a registry that was set back stands, for people.

use super::layout::Facts;
use super::text::bold;
use api::http::Reconciliation;
use std::fmt::Write as _;

/// The whole answer.
pub(crate) fn show(r: &Reconciliation, width: usize) -> String {
    let title = match (r.accepted, r.blocking.is_empty()) {
        (true, _) => "the registry is reconciled; it decides again",
        (false, true) => "nothing is in the way: --accept reconciles the registry",
        (false, false) => "THE REGISTRY CAN'T BE RECONCILED YET",
    };
    let mut facts = Facts::new(bold(title));
    facts.add("Was", format!("{} since {}", r.standing, r.since));
    facts.add("Why", &r.why);
    facts.add("Generation", r.generation.to_string());
    for host in &r.hosts {
        facts.add("Host", format!("{}: {}", host.name, host.state));
    }
    let mut text = facts.render(width);
    for vm in &r.vms {
        writeln!(text, "  VM {}: {}", vm.name, vm.outcome).unwrap_or_default();
    }
    for blocking in &r.blocking {
        writeln!(text, "  IN THE WAY: {blocking}").unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_plan_names_what_is_in_the_way() {
        let plan: Reconciliation = serde_json::from_value(json!({
            "standing": "restored", "why": "it was restored from a backup of 12 audit entries",
            "since": "2026-11-25T10:00:00Z", "accepted": false, "generation": 0,
            "hosts": [{ "name": "host-a", "state": "told" }, { "name": "host-b", "state": "missing" }],
            "vms": [{ "name": "web-1", "outcome": "is on host-a under epoch 5" }],
            "blocking": ["host host-b has not told what it holds"],
        }))
        .unwrap();
        let text = show(&plan, 80);
        for part in
            ["CAN'T BE RECONCILED", "host-b: missing", "VM web-1: is on host-a", "IN THE WAY: host host-b"]
        {
            assert!(text.contains(part), "{text}");
        }
        let open = Reconciliation { blocking: Vec::new(), ..plan };
        assert!(show(&open, 80).contains("--accept"));
        assert!(show(&Reconciliation { accepted: true, ..open }, 80).contains("decides again"));
    }
}
