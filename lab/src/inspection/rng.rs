//! Seeded choices: the same seed and case give the same VM, the same mutation, on every machine.

/// A small generator (SplitMix64).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The generator of one case of a run.
    #[must_use]
    pub fn of(seed: u64, case: u64) -> Self {
        let mut rng = Self(seed ^ case.wrapping_mul(0xd1b5_4a32_d192_ed03));
        rng.next_u64();
        rng
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 when the bound is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let number = self.next_u64() % (bound.max(1) as u64);
        // It is below a usize.
        usize::try_from(number).unwrap_or(0)
    }

    /// True in one case of `cases`.
    pub fn one_in(&mut self, cases: usize) -> bool {
        self.below(cases) == 0
    }

    /// One of these; `None` of nothing.
    pub fn pick<'a, T>(&mut self, among: &'a [T]) -> Option<&'a T> {
        among.get(self.below(among.len()))
    }

    /// One of these, each as often as its weight says; `None` when all weights are 0.
    pub fn weighted<'a, T>(&mut self, among: &'a [(usize, T)]) -> Option<&'a T> {
        let total = among.iter().map(|(weight, _)| weight).sum();
        let mut at = self.below(total);
        among.iter().find_map(|(weight, item)| {
            let hit = at < *weight;
            at = at.wrapping_sub(if hit { 0 } else { *weight });
            hit.then_some(item)
        })
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.next_u64().to_be_bytes()[0]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_case_is_the_same_every_time_and_differs_from_the_next() {
        let numbers = |seed, case| {
            let mut rng = Rng::of(seed, case);
            [rng.next_u64(), rng.next_u64()]
        };
        assert_eq!(numbers(7, 1), numbers(7, 1));
        assert_ne!(numbers(7, 1), numbers(7, 2));
        assert_ne!(numbers(7, 1), numbers(8, 1));
    }

    #[test]
    fn weights_are_kept_and_nothing_is_picked_from_nothing() {
        let mut rng = Rng::of(1, 1);
        let mut seen = [0; 3];
        for _ in 0..4000 {
            seen[*rng.weighted(&[(1, 0), (0, 1), (3, 2)]).unwrap()] += 1;
        }
        assert_eq!(seen[1], 0);
        assert!((800..1200).contains(&seen[0]), "{seen:?}");
        assert_eq!(rng.pick::<u8>(&[]), None);
        assert_eq!(rng.below(0), 0);
    }
}
