//! QEMU: the program, its command line, its inventory, its taps.

pub mod binary;
pub mod catalogue;
pub mod command;
pub mod inventory;
pub mod plugged;
pub mod tap;
