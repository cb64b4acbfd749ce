//! Follows a migration to its end. The view is the truth; events only say when to look again and move the
//! counters, so a lost event or a manager that restarts costs nothing but a moment.

use crate::client::{Client, ClientError, EventStream};
use crate::output::progress::Progress;
use api::http::MigrationEvent;
use std::time::{Duration, Instant};
use types::MigrationId;
use types::migration::{MigrationState, MigrationView};

/// The view is fetched this often even when no event comes.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// After an event that may have changed the state, others of the same step are awaited so long.
const SETTLE: Duration = Duration::from_millis(20);
/// A manager that restarts during a migration is given so long; the migration itself needs it only to decide.
const OUTAGE_LIMIT: Duration = Duration::from_secs(60);

/// How following ended.
#[derive(Debug)]
pub(crate) enum Followed {
    /// The migration is over, or only an operator can go on.
    Ended(Box<MigrationView>),
    /// Ctrl-C: the migration goes on.
    Detached,
}

/// Follows `id` until it ends or the operator presses Ctrl-C.
pub(crate) async fn follow(
    client: &Client,
    id: MigrationId,
    progress: &mut Progress,
) -> Result<Followed, ClientError> {
    let detach = tokio::signal::ctrl_c();
    tokio::select! {
        view = until_end(client, id, progress) => view.map(|v| Followed::Ended(Box::new(v))),
        _ = detach => Ok(Followed::Detached),
    }
}

async fn until_end(
    client: &Client,
    id: MigrationId,
    progress: &mut Progress,
) -> Result<MigrationView, ClientError> {
    let mut outage = Outage::default();
    let mut events = None;
    loop {
        // The stream is opened before the view is read: what happens in between is in one of them.
        if events.is_none() {
            events = client.migration_events(id).await.ok();
        }
        if let Some(view) = outage.bridge(client.migration(id).await, progress)? {
            progress.view(&view, Instant::now());
            if view.state.is_final() || view.state == MigrationState::NeedsOperator {
                return Ok(view);
            }
        }
        wait_for_news(&mut events, progress).await;
    }
}

/// Waits until it is worth looking again: an event that is more than counters, the end of the stream, or time.
async fn wait_for_news(events: &mut Option<EventStream>, progress: &mut Progress) {
    let look_again = tokio::time::sleep(LOOK_EVERY);
    tokio::pin!(look_again);
    while let Some(stream) = events {
        tokio::select! {
            () = &mut look_again => return,
            event = stream.next() => match event {
                Ok(Some(event)) => match serde_json::from_str::<MigrationEvent>(&event.data) {
                    Ok(event) if event.kind == "progress" => progress.counters(&event.detail, Instant::now()),
                    // The stream begins with what happened already: one look serves all of it.
                    _ => {
                        let soon = (tokio::time::Instant::now() + SETTLE).min(look_again.deadline());
                        look_again.as_mut().reset(soon);
                    }
                },
                Ok(None) | Err(_) => *events = None,
            }
        }
    }
    look_again.await;
}

/// A time without answers.
#[derive(Debug, Default)]
struct Outage {
    since: Option<Instant>,
}

impl Outage {
    /// `None` while the manager does not answer and may come back.
    fn bridge(
        &mut self,
        answer: Result<MigrationView, ClientError>,
        progress: &Progress,
    ) -> Result<Option<MigrationView>, ClientError> {
        match answer {
            Ok(view) => {
                if self.since.take().is_some() {
                    progress.note("the manager answers again");
                }
                Ok(Some(view))
            }
            Err(error) if error.is_unreachable() => {
                if self.since.is_none() {
                    progress.note("the manager does not answer; waiting for it (Ctrl-C to stop watching)");
                }
                let since = *self.since.get_or_insert_with(Instant::now);
                if since.elapsed() < OUTAGE_LIMIT { Ok(None) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }
}
