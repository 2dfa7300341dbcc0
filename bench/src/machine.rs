//! The machine: which CPUs there are, how far apart they stand, and what a process uses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use device_svc::reactor::available_cpus;

/// One CPU for the server, one for the load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpus {
    pub(crate) server: usize,
    pub(crate) load: usize,
}

impl Cpus {
    /// The first two CPUs that this process may use.
    pub(crate) fn find() -> Result<Self> {
        match available_cpus()?.as_slice() {
            [server, load, ..] => Ok(Self { server: *server, load: *load }),
            _ => bail!("server and load need a CPU each, and this process may use one only"),
        }
    }

    /// Runs `work` on a thread pinned to the server's CPU; processes that it starts inherit the place.
    pub(crate) fn on_server<T: Send>(self, work: impl FnOnce() -> T + Send) -> T {
        on_cpu(self.server, work)
    }

    /// The same on the load's CPU.
    pub(crate) fn on_load<T: Send>(self, work: impl FnOnce() -> T + Send) -> T {
        on_cpu(self.load, work)
    }
}

fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            pin(cpu);
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Pins this thread.
pub(crate) fn pin(cpu: usize) {
    if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
        eprintln!("bench: could not pin a thread to CPU {cpu}; the figures mean little");
    }
}

/// Two CPUs that exchange nothing else in this line.
#[repr(align(128))]
struct Line(AtomicU32);

const CHUNKS: u32 = 41;
const ROUNDS: u32 = 200;

/// A cache line's round trip between the two CPUs, ns. Such machines' virtual CPUs move, and each place has its own figure;
/// what runs on two CPUs runs at the speed of this. The caller is on the load's CPU; the server must not run.
pub(crate) fn round_trip_ns(cpus: Cpus) -> f64 {
    let ball = Arc::new(Line(AtomicU32::new(0)));
    let far = Arc::clone(&ball);
    let helper = std::thread::spawn(move || {
        pin(cpus.server);
        for round in 0..CHUNKS * ROUNDS {
            while far.0.load(Ordering::Acquire) != 2 * round + 1 {
                std::hint::spin_loop();
            }
            far.0.store(2 * round + 2, Ordering::Release);
        }
    });
    let mut chunks = Vec::new();
    for chunk in 0..CHUNKS {
        let start = Instant::now();
        for round in chunk * ROUNDS..(chunk + 1) * ROUNDS {
            ball.0.store(2 * round + 1, Ordering::Release);
            while ball.0.load(Ordering::Acquire) != 2 * round + 2 {
                std::hint::spin_loop();
            }
        }
        chunks.push(start.elapsed().as_nanos() as f64 / f64::from(ROUNDS));
    }
    // It has played its last round, or this thread would still wait.
    let _ = helper.join();
    chunks.sort_by(f64::total_cmp);
    chunks[chunks.len() / 2]
}

/// How long the threads of a process have run, ns.
pub(crate) fn cpu_ns(process: u32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread that ends meanwhile has nothing more to say.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
        sum += text.split(' ').next().and_then(|first| first.parse::<u64>().ok()).context("schedstat has numbers")?;
    }
    Ok(sum)
}

/// Resident memory of a process without that of the VMs it serves, bytes.
pub(crate) fn resident_bytes(process: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let mut sum_kib = 0;
    let mut is_guest = false;
    for line in text.lines() {
        match line.split_once(':') {
            Some(("Rss", size)) if !is_guest => {
                let size = size.trim().trim_end_matches(" kB");
                sum_kib += size.parse::<u64>().context("smaps has sizes in kB")?;
            }
            // The head of a mapping: its range comes first, its name last.
            _ if line.split(' ').next().is_some_and(|range| range.contains('-')) => {
                is_guest = line.contains("/memfd:guest");
            }
            _ => {}
        }
    }
    Ok(sum_kib << 10)
}

/// The load average of the last minute, to see whether others ran.
pub(crate) fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// The processor's name.
pub(crate) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}
