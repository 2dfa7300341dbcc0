//! One queue's region of the record as it lies in shared memory: the layout that the vhost-user specification documents
//! ("Inflight I/O tracking"), and the only way to it.
//!
//! The front end has the same memory, so every field is an atomic: what is read is whatever is there, and is believed only after
//! the checks of `split.rs` and `packed.rs`. A store is a plain store that becomes visible after all stores before it; nothing
//! here costs more. What makes two changes one is that they share one store.
#![expect(unsafe_code, reason = "memory that outlives the process, and that the front end has too")]

use std::mem::{align_of, offset_of, size_of};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::dma::Mapping;
use crate::virtqueue::PackedDescriptor;

macro_rules! field {
    ($name:ident, $atomic:ty, $value:ty, $text:literal) => {
        #[doc = $text]
        #[derive(Debug)]
        #[repr(transparent)]
        pub(super) struct $name($atomic);

        impl $name {
            /// What is there now; anybody may have written it.
            #[inline]
            pub(super) fn get(&self) -> $value {
                self.0.load(Ordering::Acquire)
            }

            /// Stores, visible after every store before.
            #[inline]
            pub(super) fn set(&self, value: $value) {
                #[cfg(test)]
                crate::dma::mortality::about_to_store();
                self.0.store(value, Ordering::Release);
            }
        }
    };
}

field!(Field8, AtomicU8, u8, "A field of 8 bits.");
field!(Field16, AtomicU16, u16, "A field of 16 bits.");
field!(Field32, AtomicU32, u32, "A field of 32 bits.");
field!(Field64, AtomicU64, u64, "A field of 64 bits.");

/// `QueueRegionSplit` up to its entries.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SplitHeader {
    pub(super) features: Field64,
    pub(super) version: Field16,
    pub(super) desc_num: Field16,
    pub(super) last_batch_head: Field16,
    pub(super) used_idx: Field16,
}

/// `DescStateSplit`: one for each descriptor; those of heads count.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SplitEntry {
    pub(super) inflight: Field8,
    padding: [Field8; 5],
    pub(super) next: Field16,
    pub(super) counter: Field64,
}

/// `QueueRegionPacked` up to its entries. Neighbours that change together are one field here.
#[derive(Debug)]
#[repr(C)]
pub(super) struct PackedHeader {
    pub(super) features: Field64,
    pub(super) version: Field16,
    pub(super) desc_num: Field16,
    /// `free_head` and `old_free_head`: [`FreeHeads`].
    pub(super) free_heads: Field32,
    /// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter` and two bytes of padding: [`UsedPlaces`].
    pub(super) used_places: Field64,
    /// The other five bytes of padding, and what the compiler of the specification's C adds before an array of 64-bit fields.
    padding: Field64,
}

/// `DescStatePacked`: one for each descriptor of a chain. What a descriptor of the ring has in its second half is one field here.
#[derive(Debug)]
#[repr(C)]
pub(super) struct PackedEntry {
    pub(super) inflight: Field8,
    padding: Field8,
    pub(super) next: Field16,
    pub(super) last: Field16,
    pub(super) num: Field16,
    pub(super) counter: Field64,
    /// `id`, `flags` and `len`, in this order; a descriptor has `len` first.
    id_flags_len: Field64,
    addr: Field64,
}

impl PackedEntry {
    /// Keeps a descriptor.
    #[inline]
    pub(super) fn put(&self, descriptor: PackedDescriptor) {
        let [address, len_id_flags]: [u64; 2] = zerocopy::transmute!(descriptor);
        self.addr.set(address);
        self.id_flags_len.set(len_id_flags.rotate_left(32));
    }

    /// The descriptor that was kept.
    pub(super) fn descriptor(&self) -> PackedDescriptor {
        zerocopy::transmute!([self.addr.get(), self.id_flags_len.get().rotate_left(32)])
    }
}

const _: () = {
    assert!(size_of::<SplitHeader>() == 16 && size_of::<SplitEntry>() == 16);
    assert!(offset_of!(SplitHeader, version) == 8 && offset_of!(SplitHeader, desc_num) == 10);
    assert!(offset_of!(SplitHeader, last_batch_head) == 12 && offset_of!(SplitHeader, used_idx) == 14);
    assert!(offset_of!(SplitEntry, next) == 6 && offset_of!(SplitEntry, counter) == 8);
    assert!(size_of::<PackedHeader>() == 32 && size_of::<PackedEntry>() == 32);
    assert!(offset_of!(PackedHeader, version) == 8 && offset_of!(PackedHeader, desc_num) == 10);
    assert!(offset_of!(PackedHeader, free_heads) == 12 && offset_of!(PackedHeader, used_places) == 16);
    assert!(offset_of!(PackedEntry, next) == 2 && offset_of!(PackedEntry, last) == 4);
    assert!(offset_of!(PackedEntry, num) == 6 && offset_of!(PackedEntry, counter) == 8);
    assert!(offset_of!(PackedEntry, id_flags_len) == 16 && offset_of!(PackedEntry, addr) == 24);
};

/// The two heads of the list of free entries, which lie side by side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FreeHeads {
    pub(super) new: u16,
    pub(super) old: u16,
}

impl FreeHeads {
    pub(super) const fn decode(bits: u32) -> Self {
        let [a, b, c, d] = bits.to_ne_bytes();
        Self { new: u16::from_ne_bytes([a, b]), old: u16::from_ne_bytes([c, d]) }
    }

    #[inline]
    pub(super) const fn encode(self) -> u32 {
        let ([a, b], [c, d]) = (self.new.to_ne_bytes(), self.old.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    }
}

/// The two used places, which lie side by side: index and wrap counter of each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct UsedPlaces {
    pub(super) new: (u16, u8),
    pub(super) old: (u16, u8),
}

impl UsedPlaces {
    pub(super) const fn decode(bits: u64) -> Self {
        let [a, b, c, d, new_wrap, old_wrap, _, _] = bits.to_ne_bytes();
        Self { new: (u16::from_ne_bytes([a, b]), new_wrap), old: (u16::from_ne_bytes([c, d]), old_wrap) }
    }

    #[inline]
    pub(super) const fn encode(self) -> u64 {
        let ([a, b], [c, d]) = (self.new.0.to_ne_bytes(), self.old.0.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, self.new.1, self.old.1, 0, 0])
    }
}

/// What a region is made of.
///
/// # Safety
/// Only for types that consist of atomics alone: then any bytes are a value of it, and others may change them at any time.
pub(super) unsafe trait Shared {}

// SAFETY: it consists of atomics.
unsafe impl Shared for SplitHeader {}
// SAFETY: it consists of atomics.
unsafe impl Shared for SplitEntry {}
// SAFETY: it consists of atomics.
unsafe impl Shared for PackedHeader {}
// SAFETY: it consists of atomics.
unsafe impl Shared for PackedEntry {}

/// Bytes of a region with a header `H` and `count` entries `E`, before it is rounded up.
pub(super) const fn bytes<H, E>(count: u16) -> usize {
    size_of::<H>() + count as usize * size_of::<E>()
}

/// One queue's region.
#[derive(Debug)]
pub(super) struct Region<H, E> {
    header: NonNull<H>,
    entries: NonNull<E>,
    count: u16,
    /// Keeps the memory mapped.
    _mapping: Arc<Mapping>,
}

// SAFETY: it points to atomics in a mapping that it keeps alive; any thread may touch them.
unsafe impl<H: Shared, E: Shared> Send for Region<H, E> {}

impl<H: Shared, E: Shared> Region<H, E> {
    /// The region at `offset` of `mapping`, with `count` entries. `None` if it is not wholly inside, or not aligned.
    pub(super) fn new(mapping: &Arc<Mapping>, offset: usize, count: u16) -> Option<Self> {
        let end = offset.checked_add(bytes::<H, E>(count))?;
        let aligned = offset.is_multiple_of(align_of::<H>()) && size_of::<H>().is_multiple_of(align_of::<E>());
        if end > mapping.len() || !aligned {
            return None;
        }
        let start = NonNull::new(mapping.as_ptr())?;
        // SAFETY: the offset is inside the mapping, as just checked.
        let header = unsafe { start.byte_add(offset) }.cast::<H>();
        // SAFETY: so are the header behind it, and the entries behind that.
        let entries = unsafe { header.add(1) }.cast::<E>();
        Some(Self { header, entries, count, _mapping: Arc::clone(mapping) })
    }

    /// Its header.
    #[inline]
    pub(super) const fn header(&self) -> &H {
        // SAFETY: inside a mapping that lives as long as `self`, aligned (a mapping starts with a page); any bytes are an `H`, and
        // atomics may change behind a shared reference.
        unsafe { self.header.as_ref() }
    }

    /// How many entries it has.
    #[inline]
    pub(super) const fn count(&self) -> u16 {
        self.count
    }

    /// Its entries. What is not counted by ourselves is checked before it is a number of one.
    #[inline]
    pub(super) const fn entries(&self) -> &[E] {
        // SAFETY: as for the header; so many of them lie one behind the other.
        unsafe { std::slice::from_raw_parts(self.entries.as_ptr(), self.count as usize) }
    }

    /// One of them.
    #[inline]
    pub(super) const fn entry(&self, number: u16) -> &E {
        &self.entries()[number as usize]
    }
}
