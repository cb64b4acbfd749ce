//! What is known of a migration beside its columns: kept as one JSON document in its row.

use registry::{MigrationRow, RegistryError};
use serde::{Deserialize, Serialize};
use types::handover::AbortReason;
use types::migration::{ChannelView, DigestsView, Finding, StageView};
use types::permit::StreamFeatures;
use types::{Nonce, Problem};

/// Findings that are kept of one migration: the first ones tell the story.
const FINDINGS_LIMIT: usize = 64;

/// The facts. Times are microseconds since the Unix epoch by the manager's clock, so that their differences mean
/// something whatever the hosts' clocks say.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Facts {
    /// Name of the operator, for policy.
    pub(crate) principal: String,
    /// Role of the operator, for policy.
    pub(crate) role: String,
    /// Tenants of the operator's token, for policy.
    pub(crate) tenants: Option<Vec<String>>,
    /// A plan of maintenance that the request names.
    pub(crate) plan: Option<Nonce>,
    /// What the stream is to use.
    pub(crate) features: StreamFeatures,
    /// The intent was answered by the source's signed request.
    pub(crate) request_us: Option<i64>,
    /// The permit was signed.
    pub(crate) permit_us: Option<i64>,
    /// The target may hold the permit from now on (set before it is sent).
    pub(crate) prepare_sent_us: Option<i64>,
    /// Where the source's agent is to connect.
    pub(crate) data_address: Option<String>,
    /// Where the source asks the target to renounce.
    pub(crate) peer_address: Option<String>,
    /// The source may hold the permit from now on (set before it is sent).
    pub(crate) start_sent_us: Option<i64>,
    /// The source took the order to start.
    pub(crate) started_us: Option<i64>,
    /// The channel stood.
    pub(crate) connected_us: Option<i64>,
    /// Everything that a freeze rests on was last found good, by a look that began then.
    pub(crate) looked_us: Option<i64>,
    /// The guest stopped on the source.
    pub(crate) stopped_us: Option<i64>,
    /// The source voted.
    pub(crate) frozen_us: Option<i64>,
    /// The decision was durable.
    pub(crate) committed_us: Option<i64>,
    /// The guest ran on the target.
    pub(crate) running_us: Option<i64>,
    /// The source's copy was gone.
    pub(crate) released_us: Option<i64>,
    /// An abort was asked for.
    pub(crate) abort_us: Option<i64>,
    /// Both votes were in and an abort was wanted: from then on the source may be silent for so long.
    pub(crate) awaits_source_us: Option<i64>,
    /// The host on which the VM's QEMU died by itself meanwhile.
    pub(crate) died_on: Option<String>,
    /// When the migration was suspended.
    pub(crate) suspended_us: Option<i64>,
    /// Why it did not complete.
    pub(crate) problem: Option<Problem>,
    /// By the source's monotonic clock.
    pub(crate) downtime_ms: Option<f64>,
    /// Its parts.
    pub(crate) downtime_parts: Vec<StageView>,
    /// By the target.
    pub(crate) time_to_responsiveness_ms: Option<f64>,
    /// What it rests on.
    pub(crate) responsiveness_basis: Option<String>,
    /// Received at the target.
    pub(crate) transferred_bytes: u64,
    /// Request to signed permit.
    pub(crate) permit_decision_ms: Option<f64>,
    /// The channel.
    pub(crate) channel: Option<ChannelView>,
    /// Of both sides.
    pub(crate) digests: Option<DigestsView>,
    /// Of the agents.
    pub(crate) findings: Vec<Finding>,
}

impl Facts {
    /// From a row.
    ///
    /// # Errors
    /// A row that this version cannot read.
    pub(crate) fn of(row: &MigrationRow) -> Result<Self, RegistryError> {
        serde_json::from_str(&row.facts)
            .map_err(|e| RegistryError::Malformed { what: "facts", detail: e.to_string() })
    }

    /// As the row holds them.
    pub(crate) fn text(&self) -> String {
        serde_json::to_string(self).expect("facts hold text, numbers and lists, all of which serialise")
    }

    /// Keeps the first problem: what came later follows from it.
    pub(crate) fn blame(&mut self, problem: Problem) {
        self.problem.get_or_insert(problem);
    }

    /// Keeps a finding while there is room.
    pub(crate) fn find(&mut self, finding: Finding) {
        if self.findings.len() < FINDINGS_LIMIT {
            self.findings.push(finding);
        }
    }
}

/// A reason as a problem.
pub(crate) fn problem_of(reason: &AbortReason) -> Problem {
    Problem::new(reason.code, reason.detail.clone())
}

/// A problem as a reason.
pub(crate) fn reason_of(problem: &Problem) -> AbortReason {
    AbortReason { code: problem.code, detail: problem.detail.clone() }
}
