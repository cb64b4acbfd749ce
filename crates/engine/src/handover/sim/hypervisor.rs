//! QEMU and the VM agents' channel, as measured.

use super::super::{FREEZE_GUARD_MS, source, target};
use super::world::{Item, World};
use super::{Invariant, daemon::Input};
use types::Digest;
use types::handover::StreamEvidence;

/// A QEMU process that holds, or is to hold, the VM.
#[derive(Debug, Clone)]
pub(super) struct Qemu {
    pub(super) host: usize,
    pub(super) alive: bool,
    pub(super) frozen: bool,
    /// vCPUs run, as far as QEMU is concerned.
    pub(super) vcpus: bool,
    pub(super) phase: Phase,
    /// The guest's state: how much it has executed.
    pub(super) counter: u64,
    /// Its socket to the VM agent is open.
    pub(super) link: bool,
    /// RESUME since STOP.
    pub(super) resumed: bool,
    /// Image locks are held (a target that tried to run).
    pub(super) locks: bool,
    /// It executed at least once.
    pub(super) executed: bool,
}

/// What QEMU is doing, by number of the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// An ordinary VM.
    Plain,
    /// Source, guest running.
    Active(usize),
    /// Source, guest stopped by QEMU itself.
    Device(usize),
    /// Target, `inmigrate`; whether `-S` is in force.
    Incoming(usize, bool),
    /// Target, loaded.
    Loaded(usize),
}

impl Qemu {
    pub(super) fn executes(&self) -> bool {
        self.alive && !self.frozen && self.vcpus
    }
}

/// The channel between the two VM agents of one migration.
#[derive(Debug, Clone, Default)]
pub(super) struct Channel {
    pub(super) source_agent: bool,
    pub(super) target_agent: bool,
    pub(super) suspended: bool,
    pub(super) withhold_tail: bool,
    pub(super) drop_reverse: bool,
    /// FROZEN was told to the source's agent.
    pub(super) guard_off: bool,
    /// The guest's state in the stream.
    pub(super) snapshot: u64,
}

/// What QEMU and the agents do by themselves after a while.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stir {
    /// The source's QEMU converges and stops the guest.
    Converge,
    /// The whole stream has left the source's QEMU.
    StreamOut,
    /// The target's agent has all of it.
    Arrived,
    /// The target's QEMU has loaded it.
    Load,
    /// The source's agent is told that the target's has it.
    EndSeen,
    /// No FROZEN in time.
    Guard,
    /// An agent sees that the other has ended.
    PeerGone {
        /// Which one sees it.
        at_source: bool,
    },
    /// A second after a STOP while suspended.
    StillStopped,
}

impl World<'_> {
    pub(super) fn stir(&mut self, m: usize, what: Stir) {
        match what {
            Stir::Converge => self.converge(m),
            Stir::StreamOut => self.stream_out(m),
            Stir::Arrived => self.arrived(m),
            Stir::Load => self.load(m),
            Stir::EndSeen => self.end_seen(m),
            Stir::Guard => {
                if self.migrations[m].channel.source_agent && !self.migrations[m].channel.guard_off {
                    self.note(|| format!("m{m}: the freeze guard closes QEMU's socket"));
                    self.end_source_agent(m, "freeze guard");
                }
            }
            Stir::PeerGone { at_source: true } => self.end_source_agent(m, "peer gone"),
            Stir::PeerGone { at_source: false } => self.end_target_agent(m, "peer gone"),
            Stir::StillStopped => self.check_still_stopped(m),
        }
    }

    fn source_in(&self, m: usize, phase: fn(usize) -> Phase) -> Option<usize> {
        self.qemus.iter().position(|q| q.alive && q.phase == phase(m))
    }

    /// Both agents are connected.
    pub(super) fn open_channel(&mut self, m: usize) {
        let channel = &mut self.migrations[m].channel;
        (channel.source_agent, channel.target_agent) = (true, true);
    }

    pub(super) fn start_stream(&mut self, m: usize, q: usize) {
        let ordinary =
            |q: &&mut Qemu| q.alive && matches!(q.phase, Phase::Plain | Phase::Loaded(_)) && q.vcpus;
        let Some(qemu) = self.qemus.get_mut(q).filter(ordinary) else { return };
        qemu.phase = Phase::Active(m);
        qemu.link = true;
        qemu.resumed = false;
        let delay = self.rng.range(5, 30);
        self.later(delay, Item::Stir(m, Stir::Converge));
    }

    fn converge(&mut self, m: usize) {
        let Some(q) = self.source_in(m, Phase::Active) else { return };
        if self.qemus[q].frozen {
            return;
        }
        if self.migrations[m].channel.suspended {
            // A relay that stops late lets QEMU converge on what its socket's buffers take.
            if !self.rng.per_mille(500) {
                return self.later(20, Item::Stir(m, Stir::Converge));
            }
            self.later(1_000, Item::Stir(m, Stir::StillStopped));
        }
        let qemu = &mut self.qemus[q];
        qemu.vcpus = false;
        qemu.resumed = false;
        qemu.phase = Phase::Device(m);
        self.migrations[m].channel.snapshot = qemu.counter;
        self.note(|| format!("m{m}: q{q} stops its guest"));
        self.tell_source(m, source::Event::GuestStopped);
        let delay = self.rng.range(1, 5);
        self.later(delay, Item::Stir(m, Stir::StreamOut));
    }

    fn stream_out(&mut self, m: usize) {
        let Some(q) = self.source_in(m, Phase::Device) else { return };
        if !self.qemus[q].link || !self.migrations[m].channel.source_agent {
            return;
        }
        if self.migrations[m].channel.suspended {
            return self.later(20, Item::Stir(m, Stir::StreamOut));
        }
        let delay = self.rng.range(1, 5);
        if !self.migrations[m].channel.withhold_tail {
            self.later(delay, Item::Stir(m, Stir::Arrived));
        }
        if self.plan.eager_end {
            self.later(1, Item::Stir(m, Stir::EndSeen));
        }
    }

    fn arrived(&mut self, m: usize) {
        if !self.migrations[m].channel.target_agent {
            return;
        }
        let evidence = self.evidence(m);
        self.tell_target(m, target::Event::StreamAccepted(evidence));
        let delay = self.rng.range(0, 8);
        self.later(delay, Item::Stir(m, Stir::Load));
        if !self.migrations[m].channel.drop_reverse && !self.plan.eager_end {
            let delay = self.rng.range(1, 5);
            self.later(delay, Item::Stir(m, Stir::EndSeen));
        }
    }

    fn load(&mut self, m: usize) {
        let waiting = |q: &Qemu| q.alive && matches!(q.phase, Phase::Incoming(n, _) if n == m);
        let Some(q) = self.qemus.iter().position(waiting) else { return };
        let paused = self.qemus[q].phase == Phase::Incoming(m, true);
        let snapshot = self.migrations[m].channel.snapshot;
        let qemu = &mut self.qemus[q];
        qemu.phase = Phase::Loaded(m);
        qemu.counter = snapshot;
        qemu.vcpus = !paused;
        qemu.locks = !paused;
        self.note(|| format!("m{m}: q{q} has loaded state {snapshot}, paused: {paused}"));
    }

    fn end_seen(&mut self, m: usize) {
        if !self.migrations[m].channel.source_agent || self.migrations[m].end_seen {
            return;
        }
        self.migrations[m].end_seen = true;
        self.later(FREEZE_GUARD_MS, Item::Stir(m, Stir::Guard));
        let evidence = self.evidence(m);
        self.tell_source(m, source::Event::EndOfStream(evidence));
    }

    fn evidence(&self, m: usize) -> StreamEvidence {
        let tag = u8::try_from(m).unwrap_or(u8::MAX);
        StreamEvidence { stream_bytes: self.migrations[m].channel.snapshot, digest: Digest([tag; 32]) }
    }

    /// The source's VM agent ends: QEMU's socket closes, and the other agent notices.
    pub(super) fn end_source_agent(&mut self, m: usize, why: &'static str) {
        if !std::mem::take(&mut self.migrations[m].channel.source_agent) {
            return;
        }
        self.note(|| format!("m{m}: the source's agent ends: {why}"));
        let closed = self.qemus.iter().position(|q| {
            q.alive && q.link && matches!(q.phase, Phase::Active(n) | Phase::Device(n) if n == m)
        });
        if let Some(q) = closed {
            self.qemus[q].link = false;
            self.settle_link(q);
        }
        self.tell_source(m, source::Event::ChannelLost { detail: why.to_owned() });
        let delay = self.rng.range(1, 40);
        self.later(delay, Item::Stir(m, Stir::PeerGone { at_source: false }));
    }

    /// The target's VM agent ends: a QEMU that has not loaded yet exits.
    pub(super) fn end_target_agent(&mut self, m: usize, why: &'static str) {
        if !std::mem::take(&mut self.migrations[m].channel.target_agent) {
            return;
        }
        self.note(|| format!("m{m}: the target's agent ends: {why}"));
        let waiting = |q: &Qemu| q.alive && matches!(q.phase, Phase::Incoming(n, _) if n == m);
        if let Some(q) = self.qemus.iter().position(waiting) {
            self.qemus[q].alive = false;
            self.note(|| format!("m{m}: q{q} exits, its stream broke"));
            self.tell_target(m, target::Event::QemuDied);
        }
        self.tell_target(m, target::Event::ChannelLost { detail: why.to_owned() });
        let delay = self.rng.range(1, 40);
        self.later(delay, Item::Stir(m, Stir::PeerGone { at_source: true }));
    }

    /// What a source QEMU does by itself when its link is closed: measured, it resumes, unless frozen.
    fn settle_link(&mut self, q: usize) {
        let qemu = &mut self.qemus[q];
        if !qemu.alive || qemu.frozen || qemu.link {
            return;
        }
        match qemu.phase {
            Phase::Active(m) => {
                qemu.phase = Phase::Plain;
                self.tell_source(m, source::Event::MigrationFailed { detail: String::new() });
            }
            Phase::Device(m) => {
                qemu.phase = Phase::Plain;
                self.resume(q, m);
                self.tell_source(m, source::Event::MigrationFailed { detail: String::new() });
            }
            _ => {}
        }
    }

    fn resume(&mut self, q: usize, m: usize) {
        let blocked = self.qemus.iter().any(|o| o.alive && o.locks && o.phase == Phase::Loaded(m));
        let qemu = &mut self.qemus[q];
        if qemu.vcpus {
            return;
        }
        if blocked {
            // Measured: a source that wants its images back while the target holds them aborts.
            qemu.alive = false;
            self.note(|| format!("m{m}: q{q} aborts, its images are locked"));
            return self.tell_source(m, source::Event::QemuDied);
        }
        qemu.vcpus = true;
        qemu.resumed = true;
        self.note(|| format!("m{m}: q{q} resumes its guest"));
        self.tell_source(m, source::Event::GuestResumed);
    }

    pub(super) fn thaw(&mut self, q: usize) {
        self.qemus[q].frozen = false;
        self.settle_link(q);
    }

    /// `migrate_cancel`, or `yank`, or `cont`. A frozen process answers nothing.
    pub(super) fn cancel(&mut self, q: usize, m: usize) -> Option<source::Event> {
        let qemu = &mut self.qemus[q];
        if !qemu.alive || qemu.frozen {
            return None;
        }
        if matches!(qemu.phase, Phase::Active(n) | Phase::Device(n) if n == m) {
            qemu.phase = Phase::Plain;
            qemu.link = false;
        }
        self.resume(q, m);
        self.qemus[q].alive.then_some(source::Event::Cancelled)
    }

    /// Whether the source's agent can prove that nothing moved.
    pub(super) fn proves(&self, q: usize, m: usize) -> bool {
        let qemu = &self.qemus[q];
        let channel = &self.migrations[m].channel;
        qemu.alive && qemu.link && channel.source_agent && !qemu.resumed && qemu.phase == Phase::Device(m)
    }

    pub(super) fn query(&self, m: usize) -> target::QemuStatus {
        use target::{QemuStatus, RunState};
        match self.qemus.iter().find(|q| q.alive && q.of_target(m)) {
            Some(q) if q.vcpus => QemuStatus { completed: true, run: RunState::Running },
            Some(q) if q.phase == Phase::Loaded(m) => QemuStatus { completed: true, run: RunState::Paused },
            _ => QemuStatus { completed: false, run: RunState::InMigrate },
        }
    }

    /// `cont` on the target: while `inmigrate` it silently cancels `-S`.
    pub(super) fn cont(&mut self, m: usize) -> target::Event {
        let refuses = self.migrations[m].refuses_cont;
        let Some(q) = self.qemus.iter().position(|q| q.alive && q.of_target(m)) else {
            return target::Event::ContRefused { still_paused: false };
        };
        let qemu = &mut self.qemus[q];
        if refuses && !qemu.vcpus {
            qemu.locks = true;
            return target::Event::ContRefused { still_paused: true };
        }
        match qemu.phase {
            Phase::Incoming(..) => qemu.phase = Phase::Incoming(m, false),
            _ => (qemu.vcpus, qemu.locks) = (true, true),
        }
        target::Event::ContDone
    }

    pub(super) fn prepare_qemu(&mut self, host: usize, m: usize, paused: bool) -> usize {
        self.qemus.push(Qemu {
            host,
            alive: true,
            frozen: false,
            vcpus: false,
            phase: Phase::Incoming(m, paused),
            counter: 0,
            link: true,
            resumed: false,
            locks: false,
            executed: false,
        });
        self.qemus.len() - 1
    }

    pub(super) fn kill_target_qemus(&mut self, m: usize) {
        for qemu in self.qemus.iter_mut().filter(|q| q.of_target(m)) {
            qemu.alive = false;
        }
    }

    fn check_still_stopped(&mut self, m: usize) {
        let held = self.migrations[m].channel.suspended && self.migrations[m].channel.source_agent;
        if held
            && let Some(q) = self.source_in(m, Phase::Device)
            && !self.qemus[q].frozen
        {
            let detail = format!("m{m}: suspended, and the guest in q{q} stopped for a second");
            self.violate(Invariant::I8SuspendedRuns, detail);
        }
    }

    pub(super) fn tell_source(&mut self, m: usize, event: source::Event) {
        let host = self.migrations[m].from;
        self.give(host, Input::SourceOf(m, event));
    }

    pub(super) fn tell_target(&mut self, m: usize, event: target::Event) {
        let host = self.migrations[m].to;
        self.give(host, Input::TargetOf(m, event));
    }
}

impl Qemu {
    /// Whether it was started as the target of a migration, and is not a source by now.
    pub(super) fn of_target(&self, m: usize) -> bool {
        matches!(self.phase, Phase::Incoming(n, _) | Phase::Loaded(n) if n == m)
    }
}
