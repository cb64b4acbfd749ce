//! Deterministic simulation of whole hand-overs: the production machines under a fake network, fake QEMUs that
//! behave as measured, crashes between any two effects, and invariants checked after every step.
//!
//! One seed is one run: a [`plan::Plan`] (how many migrations, which faults at which step, how bad the network is)
//! and every random choice after it. `OUTRIDER_SIM_SEED=<seed>` with the simulation's tests, or
//! `--example sim -- --seed <seed>`, replays one and prints its log; [`shrink`] first drops every fault that the
//! failure does not need.
//!
//! What is modelled, and on which facts it rests:
//! - **QEMU**: stops its guest by itself when it converges; resumes it *by itself* when its link closes in `device`,
//!   unless its process is frozen, and then on thaw; without `-S` the target runs once loaded; `cont` while the target
//!   is `inmigrate` cancels its `-S`; a target whose link closes before it is loaded exits; thawing while the target
//!   holds image locks kills the source.
//! - **VM agents** die with their daemon, close QEMU's sockets, hold back the final acknowledgement for ever, and
//!   close QEMU's socket when they see no FROZEN within [`super::FREEZE_GUARD_MS`].
//! - **Attackers and bad luck on the channel**: cut, tail withheld, reverse direction dropped.
//! - **Daemons** run one effect per step; a crash falls between any two; a restart recovers from the journal alone.
//! - **Manager**: one transaction per step, then its orders one by one; crashes between; may be lost for ever; its
//!   registry may be restored from an older state.
//! - **Network**: loss, duplication, reordering, delays of seconds that carry a message into later migrations, one-way
//!   cuts, and the daemons' direct path beside the manager's.

mod check;
mod daemon;
mod hypervisor;
mod manager;
pub mod plan;
mod world;

use super::Rules;
use plan::Plan;

/// An invariant by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// At most one running copy.
    I1AtMostOne,
    /// No copy starts from a state older than the newest that was ever executed.
    I2NoRollback,
    /// Ten seconds after the last fault exactly one copy runs, unless every valid copy was lost.
    I2Recovers,
    /// A permit is consumed at most once.
    I4ConsumedOnce,
    /// A durable entry (journal, registry) precedes each effect.
    I6JournalFirst,
    /// A suspended migration never holds the guest stopped.
    I8SuspendedRuns,
    /// Once faults stop, every hand-over ends at the manager.
    L2Ends,
    /// A frozen source is thawed after its vote only with a journalled renunciation or fence.
    HThawNeedsProof,
    /// A renunciation is signed only over a dead QEMU.
    HSignOverDead,
    /// The location's compare-and-swap finds what the row implies.
    HLocation,
    /// What was renounced never runs.
    HRenouncedNeverRuns,
    /// The source is never thawed once the target was continued.
    HNoThawAfterCont,
    /// The epoch of the VM's record only grows.
    HEpochsGrow,
    /// An attempt is committed at most once and voided at most once, and never voided once its target ran.
    HOneDecision,
}

impl Invariant {
    /// Every invariant.
    pub const ALL: [Self; 14] = [
        Self::I1AtMostOne,
        Self::I2NoRollback,
        Self::I2Recovers,
        Self::I4ConsumedOnce,
        Self::I6JournalFirst,
        Self::I8SuspendedRuns,
        Self::L2Ends,
        Self::HThawNeedsProof,
        Self::HSignOverDead,
        Self::HLocation,
        Self::HRenouncedNeverRuns,
        Self::HNoThawAfterCont,
        Self::HEpochsGrow,
        Self::HOneDecision,
    ];

    /// Whether it says that something comes, not that something never happens.
    #[must_use]
    pub const fn is_liveness(self) -> bool {
        matches!(self, Self::I2Recovers | Self::L2Ends)
    }
}

/// What went wrong, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub invariant: Invariant,
    /// In words.
    pub detail: String,
    /// At which step.
    pub step: u64,
    /// At which simulated time.
    pub at_ms: u64,
}

/// How one run went.
#[derive(Debug, Clone)]
pub struct Report {
    /// The first violation, at which the run ended.
    pub violation: Option<Violation>,
    /// Steps taken.
    pub steps: u64,
    /// Migrations that ended with the VM on the target.
    pub completed: u32,
    /// Migrations that ended with the VM kept on the source.
    pub kept: u32,
    /// Whether every valid copy was lost, so that liveness is not promised.
    pub lost: bool,
    /// One line per step, when asked for.
    pub log: Vec<String>,
}

/// What to check and what to keep.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The rules in force.
    pub rules: Rules,
    /// Check [`Invariant::I6JournalFirst`] and the two `H` rules about journals; off where a mutation test wants to
    /// see the damage itself.
    pub check_journal: bool,
    /// Keep the log.
    pub log: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { rules: Rules::ALL, check_journal: true, log: false }
    }
}

/// Runs one plan.
#[must_use]
pub fn run(plan: &Plan, options: Options) -> Report {
    world::World::new(plan, options).run()
}

/// Runs the plan of one seed.
#[must_use]
pub fn run_seed(seed: u64, options: Options) -> Report {
    run(&Plan::from_seed(seed), options)
}

/// Drops faults and migrations one by one while the same invariant still fails.
#[must_use]
pub fn shrink(plan: &Plan, options: Options) -> Plan {
    let failing = |plan: &Plan| run(plan, options).violation.map(|v| v.invariant);
    let Some(invariant) = failing(plan) else { return plan.clone() };
    let mut best = plan.clone();
    loop {
        let smaller = best.smaller().into_iter().find(|candidate| failing(candidate) == Some(invariant));
        match smaller {
            Some(candidate) => best = candidate,
            None => return best,
        }
    }
}

/// A failure as people read it: the plan shrunk, its log, and how to replay it.
#[must_use]
pub fn explain(plan: &Plan, options: Options) -> String {
    let plan = shrink(plan, options);
    let report = run(&plan, Options { log: true, ..options });
    let mut text = report.log.join("\n");
    if let Some(v) = report.violation {
        text.push_str(&format!(
            "\n{:?} violated at step {}, {} ms: {}\nplan after shrinking: {plan:?}\nreplay: OUTRIDER_SIM_SEED={} cargo run -p outrider-engine --example sim\n",
            v.invariant, v.step, v.at_ms, v.detail, plan.seed
        ));
    }
    text
}
