//! The shell around the hand-over's machines: one task per migration and side.
//!
//! The machines of `engine::handover` decide; a shell feeds them what happens and executes their effects, strictly
//! one after the other, the journal first. Freeze, thaw, cont, kill and commit happen here, and only because a
//! machine asked for them.
//!
//! When an entry can't be made durable, or the outcome of an effect is unknown, the shell does what a restarted
//! daemon would: it drops the machine and recovers it from the journal and from what it sees of QEMU.

pub mod attempt;
pub mod hypervisor;
mod incoming;
mod link;
pub mod registry;
pub mod source;
pub mod target;
mod timers;

use crate::daemon::Daemon;
use engine::handover::{
    RenunciationProof, TargetStatus, Verdict, Weight, source as machine, target as tmachine,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use types::handover::{HandoverKey, RenounceRequest};
use types::{ErrorCode, MigrationId, Problem};

/// Orders that wait for one migration.
pub const INBOX_MAX: usize = 256;

/// What comes to a migration from outside its own task.
#[derive(Debug)]
pub enum Input {
    /// The manager's order to a source.
    Source(HandoverKey, machine::Order, Answer),
    /// The manager's order to a target.
    Target(HandoverKey, tmachine::Order, Answer),
    /// An operator's or monitor's order, to whichever side this is.
    Control(Control, Answer),
    /// The target's renunciation, verified.
    Renounced(RenunciationProof),
    /// What the target says short of that.
    TargetStatus(HandoverKey, TargetStatus),
    /// The source's request, verified, and where its answer goes.
    Asked(RenounceRequest, mpsc::Sender<PeerAnswer>),
    /// The manager is back.
    ManagerContact,
}

/// How an order went.
pub type Answer = oneshot::Sender<Result<(), Problem>>;

/// What a target answers a source directly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerAnswer {
    /// Its signed renunciation.
    Renounced(Vec<u8>),
    /// Something that is no proof.
    Status(TargetStatus),
}

/// See [`Input::Control`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Stop relaying; the guest runs on.
    Suspend,
    /// Relay again.
    Resume,
    /// Give up.
    Terminate,
    /// At most so many bytes a second; 0 is unlimited.
    Throttle(u64),
}

/// The machine must be recovered: an entry is not durable, or an effect's outcome is unknown.
#[derive(Debug)]
pub struct Crash(pub String);

/// A running migration, as the rest of the daemon sees it.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Its inbox.
    pub inbox: mpsc::Sender<Input>,
}

/// A copy of a shell's machine, for those who ask whether it has let go of its QEMU. `None` until there is one.
pub type Mirror = Arc<std::sync::Mutex<Option<Machine>>>;

/// See [`Mirror`].
#[derive(Debug, Clone)]
pub enum Machine {
    /// Of a source.
    Source(machine::Source),
    /// Of a target.
    Target(tmachine::Target),
}

/// What connects a shell with the rest of the daemon.
#[derive(Debug)]
pub struct Line {
    /// Where its inputs come from.
    pub inbox: mpsc::Receiver<Input>,
    /// For those who answer it later; does not keep it alive.
    pub own: mpsc::WeakSender<Input>,
    /// Where it shows its machine.
    pub mirror: Mirror,
}

/// Turns a machine's verdict into the answer to the order that it judged.
pub(crate) fn answer(verdict: &Verdict, reply: Answer) {
    let result = match verdict {
        Verdict::Accepted | Verdict::Ignored => Ok(()),
        Verdict::Refused(refusal) => {
            let code = match refusal {
                engine::handover::Refusal::TooLate | engine::handover::Refusal::BoundByVote => {
                    ErrorCode::TooLate
                }
                _ => ErrorCode::WrongState,
            };
            Err(Problem::new(code, refusal.to_string()))
        }
    };
    // Whoever asked may be gone.
    reply.send(result).ok();
}

/// A report of a machine goes to the log, and to the manager as a finding when it matters.
pub(crate) fn report(daemon: &Arc<Daemon>, migration: MigrationId, weight: Weight, text: &str) {
    match weight {
        Weight::Notice => tracing::info!(%migration, text, "hand-over"),
        Weight::Breach => {
            tracing::error!(%migration, text, "hand-over");
            let finding = serde_json::json!({
                "rule": "HANDOVER", "threat": "", "severity": "critical", "channel": 0, "offset": 0,
                "section": "hand-over", "expected": "", "found": text, "response": "reported",
            });
            daemon.event(migration, "finding", finding);
        }
    }
}

/// What a shell works through: effects first, then the events that they brought, then the outside.
#[derive(Debug)]
pub(crate) struct Work<Effect, Event> {
    pub(crate) effects: VecDeque<Effect>,
    pub(crate) events: VecDeque<Event>,
}

impl<Effect, Event> Work<Effect, Event> {
    pub(crate) fn new(effects: Vec<Effect>) -> Self {
        Self { effects: effects.into(), events: VecDeque::new() }
    }
}

/// An effect's name without what it holds.
pub(crate) fn name_of(effect: &impl std::fmt::Debug) -> String {
    let text = format!("{effect:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}

/// Milliseconds between two moments, for people.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn ms_between(from: Instant, to: Instant) -> f64 {
    (to.saturating_duration_since(from).as_micros() as f64) / 1000.0
}
