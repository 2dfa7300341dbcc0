//! A network that takes every frame and brings none: the ceiling of the transmitting path.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::{Carrier, Incoming, NetBackend, NetChannel, NetInfo, Offloads, Outgoing, Sent};
use crate::backend::BackendError;

/// The control half.
#[derive(Debug)]
pub struct NullNet {
    carrier: Arc<Carrier>,
}

impl NullNet {
    /// A network where nobody is.
    #[must_use]
    pub fn new() -> Self {
        Self { carrier: Arc::new(Carrier::new(true)) }
    }
}

impl Default for NullNet {
    fn default() -> Self {
        Self::new()
    }
}

impl NetBackend for NullNet {
    fn info(&self) -> NetInfo {
        NetInfo {
            mtu_max: u16::MAX,
            // What is never looked at may be left as undone as one likes.
            transmit: Offloads::ALL,
            receive: Offloads::ALL,
            channels_max: u16::MAX,
            functions_max: usize::MAX,
        }
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(NullChannel))
    }
}

struct NullChannel;

impl NetChannel for NullChannel {
    fn enable(&mut self, _enabled: bool) {}

    fn leave_undone(&mut self, _offloads: Offloads) {}

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        Sent { taken: frames.len(), lost: 0 }
    }

    #[inline]
    fn receive(&mut self, _most: usize) -> &[Incoming] {
        &[]
    }

    fn release(&mut self, _count: usize) {}

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn arm(&mut self) -> bool {
        true
    }
}
