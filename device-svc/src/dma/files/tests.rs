#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use super::*;

fn file(bytes: i64) -> OwnedFd {
    let fd = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn read_only(fd: &OwnedFd) -> File {
    OpenOptions::new().read(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

#[test]
fn a_file_is_mapped_once_whatever_its_descriptor() {
    let (mut files, ram) = (MemoryFiles::default(), file(0x10000));
    let (first, at) = files.map(&ram, 0x3000, 0x1000, Access::Both).unwrap();
    assert_eq!((first.len(), at), (0x10000, 0x3000));
    let (again, at) = files.map(ram.try_clone().unwrap(), 0xf000, 0x1000, Access::Write).unwrap();
    assert!(Arc::ptr_eq(&first, &again) && at == 0xf000);
    let (other, _) = files.map(file(0x10000), 0, 0x1000, Access::Both).unwrap();
    assert!(!Arc::ptr_eq(&first, &other), "another file of the same size");
    // A mapping that can be written is not given to who may only read.
    let (reading, _) = files.map(read_only(&ram), 0, 0x1000, Access::Read).unwrap();
    assert!(!Arc::ptr_eq(&first, &reading));
    drop((first, again));
    assert_eq!(files.mappings.values().filter(|mapping| mapping.strong_count() > 0).count(), 2);
}

#[test]
fn a_file_that_has_grown_is_mapped_anew() {
    let (mut files, ram) = (MemoryFiles::default(), file(0x1000));
    let (before, _) = files.map(&ram, 0, 0x1000, Access::Both).unwrap();
    assert!(files.map(&ram, 0x1000, 0x1000, Access::Both).is_err());
    ftruncate(&ram, 0x4000).unwrap();
    let (after, at) = files.map(&ram, 0x1000, 0x1000, Access::Both).unwrap();
    assert_eq!((before.len(), after.len(), at), (0x1000, 0x4000, 0x1000));
}

#[test]
fn what_cannot_be_mapped_so_is_refused() {
    let (mut files, ram) = (MemoryFiles::default(), file(0x2000));
    assert!(files.map(read_only(&ram), 0, 0x1000, Access::Both).is_err(), "a descriptor for reading only");
    assert!(files.map(&ram, 0x2000, 0x1000, Access::Both).is_err());
    assert!(files.map(&ram, u64::MAX - 0xfff, 0x1000, Access::Both).is_err());
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    assert!(files.map(&pipe, 0, 0x1000, Access::Both).is_err());
}

#[test]
fn one_front_end_cannot_have_all_mappings() {
    let mut files = MemoryFiles::default();
    let mut kept = Vec::new();
    // Behind an IOMMU each page of a guest comes as a range of its own: all those of one file are one mapping.
    let guest = file(0x100_0000);
    for page in 0..0x1000 {
        kept.push(files.map(&guest, page << 12, 0x1000, Access::Both).unwrap());
    }
    for _ in 1..MAPPINGS_MAX {
        kept.push(files.map(file(0x1000), 0, 0x1000, Access::Both).unwrap());
    }
    let one_more = files.map(file(0x1000), 0, 0x1000, Access::Both);
    assert!(matches!(one_more, Err(MemoryError::TooMany(MAPPINGS_MAX))), "{one_more:?}");
    // A device's memory counts as well; and what is gone does not.
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
    assert!(files.map(&zero, 0, 0x1000, Access::Both).is_err());
    kept.truncate(1);
    files.map(&zero, 0, 0x1000, Access::Both).unwrap();
}

#[test]
fn one_front_end_cannot_have_all_addresses() {
    let mut files = MemoryFiles::default();
    // Sparse files: nobody has so much memory.
    let half = i64::try_from(MAPPED_BYTES_MAX / 2).unwrap();
    let first = files.map(file(half), 0, 0x1000, Access::Both).unwrap();
    let _second = files.map(file(half), 0, 0x1000, Access::Both).unwrap();
    assert!(files.map(file(0x1000), 0, 0x1000, Access::Both).is_err());
    drop(first);
    files.map(file(half), 0, 0x1000, Access::Both).unwrap();
    assert!(files.map(file(half * 4), 0, 0x1000, Access::Both).is_err());
}
