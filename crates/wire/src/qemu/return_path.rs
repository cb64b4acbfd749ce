//! The return path: what the destination's QEMU says to the source's, on the same socket.

use super::{be16, be32};

/// QEMU's bound on a message's data.
pub const MAX_MESSAGE_BYTES: usize = 512;
const HEADER_BYTES: usize = 4;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The final acknowledgement; 0 is success.
    Shut(u32),
    /// Answer to PING.
    Pong(u32),
    /// Post-copy: pages by block name.
    RequestPagesOfBlock,
    /// Post-copy: pages of the last block.
    RequestPages,
    /// Post-copy recovery: the received bitmap.
    ReceivedBitmap,
    /// Post-copy recovery.
    ResumeAcknowledged(u32),
    /// The destination is ready for the switchover.
    SwitchoverAcknowledged,
}

impl Message {
    /// Whether pre-copy knows it. Only these are looked at beyond their header.
    #[must_use]
    pub fn legal_in_precopy(&self) -> bool {
        matches!(self, Self::Shut(_) | Self::Pong(_) | Self::SwitchoverAcknowledged)
    }

    /// Its bytes on the wire; nothing for the messages of post-copy, which are never made here.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let (kind, data): (u16, Option<u32>) = match self {
            Self::Shut(status) => (1, Some(*status)),
            Self::Pong(value) => (2, Some(*value)),
            Self::SwitchoverAcknowledged => (7, None),
            _ => return None,
        };
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend_from_slice(if data.is_some() { &[0, 4] } else { &[0, 0] });
        bytes.extend(data.into_iter().flat_map(u32::to_be_bytes));
        Some(bytes)
    }
}

/// Why a return path was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReturnPathError {
    /// The type is none of the seven.
    #[error("INV-P1: return-path message of unknown type {kind}")]
    UnknownType {
        /// Its type.
        kind: u16,
    },
    /// A length that the type can't have.
    #[error("INV-P1: return-path message of type {kind} with length {len}")]
    BadLength {
        /// Its type.
        kind: u16,
        /// Its length.
        len: u16,
    },
    /// A message after SHUT.
    #[error("INV-P5: return-path message of type {kind} after SHUT")]
    AfterShut {
        /// Its type.
        kind: u16,
    },
}

/// Incremental decoder. Memory: one message, at most [`MAX_MESSAGE_BYTES`] and its header.
#[derive(Debug, Clone, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    shut: bool,
}

impl Decoder {
    /// Takes the next bytes and gives complete messages to `each`, in order.
    ///
    /// # Errors
    /// A message that breaks the grammar; the caller drops the connection.
    pub fn feed(&mut self, input: &[u8], mut each: impl FnMut(Message)) -> Result<(), ReturnPathError> {
        for &byte in input {
            self.pending.push(byte);
            if let Some(message) = self.message()? {
                self.pending.clear();
                self.shut |= matches!(message, Message::Shut(_));
                each(message);
            }
        }
        Ok(())
    }

    fn message(&self) -> Result<Option<Message>, ReturnPathError> {
        let (Some(kind), Some(len)) = (be16(&self.pending, 0), be16(&self.pending, 2)) else {
            return Ok(None);
        };
        if self.shut {
            return Err(ReturnPathError::AfterShut { kind });
        }
        let legal = match kind {
            1 | 2 | 6 => len == 4,
            3 => (14..=MAX_MESSAGE_BYTES).contains(&(len as usize)),
            4 => len == 12,
            5 => (2..=256).contains(&len),
            7 => len == 0,
            _ => return Err(ReturnPathError::UnknownType { kind }),
        };
        if !legal {
            return Err(ReturnPathError::BadLength { kind, len });
        }
        if self.pending.len() < HEADER_BYTES + len as usize {
            return Ok(None);
        }
        let value = be32(&self.pending, HEADER_BYTES).unwrap_or(0);
        Ok(Some(match kind {
            1 => Message::Shut(value),
            2 => Message::Pong(value),
            3 => Message::RequestPagesOfBlock,
            4 => Message::RequestPages,
            5 => Message::ReceivedBitmap,
            6 => Message::ResumeAcknowledged(value),
            _ => Message::SwitchoverAcknowledged,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> (Vec<Message>, Result<(), ReturnPathError>) {
        let (mut decoder, mut seen) = (Decoder::default(), Vec::new());
        let result = decoder.feed(bytes, |message| seen.push(message));
        (seen, result)
    }

    #[test]
    fn the_recorded_return_path_reads_and_round_trips() {
        let bytes = [0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0];
        let expect = vec![Message::Pong(1), Message::Shut(0)];
        assert_eq!(decode(&bytes), (expect.clone(), Ok(())));
        assert_eq!(expect.iter().flat_map(|m| m.encode().unwrap_or_default()).collect::<Vec<_>>(), bytes);
    }

    #[test]
    fn illegal_messages_are_named() {
        assert_eq!(decode(&[0, 9, 0, 0]).1, Err(ReturnPathError::UnknownType { kind: 9 }));
        assert_eq!(decode(&[0, 1, 0, 5]).1, Err(ReturnPathError::BadLength { kind: 1, len: 5 }));
        assert_eq!(decode(&[0, 3, 2, 1]).1, Err(ReturnPathError::BadLength { kind: 3, len: 0x201 }));
        let after = [0, 1, 0, 4, 0, 0, 0, 0, 0, 2, 0, 4];
        assert_eq!(decode(&after).1, Err(ReturnPathError::AfterShut { kind: 2 }));
    }
}
