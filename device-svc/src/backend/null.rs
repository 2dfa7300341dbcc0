//! A volume that keeps nothing: the ceiling of the data path, and a stand-in where only the path matters.
//!
//! Every request ends well in the poll after its submit. A read leaves its memory as it was (a guest sees what its
//! buffer held before), so that nothing but the path itself is measured. The work per request is one bounded push and
//! its share of one block copy.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BackendError, BlockBackend, BlockChannel, BlockInfo, BlockRequest, Completion, PayloadPlace};
use crate::clock::Moment;

/// Requests a channel takes between two polls; as many completions stay in the first-level cache.
const DEPTH: usize = 1024;

/// Logical block size, bytes.
const BLOCK_BYTES: u32 = 512;

/// What a null volume is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NullSettings {
    /// Size that the volume shows, bytes: a multiple of 512, not 0.
    pub size_bytes: u64,
    /// Whether the volume shows itself as read-only.
    pub read_only: bool,
}

/// The control half.
#[derive(Debug)]
pub struct NullBackend {
    size_bytes: AtomicU64,
    read_only: bool,
}

impl NullBackend {
    /// A volume of that size.
    ///
    /// # Errors
    /// A size of 0 or with a part of a block.
    pub fn new(settings: &NullSettings) -> Result<Self, BackendError> {
        check_size(settings.size_bytes)?;
        Ok(Self { size_bytes: AtomicU64::new(settings.size_bytes), read_only: settings.read_only })
    }
}

fn check_size(size_bytes: u64) -> Result<(), BackendError> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(BLOCK_BYTES)) {
        return Err(BackendError::Refused(format!(
            "a null volume cannot have {size_bytes} bytes: give a multiple of {BLOCK_BYTES}, not 0"
        )));
    }
    Ok(())
}

impl BlockBackend for NullBackend {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            size_bytes: self.size_bytes.load(Ordering::Relaxed),
            block_bytes: BLOCK_BYTES,
            physical_block_bytes: BLOCK_BYTES,
            read_only: self.read_only,
            volatile_cache: false,
            discard: true,
            write_zeroes: true,
            discard_alignment_bytes: BLOCK_BYTES,
            payload: PayloadPlace::InPlace,
            channels_max: usize::MAX,
        }
    }

    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError> {
        Ok(Box::new(NullChannel { ended: Vec::with_capacity(DEPTH) }))
    }

    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        check_size(size_bytes)?;
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        Ok(size_bytes)
    }
}

struct NullChannel {
    ended: Vec<Completion>,
}

impl BlockChannel for NullChannel {
    #[inline]
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        // The same comparison that `push` makes before it grows, so the compiler drops the growing.
        if self.ended.len() == self.ended.capacity() {
            return Err(request);
        }
        self.ended.push(Completion { tag: request.tag, result: Ok(()) });
        Ok(())
    }

    #[inline]
    fn poll(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        completions.append(&mut self.ended);
    }

    #[inline]
    fn in_flight(&self) -> usize {
        self.ended.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

#[cfg(test)]
mod tests;
