//! What each machine makes of every event in every state, as snapshots: a change of a rule shows as a changed line.
#![allow(clippy::unwrap_used)]

use outrider_engine::handover::decider::{self, Continuity, HandoverRow};
use outrider_engine::handover::journal::NonceLedger;
use outrider_engine::handover::source::{self, Claim, Source};
use outrider_engine::handover::target::{self, QemuStatus, RunState, Target};
use outrider_engine::handover::{
    Attempt, QemuFacts, RenunciationProof, Resolution, TargetStatus, TimerKind, Verdict, fresh_epochs,
};
use std::fmt::{Debug, Write};
use types::handover::{
    AbortReason, HandoverKey, NoVote, PriorRunState, ReleaseReceipt, RenounceRequest, Renunciation,
    RunningReceipt, SourceVote, Statement, StreamEvidence, TargetVote, ThawReceipt,
};
use types::{Digest, Epoch, ErrorCode, MigrationId, Nonce, Side, VmId};

fn attempt() -> Attempt {
    let epochs = fresh_epochs(Epoch(6)).unwrap();
    Attempt {
        key: HandoverKey {
            migration: MigrationId::from_bytes([1; 16]),
            vm: VmId::from_bytes([2; 16]),
            source_epoch: epochs.source,
            target_epoch: epochs.target,
        },
        permit: Digest([3; 32]),
        nonce: Nonce::from_bytes([4; 16]),
        source: "host-a".parse().unwrap(),
        target: "host-b".parse().unwrap(),
        target_journal: Nonce::from_bytes([5; 16]),
        run_budget_ms: 60_000,
    }
}

fn key() -> HandoverKey {
    attempt().key
}

/// Another attempt to move the same VM.
fn other_key() -> HandoverKey {
    HandoverKey {
        migration: MigrationId::from_bytes([9; 16]),
        source_epoch: Epoch(3),
        target_epoch: Epoch(4),
        ..key()
    }
}

fn evidence() -> StreamEvidence {
    StreamEvidence { stream_bytes: 1 << 20, digest: Digest([6; 32]) }
}

fn other_evidence() -> StreamEvidence {
    StreamEvidence { stream_bytes: 1 << 20, digest: Digest([7; 32]) }
}

fn qemu() -> QemuFacts {
    QemuFacts { pid: 42, start_time_ticks: 7, boot: Nonce::from_bytes([8; 16]) }
}

fn why() -> AbortReason {
    AbortReason { code: ErrorCode::Terminated, detail: "the operator said so".to_owned() }
}

fn proof() -> RenunciationProof {
    let Attempt { key, permit, source, target, target_journal: journal, .. } = attempt();
    RenunciationProof { renunciation: Renunciation { key, permit, source, target, journal }, token: vec![1] }
}

fn detail() -> String {
    "why".to_owned()
}

/// The head of a value's debug text: the variant, and one level below where that is what matters.
fn head(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    let cut = |t: &str| t.split(['(', ' ', '{', ',', ')']).next().unwrap_or_default().to_owned();
    let after = |word: &str| text.find(word).map(|at| cut(&text[at + word.len()..]));
    match cut(&text).as_str() {
        "Journal" => format!("Journal {}", after("fact: ").unwrap()),
        "Send" => format!("Send {}", after("Send(").unwrap()),
        "SetTimer" | "ClearTimer" | "Timer" | "Done" | "Answer" | "Report" => text.replace("Cow::", ""),
        "Order" => format!("Order {}", after("order: ").unwrap()),
        "Statement" => format!("{} says {}", after("from: ").unwrap(), after("statement: ").unwrap()),
        "Source" => format!("source: {}", after("Source(").unwrap()),
        "Target" => format!("target: {}", after("Target(").unwrap()),
        other => other.to_owned(),
    }
}

fn row(out: &mut String, event: &str, next: &str, verdict: &str, effects: &[String]) {
    let parts = [verdict.to_owned(), next.to_owned(), effects.join(", ")];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    writeln!(out, "  {event:<40} {}", parts.join(" | ")).unwrap();
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accepted => "accepted".to_owned(),
        Verdict::Ignored => "ignored".to_owned(),
        Verdict::Refused(refusal) => format!("refused {refusal:?}"),
    }
}

fn arrow(before: &str, after: &str) -> String {
    if before == after { String::new() } else { format!("-> {after}") }
}

// ---- source ----

fn started() -> Source {
    Source::start(Claim::new([], []).unwrap(), attempt(), qemu(), PriorRunState::Running).0
}

fn source_order(order: source::Order) -> source::Event {
    source::Event::Order { key: key(), order }
}

fn source_after(events: &[source::Event]) -> Source {
    let mut source = started();
    for event in events {
        source.handle(event.clone());
    }
    source
}

fn source_states() -> Vec<Source> {
    use source::Event as E;
    use source::Order as O;
    let frozen = [E::GuestStopped, E::EndOfStream(evidence()), E::FreezeConfirmed, E::ProofOk];
    let then = |more: &[E]| source_after(&[frozen.as_slice(), more].concat());
    vec![
        started(),
        source_after(&[source_order(O::Suspend)]),
        source_after(&frozen[..1]),
        source_after(&frozen[..2]),
        source_after(&frozen[..3]),
        then(&[]),
        then(&[E::Timer(TimerKind::Watchdog)]),
        then(&[E::QemuDied]),
        then(&[E::Renounced(proof())]),
        then(&[E::Renounced(proof()), E::Cancelled]),
        then(&[source_order(O::Release)]),
        then(&[source_order(O::Release), E::QemuDied]),
        source_after(&[source_order(O::Abort { reason: why() })]),
        source_after(&[source_order(O::Abort { reason: why() }), E::Cancelled]),
        source_after(&[E::QemuDied]),
        then(&[source_order(O::Release), E::QemuDied, source_order(O::Close)]),
    ]
}

fn source_events() -> Vec<source::Event> {
    use source::Event as E;
    use source::Order as O;
    let foreign = RenunciationProof {
        renunciation: Renunciation { key: other_key(), ..proof().renunciation },
        ..proof()
    };
    let mut events = vec![
        E::GuestStopped,
        E::GuestResumed,
        E::EndOfStream(evidence()),
        E::FreezeConfirmed,
        E::FreezeFailed { detail: detail() },
        E::ProofOk,
        E::ProofFailed { detail: detail() },
        E::MigrationFailed { detail: detail() },
        E::Cancelled,
        E::Renounced(proof()),
        E::Renounced(foreign),
        E::QemuDied,
        E::KillRefused { detail: detail() },
        E::ChannelLost { detail: detail() },
        E::ManagerContact,
    ];
    let orders = [
        O::Suspend,
        O::Resume,
        O::Abort { reason: why() },
        O::Release,
        O::Fenced { resolution: Resolution::Thaw },
        O::Fenced { resolution: Resolution::Discard },
        O::Present,
        O::Close,
    ];
    events.extend(orders.map(source_order));
    events.push(E::Order { key: other_key(), order: O::Release });
    for status in [TargetStatus::NoRecord, TargetStatus::NotRun, TargetStatus::Running] {
        events.push(E::TargetStatus { key: key(), status });
    }
    events.extend([TimerKind::Switchover, TimerKind::Watchdog, TimerKind::Resend].map(E::Timer));
    events
}

fn source_event_name(event: &source::Event) -> String {
    match event {
        source::Event::Order { key, .. } if *key != self::key() => {
            format!("{} of another attempt", head(event))
        }
        source::Event::Order { order: source::Order::Fenced { resolution }, .. } => {
            format!("Order Fenced {resolution:?}")
        }
        source::Event::Renounced(p) if p.renunciation.key != key() => {
            "Renounced of another attempt".to_owned()
        }
        source::Event::TargetStatus { status, .. } => format!("TargetStatus {status:?}"),
        other => head(other),
    }
}

#[test]
fn source_table() {
    let mut out = String::new();
    for state in source_states() {
        let mut header = state.state_name().to_owned();
        if Claim::new([&state], []).is_some() {
            header.push_str(" (has let go of QEMU)");
        }
        writeln!(out, "{header}").unwrap();
        for event in source_events() {
            let mut machine = state.clone();
            let reaction = machine.handle(event.clone());
            let effects: Vec<_> = reaction.effects.iter().map(head).collect();
            let next = arrow(state.state_name(), machine.state_name());
            row(&mut out, &source_event_name(&event), &next, &verdict(&reaction.verdict), &effects);
        }
    }
    insta::assert_snapshot!(out);
}

// ---- target ----

fn target_after(events: &[target::Event]) -> Target {
    let mut target = Target::prepare(attempt(), &mut NonceLedger::default()).unwrap().0;
    for event in events {
        target.handle(event.clone());
    }
    target
}

fn target_order(order: target::Order) -> target::Event {
    target::Event::Order { key: key(), order }
}

fn commit() -> target::Order {
    target::Order::Commit { evidence: evidence(), prior: PriorRunState::Running }
}

fn status(completed: bool, run: RunState) -> target::Event {
    target::Event::QemuStatus(QemuStatus { completed, run })
}

fn target_states() -> Vec<Target> {
    use target::Event as E;
    use target::Order as O;
    let ready = status(true, RunState::Paused);
    let run = [
        E::QemuPrepared(qemu()),
        E::StreamAccepted(evidence()),
        ready.clone(),
        target_order(commit()),
        ready,
        E::ContDone,
        target_order(O::Close),
    ];
    let mut states: Vec<_> = (0..=run.len()).map(|n| target_after(&run[..n])).collect();
    states.push(target_after(&[E::PrepareFailed { detail: detail() }]));
    states.push(target_after(&[E::PrepareFailed { detail: detail() }, E::QemuDied]));
    states.push(target_after(&[run[0].clone(), status(true, RunState::Running)]));
    states
}

fn target_events() -> Vec<target::Event> {
    use target::Event as E;
    use target::Order as O;
    let other = O::Commit { evidence: other_evidence(), prior: PriorRunState::Running };
    let paused = O::Commit { evidence: evidence(), prior: PriorRunState::Paused };
    vec![
        E::QemuPrepared(qemu()),
        E::PrepareFailed { detail: detail() },
        E::StreamAccepted(evidence()),
        E::StreamRejected { detail: detail() },
        status(true, RunState::Paused),
        status(false, RunState::InMigrate),
        status(true, RunState::Running),
        E::ContDone,
        E::ContRefused { still_paused: true },
        E::ContRefused { still_paused: false },
        target_order(commit()),
        target_order(paused),
        target_order(other),
        E::Order { key: other_key(), order: commit() },
        target_order(O::Abort { reason: why() }),
        target_order(O::Void { reason: why() }),
        target_order(O::Present),
        target_order(O::Close),
        E::Asked(RenounceRequest { key: key(), permit: attempt().permit }),
        E::Asked(RenounceRequest { key: other_key(), permit: attempt().permit }),
        E::Timer(TimerKind::Resend),
        E::Timer(TimerKind::Poll),
        E::Timer(TimerKind::RunBudget),
        E::QemuDied,
        E::ChannelLost { detail: detail() },
        E::ManagerContact,
    ]
}

fn target_event_name(event: &target::Event) -> String {
    use target::Event as E;
    use target::Order as O;
    match event {
        E::Order { key, .. } if *key != self::key() => format!("{} of another attempt", head(event)),
        E::Asked(request) if request.key != key() => "Asked about another attempt".to_owned(),
        E::Order { order: O::Commit { evidence, .. }, .. } if *evidence != self::evidence() => {
            "Order Commit of another stream".to_owned()
        }
        E::Order { order: O::Commit { prior: PriorRunState::Paused, .. }, .. } => {
            "Order Commit, paused".to_owned()
        }
        E::QemuStatus(status) => format!("QemuStatus completed: {}, {:?}", status.completed, status.run),
        E::ContRefused { still_paused } => format!("ContRefused still_paused: {still_paused}"),
        other => head(other),
    }
}

#[test]
fn target_table() {
    let mut out = String::new();
    for state in target_states() {
        writeln!(out, "{}", state.state_name()).unwrap();
        for event in target_events() {
            let mut machine = state.clone();
            let reaction = machine.handle(event.clone());
            let effects: Vec<_> = reaction.effects.iter().map(head).collect();
            let next = arrow(state.state_name(), machine.state_name());
            row(&mut out, &target_event_name(&event), &next, &verdict(&reaction.verdict), &effects);
        }
    }
    insta::assert_snapshot!(out);
}

// ---- decider ----

fn says(from: Side, statement: Statement) -> decider::Event {
    decider::Event::Statement { from, statement }
}

fn source_vote() -> SourceVote {
    SourceVote { key: key(), permit: attempt().permit, evidence: evidence(), prior: PriorRunState::Running }
}

fn target_vote() -> TargetVote {
    TargetVote { key: key(), permit: attempt().permit, evidence: evidence() }
}

fn receipt() -> RunningReceipt {
    RunningReceipt {
        key: key(),
        permit: attempt().permit,
        evidence: evidence(),
        state: PriorRunState::Running,
    }
}

fn decider_events() -> Vec<(&'static str, decider::Event)> {
    use decider::Event as E;
    let Attempt { permit, .. } = attempt();
    vec![
        ("FROZEN", says(Side::Source, Statement::Frozen(source_vote()))),
        ("FROZEN, signed by the target", says(Side::Target, Statement::Frozen(source_vote()))),
        (
            "FROZEN of another attempt",
            says(Side::Source, Statement::Frozen(SourceVote { key: other_key(), ..source_vote() })),
        ),
        (
            "FROZEN of another stream",
            says(Side::Source, Statement::Frozen(SourceVote { evidence: other_evidence(), ..source_vote() })),
        ),
        ("PREPARED", says(Side::Target, Statement::Prepared(target_vote()))),
        (
            "PREPARED of another permit",
            says(Side::Target, Statement::Prepared(TargetVote { permit: Digest([0; 32]), ..target_vote() })),
        ),
        (
            "PREPARED of another stream",
            says(
                Side::Target,
                Statement::Prepared(TargetVote { evidence: other_evidence(), ..target_vote() }),
            ),
        ),
        ("NO-VOTE", says(Side::Source, Statement::NoVote(NoVote { key: key(), reason: why() }))),
        ("RUNNING", says(Side::Target, Statement::Running(receipt()))),
        (
            "RUNNING of another stream",
            says(
                Side::Target,
                Statement::Running(RunningReceipt { evidence: other_evidence(), ..receipt() }),
            ),
        ),
        ("RENOUNCED", E::Renounced(proof())),
        (
            "RENOUNCED of another journal",
            E::Renounced(RenunciationProof {
                renunciation: Renunciation { journal: Nonce::from_bytes([0; 16]), ..proof().renunciation },
                ..proof()
            }),
        ),
        (
            "RELEASED",
            says(Side::Source, Statement::Released(ReleaseReceipt { key: key(), evidence: evidence() })),
        ),
        ("THAWED", says(Side::Source, Statement::Thawed(ThawReceipt { key: key(), had_voted: true }))),
        ("ASK", says(Side::Source, Statement::AskRenounce(RenounceRequest { key: key(), permit }))),
        ("abort requested", E::AbortRequested(why())),
        ("source silent", E::SourceSilent),
        ("target fenced", E::TargetFenced),
        ("source fenced", E::SourceFenced),
    ]
}

fn row_after(names: &[&str]) -> HandoverRow {
    let mut row = HandoverRow::new(&attempt());
    for name in names {
        let (_, event) = decider_events().into_iter().find(|(n, _)| n == name).unwrap();
        row = decider::decide(&row, event).unwrap().row;
    }
    row
}

#[test]
fn decider_table() {
    let paths: &[&[&str]] = &[
        &[],
        &["abort requested"],
        &["FROZEN"],
        &["PREPARED"],
        &["FROZEN", "abort requested", "PREPARED"],
        &["FROZEN", "PREPARED"],
        &["FROZEN", "PREPARED", "RUNNING"],
        &["FROZEN", "PREPARED", "RUNNING", "RELEASED"],
        &["NO-VOTE"],
        &["NO-VOTE", "RENOUNCED"],
        &["FROZEN", "RENOUNCED"],
        &["FROZEN", "RENOUNCED", "THAWED"],
        &["FROZEN", "PREPARED", "RENOUNCED"],
        &["FROZEN", "target fenced"],
        &["FROZEN", "PREPARED", "target fenced"],
        &["FROZEN", "PREPARED", "target fenced", "RELEASED"],
        &["FROZEN", "PREPARED", "RUNNING", "target fenced"],
    ];
    let mut out = String::new();
    for path in paths {
        let before = row_after(path);
        writeln!(
            out,
            "after {path:?}: {}{}",
            head(&before.state),
            if before.is_final() { ", final" } else { "" }
        )
        .unwrap();
        decider_rows(&mut out, &before);
    }
    let forgetful = HandoverRow { continuity: Continuity::Unproven, ..row_after(&["FROZEN"]) };
    writeln!(out, "after [\"FROZEN\"], registry restored: {}", head(&forgetful.state)).unwrap();
    decider_rows(&mut out, &forgetful);
    let fenced = decider::decide(&forgetful, decider::Event::TargetFenced).unwrap().row;
    writeln!(out, "after [\"FROZEN\"], registry restored, target fenced: {}", head(&fenced.state)).unwrap();
    decider_rows(&mut out, &fenced);
    let fenced = decider::decide(&forgetful, decider::Event::SourceFenced).unwrap().row;
    writeln!(out, "after [\"FROZEN\"], registry restored, source fenced: {}", head(&fenced.state)).unwrap();
    decider_rows(&mut out, &fenced);
    insta::assert_snapshot!(out);
}

fn decider_rows(out: &mut String, before: &HandoverRow) {
    for (name, event) in decider_events() {
        match decider::decide(before, event) {
            Err(refusal) => row(out, name, "", &format!("refused {refusal:?}"), &[]),
            Ok(outcome) => {
                let mut effects: Vec<_> = match &outcome.decision {
                    decider::Decision::Keep => Vec::new(),
                    other => vec![head(other)],
                };
                effects.extend(outcome.orders.iter().map(head));
                let next = arrow(&head(&before.state), &head(&outcome.row.state));
                let same = if outcome.row == *before { "unchanged" } else { "accepted" };
                row(out, name, &next, same, &effects);
            }
        }
    }
}
