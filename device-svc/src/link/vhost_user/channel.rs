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

/// What a network function is told, by messages that the `vhost` crate does not know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NetMessage {
    /// `VHOST_USER_SEND_RARP`: the address that the VM has.
    Announce([u8; 6]),
    /// `VHOST_USER_NET_SET_MTU`: what the driver was told, bytes.
    Mtu(u64),
}

impl NetMessage {
    const SEND_RARP: u32 = 19;
    const SET_MTU: u32 = 20;
    /// Each carries one number.
    const BODY_BYTES: usize = 8;
    /// Of a reply: version 1, and that it is one.
    const REPLY: u32 = 0b101;

    /// Takes such a message off the stream, if the next one is: then the crate does not see it.
    fn take(stream: &UnixStream, request: u32, bytes: u32) -> Option<Self> {
        if !matches!(request, Self::SEND_RARP | Self::SET_MTU) || bytes as usize != Self::BODY_BYTES {
            return None;
        }
        let mut whole = [0; HEADER_BYTES + Self::BODY_BYTES];
        if recv(stream.as_raw_fd(), &mut whole, MsgFlags::MSG_WAITALL) != Ok(whole.len()) {
            return None;
        }
        let body = *whole.last_chunk::<{ Self::BODY_BYTES }>()?;
        Some(match request {
            Self::SET_MTU => Self::Mtu(u64::from_ne_bytes(body)),
            _ => Self::Announce(*body.first_chunk()?),
        })
    }

    /// Answers it, where an answer is wanted.
    pub(super) fn answer(self, stream: &UnixStream, done: bool) -> nix::Result<()> {
        let request = match self {
            Self::Announce(_) => Self::SEND_RARP,
            Self::Mtu(_) => Self::SET_MTU,
        };
        let mut bytes: Vec<u8> =
            [request, Self::REPLY, Self::BODY_BYTES as u32].iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend(u64::from(!done).to_ne_bytes());
        send(stream.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).map(drop)
    }
}

/// What a message says about itself before it is read.
#[derive(Debug)]
pub(super) struct Peeked {
    /// It was one of those, and has been read.
    pub(super) net: Option<NetMessage>,
    /// Whether the front end waits to hear how it went.
    pub(super) wants_reply: bool,
    /// The channel that it hands over.
    pub(super) channel: Option<Channel>,
}

impl Default for Peeked {
    /// Of a header that comes in pieces nothing is known; its front end gets the benefit of the doubt.
    fn default() -> Self {
        Self { net: None, wants_reply: true, channel: None }
    }
}

impl Peeked {
    /// Waits for the next message, which stays to be read, but for those that only a `network` function knows.
    pub(super) fn wait_for(stream: &UnixStream, network: bool) -> Self {
        let mut header = [0; HEADER_BYTES];
        // Without room for descriptors none is made.
        if recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK) != Ok(HEADER_BYTES) {
            return Self::default();
        }
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let channel = (word(0) == SET_BACKEND_REQ_FD).then(|| Channel::peek(stream)).flatten();
        let net = if network { NetMessage::take(stream, word(0), word(8)) } else { None };
        Self { net, wants_reply: word(4) & NEED_REPLY != 0, channel }
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
