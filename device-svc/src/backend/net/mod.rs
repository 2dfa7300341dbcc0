//! Networks, behind one seam of two halves, as storage is.
//!
//! [`NetBackend`] is the control half: one for each uplink, shared, may block. It hands out [`NetChannel`]s, the hot half: one for
//! each queue pair of a function, one owner, never blocks, never allocates for a frame.
//!
//! Every network here copies a frame when it takes it (the kernel does, or we into a ring), so a frame that was taken is done with
//! when the call returns: nothing of a VM's memory is ever lent for longer than that, and a map can go at any time.
//!
//! Who checks what: the device has parsed a VM's header ([`NetHeader`]) before its frame reaches a channel. A frame that a channel
//! hands over comes from the network and is untrusted: only its length and its header have been checked.

pub mod af_packet;
#[cfg(test)]
mod bed;
pub mod af_xdp;
mod carrier;
pub mod flow;
mod frame_ring;
pub mod header;
pub(crate) mod inbox;
mod incoming;
mod kernel_queue;
pub mod loopback;
mod missed;
mod namespace;
pub mod null;
pub mod offload;
mod polled_ring;
mod slab;
pub mod stations;
mod packet_socket;
pub mod switch;
pub mod tap;
pub mod tunnel;
mod watch;

use std::os::fd::RawFd;
use std::sync::Arc;

pub use carrier::{Carrier, CarrierWatcher};
pub use header::{BadHeader, Checksum, NetHeader, RawNetHeader, Segmentation, SegmentationKind};
pub use incoming::Incoming;
pub use missed::Missed;

use super::{BackendError, Segments};

/// An Ethernet address, in the order in which it is sent.
pub type Octets = [u8; 6];

/// Bytes of an Ethernet header, without a VLAN tag.
pub const ETHERNET_BYTES: u32 = 14;
/// Bytes of a VLAN tag.
pub const VLAN_TAG_BYTES: u32 = 4;
/// The longest frame: 64 KiB of IP, which segmentation makes shorter, with its Ethernet header and a VLAN tag.
pub const FRAME_BYTES_MAX: u32 = 65535 + ETHERNET_BYTES + VLAN_TAG_BYTES;
/// Frames in one call of a channel at most.
pub const BURST: usize = 32;

/// Work on frames that one side leaves to the other.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Offloads {
    /// A checksum that is still to be computed.
    pub checksum: bool,
    /// TCP over IPv4 that is still to be cut.
    pub tso4: bool,
    /// TCP over IPv6 that is still to be cut.
    pub tso6: bool,
    /// TCP with explicit congestion notification that is still to be cut.
    pub ecn: bool,
    /// UDP datagrams that are still to be cut (`UDP_L4`).
    pub uso: bool,
}

impl Offloads {
    /// None at all.
    pub const NONE: Self = Self { checksum: false, tso4: false, tso6: false, ecn: false, uso: false };
    /// All of them.
    pub const ALL: Self = Self { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };

    /// What both sides do.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            checksum: self.checksum && other.checksum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
            uso: self.uso && other.uso,
        }
    }

    /// Whether a frame with this header can be handed to somebody who does this much.
    #[inline]
    #[must_use]
    pub const fn cover(self, header: &NetHeader) -> bool {
        let checksum = self.checksum || !matches!(header.checksum, Checksum::Needed { .. });
        checksum
            && match header.segmentation {
                None => true,
                Some(Segmentation { kind, ecn, .. }) => {
                    (self.ecn || !ecn)
                        && match kind {
                            SegmentationKind::Tcp4 => self.tso4,
                            SegmentationKind::Tcp6 => self.tso6,
                            SegmentationKind::Udp => self.uso,
                        }
                }
            }
    }
}

/// What a network can do: fixed while a channel is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetInfo {
    /// The largest IP packet that it carries, bytes: 68 to 65535.
    pub mtu_max: u16,
    /// What its channels do with frames that they are given.
    pub transmit: Offloads,
    /// What its channels can leave undone of frames that they hand over.
    pub receive: Offloads,
    /// At most this many channels, one for each queue pair of a function.
    pub channels_max: u16,
    /// At most this many functions.
    pub functions_max: usize,
}

/// A function's port.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PortSettings {
    /// The VLAN of an access port, 1 to 4094; `None`: a trunk.
    pub vlan: Option<u16>,
}

/// A frame on its way to the network.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    /// What is still to be done to it.
    pub header: NetHeader,
    /// Its bytes, from the Ethernet header on.
    pub segments: Segments,
    /// How many.
    pub bytes: u32,
}

/// The control half of a network.
pub trait NetBackend: Send + Sync {
    /// What it can do.
    fn info(&self) -> NetInfo;

    /// Whether it is there, and who wants to know when that changes.
    fn carrier(&self) -> &Arc<Carrier>;

    /// This network as one more function sees it, where each has a port of its own, for as long as the port or a channel of it is kept.
    /// `None`: all see the same.
    ///
    /// # Errors
    /// When there is no port left.
    fn port(&self, _settings: PortSettings) -> Result<Option<Arc<dyn NetBackend>>, BackendError> {
        Ok(None)
    }

    /// Whether each function has a port of its own.
    fn has_ports(&self) -> bool {
        false
    }

    /// Opens one more channel, for one queue pair. It carries frames once it is enabled.
    ///
    /// # Errors
    /// When the network refuses, or is not there.
    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError>;

    /// Opens a channel that several reactors use, one at a time.
    ///
    /// # Errors
    /// As above.
    fn open_shared_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        self.open_channel()
    }
}

/// The hot half: frames out, frames in, all on one reactor.
pub trait NetChannel: Send {
    /// Whether frames shall come and go. A channel that is not enabled takes what it is given and drops it, and hands over nothing;
    /// the network stops to send it anything.
    fn enable(&mut self, enabled: bool);

    /// From now on frames are handed over with no more left undone than this.
    fn leave_undone(&mut self, offloads: Offloads);

    /// Sends frames in the order given, at most [`BURST`]. Returns how many it took, and with how many of those the network could
    /// do nothing: those are lost. What it did not take may be given again when its descriptor is readable.
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent;

    /// Frames that have come, at most `most`, oldest first. They are handed over again until [`release`](Self::release) says that
    /// they are done with, and stay where they are until then.
    fn receive(&mut self, most: usize) -> &[Incoming];

    /// The first `count` of what `receive` handed over last are done with.
    fn release(&mut self, count: usize);

    /// Carries on what this channel carries for others, whatever its own function does: called once in each turn. Returns whether there
    /// was anything.
    fn carry(&mut self) -> bool {
        false
    }

    /// Frames for this channel that were lost before they could be handed over, since this was last asked.
    fn missed(&mut self) -> Missed {
        Missed::NONE
    }

    /// Frames that [`transmit`](Self::transmit) took and did not name as lost, and that were lost later, since this was last asked. Of
    /// a frame that goes to several, each copy that is lost counts here while another goes.
    fn lost_later(&mut self) -> u64 {
        0
    }

    /// A descriptor for a reactor that sleeps, waited on by its edges: it becomes readable when there are frames again, or room for
    /// frames that were not taken. `None` for a channel where nothing comes of its own accord. It stays the same for the channel's
    /// life.
    fn wake_fd(&self) -> Option<RawFd>;

    /// `wake_fd` has become readable.
    fn woken(&mut self) {}

    /// Whether the reactor may sleep, as far as what comes in is concerned: there is no frame, and the descriptor will tell of the
    /// next.
    fn arm(&mut self) -> bool;

    /// Whether the reactor may sleep, as far as what it [carries](Self::carry) for others is concerned.
    fn arm_carrying(&mut self) -> bool {
        true
    }
}

/// What became of frames.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sent {
    /// The first so many were taken.
    pub taken: usize,
    /// Of those, so many were lost.
    pub lost: usize,
}
