//! Doorbell and interrupt of a ring: the two eventfds that a front end hands over.

use std::os::fd::RawFd;

use crate::link::QueuePort;
use crate::link::event::{Bell, Event};

/// The port of a running ring.
#[derive(Debug)]
pub(super) struct EventPort {
    pub(super) kick: Option<Event>,
    pub(super) call: Option<Bell>,
}

impl QueuePort for EventPort {
    fn doorbell_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(Event::fd)
    }

    fn take_doorbell(&mut self) -> bool {
        self.kick.as_mut().is_some_and(Event::take)
    }

    fn raise_interrupt(&mut self) {
        if let Some(call) = &mut self.call {
            call.signal();
        }
    }
}
