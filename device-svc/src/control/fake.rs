//! Functions and storage that do what a test tells them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::inventory::{Inventory, OpenBackend};
use super::seam::{FunctionRun, FunctionStarter, Notify, Standing, StartError};
use crate::backend::{BackendError, BlockBackend, BlockChannel, BlockInfo, PayloadPlace};
use crate::config::{BackendConfig, Config, FunctionConfig, LimitConfig, LimitGroupConfig};
use crate::metrics::{QueueCounters, ReactorCounters};
use crate::volume::Volume;

/// A function that stands as told.
pub(super) struct FakeFunction {
    pub(super) name: String,
    standing: Mutex<Standing>,
    notify: Notify,
    counters: Vec<Arc<QueueCounters>>,
    pub(super) stopped: AtomicBool,
    pub(super) resized: AtomicU64,
    pub(super) limit: Mutex<LimitConfig>,
    pub(super) group: Option<String>,
}

impl FakeFunction {
    pub(super) fn stand(&self, standing: Standing) {
        *self.standing.lock().unwrap() = standing.clone();
        (self.notify)(standing);
    }
}

impl FunctionRun for FakeFunction {
    fn standing(&self) -> Standing {
        self.standing.lock().unwrap().clone()
    }

    fn counters(&self) -> &[Arc<QueueCounters>] {
        &self.counters
    }

    fn resized(&self, size_bytes: u64) {
        self.resized.store(size_bytes, Ordering::Relaxed);
    }

    fn set_limit(&self, limit: &LimitConfig) {
        *self.limit.lock().unwrap() = limit.clone();
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        if self.standing() != Standing::Waiting {
            self.stand(Standing::Waiting);
        }
    }
}

/// Refuses functions called `refused` and `away`; those called `eager` are attached before they are created.
#[derive(Default)]
pub(super) struct FakeStarter {
    started: Mutex<Vec<Arc<FakeFunction>>>,
    reactor: Arc<ReactorCounters>,
}

impl FakeStarter {
    /// The latest function of that name.
    pub(super) fn function(&self, name: &str) -> Arc<FakeFunction> {
        let started = self.started.lock().unwrap();
        Arc::clone(started.iter().rev().find(|function| function.name == name).unwrap())
    }

    pub(super) fn reactor(&self) -> &ReactorCounters {
        &self.reactor
    }
}

impl FunctionStarter for FakeStarter {
    fn start(
        &self,
        config: &FunctionConfig,
        group: Option<&LimitGroupConfig>,
        _volume: Arc<Volume>,
        notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError> {
        match config.name.as_str() {
            "refused" => return Err(StartError::Refused("its socket is in use".to_owned())),
            "away" => return Err(StartError::Unavailable("its server is away".to_owned())),
            _ => {}
        }
        let function = Arc::new(FakeFunction {
            name: config.name.clone(),
            standing: Mutex::new(Standing::Waiting),
            notify,
            counters: (0..config.queues).map(|_| Arc::default()).collect(),
            stopped: AtomicBool::new(false),
            resized: AtomicU64::new(0),
            limit: Mutex::new(config.limit.clone()),
            group: group.map(|group| group.name.clone()),
        });
        if config.name == "eager" {
            function.stand(Standing::Attached { running: 1 });
        }
        self.started.lock().unwrap().push(Arc::clone(&function));
        Ok(function)
    }

    fn reactors(&self) -> Vec<Arc<ReactorCounters>> {
        vec![Arc::clone(&self.reactor)]
    }
}

struct FakeBackend {
    size_bytes: AtomicU64,
}

impl BlockBackend for FakeBackend {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            size_bytes: self.size_bytes.load(Ordering::Relaxed),
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            volatile_cache: true,
            discard: true,
            write_zeroes: true,
            discard_alignment_bytes: 4096,
            payload: PayloadPlace::Card,
            channels_max: 1,
        }
    }

    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError> {
        Err(BackendError::Refused("a fake has no channels".to_owned()))
    }

    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        Ok(size_bytes)
    }
}

/// Opens null volumes; a file cannot be reached.
pub(super) fn open_fake() -> OpenBackend {
    Box::new(|config| match &config.backend {
        BackendConfig::Null { size_bytes } | BackendConfig::Ram { size_bytes } => {
            Ok(Arc::new(FakeBackend { size_bytes: AtomicU64::new(*size_bytes) }))
        }
        _ => Err(BackendError::Unavailable("the server is away".to_owned())),
    })
}

/// An empty inventory over fakes.
pub(super) fn inventory() -> (Arc<Inventory>, Arc<FakeStarter>) {
    let starter = Arc::new(FakeStarter::default());
    let for_inventory: Arc<dyn FunctionStarter> = Arc::clone(&starter) as Arc<dyn FunctionStarter>;
    (Arc::new(Inventory::new(for_inventory, open_fake())), starter)
}

/// Volumes `v` (read-write) and `w` (read-only), group `gold`, and functions of these names on `w`.
pub(super) fn config(functions: &[&str]) -> Config {
    let mut text = "[[limit-group]]\nname = \"gold\"\niops = 10\n\
        [[volume]]\nname = \"v\"\nbackend = { type = \"null\", size = \"1M\" }\n\
        [[volume]]\nname = \"w\"\nbackend = { type = \"null\", size = \"2M\" }\nread-only = true\n"
        .to_owned();
    for name in functions {
        text.push_str(&format!(
            "[[function]]\nname = \"{name}\"\ntype = \"blk\"\nvolume = \"w\"\nlimit-group = \"gold\"\nqueues = 2\n\
             link = {{ type = \"vhost-user\", socket = \"/tmp/{name}.sock\" }}\n"
        ));
    }
    Config::parse(&text, "test", Path::new("/")).unwrap()
}
