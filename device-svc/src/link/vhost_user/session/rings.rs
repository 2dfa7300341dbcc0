//! When a ring runs: what it takes to start, and where it stopped.

use std::sync::Arc;

use vhost::vhost_user::Result;
use vhost::vhost_user::message::VhostUserVirtioFeatures;

use super::super::regions::Regions;
use super::super::resume;
use super::super::ring::Ring;
use super::{GUEST_FAULT, Session};
use crate::link::{FunctionSide, QueuePosition, QueueStart};

impl Session {
    /// Stops a ring if it runs, and remembers where.
    pub(super) fn halt(&mut self, number: u16) {
        self.halt_with(number, |function| function.stop_queue(number));
    }

    /// Stops a ring that the front end stops: it may go on elsewhere. What is in flight is left to the record, where both have agreed on that.
    /// The front end keeps it, and a ring that runs has it.
    pub(super) fn let_go(&mut self, number: u16) {
        if self.hands_over && self.inflight.is_some() {
            self.halt_with(number, |function| function.hand_queue_over(number));
        } else {
            self.halt(number);
        }
    }

    fn halt_with(&mut self, number: u16, stop: impl FnOnce(&dyn FunctionSide) -> Option<QueuePosition>) {
        let ring = &mut self.rings[usize::from(number)];
        if std::mem::take(&mut ring.running)
            && let Some(position) = stop(self.function.as_ref())
        {
            tracing::debug!(function = %self.name, ring = number, ?position, "a ring has stopped");
            let ring = &mut self.rings[usize::from(number)];
            (ring.position, ring.stopped_at) = (Some(position), Some(position));
        }
    }

    /// Runs a ring if it is to run, stops it if not; anew if `changed`.
    pub(super) fn settle(&mut self, number: u16, changed: bool) -> Result<()> {
        let ring = &self.rings[usize::from(number)];
        let (wanted, running) = (ring.is_wanted(), ring.running);
        if running && !wanted {
            self.let_go(number);
        } else if running && changed {
            self.halt(number);
        }
        if wanted && !self.rings[usize::from(number)].running {
            if let Err(why) = self.start(number) {
                if let Some(err) = &self.rings[usize::from(number)].err {
                    err.signal_once();
                }
                return Err(self.refuse_as(GUEST_FAULT, "a ring cannot start", &why));
            }
            let ring = &mut self.rings[usize::from(number)];
            (ring.running, ring.ran) = (true, true);
        }
        Ok(())
    }

    fn start(&self, number: u16) -> std::result::Result<(), String> {
        let accepted = self.accepted & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let record = self.inflight.as_ref().map(|area| area.queue(number, self.packed())).transpose();
        let record = record.map_err(|why| why.to_string())?;
        let mut start = self.rings[usize::from(number)].start(number, &self.regions, accepted, record)?;
        if self.packed() && start.inflight.is_none() {
            let in_order = self.function.network().is_some() && !self.rings[usize::from(number)].ran;
            resume::correct(&mut start, in_order, self.regions.memory());
        }
        let is_fresh = start.position == QueuePosition::fresh(self.packed()) && start.inflight.is_none();
        let goes_on = self.attach_own_record(&mut start, number).map_err(|error| error.to_string())?;
        start.is_resumed = (goes_on || !is_fresh) && !self.rings[usize::from(number)].ran;
        tracing::debug!(function = %self.name, ring = number, ?start.position, start.size, "a ring starts");
        self.function.start_queue(start).map_err(|why| why.to_string())
    }

    /// Has a ring recorded by ourselves, if the front end does not. Returns whether it goes on by what is recorded.
    fn attach_own_record(&self, start: &mut QueueStart, number: u16) -> std::io::Result<bool> {
        let Ring { addresses, position, stopped_at, .. } = &self.rings[usize::from(number)];
        let stopped_here = stopped_at.map(|at| *position == Some(at));
        let file = addresses.and_then(|addresses| self.regions.file_of(addresses.descriptors));
        match (&self.own_record, file) {
            (Some(own), Some(file)) if start.inflight.is_none() => {
                own.attach(start, self.packed(), stopped_here, file, self.regions.memory())
            }
            _ => Ok(false),
        }
    }

    /// Goes over to another table. A ring that it moves or takes away stops first: a front end changes a region by removing it
    /// and adding it again, and the card polls in between. It goes on when its memory is there.
    pub(super) fn use_regions(&mut self, regions: Regions) -> Result<()> {
        for number in 0..self.rings.len() as u16 {
            let ring = &self.rings[usize::from(number)];
            if ring.running && ring.places(&regions) != ring.places(&self.regions) {
                self.halt(number);
            }
        }
        self.regions = regions;
        tracing::debug!(function = %self.name, regions = self.regions.memory().regions().len(), "the memory has changed");
        // Returns when no queue touches what is gone; then the old table's mappings go with its last owner.
        self.function.set_memory(Arc::clone(self.regions.memory()));
        for number in 0..self.rings.len() as u16 {
            let ring = &self.rings[usize::from(number)];
            if !ring.running && ring.places(&self.regions).is_some() {
                self.settle(number, false)?;
            }
        }
        Ok(())
    }
}
