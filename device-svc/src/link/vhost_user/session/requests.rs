//! What the front end asks for, message by message (the vhost-user protocol, front-end message types).

use std::fs::File;
use std::sync::PoisonError;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::super::regions::{SLOTS_MAX, Slot};
use super::super::ring::{RingAddresses, decode_base, encode_base};
use super::{GUEST_FAULT, Session};
use crate::address::{FrontEndAddress, Iova};
use crate::inflight::RecordArea;
use crate::link::QueuePosition;
use crate::link::event::Event;

/// Bytes of a configuration space that are read or written at most (virtio 1.3 has none larger).
const CONFIG_BYTES_MAX: u32 = 256;

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.function.reset();
        self.forget();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.function.reset();
        // The front end keeps its memory table and protocol features over a device reset.
        self.forget();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.function.offered_features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, accepted: u64) -> Result<()> {
        let device = accepted & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if let Err(why) = self.function.accept_features(device) {
            return Err(self.refuse("features", why));
        }
        let before = self.accepted;
        self.accepted = accepted;
        self.protocol = accepted & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        if !self.protocol {
            // Without protocol features there is no message to enable a ring: it is enabled from the start.
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        for number in 0..self.rings.len() as u16 {
            self.settle(number, before != accepted)?;
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        // Of a network function the front end has the configuration, and complains about one that is offered.
        let kind = match self.function.network() {
            Some(_) => VhostUserProtocolFeatures::RARP | VhostUserProtocolFeatures::MTU,
            None => VhostUserProtocolFeatures::CONFIG,
        };
        let hand_over = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT;
        let hand_over = if self.function.hands_over() { hand_over } else { VhostUserProtocolFeatures::empty() };
        Ok(kind
            | hand_over
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.replies = features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
        let both = VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        self.hands_over = self.function.hands_over() && features & both.bits() == both.bits();
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        // Of a network function front ends count pairs.
        Ok(self.function.network().map_or(self.rings.len() as u64, |network| network.pairs().into()))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let slots = regions.iter().map(|region| Slot {
            guest: Iova(region.guest_phys_addr),
            front_end: FrontEndAddress(region.user_addr),
            length: region.memory_size,
            file_offset: region.mmap_offset,
        });
        let table = self.regions.replaced_by(slots.zip(files)).map_err(|why| self.refuse("a memory table", why))?;
        self.use_regions(table)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(SLOTS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let table = self.regions.with(slot_of(region), &file).map_err(|why| self.refuse("a memory region", why))?;
        self.use_regions(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let table = self.regions.without(slot_of(region)).map_err(|why| self.refuse("removing memory", why))?;
        self.use_regions(table)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let size_max = self.function.queue_size_max();
        let (number, ring) = self.ring(index)?;
        if let Err(why) = ring.set_size(size, size_max) {
            return Err(self.refuse("a queue size", why));
        }
        self.settle(number, true)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (number, ring) = self.ring(index)?;
        ring.addresses = Some(RingAddresses {
            descriptors: FrontEndAddress(descriptor),
            driver: FrontEndAddress(available),
            device: FrontEndAddress(used),
        });
        self.settle(number, true)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let packed = self.packed();
        let (number, _) = self.ring(index)?;
        let position = decode_base(base, packed).map_err(|why| self.refuse("a ring's base", why))?;
        self.halt(number);
        let known = self.rings[usize::from(number)].position.filter(|known| encode_base(*known, packed) == base);
        let ring = &mut self.rings[usize::from(number)];
        ring.position = Some(known.unwrap_or(position));
        self.settle(number, true)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let packed = self.packed();
        let (number, _) = self.ring(index)?;
        self.let_go(number);
        let ring = &mut self.rings[usize::from(number)];
        ring.started = false;
        ring.kick = None;
        Ok(VhostUserVringState::new(
            index,
            encode_base(ring.position.unwrap_or_else(|| QueuePosition::fresh(packed)), packed),
        ))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.map(Event::new).transpose().map_err(|why| self.refuse("a doorbell", why))?;
        let (number, ring) = self.ring(index.into())?;
        ring.kick = kick;
        ring.started = true;
        self.settle(number, true)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = fd.map(Event::new).transpose().map_err(|why| self.refuse("an interrupt", why))?;
        let (number, ring) = self.ring(index.into())?;
        ring.call = call;
        self.settle(number, true)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let err = fd.map(Event::new).transpose().map_err(|why| self.refuse("an error event", why))?;
        let (number, ring) = self.ring(index.into())?;
        let again = err.as_ref().and_then(|event| event.again().ok());
        ring.err = err;
        self.events.errors.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(number)] = again;
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (number, ring) = self.ring(index)?;
        ring.enabled = enable;
        self.settle(number, false)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if offset.saturating_add(size) > CONFIG_BYTES_MAX {
            return Err(Error::InvalidParam);
        }
        // What lies behind the fields that we know reads as zeroes.
        let mut space = self.function.config_space();
        space.resize(CONFIG_BYTES_MAX as usize, 0);
        Ok(space[offset as usize..(offset + size) as usize].to_vec())
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let written = self.function.write_config(offset, data);
        written.map_err(|why| self.refuse_as(GUEST_FAULT, "a write to the configuration", &why))
    }

    fn set_backend_req_fd(&mut self, _channel: Backend) {
        // Taken when the message was peeked at; the crate's own handle cannot say what there is to say.
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let made = self.record_shape(wanted).and_then(|shape| Ok((shape.bytes(), shape.create()?)));
        let (bytes, file) = made.map_err(|why| {
            self.refuse("an inflight record", why);
            // The answer is a record; there is none that says no.
            Error::InvalidParam
        })?;
        Ok((VhostUserInflight::new(bytes, 0, wanted.num_queues, wanted.queue_size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let area = self
            .record_shape(given)
            .and_then(|shape| RecordArea::open(&file, given.mmap_offset, given.mmap_size, shape))
            .map_err(|why| self.refuse("an inflight record", why))?;
        self.inflight = Some(area);
        for number in 0..self.rings.len() as u16 {
            self.settle(number, true)?;
        }
        Ok(())
    }

    // What follows belongs to features that are not offered; a front end that asks all the same is refused.

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidMessage)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
}

fn slot_of(region: &VhostUserSingleMemoryRegion) -> Slot {
    Slot {
        guest: Iova(region.guest_phys_addr),
        front_end: FrontEndAddress(region.user_addr),
        length: region.memory_size,
        file_offset: region.mmap_offset,
    }
}
