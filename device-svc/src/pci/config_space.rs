//! The configuration space: a type 0 header and a list of capabilities, as bytes and a mask of which bits can be written.

use super::saved::BadSaved;
use super::{Identity, MSIX_BAR, Range, VIRTIO_BAR, layout};

/// Bytes of the whole space: a PCI Express function has the extended space too, which is empty here.
pub(super) const CONFIG_BYTES: usize = 4096;

/// Where the registers of the header are that mean something here (PCI 3.0, 6.1).
mod header {
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x0a;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR: usize = 0x10;
    pub(super) const SUBSYSTEM: usize = 0x2c;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
}

/// Capability ids.
const ID_POWER: u8 = 0x01;
const ID_VENDOR: u8 = 0x09;
const ID_EXPRESS: u8 = 0x10;
const ID_MSIX: u8 = 0x11;

/// The vendor of virtio devices; 0x1040 and the device type is their device id (virtio 1.3, 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
/// At least 1 for devices that are not transitional (4.1.2.1), and subsystem ids from 0x40 on.
const REVISION: u8 = 1;
const SUBSYSTEM_BASE: u16 = 0x40;

/// Bits of the command register.
pub struct Command;

impl Command {
    /// Memory accesses are answered.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may reach memory.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// INTx is not asserted.
    pub const INTX_DISABLE: u16 = 1 << 10;
    const WRITABLE: u16 = Self::MEMORY | Self::BUS_MASTER | 1 << 6 | 1 << 8 | Self::INTX_DISABLE;
}

/// Status: there is a capability list; an interrupt is pending.
const STATUS_CAPABILITIES: u16 = 1 << 4;
const STATUS_INTERRUPT: u16 = 1 << 3;

/// MSI-X message control.
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;

/// Device control: this bit starts a function-level reset, and reads as zero (PCI Express base, 7.5.3.4).
const INITIATE_RESET: u16 = 1 << 15;

/// virtio's vendor capabilities (virtio 1.3, 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// The space of one function.
#[derive(Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_BYTES]>,
    writable: Box<[u8; CONFIG_BYTES]>,
    after_reset: Box<[u8; CONFIG_BYTES]>,
    power: usize,
    express: usize,
    msix: Option<usize>,
    /// The capability through which BARs can be reached from here.
    window: usize,
}

impl std::fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ConfigSpace({:02x?})", &self.bytes[..64])
    }
}

/// Builds the list of capabilities from the front.
struct Capabilities<'a> {
    space: &'a mut ConfigSpace,
    /// Where the pointer to the next capability goes.
    link: usize,
    end: usize,
}

impl Capabilities<'_> {
    /// Adds one; returns where it is.
    fn add(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.end;
        self.space.bytes[self.link] = at as u8;
        self.space.bytes[at] = id;
        self.space.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.link = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Adds one of virtio's, which says where in a BAR a structure is (virtio 1.3, 4.1.4).
    fn add_virtio(&mut self, kind: u8, range: Range, more: &[u8]) -> usize {
        let length = 16 + more.len() as u8;
        let mut body = vec![length, kind, VIRTIO_BAR, 0, 0, 0];
        body.extend(range.offset.to_le_bytes());
        body.extend(range.length.to_le_bytes());
        body.extend(more);
        self.add(ID_VENDOR, &body)
    }
}

impl ConfigSpace {
    /// The space of a function of this kind, with `vectors` MSI-X vectors; without any it has INTx only.
    #[must_use]
    pub fn new(identity: Identity, vectors: u16) -> Self {
        let zeroes = || Box::new([0; CONFIG_BYTES]);
        let (bytes, writable, after_reset) = (zeroes(), zeroes(), zeroes());
        let mut space = Self { bytes, writable, after_reset, power: 0, express: 0, msix: None, window: 0 };
        space.put16(0, VENDOR);
        space.put16(2, DEVICE_BASE + identity.device_type);
        space.put16(header::STATUS, STATUS_CAPABILITIES);
        space.bytes[header::REVISION] = REVISION;
        space.put16(header::CLASS, identity.class);
        space.put16(header::SUBSYSTEM, VENDOR);
        space.put16(header::SUBSYSTEM + 2, SUBSYSTEM_BASE + identity.device_type);
        space.bytes[header::INTERRUPT_PIN] = 1;
        space.allow16(header::COMMAND, Command::WRITABLE);
        space.writable[header::CACHE_LINE] = 0xff;
        space.writable[header::INTERRUPT_LINE] = 0xff;
        // A 64-bit BAR in prefetchable memory, so that a bridge can place it above 4 GiB; a 32-bit one for the MSI-X table.
        space.add_bar(VIRTIO_BAR, 0b1100, u64::from(layout::VIRTIO_BAR_BYTES));
        if vectors > 0 {
            space.add_bar(MSIX_BAR, 0, u64::from(layout::MSIX_BAR_BYTES));
        }
        space.add_capabilities(vectors);
        space.after_reset = space.bytes.clone();
        space
    }

    fn add_capabilities(&mut self, vectors: u16) {
        let mut list = Capabilities { space: self, link: header::CAPABILITIES, end: 0x40 };
        // Version 3, D0 and D3hot, no PME; leaving D3hot resets nothing (PCI power management 1.2, 3.2).
        let power = list.add(ID_POWER, &[3, 0, 1 << 3, 0, 0, 0]);
        let msix = (vectors > 0).then(|| {
            let mut body = (vectors - 1).to_le_bytes().to_vec();
            body.extend((layout::MSIX_TABLE.offset | u32::from(MSIX_BAR)).to_le_bytes());
            body.extend((layout::MSIX_PENDING.offset | u32::from(MSIX_BAR)).to_le_bytes());
            list.add(ID_MSIX, &body)
        });
        let express = list.add(ID_EXPRESS, &express_body());
        list.add_virtio(CFG_COMMON, layout::COMMON, &[]);
        list.add_virtio(CFG_NOTIFY, layout::NOTIFY, &layout::NOTIFY_BYTES.to_le_bytes());
        list.add_virtio(CFG_ISR, layout::ISR, &[]);
        list.add_virtio(CFG_DEVICE, layout::DEVICE, &[]);
        let window = list.add_virtio(CFG_PCI, Range { offset: 0, length: 0 }, &[0; 4]);
        self.power = power;
        self.msix = msix;
        self.express = express;
        self.window = window;
        self.writable[power + 4] = 0b11;
        if let Some(msix) = msix {
            self.allow16(msix + 2, MSIX_ENABLE | MSIX_MASK_ALL);
        }
        // Device control: what a function without errors, relaxed ordering or snooping of its own may as well keep.
        self.allow16(express + 8, 0x7fff);
        // Link control: ASPM, common clock, extended synch.
        self.allow16(express + 16, 0x00c3);
        // The window's BAR, offset and length; its data is an access.
        self.writable[window + 4] = 0xff;
        self.writable[window + 8..window + 16].fill(0xff);
    }

    fn add_bar(&mut self, number: u8, kind: u8, bytes: u64) {
        let at = header::BAR + 4 * usize::from(number);
        self.bytes[at] = kind;
        let mask = !(bytes - 1);
        let wide = kind & 0b110 == 0b100;
        let count = if wide { 8 } else { 4 };
        self.writable[at..at + count].copy_from_slice(&mask.to_le_bytes()[..count]);
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | u32::from(self.get16(at + 2)) << 16
    }

    fn put16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn allow16(&mut self, at: usize, mask: u16) {
        self.writable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// Back to what it was when it was made.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&*self.after_reset);
    }

    /// Its bytes, up to the last that is not zero.
    pub(super) fn save(&self) -> Vec<u8> {
        let end = self.bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        self.bytes[..end].to_vec()
    }

    /// After a reset: the bits that can be written become those of `saved`; it must be the same function's.
    pub(super) fn restore(&mut self, saved: &[u8]) -> Result<(), BadSaved> {
        let identity = [0..4, header::REVISION..header::CACHE_LINE, header::SUBSYSTEM..header::SUBSYSTEM + 4];
        if saved.len() > CONFIG_BYTES
            || identity.into_iter().any(|part| saved.get(part.clone()) != Some(&self.bytes[part]))
        {
            return Err(BadSaved::Other("ids"));
        }
        for (at, value) in saved.iter().enumerate() {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
        }
        Ok(())
    }

    /// Reads; `interrupt` says whether INTx is asserted. Behind the end are zeroes.
    pub(super) fn read(&self, offset: usize, data: &mut [u8], interrupt: bool) {
        super::msix::copy_from(&*self.bytes, offset, data);
        if interrupt
            && let Some(status) = header::STATUS.checked_sub(offset)
            && let Some(status) = data.get_mut(status)
        {
            *status |= STATUS_INTERRUPT as u8;
        }
    }

    /// Writes the bits that can be written. Returns whether the driver asks for a function-level reset by it.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let power = self.bytes[self.power + 4];
        for (at, value) in (offset..CONFIG_BYTES).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (value & mask);
        }
        // D1 and D2 do not exist: a write that asks for them changes nothing (PCI power management 1.2, 3.2.4).
        if matches!(self.bytes[self.power + 4] & 0b11, 1 | 2) {
            self.bytes[self.power + 4] = (self.bytes[self.power + 4] & !0b11) | (power & 0b11);
        }
        let control = self.express + 9;
        let asked = control.checked_sub(offset).and_then(|at| data.get(at));
        asked.is_some_and(|byte| u16::from(*byte) << 8 & INITIATE_RESET != 0)
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.get16(header::COMMAND)
    }

    /// Whether the function may reach memory: it is a bus master, and has power.
    #[must_use]
    pub fn may_reach_memory(&self) -> bool {
        self.command() & Command::BUS_MASTER != 0 && self.bytes[self.power + 4] & 0b11 == 0
    }

    /// Whether MSI-X is enabled.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        self.msix.is_some_and(|msix| self.get16(msix + 2) & MSIX_ENABLE != 0)
    }

    /// Whether all vectors are masked at once.
    #[must_use]
    pub fn msix_all_masked(&self) -> bool {
        self.msix.is_some_and(|msix| self.get16(msix + 2) & MSIX_MASK_ALL != 0)
    }

    /// Enables or disables MSI-X, as a VMM does that gives the vectors descriptors, or takes them.
    pub fn set_msix_enabled(&mut self, enabled: bool) {
        if let Some(msix) = self.msix {
            let control = self.get16(msix + 2) & !MSIX_ENABLE;
            self.put16(msix + 2, control | if enabled { MSIX_ENABLE } else { 0 });
        }
    }

    /// The data of the window to the BARs, if an access touches it: which BAR, where, and how many bytes (virtio 1.3,
    /// 4.1.4.9). `None`: it does not, or the window is set to nothing that can be accessed.
    pub(super) fn window(&self, offset: usize, length: usize) -> Option<(u8, u64, usize)> {
        let data = self.window + 16;
        if offset != data || length > 4 {
            return None;
        }
        let (bar, at, count) = (self.bytes[self.window + 4], self.get32(self.window + 8), self.get32(self.window + 12));
        (matches!(count, 1 | 2 | 4) && at.is_multiple_of(count)).then_some((bar, u64::from(at), count as usize))
    }
}

/// The PCI Express capability (PCI Express base, 7.5.3) behind its two header bytes: an endpoint on a link of its own speed.
fn express_body() -> [u8; 58] {
    let mut body = [0; 58];
    // Version 2, endpoint.
    body[0] = 0x02;
    // Device capabilities: payload of 256 bytes, extended tags, role-based error reporting, function-level reset.
    let device: u32 = 1 | 1 << 5 | 1 << 15 | 1 << 28;
    body[2..6].copy_from_slice(&device.to_le_bytes());
    // Device control: relaxed ordering, no snoop, read requests of 512 bytes, as after a reset.
    let control: u16 = 1 << 4 | 1 << 11 | 2 << 12;
    body[6..8].copy_from_slice(&control.to_le_bytes());
    // Link capabilities and status: 16 GT/s, 8 lanes; ASPM not supported.
    let link: u32 = 4 | 8 << 4 | 1 << 22;
    body[10..14].copy_from_slice(&link.to_le_bytes());
    let status: u16 = 4 | 8 << 4 | 1 << 12;
    body[16..18].copy_from_slice(&status.to_le_bytes());
    // Link capabilities 2: speeds from 2.5 to 16 GT/s; link control 2: the target is 16.
    body[42..46].copy_from_slice(&(0b1111_u32 << 1).to_le_bytes());
    body[46..48].copy_from_slice(&4_u16.to_le_bytes());
    body
}

#[cfg(test)]
mod tests;
