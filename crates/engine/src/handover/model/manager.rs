//! The managers: transactions on the registry, one at a time, whoever makes them.
//!
//! A manager keeps nothing between two transactions but orders that it has not sent yet, and an order that is sent
//! late, or never, is a message that arrives late, or never. So two managers are two that may make the next
//! transaction, and what they can do to each other is in [`Action::Pause`]: one reads and decides, sleeps, and writes
//! over what the other did meanwhile, if nothing compares.

use super::super::decider::{Continuity, HandoverRow};
use super::super::sim::Invariant;
use super::super::{Rule, fresh_epochs};
use super::Shell;
use super::messages::Moved;
use super::state::{
    Action, Ask, HOSTS, Held, Lane, Message, NOBODY, Qemu, Run, Spot, flag, lane_number, mark, qemu,
};
use super::table::Written;
use types::Epoch;

impl Run<'_> {
    pub(super) fn list_transaction(&mut self, number: u8, ask: Ask, actions: &mut Vec<Action>) {
        if self.state.is(mark::NO_MANAGER) {
            return;
        }
        let lane = usize::from(number);
        if ask == Ask::Hears(Message::Ready) {
            if self.state.lanes[lane].net & Message::Start.bit() == 0 {
                actions.push(Action::Transact(number, ask));
            }
            return;
        }
        let (n, written) = self.would_write(lane, ask);
        let l = &self.state.lanes[n];
        let relays = ask == Ask::Hears(Message::AskedForAbort)
            && self.state.lanes[lane].net & Message::Asked.bit() == 0;
        let changes = written.row != l.row;
        if changes || relays || written.orders & !l.net != 0 {
            actions.push(Action::Transact(number, ask));
        }
        if changes && self.config.pausing && self.state.held.row == 0 {
            actions.push(Action::Pause(number, ask));
        }
    }

    /// What comes to the managers besides messages.
    pub(super) fn list_manager(&mut self, lane: usize, actions: &mut Vec<Action>) {
        let number = lane_number(lane);
        let row = self.tables.rows.get(self.state.lanes[lane].row);
        let (awaits, over) = (row.awaits_source(), row.is_final());
        if over {
            return;
        }
        if self.config.operator {
            self.list_transaction(number, Ask::Abort, actions);
        }
        if awaits {
            self.list_transaction(number, Ask::Silence, actions);
        }
        if let Some(word) = self.fence_of(lane) {
            self.list_transaction(number, word, actions);
        }
    }

    /// The newest row of the VM sees what is said first, then the one that it names.
    fn would_write(&mut self, lane: usize, ask: Ask) -> (usize, Written) {
        let attempt = self.state.lanes[lane].attempt;
        let newest = self.state.granted().saturating_sub(1);
        if matches!(ask, Ask::Hears(_)) && newest != lane {
            let written = self.tables.transaction(self.state.lanes[newest].row, attempt, ask);
            if !written.misdelivered {
                return (newest, written);
            }
        }
        (lane, self.tables.transaction(self.state.lanes[lane].row, attempt, ask))
    }

    pub(super) fn transact(&mut self, lane: usize, ask: Ask) {
        match ask {
            Ask::Hears(Message::Ready) => {
                self.state.lanes[lane].net |= Message::Start.bit();
                return;
            }
            // The ask itself is relayed to the target as it is.
            Ask::Hears(Message::AskedForAbort) => self.state.lanes[lane].net |= Message::Asked.bit(),
            Ask::TargetFenced | Ask::SourceFenced => self.state.marks |= mark::FENCED,
            _ => {}
        }
        let (n, written) = self.would_write(lane, ask);
        let commits = matches!(written.decision, Moved::Commit { .. });
        if commits && !self.config.rules.has(Rule::DurableCommit) {
            // Mutation only: the transaction after its orders.
            if self.state.held.row == 0 {
                self.state.lanes[n].net |= written.orders;
                self.state.held =
                    Held { lane: lane_number(n), row: self.state.lanes[n].row, ask: ask.number() };
            }
            return;
        }
        self.write(n, written);
    }

    pub(super) fn pause(&mut self, number: u8, ask: Ask) {
        let row = self.state.lanes[usize::from(number)].row;
        if matches!(ask, Ask::TargetFenced | Ask::SourceFenced) {
            self.state.marks |= mark::FENCED;
        }
        self.state.held = Held { lane: number, row, ask: ask.number() };
    }

    /// A compare-and-swap on the row: what was decided on another row is thrown away and decided anew.
    pub(super) fn go_on(&mut self) {
        let held = std::mem::take(&mut self.state.held);
        let lane = usize::from(held.lane);
        let same = self.state.lanes[lane].row == held.row;
        if same || self.config.shell == Shell::BlindWrite {
            let attempt = self.state.lanes[lane].attempt;
            let written = self.tables.transaction(held.row, attempt, Ask::of_number(held.ask));
            self.write(lane, written);
        }
    }

    /// Row, location and audit entry in one transaction; then the orders.
    fn write(&mut self, lane: usize, written: Written) {
        match written.decision {
            Moved::Keep => {}
            Moved::Commit { from, to } => {
                self.check_decision(lane, false);
                self.move_location(from, to);
                self.state.lanes[lane].set(flag::COMMITTED);
            }
            Moved::AdoptCommit { from, to } => {
                self.move_location(from, to);
                self.state.lanes[lane].set(flag::COMMITTED);
            }
            Moved::Void { from, to } => {
                self.check_decision(lane, true);
                self.move_location(from, to);
                self.state.lanes[lane].set(flag::VOIDED);
            }
            Moved::Discard { from, to } => {
                self.move_location(from, to);
                self.state.marks |= mark::DISCARDED;
                if !self.state.is(mark::FENCED) {
                    self.violate(
                        Invariant::I2Recovers,
                        "the VM is given to its disk without an operator's word",
                    );
                }
            }
        }
        let l = &mut self.state.lanes[lane];
        l.row = written.row;
        l.net |= written.orders;
    }

    fn move_location(&mut self, from: Spot, to: Spot) {
        if self.state.location != from {
            self.violate(Invariant::HLocation, "the location is not what the row implies");
        }
        if to.epoch <= from.epoch {
            self.violate(Invariant::HEpochsGrow, "an epoch does not grow");
        }
        self.state.location = to;
    }

    /// One decision: committed at most once, never after a void; voided at most once, never once the target ran.
    fn check_decision(&mut self, lane: usize, void: bool) {
        let l = self.state.lanes[lane];
        let forgot = self.state.is(mark::RESTORED);
        if !forgot && (l.has(flag::VOIDED) || !void && l.has(flag::COMMITTED)) {
            self.violate(Invariant::HOneDecision, "an attempt is decided twice");
        }
        if void && self.state.qemus[lane + 1].has(qemu::EXECUTED) {
            self.violate(Invariant::HOneDecision, "an attempt is voided, and its target ran");
        }
    }

    /// A migration has ended and the next begins. Every message that could ever have been said in it is under way from
    /// here on, whether it was said or not; what it left behind that nothing asks for any more is forgotten.
    fn retire(&mut self, lane: usize) {
        self.end_source_agent(lane);
        self.end_target_agent(lane);
        let l = self.state.lanes[lane];
        let (source, target) = (l.source.journal, l.target.journal);
        let (source, target) = (self.tables.shorten_source(source), self.tables.shorten_target(target));
        let l = &mut self.state.lanes[lane];
        l.net |= Message::ALL.into_iter().fold(0, |bits, m| bits | m.bit());
        if !self.config.operator {
            l.net &= !(Message::Suspend.bit() | Message::Resume.bit());
        }
        l.clear(flag::FRESH | flag::SENT | flag::ARRIVED | flag::END_SEEN);
        (l.source.journal, l.target.journal) = (source, target);
        for q in self.state.qemus.iter_mut().filter(|q| !q.has(qemu::ALIVE)) {
            *q = Qemu::default();
        }
    }

    // ---- the registry set back ----

    pub(super) fn back_up(&mut self) {
        let newest = self.state.granted().saturating_sub(1);
        self.state.backup = (self.state.lanes[newest].row, self.state.location);
    }

    pub(super) fn restore_changes(&self) -> bool {
        let newest = self.state.granted().saturating_sub(1);
        self.state.backup.0 != self.state.lanes[newest].row
    }

    pub(super) fn restore(&mut self) {
        let newest = self.state.granted().saturating_sub(1);
        let (row, location) = std::mem::take(&mut self.state.backup);
        let mut row = self.tables.rows.get(row).clone();
        if !row.is_final() {
            row.continuity = Continuity::Unproven;
        }
        self.state.lanes[newest].row = self.tables.rows.number(row);
        self.state.location = location;
        self.state.marks |= mark::RESTORED;
        self.state.held = Held::default();
        self.excuse_last_copy();
    }

    // ---- permits ----

    pub(super) fn list_grants(&self, actions: &mut Vec<Action>) {
        let granted = self.state.granted();
        let stands = mark::NO_MANAGER | mark::VM_LOST | mark::DISCARDED;
        if granted >= usize::from(self.config.migrations) || self.state.is(stands) || self.state.lost != 0 {
            return;
        }
        let open = |l: &Lane| l.attempt != 0 && !self.tables.rows.get(l.row).is_final();
        if !self.state.lanes.iter().any(open) {
            let elsewhere = (0..HOSTS).filter(|h| *h != self.state.location.host);
            actions.extend(elsewhere.map(Action::Grant));
        }
    }

    /// Permit, row, epochs and location at once, and PREPARE.
    pub(super) fn grant(&mut self, to: u8) {
        let lane = self.state.granted();
        let Spot { host: from, epoch } = self.state.location;
        let Some(epochs) = fresh_epochs(Epoch(u64::from(epoch))) else { return };
        let attempt = self.tables.attempt(lane, from, to, epochs);
        let row = self.tables.rows.number(HandoverRow::new(self.tables.attempts.get(attempt)));
        let Epoch(fresh) = epochs.source;
        self.state.location = Spot { host: from, epoch: u8::try_from(fresh).unwrap_or(u8::MAX) };
        self.state.backup = Default::default();
        for ended in 0..lane {
            self.retire(ended);
        }
        // What the operator may say at any time may arrive at any time.
        let operator = Message::Suspend.bit() | Message::Resume.bit();
        let net = Message::Prepare.bit() | if self.config.operator { operator } else { 0 };
        self.state.lanes[lane] = Lane { attempt, row, from, to, net, moves: NOBODY, ..Lane::default() };
    }
}
