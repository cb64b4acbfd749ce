//! Throughput of one channel over loopback TCP, both ends on this machine:
//! `cargo run -p outrider-link --release --example throughput [MiB]`.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use outrider_link::channel::{ChannelConfig, ChannelError, ChannelTls, EphemeralKey, Opened};
use rustix::event::{PollFd, PollFlags, poll};
use types::Digest;

const UNIT_BYTES: usize = 512 * 1024;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let total_bytes = std::env::args().nth(1).map_or(Ok(4096), |mib| mib.parse::<usize>())? << 20;
    let (near, far) = (EphemeralKey::generate()?, EphemeralKey::generate()?);
    let permit = Digest::of(b"throughput");
    let sender = ChannelConfig::new(&near, far.spki(), &permit, 0)?;
    let receiver = ChannelConfig::new(&far, near.spki(), &permit, 0)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let sending = std::thread::spawn(move || send(TcpStream::connect(address)?, &sender, total_bytes));
    let mut socket = listener.accept()?.0;
    let started = Instant::now();
    let received_bytes = receive(&mut socket, &receiver)?;
    let took = started.elapsed();
    sending.join().map_err(|_| "the sender panicked")??;
    let rate = received_bytes as f64 / took.as_secs_f64() / 1e9;
    println!("{received_bytes} bytes in {:.2} s: {rate:.2} GB/s", took.as_secs_f64());
    Ok(())
}

fn send(mut socket: TcpStream, config: &ChannelConfig, total_bytes: usize) -> Outcome<()> {
    let mut tls = ChannelTls::client(config)?;
    let facts = tls.handshake(&socket, Instant::now() + Duration::from_secs(5))?;
    println!("{facts:?}");
    let plain = vec![0x5a; UNIT_BYTES];
    let mut out = Vec::new();
    for _ in 0..total_bytes / UNIT_BYTES {
        out.clear();
        tls.seal(&plain, &mut out)?;
        socket.write_all(&out)?;
    }
    out.clear();
    tls.close_notify(&mut out)?;
    Ok(socket.write_all(&out)?)
}

fn receive(socket: &mut TcpStream, config: &ChannelConfig) -> Outcome<usize> {
    let mut tls = ChannelTls::server(config)?;
    tls.handshake(&*socket, Instant::now() + Duration::from_secs(5))?;
    let mut received_bytes = 0;
    loop {
        let opened = tls.open(|bytes| -> Result<(), ChannelError> {
            received_bytes += bytes.len();
            Ok(())
        })?;
        if opened == Opened::Closed {
            return Ok(received_bytes);
        }
        poll(&mut [PollFd::new(&*socket, PollFlags::IN)], None)?;
        tls.receive(&*socket)?;
    }
}
