//! virtio-blk requests from the driver's side (virtio 1.3, 5.2.6): a fixed number of rows, each with a header, a status byte and
//! a data buffer of its own in the guest's memory.

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_bindings::virtio_blk as spec;
use zerocopy::{Immutable, IntoBytes};

use super::{Buffer, DriverQueue, GuestMemory, QueueOptions};
use crate::address::Iova;
use crate::dma::prefetch_write;

/// `struct virtio_blk_req` up to its data.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// A range of a discard or write-zeroes request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Bit 0: unmap (write zeroes only).
    pub flags: u32,
}

/// A request that has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Its row.
    pub row: u32,
    /// `VIRTIO_BLK_S_…`: 0 is well; 255 if the device wrote none.
    pub status: u8,
    /// What the device says it wrote, bytes.
    pub written: u32,
}

/// Bytes of a row's own line: header, then status.
const LINE_BYTES: u64 = 64;
const STATUS_AT: u64 = 32;
/// Requests taken off the ring in one go at most.
const BATCH: usize = 32;
/// The status before the device has written one.
const NO_STATUS: u8 = 255;

/// A request queue of a virtio-blk device.
#[derive(Debug)]
pub struct BlockQueue {
    memory: Arc<GuestMemory>,
    queue: DriverQueue,
    lines: Iova,
    data: Iova,
    data_bytes: u32,
    rows: u32,
    in_flight: u32,
    /// Requests taken off the ring and not yet handed out.
    ended: VecDeque<(u32, u32)>,
}

impl BlockQueue {
    /// A queue with `rows` requests at most, each with `data_bytes` of data.
    #[must_use]
    pub fn new(memory: &Arc<GuestMemory>, options: QueueOptions, rows: u32, data_bytes: u32) -> Self {
        let queue = DriverQueue::new(memory, options);
        let lines = memory.take(u64::from(rows) * LINE_BYTES, 64);
        let data = memory.take(u64::from(rows) * u64::from(data_bytes), 4096);
        Self {
            memory: Arc::clone(memory),
            queue,
            lines,
            data,
            data_bytes,
            rows,
            in_flight: 0,
            ended: VecDeque::with_capacity(BATCH),
        }
    }

    /// The ring underneath.
    pub const fn queue(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }

    /// Requests at most.
    #[must_use]
    pub const fn rows(&self) -> u32 {
        self.rows
    }

    /// Requests under way.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Where a row's data is.
    #[inline]
    #[must_use]
    pub const fn data_at(&self, row: u32) -> Iova {
        Iova(self.data.0 + row as u64 * self.data_bytes as u64)
    }

    #[inline]
    const fn line_at(&self, row: u32) -> Iova {
        Iova(self.lines.0 + row as u64 * LINE_BYTES)
    }

    /// Adds a request with up to two data buffers' worth of chain; the device sees it with the next `publish`.
    #[inline]
    fn add(&mut self, row: u32, kind: u32, sector: u64, data: Option<(u32, bool)>) -> bool {
        let line = self.line_at(row);
        let header = Buffer { address: line, length: 16, writable: false };
        let status = Buffer { address: Iova(line.0 + STATUS_AT), length: 1, writable: true };
        let added = match data {
            Some((length, writable)) => {
                let data = Buffer { address: self.data_at(row), length, writable };
                self.put_header(row, kind, sector);
                self.queue.add(&[header, data, status], row)
            }
            None => {
                self.put_header(row, kind, sector);
                self.queue.add(&[header, status], row)
            }
        };
        self.in_flight += u32::from(added);
        added
    }

    #[inline]
    fn put_header(&self, row: u32, kind: u32, sector: u64) {
        let line = self.line_at(row);
        self.memory.put(line, Header { kind, reserved: 0, sector });
        self.memory.put(Iova(line.0 + STATUS_AT), NO_STATUS);
    }

    /// Adds a read of `bytes` from `sector` into the row's data. Returns whether there was room in the ring.
    #[inline]
    pub fn read(&mut self, row: u32, sector: u64, bytes: u32) -> bool {
        self.add(row, spec::VIRTIO_BLK_T_IN, sector, Some((bytes, true)))
    }

    /// Adds a write of the row's data.
    #[inline]
    pub fn write(&mut self, row: u32, sector: u64, bytes: u32) -> bool {
        self.add(row, spec::VIRTIO_BLK_T_OUT, sector, Some((bytes, false)))
    }

    /// Adds a flush.
    pub fn flush(&mut self, row: u32) -> bool {
        self.add(row, spec::VIRTIO_BLK_T_FLUSH, 0, None)
    }

    /// Adds a get id; the 20 bytes come into the row's data.
    pub fn get_id(&mut self, row: u32) -> bool {
        self.add(row, spec::VIRTIO_BLK_T_GET_ID, 0, Some((20, true)))
    }

    /// Adds a discard, or a write zeroes, of these ranges.
    pub fn ranges(&mut self, row: u32, zero: bool, ranges: &[Range]) -> bool {
        for (index, range) in ranges.iter().enumerate() {
            self.memory.put(Iova(self.data_at(row).0 + 16 * index as u64), *range);
        }
        let kind = if zero { spec::VIRTIO_BLK_T_WRITE_ZEROES } else { spec::VIRTIO_BLK_T_DISCARD };
        self.add(row, kind, 0, Some((16 * ranges.len() as u32, false)))
    }

    /// Adds a request of any kind and shape, legal or not.
    pub fn raw(&mut self, row: u32, kind: u32, sector: u64, data: Option<(u32, bool)>) -> bool {
        self.add(row, kind, sector, data)
    }

    /// Makes what was added available; returns whether the doorbell is wanted.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// Takes a batch off the ring, and asks for the lines of its rows: each holds a status to be read, and then the header of
    /// the next request.
    #[inline]
    fn take_batch(&mut self) {
        while self.ended.len() < BATCH
            && let Some(used) = self.queue.take_used()
        {
            prefetch_write(self.memory.pointer(self.line_at(used.0), 1));
            self.ended.push_back(used);
        }
    }

    /// Takes one request that has ended.
    #[inline]
    pub fn take_ended(&mut self) -> Option<Ended> {
        if self.ended.is_empty() {
            self.take_batch();
        }
        let (row, written) = self.ended.pop_front()?;
        self.in_flight -= 1;
        let status = self.memory.get::<u8>(Iova(self.line_at(row).0 + STATUS_AT));
        Some(Ended { row, status, written })
    }
}
