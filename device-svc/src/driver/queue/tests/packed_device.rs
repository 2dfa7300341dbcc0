//! The device's side of a packed ring, word for word as the specification has it (virtio 1.3, 2.8): slow, and without a line
//! of the card's own.

use super::*;

pub(super) struct PackedDevice {
    memory: Arc<GuestMemory>,
    at: QueueAddresses,
    size: u16,
    avail: (u16, bool),
    used: (u16, bool),
}

/// One 16-byte descriptor (2.8.13): address, length, id, flags.
#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    length: u32,
    id: u16,
    flags: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl PackedDevice {
    pub(super) fn new(memory: &Arc<GuestMemory>, size: u16, at: QueueAddresses) -> Self {
        // Alignment that 2.8.10.1 asks for.
        assert!(at.descriptors.0.is_multiple_of(16) && at.driver.0.is_multiple_of(4) && at.device.0.is_multiple_of(4));
        Self { memory: Arc::clone(memory), at, size, avail: (0, true), used: (0, true) }
    }

    fn entry(&self, at: u64) -> Entry {
        let field = |offset: u64| Iova(at + offset);
        Entry {
            address: self.memory.get(field(0)),
            length: self.memory.get(field(8)),
            id: self.memory.get(field(12)),
            flags: self.memory.get(field(14)),
        }
    }

    fn step(&self, place: (u16, bool)) -> (u16, bool) {
        if place.0 + 1 == self.size { (0, !place.1) } else { (place.0 + 1, place.1) }
    }

    fn set_events(&self, flags: u16) {
        self.memory.put(Iova(self.at.device.0 + 2), flags);
    }

    fn driver_events(&self) -> u16 {
        self.memory.get(Iova(self.at.driver.0 + 2))
    }
}

fn buffer(entry: Entry) -> Buffer {
    Buffer { address: Iova(entry.address), length: entry.length, writable: entry.flags & WRITE != 0 }
}

impl Device for PackedDevice {
    fn pop(&mut self) -> Option<Popped> {
        let mut buffers = Vec::new();
        let mut slots = 0;
        loop {
            let entry = self.entry(self.at.descriptors.0 + 16 * u64::from(self.avail.0));
            let (avail, used) = (entry.flags & 1 << 7 != 0, entry.flags & 1 << 15 != 0);
            let is_available = avail == self.avail.1 && used != self.avail.1;
            if slots == 0 && !is_available {
                return None;
            }
            assert!(is_available, "a chain is published as a whole");
            self.avail = self.step(self.avail);
            slots += 1;
            if entry.flags & INDIRECT != 0 {
                assert!(entry.flags & (NEXT | WRITE) == 0 && slots == 1 && entry.length.is_multiple_of(16));
                let table = (0..u64::from(entry.length / 16)).map(|index| self.entry(entry.address + 16 * index));
                // In a table only `WRITE` means something (2.8.19).
                buffers.extend(table.map(buffer));
            } else {
                buffers.push(buffer(entry));
            }
            if entry.flags & NEXT == 0 {
                // The last descriptor of a chain has its id (2.8.6).
                return Some(Popped { id: entry.id, slots, buffers });
            }
        }
    }

    fn complete(&mut self, chain: &Popped, written: u32) {
        let at = self.at.descriptors.0 + 16 * u64::from(self.used.0);
        self.memory.put(Iova(at + 8), written);
        self.memory.put(Iova(at + 12), chain.id);
        let marks: u16 = if self.used.1 { 1 << 7 | 1 << 15 } else { 0 };
        self.memory.put(Iova(at + 14), marks);
        for _ in 0..chain.slots {
            self.used = self.step(self.used);
        }
    }
}

#[test]
fn doorbells_and_interrupts_are_said_in_the_event_structures() {
    let memory = memory();
    let options = options(5, true, false, false);
    let mut queue = DriverQueue::new(&memory, options);
    let mut device = PackedDevice::new(&memory, 5, queue.addresses());
    for turn in 0..1000 {
        let wanted = turn % 2 == 0;
        device.set_events(u16::from(!wanted));
        assert!(!queue.want_interrupts(wanted), "nothing is there yet");
        assert_eq!(device.driver_events(), u16::from(!wanted));
        assert!(queue.add(&buffers(&[(16, false), (512, true)]), turn));
        assert_eq!(queue.publish(), wanted);
        let chain = device.pop().unwrap();
        device.complete(&chain, 512);
        assert!(queue.want_interrupts(true), "what came before the wish is told at once");
        assert_eq!(queue.take_used(), Some((turn, 512)));
    }
}
