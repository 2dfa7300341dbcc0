//! The load, on the CPU that the caller is pinned to: clients of block functions, and what memory itself can do.
#![expect(unsafe_code, reason = "huge pages under a plain copy, as the ram backend has them")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use device_svc::driver::client::{Access, Attached, Client, ClientSettings, Load, Through};
use device_svc::driver::latency::Latencies;

/// What is accessed at random, bytes.
pub(crate) const SPAN_BYTES: u64 = 256 << 20;
/// Of each request.
pub(crate) const REQUEST_BYTES: u32 = 4096;
/// Entries of the longest queue: qemu-storage-daemon takes 1024.
pub(crate) const QUEUE_SIZE_MAX: u16 = 512;

/// What a load showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    /// Requests per second.
    pub(crate) iops: f64,
    /// Median latency, ns; at depth 1 only.
    pub(crate) median_ns: f64,
    /// Doorbells that were rung.
    pub(crate) rings: f64,
    /// Messages that went over the socket.
    pub(crate) messages: f64,
}

/// A load on one function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockLoad {
    pub(crate) through: Through,
    pub(crate) access: Access,
    pub(crate) depth: u32,
    pub(crate) indirect: bool,
    pub(crate) duration: Duration,
}

impl BlockLoad {
    /// Reads with direct chains.
    pub(crate) const fn reads(depth: u32, duration: Duration) -> Self {
        Self { through: Through::VhostUser, access: Access::Read, depth, indirect: false, duration }
    }

    /// Runs it, after a short one that warms both sides up.
    pub(crate) fn run(&self, socket: &Path) -> Result<Shown> {
        let (through, indirect) = (self.through, self.indirect);
        let mut client = connect(socket, ClientSettings { through, indirect, ..settings(self.depth) })?;
        let timed = self.depth == 1;
        let mut load = Load { access: self.access, span_bytes: SPAN_BYTES, duration: self.duration / 10, timed };
        client.run(&load)?;
        load.duration = self.duration;
        let (rings, messages) = (client.events().rings(), messages(&mut client));
        let done = client.run(&load)?;
        ensure!(done.errors == 0, "{} of {} requests failed", done.errors, done.requests);
        let rings = client.events().rings() - rings;
        let messages = self::messages(&mut client) - messages;
        client.leave()?;
        let median_ns = done.latencies.at_share(0.5) as f64;
        Ok(Shown { iops: done.iops(), median_ns, rings: rings.into(), messages: messages as f64 })
    }
}

/// Messages that a client has sent; over vhost-user they are not counted.
fn messages(client: &mut Client) -> u64 {
    match client.front_end() {
        Attached::VhostUser(_) => 0,
        Attached::VfioUser(device) => device.messages_sent(),
    }
}

/// A client's settings for a depth: three descriptors make a request, and all of them fit the queue.
pub(crate) fn settings(depth: u32) -> ClientSettings {
    let queue_size = if 3 * depth > 256 { QUEUE_SIZE_MAX } else { 256 };
    ClientSettings { depth, queue_size, ..ClientSettings::default() }
}

/// Connects; a server that was woken just now may take a moment.
pub(crate) fn connect(socket: &Path, settings: ClientSettings) -> Result<Client> {
    Client::connect(socket, settings).with_context(|| socket.display().to_string())
}

/// The 99th percentile of depth 1 at `quiet`, ns, while depth 128 floods `noisy` from the same thread. The flood is tended
/// between looks at the quiet queue, a few requests at a time, so that what is measured is the server's fairness.
pub(crate) fn p99_beside(through: Through, quiet: &Path, noisy: Option<&Path>, duration: Duration) -> Result<f64> {
    const FLOOD: u32 = 128;
    let mut one = connect(quiet, ClientSettings { through, ..ClientSettings::default() })?;
    let mut flood = noisy.map(|socket| connect(socket, ClientSettings { through, ..settings(FLOOD) })).transpose()?;
    let mut seed = 1u64;
    let mut sector = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((seed >> 32) * (SPAN_BYTES / u64::from(REQUEST_BYTES))) >> 32) * 8
    };
    if let Some(flood) = &mut flood {
        for row in 0..FLOOD {
            flood.queue().read(row, sector(), REQUEST_BYTES);
        }
        flood.publish();
    }
    let mut latencies = Latencies::default();
    let start = Instant::now();
    let mut sent_ns = 0;
    one.queue().read(0, sector(), REQUEST_BYTES);
    one.publish();
    loop {
        if let Some(ended) = one.queue().take_ended() {
            let now_ns = start.elapsed().as_nanos() as u64;
            ensure!(ended.status == 0, "a read failed");
            latencies.record(now_ns - sent_ns);
            if now_ns > duration.as_nanos() as u64 {
                break;
            }
            sent_ns = now_ns;
            one.queue().read(0, sector(), REQUEST_BYTES);
            one.publish();
        } else if start.elapsed() > duration + Duration::from_secs(10) {
            bail!("the quiet queue starves");
        }
        if let Some(flood) = &mut flood {
            let mut taken = 0;
            while taken < 4
                && let Some(ended) = flood.queue().take_ended()
            {
                flood.queue().read(ended.row, sector(), REQUEST_BYTES);
                taken += 1;
            }
            if taken > 0 {
                flood.publish();
            }
        }
    }
    if let Some(mut flood) = flood {
        while flood.queue().in_flight() > 0 {
            flood.wait()?;
        }
        flood.leave()?;
    }
    one.leave()?;
    Ok(latencies.at_share(0.99) as f64)
}

/// Memory for [`copies_per_second`].
pub(crate) struct Span(std::ptr::NonNull<u8>);

impl Span {
    /// Memory of [`SPAN_BYTES`], written once, in huge pages where the kernel gives them.
    pub(crate) fn new() -> Result<Self> {
        use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};
        let length = std::num::NonZeroUsize::new(SPAN_BYTES as usize).context("a span has bytes")?;
        // SAFETY: a new private mapping, which nothing else knows of.
        let memory =
            unsafe { mmap_anonymous(None, length, ProtFlags::all() & !ProtFlags::PROT_EXEC, MapFlags::MAP_PRIVATE)? };
        // SAFETY: the mapping just made; advice changes no content.
        unsafe { madvise(memory, length.get(), MmapAdvise::MADV_HUGEPAGE)? };
        // SAFETY: the whole of it, writable.
        unsafe { memory.cast::<u8>().write_bytes(1, length.get()) };
        Ok(Self(memory.cast()))
    }

    const fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, written, and never written again while `self` lives.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), SPAN_BYTES as usize) }
    }

    /// How often a second this CPU copies 4 KiB from a random place of the span into one of 32 buffers.
    pub(crate) fn copies_per_second(&self, duration: Duration) -> f64 {
        let bytes = self.bytes();
        let mut buffers = vec![0u8; 32 * REQUEST_BYTES as usize];
        let mut seed = 1u64;
        let mut copies = 0u64;
        let start = Instant::now();
        while start.elapsed() < duration {
            for buffer in buffers.chunks_exact_mut(REQUEST_BYTES as usize) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (((seed >> 32) * (SPAN_BYTES / u64::from(REQUEST_BYTES))) >> 32) as usize * buffer.len();
                buffer.copy_from_slice(&bytes[at..at + buffer.len()]);
            }
            std::hint::black_box(&mut buffers);
            copies += 32;
        }
        copies as f64 / start.elapsed().as_secs_f64()
    }
}

// SAFETY: memory of this process, only read.
unsafe impl Sync for Span {}
