//! The permit-bound channel between two VM agents: TLS 1.3 without I/O of its own.
//!
//! ```text
//!  client (source agent)                              server (target agent)
//!    EphemeralKey, peer key from the permit             EphemeralKey, peer key from the permit
//!    ---- ALPN outrider/1/<permit digest>/<channel>, raw public keys, X25519MLKEM768 ---->
//!    key pinned, signature over the transcript <----> key pinned, signature over the transcript
//!    handshake() -> ChannelFacts                        handshake() -> ChannelFacts
//!    seal(), seal(), … close_notify()  ------------->   receive(), open(), … Opened::Closed
//! ```
//!
//! Invariants: nothing is sealed or opened before the peer proved the key that the permit names and agreed
//! to exactly this permit's ALPN value (I3); no plaintext is handed out after any error; a connection that
//! ends without close_notify is an error, never an end of data; every buffer is bounded (I11).
//!
//! Threats met here, each with its test: DP-01 sniffing, DP-08 modification, DP-09 downgrade, DP-10 fake destination
//! with a valid chain, DP-12 replay and early data, CP-09 permit relayed over another channel.
//!
//! The client learns that the *server* accepted it only with the server's first record: in TLS 1.3 the
//! client finishes first. A server that refuses answers with an alert, seen by the client's next [`ChannelTls::open`].
//!
//! The receive buffer lives inside, and sealing shows TLS only the part of it that it has already seen:
//! the TLS library indexes into the buffer by offsets it remembers when a peer leaves a handshake message
//! unfinished, and would panic on any other slice.

mod buffer;
mod config;
mod error;
mod io;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls::{CipherSuite, Error as TlsError};

pub use buffer::RECEIVE_BUFFER_BYTES;
pub use config::{ChannelConfig, EphemeralKey};
pub use error::{ChannelError, TlsFault};
pub use io::Received;

use buffer::RecordBuffer;

/// A handshake takes about 3 KiB each way (the hybrid key share is 1.2 KiB); more is not a handshake.
pub const HANDSHAKE_LIMIT_BYTES: usize = 16 * 1024;

/// Plaintext sealed in one go: bounds the scratch space and lets a key update happen in between.
const SEAL_UNIT_BYTES: usize = 512 * 1024;
/// Plaintext of one TLS record.
const RECORD_PLAINTEXT_BYTES: usize = 16 * 1024;
/// Header, inner content type and AEAD tag.
const RECORD_OVERHEAD_BYTES: usize = 22;
/// A key update or an alert that goes out before the data.
const CONTROL_RECORD_BYTES: usize = 256;

/// What was negotiated, for the report and the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelFacts {
    /// `TLSv1.3`.
    pub protocol: &'static str,
    /// IANA name of the cipher suite.
    pub cipher_suite: &'static str,
    /// IANA name of the key exchange group.
    pub key_exchange: String,
}

/// Whether more can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// The peer may send more.
    More,
    /// The peer closed cleanly: everything that it sent was handed out.
    Closed,
}

/// One end of a channel. Sans-I/O but for the helpers `handshake` and `receive`.
pub struct ChannelTls {
    connection: Connection,
    alpn: Vec<u8>,
    incoming: RecordBuffer,
    /// Plaintext that came in the same bytes as the end of the handshake; at most one record.
    early: Vec<u8>,
    phase: Phase,
}

enum Connection {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Handshaking,
    Open { peer_closed: bool, we_closed: bool },
    Dead,
}

/// Both connection types have the same methods and no common trait.
macro_rules! on_connection {
    ($connection:expr, $it:ident => $do:expr) => {
        match $connection {
            Connection::Client($it) => $do,
            Connection::Server($it) => $do,
        }
    };
}

impl ChannelTls {
    /// The end that dials: the source's agent.
    ///
    /// # Errors
    /// The TLS library refused the configuration.
    pub fn client(config: &ChannelConfig) -> Result<Self, ChannelError> {
        let connection = config
            .client()
            .and_then(|tls| UnbufferedClientConnection::new(tls, config::unused_server_name()))
            .map_err(ChannelError::from_tls)?;
        Ok(Self::new(Connection::Client(Box::new(connection)), config))
    }

    /// The end that accepts: the target's agent.
    ///
    /// # Errors
    /// The TLS library refused the configuration.
    pub fn server(config: &ChannelConfig) -> Result<Self, ChannelError> {
        let connection =
            config.server().and_then(UnbufferedServerConnection::new).map_err(ChannelError::from_tls)?;
        Ok(Self::new(Connection::Server(Box::new(connection)), config))
    }

    fn new(connection: Connection, config: &ChannelConfig) -> Self {
        Self {
            connection,
            alpn: config.alpn().to_vec(),
            incoming: RecordBuffer::new(),
            early: Vec::new(),
            phase: Phase::Handshaking,
        }
    }

    /// Where bytes from the socket go, for callers that read by themselves. Never empty as long as
    /// [`Self::open`] is called after every read.
    pub fn receive_space(&mut self) -> &mut [u8] {
        self.incoming.space()
    }

    /// `count` bytes were read into [`Self::receive_space`].
    pub fn received(&mut self, count: usize) {
        self.incoming.commit(count);
    }

    /// Whether bytes wait that [`Self::open`] has not seen: after the handshake they may, and no socket will
    /// become readable for them.
    pub fn has_unopened(&self) -> bool {
        self.incoming.unscanned() > 0 || !self.early.is_empty()
    }

    /// The connection ended. Fine only after the peer's close_notify.
    ///
    /// # Errors
    /// [`ChannelError::Truncated`]; the channel is dead then.
    pub fn end_of_input(&mut self) -> Result<(), ChannelError> {
        match self.phase {
            Phase::Open { peer_closed: true, .. } => Ok(()),
            _ => Err(self.die(ChannelError::Truncated)),
        }
    }

    /// Encrypts `plaintext` of any length and appends the records to `out`.
    ///
    /// # Errors
    /// The channel is not open, is dead, or its keys are exhausted.
    pub fn seal(&mut self, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), ChannelError> {
        self.require_sending("sealing")?;
        for unit in plaintext.chunks(SEAL_UNIT_BYTES) {
            self.emit(Emit::Data(unit), out)?;
        }
        Ok(())
    }

    /// Appends close_notify to `out`: the peer then knows that it has everything. Nothing can be sealed after.
    ///
    /// # Errors
    /// The channel is not open or is dead.
    pub fn close_notify(&mut self, out: &mut Vec<u8>) -> Result<(), ChannelError> {
        self.require_sending("closing")?;
        self.emit(Emit::Close, out)?;
        if let Phase::Open { we_closed, .. } = &mut self.phase {
            *we_closed = true;
        }
        Ok(())
    }

    /// Decrypts every complete record received so far and hands out its plaintext, in order.
    ///
    /// # Errors
    /// The channel's own, or the sink's; in both cases the channel is dead and hands out nothing more.
    pub fn open<E: From<ChannelError>>(
        &mut self,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Opened, E> {
        match self.phase {
            Phase::Open { .. } => {}
            Phase::Dead => return Err(ChannelError::Dead.into()),
            Phase::Handshaking => return Err(ChannelError::NotOpen { operation: "opening" }.into()),
        }
        let result = self.open_all(&mut sink);
        if result.is_err() {
            self.phase = Phase::Dead;
        }
        result
    }

    fn open_all<E: From<ChannelError>>(
        &mut self,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Opened, E> {
        if !self.early.is_empty() {
            sink(&std::mem::take(&mut self.early))?;
        }
        loop {
            let bytes = self.incoming.filled_mut();
            let (discard, turn) =
                on_connection!(&mut self.connection, tls => open_turn(tls.process_tls_records(bytes), sink));
            self.incoming.consume(discard);
            match turn? {
                Turn::Again => {}
                Turn::NeedMore => {
                    self.incoming.mark_scanned();
                    return Ok(Opened::More);
                }
                Turn::PeerClosed => {
                    // Whatever follows a close_notify belongs to nobody.
                    let rest = self.incoming.filled_mut().len();
                    self.incoming.consume(rest);
                    if let Phase::Open { peer_closed, .. } = &mut self.phase {
                        *peer_closed = true;
                    }
                    return Ok(Opened::Closed);
                }
            }
        }
    }

    fn require_sending(&self, operation: &'static str) -> Result<(), ChannelError> {
        match self.phase {
            Phase::Open { we_closed: false, .. } => Ok(()),
            Phase::Open { .. } | Phase::Handshaking => Err(ChannelError::NotOpen { operation }),
            Phase::Dead => Err(ChannelError::Dead),
        }
    }

    fn emit(&mut self, what: Emit<'_>, out: &mut Vec<u8>) -> Result<(), ChannelError> {
        loop {
            let seen = self.incoming.scanned_mut();
            let (discard, done) = on_connection!(
                &mut self.connection,
                tls => emit_turn(tls.process_tls_records(seen), &what, out)
            );
            self.incoming.consume(discard);
            match done {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(self.die(error)),
            }
        }
    }

    /// One turn of the handshake over what was received so far: what to send is appended to `out`.
    fn handshake_turn(&mut self, out: &mut Vec<u8>) -> Result<Step, ChannelError> {
        let bytes = self.incoming.filled_mut();
        let (discard, step) = on_connection!(
            &mut self.connection,
            tls => shake_turn(tls.process_tls_records(bytes), &mut self.early, out)
        );
        self.incoming.consume(discard);
        step.map_err(|error| {
            self.encode_alert(out);
            self.die(error)
        })
    }

    /// After a failure the library holds an alert that tells the peer why, perhaps behind other messages.
    /// Best effort: that the peer can't be told changes nothing for us.
    fn encode_alert(&mut self, out: &mut Vec<u8>) {
        loop {
            let bytes = self.incoming.filled_mut();
            let encoded = on_connection!(&mut self.connection, tls => {
                if !tls.wants_write() {
                    return;
                }
                // What waits to be sent comes before anything received is looked at.
                match tls.process_tls_records(bytes).state {
                    Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                    _ => return,
                }
            });
            if encoded.is_err() {
                return;
            }
        }
    }

    /// The handshake is through: is the peer bound to this very permit and channel?
    fn establish(&mut self) -> Result<ChannelFacts, ChannelError> {
        let facts = on_connection!(&self.connection, tls => {
            let bound = tls.alpn_protocol() == Some(&self.alpn[..]);
            facts(tls.protocol_version(), tls.negotiated_cipher_suite(), tls.negotiated_key_exchange_group())
                .filter(|_| !tls.is_handshaking())
                .map(|facts| (bound, facts))
        });
        match facts {
            Some((true, facts)) => {
                self.phase = Phase::Open { peer_closed: false, we_closed: false };
                Ok(facts)
            }
            Some((false, _)) => Err(self.die(ChannelError::WrongBinding)),
            None => Err(self.die(ChannelError::NotOpen { operation: "establishing" })),
        }
    }

    fn die(&mut self, error: ChannelError) -> ChannelError {
        self.phase = Phase::Dead;
        self.early.clear();
        error
    }
}

/// What a turn of opening led to.
enum Turn {
    Again,
    NeedMore,
    PeerClosed,
}

/// What a turn of the handshake led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Again,
    /// `out` must reach the peer before the handshake goes on.
    Flush,
    NeedMore,
    Done,
}

enum Emit<'a> {
    Data(&'a [u8]),
    Close,
}

fn open_turn<D, E: From<ChannelError>>(
    status: UnbufferedStatus<'_, '_, D>,
    sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> (usize, Result<Turn, E>) {
    let mut discard = status.discard;
    let turn = (|| match status.state.map_err(ChannelError::from_tls)? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record.map_err(ChannelError::from_tls)?;
                discard += record.discard;
                sink(record.payload)?;
            }
            Ok(Turn::Again)
        }
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Turn::PeerClosed),
        ConnectionState::TransmitTlsData(sent) => {
            sent.done();
            Ok(Turn::Again)
        }
        ConnectionState::WriteTraffic(_) => Ok(Turn::NeedMore),
        // With tickets, early data and renegotiation off, an open connection has nothing of its own to say
        // but key updates, which travel with the next sealed data.
        _ => Err(ChannelError::NotOpen { operation: "opening" }.into()),
    })();
    (discard, turn)
}

fn emit_turn<D>(
    status: UnbufferedStatus<'_, '_, D>,
    what: &Emit<'_>,
    out: &mut Vec<u8>,
) -> (usize, Result<bool, ChannelError>) {
    let done = (|| match status.state.map_err(ChannelError::from_tls)? {
        ConnectionState::WriteTraffic(traffic) => write(traffic, what, out).map(|()| true),
        ConnectionState::EncodeTlsData(mut data) => encode(&mut data, out).map(|()| false),
        ConnectionState::TransmitTlsData(sent) => {
            sent.done();
            Ok(false)
        }
        // The peer's close does not end our own direction.
        ConnectionState::PeerClosed => Ok(false),
        _ => Err(ChannelError::NotOpen { operation: "sealing" }),
    })();
    (status.discard, done)
}

fn shake_turn<D>(
    status: UnbufferedStatus<'_, '_, D>,
    early: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> (usize, Result<Step, ChannelError>) {
    let mut discard = status.discard;
    let step = (|| match status.state.map_err(ChannelError::from_tls)? {
        ConnectionState::EncodeTlsData(mut data) => encode(&mut data, out).map(|()| Step::Again),
        ConnectionState::TransmitTlsData(sent) => {
            sent.done();
            Ok(Step::Flush)
        }
        ConnectionState::BlockedHandshake => Ok(Step::NeedMore),
        ConnectionState::WriteTraffic(_) => Ok(Step::Done),
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record.map_err(ChannelError::from_tls)?;
                discard += record.discard;
                early.extend_from_slice(record.payload);
            }
            Ok(Step::Done)
        }
        _ => Err(ChannelError::Truncated),
    })();
    (discard, step)
}

fn encode<D>(
    data: &mut rustls::unbuffered::EncodeTlsData<'_, D>,
    out: &mut Vec<u8>,
) -> Result<(), ChannelError> {
    let at = out.len();
    // An empty buffer is refused with the size that it takes.
    let Err(EncodeError::InsufficientSize(needed)) = data.encode(&mut []) else {
        return Ok(());
    };
    let needed = needed.required_size;
    out.resize(at + needed, 0);
    match data.encode(&mut out[at..]) {
        Ok(written) => out.truncate(at + written),
        Err(_) => out.truncate(at),
    }
    Ok(())
}

fn write<D>(
    mut traffic: WriteTraffic<'_, D>,
    what: &Emit<'_>,
    out: &mut Vec<u8>,
) -> Result<(), ChannelError> {
    let at = out.len();
    let mut room = CONTROL_RECORD_BYTES
        + match what {
            Emit::Data(plaintext) => sealed_bytes(plaintext.len()),
            Emit::Close => 0,
        };
    loop {
        out.resize(at + room, 0);
        let written = match what {
            Emit::Data(plaintext) => traffic.encrypt(plaintext, &mut out[at..]),
            Emit::Close => traffic.queue_close_notify(&mut out[at..]),
        };
        match written {
            Ok(written) => {
                out.truncate(at + written);
                return Ok(());
            }
            // Grows strictly, so that it ends.
            Err(EncryptError::InsufficientSize(needed)) if needed.required_size > room => {
                room = needed.required_size;
            }
            Err(_) => {
                out.truncate(at);
                return Err(ChannelError::Library(TlsFault(TlsError::EncryptError)));
            }
        }
    }
}

/// Bytes on the wire of that much plaintext.
pub fn sealed_bytes(plaintext_bytes: usize) -> usize {
    plaintext_bytes + plaintext_bytes.div_ceil(RECORD_PLAINTEXT_BYTES) * RECORD_OVERHEAD_BYTES
}

fn facts(
    version: Option<rustls::ProtocolVersion>,
    suite: Option<rustls::SupportedCipherSuite>,
    group: Option<&'static dyn rustls::crypto::SupportedKxGroup>,
) -> Option<ChannelFacts> {
    (version == Some(rustls::ProtocolVersion::TLSv1_3)).then_some(())?;
    Some(ChannelFacts {
        protocol: "TLSv1.3",
        cipher_suite: iana_name(suite?.suite())?,
        key_exchange: format!("{:?}", group?.name()),
    })
}

/// IANA's names, not the library's.
fn iana_name(suite: CipherSuite) -> Option<&'static str> {
    match suite {
        CipherSuite::TLS13_AES_256_GCM_SHA384 => Some("TLS_AES_256_GCM_SHA384"),
        CipherSuite::TLS13_AES_128_GCM_SHA256 => Some("TLS_AES_128_GCM_SHA256"),
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => Some("TLS_CHACHA20_POLY1305_SHA256"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
