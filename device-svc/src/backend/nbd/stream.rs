//! A connection while it is being made: every step of it, from the connect to the last byte of the handshake, stands
//! under one deadline, so that a server which drips a byte now and then holds nobody for longer.

use std::io::{self, Read, Write};
use std::net::ToSocketAddrs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr};

use super::uri::NbdAddress;

/// A nonblocking socket whose reads and writes wait, until a deadline.
#[derive(Debug)]
pub(super) struct DeadlineStream {
    socket: OwnedFd,
    deadline: Instant,
}

impl DeadlineStream {
    /// Connects to `address`; this and all that follows ends at `timeout` from now. (Looking up a name stands outside
    /// it: the system's resolver has its own limit.)
    pub(super) fn connect(address: &NbdAddress, timeout: Duration) -> io::Result<Self> {
        match address {
            NbdAddress::Unix(path) => {
                let address = UnixAddr::new(path)?;
                Self::connect_one(AddressFamily::Unix, &address, Instant::now() + timeout)
            }
            NbdAddress::Tcp { host, port } => {
                let found = (host.as_str(), *port).to_socket_addrs()?;
                let deadline = Instant::now() + timeout;
                let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in found {
                    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
                    match Self::connect_one(family, &SockaddrStorage::from(address), deadline) {
                        Ok(stream) => {
                            // A request must not wait for the reply to the one before it.
                            socket::setsockopt(&stream.socket, socket::sockopt::TcpNoDelay, &true)?;
                            // A peer that vanished without a word is found in about half a minute, not in two hours.
                            socket::setsockopt(&stream.socket, socket::sockopt::KeepAlive, &true)?;
                            socket::setsockopt(&stream.socket, socket::sockopt::TcpKeepIdle, &10)?;
                            socket::setsockopt(&stream.socket, socket::sockopt::TcpKeepInterval, &5)?;
                            socket::setsockopt(&stream.socket, socket::sockopt::TcpKeepCount, &4)?;
                            socket::setsockopt(&stream.socket, socket::sockopt::TcpUserTimeout, &30_000)?;
                            return Ok(stream);
                        }
                        Err(failed) => error = failed,
                    }
                }
                Err(error)
            }
        }
    }

    fn connect_one(family: AddressFamily, address: &impl SockaddrLike, deadline: Instant) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let stream = Self { socket: socket::socket(family, SockType::Stream, flags, None)?, deadline };
        match socket::connect(stream.socket.as_raw_fd(), address) {
            Err(nix::Error::EINPROGRESS) => {
                stream.wait(PollFlags::POLLOUT)?;
                match socket::getsockopt(&stream.socket, socket::sockopt::SocketError)? {
                    0 => Ok(stream),
                    error => Err(io::Error::from_raw_os_error(error)),
                }
            }
            result => result.map(|()| stream).map_err(io::Error::from),
        }
    }

    /// The socket, nonblocking, for the data path.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    fn wait(&self, event: PollFlags) -> io::Result<()> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the server did not answer in time"));
            }
            // Rounded up: a wait of 0 ms would spin through the last millisecond.
            let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match nix::poll::poll(&mut [PollFd::new(self.socket.as_fd(), event)], left) {
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for DeadlineStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::read(&self.socket, buffer) {
                Err(nix::Error::EAGAIN) => self.wait(PollFlags::POLLIN)?,
                Err(nix::Error::EINTR) => {}
                result => return result.map_err(io::Error::from),
            }
        }
    }
}

impl Write for DeadlineStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        loop {
            match socket::send(self.socket.as_raw_fd(), buffer, socket::MsgFlags::MSG_NOSIGNAL) {
                Err(nix::Error::EAGAIN) => self.wait(PollFlags::POLLOUT)?,
                Err(nix::Error::EINTR) => {}
                result => return result.map_err(io::Error::from),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
