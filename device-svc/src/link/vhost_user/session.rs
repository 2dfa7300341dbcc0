//! One front end's conversation, from connection to hang-up.
//!
//! Every message is checked here against what the function has. What is refused is answered with an error where the protocol
//! has an answer (REPLY_ACK), and ends the connection where it has none: a front end that is not told would go on as if the card
//! used memory or features that it does not use. What a guest got wrong is no reason to hang up on its front end: a ring that
//! cannot start stays off and signals its error event, and runs once it is set right.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::channel::{Channel, NetMessage, Peeked};
use super::own_record::OwnRecord;
use super::regions::{Regions, SLOTS_MAX, Slot};
use super::resume;
use super::ring::{Ring, RingAddresses, decode_base, encode_base};
use crate::address::{FrontEndAddress, Iova};
use crate::inflight::{AreaError, AreaShape, RecordArea};
use crate::link::event::Event;
use crate::link::{FunctionSide, HostEvents, NetworkSide, QueuePosition, QueueStart};
use crate::virtqueue::features;

/// Bytes of a configuration space that are read or written at most (virtio 1.3 has none larger).
const CONFIG_BYTES_MAX: u32 = 256;

/// How a refusal is marked that is the guest's fault, not the front end's.
const GUEST_FAULT: ErrorKind = ErrorKind::InvalidData;

/// What the function can tell this front end.
#[derive(Default)]
struct Events {
    channel: Mutex<Option<Channel>>,
    errors: Mutex<Vec<Option<Event>>>,
    /// Something was refused, and people were told: once for each front end, which could otherwise fill a disk with our words.
    warned: AtomicBool,
}

impl HostEvents for Events {
    fn config_changed(&self) {
        if let Some(channel) = &*self.channel.lock().unwrap_or_else(PoisonError::into_inner)
            && let Err(error) = channel.config_changed()
        {
            tracing::debug!(%error, "the front end took no configuration change");
        }
    }

    fn needs_reset(&self, queue: Option<u16>) {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, event) in errors.iter().enumerate() {
            if let Some(event) = event
                && queue.is_none_or(|queue| usize::from(queue) == number)
            {
                event.signal_once();
            }
        }
    }
}

/// The state of the conversation.
struct Session {
    name: String,
    function: Arc<dyn FunctionSide>,
    events: Arc<Events>,
    regions: Regions,
    rings: Vec<Ring>,
    accepted: u64,
    /// The record of requests in flight, where the front end keeps one.
    inflight: Option<RecordArea>,
    /// For a front end that keeps none.
    own_record: Option<Arc<OwnRecord>>,
    protocol: bool,
    /// REPLY_ACK was negotiated.
    replies: bool,
    /// GET_VRING_BASE_INFLIGHT was negotiated: a ring that stops leaves what is in flight to its record.
    hands_over: bool,
}

/// Converses until the front end hangs up or breaks the protocol, or the link is `stopping` and ends the connection.
pub(super) fn run(
    stream: UnixStream,
    name: &str,
    function: &Arc<dyn FunctionSide>,
    own_record: Option<&Arc<OwnRecord>>,
    stopping: &AtomicBool,
) {
    let rings = usize::from(function.queue_count());
    let events = Arc::new(Events {
        errors: Mutex::new(std::iter::repeat_with(|| None).take(rings).collect()),
        ..Events::default()
    });
    function.attach(Arc::clone(&events) as Arc<dyn HostEvents>);
    let session = Session {
        name: name.to_owned(),
        function: Arc::clone(function),
        events: Arc::clone(&events),
        regions: Regions::default(),
        rings: std::iter::repeat_with(Ring::default).take(rings).collect(),
        accepted: 0,
        inflight: None,
        own_record: own_record.cloned(),
        protocol: false,
        replies: false,
        hands_over: false,
    };
    tracing::info!(function = name, "a front end is attached");
    let peeked = stream.try_clone();
    let network = function.network();
    let session = Arc::new(Mutex::new(session));
    let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let end = loop {
        let next = peeked.as_ref().map(|stream| Peeked::wait_for(stream, network.is_some())).unwrap_or_default();
        if let Some(channel) = next.channel {
            *events.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
        }
        let handled = match (next.net, network, &peeked) {
            (Some(message), Some(network), Ok(stream)) => {
                let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
                let done = session.hear(message, network);
                if next.wants_reply && session.replies {
                    // A front end that is gone is noticed with the next message.
                    let _ = message.answer(stream, done.is_ok());
                }
                done
            }
            _ => requests.handle_request(),
        };
        match handled {
            Ok(()) => {}
            Err(Error::ReqHandlerError(why)) if why.kind() == GUEST_FAULT => {}
            Err(Error::ReqHandlerError(_))
                if next.wants_reply && session.lock().unwrap_or_else(PoisonError::into_inner).replies => {}
            Err(end) => break end,
        }
    };
    match end {
        _ if stopping.load(Ordering::Acquire) => {
            tracing::info!(function = name, "the link ends the connection");
            crate::link::drain(function.as_ref(), 0..rings as u16);
        }
        Error::Disconnected | Error::PartialMessage => tracing::info!(function = name, "the front end is gone"),
        // What was refused has been said.
        Error::ReqHandlerError(_) => {
            tracing::info!(function = name, "the front end cannot be told of the refusal; the connection ends");
        }
        error if events.warned.load(Ordering::Relaxed) => {
            tracing::info!(function = name, %error, "the front end broke the protocol; the connection ends");
        }
        error => tracing::warn!(function = name, %error, "the front end broke the protocol; the connection ends"),
    }
    function.detach();
}

impl Session {
    const fn packed(&self) -> bool {
        self.accepted & features::RING_PACKED != 0
    }

    fn ring(&mut self, index: u32) -> Result<(u16, &mut Ring)> {
        let number = u16::try_from(index).ok().filter(|number| usize::from(*number) < self.rings.len());
        let number = number.ok_or(Error::InvalidParam)?;
        Ok((number, &mut self.rings[usize::from(number)]))
    }

    /// Refuses, and says why: the first time so that people see it.
    fn refuse(&self, what: &str, why: impl std::fmt::Display) -> Error {
        self.refuse_as(ErrorKind::InvalidInput, what, &why)
    }

    fn refuse_as(&self, kind: ErrorKind, what: &str, why: &dyn std::fmt::Display) -> Error {
        if self.events.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(function = %self.name, %why, "refused: {what}");
        } else {
            tracing::warn!(function = %self.name, %why, "refused: {what}; what is refused after it is not reported");
        }
        Error::ReqHandlerError(std::io::Error::new(kind, why.to_string()))
    }

    /// Stops a ring if it runs, and remembers where.
    fn halt(&mut self, number: u16) {
        self.halt_with(number, |function| function.stop_queue(number));
    }

    /// Stops a ring that the front end stops: it may go on elsewhere. What is in flight is left to the record, where both have agreed on that.
    /// The front end keeps it, and a ring that runs has it.
    fn let_go(&mut self, number: u16) {
        if self.hands_over && self.inflight.is_some() {
            self.halt_with(number, |function| function.hand_queue_over(number));
        } else {
            self.halt(number);
        }
    }

    fn halt_with(&mut self, number: u16, stop: impl FnOnce(&dyn FunctionSide) -> Option<QueuePosition>) {
        let ring = &mut self.rings[usize::from(number)];
        if std::mem::take(&mut ring.running)
            && let Some(position) = stop(self.function.as_ref())
        {
            tracing::debug!(function = %self.name, ring = number, ?position, "a ring has stopped");
            let ring = &mut self.rings[usize::from(number)];
            (ring.position, ring.stopped_at) = (Some(position), Some(position));
        }
    }

    /// Runs a ring if it is to run, stops it if not; anew if `changed`.
    fn settle(&mut self, number: u16, changed: bool) -> Result<()> {
        let ring = &self.rings[usize::from(number)];
        let (wanted, running) = (ring.is_wanted(), ring.running);
        if running && !wanted {
            self.let_go(number);
        } else if running && changed {
            self.halt(number);
        }
        if wanted && !self.rings[usize::from(number)].running {
            if let Err(why) = self.start(number) {
                if let Some(err) = &self.rings[usize::from(number)].err {
                    err.signal_once();
                }
                return Err(self.refuse_as(GUEST_FAULT, "a ring cannot start", &why));
            }
            let ring = &mut self.rings[usize::from(number)];
            (ring.running, ring.ran) = (true, true);
        }
        Ok(())
    }

    fn start(&self, number: u16) -> std::result::Result<(), String> {
        let accepted = self.accepted & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let record = self.inflight.as_ref().map(|area| area.queue(number, self.packed())).transpose();
        let record = record.map_err(|why| why.to_string())?;
        let mut start = self.rings[usize::from(number)].start(number, &self.regions, accepted, record)?;
        if self.packed() && start.inflight.is_none() {
            let in_order = self.function.network().is_some() && !self.rings[usize::from(number)].ran;
            resume::correct(&mut start, in_order, self.regions.memory());
        }
        let is_fresh = start.position == QueuePosition::fresh(self.packed()) && start.inflight.is_none();
        let goes_on = self.attach_own_record(&mut start, number).map_err(|error| error.to_string())?;
        start.is_resumed = (goes_on || !is_fresh) && !self.rings[usize::from(number)].ran;
        tracing::debug!(function = %self.name, ring = number, ?start.position, start.size, "a ring starts");
        self.function.start_queue(start).map_err(|why| why.to_string())
    }

    /// Has a ring recorded by ourselves, if the front end does not. Returns whether it goes on by what is recorded.
    fn attach_own_record(&self, start: &mut QueueStart, number: u16) -> std::io::Result<bool> {
        let Ring { addresses, position, stopped_at, .. } = &self.rings[usize::from(number)];
        let stopped_here = stopped_at.map(|at| *position == Some(at));
        let file = addresses.and_then(|addresses| self.regions.file_of(addresses.descriptors));
        match (&self.own_record, file) {
            (Some(own), Some(file)) if start.inflight.is_none() => {
                own.attach(start, self.packed(), stopped_here, file, self.regions.memory())
            }
            _ => Ok(false),
        }
    }

    /// Goes over to another table. A ring that it moves or takes away stops first: a front end changes a region by removing it
    /// and adding it again, and the card polls in between. It goes on when its memory is there.
    fn use_regions(&mut self, regions: Regions) -> Result<()> {
        for number in 0..self.rings.len() as u16 {
            let ring = &self.rings[usize::from(number)];
            if ring.running && ring.places(&regions) != ring.places(&self.regions) {
                self.halt(number);
            }
        }
        self.regions = regions;
        tracing::debug!(function = %self.name, regions = self.regions.memory().regions().len(), "the memory has changed");
        // Returns when no queue touches what is gone; then the old table's mappings go with its last owner.
        self.function.set_memory(Arc::clone(self.regions.memory()));
        for number in 0..self.rings.len() as u16 {
            let ring = &self.rings[usize::from(number)];
            if !ring.running && ring.places(&self.regions).is_some() {
                self.settle(number, false)?;
            }
        }
        Ok(())
    }

    /// Does what a network function is told.
    fn hear(&mut self, message: NetMessage, network: &dyn NetworkSide) -> Result<()> {
        match message {
            NetMessage::Enable(index, enable) => self.set_vring_enable(index, enable),
            NetMessage::Announce(address) => {
                network.announce(address);
                Ok(())
            }
            NetMessage::Mtu(mtu) => network.use_mtu(mtu).map_err(|why| self.refuse("an MTU", why)),
        }
    }

    /// What a front end says of the record, checked.
    fn record_shape(&self, said: &VhostUserInflight) -> std::result::Result<AreaShape, AreaError> {
        let shape = AreaShape { queues: said.num_queues, size: said.queue_size, packed: self.packed() };
        shape.check(self.function.queue_count(), self.function.queue_size_max())
    }

    fn forget(&mut self) {
        // A front end that keeps its record over a reset shall not find in it what was before.
        if let Some(area) = self.inflight.take() {
            area.forget();
        }
        if let Some(own) = &self.own_record {
            own.forget();
        }
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        self.accepted = 0;
    }
}

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
