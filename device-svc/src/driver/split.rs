//! The driver's half of a split ring (virtio 1.3, 2.7).
//!
//! Free descriptors stand in a circle: chains that come back in order are taken again in order, so that what is published
//! together lies together in the table.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::queue::TABLE_MAX;
use super::{Buffer, GuestMemory};
use crate::address::Iova;
use crate::dma::{full_barrier, prefetch_read, prefetch_write};
use crate::virtqueue::split::{NO_INTERRUPT, NO_NOTIFY, SplitRing, avail_bytes, passes_event, table_bytes, used_bytes};
use crate::virtqueue::{
    DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, QueueAddresses, UsedElement,
};

/// What is known of the chain that starts at a descriptor.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    token: u32,
    descriptors: u16,
}

/// The driver's half of a split ring.
#[derive(Debug)]
pub struct SplitDriver {
    memory: Arc<GuestMemory>,
    size: u16,
    at: QueueAddresses,
    /// The same ring, for where things lie.
    places: SplitRing,
    /// The circle of free descriptors: `free_count` of them from `free_head`.
    free: Box<[u16]>,
    free_head: u16,
    free_count: u16,
    heads: Box<[Head]>,
    /// The numbers of each chain's descriptors, by head: only its own are given back.
    links: Box<[u16]>,
    next_avail: u16,
    published: u16,
    next_used: u16,
    /// The used index as last read: the device's line is asked for again only when what it said is used up.
    seen_used: u16,
    /// One table per descriptor.
    tables: Option<Iova>,
    event_index: bool,
}

impl SplitDriver {
    pub(super) fn new(memory: &Arc<GuestMemory>, size: u16, indirect: bool, event_index: bool) -> Self {
        assert!(size.is_power_of_two());
        let at = QueueAddresses {
            descriptors: memory.take(table_bytes(size), 4096),
            driver: memory.take(avail_bytes(size), 64),
            device: memory.take(used_bytes(size), 64),
        };
        let tables = indirect.then(|| memory.take(u64::from(size) * TABLE_MAX as u64 * 16, 64));
        Self {
            memory: Arc::clone(memory),
            size,
            at,
            places: SplitRing::new(size, at, 0, 0),
            free: (0..size).collect(),
            free_head: 0,
            free_count: size,
            heads: vec![Head::default(); usize::from(size)].into_boxed_slice(),
            links: vec![0; usize::from(size)].into_boxed_slice(),
            next_avail: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
            tables,
            event_index,
        }
    }

    pub(super) const fn addresses(&self) -> QueueAddresses {
        self.at
    }

    /// The free descriptor that is taken after `ahead` others.
    #[inline]
    fn free_at(&self, ahead: u16) -> u16 {
        self.free[usize::from(self.free_head.wrapping_add(ahead) & (self.size - 1))]
    }

    #[inline]
    pub(super) fn add(&mut self, buffers: &[Buffer], token: u32) -> bool {
        let indirect = self.tables.filter(|_| buffers.len() > 1 && buffers.len() <= TABLE_MAX);
        let needed = if indirect.is_some() { 1 } else { buffers.len() };
        if needed == 0 || usize::from(self.free_count) < needed {
            return false;
        }
        let head = self.free_at(0);
        if let Some(tables) = indirect {
            let table = Iova(tables.0 + u64::from(head) * TABLE_MAX as u64 * 16);
            for (index, buffer) in buffers.iter().enumerate() {
                let last = index + 1 == buffers.len();
                let entry = descriptor(*buffer, if last { None } else { Some(index as u16 + 1) });
                self.memory.put(Iova(table.0 + 16 * index as u64), entry);
            }
            let length = 16 * buffers.len() as u32;
            let entry = Descriptor { address: table.0, length, flags: DESCRIPTOR_INDIRECT, next: 0 };
            self.memory.put(self.places.descriptor_at(head), entry);
        } else {
            for (index, buffer) in buffers.iter().enumerate() {
                let number = self.free_at(index as u16);
                let next = (index + 1 < buffers.len()).then(|| self.free_at(index as u16 + 1));
                self.links[usize::from(number)] = next.unwrap_or(0);
                self.memory.put(self.places.descriptor_at(number), descriptor(*buffer, next));
            }
        }
        self.free_head = self.free_head.wrapping_add(needed as u16);
        self.free_count -= needed as u16;
        self.heads[usize::from(head)] = Head { token, descriptors: needed as u16 };
        let slot = self.next_avail & (self.size - 1);
        self.memory.put(self.places.avail_entry_at(slot), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        true
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if self.next_avail == self.published {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.next_avail);
        // Release: who sees the index sees the entries and descriptors.
        self.memory.word(self.places.avail_index_at()).store(self.next_avail, Ordering::Release);
        // Our index against the device's wish for a doorbell (virtio 1.3, 2.7.13.4.1).
        full_barrier();
        if self.event_index {
            let event = self.memory.word(self.places.avail_event_at()).load(Ordering::Relaxed);
            passes_event(event, old, self.next_avail)
        } else {
            self.memory.word(self.places.used_flags_at()).load(Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    #[inline]
    pub(super) fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.seen_used == self.next_used {
            // Acquire: behind the index are the elements, the data and the status.
            self.seen_used = self.memory.word(self.places.used_index_at()).load(Ordering::Acquire);
            if self.seen_used == self.next_used {
                return None;
            }
            self.expect_batch();
        }
        let slot = self.next_used & (self.size - 1);
        let element = self.memory.get::<UsedElement>(self.places.used_element_at(slot));
        self.next_used = self.next_used.wrapping_add(1);
        let mut number = element.id as u16;
        let Head { token, descriptors } = self.heads[usize::from(number)];
        assert!(
            element.id < u32::from(self.size) && descriptors > 0,
            "the device returned a chain that it did not have"
        );
        self.heads[usize::from(number)].descriptors = 0;
        for _ in 0..descriptors {
            let place = usize::from(self.free_head.wrapping_add(self.free_count) & (self.size - 1));
            self.free[place] = number;
            self.free_count += 1;
            number = self.links[usize::from(number)];
        }
        Some((token, element.length))
    }

    /// Asks for the lines of a batch that has ended, and for those that will be written when as many chains are added.
    #[inline]
    fn expect_batch(&self) {
        /// What of each is in a cache line of 64 bytes.
        const ELEMENTS: u16 = 8;
        const DESCRIPTORS: u16 = 4;
        /// Descriptors of a usual chain.
        const CHAIN: u16 = 3;
        let count = self.seen_used.wrapping_sub(self.next_used).min(self.size);
        for ahead in (0..count).step_by(ELEMENTS.into()) {
            let slot = self.next_used.wrapping_add(ahead) & (self.size - 1);
            prefetch_read(self.memory.pointer(self.places.used_element_at(slot), 8));
        }
        for ahead in (0..(count * CHAIN).min(self.free_count)).step_by(DESCRIPTORS.into()) {
            prefetch_write(self.memory.pointer(self.places.descriptor_at(self.free_at(ahead)), 16));
        }
        let slot = self.next_avail & (self.size - 1);
        prefetch_write(self.memory.pointer(self.places.avail_entry_at(slot), 2));
    }

    pub(super) fn want_interrupts(&mut self, want: bool) -> bool {
        if self.event_index {
            // Just behind what was taken is soon; half the indices away is never.
            let event = if want { self.next_used } else { self.next_used.wrapping_sub(1) };
            self.memory.word(self.places.used_event_at()).store(event, Ordering::Relaxed);
        } else {
            let flags = if want { 0 } else { NO_INTERRUPT };
            self.memory.word(self.places.avail_flags_at()).store(flags, Ordering::Relaxed);
        }
        // Our wish against the device's index.
        full_barrier();
        self.seen_used = self.memory.word(self.places.used_index_at()).load(Ordering::Acquire);
        want && self.seen_used != self.next_used
    }
}

const fn descriptor(buffer: Buffer, next: Option<u16>) -> Descriptor {
    let mut flags = if buffer.writable { DESCRIPTOR_WRITE } else { 0 };
    let mut number = 0;
    if let Some(next) = next {
        flags |= DESCRIPTOR_NEXT;
        number = next;
    }
    Descriptor { address: buffer.address.0, length: buffer.length, flags, next: number }
}
