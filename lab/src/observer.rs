//! The outside observer: how many copies of one VM execute, judged every millisecond without asking QEMU.
//!
//! It reads the guest's counter page out of each QEMU's memory (`/proc/PID/mem`) and the CPU time of its
//! vCPU threads (`/proc/PID/task/TID/schedstat`). A frozen QEMU can't answer a question and a lying one could;
//! neither matters here.
//!
//! Two threads: the *finder* looks for QEMU processes of the VM and for the page in their memory (slow,
//! thirty times a second), the *sampler* reads what was found (fast, every millisecond) and feeds [`judge`],
//! which is pure and tested on its own.

pub mod judge;
mod memory;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use outrider_lab_guest::page;
use serde::Serialize;
use uuid::Uuid;

use crate::net::{Machine, Net};
use crate::process;
use judge::{Judge, Sample, Verdict};
use memory::{Copy, Hint, Look};

/// Distance of two samples.
const SAMPLE: Duration = Duration::from_millis(1);
/// Distance of two looks for new processes and pages.
const FIND: Duration = Duration::from_millis(30);
/// A scan of a whole memory may take this share of the finder's time (one in so many).
const SCAN_SHARE: u32 = 5;
/// A process without the page at the known place for so long is searched whole: it may have booted by itself.
const HINT_LIMIT: Duration = Duration::from_secs(3);
/// Copies watched at once; a VM has two in a migration, and the lab's attacks make a few more.
const MAX_COPIES: usize = 8;

/// A running observer of one VM. Dropping it stops the threads.
#[derive(Debug)]
pub struct Observer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the observer saw, so far or in the end.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The judgement.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Each copy, in the order in which they were found.
    pub processes: Vec<Process>,
    /// Samples taken.
    pub samples: u64,
    /// Longest distance of two samples, in milliseconds: what happened in between was seen late.
    pub longest_sample_distance_ms: f64,
    /// CPU time of the sampling thread, in milliseconds.
    pub sampler_cpu_ms: u64,
    /// Time watched, in milliseconds.
    pub watched_ms: u64,
}

/// One QEMU process that holds a copy.
#[derive(Debug, Clone, Serialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// The machine it runs on, by its network namespace.
    pub machine: String,
    /// Whether it still exists.
    pub alive: bool,
    /// State letter of its first vCPU thread at last sight (`T` stopped, `D` in the v1 freezer, …).
    pub vcpu_state: Option<char>,
}

#[derive(Debug)]
struct Shared {
    uuid: Uuid,
    machines: BTreeMap<u64, String>,
    stop: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    judge: Judge,
    found: Vec<Copy>,
    processes: Vec<Process>,
    started: Instant,
    samples: u64,
    longest_distance: Duration,
    sampler_cpu_ms: u64,
    watched: Duration,
}

impl Observer {
    /// Starts watching the VM with this UUID on the hosts of `net` (and anywhere else on the machine).
    pub fn start(net: &Net, uuid: Uuid) -> Result<Self> {
        let mut machines = BTreeMap::new();
        for host in Machine::HOSTS {
            machines.insert(net.node(host).namespace_inode()?, host.name().to_owned());
        }
        let shared = Arc::new(Shared {
            uuid,
            machines,
            stop: AtomicBool::new(false),
            state: Mutex::new(State {
                judge: Judge::default(),
                found: Vec::new(),
                processes: Vec::new(),
                started: Instant::now(),
                samples: 0,
                longest_distance: Duration::ZERO,
                sampler_cpu_ms: 0,
                watched: Duration::ZERO,
            }),
        });
        let mut observer = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        let finder = Arc::clone(&shared);
        observer.thread("finder", move || find(&finder))?;
        observer.thread("sampler", move || sample(&shared))?;
        Ok(observer)
    }

    fn thread(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
        self.threads.push(thread.with_context(|| format!("starting the observer's {name}"))?);
        Ok(())
    }

    /// What was seen so far.
    #[must_use]
    pub fn report(&self) -> Report {
        self.shared.state().report()
    }

    /// Machines whose copy has moved within the last `within`.
    #[must_use]
    pub fn running_on(&self, within: Duration) -> Vec<String> {
        let state = self.shared.state();
        let now_us = micros(state.started.elapsed());
        let moving = state.judge.moving(now_us, micros(within));
        moving.iter().map(|index| state.processes[*index].machine.clone()).collect()
    }

    /// Waits until exactly these machines run a copy.
    pub fn wait_running_on(&self, machines: &[Machine], limit: Duration) -> Result<()> {
        let mut wanted: Vec<&str> = machines.iter().map(|machine| machine.name()).collect();
        wanted.sort_unstable();
        process::wait_for(&format!("copies running on {wanted:?}"), limit, || {
            let mut running = self.running_on(Duration::from_millis(50));
            running.sort_unstable();
            Ok((running == wanted).then_some(()))
        })
    }

    /// Stops watching.
    pub fn stop(mut self) -> Report {
        self.end();
        self.report()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A panic of the thread has been printed; the report shows samples that stopped.
            let _printed = thread.join();
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

impl State {
    fn report(&self) -> Report {
        Report {
            verdict: self.judge.verdict(micros(self.watched)),
            processes: self.processes.clone(),
            samples: self.samples,
            longest_sample_distance_ms: self.longest_distance.as_secs_f64() * 1000.0,
            sampler_cpu_ms: self.sampler_cpu_ms,
            watched_ms: micros(self.watched) / 1000,
        }
    }
}

/// Looks for processes of the VM, and for the counter page in each.
fn find(shared: &Shared) {
    let mut waiting: BTreeMap<i32, Look> = BTreeMap::new();
    let mut known: Vec<(i32, u64)> = Vec::new();
    let mut hints: Vec<Hint> = Vec::new();
    let mut next_scan = Instant::now();
    while !shared.stopped() {
        for (pid, start) in memory::processes_of(shared.uuid) {
            if !known.contains(&(pid, start)) && known.len() < MAX_COPIES {
                known.push((pid, start));
                waiting.insert(pid, Look::new(pid, page::magic(shared.uuid.into_bytes())));
            }
        }
        waiting.retain(|_, look| process::is_alive(look.pid()));
        let found: Option<Copy> = waiting.values().find_map(|look| look.at_hints(&hints));
        let found = found.or_else(|| {
            // A migrated copy has the page where the first had it; one that booted by itself has it elsewhere.
            (Instant::now() >= next_scan).then(|| {
                let begin = Instant::now();
                let strangers =
                    waiting.values().filter(|look| hints.is_empty() || look.waited() > HINT_LIMIT);
                let found = strangers.into_iter().find_map(Look::scan);
                next_scan = Instant::now() + begin.elapsed() * SCAN_SHARE + FIND;
                found
            })?
        });
        match found {
            Some(copy) => {
                waiting.remove(&copy.pid());
                hints.push(copy.hint());
                adopt(shared, copy);
            }
            None => thread::sleep(FIND),
        }
    }
}

fn adopt(shared: &Shared, copy: Copy) {
    let inode = memory::network_of(copy.pid());
    let machine = inode.and_then(|inode| shared.machines.get(&inode)).cloned();
    let mut state = shared.state();
    state.processes.push(Process {
        pid: copy.pid(),
        machine: machine.unwrap_or_else(|| "elsewhere".to_owned()),
        alive: true,
        vcpu_state: None,
    });
    state.judge.add_copy();
    state.found.push(copy);
}

/// Reads every copy each millisecond.
fn sample(shared: &Shared) {
    // Without it, a busy machine makes the samples less even.
    let _less_even = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -15);
    let mut copies: Vec<Copy> = Vec::new();
    let mut next = Instant::now();
    let mut last = Instant::now();
    while !shared.stopped() {
        next += SAMPLE;
        match next.checked_duration_since(Instant::now()) {
            Some(pause) => thread::sleep(pause),
            None => next = Instant::now(), // late: don't make it up with a burst
        }
        let mut state = shared.state();
        copies.append(&mut state.found);
        state.samples += 1;
        state.longest_distance = state.longest_distance.max(last.elapsed());
        last = Instant::now();
        for (index, copy) in copies.iter_mut().enumerate() {
            take(&mut state, index, copy);
        }
        state.watched = state.started.elapsed();
        if state.samples.is_multiple_of(256) {
            state.sampler_cpu_ms = thread_cpu_ms();
        }
    }
    shared.state().sampler_cpu_ms = thread_cpu_ms();
}

fn take(state: &mut State, index: usize, copy: &mut Copy) {
    let slow = state.samples.is_multiple_of(16);
    if let Some(counter) = copy.counter() {
        state.judge.sample(Sample {
            copy: index,
            at_us: micros(state.started.elapsed()),
            counter,
            vcpu_run_ns: copy.vcpu_run_ns(),
        });
    } else if slow {
        state.processes[index].alive = process::is_alive(copy.pid());
    }
    if slow {
        let seen = copy.vcpu_state();
        state.processes[index].vcpu_state = seen.or(state.processes[index].vcpu_state);
    }
}

fn thread_cpu_ms() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1000 + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
