//! QEMU, the VM agents' channel and the faults, as `sim/hypervisor.rs` has them; here everything that may happen is
//! listed, and nothing takes time.

use super::super::Rule;
use super::super::sim::Invariant;
use super::state::{Action, Ask, HOSTS, Notice, Phase, Qemu, Run, Stir, flag, lane_number, mark, qemu};
use super::table::wrote;
use types::Side;

impl Run<'_> {
    // ---- what QEMU and agents do by themselves ----

    pub(super) fn list_stirs(&self, lane: usize, actions: &mut Vec<Action>) {
        let may = [
            Stir::Converge,
            Stir::StreamOut,
            Stir::Arrived,
            Stir::Rejected,
            Stir::Load,
            Stir::EndSeen,
            Stir::Guard,
            Stir::CutAtSource,
            Stir::CutAtTarget,
        ];
        let number = lane_number(lane);
        actions.extend(may.into_iter().filter(|s| self.may_stir(lane, *s)).map(|s| Action::Stir(number, s)));
    }

    pub(super) fn may_stir(&self, lane: usize, stir: Stir) -> bool {
        let l = &self.state.lanes[lane];
        let (source_agent, target_agent) = (l.has(flag::SOURCE_AGENT), l.has(flag::TARGET_AGENT));
        match stir {
            Stir::Converge => self.source_in(lane, Phase::Active).is_some_and(|q| !self.qemu_frozen(q)),
            // The link must be open: once sent, the bytes are on their way whatever happens to it.
            Stir::StreamOut => {
                let linked = self
                    .source_in(lane, Phase::Device)
                    .is_some_and(|q| self.state.qemus[q].has(qemu::LINK) && !self.qemu_frozen(q));
                linked && source_agent && !l.has(flag::SUSPENDED | flag::SENT)
            }
            Stir::Arrived => l.has(flag::SENT) && target_agent && !l.has(flag::ARRIVED),
            Stir::Rejected => l.has(flag::SENT) && target_agent && !l.has(flag::ARRIVED) && self.config.cuts,
            Stir::Load => l.has(flag::ARRIVED) && self.waiting(lane).is_some(),
            Stir::EndSeen => l.has(flag::SENT) && source_agent && !l.has(flag::END_SEEN),
            Stir::Guard => {
                self.config.cuts && source_agent && l.has(flag::END_SEEN) && !l.has(flag::GUARD_OFF)
            }
            Stir::CutAtSource => source_agent && (self.config.cuts || !target_agent),
            Stir::CutAtTarget => target_agent && (self.config.cuts || !source_agent),
        }
    }

    pub(super) fn stir(&mut self, lane: usize, stir: Stir) {
        match stir {
            Stir::Converge => self.converge(lane),
            Stir::StreamOut => self.state.lanes[lane].set(flag::SENT),
            Stir::Arrived => {
                self.state.lanes[lane].set(flag::ARRIVED);
                self.tell(lane, Side::Target, Notice::StreamAccepted);
            }
            // Refused bytes never reach QEMU, and nothing follows them.
            Stir::Rejected => {
                self.state.lanes[lane].clear(flag::SENT);
                self.tell(lane, Side::Target, Notice::StreamRejected);
            }
            Stir::Load => self.load(lane),
            Stir::EndSeen => {
                self.state.lanes[lane].set(flag::END_SEEN);
                self.tell(lane, Side::Source, Notice::EndOfStream);
            }
            Stir::Guard | Stir::CutAtSource => self.end_source_agent(lane),
            Stir::CutAtTarget => self.end_target_agent(lane),
        }
    }

    fn converge(&mut self, lane: usize) {
        let Some(q) = self.source_in(lane, Phase::Active) else { return };
        let qemu = &mut self.state.qemus[q];
        qemu.clear(qemu::VCPUS | qemu::RESUMED);
        qemu.phase = Phase::Device;
        let newest = qemu.has(qemu::NEWEST);
        let l = &mut self.state.lanes[lane];
        if newest {
            l.set(flag::FRESH)
        } else {
            l.clear(flag::FRESH)
        }
        self.tell(lane, Side::Source, Notice::GuestStopped);
    }

    fn load(&mut self, lane: usize) {
        let Some(q) = self.waiting(lane) else { return };
        let fresh = self.state.lanes[lane].has(flag::FRESH);
        let qemu = &mut self.state.qemus[q];
        let paused = qemu.phase == Phase::Incoming;
        qemu.phase = Phase::Loaded;
        if fresh {
            qemu.set(qemu::NEWEST);
        }
        if !paused {
            qemu.set(qemu::VCPUS | qemu::LOCKS);
        }
    }

    /// The QEMU that waits for the stream.
    fn waiting(&self, lane: usize) -> Option<usize> {
        let waits = |q: &Qemu| matches!(q.phase, Phase::Incoming | Phase::IncomingRuns);
        self.target_qemu(lane).filter(|q| waits(&self.state.qemus[*q]))
    }

    pub(super) fn target_qemu(&self, lane: usize) -> Option<usize> {
        self.state.qemus.iter().position(|q| q.has(qemu::ALIVE) && q.of_target(lane))
    }

    /// The QEMU that the source's journal names, if it lives.
    pub(super) fn source_qemu(&self, lane: usize) -> Option<usize> {
        let q = usize::from(self.state.lanes[lane].moves);
        self.state.qemus.get(q).is_some_and(|q| q.has(qemu::ALIVE)).then_some(q)
    }

    fn source_in(&self, lane: usize, phase: Phase) -> Option<usize> {
        self.state
            .qemus
            .iter()
            .position(|q| q.has(qemu::ALIVE) && q.phase == phase && usize::from(q.lane) == lane)
    }

    fn qemu_frozen(&self, q: usize) -> bool {
        self.state.qemus[q].has(qemu::FROZEN)
    }

    /// Puts a notice before a daemon; a dead one hears nothing, and no machine has no ears.
    pub(super) fn tell(&mut self, lane: usize, side: Side, notice: Notice) {
        let up = self.state.up(self.state.lanes[lane].host(side));
        let seat = self.state.lanes[lane].seat_mut(side);
        if up && seat.machine != 0 {
            seat.notices |= notice.bit();
        }
    }

    /// The source's VM agent ends: QEMU's socket closes.
    pub(super) fn end_source_agent(&mut self, lane: usize) {
        let l = &mut self.state.lanes[lane];
        if !l.has(flag::SOURCE_AGENT) {
            return;
        }
        l.clear(flag::SOURCE_AGENT | flag::SUSPENDED | flag::GUARD_OFF);
        let closed =
            self.state.qemus.iter().position(|q| q.has(qemu::ALIVE | qemu::LINK) && q.of_source(lane));
        if let Some(q) = closed {
            self.state.qemus[q].clear(qemu::LINK);
            self.settle_link(q);
        }
        self.tell(lane, Side::Source, Notice::ChannelLost);
        self.forget_channel(lane);
    }

    /// The target's VM agent ends: a QEMU that has not loaded yet exits.
    pub(super) fn end_target_agent(&mut self, lane: usize) {
        let l = &mut self.state.lanes[lane];
        if !l.has(flag::TARGET_AGENT) {
            return;
        }
        l.clear(flag::TARGET_AGENT);
        if let Some(q) = self.waiting(lane) {
            self.state.qemus[q].die();
            self.tell(lane, Side::Target, Notice::QemuDied);
        }
        self.tell(lane, Side::Target, Notice::ChannelLost);
        self.forget_channel(lane);
    }

    /// With both agents gone nothing asks what the channel held.
    fn forget_channel(&mut self, lane: usize) {
        let l = &mut self.state.lanes[lane];
        if !l.has(flag::SOURCE_AGENT) && !l.has(flag::TARGET_AGENT) {
            l.clear(flag::SENT | flag::END_SEEN);
        }
    }

    /// What a source QEMU does by itself when its link is closed: measured, it resumes, unless frozen.
    fn settle_link(&mut self, q: usize) {
        let qemu = self.state.qemus[q];
        if !qemu.has(qemu::ALIVE) || qemu.has(qemu::FROZEN) || qemu.has(qemu::LINK) {
            return;
        }
        let lane = usize::from(qemu.lane);
        match qemu.phase {
            Phase::Active => {
                self.state.qemus[q].phase = Phase::Plain;
                self.tell(lane, Side::Source, Notice::MigrationFailed);
            }
            Phase::Device => {
                self.state.qemus[q].phase = Phase::Plain;
                self.resume(q, lane);
                self.tell(lane, Side::Source, Notice::MigrationFailed);
            }
            _ => {}
        }
    }

    fn resume(&mut self, q: usize, lane: usize) {
        let blocks = |o: &Qemu| {
            o.has(qemu::ALIVE | qemu::LOCKS) && o.phase == Phase::Loaded && usize::from(o.lane) == lane
        };
        let blocked = self.state.qemus.iter().any(blocks);
        let qemu = &mut self.state.qemus[q];
        if qemu.has(qemu::VCPUS) {
            return;
        }
        if blocked {
            // Measured: a source that wants its images back while the target holds them aborts.
            qemu.die();
            return self.tell(lane, Side::Source, Notice::QemuDied);
        }
        qemu.set(qemu::VCPUS | qemu::RESUMED);
        self.tell(lane, Side::Source, Notice::GuestResumed);
    }

    pub(super) fn thaw(&mut self, q: usize) {
        self.state.qemus[q].clear(qemu::FROZEN);
        self.settle_link(q);
    }

    /// `migrate_cancel`, or `yank`, or `cont`; true once no migration is left. A frozen process answers nothing.
    pub(super) fn cancel(&mut self, q: usize, lane: usize) -> bool {
        let qemu = &mut self.state.qemus[q];
        if !qemu.has(qemu::ALIVE) || qemu.has(qemu::FROZEN) {
            return false;
        }
        if qemu.of_source(lane) {
            qemu.phase = Phase::Plain;
            qemu.clear(qemu::LINK);
        }
        self.resume(q, lane);
        self.state.qemus[q].has(qemu::ALIVE)
    }

    /// Whether the source's agent can prove that nothing moved.
    pub(super) fn proves(&self, q: usize, lane: usize) -> bool {
        let qemu = &self.state.qemus[q];
        let linked = qemu.has(qemu::ALIVE | qemu::LINK) && !qemu.has(qemu::RESUMED);
        linked
            && self.state.lanes[lane].has(flag::SOURCE_AGENT)
            && qemu.phase == Phase::Device
            && usize::from(qemu.lane) == lane
    }

    // ---- guests ----

    /// Every copy whose vCPUs run executes: that is where twice and back in time would happen.
    pub(super) fn execute_guests(&mut self) {
        let mut running = None;
        for q in 0..self.state.qemus.len() {
            if !self.state.qemus[q].executes() {
                continue;
            }
            if self.state.is(mark::DISCARDED) {
                return self
                    .violate(Invariant::I1AtMostOne, "a copy executes, and the VM restarts from its disk");
            }
            if running.replace(q).is_some() {
                return self.violate(Invariant::I1AtMostOne, "two copies execute");
            }
            if !self.state.qemus[q].has(qemu::NEWEST) {
                return self.violate(
                    Invariant::I2NoRollback,
                    "a copy executes from a state older than what was executed",
                );
            }
        }
        if let Some(q) = running {
            self.executed(q);
        }
    }

    fn executed(&mut self, q: usize) {
        self.check_target_runs(q);
        self.state.qemus[q].set(qemu::EXECUTED);
        for (other, qemu) in self.state.qemus.iter_mut().enumerate() {
            if other != q {
                qemu.clear(qemu::NEWEST);
            }
        }
        for lane in &mut self.state.lanes {
            lane.clear(flag::FRESH);
        }
    }

    /// A target that runs was told to, by a registry that had decided it, and has not renounced.
    fn check_target_runs(&mut self, q: usize) {
        let qemu = self.state.qemus[q];
        if qemu.has(qemu::EXECUTED) || qemu.phase != Phase::Loaded || !self.config.check_journal {
            return;
        }
        let l = self.state.lanes[usize::from(qemu.lane)];
        let facts = self.tables.facts(l.target.journal, false);
        if facts & wrote::RENOUNCED != 0 {
            self.violate(Invariant::HRenouncedNeverRuns, "a target runs what it has renounced");
        }
        if facts & wrote::RUN == 0 || !l.has(flag::COMMITTED) {
            self.violate(Invariant::I6JournalFirst, "a target runs without a commit");
        }
    }

    /// I8: with the relay held, no guest stays stopped once its daemon has taken note of everything.
    pub(super) fn check_suspended(&mut self) {
        for lane in 0..self.state.lanes.len() {
            let l = &self.state.lanes[lane];
            let noted = l.source.machine != 0 && l.source.idle() && l.source.notices == 0;
            if l.has(flag::SUSPENDED) && noted {
                let stopped = self.source_in(lane, Phase::Device).is_some_and(|q| !self.qemu_frozen(q));
                if stopped {
                    self.violate(Invariant::I8SuspendedRuns, "suspended, and the guest is held stopped");
                }
            }
        }
    }

    // ---- faults ----

    pub(super) fn list_faults(&self, actions: &mut Vec<Action>) {
        let kinds = self.config.kinds;
        for host in 0..HOSTS {
            let used = self.state.lanes.iter().any(|l| l.attempt != 0 && (l.from == host || l.to == host));
            if used && self.state.up(host) && kinds.daemons {
                actions.push(Action::CrashDaemon(host));
            }
            if used && self.state.lost == 0 && kinds.hosts {
                actions.push(Action::LoseHost(host));
            }
        }
        if kinds.qemus {
            let alive = (0u8..).zip(self.state.qemus.iter()).filter(|(_, q)| q.has(qemu::ALIVE));
            actions.extend(alive.map(|(q, _)| Action::KillQemu(q)));
        }
        if kinds.managers && !self.state.is(mark::NO_MANAGER) {
            actions.push(Action::LoseManagers);
        }
        if kinds.restores && !self.state.is(mark::NO_MANAGER) {
            if self.state.backup.0 == 0 {
                actions.push(Action::Backup);
            } else if self.restore_changes() {
                actions.push(Action::Restore);
            }
        }
    }

    pub(super) fn fault(&mut self, fault: Action) {
        match fault {
            Action::CrashDaemon(host) => {
                self.stop_daemon(host);
                self.state.down |= 1 << host;
            }
            Action::LoseHost(host) => self.lose_host(host),
            Action::KillQemu(q) => self.kill_qemu(usize::from(q)),
            Action::LoseManagers => {
                self.state.marks |= mark::NO_MANAGER;
                self.state.held = Default::default();
                self.excuse_last_copy();
            }
            Action::Restore => self.restore(),
            _ => {}
        }
    }

    /// The daemon and its agents die; its QEMUs and its journal stay.
    fn stop_daemon(&mut self, host: u8) {
        for lane in 0..self.state.lanes.len() {
            let l = &mut self.state.lanes[lane];
            if l.attempt == 0 {
                continue;
            }
            let (source, target) = (l.from == host, l.to == host);
            if source {
                l.source.crash();
            }
            if target {
                l.target.crash();
                l.clear(flag::CONSUMED);
            }
            if source {
                self.end_source_agent(lane);
            }
            if target {
                self.end_target_agent(lane);
            }
        }
    }

    fn lose_host(&mut self, host: u8) {
        for q in 0..self.state.qemus.len() {
            if self.state.qemus[q].has(qemu::ALIVE) && self.state.qemus[q].host == host {
                self.before_loss(q, true);
                self.state.qemus[q].die();
            }
        }
        self.stop_daemon(host);
        self.state.lost |= 1 << host;
        self.state.down &= !(1 << host);
    }

    pub(super) fn kill_qemu(&mut self, q: usize) {
        self.before_loss(q, false);
        let qemu = self.state.qemus[q];
        self.state.qemus[q].die();
        let lane = usize::from(qemu.lane);
        if qemu.of_source(lane) {
            self.tell(lane, Side::Source, Notice::QemuDied);
            self.end_source_agent(lane);
        } else if qemu.of_target(lane) {
            self.tell(lane, Side::Target, Notice::QemuDied);
            self.end_target_agent(lane);
        } else {
            // An ordinary VM: the machine that named it, if there is one, sees its pid descriptor.
            for lane in 0..self.state.lanes.len() {
                if usize::from(self.state.lanes[lane].moves) == q && self.state.lanes[lane].attempt != 0 {
                    self.tell(lane, Side::Source, Notice::QemuDied);
                }
            }
        }
    }

    /// A copy is about to be lost. Was it the last valid one, as far as the promise goes?
    fn before_loss(&mut self, q: usize, with_host: bool) {
        let qemu = self.state.qemus[q];
        let fragile = self.state.is(mark::NO_MANAGER | mark::RESTORED)
            || self.state.lanes.iter().any(|l| l.has(flag::REFUSES));
        let newest = self.state.granted().saturating_sub(1);
        let l = self.state.lanes[newest];
        let target = self.tables.facts(l.target.journal, false);
        let lost = match qemu.phase {
            Phase::Device if usize::from(qemu.lane) == newest => {
                let source = self.tables.facts(l.source.journal, true);
                let copy = self.target_qemu(newest).map(|c| self.state.qemus[c]);
                let copy = copy.filter(|c| c.host != qemu.host);
                let runs = copy.is_some_and(|c| c.has(qemu::EXECUTED));
                let held = copy.is_some() && target & wrote::VOTED != 0 && target & wrote::RENOUNCED == 0;
                let decided = self.both_votes_on_record(newest) && source & wrote::ASKED == 0;
                !(runs || held && decided && !fragile)
            }
            Phase::Incoming | Phase::IncomingRuns | Phase::Loaded if usize::from(qemu.lane) == newest => {
                let survives = self.state.qemus.iter().any(|c| {
                    let whole =
                        matches!(c.phase, Phase::Plain | Phase::Active | Phase::Device | Phase::Loaded);
                    c.has(qemu::ALIVE) && c.host != qemu.host && whole
                });
                target & wrote::RUN != 0 || !survives || with_host && fragile
            }
            // An ordinary VM, or one whose memory still moves: it crashed, as VMs do.
            _ => qemu.has(qemu::VCPUS) || qemu.phase == Phase::Device,
        };
        if lost {
            self.state.marks |= mark::VM_LOST;
        }
    }

    /// A fault that may make the one copy that is left unusable strikes.
    pub(super) fn excuse_last_copy(&mut self) {
        let runs = self.state.qemus.iter().any(Qemu::executes);
        let copies = self.state.qemus.iter().filter(|q| q.has(qemu::ALIVE)).count();
        if !runs && copies < 2 {
            self.state.marks |= mark::VM_LOST;
        }
    }

    /// The process that the source's facts name, if it may be killed: `None` without one, false if it is not frozen.
    pub(super) fn kill_frozen(&mut self, lane: usize) -> Option<bool> {
        let q = usize::from(self.state.lanes[lane].moves);
        let reconciler = !self.config.rules.has(Rule::AdoptBeforeStopping);
        let qemu = self.state.qemus.get_mut(q)?;
        if qemu.has(qemu::ALIVE) && !qemu.has(qemu::FROZEN) && !reconciler {
            return Some(false);
        }
        qemu.die();
        Some(true)
    }

    pub(super) fn fence_of(&self, lane: usize) -> Option<Ask> {
        let l = &self.state.lanes[lane];
        let gone = |host: u8| self.state.lost & 1 << host != 0;
        if gone(l.to) {
            Some(Ask::TargetFenced)
        } else if gone(l.from) {
            Some(Ask::SourceFenced)
        } else {
            None
        }
    }
}
