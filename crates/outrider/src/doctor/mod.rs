//! `doctor`: is this machine ready for its role? Looks, changes nothing, and says what to do.

mod folders;
mod machine;
mod manager;

use crate::args::{Doctor, Format, Role};
use crate::commands::Outcome;
use crate::output::{self, layout::columns, text::clean};
use serde::Serialize;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could.
    Warn,
    /// It does not work.
    Fail,
}

impl Status {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What was looked at.
    pub(crate) check: &'static str,
    /// How it came out.
    pub(crate) status: Status,
    /// What was found.
    pub(crate) found: String,
    /// What to do, unless all is well.
    pub(crate) advice: Option<String>,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, found: found.into(), advice: None }
    }
    fn warn(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, status: Status::Warn, found: found.into(), advice: Some(advice.into()) }
    }
    fn fail(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, status: Status::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

#[derive(Debug, Serialize)]
struct Verdict {
    ready: bool,
    role: Role,
    checks: Vec<Check>,
}

impl Verdict {
    fn new(role: Role, checks: Vec<Check>) -> Self {
        Self { ready: checks.iter().all(|c| c.status != Status::Fail), role, checks }
    }
}

/// Runs the checks of a role.
pub(crate) async fn run(args: Doctor, format: Format) -> Outcome {
    let mut checks = Vec::new();
    match args.role {
        Role::Host => {
            checks.extend(machine::checks().await);
            checks.extend(folders::state("host state", &args.host_state));
            checks.push(machine::data_ports());
        }
        Role::Manager => {
            checks.extend(folders::state("manager state", &args.manager_state));
        }
        Role::Operator => {}
    }
    checks.extend(manager::checks(&args).await);
    let verdict = Verdict::new(args.role, checks);
    output::print(format, &verdict, render);
    Ok(u8::from(!verdict.ready))
}

fn render(verdict: &Verdict, width: usize) -> String {
    let rows = verdict.checks.iter().map(|c| {
        let advice = c.advice.as_ref().map(|a| format!(": {a}")).unwrap_or_default();
        vec![c.status.as_str().to_owned(), c.check.to_owned(), clean(&format!("{}{advice}", c.found))]
    });
    let table =
        columns(&["STATUS", "CHECK", "FOUND, AND WHAT TO DO"], rows.collect(), width, "nothing to check");
    let count = |status| verdict.checks.iter().filter(|c| c.status == status).count();
    let summary = if verdict.ready {
        format!("ready, with {} warnings", count(Status::Warn))
    } else {
        format!("not ready: {} checks failed, {} warnings", count(Status::Fail), count(Status::Warn))
    };
    format!("{table}\n{summary}\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_failure_makes_the_verdict_negative_and_warnings_do_not() {
        let ok = Check::ok("a", "x");
        let warn = Check::warn("b", "y", "do z");
        assert!(Verdict::new(Role::Host, vec![ok.clone(), warn.clone()]).ready);
        let verdict = Verdict::new(Role::Host, vec![ok, warn, Check::fail("c", "bad", "fix")]);
        assert!(!verdict.ready);
        let text = render(&verdict, 80);
        assert!(
            text.contains("FAIL") && text.contains("bad: fix") && text.contains("1 checks failed"),
            "{text}"
        );
        let json = serde_json::to_value(&verdict).unwrap();
        assert_eq!(json["checks"][2]["status"], "fail");
        assert_eq!(json["role"], "host");
    }
}
