//! The fault matrix, F-01 to F-44: one row for each, and a test for each that is a matter of the hand-over's machines.
//!
//! A test walks the production machines (in [`outrider_engine::handover::model`]) to each point that its row names, lets
//! the fault strike, and lets a fair run come to rest: every wait is over, everything is sent again. The rest is then
//! what the row expects: where a copy runs, and that the manager's row has ended. Rows about something else name the
//! tests that are about it, or say what is missing. `docs/model.md` has the table for people.
#![allow(clippy::unwrap_used)]

use Expect::{AtMostOnce, Nowhere, Once, Source, Target};
use outrider_engine::handover::TimerKind;
use outrider_engine::handover::model::{Action, Ask, Config, Message, Model, Notice, Stand, State, Stir};
use std::path::Path;
use types::Side;

const A: u8 = 0;
const B: u8 = 1;
/// The QEMU that runs the VM before, and the target's.
const QA: u8 = 0;
const QB: u8 = 1;

/// Points of a hand-over: a fault strikes when this much has happened, and nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum P {
    /// The permit is durable.
    Permit = 2,
    /// It was delivered and is consumed.
    Delivered,
    /// The target's QEMU waits.
    Prepared,
    Streaming,
    /// The source's vote is durable.
    Frozen,
    /// The target holds everything and has voted.
    Complete,
    /// Both votes are durable, one is in the registry.
    Voted,
    /// The commit is in the registry.
    Decided,
    /// The target has journalled RUN.
    Granted,
    /// It runs.
    Running,
    /// The registry has the receipt.
    Receipt,
    /// The source's copy is destroyed.
    Destroyed,
    Closed,
}

const POINTS: [P; 13] = [
    P::Permit,
    P::Delivered,
    P::Prepared,
    P::Streaming,
    P::Frozen,
    P::Complete,
    P::Voted,
    P::Decided,
    P::Granted,
    P::Running,
    P::Receipt,
    P::Destroyed,
    P::Closed,
];

fn between(first: P, last: P) -> impl Iterator<Item = P> {
    POINTS.into_iter().filter(move |p| *p >= first && *p <= last)
}

/// Where a copy runs in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Source,
    Target,
    /// On one of them.
    Once,
    AtMostOnce,
    /// The VM crashed, or restarts from its disk.
    Nowhere,
}

/// A hand-over under way.
struct Trial {
    model: Model,
    state: State,
    /// Every state on the way.
    passed: Vec<State>,
}

impl Trial {
    fn at(point: P) -> Self {
        Self::with(Config::one(9), point)
    }

    fn with(config: Config, point: P) -> Self {
        let model = Model::new(config);
        let mut trial = Self { state: model.first(), model, passed: Vec::new() };
        for next in between(P::Delivered, point) {
            trial.advance(next);
        }
        trial
    }

    /// From the point before to this one.
    fn advance(&mut self, point: P) {
        match point {
            P::Permit => {}
            P::Delivered => self.does(Action::Deliver(0, Message::Prepare)),
            P::Prepared => self.finish(Side::Target),
            P::Streaming => {
                self.does(Action::Transact(0, Ask::Hears(Message::Ready)));
                self.does(Action::Deliver(0, Message::Start));
                self.finish(Side::Source);
            }
            P::Frozen => {
                self.stop_guest();
                self.does(Action::Stir(0, Stir::EndSeen));
                self.does(Action::Notice(0, Side::Source, Notice::EndOfStream));
                self.finish(Side::Source);
            }
            P::Complete => self.complete(),
            P::Voted => self.does(Action::Transact(0, Ask::Hears(Message::Prepared))),
            P::Decided => self.does(Action::Transact(0, Ask::Hears(Message::Frozen))),
            P::Granted => self.does(Action::Deliver(0, Message::Commit)),
            P::Running => self.finish(Side::Target),
            P::Receipt => self.does(Action::Transact(0, Ask::Hears(Message::Running))),
            P::Destroyed => {
                self.does(Action::Deliver(0, Message::Release));
                self.finish(Side::Source);
            }
            P::Closed => {
                self.does(Action::Transact(0, Ask::Hears(Message::Released)));
                self.does(Action::Deliver(0, Message::CloseSource));
                self.finish(Side::Source);
                self.does(Action::Deliver(0, Message::CloseTarget));
                self.finish(Side::Target);
            }
        }
        let Stand { source, target, row, .. } = self.stand();
        let expected = match point {
            P::Permit => ("", "", "open"),
            P::Delivered => ("", "preparing", "open"),
            P::Prepared => ("", "receiving", "open"),
            P::Streaming => ("streaming", "receiving", "open"),
            P::Frozen => ("voted", "receiving", "open"),
            P::Complete | P::Voted => ("voted", "voted", "open"),
            P::Decided => ("voted", "voted", "committed"),
            P::Granted => ("voted", "starting", "committed"),
            P::Running => ("voted", "running", "committed"),
            P::Receipt => ("voted", "running", "running"),
            P::Destroyed => ("released", "running", "running"),
            P::Closed => ("closed", "closed", "completed"),
        };
        assert_eq!((source, target, row), expected, "{point:?}");
    }

    fn stop_guest(&mut self) {
        self.does(Action::Stir(0, Stir::Converge));
        self.does(Action::Notice(0, Side::Source, Notice::GuestStopped));
        self.does(Action::Stir(0, Stir::StreamOut));
    }

    fn complete(&mut self) {
        self.does(Action::Stir(0, Stir::Arrived));
        self.does(Action::Stir(0, Stir::Load));
        self.does(Action::Notice(0, Side::Target, Notice::StreamAccepted));
        self.finish(Side::Target);
    }

    fn may(&self, action: Action) -> bool {
        let mut actions = Vec::new();
        self.model.actions(&self.state, &mut actions);
        actions.contains(&action)
    }

    fn does(&mut self, action: Action) {
        assert!(self.may(action), "{action:?} is not possible at {:?}", self.stand());
        self.passed.push(self.state);
        self.state = self.model.next(&self.state, action);
        assert_eq!(self.state.violation(), None, "{action:?} at {:?}", self.stand());
    }

    /// Does it where it is possible; true if it was.
    fn tries(&mut self, action: Action) -> bool {
        let may = self.may(action);
        if may {
            self.does(action);
        }
        may
    }

    fn finish(&mut self, side: Side) {
        while self.tries(Action::Effect(0, side)) {}
    }

    fn stand(&self) -> Stand {
        self.model.stand(&self.state)
    }

    /// For as long as it takes nothing of `cut` arrives.
    fn rests_without(&mut self, cut: u32) -> Stand {
        self.state = self.model.rest(&self.state, cut);
        assert_eq!(self.state.violation(), None, "{:?}", self.stand());
        self.stand()
    }

    /// Everything is there again; what comes of it in the end.
    fn ends(&mut self, what: &str, expect: Expect) -> Stand {
        let broken = self.model.broken(&self.state);
        assert_eq!(broken, None, "{what}: with everything in flight lost");
        let end = self.rests_without(0);
        let right = match expect {
            Source => end.runs_on == [A],
            Target => end.runs_on == [B],
            Once => end.runs_on.len() == 1,
            AtMostOnce => end.runs_on.len() <= 1,
            Nowhere => end.runs_on.is_empty(),
        };
        assert!(right && end.ended, "{what}: expected {expect:?}, and the row's end: {end:?}");
        end
    }
}

/// At each of the points the faults strike (those that can), and the end is as expected.
fn check(points: impl IntoIterator<Item = P>, faults: &[Action], expect: Expect) {
    for point in points {
        let mut trial = Trial::at(point);
        for fault in faults {
            trial.does(*fault);
        }
        trial.ends(&format!("{faults:?} at {point:?}"), expect);
    }
}

/// At each of the points messages are cut until everybody has tried everything, then the links heal.
fn cut(points: impl IntoIterator<Item = P>, cut: u32, expect: Expect) {
    for point in points {
        let mut trial = Trial::at(point);
        let meanwhile = trial.rests_without(cut);
        assert!(meanwhile.runs_on.len() <= 1, "{point:?}: {meanwhile:?}");
        trial.ends(&format!("messages {cut:#x} cut at {point:?}"), expect);
    }
}

fn bits(messages: &[Message]) -> u32 {
    messages.iter().fold(0, |bits, m| bits | m.bit())
}

/// One direction of one pair. A renunciation and an ask have two ways each: they count for the direct one, so that the
/// other is there where only one is cut.
fn link(from: char, to: char) -> u32 {
    use Message as M;
    bits(match (from, to) {
        ('a', 'm') => &[M::Frozen, M::NoVote, M::Released, M::Thawed, M::AskedForAbort],
        ('m', 'a') => &[
            M::Start,
            M::Suspend,
            M::Resume,
            M::AbortSource,
            M::Release,
            M::FencedThaw,
            M::FencedDiscard,
            M::PresentSource,
            M::CloseSource,
        ],
        ('b', 'm') => &[M::Prepared, M::Running, M::Ready, M::RenouncedToManager],
        ('m', 'b') => &[M::Prepare, M::Commit, M::AbortTarget, M::Void, M::PresentTarget, M::CloseTarget],
        ('a', 'b') => &[M::Asked],
        _ => &[M::RenouncedToSource, M::StatusNoRecord, M::StatusNotRun, M::StatusRunning],
    })
}

/// Everything to and from the managers.
fn manager() -> u32 {
    let known = link('a', 'm') | link('m', 'a') | link('b', 'm') | link('m', 'b');
    known & !link('a', 'b')
}

// ---- the rows ----

fn f01() {
    cut(between(P::Permit, P::Voted), manager(), Once);
    cut(between(P::Decided, P::Receipt), manager(), Once);
    cut([P::Running, P::Receipt, P::Destroyed, P::Closed], manager(), Target);
}

/// The decision is durable and nobody has heard of it.
fn f02() {
    for point in [P::Permit, P::Decided] {
        let mut trial = Trial::at(point);
        let row = trial.stand().row;
        // What the transaction wanted to send is lost with its manager; the row says it again.
        let orders = bits(&[Message::Prepare, Message::Commit]);
        let again = trial.model.rest(&trial.state, orders);
        assert_eq!(again.violation(), None);
        trial.ends(&format!("the answer of {row} is lost"), Once);
    }
}

/// A manager that was stopped with its decision made writes nothing over what the other did meanwhile.
fn f03() {
    for point in between(P::Streaming, P::Voted) {
        let mut trial = Trial::at(point);
        trial.does(Action::Pause(0, Ask::Abort));
        for next in between(P::Streaming, P::Receipt).filter(|p| *p > point) {
            trial.advance(next);
        }
        let before = trial.state;
        if trial.may(Action::GoOn) {
            trial.does(Action::GoOn);
        }
        assert_eq!(trial.model.stand(&before), trial.stand(), "{point:?}");
        trial.ends(&format!("paused at {point:?}"), Target);
    }
}

/// The second manager to make the same transaction changes nothing.
fn f04() {
    for (point, message) in [(P::Voted, Message::Prepared), (P::Decided, Message::Frozen)] {
        let mut trial = Trial::at(point);
        assert!(!trial.may(Action::Transact(0, Ask::Hears(message))), "{message:?} again at {point:?}");
        trial.ends(&format!("{message:?} at both managers"), Target);
    }
}

fn f05() {
    check([P::Prepared], &[Action::CrashDaemon(A)], Once);
    check([P::Streaming], &[Action::CrashDaemon(A)], Source);
}

fn f06() {
    for point in between(P::Frozen, P::Voted) {
        let mut trial = Trial::at(point);
        trial.does(Action::CrashDaemon(A));
        assert!(trial.stand().runs_on.is_empty(), "it stays frozen while its daemon is down");
        trial.does(Action::RestartDaemon(A));
        assert_eq!(trial.stand().source, "voted", "the restarted daemon finds its vote");
        trial.ends(&format!("{point:?}"), Once);
    }
}

fn f07() {
    check(between(P::Decided, P::Receipt), &[Action::CrashDaemon(A)], Target);
}

fn f08() {
    check(between(P::Delivered, P::Frozen), &[Action::CrashDaemon(B)], Source);
    check([P::Complete], &[Action::CrashDaemon(B)], Once);
}

fn f09() {
    check([P::Voted], &[Action::CrashDaemon(B)], Target);
    check([P::Voted], &[Action::CrashDaemon(B), Action::KillQemu(QB)], Source);
}

fn f10() {
    check(between(P::Decided, P::Running), &[Action::CrashDaemon(B)], Target);
}

fn f11() {
    for point in between(P::Permit, P::Streaming) {
        let mut trial = Trial::at(point);
        trial.does(Action::KillQemu(QA));
        let end = trial.ends(&format!("{point:?}"), Nowhere);
        assert_eq!(end.ran_on, [A], "nothing ever ran on the target");
    }
}

/// Once it has voted, the source's death is the target's to make good.
fn f12() {
    check([P::Frozen], &[Action::KillQemu(QA)], AtMostOnce);
    check([P::Complete, P::Voted], &[Action::KillQemu(QA)], Target);
    // The same before the vote: the VM crashed.
    let mut trial = Trial::at(P::Streaming);
    trial.stop_guest();
    trial.does(Action::KillQemu(QA));
    trial.ends("stopped and not voted", Nowhere);
}

fn f13() {
    check(between(P::Prepared, P::Voted), &[Action::KillQemu(QB)], Source);
}

fn f14() {
    // RUN may be journalled: as long as `cont` was not sent in this life, it never ran.
    check([P::Decided, P::Granted], &[Action::KillQemu(QB)], Source);
    // It ran: the frozen copy is stale for ever.
    check([P::Running, P::Receipt], &[Action::KillQemu(QB)], Nowhere);
    check([P::Granted], &[Action::CrashDaemon(B), Action::KillQemu(QB)], Nowhere);
}

fn f15() {
    check([P::Streaming], &[Action::LoseHost(A)], Nowhere);
    check([P::Frozen], &[Action::LoseHost(A)], AtMostOnce);
    check(between(P::Complete, P::Receipt), &[Action::LoseHost(A)], Target);
}

fn f16() {
    // The operator's word comes before the last vote is heard.
    for point in between(P::Prepared, P::Voted) {
        let faults = [Action::LoseHost(B), Action::Transact(0, Ask::TargetFenced)];
        check([point], &faults, Source);
    }
    for point in between(P::Decided, P::Receipt) {
        let mut trial = Trial::at(point);
        trial.does(Action::LoseHost(B));
        let end = trial.ends(&format!("{point:?}"), Nowhere);
        // Or the receipt of a target that ran came through: then it crashed after the move.
        let restarts = end.row == "discarded" || end.row == "completed" && point >= P::Running;
        assert!(restarts, "the VM restarts from its disk by the operator's word: {end:?}");
    }
}

fn f17() {
    let both = [Action::LoseHost(B), Action::KillQemu(QA), Action::CrashDaemon(A)];
    check(between(P::Streaming, P::Receipt), &both, Nowhere);
}

fn f18() {
    let ends = [Action::Stir(0, Stir::CutAtSource), Action::Stir(0, Stir::CutAtTarget)];
    check([P::Streaming], &ends, Source);
    check([P::Frozen], &ends, Source);
    check([P::Complete], &ends, Once);
}

fn f19() {
    cut([P::Streaming], link('a', 'm') | link('m', 'a'), Source);
}

fn f20() {
    for point in between(P::Decided, P::Receipt) {
        let mut trial = Trial::at(point);
        let meanwhile = trial.rests_without(link('a', 'm') | link('m', 'a'));
        assert_eq!(meanwhile.runs_on, [B], "{point:?}");
        assert!(matches!(meanwhile.source, "voted" | "asking"), "{point:?}: {meanwhile:?}");
        trial.ends(&format!("{point:?}"), Target);
    }
}

/// The frozen source asks its target directly, which renounces; the registry adopts that over its commit. It never
/// aborts by itself.
fn f21() {
    let mut trial = Trial::at(P::Decided);
    let meanwhile = trial.rests_without(link('b', 'm') | link('m', 'b'));
    assert_eq!((meanwhile.row, meanwhile.runs_on), ("committed", vec![A]));
    let end = trial.ends("decided", Source);
    assert_eq!(end.row, "voided");
    cut([P::Granted], link('b', 'm') | link('m', 'b'), Target);
}

fn f22() {
    for (from, to) in [('a', 'm'), ('m', 'a'), ('b', 'm'), ('m', 'b'), ('a', 'b'), ('b', 'a')] {
        cut(POINTS, link(from, to), Once);
    }
}

fn f23() {
    // The source's agent never hears that everything arrived.
    let mut trial = Trial::at(P::Streaming);
    trial.stop_guest();
    trial.complete();
    trial.does(Action::Timer(0, Side::Source, TimerKind::Switchover));
    trial.ends("nothing comes back", Source);
    // Or not before its guard closed the socket.
    let mut trial = Trial::at(P::Streaming);
    trial.stop_guest();
    trial.complete();
    trial.does(Action::Stir(0, Stir::CutAtSource));
    trial.ends("the channel is cut", Source);
}

/// Everything that was ever sent arrives once more, and all of it late.
fn f24() {
    for point in POINTS {
        let mut trial = Trial::at(point);
        for round in 0..3 {
            let mut actions = Vec::new();
            trial.model.actions(&trial.state, &mut actions);
            for again in actions.into_iter().filter(|a| matches!(a, Action::Deliver(..))) {
                let operator = matches!(again, Action::Deliver(_, Message::Suspend | Message::Resume));
                if !operator && trial.tries(again) {
                    trial.finish(Side::Source);
                    trial.finish(Side::Target);
                }
            }
            assert!(trial.stand().runs_on.len() <= 1, "{point:?}, round {round}");
        }
        trial.ends(&format!("{point:?}"), Once);
    }
}

/// Nothing is written, so nothing is sent.
fn f25() {
    for point in POINTS {
        let mut trial = Trial::at(point);
        let before = trial.stand().row;
        let meanwhile = trial.rests_without(manager() | bits(&[Message::RenouncedToManager]));
        assert_eq!(meanwhile.row, before, "no decision without a durable write");
        trial.ends(&format!("{point:?}"), Once);
    }
}

fn f26() {
    for kept in between(P::Permit, P::Voted) {
        for lost in between(P::Decided, P::Receipt) {
            let mut trial = Trial::at(kept);
            trial.does(Action::Backup);
            for next in between(P::Permit, lost).filter(|p| *p > kept) {
                trial.advance(next);
            }
            trial.does(Action::Restore);
            trial.ends(&format!("set back from {lost:?} to {kept:?}"), Once);
        }
    }
}

/// A step whose line could not be written is a crash before it (duty 2 of the shells): at every step of the whole way.
fn f27() {
    let mut trial = Trial::at(P::Closed);
    let passed = std::mem::take(&mut trial.passed);
    assert!(passed.len() > 25, "{} steps", passed.len());
    for (step, state) in passed.into_iter().enumerate() {
        for host in [A, B] {
            trial.state = state;
            trial.does(Action::CrashDaemon(host));
            trial.ends(&format!("the daemon of host {host} after {step} steps"), Once);
        }
    }
}

/// Twice at the same step: the disk is still full when the daemon is back.
fn f28() {
    for point in [P::Delivered, P::Frozen, P::Voted] {
        for host in [A, B] {
            let faults = [Action::CrashDaemon(host), Action::RestartDaemon(host), Action::CrashDaemon(host)];
            check([point], &faults, Once);
        }
    }
}

/// Every timer that is set fires at once.
fn f29() {
    let kinds = [
        TimerKind::RunBudget,
        TimerKind::Watchdog,
        TimerKind::Switchover,
        TimerKind::Resend,
        TimerKind::Poll,
    ];
    for point in POINTS {
        for sides in [&[Side::Source][..], &[Side::Target], &[Side::Source, Side::Target]] {
            let mut trial = Trial::at(point);
            for side in sides {
                for kind in kinds {
                    trial.tries(Action::Timer(0, *side, kind));
                    trial.finish(*side);
                }
            }
            trial.ends(&format!("{sides:?} at {point:?}"), Once);
        }
    }
}

fn f31() {
    check([P::Streaming], &[Action::Stir(0, Stir::CutAtSource)], Source);
    check([P::Streaming], &[Action::Stir(0, Stir::CutAtTarget)], Source);
}

fn alarm(points: impl IntoIterator<Item = P>, expect: Expect) {
    for point in points {
        let mut trial = Trial::at(point);
        let heard = trial.tries(Action::Transact(0, Ask::Abort));
        assert_eq!(heard, point < P::Decided, "an alarm is a wish until the decision, and too late after it");
        trial.ends(&format!("an alarm at {point:?}"), expect);
    }
}

fn f32() {
    alarm(between(P::Permit, P::Voted), Source);
    alarm(between(P::Decided, P::Receipt), Target);
    // The inspector's own.
    let mut trial = Trial::at(P::Streaming);
    trial.stop_guest();
    trial.does(Action::Stir(0, Stir::Rejected));
    trial.ends("the stream is refused", Source);
}

/// For the machines a lapsed certificate and a drifted platform are wishes to end it.
fn f33() {
    alarm([P::Streaming, P::Voted], Source);
    alarm([P::Decided], Target);
}

fn f35() {
    check([P::Prepared], &[Action::CrashDaemon(B), Action::RestartDaemon(B)], Source);
}

fn f38() {
    check([P::Streaming], &[Action::KillQemu(QA), Action::CrashDaemon(A)], Nowhere);
    check([P::Frozen], &[Action::KillQemu(QA), Action::CrashDaemon(A)], AtMostOnce);
    check(between(P::Complete, P::Running), &[Action::KillQemu(QA), Action::CrashDaemon(A)], Target);
    check(between(P::Streaming, P::Decided), &[Action::KillQemu(QB), Action::CrashDaemon(B)], Source);
    check([P::Granted, P::Running], &[Action::KillQemu(QB), Action::CrashDaemon(B)], Nowhere);
}

fn f39() {
    let mut trial = Trial::at(P::Voted);
    trial.does(Action::Transact(0, Ask::Abort));
    // The last vote comes after the wish: no commit.
    trial.does(Action::Transact(0, Ask::Hears(Message::Frozen)));
    assert_eq!(trial.stand().row, "open");
    trial.ends("before the decision", Source);
    alarm([P::Decided, P::Granted], Target);
}

/// A guest that switches itself off ends its QEMU.
fn f40() {
    check([P::Streaming], &[Action::KillQemu(QA)], Nowhere);
    check([P::Running], &[Action::KillQemu(QB)], Nowhere);
}

fn f41() {
    for point in between(P::Permit, P::Destroyed) {
        let trial = Trial::with(Config::two(0), point);
        let mut actions = Vec::new();
        trial.model.actions(&trial.state, &mut actions);
        assert!(!actions.iter().any(|a| matches!(a, Action::Grant(_))), "{point:?}: a second migration");
    }
}

/// A new binary is a restart: what was written is read, at every point between.
fn f42() {
    let both =
        [Action::CrashDaemon(A), Action::CrashDaemon(B), Action::RestartDaemon(A), Action::RestartDaemon(B)];
    check(between(P::Frozen, P::Receipt), &both, Once);
}

fn f43() {
    let mut trial = Trial::at(P::Granted);
    // It looks at QEMU first.
    trial.does(Action::Effect(0, Side::Target));
    trial.does(Action::EffectFails(0, Side::Target));
    let end = trial.ends("cont is refused", Source);
    assert_eq!(end.row, "voided");
}

// ---- the table ----

/// One row of the matrix.
struct Row {
    id: &'static str,
    fault: &'static str,
    simulated: Option<fn()>,
    /// Tests of the same fault elsewhere: in a room, or on real QEMU (`lab/`, `crates/host/`).
    also: &'static [(&'static str, &'static str)],
    /// What no test shows yet, and why.
    not_yet: &'static str,
}

const LAB: &str = "lab/tests/faults.rs";
const OPERATOR: &str = "lab/tests/operator.rs";
const HOST: &str = "crates/host/tests/handover.rs";
const JOURNAL: &str = "crates/host/src/journal.rs";
const RESTARTING: &str = "crates/manager/tests/it/restarting.rs";
const MIGRATING: &str = "crates/manager/tests/it/migrating.rs";
const SHARING: &str = "crates/manager/tests/it/sharing.rs";
const RACES: &str = "crates/registry/tests/it/races.rs";
const DATABASE: &str = "crates/registry/tests/it/faults.rs";
const MODEL: &str = "crates/engine/tests/handover_model.rs";
const RULES: &str = "crates/engine/tests/handover_rules.rs";

const fn row(
    id: &'static str,
    fault: &'static str,
    simulated: Option<fn()>,
    also: &'static [(&'static str, &'static str)],
    not_yet: &'static str,
) -> Row {
    Row { id, fault, simulated, also, not_yet }
}

#[rustfmt::skip]
const MATRIX: [Row; 44] = [
    row("F-01", "manager crash and restart", Some(f01), &[(LAB, "manager_is_killed_at_the_permit"), (LAB, "manager_is_killed_in_transfer"), (LAB, "manager_is_killed_at_the_commit"), (RESTARTING, "a_manager_killed_at_any_step_goes_on_where_the_rows_stand")], ""),
    row("F-02", "manager crash between log append and reply", Some(f02), &[("crates/registry/tests/it/cuts.rs", "a_commit_whose_answer_was_lost_is_told_as_done")], ""),
    row("F-03", "manager stopped, then goes on", Some(f03), &[(DATABASE, "a_manager_that_is_frozen_in_a_transaction_does_not_freeze_the_others")], "a stopped manager on real QEMU"),
    row("F-04", "two managers", Some(f04), &[(MODEL, "one_migration_with_two_faults"), (SHARING, "of_two_managers_one_works_on_a_migration_and_the_other_takes_over")], ""),
    row("F-05", "source daemon crash, transfer", Some(f05), &[(LAB, "source_daemon_is_killed_in_transfer")], ""),
    row("F-06", "source daemon crash, frozen", Some(f06), &[(LAB, "source_daemon_is_killed_when_it_has_frozen")], ""),
    row("F-07", "source daemon crash, committed", Some(f07), &[(LAB, "source_daemon_is_killed_right_after_commit")], ""),
    row("F-08", "target daemon crash, transfer", Some(f08), &[(LAB, "target_daemon_is_killed_before_commit")], ""),
    row("F-09", "target daemon crash, voted", Some(f09), &[(HOST, "the_target_daemon_dies_between_its_vote_and_the_commit")], ""),
    row("F-10", "target daemon crash, committed", Some(f10), &[(LAB, "target_daemon_is_killed_after_commit")], "between RUN and cont on real QEMU"),
    row("F-11", "source QEMU crash, transfer", Some(f11), &[(LAB, "source_qemu_is_killed_in_transfer")], ""),
    row("F-12", "source QEMU crash, frozen", Some(f12), &[(HOST, "the_sources_qemu_dies_after_both_votes")], ""),
    row("F-13", "target QEMU crash, before the commit", Some(f13), &[(LAB, "target_qemu_is_killed_in_transfer"), (HOST, "the_targets_qemu_dies_before_the_commit")], ""),
    row("F-14", "target QEMU crash, committed", Some(f14), &[], "on real QEMU"),
    row("F-15", "source host power loss", Some(f15), &[], "on real machines: a namespace can't lose its power"),
    row("F-16", "target host power loss", Some(f16), &[], "on real machines: a namespace can't lose its power"),
    row("F-17", "both hosts die", Some(f17), &[], "on real machines: a namespace can't lose its power"),
    row("F-18", "partition source-target", Some(f18), &[(LAB, "tail_of_the_stream_is_withheld")], ""),
    row("F-19", "partition manager-source, transfer", Some(f19), &[], "on real QEMU"),
    row("F-20", "partition manager-source, committed", Some(f20), &[], "on real QEMU"),
    row("F-21", "partition manager-target, decided", Some(f21), &[(HOST, "a_frozen_source_that_hears_nothing_asks_the_target_directly")], ""),
    row("F-22", "one-way partitions", Some(f22), &[], "on real QEMU: each direction for 10 and 60 s"),
    row("F-23", "reverse path dropped", Some(f23), &[(LAB, "reverse_direction_is_dropped_during_switchover")], ""),
    row("F-24", "messages lost, duplicated, reordered, late", Some(f24), &[(MODEL, "one_migration_with_two_faults"), (MODEL, "stateright_agrees")], ""),
    row("F-25", "database unavailable", Some(f25), &[(SHARING, "a_server_that_is_restarted_in_a_migration_is_survived"), (DATABASE, "a_server_that_hangs_is_told_in_time")], ""),
    row("F-26", "database loses its last write", Some(f26), &[(RESTARTING, "a_registry_that_was_set_back_grants_and_starts_nothing_new"), (RULES, "a_registry_that_forgot_asks_the_target_before_it_believes_a_fenced_source")], ""),
    row("F-27", "log disk full, write error, torn write", Some(f27), &[(JOURNAL, "a_torn_last_record_is_cut_at_every_length"), (JOURNAL, "a_failed_write_closes_it_only_until_it_can_be_read_afresh"), ("crates/registry/tests/it/full_disk.rs", "a_full_disk_refuses_loses_nothing_and_recovers"), (OPERATOR, "a_full_disk_under_the_registry_refuses_and_recovers")], ""),
    row("F-28", "daemon's disk full", Some(f28), &[(JOURNAL, "a_full_disk_refuses_the_step_and_keeps_what_was_there")], ""),
    row("F-29", "clock jumps", Some(f29), &[("crates/registry/tests/it/managers.rs", "a_lease_from_a_clock_that_jumped_back_does_not_last")], "drift of 1 % on one node"),
    row("F-30", "managers' clocks disagree", None, &[("crates/registry/tests/it/records.rs", "nonces_and_join_tokens_are_used_once_and_in_time"), (RACES, "of_a_hundred_redemptions_of_one_permit_one_counts")], ""),
    row("F-31", "agent crash", Some(f31), &[(HOST, "the_targets_agent_is_killed_in_the_transfer")], ""),
    row("F-32", "agent alarm", Some(f32), &[(MIGRATING, "a_finding_of_the_inspector_terminates"), (MIGRATING, "past_the_commit_it_is_too_late")], ""),
    row("F-33", "certificate expiry, revocation", Some(f33), &[(HOST, "a_certificate_is_renewed_before_it_ends")], "the machines' part only: that a lapse becomes the wish is not shown here"),
    row("F-34", "attestation drift", Some(f33), &[], "the machines' part only: that a drift becomes the wish is not shown here"),
    row("F-35", "reservation lost", Some(f35), &[(RACES, "of_a_hundred_reservations_the_last_room_is_given_to_one"), (MIGRATING, "no_room_on_the_target_refuses")], ""),
    row("F-36", "firewall flushed on the target", None, &[], "firewall pinholes are not built"),
    row("F-37", "TPM busy or reset", None, &[("crates/attest/tests/faults.rs", "a_busy_tpm_is_waited_for_and_one_that_stays_busy_is_a_fault"), ("crates/attest/tests/faults.rs", "a_tpm_that_is_killed_in_the_middle_is_a_fault_in_time")], ""),
    row("F-38", "OOM kill of daemon or QEMU", Some(f38), &[], "by a real cgroup limit"),
    row("F-39", "operator's cancel races", Some(f39), &[(MIGRATING, "terminate_after_the_source_s_vote_waits_for_the_renunciation"), (OPERATOR, "terminate_leaves_the_guest_on_the_source_and_nothing_else")], ""),
    row("F-40", "VM deleted, guest powers off or resets", Some(f40), &[], "a guest's reset, and `vm stop` during a migration"),
    row("F-41", "the same VM asked for twice", Some(f41), &[(RACES, "of_twenty_concurrent_migrations_of_one_vm_one_is_let_in"), (MIGRATING, "of_twenty_requests_at_once_one_is_let_in")], ""),
    row("F-42", "daemon upgraded", Some(f42), &[("crates/registry/tests/it/schema.rs", "a_registry_of_the_first_version_is_brought_up_to_date_with_what_is_in_it")], "there is no older release to read the journals of"),
    row("F-43", "shared disk lost", Some(f43), &[(RULES, "an_earlier_life_may_have_run_it_so_a_refused_cont_does_not_renounce")], "with a real lock server"),
    row("F-44", "witness or audit verifier down", None, &[], "there is no witness"),
];

/// No row is missing, each is shown or says why not, and every test that is named is there.
#[test]
fn every_row_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let table = std::fs::read_to_string(root.join("docs/model.md")).unwrap();
    for (row, number) in MATRIX.iter().zip(1..) {
        assert_eq!(row.id, format!("F-{number:02}"));
        let shown = row.simulated.is_some() || !row.also.is_empty();
        assert!(shown || !row.not_yet.is_empty(), "{}: neither shown nor explained", row.id);
        for (file, test) in row.also {
            let text = std::fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
            assert!(text.contains(&format!("fn {test}(")), "{}: {file} has no {test}", row.id);
        }
        assert!(table.contains(&format!("| {} | {} |", row.id, row.fault)), "docs/model.md lacks {}", row.id);
        let how = if row.simulated.is_some() { "simulated" } else { "not a matter of the machines" };
        println!(
            "{} {}: {how}; {} other tests; not yet: {:?}",
            row.id,
            row.fault,
            row.also.len(),
            row.not_yet
        );
    }
}

macro_rules! simulated {
    ($($name:ident => $id:literal;)*) => {
        $(#[test] fn $name() {
            MATRIX.iter().find(|r| r.id == $id).and_then(|r| r.simulated).unwrap()();
        })*

        #[test]
        fn every_simulated_row_runs() {
            let rows: Vec<_> = MATRIX.iter().filter(|r| r.simulated.is_some()).map(|r| r.id).collect();
            assert_eq!(rows, [$($id),*]);
        }
    };
}

simulated! {
    f01_manager_crash => "F-01";
    f02_manager_crash_before_the_reply => "F-02";
    f03_manager_stopped => "F-03";
    f04_two_managers => "F-04";
    f05_source_daemon_in_transfer => "F-05";
    f06_source_daemon_frozen => "F-06";
    f07_source_daemon_committed => "F-07";
    f08_target_daemon_in_transfer => "F-08";
    f09_target_daemon_voted => "F-09";
    f10_target_daemon_committed => "F-10";
    f11_source_qemu_in_transfer => "F-11";
    f12_source_qemu_frozen => "F-12";
    f13_target_qemu_before_the_commit => "F-13";
    f14_target_qemu_committed => "F-14";
    f15_source_host => "F-15";
    f16_target_host => "F-16";
    f17_both_hosts => "F-17";
    f18_partition_of_the_hosts => "F-18";
    f19_partition_from_the_source_in_transfer => "F-19";
    f20_partition_from_the_source_committed => "F-20";
    f21_partition_from_the_target_decided => "F-21";
    f22_one_way_partitions => "F-22";
    f23_reverse_path => "F-23";
    f24_messages => "F-24";
    f25_database_away => "F-25";
    f26_database_set_back => "F-26";
    f27_log_not_written => "F-27";
    f28_disk_stays_full => "F-28";
    f29_clock_jump => "F-29";
    f31_agent_crash => "F-31";
    f32_alarm => "F-32";
    f33_certificate => "F-33";
    f34_attestation => "F-34";
    f35_reservation => "F-35";
    f38_oom => "F-38";
    f39_cancel_races => "F-39";
    f40_poweroff => "F-40";
    f41_same_vm_twice => "F-41";
    f42_upgrade => "F-42";
    f43_shared_disk => "F-43";
}
