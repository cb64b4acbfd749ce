//! `migration list`, `show`, `watch`, `suspend`, `resume`, `terminate`.

use super::{DONE, Outcome, now};
use crate::args::{Connection, Format, ListMigrations, MigrationCommand, OneMigration};
use crate::client::{Client, Order};
use crate::error::Error;
use crate::migration_ref::{VmMeans, resolve};
use crate::output::{self, lists, report};
use types::migration::MigrationView;
use types::{MigrationId, Side};

pub(super) async fn run(command: MigrationCommand, format: Format) -> Outcome {
    match command {
        MigrationCommand::List(args) => list(args, format).await,
        MigrationCommand::Show(args) => {
            let (client, id) = find(&args.connection, &args.id, VmMeans::OpenOrLast).await?;
            show(&client, id, format).await
        }
        MigrationCommand::Watch(args) => {
            let (client, id) = find(&args.connection, &args.id, VmMeans::Open).await?;
            super::migrate::watch(&client, id, format).await
        }
        MigrationCommand::Suspend(args) => order(&args, Order::Suspend, format).await,
        MigrationCommand::Resume(args) => order(&args, Order::Resume, format).await,
        MigrationCommand::Terminate(args) => order(&args, Order::Terminate, format).await,
        MigrationCommand::Resolve(args) => {
            let (client, id) = find(&args.connection, &args.id, VmMeans::Open).await?;
            let fenced = if args.target_fenced { Side::Target } else { Side::Source };
            shown(&client.resolve(id, fenced).await?, format)
        }
    }
}

async fn list(args: ListMigrations, format: Format) -> Outcome {
    let mut list = Client::new(&args.connection)?.migrations().await?;
    list.retain(|m| !(args.open && m.state.is_final()) && args.vm.as_ref().is_none_or(|vm| *vm == m.vm));
    list.sort_by(|a, b| b.requested_at.cmp(&a.requested_at));
    output::print(format, &list, |list, width| lists::migrations(list, now(), width));
    Ok(DONE)
}

async fn show(client: &Client, id: MigrationId, format: Format) -> Outcome {
    shown(&client.migration(id).await?, format)
}

fn shown(view: &MigrationView, format: Format) -> Outcome {
    output::print(format, view, |view, width| report::render(view, now(), width));
    Ok(DONE)
}

/// Gives the order; the answer shows what became of it.
async fn order(args: &OneMigration, order: Order, format: Format) -> Outcome {
    let (client, id) = find(&args.connection, &args.id, VmMeans::Open).await?;
    shown(&client.order(id, order).await?, format)
}

/// A whole id needs no look-up.
async fn find(connection: &Connection, text: &str, vm: VmMeans) -> Result<(Client, MigrationId), Error> {
    let client = Client::new(connection)?;
    if let Ok(id) = text.parse() {
        return Ok((client, id));
    }
    let known = client.migrations().await?;
    let id = resolve(text, &known, vm)?;
    Ok((client, id))
}
