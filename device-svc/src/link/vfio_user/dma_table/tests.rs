#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::*;

fn file(bytes: i64) -> OwnedFd {
    let fd = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

#[test]
fn ranges_come_and_go() {
    let (mut table, ram) = (DmaTable::default(), file(0x20_0000));
    table.map(Iova(0x10000), 0x8000, Access::Both, 0, Some(&ram)).unwrap();
    table.map(Iova(0x18000), 0x8000, Access::Both, 0x8000, Some(&ram)).unwrap();
    table.map(Iova(0xf_0000), 0x10000, Access::Read, 0, None).unwrap();
    assert!(table.memory().covers(Iova(0x10000), 0x10000));
    assert!(!table.memory().covers(Iova(0xf_0000), 1) && table.memory().find(Iova(0xf_0000)).is_some());
    let mappings: Vec<_> = table.memory().regions().iter().filter_map(|region| region.mapping().cloned()).collect();
    assert!(Arc::ptr_eq(&mappings[0], &mappings[1]), "one file, one mapping");
    for (start, length) in [(0x10000, 0x8000), (0xf000, 0x2000), (0x1f000, 0x2000), (0xf_f000, 0x1000), (0, 0x20_0000)]
    {
        let refused = table.map(Iova(start), length, Access::Both, 0, Some(&ram)).unwrap_err();
        assert_eq!(refused.errno(), Errno::EEXIST, "{start:#x}");
    }
    assert!(!table.unmap(Iova(0x10000), 0x8000).unwrap().is_empty());
    assert!(!table.memory().covers(Iova(0x10000), 1) && table.memory().covers(Iova(0x18000), 0x8000));
    assert!(!table.unmap(Iova(0xf_0000), 0x10000).unwrap().is_empty());
    assert!(table.unmap(Iova(0xf_0000), 0x10000).unwrap().is_empty(), "nothing is there any more");
}

#[test]
fn a_sweep_takes_all_that_is_inside_and_cuts_nothing() {
    let (mut table, ram) = (DmaTable::default(), file(0x10000));
    for page in 0..8 {
        table.map(Iova(0x4000 + page * 0x1000), 0x1000, Access::Both, page * 0x1000, Some(&ram)).unwrap();
    }
    table.map(Iova(0x10_0000), 0x4000, Access::Both, 0, Some(&ram)).unwrap();
    for (start, length) in [(0x10_1000, 0x1000), (0x10_1000, 0x10_0000), (0xf_0000, 0x1_1000)] {
        assert_eq!(table.unmap(Iova(start), length).unwrap_err().errno(), Errno::EINVAL);
    }
    assert!(!table.unmap(Iova(0x5000), 0x2000).unwrap().is_empty());
    assert_eq!(table.memory().regions().len(), 7);
    assert!(!table.unmap(Iova(0), 1 << 63).unwrap().is_empty());
    assert!(table.memory().regions().is_empty());
}

/// QEMU, when a guest turns its IOMMU off, sweeps what lies above the interrupts' addresses with one message.
#[test]
fn a_sweep_may_reach_the_end_of_the_address_space() {
    let (mut table, ram) = (DmaTable::default(), file(0x10000));
    table.map(Iova(1 << 32), 0x4000, Access::Both, 0, Some(&ram)).unwrap();
    table.map(Iova(u64::MAX - 0x2fff), 0x2000, Access::Both, 0, Some(&ram)).unwrap();
    assert!(!table.unmap(Iova(0xfef0_0000), 0_u64.wrapping_sub(0xfef0_0000)).unwrap().is_empty());
    assert!(table.memory().regions().is_empty());
    for (start, length) in [(0x1000, u64::MAX), (0x1000, 0), (0, 0)] {
        assert_eq!(table.unmap(Iova(start), length).unwrap_err().errno(), Errno::EINVAL, "{start:#x}");
    }
}

#[test]
fn what_is_no_range_is_refused() {
    let (mut table, ram) = (DmaTable::default(), file(0x10000));
    for (start, length, offset) in [
        (0, 0, 0),
        (1, 0x1000, 0),
        (0, 0x1001, 0),
        (u64::MAX - 0xfff, 0x2000, 0),
        (!0xfff, 0x1000, 0),
        (0, 0x11000, 0),
        (0, 0x1000, 0x10000),
        (0, 0x1000, 5),
        (0, 0x1000, !0xfff),
    ] {
        let refused = table.map(Iova(start), length, Access::Both, offset, Some(&ram)).unwrap_err();
        assert_eq!(refused.errno(), Errno::EINVAL, "{start:#x} {length:#x} {offset:#x}");
    }
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    assert!(table.map(Iova(0), 0x1000, Access::Both, 0, Some(&pipe)).is_err());
    assert!(table.unmap(Iova(5), u64::MAX).is_err() && table.unmap(Iova(0), 0).is_err());
}
