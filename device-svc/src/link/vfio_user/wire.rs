//! A connection that both the session and the lanes use: the session hears commands and answers them, and lanes whose guest shares
//! no memory ask the VMM for its bytes.
//!
//! The session's thread waits for commands, and hands answers that come between them to whoever asked. While it is busy itself,
//! perhaps because it waits for a lane to end what it has in flight, nobody would hear the lane's answers; so a lane that waits for
//! one reads too. Commands that it meets are kept for the session. Lanes live on reactors: they never wait here, neither for bytes
//! nor for a lock.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::framing::{
    DESCRIPTORS_MAX, FLAG_ERROR, FLAG_KEEPER, FLAG_NO_REPLY, FLAG_TYPE, Framing, FramingError, HEADER_BYTES, Header,
    Message, TYPE_COMMAND, TYPE_REPLY,
};
use super::message::{BODY_BYTES_MAX, DmaAccess, command};
use crate::address::Iova;
use crate::dma::{DistantMemory, DmaFault, Question};

/// Commands that lanes keep for the session, and their bytes: beyond that they leave them where they are.
const KEPT_MAX: usize = 64;
const KEPT_BYTES_MAX: usize = 4 << 20;
/// What a descriptor counts as, bytes: the process can have far fewer of them, and all functions share them.
const DESCRIPTOR_BYTES: usize = 32 << 10;

/// Bytes that one question is about, at most: with the headers, what a Unix socket takes as one piece or not at all. QEMU (11.1) writes
/// an answer once and does not look at how much of it the socket has taken; of a longer one the end would be lost, and the stream's
/// step with it.
const QUESTION_BYTES_MAX: u32 = 32 << 10;

/// What keeping a message costs, bytes.
const fn cost(message: &Message) -> usize {
    message.body.len() + message.fds.len() * DESCRIPTOR_BYTES
}

#[derive(Debug)]
struct Inbound {
    framing: Framing,
    /// What is being received.
    partial: Message,
    kept: VecDeque<Message>,
    kept_bytes: usize,
    /// The connection has ended, which the session has not heard yet.
    ended: Option<FramingError>,
}

#[derive(Debug)]
struct Outbound {
    framing: Framing,
    /// A question of which the VMM has not taken all.
    unsent: Vec<u8>,
    taken: usize,
}

#[derive(Debug)]
enum Asked {
    Waiting,
    Answered(Vec<u8>),
    Refused,
}

#[derive(Debug, Default)]
struct Questions {
    next_id: u16,
    by_id: HashMap<u16, (u16, Asked)>,
}

/// The connection.
#[derive(Debug)]
pub(super) struct Wire {
    inbound: Mutex<Inbound>,
    outbound: Mutex<Outbound>,
    questions: Mutex<Questions>,
    question_bytes_max: AtomicU32,
    /// There is a keeper between us and the VMM.
    kept: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// The connection on `stream`, to a VMM, or to the keeper that holds one.
    pub(super) fn new(stream: UnixStream, kept: bool) -> std::io::Result<Self> {
        let framing = |stream| Framing::new(stream, BODY_BYTES_MAX, DESCRIPTORS_MAX);
        let outbound = Outbound { framing: framing(stream.try_clone()?), unsent: Vec::new(), taken: 0 };
        let inbound = Inbound {
            framing: framing(stream),
            partial: Message::default(),
            kept: VecDeque::new(),
            kept_bytes: 0,
            ended: None,
        };
        Ok(Self {
            inbound: Mutex::new(inbound),
            outbound: Mutex::new(outbound),
            questions: Mutex::default(),
            question_bytes_max: AtomicU32::new(QUESTION_BYTES_MAX),
            kept,
        })
    }

    /// Whether there is a keeper between us and the VMM.
    pub(super) const fn is_kept(&self) -> bool {
        self.kept
    }

    /// Tells the keeper what the function becomes by the command that is being carried out.
    pub(super) fn keep_state(&self, state: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FramingError> {
        let flags = TYPE_COMMAND | FLAG_NO_REPLY | FLAG_KEEPER;
        self.send(Header { command: command::kept::STATE, flags, ..Header::default() }, &[state], fds)
    }

    /// A command is carried out, or refused, of which the VMM hears nothing: a keeper does.
    pub(super) fn done(&self, refused: Option<Errno>) -> Result<(), FramingError> {
        if !self.kept {
            return Ok(());
        }
        let flags = TYPE_REPLY | FLAG_KEEPER | if refused.is_some() { FLAG_ERROR } else { 0 };
        self.send(Header { command: command::kept::DONE, flags, ..Header::default() }, &[], &[])
    }

    /// What the VMM has said that one message may carry.
    pub(super) fn set_transfer_bytes_max(&self, bytes: u32) {
        self.question_bytes_max.store(bytes.clamp(1, QUESTION_BYTES_MAX), Ordering::Relaxed);
    }

    /// Waits for the next command, or an answer that nobody waits for.
    ///
    /// # Errors
    /// When there is none any more.
    pub(super) fn receive(&self, message: &mut Message) -> Result<(), FramingError> {
        let mut inbound = lock(&self.inbound);
        let inbound = &mut *inbound;
        if let Some(kept) = inbound.kept.pop_front() {
            inbound.kept_bytes -= cost(&kept);
            *message = kept;
            return Ok(());
        }
        if let Some(ended) = inbound.ended.take() {
            return Err(ended);
        }
        loop {
            inbound.framing.receive(&mut inbound.partial)?;
            if !self.is_answer(&mut inbound.partial) {
                std::mem::swap(message, &mut inbound.partial);
                return Ok(());
            }
        }
    }

    /// Sends a message of the session's, behind what a lane has begun to send.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub(super) fn send(&self, header: Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<(), FramingError> {
        let mut outbound = lock(&self.outbound);
        let outbound = &mut *outbound;
        outbound.framing.send_bytes(&outbound.unsent[outbound.taken..])?;
        outbound.unsent.clear();
        outbound.taken = 0;
        outbound.framing.send(header, parts, fds)
    }

    /// Gives a message to the lane that waits for it; returns whether there was one.
    fn is_answer(&self, message: &mut Message) -> bool {
        if message.header.flags & FLAG_TYPE != TYPE_REPLY {
            return false;
        }
        let mut questions = lock(&self.questions);
        let Some((command, asked @ Asked::Waiting)) = questions.by_id.get_mut(&message.header.id) else { return false };
        if *command != message.header.command {
            return false;
        }
        *asked = if message.header.flags & FLAG_ERROR != 0 {
            Asked::Refused
        } else {
            Asked::Answered(std::mem::take(&mut message.body))
        };
        true
    }

    /// Hears what is there, unless the session does.
    fn listen(&self) -> Result<(), DmaFault> {
        let Ok(mut inbound) = self.inbound.try_lock() else { return Ok(()) };
        let inbound = &mut *inbound;
        while inbound.ended.is_none() && inbound.kept.len() < KEPT_MAX && inbound.kept_bytes < KEPT_BYTES_MAX {
            match inbound.framing.try_receive(&mut inbound.partial) {
                Ok(false) => return Ok(()),
                Ok(true) if self.is_answer(&mut inbound.partial) => {}
                Ok(true) => {
                    inbound.kept_bytes += cost(&inbound.partial);
                    inbound.kept.push_back(std::mem::take(&mut inbound.partial));
                }
                Err(error) => inbound.ended = Some(error),
            }
        }
        if inbound.ended.is_some() { Err(DmaFault) } else { Ok(()) }
    }
}

impl Outbound {
    /// Sends on what was begun. Returns whether it is all gone.
    fn flush(&mut self) -> Result<bool, DmaFault> {
        if self.taken < self.unsent.len() {
            self.taken += self.framing.send_some(&self.unsent[self.taken..]).map_err(|_| DmaFault)?;
        }
        Ok(self.taken == self.unsent.len())
    }
}

impl DistantMemory for Wire {
    fn bytes_max(&self) -> u32 {
        self.question_bytes_max.load(Ordering::Relaxed)
    }

    fn ask(&self, at: Iova, question: Question<'_>) -> Result<Option<u16>, DmaFault> {
        let Ok(mut outbound) = self.outbound.try_lock() else { return Ok(None) };
        if !outbound.flush()? {
            return Ok(None);
        }
        let (command, count, data) = match question {
            Question::Read(count) => (command::DMA_READ, count as usize, &[][..]),
            Question::Write(data) => (command::DMA_WRITE, data.len(), data),
        };
        let mut questions = lock(&self.questions);
        let Questions { next_id, by_id } = &mut *questions;
        while by_id.contains_key(next_id) {
            *next_id = next_id.wrapping_add(1);
        }
        let id = *next_id;
        *next_id = id.wrapping_add(1);
        by_id.insert(id, (command, Asked::Waiting));
        drop(questions);
        let access = DmaAccess { address: at.0, count: count as u64 };
        let size = (HEADER_BYTES + size_of::<DmaAccess>() + data.len()) as u32;
        let header = Header { id, command, size, flags: TYPE_COMMAND, error: 0 };
        outbound.unsent.clear();
        outbound.taken = 0;
        for part in [header.as_bytes(), access.as_bytes(), data] {
            outbound.unsent.extend_from_slice(part);
        }
        outbound.flush()?;
        Ok(Some(id))
    }

    fn answer(&self, id: u16, count: u32) -> Result<Option<Vec<u8>>, DmaFault> {
        if let Ok(mut outbound) = self.outbound.try_lock() {
            outbound.flush()?;
        }
        let ended = self.listen();
        let mut questions = lock(&self.questions);
        match questions.by_id.get_mut(&id) {
            Some((_, Asked::Waiting)) => ended.map(|()| None),
            Some((command, Asked::Answered(body))) => {
                let (command, mut body) = (*command, std::mem::take(body));
                questions.by_id.remove(&id);
                let Ok((access, data)) = DmaAccess::read_from_prefix(&body) else { return Err(DmaFault) };
                let expected = if command == command::DMA_READ { count as usize } else { 0 };
                if data.len() != expected || access.count != u64::from(count) {
                    return Err(DmaFault);
                }
                body.drain(..size_of::<DmaAccess>());
                Ok(Some(body))
            }
            Some((_, Asked::Refused)) | None => {
                questions.by_id.remove(&id);
                Err(DmaFault)
            }
        }
    }

    fn forget(&self, id: u16) {
        // The answer may still come: then nobody waits for it, and the session says so to nobody.
        lock(&self.questions).by_id.remove(&id);
    }
}

/// Answers a command with an error.
pub(super) fn answer_error(wire: &Wire, request: Header, errno: Errno) -> Result<(), FramingError> {
    let header = Header { flags: TYPE_REPLY | FLAG_ERROR, error: errno as u32, ..request };
    wire.send(header, &[], &[])
}

#[cfg(test)]
mod tests;
