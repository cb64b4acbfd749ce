//! A verdict as an operator reads it.

use types::migration::{Finding, Severity};
use wire::qemu::Violation;

/// The finding of a violation, as it is reported.
#[must_use]
pub fn finding(violation: &Violation, channel: u16, response: &str) -> Finding {
    Finding {
        rule: violation.rule.to_owned(),
        threat: threat(violation.rule).to_owned(),
        severity: Severity::Critical,
        channel,
        offset: violation.offset,
        section: violation.section.clone(),
        expected: violation.expected.clone(),
        found: violation.found.clone(),
        response: response.to_owned(),
    }
}

/// The threat that a rule stands against.
fn threat(rule: &str) -> &'static str {
    match rule {
        "INV-T5" | "INV-D9" | "INV-R15" => "MM-12",
        "INV-R3" | "INV-R4" | "INV-R6" | "INV-R7" | "INV-R8" | "INV-R9" | "INV-M4" | "INV-M5" => "MM-04",
        "INV-R2" | "INV-S2" | "INV-S6" | "INV-S9" | "INV-S11" | "INV-E3" => "MM-05",
        "INV-S5" | "INV-S7" | "INV-S10" => "MM-06",
        "INV-D4" | "INV-D5" | "INV-D6" | "INV-D7" | "INV-D8" | "INV-M10" => "MM-07",
        "INV-C2" | "INV-C3" | "INV-C8" => "MM-08",
        "INV-M7" | "INV-R11" => "MM-09",
        "INV-R14" => "MM-10",
        "INV-D2" | "INV-D3" | "INV-E2" => "MM-11",
        _ => "MM-01",
    }
}
