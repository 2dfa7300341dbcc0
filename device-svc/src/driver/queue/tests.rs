#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The driver's halves of both rings against devices that share no code with them: `virtio-queue` for the split ring, and a
//! packed one written straight from the specification.

mod oracle;
mod packed_device;

use std::collections::VecDeque;

use proptest::prelude::*;

use self::oracle::SplitOracle;
use self::packed_device::PackedDevice;
use super::*;
use crate::address::Iova;

const MEMORY_BYTES: u64 = 1 << 20;
const MEMORY_BASE: u64 = 0x10_0000;

/// A chain as a device finds it: what to return it by, and its buffers.
#[derive(Debug)]
struct Popped {
    id: u16,
    slots: u16,
    buffers: Vec<Buffer>,
}

/// The other side of a queue.
trait Device {
    fn pop(&mut self) -> Option<Popped>;
    fn complete(&mut self, chain: &Popped, written: u32);
}

fn device(memory: &Arc<GuestMemory>, options: QueueOptions, queue: &DriverQueue) -> Box<dyn Device> {
    if options.features & features::RING_PACKED != 0 {
        Box::new(PackedDevice::new(memory, options.size, queue.addresses()))
    } else {
        Box::new(SplitOracle::new(memory, options, queue.addresses()))
    }
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(MEMORY_BASE, MEMORY_BYTES).unwrap())
}

/// Readable buffers first, as every chain must be (virtio 1.3, 2.7.4.2).
fn buffers(lengths: &[(u32, bool)]) -> Vec<Buffer> {
    let mut buffers: Vec<Buffer> = lengths
        .iter()
        .enumerate()
        .map(|(index, (length, writable))| Buffer {
            address: Iova(0x1_0000_0000 + ((index as u64) << 20) + u64::from(*length)),
            length: *length,
            writable: *writable,
        })
        .collect();
    buffers.sort_by_key(|buffer| buffer.writable);
    buffers
}

#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a chain.
    Add(Vec<(u32, bool)>),
    /// The driver publishes.
    Publish,
    /// The device takes all it sees.
    Pop,
    /// The device completes one of its chains, chosen by this number.
    Complete(usize, u32),
    /// The driver takes so many.
    Take(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chain = prop_oneof![
        8 => prop::collection::vec((1..9000_u32, any::<bool>()), 1..5),
        1 => prop::collection::vec((1..9000_u32, any::<bool>()), 14..20),
    ];
    let step = prop_oneof![
        6 => chain.prop_map(Step::Add),
        3 => Just(Step::Publish),
        3 => Just(Step::Pop),
        6 => (any::<usize>(), any::<u32>()).prop_map(|(which, written)| Step::Complete(which, written)),
        3 => (1..8_u8).prop_map(Step::Take),
    ];
    prop::collection::vec(step, 1..400)
}

/// What a queue must do, kept beside it.
struct Model {
    queue: DriverQueue,
    device: Box<dyn Device>,
    size: u16,
    indirect: bool,
    free: u16,
    next_token: u32,
    added: VecDeque<(u32, Vec<Buffer>)>,
    published: VecDeque<(u32, Vec<Buffer>)>,
    at_device: Vec<(u32, Popped)>,
    used: VecDeque<(u32, u32, u16)>,
}

impl Model {
    fn new(options: QueueOptions) -> Self {
        let memory = memory();
        let queue = DriverQueue::new(&memory, options);
        let device = device(&memory, options, &queue);
        Self {
            queue,
            device,
            size: options.size,
            indirect: options.indirect,
            free: options.size,
            next_token: 7,
            added: VecDeque::new(),
            published: VecDeque::new(),
            at_device: Vec::new(),
            used: VecDeque::new(),
        }
    }

    fn entries(&self, buffers: &[Buffer]) -> u16 {
        let table = self.indirect && buffers.len() > 1 && buffers.len() <= TABLE_MAX;
        if table { 1 } else { u16::try_from(buffers.len()).unwrap() }
    }

    fn add(&mut self, chain: &[(u32, bool)]) {
        let buffers = buffers(chain);
        let needed = self.entries(&buffers);
        let token = self.next_token;
        assert_eq!(self.queue.add(&buffers, token), needed <= self.free, "{needed} entries of {}", self.free);
        if needed <= self.free {
            self.free -= needed;
            self.next_token += 1;
            self.added.push_back((token, buffers));
        }
    }

    fn publish(&mut self) {
        let rings = self.queue.publish();
        assert!(!rings || !self.added.is_empty(), "a doorbell for nothing");
        self.published.append(&mut self.added);
    }

    fn pop(&mut self) {
        while let Some(chain) = self.device.pop() {
            let (token, buffers) = self.published.pop_front().expect("only what was published is seen");
            assert_eq!(chain.buffers, buffers);
            self.at_device.push((token, chain));
        }
        assert!(self.published.is_empty(), "{} published chains are not seen", self.published.len());
    }

    fn complete(&mut self, which: usize, written: u32) {
        if !self.at_device.is_empty() {
            let (token, chain) = self.at_device.swap_remove(which % self.at_device.len());
            self.device.complete(&chain, written);
            self.used.push_back((token, written, self.entries(&chain.buffers)));
        }
    }

    fn take(&mut self) -> bool {
        let taken = self.queue.take_used();
        let Some((token, written, entries)) = self.used.pop_front() else {
            assert_eq!(taken, None);
            return false;
        };
        assert_eq!(taken, Some((token, written)));
        self.free += entries;
        true
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add(chain) => self.add(chain),
            Step::Publish => self.publish(),
            Step::Pop => self.pop(),
            Step::Complete(which, written) => self.complete(*which, *written),
            Step::Take(count) => {
                for _ in 0..*count {
                    self.take();
                }
            }
        }
    }

    /// Ends what is under way; then the queue is as empty as in the beginning.
    fn finish(mut self) {
        self.publish();
        self.pop();
        while !self.at_device.is_empty() {
            self.complete(0, 1);
        }
        while self.take() {}
        assert_eq!(self.free, self.size);
        for _ in 0..self.size {
            self.add(&[(16, true)]);
        }
        assert_eq!(self.free, 0);
        assert!(!self.queue.add(&buffers(&[(16, true)]), 0), "a full ring takes no more");
    }
}

fn options(size: u16, packed: bool, indirect: bool, event_index: bool) -> QueueOptions {
    let bit = |set: bool, feature: u64| if set { feature } else { 0 };
    QueueOptions {
        size,
        features: features::VERSION_1
            | bit(packed, features::RING_PACKED)
            | bit(indirect, features::INDIRECT)
            | bit(event_index, features::EVENT_INDEX),
        indirect,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn every_chain_goes_over_a_split_ring_and_comes_back_once(
        power in 0..7_u32, indirect: bool, event_index: bool, steps in steps(),
    ) {
        let mut model = Model::new(options(1 << power, false, indirect, event_index));
        steps.iter().for_each(|step| model.step(step));
        model.finish();
    }

    #[test]
    fn every_chain_goes_over_a_packed_ring_and_comes_back_once(
        size in 1..70_u16, indirect: bool, event_index: bool, steps in steps(),
    ) {
        let mut model = Model::new(options(size, true, indirect, event_index));
        steps.iter().for_each(|step| model.step(step));
        model.finish();
    }
}

/// Both rings, with and without tables.
fn all_kinds(size: u16) -> [QueueOptions; 4] {
    [
        options(size, false, false, false),
        options(size, false, true, true),
        options(size, true, false, false),
        options(size, true, true, true),
    ]
}

#[test]
fn indices_run_over_their_sixteen_bits() {
    for options in all_kinds(8) {
        let mut model = Model::new(options);
        let mut done = 0;
        while done < 70_000 {
            model.add(&[(16, false), (4096, true)]);
            model.add(&[(16, false)]);
            model.publish();
            model.pop();
            // The younger one first.
            model.complete(1, 4097);
            model.complete(0, 1);
            while model.take() {
                done += 1;
            }
        }
        model.finish();
    }
}

#[test]
fn the_largest_ring_fills_and_empties() {
    for packed in [false, true] {
        let options = options(QUEUE_SIZE, packed, false, false);
        let memory = Arc::new(GuestMemory::new(0, 8 << 20).unwrap());
        let mut queue = DriverQueue::new(&memory, options);
        let mut device = device(&memory, options, &queue);
        for lap in 0..3_u32 {
            for token in 0..u32::from(QUEUE_SIZE) {
                assert!(queue.add(&buffers(&[(token + 1, true)]), token));
            }
            assert!(!queue.add(&buffers(&[(1, true)]), 0));
            queue.publish();
            for token in 0..u32::from(QUEUE_SIZE) {
                let chain = device.pop().unwrap();
                assert_eq!(chain.buffers[0].length, token + 1, "lap {lap}");
                device.complete(&chain, token);
                assert_eq!(queue.take_used(), Some((token, token)));
            }
        }
    }
}

const QUEUE_SIZE: u16 = crate::virtqueue::QUEUE_SIZE_MAX;

#[test]
fn nothing_is_seen_before_it_is_published() {
    for options in all_kinds(16) {
        let memory = memory();
        let mut queue = DriverQueue::new(&memory, options);
        let mut device = device(&memory, options, &queue);
        for token in 0..3 {
            assert!(queue.add(&buffers(&[(16, false), (512, true)]), token));
            assert!(device.pop().is_none());
        }
        assert!(queue.publish(), "a device that has said nothing wants its doorbell");
        assert!(!queue.publish(), "nothing new");
        assert_eq!(std::iter::from_fn(|| device.pop()).count(), 3);
    }
}

/// The numbers of the descriptors that the available ring names.
fn heads(memory: &GuestMemory, at: QueueAddresses, from: u16, count: u16, size: u16) -> Vec<u16> {
    (from..from + count).map(|index| memory.get(Iova(at.driver.0 + 4 + 2 * u64::from(index % size)))).collect()
}

#[test]
fn what_is_published_together_lies_together_once_chains_come_back_in_order() {
    let memory = memory();
    let options = options(32, false, false, false);
    let mut queue = DriverQueue::new(&memory, options);
    let mut device = device(&memory, options, &queue);
    let chain = buffers(&[(16, false), (4096, true), (1, true)]);
    for turn in 0..100_u16 {
        for token in 0..8 {
            assert!(queue.add(&chain, token));
        }
        queue.publish();
        let heads = heads(&memory, queue.addresses(), turn * 8, 8, 32);
        let expected: Vec<u16> = (0..8).map(|number| (turn * 24 + number * 3) % 32).collect();
        assert_eq!(heads, expected);
        while let Some(chain) = device.pop() {
            device.complete(&chain, 0);
        }
        while queue.take_used().is_some() {}
    }
}

#[test]
fn a_chain_too_long_for_a_table_goes_into_the_ring() {
    for options in [options(32, false, true, false), options(32, true, true, false)] {
        let memory = memory();
        let mut queue = DriverQueue::new(&memory, options);
        let mut device = device(&memory, options, &queue);
        for length in [TABLE_MAX, TABLE_MAX + 1] {
            let chain = buffers(&vec![(512, true); length]);
            assert!(queue.add(&chain, 1));
            queue.publish();
            let popped = device.pop().unwrap();
            assert_eq!(popped.buffers, chain);
            device.complete(&popped, 9);
            assert_eq!(queue.take_used(), Some((1, 9)));
        }
        // A chain that no ring of this size holds is refused, and nothing is lost.
        assert!(!queue.add(&buffers(&[(1, true); 33]), 2));
        assert!(queue.add(&buffers(&[(1, true); 32]), 3));
    }
}
