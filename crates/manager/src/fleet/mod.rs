//! The hosts that are connected now.

mod inbound;
mod join;
mod service;
mod session;

pub(crate) use service::{FleetService, HostConnection};
pub(crate) use session::{Session, order_text};

use crate::clock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use types::host::{Interface, Load};
use types::{ErrorCode, HostName, Problem, VmId};

/// Every live session, at most one per host.
#[derive(Default)]
pub(crate) struct Fleet {
    sessions: Mutex<BTreeMap<HostName, Arc<Session>>>,
}

/// What a live session says, for views.
pub(crate) struct Live {
    pub(crate) load: Option<Load>,
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) last_seen_us: i64,
}

impl Fleet {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostName, Arc<Session>>> {
        self.sessions.lock().expect("no holder of this lock can panic: it only moves values in a map")
    }

    /// Puts a session in; the one that it replaces is ended.
    pub(crate) fn enter(&self, session: Arc<Session>) {
        let old = self.lock().insert(session.host.clone(), session);
        if let Some(old) = old {
            old.close();
        }
    }

    /// Takes a session out, unless a newer one took its place. Returns whether it was there.
    pub(crate) fn leave(&self, session: &Arc<Session>) -> bool {
        let mut sessions = self.lock();
        let current = sessions.get(&session.host).is_some_and(|s| Arc::ptr_eq(s, session));
        if current {
            sessions.remove(&session.host);
        }
        current
    }

    /// The session of a host.
    pub(crate) fn session(&self, host: &HostName) -> Option<Arc<Session>> {
        self.lock().get(host).filter(|s| !s.is_silent(clock::now_us())).cloned()
    }

    /// The session of a host that must be there.
    pub(crate) fn require(&self, host: &HostName) -> Result<Arc<Session>, Problem> {
        self.session(host).ok_or_else(|| {
            Problem::new(ErrorCode::HostUnreachable, format!("host {host} is not connected to the manager"))
                .hint("is its daemon running (`outrider host run`), and can it reach the manager?")
        })
    }

    /// What a host's session says, when it has one.
    pub(crate) fn live(&self, host: &HostName) -> Option<Live> {
        self.session(host).map(|s| Live {
            load: s.load(),
            interfaces: s.interfaces.clone(),
            last_seen_us: s.last_seen_us(),
        })
    }

    /// Whether a session is the one that its host has now.
    pub(crate) fn is_current(&self, session: &Arc<Session>) -> bool {
        self.lock().get(&session.host).is_some_and(|s| Arc::ptr_eq(s, session))
    }

    /// A host other than this one that says that it holds a copy of a VM.
    pub(crate) fn holder_beside(&self, vm: VmId, host: &HostName) -> Option<HostName> {
        self.lock().values().find(|s| s.host != *host && s.is_holding(vm)).map(|s| s.host.clone())
    }

    /// Names of the hosts that are connected.
    pub(crate) fn connected(&self) -> Vec<HostName> {
        self.lock().keys().cloned().collect()
    }

    /// Every session that is heard.
    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        let now_us = clock::now_us();
        self.lock().values().filter(|s| !s.is_silent(now_us)).cloned().collect()
    }

    /// Ends every session.
    pub(crate) fn close_all(&self) {
        for session in self.lock().values() {
            session.close();
        }
    }
}
