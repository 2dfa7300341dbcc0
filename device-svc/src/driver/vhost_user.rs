//! A vhost-user front end: hands a guest's memory and queues to whoever serves a socket.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::front_end::{Doorbell, FrontEndError, QueueEvents};
use super::{DriverQueue, GuestMemory};
use crate::virtqueue::features;

/// A back end's record of requests in flight, which the front end keeps for it and hands back when it has come again.
pub struct InflightRecord {
    what: VhostUserInflight,
    file: File,
}

impl InflightRecord {
    /// The memory file that it is in.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

/// A connection to a back end.
pub struct FrontEnd {
    frontend: Frontend,
    memory: Arc<GuestMemory>,
    offered: u64,
    accepted: u64,
}

impl FrontEnd {
    /// Connects, negotiates those of `wanted` that are offered (VERSION_1 in any case) and hands over `memory`.
    ///
    /// # Errors
    /// When nobody listens, or the back end refuses.
    pub fn connect(path: &Path, wanted: u64, memory: Arc<GuestMemory>) -> Result<Self, FrontEndError> {
        Self::negotiate(path, wanted, memory, VhostUserProtocolFeatures::empty())
    }

    /// Connects to a back end whose queues hand over when they stop: what has not begun stays in the record for whoever starts them next
    /// (`VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT`).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and when the back end does not offer that.
    pub fn connect_to_hand_over(path: &Path, wanted: u64, memory: Arc<GuestMemory>) -> Result<Self, FrontEndError> {
        Self::negotiate(path, wanted, memory, VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT)
    }

    fn negotiate(
        path: &Path,
        wanted: u64,
        memory: Arc<GuestMemory>,
        needed: VhostUserProtocolFeatures,
    ) -> Result<Self, FrontEndError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| FrontEndError::Connect { path: path.display().to_string(), error })?;
        let mut frontend = Frontend::from_stream(stream, 256);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let accepted = offered & (wanted | features::VERSION_1 | protocol_bit);
        if accepted & protocol_bit != 0 {
            let known = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::RESET_DEVICE
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            let protocol = frontend.get_protocol_features()? & (known | needed);
            if !protocol.contains(needed) {
                return Err(FrontEndError::Protocol(format!("the back end does not offer {needed:?}")));
            }
            frontend.set_protocol_features(protocol)?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        frontend.set_features(accepted)?;
        frontend.set_mem_table(&[region(&memory)])?;
        Ok(Self { frontend, memory, offered, accepted: accepted & !protocol_bit })
    }

    /// The feature bits that the back end offered.
    #[must_use]
    pub const fn offered(&self) -> u64 {
        self.offered
    }

    /// The feature bits that both accepted.
    #[must_use]
    pub const fn accepted(&self) -> u64 {
        self.accepted
    }

    /// How many queues the back end has.
    ///
    /// # Errors
    /// When it does not say.
    pub fn queue_count(&mut self) -> Result<u64, FrontEndError> {
        Ok(self.frontend.get_queue_num()?)
    }

    /// Reads the device's configuration space.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn read_config(&mut self, offset: u32, bytes: u32) -> Result<Vec<u8>, FrontEndError> {
        let place = vec![0; bytes as usize];
        let (_, data) = self.frontend.get_config(offset, bytes, VhostUserConfigFlags::empty(), &place)?;
        Ok(data)
    }

    /// The disk's size, bytes (virtio 1.3, 5.2.4).
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn capacity_bytes(&mut self) -> Result<u64, FrontEndError> {
        let bytes = self.read_config(0, 8)?;
        let bytes: [u8; 8] =
            bytes.try_into().map_err(|_| FrontEndError::Protocol("a configuration space of odd size".to_owned()))?;
        Ok(u64::from_le_bytes(bytes) * 512)
    }

    /// Writes the device's configuration space.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), FrontEndError> {
        Ok(self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, data)?)
    }

    /// Asks the back end for a record of what will be in flight in `queues` queues of `size` entries.
    ///
    /// # Errors
    /// When the back end keeps none, or none for so many.
    pub fn make_record(&mut self, queues: u16, size: u16) -> Result<InflightRecord, FrontEndError> {
        let (what, file) = self.frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size))?;
        Ok(InflightRecord { what, file })
    }

    /// Hands a record to the back end, before a queue is started.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn hand_over_record(&mut self, record: &InflightRecord) -> Result<(), FrontEndError> {
        Ok(self.frontend.set_inflight_fd(&record.what, record.file.as_raw_fd())?)
    }

    /// Hands over a queue and starts it.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn start_queue(&mut self, index: usize, size: u16, queue: &DriverQueue) -> Result<QueueEvents, FrontEndError> {
        let at = queue.addresses();
        let user = |iova: crate::address::Iova| iova.0 - self.memory.base().0 + self.memory.user_address();
        let places = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: user(at.descriptors),
            used_ring_addr: user(at.device),
            avail_ring_addr: user(at.driver),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, size)?;
        // A packed ring starts on its first lap, which a 16-bit base cannot say; it is the back end's default.
        if self.accepted & features::RING_PACKED == 0 {
            self.frontend.set_vring_base(index, 0)?;
        }
        self.frontend.set_vring_addr(index, &places)?;
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        self.frontend.set_vring_call(index, &call)?;
        self.frontend.set_vring_kick(index, &kick)?;
        self.frontend.set_vring_enable(index, true)?;
        Ok(QueueEvents::new(Doorbell::Event(kick), call))
    }

    /// Stops a queue; returns its base.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn stop_queue(&mut self, index: usize) -> Result<u32, FrontEndError> {
        Ok(self.frontend.get_vring_base(index)?)
    }

    /// The messages themselves, for what a test wants to say otherwise.
    pub const fn messages(&mut self) -> &mut Frontend {
        &mut self.frontend
    }
}

/// The whole of a guest's memory as one region.
#[must_use]
pub fn region(memory: &GuestMemory) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: memory.base().0,
        memory_size: memory.len(),
        userspace_addr: memory.user_address(),
        mmap_offset: 0,
        mmap_handle: memory.fd(),
    }
}
