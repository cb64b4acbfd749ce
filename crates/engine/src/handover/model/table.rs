//! Values by number, and what the production machines answered: each question is put to them once.
//!
//! Two values are the same if they read the same in debug output, reasons for giving up aside: a reason is carried to
//! the people and decides nothing, so a state that differs from another in it alone behaves alike.

use super::super::decider::{self, HandoverRow, Order, Refusal as ManagerRefusal};
use super::super::journal::{Entry, NonceLedger, SourceEntry, SourceFact, TargetEntry, TargetFact};
use super::super::source::{self, Claim, Source};
use super::super::target::{self, Target};
use super::super::{Attempt, EpochPair, Refusal, Resolution, Rules, Verdict};
use super::messages::{
    Moved, evidence, host_name, lane_of, manager_event, moved, order_message, row_name, source_event,
    source_notice, target_event, target_notice,
};
use super::state::{Ask, Message, Notice};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use types::handover::HandoverKey;
use types::{Digest, MigrationId, Nonce, Side, VmId};

/// Values by number, from 1: 0 is none.
#[derive(Debug)]
pub(super) struct Pool<T> {
    values: Vec<T>,
    numbers: HashMap<String, u16>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { values: Vec::new(), numbers: HashMap::new() }
    }
}

impl<T: Debug> Pool<T> {
    pub(super) fn number(&mut self, value: T) -> u16 {
        let key = without_reasons(&format!("{value:?}"));
        if let Some(number) = self.numbers.get(&key) {
            return *number;
        }
        self.values.push(value);
        let number = u16::try_from(self.values.len()).expect("a bound keeps each kind of value below 65536");
        self.numbers.insert(key, number);
        number
    }

    pub(super) fn get(&self, number: u16) -> &T {
        &self.values[usize::from(number) - 1]
    }

    pub(super) fn len(&self) -> usize {
        self.values.len()
    }
}

/// Debug text without what only people read.
fn without_reasons(text: &str) -> String {
    const START: &str = "AbortReason {";
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(START) {
        out.push_str(&rest[..at]);
        out.push_str("reason");
        let reason = &rest[at..];
        // `AbortReason { code: X, detail: "…" }`, and no detail of ours holds a quote.
        let end = reason.find("\" }").map_or(reason.len(), |e| e + 3);
        rest = &reason[end..];
    }
    out.push_str(rest);
    out
}

/// What a machine answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) machine: u16,
    pub(super) effects: u16,
    /// It said that the event names another attempt.
    pub(super) misdelivered: bool,
}

/// What a transaction would write.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written {
    pub(super) row: u16,
    pub(super) decision: Moved,
    /// What goes out, as bits of the network.
    pub(super) orders: u32,
    /// It names another attempt.
    pub(super) misdelivered: bool,
}

/// Bits of what a journal holds.
pub(super) mod wrote {
    pub(in super::super) const OPENED: u16 = 1;
    pub(in super::super) const FREEZING: u16 = 1 << 1;
    pub(in super::super) const NO_VOTE: u16 = 1 << 2;
    pub(in super::super) const FROZEN: u16 = 1 << 3;
    pub(in super::super) const ASKED: u16 = 1 << 4;
    pub(in super::super) const FREED: u16 = 1 << 5;
    pub(in super::super) const KILLING: u16 = 1 << 6;
    pub(in super::super) const RELEASED: u16 = 1 << 7;
    pub(in super::super) const CONSUMED: u16 = 1 << 8;
    pub(in super::super) const VOTED: u16 = 1 << 9;
    pub(in super::super) const RUN: u16 = 1 << 10;
    pub(in super::super) const RENOUNCED: u16 = 1 << 11;
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) rules: Rules,
    pub(super) attempts: Pool<Attempt>,
    pub(super) sources: Pool<Source>,
    pub(super) targets: Pool<Target>,
    pub(super) rows: Pool<HandoverRow>,
    pub(super) source_effects: Pool<Vec<source::Effect>>,
    pub(super) target_effects: Pool<Vec<target::Effect>>,
    pub(super) source_events: Pool<source::Event>,
    pub(super) target_events: Pool<target::Event>,
    pub(super) source_journals: Pool<Vec<SourceEntry>>,
    pub(super) target_journals: Pool<Vec<TargetEntry>>,
    source_steps: HashMap<(u16, u16), Step>,
    target_steps: HashMap<(u16, u16), Step>,
    source_tails: HashMap<u16, u16>,
    target_tails: HashMap<u16, u16>,
    source_writes: HashMap<(u16, u16), u16>,
    target_writes: HashMap<(u16, u16), u16>,
    messages: HashMap<(u16, u8, bool), u16>,
    notices: HashMap<(u16, u8, bool), u16>,
    written: HashMap<(u16, u16, u8), Written>,
    outstanding: HashMap<u16, u32>,
    facts: HashMap<(u16, bool), u16>,
    dead: [Vec<Option<u8>>; 2],
    let_go: HashMap<(u16, bool), bool>,
    /// Ends of rounds of fair runs that are known to end well.
    pub(super) ends_well: HashSet<u64>,
    /// Fair runs so far; those that meet a known end are short.
    pub(super) fair_runs: u64,
}

impl Tables {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            rules,
            attempts: Pool::default(),
            sources: Pool::default(),
            targets: Pool::default(),
            rows: Pool::default(),
            source_effects: Pool::default(),
            target_effects: Pool::default(),
            source_events: Pool::default(),
            target_events: Pool::default(),
            source_journals: Pool::default(),
            target_journals: Pool::default(),
            source_steps: HashMap::new(),
            target_steps: HashMap::new(),
            source_tails: HashMap::new(),
            target_tails: HashMap::new(),
            source_writes: HashMap::new(),
            target_writes: HashMap::new(),
            messages: HashMap::new(),
            notices: HashMap::new(),
            written: HashMap::new(),
            outstanding: HashMap::new(),
            facts: HashMap::new(),
            dead: [Vec::new(), Vec::new()],
            let_go: HashMap::new(),
            ends_well: HashSet::new(),
            fair_runs: 0,
        }
    }

    // ---- what the machines say ----

    pub(super) fn source_step(&mut self, machine: u16, event: u16) -> Step {
        if let Some(step) = self.source_steps.get(&(machine, event)) {
            return *step;
        }
        let mut source = self.sources.get(machine).clone();
        let reaction = source.handle(self.source_events.get(event).clone());
        let step = Step {
            machine: self.sources.number(source),
            effects: self.source_list(reaction.effects),
            misdelivered: misdelivered(&reaction.verdict),
        };
        self.source_steps.insert((machine, event), step);
        step
    }

    pub(super) fn target_step(&mut self, machine: u16, event: u16) -> Step {
        if let Some(step) = self.target_steps.get(&(machine, event)) {
            return *step;
        }
        let mut target = self.targets.get(machine).clone();
        let reaction = target.handle(self.target_events.get(event).clone());
        let step = Step {
            machine: self.targets.number(target),
            effects: self.target_list(reaction.effects),
            misdelivered: misdelivered(&reaction.verdict),
        };
        self.target_steps.insert((machine, event), step);
        step
    }

    /// Effects that nothing in the world can see are left out.
    pub(super) fn source_list(&mut self, mut effects: Vec<source::Effect>) -> u16 {
        effects.retain(|e| !matches!(e, source::Effect::Report(..) | source::Effect::Done(_)));
        if effects.is_empty() { 0 } else { self.source_effects.number(effects) }
    }

    pub(super) fn target_list(&mut self, mut effects: Vec<target::Effect>) -> u16 {
        use target::Effect as E;
        effects.retain(|e| !matches!(e, E::Report(..) | E::Done(_) | E::Announce));
        if effects.is_empty() { 0 } else { self.target_effects.number(effects) }
    }

    /// The list without its first effect.
    pub(super) fn source_tail(&mut self, list: u16) -> u16 {
        if let Some(tail) = self.source_tails.get(&list) {
            return *tail;
        }
        let rest = self.source_effects.get(list)[1..].to_vec();
        let tail = self.source_list(rest);
        self.source_tails.insert(list, tail);
        tail
    }

    pub(super) fn target_tail(&mut self, list: u16) -> u16 {
        if let Some(tail) = self.target_tails.get(&list) {
            return *tail;
        }
        let rest = self.target_effects.get(list)[1..].to_vec();
        let tail = self.target_list(rest);
        self.target_tails.insert(list, tail);
        tail
    }

    /// The journal with the first effect of `list`, which is an entry.
    pub(super) fn source_write(&mut self, journal: u16, list: u16) -> u16 {
        if let Some(after) = self.source_writes.get(&(journal, list)) {
            return *after;
        }
        let Some(source::Effect::Journal(entry)) = self.source_effects.get(list).first().cloned() else {
            return journal;
        };
        let mut entries = if journal == 0 { Vec::new() } else { self.source_journals.get(journal).clone() };
        if !self.source_repeats(&entries, &entry) {
            entries.push(entry);
        }
        let after = self.source_journals.number(entries);
        self.source_writes.insert((journal, list), after);
        after
    }

    pub(super) fn target_write(&mut self, journal: u16, list: u16) -> u16 {
        if let Some(after) = self.target_writes.get(&(journal, list)) {
            return *after;
        }
        let Some(target::Effect::Journal(entry)) = self.target_effects.get(list).first().cloned() else {
            return journal;
        };
        let mut entries = if journal == 0 { Vec::new() } else { self.target_journals.get(journal).clone() };
        if !self.target_repeats(&entries, &entry) {
            entries.push(entry);
        }
        let after = self.target_journals.number(entries);
        self.target_writes.insert((journal, list), after);
        after
    }

    /// Whether the journal says the same after one more `entry`: the same line again, and recovery can't tell. Without
    /// this a daemon that restarts often writes ever longer journals that mean the same.
    fn source_repeats(&self, entries: &[SourceEntry], entry: &SourceEntry) -> bool {
        let same =
            |a: &SourceEntry| without_reasons(&format!("{a:?}")) == without_reasons(&format!("{entry:?}"));
        if !entries.last().is_some_and(same) {
            return false;
        }
        let longer: Vec<_> = entries.iter().chain([entry]).collect();
        let longest: Vec<_> = longer.iter().copied().chain([entry]).collect();
        let recovered = |entries: &[&SourceEntry]| {
            SOURCE_SEEN.map(|seen| plain(&Source::recover_under(self.rules, entries.iter().copied(), seen)))
        };
        let short: Vec<_> = entries.iter().collect();
        recovered(&short) == recovered(&longer) && recovered(&longer) == recovered(&longest)
    }

    fn target_repeats(&self, entries: &[TargetEntry], entry: &TargetEntry) -> bool {
        let same =
            |a: &TargetEntry| without_reasons(&format!("{a:?}")) == without_reasons(&format!("{entry:?}"));
        if !entries.last().is_some_and(same) {
            return false;
        }
        let longer: Vec<_> = entries.iter().chain([entry]).collect();
        let recovered = |entries: &[&TargetEntry]| {
            TARGET_SEEN.map(|seen| plain(&Target::recover_under(self.rules, entries.iter().copied(), seen)))
        };
        let short: Vec<_> = entries.iter().collect();
        recovered(&short) == recovered(&longer)
    }

    /// A journal without the lines that no recovery tells from their absence, whether or not the hand-over is closed.
    pub(super) fn shorten_source(&mut self, journal: u16) -> u16 {
        if journal == 0 {
            return 0;
        }
        let mut entries = self.source_journals.get(journal).clone();
        let Some(key) = entries.first().map(|e| e.key) else { return journal };
        let recovered = |entries: &[SourceEntry]| {
            let closed = SourceEntry { key, fact: SourceFact::Closed };
            let open = SOURCE_SEEN.map(|seen| plain(&Source::recover_under(self.rules, entries, seen)));
            let with = || entries.iter().chain([&closed]);
            (open, SOURCE_SEEN.map(|seen| plain(&Source::recover_under(self.rules, with(), seen))))
        };
        let facts = |entries: &[SourceEntry]| entries.iter().fold(0, |bits, e| bits | source_bit(&e.fact));
        for at in (1..entries.len()).rev() {
            let mut shorter = entries.clone();
            shorter.remove(at);
            let same_facts = (facts(&shorter) | wrote::FREEZING) == (facts(&entries) | wrote::FREEZING);
            if same_facts && recovered(&shorter) == recovered(&entries) {
                entries = shorter;
            }
        }
        self.source_journals.number(entries)
    }

    pub(super) fn shorten_target(&mut self, journal: u16) -> u16 {
        if journal == 0 {
            return 0;
        }
        let mut entries = self.target_journals.get(journal).clone();
        let Some(key) = entries.first().map(|e| e.key) else { return journal };
        let recovered = |entries: &[TargetEntry]| {
            let closed = TargetEntry { key, fact: TargetFact::Closed };
            let open = TARGET_SEEN.map(|seen| plain(&Target::recover_under(self.rules, entries, seen)));
            let with = || entries.iter().chain([&closed]);
            (open, TARGET_SEEN.map(|seen| plain(&Target::recover_under(self.rules, with(), seen))))
        };
        let facts = |entries: &[TargetEntry]| entries.iter().fold(0, |bits, e| bits | target_bit(&e.fact));
        for at in (1..entries.len()).rev() {
            let mut shorter = entries.clone();
            shorter.remove(at);
            if facts(&shorter) == facts(&entries) && recovered(&shorter) == recovered(&entries) {
                entries = shorter;
            }
        }
        self.target_journals.number(entries)
    }

    /// What a restarted daemon makes of its journal; `None` if there is nothing to recover.
    pub(super) fn recover_source(&mut self, journal: u16, seen: source::QemuSeen) -> Option<(u16, u16)> {
        let entries = (journal != 0).then(|| self.source_journals.get(journal))?;
        let (source, effects) = Source::recover_under(self.rules, entries, seen).ok()?;
        Some((self.sources.number(source), self.source_list(effects)))
    }

    pub(super) fn recover_target(&mut self, journal: u16, seen: target::QemuSeen) -> Option<(u16, u16)> {
        let entries = (journal != 0).then(|| self.target_journals.get(journal))?;
        let (target, effects) = Target::recover_under(self.rules, entries, seen).ok()?;
        Some((self.targets.number(target), self.target_list(effects)))
    }

    /// Whether the nonce is used up according to the target's journal.
    pub(super) fn consumed(&self, attempt: u16, journal: u16) -> bool {
        if journal == 0 {
            return false;
        }
        let entries: Vec<_> = self.target_journals.get(journal).iter().cloned().map(Entry::Target).collect();
        NonceLedger::rebuild(&entries).contains(&self.attempts.get(attempt).nonce)
    }

    /// A ledger as the daemon's memory holds it.
    pub(super) fn ledger(&self, attempt: u16, consumed: bool) -> NonceLedger {
        let attempt = Box::new(self.attempts.get(attempt).clone());
        let entry = Entry::Target(TargetEntry { key: attempt.key, fact: TargetFact::Consumed { attempt } });
        NonceLedger::rebuild(consumed.then_some(&entry))
    }

    /// Bits of [`wrote`].
    pub(super) fn facts(&mut self, journal: u16, source: bool) -> u16 {
        if journal == 0 {
            return 0;
        }
        if let Some(bits) = self.facts.get(&(journal, source)) {
            return *bits;
        }
        let bits = match source {
            true => self.source_journals.get(journal).iter().fold(0, |bits, e| bits | source_bit(&e.fact)),
            false => self.target_journals.get(journal).iter().fold(0, |bits, e| bits | target_bit(&e.fact)),
        };
        self.facts.insert((journal, source), bits);
        bits
    }

    /// Notices that a machine will ignore from here on, whatever else happens to it, by the names of its states;
    /// [`Self::check_dead`] looks whether that is so.
    pub(super) fn dead_notices(&mut self, machine: u16, side: Side) -> u8 {
        if machine == 0 {
            return 0;
        }
        let known = &mut self.dead[usize::from(side == Side::Target)];
        let index = usize::from(machine);
        if known.len() <= index {
            known.resize(index + 1, None);
        }
        if let Some(bits) = known[index] {
            return bits;
        }
        let bits = match side {
            Side::Source => dead_at_source(self.sources.get(machine).state_name()),
            Side::Target => dead_at_target(self.targets.get(machine).state_name()),
        };
        self.dead[usize::from(side == Side::Target)][index] = Some(bits);
        bits
    }

    /// Whether a machine will never touch its QEMU again, as the next attempt's claim asks it.
    pub(super) fn has_let_go(&mut self, machine: u16, side: Side) -> bool {
        if machine == 0 {
            return false;
        }
        if let Some(known) = self.let_go.get(&(machine, side == Side::Source)) {
            return *known;
        }
        let free = match side {
            Side::Source => Claim::new([self.sources.get(machine)], []),
            Side::Target => Claim::new([], [self.targets.get(machine)]),
        };
        self.let_go.insert((machine, side == Side::Source), free.is_some());
        free.is_some()
    }

    /// Whether every notice that was dropped would have been ignored, in every state that any machine was seen in, and
    /// no machine was seen to leave the states in which it is dropped for one in which it is not.
    pub(super) fn check_dead(&mut self) -> Result<usize, String> {
        let attempts: Vec<(u16, usize)> = (1..=self.attempts.len())
            .filter_map(|n| u16::try_from(n).ok())
            .map(|n| (n, lane_of(self.attempts.get(n))))
            .collect();
        let mut checked = 0;
        for side in [Side::Source, Side::Target] {
            let machines = if side == Side::Source { self.sources.len() } else { self.targets.len() };
            for machine in (1..=machines).filter_map(|n| u16::try_from(n).ok()) {
                let dead = self.dead_notices(machine, side);
                for notice in Notice::ALL.into_iter().filter(|n| dead & n.bit() != 0) {
                    for (attempt, lane) in attempts.clone() {
                        let event = self.notice_event(lane, attempt, side, notice);
                        let step = match side {
                            Side::Source => self.source_step(machine, event),
                            Side::Target => self.target_step(machine, event),
                        };
                        if step.machine != machine || step.effects != 0 {
                            return Err(format!("{side} machine {machine} does something on {notice:?}"));
                        }
                        checked += 1;
                    }
                }
            }
            let steps = if side == Side::Source { &self.source_steps } else { &self.target_steps };
            for ((before, _), step) in steps.clone() {
                let (dead, after) = (self.dead_notices(before, side), self.dead_notices(step.machine, side));
                if dead & !after != 0 {
                    return Err(format!(
                        "{side} machine {before} forgets too early, before {}",
                        step.machine
                    ));
                }
            }
        }
        Ok(checked)
    }

    // ---- what comes to them ----

    /// The event that a message is for a source (or a target).
    pub(super) fn message_event(&mut self, attempt: u16, message: Message) -> u16 {
        let to_source = message.is_to_source();
        let memo = (attempt, message as u8, to_source);
        if let Some(event) = self.messages.get(&memo) {
            return *event;
        }
        let of = self.attempts.get(attempt).clone();
        let event = match to_source {
            true => {
                let event = source_event(&of, message);
                self.source_events.number(event)
            }
            false => {
                let event = target_event(&of, message);
                self.target_events.number(event)
            }
        };
        self.messages.insert(memo, event);
        event
    }

    pub(super) fn notice_event(&mut self, lane: usize, attempt: u16, side: Side, notice: Notice) -> u16 {
        let memo = (attempt, notice as u8, side == Side::Source);
        if let Some(event) = self.notices.get(&memo) {
            return *event;
        }
        let event = match side {
            Side::Source => self.source_events.number(source_notice(lane, notice)),
            Side::Target => self.target_events.number(target_notice(lane, notice)),
        };
        self.notices.insert(memo, event);
        event
    }

    // ---- the managers ----

    /// What one transaction on `row` would write for `ask`, which comes from migration `attempt`.
    pub(super) fn transaction(&mut self, row: u16, attempt: u16, ask: Ask) -> Written {
        let memo = (row, attempt, ask.number());
        if let Some(written) = self.written.get(&memo) {
            return *written;
        }
        let event = manager_event(self.attempts.get(attempt), ask);
        let held = self.rows.get(row).clone();
        let written = match decider::decide_under(self.rules, &held, event) {
            Ok(outcome) => Written {
                row: self.rows.number(outcome.row),
                decision: moved(&outcome.decision),
                orders: self.bits(row, &outcome.orders),
                misdelivered: false,
            },
            Err(refusal) => Written {
                row,
                decision: Moved::Keep,
                orders: 0,
                misdelivered: matches!(refusal, ManagerRefusal::WrongKey | ManagerRefusal::NotCovered),
            },
        };
        self.written.insert(memo, written);
        written
    }

    /// What each side must hear while the row stands so.
    pub(super) fn outstanding(&mut self, row: u16) -> u32 {
        if let Some(orders) = self.outstanding.get(&row) {
            return *orders;
        }
        let orders = decider::outstanding_under(self.rules, self.rows.get(row));
        let bits = self.bits(row, &orders);
        self.outstanding.insert(row, bits);
        bits
    }

    /// Orders that do not hold what this migration's messages hold (a mutant's) are never delivered.
    fn bits(&self, row: u16, orders: &[Order]) -> u32 {
        let row = self.rows.get(row);
        let own = evidence(usize::from(row.key.migration.as_bytes()[0]));
        orders.iter().filter_map(|order| order_message(order, own)).fold(0, |bits, m| bits | m.bit())
    }

    /// The names of the states that the machines and the rows were in.
    pub(super) fn seen(&self) -> BTreeSet<String> {
        let sources = self.sources.values.iter().map(|s| format!("source {}", s.state_name()));
        let targets = self.targets.values.iter().map(|t| format!("target {}", t.state_name()));
        let rows = self.rows.values.iter().map(|r| format!("row {}", row_name(r)));
        sources.chain(targets).chain(rows).collect()
    }

    /// The attempt of migration `lane`.
    pub(super) fn attempt(&mut self, lane: usize, from: u8, to: u8, epochs: EpochPair) -> u16 {
        let tag = u8::try_from(lane).unwrap_or(u8::MAX);
        self.attempts.number(Attempt {
            key: HandoverKey {
                migration: MigrationId::from_bytes([tag; 16]),
                vm: VmId::from_bytes([9; 16]),
                source_epoch: epochs.source,
                target_epoch: epochs.target,
            },
            permit: Digest([tag; 32]),
            nonce: Nonce::from_bytes([tag; 16]),
            source: host_name(from),
            target: host_name(to),
            target_journal: Nonce::from_bytes([100 + to; 16]),
            run_budget_ms: 6_000,
        })
    }
}

/// See [`Tables::dead_notices`].
fn dead_at_source(name: &str) -> u8 {
    use Notice::{ChannelLost, EndOfStream, GuestResumed, GuestStopped, MigrationFailed, QemuDied};
    let dead: &[Notice] = match name {
        "stopping" => &[GuestStopped],
        "freezing" | "proving" => &[GuestStopped, EndOfStream],
        "voted" | "asking" => &[GuestStopped, EndOfStream, ChannelLost],
        "thawed" | "cancelling" | "releasing" | "voted-lost" => {
            &[GuestStopped, EndOfStream, ChannelLost, GuestResumed, MigrationFailed]
        }
        "released" | "lost" | "closed" => {
            &[GuestStopped, EndOfStream, ChannelLost, GuestResumed, MigrationFailed, QemuDied]
        }
        _ => &[],
    };
    dead.iter().fold(0, |bits, n| bits | n.bit())
}

/// See [`Tables::dead_notices`].
fn dead_at_target(name: &str) -> u8 {
    use Notice::{ChannelLost, QemuDied, StreamAccepted, StreamRejected};
    let dead: &[Notice] = match name {
        "accepted" => &[StreamAccepted],
        "voted" | "starting" | "cont-sent" | "starting-again" | "renouncing" => {
            &[StreamAccepted, StreamRejected, ChannelLost]
        }
        "running" | "renounced" | "lost" | "closed" => {
            &[StreamAccepted, StreamRejected, ChannelLost, QemuDied]
        }
        _ => &[],
    };
    dead.iter().fold(0, |bits, n| bits | n.bit())
}

const SOURCE_SEEN: [source::QemuSeen; 4] = [
    source::QemuSeen::Frozen,
    source::QemuSeen::Running,
    source::QemuSeen::Dead,
    source::QemuSeen::Superseded,
];
const TARGET_SEEN: [target::QemuSeen; 4] = [
    target::QemuSeen::Paused,
    target::QemuSeen::Running,
    target::QemuSeen::Dead,
    target::QemuSeen::Superseded,
];

fn plain(value: &impl Debug) -> String {
    without_reasons(&format!("{value:?}"))
}

fn misdelivered(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Refused(Refusal::WrongKey | Refusal::NotCovered))
}

fn source_bit(fact: &SourceFact) -> u16 {
    match fact {
        SourceFact::Opened { .. } => wrote::OPENED,
        SourceFact::Freezing => wrote::FREEZING,
        SourceFact::NoVote { .. } | SourceFact::Declined { .. } | SourceFact::Lost => wrote::NO_VOTE,
        SourceFact::Frozen { .. } => wrote::FROZEN,
        SourceFact::Asked { .. } => wrote::ASKED,
        SourceFact::RenunciationAccepted { .. }
        | SourceFact::FenceAccepted { resolution: Resolution::Thaw } => wrote::FREED,
        SourceFact::Releasing | SourceFact::FenceAccepted { resolution: Resolution::Discard } => {
            wrote::KILLING
        }
        SourceFact::Released => wrote::RELEASED,
        SourceFact::Closed => 0,
    }
}

fn target_bit(fact: &TargetFact) -> u16 {
    match fact {
        TargetFact::Consumed { .. } => wrote::CONSUMED,
        TargetFact::Voted { .. } => wrote::VOTED,
        TargetFact::Run { .. } => wrote::RUN,
        TargetFact::Renounced { .. } => wrote::RENOUNCED,
        TargetFact::Prepared { .. } | TargetFact::Lost | TargetFact::Closed => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::handover::AbortReason;
    use types::{Epoch, ErrorCode};

    #[test]
    fn values_differ_by_everything_but_reasons() {
        let mut pool = Pool::default();
        let key = Attempt::clone;
        let mut tables = Tables::new(Rules::ALL);
        let epochs = EpochPair { source: Epoch(2), target: Epoch(3) };
        let attempt = tables.attempt(0, 0, 1, epochs);
        let of = key(tables.attempts.get(attempt));
        let no_vote = |detail: &str| {
            let reason = AbortReason { code: ErrorCode::Terminated, detail: detail.to_owned() };
            SourceEntry { key: of.key, fact: SourceFact::NoVote { reason } }
        };
        let one = pool.number(no_vote("one"));
        assert_eq!(pool.number(no_vote("another")), one);
        assert_ne!(pool.number(SourceEntry { key: of.key, fact: SourceFact::Closed }), one);
        assert_eq!(pool.len(), 2);
    }
}
