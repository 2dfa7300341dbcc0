//! The card listens: one front end after another on a socket that only those may open who its permissions allow.
//!
//! A front end that sets a device up and then runs it (libblkio, fio) connects twice in a row, and a VMM that restarts may
//! connect before the end of its old connection was noticed: so a second connection waits in the listen queue until the first
//! has ended.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::{LinkError, Shared};

/// A socket that listens. Its file is removed when this is dropped, if it is still ours.
pub(super) struct Listening {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl Listening {
    pub(super) fn open(path: &Path, mode: u32) -> Result<Self, LinkError> {
        let system = |error| LinkError::System { path: path.to_owned(), error };
        if let Ok(there) = path.symlink_metadata() {
            if !there.file_type().is_socket() {
                return Err(LinkError::NotASocket(path.to_owned()));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(LinkError::InUse(path.to_owned()));
            }
        }
        // Bound under another name, given its permissions, then moved into place: nobody finds it open too far, and a socket
        // that a dead process left is replaced in the same step.
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let new = path.with_file_name(name);
        let _ = std::fs::remove_file(&new);
        let listener = UnixListener::bind(&new).map_err(system)?;
        let placed = std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode))
            .and_then(|()| std::fs::rename(&new, path))
            .and_then(|()| path.symlink_metadata());
        let metadata = placed.inspect_err(|_| drop(std::fs::remove_file(&new))).map_err(system)?;
        listener.set_nonblocking(true).map_err(system)?;
        Ok(Self { listener, path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let ours = self.path.symlink_metadata().is_ok_and(|there| (there.dev(), there.ino()) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Serves front ends until the link stops.
pub(super) fn run(shared: &Shared, listening: &Listening, waker: &EventFd) {
    while !shared.is_stopping() {
        let mut fds =
            [PollFd::new(listening.listener.as_fd(), PollFlags::POLLIN), PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is waited again.
        let _ = poll(&mut fds, PollTimeout::NONE);
        match listening.listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = stream.set_nonblocking(false) {
                    tracing::warn!(function = %shared.settings.function, %error, "a front end could not be served");
                    continue;
                }
                shared.serve(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(function = %shared.settings.function, %error, "a front end could not be accepted");
                // Out of descriptors, say: without a pause this would spin until somebody closes one.
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}
