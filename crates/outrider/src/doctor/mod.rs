//! `doctor`: is this machine ready for its role? Looks, changes nothing, and says what to do.

mod folders;
mod identity;
mod machine;
mod manager;

use crate::args::{Doctor, Format, Role};
use crate::commands::Outcome;
use crate::output;
use crate::output::layout::wrap;
use crate::output::text::{Tone, clean, toned};
use serde::Serialize;
use std::time::SystemTime;

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

    const fn tone(self) -> Tone {
        match self {
            Self::Ok => Tone::Good,
            Self::Warn => Tone::Attention,
            Self::Fail => Tone::Bad,
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
            checks.push(identity::check(&args.host_state, SystemTime::now()));
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
    let lines = verdict.checks.iter().map(|check| line(check, width));
    format!("{}\n{}\n", lines.collect::<String>(), summary(verdict))
}

/// Status, name and finding in columns; the advice under the finding, marked.
fn line(check: &Check, width: usize) -> String {
    const STATUS_WIDTH: usize = 6;
    const NAME_WIDTH: usize = 15;
    const INDENT: usize = STATUS_WIDTH + NAME_WIDTH;
    let room = width.saturating_sub(INDENT).max(20);
    let mut lines = wrap(&clean(&check.found), room);
    if let Some(advice) = &check.advice {
        let advice = wrap(&clean(advice), room.saturating_sub(2));
        lines.extend(
            advice.iter().enumerate().map(|(i, l)| format!("{} {l}", if i == 0 { "→" } else { " " })),
        );
    }
    let word = check.status.as_str();
    let head = format!(
        "{}{:pad$}{:NAME_WIDTH$}",
        toned(check.status.tone(), word),
        "",
        check.check,
        pad = STATUS_WIDTH - word.len()
    );
    format!("{head}{}\n", lines.join(&format!("\n{:INDENT$}", "")))
}

fn summary(verdict: &Verdict) -> String {
    let count = |status, what: &str| {
        let n = verdict.checks.iter().filter(|c| c.status == status).count();
        format!("{n} {what}{}", if n == 1 { "" } else { "s" })
    };
    let warnings = count(Status::Warn, "warning");
    if verdict.checks.iter().all(|c| c.status == Status::Ok) {
        "ready".to_owned()
    } else if verdict.ready {
        format!("ready, {warnings}")
    } else {
        format!("not ready: {}, {warnings}", count(Status::Fail, "failure"))
    }
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
        let text = anstream::adapter::strip_str(&render(&verdict, 80)).to_string();
        let expected = "ok    a              x\n\
                        warn  b              y\n                     → do z\n\
                        FAIL  c              bad\n                     → fix\n\n\
                        not ready: 1 failure, 1 warning\n";
        assert_eq!(text, expected);
        let json = serde_json::to_value(&verdict).unwrap();
        assert_eq!(json["checks"][2]["status"], "fail");
        assert_eq!(json["role"], "host");
    }
}
