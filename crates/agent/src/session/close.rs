//! What the halves ask for, and the end.

use super::{Session, Stop};
use crate::effect::{Effect, End};
use crate::peer::{Peer, PeerError};
use std::time::{Duration, Instant};
use types::ErrorCode;
use types::agent::{EndedBy, FromAgent};
use wire::frame::Control;

/// How long the last report and the ABORT may take.
const GOODBYE_LIMIT: Duration = Duration::from_millis(500);

impl Session {
    pub(super) fn apply(&mut self, effects: Vec<Effect>) -> Result<(), Stop> {
        for effect in effects {
            let (number, sent) = match effect {
                Effect::Frame(control) => (0, self.send(0, |peer| peer.control(&control))),
                Effect::EndOfLane(number, evidence) => {
                    (number, self.send(number, |peer| peer.control(&Control::End(evidence))))
                }
                Effect::Return(bytes) => (0, self.send(0, |peer| peer.return_path(&bytes))),
                Effect::Report(message) => {
                    self.control.report(&message)?;
                    continue;
                }
                Effect::ToHypervisor(bytes) => {
                    if let Some(main) = self.lane_mut(0) {
                        main.to_hypervisor.push_owned(bytes);
                    }
                    self.flush_hypervisor(0)?;
                    continue;
                }
                Effect::DropPeer => {
                    for lane in &mut self.lanes {
                        lane.peer = None;
                    }
                    continue;
                }
                Effect::End(end) => return Err(Stop::Ended(end)),
            };
            if let Err(error) = sent {
                self.peer_gone(number, &error)?;
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        number: u16,
        put: impl FnOnce(&mut Peer) -> Result<(), PeerError>,
    ) -> Result<(), PeerError> {
        match self.lane_mut(number).and_then(|lane| lane.peer.as_mut()) {
            Some(peer) => put(peer).and_then(|()| peer.flush()),
            None => Ok(()),
        }
    }

    /// QEMU's sockets first: on the source their closing lets the guest go on. Then the main channel, whose ABORT the
    /// other side should hear before it sees the others closed.
    pub(super) fn goodbye(mut self, end: End) -> bool {
        for lane in &mut self.lanes {
            drop(lane.hypervisor.take());
        }
        let deadline = Instant::now() + GOODBYE_LIMIT;
        let told = match &end.report {
            Some(report) => self.control.report(report).is_ok() && self.control.drain(deadline),
            None => true,
        };
        if let (Some(peer), Some((code, text))) =
            (self.lane_mut(0).and_then(|main| main.peer.as_mut()), end.abort)
        {
            let _best_effort = peer.control(&Control::Abort { code, text });
        }
        for mut peer in self.lanes.into_iter().filter_map(|lane| lane.peer) {
            peer.goodbye(deadline);
        }
        told
    }
}

pub(super) fn internal(detail: String) -> Stop {
    let report = FromAgent::Ended { what: EndedBy::Internal, detail: detail.clone(), digest: None };
    Stop::Ended(End { report: Some(Box::new(report)), abort: Some((ErrorCode::Internal, detail)) })
}

pub(super) fn refused(code: ErrorCode, detail: &str) -> Stop {
    let report = FromAgent::Refused { code, detail: detail.to_owned() };
    Stop::Ended(End { report: Some(Box::new(report)), abort: None })
}

pub(super) fn handshake_failed(detail: &str) -> Stop {
    let report = FromAgent::Ended { what: EndedBy::Handshake, detail: detail.to_owned(), digest: None };
    Stop::Ended(End { report: Some(Box::new(report)), abort: None })
}
