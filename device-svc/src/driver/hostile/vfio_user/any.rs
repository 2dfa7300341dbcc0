//! Messages of any kind, with values of which some are right.

use zerocopy::IntoBytes;

use super::wire::{message, region_read, region_write};
use crate::driver::hostile::guest::Guest;
use crate::driver::hostile::random::Random;
use crate::driver::hostile::wire::{Message, odd_fd};
use crate::driver::hostile::{End, Events, again};
use crate::driver::vfio_user::{IRQ_MSIX, REGION_BAR, REGION_CONFIG};
use crate::link::vfio_user::framing::FLAG_NO_REPLY;
use crate::link::vfio_user::message::{
    DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionInfo, SmallWrite, VersionBody, command,
};

const REGION_MSIX: u32 = 2;

/// Commands that are known.
const COMMANDS: [u16; 16] = [
    command::VERSION,
    command::DMA_MAP,
    command::DMA_MAP,
    command::DMA_UNMAP,
    command::DEVICE_GET_INFO,
    command::DEVICE_GET_REGION_INFO,
    command::DEVICE_GET_IRQ_INFO,
    command::DEVICE_SET_IRQS,
    command::DEVICE_SET_IRQS,
    command::REGION_READ,
    command::REGION_READ,
    command::REGION_WRITE,
    command::REGION_WRITE,
    command::REGION_WRITE,
    command::REGION_WRITE_MULTI,
    command::DEVICE_RESET,
];

/// A region, an offset and a count, often of a register that matters.
fn any_access(random: &mut Random, control: u64) -> (u32, u64, u32) {
    match random.below(8) {
        0..=2 => (REGION_BAR, random.below(0x3c), random.pick(&[1, 2, 4, 8, 3])),
        3 => (REGION_CONFIG, random.pick(&[4, 0x10, 0x44, 0x4a, control, 0xc4, random.clone().below(256)]), 4),
        4 => (REGION_BAR, random.pick(&[0x1000, 0x2000, 0x3000, 0x3ffc, 0x3fff]) + random.below(16), 2),
        5 => (REGION_MSIX, random.pick(&[0, 12, 16, 28, 0x4000, 0x7ffc]), random.pick(&[4, 8])),
        6 => (random.below(11) as u32, random.nasty(), random.pick(&[0, 1, 4, 4096, 1 << 20, (1 << 20) + 1, u32::MAX])),
        _ => (REGION_CONFIG, random.below(4096), random.pick(&[1, 2, 3, 4, 256])),
    }
}

/// A message with values that may be right; `control` is where device control is in the configuration space.
pub(super) fn any_message(random: &mut Random, guest: &Guest, events: &Events, control: u64) -> Result<Message, End> {
    let share = &guest.shares[random.below(guest.shares.len() as u64) as usize];
    let code = if random.one_in(8) { random.below(24) as u16 } else { random.pick(&COMMANDS) };
    let mut built = match code {
        command::VERSION => {
            let texts: [&[u8]; 4] =
                [b"\0", b"{}\0", b"{\"capabilities\":{\"max_msg_fds\":-1}}\0", b"{\"capabilities\":[[[[[[[[[[[["];
            let version = VersionBody { major: random.below(2) as u16, minor: random.next() as u16 };
            message(code, &[version.as_bytes(), random.pick(&texts)])
        }
        command::DMA_MAP => {
            let mut words = [share.offset, share.guest, share.bytes];
            if random.one_in(2) {
                words[random.below(3) as usize] = random.nasty();
            } else {
                // Beside the regions, or across one's edge.
                words[1] = random.pick(&[guest.end() + 4096, share.guest + share.bytes - 4096, 1 << 45, 0]);
            }
            let [offset, address, size] = words;
            let map = DmaMap { argsz: 32, flags: random.pick(&[3, 3, 1, 2, 0, u32::MAX]), offset, address, size };
            let built = message(code, &[map.as_bytes()]);
            match random.below(8) {
                0 => built,
                1 => built.with(odd_fd(random)),
                2 => built.with([share.fd()?, share.fd()?]),
                _ => built.with([share.fd()?]),
            }
        }
        command::DMA_UNMAP => {
            let mut words = [share.guest, share.bytes];
            if !random.one_in(3) {
                words[random.below(2) as usize] = random.nasty();
            }
            let flags = random.pick(&[0, 0, 0, 2, 4]);
            let unmap = DmaUnmap { argsz: 24, flags, address: words[0], size: words[1] };
            message(code, &[unmap.as_bytes()])
        }
        command::DEVICE_GET_INFO => {
            message(code, &[DeviceInfo { argsz: random.pick(&[0, 15, 16, 99]), ..DeviceInfo::default() }.as_bytes()])
        }
        command::DEVICE_GET_REGION_INFO => {
            let (argsz, index) = (random.pick(&[0, 32, 63, 64, u32::MAX]), random.below(11) as u32);
            message(code, &[RegionInfo { argsz, index, ..RegionInfo::default() }.as_bytes()])
        }
        command::DEVICE_GET_IRQ_INFO => {
            let index = random.below(7) as u32;
            message(code, &[IrqInfo { argsz: 16, index, ..IrqInfo::default() }.as_bytes()])
        }
        command::DEVICE_SET_IRQS => {
            let mut number = || random.pick(&[0, 1, 2, 3, 4, 0xffff, u32::MAX]);
            let (start, count) = (number(), number());
            let flags = 1 << random.below(4) | 8 << random.below(4);
            let set = IrqSet { argsz: 20, flags, index: random.pick(&[0, 1, IRQ_MSIX, IRQ_MSIX, 9]), start, count };
            let fds = (0..random.below(5)).filter_map(|_| match random.below(4) {
                0 => odd_fd(random),
                _ => again(&events.call).ok(),
            });
            let fds: Vec<_> = fds.collect();
            message(code, &[set.as_bytes(), &[1, 0, 1, 1]]).with(fds)
        }
        command::REGION_READ => {
            let (region, offset, count) = any_access(random, control);
            region_read(region, offset, count)
        }
        command::REGION_WRITE => {
            let (region, offset, count) = any_access(random, control);
            let data = random.bytes(count.min(64) as usize);
            region_write(region, offset, &data)
        }
        command::REGION_WRITE_MULTI => {
            let count: u64 = random.pick(&[0, 1, 3, 1024]);
            let mut writes = count.to_ne_bytes().to_vec();
            for _ in 0..count {
                let (region, offset, count) = any_access(random, control);
                let data = random.next().to_le_bytes();
                writes.extend(SmallWrite { offset, region, count: count.min(9), data }.as_bytes());
            }
            message(code, &[&writes])
        }
        other => {
            let count = random.pick(&[0, 8, 40]);
            message(other, &[&random.bytes(count)])
        }
    };
    if random.one_in(8) {
        built.flags |= FLAG_NO_REPLY;
    }
    Ok(built)
}
