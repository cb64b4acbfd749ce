//! What messages, orders, notices and places are to the production machines: the values behind the model's numbers.

use super::super::decider::{self, Decision, HandoverRow, Order, RowState};
use super::super::source;
use super::super::target;
use super::super::{Attempt, QemuFacts, RenunciationProof, Resolution, TargetStatus};
use super::state::{Ask, HOSTS, Message, NOBODY, Notice, Spot};
use types::handover::{
    AbortReason, NoVote, PriorRunState, ReleaseReceipt, RenounceRequest, Renunciation, RunningReceipt,
    SourceVote, Statement, StreamEvidence, TargetVote, ThawReceipt,
};
use types::{Digest, Epoch, ErrorCode, HostName, Nonce, Side};

/// What happens to the location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    Keep,
    Commit { from: Spot, to: Spot },
    Void { from: Spot, to: Spot },
    Discard { from: Spot, to: Spot },
    AdoptCommit { from: Spot, to: Spot },
}

pub(super) fn host_name(host: u8) -> HostName {
    ["a", "b", "c"][usize::from(host)].parse().expect("a name of one letter follows the rule")
}

/// A host's number by its name.
pub(super) fn host_number(name: &HostName) -> u8 {
    (0..HOSTS).find(|h| host_name(*h) == *name).unwrap_or(NOBODY)
}

/// The process of QEMU number `q`.
pub(super) fn qemu_facts(q: usize) -> QemuFacts {
    QemuFacts {
        pid: u32::try_from(q).unwrap_or(u32::MAX),
        start_time_ticks: 1,
        boot: Nonce::from_bytes([1; 16]),
    }
}

pub(super) fn evidence(lane: usize) -> StreamEvidence {
    let tag = u8::try_from(lane).unwrap_or(u8::MAX);
    StreamEvidence { stream_bytes: u64::from(tag) + 1, digest: Digest([tag; 32]) }
}

pub(super) fn ended() -> AbortReason {
    AbortReason { code: ErrorCode::Terminated, detail: "ended".to_owned() }
}

/// The variant of a row's state.
pub(super) fn row_name(row: &HandoverRow) -> &'static str {
    match &row.state {
        RowState::Open(_) => "open",
        RowState::Committed(_) => "committed",
        RowState::Running { .. } => "running",
        RowState::Completed { .. } => "completed",
        RowState::Voided(_) => "voided",
        RowState::Discarded { .. } => "discarded",
    }
}

pub(super) fn lane_of(attempt: &Attempt) -> usize {
    usize::from(attempt.key.migration.as_bytes()[0])
}

fn proof(of: &Attempt) -> RenunciationProof {
    let renunciation = Renunciation {
        key: of.key,
        permit: of.permit,
        source: of.source.clone(),
        target: of.target.clone(),
        journal: of.target_journal,
    };
    RenunciationProof { renunciation, token: Vec::new() }
}

pub(super) fn source_event(of: &Attempt, message: Message) -> source::Event {
    use source::Order as O;
    let key = of.key;
    let order = |order| source::Event::Order { key, order };
    let status = |status| source::Event::TargetStatus { key, status };
    match message {
        Message::Suspend => order(O::Suspend),
        Message::Resume => order(O::Resume),
        Message::Release => order(O::Release),
        Message::FencedThaw => order(O::Fenced { resolution: Resolution::Thaw }),
        Message::FencedDiscard => order(O::Fenced { resolution: Resolution::Discard }),
        Message::PresentSource => order(O::Present),
        Message::CloseSource => order(O::Close),
        Message::RenouncedToSource => source::Event::Renounced(proof(of)),
        Message::StatusNoRecord => status(TargetStatus::NoRecord),
        Message::StatusNotRun => status(TargetStatus::NotRun),
        Message::StatusRunning => status(TargetStatus::Running),
        _ => order(O::Abort { reason: ended() }),
    }
}

pub(super) fn target_event(of: &Attempt, message: Message) -> target::Event {
    use target::Order as O;
    let order = |order| target::Event::Order { key: of.key, order };
    match message {
        Message::Commit => {
            order(O::Commit { evidence: evidence(lane_of(of)), prior: PriorRunState::Running })
        }
        Message::AbortTarget => order(O::Abort { reason: ended() }),
        Message::PresentTarget => order(O::Present),
        Message::CloseTarget => order(O::Close),
        Message::Asked => target::Event::Asked(RenounceRequest { key: of.key, permit: of.permit }),
        _ => order(O::Void { reason: ended() }),
    }
}

pub(super) fn manager_event(of: &Attempt, ask: Ask) -> decider::Event {
    let message = match ask {
        Ask::Hears(message) => message,
        Ask::Abort => return decider::Event::AbortRequested(ended()),
        Ask::Silence => return decider::Event::SourceSilent,
        Ask::TargetFenced => return decider::Event::TargetFenced,
        Ask::SourceFenced => return decider::Event::SourceFenced,
    };
    let (key, permit, evidence) = (of.key, of.permit, evidence(lane_of(of)));
    let running = PriorRunState::Running;
    let source = |statement| decider::Event::Statement { from: Side::Source, statement };
    let target = |statement| decider::Event::Statement { from: Side::Target, statement };
    match message {
        Message::Frozen => source(Statement::Frozen(SourceVote { key, permit, evidence, prior: running })),
        Message::Prepared => target(Statement::Prepared(TargetVote { key, permit, evidence })),
        Message::NoVote => source(Statement::NoVote(NoVote { key, reason: ended() })),
        Message::Running => {
            target(Statement::Running(RunningReceipt { key, permit, evidence, state: running }))
        }
        Message::Released => source(Statement::Released(ReleaseReceipt { key, evidence })),
        Message::Thawed => source(Statement::Thawed(ThawReceipt { key, had_voted: true })),
        Message::AskedForAbort => source(Statement::AskRenounce(RenounceRequest { key, permit })),
        _ => decider::Event::Renounced(proof(of)),
    }
}

/// The message that an order is, if it holds what that message holds.
pub(super) fn order_message(order: &Order, own: StreamEvidence) -> Option<Message> {
    use source::Order as S;
    use target::Order as T;
    Some(match order {
        Order::Source(S::Suspend) => Message::Suspend,
        Order::Source(S::Resume) => Message::Resume,
        Order::Source(S::Abort { .. }) => Message::AbortSource,
        Order::Source(S::Release) => Message::Release,
        Order::Source(S::Fenced { resolution: Resolution::Thaw }) => Message::FencedThaw,
        Order::Source(S::Fenced { resolution: Resolution::Discard }) => Message::FencedDiscard,
        Order::Source(S::Present) => Message::PresentSource,
        Order::Source(S::Close) => Message::CloseSource,
        Order::ShowRenunciation(_) => Message::RenouncedToSource,
        Order::Target(T::Commit { evidence, .. }) if *evidence != own => return None,
        Order::Target(T::Commit { .. }) => Message::Commit,
        Order::Target(T::Abort { .. }) => Message::AbortTarget,
        Order::Target(T::Void { .. }) => Message::Void,
        Order::Target(T::Present) => Message::PresentTarget,
        Order::Target(T::Close) => Message::CloseTarget,
    })
}

/// The message that a statement of a source is.
pub(super) fn statement_message(statement: &Statement) -> Option<Message> {
    Some(match statement {
        Statement::Request(_) => return None,
        Statement::Frozen(_) => Message::Frozen,
        Statement::NoVote(_) => Message::NoVote,
        Statement::Prepared(_) => Message::Prepared,
        Statement::Running(_) => Message::Running,
        Statement::Renounced(_) => Message::RenouncedToManager,
        Statement::AskRenounce(_) => Message::AskedForAbort,
        Statement::Released(_) => Message::Released,
        Statement::Thawed(_) => Message::Thawed,
    })
}

fn spot(place: &decider::Place) -> Spot {
    let Epoch(epoch) = place.epoch;
    Spot { host: host_number(&place.host), epoch: u8::try_from(epoch).unwrap_or(u8::MAX) }
}

pub(super) fn moved(decision: &Decision) -> Moved {
    match decision {
        Decision::Keep => Moved::Keep,
        Decision::Commit(step) => Moved::Commit { from: spot(&step.from), to: spot(&step.to) },
        Decision::Void(step) => Moved::Void { from: spot(&step.from), to: spot(&step.to) },
        Decision::Discard(step) => Moved::Discard { from: spot(&step.from), to: spot(&step.to) },
        Decision::AdoptCommit(step) => Moved::AdoptCommit { from: spot(&step.from), to: spot(&step.to) },
    }
}

pub(super) fn source_notice(lane: usize, notice: Notice) -> source::Event {
    let detail = String::new();
    match notice {
        Notice::GuestStopped => source::Event::GuestStopped,
        Notice::GuestResumed => source::Event::GuestResumed,
        Notice::EndOfStream => source::Event::EndOfStream(evidence(lane)),
        Notice::MigrationFailed => source::Event::MigrationFailed { detail },
        Notice::QemuDied => source::Event::QemuDied,
        _ => source::Event::ChannelLost { detail },
    }
}

pub(super) fn target_notice(lane: usize, notice: Notice) -> target::Event {
    let detail = String::new();
    match notice {
        Notice::StreamAccepted => target::Event::StreamAccepted(evidence(lane)),
        Notice::StreamRejected => target::Event::StreamRejected { detail },
        Notice::QemuDied => target::Event::QemuDied,
        _ => target::Event::ChannelLost { detail },
    }
}
