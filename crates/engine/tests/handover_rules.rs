//! Single rules of the hand-over that the simulation reaches rarely, by hand.
#![allow(clippy::unwrap_used)]

use outrider_engine::handover::decider::{self, Continuity, Decision, HandoverRow, RowState};
use outrider_engine::handover::journal::{Entry, NonceLedger, Recorded, attempts, superseded};
use outrider_engine::handover::source::{self, Claim, Source};
use outrider_engine::handover::target::{self, QemuStatus, RunState, Target};
use outrider_engine::handover::{Attempt, QemuFacts, RenunciationProof, Resolution, TimerKind, fresh_epochs};
use types::handover::{
    AbortReason, HandoverKey, PriorRunState, ReleaseReceipt, Renunciation, RunningReceipt, SourceVote,
    Statement, StreamEvidence, TargetVote, ThawReceipt,
};
use types::{Digest, Epoch, ErrorCode, MigrationId, Nonce, Side, VmId};

fn attempt(number: u8) -> Attempt {
    let epochs = fresh_epochs(Epoch(u64::from(number) * 3)).unwrap();
    Attempt {
        key: HandoverKey {
            migration: MigrationId::from_bytes([number; 16]),
            vm: VmId::from_bytes([2; 16]),
            source_epoch: epochs.source,
            target_epoch: epochs.target,
        },
        permit: Digest([number; 32]),
        nonce: Nonce::from_bytes([number; 16]),
        source: "host-a".parse().unwrap(),
        target: "host-b".parse().unwrap(),
        target_journal: Nonce::from_bytes([5; 16]),
        run_budget_ms: 60_000,
    }
}

fn evidence() -> StreamEvidence {
    StreamEvidence { stream_bytes: 1 << 20, digest: Digest([6; 32]) }
}

fn qemu() -> QemuFacts {
    QemuFacts { pid: 42, start_time_ticks: 7, boot: Nonce::from_bytes([8; 16]) }
}

fn why() -> AbortReason {
    AbortReason { code: ErrorCode::Terminated, detail: "the operator said so".to_owned() }
}

fn proof(attempt: &Attempt) -> RenunciationProof {
    let Attempt { key, permit, source, target, target_journal: journal, .. } = attempt.clone();
    RenunciationProof { renunciation: Renunciation { key, permit, source, target, journal }, token: vec![1] }
}

/// A daemon's journal, and its effects without the journal's.
#[derive(Default)]
struct Host {
    journal: Vec<Entry>,
}

impl Host {
    fn source(&mut self, effects: Vec<source::Effect>) -> Vec<source::Effect> {
        let keep = |effect: source::Effect| match effect {
            source::Effect::Journal(entry) => {
                // Through the codec, as a real journal would.
                let text = serde_json::to_string(&Entry::Source(entry)).unwrap();
                self.journal.push(serde_json::from_str(&text).unwrap());
                None
            }
            other => Some(other),
        };
        effects.into_iter().filter_map(keep).collect()
    }

    fn target(&mut self, effects: Vec<target::Effect>) -> Vec<target::Effect> {
        let keep = |effect: target::Effect| match effect {
            target::Effect::Journal(entry) => {
                let text = serde_json::to_string(&Entry::Target(entry)).unwrap();
                self.journal.push(serde_json::from_str(&text).unwrap());
                None
            }
            other => Some(other),
        };
        effects.into_iter().filter_map(keep).collect()
    }
}

fn start(host: &mut Host, number: u8) -> Source {
    let (source, effects) =
        Source::start(Claim::new([], []).unwrap(), attempt(number), qemu(), PriorRunState::Running);
    host.source(effects);
    source
}

fn feed_source(host: &mut Host, source: &mut Source, event: source::Event) -> Vec<source::Effect> {
    host.source(source.handle(event).effects)
}

fn feed_target(host: &mut Host, target: &mut Target, event: target::Event) -> Vec<target::Effect> {
    host.target(target.handle(event).effects)
}

fn voted_target(host: &mut Host) -> Target {
    let (mut target, effects) = Target::prepare(attempt(1), &mut NonceLedger::default()).unwrap();
    host.target(effects);
    let paused = target::Event::QemuStatus(QemuStatus { completed: true, run: RunState::Paused });
    for event in [target::Event::QemuPrepared(qemu()), target::Event::StreamAccepted(evidence()), paused] {
        feed_target(host, &mut target, event);
    }
    assert_eq!(target.state_name(), "voted");
    target
}

fn voted_source(host: &mut Host) -> Source {
    let mut source = start(host, 1);
    let events = [
        source::Event::GuestStopped,
        source::Event::EndOfStream(evidence()),
        source::Event::FreezeConfirmed,
        source::Event::ProofOk,
    ];
    for event in events {
        feed_source(host, &mut source, event);
    }
    assert_eq!(source.state_name(), "voted");
    source
}

fn commit(prior: PriorRunState) -> target::Event {
    let order = target::Order::Commit { evidence: evidence(), prior };
    target::Event::Order { key: attempt(1).key, order }
}

#[test]
fn a_vm_that_its_user_had_paused_stays_paused() {
    let mut host = Host::default();
    let mut target = voted_target(&mut host);
    feed_target(&mut host, &mut target, commit(PriorRunState::Paused));
    let paused = target::Event::QemuStatus(QemuStatus { completed: true, run: RunState::Paused });
    let effects = feed_target(&mut host, &mut target, paused);
    assert!(!effects.contains(&target::Effect::Cont), "{effects:?}");
    let says = |e: &target::Effect| matches!(e, target::Effect::Send(Statement::Running(r)) if r.state == PriorRunState::Paused);
    assert!(effects.iter().any(says), "{effects:?}");
}

/// H9: only the daemon's life that journalled RUN knows that nothing ran.
#[test]
fn an_earlier_life_may_have_run_it_so_a_refused_cont_does_not_renounce() {
    let mut host = Host::default();
    let mut target = voted_target(&mut host);
    feed_target(&mut host, &mut target, commit(PriorRunState::Running));
    let recovered = attempts(&host.journal);
    let [Recorded::Target { entries, superseded: false, .. }] = recovered.as_slice() else {
        panic!("{recovered:?}")
    };
    let (mut target, effects) = Target::recover(entries.iter().copied(), target::QemuSeen::Paused).unwrap();
    assert_eq!(effects, vec![target::Effect::QueryQemu]);
    target.handle(target::Event::QemuStatus(QemuStatus { completed: true, run: RunState::Paused }));
    let effects = target.handle(target::Event::ContRefused { still_paused: true }).effects;
    assert_eq!(target.state_name(), "starting-again", "{effects:?}");
    let (dead, _) = Target::recover(entries.iter().copied(), target::QemuSeen::Dead).unwrap();
    assert_eq!(dead.state_name(), "lost", "a QEMU that may have run is never renounced");
}

#[test]
fn a_nonce_is_consumed_once_across_restarts() {
    let mut host = Host::default();
    let mut ledger = NonceLedger::default();
    let (_, effects) = Target::prepare(attempt(1), &mut ledger).unwrap();
    assert!(matches!(effects[0], target::Effect::Journal(_)), "the journal comes first: {effects:?}");
    host.target(effects);
    assert!(Target::prepare(attempt(1), &mut ledger).is_err());
    let mut rebuilt = NonceLedger::rebuild(&host.journal);
    assert!(Target::prepare(attempt(1), &mut rebuilt).is_err());
    assert!(Target::decline(attempt(1), why(), &mut rebuilt).is_err());
    assert!(Target::decline(attempt(2), why(), &mut rebuilt).is_ok());
    assert!(Target::prepare(attempt(2), &mut rebuilt).is_err(), "a declined attempt can't be prepared later");
}

/// The simulation found it: an earlier attempt's unfinished abort thawed what a later attempt had frozen.
#[test]
fn an_attempt_that_still_has_to_free_its_qemu_blocks_the_next() {
    let mut host = Host::default();
    let mut first = start(&mut host, 1);
    let order = source::Order::Abort { reason: why() };
    let effects = feed_source(&mut host, &mut first, source::Event::Order { key: attempt(1).key, order });
    assert!(effects.contains(&source::Effect::Thaw));
    assert!(Claim::new([&first], []).is_none());
    let close = source::Event::Order { key: attempt(1).key, order: source::Order::Close };
    assert!(feed_source(&mut host, &mut first, close).is_empty(), "not before the guest runs");
    feed_source(&mut host, &mut first, source::Event::Cancelled);
    assert!(Claim::new([&first], []).is_some());
    start(&mut host, 2);
    let recovered = attempts(&host.journal);
    let [Recorded::Source { entries, superseded: true, .. }, Recorded::Source { superseded: false, .. }] =
        recovered.as_slice()
    else {
        panic!("{recovered:?}")
    };
    assert!(superseded(&host.journal, &attempt(1).key) && !superseded(&host.journal, &attempt(2).key));
    let (first, effects) = Source::recover(entries.iter().copied(), source::QemuSeen::Superseded).unwrap();
    let touches =
        |e: &source::Effect| matches!(e, source::Effect::Thaw | source::Effect::YankOrCancel { .. });
    assert!(!effects.iter().any(touches), "{effects:?}");
    assert!(Claim::new([&first], []).is_some());
}

/// The source may have thawed on a renunciation that the registry has not heard of: the operator's word about the
/// target alone must not give the VM to its disk.
#[test]
fn a_fenced_commit_waits_for_the_word_of_the_source() {
    let attempt = attempt(1);
    let Attempt { key, permit, .. } = attempt;
    let decide = |row: &HandoverRow, event| decider::decide(row, event).unwrap();
    let says = |from, statement| decider::Event::Statement { from, statement };
    let source_vote = SourceVote { key, permit, evidence: evidence(), prior: PriorRunState::Running };
    let target_vote = TargetVote { key, permit, evidence: evidence() };
    let row = decide(&HandoverRow::new(&attempt), says(Side::Source, Statement::Frozen(source_vote))).row;
    let committed = decide(&row, says(Side::Target, Statement::Prepared(target_vote)));
    assert!(matches!(committed.decision, Decision::Commit(_)));
    let fenced = decide(&committed.row, decider::Event::TargetFenced);
    assert_eq!(fenced.decision, Decision::Keep);

    let thawed = decide(&fenced.row, decider::Event::Renounced(proof(&attempt)));
    assert!(matches!(&thawed.decision, Decision::Void(step) if step.to.host == attempt.source));
    let released = ReleaseReceipt { key, evidence: evidence() };
    let killed = decide(&fenced.row, says(Side::Source, Statement::Released(released)));
    assert!(matches!(killed.decision, Decision::Discard(_)));
    assert!(
        matches!(killed.row.state, RowState::Discarded { source_settled: true }) && killed.row.is_final()
    );
}

/// The model checker found it: the target host is lost with its renunciation on the way, the operator says so, the
/// order to discard overtakes the renunciation at the source. The row must still end, and say that no host holds the VM.
#[test]
fn a_discard_that_overtook_the_renunciation_ends_the_row() {
    let attempt = attempt(1);
    let Attempt { key, permit, .. } = attempt;
    let decide = |row: &HandoverRow, event| decider::decide(row, event).unwrap();
    let says = |from, statement| decider::Event::Statement { from, statement };
    let source_vote = SourceVote { key, permit, evidence: evidence(), prior: PriorRunState::Running };
    let target_vote = TargetVote { key, permit, evidence: evidence() };
    let row = decide(&HandoverRow::new(&attempt), says(Side::Source, Statement::Frozen(source_vote))).row;
    let row = decide(&row, says(Side::Target, Statement::Prepared(target_vote))).row;
    let fenced = decide(&row, decider::Event::TargetFenced);
    let resolution = Resolution::Discard;
    assert_eq!(fenced.orders, [decider::Order::Source(source::Order::Fenced { resolution })]);
    let voided = decide(&fenced.row, decider::Event::Renounced(proof(&attempt)));
    let Decision::Void(void) = voided.decision else { panic!("{:?}", voided.decision) };

    let released = says(Side::Source, Statement::Released(ReleaseReceipt { key, evidence: evidence() }));
    let ended = decide(&voided.row, released.clone());
    let Decision::Discard(step) = ended.decision else { panic!("{:?}", ended.decision) };
    assert_eq!(step.from, void.to, "the location is where the void left it");
    assert!(step.to.epoch > step.from.epoch);
    assert!(ended.row.is_final() && ended.row.place().is_none());

    // Without the operator's word nobody told the source to: its word is a contradiction.
    let unfenced = decide(&row, decider::Event::Renounced(proof(&attempt))).row;
    assert_eq!(decider::decide(&unfenced, released.clone()), Err(decider::Refusal::Contradiction));
    // A source that thawed on the renunciation has not released: its word is a contradiction.
    let thawed = ThawReceipt { key, had_voted: true };
    let kept = decide(&voided.row, says(Side::Source, Statement::Thawed(thawed))).row;
    assert_eq!(decider::decide(&kept, released), Err(decider::Refusal::Contradiction));
}

/// The model checker found it: a registry that was set back forgot its commit, and voided the attempt on the word that
/// the source is dead, while the target ran the VM.
#[test]
fn a_registry_that_forgot_asks_the_target_before_it_believes_a_fenced_source() {
    let attempt = attempt(1);
    let Attempt { key, permit, .. } = attempt;
    let decide = |row: &HandoverRow, event| decider::decide(row, event).unwrap();
    let says = |from, statement| decider::Event::Statement { from, statement };
    let target_vote = TargetVote { key, permit, evidence: evidence() };
    let row = decide(&HandoverRow::new(&attempt), says(Side::Target, Statement::Prepared(target_vote))).row;
    assert!(matches!(decide(&row, decider::Event::SourceFenced).decision, Decision::Void(_)));

    let forgetful = HandoverRow { continuity: Continuity::Unproven, ..row };
    let asked = decide(&forgetful, decider::Event::SourceFenced);
    assert_eq!(asked.decision, Decision::Keep);
    let void = |o: &decider::Order| matches!(o, decider::Order::Target(target::Order::Void { .. }));
    assert!(asked.orders.iter().any(void), "a target that only voted gives up: {:?}", asked.orders);

    let state = PriorRunState::Running;
    let receipt = RunningReceipt { key, permit, evidence: evidence(), state };
    let runs = decide(&asked.row, says(Side::Target, Statement::Running(receipt)));
    assert!(matches!(&runs.decision, Decision::AdoptCommit(step) if step.to.host == attempt.target));
    assert!(runs.row.is_final(), "a dead host needs no release");

    let gave_up = decide(&asked.row, decider::Event::Renounced(proof(&attempt)));
    assert!(matches!(gave_up.decision, Decision::Void(_)) && gave_up.row.is_final());
    let both_dead = decide(&asked.row, decider::Event::TargetFenced);
    assert!(matches!(both_dead.decision, Decision::Discard(_)) && both_dead.row.is_final());
}

/// The model checker found it: a registry that was set back heard that the target is dead, then both votes again, and
/// committed to the dead target for want of the source's answer.
#[test]
fn a_silent_source_never_commits_to_a_fenced_target() {
    let attempt = attempt(1);
    let Attempt { key, permit, .. } = attempt;
    let decide = |row: &HandoverRow, event| decider::decide(row, event).unwrap();
    let says = |from, statement| decider::Event::Statement { from, statement };
    let target_vote = TargetVote { key, permit, evidence: evidence() };
    let source_vote = SourceVote { key, permit, evidence: evidence(), prior: PriorRunState::Running };
    let row = HandoverRow { continuity: Continuity::Unproven, ..HandoverRow::new(&attempt) };
    let row = decide(&row, decider::Event::TargetFenced).row;
    let row = decide(&row, says(Side::Source, Statement::Frozen(source_vote))).row;
    let row = decide(&row, says(Side::Target, Statement::Prepared(target_vote))).row;
    assert!(!row.awaits_source());
    assert_eq!(decide(&row, decider::Event::SourceSilent).row, row);
    let voided = decide(&row, decider::Event::Renounced(proof(&attempt))).row;
    let released = says(Side::Source, Statement::Released(ReleaseReceipt { key, evidence: evidence() }));
    assert!(matches!(decide(&voided, released).decision, Decision::Discard(_)));
}

/// The model checker found it: both copies died after the source's vote, and the row of the commit never ended, because
/// the source answered the order to discard with a NO-VOTE that contradicts its vote.
#[test]
fn a_source_whose_voted_copy_died_says_released_when_it_is_to_discard() {
    let mut host = Host::default();
    let mut source = voted_source(&mut host);
    feed_source(&mut host, &mut source, source::Event::QemuDied);
    assert_eq!(source.state_name(), "voted-lost");
    let order = source::Order::Fenced { resolution: Resolution::Discard };
    let effects = feed_source(&mut host, &mut source, source::Event::Order { key: attempt(1).key, order });
    let says = |e: &source::Effect| matches!(e, source::Effect::Send(Statement::Released(_)));
    assert!(effects.iter().any(says), "{effects:?}");
    let recovered = attempts(&host.journal);
    let [Recorded::Source { entries, .. }] = recovered.as_slice() else { panic!("{recovered:?}") };
    let (again, effects) = Source::recover(entries.iter().copied(), source::QemuSeen::Dead).unwrap();
    assert_eq!((again.state_name(), effects.iter().any(says)), ("released", true));
}

/// The model checker found it: the proof was shown once and lost, and the target that signed it is lost too.
#[test]
fn a_source_whose_voted_copy_died_owes_the_renunciation_until_it_is_adopted() {
    let mut host = Host::default();
    let mut source = voted_source(&mut host);
    feed_source(&mut host, &mut source, source::Event::QemuDied);
    feed_source(&mut host, &mut source, source::Event::Renounced(proof(&attempt(1))));
    let again = feed_source(&mut host, &mut source, source::Event::Timer(TimerKind::Resend));
    assert!(again.contains(&source::Effect::Present(proof(&attempt(1)))), "{again:?}");
    let touches =
        |e: &source::Effect| matches!(e, source::Effect::Thaw | source::Effect::YankOrCancel { .. });
    assert!(!again.iter().any(touches), "there is no QEMU: {again:?}");
}

/// The model checker found it: a registry that was set back commits on the old votes after it had freed the source by
/// the operator's word, which it forgot; the source runs, the target is dead, and the row never ended.
#[test]
fn a_thawed_source_over_a_fenced_commit_keeps_the_vm() {
    let attempt = attempt(1);
    let Attempt { key, permit, .. } = attempt;
    let decide = |row: &HandoverRow, event| decider::decide(row, event).unwrap();
    let says = |from, statement| decider::Event::Statement { from, statement };
    let source_vote = SourceVote { key, permit, evidence: evidence(), prior: PriorRunState::Running };
    let target_vote = TargetVote { key, permit, evidence: evidence() };
    let row = HandoverRow { continuity: Continuity::Unproven, ..HandoverRow::new(&attempt) };
    let row = decide(&row, says(Side::Source, Statement::Frozen(source_vote))).row;
    let row = decide(&row, says(Side::Target, Statement::Prepared(target_vote))).row;
    let thawed = says(Side::Source, Statement::Thawed(ThawReceipt { key, had_voted: true }));
    assert_eq!(decider::decide(&row, thawed.clone()), Err(decider::Refusal::NotYet));
    let row = decide(&row, decider::Event::TargetFenced).row;
    let kept = decide(&row, thawed);
    assert!(matches!(&kept.decision, Decision::Void(step) if step.to.host == attempt.source));
    assert!(kept.row.is_final());
}

#[test]
fn every_attempt_burns_fresh_epochs_whatever_its_end() {
    let first = fresh_epochs(Epoch(1)).unwrap();
    let row = HandoverRow::new(&Attempt {
        key: HandoverKey { source_epoch: first.source, target_epoch: first.target, ..attempt(1).key },
        ..attempt(1)
    });
    let renounced = proof(&Attempt { key: row.key, ..attempt(1) });
    let voided = decider::decide(&row, decider::Event::Renounced(renounced)).unwrap();
    let Decision::Void(step) = voided.decision else { panic!("{:?}", voided.decision) };
    assert_eq!(step.from.epoch, first.source);
    assert!(step.to.epoch > first.target, "the target's epoch is burnt too");
    assert!(fresh_epochs(step.to.epoch).unwrap().source > step.to.epoch);
    assert_eq!(fresh_epochs(Epoch(u64::MAX - 2)), None);
    assert_eq!(fresh_epochs(Epoch(u64::MAX)), None);
}

#[test]
fn recovery_refuses_a_journal_that_is_not_one_attempts() {
    let mut host = Host::default();
    start(&mut host, 1);
    start(&mut host, 2);
    let mixed: Vec<_> = host
        .journal
        .iter()
        .filter_map(|entry| match entry {
            Entry::Source(entry) => Some(entry),
            Entry::Target(_) => None,
        })
        .collect();
    assert!(Source::recover(mixed, source::QemuSeen::Running).is_err());
    assert!(Source::recover([], source::QemuSeen::Running).is_err());
    assert!(Target::recover([], target::QemuSeen::Paused).is_err());
}
