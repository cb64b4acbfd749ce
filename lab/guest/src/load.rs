//! Memory that holds random data, and a dirtier that rewrites a working set at a chosen rate.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const WORDS_PER_PAGE: usize = 512;
const PAGES_PER_MIB: u64 = 256;
/// Longest arrears the dirtier catches up with, so that a pause of the VM does not end in a storm.
const MAX_ARREARS: Duration = Duration::from_millis(200);

/// Controls and figures of the load, shared with the TCP service.
#[derive(Debug, Default)]
pub struct Load {
    /// Wanted rate, in MiB per second.
    pub rate_mib_per_s: AtomicU64,
    /// Pages written so far.
    pub dirtied_pages: AtomicU64,
}

/// Fills memory and starts the dirtier. The filled memory is kept by a thread that never ends.
pub fn start(fill_mib: usize, working_set_mib: usize, rate_mib_per_s: u64) -> std::io::Result<Arc<Load>> {
    let load = Arc::new(Load::default());
    load.rate_mib_per_s.store(rate_mib_per_s, Ordering::Relaxed);
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let fill = random_words(fill_mib, &mut random);
    let working_set = random_words(working_set_mib, &mut random);
    let shared = Arc::clone(&load);
    thread::Builder::new().name("dirtier".to_owned()).spawn(move || {
        let _kept = fill;
        dirty(&shared, working_set, random);
    })?;
    Ok(load)
}

fn random_words(mib: usize, random: &mut Random) -> Vec<u64> {
    (0..mib * MIB / 8).map(|_| random.next()).collect()
}

fn dirty(load: &Load, mut working_set: Vec<u64>, mut random: Random) {
    // Load must not starve the counter or the service on a guest with one vCPU; failure only makes it ruder.
    let _ruder = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 10);
    let pages = working_set.len() / WORDS_PER_PAGE;
    let mut position = 0;
    let mut last = Instant::now();
    let mut owed_pages = 0.0_f64;
    loop {
        thread::sleep(Duration::from_millis(5));
        let elapsed = last.elapsed().min(MAX_ARREARS);
        last = Instant::now();
        let rate = load.rate_mib_per_s.load(Ordering::Relaxed);
        if pages == 0 || rate == 0 {
            owed_pages = 0.0;
            continue;
        }
        owed_pages += elapsed.as_secs_f64() * pages_per_second(rate);
        while owed_pages >= 1.0 {
            let value = random.next();
            working_set[position * WORDS_PER_PAGE + position % WORDS_PER_PAGE] = value;
            position = (position + 1) % pages;
            load.dirtied_pages.fetch_add(1, Ordering::Relaxed);
            owed_pages -= 1.0;
        }
        std::hint::black_box(&working_set);
    }
}

fn pages_per_second(rate_mib_per_s: u64) -> f64 {
    let pages = rate_mib_per_s.saturating_mul(PAGES_PER_MIB);
    f64::from(u32::try_from(pages).unwrap_or(u32::MAX))
}

/// xorshift64: incompressible data, quickly; not for secrets.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
