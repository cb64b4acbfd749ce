//! Handshakes of all lanes, and QEMU's connections. Nothing is asked of a QEMU socket before every lane's peer has
//! proved its key for this very lane (I3).

use super::close::{handshake_failed, internal};
use super::{Half, LaneReady, Session, Stop};
use crate::arm::channel_config;
use crate::log;
use crate::peer::{HANDSHAKE_LIMIT, Peer};
use crate::source::Source;
use crate::target::Target;
use link::channel::ChannelFacts;
use serde_json::json;
use std::os::fd::OwnedFd;
use std::time::Instant;
use types::agent::FromAgent;
use types::handover::Side;
use types::migration::ChannelView;

impl Session {
    /// The source dials and speaks first; the target waits for the first bytes without blocking.
    pub(super) fn attach_peer(&mut self, number: u16, fd: OwnedFd) -> Result<(), Stop> {
        let deadline = *self.handshakes_until.get_or_insert_with(|| Instant::now() + HANDSHAKE_LIMIT);
        match (self.identity.as_ref().map(|identity| identity.side), self.lane_mut(number)) {
            (Some(Side::Target), Some(lane)) => {
                lane.pending = Some(fd);
                Ok(())
            }
            _ => self.open_peer(number, fd, deadline),
        }
    }

    pub(super) fn handshake_turn(&mut self, ready: &[LaneReady]) -> Result<(), Stop> {
        let Some(deadline) = self.handshakes_until.filter(|_| self.half.is_none()) else { return Ok(()) };
        for (number, ready) in (0u16..).zip(ready) {
            if !ready.pending.is_empty()
                && let Some(fd) = self.lane_mut(number).and_then(|lane| lane.pending.take())
            {
                self.open_peer(number, fd, deadline)?;
            }
        }
        Ok(())
    }

    fn open_peer(&mut self, number: u16, fd: OwnedFd, deadline: Instant) -> Result<(), Stop> {
        let (Some(identity), Some(armed)) = (&self.identity, &self.armed) else {
            return Err(internal("a channel without a permit".to_owned()));
        };
        let side = identity.side;
        let opened = channel_config(identity, armed, number)
            .and_then(|config| Peer::open(fd, &config, side, deadline))
            .map_err(|error| handshake_failed(&format!("channel {number}: {}: {error}", error.code())));
        let (peer, facts) = opened?;
        if let Some(lane) = self.lane_mut(number) {
            lane.peer = Some(peer);
        }
        if self.lanes.iter().all(|lane| lane.peer.is_some()) { self.connected(facts) } else { Ok(()) }
    }

    /// Every lane stands; all of them negotiate alike.
    fn connected(&mut self, facts: ChannelFacts) -> Result<(), Stop> {
        let (Some(identity), Some(armed)) = (&self.identity, &self.armed) else {
            return Err(internal("a channel without a permit".to_owned()));
        };
        let now = Instant::now();
        self.half = Some(match identity.side {
            Side::Source => Half::Source(Box::new(Source::new(armed, now))),
            Side::Target => {
                Half::Target(Box::new(Target::new(armed, now).map_err(|error| internal(error.to_string()))?))
            }
        });
        let channel = ChannelView {
            protocol: facts.protocol.to_owned(),
            cipher_suite: facts.cipher_suite.to_owned(),
            key_exchange: facts.key_exchange,
            channels: u16::try_from(self.lanes.len()).unwrap_or(u16::MAX),
        };
        log::line("info", "connected", &[("channel", json!(channel))]);
        self.control.report(&FromAgent::Connected { channel })?;
        if self.suspended { self.suspend(true) } else { Ok(()) }
    }

    /// With several lanes QEMU is connected when its first bytes are at hand: it peeks at them, and its monitor stands
    /// still until they come. Its first connection is the main one, so the others wait for that.
    pub(super) fn want_hypervisors(&mut self) -> Result<(), Stop> {
        if self.suspended || self.lanes.len() == 1 || !matches!(self.half, Some(Half::Target(_))) {
            return Ok(());
        }
        for number in (0u16..).take(self.lanes.len()) {
            let main_began = self.lane(0).is_some_and(super::Lane::has_begun);
            let Some(lane) = self.lane_mut(number) else { break };
            if lane.awaits_hypervisor() && (number == 0 || main_began) {
                lane.hypervisor_wanted = true;
                self.control.report(&FromAgent::HypervisorWanted { channel: number })?;
            }
        }
        Ok(())
    }
}
