//! What happens, for those who watch: a bounded broadcast. A slow watcher is told that it missed events and let go;
//! nobody waits for it.

use api::http::MigrationEvent;
use tokio::sync::broadcast;

/// Events that a watcher may lag behind: a few seconds of a busy fleet.
const BACKLOG_EVENTS: usize = 1_024;

/// The feed.
pub(crate) struct Feed {
    sender: broadcast::Sender<MigrationEvent>,
}

impl Feed {
    pub(crate) fn new() -> Self {
        Self { sender: broadcast::channel(BACKLOG_EVENTS).0 }
    }

    /// Tells whoever watches.
    pub(crate) fn publish(&self, event: MigrationEvent) {
        // An error means only that nobody watches.
        drop(self.sender.send(event));
    }

    /// From now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<MigrationEvent> {
        self.sender.subscribe()
    }
}
