//! What front ends of both links have in common: why they fail, and a queue's doorbell and interrupt.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::vfio_user::{NotifyMessage, NotifyRegister};

/// Why a back end could not be used.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// Nobody serves the socket.
    #[error("{path}: {error}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// The back end refused, or broke the protocol.
    #[error("the back end refused: {0}")]
    Protocol(String),
}

impl From<vhost::Error> for FrontEndError {
    fn from(error: vhost::Error) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl From<vhost::vhost_user::Error> for FrontEndError {
    fn from(error: vhost::vhost_user::Error) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl From<std::io::Error> for FrontEndError {
    fn from(error: std::io::Error) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// How a doorbell is rung.
#[derive(Debug)]
pub(super) enum Doorbell {
    /// By an event (vhost-user).
    Event(EventFd),
    /// By a message to a register (vfio-user).
    Message(NotifyMessage),
    /// By a store to a register's page that is shared (vfio-user).
    Store(NotifyRegister),
}

/// Doorbell and interrupt of a queue that was handed over.
#[derive(Debug)]
pub struct QueueEvents {
    doorbell: Doorbell,
    call: EventFd,
    rings: AtomicU32,
}

impl QueueEvents {
    pub(super) const fn new(doorbell: Doorbell, call: EventFd) -> Self {
        Self { doorbell, call, rings: AtomicU32::new(0) }
    }

    /// Rings the doorbell.
    pub fn ring(&self) {
        self.rings.fetch_add(1, Ordering::Relaxed);
        match &self.doorbell {
            // A full counter is a doorbell that rings already.
            Doorbell::Event(event) => drop(event.write(1)),
            Doorbell::Message(message) => message.send(),
            Doorbell::Store(register) => register.store(),
        }
    }

    /// How often the doorbell was rung.
    #[must_use]
    pub fn rings(&self) -> u32 {
        self.rings.load(Ordering::Relaxed)
    }

    /// Takes the interrupts off; returns whether there were any.
    #[must_use]
    pub fn take_interrupts(&self) -> bool {
        self.call.read().is_ok()
    }

    /// The descriptor that becomes readable with an interrupt.
    #[must_use]
    pub fn interrupt_fd(&self) -> i32 {
        self.call.as_raw_fd()
    }
}
