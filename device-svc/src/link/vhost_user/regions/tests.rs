#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

fn file(bytes: u64) -> File {
    let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

fn slot(guest: u64, front_end: u64, length: u64, file_offset: u64) -> Slot {
    Slot { guest: Iova(guest), front_end: FrontEndAddress(front_end), length, file_offset }
}

#[test]
fn a_region_is_named_three_ways() {
    let table = Regions::default().with(slot(0x10000, 0x7f00_0000, 0x2000, 512), &file(0x2200)).unwrap();
    assert_eq!(table.translate(FrontEndAddress(0x7f00_1fff)), Some(Iova(0x11fff)));
    assert_eq!(table.translate(FrontEndAddress(0x7f00_2000)), None);
    assert!(table.memory().covers(Iova(0x10000), 0x2000) && !table.memory().covers(Iova(0x10000), 0x2001));
    assert!(table.without(slot(0x10000, 0x7f00_0000, 0x2000, 0)).unwrap().memory().regions().is_empty());
    assert!(table.without(slot(0x10000, 0x7f00_1000, 0x2000, 0)).is_err(), "named otherwise than it was added");
}

#[test]
fn numbers_that_wrap_or_lie_are_refused() {
    let file = file(0x2000);
    let numbers =
        [0, 1, 4095, 4096, 0x2000, 0x2001, 1 << 63, u64::MAX - 8191, u64::MAX - 4096, u64::MAX - 4095, u64::MAX];
    for guest in numbers {
        for front_end in numbers {
            for length in numbers {
                for offset in numbers {
                    let fits = length > 0
                        && guest.is_multiple_of(4096)
                        && [guest, front_end].iter().all(|start| start.checked_add(length).is_some())
                        && offset.checked_add(length).is_some_and(|end| end <= 0x2000);
                    let taken = Regions::default().with(slot(guest, front_end, length, offset), &file).is_ok();
                    assert_eq!(taken, fits, "{guest:#x} {front_end:#x} {length:#x} {offset:#x}");
                }
            }
        }
    }
}
