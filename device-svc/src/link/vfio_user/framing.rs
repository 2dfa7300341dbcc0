//! Bytes and descriptors to whole messages, and back, over a Unix stream. What messages mean is nobody's business here, and the
//! VMM's side frames the same way.
//!
//! A message is a header that says how long it is, and a body. Its descriptors come with one of its bytes, so no read goes beyond
//! the message that is being read: the next one's descriptors stay with the next one.
#![expect(unsafe_code, reason = "takes ownership of descriptors that the kernel has just made for us")]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The bits of a header's flags that say what kind of message it is.
pub const FLAG_TYPE: u32 = 0xf;
/// A command.
pub const TYPE_COMMAND: u32 = 0;
/// A reply.
pub const TYPE_REPLY: u32 = 1;
/// Of a command: no reply is wanted.
pub const FLAG_NO_REPLY: u32 = 1 << 4;
/// Of a reply: it failed, and `error` says why.
pub const FLAG_ERROR: u32 = 1 << 5;
/// Between the service and its keeper only, which takes it off whatever a VMM sends: this message is theirs (`command::kept`), or is
/// one of a VMM's said again.
pub const FLAG_KEEPER: u32 = 1 << 31;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Descriptors with one part of a message at most: what the kernel passes at once (`SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 253;

/// A message's header (vfio-user, "Header").
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The sender's number for it; a reply carries its command's.
    pub id: u16,
    /// What is asked.
    pub command: u16,
    /// Bytes of the whole message.
    pub size: u32,
    /// `FLAG_…` bits and a type.
    pub flags: u32,
    /// An error number, in a reply that failed.
    pub error: u32,
}

/// A message; one that is received into again and again keeps its buffers.
#[derive(Debug, Default)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub body: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why nothing more can be said or heard.
#[derive(Debug, thiserror::Error)]
pub enum FramingError {
    /// The peer has ended the conversation, between two messages.
    #[error("the peer is gone")]
    Closed,
    /// The peer has gone away in the middle of a message.
    #[error("the peer has gone away in the middle of a message")]
    Truncated,
    /// A message longer than any may be, or shorter than its header: what follows is not to be trusted.
    #[error("a message of {0} bytes")]
    BadSize(u32),
    /// More descriptors than one message may carry.
    #[error("more than {0} descriptors with one message")]
    TooManyDescriptors(usize),
    /// What a service before has left of the conversation is of no use to this one.
    #[error("what was kept of the function cannot be used: {0}")]
    Kept(String),
    /// The system refused.
    #[error("the connection failed: {0}")]
    System(#[from] Errno),
}

/// In front of the descriptors that came with a message (`struct cmsghdr`).
#[derive(Clone, Copy, FromBytes)]
#[repr(C)]
struct ControlHeader {
    /// Bytes of this structure and what follows.
    length: usize,
    level: i32,
    kind: i32,
}

/// The descriptors in control data whose header was zeroes before the kernel wrote there. Read here and not by the library, which
/// refuses to where the kernel has made only some of them: those would stay open for ever.
fn descriptors(control: &[u8]) -> impl Iterator<Item = i32> {
    let (header, rest) = ControlHeader::read_from_prefix(control)
        .ok()
        // Nothing else is asked for on these sockets.
        .filter(|(header, _)| (header.level, header.kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS))
        .unwrap_or((ControlHeader { length: 0, level: 0, kind: 0 }, &[]));
    let bytes = header.length.saturating_sub(size_of::<ControlHeader>()).min(rest.len());
    rest[..bytes].chunks_exact(size_of::<i32>()).filter_map(|fd| i32::read_from_bytes(fd).ok())
}

/// One side of a connection.
#[derive(Debug)]
pub struct Framing {
    stream: UnixStream,
    body_bytes_max: u32,
    descriptors_max: usize,
    control: Vec<u8>,
    /// Bytes of the message that is being received which are here.
    received: usize,
}

impl Framing {
    /// Frames what comes and goes on `stream`: bodies of at most `body_bytes_max`, with at most `descriptors_max` descriptors.
    #[must_use]
    pub fn new(stream: UnixStream, body_bytes_max: u32, descriptors_max: usize) -> Self {
        let control = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
        Self { stream, body_bytes_max, descriptors_max, control, received: 0 }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// When there is none any more, or what comes is not one; then the connection is of no use.
    pub fn receive(&mut self, message: &mut Message) -> Result<(), FramingError> {
        self.advance(message, MsgFlags::empty()).map(drop)
    }

    /// Takes what is there of the next message, without waiting. Returns whether it is whole; if not, it goes on with the next call
    /// of this or of [`receive`](Self::receive), for which `message` must be left as it is.
    ///
    /// # Errors
    /// As for `receive`.
    pub fn try_receive(&mut self, message: &mut Message) -> Result<bool, FramingError> {
        self.advance(message, MsgFlags::MSG_DONTWAIT)
    }

    fn advance(&mut self, message: &mut Message, flags: MsgFlags) -> Result<bool, FramingError> {
        if self.received == 0 {
            message.body.clear();
            message.fds.clear();
        }
        loop {
            let Message { header, body, fds } = &mut *message;
            let buffer = match self.received.checked_sub(HEADER_BYTES) {
                Some(inside) => &mut body[inside..],
                None => &mut header.as_mut_bytes()[self.received..],
            };
            if buffer.is_empty() {
                self.received = 0;
                return Ok(true);
            }
            let mut parts = [IoSliceMut::new(buffer)];
            let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
            self.control[..size_of::<ControlHeader>()].fill(0);
            let received = match recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut self.control), flags) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) if flags.contains(MsgFlags::MSG_DONTWAIT) => return Ok(false),
                // It went without reading what it was sent.
                Err(Errno::ECONNRESET) => return Err(self.end()),
                other => other?,
            };
            let (count, cut) = (received.bytes, received.flags.contains(MsgFlags::MSG_CTRUNC));
            // SAFETY: the kernel has made these descriptors for us with this message, and nobody else knows them.
            fds.extend(descriptors(&self.control).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            if cut {
                // There is room for as many as the kernel passes at once: this process has as many open as it may.
                return Err(FramingError::System(Errno::EMFILE));
            }
            if fds.len() > self.descriptors_max {
                return Err(FramingError::TooManyDescriptors(self.descriptors_max));
            }
            if count == 0 {
                return Err(self.end());
            }
            self.received += count;
            if self.received == HEADER_BYTES {
                let size = header.size;
                let body_bytes = size.checked_sub(HEADER_BYTES as u32).filter(|bytes| *bytes <= self.body_bytes_max);
                body.resize(body_bytes.ok_or(FramingError::BadSize(size))? as usize, 0);
            }
        }
    }

    /// The peer is gone: between two messages, or in the middle of one.
    const fn end(&self) -> FramingError {
        if self.received == 0 { FramingError::Closed } else { FramingError::Truncated }
    }

    /// Sends a message; its size is that of `parts`. The descriptors go with its first byte.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn send(&self, header: Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<(), FramingError> {
        let bytes = HEADER_BYTES + parts.iter().map(|part| part.len()).sum::<usize>();
        let size = u32::try_from(bytes).map_err(|_| FramingError::BadSize(u32::MAX))?;
        let header = Header { size, ..header };
        let mut slices: Vec<IoSlice<'_>> =
            std::iter::once(header.as_bytes()).chain(parts.iter().copied()).map(IoSlice::new).collect();
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let mut control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let mut left = &mut slices[..];
        let mut unsent = bytes;
        while unsent > 0 {
            let sent = match sendmsg::<()>(self.stream.as_raw_fd(), left, control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(FramingError::Closed),
                other => other?,
            };
            control = &[];
            unsent -= sent;
            IoSlice::advance_slices(&mut left, sent);
        }
        Ok(())
    }

    /// Sends as many bytes of a message as the peer takes now. Returns how many.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn send_some(&self, bytes: &[u8]) -> Result<usize, FramingError> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        match sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None) {
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(0),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(FramingError::Closed),
            other => Ok(other?),
        }
    }

    /// Waits until the peer has taken all these bytes.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn send_bytes(&self, mut bytes: &[u8]) -> Result<(), FramingError> {
        while !bytes.is_empty() {
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(bytes)], &[], flags, None) {
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(FramingError::Closed),
                other => bytes = &bytes[other?..],
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
