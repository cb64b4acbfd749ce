//! `host add`, `host list`, `host show`.

use super::{DONE, Outcome, now};
use crate::args::{Format, HostAdd, ListHosts, ShowHost};
use crate::client::Client;
use crate::output::{self, lists};
use api::http::HostAdded;
use types::host::{Capacity, HostSpec};

pub(super) async fn add(args: HostAdd, format: Format) -> Outcome {
    let client = Client::new(&args.connection)?;
    let spec = HostSpec {
        name: args.name,
        control_address: args.control_address,
        migration_address: args.migration_address,
        macs: args.macs.iter().map(|mac| mac.to_ascii_lowercase()).collect(),
        capacity: Capacity { memory_bytes: args.memory, vcpus: args.vcpus, vms: args.vms },
        zone: args.zone,
    };
    let added = client.add_host(&spec).await?;
    output::print(format, &added, |added, _| added_text(added));
    Ok(DONE)
}

/// The token is the point, alone on its line so that it can be copied whole.
fn added_text(added: &HostAdded) -> String {
    format!(
        "{name} is enrolled. On {name}, as root, run:\n\n  outrider host join {token}\n\n\
         The token works once and is not shown again.\n",
        name = added.host.name,
        token = output::text::clean(&added.join_token),
    )
}

pub(super) async fn list(args: ListHosts, format: Format) -> Outcome {
    let hosts = Client::new(&args.connection)?.hosts().await?;
    output::print(format, &hosts, |hosts, width| lists::hosts(hosts, now(), width));
    Ok(DONE)
}

pub(super) async fn show(args: ShowHost, format: Format) -> Outcome {
    let host = Client::new(&args.connection)?.host(&args.name).await?;
    output::print(format, &host, |host, width| lists::host(host, now(), width));
    Ok(DONE)
}
