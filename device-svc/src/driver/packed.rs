//! The driver's half of a packed ring (virtio 1.3, 2.8).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::queue::TABLE_MAX;
use super::{Buffer, GuestMemory};
use crate::address::Iova;
use crate::dma::full_barrier;
use crate::virtqueue::packed::{AVAIL, EVENT_DISABLE, EVENT_ENABLE, Place, USED};
use crate::virtqueue::{DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, PackedDescriptor, QueueAddresses};

/// Where a descriptor's flags are.
const FLAGS: u64 = 14;

#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    token: u32,
    slots: u16,
}

/// The driver's half of a packed ring.
#[derive(Debug)]
pub struct PackedDriver {
    memory: Arc<GuestMemory>,
    size: u16,
    at: QueueAddresses,
    next_avail: Place,
    next_used: Place,
    free_slots: u16,
    /// Buffer ids that are free, oldest first.
    free_ids: std::collections::VecDeque<u16>,
    /// By buffer id.
    chains: Box<[Chain]>,
    tables: Option<Iova>,
    /// The first descriptor of what was added since the last publication: its flags are written last.
    first: Option<(Place, u16)>,
}

impl PackedDriver {
    pub(super) fn new(memory: &Arc<GuestMemory>, size: u16, indirect: bool) -> Self {
        let at = QueueAddresses {
            descriptors: memory.take(16 * u64::from(size), 4096),
            driver: memory.take(4, 64),
            device: memory.take(4, 64),
        };
        let tables = indirect.then(|| memory.take(u64::from(size) * TABLE_MAX as u64 * 16, 64));
        let start = Place { slot: 0, wrap: true };
        Self {
            memory: Arc::clone(memory),
            size,
            at,
            next_avail: start,
            next_used: start,
            free_slots: size,
            free_ids: (0..size).collect(),
            chains: vec![Chain::default(); usize::from(size)].into_boxed_slice(),
            tables,
            first: None,
        }
    }

    pub(super) const fn addresses(&self) -> QueueAddresses {
        self.at
    }

    fn descriptor_at(&self, slot: u16) -> Iova {
        Iova(self.at.descriptors.0 + 16 * u64::from(slot))
    }

    #[inline]
    pub(super) fn add(&mut self, buffers: &[Buffer], token: u32) -> bool {
        let indirect = self.tables.filter(|_| buffers.len() > 1 && buffers.len() <= TABLE_MAX);
        let needed = if indirect.is_some() { 1 } else { buffers.len() as u16 };
        if needed == 0 || self.free_slots < needed {
            return false;
        }
        let Some(id) = self.free_ids.pop_front() else { return false };
        if let Some(tables) = indirect {
            let table = Iova(tables.0 + u64::from(id) * TABLE_MAX as u64 * 16);
            for (index, buffer) in buffers.iter().enumerate() {
                let flags = if buffer.writable { DESCRIPTOR_WRITE } else { 0 };
                let entry = PackedDescriptor { address: buffer.address.0, length: buffer.length, id: 0, flags };
                self.memory.put(Iova(table.0 + 16 * index as u64), entry);
            }
            self.put(table.0, 16 * buffers.len() as u32, id, DESCRIPTOR_INDIRECT);
        } else {
            for (index, buffer) in buffers.iter().enumerate() {
                let write = if buffer.writable { DESCRIPTOR_WRITE } else { 0 };
                let next = if index + 1 < buffers.len() { DESCRIPTOR_NEXT } else { 0 };
                self.put(buffer.address.0, buffer.length, id, write | next);
            }
        }
        self.free_slots -= needed;
        self.chains[usize::from(id)] = Chain { token, slots: needed };
        true
    }

    /// Writes one descriptor at the next place; the first of a batch without its flags.
    #[inline]
    fn put(&mut self, address: u64, length: u32, id: u16, flags: u16) {
        let place = self.next_avail;
        let marks = if place.wrap { AVAIL } else { USED };
        let at = self.descriptor_at(place.slot);
        let flags = flags | marks;
        if self.first.is_none() {
            // The old flags stay, which say used, or nothing on the first lap.
            let old = self.memory.get::<PackedDescriptor>(at).flags;
            self.memory.put(at, PackedDescriptor { address, length, id, flags: old });
            self.first = Some((place, flags));
        } else {
            self.memory.put(at, PackedDescriptor { address, length, id, flags });
        }
        self.next_avail = place.advance(1, self.size);
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Some((place, flags)) = self.first.take() else { return false };
        // Release: who sees these flags sees the whole batch (virtio 1.3, 2.8.21.1).
        self.memory.word(Iova(self.descriptor_at(place.slot).0 + FLAGS)).store(flags, Ordering::Release);
        full_barrier();
        self.memory.word(Iova(self.at.device.0 + 2)).load(Ordering::Relaxed) != EVENT_DISABLE
    }

    #[inline]
    pub(super) fn take_used(&mut self) -> Option<(u32, u32)> {
        let place = self.next_used;
        let at = self.descriptor_at(place.slot);
        // Acquire: behind the flags are id and length, the data and the status.
        let flags = self.memory.word(Iova(at.0 + FLAGS)).load(Ordering::Acquire);
        if (flags & USED != 0) != place.wrap || (flags & AVAIL != 0) != place.wrap {
            return None;
        }
        let used = self.memory.get::<PackedDescriptor>(at);
        let known = self.chains.get_mut(usize::from(used.id)).map(std::mem::take).filter(|chain| chain.slots > 0);
        let Some(Chain { token, slots }) = known else {
            unreachable!("the device returned a chain that it did not have: id {}", used.id);
        };
        self.next_used = place.advance(slots, self.size);
        self.free_slots += slots;
        self.free_ids.push_back(used.id);
        Some((token, used.length))
    }

    pub(super) fn want_interrupts(&mut self, want: bool) -> bool {
        let flags = if want { EVENT_ENABLE } else { EVENT_DISABLE };
        self.memory.word(Iova(self.at.driver.0 + 2)).store(flags, Ordering::Relaxed);
        full_barrier();
        if !want {
            return false;
        }
        let place = self.next_used;
        let flags = self.memory.word(Iova(self.descriptor_at(place.slot).0 + FLAGS)).load(Ordering::Acquire);
        (flags & USED != 0) == place.wrap && (flags & AVAIL != 0) == place.wrap
    }
}
