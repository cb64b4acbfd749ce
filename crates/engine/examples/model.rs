//! Explores the hand-over's model, or shows what a mutant breaks.
//!
//! `cargo run -p outrider-engine --release --example model` (two migrations, one fault: what the evidence records)
//! `cargo run -p outrider-engine --release --example model -- --migrations 1 --faults 2`
//! `cargo run -p outrider-engine --release --example model -- --mutant h1` (every mutant whose name holds the word)

use outrider_engine::handover::model::{Config, Kinds, Model, explore, mutants};
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "usage: model [--migrations 1|2] [--faults N] [--states LIMIT] [--mutant WORD]";
/// Some 40 bytes each. A run that is given fewer is a share, and need not come to the end.
const STATES_LIMIT: u64 = 100_000_000;

fn main() -> ExitCode {
    let (mut migrations, mut faults, mut limit) = (2, 1, STATES_LIMIT);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_default();
        let number = value.parse::<u64>().ok();
        match (word.as_str(), number) {
            ("--migrations", Some(n @ (1 | 2))) => migrations = n,
            ("--faults", Some(n @ 0..=9)) => faults = u8::try_from(n).unwrap_or(0),
            ("--states", Some(n)) => limit = n,
            // Nothing is drawn at random: every run is the same. `cargo xtask evidence` gives one to each kind.
            ("--seed", Some(_)) => {}
            ("--mutant", _) => return show(&value),
            _ => {
                eprintln!("{USAGE}");
                return 2.into();
            }
        }
    }
    let config = match migrations {
        // A registry that is set back is explored with one migration: it is the newest row that it forgets.
        2 => Config { kinds: Kinds { restores: false, ..Kinds::ALL }, ..Config::two(faults) },
        _ => Config::one(faults),
    };
    run(&Model::new(config), limit)
}

fn run(model: &Model, limit: u64) -> ExitCode {
    let begun = Instant::now();
    let found = explore(model, &[], limit);
    let seconds = begun.elapsed().as_secs_f64();
    if let Some((invariant, trace)) = &found.broken {
        println!("{invariant:?} is broken:\n{}", trace.text);
    }
    if let Some(wrong) = &found.unsound {
        println!("a reduction is unsound: {wrong}");
    }
    let config = model.config();
    println!(
        "{} migrations, {} faults: {} states, depth {}, {seconds:.1} s, complete: {}",
        config.migrations, config.faults, found.states, found.depth, found.complete
    );
    let violations = u8::from(found.broken.is_some());
    println!(
        r#"{{"migrations": {}, "faults": {}, "states": {}, "steps": {}, "depth": {}, "fair_runs": {}, "seconds": {seconds:.0}, "complete": {}, "violations": {violations}}}"#,
        config.migrations,
        config.faults,
        found.states,
        found.steps,
        found.depth,
        found.fair_runs,
        found.complete
    );
    let unfinished = !found.complete && limit >= STATES_LIMIT;
    u8::from(unfinished || found.broken.is_some() || found.unsound.is_some()).into()
}

/// The shortest counter-example of each mutant.
fn show(word: &str) -> ExitCode {
    let mut missed = 0_u8;
    for mutant in mutants().into_iter().filter(|m| m.name.contains(word)) {
        match explore(&Model::new(mutant.config), mutant.wanted, STATES_LIMIT).broken {
            Some((invariant, trace)) => println!("{}: {invariant:?}\n{}", mutant.name, trace.text),
            None => {
                missed += 1;
                println!("{}: nothing breaks", mutant.name);
            }
        }
    }
    missed.min(1).into()
}
