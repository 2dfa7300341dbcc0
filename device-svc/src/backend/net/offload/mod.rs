//! What a network leaves undone, done by the card: checksums are computed and packets cut before its channel gets them, and before
//! the VM does.
//!
//! [`SoftwareOffload`] stands around a network, and offers everything both ways. What the network does itself goes through untouched;
//! so does, the other way, what the VM does itself.

pub mod checksum;
mod receive;
pub mod segment;
mod transmit;

use std::os::fd::RawFd;
use std::sync::Arc;

use super::{Carrier, Incoming, Missed, NetBackend, NetChannel, NetInfo, Offloads, Outgoing, PortSettings, Sent};
use crate::backend::BackendError;

pub use segment::{CannotCut, Cut};

/// A network around which the card does in software what the network does not.
pub struct SoftwareOffload {
    inner: Arc<dyn NetBackend>,
}

impl SoftwareOffload {
    /// Stands around `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn NetBackend>) -> Self {
        Self { inner }
    }
}

impl NetBackend for SoftwareOffload {
    fn info(&self) -> NetInfo {
        NetInfo { transmit: Offloads::ALL, receive: Offloads::ALL, ..self.inner.info() }
    }

    fn carrier(&self) -> &Arc<Carrier> {
        self.inner.carrier()
    }

    fn port(&self, settings: PortSettings) -> Result<Option<Arc<dyn NetBackend>>, BackendError> {
        let port = self.inner.port(settings)?;
        Ok(port.map(|inner| Arc::new(Self { inner }) as Arc<dyn NetBackend>))
    }

    fn has_ports(&self) -> bool {
        self.inner.has_ports()
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(SoftwareOffloadChannel::new(self.inner.open_channel()?, self.inner.info())))
    }

    fn open_shared_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(SoftwareOffloadChannel::new(self.inner.open_shared_channel()?, self.inner.info())))
    }
}

/// A channel around which the card does what the channel does not.
pub struct SoftwareOffloadChannel {
    inner: Box<dyn NetChannel>,
    /// What the inner one does of what it is given, and can leave undone.
    info: NetInfo,
    outbound: transmit::Outbound,
    inbound: receive::Inbound,
}

impl SoftwareOffloadChannel {
    /// Stands around `inner`, a channel of a network that can do what `info` says.
    #[must_use]
    pub fn new(inner: Box<dyn NetChannel>, info: NetInfo) -> Self {
        Self { inner, info, outbound: transmit::Outbound::new(info.mtu_max), inbound: receive::Inbound::new() }
    }
}

impl NetChannel for SoftwareOffloadChannel {
    fn enable(&mut self, enabled: bool) {
        if !enabled {
            self.outbound.clear();
            self.inbound.clear();
        }
        self.inner.enable(enabled);
    }

    fn leave_undone(&mut self, offloads: Offloads) {
        self.inbound.leave_undone(offloads);
        self.inner.leave_undone(offloads.and(self.info.receive));
    }

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        let covered = self.info.transmit;
        if !self.outbound.has_rest() && frames.iter().all(|frame| covered.cover(&frame.header)) {
            return self.inner.transmit(frames);
        }
        self.outbound.transmit(self.inner.as_mut(), covered, frames)
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        self.outbound.go_on(self.inner.as_mut());
        self.inbound.receive(self.inner.as_mut(), most)
    }

    #[inline]
    fn release(&mut self, count: usize) {
        self.inbound.release(self.inner.as_mut(), count);
        // Where what is sent comes back, there is room now.
        self.outbound.go_on(self.inner.as_mut());
    }

    #[inline]
    fn carry(&mut self) -> bool {
        self.inner.carry()
    }

    #[inline]
    fn missed(&mut self) -> Missed {
        self.inner.missed()
    }

    #[inline]
    fn lost_later(&mut self) -> u64 {
        self.outbound.lost_later() + self.inner.lost_later()
    }

    fn arm_carrying(&mut self) -> bool {
        self.inner.arm_carrying()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        self.inner.wake_fd()
    }

    fn woken(&mut self) {
        self.inner.woken();
        self.outbound.go_on(self.inner.as_mut());
    }

    fn arm(&mut self) -> bool {
        self.outbound.go_on(self.inner.as_mut());
        self.inbound.is_empty() && self.inner.arm()
    }
}

#[cfg(test)]
mod tests;
