//! The direct way between daemons: a frozen source asks the target to renounce, also when no manager can be reached.
//!
//! Open only while a hand-over is open, only for the host that the permit names. What is said is signed by itself:
//! this way may delay or lose a word, never forge one.

use crate::daemon::Daemon;
use crate::migration::attempt::AttemptFile;
use crate::migration::registry::verify_ask;
use crate::migration::{Input, PeerAnswer};
use engine::handover::TargetStatus;
use link::ca::CaCertificate;
use link::control::TlsConn;
use link::identity::LiveIdentity;
use link::peer::PeerListener;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use types::permit::hex_bytes;
use types::{ErrorCode, HostName, Problem};

/// A signed statement is at most 4 KiB, twice that in hexadecimal.
const FRAME_BYTES_MAX: u32 = 16 * 1024;
/// A renunciation follows the target QEMU's death, which may take a while; the source asks again anyway.
const CONVERSATION_TIMEOUT: Duration = Duration::from_secs(8);
/// Answers that wait for a slow reader.
const ANSWERS_MAX: usize = 4;

/// Who this daemon is to other daemons.
#[derive(Debug)]
pub struct PeerSide {
    /// Its certificate.
    pub identity: LiveIdentity,
    /// The CA that vouches for all hosts.
    pub ca: CaCertificate,
}

/// One frame: 32-bit length, big endian, then JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say")]
enum Frame {
    /// Source: the signed request.
    Renounce {
        #[serde(with = "hex_bytes")]
        request: Vec<u8>,
    },
    /// Target: its signed renunciation.
    Renounced {
        #[serde(with = "hex_bytes")]
        token: Vec<u8>,
    },
    /// Target: no proof of anything.
    Status { status: TargetStatus },
}

/// Serves the source of one open hand-over; ends when dropped.
#[derive(Debug)]
pub struct PeerServer {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for PeerServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl PeerServer {
    /// Listens for `source` on the first free data port, or on exactly `address`.
    ///
    /// # Errors
    /// No port is free.
    pub async fn bind(
        daemon: &Arc<Daemon>,
        source: &HostName,
        address: Option<SocketAddr>,
        inbox: mpsc::WeakSender<Input>,
    ) -> Result<Self, Problem> {
        let ports = daemon.data_ports;
        let candidates: Vec<_> = match address {
            Some(address) => vec![address],
            // From the top: agents take ports from the bottom.
            None => (ports.first..=ports.last)
                .rev()
                .map(|port| SocketAddr::new(daemon.migration_address, port))
                .collect(),
        };
        let mut last = "the range of data ports is empty".to_owned();
        for candidate in candidates {
            let side = &daemon.peers;
            match PeerListener::bind(candidate, side.identity.clone(), &side.ca, source).await {
                Ok(listener) => {
                    let address = listener.local_address();
                    let task = tokio::spawn(serve(daemon.clone(), listener, inbox));
                    return Ok(Self { address, task });
                }
                Err(error) => last = crate::error::chain(&error),
            }
        }
        Err(Problem::new(ErrorCode::AddressInUse, format!("no data port is free: {last}")))
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn serve(daemon: Arc<Daemon>, mut listener: PeerListener, inbox: mpsc::WeakSender<Input>) {
    loop {
        let connection = listener.accept().await;
        let (daemon, inbox) = (daemon.clone(), inbox.clone());
        tokio::spawn(async move {
            let work = answer(&daemon, connection, inbox);
            if let Ok(Err(error)) = tokio::time::timeout(CONVERSATION_TIMEOUT, work).await {
                tracing::debug!(%error, "a source's request");
            }
        });
    }
}

async fn answer(daemon: &Daemon, mut connection: TlsConn, inbox: mpsc::WeakSender<Input>) -> io::Result<()> {
    let Frame::Renounce { request } = read(&mut connection).await? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let request = verify_ask(daemon, request).map_err(|p| io::Error::other(p.to_string()))?;
    let (asker, mut answers) = mpsc::channel(ANSWERS_MAX);
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    let inbox = inbox.upgrade().ok_or_else(gone)?;
    inbox.send(Input::Asked(request, asker)).await.map_err(|_| gone())?;
    drop(inbox);
    while let Some(said) = answers.recv().await {
        let (frame, over) = match said {
            PeerAnswer::Renounced(token) => (Frame::Renounced { token }, true),
            PeerAnswer::Status(status) => (Frame::Status { status }, status == TargetStatus::Running),
        };
        write(&mut connection, &frame).await?;
        if over {
            break;
        }
    }
    connection.shutdown().await
}

/// Asks the target; gives everything that it answered. Nothing when it can't be reached.
pub async fn ask(daemon: &Daemon, file: &AttemptFile, request: Vec<u8>) -> Vec<PeerAnswer> {
    let mut answers = Vec::new();
    let Some(address) = file.peer_address else { return answers };
    let work = async {
        let side = &daemon.peers;
        let target = &file.claims.target.host;
        let mut connection = link::peer::connect(address, &side.identity, &side.ca, target)
            .await
            .map_err(|e| io::Error::other(crate::error::chain(&e)))?;
        write(&mut connection, &Frame::Renounce { request }).await?;
        loop {
            match read(&mut connection).await? {
                Frame::Renounced { token } => {
                    answers.push(PeerAnswer::Renounced(token));
                    return Ok(());
                }
                Frame::Status { status } if answers.len() < ANSWERS_MAX => {
                    answers.push(PeerAnswer::Status(status));
                }
                _ => return Err(io::Error::from(io::ErrorKind::InvalidData)),
            }
        }
    };
    match tokio::time::timeout(CONVERSATION_TIMEOUT, work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the target does not answer directly"),
        Err(_) => tracing::debug!("the target does not answer directly in time"),
    }
    answers
}

async fn read(connection: &mut TlsConn) -> io::Result<Frame> {
    let length = connection.read_u32().await?;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is too long"));
    }
    let mut bytes = vec![0; length as usize];
    connection.read_exact(&mut bytes).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

async fn write(connection: &mut TlsConn, frame: &Frame) -> io::Result<()> {
    let bytes = serde_json::to_vec(frame)?;
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    connection.write_u32(length).await?;
    connection.write_all(&bytes).await?;
    connection.flush().await
}
