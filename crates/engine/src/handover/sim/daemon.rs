//! The shell of a daemon: one effect per step, so that a crash can fall between any two.

use super::super::journal::{Entry, NonceLedger, Recorded, SourceEntry, SourceFact, attempts};
use super::super::source::{self, Claim, Source};
use super::super::target::{self, Target};
use super::super::{QemuFacts, RenunciationProof, Rule, TargetStatus, TimerKind};
use super::check;
use super::hypervisor::Phase;
use super::plan::{MANAGER, Moment};
use super::world::{Item, Message, World};
use std::collections::VecDeque;
use types::handover::{AbortReason, PriorRunState, Statement};
use types::{ErrorCode, Nonce, Side};

/// What a daemon has to look at.
#[derive(Debug)]
pub(super) enum Input {
    Prepare(usize),
    Start(usize),
    /// A message: the newest machine of the VM sees it first, then the one that it names.
    Source(usize, source::Event),
    Target(usize, target::Event),
    /// Something that happened to a migration's own QEMU, agent or timer.
    SourceOf(usize, source::Event),
    TargetOf(usize, target::Event),
}

#[derive(Debug)]
enum Effect {
    Source(source::Effect),
    Target(target::Effect),
}

impl Effect {
    fn moment(&self) -> Option<Moment> {
        use source::Effect as S;
        use target::Effect as T;
        Some(match self {
            Self::Source(S::Journal(_)) | Self::Target(T::Journal(_)) => Moment::Journal,
            Self::Target(T::Send(Statement::Renounced(_))) => Moment::SendRenounced,
            Self::Source(S::Send(_)) | Self::Target(T::Send(_)) => Moment::Send,
            Self::Source(S::Freeze) => Moment::Freeze,
            Self::Source(S::AskRenounce(_)) => Moment::Ask,
            Self::Source(S::Thaw) => Moment::Thaw,
            Self::Source(S::KillFrozenQemu(_)) | Self::Target(T::KillQemu) => Moment::Kill,
            Self::Target(T::Cont) => Moment::Cont,
            _ => return None,
        })
    }
}

#[derive(Debug)]
enum Machine {
    Source(usize, Source),
    Target(usize, Target),
}

#[derive(Debug)]
struct Timer {
    source: bool,
    m: usize,
    kind: TimerKind,
    generation: u64,
    set: bool,
}

/// A daemon; everything but its host's journal dies with it.
#[derive(Debug, Default)]
pub(super) struct Daemon {
    pub(super) up: bool,
    life: u64,
    busy: bool,
    machines: Vec<Machine>,
    pending: VecDeque<(usize, Effect)>,
    inbox: VecDeque<Input>,
    timers: Vec<Timer>,
    pub(super) ledger: NonceLedger,
}

impl Daemon {
    pub(super) fn crash(&mut self) {
        *self = Self { life: self.life + 1, ..Self::default() };
    }

    fn machine(&mut self, source: bool, m: usize) -> Option<&mut Machine> {
        self.machines.iter_mut().find(|machine| match machine {
            Machine::Source(n, _) => source && *n == m,
            Machine::Target(n, _) => !source && *n == m,
        })
    }

    fn newest(&self, source: bool) -> Option<usize> {
        let numbers = self.machines.iter().filter_map(|machine| match machine {
            Machine::Source(n, _) => source.then_some(*n),
            Machine::Target(n, _) => (!source).then_some(*n),
        });
        numbers.max()
    }
}

impl World<'_> {
    /// Puts something into a daemon's inbox; a dead daemon hears nothing.
    pub(super) fn give(&mut self, host: usize, input: Input) {
        if self.hosts[host].daemon.up {
            self.hosts[host].daemon.inbox.push_back(input);
            self.wake(host);
        }
    }

    fn wake(&mut self, host: usize) {
        let daemon = &mut self.hosts[host].daemon;
        let work = !daemon.pending.is_empty() || !daemon.inbox.is_empty();
        if work && !std::mem::replace(&mut daemon.busy, true) {
            let life = daemon.life;
            let delay = self.rng.range(0, 1);
            self.later(delay, Item::Daemon { host, life });
        }
    }

    pub(super) fn daemon_step(&mut self, host: usize, life: u64) {
        let daemon = &mut self.hosts[host].daemon;
        if daemon.life != life || !daemon.up {
            return;
        }
        daemon.busy = false;
        if let Some((m, effect)) = daemon.pending.pop_front() {
            let moment = effect.moment();
            match effect {
                Effect::Source(effect) => self.source_effect(host, m, effect),
                Effect::Target(effect) => self.target_effect(host, m, effect),
            }
            self.crash_if_due(host, moment);
        } else if let Some(input) = daemon.inbox.pop_front() {
            self.handle(host, input);
        }
        if self.hosts[host].daemon.life == life {
            self.wake(host);
        }
    }

    fn handle(&mut self, host: usize, input: Input) {
        match input {
            Input::Prepare(m) => self.handle_prepare(host, m),
            Input::Start(m) => self.handle_start(host, m),
            Input::SourceOf(m, event) => {
                self.offer_source(host, m, event);
            }
            Input::TargetOf(m, event) => {
                self.offer_target(host, m, event);
            }
            Input::Source(m, event) => {
                let newest = self.hosts[host].daemon.newest(true);
                let taken = newest.is_some_and(|n| self.offer_source(host, n, event.clone()));
                if !taken && newest != Some(m) {
                    self.offer_named_source(host, m, event);
                }
            }
            Input::Target(m, event) => {
                let newest = self.hosts[host].daemon.newest(false);
                let taken = newest.is_some_and(|n| self.offer_target(host, n, event.clone()));
                if !taken && newest != Some(m) {
                    self.offer_named_target(host, m, event);
                }
            }
        }
    }

    fn handle_prepare(&mut self, host: usize, m: usize) {
        let attempt = (*self.migrations[m].attempt).clone();
        let rules = self.options.rules;
        let daemon = &mut self.hosts[host].daemon;
        if let Ok((target, effects)) = Target::prepare_under(rules, attempt, &mut daemon.ledger) {
            daemon.machines.push(Machine::Target(m, target));
            daemon.pending.extend(effects.into_iter().map(|e| (m, Effect::Target(e))));
        }
    }

    fn handle_start(&mut self, host: usize, m: usize) {
        if self.hosts[host].daemon.machine(true, m).is_some() {
            return;
        }
        let attempt = (*self.migrations[m].attempt).clone();
        let ordinary = |q: &super::hypervisor::Qemu| {
            q.alive && q.host == host && q.vcpus && matches!(q.phase, Phase::Plain | Phase::Loaded(_))
        };
        let machines = &self.hosts[host].daemon.machines;
        let sources = machines.iter().filter_map(|machine| match machine {
            Machine::Source(_, source) => Some(source),
            Machine::Target(..) => None,
        });
        let targets = machines.iter().filter_map(|machine| match machine {
            Machine::Target(_, target) => Some(target),
            Machine::Source(..) => None,
        });
        let claim = Claim::new(sources, targets);
        let (source, effects) = match self.qemus.iter().rposition(ordinary).zip(claim) {
            Some((q, claim)) => {
                Source::start_under(self.options.rules, claim, attempt, facts(q), PriorRunState::Running)
            }
            None => Source::decline(attempt, declined()),
        };
        let daemon = &mut self.hosts[host].daemon;
        daemon.machines.push(Machine::Source(m, source));
        daemon.pending.extend(effects.into_iter().map(|e| (m, Effect::Source(e))));
    }

    /// True if the machine took the event for its own.
    fn offer_source(&mut self, host: usize, m: usize, event: source::Event) -> bool {
        let Some(Machine::Source(_, source)) = self.hosts[host].daemon.machine(true, m) else { return false };
        let before = source.state_name();
        let reaction = source.handle(event.clone());
        let after = source.state_name();
        if Self::misdelivered(&reaction.verdict) {
            return false;
        }
        self.note(|| format!("m{m} source: {before} -> {after} on {event:?}: {:?}", reaction.verdict));
        let effects = reaction.effects.into_iter().map(|e| (m, Effect::Source(e)));
        self.hosts[host].daemon.pending.extend(effects);
        true
    }

    fn offer_target(&mut self, host: usize, m: usize, event: target::Event) -> bool {
        let Some(Machine::Target(_, target)) = self.hosts[host].daemon.machine(false, m) else {
            return false;
        };
        let before = target.state_name();
        let reaction = target.handle(event.clone());
        let after = target.state_name();
        if Self::misdelivered(&reaction.verdict) {
            return false;
        }
        self.note(|| format!("m{m} target: {before} -> {after} on {event:?}: {:?}", reaction.verdict));
        let effects = reaction.effects.into_iter().map(|e| (m, Effect::Target(e)));
        self.hosts[host].daemon.pending.extend(effects);
        true
    }

    fn offer_named_source(&mut self, host: usize, m: usize, event: source::Event) {
        if self.hosts[host].daemon.machine(true, m).is_some() {
            self.offer_source(host, m, event);
            return;
        }
        let reason = match event {
            source::Event::Order { order: source::Order::Abort { reason }, .. } => Some(reason),
            source::Event::Renounced(_) => Some(declined()),
            _ => None,
        };
        if let Some(reason) = reason {
            let attempt = (*self.migrations[m].attempt).clone();
            let (source, effects) = Source::decline(attempt, reason);
            let daemon = &mut self.hosts[host].daemon;
            daemon.machines.push(Machine::Source(m, source));
            daemon.pending.extend(effects.into_iter().map(|e| (m, Effect::Source(e))));
        }
    }

    fn offer_named_target(&mut self, host: usize, m: usize, event: target::Event) {
        if self.hosts[host].daemon.machine(false, m).is_some() {
            self.offer_target(host, m, event);
            return;
        }
        match event {
            target::Event::Order {
                order: target::Order::Abort { reason } | target::Order::Void { reason },
                ..
            } => {
                let attempt = (*self.migrations[m].attempt).clone();
                let daemon = &mut self.hosts[host].daemon;
                if let Ok((target, effects)) = Target::decline(attempt, reason, &mut daemon.ledger) {
                    daemon.machines.push(Machine::Target(m, target));
                    daemon.pending.extend(effects.into_iter().map(|e| (m, Effect::Target(e))));
                }
            }
            target::Event::Asked(_) => {
                let source = self.migrations[m].from;
                self.send(host, source, Message::Status(m, TargetStatus::NoRecord));
            }
            _ => {}
        }
    }

    fn source_effect(&mut self, host: usize, m: usize, effect: source::Effect) {
        use source::Effect as E;
        self.note(|| format!("m{m} source does {effect:?}"));
        check::source_effect(self, m, &effect);
        let q = self.source_qemu(m);
        let result = match effect {
            E::Journal(entry) => {
                check::source_wrote(self, m, &entry.fact);
                self.hosts[host].journal.push((m, Entry::Source(entry)));
                None
            }
            E::StartMigration => {
                if let Some(q) = q {
                    self.start_stream(m, q);
                }
                None
            }
            E::SuspendRelay | E::ResumeRelay => {
                self.migrations[m].channel.suspended = effect == E::SuspendRelay;
                None
            }
            E::Freeze if std::mem::take(&mut self.migrations[m].fails_freeze) => {
                Some(source::Event::FreezeFailed { detail: "the freezer failed".to_owned() })
            }
            E::Freeze => {
                if let Some(q) = q {
                    self.qemus[q].frozen = true;
                }
                Some(source::Event::FreezeConfirmed)
            }
            E::Prove { .. } => match q.is_some_and(|q| self.proves(q, m)) {
                true => Some(source::Event::ProofOk),
                false => Some(source::Event::ProofFailed { detail: "QEMU moved".to_owned() }),
            },
            E::TellAgentFrozen => {
                self.migrations[m].channel.guard_off = true;
                None
            }
            E::Send(statement) => {
                self.send(host, MANAGER, Message::Statement(m, Side::Source, statement));
                None
            }
            E::Present(proof) => {
                self.send(host, MANAGER, Message::Renounced(proof));
                None
            }
            E::AskRenounce(_) if !q.is_some_and(|q| self.qemus[q].frozen) => None,
            E::AskRenounce(statement) => {
                if let Statement::AskRenounce(request) = &statement {
                    let target = self.migrations[m].to;
                    self.send(host, target, Message::Asked(m, request.clone()));
                }
                self.send(host, MANAGER, Message::Statement(m, Side::Source, statement));
                None
            }
            E::CloseAgent => {
                self.end_source_agent(m, "its daemon said so");
                None
            }
            E::Thaw => {
                if let Some(q) = q {
                    self.thaw(q);
                }
                None
            }
            E::YankOrCancel { .. } => q.and_then(|q| self.cancel(q, m)),
            E::KillFrozenQemu(facts) => self.kill_frozen(facts),
            E::SetTimer(kind, ms) => {
                self.set_timer(host, true, m, kind, ms);
                None
            }
            E::ClearTimer(kind) => {
                self.clear_timer(host, true, m, kind);
                None
            }
            E::Report(..) | E::Done(_) => None,
        };
        if let Some(event) = result {
            self.hosts[host].daemon.inbox.push_front(Input::SourceOf(m, event));
        }
    }

    fn kill_frozen(&mut self, facts: QemuFacts) -> Option<source::Event> {
        let q = usize::try_from(facts.pid).unwrap_or(usize::MAX);
        let reconciler = !self.options.rules.has(Rule::AdoptBeforeStopping);
        match self.qemus.get_mut(q) {
            Some(qemu) if qemu.alive && !qemu.frozen && !reconciler => {
                Some(source::Event::KillRefused { detail: "it is not frozen".to_owned() })
            }
            Some(qemu) => {
                qemu.alive = false;
                Some(source::Event::QemuDied)
            }
            None => None,
        }
    }

    fn target_effect(&mut self, host: usize, m: usize, effect: target::Effect) {
        use target::Effect as E;
        self.note(|| format!("m{m} target does {effect:?}"));
        check::target_effect(self, m, &effect);
        let result = match effect {
            E::Journal(entry) => {
                check::target_wrote(self, m, &entry.fact);
                self.hosts[host].journal.push((m, Entry::Target(entry)));
                None
            }
            E::PrepareQemu { paused } => {
                let q = self.prepare_qemu(host, m, paused);
                self.open_channel(m);
                Some(target::Event::QemuPrepared(facts(q)))
            }
            E::Ready => {
                self.send(host, MANAGER, Message::Ready(m));
                None
            }
            E::QueryQemu => Some(target::Event::QemuStatus(self.query(m))),
            E::Cont => Some(self.cont(m)),
            E::Announce | E::Report(..) | E::Done(_) => None,
            E::Send(statement) => {
                self.target_says(host, m, statement);
                None
            }
            E::Answer(status) => {
                let source = self.migrations[m].from;
                self.send(host, source, Message::Status(m, status));
                None
            }
            E::KillQemu => {
                self.kill_target_qemus(m);
                Some(target::Event::QemuDied)
            }
            E::CloseAgent => {
                self.end_target_agent(m, "its daemon said so");
                None
            }
            E::SetTimer(kind, ms) => {
                self.set_timer(host, false, m, kind, ms);
                None
            }
            E::ClearTimer(kind) => {
                self.clear_timer(host, false, m, kind);
                None
            }
        };
        if let Some(event) = result {
            self.hosts[host].daemon.inbox.push_front(Input::TargetOf(m, event));
        }
    }

    fn target_says(&mut self, host: usize, m: usize, statement: Statement) {
        let Statement::Renounced(renunciation) = statement else {
            return self.send(host, MANAGER, Message::Statement(m, Side::Target, statement));
        };
        let proof = RenunciationProof { renunciation, token: Vec::new() };
        let source = self.migrations[m].from;
        self.send(host, MANAGER, Message::Renounced(proof.clone()));
        self.send(host, source, Message::Renounced(proof));
    }

    fn source_qemu(&self, m: usize) -> Option<usize> {
        let host = self.migrations[m].from;
        let machine = self.hosts[host].journal.iter().find_map(|(n, entry)| match entry {
            Entry::Source(SourceEntry { fact: SourceFact::Opened { qemu, .. }, .. }) if *n == m => {
                usize::try_from(qemu.pid).ok()
            }
            _ => None,
        });
        machine.filter(|q| self.qemus.get(*q).is_some_and(|q| q.alive))
    }

    // ---- timers ----

    fn slot(&mut self, host: usize, source: bool, m: usize, kind: TimerKind) -> usize {
        let timers = &mut self.hosts[host].daemon.timers;
        let found = timers.iter().position(|t| t.source == source && t.m == m && t.kind == kind);
        found.unwrap_or_else(|| {
            timers.push(Timer { source, m, kind, generation: 0, set: false });
            timers.len() - 1
        })
    }

    fn set_timer(&mut self, host: usize, source: bool, m: usize, kind: TimerKind, ms: u64) {
        let slot = self.slot(host, source, m, kind);
        let daemon = &mut self.hosts[host].daemon;
        let life = daemon.life;
        let timer = &mut daemon.timers[slot];
        timer.generation += 1;
        timer.set = true;
        let generation = timer.generation;
        self.later(ms, Item::Timer { host, life, slot, generation });
    }

    fn clear_timer(&mut self, host: usize, source: bool, m: usize, kind: TimerKind) {
        let slot = self.slot(host, source, m, kind);
        self.hosts[host].daemon.timers[slot].set = false;
    }

    pub(super) fn timer_fires(&mut self, host: usize, life: u64, slot: usize, generation: u64) {
        let daemon = &mut self.hosts[host].daemon;
        if daemon.life != life || !daemon.up {
            return;
        }
        let timer = &mut daemon.timers[slot];
        if timer.generation == generation && std::mem::take(&mut timer.set) {
            let input = fired(timer);
            self.give(host, input);
        }
    }

    /// The clock jumps: whatever was set is due.
    pub(super) fn fire_all_timers(&mut self, host: usize) {
        for slot in 0..self.hosts[host].daemon.timers.len() {
            let timer = &mut self.hosts[host].daemon.timers[slot];
            if std::mem::take(&mut timer.set) {
                let input = fired(timer);
                self.give(host, input);
            }
        }
    }

    // ---- restart ----

    /// Rebuilds every machine from the journal and from what is seen of QEMU, and nothing else.
    pub(super) fn restart_daemon(&mut self, host: usize) {
        if self.hosts[host].lost || self.hosts[host].daemon.up {
            return;
        }
        self.note(|| format!("the daemon of host {host} restarts"));
        let ledger = NonceLedger::rebuild(self.hosts[host].journal.iter().map(|(_, entry)| entry));
        let mut machines = Vec::new();
        let mut pending = VecDeque::new();
        for recorded in attempts(self.hosts[host].journal.iter().map(|(_, entry)| entry)) {
            match recorded {
                Recorded::Source { key, superseded, entries } => {
                    let m = usize::from(key.migration.as_bytes()[0]);
                    let seen = self.source_seen(m, superseded);
                    if let Ok((source, effects)) = Source::recover_under(self.options.rules, entries, seen) {
                        machines.push(Machine::Source(m, source));
                        pending.extend(effects.into_iter().map(|e| (m, Effect::Source(e))));
                    }
                }
                Recorded::Target { key, superseded, entries } => {
                    let m = usize::from(key.migration.as_bytes()[0]);
                    let seen = self.target_seen(m, superseded);
                    if let Ok((target, effects)) = Target::recover_under(self.options.rules, entries, seen) {
                        machines.push(Machine::Target(m, target));
                        pending.extend(effects.into_iter().map(|e| (m, Effect::Target(e))));
                    }
                }
            }
        }
        let daemon = &mut self.hosts[host].daemon;
        *daemon = Daemon { up: true, life: daemon.life, machines, pending, ledger, ..Daemon::default() };
        self.wake(host);
    }

    fn source_seen(&self, m: usize, superseded: bool) -> source::QemuSeen {
        match self.source_qemu(m).map(|q| self.qemus[q].frozen) {
            _ if superseded => source::QemuSeen::Superseded,
            Some(true) => source::QemuSeen::Frozen,
            Some(false) => source::QemuSeen::Running,
            None => source::QemuSeen::Dead,
        }
    }

    fn target_seen(&self, m: usize, superseded: bool) -> target::QemuSeen {
        match self.qemus.iter().find(|q| q.alive && q.of_target(m)) {
            _ if superseded => target::QemuSeen::Superseded,
            Some(q) if q.vcpus => target::QemuSeen::Running,
            Some(_) => target::QemuSeen::Paused,
            None => target::QemuSeen::Dead,
        }
    }
}

fn fired(timer: &Timer) -> Input {
    match timer.source {
        true => Input::SourceOf(timer.m, source::Event::Timer(timer.kind)),
        false => Input::TargetOf(timer.m, target::Event::Timer(timer.kind)),
    }
}

fn facts(q: usize) -> QemuFacts {
    QemuFacts {
        pid: u32::try_from(q).unwrap_or(u32::MAX),
        start_time_ticks: 1,
        boot: Nonce::from_bytes([1; 16]),
    }
}

fn declined() -> AbortReason {
    AbortReason { code: ErrorCode::VmNotRunning, detail: "no such VM runs here".to_owned() }
}
