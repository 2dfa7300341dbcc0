//! The function that a VMM sees: its registers, and what their writes do to queues and interrupts.

mod kept;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::VfioUserSettings;
use super::interrupts::Interrupts;
use super::lives::Lives;
use super::port::FunctionPort;
use crate::address::Iova;
use crate::inflight::RecordArea;
use crate::link::event::Event;
use crate::link::{FunctionSide, HostEvents, QueuePosition, QueueStart};
use crate::pci::{BadAccess, Change, HexBytes, Outside, PciFunction, QueueRegisters, Space};
use crate::virtqueue::features;
use crate::virtqueue::split::{avail_bytes, used_bytes};

/// What the transport offers beside the device: the function reaches memory through the platform's IOMMU and orders its accesses as
/// a device does; doorbells may carry more than a number; single queues can be reset (virtio 1.3, 6).
const TRANSPORT: u64 =
    features::ACCESS_PLATFORM | features::ORDER_PLATFORM | features::NOTIFICATION_DATA | features::RING_RESET;

/// Registers and interrupts, which the card's other threads touch when they have something to tell.
pub(super) struct Shown {
    registers: Mutex<PciFunction>,
    pub(super) interrupts: Arc<Interrupts>,
    generation: AtomicU8,
    /// The registers are not what was saved last.
    changed: AtomicBool,
}

impl Shown {
    pub(super) fn lock(&self) -> MutexGuard<'_, PciFunction> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registers have changed.
    pub(super) fn set_changed(&self) {
        self.changed.store(true, Ordering::Release);
    }
}

impl HostEvents for Shown {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.interrupts.raise_config();
    }

    fn needs_reset(&self, _queue: Option<u16>) {
        let tell = self.lock().virtio.need_reset();
        self.set_changed();
        if tell {
            self.interrupts.raise_config();
        }
    }
}

/// What the registers show that is not in them.
struct Seen<'a> {
    shown: &'a Shown,
    function: &'a dyn FunctionSide,
    name: &'a str,
    config_writes: &'a RefCell<BTreeMap<u32, HexBytes>>,
}

impl Outside for Seen<'_> {
    fn device_config(&self) -> Vec<u8> {
        self.function.config_space()
    }

    fn write_device_config(&self, offset: u32, data: &[u8]) {
        match self.function.write_config(offset, data) {
            Ok(()) => {
                self.config_writes.borrow_mut().insert(offset, HexBytes(data.to_vec()));
            }
            Err(why) => tracing::debug!(function = self.name, %why, "a write to the configuration was dropped"),
        }
    }

    fn generation(&self) -> u8 {
        self.shown.generation.load(Ordering::SeqCst)
    }

    fn take_isr(&self) -> u8 {
        self.shown.interrupts.take_isr()
    }

    fn intx_pending(&self) -> bool {
        self.shown.interrupts.is_intx_pending()
    }

    fn vector_pending(&self, vector: u16) -> bool {
        self.shown.interrupts.is_vector_pending(vector)
    }
}

/// One queue, as the card runs it.
struct Queue {
    /// Rung when a doorbell message arrives.
    doorbell: Event,
    /// What it runs with.
    running: Option<QueueRegisters>,
    /// Where it goes on when it runs again.
    position: Option<QueuePosition>,
    /// It is not to run before it was reset.
    is_doubtful: bool,
}

/// The function.
pub(super) struct ShownFunction {
    name: String,
    function: Arc<dyn FunctionSide>,
    shown: Arc<Shown>,
    queues: Vec<Queue>,
    /// What the driver has written to the device's own configuration since the reset: the last of each place.
    config_writes: RefCell<BTreeMap<u32, HexBytes>>,
    /// The requests in flight, if somebody keeps them for a service after this one.
    record: Option<RecordArea>,
    /// How often each queue was reset, beside the record.
    lives: Option<Lives>,
}

impl ShownFunction {
    /// A function as after power-on; from now on the card's news reach it.
    pub(super) fn new(settings: &VfioUserSettings, function: &Arc<dyn FunctionSide>) -> std::io::Result<Self> {
        let queues = function.queue_count();
        let offered = function.offered_features() | TRANSPORT;
        let registers = PciFunction::new(settings.identity, offered, queues, function.queue_size_max(), settings.msix);
        let interrupts = Arc::new(Interrupts::new(queues, registers.msix.vectors()));
        let shown = Arc::new(Shown {
            registers: Mutex::new(registers),
            interrupts,
            generation: AtomicU8::new(0),
            changed: AtomicBool::new(true),
        });
        let queues = (0..queues)
            .map(|_| Ok(Queue { doorbell: Event::make()?, running: None, position: None, is_doubtful: false }))
            .collect::<std::io::Result<Vec<_>>>()?;
        function.attach(Arc::clone(&shown) as Arc<dyn HostEvents>);
        Ok(Self {
            name: settings.function.clone(),
            function: Arc::clone(function),
            shown,
            queues,
            config_writes: RefCell::default(),
            record: None,
            lives: None,
        })
    }

    fn seen(&self) -> Seen<'_> {
        Seen {
            shown: &self.shown,
            function: self.function.as_ref(),
            name: &self.name,
            config_writes: &self.config_writes,
        }
    }

    /// Registers and interrupts.
    pub(super) const fn shown(&self) -> &Arc<Shown> {
        &self.shown
    }

    /// The VMM reads.
    pub(super) fn read(&self, space: Space, offset: u64, data: &mut [u8]) -> Result<(), BadAccess> {
        self.shown.lock().read(space, offset, data, &self.seen())
    }

    /// The VMM writes; what that means has happened when this returns. Returns whether queues may go on that have stopped:
    /// [`come_back`](Self::come_back) must come next.
    pub(super) fn write(&mut self, space: Space, offset: u64, data: &[u8]) -> Result<bool, BadAccess> {
        let change = self.shown.lock().write(space, offset, data, &self.seen())?;
        if !matches!(change, Change::Notify(_)) {
            self.shown.set_changed();
        }
        match change {
            Change::Nothing => {}
            Change::Notify(queue) => self.queues[usize::from(queue)].doorbell.signal_own(),
            Change::Interrupts => self.shown.interrupts.follow(&self.shown.lock()),
            Change::Queues => {
                self.shown.interrupts.follow(&self.shown.lock());
                self.settle();
            }
            Change::QueueReset(queue) => {
                self.halt(queue);
                self.function.forget_queue(queue);
                self.queues[usize::from(queue)].position = None;
                self.queues[usize::from(queue)].is_doubtful = false;
                if let Some(lives) = &mut self.lives {
                    lives.end(usize::from(queue)..usize::from(queue) + 1);
                }
                if let Some(record) = &self.record {
                    let packed = self.shown.lock().virtio.accepted() & features::RING_PACKED != 0;
                    record.forget_queue(queue, packed);
                }
                self.shown.interrupts.follow(&self.shown.lock());
            }
            Change::DeviceReset | Change::FunctionReset => self.forget(),
        }
        Ok(change == Change::Queues)
    }

    /// The VMM resets the function.
    pub(super) fn reset(&mut self) {
        self.shown.lock().reset();
        self.forget();
    }

    /// After a reset of the registers.
    fn forget(&mut self) {
        self.function.reset();
        if let Some(lives) = &mut self.lives {
            lives.end(0..self.queues.len());
        }
        if let Some(record) = &self.record {
            record.forget();
        }
        self.config_writes.borrow_mut().clear();
        self.shown.set_changed();
        // Until then a queue may have failed, and the fresh status said that the device needs a reset: a driver waits for zero.
        self.shown.lock().virtio.reset();
        for queue in &mut self.queues {
            queue.running = None;
            queue.position = None;
            queue.is_doubtful = false;
            // A doorbell from before is none for the next driver.
            queue.doorbell.take();
        }
        self.shown.interrupts.forget();
        self.shown.interrupts.follow(&self.shown.lock());
    }

    /// Runs the queues that are to run and never did, stops those that are not to. Those that have stopped go on by
    /// [`come_back`](Self::come_back), for which the VMM may have taken their memory away.
    fn settle(&mut self) {
        for number in 0..self.queues.len() as u16 {
            let is_live = self.shown.lock().is_live(number);
            let queue = &self.queues[usize::from(number)];
            let is_fresh = queue.running.is_none() && queue.position.is_none() && !queue.is_doubtful;
            if queue.running.is_some() && !is_live {
                self.halt(number);
            } else if is_live && is_fresh {
                self.run(number);
            }
        }
    }

    fn run(&mut self, number: u16) {
        let (registers, accepted) = {
            let shown = self.shown.lock();
            (shown.virtio.queues()[usize::from(number)], shown.virtio.accepted())
        };
        if let Err(why) = self.start(number, registers, accepted) {
            tracing::warn!(function = %self.name, queue = number, %why, "a queue cannot start; the function needs a reset");
            self.shown.needs_reset(Some(number));
            // Those that run already stop too: none is live any more.
            self.settle();
        }
    }

    fn start(&mut self, number: u16, registers: QueueRegisters, accepted: u64) -> Result<(), String> {
        let queue = &mut self.queues[usize::from(number)];
        let packed = accepted & features::RING_PACKED != 0;
        let doorbell = queue.doorbell.again().map_err(|error| error.to_string())?;
        let port = FunctionPort::new(number, doorbell, Arc::clone(&self.shown.interrupts));
        let device_features = accepted & !TRANSPORT;
        self.function.accept_features(device_features).map_err(|why| why.to_string())?;
        let record = self.record.as_ref().map(|record| record.queue(number, packed));
        let inflight = record.transpose().map_err(|error| error.to_string())?;
        let start = QueueStart {
            index: number,
            size: registers.size,
            descriptors: Iova(registers.descriptors),
            driver: Iova(registers.driver),
            device: Iova(registers.device),
            position: queue.position.unwrap_or_else(|| QueuePosition::fresh(packed)),
            features: device_features,
            port: Box::new(port),
            inflight,
            // `restore` has raised all there are.
            is_resumed: false,
        };
        tracing::debug!(function = %self.name, queue = number, ?start.position, start.size, "a queue starts");
        self.function.start_queue(start).map_err(|why| why.to_string())?;
        queue.running = Some(registers);
        Ok(())
    }

    fn halt(&mut self, number: u16) {
        let queue = &mut self.queues[usize::from(number)];
        if queue.running.take().is_some()
            && let Some(position) = self.function.stop_queue(number)
        {
            tracing::debug!(function = %self.name, queue = number, ?position, "a queue has stopped");
            queue.position = Some(position);
        }
    }

    /// Memory is about to go: queues whose rings lie in it stop, where they are. A VMM takes a range away and maps it again in
    /// other pieces, while the driver knows nothing of it.
    pub(super) fn leave(&mut self, start: Iova, length: u64) {
        let packed = self.shown.lock().virtio.accepted() & features::RING_PACKED != 0;
        for number in 0..self.queues.len() as u16 {
            let running = self.queues[usize::from(number)].running;
            if running.is_some_and(|registers| areas(&registers, packed).iter().any(|area| area.touches(start, length)))
            {
                self.halt(number);
            }
        }
    }

    /// Memory has come: queues that stopped because theirs went go on if it is there again.
    pub(super) fn come_back(&mut self, covers: impl Fn(Iova, u64) -> bool) {
        let packed = self.shown.lock().virtio.accepted() & features::RING_PACKED != 0;
        for number in 0..self.queues.len() as u16 {
            let queue = &self.queues[usize::from(number)];
            if queue.running.is_some() || queue.position.is_none() {
                continue;
            }
            let registers = {
                let shown = self.shown.lock();
                if !shown.is_live(number) {
                    continue;
                }
                shown.virtio.queues()[usize::from(number)]
            };
            if areas(&registers, packed).iter().all(|area| covers(area.start, area.length)) {
                self.run(number);
            }
        }
    }

    /// The VMM is gone.
    pub(super) fn detach(&self) {
        if let Some(network) = self.function.network() {
            // Where a service after this one goes on, what the driver chose holds. Without a file nothing can be wrong with it.
            let _ = network.keep_commands(None, 0);
        }
        self.function.detach();
    }
}

/// Memory that a ring lies in.
struct Area {
    start: Iova,
    length: u64,
}

impl Area {
    const fn touches(&self, start: Iova, length: u64) -> bool {
        self.start.0 < start.0.saturating_add(length) && start.0 < self.start.0.saturating_add(self.length)
    }
}

/// The areas of a queue (virtio 1.3, 2.7 and 2.8).
fn areas(queue: &QueueRegisters, packed: bool) -> [Area; 3] {
    let (driver, device) = if packed { (4, 4) } else { (avail_bytes(queue.size), used_bytes(queue.size)) };
    [(queue.descriptors, 16 * u64::from(queue.size)), (queue.driver, driver), (queue.device, device)]
        .map(|(start, length)| Area { start: Iova(start), length })
}
