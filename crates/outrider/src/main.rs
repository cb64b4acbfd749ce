//! The `outrider` command: reads the command line and configuration, talks to the control manager or starts a
//! daemon, and prints. It decides nothing.
//!
//! Architecture invariant: what a person or a script sees (words, tables, JSON, exit codes) is made here; what
//! is true comes from the manager, the host daemon or the machine.

mod args;
mod client;
mod commands;
mod config;
mod doctor;
mod error;
mod inspect;
mod migration_ref;
mod output;
mod size;
mod watch;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let format = cli.output;
    match commands::run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::failure::print(&error, format);
            ExitCode::from(error.exit_code())
        }
    }
}
