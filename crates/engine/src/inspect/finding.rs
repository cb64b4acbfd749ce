//! A verdict as an operator reads it.

use super::devices::{JudgedSection, Vouched};
use types::migration::{Finding, Severity};
use wire::qemu::Violation;

/// A VM has some forty devices, and a migration's list of findings has room for other things too.
const MAX_UNVOUCHED: usize = 16;
const MAX_NAMES_CHARS: usize = 600;

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

/// Findings about devices of which nothing vouches for all values, where the permit lets them through; the last one
/// counts those for which there is no room.
#[must_use]
pub fn unvouched(sections: &[JudgedSection]) -> Vec<Finding> {
    let weak: Vec<_> = sections.iter().filter(|section| section.vouched != Vouched::Layout).collect();
    let shown = if weak.len() > MAX_UNVOUCHED { MAX_UNVOUCHED - 1 } else { weak.len() };
    let (each, rest) = weak.split_at(shown);
    let mut findings: Vec<_> = each.iter().map(|section| unvouched_finding(section)).collect();
    if let Some(first) = rest.first() {
        let names = rest.iter().map(|section| section.name.as_str()).collect::<Vec<_>>().join(", ");
        let cut: String = names.chars().take(MAX_NAMES_CHARS).collect();
        let more = if cut.len() < names.len() { ", …" } else { "" };
        let found = format!("{} more without one: {cut}{more}", rest.len());
        findings.push(Finding { section: "devices".to_owned(), found, ..unvouched_finding(first) });
    }
    findings
}

fn unvouched_finding(section: &JudgedSection) -> Finding {
    let found = match section.vouched {
        Vouched::Layout => "one",
        Vouched::FixedLength => "a length that is known; its values were not looked at",
        Vouched::Partly => "a part that none tells; what is before and behind it was looked at",
        Vouched::UniqueCut => "one possible end only; its values were not looked at",
    };
    Finding {
        rule: "INV-D2".to_owned(),
        threat: threat("INV-D2").to_owned(),
        severity: Severity::Warning,
        channel: 0,
        offset: section.offset,
        section: section.name.clone(),
        expected: "a layout from the target's QEMU".to_owned(),
        found: found.to_owned(),
        response: "let through and reported, as the permit says".to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn section(n: usize, vouched: Vouched) -> JudgedSection {
        JudgedSection {
            name: format!("device-{n}"),
            instance: 0,
            version: 1,
            offset: n as u64,
            bytes: 1,
            vouched,
        }
    }

    #[test]
    fn every_device_without_a_layout_is_named_and_the_list_is_bounded() {
        assert_eq!(unvouched(&[section(1, Vouched::Layout)]), []);
        let all = [Vouched::FixedLength, Vouched::Layout, Vouched::Partly, Vouched::UniqueCut];
        let sections: Vec<_> = all.into_iter().enumerate().map(|(n, vouched)| section(n, vouched)).collect();
        let found = unvouched(&sections);
        let names: Vec<_> = found.iter().map(|f| (f.section.as_str(), f.offset)).collect();
        assert_eq!(names, [("device-0", 0), ("device-2", 2), ("device-3", 3)]);
        assert!(found.iter().all(|f| f.severity == Severity::Warning && f.threat == "MM-11"));
        for count in [MAX_UNVOUCHED, MAX_UNVOUCHED + 1, 4096] {
            let many: Vec<_> = (0..count).map(|n| section(n, Vouched::UniqueCut)).collect();
            let found = unvouched(&many);
            assert_eq!(found.len(), MAX_UNVOUCHED);
            let told: usize = found.iter().map(|f| if f.section == "devices" { 0 } else { 1 }).sum();
            let rest = found.last().map(|f| f.found.as_str()).unwrap_or_default();
            assert!(
                count == told || rest.starts_with(&format!("{} more without one: device-15", count - told))
            );
            assert!(rest.len() < 2 * MAX_NAMES_CHARS);
        }
    }
}
