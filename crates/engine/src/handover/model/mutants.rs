//! Each rule removed once: what must break, and the bound in which it shows.

use super::super::sim::Invariant;
use super::super::{Rule, Rules};
use super::{Config, Shell};
use Invariant::{
    HLocation, HOneDecision, I1AtMostOne, I2NoRollback, I2Recovers, I4ConsumedOnce, I6JournalFirst,
    I8SuspendedRuns,
};

/// Both copies ran, at once or one after the other from an older state.
const TWICE: &[Invariant] = &[I1AtMostOne, I2NoRollback];
/// No copy runs any more.
const ZERO: &[Invariant] = &[I2Recovers];
/// Either.
const DAMAGE: &[Invariant] = &[I1AtMostOne, I2NoRollback, I2Recovers];

/// One change that must show.
#[derive(Debug, Clone, Copy)]
pub struct Mutant {
    /// What is left undone, in words.
    pub name: &'static str,
    /// The rule that is removed, if it is one.
    pub rule: Option<Rule>,
    /// Where it shows.
    pub config: Config,
    /// What breaks, one of these.
    pub wanted: &'static [Invariant],
}

/// A mutant for each rule, then those of the shells' duties.
#[must_use]
pub fn mutants() -> Vec<Mutant> {
    use Rule as R;
    vec![
        rule("h1-no-proof-after-the-freeze", R::Proof, TWICE, one(0)),
        rule("h2-source-killed-on-commit", R::ReleaseAfterRunning, ZERO, one(0)),
        rule("h3-not-run-taken-for-proof", R::OnlyRenouncedIsProof, TWICE, one(1)),
        rule("h4-signed-before-journalled", R::JournalBeforeSigning, TWICE, one(1)),
        rule("h5-renunciation-of-another-attempt", R::RenunciationCoversAttempt, TWICE, two(0)),
        rule("h6-orders-at-least", R::ExactOrders, DAMAGE, two(0)),
        rule("h7-target-renounces-on-its-timer", R::NoTimerRenounce, ZERO, one(1)),
        rule("h8-thawed-copy-killed-as-a-breach", R::AdoptBeforeStopping, ZERO, one(0)),
        rule("h9-refused-cont-keeps-run", R::RefusedContRenounces, ZERO, one(1)),
        rule("h10-void-without-proof", R::VoidNeedsProof, TWICE, one(1)),
        rule("target-without-s", R::TargetStartsPaused, TWICE, one(0)),
        rule("no-freeze", R::Freeze, TWICE, one(0)),
        rule("proof-before-the-freeze", R::ProofAfterFreeze, TWICE, one(0)),
        rule("receipts-of-other-attempts", R::ExactReceipts, DAMAGE, two(0)),
        rule("commit-not-durable", R::DurableCommit, &[I6JournalFirst], journals(one(0))),
        rule("nonce-not-durable", R::DurableNonce, &[I4ConsumedOnce], one(1)),
        rule("vote-not-durable", R::DurableVote, TWICE, one(1)),
        rule("renunciation-over-a-living-qemu", R::DeadBeforeSigning, DAMAGE, one(1)),
        rule("cont-while-inmigrate", R::CheckBeforeCont, DAMAGE, one(0)),
        rule("stop-while-suspended-ignored", R::StopWhileSuspendedAborts, &[I8SuspendedRuns], one(0)),
        rule("no-watchdog", R::Watchdog, ZERO, one(1)),
        shell("paused-manager-writes-blindly", Shell::BlindWrite, &[HLocation, HOneDecision]),
        shell("permit-taken-by-the-third-host", Shell::PermitForAnyHost, &[I4ConsumedOnce]),
    ]
}

fn rule(name: &'static str, rule: Rule, wanted: &'static [Invariant], config: Config) -> Mutant {
    let config = Config { rules: Rules::without(rule), ..config };
    Mutant { name, rule: Some(rule), config, wanted }
}

fn shell(name: &'static str, shell: Shell, wanted: &'static [Invariant]) -> Mutant {
    Mutant { name, rule: None, config: Config { shell, pausing: true, ..one(0) }, wanted }
}

/// The checks on journals are off, so that a mutant is not caught by bookkeeping before it does harm; and a paused
/// manager only makes the search longer.
const fn one(faults: u8) -> Config {
    Config { check_journal: false, pausing: false, ..Config::one(faults) }
}

/// What needs an earlier migration shows without the operator and without cuts.
const fn two(faults: u8) -> Config {
    Config { check_journal: false, ..Config::two(faults) }
}

const fn journals(config: Config) -> Config {
    Config { check_journal: true, ..config }
}
