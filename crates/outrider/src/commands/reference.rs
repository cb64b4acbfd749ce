//! `reference list`, `show`, `set`, `allow`, `record`.

use super::{DONE, Outcome, read_input};
use crate::args::{Format, ReferenceCommand};
use crate::client::Client;
use crate::error::InputError;
use crate::output::{self, platforms};
use api::http::{AllowValue, RecordReference, ReferenceView};

/// 24 registers with 512 events each stay below.
const DOCUMENT_LIMIT_BYTES: u64 = 4 << 20;

pub(super) async fn run(command: ReferenceCommand, format: Format) -> Outcome {
    let changed = match command {
        ReferenceCommand::List(args) => {
            let all = Client::new(&args.connection)?.references().await?;
            output::print(format, &all, |all, width| platforms::references(all, width));
            return Ok(DONE);
        }
        ReferenceCommand::Show(args) => {
            let found = Client::new(&args.connection)?.reference(&args.scope.0).await?;
            // The document itself, in either format: it is what `set` reads.
            output::print_json(&found.values);
            return Ok(DONE);
        }
        ReferenceCommand::Remove(args) => {
            let left = Client::new(&args.connection)?.remove_reference(&args.scope.0).await?;
            output::print(format, &left, |left, width| platforms::references(left, width));
            return Ok(DONE);
        }
        ReferenceCommand::Set(args) => {
            let text = read_input(&args.file, DOCUMENT_LIMIT_BYTES)?;
            let values = serde_json::from_str(&text).map_err(|e| InputError::Malformed {
                place: args.file.display().to_string(),
                reason: e.to_string(),
            })?;
            Client::new(&args.connection)?.set_reference(&args.scope.0, &values).await?
        }
        ReferenceCommand::Allow(args) => {
            let second = |at: Option<jiff::Timestamp>| at.and_then(|at| u64::try_from(at.as_second()).ok());
            let order = AllowValue {
                pcr: args.pcr,
                digest: args.digest.to_ascii_lowercase(),
                note: args.note.unwrap_or_default(),
                not_before_unix_s: second(args.not_before),
                not_after_unix_s: second(args.not_after),
            };
            Client::new(&args.connection)?.allow_value(&args.scope.0, &order).await?
        }
        ReferenceCommand::Record(args) => {
            let order = RecordReference { pcrs: args.pcrs, class: args.class };
            Client::new(&args.connection)?.record_reference(&args.host, &order).await?
        }
    };
    output::print(format, &changed, |changed: &ReferenceView, _| {
        format!("{} is measured against {} from now on.\n", changed.scope, changed.digest)
    });
    Ok(DONE)
}
