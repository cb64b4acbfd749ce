//! What waits to be sent to the manager. It outlives a connection: what happened while the manager was away is told
//! when it is back. Bounded; progress is dropped first.

use api::fleet::{ToManager, to_manager::Body};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Messages that wait at most: an hour without a manager, with a few migrations that end meanwhile.
const WAITING_MAX: usize = 2048;

/// The queue.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<VecDeque<ToManager>>,
    wake: Notify,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, VecDeque<ToManager>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message. When full, the oldest progress goes, or else the oldest message: hand-over machines repeat
    /// what matters.
    pub fn push(&self, body: Body) {
        let mut waiting = self.lock();
        if waiting.len() >= WAITING_MAX {
            let index = waiting.iter().position(is_progress).unwrap_or(0);
            waiting.remove(index);
        }
        waiting.push_back(ToManager { body: Some(body) });
        drop(waiting);
        self.wake.notify_one();
    }

    /// The next message, when there is one.
    pub async fn next(&self) -> ToManager {
        loop {
            if let Some(message) = self.lock().pop_front() {
                return message;
            }
            self.wake.notified().await;
        }
    }

    /// Puts a message back that could not be sent.
    pub fn put_back(&self, message: ToManager) {
        self.lock().push_front(message);
    }

    /// Forgets replies: the connection that asked is gone, and ids begin anew.
    pub fn forget_replies(&self) {
        self.lock().retain(|m| !matches!(m.body, Some(Body::Reply(_))));
    }
}

fn is_progress(message: &ToManager) -> bool {
    matches!(&message.body, Some(Body::Event(event)) if event.kind == "progress")
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::fleet::{MigrationEvent, SignedStatement};

    #[tokio::test]
    async fn progress_is_dropped_first_and_order_is_kept() {
        let outbox = Outbox::default();
        let event = |kind: &str| Body::Event(MigrationEvent { kind: kind.to_owned(), ..Default::default() });
        outbox.push(Body::Statement(SignedStatement { token: vec![1] }));
        for _ in 0..WAITING_MAX + 50 {
            outbox.push(event("progress"));
        }
        outbox.push(event("frozen"));
        assert_eq!(outbox.lock().len(), WAITING_MAX);
        assert!(matches!(outbox.next().await.body, Some(Body::Statement(_))));
        let mut last = None;
        while !outbox.lock().is_empty() {
            last = outbox.next().await.body;
        }
        assert!(matches!(last, Some(Body::Event(e)) if e.kind == "frozen"));
    }
}
