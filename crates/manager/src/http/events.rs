//! Server-sent events: everything, or one migration with what happened before.

use super::problem::Failure;
use super::{App, Caller};
use crate::clock;
use crate::migration::handover;
use crate::policy::Action;
use api::http::MigrationEvent;
use axum::extract::{Path, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::stream::{self, Stream, StreamExt};
use registry::EventRow;
use serde_json::json;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use types::{ErrorCode, MigrationId, Problem};

/// Comments that keep proxies from closing a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

pub(super) async fn all(
    State(app): State<App>,
    caller: Caller,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    caller.may(&app, Action::View)?;
    if caller.is_of_some_tenants() {
        let detail = "this stream tells of all tenants' migrations, and the token is for some tenants";
        return Err(Problem::new(ErrorCode::Forbidden, detail)
            .hint("follow one migration: /v1/migrations/{id}/events")
            .into());
    }
    let live = live(app.manager.feed.subscribe(), None);
    Ok(serve(&app, caller, live))
}

pub(super) async fn of_migration(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    caller.may(&app, Action::View)?;
    let id: MigrationId = id
        .parse()
        .map_err(|e: types::id::MalformedId| Problem::new(ErrorCode::UnknownMigration, e.to_string()))?;
    // Subscribed before the past is read: what happens in between is told twice rather than never.
    let receiver = app.manager.feed.subscribe();
    let mut tx = app.manager.registry.read("events").await?;
    let row = tx.migration(id).await?.ok_or_else(|| handover::unknown(id))?;
    if !tx.vm(row.vm).await?.is_some_and(|vm| caller.sees(&app, &vm.spec)) {
        return Err(handover::unknown(id).into());
    }
    let past = tx.events(id).await?;
    drop(tx);
    let told = past.into_iter().map(move |row| document(&past_event(id, row)));
    Ok(serve(&app, caller, stream::iter(told).chain(live(receiver, Some(id)))))
}

fn past_event(migration: MigrationId, row: EventRow) -> MigrationEvent {
    let mut detail = row.detail;
    if let serde_json::Value::Object(map) = &mut detail {
        map.insert("host".to_owned(), json!(row.host));
    }
    MigrationEvent { migration, at: clock::rfc3339(row.at_us), kind: row.kind, detail }
}

fn serve<S>(
    app: &App,
    caller: Caller,
    events: S,
) -> Sse<impl Stream<Item = Result<Event, Infallible>> + use<S>>
where
    S: Stream<Item = Event> + Send + 'static,
{
    let end = app.manager.shutdown.clone().cancelled_owned();
    let revoked = Box::pin(caller.until_revoked(app.clone()));
    let events = events.take_until(futures::future::select(Box::pin(end), revoked)).map(Ok);
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

fn document(event: &MigrationEvent) -> Event {
    let data = serde_json::to_string(event).unwrap_or_else(|_| "{}".to_owned());
    Event::default().event("migration").data(data)
}

/// From now on. Who is too slow hears how much it missed, and is let go: it asks again and gets the past.
fn live(receiver: Receiver<MigrationEvent>, only: Option<MigrationId>) -> impl Stream<Item = Event> {
    stream::unfold(Some(receiver), move |receiver| async move {
        let mut receiver = receiver?;
        loop {
            match receiver.recv().await {
                Ok(event) if only.is_none_or(|id| id == event.migration) => {
                    return Some((document(&event), Some(receiver)));
                }
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => {
                    let data = json!({ "missed": missed }).to_string();
                    return Some((Event::default().event("lagged").data(data), None));
                }
                Err(RecvError::Closed) => return None,
            }
        }
    })
}
