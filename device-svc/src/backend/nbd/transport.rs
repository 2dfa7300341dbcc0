//! Bytes to and from a server on the data path: a plain socket, which takes payload straight from its place and puts it
//! straight there, or a TLS session, which goes through buffers because the encryption has to.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{self, MsgFlags};
use rustls::ClientConnection;

/// How much plain text a TLS session holds that the socket has not taken yet, bytes; beyond it, sending waits.
const TLS_BUFFER_BYTES: usize = 256 << 10;

/// A connection's lower half.
#[derive(Debug)]
pub(super) struct Transport {
    socket: OwnedFd,
    tls: Option<Box<ClientConnection>>,
}

impl Transport {
    /// Takes a nonblocking socket and the session on it.
    pub(super) fn new(socket: OwnedFd, mut tls: Option<Box<ClientConnection>>) -> Self {
        if let Some(session) = &mut tls {
            session.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        }
        Self { socket, tls }
    }

    /// The socket, to wait on.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether payload may go by itself, without [`Self::write`] and [`Self::read`].
    pub(super) const fn is_plain(&self) -> bool {
        self.tls.is_none()
    }

    /// Takes bytes to send over TLS; returns how many, 0 when the buffer is full.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(session) => session.writer().write(bytes),
            None => Ok(0),
        }
    }

    /// Sends what a TLS session has encrypted. `true` when all has gone.
    pub(super) fn push(&mut self) -> io::Result<bool> {
        let Some(session) = &mut self.tls else { return Ok(true) };
        while session.wants_write() {
            match session.write_tls(&mut Raw(self.socket.as_fd())) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Reads plain text out of a TLS session: `WouldBlock` when there is none, 0 at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &mut self.tls else { return Ok(0) };
        loop {
            match session.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            if session.read_tls(&mut Raw(self.socket.as_fd()))? == 0 {
                return Ok(0);
            }
            session.process_new_packets().map_err(io::Error::other)?;
        }
    }
}

/// A nonblocking socket as rustls wants it.
struct Raw<'a>(BorrowedFd<'a>);

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        socket::recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        socket::send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
            .map_err(io::Error::from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
