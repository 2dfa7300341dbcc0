//! A VMM's end of vfio-user: finds virtio's structures in a function's registers and drives them as a guest would.
//!
//! A thread reads what the card sends: replies go to whoever waits for one, and what the card asks of the guest's memory is done
//! there. So memory can be shared by descriptor, where the card never asks, or not at all, where it asks for every byte.
#![expect(unsafe_code, reason = "lends a descriptor whose owner has no safe way to do so")]

mod conversation;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, IntoBytes};

use super::front_end::{Doorbell, FrontEndError, QueueEvents};
use super::{DriverQueue, GuestMemory};
use crate::address::Iova;
use crate::dma::Mapping;
use crate::link::vfio_user::message::{DmaMap, DmaUnmap, IrqSet, RegionAccess, RegionInfo, command};
use crate::virtqueue::features;
use conversation::Conversation;
pub use conversation::NotifyMessage;

pub(super) const REGION_BAR: u32 = 0;
pub(super) const REGION_CONFIG: u32 = 7;
pub(super) const IRQ_MSIX: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
pub(super) const IRQ_EVENTS: u32 = 1 << 2 | 1 << 5;
pub(super) const MAP_READ_WRITE: u32 = 3;
/// Of a region: parts of it can be mapped, and capabilities say which.
const REGION_MMAP: u32 = 1 << 2;

/// Fields of the common configuration (virtio 1.3, 4.1.4.3).
pub(super) mod common {
    pub(in crate::driver) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(in crate::driver) const DEVICE_FEATURE: u64 = 4;
    pub(in crate::driver) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(in crate::driver) const DRIVER_FEATURE: u64 = 12;
    pub(in crate::driver) const STATUS: u64 = 0x14;
    pub(in crate::driver) const QUEUE_SELECT: u64 = 0x16;
    pub(in crate::driver) const QUEUE_SIZE: u64 = 0x18;
    pub(in crate::driver) const QUEUE_VECTOR: u64 = 0x1a;
    pub(in crate::driver) const QUEUE_ENABLE: u64 = 0x1c;
    pub(in crate::driver) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(in crate::driver) const QUEUE_DRIVER: u64 = 0x28;
    pub(in crate::driver) const QUEUE_DEVICE: u64 = 0x30;
    pub(in crate::driver) const QUEUE_RESET: u64 = 0x3a;
}

/// How the card reaches the guest's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// It is given a descriptor, once.
    Whole,
    /// It is given a descriptor for each page, as behind a guest's IOMMU.
    Pages,
    /// It is given none: it asks for every byte by a message.
    Messages,
    /// It does not, until somebody maps it.
    Nothing,
}

/// Where virtio's structures are in the BAR.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Places {
    pub(super) common: u64,
    pub(super) notify: u64,
    pub(super) notify_bytes: u64,
    pub(super) own: u64,
}

impl Places {
    /// Walks the capabilities (virtio 1.3, 4.1.4) in the first 256 bytes of a configuration space; `None` if it is not virtio's.
    pub(super) fn find(space: &[u8]) -> Option<Self> {
        const VENDOR_SPECIFIC: u8 = 9;
        if space.len() < 256 || space[..2] != 0x1af4_u16.to_le_bytes() {
            return None;
        }
        let mut places = Self::default();
        let word = |at: usize| space.get(at..at + 4).and_then(|bytes| u32::read_from_bytes(bytes).ok()).unwrap_or(0);
        let mut at = usize::from(space[0x34]);
        // Capabilities are 4 bytes or more apart; a list that is longer is a ring.
        for _ in 0..64 {
            if !(0x40..0xf0).contains(&at) {
                break;
            }
            if space[at] == VENDOR_SPECIFIC {
                let offset = word(at + 8).into();
                match space[at + 3] {
                    1 => places.common = offset,
                    2 => (places.notify, places.notify_bytes) = (offset, word(at + 16).into()),
                    4 => places.own = offset,
                    _ => {}
                }
            }
            at = space[at + 1].into();
        }
        Some(places)
    }
}

/// A queue's notify register in a page that is shared with the card.
#[derive(Debug)]
pub struct NotifyRegister {
    pages: Arc<Mapping>,
    offset: usize,
    queue: u16,
}

impl NotifyRegister {
    pub(super) fn store(&self) {
        super::memory::store_register(&self.pages, self.offset, self.queue);
    }
}

/// A function, attached.
pub struct VfioUserDevice {
    conversation: Conversation,
    memory: Arc<GuestMemory>,
    places: Places,
    /// The notify registers, if they can be mapped.
    pages: Option<Arc<Mapping>>,
    offered: u64,
    accepted: u64,
}

impl VfioUserDevice {
    /// Connects, negotiates those of `wanted` that are offered (what a modern driver needs in any case) and shares `memory`.
    ///
    /// # Errors
    /// When nobody listens, the function refuses, or it is no virtio function.
    pub fn connect(
        path: &Path,
        wanted: u64,
        memory: Arc<GuestMemory>,
        sharing: Sharing,
    ) -> Result<Self, FrontEndError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| FrontEndError::Connect { path: path.display().to_string(), error })?;
        let conversation = Conversation::begin(stream, Arc::clone(&memory))?;
        let places = Places::default();
        let mut device = Self { conversation, memory, places, pages: None, offered: 0, accepted: 0 };
        device.find_structures()?;
        device.find_pages()?;
        device.set_bus_master(true)?;
        device.share(sharing)?;
        let always = features::VERSION_1 | features::ACCESS_PLATFORM | features::ORDER_PLATFORM;
        device.negotiate(wanted | always)?;
        Ok(device)
    }

    fn find_structures(&mut self) -> Result<(), FrontEndError> {
        let space = self.read(REGION_CONFIG, 0, 256)?;
        let not = || FrontEndError::Protocol("the function is not a virtio function".to_owned());
        self.places = Places::find(&space).ok_or_else(not)?;
        Ok(())
    }

    /// Maps the notify registers, if the function lets us.
    fn find_pages(&mut self) -> Result<(), FrontEndError> {
        let ask = RegionInfo { argsz: 256, index: REGION_BAR, ..RegionInfo::default() };
        let mut answer = self.conversation.ask(command::DEVICE_GET_REGION_INFO, &[ask.as_bytes()], &[])?;
        let info = answer.front::<RegionInfo>()?;
        if info.flags & REGION_MMAP != 0
            && let Some(fd) = answer.fds.pop()
        {
            let bytes = info.size - self.places.notify;
            let pages = Mapping::new(&fd, info.offset + self.places.notify, bytes);
            self.pages = Some(Arc::new(pages.map_err(|error| FrontEndError::Protocol(error.to_string()))?));
        }
        Ok(())
    }

    fn share(&mut self, sharing: Sharing) -> Result<(), FrontEndError> {
        let (base, bytes) = (self.memory.base(), self.memory.len());
        match sharing {
            Sharing::Whole => self.map(base, bytes, 0, true),
            Sharing::Messages => self.map(base, bytes, 0, false),
            Sharing::Nothing => Ok(()),
            Sharing::Pages => {
                for at in (0..bytes).step_by(4096) {
                    self.map(Iova(base.0 + at), 4096, at, true)?;
                }
                Ok(())
            }
        }
    }

    /// Maps `length` bytes of the memory file from `offset` at `start`; without a descriptor, the card has to ask for them.
    ///
    /// # Errors
    /// When the function refuses.
    pub fn map(&mut self, start: Iova, length: u64, offset: u64, by_descriptor: bool) -> Result<(), FrontEndError> {
        let argsz = size_of::<DmaMap>() as u32;
        let map = DmaMap { argsz, flags: MAP_READ_WRITE, offset, address: start.0, size: length };
        let memory = Arc::clone(&self.memory);
        let fds = [memory.file().as_fd()];
        let fds = if by_descriptor { &fds[..] } else { &[] };
        self.conversation.ask(command::DMA_MAP, &[map.as_bytes()], fds).map(drop)
    }

    /// Lets the function reach memory, or not (PCI 3.0, 6.2.2).
    ///
    /// # Errors
    /// When the function refuses.
    pub fn set_bus_master(&mut self, may: bool) -> Result<(), FrontEndError> {
        self.write(REGION_CONFIG, 4, &(if may { 6_u16 } else { 2 }).to_le_bytes())
    }

    /// Takes ranges away.
    ///
    /// # Errors
    /// When the function refuses.
    pub fn unmap(&mut self, start: Iova, length: u64) -> Result<(), FrontEndError> {
        let unmap = DmaUnmap { argsz: size_of::<DmaUnmap>() as u32, flags: 0, address: start.0, size: length };
        self.conversation.ask(command::DMA_UNMAP, &[unmap.as_bytes()], &[]).map(drop)
    }

    fn negotiate(&mut self, wanted: u64) -> Result<(), FrontEndError> {
        for status in [0, 1, 3] {
            self.write_common(common::STATUS, &[status])?;
        }
        for half in 0..2_u32 {
            self.write_common(common::DEVICE_FEATURE_SELECT, &half.to_le_bytes())?;
            let bits: [u8; 4] = self.read_common(common::DEVICE_FEATURE)?;
            self.offered |= u64::from(u32::from_le_bytes(bits)) << (32 * half);
        }
        self.accepted = self.offered & wanted;
        for half in 0..2_u32 {
            self.write_common(common::DRIVER_FEATURE_SELECT, &half.to_le_bytes())?;
            self.write_common(common::DRIVER_FEATURE, &((self.accepted >> (32 * half)) as u32).to_le_bytes())?;
        }
        self.write_common(common::STATUS, &[11])?;
        if self.read_common(common::STATUS)? != [11] {
            return Err(FrontEndError::Protocol(format!("the features {:#x} were not accepted", self.accepted)));
        }
        Ok(())
    }

    /// The feature bits that both accepted.
    #[must_use]
    pub const fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The disk's size, bytes (virtio 1.3, 5.2.4).
    ///
    /// # Errors
    /// When the function refuses.
    pub fn capacity_bytes(&mut self) -> Result<u64, FrontEndError> {
        let bytes = self.read(REGION_BAR, self.places.own, 8)?;
        Ok(u64::read_from_bytes(&bytes).map_or(0, u64::from_le) * 512)
    }

    /// Hands over a queue and starts it, and the device with it.
    ///
    /// # Errors
    /// When the function refuses.
    pub fn start_queue(&mut self, index: u16, size: u16, queue: &DriverQueue) -> Result<QueueEvents, FrontEndError> {
        let call = EventFd::new(EFD_NONBLOCK)?;
        // Vector 0 is the configuration's.
        let vector = index + 1;
        let argsz = size_of::<IrqSet>() as u32;
        let set = IrqSet { argsz, flags: IRQ_EVENTS, index: IRQ_MSIX, start: vector.into(), count: 1 };
        // SAFETY: the event is open until the end of this function.
        let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
        self.conversation.ask(command::DEVICE_SET_IRQS, &[set.as_bytes()], &[fd])?;
        let at = queue.addresses();
        self.write_common(common::QUEUE_SELECT, &index.to_le_bytes())?;
        self.write_common(common::QUEUE_SIZE, &size.to_le_bytes())?;
        self.write_common(common::QUEUE_VECTOR, &vector.to_le_bytes())?;
        self.write_common(common::QUEUE_DESCRIPTORS, &at.descriptors.0.to_le_bytes())?;
        self.write_common(common::QUEUE_DRIVER, &at.driver.0.to_le_bytes())?;
        self.write_common(common::QUEUE_DEVICE, &at.device.0.to_le_bytes())?;
        self.write_common(common::QUEUE_ENABLE, &1_u16.to_le_bytes())?;
        self.write_common(common::STATUS, &[15])?;
        if self.read_common(common::STATUS)? != [15] {
            return Err(FrontEndError::Protocol(format!("queue {index} does not start")));
        }
        let register = self.places.notify_bytes * u64::from(index);
        let doorbell = match &self.pages {
            Some(pages) => {
                Doorbell::Store(NotifyRegister { pages: Arc::clone(pages), offset: register as usize, queue: index })
            }
            None => {
                let at = self.places.notify + register;
                Doorbell::Message(self.conversation.notify_message(REGION_BAR, at, index))
            }
        };
        Ok(QueueEvents::new(doorbell, call))
    }

    /// Resets the device, which stops its queues.
    ///
    /// # Errors
    /// When the function refuses.
    pub fn reset(&mut self) -> Result<(), FrontEndError> {
        self.write_common(common::STATUS, &[0])
    }

    /// Messages that were sent so far, doorbells and answers to the card included.
    #[must_use]
    pub fn messages_sent(&self) -> u64 {
        self.conversation.sent().load(Ordering::Relaxed)
    }

    /// Messages by which the card read or wrote the guest's memory.
    #[must_use]
    pub fn memory_messages(&self) -> u64 {
        self.conversation.served().load(Ordering::Relaxed)
    }

    fn read(&mut self, region: u32, offset: u64, bytes: u32) -> Result<Vec<u8>, FrontEndError> {
        let access = RegionAccess { offset, region, count: bytes };
        let answer = self.conversation.ask(command::REGION_READ, &[access.as_bytes()], &[])?;
        match answer.body.get(size_of::<RegionAccess>()..) {
            Some(data) if data.len() == bytes as usize => Ok(data.to_vec()),
            _ => Err(FrontEndError::Protocol("a register of odd size".to_owned())),
        }
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), FrontEndError> {
        let access = RegionAccess { offset, region, count: data.len() as u32 };
        self.conversation.ask(command::REGION_WRITE, &[access.as_bytes(), data], &[]).map(drop)
    }

    fn write_common(&mut self, field: u64, data: &[u8]) -> Result<(), FrontEndError> {
        self.write(REGION_BAR, self.places.common + field, data)
    }

    fn read_common<const N: usize>(&mut self, field: u64) -> Result<[u8; N], FrontEndError> {
        let data = self.read(REGION_BAR, self.places.common + field, N as u32)?;
        // `read` returns as many bytes as were asked for.
        Ok(data.try_into().unwrap_or([0; N]))
    }
}
