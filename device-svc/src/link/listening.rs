//! A socket that the card listens on, which only those may open who its permissions allow.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::LinkError;

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

    /// Waits for a connection to `function`, or for the waker. `None`: look whether the link is to go on, and wait again.
    pub(super) fn accept(&self, function: &str, waker: &EventFd) -> Option<UnixStream> {
        let mut fds =
            [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN), PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is waited again.
        let _ = poll(&mut fds, PollTimeout::NONE);
        let accepted = self.listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(false)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => Some(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(error) => {
                tracing::warn!(function, %error, "a connection could not be accepted");
                // Out of descriptors, say: without a pause this would spin until somebody closes one.
                std::thread::sleep(std::time::Duration::from_millis(100));
                None
            }
        }
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
