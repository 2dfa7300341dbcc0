//! virtio-blk (virtio 1.3, 5.2): features, configuration space, and what all queues of a function share.

mod lane;
mod request;
mod row;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_blk as spec;
use zerocopy::{Immutable, IntoBytes};

use super::limit::Limit;
use super::{AnyLane, Device, LanePlace};
use crate::backend::{BlockInfo, PayloadPlace};
use crate::dma::{CopyEngine, DistantEngine};
use crate::link::QueueStart;
use crate::mirror::Reach;
use crate::virtqueue::features;

pub use lane::{BlkLane, lane_card_layout};

/// Bytes of a sector: the unit of every offset in virtio-blk, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Ranges in one discard or write-zeroes request.
pub const RANGES_MAX: u32 = 16;
/// Bytes in one range of a discard or write-zeroes request: 1 GiB, which no driver finds small.
const RANGE_SECTORS_MAX: u32 = (1 << 30) / 512;
/// Data buffers of one request, with payload in place.
const IN_PLACE_SEGMENTS: u32 = 254;
/// Data buffers of one request, with payload through card memory.
const COPIED_SEGMENTS: u32 = 126;
/// Bytes of one data buffer, with payload through card memory: together at most 4 MiB less a little.
const COPIED_SEGMENT_BYTES: u32 = 32 << 10;
/// Bytes of one request, with payload in place.
const IN_PLACE_BYTES_MAX: u32 = 1 << 30;

/// What all queues of one virtio-blk function share: fixed, or changed by the control thread while they run.
#[derive(Debug)]
pub struct BlkShared {
    size_bytes: AtomicU64,
    write_back: AtomicBool,
    write_back_at_reset: bool,
    /// The logical block size, bytes.
    pub block_bytes: u32,
    physical_block_bytes: u32,
    discard_alignment_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Completed writes may be in a volatile cache.
    pub volatile_cache: bool,
    discard: bool,
    write_zeroes: bool,
    /// The guest's 20-byte serial, padded with zeroes.
    pub serial: [u8; 20],
    /// How long a request is held for a server that is away.
    pub io_timeout: Duration,
    /// Requests that were in flight when the service before this one died are issued again; else they end with an error.
    pub reissue: bool,
    /// Where payload is.
    pub payload: PayloadPlace,
    queues: u16,
    queue_size_max: u16,
    packed: bool,
    segments_max: u16,
    /// The function's own limit, then that of its group.
    pub limits: Vec<Arc<Limit>>,
}

/// How a function presents its volume.
#[derive(Clone, Debug)]
pub struct BlkSettings {
    /// Queues.
    pub queues: u16,
    /// The largest size of a queue.
    pub queue_size_max: u16,
    /// Whether packed rings are offered.
    pub packed: bool,
    /// Data buffers of one request at most.
    pub segments_max: u16,
    /// The logical block size shown, bytes, if not the volume's own; at least that.
    pub block_bytes: Option<u32>,
    /// Whether the write cache is on until the driver says otherwise.
    pub write_back: bool,
    /// Whether payload goes through card memory though it could stay in place.
    pub copy_payload: bool,
    /// Whether the guest must not write.
    pub read_only: bool,
    /// The 20-byte serial.
    pub serial: [u8; 20],
    /// How long a request is held for a server that is away.
    pub io_timeout: Duration,
    /// Whether requests that were in flight when the service before this one died are issued again; else they end with an error.
    pub reissue: bool,
    /// Limits, all of which a request must pass.
    pub limits: Vec<Arc<Limit>>,
}

/// `struct virtio_blk_config` up to what we offer (virtio 1.3, 5.2.4).
#[derive(IntoBytes, Immutable, Debug)]
#[repr(C)]
struct ConfigSpace {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    geometry: [u8; 4],
    block_bytes: u32,
    physical_block_exponent: u8,
    alignment_offset: u8,
    min_io_blocks: u16,
    opt_io_blocks: u32,
    write_back: u8,
    unused: u8,
    queues: u16,
    max_discard_sectors: u32,
    max_discard_segments: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_segments: u32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
    unused2: [u8; 4],
}

/// Bytes of the whole configuration space (virtio 1.3, 5.2.4, with the zoned fields).
const CONFIG_BYTES: usize = 96;
/// Where `writeback` is in the configuration space: the one field that a driver may write.
const WRITE_BACK_AT: u32 = 32;

impl BlkShared {
    /// How a volume like `info` is presented under these settings.
    #[must_use]
    pub fn new(settings: BlkSettings, info: &BlockInfo) -> Self {
        let payload = if settings.copy_payload { PayloadPlace::Card } else { info.payload };
        let block_bytes = settings.block_bytes.unwrap_or(info.block_bytes).max(info.block_bytes);
        Self {
            size_bytes: AtomicU64::new(info.size_bytes - info.size_bytes % u64::from(block_bytes)),
            write_back: AtomicBool::new(info.volatile_cache && settings.write_back),
            write_back_at_reset: settings.write_back,
            block_bytes,
            physical_block_bytes: info.physical_block_bytes.max(block_bytes),
            discard_alignment_bytes: info.discard_alignment_bytes.max(block_bytes),
            read_only: settings.read_only || info.read_only,
            volatile_cache: info.volatile_cache,
            discard: info.discard,
            write_zeroes: info.write_zeroes,
            serial: settings.serial,
            io_timeout: settings.io_timeout,
            reissue: settings.reissue,
            payload,
            queues: settings.queues,
            queue_size_max: settings.queue_size_max,
            packed: settings.packed,
            segments_max: settings.segments_max,
            limits: settings.limits,
        }
    }

    /// The size of the disk, bytes.
    #[inline]
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// The disk has another size now.
    pub fn set_size_bytes(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes - size_bytes % u64::from(self.block_bytes), Ordering::Relaxed);
    }

    /// Device reset: what the driver chose is forgotten.
    pub fn reset(&self) {
        self.set_write_back(self.volatile_cache && self.write_back_at_reset);
    }

    /// Queues.
    #[must_use]
    pub const fn queues(&self) -> u16 {
        self.queues
    }

    /// The largest size of a queue.
    #[must_use]
    pub const fn queue_size_max(&self) -> u16 {
        self.queue_size_max
    }

    /// Whether a completed write must be durable: the driver chose write-through, or knows no flush (virtio 1.3, 5.2.6.2).
    #[inline]
    #[must_use]
    pub fn writes_through(&self, features: u64) -> bool {
        self.volatile_cache
            && (features & (1 << spec::VIRTIO_BLK_F_FLUSH) == 0 || !self.write_back.load(Ordering::Relaxed))
    }

    /// The driver chooses write-back or write-through.
    pub fn set_write_back(&self, write_back: bool) {
        self.write_back.store(write_back, Ordering::Relaxed);
    }

    /// The most bytes that a request's payload may have.
    #[must_use]
    pub const fn payload_bytes_max(&self) -> u32 {
        match self.payload {
            PayloadPlace::InPlace => IN_PLACE_BYTES_MAX,
            PayloadPlace::Card => COPIED_SEGMENTS * COPIED_SEGMENT_BYTES,
        }
    }

    /// The device's feature bits.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        let mut bits = features::VERSION_1 | features::INDIRECT | features::EVENT_INDEX | features::IN_ORDER;
        bits |= 1 << spec::VIRTIO_BLK_F_SEG_MAX
            | 1 << spec::VIRTIO_BLK_F_BLK_SIZE
            | 1 << spec::VIRTIO_BLK_F_TOPOLOGY
            | 1 << spec::VIRTIO_BLK_F_MQ;
        let optional = [
            (self.packed, features::RING_PACKED),
            (self.payload == PayloadPlace::Card, 1 << spec::VIRTIO_BLK_F_SIZE_MAX),
            (self.read_only, 1 << spec::VIRTIO_BLK_F_RO),
            (self.volatile_cache, 1 << spec::VIRTIO_BLK_F_FLUSH | 1 << spec::VIRTIO_BLK_F_CONFIG_WCE),
            (self.discard && !self.read_only, 1 << spec::VIRTIO_BLK_F_DISCARD),
            (self.write_zeroes && !self.read_only, 1 << spec::VIRTIO_BLK_F_WRITE_ZEROES),
        ];
        for (offered, bit) in optional {
            if offered {
                bits |= bit;
            }
        }
        bits
    }

    /// The configuration space.
    #[must_use]
    pub fn config_space(&self) -> Vec<u8> {
        let (size_max, seg_max) = match self.payload {
            PayloadPlace::InPlace => (0, IN_PLACE_SEGMENTS),
            PayloadPlace::Card => (COPIED_SEGMENT_BYTES, COPIED_SEGMENTS),
        };
        // Without indirect tables a chain must fit the ring, with header and status.
        let seg_max =
            seg_max.min(u32::from(self.segments_max)).min(u32::from(self.queue_size_max).saturating_sub(2).max(1));
        let space = ConfigSpace {
            capacity: self.size_bytes() / SECTOR_BYTES,
            size_max,
            seg_max,
            geometry: [0; 4],
            block_bytes: self.block_bytes,
            physical_block_exponent: (self.physical_block_bytes / self.block_bytes).ilog2() as u8,
            alignment_offset: 0,
            min_io_blocks: (self.physical_block_bytes / self.block_bytes) as u16,
            opt_io_blocks: 0,
            write_back: u8::from(self.write_back.load(Ordering::Relaxed)),
            unused: 0,
            queues: self.queues,
            max_discard_sectors: RANGE_SECTORS_MAX,
            max_discard_segments: RANGES_MAX,
            discard_sector_alignment: self.discard_alignment_bytes / SECTOR_BYTES as u32,
            max_write_zeroes_sectors: RANGE_SECTORS_MAX,
            max_write_zeroes_segments: RANGES_MAX,
            write_zeroes_may_unmap: u8::from(self.discard),
            unused1: [0; 3],
            unused2: [0; 4],
        };
        // Readers may know fields of later versions; those we do not offer read as zeroes.
        let mut bytes = space.as_bytes().to_vec();
        bytes.resize(CONFIG_BYTES, 0);
        bytes
    }

    /// The driver writes to the configuration space. Returns whether there is such a writable field.
    #[must_use]
    pub fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        if offset == WRITE_BACK_AT && data.len() == 1 && self.volatile_cache {
            self.set_write_back(data[0] & 1 != 0);
            return true;
        }
        false
    }
}

/// A virtio-blk function's device.
#[derive(Debug)]
pub struct BlkDevice(pub Arc<BlkShared>);

impl Device for BlkDevice {
    fn offered_features(&self) -> u64 {
        self.0.offered_features()
    }

    fn queue_count(&self) -> u16 {
        self.0.queues()
    }

    fn queue_size_max(&self) -> u16 {
        self.0.queue_size_max()
    }

    fn config_space(&self) -> Vec<u8> {
        self.0.config_space()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        self.0.write_config(offset, data)
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn lane(&self, start: QueueStart, place: LanePlace) -> std::io::Result<AnyLane> {
        let LanePlace { memory, reach, counters, report } = place;
        let shared = Arc::clone(&self.0);
        Ok(AnyLane::Block(match memory.distant().cloned() {
            Some(distant) if reach == Reach::Distant => {
                let engine = |card| DistantEngine::new(card, memory, distant);
                Box::new(BlkLane::new(start, shared, counters, report, engine)?)
            }
            _ => Box::new(BlkLane::new(start, shared, counters, report, |card| CopyEngine::new(card, memory))?),
        }))
    }
}

#[cfg(test)]
mod tests;
