//! A network that sends every frame back to whoever sent it: for measurement, and to see that a queue pair works at all.
//!
//! Sender and receiver change places in the frame, or the VM would not take it. What it left undone stays undone, so nothing is offered
//! to be left: a VM that sends what it does not take would lose it.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::frame_ring::FrameRing;
use super::{Carrier, Incoming, NetBackend, NetChannel, NetInfo, Offloads, Outgoing, Sent};
use crate::backend::BackendError;

/// Frames that wait at most: two of the largest bursts of a driver.
const FRAMES: usize = 512;
/// Bytes of them.
const FRAMES_BYTES: u32 = 512 << 10;

/// The control half.
#[derive(Debug)]
pub struct LoopbackBackend {
    carrier: Arc<Carrier>,
}

impl LoopbackBackend {
    /// A loop.
    #[must_use]
    pub fn new() -> Self {
        Self { carrier: Arc::new(Carrier::new(true)) }
    }
}

impl Default for LoopbackBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl NetBackend for LoopbackBackend {
    fn info(&self) -> NetInfo {
        NetInfo {
            mtu_max: u16::MAX,
            transmit: Offloads::NONE,
            receive: Offloads::NONE,
            channels_max: u16::MAX,
            functions_max: usize::MAX,
        }
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        let frames = FrameRing::new(FRAMES, FRAMES_BYTES)
            .map_err(|error| BackendError::Unavailable(format!("no memory for frames: {error}")))?;
        Ok(Box::new(LoopbackChannel { enabled: false, frames }))
    }
}

struct LoopbackChannel {
    enabled: bool,
    frames: FrameRing,
}

impl NetChannel for LoopbackChannel {
    fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        if !enabled {
            self.frames.clear();
        }
    }

    fn leave_undone(&mut self, _offloads: Offloads) {}

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        if !self.enabled {
            return Sent { taken: frames.len(), lost: frames.len() };
        }
        for (taken, frame) in frames.iter().enumerate() {
            let Some(copy) = self.frames.push(frame) else { return Sent { taken, lost: 0 } };
            if let [destination, source, ..] = copy.as_chunks_mut::<6>().0 {
                std::mem::swap(destination, source);
            }
        }
        Sent { taken: frames.len(), lost: 0 }
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        self.frames.frames(most)
    }

    #[inline]
    fn release(&mut self, count: usize) {
        self.frames.release(count);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn arm(&mut self) -> bool {
        self.frames.is_empty()
    }
}
