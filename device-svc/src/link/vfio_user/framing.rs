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
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

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
    /// The system refused.
    #[error("the connection failed: {0}")]
    System(#[from] Errno),
}

/// One side of a connection.
#[derive(Debug)]
pub struct Framing {
    stream: UnixStream,
    body_bytes_max: u32,
    descriptors_max: usize,
    control: Vec<u8>,
}

impl Framing {
    /// Frames what comes and goes on `stream`: bodies of at most `body_bytes_max`, with at most `descriptors_max` descriptors.
    #[must_use]
    pub fn new(stream: UnixStream, body_bytes_max: u32, descriptors_max: usize) -> Self {
        let control = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
        Self { stream, body_bytes_max, descriptors_max, control }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// When there is none any more, or what comes is not one; then the connection is of no use.
    pub fn receive(&mut self, message: &mut Message) -> Result<(), FramingError> {
        message.body.clear();
        message.fds.clear();
        let mut header = Header::new_zeroed();
        self.fill(header.as_mut_bytes(), &mut message.fds, true)?;
        let body_bytes = header.size.checked_sub(HEADER_BYTES as u32).filter(|bytes| *bytes <= self.body_bytes_max);
        let body_bytes = body_bytes.ok_or(FramingError::BadSize(header.size))?;
        message.header = header;
        message.body.resize(body_bytes as usize, 0);
        self.fill(&mut message.body, &mut message.fds, false)
    }

    /// Reads until `buffer` is full.
    fn fill(&mut self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>, first: bool) -> Result<(), FramingError> {
        let mut done = 0;
        while done < buffer.len() {
            let mut parts = [IoSliceMut::new(&mut buffer[done..])];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = match recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut self.control), flags) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let count = received.bytes;
            // There is room for as many as the kernel passes at once, so none is cut off.
            for control in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(new) = control {
                    // SAFETY: the kernel has made these descriptors for us with this message, and nobody else knows them.
                    fds.extend(new.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            if fds.len() > self.descriptors_max {
                return Err(FramingError::TooManyDescriptors(self.descriptors_max));
            }
            if count == 0 {
                return Err(if first && done == 0 { FramingError::Closed } else { FramingError::Truncated });
            }
            done += count;
        }
        Ok(())
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

    /// A second handle that sends on the same connection; whoever has both takes care that messages do not mix.
    ///
    /// # Errors
    /// When the process has too many descriptors.
    pub fn again(&self) -> std::io::Result<Self> {
        Ok(Self::new(self.stream.try_clone()?, self.body_bytes_max, self.descriptors_max))
    }
}

#[cfg(test)]
mod tests;
