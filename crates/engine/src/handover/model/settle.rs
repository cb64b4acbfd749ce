//! Liveness: from every state that is reached, with everything in flight lost, a fair run without further faults ends
//! well.
//!
//! A fair run restarts what is down, performs what waits, delivers what is (re)sent once, and when nothing is left to
//! do lets every timer fire; the operator says what is true. It is one run, so what is shown is that a good end can be
//! reached from everywhere. In a finite graph that means: a run that takes each of its possible steps now and then
//! does reach one.

use super::super::sim::Invariant;
use super::Config;
use super::explore::fingerprint;
use super::state::flag::{SOURCE_AGENT, SUSPENDED, TARGET_AGENT};
use super::state::{Ask, HOSTS, Lane, Message, Notice, Qemu, Run, State, Stir, TIMERS, mark, timer_bit};
use super::table::Tables;
use types::Side;

/// No fair run takes more rounds of timers than this: what is still changing then never ends.
const ROUNDS_LIMIT: usize = 64;
/// Nor more steps in one round.
const STEPS_LIMIT: usize = 4_000;

/// What a fair run from `state` breaks.
pub(super) fn broken(
    config: &Config,
    tables: &mut Tables,
    state: &State,
) -> Option<(Invariant, &'static str)> {
    let begin = everything_lost(state);
    if tables.ends_well.contains(&fingerprint(&begin)) {
        return None;
    }
    tables.fair_runs += 1;
    let mut run = Run::new(config, tables, begin);
    let mut passed = vec![fingerprint(&begin)];
    let verdict = run.settle(&mut passed);
    if verdict.is_none() {
        tables.ends_well.extend(passed);
    }
    verdict
}

/// Where a fair run from `state` comes to rest, with nothing lost but what `cut` says never arrives.
pub(super) fn rest(config: &Config, tables: &mut Tables, state: &State, cut: u32) -> State {
    let mut run = Run::new(config, tables, *state);
    run.cut = cut;
    let mut before = None;
    for _ in 0..ROUNDS_LIMIT {
        run.drain();
        if before == Some(run.state) && (cut != 0 || !run.intervene()) {
            break;
        }
        before = Some(run.state);
        run.round();
    }
    run.state
}

fn everything_lost(state: &State) -> State {
    let mut state = *state;
    for lane in &mut state.lanes {
        lane.net = 0;
    }
    state.faults_left = 0;
    state.held = Default::default();
    state.backup = Default::default();
    state
}

impl Run<'_> {
    fn settle(&mut self, passed: &mut Vec<u64>) -> Option<(Invariant, &'static str)> {
        let mut ends = Vec::new();
        for _ in 0..ROUNDS_LIMIT {
            self.drain();
            if let Some(invariant) = self.state.violation() {
                return Some((invariant, self.detail));
            }
            let end = fingerprint(&self.state);
            if self.tables.ends_well.contains(&end) {
                return None;
            }
            passed.push(end);
            if ends.contains(&end) {
                // Nothing changes any more by itself.
                if self.intervene() {
                    ends.clear();
                    continue;
                }
                return self.judge();
            }
            ends.push(end);
            self.round();
        }
        Some((Invariant::L2Ends, "a fair run does not come to rest"))
    }

    /// Every timer fires, and the manager says again what each side must hear.
    fn round(&mut self) {
        for lane in 0..self.state.lanes.len() {
            for side in [Side::Source, Side::Target] {
                for kind in TIMERS {
                    let seat = self.state.lanes[lane].seat(side);
                    if seat.machine != 0 && seat.timers & timer_bit(kind) != 0 {
                        self.timer(lane, side, kind);
                        self.calm();
                        self.drain();
                    }
                }
            }
            if self.state.lanes[lane].attempt == 0 || self.state.is(mark::NO_MANAGER) {
                continue;
            }
            let row = self.tables.rows.get(self.state.lanes[lane].row);
            let (awaits, over) = (row.awaits_source(), row.is_final());
            if awaits {
                self.transact(lane, Ask::Silence);
            } else if !over {
                let orders = self.tables.outstanding(self.state.lanes[lane].row);
                self.state.lanes[lane].net |= orders;
            }
            self.drain();
        }
    }

    fn calm(&mut self) {
        self.execute_guests();
        self.check_suspended();
        self.forget();
    }

    /// Does what there is to do, one thing after the other, until there is nothing left.
    fn drain(&mut self) {
        for _ in 0..STEPS_LIMIT {
            if self.state.violation().is_some() || !self.do_one() {
                return;
            }
            self.calm();
        }
        self.violate(Invariant::L2Ends, "a fair run echoes for ever");
    }

    fn do_one(&mut self) -> bool {
        for host in 0..HOSTS {
            if self.state.down & 1 << host != 0 {
                self.restart_daemon(host);
                return true;
            }
        }
        (0..self.state.lanes.len()).any(|lane| self.state.lanes[lane].attempt != 0 && self.do_one_of(lane))
    }

    fn do_one_of(&mut self, lane: usize) -> bool {
        for side in [Side::Source, Side::Target] {
            let seat = *self.state.lanes[lane].seat(side);
            if seat.pending != 0 {
                self.step(lane, side, false);
                return true;
            }
            if let Some(notice) = Notice::ALL.into_iter().find(|n| seat.notices & n.bit() != 0) {
                self.notice(lane, side, notice);
                return true;
            }
        }
        let stirs = [Stir::Converge, Stir::StreamOut, Stir::Arrived, Stir::Load, Stir::EndSeen];
        for stir in stirs {
            let held = stir == Stir::Converge && self.state.lanes[lane].has(SUSPENDED);
            if !held && self.may_stir(lane, stir) {
                self.stir(lane, stir);
                return true;
            }
        }
        self.follow_agent(lane) || self.arrive(lane)
    }

    /// An agent whose peer is gone notices it.
    fn follow_agent(&mut self, lane: usize) -> bool {
        let l = &self.state.lanes[lane];
        match (l.has(SOURCE_AGENT), l.has(TARGET_AGENT)) {
            (true, false) => self.end_source_agent(lane),
            (false, true) => self.end_target_agent(lane),
            _ => return false,
        }
        true
    }

    /// The first message that is under way arrives, once.
    fn arrive(&mut self, lane: usize) -> bool {
        let net = self.state.lanes[lane].net;
        let Some(message) = Message::ALL.into_iter().find(|m| net & m.bit() != 0) else { return false };
        self.state.lanes[lane].net &= !message.bit();
        if self.cut & message.bit() != 0 {
            return true;
        }
        if message.is_to_manager() {
            if !self.state.is(mark::NO_MANAGER) {
                self.transact(lane, Ask::Hears(message));
            }
        } else if self.reaches(lane, message) {
            self.deliver(lane, message);
        }
        true
    }

    /// What people, and the manager's limits, do when nothing moves any more; false if there is nothing to do.
    fn intervene(&mut self) -> bool {
        if self.state.is(mark::NO_MANAGER) {
            return false;
        }
        for lane in 0..self.state.lanes.len() {
            let l = self.state.lanes[lane];
            if l.attempt == 0 || self.tables.rows.get(l.row).is_final() {
                continue;
            }
            for ask in [Some(Ask::Abort), self.fence_of(lane)].into_iter().flatten() {
                if self.tables.transaction(l.row, l.attempt, ask).row != l.row {
                    self.transact(lane, ask);
                    self.calm();
                    return true;
                }
            }
            if self.awaits_operator(lane) {
                // The operator fences the target (kills what is left there), then says so.
                if let Some(q) = self.target_qemu(lane) {
                    self.kill_qemu(q);
                }
                if self.tables.transaction(l.row, l.attempt, Ask::TargetFenced).row != l.row {
                    self.transact(lane, Ask::TargetFenced);
                    self.calm();
                    return true;
                }
            }
        }
        false
    }

    /// Where no rule can go on and `migration show` asks for the operator: the target may have run the VM and its
    /// QEMU is dead or refuses to continue.
    fn awaits_operator(&self, lane: usize) -> bool {
        let l = &self.state.lanes[lane];
        if l.target.machine == 0 || self.state.qemus.iter().any(Qemu::executes) {
            return false;
        }
        matches!(
            self.tables.targets.get(l.target.machine).state_name(),
            "lost" | "starting-again" | "running"
        )
    }

    /// Whether what a fair run came to is a good end.
    fn judge(&mut self) -> Option<(Invariant, &'static str)> {
        let managed = !self.state.is(mark::NO_MANAGER);
        // Without a manager nobody hears the operator.
        let nobody = self.state.lost != 0 || (0..self.state.lanes.len()).any(|l| self.awaits_operator(l));
        let excused = self.state.is(mark::VM_LOST | mark::DISCARDED) || !managed && nobody;
        if !excused && !self.state.qemus.iter().any(Qemu::executes) {
            return Some((Invariant::I2Recovers, "no copy runs, and a valid one is held"));
        }
        // Whatever is lost: the row ends, or nobody may start the VM again.
        let open = |l: &Lane| l.attempt != 0 && !self.tables.rows.get(l.row).is_final();
        if managed && self.state.lanes.iter().any(open) {
            return Some((Invariant::L2Ends, "the hand-over does not end at the manager"));
        }
        None
    }
}
