//! How a lane comes to rest.
//!
//! ```text
//!   stop       what was fetched goes on to its end ─────────────────────────────┐
//!   hand over  what the channel has goes on to its end; the rest stays recorded ├─► still ─► resume, or abandoned
//!   a server that does not answer: waited for within bounds ────────────────────┘
//! ```
//!
//! **What waits.** What storage has been given must not land behind what the ring's next owner writes, and nothing but its answer says
//! that it cannot any more: so both ways of stopping wait for the channel, and that wait is the fence between two owners. Copies between
//! the VM's memory and the card's are waited for too, and what has ended is published: the VM's memory is the next owner's as well.
//!
//! **What does not.** A queue that hands over gives the channel nothing more: not what waits for a limit, for a server that is away or for
//! room, not what was in flight before it started, and not the flush behind a write through a cache. All of it is in the record as in
//! flight, nobody was told that it has ended, and the next owner issues it again in its order. Some of it may be carried out twice that
//! way, none ends twice towards the driver. A request that ended and waits for its place in order is among those.
//!
//! A channel that writes again what its server may have lost has it made durable with the last queue (`BlockChannel::hand_over`).
//!
//! **What remains.** The kernel's requests are waited for as long as they take. The wait for a server has an end, at which its channel is cut
//! off: nothing is sent from then on, and no answer counts. A server that has a request already may carry it out later, whatever the next
//! owner has done by then. A server over NBD cannot be kept from it.

use super::super::row::Stage;
use super::{BlkLane, State};
use crate::backend::{BlockFault, PayloadPlace};
use crate::clock::Moment;
use crate::device::QueueFault;
use crate::dma::DmaEngine;

impl<E: DmaEngine> BlkLane<E> {
    /// A turn of a queue that hands over: what is under way comes to its end, and nothing begins.
    #[cold]
    pub(super) fn hand_on(&mut self, now: Moment, chains_max: u16) -> Result<bool, QueueFault> {
        let mut did = false;
        if self.queue.wants_fetch() {
            // The batch that is on its way is taken into the record, and no further.
            did = self.fetch(now, chains_max)?;
        }
        let landed = self.queue.mirror.engine().landed()?;
        while let Some(number) = self.landing.front() {
            if self.rows[number].ticket > landed {
                break;
            }
            self.landing.pop_front();
            did = true;
        }
        Ok(did)
    }

    /// Whether a lane that is to stop has nothing under way any more.
    pub(super) fn has_come_to_rest(&mut self, now: Moment) -> bool {
        // What is still to be issued again goes on as far as there is room.
        let goes_on = matches!(self.queue.state, State::Stopping(_))
            && self.queue.mirror.is_resuming()
            && self.rows.free_count() > 0
            && !self.queue.ring_gone;
        let gives_up =
            self.payload == PayloadPlace::Card && self.queue.stopping_until().is_some_and(|until| until <= now);
        // What an engine has failed to copy never lands.
        let has_landed = self.landing.is_empty() || self.queue.mirror.engine().landed().is_err();
        has_landed && !goes_on && (gives_up || !self.in_channel())
    }

    /// The channel has ended a request of a lane that is still, or was abandoned. It stays in the channel as far as a lane knows that may
    /// go on.
    #[cold]
    pub(super) fn ended_late(&mut self, number: u16, result: Result<(), BlockFault>) {
        if self.queue.state == State::Stopped {
            self.late.push((number, result));
            return;
        }
        let row = &mut self.rows[number];
        row.outstanding -= 1;
        if row.outstanding == 0 {
            self.drop_row(number);
        }
    }

    /// A lane that was still goes on: what the channel has ended in the meantime ends now. No time has passed for the VM, so each request
    /// has the volume's time limit once more.
    #[cold]
    pub(super) fn go_on(&mut self, now: Moment) -> Result<(), QueueFault> {
        for number in 0..self.rows.in_use() + self.rows.free_count() {
            self.rows[number].popped_at = now;
        }
        while let Some((number, result)) = self.late.pop() {
            self.completed(now, number, result)?;
        }
        self.goes_on = false;
        Ok(())
    }

    /// Drops every row but those in the channel, which go when it has ended them.
    pub(super) fn drop_rows(&mut self) {
        for (number, _) in std::mem::take(&mut self.late) {
            self.rows[number].outstanding -= 1;
        }
        let idle: Vec<u16> = (0..self.rows.in_use() + self.rows.free_count())
            .filter(|row| self.rows[*row].stage != Stage::Free && self.rows[*row].outstanding == 0)
            .collect();
        for number in idle {
            self.drop_row(number);
        }
    }
}
