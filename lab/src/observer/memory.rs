//! Reading a QEMU process from outside: its guest memory, its vCPU threads.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use outrider_lab_guest::page::{self, HEADER_BYTES, MAGIC_BYTES, PAGE_BYTES, Reading};
use uuid::Uuid;

use crate::process;

/// Smallest mapping that can be a guest's memory, in bytes.
const LEAST_MEMORY_BYTES: u64 = 32 << 20;
/// Page map entries read at once (8 bytes each).
const ENTRIES_AT_ONCE: usize = 8192;
/// Bit of a page map entry: the page is in memory.
const PRESENT: u64 = 1 << 63;
/// Reads of a page that was caught half written before giving up on this sample.
const TORN_RETRIES: u32 = 3;
/// vCPU threads whose CPU time is read; their sum tells whether the guest executes.
const MAX_VCPUS: usize = 8;

/// Processes whose command line says that they are QEMU and names this UUID, with their start times.
pub(super) fn processes_of(uuid: Uuid) -> Vec<(i32, u64)> {
    let text = uuid.to_string();
    let is_ours = |pid: &i32| {
        process::command_line(*pid).is_some_and(|line| {
            let line = String::from_utf8_lossy(&line).to_lowercase();
            let program = line.split('\0').next().unwrap_or_default();
            program.contains("qemu-system") && line.contains(&text)
        })
    };
    let alive = |pid: i32| {
        let (state, start) = process::state_and_start(pid)?;
        (state != 'Z' && state != 'X').then_some((pid, start))
    };
    process::all_pids().into_iter().filter(is_ours).filter_map(alive).collect()
}

/// The number of the process's network namespace.
pub(super) fn network_of(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|data| data.ino())
}

/// Where the page was in one copy: the same place in the guest's memory of every other copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hint {
    memory_bytes: u64,
    offset: u64,
}

/// A process whose page has not been found yet.
#[derive(Debug)]
pub(super) struct Look {
    pid: i32,
    magic: [u8; MAGIC_BYTES],
    since: Instant,
}

impl Look {
    pub(super) fn new(pid: i32, magic: [u8; MAGIC_BYTES]) -> Self {
        Self { pid, magic, since: Instant::now() }
    }

    /// For how long it has been looked for.
    pub(super) fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Looks where other copies have the page. Cheap.
    pub(super) fn at_hints(&self, hints: &[Hint]) -> Option<Copy> {
        let process = Memory::open(self.pid)?;
        for mapping in process.mappings() {
            for hint in hints.iter().filter(|hint| hint.memory_bytes == mapping.bytes()) {
                let address = mapping.start + hint.offset;
                if process.is_present(address) && self.is_page(&process.memory, address) {
                    return Some(self.copy(process, mapping, address));
                }
            }
        }
        None
    }

    /// Looks at the start of every page that is in memory.
    ///
    /// Pages that are not there are left alone: to read them would make some kinds of memory allocate them.
    pub(super) fn scan(&self) -> Option<Copy> {
        let process = Memory::open(self.pid)?;
        for mapping in process.mappings() {
            let address =
                process.present_pages(mapping).find(|address| self.is_page(&process.memory, *address));
            if let Some(address) = address {
                return Some(self.copy(process, mapping, address));
            }
        }
        None
    }

    fn is_page(&self, memory: &File, address: u64) -> bool {
        let mut header = [0; HEADER_BYTES];
        memory.read_exact_at(&mut header, address).is_ok()
            && page::read(&header, &self.magic) != Reading::NotThePage
    }

    fn copy(&self, process: Memory, mapping: Mapping, address: u64) -> Copy {
        Copy {
            pid: self.pid,
            magic: self.magic,
            memory: process.memory,
            address,
            hint: Hint { memory_bytes: mapping.bytes(), offset: address - mapping.start },
            vcpus: vcpus(self.pid),
        }
    }
}

/// One copy of the VM whose page is known.
#[derive(Debug)]
pub(super) struct Copy {
    pid: i32,
    magic: [u8; MAGIC_BYTES],
    memory: File,
    address: u64,
    hint: Hint,
    vcpus: Vec<Vcpu>,
}

#[derive(Debug)]
struct Vcpu {
    thread: i32,
    schedstat: File,
}

impl Copy {
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn hint(&self) -> Hint {
        self.hint
    }

    /// The counter now; `None` when the process is gone or the page is being overwritten.
    pub(super) fn counter(&self) -> Option<u64> {
        let mut header = [0; HEADER_BYTES];
        for _ in 0..TORN_RETRIES {
            self.memory.read_exact_at(&mut header, self.address).ok()?;
            match page::read(&header, &self.magic) {
                Reading::Counter(counter) => return Some(counter),
                Reading::Torn => {}
                Reading::NotThePage => return None,
            }
        }
        None
    }

    /// CPU time of all vCPU threads together; `None` when they can't be told from other threads.
    pub(super) fn vcpu_run_ns(&mut self) -> Option<u64> {
        if self.vcpus.is_empty() {
            // QEMU makes them a moment after it has started.
            self.vcpus = vcpus(self.pid);
        }
        if self.vcpus.is_empty() {
            return None;
        }
        let times = self.vcpus.iter().filter_map(|vcpu| run_ns(&vcpu.schedstat));
        Some(times.sum())
    }

    /// State letter of the first vCPU thread.
    pub(super) fn vcpu_state(&self) -> Option<char> {
        let vcpu = self.vcpus.first()?;
        let stat = fs::read_to_string(format!("/proc/{}/task/{}/stat", self.pid, vcpu.thread)).ok()?;
        stat.rsplit_once(')')?.1.trim_start().chars().next()
    }
}

/// The first number of a `schedstat` file: time on the CPU, in nanoseconds.
fn run_ns(schedstat: &File) -> Option<u64> {
    let mut bytes = [0; 64];
    let length = schedstat.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(bytes.get(..length)?).ok()?;
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// QEMU calls its vCPU threads `CPU 0/TCG`, `CPU 1/KVM`, ….
fn vcpus(pid: i32) -> Vec<Vcpu> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let threads = tasks.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_vcpu = |thread: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"));
        name.is_ok_and(|name| name.starts_with("CPU "))
    };
    let open = |thread| {
        let schedstat = File::open(format!("/proc/{pid}/task/{thread}/schedstat")).ok()?;
        Some(Vcpu { thread, schedstat })
    };
    threads.filter(is_vcpu).filter_map(open).take(MAX_VCPUS).collect()
}

/// A readable and writable mapping of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let writable = fields.next()?.starts_with("rw");
        let mapping =
            Self { start: u64::from_str_radix(start, 16).ok()?, end: u64::from_str_radix(end, 16).ok()? };
        (writable && mapping.bytes() >= LEAST_MEMORY_BYTES).then_some(mapping)
    }

    fn bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

/// The open files through which a process's memory is read.
struct Memory {
    pid: i32,
    memory: File,
    page_map: File,
}

impl Memory {
    fn open(pid: i32) -> Option<Self> {
        Some(Self {
            pid,
            memory: File::open(format!("/proc/{pid}/mem")).ok()?,
            page_map: File::open(format!("/proc/{pid}/pagemap")).ok()?,
        })
    }

    fn mappings(&self) -> Vec<Mapping> {
        let mut text = String::new();
        let read = File::open(format!("/proc/{}/maps", self.pid))
            .and_then(|mut file| file.read_to_string(&mut text));
        if read.is_err() {
            return Vec::new();
        }
        text.lines().filter_map(Mapping::parse).collect()
    }

    fn is_present(&self, address: u64) -> bool {
        self.entries(address, 1).first().is_some_and(|entry| entry & PRESENT != 0)
    }

    fn present_pages(&self, mapping: Mapping) -> impl Iterator<Item = u64> + '_ {
        let step = ENTRIES_AT_ONCE * PAGE_BYTES;
        (mapping.start..mapping.end).step_by(step).flat_map(move |start| {
            let pages = ((mapping.end - start) / PAGE_BYTES as u64).min(ENTRIES_AT_ONCE as u64);
            let entries = self.entries(start, usize::try_from(pages).unwrap_or(0));
            let addresses = (start..).step_by(PAGE_BYTES).zip(entries);
            addresses.filter(|(_, entry)| entry & PRESENT != 0).map(|(address, _)| address)
        })
    }

    fn entries(&self, address: u64, pages: usize) -> Vec<u64> {
        let mut bytes = vec![0; pages * 8];
        let offset = address / PAGE_BYTES as u64 * 8;
        let length = self.page_map.read_at(&mut bytes, offset).unwrap_or(0);
        let whole = bytes[..length].chunks_exact(8);
        whole.map(|entry| u64::from_le_bytes(entry.try_into().expect("chunks of eight bytes"))).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_large_writable_mappings_can_be_guest_memory() {
        let check = |line, expect: Option<u64>| assert_eq!(Mapping::parse(line).map(Mapping::bytes), expect);
        check("7f0000000000-7f0010000000 rw-p 00000000 00:00 0 ", Some(256 << 20));
        check("7f0000000000-7f0010000000 r--p 00000000 00:00 0 ", None);
        check("7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ", None);
        check("nonsense", None);
    }

    #[test]
    fn a_page_in_our_own_memory_is_found_by_scanning_and_then_by_the_hint() {
        let magic = page::magic(*b"a test's own VM!");
        let mut memory = vec![1_u8; 48 << 20];
        let start = PAGE_BYTES - memory.as_ptr().addr() % PAGE_BYTES + 7 * PAGE_BYTES;
        memory[start..start + 32].copy_from_slice(&magic);
        memory[start + 32..start + 40].copy_from_slice(&41_u64.to_le_bytes());
        memory[start + 40..start + 48].copy_from_slice(&(!41_u64).to_le_bytes());
        let look = Look::new(i32::try_from(std::process::id()).unwrap(), magic);
        let found = look.scan().unwrap();
        assert_eq!(found.counter(), Some(41));
        let again = look.at_hints(&[found.hint()]).unwrap();
        assert_eq!(again.hint(), found.hint());
        memory[start] ^= 1;
        assert_eq!(found.counter(), None, "the page has lost its magic");
    }
}
