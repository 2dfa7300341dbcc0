//! What the driver of a split ring is told: used elements, when it wants an interrupt for them, and whether we want its doorbell.

use super::record::heads_used;
use super::{Publishing, SplitMirror};
use crate::dma::DmaEngine;
use crate::mirror::QueueFault;
use crate::virtqueue::UsedElement;
use crate::virtqueue::split::{NO_INTERRUPT, NO_NOTIFY, Run, passes_event};

impl SplitMirror {
    #[inline]
    pub(in crate::mirror) fn stage_used<E: DmaEngine>(&mut self, engine: &E, id: u16, written: u32) {
        let slot = self.ring.stage_used();
        engine
            .card()
            .put(self.places.used.add(8 * u32::from(slot)), UsedElement { id: u32::from(id), length: written });
    }

    #[inline]
    pub(in crate::mirror) fn publish<E: DmaEngine>(&mut self, engine: &mut E) -> Result<Option<bool>, QueueFault> {
        if self.publishing == Publishing::Idle {
            if self.ring.staged() == 0 {
                return Ok(None);
            }
            for Run { slot, count } in self.ring.staged_runs() {
                if count > 0 {
                    let from = self.places.used.add(8 * u32::from(slot));
                    engine.write(from, self.ring.used_element_at(slot), 8 * u32::from(count))?;
                }
            }
            if let Some(recorded) = &mut self.recorded {
                // The index is queued behind this, so it lands behind it.
                recorded.record.link(heads_used(engine.card(), self.places.used, self.ring.staged_runs()));
            }
            let (old, new) = self.ring.publish();
            engine.card().put(self.places.used_index, new);
            engine.write_index(self.places.used_index, self.ring.used_index_at())?;
            // The driver stores its event and then looks at our index; we store our index and then look at its event. One
            // of the two sees the other's store only with a full barrier on both sides (virtio 1.3, 2.7.10).
            engine.order();
            let event = if self.event_index { self.ring.used_event_at() } else { self.ring.avail_flags_at() };
            engine.read_index(event, self.places.driver_event)?;
            self.publishing = Publishing::Waiting { ticket: engine.submit(), old, new };
        }
        let Publishing::Waiting { ticket, old, new } = self.publishing else { return Ok(None) };
        if engine.landed()? < ticket {
            return Ok(None);
        }
        if let Some(recorded) = &mut self.recorded {
            let batch = heads_used(engine.card(), self.places.used, self.ring.used_runs(old, new));
            recorded.record.complete(batch, new);
        }
        self.publishing = Publishing::Idle;
        let event = engine.card().get::<u16>(self.places.driver_event);
        Ok(Some(if self.event_index { passes_event(event, old, new) } else { event & NO_INTERRUPT == 0 }))
    }

    pub(in crate::mirror) const fn is_publishing(&self) -> bool {
        self.ring.staged() > 0 || matches!(self.publishing, Publishing::Waiting { .. })
    }

    pub(in crate::mirror) fn arm_doorbell<E: DmaEngine>(&mut self, engine: &mut E) -> Result<Option<bool>, QueueFault> {
        if self.is_fetching() || self.used_unknown || self.is_resuming() {
            return Ok(Some(false));
        }
        let ticket = match self.arming.take() {
            Some(ticket) => ticket,
            None => {
                if self.event_index {
                    engine.card().put(self.places.device_event, self.ring.next_avail());
                    engine.write_index(self.places.device_event, self.ring.avail_event_at())?;
                } else {
                    engine.card().put(self.places.device_event, 0u16);
                    engine.write_index(self.places.device_event, self.ring.used_flags_at())?;
                }
                // The mirror image of the race in `publish`: our wish for a doorbell against the driver's index.
                engine.order();
                engine.read_index(self.ring.avail_index_at(), self.places.avail_index)?;
                engine.submit()
            }
        };
        if engine.landed()? < ticket {
            self.arming = Some(ticket);
            return Ok(None);
        }
        let waiting = self.ring.see_avail(engine.card().get(self.places.avail_index))?;
        if waiting == 0 {
            engine.forgive_empty_poll(2);
        }
        Ok(Some(waiting == 0))
    }

    pub(in crate::mirror) fn disarm_doorbell<E: DmaEngine>(&mut self, engine: &mut E) -> Result<(), QueueFault> {
        // With the event index an event that lies behind is no wish; without it a flag says so.
        if !self.event_index {
            engine.card().put(self.places.device_event, NO_NOTIFY);
            engine.write_index(self.places.device_event, self.ring.used_flags_at())?;
            engine.submit();
        }
        Ok(())
    }
}
