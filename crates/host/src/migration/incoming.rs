//! The connections to a target's QEMU, and when each may be made.
//!
//! With one channel it is made while the target is prepared: whoever is at the other end is known before the source
//! starts. With multifd QEMU 7.2 takes its first connection for the main one, and 10.0 peeks at
//! the first four bytes of each, during which their monitor stands still. So the agent asks when it has them.

use crate::channel::connect_hypervisor;
use crate::process::Process;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use types::{ErrorCode, Problem};

/// See the module.
#[derive(Debug)]
pub(crate) struct Incoming {
    socket: PathBuf,
    connections: u16,
    /// Made, and not given to the agent yet.
    main: Option<OwnedFd>,
    made: BTreeSet<u16>,
}

impl Incoming {
    /// Of a QEMU that listens at `socket` for so many connections.
    ///
    /// # Errors
    /// The only one can't be made.
    pub(crate) async fn of(socket: PathBuf, connections: u16, qemu: &Process) -> Result<Self, Problem> {
        let main = match connections {
            1 => Some(connect_hypervisor(&socket, qemu).await?),
            _ => None,
        };
        Ok(Self { socket, connections, main, made: BTreeSet::new() })
    }

    /// The only connection, once.
    pub(crate) fn main(&mut self) -> Option<OwnedFd> {
        self.main.take()
    }

    /// A connection that the agent asks for: each once, the main one first. An agent that asks otherwise is not ours.
    ///
    /// # Errors
    /// It has no place, or can't be made.
    pub(crate) async fn wanted(&mut self, channel: u16, qemu: &Process) -> Result<OwnedFd, Problem> {
        if !self.has_place(channel) {
            let text = format!("the VM agent asked for QEMU's connection {channel} out of turn");
            return Err(Problem::new(ErrorCode::WrongState, text));
        }
        self.made.insert(channel);
        connect_hypervisor(&self.socket, qemu).await
    }

    fn has_place(&self, channel: u16) -> bool {
        let in_turn = channel == 0 || self.made.contains(&0);
        self.connections > 1 && channel < self.connections && in_turn && !self.made.contains(&channel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_one_first_and_each_once() {
        let incoming = |connections, made: &[u16]| Incoming {
            socket: PathBuf::new(),
            connections,
            main: None,
            made: made.iter().copied().collect(),
        };
        let check = |connections, made: &[u16], channel, expect| {
            assert_eq!(
                incoming(connections, made).has_place(channel),
                expect,
                "{connections} {made:?} {channel}"
            );
        };
        check(3, &[], 0, true);
        check(3, &[], 1, false);
        check(3, &[0], 2, true);
        check(3, &[0, 2], 1, true);
        check(3, &[0, 2], 2, false);
        check(3, &[0], 0, false);
        check(3, &[0], 3, false);
        check(1, &[], 0, false);
    }
}
