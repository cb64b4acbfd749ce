//! What a seed stands for: the plan of one run.

/// A small, fast, seeded generator (xorshift64*). The machines never see it.
#[derive(Debug, Clone)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        // SplitMix64's finaliser: neighbouring seeds must not give neighbouring runs.
        let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((z ^ (z >> 31)) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }

    /// From `low` to `high`, both included.
    pub(super) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    pub(super) fn per_mille(&mut self, chance: u64) -> bool {
        self.next() % 1000 < chance
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        let index = usize::try_from(self.next() % of.len() as u64).unwrap_or(0);
        of[index]
    }
}

/// Who a message goes to or comes from: two hosts and the manager.
pub(super) const MANAGER: usize = 2;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A daemon dies, its VM agents with it, and restarts.
    CrashDaemon {
        /// Of which host.
        host: usize,
        /// For how long.
        down_ms: u64,
    },
    /// A daemon dies right after its next effect of a kind.
    CrashAfter {
        /// Of which host.
        host: usize,
        /// After what.
        moment: Moment,
        /// For how long.
        down_ms: u64,
    },
    /// The manager dies and restarts.
    CrashManager {
        /// For how long.
        down_ms: u64,
    },
    /// The manager is gone for ever.
    LoseManager,
    /// A host is gone for ever, with everything on it; the operator fences it once the other faults are over.
    LoseHost {
        /// Which.
        host: usize,
    },
    /// The QEMU of the newest migration dies on a host.
    KillQemu {
        /// Of which host.
        host: usize,
    },
    /// The channel between the VM agents is cut.
    CutChannel,
    /// The last bytes of the stream never arrive; the channel is cut after a while.
    WithholdTail,
    /// Nothing comes back from the target's VM agent; the channel is cut after a while.
    DropReverse,
    /// A one-way cut between two of the hosts and the manager (2).
    CutLink {
        /// From.
        from: usize,
        /// To.
        to: usize,
        /// For how long.
        ms: u64,
    },
    /// The operator suspends, and resumes after a while.
    Suspend {
        /// For how long.
        ms: u64,
    },
    /// The operator terminates.
    Terminate,
    /// The target's QEMU will refuse `cont`.
    RefuseCont,
    /// The next freeze fails.
    FailFreeze,
    /// Every timer of a daemon fires at once.
    ClockJump {
        /// Of which host.
        host: usize,
    },
    /// The registry is restored to a state that many transactions ago.
    RestoreRegistry {
        /// How many.
        back: usize,
    },
}

/// The effects whose aftermath matters most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A journal entry.
    Journal,
    /// A statement other than a renunciation.
    Send,
    /// A renunciation.
    SendRenounced,
    /// The freeze.
    Freeze,
    /// The request to renounce.
    Ask,
    /// The thaw.
    Thaw,
    /// The kill of either copy.
    Kill,
    /// `cont`.
    Cont,
}

/// A fault and the step at which it strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strike {
    /// The step.
    pub step: u64,
    /// The fault.
    pub fault: Fault,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Where it comes from; also seeds every random choice of the run.
    pub seed: u64,
    /// How many migrations there and back.
    pub migrations: u32,
    /// What goes wrong, by step.
    pub strikes: Vec<Strike>,
    /// Messages lost, per mille, until the faults are over.
    pub loss: u64,
    /// Messages duplicated, per mille.
    pub duplication: u64,
    /// Messages that take seconds, per mille.
    pub delay: u64,
    /// The network is bad for at least so long.
    pub chaos_ms: u64,
    /// Whether the source's agent reports the end of the stream when it has sent it, not when the target's has it.
    pub eager_end: bool,
}

/// About so many steps a migration takes without faults.
const STEPS_PER_MIGRATION: u64 = 75;

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let migrations = [1, 1, 1, 2, 2, 3, 4][usize::try_from(rng.range(0, 6)).unwrap_or(0)];
        let span = STEPS_PER_MIGRATION * u64::from(migrations);
        let mut strikes: Vec<_> =
            (0..rng.range(0, 4)).map(|_| Strike { step: rng.range(1, span), fault: fault(rng) }).collect();
        strikes.sort_by_key(|s| s.step);
        let (loss, duplication, delay) =
            rng.pick(&[(0, 0, 0), (0, 100, 50), (50, 50, 20), (150, 150, 50), (20, 300, 200)]);
        let eager_end = rng.per_mille(300);
        let chaos_ms = rng.pick(&[0, 100, 400, 2_000, 7_000]);
        Self { seed, migrations, strikes, loss, duplication, delay, chaos_ms, eager_end }
    }

    /// Every placement of at most two faults (one, with `pairs` false) over the steps of one migration with a good
    /// network: not a sample. `stride` skips all but one in so many of the pairs.
    pub fn systematic(pairs: bool, stride: usize) -> impl Iterator<Item = Self> {
        let singles: Vec<Strike> = (1..=STEPS_PER_MIGRATION)
            .flat_map(|step| every_fault().into_iter().map(move |fault| Strike { step, fault }))
            .collect();
        let plan = |mut strikes: Vec<Strike>| {
            strikes.sort_by_key(|s| s.step);
            let (loss, duplication, delay) = (0, 0, 0);
            Self { seed: 1, migrations: 1, strikes, loss, duplication, delay, chaos_ms: 0, eager_end: false }
        };
        let seconds = if pairs { singles.clone() } else { Vec::new() };
        let firsts = singles.clone();
        let two = firsts.into_iter().enumerate().flat_map(move |(i, first)| {
            let later = seconds.clone().into_iter().skip(i).step_by(stride.max(1));
            later.map(move |second| plan(vec![first, second]))
        });
        singles.into_iter().map(move |strike| plan(vec![strike])).chain(two)
    }

    /// Plans with one thing less.
    #[must_use]
    pub fn smaller(&self) -> Vec<Self> {
        let mut plans: Vec<_> = (0..self.strikes.len())
            .map(|skip| {
                let mut plan = self.clone();
                plan.strikes.remove(skip);
                plan
            })
            .collect();
        if self.migrations > 1 {
            plans.push(Self { migrations: self.migrations - 1, ..self.clone() });
        }
        for (loss, duplication, delay) in
            [(0, self.duplication, self.delay), (self.loss, 0, self.delay), (self.loss, self.duplication, 0)]
        {
            if (loss, duplication, delay) != (self.loss, self.duplication, self.delay) {
                plans.push(Self { loss, duplication, delay, ..self.clone() });
            }
        }
        plans
    }
}

/// One of each kind, for the systematic exploration.
fn every_fault() -> Vec<Fault> {
    use Moment::{Ask, Cont, Freeze, Journal, Kill, Send, SendRenounced, Thaw};
    let mut faults = vec![
        Fault::CrashManager { down_ms: 500 },
        Fault::LoseManager,
        Fault::CutChannel,
        Fault::WithholdTail,
        Fault::DropReverse,
        Fault::Suspend { ms: 100 },
        Fault::Terminate,
        Fault::RefuseCont,
        Fault::FailFreeze,
        Fault::RestoreRegistry { back: 1 },
        Fault::RestoreRegistry { back: 2 },
    ];
    for host in 0..2 {
        faults.extend([Fault::CrashDaemon { host, down_ms: 5 }, Fault::CrashDaemon { host, down_ms: 2_500 }]);
        faults.extend([Fault::LoseHost { host }, Fault::KillQemu { host }, Fault::ClockJump { host }]);
        for moment in [Ask, Cont, Freeze, Journal, Kill, Send, SendRenounced, Thaw] {
            faults.push(Fault::CrashAfter { host, moment, down_ms: 50 });
        }
    }
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
        faults.push(Fault::CutLink { from, to, ms: 2_000 });
    }
    faults
}

fn fault(rng: &mut Rng) -> Fault {
    let host = usize::from(rng.per_mille(500));
    let ms = rng.range(10, 3_000);
    match rng.range(0, 99) {
        0..=9 => Fault::CrashDaemon { host, down_ms: rng.pick(&[5, 50, 500, 2_500]) },
        10..=17 => {
            use Moment::{Ask, Cont, Freeze, Journal, Kill, Send, SendRenounced, Thaw};
            let moment = rng.pick(&[Ask, Cont, Freeze, Journal, Kill, Send, SendRenounced, Thaw]);
            Fault::CrashAfter { host, moment, down_ms: rng.pick(&[2, 50, 500, 2_500]) }
        }
        18..=27 => Fault::CrashManager { down_ms: rng.pick(&[5, 50, 500, 3_000]) },
        28..=29 => Fault::LoseManager,
        30..=35 => Fault::LoseHost { host },
        36..=42 => Fault::KillQemu { host },
        43..=52 => Fault::CutChannel,
        53..=58 => Fault::WithholdTail,
        59..=63 => Fault::DropReverse,
        64..=73 => {
            let (from, to) = rng.pick(&[(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]);
            Fault::CutLink { from, to, ms }
        }
        74..=78 => Fault::Suspend { ms: rng.pick(&[5, 100, 1_500]) },
        79..=84 => Fault::Terminate,
        85..=89 => Fault::RefuseCont,
        90..=91 => Fault::FailFreeze,
        92..=95 => Fault::ClockJump { host },
        _ => Fault::RestoreRegistry { back: usize::try_from(rng.range(1, 4)).unwrap_or(1) },
    }
}
