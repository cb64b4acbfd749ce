//! A hundred thousand seeded runs of the hand-over; none may break an invariant.

use outrider_engine::handover::sim::{self, Options, plan::Plan};

const SEEDS_PER_TEST: u64 = 25_000;

/// What a block of seeds went through, so that a simulation that stopped simulating is noticed.
#[derive(Debug, Default)]
struct Seen {
    completed: u64,
    kept: u64,
    lost: u64,
    steps: u64,
}

fn runs(block: u64) {
    let mut seen = Seen::default();
    for seed in block * SEEDS_PER_TEST..(block + 1) * SEEDS_PER_TEST {
        let plan = Plan::from_seed(seed);
        let report = sim::run(&plan, Options::default());
        assert!(report.violation.is_none(), "{}", sim::explain(&plan, Options::default()));
        seen.completed += u64::from(report.completed);
        seen.kept += u64::from(report.kept);
        seen.lost += u64::from(report.lost);
        seen.steps += report.steps;
    }
    println!("{seen:?}");
    let share = |n: u64| n * 100 / SEEDS_PER_TEST;
    assert!(share(seen.completed) > 50, "too few migrations complete: {seen:?}");
    assert!(share(seen.kept) > 15, "too few migrations are given up: {seen:?}");
    assert!(share(seen.lost) < 20, "too many runs excuse themselves: {seen:?}");
    assert!(seen.steps / SEEDS_PER_TEST > 80, "runs are too short: {seen:?}");
}

#[test]
fn seeds_from_0() {
    runs(0);
}

#[test]
fn seeds_from_25000() {
    runs(1);
}

#[test]
fn seeds_from_50000() {
    runs(2);
}

#[test]
fn seeds_from_75000() {
    runs(3);
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..200 {
        let options = Options { log: true, ..Options::default() };
        let (first, second) = (sim::run_seed(seed, options), sim::run_seed(seed, options));
        assert_eq!(first.log, second.log, "seed {seed}");
        assert!(first.log.len() > 10, "seed {seed} logs nothing");
    }
}

/// `OUTRIDER_SIM_SEED=42 cargo nextest run -p outrider-engine replay --no-capture`
#[test]
fn replay() {
    let seed = std::env::var("OUTRIDER_SIM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    let report = sim::run_seed(seed, Options { log: true, ..Options::default() });
    println!("{}", report.log.join("\n"));
    assert_eq!(report.violation, None, "seed {seed}");
}

/// Every single fault at every step of a migration, and a spread of the pairs (`--example sim -- --pairs 1` runs all).
#[test]
fn every_fault_at_every_step() {
    let mut plans = 0;
    for plan in Plan::systematic(true, 97) {
        let report = sim::run(&plan, Options::default());
        assert!(report.violation.is_none(), "{}", sim::explain(&plan, Options::default()));
        plans += 1;
    }
    assert!(plans > 30_000, "only {plans} plans");
}
