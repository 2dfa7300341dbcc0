//! Memory of a channel into which the kernel writes frames: one place for each frame of a burst.
#![expect(unsafe_code, reason = "gives out addresses of its places, which the kernel writes")]

use std::ptr::NonNull;

use super::header::HEADER_BYTES;
use super::{BURST, FRAME_BYTES_MAX};

/// Bytes of a place for a frame and what stands before it, in whole pages. A page is taken from the machine when a frame first
/// reaches it.
pub(super) const PLACE_BYTES: usize = 68 << 10;
const _: () = assert!(PLACE_BYTES >= (HEADER_BYTES + FRAME_BYTES_MAX) as usize);

/// Places for a burst of frames.
pub(super) struct Slab(NonNull<[u8]>);

// SAFETY: the places belong to whoever owns the slab, as a box's content does.
unsafe impl Send for Slab {}

impl Slab {
    pub(super) fn new() -> Self {
        Self(NonNull::from(Box::leak(vec![0u8; BURST * PLACE_BYTES].into_boxed_slice())))
    }

    /// The first byte of a place.
    #[inline]
    pub(super) fn place(&self, number: usize) -> *mut u8 {
        assert!(number < BURST, "a burst has {BURST} places");
        // SAFETY: there are `BURST` places.
        unsafe { self.0.cast::<u8>().as_ptr().add(number * PLACE_BYTES) }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: it was a box, and no frame of it is handed over any more: those end with the channel.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}
