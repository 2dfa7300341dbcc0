//! The memory and the ring of a guest that means harm: files that nobody maps on this side, so that they may be cut short, and
//! descriptors written as they are, whatever they say.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::IntoBytes;

use super::random::Random;
use super::wire::Message;
use crate::virtqueue::packed::AVAIL;
use crate::virtqueue::{DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, PackedDescriptor};

/// Bytes of the region that holds rings, headers and data.
const MAIN_BYTES: u64 = 1 << 20;
/// Where things are in it. The ring's parts have room for 1024 entries.
const TABLE_AT: u64 = 0;
const DRIVER_AT: u64 = 0x8000;
const DEVICE_AT: u64 = 0x10000;
const INDIRECT_AT: u64 = 0x20000;
const LINES_AT: u64 = 0x40000;
const DATA_AT: u64 = 0x80000;
/// Bytes of a request's header and status.
const LINE_BYTES: u64 = 64;
/// A status that no device writes.
pub(super) const NO_STATUS: u8 = 255;

/// One region.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) file: File,
    pub(super) guest: u64,
    pub(super) user: u64,
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

impl Share {
    /// As SET_MEM_TABLE and ADD_MEM_REG name it.
    pub(super) const fn words(&self) -> [u64; 4] {
        [self.guest, self.bytes, self.user, self.offset]
    }

    pub(super) fn fd(&self) -> std::io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

/// The memory.
#[derive(Debug)]
pub(super) struct Guest {
    /// The first one holds everything that is named below.
    pub(super) shares: Vec<Share>,
    lines: u64,
    tables: u64,
}

impl Guest {
    /// One to three regions of files of their own, or of parts of them that start at one of these `offsets`.
    pub(super) fn new(random: &mut Random, offsets: &[u64]) -> std::io::Result<Self> {
        let mut shares = Vec::new();
        let mut guest = random.pick(&[0, 0x1000, 1 << 32, 0x7fff_f000_0000]);
        let mut user = 0x7f00_0000_0000 + (random.below(1 << 20) << 12);
        for number in 0..=random.below(3) {
            let bytes = if number == 0 { MAIN_BYTES } else { 4096 * (1 + random.below(16)) };
            let offset = random.pick(offsets);
            let file = File::from(memfd_create(c"hostile", MFdFlags::MFD_CLOEXEC)?);
            file.set_len(offset + bytes)?;
            shares.push(Share { file, guest, user, bytes, offset });
            guest += bytes + 4096 * random.below(2);
            user += bytes + 4096 * random.below(2);
        }
        Ok(Self { shares, lines: 0, tables: 0 })
    }

    const fn base(&self) -> u64 {
        // `new` makes at least one.
        self.shares.as_slice()[0].guest
    }

    /// Behind the last region.
    pub(super) fn end(&self) -> u64 {
        self.shares.iter().map(|share| share.guest + share.bytes).max().unwrap_or(0)
    }

    /// Where the data buffers are.
    pub(super) const fn data(&self) -> u64 {
        self.base() + DATA_AT
    }

    /// Writes what lies in the first region; what a file that was cut short does not take is lost.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let share = &self.shares[0];
        if let Some(inside) = at.checked_sub(share.guest).filter(|inside| inside + bytes.len() as u64 <= share.bytes) {
            let _ = share.file.write_all_at(bytes, share.offset + inside);
        }
    }

    /// Reads from the first region; what a file that was cut short does not have stays as it is in `bytes`.
    pub(super) fn read(&self, at: u64, bytes: &mut [u8]) {
        let share = &self.shares[0];
        let _ = share.file.read_at(bytes, share.offset.wrapping_add(at.wrapping_sub(share.guest)));
    }

    pub(super) fn byte(&self, at: u64) -> u8 {
        let mut byte = [NO_STATUS];
        self.read(at, &mut byte);
        byte[0]
    }

    /// Room for a header (16 bytes) and a status, with this header in it; the status' address comes second.
    pub(super) fn line(&mut self, kind: u32, sector: u64) -> (u64, u64) {
        let line = self.base() + LINES_AT + (self.lines % 1024) * LINE_BYTES;
        self.lines += 1;
        self.write(line, &[kind.to_le_bytes(), [0; 4]].concat());
        self.write(line + 8, &sector.to_le_bytes());
        self.write(line + 32, &[NO_STATUS]);
        (line, line + 32)
    }

    /// Writes an indirect table of these links; returns where it is.
    pub(super) fn table(&mut self, links: &[Link], packed: bool) -> u64 {
        let at = self.base() + INDIRECT_AT + (self.tables % 16) * 0x2000;
        self.tables += 1;
        for (number, link) in links.iter().enumerate().take(512) {
            let next = link.next.unwrap_or(number as u16 + 1);
            self.write(at + 16 * number as u64, &link.bytes(packed, next, 0));
        }
        at
    }
}

/// A descriptor to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) flags: u16,
    /// The next one's number, if it is not the one that follows.
    pub(super) next: Option<u16>,
}

impl Link {
    /// A buffer that the device reads; more follow.
    pub(super) const fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: DESCRIPTOR_NEXT, next: None }
    }

    /// A buffer that the device writes; more follow.
    pub(super) const fn writable(address: u64, length: u32) -> Self {
        Self { address, length, flags: DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, next: None }
    }

    /// An indirect table, the only one of its chain.
    pub(super) const fn indirect(address: u64, length: u32) -> Self {
        Self { address, length, flags: DESCRIPTOR_INDIRECT, next: None }
    }

    /// The last one of its chain.
    pub(super) const fn last(mut self) -> Self {
        self.flags &= !DESCRIPTOR_NEXT;
        self
    }

    fn bytes(self, packed: bool, next: u16, marks: u16) -> Vec<u8> {
        let Self { address, length, flags, .. } = self;
        if packed {
            PackedDescriptor { address, length, id: next, flags: flags | marks }.as_bytes().to_vec()
        } else {
            Descriptor { address, length, flags, next }.as_bytes().to_vec()
        }
    }
}

/// One queue on its first lap.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) packed: bool,
    pub(super) size: u16,
    next: u16,
    offered: u16,
}

impl Ring {
    /// A fresh ring: its memory is cleared.
    fn new(guest: &Guest, packed: bool, size: u16) -> Self {
        guest.write(guest.base() + TABLE_AT, &vec![0; INDIRECT_AT as usize]);
        Self { packed, size, next: 0, offered: 0 }
    }

    /// A fresh ring of a size that such rings may have.
    pub(super) fn any(guest: &Guest, packed: bool, random: &mut Random) -> Self {
        let size = if packed { random.pick(&[16, 63, 100, 128]) } else { random.pick(&[16, 64, 128]) };
        Self::new(guest, packed, size)
    }

    /// The words of SET_VRING_ADDR for queue `index`.
    pub(super) fn addresses(&self, guest: &Guest, index: u32) -> Message {
        let user = guest.shares[0].user;
        let words = [u64::from(index), user + TABLE_AT, user + DEVICE_AT, user + DRIVER_AT, 0];
        Message::words(super::wire::request::SET_VRING_ADDR, &words)
    }

    /// Where the guest sees its descriptor, driver and device areas.
    pub(super) const fn areas(guest: &Guest) -> [u64; 3] {
        let base = guest.base();
        [base + TABLE_AT, base + DRIVER_AT, base + DEVICE_AT]
    }

    /// The number that the next descriptor gets.
    pub(super) const fn next(&self) -> u16 {
        self.next
    }

    /// Makes a chain available, as far as it fits the first lap.
    pub(super) fn offer(&mut self, guest: &Guest, links: &[Link]) {
        let head = self.next;
        let count = (links.len() as u16).min(self.size - head);
        for (number, link) in links.iter().enumerate().take(usize::from(count)).rev() {
            let slot = head + number as u16;
            // A packed ring's buffer id stands where a split ring's link does.
            let next = if self.packed { head } else { link.next.unwrap_or(slot + 1) };
            let at = guest.base() + TABLE_AT + 16 * u64::from(slot);
            let bytes = link.bytes(self.packed, next, AVAIL);
            // A packed chain is available with the flags of its first descriptor, so those come last: a write to a file is
            // seen in no particular order.
            let (body, flags) = bytes.split_at(14);
            guest.write(at, body);
            guest.write(at + 14, flags);
        }
        self.next = head + count;
        self.entry(guest, head);
    }

    /// Names a chain's head in the available ring, whether there is one or not.
    pub(super) fn entry(&mut self, guest: &Guest, head: u16) {
        if !self.packed {
            let at = guest.base() + DRIVER_AT + 4 + 2 * u64::from(self.offered % self.size);
            guest.write(at, &head.to_le_bytes());
            self.offered = self.offered.wrapping_add(1);
        }
    }

    /// Shows the device what was offered, and `jump` entries more that were not.
    pub(super) fn publish(&self, guest: &Guest, jump: u16) {
        if !self.packed {
            let index = self.offered.wrapping_add(jump);
            guest.write(guest.base() + DRIVER_AT + 2, &index.to_le_bytes());
        }
    }

    /// Fills the ring's parts with random bytes.
    pub(super) fn scribble(&self, guest: &Guest, random: &mut Random) {
        for (at, bytes) in [(TABLE_AT, 16 * u64::from(self.size)), (DRIVER_AT, 4096), (DEVICE_AT, 4096)] {
            if !random.one_in(4) {
                guest.write(guest.base() + at, &random.bytes(bytes as usize));
            }
        }
    }
}
