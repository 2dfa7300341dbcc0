//! Functions and storage that do what a test tells them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::inventory::{Inventory, OpenBackend, OpenUplink};
use super::seam::{Backing, FunctionRun, FunctionStarter, Notify, SetError, Standing, StartError};
use crate::backend::net::{Carrier, NetBackend, NetChannel, NetInfo, Offloads};
use crate::backend::{BackendError, BlockBackend, BlockChannel, BlockInfo, PayloadPlace};
use crate::config::{
    BackendConfig, Config, DeviceConfig, FunctionConfig, LimitConfig, LimitGroupConfig, NetChange, UplinkBackendConfig,
};
use crate::metrics::{QueueCounters, ReactorCounters};

/// A function that stands as told.
pub(super) struct FakeFunction {
    pub(super) name: String,
    standing: Mutex<Standing>,
    notify: Notify,
    counters: Vec<Arc<QueueCounters>>,
    pub(super) stopped: AtomicBool,
    pub(super) resized: AtomicU64,
    /// The limit that was set last, of a disk.
    pub(super) limit: Mutex<LimitConfig>,
    /// The changes of a network interface.
    pub(super) changes: Mutex<Vec<NetChange>>,
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

    /// Refuses an MTU of 1000.
    fn set_net(&self, change: &NetChange) -> Result<(), SetError> {
        if change.mtu == Some(1000) {
            return Err(SetError::Refused("its driver holds on to its MTU".to_owned()));
        }
        self.changes.lock().unwrap().push(change.clone());
        Ok(())
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
        backing: Backing,
        notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError> {
        match config.name.as_str() {
            "refused" => return Err(StartError::Refused("its socket is in use".to_owned())),
            "away" => return Err(StartError::Unavailable("its server is away".to_owned())),
            _ => {}
        }
        match (&config.device, &backing) {
            (DeviceConfig::Blk(blk), Backing::Volume(volume)) => assert_eq!(blk.volume, volume.name),
            (DeviceConfig::Net(net), Backing::Uplink(uplink)) => assert_eq!(net.uplink, uplink.name),
            _ => panic!("{:?} does not suit its backing", config.device),
        }
        let function = Arc::new(FakeFunction {
            name: config.name.clone(),
            standing: Mutex::new(Standing::Waiting),
            notify,
            counters: (0..config.queues()).map(|_| Arc::default()).collect(),
            stopped: AtomicBool::new(false),
            resized: AtomicU64::new(0),
            limit: Mutex::default(),
            changes: Mutex::default(),
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

/// A network of taps for one function each, that carries 1450 bytes.
struct FakeNetwork {
    carrier: Arc<Carrier>,
    functions_max: usize,
}

impl NetBackend for FakeNetwork {
    fn info(&self) -> NetInfo {
        NetInfo {
            mtu_max: 1450,
            transmit: Offloads::ALL,
            receive: Offloads::NONE,
            channels_max: 4,
            functions_max: self.functions_max,
        }
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Err(BackendError::Refused("a fake has no channels".to_owned()))
    }
}

/// Opens networks with this carrier: `null` for any number of functions, `loopback` for one; a tap cannot be reached.
pub(super) fn open_fake_network(carrier: &Arc<Carrier>) -> OpenUplink {
    let carrier = Arc::clone(carrier);
    Box::new(move |config, _| {
        let functions_max = match &config.backend {
            UplinkBackendConfig::Null => usize::MAX,
            UplinkBackendConfig::Loopback => 1,
            UplinkBackendConfig::Vxlan(_) | UplinkBackendConfig::Geneve(_) => 1,
            UplinkBackendConfig::Switch { .. } => 2,
            _ => return Err(BackendError::Refused("the kernel has no taps".to_owned())),
        };
        Ok(Arc::new(FakeNetwork { carrier: Arc::clone(&carrier), functions_max }))
    })
}

/// An empty inventory over fakes.
pub(super) fn inventory() -> (Arc<Inventory>, Arc<FakeStarter>) {
    inventory_with(&Arc::new(Carrier::new(true)))
}

/// An empty inventory over fakes, whose networks have this carrier.
pub(super) fn inventory_with(carrier: &Arc<Carrier>) -> (Arc<Inventory>, Arc<FakeStarter>) {
    let starter = Arc::new(FakeStarter::default());
    let for_inventory: Arc<dyn FunctionStarter> = Arc::clone(&starter) as Arc<dyn FunctionStarter>;
    (Arc::new(Inventory::new(for_inventory, open_fake(), open_fake_network(carrier))), starter)
}

/// Volumes `v` (read-write) and `w` (read-only), group `gold`, uplinks `any` and `one`, and functions of these names: those that
/// begin with `net` on `any` over vfio-user, the others on `w` over vhost-user.
pub(super) fn config(functions: &[&str]) -> Config {
    let mut text = "[[limit-group]]\nname = \"gold\"\niops = 10\n\
        [[volume]]\nname = \"v\"\nbackend = { type = \"null\", size = \"1M\" }\n\
        [[volume]]\nname = \"w\"\nbackend = { type = \"null\", size = \"2M\" }\nread-only = true\n\
        [[uplink]]\nname = \"any\"\nbackend = { type = \"null\" }\n\
        [[uplink]]\nname = \"one\"\nbackend = { type = \"loopback\" }\n"
        .to_owned();
    for name in functions {
        let (device, link) = if name.starts_with("net") {
            ("type = \"net\"\nuplink = \"any\"\nmtu = 1400\n", "vfio-user")
        } else {
            ("type = \"blk\"\nvolume = \"w\"\nlimit-group = \"gold\"\nqueues = 2\n", "vhost-user")
        };
        text.push_str(&format!(
            "[[function]]\nname = \"{name}\"\n{device}\
             link = {{ type = \"{link}\", socket = \"/tmp/{name}.sock\" }}\n"
        ));
    }
    Config::parse(&text, "test", Path::new("/")).unwrap()
}
