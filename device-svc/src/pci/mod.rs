//! A virtio function's PCI registers: configuration space, MSI-X table, and virtio's structures in the BARs.
//!
//! ```text
//!   function.rs       one access to a region in, bytes or a [`Change`] out
//!     ├► config_space.rs   type 0 header and capabilities (PCI 3.0, 6; PCI Express base, 7)
//!     ├► msix.rs           the MSI-X table
//!     ├► virtio.rs         the common configuration structure (virtio 1.3, 4.1.4.3)
//!     └► saved.rs          all of it as it outlives the service
//! ```
//!
//! Pure: no sockets, no threads. What a register shows that lives elsewhere (the device's own configuration, interrupts that
//! are pending) is asked of an [`Outside`]; what a write means beyond the registers is returned. So the whole function can be
//! saved, restored and fuzzed without a link.

mod config_space;
mod function;
mod msix;
mod saved;
mod virtio;

pub use config_space::{Command, ConfigSpace};
pub use function::{BadAccess, Change, Outside, PciFunction, Space};
pub use msix::MsixTable;
pub use saved::{BadSaved, HexBytes, SavedRegisters};
pub use virtio::{NO_VECTOR, QueueRegisters, VirtioRegisters, status};

/// What a function is, as its registers show it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// virtio's device type (virtio 1.3, 5): 1 net, 2 blk.
    pub device_type: u16,
    /// PCI base class and subclass (PCI Code and ID Assignment): `0x0100` SCSI storage, `0x0200` Ethernet.
    pub class: u16,
}

impl Identity {
    /// virtio-blk.
    pub const BLK: Self = Self { device_type: 2, class: 0x0100 };
    /// virtio-net.
    pub const NET: Self = Self { device_type: 1, class: 0x0200 };
}

/// The BAR with virtio's structures.
pub const VIRTIO_BAR: u8 = 0;
/// The BAR with the MSI-X table. It is apart, so that a VMM which traps the table traps nothing else.
pub const MSIX_BAR: u8 = 2;

/// A range of a BAR, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// Where it starts.
    pub offset: u32,
    /// Its length.
    pub length: u32,
}

impl Range {
    /// Whether an access lies wholly inside; where, if it does.
    #[must_use]
    pub fn inside(self, offset: u64, length: usize) -> Option<u32> {
        let at = offset.checked_sub(u64::from(self.offset))?;
        let end = at.checked_add(length as u64)?;
        (end <= u64::from(self.length)).then_some(at as u32)
    }
}

/// The structures of the virtio BAR, a page each: what may be mapped into a VMM must share its page with nothing else.
pub mod layout {
    use super::Range;

    /// Bytes of the virtio BAR.
    pub const VIRTIO_BAR_BYTES: u32 = 0x4000;
    /// The common configuration (virtio 1.3, 4.1.4.3).
    pub const COMMON: Range = Range { offset: 0, length: 64 };
    /// The ISR status (4.1.4.5).
    pub const ISR: Range = Range { offset: 0x1000, length: 4 };
    /// The device's own configuration (4.1.4.6): as long as any device's that there is.
    pub const DEVICE: Range = Range { offset: 0x2000, length: 0x100 };
    /// The notification registers (4.1.4.4), one of 4 bytes for each queue.
    pub const NOTIFY: Range = Range { offset: 0x3000, length: 0x1000 };
    /// Bytes of one notification register: the 32 bits of NOTIFICATION_DATA.
    pub const NOTIFY_BYTES: u32 = 4;

    /// Bytes of the MSI-X BAR.
    pub const MSIX_BAR_BYTES: u32 = 0x8000;
    /// The MSI-X table: 16 bytes a vector.
    pub const MSIX_TABLE: Range = Range { offset: 0, length: 0x4000 };
    /// The pending bits.
    pub const MSIX_PENDING: Range = Range { offset: 0x4000, length: 0x100 };
}

/// The most queues that a function can have: each has a notification register, and a vector beside that of the configuration.
pub const QUEUES_MAX: u16 = 512;
