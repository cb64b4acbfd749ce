//! What every gate of a decision says to a migration that nobody started.

use super::layout::columns;
use super::text::bold;
use api::http::{Explanation, Gate, GateOutcome};

/// Refused, when no gate says how.
const REFUSED: u8 = 3;

/// The gates, and what they come to.
pub(crate) fn explanation(e: &Explanation, width: usize) -> String {
    let source = e.source.as_ref().map_or_else(|| "?".to_owned(), ToString::to_string);
    let title = bold(&format!("{}: {source} to {}", e.vm, e.target));
    let gates = columns(&["GATE", "ANSWER", "WHY"], e.gates.iter().map(row).collect(), width, "no gates");
    let refused = e.gates.iter().filter(|gate| gate.outcome == GateOutcome::Refused).count();
    let verdict = match (e.allowed, refused) {
        (true, _) => "It would be permitted now; nothing was moved.".to_owned(),
        (false, 1) => "It would be refused now, by one gate; nothing was moved.".to_owned(),
        (false, n) => format!("It would be refused now, by {n} gates; nothing was moved."),
    };
    format!("{title}\n\n{gates}\n{verdict}\n")
}

fn row(gate: &Gate) -> Vec<String> {
    let answer = match gate.outcome {
        GateOutcome::Passed => "passed",
        GateOutcome::Refused => "REFUSED",
        GateOutcome::NotAsked => "-",
    };
    let code = gate.code.map(|code| format!(" [{code}]")).unwrap_or_default();
    vec![gate.name.clone(), answer.to_owned(), format!("{}{code}", gate.detail)]
}

/// As the migration itself would end: by the first gate that refuses.
pub(crate) fn exit_code(e: &Explanation) -> u8 {
    if e.allowed {
        return 0;
    }
    e.gates.iter().find_map(|gate| gate.code).map_or(REFUSED, types::ErrorCode::exit_code)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use types::ErrorCode;

    fn sample(code: Option<ErrorCode>) -> Explanation {
        let gate = |name: &str, outcome, code, detail: &str| Gate {
            name: name.to_owned(),
            outcome,
            code,
            detail: detail.to_owned(),
        };
        let outcome = if code.is_some() { GateOutcome::Refused } else { GateOutcome::Passed };
        let rest = if code.is_some() { GateOutcome::NotAsked } else { GateOutcome::Passed };
        Explanation {
            allowed: code.is_none(),
            vm: "web-1".parse().unwrap(),
            source: Some("host-a".parse().unwrap()),
            target: "host-b".parse().unwrap(),
            gates: vec![
                gate("request", GateOutcome::Passed, None, "the VM runs on host-a"),
                gate("policy", outcome, code, "policy \"zones-are-left-by-admins-only\" speaks"),
                gate("capacity", rest, None, "room"),
            ],
        }
    }

    #[test]
    fn every_gate_is_shown_and_the_first_refusal_counts() {
        let denied = sample(Some(ErrorCode::PolicyDenied));
        let text = format!("{}---\n{}", explanation(&sample(None), 80), explanation(&denied, 80));
        insta::assert_snapshot!("gates-80", anstream::adapter::strip_str(&text).to_string());
        assert_eq!((exit_code(&sample(None)), exit_code(&denied)), (0, 3));
        assert_eq!(exit_code(&sample(Some(ErrorCode::UnknownVm))), 2);
        let silent = Explanation { allowed: false, gates: vec![], ..denied };
        assert_eq!(exit_code(&silent), 3, "what no gate permits is not permitted");
    }
}
