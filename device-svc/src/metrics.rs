//! What the card counts: one block of counters per queue and per reactor, written by one thread, read by any.
//!
//! A counter has one writer, so adding is a plain load and store, without the bus lock that a shared counter would cost
//! on every request. Each block is padded to its own cache lines, so that two reactors never share one.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter or gauge with one writer.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds. Only the owning thread may call this.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// Sets. Only the owning thread may call this.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Raises to `value` if that is more. Only the owning thread may call this.
    #[inline]
    pub fn raise(&self, value: u64) {
        if value > self.get() {
            self.set(value);
        }
    }

    /// The value, from any thread.
    #[inline]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the latency histogram's buckets are powers of two of 1 µs: 1 µs, 2 µs, … 2^22 µs (4.2 s), and above.
pub const LATENCY_BUCKETS: usize = 24;

/// A histogram of latencies in powers of two of a microsecond.
#[derive(Default, Debug)]
pub struct LatencyHistogram {
    /// How many fell into each bucket: bucket `i` holds latencies of at most 2^i µs, the last one all above.
    pub buckets: [Counter; LATENCY_BUCKETS],
    /// Sum of all, nanoseconds.
    pub sum_ns: Counter,
}

impl LatencyHistogram {
    /// Records one latency.
    #[inline]
    pub fn record(&self, latency_ns: u64) {
        let bucket = (64 - (latency_ns.saturating_sub(1) / 1000).leading_zeros()) as usize;
        self.buckets[bucket.min(LATENCY_BUCKETS - 1)].add(1);
        self.sum_ns.add(latency_ns);
    }
}

/// The kinds of request that are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum RequestKind {
    /// `VIRTIO_BLK_T_IN`.
    Read,
    /// `VIRTIO_BLK_T_OUT`.
    Write,
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`.
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    WriteZeroes,
    /// `VIRTIO_BLK_T_GET_ID` and what is not known.
    Other,
}

impl RequestKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 6] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes, Self::Other];

    /// The kind's name in metrics and statistics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::Other => "other",
        }
    }
}

/// Why a frame was not carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum DropReason {
    /// Longer than the MTU allows, or than the buffer that the guest put out for it, or than any frame can be.
    TooLong,
    /// No Ethernet header, or a header before it (virtio-net's or a tunnel's) that promises more than the frame holds, was not
    /// negotiated or is not known. Received by a switch: VLAN tags that the port cannot have.
    BadHeader,
    /// Received: to another address or VLAN than the guest's receive mode lets in, or by a tunnel and of another network.
    NotForUs,
    /// A checksum to compute or a packet to cut where neither the other side nor the card can.
    Offload,
    /// The link is down: it was set so, or the uplink has no carrier.
    LinkDown,
    /// Sent: the uplink had no room, or took the frame, or one of several copies of it, and could do nothing with it.
    UplinkFull,
    /// Sent: it comes from an address or is in a VLAN that is not the guest's (`anti-spoofing`). Received by a tunnel: from an end
    /// point that is not believed.
    Spoofed,
    /// Received: the guest had put out no buffers, and what waits for it on the card was full.
    NoBuffers,
}

impl DropReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::TooLong,
        Self::BadHeader,
        Self::NotForUs,
        Self::Offload,
        Self::LinkDown,
        Self::UplinkFull,
        Self::Spoofed,
        Self::NoBuffers,
    ];

    /// The reason's name in metrics and statistics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::BadHeader => "bad_header",
            Self::NotForUs => "not_for_us",
            Self::Offload => "offload",
            Self::LinkDown => "link_down",
            Self::UplinkFull => "uplink_full",
            Self::Spoofed => "spoofed",
            Self::NoBuffers => "no_buffers",
        }
    }
}

/// What a queue of a network interface is for (virtio 1.3, 5.1.2): pairs of a receive and a transmit queue, then the control queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NetQueue {
    /// Frames to the guest, of this pair.
    Receive(u16),
    /// Frames from the guest, of this pair.
    Transmit(u16),
    /// The guest's commands.
    Control,
}

impl NetQueue {
    /// The use of queue `index` where there are so many pairs.
    #[must_use]
    pub const fn of(index: u16, pairs: u16) -> Self {
        match (index / 2, index % 2) {
            (pair, _) if pair >= pairs => Self::Control,
            (pair, 0) => Self::Receive(pair),
            (pair, _) => Self::Transmit(pair),
        }
    }

    /// Its name in statistics, as `ethtool -S` has it.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Receive(pair) => format!("rx_queue_{pair}"),
            Self::Transmit(pair) => format!("tx_queue_{pair}"),
            Self::Control => "control_queue".to_owned(),
        }
    }
}

/// What one receive or transmit queue of a network interface counts of its frames.
#[derive(Default, Debug)]
pub struct NetCounters {
    /// Frames carried: given to the guest, or taken from it and given to the uplink. One that the other side has still to cut counts
    /// as one.
    pub packets: Counter,
    /// Their bytes, from the Ethernet header on.
    pub bytes: Counter,
    /// Of them, those to all.
    pub broadcasts: Counter,
    /// Of them, those to a group but not to all.
    pub multicasts: Counter,
    /// Of them, those whose checksum the other side has to compute.
    pub undone_checksums: Counter,
    /// Of them, those that the other side has to cut.
    pub undone_segmentations: Counter,
    /// Frames not carried.
    pub drops: Drops,
}

/// Frames not carried, by reason.
#[derive(Default, Debug)]
pub struct Drops([Counter; DropReason::ALL.len()]);

impl Drops {
    /// Counts frames. Only the owning thread may call this.
    #[inline]
    pub fn add(&self, reason: DropReason, frames: u64) {
        self.0[reason as usize].add(frames);
    }

    /// How many there were for this reason, from any thread.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].get()
    }
}

/// What one queue of one function counts. Lives as long as the function, over any number of starts of the queue.
#[derive(Default, Debug)]
#[repr(align(128))]
pub struct QueueCounters {
    /// Completed requests, by [`RequestKind`].
    pub requests: [Counter; 6],
    /// Payload bytes of them, by [`RequestKind`].
    pub bytes: [Counter; 6],
    /// Of them, those with a status other than OK.
    pub errors: Counter,
    /// Requests popped and not yet completed (a gauge).
    pub in_flight: Counter,
    /// Of them, those held because the server is away (a gauge).
    pub held: Counter,
    /// Requests that waited for a limit.
    pub throttled: Counter,
    /// Interrupts raised.
    pub interrupts: Counter,
    /// Doorbells taken.
    pub doorbells: Counter,
    /// From popped to completed.
    pub latency: LatencyHistogram,
    /// DMA copies towards the card.
    pub dma_reads: Counter,
    /// DMA copies towards the host.
    pub dma_writes: Counter,
    /// Bytes copied towards the card.
    pub dma_read_bytes: Counter,
    /// Bytes copied towards the host.
    pub dma_write_bytes: Counter,
    /// Polls of the ring that found nothing.
    pub dma_empty_polls: Counter,
    /// Ranges lent in place.
    pub dma_lent: Counter,
    /// Bytes lent in place.
    pub dma_lent_bytes: Counter,
    /// Of a network interface: its frames.
    pub net: NetCounters,
}

/// What one reactor counts.
#[derive(Default, Debug)]
#[repr(align(128))]
pub struct ReactorCounters {
    /// Turns in which some lane or channel had work.
    pub turns_busy: Counter,
    /// Turns that found nothing.
    pub turns_idle: Counter,
    /// Time in busy turns, nanoseconds.
    pub busy_ns: Counter,
    /// Time in idle turns, nanoseconds.
    pub idle_ns: Counter,
    /// Time asleep, nanoseconds.
    pub asleep_ns: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
    /// The longest turn, nanoseconds.
    pub turn_ns_max: Counter,
    /// Lanes it turns (a gauge).
    pub lanes: Counter,
}
