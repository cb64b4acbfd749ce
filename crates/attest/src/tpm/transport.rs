//! How commands reach a TPM: a device file of the kernel, or a socket of swtpm's data channel. All three
//! carry the bare command and the bare response; the response says its own length.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Longest response that is read, bytes: what the kernel itself takes (`TPM_BUFSIZE`).
pub const RESPONSE_LIMIT_BYTES: usize = 4096;
/// Tag, size and code.
const HEADER_BYTES: usize = 10;
/// Between two tries to connect to a socket whose queue is full.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// Carries one command and brings its response.
pub trait Transport: Send {
    /// Sends `command` and waits for the response until `deadline`.
    ///
    /// # Errors
    /// [`TransportFault`]. After one, the transport gives [`TransportFault::Spent`] for ever: a late response
    /// would be taken for that of another command.
    fn transact(&mut self, command: &[u8], deadline: Instant) -> Result<Zeroizing<Vec<u8>>, TransportFault>;
}

/// Where a TPM is: `device:/dev/tpmrm0`, `unix:/run/swtpm/data.sock` or `tcp:127.0.0.1:2321`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A device file of the kernel. `/dev/tpmrm0` is shared with others; `/dev/tpm0` is not.
    Device(PathBuf),
    /// The UNIX socket of a swtpm's data channel.
    Unix(PathBuf),
    /// The TCP port of a swtpm's data channel.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const RULE: &str =
            "a TPM is device:/dev/tpmrm0, unix:/path/of/socket or tcp:ip:port (paths are absolute)";
        let (kind, rest) = text.split_once(':').ok_or(RULE)?;
        let path = || Some(PathBuf::from(rest)).filter(|path| path.is_absolute()).ok_or(RULE);
        match kind {
            "device" => path().map(Self::Device),
            "unix" => path().map(Self::Unix),
            "tcp" => rest.parse().map(Self::Tcp).map_err(|_| RULE),
            _ => Err(RULE),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(path) => write!(f, "device:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

/// Why a command did not bring a response.
#[derive(Debug, thiserror::Error)]
pub enum TransportFault {
    /// There is no TPM there, or it can't be opened.
    #[error("opening the TPM {address}")]
    Open {
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("{doing} the TPM")]
    Io {
        /// "writing to" or "reading from".
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The deadline passed.
    #[error("no answer within the deadline")]
    Deadline,
    /// It closed the connection.
    #[error("the TPM closed the connection in the middle of a command")]
    Closed,
    /// The response says that it is shorter than a header or longer than any.
    #[error("a response of {found} bytes, more than {RESPONSE_LIMIT_BYTES} or less than {HEADER_BYTES}")]
    Size {
        /// How many.
        found: usize,
    },
    /// It failed before.
    #[error("this connection to the TPM failed before; it must be opened anew")]
    Spent,
}

/// Opens the transport to a TPM.
///
/// # Errors
/// [`TransportFault::Open`].
pub fn open(address: &Address, deadline: Instant) -> Result<Box<dyn Transport>, TransportFault> {
    let opened = match address {
        Address::Device(path) => open_device(path),
        Address::Unix(path) => connect_unix(path, deadline),
        Address::Tcp(address) => connect_tcp(*address, deadline),
    };
    let fd = opened.map_err(|source| TransportFault::Open { address: address.clone(), source })?;
    Ok(Box::new(Stream { fd: Some(fd) }))
}

fn open_device(path: &Path) -> io::Result<OwnedFd> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?.into())
}

fn connect_unix(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    loop {
        match connect(&socket, &address) {
            // Its queue is full: somebody else is being served.
            Err(Errno::AGAIN) if Instant::now() + CONNECT_PAUSE < deadline => {
                std::thread::sleep(CONNECT_PAUSE)
            }
            outcome => return Ok(outcome.map(|()| socket)?),
        }
    }
}

fn connect_tcp(address: SocketAddr, deadline: Instant) -> io::Result<OwnedFd> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::connect_timeout(&address, left)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream.into())
}

/// A file descriptor that never blocks; gone after the first fault.
struct Stream {
    fd: Option<OwnedFd>,
}

impl Transport for Stream {
    fn transact(&mut self, command: &[u8], deadline: Instant) -> Result<Zeroizing<Vec<u8>>, TransportFault> {
        let fd = self.fd.take().ok_or(TransportFault::Spent)?;
        send(&fd, command, deadline)?;
        let response = receive(&fd, deadline)?;
        self.fd = Some(fd);
        Ok(response)
    }
}

fn send(fd: &OwnedFd, mut command: &[u8], deadline: Instant) -> Result<(), TransportFault> {
    let fault = |source: Errno| TransportFault::Io { doing: "writing to", source: source.into() };
    while !command.is_empty() {
        wait(fd, PollFlags::OUT, deadline)?;
        match write(fd, command) {
            Ok(written) => command = command.get(written..).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(TransportFault::Closed),
            Err(errno) => return Err(fault(errno)),
        }
    }
    Ok(())
}

/// Reads until the response is as long as it says. A device gives it in one piece, a socket as it comes.
fn receive(fd: &OwnedFd, deadline: Instant) -> Result<Zeroizing<Vec<u8>>, TransportFault> {
    let fault = |source: Errno| TransportFault::Io { doing: "reading from", source: source.into() };
    let mut buffer = Zeroizing::new([0; RESPONSE_LIMIT_BYTES]);
    let mut filled = 0;
    loop {
        wait(fd, PollFlags::IN, deadline)?;
        match read(fd, buffer.get_mut(filled..).unwrap_or_default()) {
            Ok(0) => return Err(TransportFault::Closed),
            Ok(more) => filled += more,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(Errno::CONNRESET) => return Err(TransportFault::Closed),
            Err(errno) => return Err(fault(errno)),
        }
        let response = buffer.get(..filled).unwrap_or_default();
        match announced(response) {
            Some(size) if !(HEADER_BYTES..=RESPONSE_LIMIT_BYTES).contains(&size) || filled > size => {
                return Err(TransportFault::Size { found: size.max(filled) });
            }
            Some(size) if filled == size => return Ok(Zeroizing::new(response.to_vec())),
            _ => {}
        }
    }
}

/// The length that a response says it has, once that much of it is there.
fn announced(response: &[u8]) -> Option<usize> {
    let (size, _) = response.get(2..)?.split_first_chunk()?;
    Some(usize::try_from(u32::from_be_bytes(*size)).unwrap_or(usize::MAX))
}

fn wait(fd: &OwnedFd, what: PollFlags, deadline: Instant) -> Result<(), TransportFault> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TransportFault::Deadline);
        }
        // Longer than a time can say is for ever: the deadline is looked at again.
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(fd, what)], left.as_ref()) {
            // A closed or broken one is ready, too: reading or writing then says how.
            Ok(1..) => return Ok(()),
            Ok(0) | Err(Errno::INTR) => {}
            Err(errno) => return Err(TransportFault::Io { doing: "waiting for", source: errno.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn addresses_read_back_as_written() {
        for good in ["device:/dev/tpmrm0", "unix:/run/swtpm.sock", "tcp:127.0.0.1:2321", "tcp:[::1]:2321"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in ["", "/dev/tpmrm0", "device:tpm0", "unix:", "tcp:localhost", "usb:/dev/x"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    type Outcome = Result<Zeroizing<Vec<u8>>, TransportFault>;

    /// What becomes of a command, and of the next, when the other side behaves as `serve` says.
    fn against(serve: impl FnOnce(std::os::unix::net::UnixStream) + Send + 'static) -> (Outcome, Outcome) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tpm");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let deadline = Instant::now() + Duration::from_millis(300);
        let mut transport = open(&Address::Unix(path), deadline).unwrap();
        let outcome = transport.transact(&[1; 12], deadline);
        let again = transport.transact(&[1; 12], Instant::now());
        drop(transport);
        server.join().unwrap();
        (outcome, again)
    }

    #[test]
    fn a_response_in_pieces_is_put_together() {
        let (outcome, _) = against(|mut peer| {
            let mut command = [0; 12];
            peer.read_exact(&mut command).unwrap();
            for piece in [&[0x80, 1, 0, 0][..], &[0, 12, 0, 0, 0, 0], &[7, 8]] {
                peer.write_all(piece).unwrap();
            }
        });
        assert_eq!(*outcome.unwrap(), [0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 7, 8]);
    }

    #[test]
    fn silence_nonsense_and_hanging_up_end_in_time_and_spend_the_connection() {
        let check = |response: &'static [u8], hang_up: bool, expect: fn(&TransportFault) -> bool| {
            let (outcome, again) = against(move |mut peer| {
                peer.write_all(response).unwrap();
                if !hang_up {
                    // Until the other side gives up.
                    drop(peer.read_to_end(&mut Vec::new()));
                }
            });
            let fault = outcome.unwrap_err();
            assert!(expect(&fault), "{response:?}: {fault:?}");
            assert!(matches!(again, Err(TransportFault::Spent)), "{again:?}");
        };
        check(&[], false, |fault| matches!(fault, TransportFault::Deadline));
        check(&[0x80, 1, 0, 0, 0, 12, 0, 0], false, |fault| matches!(fault, TransportFault::Deadline));
        check(&[0x80, 1, 0, 0], true, |fault| matches!(fault, TransportFault::Closed));
        check(&[0x80, 1, 0xff, 0xff, 0xff, 0xff], false, |fault| {
            matches!(fault, TransportFault::Size { .. })
        });
        check(&[0x80, 1, 0, 0, 0, 9], false, |fault| matches!(fault, TransportFault::Size { found: 9 }));
        check(&[0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0, 1], false, |fault| {
            matches!(fault, TransportFault::Size { found: 11 })
        });
    }

    #[test]
    fn no_tpm_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let nothing = folder.path().join("nothing");
        for address in [Address::Unix(nothing.clone()), Address::Device(nothing)] {
            let outcome = open(&address, Instant::now() + Duration::from_secs(5));
            assert!(matches!(outcome.err(), Some(TransportFault::Open { .. })), "{address}");
        }
    }
}
