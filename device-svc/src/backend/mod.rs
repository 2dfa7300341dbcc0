//! Storage servers and local stores, behind one seam of two halves.
//!
//! [`BlockBackend`] is the control half: one per volume, shared, may block. It hands out [`BlockChannel`]s, the hot
//! half: one per reactor and volume, one owner, never blocks, never allocates per request.
//!
//! Who checks what: the device has checked a request against the volume's size, alignment and read-only state before it
//! reaches a channel; a channel need not check again, and asserts at most in debug builds. What a *server* answers is
//! untrusted and is the channel's to check.

pub mod file;
pub mod nbd;
pub mod net;
pub mod null;
pub mod ram;
mod ring;

use std::os::fd::RawFd;

use crate::clock::Moment;

/// What a request asks of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockOperation {
    /// Fill the segments from the volume.
    Read,
    /// Store the segments in the volume. The data may stay in a volatile cache until the next flush.
    Write,
    /// Make every write *completed* before this was submitted durable.
    Flush,
    /// The range's content is no longer needed; what it reads as afterwards is not defined.
    Discard,
    /// The range reads as zeroes afterwards; its space may be given up if `unmap`.
    WriteZeroes {
        /// Whether the space may be deallocated (`VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`).
        unmap: bool,
    },
}

/// Names a request between a lane and a channel: the lane's number on the channel and the row of its slab.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tag {
    /// The lane's number among those that use the channel.
    pub lane: u32,
    /// The row of the lane's slab.
    pub row: u32,
}

/// The memory of a request: where a read puts its data and a write takes it from, in order.
///
/// A borrowed list of borrowed ranges whose lifetime is a protocol, not a scope: from `submit` until the completion
/// with the same tag has been returned by `poll` (or the channel has been dropped).
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    first: *const libc::iovec,
    count: u32,
}

#[expect(unsafe_code, reason = "a segment list outlives the call that hands it over; the protocol is stated above")]
mod segments {
    use super::Segments;

    // SAFETY: a list of ranges moves with its request between threads only together with the lane that owns the memory.
    unsafe impl Send for Segments {}

    impl Segments {
        /// No memory: flush, discard, write zeroes.
        pub const NONE: Self = Self { first: std::ptr::null(), count: 0 };

        /// The list of `count` ranges at `first`.
        ///
        /// # Safety
        /// The list and each range in it must stay valid, and no Rust reference to a byte of a range may exist, until
        /// the request's completion has been polled or its channel dropped. Ranges may be shared with a VM, which can
        /// change the bytes at any time.
        #[inline]
        #[must_use]
        pub const unsafe fn new(first: *const libc::iovec, count: u32) -> Self {
            Self { first, count }
        }

        /// The ranges, in order.
        #[inline]
        #[must_use]
        pub const fn as_slice(&self) -> &[libc::iovec] {
            if self.count == 0 {
                return &[];
            }
            // SAFETY: `new` promised that the list is valid while the request is under way, and only a request under
            // way holds a `Segments`.
            unsafe { std::slice::from_raw_parts(self.first, self.count as usize) }
        }
    }
}

/// One request to a channel.
#[derive(Clone, Copy, Debug)]
pub struct BlockRequest {
    /// Comes back with the completion.
    pub tag: Tag,
    /// What to do.
    pub operation: BlockOperation,
    /// Where on the volume, bytes; a multiple of the logical block size.
    pub offset: u64,
    /// How much, bytes; a multiple of the logical block size, and for read and write the sum of the segments.
    pub length: u64,
    /// The memory of a read or write.
    pub segments: Segments,
}

/// How a request ended, when not well. The variants are what the lane does about them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BlockFault {
    /// The server is away or says that it could not just now. The lane holds the request and submits it again until the
    /// volume's `io-timeout`.
    #[error("the storage server is away")]
    Away,
    /// Final: the guest sees `VIRTIO_BLK_S_IOERR`.
    #[error("input/output error")]
    Io,
    /// Final: the guest sees `VIRTIO_BLK_S_UNSUPP`.
    #[error("the storage does not do this")]
    Unsupported,
}

/// The end of one request.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The tag of the request.
    pub tag: Tag,
    /// How it ended.
    pub result: Result<(), BlockFault>,
}

/// Where a channel can take a request's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PayloadPlace {
    /// Straight in the VM's memory. A completion then follows without waiting for a server that is away, because
    /// unmapping waits for it.
    InPlace,
    /// Only in card memory: a request may stay with a server that is away for long.
    Card,
}

/// What a volume can do: fixed while a channel is open, but for `size_bytes`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockInfo {
    /// Size of the volume, bytes; a multiple of `block_bytes`.
    pub size_bytes: u64,
    /// Logical block size: alignment and granularity of every request. 512 to 4096, a power of two.
    pub block_bytes: u32,
    /// Physical block size, a power of two, at least `block_bytes`.
    pub physical_block_bytes: u32,
    /// Whether the volume must not be written.
    pub read_only: bool,
    /// Whether completed writes may still be in a volatile cache, so that a flush means something.
    pub volatile_cache: bool,
    /// Whether discard is done, rather than answered with `Unsupported`.
    pub discard: bool,
    /// Whether write zeroes is done.
    pub write_zeroes: bool,
    /// Alignment at which discard really frees space, bytes.
    pub discard_alignment_bytes: u32,
    /// Where payload may be.
    pub payload: PayloadPlace,
    /// At most this many channels keep the volume coherent: with 1, all queues of a function go to one reactor.
    pub channels_max: usize,
}

/// Why a backend could not be opened, resized or fenced. Each says the thing's name and the next step.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The configuration cannot be served: refused for good, until somebody changes it.
    #[error("{0}")]
    Refused(String),
    /// The server or the file cannot be reached now; trying again may help.
    #[error("{0}")]
    Unavailable(String),
}

/// The control half of a volume's storage.
pub trait BlockBackend: Send + Sync {
    /// What the volume can do, now.
    fn info(&self) -> BlockInfo;

    /// Opens one more channel, for one reactor.
    ///
    /// # Errors
    /// When the storage refuses or is away.
    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError>;

    /// Sets the volume's size where the storage can (a file grows or shrinks), or finds the size out anew where only the
    /// server can set it. Returns the size now, bytes.
    ///
    /// # Errors
    /// When the storage refuses.
    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError>;
}

/// The hot half: requests in, completions out, all on one reactor.
pub trait BlockChannel: Send {
    /// Takes a request over, or hands it back when the channel is full or its server away: then the lane keeps it and
    /// stops popping. May defer real work to `poll`, so that a turn's requests go out in one system call.
    ///
    /// # Errors
    /// The request itself.
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest>;

    /// Sends what `submit` collected, takes what has ended and pushes it to `completions` (which has room for every
    /// request in flight: no allocation). Called once per turn.
    fn poll(&mut self, now: Moment, completions: &mut Vec<Completion>);

    /// Requests taken over and not yet completed.
    fn in_flight(&self) -> usize;

    /// A descriptor that is readable whenever `poll` has something to do, for a reactor that sleeps. `None` when requests
    /// always end within the turn in which they were submitted. It stays the same for the channel's life.
    fn wake_fd(&self) -> Option<RawFd>;

    /// The latest moment at which `poll` wants to be called even if nothing wakes it (a reconnect that is due).
    fn deadline(&self) -> Option<Moment> {
        None
    }

    /// Somebody else may write from now on: what has ended is made durable, and nothing of it is written again, whatever its server
    /// loses. Returns whether that is done; to be polled and asked again if not. It holds until [`take_back`](Self::take_back).
    fn hand_over(&mut self) -> bool {
        true
    }

    /// Waiting is over: nothing that is under way reaches the server any more, and none of its answers counts. Requests end as if it were
    /// away.
    fn cut_off(&mut self, _now: Moment, _completions: &mut Vec<Completion>) {}

    /// Requests come again; `unchanged`: nobody else has written since, if it was [handed over](Self::hand_over).
    fn take_back(&mut self, _unchanged: bool) {}
}
