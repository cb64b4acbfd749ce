//! Sockets that the daemon opens for its agents: QEMU's side (UNIX, checked to be exactly that QEMU) and the other
//! host's side (TCP on the migration network, only for the address that the permit's source has).

use crate::config::PortRange;
use crate::process::Process;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use types::{ErrorCode, Problem};

/// A connection on a migration network stands in milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// QEMU connects as soon as it is told to migrate.
const QEMU_TIMEOUT: Duration = Duration::from_secs(5);
const QEMU_BUSY_PAUSE: Duration = Duration::from_millis(1);
/// The source makes its connections one after the other, without a pause.
const NEXT_CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Strangers that are reported per listener; after that they are only closed.
const STRANGERS_REPORTED_MAX: usize = 20;

/// A socket for QEMU's `migrate unix:`.
#[derive(Debug)]
pub struct HypervisorListener(UnixListener);

impl HypervisorListener {
    /// Listens at `path`, in place of what may be left there.
    ///
    /// # Errors
    /// The folder can't be used.
    pub fn bind(path: &Path) -> Result<Self, Problem> {
        crate::folders::remove_file(path);
        UnixListener::bind(path).map(Self).map_err(|e| {
            Problem::new(ErrorCode::SourceFailed, format!("cannot listen at {}: {e}", path.display()))
        })
    }

    /// So many connections of exactly this QEMU, in the order in which it makes them.
    ///
    /// # Errors
    /// One did not come.
    pub async fn accept_all(&self, qemu: &Process, count: u16) -> Result<Vec<OwnedFd>, Problem> {
        let mut all = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            all.push(self.accept(qemu).await?);
        }
        Ok(all)
    }

    /// The connection of exactly this QEMU; others are closed.
    ///
    /// # Errors
    /// It did not come.
    pub async fn accept(&self, qemu: &Process) -> Result<OwnedFd, Problem> {
        let work = async {
            loop {
                let (stream, _) = self.0.accept().await?;
                match same_process(&stream, qemu) {
                    Ok(()) => return into_descriptor(stream.into_std()?),
                    Err(error) => tracing::warn!(%error, "a stranger connected to QEMU's socket"),
                }
            }
        };
        within(QEMU_TIMEOUT, work).await.map_err(|e| {
            Problem::new(ErrorCode::HypervisorFailed, format!("QEMU did not connect for its migration: {e}"))
        })
    }
}

/// Connects to a QEMU that waits for a migration.
///
/// # Errors
/// It is not there, or somebody else is.
pub async fn connect_hypervisor(path: &Path, qemu: &Process) -> Result<OwnedFd, Problem> {
    let work = async {
        let stream = connect_unix(path).await?;
        same_process(&stream, qemu)?;
        into_descriptor(stream.into_std()?)
    };
    within(QEMU_TIMEOUT, work).await.map_err(|e| {
        Problem::new(ErrorCode::HypervisorFailed, format!("cannot reach QEMU's incoming socket: {e}"))
    })
}

/// A QEMU that is busy with one connection leaves others waiting, and its queue is short.
async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(QEMU_BUSY_PAUSE).await;
            }
            other => return other,
        }
    }
}

fn same_process(stream: &UnixStream, qemu: &Process) -> io::Result<()> {
    let pid = stream.peer_cred()?.pid();
    if pid.and_then(|p| u32::try_from(p).ok()) == Some(qemu.id().pid) && qemu.is_alive() {
        return Ok(());
    }
    let text = format!("process {pid:?} is at the other end, not QEMU {}", qemu.id().pid);
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

fn into_descriptor(stream: impl Into<OwnedFd>) -> io::Result<OwnedFd> {
    Ok(stream.into())
}

/// A listener on the first free port of the range, on one address.
///
/// # Errors
/// None is free, or the address is not this host's.
pub fn listen(address: IpAddr, ports: PortRange) -> Result<(TcpListener, SocketAddr), Problem> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in ports.first..=ports.last {
        let at = SocketAddr::new(address, port);
        // SO_REUSEADDR: a port in TIME-WAIT of an earlier migration is free. A listening one is not.
        let bound = socket(address).and_then(|s| {
            s.set_reuseaddr(true)?;
            s.bind(at)?;
            s.listen(16)
        });
        match bound {
            Ok(listener) => return Ok((listener, at)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => {
                let text = format!("cannot listen on the migration address {at}: {error}");
                return Err(
                    Problem::new(ErrorCode::TargetFailed, text).hint("is migration_address this host's own?")
                );
            }
        }
    }
    let text = format!("no data port from {} to {} on {address} is free: {last}", ports.first, ports.last);
    Err(Problem::new(ErrorCode::AddressInUse, text))
}

fn socket(address: IpAddr) -> io::Result<TcpSocket> {
    match address {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    }
}

/// Accepts exactly `count` connections of `peer`, gives them to `connections` in the order in which they come, and then
/// listens no more; others are closed and named to `strangers`. The last that is given is an error when the listener
/// broke, or when one came too long after the one before.
pub async fn accept_from(
    listener: TcpListener,
    (peer, count): (IpAddr, u16),
    connections: mpsc::Sender<io::Result<OwnedFd>>,
    strangers: mpsc::Sender<SocketAddr>,
) {
    let mut reported = 0;
    for number in 0..count {
        let next = accept_one(&listener, peer, &mut reported, &strangers);
        let accepted = match number {
            // The source may take its time to start.
            0 => next.await,
            _ => within(NEXT_CONNECTION_TIMEOUT, next).await,
        };
        let broken = accepted.is_err();
        // A shell that is gone needs no connection.
        if connections.send(accepted).await.is_err() || broken {
            return;
        }
    }
}

async fn accept_one(
    listener: &TcpListener,
    peer: IpAddr,
    reported: &mut usize,
    strangers: &mpsc::Sender<SocketAddr>,
) -> io::Result<OwnedFd> {
    loop {
        let (stream, from) = listener.accept().await?;
        if from.ip() == peer {
            return descriptor(stream);
        }
        drop(stream);
        if *reported < STRANGERS_REPORTED_MAX {
            *reported += 1;
            // A full queue means that there are enough reports already.
            strangers.try_send(from).ok();
        }
    }
}

/// Connects from this host's migration address.
///
/// # Errors
/// Nobody listens there, or not in time.
pub async fn connect(from: IpAddr, to: SocketAddr) -> Result<OwnedFd, Problem> {
    let work = async {
        let socket = socket(to.ip())?;
        socket.bind(SocketAddr::new(from, 0))?;
        descriptor(socket.connect(to).await?)
    };
    within(CONNECT_TIMEOUT, work).await.map_err(|e| {
        Problem::new(
            ErrorCode::ChannelFailed,
            format!("cannot connect from {from} to the target at {to}: {e}"),
        )
    })
}

fn descriptor(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    into_descriptor(stream.into_std()?)
}

async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(time, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::process::ProcessId;
    use std::net::Ipv4Addr;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn only_the_named_peer_gets_in() {
        let (listener, at) = listen(HERE, PortRange { first: 17450, last: 17499 }).unwrap();
        let (strangers, mut reports) = mpsc::channel(4);
        let (connections, mut accepted) = mpsc::channel(4);
        let other = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
        let task = tokio::spawn(accept_from(listener, (HERE, 3), connections, strangers));
        let _stranger = connect(other, at).await.unwrap();
        assert_eq!(reports.recv().await.unwrap().ip(), other);
        let mut held = Vec::new();
        for _ in 0..3 {
            assert!(!task.is_finished() && accepted.is_empty());
            held.push(connect(HERE, at).await.unwrap());
            assert!(accepted.recv().await.unwrap().is_ok());
        }
        // Exactly so many: nobody listens any more.
        task.await.unwrap();
        assert_eq!(connect(HERE, at).await.unwrap_err().code, ErrorCode::ChannelFailed);
    }

    #[tokio::test]
    async fn occupied_ports_are_named() {
        let one = PortRange { first: 17500, last: 17500 };
        let (_held, _) = listen(HERE, one).unwrap();
        assert_eq!(listen(HERE, one).unwrap_err().code, ErrorCode::AddressInUse);
        let elsewhere = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
        assert_eq!(listen(elsewhere, one).unwrap_err().code, ErrorCode::TargetFailed);
        let nobody = SocketAddr::new(HERE, 17501);
        assert_eq!(connect(HERE, nobody).await.unwrap_err().code, ErrorCode::ChannelFailed);
    }

    #[tokio::test]
    async fn only_the_right_process_is_taken_for_qemu() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let myself = Process::adopt(&ProcessId::of(std::process::id()).unwrap()).unwrap().unwrap();
        let listener = HypervisorListener::bind(&path).unwrap();
        let (accepted, connected) =
            tokio::join!(listener.accept(&myself), connect_hypervisor(&path, &myself));
        assert!(accepted.is_ok() && connected.is_ok());
        let parent = std::os::unix::process::parent_id();
        let parent = Process::adopt(&ProcessId::of(parent).unwrap()).unwrap().unwrap();
        assert!(connect_hypervisor(&path, &parent).await.is_err());
    }
}
