//! A running queue's doorbell and interrupt.
//!
//! A doorbell arrives as a message, on the session's thread, which passes it on by an event of our own. Where the VMM has mapped
//! the notify registers a doorbell is a store that nobody hears; such a function is served by reactors that never sleep.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::interrupts::{Interrupts, Raiser};
use crate::link::QueuePort;
use crate::link::event::Event;

#[derive(Debug)]
pub(super) struct FunctionPort {
    doorbell: Event,
    raiser: Raiser,
    interrupts: Arc<Interrupts>,
}

impl FunctionPort {
    pub(super) fn new(queue: u16, doorbell: Event, interrupts: Arc<Interrupts>) -> Self {
        Self { doorbell, raiser: Raiser::new(queue), interrupts }
    }
}

impl QueuePort for FunctionPort {
    fn doorbell_fd(&self) -> Option<RawFd> {
        Some(self.doorbell.fd())
    }

    fn take_doorbell(&mut self) -> bool {
        self.doorbell.take()
    }

    fn raise_interrupt(&mut self) {
        self.raiser.raise(&self.interrupts);
    }
}
