//! A migration as people see it: states, stages, metrics, report.

use crate::error::Problem;
use crate::handover::Digest;
use crate::id::{HostName, MigrationId, Name};
use serde::{Deserialize, Serialize};

/// Where a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationState {
    /// Asked for; the source has not signed a request yet.
    Requested,
    /// Gates are being checked.
    Deciding,
    /// Refused; nothing moved.
    Refused,
    /// Permit issued; the target is being prepared.
    Setup,
    /// Memory is moving.
    MemoryTransfer,
    /// The guest is stopped; freeze, votes and commit.
    Switchover,
    /// Decided: the target owns the VM.
    Committed,
    /// The target runs; the source's copy is being destroyed, the network told.
    NetworkCleanup,
    /// Done.
    Completed,
    /// Being given up; the source keeps the VM.
    Aborting,
    /// Given up because something failed; the VM is on the source.
    Failed,
    /// Given up because a person or a monitor said so; the VM is on the source.
    Terminated,
    /// Only an operator can go on (see `awaiting`).
    NeedsOperator,
}

impl MigrationState {
    /// Whether nothing will happen any more.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Refused | Self::Completed | Self::Failed | Self::Terminated)
    }
    /// The text of the state.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Deciding => "deciding",
            Self::Refused => "refused",
            Self::Setup => "setup",
            Self::MemoryTransfer => "memory-transfer",
            Self::Switchover => "switchover",
            Self::Committed => "committed",
            Self::NetworkCleanup => "network-cleanup",
            Self::Completed => "completed",
            Self::Aborting => "aborting",
            Self::Failed => "failed",
            Self::Terminated => "terminated",
            Self::NeedsOperator => "needs-operator",
        }
    }
}

impl std::fmt::Display for MigrationState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A migration as the API shows it and `migration show` prints it. Keys are stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationView {
    /// Its id.
    pub id: MigrationId,
    /// The VM's name.
    pub vm: Name,
    /// Where it comes from.
    pub source: HostName,
    /// Where it goes.
    pub target: HostName,
    /// Where it stands.
    pub state: MigrationState,
    /// Whether an operator or a monitor holds it.
    pub suspended: bool,
    /// `precopy`.
    pub mode: String,
    /// Multifd channels beside the main one.
    #[serde(default)]
    pub multifd_channels: u16,
    /// On those channels; empty is none.
    #[serde(default)]
    pub compression: String,
    /// Who asked: operator or token name, and address.
    pub requested_by: String,
    /// RFC 3339.
    pub requested_at: String,
    /// RFC 3339, when final.
    pub ended_at: Option<String>,
    /// Where the VM runs now.
    pub vm_runs_on: String,
    /// What is awaited, in words.
    pub awaiting: String,
    /// What happens next by itself, and when (RFC 3339).
    pub next: Option<NextAct>,
    /// Which of the hosts proved their platforms for the permit: `attested` (both), `source-attested`, `target-attested` or
    /// `unattested`.
    pub attestation: String,
    /// Why it ended as it did, when not completed.
    pub problem: Option<Problem>,
    /// Guest stopped on the source until it ran on the target.
    pub downtime_ms: Option<f64>,
    /// Request accepted until the source's resources were released.
    pub total_ms: Option<f64>,
    /// Request accepted until the guest ran on the target.
    pub request_to_running_ms: Option<f64>,
    /// Running on the target until it answered.
    pub time_to_responsiveness_ms: Option<f64>,
    /// What `time_to_responsiveness_ms` rests on.
    pub responsiveness_basis: Option<String>,
    /// Wire bytes received at the target.
    pub transferred_bytes: u64,
    /// How long the decision took: request to signed permit, in ms.
    pub permit_decision_ms: Option<f64>,
    /// The stages so far.
    pub stages: Vec<StageView>,
    /// The parts of the downtime, in order.
    #[serde(default)]
    pub downtime_parts: Vec<StageView>,
    /// The channel, once open.
    pub channel: Option<ChannelView>,
    /// The permit, once issued.
    pub permit: Option<PermitView>,
    /// Digests of the stream on both sides.
    pub digests: Option<DigestsView>,
    /// Findings of the agents so far.
    #[serde(default)]
    pub findings: Vec<Finding>,
}

/// What happens next by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextAct {
    /// What.
    pub act: String,
    /// When at the latest (RFC 3339).
    pub at: String,
}

/// One stage: `setup`, `storage-transfer`, `memory-transfer`, `switchover`, `network-cleanup`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageView {
    /// Its name.
    pub name: String,
    /// How long it took, or has taken so far.
    pub duration_ms: f64,
}

/// The channel between the VM agents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelView {
    /// `TLSv1.3`.
    pub protocol: String,
    /// IANA name.
    pub cipher_suite: String,
    /// Named group.
    pub key_exchange: String,
    /// How many.
    pub channels: u16,
}

/// The permit of a migration, without its token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PermitView {
    /// Its digest.
    pub id: String,
    /// RFC 3339.
    pub issued_at: String,
    /// RFC 3339.
    pub not_after: String,
}

/// Both sides' digests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestsView {
    /// By the source's VM agent.
    pub source: Option<Digest>,
    /// By the target's VM agent.
    pub target: Option<Digest>,
    /// Whether both are there and equal.
    #[serde(rename = "match")]
    pub matching: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Worth looking at.
    Warning,
    /// Acts on the migration.
    Critical,
}

/// What an agent observed. Never holds guest memory or secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Rule id, e.g. `INV-R4`.
    pub rule: String,
    /// Threat id, e.g. `MM-02`, where there is one.
    #[serde(default)]
    pub threat: String,
    /// How bad.
    pub severity: Severity,
    /// Channel number, 0 is the main one.
    pub channel: u16,
    /// Byte offset in that channel's stream.
    pub offset: u64,
    /// Section or element at hand.
    pub section: String,
    /// What was expected.
    pub expected: String,
    /// What came.
    pub found: String,
    /// What was done about it.
    pub response: String,
}
