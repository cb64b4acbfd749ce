//! Policies, and what a table of expectations came to.

use super::layout::columns;
use super::text::clean;
use api::http::{PlanView, PolicyItem, PolicySetView};
use manager::policy_table::{CaseReport, PolicyView, TableReport};

/// The policies of a set.
pub(crate) fn list(policies: &[PolicyView], width: usize) -> String {
    let row = |p: &PolicyView| {
        vec![p.id.clone(), p.effect.to_owned(), p.reason.clone().unwrap_or_else(|| "-".to_owned())]
    };
    let table = columns(&["POLICY", "EFFECT", "REASON"], policies.iter().map(row).collect(), width, "none");
    format!("{table}\n{} policies, all valid; what none permits is denied\n", policies.len())
}

/// A set in force: which it is, then its policies.
pub(crate) fn set(set: &PolicySetView, width: usize) -> String {
    let row = |p: &PolicyItem| {
        vec![p.id.clone(), p.effect.clone(), p.reason.clone().unwrap_or_else(|| "-".to_owned())]
    };
    let table =
        columns(&["POLICY", "EFFECT", "REASON"], set.policies.iter().map(row).collect(), width, "none");
    let since = set.applied_at.as_deref().map_or_else(String::new, |at| format!(" at {}", clean(at)));
    format!("Set {} ({}), by {}{since}\n\n{table}", set.sequence, clean(&set.digest), clean(&set.applied_by))
}

/// Every set that was applied, newest first.
pub(crate) fn history(sets: &[PolicySetView], width: usize) -> String {
    let row = |s: &PolicySetView| {
        let digest = s.digest.chars().take(16).collect();
        vec![s.sequence.to_string(), digest, s.applied_at.clone().unwrap_or_default(), s.applied_by.clone()]
    };
    let empty = "no set was ever applied: the manager's configuration is in force";
    columns(&["SET", "DIGEST", "SINCE", "BY"], sets.iter().map(row).collect(), width, empty)
}

/// Plans of maintenance.
pub(crate) fn plans(plans: &[PlanView], width: usize) -> String {
    let any = |names: Vec<String>| if names.is_empty() { "any".to_owned() } else { names.join(", ") };
    let row = |p: &PlanView| {
        let targets = any(p.targets.iter().map(ToString::to_string).collect());
        let until = p.not_after.clone().unwrap_or_else(|| "-".to_owned());
        vec![p.id.clone(), p.state.clone(), p.host.to_string(), targets, any(p.zones.clone()), until]
    };
    let headings = ["PLAN", "STATE", "FROM", "TO", "ZONES", "UNTIL"];
    columns(&headings, plans.iter().map(row).collect(), width, "there are no plans")
}

/// What every case came to, and then the failed ones in words.
pub(crate) fn report(report: &TableReport, width: usize) -> String {
    let row = |case: &CaseReport| {
        let by = if case.by.is_empty() { "default".to_owned() } else { case.by.join(", ") };
        let passed = if case.passed { "ok" } else { "FAILED" };
        vec![passed.to_owned(), case.name.clone(), case.question.clone(), case.found.to_string(), by]
    };
    let rows = report.cases.iter().map(row).collect();
    let mut out = columns(&["", "CASE", "QUESTION", "DECIDED", "BY"], rows, width, "no cases");
    out.push('\n');
    for case in report.cases.iter().filter(|case| !case.passed) {
        out.push_str(&failure(case));
    }
    let passed = report.cases.len() - report.failed;
    out.push_str(&format!(
        "{passed} of {} cases as expected, {} policies\n",
        report.cases.len(),
        report.policies
    ));
    out
}

fn failure(case: &CaseReport) -> String {
    let by = case.expected_by.as_ref().map(|id| format!(" by {id}")).unwrap_or_default();
    let why = match &case.reason {
        Some(reason) => format!(": {reason}"),
        None => format!(" by {}", case.by.join(", ")),
    };
    format!("{}: expected {}{by}, decided {}{why}\n", case.name, case.expected, case.found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_table_says_what_was_decided_and_what_was_not_expected() {
        let table = "[hosts.a]\n[hosts.b]\nzone = 'far'\n[vms.web-1]\n\
            [[case]]\nname = 'evacuation'\nrole = 'admin'\naction = 'migrate'\nvm = 'web-1'\nsource = 'a'\n\
            target = 'b'\nexpect = 'allow'\n\
            [[case]]\nprincipal = 'ann'\nrole = 'operator'\naction = 'migrate'\nvm = 'web-1'\nsource = 'a'\n\
            target = 'b'\nexpect = 'allow'\n\
            [[case]]\nrole = 'viewer'\naction = 'audit'\nexpect = 'deny'\n\
            [[case]]\nrole = 'viewer'\naction = 'view'\nexpect = 'allow'\nby = 'mine'\n";
        let found = manager::policy_table::test(None, &toml::from_str(table).unwrap()).unwrap();
        let text = format!(
            "{}---\n{}",
            report(&found, 100),
            list(&manager::policy_table::check(None).unwrap(), 100)
        );
        insta::assert_snapshot!("policies-100", anstream::adapter::strip_str(&text).to_string());
    }
}
