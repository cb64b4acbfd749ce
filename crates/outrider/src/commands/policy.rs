//! `policy check`, `policy test`: policies without a manager; `policy apply`, `policy show`, `policy history`.

use super::{DONE, NEGATIVE, Outcome, read_input};
use crate::args::{CheckPolicy, Format, PolicyCommand, TestPolicy};
use crate::client::Client;
use crate::config::{MAX_FILE_BYTES, explain};
use crate::error::{Error, InputError};
use crate::output::{self, policies};
use api::http::PolicyContent;
use manager::policy_table::{self, Table};
use std::collections::BTreeMap;
use std::path::Path;

/// What needs a manager.
pub(super) async fn run(command: PolicyCommand, format: Format) -> Outcome {
    match command {
        PolicyCommand::Check(args) => check(&args, format),
        PolicyCommand::Test(args) => test(&args, format),
        PolicyCommand::Apply(args) => {
            let client = Client::new(&args.connection)?;
            let applied = match (&args.folder, &args.digest) {
                (Some(folder), _) => client.apply_policy(&content(folder, args.expect.as_deref())?).await?,
                (None, digest) => client.roll_back_policy(digest.clone().unwrap_or_default()).await?,
            };
            output::print(format, &applied, policies::set);
            Ok(DONE)
        }
        PolicyCommand::Show(args) => {
            let set = Client::new(&args.connection)?.policy().await?;
            output::print(format, &set, policies::set);
            Ok(DONE)
        }
        PolicyCommand::History(args) => {
            let sets = Client::new(&args.connection)?.policy_history().await?;
            output::print(format, &sets, |sets, width| policies::history(sets, width));
            Ok(DONE)
        }
    }
}

/// A folder as it is sent. It is validated here first, so that a slip costs no request.
fn content(folder: &Path, expect: Option<&Path>) -> Result<PolicyContent, Error> {
    policy_table::check(Some(folder)).map_err(Error::Daemon)?;
    let read = |source| InputError::Read { path: folder.to_owned(), source };
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.ends_with(".cedar") || name == "zones.toml" {
            files.insert(name, read_input(&path, MAX_FILE_BYTES)?);
        }
    }
    let expectations = expect.map(|table| read_input(table, MAX_FILE_BYTES)).transpose()?;
    Ok(PolicyContent { files, expectations })
}

pub(super) fn check(args: &CheckPolicy, format: Format) -> Outcome {
    let list = policy_table::check(args.folder.as_deref()).map_err(Error::Daemon)?;
    output::print(format, &list, |list, width| policies::list(list, width));
    Ok(DONE)
}

pub(super) fn test(args: &TestPolicy, format: Format) -> Outcome {
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
