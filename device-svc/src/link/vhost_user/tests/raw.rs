//! vhost-user messages byte by byte, for a front end that says what no decent one does.

use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::fake::PATIENCE;

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_ERR: u32 = 14;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const ADD_MEM_REG: u32 = 37;

/// Version 1, no reply wanted.
pub(super) const PLAIN: u32 = 1;
/// Version 1, with a reply.
pub(super) const NEED_REPLY: u32 = 1 | 8;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(super) const PROTOCOL: u64 = 1 << 30;

/// A connection.
pub(super) struct RawFrontEnd(pub(super) UnixStream);

/// The bytes of a message.
pub(super) fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = [request, flags, body.len() as u32].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend_from_slice(body);
    bytes
}

/// Words one behind the other.
pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// A ring's index and a number.
pub(super) fn state(index: u32, number: u32) -> Vec<u8> {
    [index, number].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

impl RawFrontEnd {
    pub(super) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Connects and negotiates `features` and all protocol features.
    pub(super) fn negotiated(socket: &Path, features: u64) -> Self {
        let mut front_end = Self::connect(socket);
        front_end.send(GET_FEATURES, PLAIN, &[], &[]);
        front_end.reply(GET_FEATURES);
        front_end.send(GET_PROTOCOL_FEATURES, PLAIN, &[], &[]);
        let protocol = front_end.reply(GET_PROTOCOL_FEATURES);
        front_end.send(SET_PROTOCOL_FEATURES, PLAIN, &protocol, &[]);
        assert_eq!(front_end.ask(SET_FEATURES, &words(&[features | PROTOCOL]), &[]), 0);
        front_end
    }

    pub(super) fn send(&mut self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
        self.send_bytes(&message(request, flags, body), fds);
    }

    pub(super) fn send_bytes(&mut self, bytes: &[u8], fds: &[RawFd]) {
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &control[..] };
        let sent = sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// The body of the next message, which must be the reply to this request.
    pub(super) fn reply(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, 1 | 4), "a reply to another request");
        let mut body = vec![0; word(8) as usize];
        self.0.read_exact(&mut body).unwrap();
        body
    }

    /// Sends a message that wants an answer; 0 is yes.
    pub(super) fn ask(&mut self, request: u32, body: &[u8], fds: &[RawFd]) -> u64 {
        self.send(request, NEED_REPLY, body, fds);
        u64::from_ne_bytes(self.reply(request).try_into().unwrap())
    }

    /// Waits until the other side hangs up; what it says before is no answer to anything.
    #[track_caller]
    pub(super) fn wait_for_end(&mut self) {
        let mut bytes = [0; 64];
        match self.0.read(&mut bytes) {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("not hung up: {other:?} {bytes:?}"),
        }
    }
}
