//! A listening Unix socket that nobody else may open, at no moment, and that no second card takes over.
//!
//! - Its permissions are set on the socket before it has a name: Linux makes the name with the mode of the socket's inode,
//!   lessened by the umask. So there is no moment at which the name is there with wider permissions.
//! - A lock file beside it is held for as long as we listen. Whoever gets the lock knows that a socket left behind is
//!   stale, without a race between two that start at once; the lock ends with the process, however it ends.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another card listens there.
    #[error("{} is in use by a running service; stop that or choose another address", .0.display())]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("{} is there and is no socket; move it away or choose another address", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refuses.
    #[error("{}: {step}: {source}", path.display())]
    System {
        /// The socket or folder.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// A listening socket; its name goes away with it.
pub struct ListeningSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
    inode: u64,
    _lock: Flock<File>,
}

impl ListeningSocket {
    /// Listens at `path` with permissions `mode`. Makes the folder if it is not there; replaces a socket left behind.
    ///
    /// # Errors
    /// When another card listens there, something else is in the way, or the kernel refuses.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, SocketError> {
        let failed =
            |step| move |source: std::io::Error| SocketError::System { path: path.to_path_buf(), step, source };
        if let Some(folder) = path.parent() {
            make_folder(folder)?;
        }
        let lock = take_lock(path)?;
        clear_stale(path)?;
        let socket =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
                .map_err(|error| failed("make a socket")(error.into()))?;
        fchmod(&socket, Mode::from_bits_truncate(mode)).map_err(|error| failed("set permissions")(error.into()))?;
        let address = UnixAddr::new(path).map_err(|error| failed("name the socket")(error.into()))?;
        bind(socket.as_raw_fd(), &address).map_err(|error| failed("bind the socket")(error.into()))?;
        // What the umask took off is given back; this only widens, so it may come later.
        std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set permissions"))?;
        let backlog = Backlog::new(64).map_err(|error| failed("listen")(error.into()))?;
        listen(&socket, backlog).map_err(|error| failed("listen")(error.into()))?;
        let inode = std::fs::symlink_metadata(path).map_err(failed("look at the socket"))?.ino();
        Ok(Self { listener: Some(UnixListener::from(socket)), path: path.to_path_buf(), inode, _lock: lock })
    }

    /// The listener (non-blocking), once.
    pub fn take(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        // Only what is ours: somebody may have put another in its place.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// As root the folder is for all to enter, because VMs under other users reach their functions' sockets in it; each
/// socket has permissions of its own. Below a user's runtime folder it is that user's.
fn make_folder(folder: &Path) -> Result<(), SocketError> {
    let mode = if nix::unistd::geteuid().is_root() { 0o755 } else { 0o700 };
    let made = DirBuilder::new().recursive(true).mode(mode).create(folder);
    made.map_err(|source| SocketError::System { path: folder.to_path_buf(), step: "make the folder", source })
}

fn take_lock(path: &Path) -> Result<Flock<File>, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let file = file.map_err(|source| SocketError::System { path: lock_path.clone(), step: "open the lock", source })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::errno::Errno::EWOULDBLOCK => SocketError::InUse(path.to_path_buf()),
        error => SocketError::System { path: lock_path, step: "take the lock", source: error.into() },
    })
}

fn clear_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |step| move |source: std::io::Error| SocketError::System { path: path.to_path_buf(), step, source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at the socket")(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_path_buf())),
        Ok(_) => {}
    }
    // Not one of ours, which hold the lock, but perhaps another program's.
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            tracing::info!(socket = %path.display(), "replacing a socket that was left behind");
            std::fs::remove_file(path).map_err(failed("remove the socket left behind"))
        }
        Ok(_) => Err(SocketError::InUse(path.to_path_buf())),
        Err(error) => Err(failed("ask who listens")(error)),
    }
}

#[cfg(test)]
mod tests;
