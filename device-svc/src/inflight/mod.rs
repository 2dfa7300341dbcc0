//! The record of requests in progress: what a process that dies leaves behind, so that the next one loses nothing and does nothing
//! twice.
//!
//! ```text
//!   GET_INFLIGHT_FD ─► RecordArea: one memory file, a region for each queue     (the front end keeps it)
//!   SET_INFLIGHT_FD ─► RecordArea ─► QueueRecord ─► QueueStart ─► mirror
//!                                                                   ├► SplitRecord    split.rs
//!                                                                   └► PackedRecord   packed.rs
//! ```
//!
//! The layout is that of the vhost-user specification ("Inflight I/O tracking"). A record is attached once, when its queue starts:
//! everything in it is then checked, put right where the process before died between two stores, and copied; from then on it is
//! only written to. What a front end does to it while the queue runs changes nothing for us.

mod memory;
mod packed;
mod split;

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use self::memory::{PackedEntry, PackedHeader, SplitEntry, SplitHeader, UsedPlaces};
use crate::dma::{Mapping, MemoryError};

pub use packed::{PackedRecord, RecordedChain};
pub use split::SplitRecord;

/// The version of the layout. 0 stands for a region that nobody has written to.
const VERSION: u16 = 1;
/// Each queue's region starts on a cache line of its own.
const REGION_ALIGNMENT: usize = 64;

/// Why a record cannot be used: it was changed by somebody, or is another queue's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordFault {
    /// Of another version, or with features that nobody has defined.
    #[error("the inflight record has version {version} and features {features:#x}, not 1 and 0")]
    Version {
        /// Its version.
        version: u16,
        /// Its features.
        features: u64,
    },
    /// Made for another number of descriptors.
    #[error("the inflight record has {found} descriptors where {expected} were agreed on")]
    Entries {
        /// What it says.
        found: u16,
        /// What it should say.
        expected: u16,
    },
    /// The queue is larger than its record.
    #[error("a queue of {size} entries with an inflight record for {entries}")]
    TooSmall {
        /// The queue's size.
        size: u16,
        /// The record's.
        entries: u16,
    },
    /// The used index of the ring and that of the record are further apart than a batch can be.
    #[error("the inflight record's used index is {record}, that of its ring {ring}: it is not this ring's")]
    UsedIndex {
        /// The record's.
        record: u16,
        /// The ring's.
        ring: u16,
    },
    /// A number of a descriptor or entry that does not exist.
    #[error("the inflight record names descriptor {number} of a queue that has {size}")]
    NoSuchEntry {
        /// The number.
        number: u16,
        /// How many there are.
        size: u16,
    },
    /// Its lists run in circles, meet each other, or leave entries out.
    #[error("the lists in the inflight record are broken")]
    Lists,
}

/// Why a memory file cannot hold the record.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// More queues or descriptors than the function has.
    #[error("an inflight record for {queues} queues of {size}; the function has {queues_max} of {size_max}")]
    Shape {
        /// Queues.
        queues: u16,
        /// Descriptors of each.
        size: u16,
        /// Queues of the function.
        queues_max: u16,
        /// Descriptors of each at most.
        size_max: u16,
    },
    /// The file's part is smaller than the record.
    #[error("an inflight record of {needed} bytes in {given}")]
    TooSmall {
        /// Bytes that it takes.
        needed: u64,
        /// Bytes that there are.
        given: u64,
    },
    /// The file cannot be mapped there.
    #[error("the inflight record: {0}")]
    Mapping(#[from] MemoryError),
    /// The system has no memory file for us, or says nothing about this one.
    #[error("the inflight record: {0}")]
    System(#[from] std::io::Error),
    /// The record has no region for this queue.
    #[error("the inflight record has no room for queue {queue}")]
    NoSuchQueue {
        /// The queue.
        queue: u16,
    },
}

/// How many queues a record is for, and how large they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AreaShape {
    /// Queues.
    pub queues: u16,
    /// Descriptors of each.
    pub size: u16,
    /// Whether their rings are packed.
    pub packed: bool,
}

impl AreaShape {
    /// Checks it against what the function has.
    ///
    /// # Errors
    /// When there is not one queue of one descriptor at least, or more than the function has.
    pub const fn check(self, queues_max: u16, size_max: u16) -> Result<Self, AreaError> {
        let Self { queues, size, .. } = self;
        if queues == 0 || size == 0 || queues > queues_max || size > size_max {
            return Err(AreaError::Shape { queues, size, queues_max, size_max });
        }
        Ok(self)
    }

    /// Bytes of one queue's region.
    const fn region_bytes(self) -> usize {
        let bytes = if self.packed {
            memory::bytes::<PackedHeader, PackedEntry>(self.size)
        } else {
            memory::bytes::<SplitHeader, SplitEntry>(self.size)
        };
        bytes.next_multiple_of(REGION_ALIGNMENT)
    }

    /// Bytes of all of them.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.region_bytes() as u64 * self.queues as u64
    }

    /// A memory file for them, in which every region is one that nobody has written to. It cannot be cut short.
    ///
    /// # Errors
    /// When the system has none for us.
    pub fn create(self) -> std::io::Result<File> {
        let file = File::from(memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(self.bytes())?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Ok(file)
    }
}

/// Which memory a queue's record is: the same file, seen through any descriptor of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordIdentity {
    device: u64,
    inode: u64,
    offset: u64,
}

/// The record of a function's queues, mapped.
#[derive(Debug)]
pub struct RecordArea {
    mapping: Arc<Mapping>,
    shape: AreaShape,
    identity: RecordIdentity,
}

impl RecordArea {
    /// Maps the record of `shape`, which has been checked, in the `given` bytes of a file at `offset`.
    ///
    /// # Errors
    /// When the file is too small, or cannot be mapped.
    pub fn open(file: &File, offset: u64, given: u64, shape: AreaShape) -> Result<Self, AreaError> {
        let needed = shape.bytes();
        if given < needed {
            return Err(AreaError::TooSmall { needed, given });
        }
        let metadata = file.metadata()?;
        // The front end's `given` may be anything; what is mapped is what is used.
        let mapping = Arc::new(Mapping::new(file, offset, needed)?);
        Ok(Self { mapping, shape, identity: RecordIdentity { device: metadata.dev(), inode: metadata.ino(), offset } })
    }

    /// The region of queue `queue`.
    ///
    /// # Errors
    /// When there is none, or the rings are of the other kind now and it does not fit.
    pub fn queue(&self, queue: u16, packed: bool) -> Result<QueueRecord, AreaError> {
        let shape = AreaShape { packed, ..self.shape };
        if queue >= shape.queues || shape.bytes() > self.mapping.len() as u64 {
            return Err(AreaError::NoSuchQueue { queue });
        }
        let offset = shape.region_bytes() * usize::from(queue);
        let identity = RecordIdentity { offset: self.identity.offset + offset as u64, ..self.identity };
        Ok(QueueRecord { mapping: Arc::clone(&self.mapping), offset, entries: shape.size, identity })
    }

    /// The device was reset: nothing is in flight any more, and the rings begin anew, of whichever kind.
    pub fn forget(&self) {
        for queue in 0..self.shape.queues {
            self.forget_queue(queue, false);
            self.forget_queue(queue, true);
        }
    }

    /// A queue was reset that has such a ring.
    pub fn forget_queue(&self, queue: u16, packed: bool) {
        // A header's version is at the same place for both kinds of ring.
        if let Ok(record) = self.queue(queue, packed) {
            record.region::<SplitHeader, SplitEntry>(0).header().version.set(0);
        }
    }
}

/// Where one queue's record is.
#[derive(Clone, Debug)]
pub struct QueueRecord {
    mapping: Arc<Mapping>,
    offset: usize,
    entries: u16,
    identity: RecordIdentity,
}

impl QueueRecord {
    /// Which memory it is.
    #[must_use]
    pub const fn identity(&self) -> RecordIdentity {
        self.identity
    }

    /// Whether anybody has written to it.
    #[must_use]
    pub fn is_known(&self) -> bool {
        // At the same place for both kinds of ring.
        self.region::<SplitHeader, SplitEntry>(0).header().version.get() == VERSION
    }

    /// Of a split ring: the used index up to which it is known what has ended.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.region::<SplitHeader, SplitEntry>(0).header().used_idx.get()
    }

    /// A number that is another one after anybody has written to it.
    #[must_use]
    pub fn fingerprint(&self, packed: bool) -> u64 {
        let mut hasher = DefaultHasher::new();
        if packed {
            let region = self.region::<PackedHeader, PackedEntry>(self.entries);
            let header = region.header();
            (header.version.get(), header.free_heads.get(), header.used_places.get()).hash(&mut hasher);
            for entry in region.entries() {
                (entry.inflight.get(), entry.next.get(), entry.num.get(), entry.counter.get(), entry.descriptor())
                    .hash(&mut hasher);
            }
        } else {
            let region = self.region::<SplitHeader, SplitEntry>(self.entries);
            let header = region.header();
            (header.version.get(), header.last_batch_head.get(), header.used_idx.get()).hash(&mut hasher);
            for entry in region.entries() {
                (entry.inflight.get(), entry.next.get(), entry.counter.get()).hash(&mut hasher);
            }
        }
        hasher.finish()
    }

    /// Of a split ring: how many requests are in flight, those of a batch among them that is published and not yet noted.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let region = self.region::<SplitHeader, SplitEntry>(self.entries);
        region.entries().iter().filter(|entry| entry.inflight.get() != 0).count()
    }

    /// Of a split ring of `size` entries: whether more was fetched than such a ring holds, so that something of it has ended.
    #[must_use]
    pub fn has_completed(&self, size: u16) -> bool {
        let region = self.region::<SplitHeader, SplitEntry>(self.entries);
        region.entries().iter().any(|entry| entry.inflight.get() != 0 && entry.counter.get() > size.into())
    }

    /// Of a packed ring of `size` slots: whether used descriptors go where those of a new ring go, although more was fetched than such a
    /// ring holds.
    #[must_use]
    pub fn begins_another_lap(&self, size: u16) -> bool {
        let region = self.region::<PackedHeader, PackedEntry>(self.entries);
        let places = UsedPlaces::decode(region.header().used_places.get());
        let begins = [places.new, places.old].contains(&(0, 1));
        begins && region.entries().iter().any(|entry| entry.inflight.get() != 0 && entry.counter.get() > size.into())
    }

    /// The region as that of one kind of ring. Panics if it does not fit: a record is made for one kind, and its area has checked
    /// that it fits.
    fn region<H: memory::Shared, E: memory::Shared>(&self, entries: u16) -> memory::Region<H, E> {
        memory::Region::new(&self.mapping, self.offset, entries).expect("the area has checked that it fits")
    }
}

/// What both kinds of record check first. Returns whether anybody has written to it.
fn check_header(version: u16, features: u64, found: u16, entries: u16, size: u16) -> Result<bool, RecordFault> {
    if size > entries {
        return Err(RecordFault::TooSmall { size, entries });
    }
    match version {
        0 => Ok(false),
        VERSION if features == 0 && found == entries => Ok(true),
        VERSION if features == 0 => Err(RecordFault::Entries { found, expected: entries }),
        _ => Err(RecordFault::Version { version, features }),
    }
}

#[cfg(test)]
mod tests;
