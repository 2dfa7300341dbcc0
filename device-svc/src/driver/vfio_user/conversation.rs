//! The VMM's side of a connection: questions with their answers, and the card's own questions about memory.

use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::driver::GuestMemory;
use crate::driver::front_end::FrontEndError;
use crate::link::vfio_user::framing::{
    DESCRIPTORS_MAX, FLAG_ERROR, FLAG_NO_REPLY, FLAG_TYPE, Framing, FramingError, Header, Message, TYPE_COMMAND,
    TYPE_REPLY,
};
use crate::link::vfio_user::message::{
    BODY_BYTES_MAX, Capabilities, DmaAccess, RegionAccess, VersionBody, command, version_text,
};

/// How long the card may take to answer: as long as QEMU waits.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// An answer.
pub(super) struct Answer {
    header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Answer {
    /// The structure in front of the body.
    pub(super) fn front<T: FromBytes>(&self) -> Result<T, FrontEndError> {
        let read = T::read_from_prefix(&self.body);
        read.map(|(front, _)| front).map_err(|_| FrontEndError::Protocol("an answer that is too short".to_owned()))
    }
}

/// What both threads use.
#[derive(Debug)]
struct Shared {
    sender: Mutex<Framing>,
    sent: AtomicU64,
    served: AtomicU64,
}

impl Shared {
    fn send(&self, header: Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<(), FramingError> {
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).send(header, parts, fds)
    }

    /// Does what the card asks of the guest's memory.
    fn serve(&self, memory: &GuestMemory, message: &Message) -> Result<(), FramingError> {
        let head = size_of::<DmaAccess>();
        let refuse = |errno: Errno| Header { flags: TYPE_REPLY | FLAG_ERROR, error: errno as u32, ..message.header };
        let Ok((access, data)) = DmaAccess::read_from_prefix(&message.body) else {
            return self.send(refuse(Errno::EINVAL), &[], &[]);
        };
        let inside = access.address.checked_sub(memory.base().0);
        let fits = inside.and_then(|at| at.checked_add(access.count)).is_some_and(|end| end <= memory.len());
        let header = Header { flags: TYPE_REPLY, ..message.header };
        let at = crate::address::Iova(access.address);
        match message.header.command {
            command::DMA_READ | command::DMA_WRITE if !fits => self.send(refuse(Errno::EFAULT), &[], &[]),
            command::DMA_READ if access.count <= u64::from(BODY_BYTES_MAX) - head as u64 => {
                let mut bytes = vec![0; access.count as usize];
                memory.copy_out(at, &mut bytes);
                self.served.fetch_add(1, Ordering::Relaxed);
                self.send(header, &[access.as_bytes(), &bytes], &[])
            }
            command::DMA_WRITE if data.len() as u64 == access.count => {
                memory.copy_in(at, data);
                self.served.fetch_add(1, Ordering::Relaxed);
                self.send(header, &[access.as_bytes()], &[])
            }
            _ => self.send(refuse(Errno::EINVAL), &[], &[]),
        }
    }
}

/// A doorbell that is a message. No reply is wanted.
#[derive(Debug)]
pub struct NotifyMessage {
    shared: Arc<Shared>,
    access: RegionAccess,
    queue: u16,
}

impl NotifyMessage {
    pub(in crate::driver) fn send(&self) {
        let header =
            Header { command: command::REGION_WRITE, flags: TYPE_COMMAND | FLAG_NO_REPLY, ..Header::default() };
        // A card that is gone shows itself with the next question.
        let _ = self.shared.send(header, &[self.access.as_bytes(), &self.queue.to_le_bytes()], &[]);
    }
}

/// A connection. Dropping it hangs up.
pub(super) struct Conversation {
    stream: UnixStream,
    shared: Arc<Shared>,
    answers: Receiver<Answer>,
    reader: Option<JoinHandle<()>>,
    id: u16,
}

impl Conversation {
    /// Agrees on a version.
    pub(super) fn begin(stream: UnixStream, memory: Arc<GuestMemory>) -> Result<Self, FrontEndError> {
        let framing = || std::io::Result::Ok(Framing::new(stream.try_clone()?, BODY_BYTES_MAX, DESCRIPTORS_MAX));
        let shared = Shared { sender: Mutex::new(framing()?), sent: AtomicU64::new(0), served: AtomicU64::new(0) };
        let shared = Arc::new(shared);
        let (answer, answers) = channel();
        let (theirs, receiving) = (Arc::clone(&shared), framing()?);
        let reader = std::thread::Builder::new()
            .name("vmm".to_owned())
            .spawn(move || receive(receiving, &theirs, &memory, &answer))?;
        let mut conversation = Self { stream, shared, answers, reader: Some(reader), id: 0 };
        let version = VersionBody { major: 0, minor: 1 };
        let said = version_text(&Capabilities::default());
        conversation.ask(command::VERSION, &[version.as_bytes(), &said], &[])?;
        Ok(conversation)
    }

    /// Sends a command and waits for its answer.
    pub(super) fn ask(
        &mut self,
        command: u16,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, FrontEndError> {
        let gone = |why: String| FrontEndError::Protocol(format!("command {command}: {why}"));
        self.id = self.id.wrapping_add(1);
        let header = Header { id: self.id, command, flags: TYPE_COMMAND, ..Header::default() };
        self.shared.send(header, parts, fds).map_err(|error| gone(error.to_string()))?;
        let answer = self.answers.recv_timeout(ANSWER_TIME_MAX).map_err(|error| gone(error.to_string()))?;
        if (answer.header.id, answer.header.command) != (self.id, command) {
            return Err(gone("the answer belongs to another question".to_owned()));
        }
        if answer.header.flags & FLAG_ERROR != 0 {
            return Err(gone(Errno::from_raw(answer.header.error.cast_signed()).to_string()));
        }
        Ok(answer)
    }

    pub(super) fn notify_message(&self, region: u32, offset: u64, queue: u16) -> NotifyMessage {
        let access = RegionAccess { offset, region, count: 2 };
        NotifyMessage { shared: Arc::clone(&self.shared), access, queue }
    }

    pub(super) fn sent(&self) -> &AtomicU64 {
        &self.shared.sent
    }

    pub(super) fn served(&self) -> &AtomicU64 {
        &self.shared.served
    }
}

fn receive(mut framing: Framing, shared: &Shared, memory: &GuestMemory, answer: &Sender<Answer>) {
    let mut message = Message::default();
    while framing.receive(&mut message).is_ok() {
        let done = if message.header.flags & FLAG_TYPE == TYPE_COMMAND {
            shared.serve(memory, &message).is_ok()
        } else {
            let Message { header, body, fds } = &mut message;
            let answered = Answer { header: *header, body: std::mem::take(body), fds: std::mem::take(fds) };
            answer.send(answered).is_ok()
        };
        if !done {
            return;
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        // A connection that is gone already needs no end.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
