//! Bytes between QEMU and the network, lane by lane.

use super::verdict::Released;
use super::{Half, LaneReady, Session, Stop, on_half};
use crate::effect::Effect;
use crate::lane::{CLOSED, Lane};
use crate::peer::PeerError;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::time::Instant;
use wire::frame::{self, Frame, HEADER_BYTES};

impl Session {
    // --- what is to be read

    /// Whether a lane of the network is to be read.
    pub(super) fn wants_peer(&self, number: u16) -> bool {
        let waiting = self.lane(number).map_or(0, |lane| lane.to_hypervisor.len());
        match &self.half {
            None => false,
            Some(Half::Source(_)) => true,
            Some(Half::Target(target)) => {
                let high_water = match self.suspended {
                    true if number == 0 => self.bounds.suspended_bytes,
                    _ => self.bounds.high_water_bytes,
                };
                waiting < high_water && target.wants(number) && self.scanner_has_room()
            }
        }
    }

    /// Whether QEMU's socket of a lane is to be read, the throttle aside.
    pub(super) fn reads_hypervisor(&self, number: u16) -> bool {
        match &self.half {
            // Nothing before all channels stand (I3).
            None => false,
            Some(Half::Source(source)) => {
                let room = self.lane(number).is_some_and(|lane| {
                    lane.peer.is_some() && lane.waiting_bytes() < self.bounds.high_water_bytes
                });
                room && source.wants_stream(number)
            }
            Some(Half::Target(_)) => true,
        }
    }

    pub(super) fn peer_interest(&self, number: u16) -> PollFlags {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, self.wants_peer(number));
        interest.set(PollFlags::OUT, self.lane(number).is_some_and(|lane| lane.waiting_bytes() > 0));
        interest
    }

    /// Nothing is asked of a socket of QEMU's before the channels stand.
    pub(super) fn hypervisor_interest(&self, number: u16, throttled: bool) -> PollFlags {
        let Some(half) = &self.half else { return PollFlags::empty() };
        let throttled = throttled && matches!(half, Half::Source(_));
        let waits = self.lane(number).is_some_and(|lane| !lane.to_hypervisor.is_empty());
        let mut interest = PollFlags::RDHUP;
        interest.set(PollFlags::IN, self.reads_hypervisor(number) && !throttled);
        interest.set(PollFlags::OUT, waits && !self.suspended);
        interest
    }

    // --- the other agent

    pub(super) fn peer_turn(&mut self, number: u16, ready: PollFlags) -> Result<(), Stop> {
        let wants = self.wants_peer(number);
        let Some(peer) = self.lane_mut(number).and_then(|lane| lane.peer.as_mut()) else { return Ok(()) };
        if ready.intersects(PollFlags::OUT | CLOSED)
            && let Err(error) = peer.flush()
        {
            return self.peer_gone(number, &error);
        }
        let waits = peer.has_unopened();
        if !wants || !(waits || ready.intersects(PollFlags::IN | CLOSED)) {
            return Ok(());
        }
        let (effects, received) = self.receive(number);
        self.apply(effects)?;
        received.or_else(|error| self.peer_gone(number, &error))
    }

    /// Reads once from a lane. Inspected bytes go on to QEMU, everything else becomes effects. What comes behind a
    /// violation is not looked at.
    fn receive(&mut self, number: u16) -> (Vec<Effect>, Result<(), PeerError>) {
        let now = Instant::now();
        let mut effects = Vec::new();
        let limit = self.bounds.read_bytes;
        // Out of its lane meanwhile: what is released may belong to any of them.
        let peer = self.lane_mut(number).and_then(|lane| lane.peer.take());
        let (Some(mut peer), Some(half)) = (peer, &mut self.half) else { return (effects, Ok(())) };
        let mut released = Released { lanes: &mut self.lanes, signatures: self.signatures.as_mut() };
        let mut violated = false;
        let received = peer.receive(limit, |frame| {
            if violated {
                return;
            }
            match (frame, &mut *half) {
                (Frame::Data(bytes), Half::Target(target)) => {
                    if let Err(end) = target.data(number, bytes, now, &mut released) {
                        violated = true;
                        effects.extend(end);
                    }
                }
                (Frame::Return(bytes), Half::Source(source)) if number == 0 => {
                    effects.extend(source.return_path(bytes));
                }
                (Frame::Control(control), half) => {
                    effects.extend(on_half!(half, it => it.control(number, control, now)));
                }
                (Frame::Data(_) | Frame::Return(_), half) => {
                    violated = true;
                    let detail = "the other agent sent bytes in the wrong direction";
                    effects.extend(on_half!(half, it => it.peer_gone(detail)));
                }
            }
        });
        if let Some(lane) = self.lane_mut(number) {
            lane.peer = Some(peer);
        }
        (effects, received.map(|_| ()))
    }

    pub(super) fn peer_gone(&mut self, number: u16, error: &PeerError) -> Result<(), Stop> {
        if let Some(lane) = self.lane_mut(number) {
            lane.peer = None;
        }
        let detail = if number == 0 { error.to_string() } else { format!("channel {number}: {error}") };
        let effects = match &mut self.half {
            Some(half) => on_half!(half, it => it.peer_gone(&detail)),
            None => Vec::new(),
        };
        self.apply(effects)
    }

    // --- QEMU

    /// Every lane's turn, beginning with another one each time.
    pub(super) fn hypervisors_turn(&mut self, ready: &[LaneReady]) -> Result<(), Stop> {
        let lanes = self.lanes.len().min(ready.len());
        for step in 0..lanes {
            let at = (self.first + step) % lanes;
            if let (Ok(number), Some(ready)) = (u16::try_from(at), ready.get(at)) {
                self.hypervisor_turn(number, ready.hypervisor)?;
            }
        }
        self.first = (self.first + 1) % lanes.max(1);
        self.flushed_turn()
    }

    fn hypervisor_turn(&mut self, number: u16, ready: PollFlags) -> Result<(), Stop> {
        self.flush_hypervisor(number)?;
        let Some(half) = &self.half else { return Ok(()) };
        if self.lane(number).is_none_or(|lane| lane.hypervisor.is_none()) {
            return Ok(());
        }
        let (wants, draining) = match half {
            Half::Source(source) => (source.wants_stream(number), source.is_draining()),
            Half::Target(_) => (true, false),
        };
        if wants && (ready.contains(PollFlags::IN) || (draining && self.reads_hypervisor(number))) {
            return self.read_hypervisor(number);
        }
        if ready.intersects(CLOSED) { self.hypervisor_gone(number) } else { Ok(()) }
    }

    pub(super) fn flush_hypervisor(&mut self, number: u16) -> Result<(), Stop> {
        let suspended = self.suspended;
        let Some(lane) = self.lane_mut(number).filter(|_| !suspended) else { return Ok(()) };
        let Lane { hypervisor, to_hypervisor, .. } = lane;
        match hypervisor.as_ref().map(|socket| to_hypervisor.flush(socket)) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(_)) => self.hypervisor_gone(number),
        }
    }

    /// Tells the half when what it waits for has left.
    fn flushed_turn(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        let wire_bytes = self.wire_bytes().1;
        let effects = match &mut self.half {
            Some(Half::Source(source))
                if self.lanes.iter().all(|lane| lane.peer.is_some() && lane.waiting_bytes() == 0) =>
            {
                source.flushed(now)
            }
            Some(Half::Target(target))
                if self.lanes.iter().all(Lane::is_flushed)
                    && self.lanes.first().is_some_and(|main| main.hypervisor.is_some()) =>
            {
                target.flushed(wire_bytes)
            }
            _ => return Ok(()),
        };
        self.apply(effects)
    }

    fn read_hypervisor(&mut self, number: u16) -> Result<(), Stop> {
        let now = Instant::now();
        let Some(socket) = self.lanes.get(usize::from(number)).and_then(|lane| lane.hypervisor.as_ref())
        else {
            return Ok(());
        };
        let allowed = self.throttle.allowed(frame::MAX_PAYLOAD_BYTES, now);
        if allowed == 0 {
            return Ok(());
        }
        let Some(room) = self.buffer.get_mut(HEADER_BYTES..HEADER_BYTES + allowed) else { return Ok(()) };
        match recv(socket, room, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => self.hypervisor_gone(number),
            Ok((_, count)) => self.relay_from_hypervisor(number, count, now),
            Err(Errno::AGAIN) => self.drained(number, now),
            Err(Errno::INTR) => Ok(()),
            Err(_) => self.hypervisor_gone(number),
        }
    }

    /// `count` bytes of QEMU's are in the buffer, behind the room for a frame header.
    fn relay_from_hypervisor(&mut self, number: u16, count: usize, now: Instant) -> Result<(), Stop> {
        self.throttle.take(count);
        let bytes = self.buffer.get(HEADER_BYTES..HEADER_BYTES + count).unwrap_or_default();
        let taken = match &mut self.half {
            Some(Half::Source(source)) => source.stream(number, bytes, now),
            Some(Half::Target(target)) => {
                let effects = target.from_hypervisor(number, bytes);
                return self.apply(effects);
            }
            None => return Ok(()),
        };
        if let Err(effect) = taken {
            return self.apply(vec![effect]);
        }
        let Some(peer) = self.lanes.get_mut(usize::from(number)).and_then(|lane| lane.peer.as_mut()) else {
            return Ok(());
        };
        if let Err(error) = peer.data(&mut self.buffer, count).and_then(|()| peer.flush()) {
            return self.peer_gone(number, &error);
        }
        self.end_turn(now)
    }

    /// A socket of QEMU's has nothing more, for now or, after the main lane's end, at all.
    fn drained(&mut self, number: u16, now: Instant) -> Result<(), Stop> {
        if let Some(Half::Source(source)) = &mut self.half {
            source.drained(number);
        }
        self.end_turn(now)
    }

    fn end_turn(&mut self, now: Instant) -> Result<(), Stop> {
        let Some(Half::Source(source)) = &mut self.half else { return Ok(()) };
        let effects = source.end_frames(now);
        if effects.is_empty() {
            return Ok(());
        }
        self.apply(effects)?;
        self.flushed_turn()
    }

    pub(super) fn hypervisor_gone(&mut self, number: u16) -> Result<(), Stop> {
        let Some(lane) = self.lane_mut(number) else { return Ok(()) };
        lane.hypervisor = None;
        let flushed = lane.to_hypervisor.is_empty();
        let effects = match &mut self.half {
            Some(Half::Source(source)) => source.hypervisor_gone(),
            Some(Half::Target(target)) => target.hypervisor_gone(number, flushed),
            None => Vec::new(),
        };
        self.apply(effects)
    }
}
