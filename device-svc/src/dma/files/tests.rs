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
