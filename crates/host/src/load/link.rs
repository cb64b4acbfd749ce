//! How much of the migration link is used.

use super::WINDOWS;
use crate::daemon::lock;
use crate::rpc::interfaces;
use std::collections::VecDeque;
use std::fs;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use types::host::LinkUse;

/// An interface keeps its name and address; one that was made anew is found within this.
const FIND_PERIOD: Duration = Duration::from_secs(60);

/// Looks at the counters of one interface.
#[derive(Debug, Clone)]
pub(super) struct LinkMeter {
    address: IpAddr,
    mbit_per_s: Option<u32>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    found: Option<Found>,
    looked_for: Option<Instant>,
    counters: VecDeque<(Instant, Counters)>,
}

#[derive(Debug, Clone)]
struct Found {
    interface: String,
    kernel_mbit_per_s: Option<u32>,
}

/// Bytes since the interface was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counters {
    received: u64,
    sent: u64,
}

impl LinkMeter {
    pub(super) fn new(address: IpAddr, mbit_per_s: Option<u32>) -> Self {
        Self { address, mbit_per_s, seen: Arc::default() }
    }

    /// Reads the counters once; finds the interface where that is due.
    pub(super) async fn look(&self) {
        let due = lock(&self.seen).looked_for.is_none_or(|at| at.elapsed() >= FIND_PERIOD);
        if due {
            let found = self.find().await;
            let mut seen = lock(&self.seen);
            let moved = seen.found.as_ref().map(|f| &f.interface) != found.as_ref().map(|f| &f.interface);
            if moved {
                seen.counters.clear();
            }
            (seen.found, seen.looked_for) = (found, Some(Instant::now()));
        }
        let mut seen = lock(&self.seen);
        let name = seen.found.as_ref().map(|found| found.interface.clone());
        // Of this process's own network namespace, which /sys need not be.
        let text = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
        match name.and_then(|name| counters(&text, &name)) {
            Some(now) => {
                seen.counters.push_back((Instant::now(), now));
                if seen.counters.len() > WINDOWS + 1 {
                    seen.counters.pop_front();
                }
            }
            None => seen.counters.clear(),
        }
    }

    async fn find(&self) -> Option<Found> {
        let all =
            interfaces().await.inspect_err(|problem| tracing::warn!(%problem, "cannot list interfaces"));
        let own = |text: &String| text.parse::<IpAddr>().is_ok_and(|a| a == self.address);
        let interface = all.ok()?.into_iter().find(|i| i.addresses.iter().any(own))?;
        let kernel_mbit_per_s = speed(&interface.name, &interface.mac);
        Some(Found { interface: interface.name, kernel_mbit_per_s })
    }

    /// What was used in the last windows; nothing until it was looked at twice.
    pub(super) fn used(&self) -> Option<LinkUse> {
        let seen = lock(&self.seen);
        let found = seen.found.clone()?;
        let (first, last) = (seen.counters.front()?, seen.counters.back()?);
        let seconds = (last.0 - first.0).as_secs_f64();
        if seconds <= 0.0 {
            return None;
        }
        #[allow(clippy::cast_precision_loss)]
        let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
        let mbit_per_s = self.mbit_per_s.or(found.kernel_mbit_per_s);
        Some(LinkUse {
            interface: found.interface,
            received_bytes_per_s: rate(first.1.received, last.1.received),
            sent_bytes_per_s: rate(first.1.sent, last.1.sent),
            capacity_bytes_per_s: mbit_per_s.map(|mbit| f64::from(mbit) * 125_000.0),
        })
    }
}

/// As the kernel knows it, if /sys shows that very interface: it may be of another namespace, where the name is
/// another's. Virtual interfaces say -1.
fn speed(name: &str, mac: &str) -> Option<u32> {
    let read = |file: &str| fs::read_to_string(format!("/sys/class/net/{name}/{file}")).ok();
    let same = !name.contains('/') && read("address")?.trim().eq_ignore_ascii_case(mac);
    read("speed")?.trim().parse().ok().filter(|mbit: &u32| same && *mbit > 0)
}

/// Of one interface in `/proc/net/dev`: name, eight columns of receiving, then sending.
fn counters(table: &str, name: &str) -> Option<Counters> {
    let of = |line: &str| {
        let (interface, numbers) = line.split_once(':')?;
        let mut numbers = numbers.split_whitespace().map(str::parse::<u64>);
        let counters = Counters { received: numbers.next()?.ok()?, sent: numbers.nth(7)?.ok()? };
        (interface.trim() == name).then_some(counters)
    };
    table.lines().find_map(of)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_table_of_interfaces_is_read() {
        let table = "Inter-|   Receive                    |  Transmit\n face |bytes    packets errs\n\
            \x20   lo: 10 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n  mig0: 300 2 0 0 0 0 0 0 400 2 0 0 0 0 0 0\n broken: 1\n";
        assert_eq!(counters(table, "mig0"), Some(Counters { received: 300, sent: 400 }));
        assert_eq!(counters(table, "lo"), Some(Counters { received: 10, sent: 20 }));
        assert_eq!((counters(table, "broken"), counters(table, "mig")), (None, None));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_goes_over_the_loopback_is_measured() {
        let meter = LinkMeter::new("127.0.0.1".parse().unwrap(), Some(8));
        meter.look().await;
        assert_eq!(meter.used(), None, "one look is no rate");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut all).unwrap();
            all.len()
        });
        std::net::TcpStream::connect(address).unwrap().write_all(&vec![7; 8 << 20]).unwrap();
        assert_eq!(reader.join().unwrap(), 8 << 20);
        meter.look().await;
        let used = meter.used().unwrap();
        assert_eq!((used.interface.as_str(), used.capacity_bytes_per_s), ("lo", Some(1e6)));
        assert!(used.sent_bytes_per_s > 0.0 && used.received_bytes_per_s > 0.0, "{used:?}");
        let nowhere = LinkMeter::new("192.0.2.1".parse().unwrap(), None);
        nowhere.look().await;
        nowhere.look().await;
        assert_eq!(nowhere.used(), None);
    }
}
