//! The counter page: proof, readable from outside the VM, that this copy of the guest executes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::page;

/// Pause between two increments. Short enough that one sample per millisecond sees movement every
/// time, long enough that an emulated guest spends little on it.
const STEP_US: u64 = 300;

/// The page itself. A static lives in the program's own data, which the kernel never turns into a huge page.
#[repr(C, align(4096))]
struct Page {
    words: [AtomicU64; page::PAGE_BYTES / 8],
}

static PAGE: Page = Page { words: [const { AtomicU64::new(0) }; page::PAGE_BYTES / 8] };

const COUNTER: usize = page::COUNTER_OFFSET_BYTES / 8;
const INVERSE: usize = page::INVERSE_OFFSET_BYTES / 8;

/// Starts counting, then publishes the magic; from here on the page can be found.
pub fn start(magic: [u8; page::MAGIC_BYTES]) -> std::io::Result<()> {
    publish(0);
    thread::Builder::new().name("counter".to_owned()).stack_size(64 * 1024).spawn(count)?;
    for (word, bytes) in PAGE.words.iter().zip(magic.chunks_exact(8)) {
        let value = bytes.iter().rev().fold(0, |acc, b| acc << 8 | u64::from(*b));
        word.store(value, Ordering::Release);
    }
    Ok(())
}

/// The counter's present value.
pub fn value() -> u64 {
    PAGE.words[COUNTER].load(Ordering::Acquire)
}

fn count() {
    // A failure only makes the steps less even.
    let _even_without = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -20);
    for value in 1.. {
        publish(value);
        thread::sleep(Duration::from_micros(STEP_US));
    }
}

fn publish(value: u64) {
    PAGE.words[COUNTER].store(value.to_le(), Ordering::Release);
    PAGE.words[INVERSE].store((!value).to_le(), Ordering::Release);
}
