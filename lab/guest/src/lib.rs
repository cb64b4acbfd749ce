//! The guest daemon of the lab: a TCP service, a counter page, a planted secret, and load.
//!
//! It is the only program of the lab's guest besides busybox. The outside observer shares [`page`]
//! with it, so that both sides agree about the bytes in memory.

pub mod counter;
pub mod disk;
pub mod load;
pub mod page;
pub mod secret;
pub mod serve;
pub mod settings;
