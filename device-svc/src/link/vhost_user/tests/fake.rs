//! A function that keeps a record of what its link asks of it, and the bed on which a test lays the two.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Condvar, OnceLock};
use std::time::Duration;

use super::super::*;
use crate::dma::{HostMemory, Removed};
use crate::driver::vhost_user::FrontEnd;
use crate::driver::{DriverQueue, GuestMemory, QueueOptions};
use crate::link::{HostEvents, QueuePosition, QueueStart, Refusal};
use crate::virtqueue::features;

/// How long anything may take: nobody waits for it in vain.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// What the function offers.
pub(super) const OFFERED: u64 =
    features::VERSION_1 | features::RING_PACKED | features::INDIRECT | features::EVENT_INDEX | 1 << 12;
/// Queues of the function.
pub(super) const QUEUES: u16 = 4;
/// The largest size of one.
pub(super) const SIZE_MAX: u16 = 256;
/// Bytes of its configuration space: the byte at `n` is `n + 1`.
pub(super) const CONFIG_BYTES: u8 = 60;

/// What a link asked of the function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Call {
    Attach,
    Features(u64),
    /// Start and length of each region.
    Memory(Vec<(u64, u64)>),
    Start(u16),
    Stop(u16),
    HandOver(u16),
    Config(u32, Vec<u8>),
    Reset,
    Detach,
}

#[derive(Default)]
pub(super) struct Record {
    pub(super) calls: Vec<Call>,
    pub(super) running: BTreeMap<u16, QueueStart>,
    pub(super) host: Option<Arc<dyn HostEvents>>,
    pub(super) memory: Arc<HostMemory>,
    /// How many requests each stopped queue has seen: what is added to its position.
    pub(super) advance: u16,
    pub(super) hands_over: bool,
}

#[derive(Default)]
pub(super) struct FakeFunction {
    record: Mutex<Record>,
    changed: Condvar,
}

impl FakeFunction {
    fn note<T>(&self, call: Call, change: impl FnOnce(&mut Record) -> T) -> T {
        let mut record = self.record.lock().unwrap();
        record.calls.push(call);
        let result = change(&mut record);
        self.changed.notify_all();
        result
    }

    fn end(&self, call: Call, index: u16) -> Option<QueuePosition> {
        self.note(call, |record| {
            let advance = record.advance;
            let start = record.running.remove(&index)?;
            let position = start.position;
            let next_avail = position.next_avail.wrapping_add(advance);
            Some(QueuePosition { next_avail, next_used: position.next_used + advance, ..position })
        })
    }

    /// Looks at the record, or changes it.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Record) -> T) -> T {
        look(&mut self.record.lock().unwrap())
    }

    /// Waits until the record is so.
    #[track_caller]
    pub(super) fn wait_for(&self, what: impl Fn(&Record) -> bool) {
        let record = self.record.lock().unwrap();
        let (record, _) = self.changed.wait_timeout_while(record, PATIENCE, |record| !what(record)).unwrap();
        assert!(what(&record), "waited too long; so far: {:?}", record.calls);
    }

    /// How often the link asked this.
    pub(super) fn count(&self, call: &Call) -> usize {
        self.with(|record| record.calls.iter().filter(|other| *other == call).count())
    }

    /// Waits until so many front ends have come and gone.
    #[track_caller]
    pub(super) fn wait_for_detached(&self, times: usize) {
        self.wait_for(|record| record.calls.iter().filter(|call| **call == Call::Detach).count() == times);
    }

    /// The queues that run.
    pub(super) fn running(&self) -> Vec<u16> {
        self.with(|record| record.running.keys().copied().collect())
    }
}

impl FunctionSide for FakeFunction {
    fn offered_features(&self) -> u64 {
        OFFERED
    }

    fn queue_count(&self) -> u16 {
        QUEUES
    }

    fn queue_size_max(&self) -> u16 {
        SIZE_MAX
    }

    fn config_space(&self) -> Vec<u8> {
        (1..=CONFIG_BYTES).collect()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Refusal> {
        self.note(Call::Config(offset, data.to_vec()), |_| ());
        if offset == 32 { Ok(()) } else { Err(Refusal::Invalid("not writable".to_owned())) }
    }

    fn accept_features(&self, features: u64) -> Result<(), Refusal> {
        if features & !OFFERED != 0 {
            return Err(Refusal::Invalid("not offered".to_owned()));
        }
        self.note(Call::Features(features), |_| Ok(()))
    }

    fn attach(&self, events: Arc<dyn HostEvents>) {
        self.note(Call::Attach, |record| record.host = Some(events));
    }

    fn set_memory(&self, memory: Arc<HostMemory>) {
        let ranges = memory.regions().iter().map(|region| (region.start().0, region.length())).collect();
        self.note(Call::Memory(ranges), |record| record.memory = memory);
    }

    fn release_memory(&self, _removed: Removed) {}

    fn start_queue(&self, start: QueueStart) -> Result<(), Refusal> {
        if !start.size.is_power_of_two() && start.features & features::RING_PACKED == 0 {
            return Err(Refusal::Invalid("not a split ring's size".to_owned()));
        }
        self.note(Call::Start(start.index), |record| drop(record.running.insert(start.index, start)));
        Ok(())
    }

    fn forget_queue(&self, _index: u16) {}

    fn hands_over(&self) -> bool {
        self.with(|record| record.hands_over)
    }

    fn stop_queue(&self, index: u16) -> Option<QueuePosition> {
        self.end(Call::Stop(index), index)
    }

    fn hand_queue_over(&self, index: u16) -> Option<QueuePosition> {
        self.end(Call::HandOver(index), index)
    }
    fn reset(&self) {
        self.note(Call::Reset, |record| record.running.clear());
    }

    fn detach(&self) {
        self.note(Call::Detach, |record| {
            record.running.clear();
            record.host = None;
            record.memory = Arc::default();
        });
    }
}

/// A link with its function, in a folder of their own.
pub(super) struct Bed {
    pub(super) link: VhostUserLink,
    pub(super) function: Arc<FakeFunction>,
    pub(super) name: String,
    pub(super) folder: tempfile::TempDir,
}

impl Bed {
    /// A link that listens, for a function of this name; names tell the log's lines apart.
    pub(super) fn server(name: &str) -> Self {
        Self::start(name, Role::Server { mode: 0o600 })
    }

    pub(super) fn start(name: &str, role: Role) -> Self {
        watch_log();
        let folder = tempfile::tempdir().unwrap();
        let function = Arc::new(FakeFunction::default());
        let settings = VhostUserSettings { function: name.to_owned(), socket: folder.path().join("f.sock"), role };
        let link = VhostUserLink::start(settings, Arc::clone(&function) as Arc<dyn FunctionSide>, None).unwrap();
        Self { link, function, name: name.to_owned(), folder }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("f.sock")
    }

    /// A front end of our own, with a MiB of memory from address 0x10000.
    pub(super) fn connect(&self, wanted: u64) -> Guest {
        let memory = Arc::new(GuestMemory::new(0x1_0000, 1 << 20).unwrap());
        let front_end = FrontEnd::connect(&self.socket(), wanted, Arc::clone(&memory)).unwrap();
        Guest { front_end, memory }
    }

    /// What the link has warned of, for this function.
    pub(super) fn warnings(&self) -> Vec<String> {
        let name = format!("function={}", self.name);
        let log = LOG.lock().unwrap();
        let text = String::from_utf8_lossy(&log);
        text.lines()
            .filter(|line| line.contains("WARN") && line.split(' ').any(|word| word.replace('"', "") == name))
            .map(str::to_owned)
            .collect()
    }
}

/// A front end and the memory that it shares.
pub(super) struct Guest {
    pub(super) front_end: FrontEnd,
    pub(super) memory: Arc<GuestMemory>,
}

impl Guest {
    /// A queue in the guest's memory.
    pub(super) fn queue(&self, size: u16) -> DriverQueue {
        let options = QueueOptions { size, features: self.front_end.accepted(), indirect: false };
        DriverQueue::new(&self.memory, options)
    }
}

/// Everything that was logged in this process.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Collects the log from now on. Links speak on threads of their own, so it is the process's.
fn watch_log() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let log = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::WARN);
        log.with_writer(|| LogWriter).init();
    });
}
