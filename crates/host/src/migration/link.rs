//! A shell's end of its VM agent: packets as they come, a watch on the heartbeat, and questions with answers.

use super::attempt::keys_for_agent;
use crate::agents::{Agent, AgentGone, HEARTBEAT_TIMEOUT};
use crate::daemon::{Daemon, now_unix_s};
use serde_json::json;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::mpsc;
use types::agent::{FromAgent, ToAgent};
use types::inventory::Inventory;
use types::{ErrorCode, MigrationId, Problem};

/// Packets that wait for a shell that is busy with an effect: a second of heartbeats many times over.
const PACKETS_MAX: usize = 256;
/// Verifying a permit takes a millisecond.
const ARM_TIMEOUT: Duration = Duration::from_secs(3);

/// The agent of one side, watched.
#[derive(Debug)]
pub(crate) struct AgentLink {
    agent: Agent,
    packets: mpsc::Receiver<Result<FromAgent, AgentGone>>,
    /// Came while an answer was awaited.
    put_by: VecDeque<FromAgent>,
}

impl AgentLink {
    /// Starts watching.
    pub(crate) fn new(agent: Agent) -> Self {
        let (sender, packets) = mpsc::channel(PACKETS_MAX);
        let reader = agent.clone();
        tokio::spawn(async move {
            let mut said_why = false;
            loop {
                let packet = tokio::time::timeout(HEARTBEAT_TIMEOUT, reader.receive())
                    .await
                    .unwrap_or_else(|_| Err(AgentGone::new("its heartbeat stopped")));
                let packet = match packet {
                    Err(gone) if !said_why => Err(reader.post_mortem(gone).await),
                    packet => packet,
                };
                said_why |= matches!(packet, Ok(ref packet) if is_last(packet));
                let over = packet.is_err();
                if sender.send(packet).await.is_err() || over {
                    return;
                }
            }
        });
        Self { agent, packets, put_by: VecDeque::new() }
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The next packet.
    pub(crate) async fn next(&mut self) -> Result<FromAgent, AgentGone> {
        if let Some(packet) = self.put_by.pop_front() {
            return Ok(packet);
        }
        self.packets.recv().await.unwrap_or_else(|| Err(AgentGone::new("it is gone")))
    }

    /// The first packet of which `wanted` makes something; others are kept for [`Self::next`].
    pub(crate) async fn await_packet<T>(
        &mut self,
        timeout: Duration,
        mut wanted: impl FnMut(&FromAgent) -> Option<T>,
    ) -> Result<T, AgentGone> {
        let work = async {
            loop {
                let packet =
                    self.packets.recv().await.unwrap_or_else(|| Err(AgentGone::new("it is gone")))?;
                match wanted(&packet) {
                    Some(found) => return Ok(found),
                    None => self.put_by.push_back(packet),
                }
            }
        };
        let late = || AgentGone::new(format!("no answer within {} ms", timeout.as_millis()));
        tokio::time::timeout(timeout, work).await.map_err(|_| late())?
    }

    /// Has it verify the permit.
    pub(crate) async fn arm(
        &mut self,
        daemon: &Daemon,
        permit: String,
        inventory: Inventory,
    ) -> Result<(), Problem> {
        let arm = ToAgent::Arm {
            permit,
            keys: keys_for_agent(daemon),
            now_unix_s: now_unix_s(),
            inventory: Box::new(inventory),
        };
        self.agent.send(&arm).await.map_err(channel_problem)?;
        self.await_packet(ARM_TIMEOUT, |packet| match packet {
            FromAgent::Armed => Some(Ok(())),
            FromAgent::Refused { code, detail } => Some(Err(Problem::new(*code, detail.clone()))),
            FromAgent::Ended { detail, .. } => Some(Err(Problem::new(ErrorCode::Internal, detail.clone()))),
            _ => None,
        })
        .await
        .map_err(channel_problem)?
    }
}

pub(crate) fn channel_problem(gone: AgentGone) -> Problem {
    Problem::new(ErrorCode::ChannelFailed, gone.to_string())
}

/// Whether an agent ends after this, as it should.
const fn is_last(packet: &FromAgent) -> bool {
    matches!(packet, FromAgent::Ended { .. } | FromAgent::Rejected { .. } | FromAgent::Refused { .. })
}

/// Tells of an agent that died or hangs (HC-15): the migration ends on it, the guest does not.
pub(crate) fn tell_lost(daemon: &Daemon, migration: MigrationId, gone: &AgentGone) {
    if !gone.abrupt {
        return;
    }
    let finding = json!({
        "rule": "agent-lost", "threat": "HC-15", "severity": "warning", "channel": 0, "offset": 0,
        "section": "VM agent", "expected": "an agent that lives until the hand-over is over", "found": gone.detail,
        "response": "the migration is given up",
    });
    daemon.event(migration, "finding", finding);
    daemon.event(migration, "ended", json!({"what": "agent", "detail": gone.detail}));
}

/// The next packet of an agent that may not be there; waits for ever when it is not.
pub(crate) async fn next_of(link: Option<&mut AgentLink>) -> Result<FromAgent, AgentGone> {
    match link {
        Some(link) => link.next().await,
        None => std::future::pending().await,
    }
}
