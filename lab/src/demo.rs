//! The demo: one real migration with everything switched on, and every claim about it checked from outside.
//!
//! ```text
//! journey   lays the lab, enrols, starts, migrates, tears down  →  Evidence
//! evidence  judges the evidence claim by claim, writes JSON and the readable report
//! sabotage  really breaks one thing at a time, so that tests can see each claim fail
//! ```

mod evidence;
mod journey;
mod sabotage;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, ValueEnum};

pub use evidence::Evidence;
pub use sabotage::Sabotage;

/// Exit code when the demo can't run here, or ran and a claim did not hold.
const FAILED: u8 = 4;

/// Live-migrate a real guest from host-a to host-b, and check every claim about it.
#[derive(Debug, Clone, Parser)]
#[command(name = "demo")]
pub struct Options {
    /// A readable report, or one JSON document.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Guest memory, in MiB.
    #[arg(long, default_value_t = 256)]
    memory_mib: u64,
    /// Really break something, to see the claim fail (for tests; may be repeated).
    #[arg(long, value_enum, hide = true)]
    sabotage: Vec<Sabotage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

/// Runs the demo.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let options =
        match Options::try_parse_from(std::iter::once("demo".to_owned()).chain(arguments.iter().cloned())) {
            Ok(options) => options,
            Err(error) => error.exit(),
        };
    if let Some(reason) = crate::require::missing() {
        eprintln!("The demo cannot run here: {reason}.");
        return Ok(ExitCode::from(FAILED));
    }
    let say = Narrator { start: Instant::now() };
    let evidence = journey::travel(&options, &say)?;
    let claims = evidence.claims();
    let failed = claims.iter().filter(|claim| !claim.holds).count();
    match options.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&evidence.document(&claims))?),
        Output::Table => println!("{}", evidence.report(&claims)),
    }
    for claim in claims.iter().filter(|claim| !claim.holds) {
        eprintln!("NOT TRUE: {} ({})", claim.says, claim.seen);
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// Tells the person in front of the terminal what is going on (on standard error, so that JSON stays alone).
struct Narrator {
    start: Instant,
}

impl Narrator {
    fn say(&self, text: &str) {
        eprintln!("[{:5.1} s] {text}", self.start.elapsed().as_secs_f64());
    }
}
