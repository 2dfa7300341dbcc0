//! A driver's commands to a network function, of any bytes: each is answered, one that is refused changes nothing, and what the
//! function goes by afterwards is within its bounds.
#![no_main]

use std::sync::Arc;

use device_svc::backend::net::NetBackend;
use device_svc::backend::net::loopback::LoopbackBackend;
use device_svc::clock::Moment;
use device_svc::device::net::{AntiSpoofing, ControlLane, NetSettings, NetShared};
use device_svc::device::{FaultReport, Lane, NetLane};
use device_svc::dma::CopyEngine;
use device_svc::driver::QueueOptions;
use device_svc::driver::net::CommandQueue;
use device_svc::link::{QueuePosition, QueueStart};
use device_svc::virtqueue::features;
use fuzz::{Choices, Faults, Silent, memory, tables};
use libfuzzer_sys::fuzz_target;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const COMMANDS_MAX: usize = 16;
const DATA_BYTES_MAX: usize = 6000;
/// Time from one turn to the next: as long as a lane may make its driver wait.
const STEP_NS: u64 = 10_000_000;

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Choices(bytes);
    let flags = choices.byte();
    let pairs = 1 + u16::from(flags >> 4 & 3);
    let keeps_its_address = flags & 8 != 0;
    let settings = NetSettings {
        mac: MAC,
        mtu: 1500,
        pairs,
        queue_size_max: 64,
        packed: true,
        control: true,
        copy_payload: false,
        rss: flags & 4 != 0,
        anti_spoofing: keeps_its_address.then(|| AntiSpoofing { mac: true, vlans: None, addresses: None }),
        limits: Vec::new(),
    };
    let shared = Arc::new(NetShared::new(settings, LoopbackBackend::new().info(), true));
    let ring = if flags & 1 != 0 { features::RING_PACKED } else { 0 };
    // Anything but the ring's own features may be missing.
    let wanted = if flags & 2 != 0 { u64::MAX } else { choices.long() };
    let rings = features::RING_PACKED | features::EVENT_INDEX | features::IN_ORDER | features::INDIRECT;
    let accepted = shared.offered_features() & wanted & !rings | ring | features::VERSION_1;
    let memory = memory();
    let table = &tables(&memory)[0];
    let mut queue = CommandQueue::new(&memory, QueueOptions { size: 16, features: accepted, indirect: false });
    let at = queue.queue().addresses();
    let start = QueueStart {
        index: 2 * pairs,
        size: 16,
        descriptors: at.descriptors,
        driver: at.driver,
        device: at.device,
        position: QueuePosition::fresh(ring != 0),
        features: accepted,
        port: Box::new(Silent),
        inflight: None,
        is_resumed: false,
    };
    let faults = Arc::new(Faults::default());
    let report = Arc::clone(&faults) as Arc<dyn FaultReport>;
    let engine = |card| CopyEngine::new(card, Arc::clone(table));
    let mut lane =
        ControlLane::new(start, Arc::clone(&shared), Arc::default(), report, engine).expect("there is card memory");
    for turn in 0..COMMANDS_MAX {
        if choices.is_empty() {
            break;
        }
        let (class, command) = (choices.byte(), choices.byte());
        let count = usize::from(choices.short()) % DATA_BYTES_MAX;
        let before = shared.chosen();
        assert!(queue.command(class, command, choices.bytes(count)), "one at a time has room");
        queue.queue().publish();
        for step in 0..4 {
            let now = Moment((turn * 4 + step) as u64 * STEP_NS);
            lane.turn(now, 32, None);
            lane.finish_turn(now);
        }
        let after = shared.chosen();
        match queue.answer().expect("it is answered") {
            0 => {
                assert!((1..=pairs).contains(&after.pairs));
                assert!(!keeps_its_address || shared.mac() == MAC);
                let _ = after.filter.brings(choices.0);
            }
            1 => assert_eq!(before, after, "what is refused changes nothing"),
            other => panic!("answered by {other}"),
        }
    }
    assert_eq!(faults.count(), 0, "no command is the queue's fault");
});
