//! What a process that reads strangers' bytes gives up before the first of them: new privileges, core dumps, being
//! traced, the file system, new sockets, new programs, new threads, executable memory, and all but a few system calls.
//!
//! Best effort where the kernel lacks a part, and honest about it: [`enter`] says what is in force, and the daemon
//! decides whether that is enough. The system-call filter kills: a parser that is made to do anything else costs one
//! migration, not the host.
//!
//! It is entered in two steps, since an engine may need a thread of its own: [`confine`] takes away everything that
//! has a name (files, sockets, privileges), [`Confined::filter`] then leaves only the profile's system calls, to
//! every thread.

pub mod self_test;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;

/// May memory be executable that was not when the program was loaded?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutableMemory {
    /// No: what a parser needs.
    Forbidden,
    /// Yes: for an engine that compiles rules to machine code.
    Allowed,
}

/// What one program keeps.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// Most address space, in bytes.
    pub memory_bytes: u64,
    /// Highest number of open descriptors.
    pub descriptors: u64,
    /// Executable memory.
    pub executable_memory: ExecutableMemory,
    /// System calls beside those that every program here keeps, whatever their arguments.
    pub calls: &'static [libc::c_long],
}

/// Why the sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A limit could not be set.
    #[error("{what} could not be set")]
    Limit {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The filter could not be built or installed.
    #[error("the system-call filter could not be installed: {0}")]
    Seccomp(String),
}

/// Gives up everything that can be given up, and says what is in force.
///
/// # Errors
/// A part failed that every kernel has; parts that a kernel may lack are left out of the text instead.
pub fn enter(profile: &Profile) -> Result<String, SandboxError> {
    confine(profile)?.filter()
}

/// A process that reaches nothing by name any more, and may still start threads, which are confined as it is.
#[must_use = "the system-call filter is not in force yet"]
#[derive(Debug)]
pub struct Confined {
    profile: Profile,
    parts: Vec<String>,
}

/// The first step: limits, no new privileges, no files, no sockets.
///
/// # Errors
/// As [`enter`].
pub fn confine(profile: &Profile) -> Result<Confined, SandboxError> {
    let mut parts = limits(profile)?;
    parts.extend(landlock_part());
    Ok(Confined { profile: *profile, parts })
}

impl Confined {
    /// The second step: no new threads, and the system-call filter. Says what is in force.
    ///
    /// # Errors
    /// As [`enter`].
    pub fn filter(mut self) -> Result<String, SandboxError> {
        limit("processes", Resource::Nproc, 0)?;
        install_filter(&self.profile)?;
        self.parts.push("seccomp".to_owned());
        Ok(self.parts.join(" "))
    }
}

/// Lowers the memory limit further, once it is known how much is needed.
///
/// # Errors
/// The limit could not be set.
pub fn limit_memory(bytes: u64) -> Result<(), SandboxError> {
    limit("memory", Resource::As, bytes)
}

fn limit(what: &'static str, resource: Resource, value: u64) -> Result<(), SandboxError> {
    let limit = Rlimit { current: Some(value), maximum: Some(value) };
    setrlimit(resource, limit).map_err(|errno| SandboxError::Limit { what, source: errno.into() })
}

/// What a process may write to its log; a defect is a few lines.
const MAX_LOG_BYTES: u64 = 1 << 20;

fn limits(profile: &Profile) -> Result<Vec<String>, SandboxError> {
    let failed = |what| move |errno: rustix::io::Errno| SandboxError::Limit { what, source: errno.into() };
    rustix::thread::set_no_new_privs(true).map_err(failed("no-new-privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("not-dumpable"))?;
    limit("core", Resource::Core, 0)?;
    // Its log is a file; nothing else is.
    limit("file size", Resource::Fsize, MAX_LOG_BYTES)?;
    limit_memory(profile.memory_bytes)?;
    limit("descriptors", Resource::Nofile, profile.descriptors)?;
    Ok(["no-new-privs", "not-dumpable", "rlimits"].map(str::to_owned).to_vec())
}

/// No path may be opened, no TCP port bound or connected to, no abstract socket or signal reach outside.
/// Public for the self-test, which shows it without the filter in front of it.
pub fn landlock_part() -> Option<String> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(ABI::V4)))
        .and_then(|rules| rules.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .ok()?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Some("landlock".to_owned()),
        RulesetStatus::PartiallyEnforced => Some("landlock-partial".to_owned()),
        RulesetStatus::NotEnforced => None,
    }
}

fn install_filter(profile: &Profile) -> Result<(), SandboxError> {
    let failed = |e: &dyn std::fmt::Display| SandboxError::Seccomp(e.to_string());
    let arch = std::env::consts::ARCH.try_into().map_err(|e: seccompiler::BackendError| failed(&e))?;
    let rules = rules(profile).map_err(|e| failed(&e))?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)
        .map_err(|e| failed(&e))?;
    let program: BpfProgram = filter.try_into().map_err(|e: seccompiler::BackendError| failed(&e))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|e| failed(&e))
}

/// Allowed whatever the arguments, to every program.
const PLAIN: &[libc::c_long] = &[
    // The relay.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // The runtime: locks, thread exit, abort.
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn rules(profile: &Profile) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let plain = PLAIN.iter().chain(profile.calls);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = plain.map(|call| (*call, Vec::new())).collect();
    let only = |index, op, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value);
    let without = |protection: libc::c_int| {
        let bits = u64::from(protection.cast_unsigned());
        SeccompRule::new(vec![only(2, SeccompCmpOp::MaskedEq(bits), 0)?])
    };
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let protections = match profile.executable_memory {
            ExecutableMemory::Forbidden => vec![without(libc::PROT_EXEC)?],
            // One or the other: what can be written can't be run.
            ExecutableMemory::Allowed => vec![without(libc::PROT_EXEC)?, without(libc::PROT_WRITE)?],
        };
        rules.insert(call, protections);
    }
    let arg = |value: libc::c_int| u64::from(value.cast_unsigned());
    let nodelay = vec![
        only(1, SeccompCmpOp::Eq, arg(libc::IPPROTO_TCP))?,
        only(2, SeccompCmpOp::Eq, arg(libc::TCP_NODELAY))?,
    ];
    // Our own limits, which can only be lowered any more.
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![only(0, SeccompCmpOp::Eq, 0)?])?]);
    // Debug builds of the standard library look at a descriptor before they close it.
    let look = SeccompRule::new(vec![only(1, SeccompCmpOp::Eq, arg(libc::F_GETFD))?])?;
    rules.insert(libc::SYS_fcntl, vec![look]);
    rules.insert(libc::SYS_setsockopt, vec![SeccompRule::new(nodelay)?]);
    Ok(rules)
}
