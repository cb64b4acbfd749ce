//! The hand-over for a model checker: the production machines in a world whose every next step can be listed.
//!
//! [`super::sim`] samples long runs; this explores *every* run within a bound. Nothing of the protocol is written
//! twice: [`super::source`], [`super::target`], [`super::decider`] and [`super::journal::NonceLedger`] decide, and
//! what stands here is what surrounds them: QEMU, VM agents, network, crashes, operator, transactions.
//!
//! `docs/model.md` says what is explored, with which reductions and why they are sound, and how to read a
//! counter-example. In short:
//! - **Network**: a message once sent may arrive never, once or any number of times, at any later moment and in any
//!   order ([`state::Lane::net`] only grows). Loss and duplication are not counted, they are always there.
//! - **Time**: a timer that is set may fire at once. Limits of the manager are over at any moment.
//! - **Faults** are counted ([`Config::faults`]): daemons, QEMUs, hosts and the manager die between any two effects.
//! - **Managers**: transactions of any of them, one at a time; one may be paused between reading and writing.
//! - **Liveness**: from every state that is reached, with everything in flight lost, a fair run without further
//!   faults must end well ([`settle`]).

mod daemon;
mod explain;
mod explore;
mod manager;
mod messages;
mod mutants;
mod settle;
mod state;
mod table;
mod world;

pub use explain::{Stand, Trace};
pub use explore::{Exploration, explore};
pub use mutants::{Mutant, mutants};
pub use state::{Action, Ask, Message, Notice, State, Stir};

use super::Rules;
use super::sim::Invariant;
use state::Run;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use table::Tables;

/// What is explored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Migrations of the VM, one after the other (1 or 2).
    pub migrations: u8,
    /// Deaths and failures in all, of any kind in [`Kinds`].
    pub faults: u8,
    /// Which of them.
    pub kinds: Kinds,
    /// A manager may be paused between reading a row and writing it, while the other goes on.
    pub pausing: bool,
    /// The channel may be cut and the guard may fire at any time; off where a mutant needs only a deep, narrow search.
    pub cuts: bool,
    /// The operator may end, suspend and resume at any time.
    pub operator: bool,
    /// Look at liveness too.
    pub liveness: bool,
    /// Check the invariants about journals; off where a mutant is to do harm first.
    pub check_journal: bool,
    /// The rules in force.
    pub rules: Rules,
    /// What the surroundings get wrong on purpose.
    pub shell: Shell,
}

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds {
    /// A daemon dies with its agents, and restarts.
    pub daemons: bool,
    /// A QEMU dies.
    pub qemus: bool,
    /// A host dies for ever, and the operator says so some time.
    pub hosts: bool,
    /// Every manager is gone for ever.
    pub managers: bool,
    /// The target's QEMU refuses `cont`, or the freezer fails.
    pub refusals: bool,
    /// The registry is set back to an earlier state of the row.
    pub restores: bool,
}

impl Kinds {
    /// All of them.
    pub const ALL: Self =
        Self { daemons: true, qemus: true, hosts: true, managers: true, refusals: true, restores: true };
    /// None of them.
    pub const NONE: Self = Self {
        daemons: false,
        qemus: false,
        hosts: false,
        managers: false,
        refusals: false,
        restores: false,
    };
}

/// A duty of the shells that is left undone, to see that the model sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shell {
    /// Every duty is done.
    Sound,
    /// A paused manager writes what it decided without comparing the row.
    BlindWrite,
    /// A daemon takes a permit that names another host.
    PermitForAnyHost,
}

impl Config {
    /// One migration with every kind of fault.
    #[must_use]
    pub const fn one(faults: u8) -> Self {
        Self {
            migrations: 1,
            faults,
            kinds: Kinds::ALL,
            pausing: true,
            cuts: true,
            operator: true,
            liveness: true,
            check_journal: true,
            rules: Rules::ALL,
            shell: Shell::Sound,
        }
    }

    /// Two migrations of one VM: on to a third host, back, or once more to the same.
    #[must_use]
    pub const fn two(faults: u8) -> Self {
        Self { migrations: 2, pausing: false, ..Self::one(faults) }
    }
}

/// The model: lists what can happen next, and does it. Results of the machines are remembered, so that each is asked
/// the same question once.
#[derive(Debug)]
pub struct Model {
    config: Config,
    tables: Mutex<Tables>,
}

impl Model {
    /// A model of `config`.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config, tables: Mutex::new(Tables::new(config.rules)) }
    }

    /// What is explored.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The VM runs on host 0 and the permit for a move to host 1 was just granted.
    #[must_use]
    pub fn first(&self) -> State {
        Run::first(&self.config, &mut self.tables())
    }

    /// What can happen next, in a fixed order. Nothing once an invariant is broken.
    pub fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        Run::new(&self.config, &mut self.tables(), *state).list(actions);
    }

    /// The state after `action`.
    #[must_use]
    pub fn next(&self, state: &State, action: Action) -> State {
        let mut tables = self.tables();
        let mut run = Run::new(&self.config, &mut tables, *state);
        run.act(action);
        run.state
    }

    /// The invariant that `state` breaks, if it does: of safety, then of liveness.
    #[must_use]
    pub fn broken(&self, state: &State) -> Option<Invariant> {
        if state.violation().is_some() || !self.config.liveness {
            return state.violation();
        }
        settle::broken(&self.config, &mut self.tables(), state).map(|(invariant, _)| invariant)
    }

    /// Where a fair run without further faults comes to rest; messages in `cut` (bits of [`Message::bit`]) never arrive.
    #[must_use]
    pub fn rest(&self, state: &State, cut: u32) -> State {
        settle::rest(&self.config, &mut self.tables(), state, cut)
    }

    /// Where everybody stands in the first migration.
    #[must_use]
    pub fn stand(&self, state: &State) -> Stand {
        explain::stand(&self.tables(), state)
    }

    /// States of machines and rows that were seen, so that an exploration that explores nothing is noticed.
    #[must_use]
    pub fn seen(&self) -> BTreeSet<String> {
        self.tables().seen()
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
