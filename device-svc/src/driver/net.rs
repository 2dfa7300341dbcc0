//! virtio-net from the driver's side (virtio 1.3, 5.1.6): frames sent, buffers filled, commands given.

use std::sync::Arc;

use virtio_bindings::virtio_net as spec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Buffer, DriverQueue, GuestMemory, QueueOptions};
use crate::address::Iova;
use crate::virtqueue::features;

/// `struct virtio_net_hdr_v1_hash` (virtio 1.3, 5.1.6.1).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FrameHeader {
    /// `VIRTIO_NET_HDR_F_…`
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_…`
    pub gso_type: u8,
    /// Bytes of all headers of a frame that is to be cut.
    pub header_bytes: u16,
    /// Payload bytes of each piece.
    pub segment_bytes: u16,
    /// Where the checksum begins to count.
    pub checksum_start: u16,
    /// Where it is, from there.
    pub checksum_offset: u16,
    /// Buffers that the frame took.
    pub buffers: u16,
    /// The frame's hash.
    pub hash: u32,
    /// `VIRTIO_NET_HASH_REPORT_…`
    pub hash_report: u16,
    /// Nothing.
    pub padding: u16,
}

/// The header as negotiated: the count of buffers is there for drivers of virtio 1, and for those that merge buffers; the hash for those
/// that want it reported.
const fn header_bytes(accepted: u64) -> u32 {
    if accepted & 1 << spec::VIRTIO_NET_F_HASH_REPORT != 0 {
        size_of::<FrameHeader>() as u32
    } else if accepted & (features::VERSION_1 | 1 << spec::VIRTIO_NET_F_MRG_RXBUF) != 0 {
        12
    } else {
        10
    }
}

/// A transmitting queue, whose frames each lie in a row of the guest's memory.
#[derive(Debug)]
pub struct TransmitQueue {
    memory: Arc<GuestMemory>,
    queue: DriverQueue,
    rows: Iova,
    row_bytes: u32,
    free: Vec<u32>,
    header_bytes: u32,
}

impl TransmitQueue {
    /// A queue with `rows` frames of at most `frame_bytes` under way.
    #[must_use]
    pub fn new(memory: &Arc<GuestMemory>, options: QueueOptions, rows: u32, frame_bytes: u32) -> Self {
        let row_bytes = (frame_bytes + size_of::<FrameHeader>() as u32).next_multiple_of(64);
        Self {
            memory: Arc::clone(memory),
            queue: DriverQueue::new(memory, options),
            rows: memory.take(u64::from(rows) * u64::from(row_bytes), 64),
            row_bytes,
            free: (0..rows).rev().collect(),
            header_bytes: header_bytes(options.features),
        }
    }

    /// The ring underneath.
    pub const fn queue(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }

    /// Adds a frame in buffers that are cut at `cuts`, offsets into header and frame; the device sees it with the next publish.
    /// Returns whether there was room.
    pub fn send(&mut self, header: FrameHeader, frame: &[u8], cuts: &[u32]) -> bool {
        let Some(&row) = self.free.last() else { return false };
        let at = Iova(self.rows.0 + u64::from(row) * u64::from(self.row_bytes));
        let end = self.header_bytes + frame.len() as u32;
        assert!(end <= self.row_bytes, "a frame of {} bytes", frame.len());
        self.memory.copy_in(at, &header.as_bytes()[..self.header_bytes as usize]);
        self.memory.copy_in(Iova(at.0 + u64::from(self.header_bytes)), frame);
        let mut buffers = Vec::with_capacity(cuts.len() + 1);
        let mut start = 0;
        for cut in cuts.iter().copied().chain([end]) {
            if cut > start && cut <= end {
                let address = Iova(at.0 + u64::from(start));
                buffers.push(Buffer { address, length: cut - start, writable: false });
                start = cut;
            }
        }
        let added = self.queue.add(&buffers, row);
        if added {
            self.free.pop();
        }
        added
    }

    /// Takes back the rows of frames that were sent. Returns how many.
    pub fn reap(&mut self) -> usize {
        let mut count = 0;
        while let Some((row, _)) = self.queue.take_used() {
            self.free.push(row);
            count += 1;
        }
        count
    }
}

/// A receiving queue, with buffers of one size.
#[derive(Debug)]
pub struct ReceiveQueue {
    memory: Arc<GuestMemory>,
    queue: DriverQueue,
    buffers: Iova,
    buffer_bytes: u32,
    free: Vec<u32>,
    header_bytes: u32,
    merges: bool,
}

impl ReceiveQueue {
    /// A queue with `count` buffers of `buffer_bytes`, header included.
    #[must_use]
    pub fn new(memory: &Arc<GuestMemory>, options: QueueOptions, count: u32, buffer_bytes: u32) -> Self {
        Self {
            memory: Arc::clone(memory),
            queue: DriverQueue::new(memory, options),
            buffers: memory.take(u64::from(count) * u64::from(buffer_bytes), 64),
            buffer_bytes,
            free: (0..count).rev().collect(),
            header_bytes: header_bytes(options.features),
            merges: options.features & 1 << spec::VIRTIO_NET_F_MRG_RXBUF != 0,
        }
    }

    /// The ring underneath.
    pub const fn queue(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }

    fn at(&self, buffer: u32) -> Iova {
        Iova(self.buffers.0 + u64::from(buffer) * u64::from(self.buffer_bytes))
    }

    /// Adds at most `most` empty buffers, each in `parts` pieces. Returns how many.
    pub fn add_buffers(&mut self, most: usize, parts: u32) -> usize {
        let mut count = 0;
        while count < most
            && let Some(&buffer) = self.free.last()
        {
            let piece = self.buffer_bytes / parts.max(1);
            let pieces: Vec<Buffer> = (0..parts.max(1))
                .map(|part| Buffer {
                    address: Iova(self.at(buffer).0 + u64::from(part * piece)),
                    length: if part + 1 == parts.max(1) { self.buffer_bytes - part * piece } else { piece },
                    writable: true,
                })
                .collect();
            if !self.queue.add(&pieces, buffer) {
                break;
            }
            self.free.pop();
            count += 1;
        }
        count
    }

    /// Takes one frame that has come.
    ///
    /// # Panics
    /// When the device broke a rule: a frame in more buffers than are there, or longer than they are.
    pub fn take(&mut self) -> Option<(FrameHeader, Vec<u8>)> {
        let (buffer, written) = self.queue.take_used()?;
        assert!(written >= self.header_bytes && written <= self.buffer_bytes, "{written} bytes in a buffer");
        let mut header = FrameHeader::default();
        self.memory.copy_out(self.at(buffer), &mut header.as_mut_bytes()[..self.header_bytes as usize]);
        let mut frame = vec![0; (written - self.header_bytes) as usize];
        self.memory.copy_out(Iova(self.at(buffer).0 + u64::from(self.header_bytes)), &mut frame);
        self.free.push(buffer);
        let buffers = if self.merges { header.buffers } else { 1 };
        assert!(buffers > 0, "a frame in no buffers");
        for _ in 1..buffers {
            let (buffer, written) = self.queue.take_used().expect("all buffers of a frame are there at once");
            assert!(written > 0 && written <= self.buffer_bytes, "{written} bytes in a further buffer");
            let before = frame.len();
            frame.resize(before + written as usize, 0);
            self.memory.copy_out(self.at(buffer), &mut frame[before..]);
            self.free.push(buffer);
        }
        Some((header, frame))
    }
}

/// The control queue, for one command at a time.
#[derive(Debug)]
pub struct CommandQueue {
    memory: Arc<GuestMemory>,
    queue: DriverQueue,
    row: Iova,
}

/// Bytes of a command at most, and where its answer is.
const COMMAND_BYTES: u32 = 8192;

impl CommandQueue {
    /// A queue.
    #[must_use]
    pub fn new(memory: &Arc<GuestMemory>, options: QueueOptions) -> Self {
        let row = memory.take(u64::from(COMMAND_BYTES) + 1, 64);
        Self { memory: Arc::clone(memory), queue: DriverQueue::new(memory, options), row }
    }

    /// The ring underneath.
    pub const fn queue(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }

    /// Adds a command; the device sees it with the next publish. Returns whether there was room.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        self.memory.copy_in(self.row, &[&[class, command], data].concat());
        let answer = Iova(self.row.0 + u64::from(COMMAND_BYTES));
        self.memory.put(answer, 0xff_u8);
        let prefix = Buffer { address: self.row, length: 2, writable: false };
        let rest = Buffer { address: Iova(self.row.0 + 2), length: data.len() as u32, writable: false };
        let answer = Buffer { address: answer, length: 1, writable: true };
        if data.is_empty() { self.queue.add(&[prefix, answer], 0) } else { self.queue.add(&[prefix, rest, answer], 0) }
    }

    /// The answer, if it has come: 0 is well.
    pub fn answer(&mut self) -> Option<u8> {
        self.queue.take_used().map(|_| self.memory.get(Iova(self.row.0 + u64::from(COMMAND_BYTES))))
    }
}
