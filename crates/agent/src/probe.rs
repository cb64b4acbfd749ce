//! The micro-probe: fresh memory, touched page by page, and work on a CPU, in the cgroup where guests live. The host daemon
//! keeps one such process started ahead; it answers one order and ends. It sees nothing of any peer.

use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use types::host::Probe;

/// A probe that takes more memory would itself be a load.
const MEMORY_BYTES_MAX: u64 = 64 << 20;
/// Nor may it hold a CPU for longer.
const WORK_MAX: Duration = Duration::from_millis(20);
const PAGE_BYTES: usize = 4096;
/// One unit is about a microsecond: small against the shortest work, large against reading the clock.
const ROUNDS_PER_UNIT: u64 = 1_000;

/// Answers the one order on standard input: two 64-bit numbers, little-endian, bytes and microseconds.
///
/// # Errors
/// There is no order, or nobody takes the answer.
pub fn serve() -> io::Result<()> {
    let mut daemon = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let (mut bytes, mut work_us) = ([0; 8], [0; 8]);
    daemon.read_exact(&mut bytes)?;
    daemon.read_exact(&mut work_us)?;
    let done = probe(u64::from_le_bytes(bytes), Duration::from_micros(u64::from_le_bytes(work_us)));
    daemon.write_all(&serde_json::to_vec(&done)?)
}

/// Does it, within the limits.
#[must_use]
pub fn probe(bytes: u64, work: Duration) -> Probe {
    let (touched_bytes, touched) = touch(bytes.min(MEMORY_BYTES_MAX));
    let (work_units, worked, cpu) = compute(work.min(WORK_MAX));
    Probe {
        touched_bytes,
        touch_us: micros(touched),
        work_units,
        work_us: micros(worked),
        cpu_us: micros(cpu),
    }
}

/// Memory that was never touched comes page by page, by faults: just what a guest's memory does.
fn touch(bytes: u64) -> (u64, Duration) {
    let began = Instant::now();
    let mut memory = vec![0_u8; usize::try_from(bytes).unwrap_or(0)];
    let mut touched = 0;
    for page in memory.chunks_mut(PAGE_BYTES) {
        if let Some(first) = page.first_mut() {
            *first = 1;
        }
        touched += page.len() as u64;
    }
    black_box(&memory);
    (touched, began.elapsed())
}

fn compute(work: Duration) -> (u64, Duration, Duration) {
    let (began, cpu_began) = (Instant::now(), cpu_time());
    let (mut units, mut state) = (0, 0x9e37_79b9_7f4a_7c15_u64);
    loop {
        for round in 0..ROUNDS_PER_UNIT {
            state = (state ^ (state >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb).wrapping_add(round);
        }
        state = black_box(state);
        units += 1;
        let elapsed = began.elapsed();
        if elapsed >= work {
            return (units, elapsed, cpu_time().saturating_sub(cpu_began));
        }
    }
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_what_it_is_asked_and_no_more_than_it_may() {
        let done = probe(1 << 20, Duration::from_millis(2));
        assert_eq!(done.touched_bytes, 1 << 20);
        assert!(done.touch_us > 0 && done.work_units > 0 && done.work_us >= 2_000, "{done:?}");
        assert!(done.cpu_us > 0 && done.cpu_us <= done.work_us + 1_000, "{done:?}");
        let most = probe(u64::MAX, Duration::ZERO);
        assert_eq!((most.touched_bytes, most.work_units), (MEMORY_BYTES_MAX, 1));
        let began = Instant::now();
        let (_, worked, _) = compute(WORK_MAX.min(Duration::MAX));
        assert!(worked >= WORK_MAX && began.elapsed() < Duration::from_secs(5));
        assert_eq!(probe(0, Duration::ZERO).touched_bytes, 0);
    }
}
