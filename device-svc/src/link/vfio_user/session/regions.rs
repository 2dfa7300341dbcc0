//! Regions: which the function has, how large they are, and what of them the VMM may map (`VFIO_USER_DEVICE_GET_REGION_INFO`).

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use zerocopy::IntoBytes;

use super::super::message::RegionInfo;
use super::{Refusal, Reply, Session, check_room, refusal};
use crate::pci::{Space, VIRTIO_BAR, layout};

/// Regions of a PCI device (`VFIO_PCI_NUM_REGIONS`): six BARs, the ROM, the configuration space, VGA.
pub(super) const REGIONS: u32 = 9;
const REGION_CONFIG: u32 = 7;

const REGION_READ: u32 = 1;
const REGION_WRITE: u32 = 1 << 1;
const REGION_MMAP: u32 = 1 << 2;
const REGION_CAPS: u32 = 1 << 3;

impl Session {
    pub(super) fn region_info(&self, info: RegionInfo) -> Result<Reply, Refusal> {
        let mut needed = size_of::<RegionInfo>() as u32;
        check_room(info.argsz, needed)?;
        if info.index >= REGIONS {
            return refusal(Errno::EINVAL, format!("there is no region {}", info.index));
        }
        let size = space_of(info.index).map_or(0, |space| self.function.shown().lock().bytes_of(space));
        let mut reply = RegionInfo { argsz: needed, index: info.index, size, ..RegionInfo::default() };
        if size == 0 {
            return Ok(Reply::of(reply.as_bytes()));
        }
        reply.flags = REGION_READ | REGION_WRITE;
        let Some(pages) = self.notify.as_ref().filter(|_| info.index == u32::from(VIRTIO_BAR)) else {
            return Ok(Reply::of(reply.as_bytes()));
        };
        // Only the notify registers: whoever stores to another must be heard.
        let capability = sparse(&[(layout::NOTIFY.offset.into(), layout::NOTIFY.length.into())]);
        needed += capability.len() as u32;
        reply.argsz = needed;
        reply.flags |= REGION_MMAP | REGION_CAPS;
        // Said also to a VMM that has no room for it yet: QEMU asks again with more, but takes an offset of 0 for an error.
        reply.cap_offset = size_of::<RegionInfo>() as u32;
        let again = pages.try_clone().or_else(|error| refusal(Errno::EMFILE, error))?;
        let mut body = reply.as_bytes().to_vec();
        if info.argsz >= needed {
            body.extend_from_slice(&capability);
        }
        Ok(Reply { body, fds: vec![again] })
    }
}

pub(super) fn space_of(region: u32) -> Result<Space, Refusal> {
    match region {
        0..=5 => Ok(Space::Bar(region as u8)),
        REGION_CONFIG => Ok(Space::Config),
        _ => refusal(Errno::EINVAL, format!("there is no region {region}")),
    }
}

/// The capability that says which parts of a region can be mapped (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`).
fn sparse(areas: &[(u64, u64)]) -> Vec<u8> {
    const SPARSE_MMAP: u16 = 1;
    const VERSION: u16 = 1;
    let mut bytes = Vec::new();
    bytes.extend(SPARSE_MMAP.to_ne_bytes());
    bytes.extend(VERSION.to_ne_bytes());
    // The last in the list.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend((areas.len() as u32).to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    for (offset, length) in areas {
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(length.to_ne_bytes());
    }
    bytes
}

/// Memory for the virtio BAR. The card never looks at it: a reactor that polls finds what a doorbell would announce.
pub(super) fn pages() -> std::io::Result<OwnedFd> {
    let fd = memfd_create(c"dray-notify", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&fd, layout::VIRTIO_BAR_BYTES.into())?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(fd)
}
