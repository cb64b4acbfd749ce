//! A packet capture of the migration network, and the search of it for what must not be there.

mod search;

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Protocol, Socket, Type};

use crate::net::{self, Net};
pub use search::{Needle, SearchReport, search};

/// Every protocol, in network byte order as the kernel wants it.
const ETH_P_ALL: u16 = 3;
/// Room for frames that the writer has not taken yet: a burst of a fast migration must not be lost.
const RECEIVE_BUFFER_BYTES: usize = 128 << 20;
/// Largest frame: segmentation offload joins up to 64 KiB.
const MAX_FRAME_BYTES: usize = 128 << 10;
/// A blocked read looks this often whether it should stop.
const READ_SLICE: Duration = Duration::from_millis(50);
/// pcap file header: magic for microseconds, version 2.4, snapshot length, Ethernet.
const PCAP_MAGIC: u32 = 0xa1b2_c3d4;
const LINK_ETHERNET: u32 = 1;

/// A capture at work.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Captured>>>,
}

/// What was captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// The file, in pcap format.
    pub path: PathBuf,
    /// Frames seen.
    pub frames: u64,
    /// Bytes of all frames seen, headers included.
    pub bytes: u64,
    /// Frames seen but not written, because the file had reached its bound.
    pub unwritten_frames: u64,
}

impl Capture {
    /// Listens to the whole migration network (see [`Net::attach_listener`]) and writes to `path`.
    pub fn start(net: &Net, path: &Path, max_bytes: u64) -> Result<Self> {
        let namespace = net.attach_listener()?;
        // The namespace has one card, so a socket that is bound to none hears that card alone.
        let socket = net::inside(&namespace, open)?;
        let mut file = CaptureFile::create(path, max_bytes)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stop);
        let work = move || file.record(&socket, &stops);
        let thread = thread::Builder::new().name("capture".to_owned()).spawn(work);
        Ok(Self { stop, thread: Some(thread.context("starting the capture")?) })
    }

    /// Takes what is still in the buffer, and ends.
    pub fn finish(mut self) -> Result<Captured> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().context("a capture ends once")?;
        thread.join().map_err(|_| anyhow!("the capture panicked"))?
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn open() -> Result<Socket> {
    let every_protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let socket =
        Socket::new(Domain::PACKET, Type::RAW, Some(every_protocol)).context("opening a packet socket")?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER_BYTES)
        .context("enlarging the capture's buffer")?;
    socket.set_read_timeout(Some(READ_SLICE)).context("setting the read timeout")?;
    Ok(socket)
}

struct CaptureFile {
    writer: BufWriter<File>,
    captured: Captured,
    written_bytes: u64,
    max_bytes: u64,
}

impl CaptureFile {
    fn create(path: &Path, max_bytes: u64) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        let mut header = Vec::new();
        header.extend_from_slice(&PCAP_MAGIC.to_le_bytes());
        header.extend_from_slice(&2_u16.to_le_bytes());
        header.extend_from_slice(&4_u16.to_le_bytes());
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&u32::try_from(MAX_FRAME_BYTES).unwrap_or(u32::MAX).to_le_bytes());
        header.extend_from_slice(&LINK_ETHERNET.to_le_bytes());
        writer.write_all(&header).context("writing the capture")?;
        Ok(Self {
            writer,
            captured: Captured { path: path.to_owned(), frames: 0, bytes: 0, unwritten_frames: 0 },
            written_bytes: 0,
            max_bytes,
        })
    }

    fn record(&mut self, mut socket: &Socket, stop: &AtomicBool) -> Result<Captured> {
        let mut frame = vec![0; MAX_FRAME_BYTES];
        loop {
            // Asked before the read: what arrived before the request to stop is still taken.
            let stopping = stop.load(Ordering::Acquire);
            match socket.read(&mut frame) {
                Ok(length) => self.add(&frame[..length])?,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if stopping {
                        self.writer.flush().context("writing the capture")?;
                        return Ok(self.captured.clone());
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("capturing"),
            }
        }
    }

    fn add(&mut self, frame: &[u8]) -> Result<()> {
        let length = u32::try_from(frame.len()).context("a frame has less than 4 GiB")?;
        self.captured.frames += 1;
        self.captured.bytes += u64::from(length);
        if self.written_bytes + u64::from(length) > self.max_bytes {
            self.captured.unwritten_frames += 1;
            return Ok(());
        }
        self.written_bytes += u64::from(length);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        for word in [seconds, now.subsec_micros(), length, length] {
            self.writer.write_all(&word.to_le_bytes()).context("writing the capture")?;
        }
        self.writer.write_all(frame).context("writing the capture")
    }
}
