//! One migration for people: the report at its end, and the answer to "what is going on?" before it.

use super::layout::Facts;
use super::text::{bold, cut, tone_of, toned};
use super::time::{duration, instant};
use crate::size::format_bytes;
use jiff::Timestamp;
use types::migration::{
    ChannelView, DigestsView, Finding, MigrationState, MigrationView, PermitView, StageView,
};

/// The report: as `migrate` and `migration watch` end, and as `migration show` answers.
pub(crate) fn render(view: &MigrationView, now: Timestamp, width: usize) -> String {
    let mut facts = Facts::new(title(view));
    situation(&mut facts, view, now);
    metrics(&mut facts, view);
    evidence(&mut facts, view);
    facts.render(width)
}

/// The exit code of a migration's end.
pub(crate) fn exit_code(view: &MigrationView) -> u8 {
    let code = view.problem.as_ref().map(|p| p.code.exit_code());
    match view.state {
        MigrationState::Completed => 0,
        MigrationState::Refused => 3,
        MigrationState::Terminated => 5,
        MigrationState::Failed if code == Some(5) => 5,
        _ => 4,
    }
}

fn title(view: &MigrationView) -> String {
    let (vm, source, target) = (bold(view.vm.as_str()), &view.source, &view.target);
    let state = toned(tone_of(view.state), view.state.as_str());
    match view.state {
        MigrationState::Completed => format!("{vm} moved from {source} to {target}: {state}"),
        MigrationState::Refused | MigrationState::Failed | MigrationState::Terminated => {
            format!("{vm} was not moved from {source} to {target}: {state}")
        }
        _ if view.suspended => format!("{vm}: {source} → {target}, {state}, suspended"),
        _ => format!("{vm}: {source} → {target}, {state}"),
    }
}

/// Where the VM runs, why it came so, what is awaited, what happens next by itself.
fn situation(facts: &mut Facts, view: &MigrationView, now: Timestamp) {
    facts.add("Runs on", &view.vm_runs_on);
    if let Some(problem) = &view.problem {
        facts.add("Why", format!("{} [{}]", problem.detail, problem.code));
        facts.add_some("What to do", problem.hint.as_ref());
    }
    if !view.state.is_final() {
        facts.add("Awaited", &view.awaiting);
        facts.add("Next by itself", next(view, now));
    }
    facts.add("Asked by", format!("{}, {}", view.requested_by, instant(&view.requested_at, now)));
    facts.add_some("Ended", view.ended_at.as_ref().map(|at| instant(at, now)));
    facts.add("Migration", view.id.to_string());
}

fn next(view: &MigrationView, now: Timestamp) -> String {
    match &view.next {
        Some(next) => format!("{}, at the latest {}", next.act, instant(&next.at, now)),
        None if view.suspended => "nothing; `outrider migration resume` or `terminate` goes on".to_owned(),
        None => "nothing".to_owned(),
    }
}

fn metrics(facts: &mut Facts, view: &MigrationView) {
    facts.add_some("Downtime", view.downtime_ms.map(|ms| with_parts(ms, &view.downtime_parts)));
    facts.add_some("Total time", view.total_ms.map(|ms| with_parts(ms, &view.stages)));
    if view.total_ms.is_none() && !view.stages.is_empty() {
        facts.add("Stages", parts(&view.stages));
    }
    facts.add_some(
        "Until it ran",
        view.request_to_running_ms.map(|ms| format!("{} after the request", duration(ms))),
    );
    facts.add_some("Responsive", view.time_to_responsiveness_ms.map(|ms| responsive(ms, view)));
    if view.transferred_bytes > 0 {
        facts.add("Transferred", format_bytes(view.transferred_bytes));
    }
}

fn responsive(ms: f64, view: &MigrationView) -> String {
    let basis = view.responsiveness_basis.as_deref().unwrap_or("basis not named");
    format!("{} after it ran ({basis})", duration(ms))
}

fn with_parts(ms: f64, stages: &[StageView]) -> String {
    if stages.is_empty() { duration(ms) } else { format!("{} ({})", duration(ms), parts(stages)) }
}

fn parts(stages: &[StageView]) -> String {
    let part = |s: &StageView| format!("{} {}", s.name.replace('-', " "), duration(s.duration_ms));
    stages.iter().map(part).collect::<Vec<_>>().join(", ")
}

/// What shows that it was allowed, encrypted, inspected and unchanged.
fn evidence(facts: &mut Facts, view: &MigrationView) {
    facts.add("Permit", view.permit.as_ref().map_or("none was issued".to_owned(), |p| permit(p, view)));
    facts.add_some("Channel", view.channel.as_ref().map(channel));
    facts.add_some("Multifd", multifd(view));
    facts.add_some("Digests", view.digests.as_ref().map(digests));
    facts.add("Attestation", &view.attestation);
    for found in &view.findings {
        facts.add("Finding", finding(found));
    }
}

fn permit(permit: &PermitView, view: &MigrationView) -> String {
    let decided =
        view.permit_decision_ms.map(|ms| format!(", decided in {}", duration(ms))).unwrap_or_default();
    format!("{}, issued {}, good until {}{decided}", cut(&permit.id, 17), permit.issued_at, permit.not_after)
}

fn channel(channel: &ChannelView) -> String {
    let plural = if channel.channels == 1 { "connection" } else { "connections" };
    format!(
        "{}, {}, {}, {} {plural}",
        channel.protocol, channel.cipher_suite, channel.key_exchange, channel.channels
    )
}

/// What was asked for, whether it stands yet or not.
fn multifd(view: &MigrationView) -> Option<String> {
    let plural = if view.multifd_channels == 1 { "channel" } else { "channels" };
    let method = if view.compression.is_empty() { "not compressed" } else { view.compression.as_str() };
    (view.multifd_channels > 0)
        .then(|| format!("{} {plural} beside the main one, {method}", view.multifd_channels))
}

fn digests(digests: &DigestsView) -> String {
    let short = |d: types::Digest| cut(&d.to_string(), 17);
    match (digests.source, digests.target) {
        (Some(source), Some(target)) if digests.matching && source == target => {
            format!("equal on both sides, {}", short(source))
        }
        (Some(source), Some(target)) => {
            format!("DIFFERENT: source {}, target {}", short(source), short(target))
        }
        (Some(source), None) => format!("only the source's so far, {}", short(source)),
        (None, Some(target)) => format!("only the target's so far, {}", short(target)),
        (None, None) => "none so far".to_owned(),
    }
}

fn finding(f: &Finding) -> String {
    let threat = if f.threat.is_empty() { String::new() } else { format!(" ({})", f.threat) };
    format!(
        "{}{threat}: expected {}, found {}, in {} at byte {} of channel {}; {}",
        f.rule, f.expected, f.found, f.section, f.offset, f.channel, f.response
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::samples;
    use super::*;
    use types::{ErrorCode, Problem};

    fn now() -> Timestamp {
        "2026-11-23T14:02:20Z".parse().unwrap()
    }

    fn plain(view: &MigrationView, width: usize) -> String {
        anstream::adapter::strip_str(&render(view, now(), width)).to_string()
    }

    #[test]
    fn the_report_of_a_completed_migration() {
        insta::assert_snapshot!("completed-80", plain(&samples::completed(), 80));
        insta::assert_snapshot!("completed-120", plain(&samples::completed(), 120));
    }

    #[test]
    fn the_answer_at_3_am() {
        let mut view = samples::view(0x6c, "web-1", MigrationState::MemoryTransfer);
        view.stages = vec![StageView { name: "setup".into(), duration_ms: 402.0 }];
        insta::assert_snapshot!("open-80", plain(&view, 80));
        view.suspended = true;
        view.next = None;
        assert!(plain(&view, 80).contains("memory-transfer, suspended"));
        assert!(plain(&view, 200).contains("nothing; `outrider migration resume`"));
    }

    #[test]
    fn the_report_of_a_refusal() {
        let mut view = samples::view(0x6c, "web-1", MigrationState::Refused);
        view.problem = Some(
            Problem::new(
                ErrorCode::InsufficientCapacity,
                "host-b has 1.20 GiB left and web-1 needs 4.40 GiB",
            )
            .hint("free memory on host-b or choose another target"),
        );
        insta::assert_snapshot!("refused-80", plain(&view, 80));
    }

    #[test]
    fn digests_that_differ_are_never_called_equal() {
        let mut view = samples::completed();
        view.digests.as_mut().unwrap().target = Some(types::Digest([1; 32]));
        assert!(plain(&view, 200).contains("DIFFERENT"));
    }

    #[test]
    fn the_exit_code_is_the_outcome() {
        use MigrationState::{Completed, Failed, NeedsOperator, Refused, Terminated};
        for (state, problem, code) in [
            (Completed, None, 0),
            (Refused, Some(ErrorCode::PolicyDenied), 3),
            (Refused, Some(ErrorCode::UnknownHost), 3),
            (Failed, Some(ErrorCode::HypervisorFailed), 4),
            (Failed, Some(ErrorCode::StreamRejected), 5),
            (Failed, None, 4),
            (Terminated, Some(ErrorCode::Terminated), 5),
            (NeedsOperator, None, 4),
        ] {
            let mut view = samples::view(1, "web", state);
            view.problem = problem.map(|code| Problem::new(code, "why"));
            assert_eq!(exit_code(&view), code, "{state} {problem:?}");
        }
    }
}
