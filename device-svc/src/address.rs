//! Addresses as types: what a guest writes in a descriptor, what a VMM writes in a message and what the card's own
//! processor can load from are three things, and the compiler keeps them apart.

use std::fmt;

/// An address in the space that a function's DMA uses: guest physical without an IOMMU in the guest, I/O virtual with
/// one. Descriptors and ring addresses hold these. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Iova(pub u64);

impl Iova {
    /// This address plus `bytes`, or `None` where it would wrap: a guest can write any 64 bits.
    #[inline]
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(address) => Some(Self(address)),
            None => None,
        }
    }

    /// Whether the address is a multiple of `alignment` (a power of two).
    #[inline]
    #[must_use]
    pub const fn is_aligned(self, alignment: u64) -> bool {
        self.0 & (alignment - 1) == 0
    }
}

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iova {:#x}", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// An address in the VMM's own address space, as vhost-user messages name rings (`VHOST_USER_SET_VRING_ADDR`). Bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct FrontEndAddress(pub u64);

/// An offset into one lane's card memory ([`crate::dma::CardMemory`]). Bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct CardAddress(pub u32);

impl CardAddress {
    /// This address plus `bytes`; card memory is far smaller than 4 GiB, and an access beyond its end is refused.
    #[inline]
    #[must_use]
    pub const fn add(self, bytes: u32) -> Self {
        Self(self.0 + bytes)
    }
}
