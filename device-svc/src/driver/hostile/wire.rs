//! vhost-user messages as bytes, so that any part of one can be wrong.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::End;
use super::random::Random;

/// Requests of a front end (the vhost-user protocol's own numbers).
pub(super) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}

/// Bit 30 of the features: there are protocol features.
pub(super) const PROTOCOL: u64 = 1 << 30;
/// Protocol features: several queues, acknowledgements, the back end's channel, configuration, device reset, memory slots.
pub(super) const PROTOCOL_FEATURES: u64 = 1 | REPLY_ACK | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15;
pub(super) const REPLY_ACK: u64 = 1 << 3;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;

/// How long an answer that is due may take: machines are busy, and nobody waits for it in vain.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long sending may block: a back end whose answers nobody reads stops to read in its turn.
const SEND_PATIENCE: Duration = Duration::from_millis(200);
/// A pause in which a back end may say something or not.
const PAUSE_MS: u16 = 2;

/// A message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) code: u32,
    pub(super) flags: u32,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    /// The header's size; the body's if `None`.
    pub(super) size: Option<u32>,
    /// The body goes in a second write, the descriptors with it.
    pub(super) apart: bool,
}

impl Message {
    pub(super) const fn new(code: u32, body: Vec<u8>) -> Self {
        Self { code, flags: VERSION, body, fds: Vec::new(), size: None, apart: false }
    }

    pub(super) fn words(code: u32, words: &[u64]) -> Self {
        Self::new(code, words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    pub(super) fn state(code: u32, index: u32, number: u32) -> Self {
        Self::words(code, &[u64::from(index) | u64::from(number) << 32])
    }

    pub(super) fn with(mut self, fds: impl IntoIterator<Item = OwnedFd>) -> Self {
        self.fds.extend(fds);
        self
    }

    /// Makes it wrong in one way. Whether the stream is still cut into messages where the back end thinks, nobody knows then.
    pub(super) fn spoil(&mut self, random: &mut Random) {
        match random.below(12) {
            0 => self.body.truncate(random.below(self.body.len() as u64 + 1) as usize),
            1 => self.size = Some((self.body.len() as u32).wrapping_add(random.below(64) as u32 + 1)),
            2 => self.size = Some(random.below(self.body.len() as u64 + 1) as u32),
            3 => self.size = Some(random.pick(&[0x1001, 0x10000, 0x7fff_ffff, u32::MAX])),
            4 => {
                let extra = random.pick(&[1, 2, 8, 31, 32, 33, 64]);
                self.fds.extend((0..extra).filter_map(|_| odd_fd(random)));
            }
            5 => self.fds.clear(),
            6 => {
                let count = self.fds.len().max(1);
                self.fds = (0..count).filter_map(|_| odd_fd(random)).collect();
            }
            7 => self.flags = random.next() as u32,
            8 => self.code = if random.one_in(2) { random.below(48) as u32 } else { random.next() as u32 },
            9 => self.body = random.bytes(self.body.len()),
            10 => {
                let more = random.below(4090) as usize;
                self.body.extend(random.bytes(more));
            }
            _ => {
                if !self.body.is_empty() {
                    let at = random.below(self.body.len() as u64) as usize;
                    self.body[at] ^= 1 << random.below(8);
                }
                self.apart = random.one_in(2);
            }
        }
    }
}

/// A descriptor of a kind that few expect.
pub(super) fn odd_fd(random: &mut Random) -> Option<OwnedFd> {
    match random.below(7) {
        0 => Some(nix::unistd::pipe().ok()?.0),
        1 => Some(nix::unistd::pipe().ok()?.1),
        2 => Some(UnixDatagram::unbound().ok()?.into()),
        3 => Some(File::open(random.pick(&["/dev/null", "/dev/zero", "/proc/self/stat", "/"])).ok()?.into()),
        4 => {
            let file = memfd_create(c"short", MFdFlags::MFD_CLOEXEC).ok()?;
            nix::unistd::ftruncate(&file, random.pick(&[0, 1, 4095, 4096, 8192])).ok()?;
            Some(file)
        }
        5 => Some(UnixStream::pair().ok()?.0.into()),
        _ => Some(EventFd::from_value_and_flags(random.nasty() as u32, EfdFlags::EFD_CLOEXEC).ok()?.into()),
    }
}

/// What came back.
#[derive(Debug)]
pub(super) enum Heard {
    /// An answer's body.
    Answer(Vec<u8>),
    /// The back end hung up.
    Gone,
}

/// Why the conversation cannot go on as it should: the back end owes an answer.
#[derive(Debug)]
pub(super) struct Silent;

/// The socket.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    /// Something wrong was said: what comes back, if anything, is not known.
    pub(super) spoiled: bool,
    /// The back end acknowledges what asks for it.
    pub(super) acknowledges: bool,
    /// Device resets that were asked for.
    pub(super) resets: u32,
}

impl Wire {
    pub(super) fn connect(path: &Path) -> std::io::Result<Self> {
        let stream = connect(path)?;
        Ok(Self { stream, spoiled: false, acknowledges: false, resets: 0 })
    }

    /// Sends a message and does not look for an answer. Returns whether it went out.
    pub(super) fn send(&mut self, message: &Message) -> bool {
        if matches!(message.code, request::RESET_DEVICE | request::RESET_OWNER) {
            self.resets += 1;
        }
        let size = message.size.unwrap_or(message.body.len() as u32);
        let mut bytes: Vec<u8> =
            [message.code, message.flags, size].iter().flat_map(|word| word.to_le_bytes()).collect();
        if message.apart {
            return send_bytes(&self.stream, &bytes, &[]) && send_bytes(&self.stream, &message.body, &message.fds);
        }
        bytes.extend(&message.body);
        send_bytes(&self.stream, &bytes, &message.fds)
    }

    /// Sends a message that has an answer, and waits for it.
    pub(super) fn ask(&mut self, message: &Message) -> Result<Heard, Silent> {
        if !self.send(message) {
            return Ok(Heard::Gone);
        }
        if self.spoiled { Ok(listen_briefly(&mut self.stream)) } else { self.answer() }
    }

    /// Sends a message, and waits for its acknowledgement if there can be one: `true` if it was taken or nobody says.
    pub(super) fn tell(&mut self, mut message: Message) -> Result<bool, Silent> {
        if self.acknowledges && !self.spoiled {
            message.flags |= NEED_REPLY;
            return Ok(matches!(self.ask(&message)?, Heard::Answer(body) if body == [0; 8]));
        }
        Ok(self.send(&message))
    }

    /// An answer that is due.
    fn answer(&mut self) -> Result<Heard, Silent> {
        let mut header = [0; HEADER_BYTES];
        if let Some(end) = self.fill(&mut header)? {
            return Ok(end);
        }
        let size = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let mut body = vec![0; (size as usize).min(1 << 16)];
        Ok(self.fill(&mut body)?.unwrap_or(Heard::Answer(body)))
    }

    fn fill(&mut self, to: &mut [u8]) -> Result<Option<Heard>, Silent> {
        match self.stream.read_exact(to) {
            Ok(()) => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(Silent),
            Err(_) => Ok(Some(Heard::Gone)),
        }
    }

    /// Sends bytes that are no messages.
    pub(super) fn garbage(&mut self, random: &mut Random) -> Result<(), End> {
        self.spoiled = true;
        garbage(&mut self.stream, random)
    }
}

/// Sends bytes that are no messages.
pub(super) fn garbage(stream: &mut UnixStream, random: &mut Random) -> Result<(), End> {
    for _ in 0..=random.below(4) {
        // Around the lengths of both protocols' headers, and longer.
        let count = random.pick(&[1, 3, 11, 12, 13, 15, 16, 17, 100, 4096, 70_000]);
        let bytes = random.bytes(count);
        let fds: Vec<OwnedFd> = (0..random.pick(&[0, 1, 2, 3, 3, 200])).filter_map(|_| odd_fd(random)).collect();
        if !send_bytes(stream, &bytes, &fds) || matches!(listen_briefly(stream), Heard::Gone) {
            return Err(End::Gone);
        }
    }
    Ok(())
}

/// Connects to a socket; nothing on it takes for ever.
pub(super) fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(SEND_PATIENCE))?;
    Ok(stream)
}

/// Sends bytes and descriptors; returns whether all went out.
pub(super) fn send_bytes(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    if bytes.is_empty() {
        return true;
    }
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let parts = [IoSlice::new(bytes)];
    sendmsg::<()>(stream.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None) == Ok(bytes.len())
}

/// Takes what is there after a pause, whatever it is.
pub(super) fn listen_briefly(stream: &mut UnixStream) -> Heard {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(PAUSE_MS)) == Ok(0) {
        return Heard::Answer(Vec::new());
    }
    match stream.read(&mut vec![0; 4096]) {
        Ok(count) if count > 0 => Heard::Answer(Vec::new()),
        _ => Heard::Gone,
    }
}
