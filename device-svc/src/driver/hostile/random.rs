//! Numbers that look random and come again with the same seed.

/// A generator (Steele and others' SplitMix64: one addition and a mix, any seed is a good one).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// 0 to `limit` − 1.
    pub(super) const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True in one of `times` cases.
    pub(super) const fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A number that breaks arithmetic more often than a random one does.
    pub(super) fn nasty(&mut self) -> u64 {
        let edge = self.pick(&[
            0,
            1,
            0xfff,
            0x1000,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 32,
            1 << 47,
            1 << 63,
            u64::MAX - 0xfff,
            u64::MAX - 1,
            u64::MAX,
        ]);
        match self.below(4) {
            0 => edge,
            1 => edge.wrapping_add(self.below(9)).wrapping_sub(4),
            2 => self.below(1 << 20),
            _ => self.next(),
        }
    }

    /// Random bytes.
    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}
