//! The device's side of a split ring by `virtio-queue`, and what it says of doorbells and interrupts.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;

pub(super) struct SplitOracle {
    queue: Queue,
    memory: GuestMemoryMmap,
}

impl SplitOracle {
    pub(super) fn new(memory: &GuestMemory, options: QueueOptions, at: QueueAddresses) -> Self {
        let file = FileOffset::new(memory.file().try_clone().unwrap(), 0);
        let range = (GuestAddress(memory.base().0), usize::try_from(memory.len()).unwrap(), Some(file));
        let mut queue = Queue::new(options.size).unwrap();
        queue.set_size(options.size);
        queue.try_set_desc_table_address(GuestAddress(at.descriptors.0)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(at.driver.0)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(at.device.0)).unwrap();
        queue.set_event_idx(options.features & features::EVENT_INDEX != 0);
        queue.set_ready(true);
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        assert!(queue.is_valid(&memory), "the ring does not lie as a device expects it");
        Self { queue, memory }
    }
}

impl Device for SplitOracle {
    fn pop(&mut self) -> Option<Popped> {
        let chain = self.queue.pop_descriptor_chain(&self.memory)?;
        let id = chain.head_index();
        let buffers = chain.map(|descriptor| Buffer {
            address: Iova(descriptor.addr().0),
            length: descriptor.len(),
            writable: descriptor.is_write_only(),
        });
        Some(Popped { id, slots: 0, buffers: buffers.collect() })
    }

    fn complete(&mut self, chain: &Popped, written: u32) {
        self.queue.add_used(&self.memory, chain.id, written).unwrap();
    }
}

/// A ring and its oracle.
fn pair(event_index: bool) -> (DriverQueue, SplitOracle) {
    let memory = memory();
    let options = options(8, false, false, event_index);
    let queue = DriverQueue::new(&memory, options);
    let oracle = SplitOracle::new(&memory, options, queue.addresses());
    (queue, oracle)
}

fn add(queue: &mut DriverQueue) -> bool {
    assert!(queue.add(&buffers(&[(16, true)]), 1));
    queue.publish()
}

#[test]
fn the_doorbell_is_rung_exactly_when_the_device_asks() {
    for event_index in [false, true] {
        let (mut queue, mut oracle) = pair(event_index);
        for _ in 0..50_000 {
            assert!(!oracle.queue.enable_notification(&oracle.memory).unwrap());
            assert!(add(&mut queue), "the device sleeps");
            oracle.queue.disable_notification(&oracle.memory).unwrap();
            // With the event index a device cannot ask for none; it only does not ask anew.
            assert!(!add(&mut queue), "the device looks by itself");
            while let Some(chain) = oracle.pop() {
                oracle.complete(&chain, 0);
            }
            assert_eq!(std::iter::from_fn(|| queue.take_used()).count(), 2);
        }
    }
}

#[test]
fn an_interrupt_comes_exactly_when_it_was_asked_for() {
    for event_index in [false, true] {
        let (mut queue, mut oracle) = pair(event_index);
        let flags = GuestAddress(queue.addresses().driver.0);
        for turn in 0..20_000 {
            let wanted = turn % 3 == 0;
            assert!(!queue.want_interrupts(wanted), "nothing is there yet");
            add(&mut queue);
            let chain = oracle.pop().unwrap();
            oracle.complete(&chain, 0);
            // The oracle knows the event index, and leaves the flag to its caller (2.7.7.1).
            let silent = !event_index && oracle.memory.read_obj::<u16>(flags).unwrap() & 1 != 0;
            let interrupts = oracle.queue.needs_notification(&oracle.memory).unwrap() && !silent;
            assert_eq!(interrupts, wanted, "turn {turn}");
            assert!(queue.want_interrupts(true), "what came before the wish is told at once");
            assert!(queue.take_used().is_some());
        }
    }
}
