//! A local store: a regular file or a block device, reached by io_uring.
//!
//! ```text
//!   FileBackend ── OpenFile (locked, its geometry known)        open.rs
//!        └─ FileChannel, one per reactor                        channel.rs
//!               ├─ Ring: one io_uring                           ../ring.rs
//!               └─ Bounce: aligned memory, made when needed     bounce.rs
//! ```
//!
//! `O_DIRECT` is used where it can be: then a completed write is the device's, and no second copy of the data fills the
//! card's memory. It wants aligned memory, which a guest need not use. A misaligned request goes through aligned memory of
//! ours, and never through a second, buffered descriptor of the file: the page cache works in pages, so a buffered write
//! of one block beside a direct write of its neighbour in the same page can put the neighbour's old content back.
//! For the same reason a file whose alignment is larger than the 512-byte block that its guest sees is used buffered
//! altogether.

mod bounce;
mod channel;
mod open;

use std::path::PathBuf;
use std::sync::Arc;

use self::channel::FileChannel;
use self::open::OpenFile;
use super::ring::{Ring, Users};
use super::{BackendError, BlockBackend, BlockChannel, BlockInfo, PayloadPlace};

/// Who needs io_uring, for people.
const RING_USER: &str = "a volume in a file or block device";

/// Whether to go around the page cache (`O_DIRECT`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum DirectIo {
    /// Where the file can at the volume's block size.
    #[default]
    Auto,
    /// Never: reads are served from the page cache.
    Never,
    /// Or refuse the file.
    Always,
}

/// What a volume in a file is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileSettings {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Makes the file if there is none (or an empty one), sparse, of this many bytes: a multiple of 512. A file that is
    /// there must have exactly this size.
    pub create_bytes: Option<u64>,
    /// Whether the volume must not be written. Several may read one file at a time, but only one may write, alone.
    pub read_only: bool,
    /// Whether to go around the page cache.
    pub direct: DirectIo,
}

/// The control half.
#[derive(Debug)]
pub struct FileBackend {
    file: Arc<OpenFile>,
}

impl FileBackend {
    /// Opens the file and locks it against other users (`flock`, and for a block device `O_EXCL`) until the backend and
    /// all its channels are gone, or, if the process is killed, until the kernel has ended their requests. A file that is in use is
    /// waited for, two seconds.
    ///
    /// # Errors
    /// `Refused` when the file is not there, not of a usable kind or size, may not be used, or this kernel has no io_uring
    /// for us; `Unavailable` when somebody else uses it.
    pub fn open(settings: &FileSettings) -> Result<Self, BackendError> {
        let file = OpenFile::open(settings)?;
        // What io_uring lacks here is better said now than when the first queue starts.
        Ring::new(file.as_fd(), 1, RING_USER, Users::One)?;
        Ok(Self { file: Arc::new(file) })
    }
}

impl BlockBackend for FileBackend {
    fn info(&self) -> BlockInfo {
        let geometry = self.file.geometry();
        BlockInfo {
            size_bytes: self.file.size_bytes(),
            block_bytes: geometry.block_bytes,
            physical_block_bytes: geometry.physical_block_bytes,
            read_only: self.file.read_only(),
            volatile_cache: geometry.volatile_cache,
            discard: geometry.discard && !self.file.read_only(),
            write_zeroes: !self.file.read_only(),
            discard_alignment_bytes: geometry.discard_alignment_bytes,
            // A file that is only read is shared with others, so nobody waits for the reads of a process that has died: what they bring
            // late must not come into a VM's memory.
            payload: if self.file.read_only() { PayloadPlace::Card } else { PayloadPlace::InPlace },
            // One inode, one page cache or none: the kernel keeps all descriptors of it coherent.
            channels_max: usize::MAX,
        }
    }

    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError> {
        Ok(Box::new(FileChannel::new(Arc::clone(&self.file))?))
    }

    /// A regular file grows (sparse) or shrinks; what it held beyond its new end is gone, so the caller has made sure that
    /// no guest still counts on it. A block device cannot be told its size: its size now is found out, whatever was asked.
    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        self.file.resize(size_bytes)
    }
}

#[cfg(test)]
mod tests;
