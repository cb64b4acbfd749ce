//! Each rule of the hand-over is removed once; the simulation must then break a named invariant, with the damage that
//! the specification names. The violation comes from the invariants alone: nothing here looks at the rule.

use outrider_engine::handover::sim::{self, Invariant, Options, plan::Plan};
use outrider_engine::handover::{Rule, Rules};

use Invariant::{I1AtMostOne, I2NoRollback, I2Recovers, I4ConsumedOnce, I6JournalFirst, I8SuspendedRuns};

/// Both copies ran, at once or one after the other from an older state.
const TWICE: &[Invariant] = &[I1AtMostOne, I2NoRollback];
/// No copy runs any more.
const ZERO: &[Invariant] = &[I2Recovers];
/// Either.
const DAMAGE: &[Invariant] = &[I1AtMostOne, I2NoRollback, I2Recovers];

/// No rule needs more seeds than this to be missed.
const SEEDS_LIMIT: u64 = 300_000;

/// Searches for a seed at which the mutant does one of the wanted damages. The checks on journals are off unless they
/// are what is wanted, so that a mutant is not caught by bookkeeping before it does harm.
fn breaks(rule: Rule, wanted: &[Invariant]) {
    let check_journal = wanted.contains(&I6JournalFirst);
    let options = Options { rules: Rules::without(rule), check_journal, log: false };
    for seed in 0..SEEDS_LIMIT {
        let violation = sim::run(&Plan::from_seed(seed), options).violation;
        if let Some(violation) = violation.filter(|v| wanted.contains(&v.invariant)) {
            println!("without {rule:?}: seed {seed}: {:?}: {}", violation.invariant, violation.detail);
            return;
        }
    }
    panic!(
        "without {rule:?} no seed below {SEEDS_LIMIT} breaks any of {wanted:?}: the simulation can't see this rule"
    );
}

macro_rules! mutants {
    ($($name:ident: $rule:ident => $wanted:expr;)*) => {
        $(#[test] fn $name() { breaks(Rule::$rule, $wanted); })*

        /// A rule without its mutant would be a rule that nothing shows to be needed.
        #[test]
        fn every_rule_has_its_mutant() {
            assert_eq!([$(Rule::$rule),*].as_slice(), Rule::ALL.as_slice());
        }
    };
}

mutants! {
    h1_no_proof_after_the_freeze: Proof => TWICE;
    h2_source_killed_on_commit: ReleaseAfterRunning => ZERO;
    h3_not_run_taken_for_proof: OnlyRenouncedIsProof => TWICE;
    h4_signed_before_journalled: JournalBeforeSigning => TWICE;
    h5_renunciation_of_another_attempt: RenunciationCoversAttempt => TWICE;
    h6_orders_at_least: ExactOrders => DAMAGE;
    h7_target_renounces_on_its_timer: NoTimerRenounce => ZERO;
    h8_thawed_copy_killed_as_a_breach: AdoptBeforeStopping => ZERO;
    h9_refused_cont_keeps_run: RefusedContRenounces => ZERO;
    h10_void_without_proof: VoidNeedsProof => TWICE;
    target_without_s: TargetStartsPaused => TWICE;
    no_freeze: Freeze => TWICE;
    proof_before_the_freeze: ProofAfterFreeze => TWICE;
    receipts_of_other_attempts: ExactReceipts => DAMAGE;
    commit_not_durable: DurableCommit => &[I6JournalFirst];
    nonce_not_durable: DurableNonce => &[I4ConsumedOnce];
    vote_not_durable: DurableVote => TWICE;
    renunciation_over_a_living_qemu: DeadBeforeSigning => ZERO;
    cont_while_inmigrate: CheckBeforeCont => DAMAGE;
    stop_while_suspended_ignored: StopWhileSuspendedAborts => &[I8SuspendedRuns];
    no_watchdog: Watchdog => ZERO;
}
