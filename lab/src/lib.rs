//! The lab: namespaces that stand for hosts, a real guest, an outside observer, a packet capture, plain QEMU.
//!
//! It drives the built programs from outside and is never packaged.
//!
//! ```text
//! net ──── namespaces, cgroups, teardown       guest ── kernel + initramfs with the guest daemon
//!  ├─ capture  the migration network, searched  vm ───── plain QEMU over QMP (baselines)
//!  ├─ client   what the guest's user sees       plain ── plain migrations and QEMU's split brain
//!  └─ observer how many copies run (never QMP)
//! qemu ─── versions of QEMU, processes of them   inspection ── the inspector between real QEMUs
//! ```

pub mod bench;
pub mod capture;
pub mod cgroup;
pub mod client;
pub mod demo;
pub mod fault;
pub mod fleet;
pub mod guest;
pub mod inspection;
pub mod net;
pub mod observer;
pub mod plain;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod relay;
pub mod require;
pub mod vm;
