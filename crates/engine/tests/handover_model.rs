//! The hand-over in a model checker: every state within a bound, not a sample. `docs/model.md` says what is explored.
//!
//! The bound of one migration and two faults runs in the project's own explorer (with liveness) and, state for state,
//! in stateright; each rule removed once must give a counter-example.
#![allow(clippy::unwrap_used)]

use outrider_engine::handover::Rule;
use outrider_engine::handover::model::{Action, Config, Exploration, Model, Mutant, State, explore, mutants};
use stateright::{Checker, Model as _, Property};
use std::collections::BTreeSet;
use std::time::Instant;

/// More states than any bound here has: past it the model grew, and someone must look why.
const STATES_LIMIT: u64 = 12_000_000;
/// What the test of the two faults may take of memory.
const MEMORY_LIMIT_KIB: u64 = 4 << 20;

/// The greatest size that this process ever had, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn explored(model: &Model) -> Exploration {
    let begun = Instant::now();
    let found = explore(model, &[], STATES_LIMIT);
    if let Some((invariant, trace)) = &found.broken {
        panic!("{invariant:?} is broken:\n{}", trace.text);
    }
    println!(
        "{} states, {} steps, depth {}, {} fair runs, {:.1} s, peak {} MiB",
        found.states,
        found.steps,
        found.depth,
        found.fair_runs,
        begun.elapsed().as_secs_f64(),
        peak_kib() / 1024
    );
    assert_eq!(found.unsound, None);
    assert!(found.complete, "more than {STATES_LIMIT} states");
    found
}

/// One migration, three hosts, two managers, and any two of: a daemon, a QEMU, a host or the managers die, `cont` or
/// the freezer refuses, the registry is set back.
#[test]
fn one_migration_with_two_faults() {
    let model = Model::new(Config::one(2));
    let found = explored(&model);
    assert!(found.states > 1_000_000 && found.fair_runs > 50_000, "{found:?}");
    assert!(peak_kib() < MEMORY_LIMIT_KIB);
    let every = "source streaming, source suspended, source stopping, source freezing, source proving, source voted, \
                 source asking, source voted-lost, source thawed, source cancelling, source releasing, source released, \
                 source lost, source closed, target preparing, target receiving, target accepted, target voted, \
                 target starting, target cont-sent, target starting-again, target running, target renouncing, \
                 target renounced, target lost, target closed, row open, row committed, row running, row completed, \
                 row voided, row discarded";
    let every: BTreeSet<String> = every.split(", ").map(|n| n.trim().to_owned()).collect();
    let missing: Vec<_> = every.difference(&model.seen()).cloned().collect();
    assert!(missing.is_empty(), "never reached: {missing:?}");
}

const HOLDS: &str = "no invariant is broken";

/// The same model for stateright, which knows nothing of the explorer.
struct Right(Model);

impl stateright::Model for Right {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.0.first()]
    }
    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.0.actions(state, actions);
    }
    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        Some(self.0.next(state, action)).filter(|next| next != state)
    }
    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always(HOLDS, |right: &Self, state| right.0.broken(state).is_none())]
    }
}

/// Another checker finds the same states, no more and no fewer, and nothing broken in them either.
#[test]
fn stateright_agrees() {
    let ours = explored(&Model::new(Config::one(1)));
    let begun = Instant::now();
    let checker = Right(Model::new(Config::one(1))).checker().threads(1).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("stateright: {states} states, depth {depth}, {:.1} s", begun.elapsed().as_secs_f64());
    assert!(checker.discovery(HOLDS).is_none(), "stateright finds a broken invariant");
    // It counts the first state as a step.
    let ours = (ours.states, u64::from(ours.depth) + 1);
    assert_eq!(ours, (u64::try_from(states).unwrap(), u64::try_from(depth).unwrap()));
}

/// And it finds a counter-example where there is one (not the shortest: it keeps the last of a block of states).
#[test]
fn stateright_finds_the_missing_freeze() {
    let mutant = mutant("no-freeze");
    let config = Config { liveness: false, ..mutant.config };
    let checker = Right(Model::new(config)).checker().threads(1).spawn_bfs().join();
    let path = checker.discovery(HOLDS).unwrap().into_actions();
    let model = Model::new(config);
    println!("{}", model.explain(&path).text);
    let (_, ours) = explore(&model, &[], STATES_LIMIT).broken.unwrap();
    assert!(path.len() >= ours.actions.len());
}

// ---- mutants ----

fn mutant(name: &str) -> Mutant {
    mutants().into_iter().find(|m| m.name == name).unwrap()
}

/// Removes what the mutant removes; the shortest way to the damage is printed.
fn breaks(name: &str) {
    let mutant = mutant(name);
    let found = explore(&Model::new(mutant.config), mutant.wanted, STATES_LIMIT);
    let Some((invariant, trace)) = found.broken else {
        panic!("{name}: none of {:?} breaks in {} states", mutant.wanted, found.states)
    };
    println!(
        "{name}: {invariant:?} in {} steps, {} states seen\n{}",
        trace.actions.len(),
        found.states,
        trace.text
    );
    assert!(mutant.wanted.contains(&invariant));
}

macro_rules! mutants {
    ($($name:ident => $mutant:literal;)*) => {
        $(#[test] fn $name() { breaks($mutant); })*

        #[test]
        fn every_mutant_is_tested_and_every_rule_has_one() {
            let names: Vec<_> = mutants().iter().map(|m| m.name).collect();
            assert_eq!([$($mutant),*].as_slice(), names.as_slice());
            let rules: Vec<_> = mutants().iter().filter_map(|m| m.rule).collect();
            assert_eq!(rules.as_slice(), Rule::ALL.as_slice());
        }
    };
}

mutants! {
    h1_no_proof_after_the_freeze => "h1-no-proof-after-the-freeze";
    h2_source_killed_on_commit => "h2-source-killed-on-commit";
    h3_not_run_taken_for_proof => "h3-not-run-taken-for-proof";
    h4_signed_before_journalled => "h4-signed-before-journalled";
    h5_renunciation_of_another_attempt => "h5-renunciation-of-another-attempt";
    h6_orders_at_least => "h6-orders-at-least";
    h7_target_renounces_on_its_timer => "h7-target-renounces-on-its-timer";
    h8_thawed_copy_killed_as_a_breach => "h8-thawed-copy-killed-as-a-breach";
    h9_refused_cont_keeps_run => "h9-refused-cont-keeps-run";
    h10_void_without_proof => "h10-void-without-proof";
    target_without_s => "target-without-s";
    no_freeze => "no-freeze";
    proof_before_the_freeze => "proof-before-the-freeze";
    receipts_of_other_attempts => "receipts-of-other-attempts";
    commit_not_durable => "commit-not-durable";
    nonce_not_durable => "nonce-not-durable";
    vote_not_durable => "vote-not-durable";
    renunciation_over_a_living_qemu => "renunciation-over-a-living-qemu";
    cont_while_inmigrate => "cont-while-inmigrate";
    stop_while_suspended_ignored => "stop-while-suspended-ignored";
    no_watchdog => "no-watchdog";
    paused_manager_writes_blindly => "paused-manager-writes-blindly";
    permit_taken_by_the_third_host => "permit-taken-by-the-third-host";
}
