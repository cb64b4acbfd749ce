//! The world of one run: time, network, faults, operator.

use super::super::journal::{Entry, NonceLedger};
use super::super::{Attempt, RESEND_MS, Refusal, decider, source, target};
use super::daemon::{Daemon, Input};
use super::hypervisor::{Channel, Phase, Qemu, Stir};
use super::manager::Manager;
use super::plan::{Fault, MANAGER, Moment, Plan, Rng};
use super::{Invariant, Options, Report, Violation, check};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use types::handover::{RenounceRequest, Statement};
use types::{HostName, VmId};

/// No more steps than this: a livelock must end a run too.
const STEPS_LIMIT: u64 = 20_000;
/// Faults that did not strike by then never do.
const CHAOS_LIMIT_MS: u64 = 15_000;
/// The promise: so long after the last fault exactly one copy runs.
pub(super) const RECOVERY_MS: u64 = 10_000;

/// What the queue holds.
#[derive(Debug)]
pub(super) enum Item {
    Deliver(usize, usize, Box<Message>),
    Daemon { host: usize, life: u64 },
    Manager { life: u64 },
    Timer { host: usize, life: u64, slot: usize, generation: u64 },
    Stir(usize, Stir),
    Restart(usize),
    Sweep,
    Migrate,
    Resume(usize),
    Calm,
    Fence,
    End,
}

/// A message between nodes.
#[derive(Debug, Clone)]
pub(super) enum Message {
    Prepare(usize),
    Start(usize),
    Ready(usize),
    SourceOrder(usize, source::Order),
    TargetOrder(usize, target::Order),
    Renounced(super::super::RenunciationProof),
    Asked(usize, RenounceRequest),
    Status(usize, super::super::TargetStatus),
    Statement(usize, types::Side, Statement),
}

/// What is known of one migration outside the machines.
#[derive(Debug)]
pub(super) struct Migration {
    pub(super) attempt: Rc<Attempt>,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) channel: Channel,
    pub(super) end_seen: bool,
    pub(super) refuses_cont: bool,
    pub(super) fails_freeze: bool,
    /// Facts in the source's and the target's journal, for the invariants.
    pub(super) written: [u32; 2],
    /// The registry has held the commit.
    pub(super) committed: bool,
    pub(super) prepared_times: u32,
}

#[derive(Debug, Default)]
pub(super) struct Host {
    pub(super) lost: bool,
    crash_after: Option<(Moment, u64)>,
    pub(super) daemon: Daemon,
    pub(super) journal: Vec<(usize, Entry)>,
}

pub(super) struct World<'a> {
    pub(super) plan: &'a Plan,
    pub(super) options: Options,
    pub(super) rng: Rng,
    pub(super) now_ms: u64,
    pub(super) steps: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    items: Vec<Option<Item>>,
    free: Vec<usize>,
    pub(super) vm: VmId,
    pub(super) names: [HostName; 2],
    pub(super) hosts: [Host; 2],
    pub(super) manager: Manager,
    pub(super) qemus: Vec<Qemu>,
    pub(super) migrations: Vec<Migration>,
    cut: [[u32; 3]; 3],
    next_strike: usize,
    /// Every strike of the plan has struck.
    struck: bool,
    /// The faults are over, the network is good.
    pub(super) calm: bool,
    /// Faults that last are over then.
    calm_from_ms: u64,
    /// The newest state that was ever executed.
    pub(super) latest: u64,
    /// Every valid copy was lost.
    pub(super) lost: bool,
    /// The registry gave the VM to its disk: no copy of it may run any more.
    pub(super) discarded: bool,
    pub(super) violation: Option<Violation>,
    log: Vec<String>,
}

impl<'a> World<'a> {
    pub(super) fn new(plan: &'a Plan, options: Options) -> Self {
        let names = ["a", "b"].map(|n| n.parse().expect("a name of one letter follows the rule"));
        let mut world = Self {
            plan,
            options,
            rng: Rng::new(plan.seed ^ 0xA5A5_5A5A),
            now_ms: 0,
            steps: 0,
            order: 0,
            queue: BinaryHeap::new(),
            items: Vec::new(),
            free: Vec::new(),
            vm: VmId::from_bytes([9; 16]),
            manager: Manager::new(&names),
            names,
            hosts: [Host::default(), Host::default()],
            qemus: Vec::new(),
            migrations: Vec::new(),
            cut: [[0; 3]; 3],
            next_strike: 0,
            struck: false,
            calm: false,
            calm_from_ms: 0,
            latest: 0,
            lost: false,
            discarded: false,
            violation: None,
            log: Vec::new(),
        };
        for host in &mut world.hosts {
            host.daemon.up = true;
            host.daemon.ledger = NonceLedger::default();
        }
        let first = world.prepare_qemu(0, usize::MAX, false);
        world.qemus[first].phase = Phase::Plain;
        world.qemus[first].vcpus = true;
        world.later(1, Item::Migrate);
        world.later(RESEND_MS, Item::Sweep);
        world
    }

    pub(super) fn run(mut self) -> Report {
        while self.violation.is_none() && self.steps < STEPS_LIMIT {
            self.strike();
            if !self.step() {
                break;
            }
        }
        if self.violation.is_none() && self.steps >= STEPS_LIMIT {
            self.violate(Invariant::L2Ends, format!("still busy after {STEPS_LIMIT} steps"));
        }
        let ended = |f: fn(&decider::RowState) -> bool| {
            u32::try_from(self.manager.rows.iter().filter(|r| f(&r.row.state)).count()).unwrap_or(u32::MAX)
        };
        Report {
            completed: ended(|s| matches!(s, decider::RowState::Completed { .. })),
            kept: ended(|s| matches!(s, decider::RowState::Voided(_))),
            violation: self.violation,
            steps: self.steps,
            lost: self.lost,
            log: self.log,
        }
    }

    /// Takes the next item; false at the end.
    fn step(&mut self) -> bool {
        let Some(Reverse((at, _, slot))) = self.queue.pop() else { return false };
        let item = self.items[slot].take();
        self.free.push(slot);
        self.now_ms = at;
        self.steps += 1;
        let goes_on = match item {
            None => true,
            Some(Item::End) => {
                self.check_end();
                false
            }
            Some(item) => {
                self.take(item);
                true
            }
        };
        self.execute_guests();
        goes_on
    }

    fn take(&mut self, item: Item) {
        match item {
            Item::Deliver(from, to, message) => self.deliver(from, to, *message),
            Item::Daemon { host, life } => self.daemon_step(host, life),
            Item::Manager { life } => self.manager_step(life),
            Item::Timer { host, life, slot, generation } => self.timer_fires(host, life, slot, generation),
            Item::Stir(m, what) => self.stir(m, what),
            Item::Restart(MANAGER) => self.restart_manager(),
            Item::Restart(host) => self.restart_daemon(host),
            Item::Sweep => self.sweep(),
            Item::Migrate => self.migrate(),
            Item::Resume(m) => self.operator(m, source::Order::Resume),
            Item::Calm => self.calm_down(),
            Item::Fence => self.fence(),
            Item::End => {}
        }
    }

    pub(super) fn later(&mut self, delay_ms: u64, item: Item) {
        self.order += 1;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.items[slot] = Some(item);
                slot
            }
            None => {
                self.items.push(Some(item));
                self.items.len() - 1
            }
        };
        self.queue.push(Reverse((self.now_ms + delay_ms, self.order, slot)));
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.options.log {
            let line = format!("{:>6} ms {:>5}  {}", self.now_ms, self.steps, abridged(&text()));
            self.log.push(line);
        }
    }

    pub(super) fn violate(&mut self, invariant: Invariant, detail: String) {
        let (step, at_ms) = (self.steps, self.now_ms);
        self.violation.get_or_insert(Violation { invariant, detail, step, at_ms });
    }

    /// Sends with the plan's bad luck until the faults are over.
    pub(super) fn send(&mut self, from: usize, to: usize, message: Message) {
        if self.cut[from][to] > 0 || self.calm_cut(from, to) {
            return self.note(|| format!("{} -> {}: cut: {message:?}", node(from), node(to)));
        }
        if !self.calm {
            if self.rng.per_mille(self.plan.loss) {
                return self.note(|| format!("{} -> {}: lost: {message:?}", node(from), node(to)));
            }
            if self.rng.per_mille(self.plan.duplication) {
                let delay = self.delay();
                self.later(delay, Item::Deliver(from, to, Box::new(message.clone())));
            }
        }
        let delay = self.delay();
        self.later(delay, Item::Deliver(from, to, Box::new(message)));
    }

    fn delay(&mut self) -> u64 {
        if !self.calm && self.rng.per_mille(self.plan.delay) {
            return self.rng.range(20, 4_000);
        }
        self.rng.range(1, 6)
    }

    fn calm_cut(&self, from: usize, to: usize) -> bool {
        let gone = |n: usize| if n == MANAGER { self.manager.gone } else { self.hosts[n].lost };
        gone(from) || gone(to)
    }

    fn deliver(&mut self, from: usize, to: usize, message: Message) {
        self.note(|| format!("{} -> {}: {message:?}", node(from), node(to)));
        if to == MANAGER {
            return self.manager_hears(message);
        }
        let input = match message {
            Message::Prepare(m) => Input::Prepare(m),
            Message::Start(m) => Input::Start(m),
            Message::SourceOrder(m, order) => {
                let key = self.migrations[m].attempt.key;
                Input::Source(m, source::Event::Order { key, order })
            }
            Message::TargetOrder(m, order) => {
                let key = self.migrations[m].attempt.key;
                Input::Target(m, target::Event::Order { key, order })
            }
            Message::Renounced(proof) => {
                let m = usize::from(proof.renunciation.key.migration.as_bytes()[0]);
                Input::Source(m, source::Event::Renounced(proof))
            }
            Message::Asked(m, request) => Input::Target(m, target::Event::Asked(request)),
            Message::Status(m, status) => {
                let key = self.migrations[m].attempt.key;
                Input::Source(m, source::Event::TargetStatus { key, status })
            }
            Message::Ready(_) | Message::Statement(..) => return,
        };
        self.give(to, input);
    }

    /// Every copy whose vCPUs run executes a little: that is where twice and back in time would happen.
    fn execute_guests(&mut self) {
        let mut running = None;
        for q in 0..self.qemus.len() {
            if !self.qemus[q].executes() {
                continue;
            }
            if self.discarded {
                let detail = format!("q{q} executes, and the VM restarts from its disk");
                return self.violate(Invariant::I1AtMostOne, detail);
            }
            if let Some(other) = running.replace(q) {
                let detail = format!("q{other} and q{q} both execute");
                return self.violate(Invariant::I1AtMostOne, detail);
            }
            if self.qemus[q].counter < self.latest {
                let detail =
                    format!("q{q} runs from {} and {} was executed", self.qemus[q].counter, self.latest);
                return self.violate(Invariant::I2NoRollback, detail);
            }
            let qemu = &mut self.qemus[q];
            qemu.counter += 1;
            qemu.executed = true;
            self.latest = qemu.counter;
        }
    }

    fn check_end(&mut self) {
        // Two daemons, or one and the manager, must be able to talk.
        let nobody = self.manager.gone && self.hosts.iter().any(|h| h.lost);
        if self.lost || nobody {
            return;
        }
        let running = self.qemus.iter().filter(|q| q.executes()).count();
        if running != 1 {
            let detail = format!("{running} copies run {RECOVERY_MS} ms after the last fault");
            return self.violate(Invariant::I2Recovers, detail);
        }
        let promised = !self.manager.gone && self.hosts.iter().all(|h| !h.lost);
        if promised && let Some(open) = self.manager.rows.iter().position(|r| !r.row.is_final()) {
            let state = format!("{:?}", self.manager.rows[open].row.state);
            self.violate(Invariant::L2Ends, format!("m{open} is still {state}"));
        }
    }

    // ---- faults ----

    fn strike(&mut self) {
        if self.struck {
            return;
        }
        while let Some(strike) = self.plan.strikes.get(self.next_strike).copied() {
            if strike.step > self.steps && self.now_ms < CHAOS_LIMIT_MS {
                return;
            }
            self.next_strike += 1;
            if self.now_ms < CHAOS_LIMIT_MS {
                self.note(|| format!("FAULT {:?}", strike.fault));
                self.fault(strike.fault);
            }
        }
        self.struck = true;
        self.calm_from_ms = self.calm_from_ms.max(self.plan.chaos_ms);
        self.later(0, Item::Calm);
    }

    fn lasts(&mut self, ms: u64) {
        self.calm_from_ms = self.calm_from_ms.max(self.now_ms + ms);
    }

    fn fault(&mut self, fault: Fault) {
        let newest = self.migrations.len().checked_sub(1);
        match (fault, newest) {
            (Fault::CrashDaemon { host, down_ms }, _) => self.crash_daemon(host, down_ms),
            (Fault::CrashAfter { host, moment, down_ms }, _) => {
                self.hosts[host].crash_after = Some((moment, down_ms))
            }
            (Fault::CrashManager { down_ms }, _) => self.crash_manager(Some(down_ms)),
            (Fault::LoseManager, _) => self.crash_manager(None),
            (Fault::LoseHost { host }, _) => self.lose_host(host),
            (Fault::KillQemu { host }, _) => self.kill_some_qemu(host),
            (Fault::CutLink { from, to, ms }, _) => {
                self.cut[from][to] += 1;
                self.lasts(ms);
            }
            (Fault::ClockJump { host }, _) => self.fire_all_timers(host),
            (Fault::RestoreRegistry { back }, _) => self.restore_registry(back),
            (Fault::CutChannel, Some(m)) => {
                let (a, b) = (self.rng.range(0, 30), self.rng.range(0, 30));
                self.later(a, Item::Stir(m, Stir::PeerGone { at_source: true }));
                self.later(b, Item::Stir(m, Stir::PeerGone { at_source: false }));
            }
            (Fault::WithholdTail, Some(m)) => {
                self.migrations[m].channel.withhold_tail = true;
                self.cut_after_a_while(m);
            }
            (Fault::DropReverse, Some(m)) => {
                self.migrations[m].channel.drop_reverse = true;
                self.cut_after_a_while(m);
            }
            (Fault::Suspend { ms }, Some(m)) => {
                self.operator(m, source::Order::Suspend);
                self.later(ms, Item::Resume(m));
                self.lasts(ms);
            }
            (Fault::Terminate, Some(m)) => self.request_abort(m),
            (Fault::RefuseCont, Some(m)) => self.migrations[m].refuses_cont = true,
            (Fault::FailFreeze, Some(m)) => self.migrations[m].fails_freeze = true,
            (_, None) => {}
        }
    }

    fn cut_after_a_while(&mut self, m: usize) {
        let ms = self.rng.range(500, 9_000);
        self.later(ms, Item::Stir(m, Stir::PeerGone { at_source: true }));
        self.later(ms, Item::Stir(m, Stir::PeerGone { at_source: false }));
    }

    fn crash_daemon(&mut self, host: usize, down_ms: u64) {
        if self.hosts[host].lost || !self.hosts[host].daemon.up {
            return;
        }
        check::before_crash(self, host);
        self.stop_daemon(host);
        self.later(down_ms, Item::Restart(host));
        self.lasts(down_ms);
    }

    /// What [`Fault::CrashAfter`] waits for; over with the other faults.
    pub(super) fn crash_if_due(&mut self, host: usize, moment: Option<Moment>) {
        let Some((due, down_ms)) = self.hosts[host].crash_after else { return };
        if moment == Some(due) && !self.calm {
            self.hosts[host].crash_after = None;
            self.note(|| format!("FAULT the daemon of host {host} dies after {due:?}"));
            self.crash_daemon(host, down_ms);
        }
    }

    fn stop_daemon(&mut self, host: usize) {
        self.hosts[host].daemon.crash();
        for m in 0..self.migrations.len() {
            if self.migrations[m].from == host {
                self.end_source_agent(m, "its daemon died");
            }
            if self.migrations[m].to == host {
                self.end_target_agent(m, "its daemon died");
            }
        }
    }

    fn crash_manager(&mut self, down_ms: Option<u64>) {
        if self.manager.gone || !self.manager.up {
            return;
        }
        self.manager.crash();
        match down_ms {
            Some(ms) => {
                self.later(ms, Item::Restart(MANAGER));
                self.lasts(ms);
            }
            None => self.manager.gone = true,
        }
    }

    fn lose_host(&mut self, host: usize) {
        if self.hosts.iter().any(|h| h.lost) {
            return;
        }
        for q in 0..self.qemus.len() {
            if self.qemus[q].alive && self.qemus[q].host == host {
                check::before_loss(self, q, true);
                self.qemus[q].alive = false;
            }
        }
        self.hosts[host].lost = true;
        self.stop_daemon(host);
    }

    fn kill_some_qemu(&mut self, host: usize) {
        let Some(q) = self.qemus.iter().rposition(|q| q.alive && q.host == host) else { return };
        check::before_loss(self, q, false);
        let phase = self.qemus[q].phase;
        self.qemus[q].alive = false;
        self.note(|| format!("q{q} is killed in {phase:?}"));
        if let Phase::Active(m) | Phase::Device(m) = phase {
            self.tell_source(m, source::Event::QemuDied);
            self.end_source_agent(m, "QEMU died");
        }
        if let Phase::Incoming(m, _) | Phase::Loaded(m) = phase {
            self.tell_target(m, target::Event::QemuDied);
            self.end_target_agent(m, "QEMU died");
        }
    }

    /// The last fault is over: links heal, and the clock of the promise starts.
    fn calm_down(&mut self) {
        let wait = self.calm_from_ms.saturating_sub(self.now_ms);
        if wait > 0 {
            return self.later(wait, Item::Calm);
        }
        self.calm = true;
        self.note(|| "CALM".to_owned());
        self.cut = [[0; 3]; 3];
        if self.hosts.iter().any(|h| h.lost) {
            self.later(50, Item::Fence);
        }
        self.later(RECOVERY_MS, Item::End);
    }

    // ---- operator ----

    fn operator(&mut self, m: usize, order: source::Order) {
        if self.manager.up {
            self.send(MANAGER, self.migrations[m].from, Message::SourceOrder(m, order));
        }
    }

    /// The operator's word about a lost host.
    fn fence(&mut self) {
        if !self.manager.up {
            return;
        }
        let Some(host) = self.hosts.iter().position(|h| h.lost) else { return };
        let Some(m) = self.manager.rows.iter().rposition(|r| !r.row.is_final()) else { return };
        let event = match self.migrations[m].to == host {
            true => decider::Event::TargetFenced,
            false => decider::Event::SourceFenced,
        };
        self.decide(m, event);
    }

    /// Whether a refusal means that the message was meant for another machine.
    pub(super) fn misdelivered(verdict: &super::super::Verdict) -> bool {
        matches!(verdict, super::super::Verdict::Refused(Refusal::WrongKey | Refusal::NotCovered))
    }
}

fn node(n: usize) -> &'static str {
    ["a", "b", "manager"][n]
}

/// A log line without what is the same on every line: keys, permits and journals are told apart by the migration.
fn abridged(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("HandoverKey { ") {
        let end = rest[start..].find('}').map_or(rest.len(), |e| start + e + 1);
        let migration = rest[start..].find("m-").map_or("", |i| &rest[start + i + 2..start + i + 4]);
        out.push_str(&rest[..start]);
        out.push_str("m#");
        out.push_str(migration);
        rest = &rest[end..];
    }
    out.push_str(rest);
    let words = out.split(' ').map(|word| {
        match word.len() > 24 && word.bytes().take(24).all(|b| b.is_ascii_hexdigit()) {
            true => &word[..2],
            false => word,
        }
    });
    words.collect::<Vec<_>>().join(" ")
}
