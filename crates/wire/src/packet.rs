//! Packets between a host daemon and its VM agent: one JSON document each.

use serde::Serialize;
use serde::de::DeserializeOwned;
use types::agent::MAX_PACKET_BYTES;

/// Why a packet was refused.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// It is longer than [`MAX_PACKET_BYTES`].
    #[error("packet of {len_bytes} bytes, at most {MAX_PACKET_BYTES} are allowed")]
    TooLong {
        /// Its length.
        len_bytes: usize,
    },
    /// It is no such message.
    #[error("packet is not a message of the agent protocol")]
    Malformed(#[source] serde_json::Error),
}

/// A packet for [`types::agent::ToAgent`] or [`types::agent::FromAgent`].
///
/// # Errors
/// A message that does not fit (an inventory with thousands of long names).
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, PacketError> {
    let packet = serde_json::to_vec(message).map_err(PacketError::Malformed)?;
    check_length(&packet)?;
    Ok(packet)
}

/// The message of a packet.
///
/// # Errors
/// Too long, or not such a message.
pub fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, PacketError> {
    check_length(packet)?;
    serde_json::from_slice(packet).map_err(PacketError::Malformed)
}

fn check_length(packet: &[u8]) -> Result<(), PacketError> {
    if packet.len() > MAX_PACKET_BYTES {
        return Err(PacketError::TooLong { len_bytes: packet.len() });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use types::agent::{FromAgent, ToAgent};
    use types::{Nonce, handover::Side};

    #[test]
    fn messages_round_trip_and_strangers_are_refused() {
        let prove = ToAgent::Prove { nonce: Nonce::from_bytes([3; 16]) };
        assert_eq!(decode::<ToAgent>(&encode(&prove).unwrap()).unwrap(), prove);
        let hello = br#"{"type":"hello","side":"source","migration":"m-00000000000000000000000000000001"}"#;
        assert!(matches!(decode(hello).unwrap(), ToAgent::Hello { side: Side::Source, .. }));
        for bad in [&b"{}"[..], b"", b"{\"type\":\"armed\"} x", b"{\"type\":\"fly\"}"] {
            assert!(matches!(decode::<FromAgent>(bad), Err(PacketError::Malformed(_))));
        }
        let long = vec![b' '; MAX_PACKET_BYTES + 1];
        assert!(matches!(decode::<FromAgent>(&long), Err(PacketError::TooLong { .. })));
    }
}
