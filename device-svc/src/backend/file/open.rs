//! Opening a file or block device as a volume: what it is, how large, how it wants to be accessed, and that nobody else
//! writes it.
#![expect(unsafe_code, reason = "statx and the ioctls of block devices have no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};

use super::super::BackendError;
use super::{DirectIo, FileSettings};

/// Logical block size of a regular file, bytes: what every guest can boot from.
const FILE_BLOCK_BYTES: u32 = 512;

/// How long a file's lock is waited for, and how often it is looked at.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// Largest logical block size that a virtio-blk driver has to know, bytes.
const BLOCK_BYTES_MAX: u32 = 4096;

mod ioctl {
    // linux/fs.h
    nix::ioctl_read!(device_bytes, 0x12, 114, u64);
    nix::ioctl_read_bad!(logical_block_bytes, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(physical_block_bytes, nix::request_code_none!(0x12, 123), libc::c_uint);
}

/// What is fixed while a file is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Geometry {
    pub(super) block_bytes: u32,
    pub(super) physical_block_bytes: u32,
    pub(super) discard_alignment_bytes: u32,
    /// Whether discard can be tried.
    pub(super) discard: bool,
    /// Whether a flush means something: not in memory.
    pub(super) volatile_cache: bool,
    /// What `O_DIRECT` wants; `None`: the page cache is used.
    pub(super) direct: Option<DirectAlignment>,
}

/// What `O_DIRECT` wants of a request whose offset and length are whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DirectAlignment {
    /// Low bits that must be zero in the address of each segment.
    pub(super) address_mask: usize,
    /// Low bits that must be zero in the length of each segment.
    pub(super) length_mask: usize,
}

/// A locked file.
#[derive(Debug)]
pub(super) struct OpenFile {
    file: Flock<File>,
    path: PathBuf,
    read_only: bool,
    is_device: bool,
    geometry: Geometry,
    size_bytes: AtomicU64,
}

/// What went wrong with a file, and whether waiting can help.
fn fault(path: &Path, error: &io::Error, what: &str) -> BackendError {
    let next = match error.raw_os_error() {
        Some(libc::ENOENT) => "; make it, or say with `create` how large it shall be made",
        Some(libc::EACCES | libc::EPERM) => "; give this user access to it",
        Some(libc::EROFS) => "; open it with `read-only = true`",
        Some(libc::EBUSY) => "; it is mounted or used by the kernel: stop that first",
        Some(libc::ENOSPC | libc::EDQUOT) => "; make room",
        _ => "",
    };
    let text = format!("{}: {what}: {error}{next}", path.display());
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC | libc::EDQUOT | libc::EIO) => {
            BackendError::Unavailable(text)
        }
        _ => BackendError::Refused(text),
    }
}

fn refused(path: &Path, why: impl std::fmt::Display) -> BackendError {
    BackendError::Refused(format!("{}: {why}", path.display()))
}

/// Waits for a file that is in use. The requests of a process that has just been killed may still be under way in the kernel, and
/// the kernel keeps their file open until they have ended, and with it its lock and a block device's `O_EXCL`. So who gets these
/// knows that nothing of the process before can still land.
struct Patience<'a> {
    path: &'a Path,
    waited: Duration,
}

impl<'a> Patience<'a> {
    const fn new(path: &'a Path) -> Self {
        Self { path, waited: Duration::ZERO }
    }

    /// Waits a moment, or says that it was long enough.
    fn waits(&mut self) -> bool {
        let waits = self.waited < LOCK_PATIENCE;
        if waits {
            std::thread::sleep(LOCK_LOOK);
            self.waited += LOCK_LOOK;
        }
        waits
    }

    /// The file is ours.
    fn ends(&self) {
        if !self.waited.is_zero() {
            let waited_ms = self.waited.as_millis();
            tracing::info!(path = %self.path.display(), waited_ms, "was in use, and was waited for");
        }
    }
}

fn lock(mut file: File, kind: FlockArg, path: &Path) -> Result<Flock<File>, Errno> {
    let mut patience = Patience::new(path);
    loop {
        match Flock::lock(file, kind) {
            Ok(locked) => {
                patience.ends();
                return Ok(locked);
            }
            Err((again, Errno::EWOULDBLOCK)) if patience.waits() => file = again,
            Err((_, errno)) => return Err(errno),
        }
    }
}

impl OpenFile {
    pub(super) fn open(settings: &FileSettings) -> Result<Self, BackendError> {
        let path = settings.path.as_path();
        let (file, created) = open_or_create(settings)?;
        match Self::prepare(settings, file) {
            Err(error) if created => {
                // A file without content that we made a moment ago; were it left, the next try would stumble over it.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
            result => result,
        }
    }

    fn prepare(settings: &FileSettings, file: File) -> Result<Self, BackendError> {
        let path = settings.path.as_path();
        let metadata = file.metadata().map_err(|error| fault(path, &error, "cannot be looked at"))?;
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(refused(path, "is neither a regular file nor a block device"));
        }
        let kind = if settings.read_only { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
        let file = lock(file, kind, path).map_err(|errno| match errno {
            Errno::EWOULDBLOCK => BackendError::Unavailable(format!(
                "{}: is in use as a volume, here or by another process (`lslocks` or `fuser -v {}` shows which); stop that, \
                 or open it read-only everywhere",
                path.display(),
                path.display()
            )),
            errno => fault(path, &errno.into(), "cannot be locked"),
        })?;
        // Under the lock, so that of two who create it one sets the size and the other finds it.
        if let (Some(bytes), false) = (settings.create_bytes, is_device) {
            let empty = file.metadata().map_err(|error| fault(path, &error, "cannot be looked at"))?.len() == 0;
            if empty {
                file.set_len(bytes).map_err(|error| fault(path, &error, "cannot be made that large"))?;
            }
        }
        let block_bytes = if is_device { device_block_bytes(path, &file)? } else { FILE_BLOCK_BYTES };
        let size_bytes = size(&file, is_device, block_bytes).map_err(|error| fault(path, &error, "size unknown"))?;
        match settings.create_bytes {
            Some(bytes) if bytes != size_bytes => {
                return Err(refused(
                    path,
                    format_args!(
                        "is there already and has {size_bytes} bytes, not {bytes}: leave out `create`, or remove it"
                    ),
                ));
            }
            _ if size_bytes == 0 => return Err(refused(path, "is empty: say with `create` how large it shall be")),
            _ => {}
        }
        let is_memory = nix::sys::statfs::fstatfs(file.as_fd())
            .is_ok_and(|system| !is_device && system.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC);
        let physical_block_bytes = if is_device {
            device_physical_block_bytes(&file).unwrap_or(block_bytes)
        } else {
            u32::try_from(metadata.blksize()).unwrap_or(BLOCK_BYTES_MAX).clamp(FILE_BLOCK_BYTES, BLOCK_BYTES_MAX)
        };
        let physical_block_bytes =
            if physical_block_bytes.is_power_of_two() { physical_block_bytes.max(block_bytes) } else { block_bytes };
        let limit = |name: &str| is_device.then(|| queue_limit(metadata.rdev(), name)).flatten();
        let geometry = Geometry {
            block_bytes,
            physical_block_bytes,
            discard_alignment_bytes: limit("discard_granularity")
                .and_then(|bytes| u32::try_from(bytes).ok())
                .filter(|&bytes| bytes >= block_bytes)
                .unwrap_or(physical_block_bytes),
            discard: if is_device {
                // Through `fallocate`, a device's discard is a write of zeroes that gives space up.
                limit("write_zeroes_max_bytes").is_some_and(|bytes| bytes > 0)
            } else {
                !settings.read_only && can_punch(&file, size_bytes)
            },
            volatile_cache: !is_memory,
            direct: direct(settings, &file, is_device, is_memory, block_bytes)?,
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            read_only: settings.read_only,
            is_device,
            geometry,
            size_bytes: AtomicU64::new(size_bytes),
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) const fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) const fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        let size_bytes = if self.is_device {
            size(&self.file, true, self.geometry.block_bytes)
                .map_err(|error| fault(&self.path, &error, "size unknown"))?
        } else if self.read_only {
            return Err(refused(&self.path, "is read-only and keeps its size"));
        } else if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(FILE_BLOCK_BYTES)) {
            return Err(refused(
                &self.path,
                format_args!("cannot have {size_bytes} bytes: give a multiple of {FILE_BLOCK_BYTES}, not 0"),
            ));
        } else {
            self.file.set_len(size_bytes).map_err(|error| fault(&self.path, &error, "cannot be resized"))?;
            size_bytes
        };
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        Ok(size_bytes)
    }
}

/// The open file, and whether it was made just now.
fn open_or_create(settings: &FileSettings) -> Result<(File, bool), BackendError> {
    let path = settings.path.as_path();
    if let Some(bytes) = settings.create_bytes {
        if settings.read_only {
            return Err(refused(path, "`create` and `read-only` exclude each other"));
        }
        if bytes == 0 || bytes % u64::from(FILE_BLOCK_BYTES) != 0 || i64::try_from(bytes).is_err() {
            return Err(refused(
                path,
                format_args!("cannot be made with {bytes} bytes: give a multiple of {FILE_BLOCK_BYTES}, not 0"),
            ));
        }
    }
    let open = |flags: i32, new: bool| {
        OpenOptions::new()
            .read(true)
            .write(!settings.read_only)
            .create_new(new)
            .mode(0o600)
            // Non-blocking, or opening a FIFO by mistake would hang.
            .custom_flags(flags | libc::O_NONBLOCK)
            .open(path)
    };
    if settings.create_bytes.is_some() {
        match open(0, true) {
            Ok(file) => return Ok((file, true)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(fault(path, &error, "cannot be made")),
        }
    }
    // O_EXCL on a block device: not together with a mount or another such user in the kernel.
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let flags = if is_device && !settings.read_only { libc::O_EXCL } else { 0 };
    let mut patience = Patience::new(path);
    loop {
        match open(flags, false) {
            Ok(file) => {
                patience.ends();
                return Ok((file, false));
            }
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && patience.waits() => {}
            Err(error) => return Err(fault(path, &error, "cannot be opened")),
        }
    }
}

fn size(file: &File, is_device: bool, block_bytes: u32) -> io::Result<u64> {
    if is_device {
        let mut bytes = 0_u64;
        // SAFETY: BLKGETSIZE64 writes one u64 to the address.
        unsafe { ioctl::device_bytes(file.as_raw_fd(), &raw mut bytes) }?;
        return Ok(bytes);
    }
    // A tail that is less than a block is the guest's to read too; a write to it fills the file up to the block.
    Ok(file.metadata()?.len().next_multiple_of(u64::from(block_bytes)))
}

fn device_block_bytes(path: &Path, file: &File) -> Result<u32, BackendError> {
    let mut bytes = 0;
    // SAFETY: BLKSSZGET writes one int to the address.
    unsafe { ioctl::logical_block_bytes(file.as_raw_fd(), &raw mut bytes) }
        .map_err(|errno| fault(path, &errno.into(), "block size unknown"))?;
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| bytes.is_power_of_two() && (512..=BLOCK_BYTES_MAX).contains(bytes))
        .ok_or_else(|| {
            refused(path, format_args!("has blocks of {bytes} bytes; 512 to {BLOCK_BYTES_MAX} can be served"))
        })
}

fn device_physical_block_bytes(file: &File) -> Option<u32> {
    let mut bytes = 0;
    // SAFETY: BLKPBSZGET writes one unsigned int to the address.
    unsafe { ioctl::physical_block_bytes(file.as_raw_fd(), &raw mut bytes) }.ok()?;
    Some(bytes)
}

/// A limit of a block device's queue; a partition has its disk's.
fn queue_limit(device: u64, name: &str) -> Option<u64> {
    let folder = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| std::fs::read_to_string(format!("{folder}/{queue}/{name}")).ok())
        .and_then(|text| text.trim().parse().ok())
}

/// Whether holes can be punched, tried where there is nothing: beyond the end.
fn can_punch(file: &File, size_bytes: u64) -> bool {
    let Ok(end) = libc::off_t::try_from(size_bytes.next_multiple_of(4096)) else { return false };
    let mode = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(file, mode, end, 4096).is_ok()
}

/// Turns `O_DIRECT` on if it is wanted and the file can, and `O_NONBLOCK` off in any case.
fn direct(
    settings: &FileSettings,
    file: &File,
    is_device: bool,
    is_memory: bool,
    block_bytes: u32,
) -> Result<Option<DirectAlignment>, BackendError> {
    let path = settings.path.as_path();
    let set = |flags| fcntl(file, FcntlArg::F_SETFL(flags)).map_err(io::Error::from);
    set(OFlag::empty()).map_err(|error| fault(path, &error, "cannot be set to block"))?;
    let must = settings.direct == DirectIo::Always;
    let cannot = |why: String| {
        if must {
            return Err(refused(path, format_args!("cannot be used with direct I/O: {why}")));
        }
        tracing::debug!(path = %path.display(), "no direct I/O: {why}");
        Ok(None)
    };
    if settings.direct == DirectIo::Never {
        return Ok(None);
    }
    let (address_bytes, offset_bytes) = match direct_alignment(file) {
        // Direct I/O on tmpfs is a copy like any other.
        _ if is_memory => (1, 1),
        Some((0, _) | (_, 0)) => return cannot("its file system has none".to_owned()),
        Some(alignment) => alignment,
        None if is_device || must => (block_bytes, block_bytes),
        // Trying it would prove nothing: a hole answers a misaligned read, the data beside it does not.
        None => return cannot("its file system does not tell its alignment (statx)".to_owned()),
    };
    if offset_bytes > block_bytes {
        return cannot(format!("it wants {offset_bytes}-byte blocks, and the volume has {block_bytes}-byte ones"));
    }
    if !address_bytes.is_power_of_two() || address_bytes > super::bounce::ALIGNMENT_BYTES {
        return cannot(format!("it wants memory aligned to {address_bytes} bytes"));
    }
    if let Err(error) = set(OFlag::O_DIRECT) {
        return cannot(error.to_string());
    }
    let length_mask = if is_memory { 0 } else { block_bytes as usize - 1 };
    Ok(Some(DirectAlignment { address_mask: address_bytes as usize - 1, length_mask }))
}

/// The alignment of memory and of offsets for direct I/O, bytes, 0 where there is no direct I/O; `None` if the file
/// system does not tell (before Linux 6.1 none does).
fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: `statx` is plain data that the kernel fills in.
    let mut result: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string (the descriptor is meant), `result` a place for the result.
    let code = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut result)
    };
    (code == 0 && result.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((result.stx_dio_mem_align, result.stx_dio_offset_align))
}
