//! `audit verify`, `audit list`, `audit export`.

use super::{DONE, NEGATIVE, Outcome};
use crate::args::{AuditCommand, BundleAudit, ExportAudit, Format, ListAudit, ReconcileAudit, VerifyAudit};
use crate::client::{Client, ClientError, next_page};
use crate::error::{Error, InputError};
use crate::migration_ref::{VmMeans, resolve};
use crate::output::{self, lists, reconciliation};
use api::http::{AuditEntry, Reconcile};
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

pub(super) async fn run(command: AuditCommand, format: Format) -> Outcome {
    match command {
        AuditCommand::Verify(args) => verify(args, format).await,
        AuditCommand::List(args) => list(args, format).await,
        AuditCommand::Export(args) => export(args).await,
        AuditCommand::Bundle(args) => bundle(args).await,
        AuditCommand::Reconcile(args) => reconcile(args, format).await,
    }
}

async fn verify(args: VerifyAudit, format: Format) -> Outcome {
    if let Some(file) = &args.bundle {
        let text = super::read_input(file, manager::bundle::BUNDLE_BYTES_MAX)?;
        let verdict = manager::bundle::verify(text.as_bytes(), &args.key);
        output::print(format, &verdict, lists::bundle_verdict);
        return Ok(if verdict.verified { DONE } else { NEGATIVE });
    }
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

async fn bundle(args: BundleAudit) -> Outcome {
    let client = Client::new(&args.connection)?;
    let id = match args.id.parse() {
        Ok(id) => id,
        Err(_) => resolve(&args.id, &client.migrations().await?, VmMeans::OpenOrLast)?,
    };
    let text = manager::bundle::to_text(&client.bundle(id).await?).map_err(Error::Daemon)?;
    let Some(path) = &args.output_file else {
        return match std::io::stdout().write_all(&text) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(InputError::Write { path: PathBuf::from("standard output"), source: error }.into())
            }
            _ => Ok(DONE),
        };
    };
    let failed = |source| InputError::Write { path: path.clone(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(folder).map_err(failed)?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist_noclobber(path).map_err(|error| failed(error.error))?;
    Ok(DONE)
}

async fn reconcile(args: ReconcileAudit, format: Format) -> Outcome {
    let order = Reconcile { lost: args.lost, accept: args.accept };
    let answer = Client::new(&args.connection)?.reconcile(&order).await?;
    output::print(format, &answer, reconciliation::show);
    Ok(if answer.accepted || answer.blocking.is_empty() { DONE } else { NEGATIVE })
}

/// One entry a line, whatever the format asked for.
async fn export(args: ExportAudit) -> Outcome {
    let client = Client::new(&args.connection)?;
    let Some(path) = &args.out else {
        let mut out = BufWriter::new(std::io::stdout().lock());
        return match write_log(&client, args.after, &mut out).await? {
            // A reader that went away (`| head`) has seen what it wanted.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(InputError::Write { path: PathBuf::from("standard output"), source: error }.into())
            }
            _ => Ok(DONE),
        };
    };
    let failed = |source| InputError::Write { path: path.clone(), source };
    if path.exists() {
        return Err(failed(ErrorKind::AlreadyExists.into()).into());
    }
    // A part of a log would be taken for a whole, shorter one: the name is there once everything is.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(folder).map_err(failed)?;
    write_log(&client, args.after, &mut BufWriter::new(&mut file)).await?.map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist_noclobber(path).map_err(|error| failed(error.error))?;
    Ok(DONE)
}

/// Page by page: the log may be longer than memory.
async fn write_log(
    client: &Client,
    after: u64,
    out: &mut impl Write,
) -> Result<std::io::Result<()>, ClientError> {
    let mut after = Some(after);
    while let Some(from) = after {
        let page = client.audit_page(from).await?;
        if let Err(error) = write_lines(out, &page) {
            return Ok(Err(error));
        }
        after = next_page(&page, from);
    }
    Ok(Ok(()))
}

fn write_lines(out: &mut impl Write, page: &[AuditEntry]) -> std::io::Result<()> {
    for entry in page {
        serde_json::to_writer(&mut *out, entry)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
