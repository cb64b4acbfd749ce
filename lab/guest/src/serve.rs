//! The TCP service: one request per line, one answer per line.
//!
//! | request | answer |
//! |---|---|
//! | `ping N` | `pong N COUNT`, COUNT being this connection's own count of requests |
//! | `secret` | `secret TEXT` |
//! | `rate N` | `ok`; the dirtier now writes N MiB per second |
//! | `stat` | `stat counter=… dirtied_pages=… rate=… disk_sequence=… disk_errors=…` |

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::counter;
use crate::disk::Disk;
use crate::load::Load;

/// Longest request line, in bytes.
const MAX_LINE_BYTES: u64 = 256;
/// Connections served at once; a guest of 96 MiB has room for no more.
const MAX_CONNECTIONS: usize = 32;

/// What the answers are made from.
#[derive(Debug)]
pub struct Service {
    /// The planted secret.
    pub secret: String,
    /// The memory load.
    pub load: Arc<Load>,
    /// The disk writer.
    pub disk: Arc<Disk>,
}

/// Serves for ever.
pub fn run(port: u16, service: Service) -> std::io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    let service = Arc::new(service);
    let connections = Arc::new(AtomicUsize::new(0));
    println!("GUEST-READY port={port}");
    for stream in listener.incoming().flatten() {
        if connections.load(Ordering::Acquire) >= MAX_CONNECTIONS {
            continue; // dropping the stream refuses it
        }
        connections.fetch_add(1, Ordering::AcqRel);
        let (service, connections) = (Arc::clone(&service), Arc::clone(&connections));
        thread::Builder::new().stack_size(128 * 1024).spawn(move || {
            // A broken connection concerns its client alone.
            let _client_gone = converse(stream, &service);
            connections.fetch_sub(1, Ordering::AcqRel);
        })?;
    }
    Ok(())
}

fn converse(mut stream: TcpStream, service: &Service) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = Vec::new();
    for count in 1_u64.. {
        line.clear();
        (&mut lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break; // end of stream, or a line beyond the bound
        }
        let request = String::from_utf8_lossy(&line);
        stream.write_all(answer(request.trim_end(), count, service).as_bytes())?;
    }
    Ok(())
}

fn answer(request: &str, count: u64, service: &Service) -> String {
    let (verb, rest) = request.split_once(' ').unwrap_or((request, ""));
    match verb {
        "ping" => format!("pong {rest} {count}\n"),
        "secret" => format!("secret {}\n", service.secret),
        "rate" => rest.parse().map_or_else(
            |_| "error a number is needed\n".to_owned(),
            |rate| {
                service.load.rate_mib_per_s.store(rate, Ordering::Relaxed);
                "ok\n".to_owned()
            },
        ),
        "stat" => format!(
            "stat counter={} dirtied_pages={} rate={} disk_sequence={} disk_errors={}\n",
            counter::value(),
            service.load.dirtied_pages.load(Ordering::Relaxed),
            service.load.rate_mib_per_s.load(Ordering::Relaxed),
            service.disk.durable_sequence.load(Ordering::Acquire),
            service.disk.errors.load(Ordering::Relaxed),
        ),
        _ => "error unknown request\n".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_answered_and_rates_set() {
        let service = Service { secret: "s3".to_owned(), load: Arc::default(), disk: Arc::default() };
        let check = |request, expect: &str| assert_eq!(answer(request, 4, &service), expect);
        check("ping 17", "pong 17 4\n");
        check("secret", "secret s3\n");
        check("rate x", "error a number is needed\n");
        check("rate 80", "ok\n");
        check("", "error unknown request\n");
        assert_eq!(service.load.rate_mib_per_s.load(Ordering::Relaxed), 80);
    }
}
