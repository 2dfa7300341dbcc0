//! One function while it exists: the glue between its link, its queues' lanes on the reactors, and its volume.
//!
//! The link calls [`FunctionSide`] from a thread of its own and may wait for a reactor's answer; a reactor never waits for
//! anybody. What goes wrong on a reactor comes back through a courier thread, because telling the host may block.

mod faults;
mod handed_over;
mod net;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use faults::{FaultNotice, start_courier};

use self::handed_over::HandedOver;
use super::seam::{Notify, Standing};
use crate::backend::BackendError;
use crate::config::{BlkConfig, FunctionConfig, LimitConfig, PayloadConfig, RecoveryConfig};
use crate::device::blk::{BlkDevice, BlkSettings, BlkShared};
use crate::device::limit::{Limit, Rates};
use crate::device::net::NetShared;
use crate::device::{Device, LanePlace, Outlet, QueueFault};
use crate::dma::{HostMemory, Removed};
use crate::inflight::{QueueRecord, RecordIdentity};
use crate::link::{FunctionSide, HostEvents, NetworkSide, QueuePosition, QueueStart, Refusal};
use crate::metrics::QueueCounters;
use crate::mirror::check_addresses;
use crate::reactor::{Message, QueueKey, ReactorHandle, Reactors, Stopped};
use crate::virtqueue::features;
use crate::volume::Volume;
use faults::Reporter;

/// Functions are numbered over the life of the process; a number is never used twice.
static NEXT_NUMBER: AtomicU32 = AtomicU32::new(1);

/// What a queue was started with, as far as a stopped one must match to go on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    size: u16,
    features: u64,
    descriptors: crate::address::Iova,
    driver: crate::address::Iova,
    device: crate::address::Iova,
    /// Where its requests in flight are recorded.
    record: Option<RecordIdentity>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum QueueState {
    Off,
    Running(Shape),
    /// Stopped, with requests that wait for a server, at this position.
    Parked(Shape, QueuePosition),
}

struct Inner {
    memory: Arc<HostMemory>,
    features: u64,
    host: Option<Arc<dyn HostEvents>>,
    queues: Vec<QueueState>,
    handed_over: HandedOver,
    fault: Option<String>,
    /// How often the function was reset.
    life: u64,
    closed: bool,
}

/// What is changed of a device while it runs.
enum Kind {
    Blk { shared: Arc<BlkShared>, limit: Arc<Limit> },
    Net { shared: Arc<NetShared>, limit: Arc<Limit> },
}

/// The reactors of a function's queues, and what was asked of [`Reactors::place`] for them.
struct Placement {
    queues: Vec<usize>,
    placed: Vec<usize>,
}

/// A function of any device.
pub struct CardFunction {
    number: u32,
    name: String,
    device: Arc<dyn Device>,
    kind: Kind,
    counters: Vec<Arc<QueueCounters>>,
    reactors: Arc<Reactors>,
    /// The reactor of each queue.
    placement: Vec<usize>,
    /// What the reactors count as placed on them.
    placed: Vec<usize>,
    courier: Sender<FaultNotice>,
    notify: Notify,
    inner: Mutex<Inner>,
}

/// Where a function runs, and whom it tells.
pub struct FunctionPlace {
    /// The reactors that its queues are placed on.
    pub reactors: Arc<Reactors>,
    /// Carries faults from the reactors.
    pub courier: Sender<FaultNotice>,
    /// Told of each change of standing.
    pub notify: Notify,
}

/// The rates of a configured limit.
#[must_use]
pub fn rates_of(config: &LimitConfig) -> Rates {
    Rates {
        iops: config.iops.unwrap_or(0),
        bandwidth: config.bandwidth.unwrap_or(0),
        read_iops: config.read_iops.unwrap_or(0),
        read_bandwidth: config.read_bandwidth.unwrap_or(0),
        write_iops: config.write_iops.unwrap_or(0),
        write_bandwidth: config.write_bandwidth.unwrap_or(0),
        burst: config.burst,
    }
}

impl CardFunction {
    /// Makes the virtio-blk function of `config` on `volume`: places its queues and opens its channels. `blk` is what `config` says
    /// of the disk, `group` the limit of its group.
    ///
    /// # Errors
    /// When the volume's storage refuses.
    pub fn blk(
        config: &FunctionConfig,
        blk: &BlkConfig,
        volume: &Volume,
        group: Option<Arc<Limit>>,
        place: FunctionPlace,
    ) -> Result<Arc<Self>, BackendError> {
        let info = volume.info();
        let limit = Arc::new(Limit::new(&rates_of(&blk.limit)));
        let settings = BlkSettings {
            queues: blk.queues,
            queue_size_max: config.queue_size,
            packed: config.packed,
            segments_max: blk.seg_max,
            block_bytes: blk.block_bytes,
            write_back: blk.write_cache,
            copy_payload: config.link.payload == PayloadConfig::Copy,
            read_only: volume.read_only,
            serial: volume.serial,
            io_timeout: volume.io_timeout,
            reissue: volume.recovery == RecoveryConfig::Reissue,
            limits: std::iter::once(Arc::clone(&limit)).chain(group).collect(),
        };
        let shared = Arc::new(BlkShared::new(settings, &info));
        let device = Arc::new(BlkDevice(Arc::clone(&shared)));
        let placed = place.reactors.place(blk.queues, info.channels_max);
        let placement = Placement { queues: placed.clone(), placed };
        let function = Self::assemble(&config.name, device, Kind::Blk { shared, limit }, placement, place);
        // All channels first: a function is made whole or not at all.
        let outlet = |_: &usize| volume.backend.open_channel().map(Outlet::Block);
        let outlets = function.used_reactors().iter().map(outlet).collect::<Result<Vec<_>, _>>();
        function.open(outlets)
    }

    /// The guest gets a configuration interrupt.
    fn tell_config(&self) {
        let host = self.lock().host.clone();
        if let Some(host) = host {
            host.config_changed();
        }
    }

    fn assemble(
        name: &str,
        device: Arc<dyn Device>,
        kind: Kind,
        placement: Placement,
        place: FunctionPlace,
    ) -> Arc<Self> {
        let queues = usize::from(device.queue_count());
        let FunctionPlace { reactors, courier, notify } = place;
        Arc::new(Self {
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            device,
            kind,
            counters: (0..queues).map(|_| Arc::default()).collect(),
            reactors,
            placement: placement.queues,
            placed: placement.placed,
            courier,
            notify,
            inner: Mutex::new(Inner {
                memory: Arc::default(),
                features: 0,
                host: None,
                queues: vec![QueueState::Off; queues],
                handed_over: HandedOver::new(queues),
                fault: None,
                life: 0,
                closed: false,
            }),
        })
    }

    /// Hands each reactor that the function is on its outlet, or lets go of the places.
    fn open(self: Arc<Self>, outlets: Result<Vec<Outlet>, BackendError>) -> Result<Arc<Self>, BackendError> {
        let outlets = outlets.inspect_err(|_| self.reactors.release(&self.placed))?;
        for (number, outlet) in self.used_reactors().into_iter().zip(outlets) {
            self.reactors.handles()[number].post(Message::OpenOutlet { function: self.number, outlet });
        }
        Ok(self)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic in another thread leaves the state as it was between two steps, and each step is whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers of the reactors that it is on.
    fn used_reactors(&self) -> Vec<usize> {
        let mut numbers = self.placement.clone();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    fn reactor_of(&self, queue: u16) -> &ReactorHandle {
        &self.reactors.handles()[self.placement[usize::from(queue)]]
    }

    /// What its queues count.
    #[must_use]
    pub fn counters(&self) -> &[Arc<QueueCounters>] {
        &self.counters
    }

    /// How it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        Self::standing_of(&self.lock())
    }

    fn standing_of(inner: &Inner) -> Standing {
        let running = inner.queues.iter().filter(|queue| matches!(queue, QueueState::Running(_))).count() as u16;
        match (&inner.fault, &inner.host) {
            (Some(reason), _) => Standing::NeedsReset { reason: reason.clone() },
            (None, Some(_)) => Standing::Attached { running },
            (None, None) => Standing::Waiting,
        }
    }

    /// Changes its limit while it runs.
    pub fn set_limit(&self, limit: &LimitConfig) {
        let (Kind::Blk { limit: own, .. } | Kind::Net { limit: own, .. }) = &self.kind;
        own.set(&rates_of(limit));
    }

    /// Its volume has another size: the guest gets a configuration interrupt.
    pub fn resized(&self, size_bytes: u64) {
        if let Kind::Blk { shared, .. } = &self.kind {
            shared.set_size_bytes(size_bytes);
            self.tell_config();
        }
    }

    /// Lets go of everything; the link has been closed before.
    pub fn close(&self) {
        {
            let mut inner = self.lock();
            if std::mem::replace(&mut inner.closed, true) {
                return;
            }
            inner.host = None;
        }
        self.ask_each(|reply| Message::CloseOutlet { function: self.number, reply });
        self.reactors.release(&self.placed);
    }

    /// Posts a message to every reactor that the function is on, and waits for all answers.
    fn ask_each(&self, message: impl Fn(Sender<()>) -> Message) {
        let (reply, answers) = channel();
        for number in self.used_reactors() {
            self.reactors.handles()[number].post(message(reply.clone()));
        }
        drop(reply);
        // Ends when every reactor has answered, or dropped the question because it ends.
        while answers.recv().is_ok() {}
    }

    fn queue_failed(&self, life: u64, queue: u16, fault: QueueFault) {
        let mut inner = self.lock();
        // A driver that has reset the function must not hear of what was before, nor must the next front end.
        if life != inner.life {
            return;
        }
        // Said once until the reset: each queue may fail, and again when it is started again.
        if inner.fault.is_none() {
            tracing::warn!(function = %self.name, queue, %fault, "the guest broke a rule; the function stops until it is reset");
            inner.fault = Some(format!("queue {queue}: {fault}"));
        } else {
            tracing::debug!(function = %self.name, queue, %fault, "the guest broke another rule");
        }
        // Under the lock, so that no reset comes between.
        if let Some(host) = &inner.host {
            host.needs_reset(Some(queue));
        }
        let standing = Self::standing_of(&inner);
        drop(inner);
        (self.notify)(standing);
    }

    fn stop_locked(&self, inner: &mut Inner, queue: u16, hand_over: bool) -> Option<QueuePosition> {
        let slot = usize::from(queue);
        let QueueState::Running(shape) = inner.queues[slot] else { return None };
        let (reply, answer) = channel();
        let key = QueueKey { function: self.number, queue };
        self.reactor_of(queue).post(Message::Stop { key, hand_over, reply });
        let Stopped { position, parked } = answer.recv().ok().flatten()?;
        inner.queues[slot] = if hand_over {
            inner.handed_over.leaves(slot);
            // The record has it all; whoever goes on with that, this lane does not.
            self.reactor_of(queue).post(Message::Forget { key });
            QueueState::Off
        } else if parked {
            QueueState::Parked(shape, position)
        } else {
            QueueState::Off
        };
        Some(position)
    }

    fn reset_locked(&self, inner: &mut Inner) {
        self.ask_each(|reply| Message::Reset { function: self.number, reply });
        inner.queues.fill(QueueState::Off);
        inner.handed_over.forget();
        inner.features = 0;
        inner.fault = None;
        inner.life += 1;
        self.device.reset();
    }
}

impl FunctionSide for Arc<CardFunction> {
    fn network(&self) -> Option<&dyn NetworkSide> {
        match &self.kind {
            Kind::Net { shared, .. } => Some(shared.as_ref()),
            Kind::Blk { .. } => None,
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.offered_features()
    }

    fn queue_count(&self) -> u16 {
        self.device.queue_count()
    }

    fn queue_size_max(&self) -> u16 {
        self.device.queue_size_max()
    }

    fn config_space(&self) -> Vec<u8> {
        self.device.config_space()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Refusal> {
        if self.device.write_config(offset, data) {
            return Ok(());
        }
        Err(Refusal::Invalid(format!("no writable field of {} bytes at offset {offset}", data.len())))
    }

    fn accept_features(&self, features: u64) -> Result<(), Refusal> {
        let unknown = features & !self.device.offered_features();
        if unknown != 0 {
            return Err(Refusal::Invalid(format!("features {unknown:#x} were not offered")));
        }
        self.lock().features = features;
        Ok(())
    }

    fn attach(&self, events: Arc<dyn HostEvents>) {
        self.lock().host = Some(events);
        (self.notify)(self.standing());
    }

    fn set_memory(&self, memory: Arc<HostMemory>) {
        let mut inner = self.lock();
        inner.memory = Arc::clone(&memory);
        self.ask_each(|reply| Message::SetMemory { function: self.number, memory: Arc::clone(&memory), reply });
    }

    fn release_memory(&self, removed: Removed) {
        let inner = self.lock();
        // Without queues nothing is in flight.
        if removed.is_empty() || inner.queues.iter().all(|state| *state == QueueState::Off) {
            return;
        }
        let removed = Arc::new(removed);
        self.ask_each(|reply| Message::LetGo { function: self.number, removed: Arc::clone(&removed), reply });
    }

    fn start_queue(&self, start: QueueStart) -> Result<(), Refusal> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(Refusal::Gone);
        }
        if start.index >= self.device.queue_count() || start.size > self.device.queue_size_max() {
            return Err(Refusal::Invalid(format!("queue {} of {} entries does not exist", start.index, start.size)));
        }
        if start.features & !self.device.offered_features() != 0 {
            return Err(Refusal::Invalid(format!("features {:#x} were not offered", start.features)));
        }
        let reach = check_addresses(&start, &inner.memory).map_err(Refusal::Invalid)?;
        let queue = start.index;
        self.stop_locked(&mut inner, queue, false);
        let key = QueueKey { function: self.number, queue };
        let (descriptors, driver, device) = (start.descriptors, start.driver, start.device);
        let (packed, kept) = (start.features & features::RING_PACKED != 0, start.inflight.clone());
        let record = start.inflight.as_ref().map(QueueRecord::identity);
        let shape = Shape { size: start.size, features: start.features, descriptors, driver, device, record };
        if inner.queues[usize::from(queue)] == QueueState::Parked(shape, start.position) {
            let unchanged = inner.handed_over.starts(queue.into(), kept, packed);
            self.reactor_of(queue).post(Message::Resume { key, start, unchanged });
        } else {
            let report =
                Arc::new(Reporter { function: Arc::downgrade(self), life: inner.life, courier: self.courier.clone() });
            let counters = Arc::clone(&self.counters[usize::from(queue)]);
            let place = LanePlace { memory: Arc::clone(&inner.memory), reach, counters, report };
            let lane = self.device.lane(start, place);
            let lane = lane.map_err(|error| Refusal::Invalid(format!("queue {queue}: no card memory: {error}")))?;
            let unchanged = inner.handed_over.starts(queue.into(), kept, packed);
            self.reactor_of(queue).post(Message::Start { key, lane, unchanged });
        }
        inner.queues[usize::from(queue)] = QueueState::Running(shape);
        let standing = CardFunction::standing_of(&inner);
        drop(inner);
        (self.notify)(standing);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<QueuePosition> {
        let mut inner = self.lock();
        if index >= self.device.queue_count() {
            return None;
        }
        self.stop_locked(&mut inner, index, false)
    }

    fn hands_over(&self) -> bool {
        match &self.kind {
            // What is issued again must be what was handed over.
            Kind::Blk { shared, .. } => shared.reissue,
            Kind::Net { .. } => false,
        }
    }

    fn hand_queue_over(&self, index: u16) -> Option<QueuePosition> {
        let mut inner = self.lock();
        if index >= self.device.queue_count() {
            return None;
        }
        self.stop_locked(&mut inner, index, true)
    }

    fn forget_queue(&self, index: u16) {
        let mut inner = self.lock();
        if let Some(state) = inner.queues.get_mut(usize::from(index))
            && let QueueState::Parked(..) = state
        {
            *state = QueueState::Off;
            self.reactor_of(index).post(Message::Forget { key: QueueKey { function: self.number, queue: index } });
        }
    }

    fn reset(&self) {
        self.reset_locked(&mut self.lock());
        (self.notify)(self.standing());
    }

    fn detach(&self) {
        {
            let mut inner = self.lock();
            self.reset_locked(&mut inner);
            inner.host = None;
            inner.memory = Arc::default();
            let empty = Arc::clone(&inner.memory);
            self.ask_each(|reply| Message::SetMemory { function: self.number, memory: Arc::clone(&empty), reply });
        }
        (self.notify)(self.standing());
    }
}
