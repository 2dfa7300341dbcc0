#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The split mirror beside `virtio-queue`, which walks the same rings by itself: what both say of chains that a random driver
//! laid, legal and not, direct and indirect, wherever its descriptors lie.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::dma::{CopyEngine, Mapping, Region};
use crate::driver::GuestMemory;
use crate::link::QueuePort;
use crate::virtqueue::split::{avail_bytes, table_bytes, used_bytes};
use crate::virtqueue::{DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor};

const SIZE: u16 = 64;

/// A driver that is told nothing, and rings nothing.
pub(super) struct NoPort;

impl QueuePort for NoPort {
    fn doorbell_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
    fn take_doorbell(&mut self) -> bool {
        false
    }
    fn raise_interrupt(&mut self) {}
}

/// A buffer: address, length, writable.
type Seen = (u64, u32, bool);

/// A ring in a guest's memory, a mirror of it and its oracle.
struct Bed {
    memory: Arc<GuestMemory>,
    at: QueueAddresses,
    mirror: Mirror<CopyEngine>,
    oracle: Queue,
    oracle_memory: GuestMemoryMmap,
}

impl Bed {
    fn new() -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let at = QueueAddresses {
            descriptors: memory.take(table_bytes(SIZE), 16),
            driver: memory.take(avail_bytes(SIZE), 2),
            device: memory.take(used_bytes(SIZE), 4),
        };
        let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len()).unwrap());
        let region = Region::new(memory.base(), memory.len(), mapping, 0).unwrap();
        let host = Arc::new(HostMemory::new(vec![region]).unwrap());
        let start = QueueStart {
            index: 0,
            size: SIZE,
            descriptors: at.descriptors,
            driver: at.driver,
            device: at.device,
            position: QueuePosition::default(),
            features: features::VERSION_1 | features::INDIRECT,
            port: Box::new(NoPort),
            inflight: None,
            is_resumed: false,
        };
        check_addresses(&start, &host).unwrap();
        let mirror = Mirror::new(&start, CardLayout::default(), |card| CopyEngine::new(card, host)).unwrap();
        let file = FileOffset::new(memory.file().try_clone().unwrap(), 0);
        let range = (GuestAddress(memory.base().0), memory.len() as usize, Some(file));
        let oracle_memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut oracle = Queue::new(SIZE).unwrap();
        oracle.try_set_desc_table_address(GuestAddress(at.descriptors.0)).unwrap();
        oracle.try_set_avail_ring_address(GuestAddress(at.driver.0)).unwrap();
        oracle.try_set_used_ring_address(GuestAddress(at.device.0)).unwrap();
        oracle.set_ready(true);
        Self { memory, at, mirror, oracle, oracle_memory }
    }

    fn put(&self, table: Iova, number: u16, descriptor: Descriptor) {
        self.memory.put(Iova(table.0 + 16 * u64::from(number)), descriptor);
    }

    /// Makes these heads available, as the ones from `index` on.
    fn make_available(&self, index: u16, heads: &[u16]) {
        for (number, head) in heads.iter().enumerate() {
            let slot = index.wrapping_add(number as u16) % SIZE;
            self.memory.put(Iova(self.at.driver.0 + 4 + 2 * u64::from(slot)), *head);
        }
        self.memory.put(Iova(self.at.driver.0 + 2), index.wrapping_add(heads.len() as u16));
    }

    /// All chains that the mirror finds, each with its head, and the fault that ended the search.
    fn fetch(&mut self) -> (Vec<(u16, Vec<Seen>)>, Option<QueueFault>) {
        let mut chains = Vec::new();
        loop {
            let fetched = self.mirror.fetch(FETCH_MAX, |_, chain| {
                let sums = chain.segments.iter().enumerate().fold([0u64; 2], |mut sums, (number, segment)| {
                    sums[usize::from(number >= chain.readable)] += u64::from(segment.length);
                    sums
                });
                assert_eq!(sums, [u64::from(chain.readable_bytes), u64::from(chain.writable_bytes)]);
                let seen = chain.segments.iter().enumerate();
                let seen = seen.map(|(number, at)| (at.address.0, at.length, number >= chain.readable));
                chains.push((chain.id, seen.collect()));
            });
            match fetched {
                Ok(Fetched::Nothing) => return (chains, None),
                Ok(_) => {}
                Err(fault) => return (chains, Some(fault)),
            }
        }
    }

    /// What the oracle finds: it ends a chain where it meets something forbidden, and says nothing.
    fn ask_oracle(&mut self) -> Vec<(u16, Vec<Seen>)> {
        let mut chains = Vec::new();
        while let Some(chain) = self.oracle.pop_descriptor_chain(&self.oracle_memory) {
            let head = chain.head_index();
            let seen = chain.map(|at| (at.addr().0, at.len(), at.is_write_only()));
            chains.push((head, seen.filter(|(_, length, _)| *length > 0).collect()));
        }
        chains
    }
}

/// A legal chain: how many readable and writable buffers, and whether it goes through a table.
fn shape() -> impl Strategy<Value = (usize, usize, bool)> {
    (0usize..6, 0usize..6, any::<bool>())
        .prop_filter("a chain has buffers", |(readable, writable, _)| readable + writable > 0)
}

proptest! {
    /// Legal chains, their descriptors anywhere in the table: both see the same.
    #[test]
    fn legal_chains_are_what_the_oracle_says(
        rounds in proptest::collection::vec(proptest::collection::vec(shape(), 1..8), 1..12),
        order in Just((0..SIZE).collect::<Vec<u16>>()).prop_shuffle(),
        lengths in proptest::collection::vec(0u32..5000, 16),
    ) {
        let mut bed = Bed::new();
        let tables = bed.memory.take(u64::from(SIZE) * 16 * 16, 16);
        let mut index = 0u16;
        for shapes in rounds {
            // Each round has all descriptors anew: those of the round before are the driver's again.
            let mut free = order.iter().copied();
            let mut heads = Vec::new();
            for (readable, writable, indirect) in shapes {
                let count = readable + writable;
                let numbers: Vec<u16> = free.by_ref().take(if indirect { 1 } else { count }).collect();
                let Some(&head) = numbers.first() else { break };
                if !indirect && numbers.len() < count {
                    break;
                }
                let table = if indirect { Iova(tables.0 + 256 * u64::from(head)) } else { bed.at.descriptors };
                for number in 0..count {
                    let place = |number: usize| if indirect { number as u16 } else { numbers[number] };
                    let next = (number + 1 < count).then(|| place(number + 1));
                    let flags = if number >= readable { DESCRIPTOR_WRITE } else { 0 };
                    bed.put(table, place(number), Descriptor {
                        address: 0x4_0000 + 64 * number as u64,
                        length: lengths[(number + usize::from(head)) % lengths.len()],
                        flags: flags | if next.is_some() { DESCRIPTOR_NEXT } else { 0 },
                        next: next.unwrap_or(0xffff),
                    });
                }
                if indirect {
                    let length = 16 * count as u32;
                    let entry = Descriptor { address: table.0, length, flags: DESCRIPTOR_INDIRECT, next: 0xffff };
                    bed.put(bed.at.descriptors, head, entry);
                }
                heads.push(head);
            }
            bed.make_available(index, &heads);
            index = index.wrapping_add(heads.len() as u16);
            let (found, fault) = bed.fetch();
            prop_assert_eq!(fault, None);
            prop_assert_eq!(found, bed.ask_oracle());
        }
    }

    /// Random bytes for a ring: whatever the mirror hands over, the oracle has seen alike, and the rest is a fault.
    #[test]
    fn random_rings_end_in_a_fault_or_as_the_oracle_says(
        table in proptest::collection::vec((0u64..1 << 21, 0u32..300, 0u16..8, 0u16..SIZE + 4), usize::from(SIZE)),
        heads in proptest::collection::vec(0u16..SIZE + 2, 1..40),
    ) {
        let mut bed = Bed::new();
        for (number, (address, length, flags, next)) in table.into_iter().enumerate() {
            bed.put(bed.at.descriptors, number as u16, Descriptor { address, length, flags, next });
        }
        bed.make_available(0, &heads);
        let (found, fault) = bed.fetch();
        prop_assert!(fault.is_some() || found.len() == heads.len());
        for (ours, theirs) in found.iter().zip(bed.ask_oracle()) {
            prop_assert_eq!(ours, &theirs);
        }
    }
}

#[test]
fn an_index_that_jumps_too_far_is_a_fault() {
    let mut bed = Bed::new();
    bed.memory.put(Iova(bed.at.driver.0 + 2), SIZE + 1);
    let (found, fault) = bed.fetch();
    assert!(found.is_empty());
    let jump = RingFault::IndexJump { from: 0, to: SIZE + 1, size: SIZE };
    assert_eq!(fault, Some(QueueFault::Ring(jump)));
}

#[test]
fn a_batch_is_half_of_what_waits_but_not_less_than_a_few() {
    let batches = [0, 1, 16, 17, 31, 32, 33, 64, 65, 1000].map(|waiting| batch_of(waiting, FETCH_MAX));
    assert_eq!(batches, [0, 1, 16, 16, 16, 16, 17, 32, 32, 32]);
    assert_eq!(batch_of(100, 3), 3);
}

#[test]
fn a_ring_outside_the_memory_or_out_of_line_is_refused() {
    let bed = Bed::new();
    let memory = Arc::clone(bed.mirror.engine_ref().memory());
    let start = |descriptors: u64, driver: u64, device: u64, size: u16| QueueStart {
        index: 3,
        size,
        descriptors: Iova(descriptors),
        driver: Iova(driver),
        device: Iova(device),
        position: QueuePosition::default(),
        features: features::VERSION_1,
        port: Box::new(NoPort),
        inflight: None,
        is_resumed: false,
    };
    assert_eq!(check_addresses(&start(0, 4096, 8192, 64), &memory), Ok(Reach::Mapped));
    for (descriptors, driver, device, size) in [
        (8, 4096, 8192, 64),
        (0, 4097, 8192, 64),
        (0, 4096, 8194, 64),
        (0, 4096, 8192, 0),
        (0, 4096, 8192, 48),
        ((1 << 20) - 16, 4096, 8192, 64),
        (0, (1 << 20) - 16, 8192, 64),
        (0, 4096, u64::MAX - 7, 64),
    ] {
        let refused = check_addresses(&start(descriptors, driver, device, size), &memory);
        assert!(
            refused.is_err_and(|why| why.starts_with("queue 3")),
            "{descriptors:#x} {driver:#x} {device:#x} {size}"
        );
    }
}
