//! The shell of the manager: one transaction per step, then its orders one by one.

use super::super::decider::{self, Continuity, Decision, HandoverRow, Order, Outcome, Place};
use super::super::{Attempt, RESEND_MS, Rule, SOURCE_SILENCE_MS, fresh_epochs};
use super::Invariant;
use super::plan::MANAGER;
use super::world::{Item, Message, Migration, World};
use std::collections::VecDeque;
use std::rc::Rc;
use types::handover::{AbortReason, HandoverKey, Statement};
use types::{Digest, Epoch, ErrorCode, HostName, MigrationId, Nonce};

/// A migration that has no votes by then is given up.
const SETUP_LIMIT_MS: u64 = 2_500;

/// A row and what the shell keeps beside it.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) row: HandoverRow,
    created_ms: u64,
}

#[derive(Debug)]
enum Work {
    Hear(Message),
    Send(usize, Order),
    /// Mutation only: the transaction after its orders.
    Write(usize, Box<Outcome>),
}

/// The manager; rows and location are the registry and survive it.
#[derive(Debug)]
pub(super) struct Manager {
    pub(super) up: bool,
    pub(super) gone: bool,
    life: u64,
    busy: bool,
    work: VecDeque<Work>,
    /// Since when each row awaits its source; forgotten in a crash.
    awaiting: Vec<Option<u64>>,
    pub(super) rows: Vec<Row>,
    location: Place,
    /// Older states of the registry, newest last.
    backups: Vec<(Vec<Row>, Place)>,
}

impl Manager {
    pub(super) fn new(names: &[HostName; 2]) -> Self {
        Self {
            up: true,
            gone: false,
            life: 0,
            busy: false,
            work: VecDeque::new(),
            awaiting: Vec::new(),
            rows: Vec::new(),
            location: Place { host: names[0].clone(), epoch: Epoch(1) },
            backups: Vec::new(),
        }
    }

    pub(super) fn crash(&mut self) {
        self.up = false;
        self.life += 1;
        self.busy = false;
        self.work.clear();
        self.awaiting.clear();
    }
}

impl World<'_> {
    pub(super) fn manager_hears(&mut self, message: Message) {
        if self.manager.up {
            self.manager.work.push_back(Work::Hear(message));
            self.wake_manager();
        }
    }

    fn wake_manager(&mut self) {
        if !self.manager.work.is_empty() && !std::mem::replace(&mut self.manager.busy, true) {
            let life = self.manager.life;
            let delay = self.rng.range(0, 1);
            self.later(delay, Item::Manager { life });
        }
    }

    pub(super) fn manager_step(&mut self, life: u64) {
        if self.manager.life != life || !self.manager.up {
            return;
        }
        self.manager.busy = false;
        match self.manager.work.pop_front() {
            Some(Work::Hear(message)) => self.hear(message),
            Some(Work::Send(m, order)) => self.send_order(m, order),
            Some(Work::Write(m, outcome)) => self.write(m, &outcome),
            None => {}
        }
        self.wake_manager();
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Ready(m) => self.send(MANAGER, self.migrations[m].from, Message::Start(m)),
            Message::Statement(m, from, statement) => {
                if let Statement::AskRenounce(request) = &statement {
                    let target = self.migrations[m].to;
                    self.send(MANAGER, target, Message::Asked(m, request.clone()));
                }
                self.hear_about(m, &decider::Event::Statement { from, statement });
            }
            Message::Renounced(proof) => {
                let m = usize::from(proof.renunciation.key.migration.as_bytes()[0]);
                self.hear_about(m, &decider::Event::Renounced(proof));
            }
            _ => {}
        }
    }

    /// The newest row of the VM sees a statement first, then the one that it names.
    fn hear_about(&mut self, m: usize, event: &decider::Event) {
        let newest = self.manager.rows.len().checked_sub(1);
        let Some(newest) = newest else { return };
        let taken = self.decide(newest, event.clone());
        if !taken && newest != m && m < self.manager.rows.len() {
            self.decide(m, event.clone());
        }
    }

    /// One transaction; false if the event names another attempt.
    pub(super) fn decide(&mut self, m: usize, event: decider::Event) -> bool {
        let rules = self.options.rules;
        let verdict = decider::decide_under(rules, &self.manager.rows[m].row, event.clone());
        match verdict {
            Ok(outcome) => {
                self.note(|| format!("m{m} manager: {event:?}: {:?}", outcome.decision));
                let late = matches!(outcome.decision, Decision::Commit(_)) && !rules.has(Rule::DurableCommit);
                if !late {
                    self.write(m, &outcome);
                }
                let sends = outcome.orders.iter().cloned().map(|order| Work::Send(m, order));
                self.manager.work.extend(sends);
                if late {
                    self.manager.work.push_back(Work::Write(m, Box::new(outcome)));
                }
                self.wake_manager();
                true
            }
            Err(refusal) => {
                self.note(|| format!("m{m} manager refuses {event:?}: {refusal:?}"));
                !matches!(refusal, decider::Refusal::WrongKey | decider::Refusal::NotCovered)
            }
        }
    }

    /// Row, location and audit entry in one transaction.
    fn write(&mut self, m: usize, outcome: &Outcome) {
        let location = match &outcome.decision {
            Decision::Keep => None,
            Decision::Commit(step)
            | Decision::Void(step)
            | Decision::Discard(step)
            | Decision::AdoptCommit(step) => Some(step),
        };
        if location.is_none() && self.manager.rows[m].row == outcome.row {
            return;
        }
        self.back_up();
        if let Some(step) = location {
            if self.manager.location != step.from {
                let detail = format!("m{m}: {step:?} and the location is {:?}", self.manager.location);
                return self.violate(Invariant::HLocation, detail);
            }
            self.manager.location = step.to.clone();
        }
        match outcome.decision {
            Decision::Commit(_) | Decision::AdoptCommit(_) => self.migrations[m].committed = true,
            Decision::Discard(_) => (self.lost, self.discarded) = (true, true),
            _ => {}
        }
        self.manager.rows[m].row = outcome.row.clone();
        if outcome.row.is_final() {
            let delay = self.rng.range(1, 60);
            self.later(delay, Item::Migrate);
        }
    }

    fn back_up(&mut self) {
        let wanted = |s: &super::plan::Strike| matches!(s.fault, super::plan::Fault::RestoreRegistry { .. });
        if self.plan.strikes.iter().any(wanted) {
            self.manager.backups.push((self.manager.rows.clone(), self.manager.location.clone()));
        }
    }

    /// The registry comes back from an older state, but not from before its newest migration (whose epochs and
    /// permit a restored registry must learn from the hosts before it grants anything).
    pub(super) fn restore_registry(&mut self, back: usize) {
        let rows = self.manager.rows.len();
        let Some(index) = self.manager.backups.len().checked_sub(back) else { return };
        if rows == 0 || self.manager.backups[index].0.len() != rows || self.manager.gone {
            return;
        }
        let (rows, location) = self.manager.backups[index].clone();
        self.manager.backups.truncate(index);
        self.manager.rows = rows;
        self.manager.location = location;
        for row in self.manager.rows.iter_mut().filter(|r| !r.row.is_final()) {
            row.row.continuity = Continuity::Unproven;
        }
        if self.manager.up {
            self.manager.crash();
            self.manager.up = true;
        }
    }

    pub(super) fn restart_manager(&mut self) {
        if !self.manager.gone {
            self.manager.up = true;
            self.note(|| "the manager restarts".to_owned());
        }
    }

    fn send_order(&mut self, m: usize, order: Order) {
        let (source, target) = (self.migrations[m].from, self.migrations[m].to);
        match order {
            Order::Source(order) => self.send(MANAGER, source, Message::SourceOrder(m, order)),
            Order::ShowRenunciation(proof) => self.send(MANAGER, source, Message::Renounced(proof)),
            Order::Target(order) => self.send(MANAGER, target, Message::TargetOrder(m, order)),
        }
    }

    /// Every second: what each side must hear is derived from the rows, and deadlines are looked at.
    pub(super) fn sweep(&mut self) {
        self.later(RESEND_MS, Item::Sweep);
        if !self.manager.up {
            return;
        }
        self.manager.awaiting.resize(self.manager.rows.len(), None);
        for m in 0..self.manager.rows.len() {
            if !self.manager.rows[m].row.is_final() {
                self.sweep_row(m);
            }
        }
        self.wake_manager();
    }

    fn sweep_row(&mut self, m: usize) {
        let row = &self.manager.rows[m];
        let aged = self.now_ms >= row.created_ms + SETUP_LIMIT_MS;
        let awaits = row.row.awaits_source();
        if aged && matches!(&row.row.state, decider::RowState::Open(open) if open.abort.is_none()) {
            self.request_abort(m);
        }
        let since = &mut self.manager.awaiting[m];
        if !awaits {
            *since = None;
        } else if self.now_ms >= *since.get_or_insert(self.now_ms) + SOURCE_SILENCE_MS {
            self.decide(m, decider::Event::SourceSilent);
        }
        let orders = decider::outstanding_under(self.options.rules, &self.manager.rows[m].row);
        self.manager.work.extend(orders.into_iter().map(|order| Work::Send(m, order)));
    }

    pub(super) fn request_abort(&mut self, m: usize) {
        if self.manager.up && m < self.manager.rows.len() {
            let detail = "the operator terminates".to_owned();
            let reason = AbortReason { code: ErrorCode::Terminated, detail };
            self.decide(m, decider::Event::AbortRequested(reason));
        }
    }

    /// The next migration, from where the VM is, to the other host: permit, row, epochs and location at once.
    pub(super) fn migrate(&mut self) {
        let done = self.migrations.len();
        let open = self.manager.rows.iter().any(|r| !r.row.is_final());
        let enough = done >= usize::try_from(self.plan.migrations).unwrap_or(usize::MAX);
        if !self.manager.up || open || enough || self.lost || self.hosts.iter().any(|h| h.lost) {
            return;
        }
        let from = usize::from(self.manager.location.host != self.names[0]);
        let Some(epochs) = fresh_epochs(self.manager.location.epoch) else { return };
        let tag = u8::try_from(done).unwrap_or(u8::MAX);
        let attempt = Attempt {
            key: HandoverKey {
                migration: MigrationId::from_bytes([tag; 16]),
                vm: self.vm,
                source_epoch: epochs.source,
                target_epoch: epochs.target,
            },
            permit: Digest([tag; 32]),
            nonce: Nonce::from_bytes([tag; 16]),
            source: self.names[from].clone(),
            target: self.names[1 - from].clone(),
            target_journal: Nonce::from_bytes([100 + u8::from(from == 0); 16]),
            run_budget_ms: 6_000,
        };
        self.back_up();
        self.manager.location = Place { host: attempt.source.clone(), epoch: epochs.source };
        self.manager.rows.push(Row { row: HandoverRow::new(&attempt), created_ms: self.now_ms });
        self.note(|| format!("m{done}: permit {epochs:?} from host {from}"));
        self.migrations.push(Migration {
            attempt: Rc::new(attempt),
            from,
            to: 1 - from,
            channel: Default::default(),
            end_seen: false,
            refuses_cont: false,
            fails_freeze: false,
            written: [0; 2],
            committed: false,
            prepared_times: 0,
        });
        self.send(MANAGER, 1 - from, Message::Prepare(done));
    }

    /// What the registry holds of a migration's votes, for the accounting of losses.
    pub(super) fn both_votes_on_record(&self, m: usize) -> bool {
        match self.manager.rows.get(m).map(|r| &r.row.state) {
            Some(decider::RowState::Open(open)) => open.source_vote.is_some() && open.target_vote.is_some(),
            Some(decider::RowState::Committed(_) | decider::RowState::Running { .. }) => true,
            _ => false,
        }
    }
}
