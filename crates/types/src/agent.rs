//! What a host daemon and its VM agent say to each other: one JSON document per packet on a `SOCK_SEQPACKET`
//! socket pair, at most [`MAX_PACKET_BYTES`]; descriptors ride beside [`ToAgent::Attach`]. The agent ends when
//! the socket closes.

use crate::handover::{Digest, Side, StreamEvidence};
use crate::inventory::Inventory;
use crate::migration::{ChannelView, Finding};
use crate::{MigrationId, Nonce};
use serde::{Deserialize, Serialize};

/// No packet is longer.
pub const MAX_PACKET_BYTES: usize = 60 * 1024;

/// Which descriptor comes with [`ToAgent::Attach`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Descriptor {
    /// The TCP connection to the other host's VM agent.
    Peer,
    /// The UNIX connection to QEMU.
    Hypervisor,
    /// Target, before the peer: the stream socket of a scanner that has its rules, where the permit's profile asks for
    /// signatures.
    Scanner,
    /// Target, before [`ToAgent::Arm`]: a file in memory that holds the catalogue of the VM's devices
    /// ([`crate::layout::Catalogue`], JSON, at most [`crate::layout::MAX_CATALOGUE_BYTES`]).
    Catalogue,
}

/// Daemon to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum ToAgent {
    /// First packet: makes the ephemeral key; answered by [`FromAgent::Ready`].
    Hello {
        /// The side.
        side: Side,
        /// The migration.
        migration: MigrationId,
    },
    /// The permit, which the agent verifies itself; answered by [`FromAgent::Armed`] or [`FromAgent::Refused`].
    Arm {
        /// The token, hexadecimal.
        permit: String,
        /// Permit keys of the managers: (key id, raw Ed25519 key, both hexadecimal), pinned by the daemon.
        keys: Vec<(String, String)>,
        /// The clock, seconds since the Unix epoch (the agent has none that it trusts more).
        now_unix_s: u64,
        /// What the stream must look like.
        inventory: Box<Inventory>,
    },
    /// One descriptor beside this packet.
    Attach {
        /// The channel, 0 is the main one.
        channel: u16,
        /// What it is.
        descriptor: Descriptor,
    },
    /// Stop relaying; the guest runs on.
    Suspend,
    /// Relay again.
    Resume,
    /// Relay at most so many bytes a second; 0 is unlimited.
    Throttle {
        /// Bytes a second.
        bytes_per_second: u64,
    },
    /// Source, after the freeze was confirmed: prove that nothing moved since the end of the stream.
    Prove {
        /// Fresh.
        nonce: Nonce,
    },
    /// Source: FROZEN is journalled; stop the one-second guard.
    Frozen,
    /// Target: the guest runs; tell the other side.
    AnnounceRunning,
    /// Close everything and end. QEMU's sockets close, so its source resumes by itself unless frozen.
    Terminate,
}

/// Agent to daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum FromAgent {
    /// The ephemeral key.
    Ready {
        /// SPKI in DER, hexadecimal.
        spki: String,
        /// The agent's version.
        version: String,
        /// Whether the sandbox is in force, and which parts.
        sandbox: String,
    },
    /// The permit is good for this agent.
    Armed,
    /// The agent will not serve this; it ends.
    Refused {
        /// Public code.
        code: crate::ErrorCode,
        /// Why.
        detail: String,
    },
    /// The channel to the other agent stands: every connection that the permit asks for.
    Connected {
        /// Facts of the channel.
        channel: ChannelView,
    },
    /// Target, with more than one channel: the first bytes for QEMU on this channel are there. QEMU looks at them as
    /// soon as it takes the connection and does nothing else until they come, so that it is connected only now; and
    /// it takes its first connection for the main one, so that this is asked for 0 first, and for the others once
    /// that one's first bytes are with QEMU. Answered by [`ToAgent::Attach`].
    HypervisorWanted {
        /// The channel.
        channel: u16,
    },
    /// Counters, at least once a second: also the heartbeat.
    Progress {
        /// Counts up by one.
        sequence: u64,
        /// Bytes of QEMU's stream relayed (source) or released (target), all channels.
        stream_bytes: u64,
        /// Bytes on the wire, sent (source) or received (target).
        wire_bytes: u64,
        /// Target: pages seen (normal, zero).
        pages: (u64, u64),
    },
    /// Source: the whole stream is out, and held by the other side.
    EndOfStream {
        /// What left.
        evidence: StreamEvidence,
        /// Microseconds since the last byte came from QEMU.
        idle_us: u64,
    },
    /// Source: nothing moved since the end of the stream.
    Proven {
        /// Echoed.
        nonce: Nonce,
    },
    /// Source: something did; do not vote.
    NotProven {
        /// Echoed.
        nonce: Nonce,
        /// What moved.
        detail: String,
    },
    /// Target: complete, accepted and released to QEMU; the digests of both sides are equal.
    Accepted {
        /// What was released.
        evidence: StreamEvidence,
        /// How long the device state was held, microseconds.
        held_us: u64,
        /// Wire bytes received so far.
        wire_bytes: u64,
    },
    /// The inspector refused the stream. Nothing past the violation reached QEMU.
    Rejected {
        /// Why.
        finding: Box<Finding>,
    },
    /// Something to report that ends nothing.
    Observed {
        /// What.
        finding: Box<Finding>,
    },
    /// Target: QEMU's final acknowledgement came and is held back for ever.
    AcknowledgementHeld {
        /// QEMU's verdict; 0 is success.
        status: u32,
    },
    /// Source: the other side says that the guest runs.
    PeerRunning {
        /// Round trip, measured on the channel just before, microseconds.
        round_trip_us: u64,
    },
    /// Something closed or broke; the agent ends.
    Ended {
        /// What was at the other end of it.
        what: EndedBy,
        /// In words.
        detail: String,
        /// Digest of the stream so far, if it was complete.
        digest: Option<Digest>,
    },
}

/// Why an agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndedBy {
    /// QEMU closed its connection.
    Hypervisor,
    /// The other agent closed or broke the channel.
    Peer,
    /// The channel could not be opened (wrong key, wrong permit, garbage).
    Handshake,
    /// The daemon said so, or went away.
    Daemon,
    /// A budget of the permit ran out.
    Budget,
    /// The one-second guard: no FROZEN after the end of the stream.
    FreezeGuard,
    /// A defect.
    Internal,
}
