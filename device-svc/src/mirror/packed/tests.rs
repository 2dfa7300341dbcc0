#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! Chains on a packed ring that lie across its end, and a bad one among good ones, with a record of requests in flight and without.

use std::sync::Arc;

use crate::address::Iova;
use crate::dma::{CopyEngine, HostMemory, Mapping, Region};
use crate::driver::GuestMemory;
use crate::inflight::{AreaShape, PackedRecord, QueueRecord, RecordArea};
use crate::link::{QueuePosition, QueueStart};
use crate::mirror::tests::NoPort;
use crate::mirror::{CardLayout, FETCH_MAX, Fetched, Mirror, QueueFault, check_addresses};
use crate::virtqueue::packed::{PackedRing, Place};
use crate::virtqueue::{
    DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, PackedDescriptor, QueueAddresses, RingFault, features,
};

const SIZE: u16 = 8;

/// A ring in a guest's memory, a driver's place on it, and a mirror.
struct Bed {
    memory: Arc<GuestMemory>,
    at: QueueAddresses,
    table: Iova,
    next: Place,
    mirror: Mirror<CopyEngine>,
    record: Option<QueueRecord>,
}

/// A chain that the mirror found: its id, how many slots it took, and where its buffers are.
type Seen = (u16, u16, Vec<u64>);

impl Bed {
    /// One whose ring starts at `start`.
    fn new(start: Place, is_recorded: bool) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let at = QueueAddresses {
            descriptors: memory.take(16 * u64::from(SIZE), 16),
            driver: memory.take(4, 4),
            device: memory.take(4, 4),
        };
        let table = memory.take(16 * 4, 16);
        let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len()).unwrap());
        let region = Region::new(memory.base(), memory.len(), mapping, 0).unwrap();
        let host = Arc::new(HostMemory::new(vec![region]).unwrap());
        let shape = AreaShape { queues: 1, size: SIZE, packed: true };
        let record = is_recorded.then(|| {
            let area = RecordArea::open(&shape.create().unwrap(), 0, shape.bytes(), shape).unwrap();
            area.queue(0, true).unwrap()
        });
        let Place { slot, wrap } = start;
        let queue = QueueStart {
            index: 0,
            size: SIZE,
            descriptors: at.descriptors,
            driver: at.driver,
            device: at.device,
            position: QueuePosition { next_avail: slot, avail_wrap: wrap, next_used: slot, used_wrap: wrap },
            features: features::VERSION_1 | features::INDIRECT | features::RING_PACKED,
            port: Box::new(NoPort),
            inflight: record.clone(),
            is_resumed: false,
        };
        check_addresses(&queue, &host).unwrap();
        let mirror = Mirror::new(&queue, CardLayout::default(), |card| CopyEngine::new(card, host)).unwrap();
        Self { memory, at, table, next: start, mirror, record }
    }

    /// Makes a chain of these available: address and flags of each descriptor. The first one's flags come last.
    fn add(&mut self, id: u16, chain: &[(u64, u16)]) {
        for (index, (address, flags)) in chain.iter().enumerate().rev() {
            let place = self.next.advance(index as u16, SIZE);
            let next = if index + 1 < chain.len() { DESCRIPTOR_NEXT } else { 0 };
            let flags = flags | next | PackedRing::available_flags(place.wrap);
            let length = if flags & DESCRIPTOR_INDIRECT != 0 { 32 } else { 1 };
            let descriptor = PackedDescriptor { address: *address, length, id, flags };
            self.memory.put(Iova(self.at.descriptors.0 + 16 * u64::from(place.slot)), descriptor);
        }
        self.next = self.next.advance(chain.len() as u16, SIZE);
    }

    fn fetch(&mut self) -> (Vec<Seen>, Option<QueueFault>) {
        let mut chains = Vec::new();
        loop {
            let fetched = self.mirror.fetch(FETCH_MAX, |_, chain| {
                chains.push((chain.id, chain.slots, chain.segments.iter().map(|at| at.address.0).collect()));
            });
            match fetched {
                Ok(Fetched::Nothing) => return (chains, None),
                Ok(_) => {}
                Err(fault) => return (chains, Some(fault)),
            }
        }
    }

    fn next_avail(&self) -> Place {
        let position = self.mirror.position();
        Place { slot: position.next_avail, wrap: position.avail_wrap }
    }
}

#[test]
fn chains_lie_across_the_rings_end_wherever_it_is() {
    for (slot, is_recorded) in (0..SIZE).flat_map(|slot| [(slot, false), (slot, true)]) {
        let mut bed = Bed::new(Place { slot, wrap: true }, is_recorded);
        for (number, address) in [(0, 0x700), (1, 0x800)] {
            let entry = PackedDescriptor { address, length: 1, id: 0, flags: 0 };
            bed.memory.put(Iova(bed.table.0 + 16 * number), entry);
        }
        let mut expected = Vec::new();
        for (id, slots) in [(7, 3), (5, 2), (6, 1)] {
            let addresses: Vec<u64> = (0..slots).map(|index| 0x1000 * u64::from(id) + index).collect();
            bed.add(id, &addresses.iter().map(|address| (*address, 0)).collect::<Vec<_>>());
            expected.push((id, slots as u16, addresses));
        }
        bed.add(4, &[(0x400, 0), (bed.table.0, DESCRIPTOR_INDIRECT)]);
        expected.push((4, 2, vec![0x400, 0x700, 0x800]));
        assert_eq!(bed.fetch(), (expected, None), "from slot {slot}, with a record: {is_recorded}");
        assert_eq!(bed.next_avail(), Place { slot, wrap: false }, "a whole lap");
    }
}

#[test]
fn a_bad_chain_is_met_again_and_those_before_it_are_in_flight() {
    for is_recorded in [false, true] {
        let mut bed = Bed::new(Place { slot: 6, wrap: true }, is_recorded);
        bed.add(1, &[(0x1000, 0), (0x2000, 0), (0x3000, DESCRIPTOR_WRITE)]);
        let bad = bed.next;
        bed.add(2, &[(0x4000, DESCRIPTOR_WRITE), (0x5000, 0)]);
        bed.add(3, &[(0x6000, 0)]);
        let fault = Some(QueueFault::Ring(RingFault::ReadableAfterWritable));
        assert_eq!(bed.fetch(), (vec![(1, 3, vec![0x1000, 0x2000, 0x3000])], fault));
        assert_eq!(bed.next_avail(), bad);
        assert_eq!(bed.fetch(), (vec![], fault), "again");
        assert_eq!(bed.next_avail(), bad);
        let Some(record) = &bed.record else { continue };
        let mut record = PackedRecord::new(record, SIZE).unwrap();
        let (used, again) = record.attach(SIZE, Place { slot: 0, wrap: true }, 0).unwrap().unwrap();
        assert_eq!(used, Place { slot: 6, wrap: true });
        let ids: Vec<Vec<u16>> =
            again.iter().map(|chain| chain.descriptors.iter().map(|descriptor| descriptor.id).collect()).collect();
        assert_eq!(ids, [[1, 1, 1]]);
    }
}

#[test]
fn slots_that_are_not_free_are_a_fault_and_nothing_is_taken() {
    let mut bed = Bed::new(Place { slot: 0, wrap: true }, true);
    bed.add(1, &[(0x1000, 0); 7]);
    assert_eq!(bed.fetch().0.len(), 1);
    let before = bed.next_avail();
    bed.add(2, &[(0x2000, 0), (0x3000, 0)]);
    let fault = QueueFault::Ring(RingFault::AvailableTwice { size: SIZE });
    assert_eq!(bed.fetch(), (vec![], Some(fault)));
    assert_eq!(bed.next_avail(), before);
}
