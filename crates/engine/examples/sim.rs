//! Runs many seeds of the hand-over's simulation, or replays one.
//!
//! `cargo run -p outrider-engine --release --example sim -- --seeds 1000000 [--from 0]`
//! `cargo run -p outrider-engine --release --example sim -- --pairs 1` (every pair of faults; a larger number skips)
//! `OUTRIDER_SIM_SEED=42 cargo run -p outrider-engine --example sim`, or `-- --seed 42`

use outrider_engine::handover::sim::{self, Options, plan::Plan};
use std::time::Instant;

fn main() -> std::process::ExitCode {
    let mut seeds = 100_000;
    let mut from = 0;
    let mut replay = std::env::var("OUTRIDER_SIM_SEED").ok().and_then(|text| text.parse().ok());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let number = words.next().and_then(|text| text.parse::<u64>().ok());
        match (word.as_str(), number) {
            ("--seeds", Some(n)) => seeds = n,
            ("--from", Some(n)) => from = n,
            ("--seed", Some(n)) => replay = Some(n),
            ("--pairs", Some(n)) => return pairs(usize::try_from(n).unwrap_or(1)),
            _ => {
                eprintln!("usage: sim [--seeds N] [--from N] [--seed N] [--pairs STRIDE]");
                return 2.into();
            }
        }
    }
    match replay {
        Some(seed) => show(seed),
        None => sweep(from, seeds),
    }
}

/// Replays one seed with its log.
fn show(seed: u64) -> std::process::ExitCode {
    let plan = Plan::from_seed(seed);
    let report = sim::run(&plan, Options { log: true, ..Options::default() });
    println!("{plan:?}");
    println!("{}", report.log.join("\n"));
    println!(
        "{} steps, {} completed, {} kept, lost: {}",
        report.steps, report.completed, report.kept, report.lost
    );
    match report.violation {
        None => 0.into(),
        Some(violation) => {
            println!("{violation:?}");
            1.into()
        }
    }
}

/// Runs many on every core.
fn sweep(from: u64, seeds: u64) -> std::process::ExitCode {
    let started = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let failures: Vec<u64> = std::thread::scope(|scope| {
        let run = |thread| {
            let fails = |seed: &u64| sim::run_seed(*seed, Options::default()).violation.is_some();
            (from + thread..from + seeds).step_by(usize::try_from(threads).unwrap_or(1)).find(fails)
        };
        let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok().flatten()).collect()
    });
    if let Some(seed) = failures.iter().min() {
        println!("{}", sim::explain(&Plan::from_seed(*seed), Options::default()));
        println!("seed {seed} fails");
        return 1.into();
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{seeds} seeds, no violation, {seconds:.1} s, {:.0} seeds/s", seeds as f64 / seconds);
    println!(r#"{{"seeds": {seeds}, "violations": 0}}"#);
    0.into()
}

/// Every placement of two faults over the steps of one migration.
fn pairs(stride: usize) -> std::process::ExitCode {
    let started = Instant::now();
    let mut plans = 0_u64;
    for plan in Plan::systematic(true, stride) {
        plans += 1;
        if sim::run(&plan, Options::default()).violation.is_some() {
            println!("{}", sim::explain(&plan, Options::default()));
            return 1.into();
        }
    }
    println!("{plans} placements of two faults, no violation, {:.1} s", started.elapsed().as_secs_f64());
    0.into()
}
