//! `audit verify`, `audit list`.

use super::{DONE, NEGATIVE, Outcome};
use crate::args::{AuditCommand, Format, ListAudit, VerifyAudit};
use crate::client::Client;
use crate::output::{self, lists};

pub(super) async fn run(command: AuditCommand, format: Format) -> Outcome {
    match command {
        AuditCommand::Verify(args) => verify(args, format).await,
        AuditCommand::List(args) => list(args, format).await,
    }
}

async fn verify(args: VerifyAudit, format: Format) -> Outcome {
    let verdict = Client::new(&args.connection)?.verify_audit().await?;
    output::print(format, &verdict, lists::verdict);
    Ok(if verdict.verified { DONE } else { NEGATIVE })
}

async fn list(args: ListAudit, format: Format) -> Outcome {
    let entries = Client::new(&args.connection)?.audit(args.limit).await?;
    output::print(format, &entries, |entries, width| lists::audit(entries, width));
    Ok(DONE)
}
