//! The host daemon.
pub mod cgroup;
pub mod config;
pub mod error;
pub mod folders;
pub mod freezer;
pub mod journal;
pub mod load;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod vms;
