//! `policy check`, `policy test`: policies without a manager.

use super::{DONE, NEGATIVE, Outcome, read_input};
use crate::args::{CheckPolicy, Format, PolicyCommand, TestPolicy};
use crate::config::{MAX_FILE_BYTES, explain};
use crate::error::{Error, InputError};
use crate::output::{self, policies};
use manager::policy_table::{self, Table};
use std::path::Path;

pub(super) fn run(command: &PolicyCommand, format: Format) -> Outcome {
    match command {
        PolicyCommand::Check(args) => check(args, format),
        PolicyCommand::Test(args) => test(args, format),
    }
}

fn check(args: &CheckPolicy, format: Format) -> Outcome {
    let list = policy_table::check(args.folder.as_deref()).map_err(Error::Daemon)?;
    output::print(format, &list, |list, width| policies::list(list, width));
    Ok(DONE)
}

fn test(args: &TestPolicy, format: Format) -> Outcome {
    let table = read_table(&args.table)?;
    let report = policy_table::test(args.policy.as_deref(), &table).map_err(Error::Daemon)?;
    output::print(format, &report, policies::report);
    Ok(if report.failed == 0 { DONE } else { NEGATIVE })
}

fn read_table(file: &Path) -> Result<Table, InputError> {
    let text = read_input(file, MAX_FILE_BYTES)?;
    let name = if file == Path::new("-") { "standard input".to_owned() } else { file.display().to_string() };
    toml::from_str(&text).map_err(|error| {
        let (place, reason) = explain(&name, &text, &error);
        InputError::Malformed { place, reason }
    })
}
