//! `migrate VM --to HOST`: asks, watches, reports.

use super::{DETACHED, DONE, Outcome, now};
use crate::args::{Format, Migrate};
use crate::client::{Client, ClientError};
use crate::output::{self, gates, progress::Progress, report};
use crate::watch::{Followed, follow};
use api::http::{Migrate as Intent, MigrateAccepted};
use std::time::{SystemTime, UNIX_EPOCH};
use types::{MigrationId, Nonce};

pub(super) async fn run(args: Migrate, format: Format) -> Outcome {
    let client = Client::new(&args.connection)?;
    if args.dry_run {
        let explanation = client.explain(&intent(&args)?).await?;
        output::print(format, &explanation, gates::explanation);
        return Ok(gates::exit_code(&explanation));
    }
    let asked = client.migrate(&intent(&args)?).await;
    if asked.as_ref().is_err_and(ClientError::may_have_arrived) {
        output::note(&format!("It may have been accepted: outrider migration list --vm {}", args.vm));
    }
    let accepted = asked?;
    if args.detach {
        output::print(format, &accepted, |accepted, _| detached_text(accepted));
        return Ok(DONE);
    }
    watch(&client, accepted.id, format).await
}

/// Follows a migration and prints its report; shared with `migration watch`.
pub(super) async fn watch(client: &Client, id: MigrationId, format: Format) -> Outcome {
    let mut progress = Progress::new();
    let followed = follow(client, id, &mut progress).await;
    progress.finish();
    match followed {
        Ok(Followed::Ended(view)) => {
            output::print(format, &*view, |view, width| report::render(view, now(), width));
            Ok(report::exit_code(&view))
        }
        Ok(Followed::Detached) => {
            output::note(&how_to_go_on(id));
            Ok(DETACHED)
        }
        Err(error) => {
            output::note(&how_to_go_on(id));
            Err(error.into())
        }
    }
}

fn detached_text(accepted: &MigrateAccepted) -> String {
    format!("{}\n{}\n", accepted.id, how_to_go_on(accepted.id))
}

fn how_to_go_on(id: MigrationId) -> String {
    let short = output::lists::short(id);
    format!(
        "The migration goes on without this command.\n  follow it:  outrider migration watch {short}\n  \
         stop it:    outrider migration terminate {short}"
    )
}

/// The nonce and the time stamp make a captured request useless.
fn intent(args: &Migrate) -> Result<Intent, crate::error::Error> {
    let mut nonce = [0; 16];
    random(&mut nonce).map_err(|source| crate::error::Error::Start { act: "draw a random nonce", source })?;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Intent {
        vm: args.vm.clone(),
        target: args.to.clone(),
        source: args.from.clone(),
        channels: args.channels,
        compression: args.compression.map(|method| method.name().to_owned()),
        plan: args.plan,
        nonce: Nonce::from_bytes(nonce),
        timestamp_unix_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
    })
}

fn random(out: &mut [u8]) -> std::io::Result<()> {
    let mut filled = 0;
    while filled < out.len() {
        filled += rustix::rand::getrandom(&mut out[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}
