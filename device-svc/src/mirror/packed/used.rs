//! What the driver of a packed ring is told: used descriptors, when it wants an interrupt for them, and whether we want its doorbell.

use super::{FLAGS, PackedMirror};
use crate::address::Iova;
use crate::dma::DmaEngine;
use crate::mirror::QueueFault;
use crate::virtqueue::PackedDescriptor;
use crate::virtqueue::packed::{EVENT_DESCRIPTOR, EVENT_DISABLE, EVENT_ENABLE, PackedRing, mark};

/// A used descriptor that is staged: its slot and flags, and what the record calls its chain.
#[derive(Clone, Copy)]
pub(super) struct Staged {
    slot: u16,
    flags: u16,
    entry: u16,
}

impl PackedMirror {
    #[inline]
    pub(in crate::mirror) fn stage_used<E: DmaEngine>(
        &mut self,
        engine: &E,
        id: u16,
        slots: u16,
        written: u32,
        entry: u16,
    ) {
        let place = self.ring.stage_used(slots);
        let flags = PackedRing::used_flags(place, written > 0);
        let used = PackedDescriptor { address: mark(slots), length: written, id, flags };
        engine.card().put(self.places.used.add(16 * u32::from(place.slot)), used);
        self.staged.push(Staged { slot: place.slot, flags, entry });
    }

    #[inline]
    pub(in crate::mirror) fn publish<E: DmaEngine>(&mut self, engine: &mut E) -> Result<Option<bool>, QueueFault> {
        if self.publishing.is_none() {
            let Some(&first) = self.staged.first() else { return Ok(None) };
            // The first one's mark before all others: see `left_at`.
            let from = self.places.used.add(16 * u32::from(first.slot));
            engine.write(from, self.ring.descriptor_at(first.slot), FLAGS)?;
            self.write_behind_first(engine)?;
            if let Some(recorded) = &mut self.recorded {
                // The flags are queued behind this, so they land behind it.
                recorded.record.link(entries(&self.staged), self.ring.next_used());
            }
            engine.card().put(self.places.first_flags, first.flags);
            let flags_at = Iova(self.ring.descriptor_at(first.slot).0.wrapping_add(u64::from(FLAGS)));
            engine.write_index(self.places.first_flags, flags_at)?;
            std::mem::swap(&mut self.staged, &mut self.published);
            self.staged.clear();
            let slots = self.ring.publish();
            // Our used flags against the driver's event: a full barrier on both sides (virtio 1.3, 2.8.10).
            engine.order();
            let event = self.ring.driver_event_at();
            // Flags before the place they speak of: the driver writes them in the other order.
            engine.read_index(Iova(event.0.wrapping_add(2)), self.places.event.add(2))?;
            if self.event_index {
                engine.read_index(event, self.places.event)?;
            }
            self.publishing = Some((engine.submit(), slots));
        }
        let Some((ticket, slots)) = self.publishing else { return Ok(None) };
        if engine.landed()? < ticket {
            return Ok(None);
        }
        if let Some(recorded) = &mut self.recorded {
            recorded.record.complete(entries(&self.published));
        }
        self.publishing = None;
        // Slots that were staged in the meantime lie behind those published.
        let wanted = match engine.card().get::<u16>(self.places.event.add(2)) {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if self.event_index => {
                let event = engine.card().get::<u16>(self.places.event);
                let staged = self.ring.staged_slots();
                self.ring.passes_event(event, slots + staged) && !(staged > 0 && self.ring.passes_event(event, staged))
            }
            _ => true,
        };
        Ok(Some(wanted))
    }

    /// Writes all staged used descriptors but the first, neighbours in one copy.
    fn write_behind_first<E: DmaEngine>(&mut self, engine: &mut E) -> Result<(), QueueFault> {
        let mut index = 1;
        while index < self.staged.len() {
            let first = self.staged[index].slot;
            let mut count = 1;
            while self.staged.get(index + usize::from(count)).is_some_and(|next| next.slot == first + count) {
                count += 1;
            }
            let from = self.places.used.add(16 * u32::from(first));
            engine.write(from, self.ring.descriptor_at(first), 16 * u32::from(count))?;
            index += usize::from(count);
        }
        Ok(())
    }

    pub(in crate::mirror) const fn is_publishing(&self) -> bool {
        self.ring.staged_slots() > 0 || self.publishing.is_some()
    }

    pub(in crate::mirror) fn arm_doorbell<E: DmaEngine>(&mut self, engine: &mut E) -> Result<Option<bool>, QueueFault> {
        if self.is_fetching() || self.is_resuming() {
            return Ok(Some(false));
        }
        let next = self.ring.next_avail();
        let ticket = match self.arming.take() {
            Some(ticket) => ticket,
            None => {
                self.say(engine, EVENT_ENABLE)?;
                engine.order();
                let flags_at = Iova(self.ring.descriptor_at(next.slot).0.wrapping_add(u64::from(FLAGS)));
                engine.read_index(flags_at, self.places.event)?;
                engine.submit()
            }
        };
        if engine.landed()? < ticket {
            self.arming = Some(ticket);
            return Ok(None);
        }
        let empty = !PackedRing::is_available(engine.card().get(self.places.event), next);
        if empty {
            engine.forgive_empty_poll(2);
        }
        Ok(Some(empty))
    }

    pub(in crate::mirror) fn disarm_doorbell<E: DmaEngine>(&mut self, engine: &mut E) -> Result<(), QueueFault> {
        self.say(engine, EVENT_DISABLE)?;
        engine.submit();
        Ok(())
    }

    fn say<E: DmaEngine>(&self, engine: &mut E, flags: u16) -> Result<(), QueueFault> {
        engine.card().put(self.places.device_event, flags);
        engine.write_index(self.places.device_event, Iova(self.ring.device_event_at().0.wrapping_add(2)))?;
        Ok(())
    }
}

/// What the record calls the chains of these.
#[inline]
pub(super) fn entries(staged: &[Staged]) -> impl Iterator<Item = u16> {
    staged.iter().map(|staged| staged.entry)
}
