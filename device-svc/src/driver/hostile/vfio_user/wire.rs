//! The VMM's end of a connection, any part of which can be wrong: messages as bytes, replies that must be those to the question,
//! and answers to what the card asks of memory that it was given no descriptor for.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::driver::hostile::End;
use crate::driver::hostile::guest::Share;
use crate::driver::hostile::random::Random;
use crate::driver::hostile::wire::{Heard, Message, Silent, connect, garbage, listen_briefly, send_bytes};
use crate::link::vfio_user::framing::{
    DESCRIPTORS_MAX, FLAG_ERROR, FLAG_NO_REPLY, FLAG_TYPE, Framing, FramingError, HEADER_BYTES, Header,
    Message as Framed, TYPE_COMMAND, TYPE_REPLY,
};
use crate::link::vfio_user::message::{BODY_BYTES_MAX, DmaAccess, RegionAccess, TRANSFER_BYTES_MAX, command};

/// A command with this body.
pub(super) fn message(code: u16, parts: &[&[u8]]) -> Message {
    Message { flags: TYPE_COMMAND, ..Message::new(code.into(), parts.concat()) }
}

/// A write to a region.
pub(super) fn region_write(region: u32, offset: u64, data: &[u8]) -> Message {
    let access = RegionAccess { offset, region, count: data.len() as u32 };
    message(command::REGION_WRITE, &[access.as_bytes(), data])
}

/// A read of a region.
pub(super) fn region_read(region: u32, offset: u64, count: u32) -> Message {
    message(command::REGION_READ, &[RegionAccess { offset, region, count }.as_bytes()])
}

/// How it answers when the card asks for the guest's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Manner {
    /// As it should.
    Honest,
    /// As it should, and then once more.
    Twice,
    /// With an error.
    Refusing,
    /// With a byte more than was asked for, or with some that nobody asked for.
    TooLong,
    /// With nothing but a header.
    Empty,
    /// Not at all.
    Silent,
}

/// Memory that the card must ask for.
#[derive(Debug)]
struct Distant {
    file: File,
    start: u64,
    bytes: u64,
    offset: u64,
    manner: Manner,
}

/// What came of a command.
#[derive(Debug)]
pub(super) enum Reply {
    /// Its reply's body; empty where nobody knows what to expect.
    Done(Vec<u8>),
    /// An error.
    Refused,
    /// The card hung up.
    Gone,
}

/// The connection.
#[derive(Debug)]
pub(super) struct Wire {
    stream: UnixStream,
    framing: Framing,
    id: u16,
    distant: Option<Distant>,
    /// Something wrong was said: what comes back, if anything, is not known.
    pub(super) spoiled: bool,
    /// Messages that may have reset the device.
    pub(super) resets: u32,
}

impl Wire {
    pub(super) fn connect(path: &Path) -> std::io::Result<Self> {
        let stream = connect(path)?;
        let framing = Framing::new(stream.try_clone()?, BODY_BYTES_MAX, DESCRIPTORS_MAX);
        Ok(Self { stream, framing, id: 0, distant: None, spoiled: false, resets: 0 })
    }

    /// From now on the card is answered so, when it asks for this memory.
    pub(super) fn answer_for(&mut self, share: &Share, manner: Manner) -> std::io::Result<()> {
        let (start, bytes, offset) = (share.guest, share.bytes, share.offset);
        self.distant = Some(Distant { file: share.file.try_clone()?, start, bytes, offset, manner });
        Ok(())
    }

    fn bytes(&mut self, message: &Message) -> Vec<u8> {
        self.id = self.id.wrapping_add(1);
        let size = message.size.unwrap_or(message.body.len() as u32).wrapping_add(HEADER_BYTES as u32);
        let command = message.code as u16;
        Header { id: self.id, command, size, flags: message.flags, error: 0 }.as_bytes().to_vec()
    }

    /// The number of the last message; numbers follow one another.
    pub(super) const fn ids_used(&self) -> u16 {
        self.id
    }

    /// Sends a message and does not look for a reply. Returns whether it went out.
    pub(super) fn send(&mut self, message: &Message) -> bool {
        let code = message.code as u16;
        if matches!(code, command::REGION_WRITE | command::REGION_WRITE_MULTI | command::DEVICE_RESET) {
            self.resets += 1;
        }
        let mut bytes = self.bytes(message);
        if message.apart {
            return send_bytes(&self.stream, &bytes, &[]) && send_bytes(&self.stream, &message.body, &message.fds);
        }
        bytes.extend(&message.body);
        send_bytes(&self.stream, &bytes, &message.fds)
    }

    /// Sends the first part of a message.
    pub(super) fn send_half(&mut self, message: &Message) {
        let mut bytes = self.bytes(message);
        bytes.extend(&message.body);
        let half = bytes.len() / 2;
        send_bytes(&self.stream, &bytes[..half], &message.fds);
    }

    /// Sends a command, and waits for the reply that it must get.
    pub(super) fn ask(&mut self, message: &Message) -> Result<Reply, End> {
        if !self.send(message) {
            return Ok(Reply::Gone);
        }
        if self.spoiled {
            return Ok(match listen_briefly(&mut self.stream) {
                Heard::Answer(_) => Reply::Done(Vec::new()),
                Heard::Gone => Reply::Gone,
            });
        }
        if message.flags & FLAG_NO_REPLY != 0 {
            return Ok(Reply::Done(Vec::new()));
        }
        self.reply(self.id, message.code as u16)
    }

    /// Waits for the reply to one command.
    pub(super) fn reply(&mut self, id: u16, code: u16) -> Result<Reply, End> {
        let mut framed = Framed::default();
        loop {
            match self.framing.receive(&mut framed) {
                Ok(()) => {}
                Err(FramingError::System(Errno::EAGAIN)) => return Err(Silent.into()),
                Err(FramingError::Closed | FramingError::Truncated | FramingError::System(_)) => {
                    return Ok(Reply::Gone);
                }
                Err(error) => return Err(End::Owes(format!("the card sends no messages: {error}"))),
            }
            let header = framed.header;
            if header.flags & FLAG_TYPE == TYPE_COMMAND {
                self.answer(&framed)?;
                continue;
            }
            if (header.id, header.command) != (id, code) {
                return Err(End::Owes(format!("{header:?} is no reply to command {code} of number {id}")));
            }
            let refused = header.flags & FLAG_ERROR != 0;
            if refused != (header.error != 0) || header.flags & FLAG_TYPE != TYPE_REPLY {
                return Err(End::Owes(format!("{header:?} is no reply")));
            }
            return Ok(if refused { Reply::Refused } else { Reply::Done(std::mem::take(&mut framed.body)) });
        }
    }

    /// The card asks for memory.
    fn answer(&mut self, question: &Framed) -> Result<(), End> {
        let header = question.header;
        let Ok((access, data)) = DmaAccess::read_from_prefix(&question.body) else {
            return Err(End::Owes("a question without a place".to_owned()));
        };
        let distant = self.distant.as_ref();
        let inside = distant.and_then(|distant| {
            let inside = access.address.checked_sub(distant.start)?;
            let fits = inside.checked_add(access.count)? <= distant.bytes;
            (fits && access.count <= TRANSFER_BYTES_MAX.into()).then_some((distant, distant.offset + inside))
        });
        let Some((distant, at)) = inside else {
            if distant.is_none() {
                // Among messages in any order is memory that was mapped again without a descriptor: asking for it is right.
                let failed = Header { flags: TYPE_REPLY | FLAG_ERROR, error: Errno::EFAULT as u32, ..header };
                let _ = self.framing.send(failed, &[], &[]);
                return Ok(());
            }
            return Err(End::Owes(format!("{} bytes at {:#x} are asked for", access.count, access.address)));
        };
        let mut bytes = Vec::new();
        match header.command {
            command::DMA_READ => {
                bytes = vec![0; access.count as usize];
                distant.file.read_exact_at(&mut bytes, at)?;
            }
            command::DMA_WRITE if data.len() as u64 == access.count => distant.file.write_all_at(data, at)?,
            other => return Err(End::Owes(format!("command {other} comes from the card"))),
        }
        let header = Header { flags: TYPE_REPLY, ..header };
        let failed = Header { flags: TYPE_REPLY | FLAG_ERROR, error: Errno::EFAULT as u32, ..header };
        let (header, parts): (_, &[&[u8]]) = match distant.manner {
            Manner::Honest | Manner::Twice => (header, &[access.as_bytes(), &bytes]),
            Manner::Refusing => (failed, &[]),
            Manner::TooLong => (header, &[access.as_bytes(), &bytes, &[0]]),
            Manner::Empty => (header, &[]),
            Manner::Silent => return Ok(()),
        };
        for _ in 0..if distant.manner == Manner::Twice { 2 } else { 1 } {
            // A card that is gone shows itself with what is waited for.
            let _ = self.framing.send(header, parts, &[]);
        }
        Ok(())
    }

    /// Sends bytes that are no messages.
    pub(super) fn garbage(&mut self, random: &mut Random) -> Result<(), End> {
        self.spoiled = true;
        garbage(&mut self.stream, random)
    }
}
