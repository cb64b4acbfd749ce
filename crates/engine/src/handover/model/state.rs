//! A state in a few bytes: machines, rows, journals and effects are numbers of [`super::table::Tables`].

use super::super::TimerKind;
use super::super::sim::Invariant;
use super::table::Tables;
use super::{Config, Shell};
use types::Side;

/// Hosts of the fleet.
pub(super) const HOSTS: u8 = 3;
/// No host, no QEMU.
pub(super) const NOBODY: u8 = u8::MAX;

/// Everything that matters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct State {
    pub(super) lanes: [Lane; 2],
    /// The VM's first QEMU, then the target's of each migration.
    pub(super) qemus: [Qemu; 3],
    /// The registry's record of the VM.
    pub(super) location: Spot,
    /// What a paused manager has read and is about to write.
    pub(super) held: Held,
    /// A copy of the registry.
    pub(super) backup: (u16, Spot),
    /// Daemons that are down, by host.
    pub(super) down: u8,
    /// Hosts that are gone.
    pub(super) lost: u8,
    /// Faults that may still come.
    pub(super) faults_left: u8,
    pub(super) marks: u8,
    /// 0, or one more than the invariant's number.
    violation: u8,
}

/// Marks of a [`State`].
pub(super) mod mark {
    /// Every manager is gone.
    pub(in super::super) const NO_MANAGER: u8 = 1;
    /// The registry was set back.
    pub(in super::super) const RESTORED: u8 = 2;
    /// Every valid copy was lost, by a fault that no rule can make good.
    pub(in super::super) const VM_LOST: u8 = 4;
    /// The registry gave the VM to its disk.
    pub(in super::super) const DISCARDED: u8 = 8;
    /// The operator has said that a host is dead.
    pub(in super::super) const FENCED: u8 = 16;
}

/// One migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Lane {
    /// 0: not granted yet.
    pub(super) attempt: u16,
    pub(super) row: u16,
    /// What was ever sent, by [`Message`].
    pub(super) net: u32,
    pub(super) flags: u16,
    pub(super) from: u8,
    pub(super) to: u8,
    /// The QEMU that it moves away, once started.
    pub(super) moves: u8,
    pub(super) source: Seat,
    pub(super) target: Seat,
}

/// Flags of a [`Lane`].
pub(super) mod flag {
    macro_rules! flags {
        ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
            $($(#[$doc])* pub(in super::super) const $name: u16 = 1 << $value;)*
        };
    }
    flags! {
        SOURCE_AGENT = 0;
        TARGET_AGENT = 1;
        SUSPENDED = 2;
        /// The stream has left the source's QEMU.
        SENT = 3;
        /// The target's agent has all of it.
        ARRIVED = 4;
        END_SEEN = 5;
        /// FROZEN was told to the source's agent.
        GUARD_OFF = 6;
        /// The state in the stream is the newest that was executed.
        FRESH = 7;
        /// The permit has prepared a QEMU.
        PREPARED = 8;
        /// The registry has held the commit.
        COMMITTED = 9;
        /// `cont` was given.
        CONT = 10;
        REFUSES = 11;
        /// The nonce is used up in the target daemon's memory.
        CONSUMED = 12;
        /// A later migration was opened on the QEMU of the source's, the target's machine.
        PASSED_SOURCE = 13;
        PASSED_TARGET = 14;
        /// The registry has held a void.
        VOIDED = 15;
    }
}

/// One machine and what waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Seat {
    pub(super) machine: u16,
    /// Effects to come.
    pub(super) pending: u16,
    pub(super) journal: u16,
    /// Results of effects, oldest first.
    pub(super) results: [u16; 2],
    pub(super) timers: u8,
    pub(super) notices: u8,
}

/// A host and an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Spot {
    pub(super) host: u8,
    pub(super) epoch: u8,
}

/// A transaction that was read and not yet written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Held {
    pub(super) lane: u8,
    /// 0: none.
    pub(super) row: u16,
    pub(super) ask: u8,
}

/// A QEMU process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Qemu {
    pub(super) host: u8,
    pub(super) phase: Phase,
    pub(super) lane: u8,
    pub(super) flags: u8,
}

/// Flags of a [`Qemu`].
pub(super) mod qemu {
    pub(in super::super) const ALIVE: u8 = 1;
    pub(in super::super) const FROZEN: u8 = 2;
    pub(in super::super) const VCPUS: u8 = 4;
    /// Its socket to the VM agent is open.
    pub(in super::super) const LINK: u8 = 8;
    /// RESUME since STOP.
    pub(in super::super) const RESUMED: u8 = 16;
    /// A target that tried to run holds image locks.
    pub(in super::super) const LOCKS: u8 = 32;
    /// It executed at least once.
    pub(in super::super) const EXECUTED: u8 = 64;
    /// It holds the newest state that was executed.
    pub(in super::super) const NEWEST: u8 = 128;
}

/// What a QEMU is doing, for the migration in [`Qemu::lane`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) enum Phase {
    #[default]
    None,
    /// An ordinary VM.
    Plain,
    /// Source, guest running.
    Active,
    /// Source, guest stopped by QEMU itself.
    Device,
    /// Target, `inmigrate`, with `-S`.
    Incoming,
    /// The same, and `-S` is not in force.
    IncomingRuns,
    /// Target, loaded.
    Loaded,
}

/// Messages of one migration: a bit of [`Lane::net`] each. What they hold follows from the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Message {
    // To the managers.
    Frozen,
    Prepared,
    NoVote,
    Running,
    Released,
    Thawed,
    AskedForAbort,
    RenouncedToManager,
    Ready,
    // To the source.
    Start,
    Suspend,
    Resume,
    AbortSource,
    Release,
    FencedThaw,
    FencedDiscard,
    PresentSource,
    CloseSource,
    RenouncedToSource,
    StatusNoRecord,
    StatusNotRun,
    StatusRunning,
    // To the target.
    Prepare,
    Commit,
    AbortTarget,
    Void,
    PresentTarget,
    CloseTarget,
    Asked,
}

impl Message {
    pub(super) const ALL: [Self; 29] = [
        Self::Frozen,
        Self::Prepared,
        Self::NoVote,
        Self::Running,
        Self::Released,
        Self::Thawed,
        Self::AskedForAbort,
        Self::RenouncedToManager,
        Self::Ready,
        Self::Start,
        Self::Suspend,
        Self::Resume,
        Self::AbortSource,
        Self::Release,
        Self::FencedThaw,
        Self::FencedDiscard,
        Self::PresentSource,
        Self::CloseSource,
        Self::RenouncedToSource,
        Self::StatusNoRecord,
        Self::StatusNotRun,
        Self::StatusRunning,
        Self::Prepare,
        Self::Commit,
        Self::AbortTarget,
        Self::Void,
        Self::PresentTarget,
        Self::CloseTarget,
        Self::Asked,
    ];

    /// Its bit in a set of messages.
    #[must_use]
    pub const fn bit(self) -> u32 {
        1 << self as u8
    }

    pub(super) const fn is_to_manager(self) -> bool {
        (self as u8) <= Self::Ready as u8
    }

    pub(super) const fn is_to_source(self) -> bool {
        self as u8 >= Self::Start as u8 && self as u8 <= Self::StatusRunning as u8
    }
}

/// What a manager may take up besides messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ask {
    /// What a daemon said.
    Hears(Message),
    /// Somebody wants it ended, or a limit is over (the permit's start window, the downtime budget, …).
    Abort,
    /// The source was silent for long enough.
    Silence,
    /// The operator's word.
    TargetFenced,
    /// The operator's word.
    SourceFenced,
}

impl Ask {
    /// In [`Held::ask`].
    pub(super) const fn number(self) -> u8 {
        match self {
            Self::Hears(message) => message as u8,
            Self::Abort => 32,
            Self::Silence => 33,
            Self::TargetFenced => 34,
            Self::SourceFenced => 35,
        }
    }

    pub(super) fn of_number(number: u8) -> Self {
        match number {
            32 => Self::Abort,
            33 => Self::Silence,
            34 => Self::TargetFenced,
            35 => Self::SourceFenced,
            n => Self::Hears(Message::ALL[usize::from(n)]),
        }
    }
}

/// What a daemon notices of its own QEMU and agent: a bit of [`Seat::notices`] each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Notice {
    GuestStopped,
    GuestResumed,
    EndOfStream,
    MigrationFailed,
    QemuDied,
    ChannelLost,
    StreamAccepted,
    StreamRejected,
}

impl Notice {
    pub(super) const ALL: [Self; 8] = [
        Self::GuestStopped,
        Self::GuestResumed,
        Self::EndOfStream,
        Self::MigrationFailed,
        Self::QemuDied,
        Self::ChannelLost,
        Self::StreamAccepted,
        Self::StreamRejected,
    ];

    pub(super) const fn bit(self) -> u8 {
        1 << self as u8
    }
}

pub(super) const TIMERS: [TimerKind; 5] =
    [TimerKind::Poll, TimerKind::Resend, TimerKind::Switchover, TimerKind::Watchdog, TimerKind::RunBudget];

pub(super) fn timer_bit(kind: TimerKind) -> u8 {
    1 << TIMERS.iter().position(|k| *k == kind).unwrap_or(0)
}

/// What QEMU and the agents do by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Stir {
    /// The source's QEMU converges and stops its guest.
    Converge,
    StreamOut,
    /// The target's inspector accepts the complete stream.
    Arrived,
    /// It refuses it.
    Rejected,
    Load,
    /// The source's agent knows that everything has left.
    EndSeen,
    /// No FROZEN in time: the source's agent closes QEMU's socket.
    Guard,
    /// The channel breaks, as the source's agent sees it.
    CutAtSource,
    CutAtTarget,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Action {
    /// A message arrives at the host that it is for.
    Deliver(u8, Message),
    /// A message arrives at a host that it is not for.
    Replay(u8, u8),
    /// A transaction of a manager, and its orders.
    Transact(u8, Ask),
    /// A manager reads and decides, and is paused.
    Pause(u8, Ask),
    /// It goes on: it writes what it decided if the row is still as it read it.
    GoOn,
    /// The next effect of a machine.
    Effect(u8, Side),
    /// The next effect fails: the freeze, `cont`.
    EffectFails(u8, Side),
    Notice(u8, Side, Notice),
    Timer(u8, Side, TimerKind),
    /// The manager is reached again.
    Contact(u8, Side),
    Stir(u8, Stir),
    CrashDaemon(u8),
    RestartDaemon(u8),
    LoseHost(u8),
    KillQemu(u8),
    LoseManagers,
    Backup,
    Restore,
    /// The next migration of the VM, to this host.
    Grant(u8),
}

/// One state being changed.
pub(super) struct Run<'a> {
    pub(super) config: &'a Config,
    pub(super) tables: &'a mut Tables,
    pub(super) state: State,
    /// What was wrong, in words.
    pub(super) detail: &'static str,
    /// Messages that never arrive in a fair run, for tests of partitions.
    pub(super) cut: u32,
}

impl State {
    /// The invariant of safety that was broken on the way here.
    #[must_use]
    pub fn violation(&self) -> Option<Invariant> {
        usize::from(self.violation).checked_sub(1).and_then(|n| Invariant::ALL.get(n).copied())
    }

    pub(super) fn is(&self, mark: u8) -> bool {
        self.marks & mark != 0
    }

    pub(super) fn up(&self, host: u8) -> bool {
        (self.down | self.lost) & 1 << host == 0
    }

    pub(super) fn granted(&self) -> usize {
        self.lanes.iter().filter(|l| l.attempt != 0).count()
    }
}

impl Lane {
    pub(super) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
    pub(super) const fn set(&mut self, flag: u16) {
        self.flags |= flag;
    }
    pub(super) const fn clear(&mut self, flag: u16) {
        self.flags &= !flag;
    }
    pub(super) const fn seat(&self, side: Side) -> &Seat {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }
    pub(super) const fn seat_mut(&mut self, side: Side) -> &mut Seat {
        match side {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        }
    }
    pub(super) const fn host(&self, side: Side) -> u8 {
        match side {
            Side::Source => self.from,
            Side::Target => self.to,
        }
    }
}

impl Seat {
    pub(super) const fn idle(&self) -> bool {
        self.pending == 0
    }

    /// What is left of it when its daemon dies.
    pub(super) fn crash(&mut self) {
        *self = Self { journal: self.journal, ..Self::default() };
    }
}

impl Qemu {
    pub(super) const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
    pub(super) const fn set(&mut self, flag: u8) {
        self.flags |= flag;
    }
    pub(super) const fn clear(&mut self, flag: u8) {
        self.flags &= !flag;
    }
    pub(super) const fn executes(&self) -> bool {
        self.has(qemu::ALIVE | qemu::VCPUS) && !self.has(qemu::FROZEN)
    }
    /// Whether it waits for, or holds, what migration `lane` brings.
    pub(super) fn of_target(&self, lane: usize) -> bool {
        let target = matches!(self.phase, Phase::Incoming | Phase::IncomingRuns | Phase::Loaded);
        target && usize::from(self.lane) == lane
    }
    pub(super) fn of_source(&self, lane: usize) -> bool {
        matches!(self.phase, Phase::Active | Phase::Device) && usize::from(self.lane) == lane
    }
    /// Nothing of a dead process matters but whether it ever ran.
    pub(super) fn die(&mut self) {
        self.flags &= qemu::EXECUTED;
        (self.phase, self.lane) = (Phase::None, 0);
    }
}

impl<'a> Run<'a> {
    pub(super) fn new(config: &'a Config, tables: &'a mut Tables, state: State) -> Self {
        Self { config, tables, state, detail: "", cut: 0 }
    }

    pub(super) fn first(config: &'a Config, tables: &'a mut Tables) -> State {
        let mut state = State { faults_left: config.faults, ..State::default() };
        state.location = Spot { host: 0, epoch: 1 };
        let flags = qemu::ALIVE | qemu::VCPUS | qemu::EXECUTED | qemu::NEWEST;
        state.qemus[0] = Qemu { host: 0, phase: Phase::Plain, lane: 0, flags };
        let mut run = Self::new(config, tables, state);
        run.grant(1);
        run.state
    }

    pub(super) fn violate(&mut self, invariant: Invariant, detail: &'static str) {
        if self.state.violation == 0 {
            let number = Invariant::ALL.iter().position(|i| *i == invariant).unwrap_or(0);
            self.state.violation = u8::try_from(number + 1).unwrap_or(u8::MAX);
            self.detail = detail;
        }
    }

    /// Everything that may happen next.
    pub(super) fn list(&mut self, actions: &mut Vec<Action>) {
        if self.state.violation != 0 {
            return;
        }
        for lane in 0..self.state.lanes.len() {
            if self.state.lanes[lane].attempt != 0 {
                self.list_lane(lane, actions);
            }
        }
        for host in 0..HOSTS {
            if self.state.down & 1 << host != 0 && self.state.lost & 1 << host == 0 {
                actions.push(Action::RestartDaemon(host));
            }
        }
        if self.state.held.row != 0 {
            actions.push(Action::GoOn);
        }
        self.list_grants(actions);
        if self.state.faults_left > 0 {
            self.list_faults(actions);
        }
    }

    fn list_lane(&mut self, lane: usize, actions: &mut Vec<Action>) {
        let l = self.state.lanes[lane];
        let number = lane_number(lane);
        for side in [Side::Source, Side::Target] {
            let seat = l.seat(side);
            if seat.machine == 0 {
                continue;
            }
            if seat.pending != 0 {
                actions.push(Action::Effect(number, side));
                if self.state.faults_left > 0 && self.config.kinds.refusals && self.may_fail(lane, side) {
                    actions.push(Action::EffectFails(number, side));
                }
                continue;
            }
            let notices = Notice::ALL.into_iter().filter(|n| seat.notices & n.bit() != 0);
            actions.extend(notices.map(|n| Action::Notice(number, side, n)));
            let timers = TIMERS.into_iter().filter(|t| seat.timers & timer_bit(*t) != 0);
            actions.extend(timers.map(|t| Action::Timer(number, side, t)));
            if !self.state.is(mark::NO_MANAGER) {
                actions.push(Action::Contact(number, side));
            }
        }
        for message in Message::ALL {
            if l.net & message.bit() == 0 {
                continue;
            }
            if message.is_to_manager() {
                self.list_transaction(number, Ask::Hears(message), actions);
            } else if self.reaches(lane, message) {
                actions.push(Action::Deliver(number, message));
            }
        }
        self.list_manager(lane, actions);
        self.list_stirs(lane, actions);
        // A permit that names one host is shown to the third.
        if l.net & Message::Prepare.bit() != 0 {
            let third = (0..HOSTS).find(|h| *h != l.from && *h != l.to).unwrap_or(NOBODY);
            actions.push(Action::Replay(number, third));
        }
    }

    pub(super) fn act(&mut self, action: Action) {
        let lane = |n: u8| usize::from(n);
        match action {
            Action::Deliver(n, message) => self.deliver(lane(n), message),
            Action::Replay(n, host) => self.replay(lane(n), host),
            Action::Transact(n, ask) => self.transact(lane(n), ask),
            Action::Pause(n, ask) => self.pause(n, ask),
            Action::GoOn => self.go_on(),
            Action::Effect(n, side) => self.step(lane(n), side, false),
            Action::EffectFails(n, side) => {
                self.state.faults_left = self.state.faults_left.saturating_sub(1);
                self.step(lane(n), side, true);
            }
            Action::Notice(n, side, notice) => self.notice(lane(n), side, notice),
            Action::Timer(n, side, kind) => self.timer(lane(n), side, kind),
            Action::Contact(n, side) => self.contact(lane(n), side),
            Action::Stir(n, stir) => self.stir(lane(n), stir),
            Action::RestartDaemon(host) => self.restart_daemon(host),
            Action::Backup => self.back_up(),
            Action::Grant(to) => self.grant(to),
            Action::CrashDaemon(_)
            | Action::LoseHost(_)
            | Action::KillQemu(_)
            | Action::LoseManagers
            | Action::Restore => {
                self.state.faults_left = self.state.faults_left.saturating_sub(1);
                self.fault(action);
            }
        }
        self.execute_guests();
        self.check_suspended();
        self.forget();
    }

    /// Forgets what can't matter any more, so that states that differ in it alone are one.
    pub(super) fn forget(&mut self) {
        for lane in &mut self.state.lanes {
            lane.source.notices &= !self.tables.dead_notices(lane.source.machine, Side::Source);
            lane.target.notices &= !self.tables.dead_notices(lane.target.machine, Side::Target);
        }
        let newest = self.state.granted().saturating_sub(1);
        for lane in &mut self.state.lanes[..newest] {
            // All that a timer makes a machine do that has let go of its QEMU is to say again what is under way.
            if self.tables.has_let_go(lane.source.machine, Side::Source) && lane.source.idle() {
                lane.source.timers = 0;
            }
            if self.tables.has_let_go(lane.target.machine, Side::Target) && lane.target.idle() {
                lane.target.timers = 0;
            }
        }
        // What was decided on a row that has changed will be thrown away; no row ever comes back but by a restore,
        // which ends the managers' transactions.
        let held = self.state.held;
        if held.row != 0
            && self.state.lanes[usize::from(held.lane)].row != held.row
            && self.config.shell != Shell::BlindWrite
        {
            self.state.held = Held::default();
        }
    }
}

pub(super) fn lane_number(lane: usize) -> u8 {
    u8::try_from(lane).unwrap_or(u8::MAX)
}
