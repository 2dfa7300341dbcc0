//! Requests and replies: what the bodies of messages hold (vfio-user protocol, "Commands").
//!
//! A body is parsed once, into a [`Request`] whose lengths and counts fit together; what does not is answered with an error, and the
//! stream goes on.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Command numbers.
pub mod command {
    /// `VFIO_USER_VERSION`.
    pub const VERSION: u16 = 1;
    /// `VFIO_USER_DMA_MAP`.
    pub const DMA_MAP: u16 = 2;
    /// `VFIO_USER_DMA_UNMAP`.
    pub const DMA_UNMAP: u16 = 3;
    /// `VFIO_USER_DEVICE_GET_INFO`.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// `VFIO_USER_DEVICE_SET_IRQS`.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// `VFIO_USER_REGION_READ`.
    pub const REGION_READ: u16 = 9;
    /// `VFIO_USER_REGION_WRITE`.
    pub const REGION_WRITE: u16 = 10;
    /// `VFIO_USER_DMA_READ`, from the card.
    pub const DMA_READ: u16 = 11;
    /// `VFIO_USER_DMA_WRITE`, from the card.
    pub const DMA_WRITE: u16 = 12;
    /// `VFIO_USER_DEVICE_RESET`.
    pub const DEVICE_RESET: u16 = 13;
    /// `VFIO_USER_REGION_WRITE_MULTI`.
    pub const REGION_WRITE_MULTI: u16 = 15;
    /// `VFIO_USER_DEVICE_FEATURE`.
    pub const DEVICE_FEATURE: u16 = 16;
    /// `VFIO_USER_MIG_DATA_READ`.
    pub const MIG_DATA_READ: u16 = 17;
    /// `VFIO_USER_MIG_DATA_WRITE`.
    pub const MIG_DATA_WRITE: u16 = 18;

    /// What a service and its keeper say to each other beside a VMM's messages, with `FLAG_KEEPER`.
    pub mod kept {
        /// From the service: the function's state, which holds from the next reply on; descriptors that come with it are of files that
        /// the function writes to without saying so: the record of requests in flight, and what a network's driver commands.
        pub const STATE: u16 = 1;
        /// From the service, as a reply: a command that wants no reply was carried out.
        pub const DONE: u16 = 2;
        /// From the keeper, when it has said all again that was settled: the last state, and the files.
        pub const RESTORE: u16 = 3;
    }
}

/// Bytes that one region access or DMA message may carry: the protocol's default.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Bytes of a body at most: the longest transfer and what goes before it.
pub const BODY_BYTES_MAX: u32 = TRANSFER_BYTES_MAX + 64;
/// Writes in one REGION_WRITE_MULTI at most: ours, the protocol has no limit but the message's size.
pub const WRITES_MAX: usize = 1024;
/// Bytes of the version's JSON at most.
const VERSION_BYTES_MAX: usize = 16 << 10;

/// What a peer says it can do, in VERSION's JSON; a missing one has the protocol's default.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Descriptors that it takes with one message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u32>,
    /// Bytes of one transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u32>,
    /// DMA ranges at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u32>,
    /// Page sizes of DMA ranges, or-ed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// It sends, or takes, REGION_WRITE_MULTI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// A second socket for the card's own commands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
}

/// A second socket for the card's own commands.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TwinSocket {
    /// The sender knows how.
    pub supported: bool,
    /// Which of the reply's descriptors it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<u32>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct VersionData {
    capabilities: Capabilities,
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)* }
    };
}

wire! {
    /// A version, in request and reply; JSON follows.
    VersionBody {
        /// Major: must be ours.
        major: u16,
        /// Minor: the lesser of both.
        minor: u16,
    }
}
wire! {
    /// A range of memory for DMA.
    DmaMap {
        /// Bytes of this structure.
        argsz: u32,
        /// Bit 0: the device may read; bit 1: it may write.
        flags: u32,
        /// Where in the descriptor's file.
        offset: u64,
        /// IOVA.
        address: u64,
        /// Bytes.
        size: u64,
    }
}
wire! {
    /// A range that goes away; the reply repeats it.
    DmaUnmap {
        /// Bytes of the reply at most.
        argsz: u32,
        /// Bit 1: report dirty pages; bit 2: all ranges.
        flags: u32,
        /// IOVA.
        address: u64,
        /// Bytes.
        size: u64,
    }
}
wire! {
    /// What the device is.
    DeviceInfo {
        /// Bytes of the reply at most, or needed.
        argsz: u32,
        /// Bit 0: it can be reset; bit 1: it is a PCI device.
        flags: u32,
        /// Regions.
        regions: u32,
        /// Kinds of interrupts.
        irqs: u32,
    }
}
wire! {
    /// What a region is.
    RegionInfo {
        /// Bytes of the reply at most, or needed.
        argsz: u32,
        /// Bit 0: readable, 1: writable, 2: can be mapped, 3: capabilities follow.
        flags: u32,
        /// Which region.
        index: u32,
        /// Where the first capability is, from here.
        cap_offset: u32,
        /// Bytes of the region.
        size: u64,
        /// Where it starts in the reply's descriptor.
        offset: u64,
    }
}
wire! {
    /// Interrupts of one kind.
    IrqInfo {
        /// Bytes of the reply at most, or needed.
        argsz: u32,
        /// Bit 0: by eventfd, 1: can be masked, 2: masks itself when it is signalled.
        flags: u32,
        /// Which kind.
        index: u32,
        /// How many.
        count: u32,
    }
}
wire! {
    /// What to do with interrupts of one kind; data follows.
    IrqSet {
        /// Bytes of this structure and its data.
        argsz: u32,
        /// `IRQ_…` bits: one of data, one of action.
        flags: u32,
        /// Which kind.
        index: u32,
        /// The first.
        start: u32,
        /// How many.
        count: u32,
    }
}
wire! {
    /// A piece of a region; data follows.
    RegionAccess {
        /// Where in the region.
        offset: u64,
        /// Which region.
        region: u32,
        /// Bytes.
        count: u32,
    }
}
wire! {
    /// One of several writes.
    SmallWrite {
        /// Where in the region.
        offset: u64,
        /// Which region.
        region: u32,
        /// Bytes, at most 8.
        count: u32,
        /// The bytes.
        data: [u8; 8],
    }
}
wire! {
    /// A piece of the VMM's memory; data follows.
    DmaAccess {
        /// IOVA.
        address: u64,
        /// Bytes.
        count: u64,
    }
}
wire! {
    /// A device feature; data follows.
    DeviceFeature {
        /// Bytes of the reply at most.
        argsz: u32,
        /// The feature's number, and whether to get, set or probe it.
        flags: u32,
    }
}

/// What comes with SET_IRQS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqData<'a> {
    /// Nothing: the action concerns all of the range.
    None,
    /// A byte for each: those that are not 0 are concerned.
    Bools(&'a [u8]),
    /// Descriptors, which come beside the message: one for each, or none to take theirs away.
    Events,
}

/// What SET_IRQS does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IrqAction {
    /// Mask.
    Mask,
    /// Unmask.
    Unmask,
    /// Signal; with descriptors: whenever the device does.
    Trigger,
}

/// A request whose form is right; whether it makes sense is another matter.
#[derive(Clone, PartialEq, Debug)]
pub enum Request<'a> {
    /// The first: who speaks, and what it can do.
    Version(VersionBody, Capabilities),
    /// Map memory.
    DmaMap(DmaMap),
    /// Unmap memory.
    DmaUnmap(DmaUnmap),
    /// What is the device?
    DeviceInfo(DeviceInfo),
    /// What is a region?
    RegionInfo(RegionInfo),
    /// What interrupts of a kind are there?
    IrqInfo(IrqInfo),
    /// Do something with interrupts.
    SetIrqs(IrqSet, IrqAction, IrqData<'a>),
    /// Read a region.
    RegionRead(RegionAccess),
    /// Write a region.
    RegionWrite(RegionAccess, &'a [u8]),
    /// Write regions in small pieces.
    RegionWriteMulti(&'a [SmallWriteBytes]),
    /// Reset the function.
    DeviceReset,
    /// Get, set or probe a feature.
    DeviceFeature(DeviceFeature),
}

/// A [`SmallWrite`] that need not be aligned.
pub type SmallWriteBytes = [u8; size_of::<SmallWrite>()];

/// Data flags of SET_IRQS.
const IRQ_DATA_NONE: u32 = 1;
const IRQ_DATA_BOOL: u32 = 1 << 1;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
/// Action flags of SET_IRQS.
const IRQ_ACTION_MASK: u32 = 1 << 3;
const IRQ_ACTION_UNMASK: u32 = 1 << 4;
const IRQ_ACTION_TRIGGER: u32 = 1 << 5;

/// Why a message is no request. The stream keeps its step.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadRequest {
    /// Lengths, counts or flags that do not fit together.
    #[error("command {0} is malformed")]
    Malformed(u16),
    /// A command that is not supported here.
    #[error("command {0} is not supported")]
    Unsupported(u16),
}

impl BadRequest {
    /// The reply's error number.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Malformed(_) => Errno::EINVAL,
            Self::Unsupported(_) => Errno::ENOTSUP,
        }
    }
}

/// The structure at the front of a body, and what follows it.
fn front<T: FromBytes>(body: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(body).ok()
}

impl<'a> Request<'a> {
    /// Parses the body of a command.
    ///
    /// # Errors
    /// When it has not the form of such a command, or there is none of that number.
    pub fn parse(command: u16, body: &'a [u8]) -> Result<Self, BadRequest> {
        let parsed = match command {
            command::VERSION => Self::version(body),
            command::DMA_MAP => front(body).map(|(map, _)| Self::DmaMap(map)),
            command::DMA_UNMAP => front(body).map(|(unmap, _)| Self::DmaUnmap(unmap)),
            command::DEVICE_GET_INFO => front(body).map(|(info, _)| Self::DeviceInfo(info)),
            command::DEVICE_GET_REGION_INFO => front(body).map(|(info, _)| Self::RegionInfo(info)),
            command::DEVICE_GET_IRQ_INFO => front(body).map(|(info, _)| Self::IrqInfo(info)),
            command::DEVICE_SET_IRQS => Self::set_irqs(body),
            command::REGION_READ => front(body)
                .filter(|(access, _): &(RegionAccess, _)| access.count <= TRANSFER_BYTES_MAX)
                .map(|(access, _)| Self::RegionRead(access)),
            command::REGION_WRITE => front(body)
                .filter(|(access, data): &(RegionAccess, &[u8])| access.count as usize == data.len())
                .map(|(access, data)| Self::RegionWrite(access, data)),
            command::REGION_WRITE_MULTI => Self::write_multi(body),
            command::DEVICE_RESET => Some(Self::DeviceReset),
            command::DEVICE_FEATURE => front(body).map(|(feature, _)| Self::DeviceFeature(feature)),
            _ => return Err(BadRequest::Unsupported(command)),
        };
        parsed.ok_or(BadRequest::Malformed(command))
    }

    fn version(body: &'a [u8]) -> Option<Self> {
        let (version, text) = front(body)?;
        // The text is optional, and ends with a zero.
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.len() > VERSION_BYTES_MAX {
            return None;
        }
        let data = if text.is_empty() { VersionData::default() } else { serde_json::from_slice(text).ok()? };
        Some(Self::Version(version, data.capabilities))
    }

    fn set_irqs(body: &'a [u8]) -> Option<Self> {
        let (set, rest): (IrqSet, _) = front(body)?;
        let action = match set.flags & (IRQ_ACTION_MASK | IRQ_ACTION_UNMASK | IRQ_ACTION_TRIGGER) {
            IRQ_ACTION_MASK => IrqAction::Mask,
            IRQ_ACTION_UNMASK => IrqAction::Unmask,
            IRQ_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return None,
        };
        let data = match set.flags & (IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD) {
            IRQ_DATA_NONE => IrqData::None,
            IRQ_DATA_BOOL => IrqData::Bools(rest.get(..set.count as usize)?),
            IRQ_DATA_EVENTFD => IrqData::Events,
            _ => return None,
        };
        Some(Self::SetIrqs(set, action, data))
    }

    fn write_multi(body: &'a [u8]) -> Option<Self> {
        let (count, rest): (u64, _) = front(body)?;
        let (writes, rest) = rest.as_chunks();
        let fits = rest.is_empty() && writes.len() as u64 == count && writes.len() <= WRITES_MAX;
        fits.then_some(Self::RegionWriteMulti(writes))
    }
}

/// The JSON of a version message, with its terminating zero.
#[must_use]
pub fn version_text(capabilities: &Capabilities) -> Vec<u8> {
    let data = VersionData { capabilities: capabilities.clone() };
    // Numbers and truth values always have a text.
    let mut text = serde_json::to_vec(&data).unwrap_or_default();
    text.push(0);
    text
}

#[cfg(test)]
mod tests;
