//! The shells of the two daemons: messages, effects, restarts.
//!
//! A step takes one event and performs the effects up to and with the first that others can see or that must be
//! durable; every later such effect is a step of its own, so that others, and crashes, come between. Sends go with
//! what is before them: nothing tells a message that is late from one that was sent late.

use super::super::TimerKind;
use super::super::sim::Invariant;
use super::super::source::{self, Claim, Source};
use super::super::target::{self, Target};
use super::Shell;
use super::messages::{ended, qemu_facts, statement_message};
use super::state::{HOSTS, Message, Notice, Phase, Qemu, Run, flag, lane_number, qemu, timer_bit};
use super::table::wrote;
use types::Side;
use types::handover::{PriorRunState, Statement};

/// What comes of an effect.
enum Done {
    Nothing,
    Source(source::Event),
    Target(target::Event),
}

impl Run<'_> {
    // ---- messages ----

    /// Whether a message can be taken up now: the host is there and its machines are not in the middle of something.
    pub(super) fn reaches(&self, lane: usize, message: Message) -> bool {
        let side = if message.is_to_source() { Side::Source } else { Side::Target };
        let l = &self.state.lanes[lane];
        let host = l.host(side);
        if !self.state.up(host) || !l.seat(side).idle() {
            return false;
        }
        match message {
            Message::Start => l.source.machine == 0,
            Message::Prepare => !l.has(flag::CONSUMED),
            _ => self.newest(host, side).is_none_or(|n| self.state.lanes[n].seat(side).idle()),
        }
    }

    /// The newest migration with a machine of this role on a host.
    fn newest(&self, host: u8, side: Side) -> Option<usize> {
        (0..self.state.lanes.len()).rev().find(|n| {
            let l = &self.state.lanes[*n];
            l.attempt != 0 && l.host(side) == host && l.seat(side).machine != 0
        })
    }

    pub(super) fn deliver(&mut self, lane: usize, message: Message) {
        match message {
            Message::Prepare => return self.prepare(lane),
            Message::Start => return self.start(lane),
            _ => {}
        }
        let side = if message.is_to_source() { Side::Source } else { Side::Target };
        let l = self.state.lanes[lane];
        let event = self.tables.message_event(l.attempt, message);
        // The newest machine of the VM sees it first, then the one that it names: a rule that matches too little
        // would show.
        if let Some(newest) = self.newest(l.host(side), side)
            && newest != lane
            && self.offer(newest, side, event)
        {
            return;
        }
        if l.seat(side).machine == 0 {
            return self.strange(lane, side, message);
        }
        self.offer(lane, side, event);
    }

    /// A message about an attempt that no machine knows.
    fn strange(&mut self, lane: usize, side: Side, message: Message) {
        match (side, message) {
            (Side::Source, Message::AbortSource | Message::RenouncedToSource) => self.decline_source(lane),
            (Side::Target, Message::AbortTarget | Message::Void) => {
                let l = self.state.lanes[lane];
                let attempt = self.tables.attempts.get(l.attempt).clone();
                let mut ledger = self.tables.ledger(l.attempt, l.has(flag::CONSUMED));
                if let Ok((target, effects)) = Target::decline(attempt, ended(), &mut ledger) {
                    self.seat_target(lane, target, effects);
                }
            }
            (Side::Target, Message::Asked) => {
                self.state.lanes[lane].net |= Message::StatusNoRecord.bit();
            }
            _ => {}
        }
    }

    fn decline_source(&mut self, lane: usize) {
        let attempt = self.tables.attempts.get(self.state.lanes[lane].attempt).clone();
        let (source, effects) = Source::decline(attempt, ended());
        self.seat_source(lane, source, effects);
    }

    /// PREPARE: the permit arrives at its target.
    fn prepare(&mut self, lane: usize) {
        let l = self.state.lanes[lane];
        let attempt = self.tables.attempts.get(l.attempt).clone();
        let mut ledger = self.tables.ledger(l.attempt, l.has(flag::CONSUMED));
        if let Ok((target, effects)) = Target::prepare_under(self.config.rules, attempt, &mut ledger) {
            self.seat_target(lane, target, effects);
        }
    }

    /// The permit is shown to a host that it does not name. That host's daemon verifies before the machine sees it.
    pub(super) fn replay(&mut self, lane: usize, host: u8) {
        let l = self.state.lanes[lane];
        let named = l.to == host;
        if !named && self.config.shell != Shell::PermitForAnyHost || host >= HOSTS {
            return;
        }
        let attempt = self.tables.attempts.get(l.attempt).clone();
        let mut ledger = self.tables.ledger(l.attempt, false);
        if Target::prepare_under(self.config.rules, attempt, &mut ledger).is_ok() && l.has(flag::PREPARED) {
            self.violate(Invariant::I4ConsumedOnce, "one permit prepared a QEMU on two hosts");
        }
    }

    fn start(&mut self, lane: usize) {
        let l = self.state.lanes[lane];
        let ordinary = |q: &Qemu| {
            let plain = matches!(q.phase, Phase::Plain | Phase::Loaded);
            q.has(qemu::ALIVE | qemu::VCPUS) && q.host == l.from && plain
        };
        let found = self.state.qemus.iter().rposition(ordinary);
        let on_host = |side: Side| {
            let lanes = self.state.lanes.iter();
            lanes.filter(move |o| o.attempt != 0 && o.host(side) == l.from && o.seat(side).machine != 0)
        };
        let sources = on_host(Side::Source).map(|o| self.tables.sources.get(o.source.machine));
        let targets = on_host(Side::Target).map(|o| self.tables.targets.get(o.target.machine));
        let (Some(q), Some(claim)) = (found, Claim::new(sources, targets)) else {
            return self.decline_source(lane);
        };
        let attempt = self.tables.attempts.get(l.attempt).clone();
        let (source, effects) =
            Source::start_under(self.config.rules, claim, attempt, qemu_facts(q), PriorRunState::Running);
        self.state.lanes[lane].moves = lane_number(q);
        self.pass_on(lane);
        self.seat_source(lane, source, effects);
    }

    /// Earlier migrations have let go of the QEMU that this one opens.
    fn pass_on(&mut self, lane: usize) {
        let host = self.state.lanes[lane].from;
        for earlier in &mut self.state.lanes[..lane] {
            if earlier.from == host && earlier.source.journal != 0 {
                earlier.set(flag::PASSED_SOURCE);
            }
            if earlier.to == host && earlier.target.journal != 0 {
                earlier.set(flag::PASSED_TARGET);
            }
        }
    }

    fn seat_source(&mut self, lane: usize, source: Source, effects: Vec<source::Effect>) {
        let machine = self.tables.sources.number(source);
        let pending = self.tables.source_list(effects);
        let seat = &mut self.state.lanes[lane].source;
        (seat.machine, seat.pending) = (machine, pending);
        self.perform_first(lane, Side::Source);
    }

    fn seat_target(&mut self, lane: usize, target: Target, effects: Vec<target::Effect>) {
        let machine = self.tables.targets.number(target);
        let pending = self.tables.target_list(effects);
        let l = &mut self.state.lanes[lane];
        (l.target.machine, l.target.pending) = (machine, pending);
        l.set(flag::CONSUMED);
        self.perform_first(lane, Side::Target);
    }

    // ---- events ----

    pub(super) fn notice(&mut self, lane: usize, side: Side, notice: Notice) {
        let attempt = self.state.lanes[lane].attempt;
        self.state.lanes[lane].seat_mut(side).notices &= !notice.bit();
        let event = self.tables.notice_event(lane, attempt, side, notice);
        self.offer(lane, side, event);
    }

    pub(super) fn timer(&mut self, lane: usize, side: Side, kind: TimerKind) {
        self.state.lanes[lane].seat_mut(side).timers &= !timer_bit(kind);
        let event = match side {
            Side::Source => self.tables.source_events.number(source::Event::Timer(kind)),
            Side::Target => self.tables.target_events.number(target::Event::Timer(kind)),
        };
        self.offer(lane, side, event);
    }

    pub(super) fn contact(&mut self, lane: usize, side: Side) {
        let event = match side {
            Side::Source => self.tables.source_events.number(source::Event::ManagerContact),
            Side::Target => self.tables.target_events.number(target::Event::ManagerContact),
        };
        self.offer(lane, side, event);
    }

    /// True if the machine took the event for its own.
    fn offer(&mut self, lane: usize, side: Side, event: u16) -> bool {
        if !self.answer(lane, side, event) {
            return false;
        }
        self.perform_first(lane, side);
        true
    }

    /// The machine answers; its effects wait.
    fn answer(&mut self, lane: usize, side: Side, event: u16) -> bool {
        let machine = self.state.lanes[lane].seat(side).machine;
        if machine == 0 {
            return false;
        }
        let step = match side {
            Side::Source => self.tables.source_step(machine, event),
            Side::Target => self.tables.target_step(machine, event),
        };
        if step.misdelivered {
            return false;
        }
        let seat = self.state.lanes[lane].seat_mut(side);
        (seat.machine, seat.pending) = (step.machine, step.effects);
        true
    }

    // ---- effects ----

    /// Whether the next effect is one that may fail.
    pub(super) fn may_fail(&self, lane: usize, side: Side) -> bool {
        let l = &self.state.lanes[lane];
        let pending = l.seat(side).pending;
        match side {
            Side::Source => {
                matches!(self.tables.source_effects.get(pending).first(), Some(source::Effect::Freeze))
            }
            Side::Target => {
                let cont =
                    matches!(self.tables.target_effects.get(pending).first(), Some(target::Effect::Cont));
                cont && !l.has(flag::REFUSES)
            }
        }
    }

    fn perform_first(&mut self, lane: usize, side: Side) {
        if self.state.lanes[lane].seat(side).pending != 0 {
            self.step(lane, side, false);
        }
    }

    /// Effects up to and with the next that others can see, those after it that nobody can tell apart from later ones,
    /// and then the machine's answer to what came of them.
    pub(super) fn step(&mut self, lane: usize, side: Side, fails: bool) {
        let mut heavy = false;
        // What was sent may be heard before the journal line that follows it is durable (no rule orders it so).
        let mut sent = false;
        // A look at QEMU changes nothing: a crash right after it is one before it, so what it is for may follow.
        let mut looked = false;
        loop {
            let pending = self.state.lanes[lane].seat(side).pending;
            if pending == 0 {
                if !self.take_result(lane, side) {
                    return;
                }
                continue;
            }
            let kind = self.kind_of(lane, side, pending);
            let allowed = match kind {
                Kind::Light | Kind::Send => true,
                Kind::Journal => (!heavy || looked) && !sent,
                Kind::Look | Kind::Heavy => !heavy,
            };
            if !allowed {
                return;
            }
            looked = kind == Kind::Look;
            sent |= kind == Kind::Send;
            heavy |= !matches!(kind, Kind::Light | Kind::Send);
            let done = match side {
                Side::Source => self.source_effect(lane, pending, fails),
                Side::Target => self.target_effect(lane, pending, fails),
            };
            self.note_result(lane, side, done);
            if self.state.violation().is_some() {
                return;
            }
        }
    }

    fn take_result(&mut self, lane: usize, side: Side) -> bool {
        let seat = self.state.lanes[lane].seat_mut(side);
        let [first, second] = seat.results;
        seat.results = [second, 0];
        first != 0 && self.answer(lane, side, first)
    }

    fn note_result(&mut self, lane: usize, side: Side, done: Done) {
        let event = match done {
            Done::Nothing => return,
            Done::Source(event) => self.tables.source_events.number(event),
            Done::Target(event) => self.tables.target_events.number(event),
        };
        let results = &mut self.state.lanes[lane].seat_mut(side).results;
        let free = results.iter().position(|r| *r == 0).expect("no list has three effects with a result");
        results[free] = event;
    }

    fn kind_of(&self, lane: usize, side: Side, pending: u16) -> Kind {
        let l = &self.state.lanes[lane];
        match side {
            Side::Source => {
                use source::Effect as E;
                match self.tables.source_effects.get(pending).first() {
                    Some(E::Journal(_)) => Kind::Journal,
                    Some(E::Prove { .. }) => Kind::Look,
                    Some(E::Send(_) | E::Present(_)) => Kind::Send,
                    // It is gone already.
                    Some(E::CloseAgent) if !l.has(flag::SOURCE_AGENT) => Kind::Light,
                    Some(E::SetTimer(..) | E::ClearTimer(_) | E::TellAgentFrozen) => Kind::Light,
                    _ => Kind::Heavy,
                }
            }
            Side::Target => {
                use target::Effect as E;
                match self.tables.target_effects.get(pending).first() {
                    Some(E::Journal(_)) => Kind::Journal,
                    Some(E::QueryQemu) => Kind::Look,
                    Some(E::Send(_) | E::Answer(_) | E::Ready) => Kind::Send,
                    Some(E::CloseAgent) if !l.has(flag::TARGET_AGENT) => Kind::Light,
                    Some(E::SetTimer(..) | E::ClearTimer(_)) => Kind::Light,
                    _ => Kind::Heavy,
                }
            }
        }
    }

    fn source_effect(&mut self, lane: usize, pending: u16, fails: bool) -> Done {
        use source::Effect as E;
        let Some(effect) = self.tables.source_effects.get(pending).first().cloned() else {
            return Done::Nothing;
        };
        self.check_source_effect(lane, &effect);
        self.state.lanes[lane].source.pending = self.tables.source_tail(pending);
        let q = self.source_qemu(lane);
        match effect {
            E::Journal(_) => {
                let journal = self.state.lanes[lane].source.journal;
                self.state.lanes[lane].source.journal = self.tables.source_write(journal, pending);
            }
            E::StartMigration => self.start_stream(lane, q),
            E::SuspendRelay if self.state.lanes[lane].has(flag::SOURCE_AGENT) => {
                self.state.lanes[lane].set(flag::SUSPENDED);
            }
            E::ResumeRelay => self.state.lanes[lane].clear(flag::SUSPENDED),
            E::Freeze if fails => {
                return Done::Source(source::Event::FreezeFailed { detail: String::new() });
            }
            E::Freeze => {
                if let Some(q) = q {
                    self.state.qemus[q].set(qemu::FROZEN);
                }
                return Done::Source(source::Event::FreezeConfirmed);
            }
            E::Prove { .. } => {
                return Done::Source(match q.is_some_and(|q| self.proves(q, lane)) {
                    true => source::Event::ProofOk,
                    false => source::Event::ProofFailed { detail: String::new() },
                });
            }
            E::TellAgentFrozen => {
                if self.state.lanes[lane].has(flag::SOURCE_AGENT) {
                    self.state.lanes[lane].set(flag::GUARD_OFF);
                }
            }
            E::Send(statement) => self.say(lane, &statement),
            E::Present(_) => self.state.lanes[lane].net |= Message::RenouncedToManager.bit(),
            E::AskRenounce(_) => {
                if q.is_some_and(|q| self.state.qemus[q].has(qemu::FROZEN)) {
                    self.state.lanes[lane].net |= Message::Asked.bit() | Message::AskedForAbort.bit();
                }
            }
            E::CloseAgent => self.end_source_agent(lane),
            E::Thaw => {
                if let Some(q) = q {
                    self.thaw(q);
                }
            }
            E::YankOrCancel { .. } => {
                if q.is_some_and(|q| self.cancel(q, lane)) {
                    return Done::Source(source::Event::Cancelled);
                }
            }
            E::KillFrozenQemu(_) => {
                return match self.kill_frozen(lane) {
                    Some(true) => Done::Source(source::Event::QemuDied),
                    Some(false) => Done::Source(source::Event::KillRefused { detail: String::new() }),
                    None => Done::Nothing,
                };
            }
            E::SetTimer(kind, _) => self.state.lanes[lane].source.timers |= timer_bit(kind),
            E::ClearTimer(kind) => self.state.lanes[lane].source.timers &= !timer_bit(kind),
            E::SuspendRelay | E::Report(..) | E::Done(_) => {}
        }
        Done::Nothing
    }

    fn start_stream(&mut self, lane: usize, q: Option<usize>) {
        let Some(q) = q else { return };
        let qemu = &mut self.state.qemus[q];
        let plain = matches!(qemu.phase, Phase::Plain | Phase::Loaded);
        if plain && qemu.has(qemu::VCPUS) {
            (qemu.phase, qemu.lane) = (Phase::Active, lane_number(lane));
            qemu.set(qemu::LINK);
            qemu.clear(qemu::RESUMED);
            // An agent that is gone already: its end of QEMU's socket is closed.
            if !self.state.lanes[lane].has(flag::SOURCE_AGENT) {
                self.state.qemus[q].clear(qemu::LINK);
                self.state.qemus[q].phase = Phase::Plain;
                self.tell(lane, Side::Source, Notice::MigrationFailed);
            }
        }
    }

    fn target_effect(&mut self, lane: usize, pending: u16, fails: bool) -> Done {
        use target::Effect as E;
        let Some(effect) = self.tables.target_effects.get(pending).first().cloned() else {
            return Done::Nothing;
        };
        self.check_target_effect(lane, &effect);
        self.state.lanes[lane].target.pending = self.tables.target_tail(pending);
        match effect {
            E::Journal(_) => {
                let journal = self.state.lanes[lane].target.journal;
                self.state.lanes[lane].target.journal = self.tables.target_write(journal, pending);
            }
            E::PrepareQemu { paused } => return self.prepare_qemu(lane, paused),
            E::Ready => self.state.lanes[lane].net |= Message::Ready.bit(),
            E::QueryQemu => return Done::Target(target::Event::QemuStatus(self.query(lane))),
            E::Cont => return Done::Target(self.cont(lane, fails)),
            E::Send(statement) => {
                self.say(lane, &statement);
                if matches!(statement, Statement::Renounced(_)) {
                    self.state.lanes[lane].net |= Message::RenouncedToSource.bit();
                }
            }
            E::Answer(status) => {
                use super::super::TargetStatus as S;
                self.state.lanes[lane].net |= match status {
                    S::NoRecord => Message::StatusNoRecord.bit(),
                    S::NotRun => Message::StatusNotRun.bit(),
                    S::Running => Message::StatusRunning.bit(),
                };
            }
            E::KillQemu => {
                if let Some(q) = self.target_qemu(lane) {
                    self.state.qemus[q].die();
                }
                return Done::Target(target::Event::QemuDied);
            }
            E::CloseAgent => self.end_target_agent(lane),
            E::SetTimer(kind, _) => self.state.lanes[lane].target.timers |= timer_bit(kind),
            E::ClearTimer(kind) => self.state.lanes[lane].target.timers &= !timer_bit(kind),
            E::Announce | E::Report(..) | E::Done(_) => {}
        }
        Done::Nothing
    }

    fn say(&mut self, lane: usize, statement: &Statement) {
        if let Some(message) = statement_message(statement) {
            self.state.lanes[lane].net |= message.bit();
        }
    }

    fn prepare_qemu(&mut self, lane: usize, paused: bool) -> Done {
        let q = lane + 1;
        let host = self.state.lanes[lane].to;
        let phase = if paused { Phase::Incoming } else { Phase::IncomingRuns };
        let flags = qemu::ALIVE | qemu::LINK;
        self.state.qemus[q] = Qemu { host, phase, lane: lane_number(lane), flags };
        self.state.lanes[lane].set(flag::PREPARED | flag::SOURCE_AGENT | flag::TARGET_AGENT);
        Done::Target(target::Event::QemuPrepared(qemu_facts(q)))
    }

    fn query(&self, lane: usize) -> target::QemuStatus {
        use target::{QemuStatus, RunState};
        match self.target_qemu(lane).map(|q| self.state.qemus[q]) {
            Some(q) if q.has(qemu::VCPUS) => QemuStatus { completed: true, run: RunState::Running },
            Some(q) if q.phase == Phase::Loaded => QemuStatus { completed: true, run: RunState::Paused },
            _ => QemuStatus { completed: false, run: RunState::InMigrate },
        }
    }

    /// `cont` on the target: while `inmigrate` it silently cancels `-S`.
    fn cont(&mut self, lane: usize, fails: bool) -> target::Event {
        if fails {
            self.state.lanes[lane].set(flag::REFUSES);
            self.excuse_last_copy();
        }
        let Some(q) = self.target_qemu(lane) else {
            return target::Event::ContRefused { still_paused: false };
        };
        let refuses = self.state.lanes[lane].has(flag::REFUSES);
        let qemu = &mut self.state.qemus[q];
        if refuses && !qemu.has(qemu::VCPUS) {
            qemu.set(qemu::LOCKS);
            return target::Event::ContRefused { still_paused: true };
        }
        match qemu.phase {
            Phase::Incoming | Phase::IncomingRuns => qemu.phase = Phase::IncomingRuns,
            _ => qemu.set(qemu::VCPUS | qemu::LOCKS),
        }
        self.state.lanes[lane].set(flag::CONT);
        target::Event::ContDone
    }

    // ---- invariants about journals ----

    fn check_source_effect(&mut self, lane: usize, effect: &source::Effect) {
        use source::Effect as E;
        let needs = match effect {
            E::StartMigration => wrote::OPENED,
            E::Freeze => wrote::FREEZING | wrote::FROZEN,
            E::Thaw => wrote::NO_VOTE | wrote::FREED,
            E::KillFrozenQemu(_) => wrote::KILLING,
            E::AskRenounce(_) => wrote::ASKED,
            E::Send(Statement::Frozen(_)) => wrote::FROZEN,
            E::Send(Statement::NoVote(_)) => wrote::NO_VOTE,
            E::Send(Statement::Released(_)) => wrote::RELEASED,
            E::Send(Statement::Thawed(_)) | E::Present(_) => wrote::FREED,
            _ => return,
        };
        if !self.config.check_journal {
            return;
        }
        let l = self.state.lanes[lane];
        let written = self.tables.facts(l.source.journal, true);
        if *effect == E::Thaw && written & wrote::FROZEN != 0 && written & wrote::FREED == 0 {
            self.violate(Invariant::HThawNeedsProof, "thawed after FROZEN without a proof");
        }
        if *effect == E::Thaw && l.has(flag::CONT) {
            self.violate(Invariant::HNoThawAfterCont, "the source thaws, and the target was continued");
        }
        if written & needs == 0 {
            self.violate(Invariant::I6JournalFirst, "the source's journal lacks the ground of an effect");
        }
    }

    fn check_target_effect(&mut self, lane: usize, effect: &target::Effect) {
        use target::Effect as E;
        let l = self.state.lanes[lane];
        if matches!(effect, E::PrepareQemu { .. }) && l.has(flag::PREPARED) {
            self.violate(Invariant::I4ConsumedOnce, "a permit prepared a second QEMU");
        }
        let needs = match effect {
            E::PrepareQemu { .. } => wrote::CONSUMED,
            E::Cont | E::Send(Statement::Running(_)) => wrote::RUN,
            E::Send(Statement::Prepared(_)) => wrote::VOTED,
            E::Send(Statement::Renounced(_)) => wrote::RENOUNCED,
            _ => return,
        };
        if !self.config.check_journal {
            return;
        }
        if matches!(effect, E::Send(Statement::Renounced(_))) && self.target_qemu(lane).is_some() {
            self.violate(Invariant::HSignOverDead, "a renunciation is signed over a living QEMU");
        }
        let written = self.tables.facts(l.target.journal, false);
        if *effect == E::Cont && !l.has(flag::COMMITTED) {
            self.violate(Invariant::I6JournalFirst, "cont, and no registry ever held the commit");
        }
        if *effect == E::Cont && written & wrote::RENOUNCED != 0 {
            self.violate(Invariant::HRenouncedNeverRuns, "cont, and the attempt is renounced");
        }
        if written & needs == 0 {
            self.violate(Invariant::I6JournalFirst, "the target's journal lacks the ground of an effect");
        }
    }

    // ---- restart ----

    /// Rebuilds every machine from the journal and from what is seen of QEMU, and nothing else.
    pub(super) fn restart_daemon(&mut self, host: u8) {
        self.state.down &= !(1 << host);
        for lane in 0..self.state.lanes.len() {
            let l = self.state.lanes[lane];
            if l.attempt == 0 {
                continue;
            }
            if l.from == host {
                self.recover_source(lane);
            }
            if l.to == host {
                if self.tables.consumed(l.attempt, l.target.journal) {
                    self.state.lanes[lane].set(flag::CONSUMED);
                }
                self.recover_target(lane);
            }
        }
    }

    fn recover_source(&mut self, lane: usize) {
        let l = self.state.lanes[lane];
        let seen = match self.source_qemu(lane).map(|q| self.state.qemus[q].has(qemu::FROZEN)) {
            _ if l.has(flag::PASSED_SOURCE) => source::QemuSeen::Superseded,
            Some(true) => source::QemuSeen::Frozen,
            Some(false) => source::QemuSeen::Running,
            None => source::QemuSeen::Dead,
        };
        if let Some((machine, pending)) = self.tables.recover_source(l.source.journal, seen) {
            let seat = &mut self.state.lanes[lane].source;
            (seat.machine, seat.pending) = (machine, pending);
            self.perform_first(lane, Side::Source);
        }
    }

    fn recover_target(&mut self, lane: usize) {
        let l = self.state.lanes[lane];
        let seen = match self.target_qemu(lane).map(|q| self.state.qemus[q].has(qemu::VCPUS)) {
            _ if l.has(flag::PASSED_TARGET) => target::QemuSeen::Superseded,
            Some(true) => target::QemuSeen::Running,
            Some(false) => target::QemuSeen::Paused,
            None => target::QemuSeen::Dead,
        };
        if let Some((machine, pending)) = self.tables.recover_target(l.target.journal, seen) {
            let seat = &mut self.state.lanes[lane].target;
            (seat.machine, seat.pending) = (machine, pending);
            self.perform_first(lane, Side::Target);
        }
    }

    /// Whether the votes of both sides are in the registry.
    pub(super) fn both_votes_on_record(&self, lane: usize) -> bool {
        use super::super::decider::RowState;
        match &self.tables.rows.get(self.state.lanes[lane].row).state {
            RowState::Open(open) => open.source_vote.is_some() && open.target_vote.is_some(),
            RowState::Committed(_) | RowState::Running { .. } => true,
            _ => false,
        }
    }
}

/// How an effect weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nobody can tell when it was done.
    Light,
    /// May be heard at any later time, or never.
    Send,
    /// Seen by nobody but the daemon's next life.
    Journal,
    /// Reads QEMU and changes nothing.
    Look,
    /// Seen by others.
    Heavy,
}
