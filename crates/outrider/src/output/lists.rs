//! Hosts, VMs, migrations and audit entries as lists, and hosts and VMs one by one.

use super::layout::{Facts, columns};
use super::text::{bold, cut};
use super::time::{duration, instant, relative, to_seconds};
use crate::size::format_bytes;
use api::http::{AuditEntry, AuditVerified, BundleVerified, HostView, TokenView, VmView};
use jiff::Timestamp;
use serde::Serialize;
use types::MigrationId;
use types::host::{Interface, Load};
use types::migration::MigrationView;

/// The text of a state as the JSON has it.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

fn join(items: impl IntoIterator<Item = impl ToString>) -> String {
    let text = items.into_iter().map(|i| i.to_string()).collect::<Vec<_>>().join(", ");
    if text.is_empty() { "-".to_owned() } else { text }
}

/// Enough of an id to type.
pub(crate) fn short(id: MigrationId) -> String {
    id.to_string().chars().take(10).collect()
}

/// Hosts.
pub(crate) fn hosts(hosts: &[HostView], now: Timestamp, width: usize) -> String {
    let row = |h: &HostView| {
        vec![
            h.name.to_string(),
            word(&h.state),
            h.attestation.clone(),
            h.migration_address.clone(),
            h.vms.len().to_string(),
            or_dash(h.load.as_ref().map(|l| format_bytes(l.memory_available_bytes))),
            or_dash(h.last_seen.as_ref().map(|at| relative(at, now))),
        ]
    };
    columns(
        &["NAME", "STATE", "ATTESTATION", "MIGRATION", "VMS", "FREE", "SEEN"],
        hosts.iter().map(row).collect(),
        width,
        "no hosts yet; enrol one with: outrider host add",
    )
}

/// One host.
pub(crate) fn host(h: &HostView, now: Timestamp, width: usize) -> String {
    let mut facts = Facts::new(format!("{}: {}", bold(h.name.as_str()), word(&h.state)));
    facts
        .add("VMs", join(&h.vms))
        .add("Load", h.load.as_ref().map_or_else(|| "not measured yet".to_owned(), load))
        .add(
            "Capacity",
            format!(
                "{} of memory, {} virtual CPUs, {} VMs",
                format_bytes(h.capacity.memory_bytes),
                h.capacity.vcpus,
                h.capacity.vms
            ),
        )
        .add("Identity", &h.spiffe_id)
        .add("Attestation", attestation_text(h))
        .add("Control", &h.control_address)
        .add("Migration", &h.migration_address)
        .add("MACs", join(&h.macs))
        .add("Zone", if h.zone.is_empty() { "-" } else { &h.zone })
        .add("Version", or_dash(h.version.as_ref()))
        .add("Last seen", h.last_seen.as_ref().map_or_else(|| "never".to_owned(), |at| instant(at, now)));
    for interface in &h.interfaces {
        facts.add("Interface", interface_text(interface));
    }
    facts.render(width)
}

fn attestation_text(h: &HostView) -> String {
    let reason = h.platform.as_ref().and_then(|p| p.reason.as_ref());
    reason.map_or_else(|| h.attestation.clone(), |reason| format!("{}: {reason}", h.attestation))
}

fn load(l: &Load) -> String {
    format!(
        "{} used and {} free, {:.2} of {:.1} CPUs busy, measured on {}",
        format_bytes(l.memory_used_bytes),
        format_bytes(l.memory_available_bytes),
        l.cpu_cores_used,
        l.cpu_cores,
        l.scope
    )
}

fn interface_text(i: &Interface) -> String {
    format!("{} {} {}", i.name, i.mac, join(&i.addresses))
}

/// VMs.
pub(crate) fn vms(vms: &[VmView], width: usize) -> String {
    let row = |v: &VmView| {
        vec![
            v.spec.name.to_string(),
            word(&v.state),
            or_dash(v.host.as_ref()),
            v.spec.vcpus.to_string(),
            format_bytes(v.spec.memory_bytes),
            or_dash(v.migration.map(short)),
        ]
    };
    columns(
        &["NAME", "STATE", "HOST", "CPUS", "MEMORY", "MIGRATION"],
        vms.iter().map(row).collect(),
        width,
        "no VMs yet; record one with: outrider vm define FILE",
    )
}

/// One VM.
pub(crate) fn vm(v: &VmView, width: usize) -> String {
    let mut facts = Facts::new(format!("{}: {}", bold(v.spec.name.as_str()), word(&v.state)));
    facts
        .add("Host", or_dash(v.host.as_ref()))
        .add("Migration", or_dash(v.migration))
        .add("UUID", v.spec.uuid.to_string())
        .add("Tenant", v.spec.tenant.as_str())
        .add(
            "Machine",
            format!(
                "{}, {}, {}",
                v.inventory.as_ref().map_or(v.spec.machine.as_str(), |i| i.machine.as_str()),
                v.spec.cpu_model,
                word(&v.spec.accel)
            ),
        )
        .add("CPUs", v.spec.vcpus.to_string())
        .add("Memory", format_bytes(v.spec.memory_bytes))
        .add("Networks", join(v.spec.nics.iter().map(|n| format!("{} on {}", n.mac, n.bridge))))
        .add("Disks", join(v.spec.disks.iter().map(|d| format!("{} ({})", d.path, d.format))))
        .add("Epoch", v.epoch.to_string())
        .add("Spec digest", &v.spec_digest);
    facts.render(width)
}

/// Migrations.
pub(crate) fn migrations(list: &[MigrationView], now: Timestamp, width: usize) -> String {
    let row = |m: &MigrationView| {
        let held = if m.suspended { " (suspended)" } else { "" };
        vec![
            short(m.id),
            m.vm.to_string(),
            m.source.to_string(),
            m.target.to_string(),
            format!("{}{held}", m.state),
            relative(&m.requested_at, now),
            or_dash(m.downtime_ms.map(duration)),
            or_dash(m.total_ms.map(duration)),
        ]
    };
    columns(
        &["ID", "VM", "FROM", "TO", "STATE", "ASKED", "DOWNTIME", "TOTAL"],
        list.iter().map(row).collect(),
        width,
        "no migrations; start one with: outrider migrate VM --to HOST",
    )
}

/// Below this the details of audit entries are left to `--output json`.
const DETAIL_WIDTH_MIN: usize = 110;

/// Operators' tokens.
pub(crate) fn tokens(tokens: &[TokenView], width: usize) -> String {
    let row = |t: &TokenView| {
        let until = match (&t.expires_at, t.expired) {
            (Some(at), true) => format!("{} (expired)", to_seconds(at)),
            (Some(at), false) => to_seconds(at),
            (None, _) => "a manager's own".to_owned(),
        };
        let tenants = t.tenants.as_ref().map_or_else(|| "-".to_owned(), |names| names.join(", "));
        vec![t.name.clone(), t.role.clone(), tenants, until]
    };
    columns(
        &["TOKEN", "ROLE", "TENANTS", "UNTIL"],
        tokens.iter().map(row).collect(),
        width,
        "there are no tokens",
    )
}

/// Audit entries.
pub(crate) fn audit(entries: &[AuditEntry], width: usize) -> String {
    let with_detail = width >= DETAIL_WIDTH_MIN;
    let row = |e: &AuditEntry| {
        let subject = e.subject.parse().map_or_else(|_| e.subject.clone(), short);
        // From where somebody asked is a detail too.
        let actor = e.actor.split(" from ").next().filter(|_| !with_detail).unwrap_or(&e.actor);
        let mut row =
            vec![e.sequence.to_string(), to_seconds(&e.at), actor.to_owned(), e.action.clone(), subject];
        if with_detail {
            row.push(if e.detail.is_null() { "-".to_owned() } else { cut(&e.detail.to_string(), 120) });
        }
        row
    };
    let headings = ["NO", "AT", "ACTOR", "ACTION", "SUBJECT", "DETAIL"];
    let shown = if with_detail { &headings[..] } else { &headings[..5] };
    columns(shown, entries.iter().map(row).collect(), width, "the audit log is empty")
}

/// The verdict on the audit log.
pub(crate) fn verdict(v: &AuditVerified, width: usize) -> String {
    let title = if v.verified { "the audit log is whole" } else { "THE AUDIT LOG IS BROKEN" };
    let mut facts = Facts::new(bold(title));
    facts.add("Entries", v.entries.to_string());
    facts.add_some("First bad", v.first_bad.map(|s| format!("entry {s}")));
    facts.add_some("Why", v.detail.as_ref());
    facts.add("Head", &v.head);
    facts.render(width)
}

/// The verdict on a bundle.
pub(crate) fn bundle_verdict(v: &BundleVerified, width: usize) -> String {
    let title = if v.verified { "the bundle holds" } else { "THE BUNDLE DOES NOT HOLD" };
    let mut facts = Facts::new(bold(title));
    facts.add_some("Migration", v.migration.map(|id| id.to_string()));
    facts.add_some("Wrong", v.first_wrong.as_ref());
    if v.verified {
        facts.add("Shows", format!("{} entries of the log, {} statements", v.entries, v.statements));
        facts.add_some("Log", v.log.map(|log| format!("{log}, with {} entries", v.log_entries)));
        let note = if v.trusted { "" } else { " (not compared with any: give --key)" };
        for key in &v.keys {
            facts.add("Signed by", format!("{key}{note}"));
        }
    }
    facts.render(width)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::samples;
    use super::*;
    use serde_json::json;
    use types::migration::MigrationState;

    fn now() -> Timestamp {
        "2026-11-23T14:02:20Z".parse().unwrap()
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    fn two_hosts() -> Vec<HostView> {
        let joined = json!({
            "name": "host-a", "spiffe_id": "spiffe://outrider/host/host-a", "state": "connected",
            "attestation": "unattested", "control_address": "10.81.0.11", "migration_address": "10.82.0.11",
            "macs": ["02:81:00:00:00:0b", "02:82:00:00:00:0b"], "zone": "",
            "capacity": {"memory_bytes": 8_589_934_592_u64, "vcpus": 8, "vms": 100}, "vms": ["web-1"],
            "load": {"scope": "/outrider-lab/a", "memory_used_bytes": 301_000_000, "vms": 1,
                "memory_available_bytes": 8_000_000_000_u64, "cpu_cores_used": 0.25, "cpu_cores": 2.0,
                "cpu_pressure_percent": null, "memory_pressure_percent": null},
            "interfaces": [{"name": "ctl0", "mac": "02:81:00:00:00:0b", "addresses": ["10.81.0.11"]}],
            "version": "0.1.0", "last_seen": "2026-11-23T14:02:19Z",
        });
        let mut enrolled = joined.clone();
        for (key, value) in [
            ("name", json!("host-b")),
            ("state", json!("enrolled")),
            ("vms", json!([])),
            ("load", json!(null)),
            ("interfaces", json!([])),
            ("version", json!(null)),
            ("last_seen", json!(null)),
        ] {
            enrolled[key] = value;
        }
        vec![serde_json::from_value(joined).unwrap(), serde_json::from_value(enrolled).unwrap()]
    }

    fn a_vm() -> VmView {
        let spec = json!({"uuid": "6f1e2d3c-0000-4000-8000-000000000001", "name": "web-1", "vcpus": 1,
            "memory_bytes": 268_435_456, "nics": [{"mac": "52:54:00:83:00:50", "bridge": "br-guest"}]});
        serde_json::from_value(json!({"spec": spec, "spec_digest": "9f".repeat(32), "state": "migrating",
            "host": "host-a", "epoch": 3, "migration": MigrationId::from_bytes([0x6c; 16]),
            "inventory": null}))
        .unwrap()
    }

    #[test]
    fn hosts_and_vms_at_80_columns() {
        let hosts_text = hosts(&two_hosts(), now(), 80);
        let host_text = host(&two_hosts()[0], now(), 80);
        let vms_text = vms(&[a_vm()], 80);
        let vm_text = vm(&a_vm(), 80);
        insta::assert_snapshot!(
            "hosts-80",
            plain(&format!("{hosts_text}---\n{host_text}---\n{vms_text}---\n{vm_text}"))
        );
    }

    #[test]
    fn migrations_and_audit_at_80_columns() {
        let mut held = samples::view(0x7d, "db", MigrationState::MemoryTransfer);
        held.suspended = true;
        let migrations_text = migrations(&[held, samples::completed()], now(), 80);
        let entry: AuditEntry = serde_json::from_value(json!({"sequence": 12, "at": "2026-11-23T14:02:11.123Z",
            "actor": "operator/admin from 10.81.0.1", "action": "permit.issue", "subject": "m-6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6c",
            "detail": {"target": "host-b"}, "hash": "ab"}))
        .unwrap();
        let (narrow, wide) = (audit(std::slice::from_ref(&entry), 80), audit(&[entry], 120));
        insta::assert_snapshot!(
            "migrations-80",
            plain(&format!("{migrations_text}---\n{narrow}---\n{wide}"))
        );
    }
}
