//! A counter-example as people read it.

use super::messages::row_name;
use super::state::{Action, Qemu, Run, State, flag, mark, qemu};
use super::table::Tables;
use super::{Model, settle};
use std::fmt::Write;

/// The way to a broken invariant.
#[derive(Debug, Clone)]
pub struct Trace {
    /// The steps.
    pub actions: Vec<Action>,
    /// One line for each, and what it came to.
    pub text: String,
}

impl Model {
    /// Walks `actions` again and writes down what happens.
    #[must_use]
    pub fn explain(&self, actions: &[Action]) -> Trace {
        let mut tables = self.tables();
        let mut state = Run::first(&self.config, &mut tables);
        let mut text = format!("  0  {}\n", describe(&tables, &state));
        let mut detail = "";
        for (n, action) in (1..).zip(actions) {
            let mut run = Run::new(&self.config, &mut tables, state);
            run.act(*action);
            (state, detail) = (run.state, run.detail);
            let after = describe(&tables, &state);
            // A `String` takes whatever is written.
            writeln!(text, "{n:>3}  {:<44} {after}", format!("{action:?}")).ok();
        }
        let broken = match state.violation() {
            Some(invariant) => Some((invariant, detail)),
            None if self.config.liveness => settle::broken(&self.config, &mut tables, &state),
            None => None,
        };
        if let Some((invariant, detail)) = broken {
            writeln!(text, "     {invariant:?}: {detail}").ok();
        }
        Trace { actions: actions.to_vec(), text }
    }
}

/// See [`Model::stand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stand {
    /// The state of the source's machine; empty without one.
    pub source: &'static str,
    /// The state of the target's machine; empty without one.
    pub target: &'static str,
    /// The manager's row.
    pub row: &'static str,
    /// Whether the row has ended.
    pub ended: bool,
    /// Hosts on which a copy runs.
    pub runs_on: Vec<u8>,
    /// Hosts on which a copy ever ran.
    pub ran_on: Vec<u8>,
    /// Nothing waits to be done by either machine.
    pub idle: bool,
}

pub(super) fn stand(tables: &Tables, state: &State) -> Stand {
    let l = &state.lanes[0];
    let row = tables.rows.get(l.row);
    let source = (l.source.machine != 0).then(|| tables.sources.get(l.source.machine).state_name());
    let target = (l.target.machine != 0).then(|| tables.targets.get(l.target.machine).state_name());
    let hosts = |holds: fn(&Qemu) -> bool| {
        // The first QEMU is on the source's host, the second on the target's.
        let hosts = [l.from, l.to];
        hosts.into_iter().zip(&state.qemus).filter(|(_, q)| holds(q)).map(|(h, _)| h).collect()
    };
    Stand {
        source: source.unwrap_or_default(),
        target: target.unwrap_or_default(),
        row: row_name(row),
        ended: row.is_final(),
        runs_on: hosts(Qemu::executes),
        ran_on: hosts(|q| q.has(qemu::EXECUTED)),
        idle: l.source.idle() && l.target.idle(),
    }
}

/// Where everybody stands.
fn describe(tables: &Tables, state: &State) -> String {
    let mut out = String::new();
    for (n, l) in state.lanes.iter().enumerate().filter(|(_, l)| l.attempt != 0) {
        let source = match l.source.machine {
            0 => "-",
            machine => tables.sources.get(machine).state_name(),
        };
        let target = match l.target.machine {
            0 => "-",
            machine => tables.targets.get(machine).state_name(),
        };
        let row = row_name(tables.rows.get(l.row));
        let channel = match (l.has(flag::SOURCE_AGENT), l.has(flag::TARGET_AGENT)) {
            (true, true) => "=",
            (false, false) => " ",
            _ => "~",
        };
        write!(out, "[m{n} source {source}{channel}target {target}, row {row}] ").ok();
    }
    for (n, q) in state.qemus.iter().enumerate().filter(|(_, q)| q.has(qemu::ALIVE)) {
        write!(out, "q{n}@{} {} ", ["a", "b", "c"][usize::from(q.host)], stands(q)).ok();
    }
    let down: String = (0..3).filter(|h| state.down & 1 << h != 0).map(|h| ["a", "b", "c"][h]).collect();
    if !down.is_empty() {
        write!(out, "down: {down} ").ok();
    }
    if state.is(mark::NO_MANAGER) {
        out.push_str("no manager ");
    }
    if state.is(mark::DISCARDED) {
        out.push_str("the VM restarts from its disk ");
    }
    out
}

fn stands(q: &Qemu) -> &'static str {
    match (q.executes(), q.has(qemu::FROZEN)) {
        (true, _) => "RUNS",
        (_, true) => "frozen",
        _ => "stopped",
    }
}
