//! A driver and a device on a ring, each of which may be interrupted between any two descriptors that it writes.

use super::*;
use crate::virtqueue::packed::PackedRing;

const BUFFER: u64 = 0x10_0000;

struct Model {
    ring: Vec<PackedDescriptor>,
    driver: Place,
    device: Place,
    /// Slots of the chains under way, in their order.
    chains: std::collections::VecDeque<u16>,
    free: u16,
    /// Slots of the chain that was used last which the driver has not written over.
    last_rest: u16,
    seed: u64,
}

impl Model {
    fn new(size: u16, seed: u64) -> Self {
        let start = Place { slot: 0, wrap: true };
        let ring = vec![PackedDescriptor::default(); size.into()];
        Self { ring, driver: start, device: start, chains: [].into(), free: size, last_rest: 0, seed: seed * 2 + 1 }
    }

    fn size(&self) -> u16 {
        self.ring.len() as u16
    }

    fn below(&mut self, limit: u16) -> u16 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed % u64::from(limit)) as u16
    }

    /// Adds a chain as drivers do, the flags of its first descriptor last; `seen` looks after each.
    fn add(&mut self, slots: u16, mut seen: impl FnMut(&Self)) {
        let start = self.driver;
        for ahead in (1..slots).chain([0]) {
            let place = start.advance(ahead, self.size());
            let flags = PackedRing::available_flags(place.wrap);
            self.ring[usize::from(place.slot)] = PackedDescriptor { address: BUFFER, length: 64, id: 0, flags };
            if ahead > 0 {
                seen(self);
            }
        }
        self.free -= slots;
        // Free slots are those of the chains used last, behind the driver's place.
        self.last_rest = self.last_rest.min(self.free);
        self.driver = start.advance(slots, self.size());
        self.chains.push_back(slots);
        seen(self);
    }

    /// Uses the first `count` chains as the mirror does; `seen` looks after each descriptor, and is told whether the batch's first
    /// was marked.
    fn use_batch(&mut self, count: u16, mut seen: impl FnMut(&Self, bool)) {
        let first = self.device;
        let mut place = first;
        let slots: Vec<u16> = self.chains.drain(..usize::from(count)).collect();
        self.ring[usize::from(first.slot)].address = mark(slots[0]);
        seen(self, true);
        for (number, slots) in slots.iter().enumerate() {
            if number > 0 {
                let flags = PackedRing::used_flags(place, false);
                self.ring[usize::from(place.slot)] =
                    PackedDescriptor { address: mark(*slots), length: 0, id: 0, flags };
                seen(self, true);
            }
            place = place.advance(*slots, self.size());
        }
        self.ring[usize::from(first.slot)].flags = PackedRing::used_flags(first, false);
        self.device = place;
        self.free += slots.iter().sum::<u16>();
        self.last_rest = slots.last().copied().unwrap_or_default();
        seen(self, false);
    }
}

fn play(size: u16, slots_max: u16, seed: u64) {
    let mut model = Model::new(size, seed);
    let check = |model: &Model, what: &str| {
        // The head of the last used chain is there, or that chain had one slot.
        if slots_max == 1 || model.free == size || model.last_rest == 0 || model.free >= slots_max {
            let left = left_at(&model.ring);
            assert_eq!(left, Left { next: model.device, unpublished: None }, "{what}: {:?}", model.ring);
        }
    };
    check(&model, "fresh");
    for _ in 0..60 {
        if model.below(2) == 0 {
            for _ in 0..model.below(size) + 1 {
                let slots = model.below(slots_max) + 1;
                if slots <= model.free {
                    let room = slots_max == 1 || model.free - slots >= slots_max;
                    model.add(slots, |model| {
                        if room {
                            check(model, "the driver adds");
                        }
                    });
                }
            }
        } else if !model.chains.is_empty() {
            let count = model.below(model.chains.len() as u16) + 1;
            let (device, free) = (model.device, model.free);
            model.use_batch(count, |model, unpublished| {
                if !unpublished {
                    check(model, "published");
                } else if slots_max == 1 || free >= slots_max {
                    let left = left_at(&model.ring);
                    assert_eq!(left.unpublished, Some(device), "{:?}", model.ring);
                }
            });
        }
    }
}

#[test]
fn a_ring_of_single_descriptors_tells_its_place_always() {
    for size in [1, 2, 3, 4, 8, 13] {
        for seed in 0..200 {
            play(size, 1, seed);
        }
    }
}

#[test]
fn a_ring_of_chains_tells_its_place_while_one_chain_more_has_room() {
    for size in [8, 13, 16] {
        for seed in 0..200 {
            play(size, 3, seed);
        }
    }
}

#[test]
fn a_batch_that_wants_only_its_flags_counts_as_used() {
    let mut model = Model::new(8, 1);
    for slots in [2, 1, 3] {
        model.add(slots, |_| {});
    }
    let mut seen = Vec::new();
    model.use_batch(2, |model, _| seen.push(left_at(&model.ring)));
    let start = Place { slot: 0, wrap: true };
    // Of the second chain nothing is written yet; then it is; then the first has its flags.
    let left = |slot, unpublished| Left { next: Place { slot, wrap: true }, unpublished };
    assert_eq!(seen, [left(2, Some(start)), left(3, Some(start)), left(3, None)]);
}

#[test]
fn what_a_driver_may_write_leads_to_a_place_in_the_ring() {
    let mut model = Model::new(1, 7);
    for size in 1..20 {
        for _ in 0..500 {
            let ring: Vec<PackedDescriptor> = (0..size)
                .map(|_| PackedDescriptor {
                    address: model.below(30).into(),
                    length: 0,
                    id: 0,
                    flags: model.below(4) << 7 & AVAIL | model.below(4) << 15,
                })
                .collect();
            let Left { next, unpublished } = left_at(&ring);
            assert!(next.slot < size && unpublished.is_none_or(|place| place.slot < size), "{ring:?}");
        }
    }
}
