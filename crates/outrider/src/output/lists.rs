//! Hosts, VMs, migrations and audit entries as lists, and hosts and VMs one by one.

use super::layout::{Facts, columns};
use super::text::{bold, cut};
use super::time::{duration, instant, relative};
use crate::size::format_bytes;
use api::http::{AuditEntry, AuditVerified, HostView, VmView};
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
        .add("Attestation", &h.attestation)
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

/// Audit entries.
pub(crate) fn audit(entries: &[AuditEntry], width: usize) -> String {
    let row = |e: &AuditEntry| {
        let detail = if e.detail.is_null() { "-".to_owned() } else { cut(&e.detail.to_string(), 120) };
        vec![
            e.sequence.to_string(),
            e.at.clone(),
            e.actor.clone(),
            e.action.clone(),
            e.subject.clone(),
            detail,
        ]
    };
    columns(
        &["SEQUENCE", "AT", "ACTOR", "ACTION", "SUBJECT", "DETAIL"],
        entries.iter().map(row).collect(),
        width,
        "the audit log is empty",
    )
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
