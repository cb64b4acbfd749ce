//! Domain separation: the kinds of signed things.

use types::handover::Statement;

/// What a signature is for. It is part of the signed bytes, twice: as COSE content type in the protected header
/// and as external data, so that a signature of one kind can never be presented as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Domain {
    /// A permit.
    Permit,
    /// A request for a migration.
    Request,
    /// The source's vote.
    Frozen,
    /// The source's refusal to vote.
    NoVote,
    /// The target's vote.
    Prepared,
    /// The target's running receipt.
    Running,
    /// The target's renunciation.
    Renounced,
    /// The source's request for a renunciation.
    AskRenounce,
    /// The source's receipt that its copy is destroyed.
    Released,
    /// The source's receipt that its guest runs again.
    Thawed,
    /// A signed head of the audit log.
    AuditCheckpoint,
    /// An entry of a daemon's journal.
    JournalEntry,
    /// A plan of maintenance.
    MaintenancePlan,
}

impl Domain {
    /// Every domain.
    pub const ALL: [Self; 13] = [
        Self::Permit,
        Self::Request,
        Self::Frozen,
        Self::NoVote,
        Self::Prepared,
        Self::Running,
        Self::Renounced,
        Self::AskRenounce,
        Self::Released,
        Self::Thawed,
        Self::AuditCheckpoint,
        Self::JournalEntry,
        Self::MaintenancePlan,
    ];

    /// The text that is signed.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Permit => "outrider-permit-v1",
            Self::Request => "outrider-request-v1",
            Self::Frozen => "outrider-frozen-v1",
            Self::NoVote => "outrider-no-vote-v1",
            Self::Prepared => "outrider-prepared-v1",
            Self::Running => "outrider-running-v1",
            Self::Renounced => "outrider-renounced-v1",
            Self::AskRenounce => "outrider-ask-renounce-v1",
            Self::Released => "outrider-released-v1",
            Self::Thawed => "outrider-thawed-v1",
            Self::AuditCheckpoint => "outrider-audit-checkpoint-v1",
            Self::JournalEntry => "outrider-journal-entry-v1",
            Self::MaintenancePlan => "outrider-maintenance-plan-v1",
        }
    }

    pub(crate) fn of(statement: &Statement) -> Self {
        match statement {
            Statement::Request(_) => Self::Request,
            Statement::Frozen(_) => Self::Frozen,
            Statement::NoVote(_) => Self::NoVote,
            Statement::Prepared(_) => Self::Prepared,
            Statement::Running(_) => Self::Running,
            Statement::Renounced(_) => Self::Renounced,
            Statement::AskRenounce(_) => Self::AskRenounce,
            Statement::Released(_) => Self::Released,
            Statement::Thawed(_) => Self::Thawed,
        }
    }

    pub(crate) fn content_type(self) -> String {
        format!("application/{}", self.as_str())
    }
}
