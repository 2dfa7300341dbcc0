//! The request formats of virtio-blk (virtio 1.3, 5.2.6): bytes of a guest, parsed once into what they may mean.

use virtio_bindings::virtio_blk as spec;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{BlkShared, RANGES_MAX, SECTOR_BYTES};
use crate::backend::BlockOperation;
use crate::metrics::RequestKind;

/// Bytes of a request's header.
pub(super) const HEADER_BYTES: u32 = 16;
/// Bytes of one range of a discard or write-zeroes request.
pub(super) const RANGE_BYTES: u32 = 16;
/// Bytes of the answer to get id.
pub(super) const ID_BYTES: u32 = 20;

/// `VIRTIO_BLK_S_…`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// `struct virtio_blk_req` up to its data.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Debug)]
#[repr(C)]
pub(super) struct Header {
    kind: u32,
    _reserved: u32,
    sector: u64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Debug)]
#[repr(C)]
pub(super) struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// A request that may be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Request {
    /// Read or write of the data buffers at an offset, bytes.
    Transfer { write: bool, offset: u64, bytes: u32 },
    /// Flush.
    Flush,
    /// Ranges in the data buffers, to be discarded or zeroed.
    Ranges { zero: bool, count: u32 },
    /// Get id.
    GetId,
}

impl Header {
    /// What it is counted as.
    #[inline]
    pub(super) const fn counted_as(self) -> RequestKind {
        match self.kind {
            spec::VIRTIO_BLK_T_IN => RequestKind::Read,
            spec::VIRTIO_BLK_T_OUT => RequestKind::Write,
            spec::VIRTIO_BLK_T_FLUSH => RequestKind::Flush,
            spec::VIRTIO_BLK_T_DISCARD => RequestKind::Discard,
            spec::VIRTIO_BLK_T_WRITE_ZEROES => RequestKind::WriteZeroes,
            _ => RequestKind::Other,
        }
    }

    /// What is asked for, with `readable` and `writable` bytes of data buffers, or the status that refuses it.
    #[inline]
    pub(super) fn parse(self, shared: &BlkShared, readable: u32, writable: u32) -> Result<Request, Status> {
        match self.kind {
            spec::VIRTIO_BLK_T_IN => self.transfer(shared, false, writable, readable),
            spec::VIRTIO_BLK_T_OUT => self.transfer(shared, true, readable, writable),
            spec::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            spec::VIRTIO_BLK_T_DISCARD if shared.discard => self.ranges(shared, false, readable),
            spec::VIRTIO_BLK_T_WRITE_ZEROES if shared.write_zeroes => self.ranges(shared, true, readable),
            // With data to read, the row's data buffers are those, and none of them is the device's to write.
            spec::VIRTIO_BLK_T_GET_ID if writable >= ID_BYTES && readable == 0 => Ok(Request::GetId),
            spec::VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
            _ => Err(Status::Unsupported),
        }
    }

    #[inline]
    fn transfer(self, shared: &BlkShared, write: bool, bytes: u32, wrong_way: u32) -> Result<Request, Status> {
        // A block is a power of two: a mask takes a cycle where a division takes thirty.
        let in_block = u64::from(shared.block_bytes) - 1;
        let offset = self.sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = offset.checked_add(u64::from(bytes)).ok_or(Status::IoError)?;
        if wrong_way != 0
            || bytes == 0
            || bytes > shared.payload_bytes_max()
            || (u64::from(bytes) | offset) & in_block != 0
            || end > shared.size_bytes()
            || (write && shared.read_only)
        {
            return Err(Status::IoError);
        }
        Ok(Request::Transfer { write, offset, bytes })
    }

    fn ranges(self, shared: &BlkShared, zero: bool, readable: u32) -> Result<Request, Status> {
        let count = readable / RANGE_BYTES;
        if shared.read_only || !readable.is_multiple_of(RANGE_BYTES) || count == 0 || count > RANGES_MAX {
            return Err(Status::IoError);
        }
        Ok(Request::Ranges { zero, count })
    }
}

impl Range {
    /// The operation, offset and length of one range, or the status that refuses it (virtio 1.3, 5.2.6.2: unknown flags and
    /// `unmap` in a discard are unsupported).
    pub(super) fn parse(self, shared: &BlkShared, zero: bool) -> Result<(BlockOperation, u64, u64), Status> {
        let unmap = self.flags & 1 != 0;
        if self.flags & !1 != 0 || (unmap && !zero) {
            return Err(Status::Unsupported);
        }
        let block = u64::from(shared.block_bytes);
        let offset = self.sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let length = u64::from(self.sectors) * SECTOR_BYTES;
        let end = offset.checked_add(length).ok_or(Status::IoError)?;
        if self.sectors > super::RANGE_SECTORS_MAX
            || !offset.is_multiple_of(block)
            || !length.is_multiple_of(block)
            || end > shared.size_bytes()
        {
            return Err(Status::IoError);
        }
        let operation = if zero { BlockOperation::WriteZeroes { unmap } } else { BlockOperation::Discard };
        Ok((operation, offset, length))
    }
}
