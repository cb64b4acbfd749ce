//! `backup`, `restore`.

use super::daemon::registry_config;
use super::{DONE, Outcome, ask};
use crate::args::{Backup, Format, Restore};
use crate::error::Error;
use crate::output;
use manager::backup;

pub(super) fn back_up(args: &Backup, format: Format) -> Outcome {
    let config = registry_config(&args.registry)?;
    ask(async {
        let made = backup::back_up(&config, &args.to).await.map_err(Error::Daemon)?;
        output::print(format, &made, |made, _| {
            format!(
                "{}: {} bytes, {} audit entries. It holds no keys: see `outrider backup --help`\n",
                made.file.display(),
                made.bytes,
                made.header.audit_entries
            )
        });
        Ok(DONE)
    })
}

pub(super) fn restore(args: &Restore, format: Format) -> Outcome {
    let config = registry_config(&args.registry)?;
    ask(async {
        let restored = backup::restore(&config, &args.from).await.map_err(Error::Daemon)?;
        output::print(format, &restored, |restored, _| {
            let kept = restored.kept.as_ref();
            let kept =
                kept.map(|k| format!("The registry that was there is {}\n", k.display())).unwrap_or_default();
            format!(
                "restored, with {} audit entries\n{kept}Next: outrider manager run, wait for the hosts, then outrider \
                 audit reconcile. Until then nothing new is decided.\n",
                restored.header.audit_entries
            )
        });
        Ok(DONE)
    })
}
