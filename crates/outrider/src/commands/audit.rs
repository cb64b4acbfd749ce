//! `audit verify`, `audit list`, `audit export`.

use super::{DONE, NEGATIVE, Outcome};
use crate::args::{AuditCommand, ExportAudit, Format, ListAudit, VerifyAudit};
use crate::client::{Client, next_page};
use crate::error::{Error, InputError};
use crate::output::{self, lists};
use api::http::AuditEntry;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::PathBuf;

pub(super) async fn run(command: AuditCommand, format: Format) -> Outcome {
    match command {
        AuditCommand::Verify(args) => verify(args, format).await,
        AuditCommand::List(args) => list(args, format).await,
        AuditCommand::Export(args) => export(args).await,
    }
}

async fn verify(args: VerifyAudit, format: Format) -> Outcome {
    let verdict = match &args.file {
        Some(file) => {
            let read = |source| InputError::Read { path: file.clone(), source };
            manager::audit_file::verify(File::open(file).map_err(read)?).map_err(Error::Daemon)?
        }
        None => Client::new(&args.connection)?.verify_audit().await?,
    };
    output::print(format, &verdict, lists::verdict);
    Ok(if verdict.verified { DONE } else { NEGATIVE })
}

async fn list(args: ListAudit, format: Format) -> Outcome {
    let entries = Client::new(&args.connection)?.audit(args.limit).await?;
    output::print(format, &entries, |entries, width| lists::audit(entries, width));
    Ok(DONE)
}

/// One entry a line, whatever the format asked for. Page by page: the log may be longer than memory.
async fn export(args: ExportAudit) -> Outcome {
    let client = Client::new(&args.connection)?;
    let name = args.out.clone().unwrap_or_else(|| PathBuf::from("standard output"));
    let failed = |source| InputError::Write { path: name.clone(), source };
    let mut out: Box<dyn Write> = match &args.out {
        Some(path) => Box::new(BufWriter::new(File::create_new(path).map_err(failed)?)),
        None => Box::new(BufWriter::new(std::io::stdout().lock())),
    };
    let mut after = Some(args.after);
    while let Some(from) = after {
        let page = client.audit_page(from).await?;
        match write_lines(&mut out, &page) {
            // A reader that went away (`| head`) has seen what it wanted.
            Err(error) if error.kind() == ErrorKind::BrokenPipe && args.out.is_none() => return Ok(DONE),
            written => written.map_err(failed)?,
        }
        after = next_page(&page, from);
    }
    Ok(DONE)
}

fn write_lines(out: &mut impl Write, page: &[AuditEntry]) -> std::io::Result<()> {
    for entry in page {
        serde_json::to_writer(&mut *out, entry)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
