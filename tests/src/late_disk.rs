//! A disk that completes late: the device mapper's `delay` over a block device. For a guest, as root: this machine's own kernel may
//! not have it.
#![expect(unsafe_code, reason = "the device mapper's calls have no safe wrapper")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;

const SECTOR_BYTES: u64 = 512;
/// What `O_DIRECT` wants of memory and offsets at most.
const ALIGNMENT_BYTES: usize = 4096;

/// `struct dm_ioctl` (linux/dm-ioctl.h), and room for a table behind it.
#[repr(C)]
struct Request {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
    table: [u8; 1024],
}

/// `sizeof(struct dm_ioctl)`, which is part of its calls' numbers.
const HEAD_BYTES: usize = 312;
/// `sizeof(struct dm_target_spec)`.
const TARGET_BYTES: usize = 40;

nix::ioctl_readwrite_bad!(device_create, nix::request_code_readwrite!(0xfd, 3, HEAD_BYTES), Request);
nix::ioctl_readwrite_bad!(device_resume, nix::request_code_readwrite!(0xfd, 6, HEAD_BYTES), Request);
nix::ioctl_readwrite_bad!(table_load, nix::request_code_readwrite!(0xfd, 9, HEAD_BYTES), Request);
nix::ioctl_readwrite_bad!(table_status, nix::request_code_readwrite!(0xfd, 12, HEAD_BYTES), Request);

impl Request {
    fn new() -> Self {
        let mut name = [0; 128];
        name[..4].copy_from_slice(b"late");
        Self {
            version: [4, 0, 0],
            data_size: size_of::<Self>() as u32,
            data_start: HEAD_BYTES as u32,
            target_count: 0,
            open_count: 0,
            flags: 0,
            event_nr: 0,
            padding: 0,
            dev: 0,
            name,
            uuid: [0; 129],
            data: [0; 7],
            table: [0; 1024],
        }
    }

    /// Adds a target to the table: `used` bytes of it are taken.
    fn add_target(&mut self, used: &mut usize, sectors: (u64, u64), kind: &str, parameters: &str) {
        let next = (TARGET_BYTES + parameters.len() + 1).next_multiple_of(8);
        let target = &mut self.table[*used..*used + next];
        target[..8].copy_from_slice(&sectors.0.to_ne_bytes());
        target[8..16].copy_from_slice(&sectors.1.to_ne_bytes());
        target[20..24].copy_from_slice(&(next as u32).to_ne_bytes());
        target[24..24 + kind.len()].copy_from_slice(kind.as_bytes());
        target[TARGET_BYTES..TARGET_BYTES + parameters.len()].copy_from_slice(parameters.as_bytes());
        *used += next;
        self.target_count += 1;
    }

    /// What each target of the table says of itself.
    fn statuses(&self) -> Vec<&str> {
        let mut start = self.data_start as usize - HEAD_BYTES;
        let word = |at: usize| u32::from_ne_bytes(self.table[at..at + 4].try_into().unwrap()) as usize;
        (0..self.target_count)
            .map(|_| {
                let text = &self.table[start + TARGET_BYTES..];
                start = self.data_start as usize - HEAD_BYTES + word(start + 20);
                std::str::from_utf8(text.split(|&letter| letter == 0).next().unwrap()).unwrap()
            })
            .collect()
    }
}

/// A block device with several roads to one and the same disk: a write to the same place of another road may overtake it.
///
/// ```text
///   sectors   0 .. S      S .. 2 S     2 S .. 3 S        roads: each with its delay of writes
///                 \           |          /
///                   the disk, 0 .. S                     what has landed
/// ```
///
/// It stays until the guest ends.
#[derive(Debug)]
pub struct LateDisk {
    control: File,
    under: File,
    number: u64,
    sectors: u64,
}

impl LateDisk {
    /// Makes one over the device `under`, of which the first `bytes` are used; each road's writes are this late. Reads are not.
    ///
    /// # Panics
    /// When the kernel does not make it.
    #[must_use]
    pub fn new(under: &Path, bytes: u64, roads: &[Duration]) -> Self {
        assert_eq!(size_of::<Request>(), HEAD_BYTES + 1024);
        let control = OpenOptions::new().read(true).write(true).open("/dev/mapper/control").unwrap();
        let sectors = bytes / SECTOR_BYTES;
        let mut created = Request::new();
        let (mut table, mut resumed) = (Request::new(), Request::new());
        let mut used = 0;
        for (number, delay) in (0..).zip(roads) {
            let (place, delay) = (under.display(), delay.as_millis());
            let parameters = format!("{place} 0 0 {place} 0 {delay}");
            table.add_target(&mut used, (number * sectors, sectors), "delay", &parameters);
        }
        // SAFETY: each request is a `struct dm_ioctl` with as much room behind it as its `data_size` says.
        unsafe {
            device_create(control.as_raw_fd(), &raw mut created).unwrap();
            table_load(control.as_raw_fd(), &raw mut table).unwrap();
            device_resume(control.as_raw_fd(), &raw mut resumed).unwrap();
        }
        // The minor number, as the kernel writes it.
        let number = (created.dev & 0xff) | (created.dev >> 12 & !0xff);
        let under = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(under).unwrap();
        Self { control, under, number, sectors }
    }

    /// The device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/dev/dm-{}", self.number).into()
    }

    /// The first sector of a road.
    #[must_use]
    pub const fn road_sector(&self, road: usize) -> u64 {
        road as u64 * self.sectors
    }

    /// Writes that the device has taken and not yet given to the disk.
    ///
    /// # Panics
    /// When the kernel does not say.
    #[must_use]
    pub fn writes_held(&self) -> u32 {
        let mut request = Request::new();
        // SAFETY: as in `new`.
        unsafe { table_status(self.control.as_raw_fd(), &raw mut request) }.unwrap();
        // Of each road: reads, writes, flushes.
        let writes = |status: &str| status.split_whitespace().nth(1).unwrap().parse::<u32>().unwrap();
        request.statuses().into_iter().map(writes).sum()
    }

    /// What has landed on the disk in its first `bytes`.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn landed(&self, bytes: usize) -> Vec<u8> {
        let mut room = vec![0; bytes + ALIGNMENT_BYTES];
        let start = room.as_ptr().align_offset(ALIGNMENT_BYTES);
        self.under.read_exact_at(&mut room[start..start + bytes], 0).unwrap();
        room[start..start + bytes].to_vec()
    }
}
