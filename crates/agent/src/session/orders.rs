//! What the daemon says.

use super::close::{internal, refused};
use super::{Half, Session, Stop, on_half};
use crate::arm::{Identity, arm};
use crate::effect::{Effect, End};
use crate::lane::{Bounds, CLOSED, Lane};
use crate::signatures::Signatures;
use crate::{log, sandbox};
use engine::inspect::map_bytes;
use rustix::event::PollFlags;
use serde_json::json;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::Instant;
use types::agent::{Descriptor, FromAgent, ToAgent};
use types::handover::Side;
use types::inventory::Inventory;
use types::layout::{Catalogue, MAX_CATALOGUE_BYTES};
use types::{ErrorCode, MigrationId, Nonce};

/// Orders looked at in one turn.
const MAX_ORDERS_PER_TURN: usize = 16;

impl Session {
    pub(super) fn control_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        self.control.flush()?;
        if !ready.intersects(PollFlags::IN | CLOSED) {
            return Ok(());
        }
        for _ in 0..MAX_ORDERS_PER_TURN {
            let Some((message, descriptor)) = self.control.receive()? else { break };
            self.order(message, descriptor)?;
        }
        Ok(())
    }

    fn order(&mut self, message: ToAgent, descriptor: Option<OwnedFd>) -> Result<(), Stop> {
        match message {
            ToAgent::Hello { side, migration } => self.hello(side, migration),
            ToAgent::Arm { permit, keys, now_unix_s, inventory } => {
                self.arm(&permit, &keys, now_unix_s, *inventory)
            }
            ToAgent::Attach { channel, descriptor: kind } => self.attach(channel, kind, descriptor),
            ToAgent::Suspend => self.suspend(true),
            ToAgent::Resume => self.suspend(false),
            ToAgent::Throttle { bytes_per_second } => {
                self.throttle.limit(bytes_per_second, Instant::now());
                Ok(())
            }
            ToAgent::Prove { nonce } => self.prove(nonce),
            ToAgent::Frozen => {
                if let Some(Half::Source(source)) = &mut self.half {
                    source.frozen();
                }
                Ok(())
            }
            ToAgent::AnnounceRunning => {
                let effects = match &self.half {
                    Some(Half::Target(target)) => target.announce_running(),
                    _ => Vec::new(),
                };
                self.apply(effects)
            }
            ToAgent::Terminate => {
                let abort = Some((ErrorCode::Terminated, "ended by its daemon".to_owned()));
                Err(Stop::Ended(End { report: None, abort }))
            }
        }
    }

    fn hello(&mut self, side: Side, migration: MigrationId) -> Result<(), Stop> {
        if self.identity.is_some() {
            return Err(refused(ErrorCode::WrongState, "a second HELLO"));
        }
        let key = self.key.clone();
        let ready = FromAgent::Ready {
            spki: hex::encode(key.spki()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sandbox: self.sandbox.clone(),
        };
        log::line("info", "ready", &[("side", json!(side)), ("migration", json!(migration))]);
        self.identity = Some(Identity { side, migration, key });
        self.control.report(&ready)?;
        Ok(())
    }

    fn arm(
        &mut self,
        permit: &str,
        keys: &[(String, String)],
        now_unix_s: u64,
        inventory: Inventory,
    ) -> Result<(), Stop> {
        let Some(identity) = self.identity.as_ref().filter(|_| self.armed.is_none()) else {
            return Err(refused(ErrorCode::WrongState, "ARM before HELLO, or a second one"));
        };
        let armed = arm(identity, permit, keys, now_unix_s, (inventory, self.catalogue.take()))
            .map_err(|refusal| refused(refusal.code(), &refusal.to_string()))?;
        let maps = map_bytes(&armed.inventory, &armed.limits);
        sandbox::limit_memory(maps).map_err(|error| internal(error.to_string()))?;
        self.lanes.resize_with(armed.lanes, Lane::default);
        self.bounds = Bounds::of(armed.lanes);
        self.armed = Some(armed);
        self.control.report(&FromAgent::Armed)?;
        Ok(())
    }

    fn attach(&mut self, channel: u16, kind: Descriptor, fd: Option<OwnedFd>) -> Result<(), Stop> {
        let Some(fd) = fd else {
            return Err(refused(ErrorCode::BadRequest, "ATTACH without a descriptor"));
        };
        if kind == Descriptor::Catalogue {
            return self.take_catalogue(fd);
        }
        if kind == Descriptor::Scanner {
            return self.take_scanner(fd);
        }
        if self.awaits_scanner().ok_or_else(|| refused(ErrorCode::WrongState, "ATTACH before ARM"))?
            && kind == Descriptor::Peer
        {
            // The permit asks for what would not be done.
            return Err(refused(ErrorCode::WrongState, "ATTACH of the peer before the permit's scanner"));
        }
        let Some(lane) = self.lane_mut(channel) else {
            return Err(refused(ErrorCode::BadRequest, "ATTACH for a channel that the permit does not name"));
        };
        match kind {
            Descriptor::Hypervisor if !lane.hypervisor_attached => {
                lane.hypervisor_attached = true;
                lane.hypervisor = Some(fd);
                Ok(())
            }
            Descriptor::Peer if !lane.peer_attached => {
                lane.peer_attached = true;
                self.attach_peer(channel, fd)
            }
            _ => Err(refused(ErrorCode::WrongState, "ATTACH of a second descriptor of one kind")),
        }
    }

    /// Whether the permit asks this side for a scanner that is not there; nothing before there is a permit.
    fn awaits_scanner(&self) -> Option<bool> {
        let (identity, armed) = self.identity.as_ref().zip(self.armed.as_ref())?;
        Some(identity.side == Side::Target && armed.profile.signatures.is_on() && self.signatures.is_none())
    }

    fn take_scanner(&mut self, fd: OwnedFd) -> Result<(), Stop> {
        let Some(armed) = self.armed.as_ref().filter(|_| self.awaits_scanner() == Some(true)) else {
            return Err(refused(ErrorCode::WrongState, "a scanner that no permit asks for, or a second one"));
        };
        self.signatures = Some(Signatures::new(fd, armed.signature_policy(), &armed.inventory));
        Ok(())
    }

    fn take_catalogue(&mut self, fd: OwnedFd) -> Result<(), Stop> {
        if self.armed.is_some() || self.catalogue.is_some() {
            return Err(refused(ErrorCode::WrongState, "a catalogue after ARM, or a second one"));
        }
        let catalogue = read_catalogue(fd).map_err(|why| refused(ErrorCode::BadRequest, &why))?;
        self.catalogue = Some(catalogue);
        Ok(())
    }

    pub(super) fn suspend(&mut self, on: bool) -> Result<(), Stop> {
        self.suspended = on;
        let effects = match &mut self.half {
            Some(half) => on_half!(half, it => it.suspend(on)),
            None => Vec::new(),
        };
        self.apply(effects)
    }

    fn prove(&mut self, nonce: Nonce) -> Result<(), Stop> {
        let quiet = (0u16..).zip(&self.lanes).try_for_each(|(number, lane)| {
            lane.quiet().map_err(|why| if number == 0 { why } else { format!("channel {number}: {why}") })
        });
        let effects = match &self.half {
            Some(Half::Source(source)) => source.prove(nonce, quiet),
            _ => {
                let detail = "nothing was relayed".to_owned();
                vec![Effect::report(FromAgent::NotProven { nonce, detail })]
            }
        };
        self.apply(effects)
    }
}

/// The daemon's own words, yet bounded and checked: it is as large as the VM's device tree.
fn read_catalogue(fd: OwnedFd) -> Result<Catalogue, String> {
    let limit = MAX_CATALOGUE_BYTES as u64 + 1;
    let mut text = Vec::new();
    std::fs::File::from(fd)
        .take(limit)
        .read_to_end(&mut text)
        .map_err(|error| format!("the catalogue could not be read: {error}"))?;
    if text.len() > MAX_CATALOGUE_BYTES {
        return Err("the catalogue is larger than any".to_owned());
    }
    serde_json::from_slice(&text).map_err(|error| format!("the catalogue could not be understood: {error}"))
}
