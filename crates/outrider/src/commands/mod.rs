//! One module per noun. Each returns the exit code of its outcome, or the error that ended it.

mod audit;
mod backup;
mod daemon;
mod host;
mod migrate;
mod migration;
mod plan;
mod policy;
mod reference;
mod token;
mod vm;

use crate::args::{Cli, Command, HostCommand, ManagerCommand, PolicyCommand};
use crate::doctor;
use crate::error::{Error, InputError};
use clap::CommandFactory;
use jiff::Timestamp;
use std::io::Read;
use std::path::Path;

/// What a command ends with.
pub(crate) type Outcome = Result<u8, Error>;

/// Done.
const DONE: u8 = 0;
/// A check answered no.
const NEGATIVE: u8 = 1;
/// Detached with Ctrl-C, as shells count it.
const DETACHED: u8 = 130;

/// Runs a command.
pub(crate) fn run(cli: Cli) -> Outcome {
    let format = cli.output;
    match cli.command {
        Command::Manager(ManagerCommand::Run(args)) => daemon::run_manager(&args),
        Command::Host(HostCommand::Run(args)) => daemon::run_host(&args),
        Command::Host(HostCommand::Join(args)) => daemon::join(&args, format),
        Command::Host(HostCommand::Add(args)) => ask(host::add(args, format)),
        Command::Host(HostCommand::List(args)) => ask(host::list(args, format)),
        Command::Host(HostCommand::Show(args)) => ask(host::show(args, format)),
        Command::Host(HostCommand::Attest(args)) => ask(host::attest(args, format)),
        Command::Host(HostCommand::Ek(args)) => daemon::ek(&args, format),
        Command::Vm(command) => ask(vm::run(command, format)),
        Command::Migrate(args) => ask(migrate::run(args, format)),
        Command::Migration(command) => ask(migration::run(command, format)),
        Command::Audit(command) => ask(audit::run(command, format)),
        Command::Backup(args) => backup::back_up(&args, format),
        Command::Restore(args) => backup::restore(&args, format),
        Command::Token(command) => ask(token::run(command, format)),
        Command::Reference(command) => ask(reference::run(command, format)),
        Command::Policy(PolicyCommand::Check(args)) => policy::check(&args, format),
        Command::Policy(PolicyCommand::Test(args)) => policy::test(&args, format),
        Command::Policy(command) => ask(policy::run(command, format)),
        Command::Plan(command) => ask(plan::run(command, format)),
        Command::Inspect(args) => crate::inspect::run(&args, format),
        Command::Doctor(args) => ask(doctor::run(args, format)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "outrider", &mut std::io::stdout());
            Ok(DONE)
        }
    }
}

/// Runs a command that asks the manager: one thread is plenty.
fn ask(work: impl Future<Output = Outcome>) -> Outcome {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { act: "start the asynchronous runtime", source })?
        .block_on(work)
}

/// A file that the operator named, or standard input for `-`.
pub(crate) fn read_input(path: &Path, limit_bytes: u64) -> Result<String, InputError> {
    let read = |source| InputError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(read)?)
    };
    source.take(limit_bytes + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > limit_bytes {
        return Err(InputError::TooLarge { path: path.to_owned(), limit_bytes });
    }
    Ok(text)
}

fn now() -> Timestamp {
    Timestamp::now()
}
