//! Quick in-process measurement while building.
#![allow(clippy::unwrap_used, missing_docs)]
use device_svc::backend::null::*;
use device_svc::config::*;
use device_svc::control::function::*;
use device_svc::driver::block::BlockQueue;
use device_svc::driver::vhost_user::FrontEnd;
use device_svc::driver::{GuestMemory, QueueOptions};
use device_svc::link::FunctionSide;
use device_svc::link::vhost_user::*;
use device_svc::reactor::Reactors;
use device_svc::virtqueue::features;
use std::sync::Arc;
use std::time::Instant;

fn main() {
    tracing_subscriber::fmt().with_env_filter("info").init();
    let kind = std::env::args().nth(1).unwrap_or("null".into());
    let packed = std::env::args().nth(2).is_some_and(|a| a == "packed");
    let copy = std::env::args().nth(3).is_some_and(|a| a == "copy");
    let text = format!(
        r#"
[reactors]
count = 1
poll = "always"
[[volume]]
name = "v"
backend = {{ type = "{kind}", size = "256M" }}
[[function]]
name = "f"
type = "blk"
link = {{ type = "vhost-user", socket = "/tmp/quick.sock", payload = "{}" }}
volume = "v"
queues = 1
queue-size = 256
"#,
        if copy { "copy" } else { "in-place" }
    );
    let config = Config::parse(&text, "quick", std::path::Path::new("/tmp")).unwrap();
    let backend: Arc<dyn device_svc::backend::BlockBackend> = if kind == "null" {
        Arc::new(NullBackend::new(&NullSettings { size_bytes: 256 << 20, read_only: false }).unwrap())
    } else {
        Arc::new(
            device_svc::backend::ram::RamBackend::new(&device_svc::backend::ram::RamSettings {
                size_bytes: 256 << 20,
                read_only: false,
            })
            .unwrap(),
        )
    };
    let volume = device_svc::volume::Volume::new(&config.volumes[0], backend);
    let reactors = Arc::new(Reactors::start(&config.reactors).unwrap());
    let f = BlkFunction::new(
        &config.functions[0],
        &volume,
        None,
        Arc::clone(&reactors),
        start_courier().unwrap(),
        Box::new(|_| {}),
    )
    .unwrap();
    let side: Arc<dyn FunctionSide> = Arc::new(Arc::clone(&f));
    let _link = VhostUserLink::start(
        VhostUserSettings {
            function: "f".into(),
            socket: "/tmp/quick.sock".into(),
            role: Role::Server { mode: 0o600 },
        },
        side,
    )
    .unwrap();
    core_affinity::set_for_current(core_affinity::CoreId { id: 1 });
    for depth in [1u32, 32, 128] {
        let memory = Arc::new(GuestMemory::new(0, 64 << 20).unwrap());
        let wanted = features::EVENT_INDEX | features::INDIRECT | if packed { features::RING_PACKED } else { 0 };
        let mut fe = FrontEnd::connect(std::path::Path::new("/tmp/quick.sock"), wanted, Arc::clone(&memory)).unwrap();
        let indirect = std::env::args().any(|a| a == "indirect");
        let mut q =
            BlockQueue::new(&memory, QueueOptions { size: 256, features: fe.accepted(), indirect }, depth, 4096);
        q.queue().want_interrupts(false);
        let ev = fe.start_queue(0, 256, q.queue()).unwrap();
        let start = Instant::now();
        let mut done = 0u64;
        let mut seed = 1u64;
        let mut next = |q: &mut BlockQueue, row: u32| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let s = (seed >> 33) % 65536 * 8;
            q.read(row, s, 4096);
        };
        for row in 0..depth {
            next(&mut q, row);
        }
        if q.publish() {
            ev.ring();
        }
        while start.elapsed().as_millis() < 2000 {
            for _ in 0..64 {
                let mut n = 0;
                while n < 32
                    && let Some(e) = q.take_ended()
                {
                    debug_assert_eq!(e.status, 0);
                    next(&mut q, e.row);
                    done += 1;
                    n += 1;
                }
                if n > 0 && q.publish() {
                    ev.ring();
                }
            }
        }
        let secs = start.elapsed().as_secs_f64();
        let c = &f.counters()[0];
        println!(
            "{kind} packed={packed} copy={copy} indirect={indirect} depth {depth}: {:.0} kIOPS {:.1} ns/io; dma/io {:.2}",
            done as f64 / secs / 1e3,
            secs * 1e9 / done as f64,
            (c.dma_reads.get() + c.dma_writes.get()) as f64 / done as f64
        );
        fe.stop_queue(0).unwrap();
    }
}
