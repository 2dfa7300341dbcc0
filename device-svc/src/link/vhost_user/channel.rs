//! The channel by which the card tells a front end of a configuration change (`VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`).
//!
//! The `vhost` crate takes the channel's descriptor over and then has no way to send this one message on it. So the message
//! that carries the descriptor is looked at before the crate reads it: a peek hands out a second descriptor of the same socket.
#![expect(unsafe_code, reason = "takes ownership of a descriptor that the kernel has just made for us")]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg, send};

/// Bytes of a message's header: request, flags, size, 32 bits each.
const HEADER_BYTES: usize = 12;
/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`: no body, no reply wanted, protocol version 1.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// `VHOST_USER_NEED_REPLY_MASK`.
const NEED_REPLY: u32 = 1 << 3;

/// What a message says about itself before it is read.
#[derive(Debug)]
pub(super) struct Peeked {
    /// Whether the front end waits to hear how it went.
    pub(super) wants_reply: bool,
    /// The channel that it hands over.
    pub(super) channel: Option<Channel>,
}

impl Default for Peeked {
    /// Of a header that comes in pieces nothing is known; its front end gets the benefit of the doubt.
    fn default() -> Self {
        Self { wants_reply: true, channel: None }
    }
}

impl Peeked {
    /// Waits for the next message, which stays to be read.
    pub(super) fn wait_for(stream: &UnixStream) -> Self {
        let mut header = [0; HEADER_BYTES];
        // Without room for descriptors none is made.
        if recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK) != Ok(HEADER_BYTES) {
            return Self::default();
        }
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let channel = (word(0) == SET_BACKEND_REQ_FD).then(|| Channel::peek(stream)).flatten();
        Self { wants_reply: word(4) & NEED_REPLY != 0, channel }
    }
}

/// Descriptors with one message at most: `SCM_MAX_FD`.
const DESCRIPTORS_MAX: usize = 253;

/// The channel to a front end.
#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

impl Channel {
    /// Takes a second descriptor of the channel that the next message hands over.
    fn peek(stream: &UnixStream) -> Option<Self> {
        let mut header = [0; HEADER_BYTES];
        let mut parts = [IoSliceMut::new(&mut header)];
        // Room for as many as the kernel hands over at once: what is cut off is reported as an error, and those that fitted would
        // stay open.
        let mut space = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).ok()?;
        let mut channel = None;
        for control in message.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                for fd in fds {
                    // SAFETY: the kernel has made this descriptor for us with this message, and nobody else knows it.
                    channel = Some(Self(unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
        }
        channel
    }

    /// Says that the configuration space has changed. A front end that does not read its channel misses it.
    pub(super) fn config_changed(&self) -> nix::Result<()> {
        let bytes: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.0.as_raw_fd(), &bytes, flags).map(drop)
    }
}

#[cfg(test)]
mod tests;
