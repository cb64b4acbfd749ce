//! What the pure halves ask the session to do.

use types::ErrorCode;
use types::agent::{EndedBy, FromAgent};
use types::handover::StreamEvidence;
use wire::frame::Control;

/// One act.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// A frame to the other agent, on the main lane.
    Frame(Control),
    /// The end of a lane's stream.
    EndOfLane(u16, StreamEvidence),
    /// Bytes of the return path to the other agent.
    Return(Vec<u8>),
    /// A message to the daemon.
    Report(Box<FromAgent>),
    /// Bytes to QEMU, on the main lane.
    ToHypervisor(Vec<u8>),
    /// Close the channel to the other agent, all lanes.
    DropPeer,
    /// Report, tell the peer where there is something to tell, close everything and end.
    End(End),
}

/// Why and how a session ends.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// What goes to the daemon at last; nothing when the daemon asked for it or is gone.
    pub report: Option<Box<FromAgent>>,
    /// What the other agent is told.
    pub abort: Option<(ErrorCode, String)>,
}

impl Effect {
    /// A report.
    #[must_use]
    pub fn report(message: FromAgent) -> Self {
        Self::Report(Box::new(message))
    }

    /// The end, because of `what`; the other agent is told `code`.
    #[must_use]
    pub fn end(what: EndedBy, detail: impl Into<String>, code: ErrorCode) -> Self {
        let detail = detail.into();
        let ended = FromAgent::Ended { what, detail: detail.clone(), digest: None };
        Self::End(End { report: Some(Box::new(ended)), abort: Some((code, detail)) })
    }

    /// The end, because the inspector refused the stream.
    #[must_use]
    pub fn reject(finding: types::migration::Finding) -> Self {
        let text = format!("{} at byte {}", finding.rule, finding.offset);
        let report = Box::new(FromAgent::Rejected { finding: Box::new(finding) });
        Self::End(End { report: Some(report), abort: Some((ErrorCode::StreamRejected, text)) })
    }
}
