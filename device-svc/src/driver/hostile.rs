//! A front end that means harm: conversations over a vhost-user socket that are right up to a point, made from a seed.
//!
//! ```text
//!   converse ─┬─ garbage:   bytes that are no messages
//!             ├─ shuffled:  real messages in any order, with any values, some of them spoiled
//!             └─ attack:    a proper start of a queue, then a ring that breaks the specification in one way
//!      wire.rs    messages as bytes, so that any part can be wrong
//!      guest.rs   memory files and rings, written as they are
//!      attack.rs  what is wrong in a ring, and what must come of it
//!      vfio_user.rs   the same over vfio-user, and a driver that is wrong in the registers
//! ```
//!
//! Whatever is said, a back end must answer what it owes an answer, or hang up; and where the specification names an outcome
//! (a status, a device that needs a reset), that outcome is waited for. Memory is written through its file and never mapped on
//! this side, so that a file can be cut short under the back end alone. The same seed says the same things, but what the back
//! end sees of a ring that changes under it also depends on the moment.

mod attack;
mod guest;
mod random;
pub mod vfio_user;
mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::virtqueue::features;
use attack::{ATTACKS, Attack, Outcome, good};
use guest::{Guest, NO_STATUS, Ring};
use random::Random;
use wire::{Heard, Message, PROTOCOL, PROTOCOL_FEATURES, REPLY_ACK, Silent, Wire, odd_fd, request};

/// Where regions start in their files: vhost-user asks for no alignment.
const FILE_OFFSETS: [u64; 4] = [0, 0, 4096, 512];
/// How long a device may take to do what it must.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it gets where nothing must come of it.
const PAUSE_MS: u16 = 2;

/// What a conversation came to.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// What it was about, for people.
    pub about: String,
    /// The device said that it needs a reset, where it had to.
    pub faults: u32,
    /// Requests that ended with the status that they had to end with.
    pub answered: u32,
    /// Resets of the device that were asked for.
    pub resets: u32,
}

/// What a back end did wrong.
#[derive(Debug, thiserror::Error)]
pub enum Misdeed {
    /// The socket is not served any more.
    #[error("seed {seed}: nobody serves the socket: {error}")]
    Refused {
        /// The conversation.
        seed: u64,
        /// Why.
        error: std::io::Error,
    },
    /// It owes an answer, or an outcome.
    #[error("seed {seed}: {what}")]
    Owes {
        /// The conversation.
        seed: u64,
        /// What.
        what: String,
    },
}

/// Why a conversation ends before its time.
enum End {
    Gone,
    Owes(String),
}

impl From<Silent> for End {
    fn from(_: Silent) -> Self {
        Self::Owes("the back end owes an answer".to_owned())
    }
}

impl From<std::io::Error> for End {
    fn from(_: std::io::Error) -> Self {
        // Out of descriptors or memory on this side: nothing was shown.
        Self::Gone
    }
}

impl From<nix::Error> for End {
    fn from(_: nix::Error) -> Self {
        Self::Gone
    }
}

/// Holds the conversation of this seed with whoever serves `socket`.
///
/// # Errors
/// When the back end does not do what it must.
pub fn converse(socket: &Path, seed: u64) -> Result<Told, Misdeed> {
    let mut random = Random::new(seed);
    let wire = Wire::connect(socket).map_err(|error| Misdeed::Refused { seed, error })?;
    let mut conversation = Conversation { wire, random: random.clone(), told: Told::default(), left: None };
    // A quarter hangs up in the middle of something.
    if random.one_in(4) {
        conversation.left = Some(random.below(30));
    }
    let result = match random.below(10) {
        0 => conversation.garbage(),
        1..=3 => conversation.shuffled(),
        _ => conversation.attack(random.pick(&ATTACKS)),
    };
    conversation.told.resets = conversation.wire.resets;
    judge(seed, conversation.told, result)
}

fn judge(seed: u64, told: Told, result: Result<(), End>) -> Result<Told, Misdeed> {
    match result {
        Err(End::Owes(what)) => Err(Misdeed::Owes { seed, what: format!("{}: {what}", told.about) }),
        Ok(()) | Err(End::Gone) => Ok(told),
    }
}

/// What the device had to say of a file that was cut short.
fn judge_truncation(seed: u64, told: Told, result: Result<(), End>) -> Result<Told, Misdeed> {
    match result {
        Ok(()) if told.faults > 0 => Ok(told),
        Ok(()) | Err(End::Gone) => Err(Misdeed::Owes { seed, what: "the back end hung up".to_owned() }),
        Err(End::Owes(what)) => Err(Misdeed::Owes { seed, what }),
    }
}

/// Starts a queue properly, cuts the memory file short under it, and waits until the device says that it needs a reset.
///
/// # Errors
/// When it does not.
pub fn truncate_memory(socket: &Path, seed: u64) -> Result<Told, Misdeed> {
    let wire = Wire::connect(socket).map_err(|error| Misdeed::Refused { seed, error })?;
    let mut conversation = Conversation { wire, random: Random::new(seed), told: Told::default(), left: None };
    let result = conversation.attack(Attack::Truncate);
    judge_truncation(seed, conversation.told, result)
}

/// Doorbell, interrupt and error event of a queue.
struct Events {
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl Events {
    fn new() -> nix::Result<Self> {
        let event = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self { kick: event()?, call: event()?, error: event()? })
    }

    /// Makes the events such that whoever is not careful blocks: in blocking mode, the interrupt at its maximum.
    fn block(&self) {
        let _ = self.call.write(u64::MAX - 1);
        for event in [&self.kick, &self.call, &self.error] {
            let _ = fcntl(event, FcntlArg::F_SETFL(OFlag::O_RDWR));
        }
    }

    /// Whether the device has said that it needs a reset.
    fn failed(&self, wait_ms: u16) -> bool {
        let mut fds = [PollFd::new(self.error.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(wait_ms)).is_ok_and(|ready| ready > 0)
    }
}

/// Waits for what must come; `failed` says whether the device needs a reset, if need be after so many milliseconds.
fn wait_for(
    told: &mut Told,
    guest: &Guest,
    outcome: Outcome,
    mut failed: impl FnMut(u16) -> Result<bool, End>,
) -> Result<(), End> {
    let start = Instant::now();
    loop {
        let failed = failed(if outcome == Outcome::Fault { 100 } else { PAUSE_MS })?;
        match outcome {
            Outcome::Any => return Ok(()),
            Outcome::Fault if failed => {
                told.faults += 1;
                return Ok(());
            }
            Outcome::Fault => {}
            Outcome::Status(at, right) => {
                let status = guest.byte(at);
                if right.contains(&status) {
                    told.answered += 1;
                    return Ok(());
                }
                if status != NO_STATUS || failed {
                    return Err(End::Owes(format!("status {status}, failed: {failed}, where {right:?} is right")));
                }
            }
        }
        if start.elapsed() > PATIENCE {
            return Err(End::Owes(format!("nothing comes of it, where {outcome:?} must")));
        }
    }
}

fn again(event: &EventFd) -> std::io::Result<OwnedFd> {
    event.as_fd().try_clone_to_owned()
}

struct Conversation {
    wire: Wire,
    random: Random,
    told: Told,
    /// Messages until it hangs up.
    left: Option<u64>,
}

impl Conversation {
    /// One more message, unless it is time to hang up.
    fn count(&mut self) -> Result<(), End> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1).ok_or(End::Gone)?;
        }
        Ok(())
    }

    fn tell(&mut self, message: Message) -> Result<bool, End> {
        self.count()?;
        Ok(self.wire.tell(message)?)
    }

    /// A message that must be taken.
    fn insist(&mut self, message: Message) -> Result<(), End> {
        let code = message.code;
        if self.tell(message)? { Ok(()) } else { Err(End::Owes(format!("message {code} was refused, and is right"))) }
    }

    fn ask(&mut self, message: &Message) -> Result<Vec<u8>, End> {
        self.count()?;
        match self.wire.ask(message)? {
            Heard::Answer(body) => Ok(body),
            Heard::Gone => Err(End::Gone),
        }
    }

    fn ask_number(&mut self, code: u32) -> Result<u64, End> {
        let body = self.ask(&Message::new(code, Vec::new()))?;
        let bytes = body.try_into().map_err(|_| End::Owes(format!("the answer to {code} has an odd size")))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Bytes that are no messages.
    fn garbage(&mut self) -> Result<(), End> {
        "garbage".clone_into(&mut self.told.about);
        self.wire.garbage(&mut self.random)
    }

    /// Real messages in any order.
    fn shuffled(&mut self) -> Result<(), End> {
        "shuffled messages".clone_into(&mut self.told.about);
        let mut guest = Guest::new(&mut self.random, &FILE_OFFSETS)?;
        let events = Events::new()?;
        if !self.random.one_in(4) {
            let accepted = self.negotiate()?;
            let table = self.memory_table(&guest)?;
            self.insist(table)?;
            if self.random.one_in(2) {
                let mut ring = self.ring(&guest, accepted);
                self.start(&guest, &ring, 0, &events)?;
                good(&mut guest, &mut ring);
                let _ = events.kick.write(1);
            }
        }
        let spoil = self.random.pick(&[0, 4, 20]);
        for _ in 0..self.random.below(60) {
            let mut message = self.any_message(&guest, &events)?;
            if spoil != 0 && self.random.one_in(spoil) {
                message.spoil(&mut self.random);
                self.wire.spoiled = true;
            }
            self.count()?;
            let answers = matches!(
                message.code,
                request::GET_FEATURES
                    | request::GET_VRING_BASE
                    | request::GET_PROTOCOL_FEATURES
                    | request::GET_QUEUE_NUM
                    | request::GET_CONFIG
                    | request::GET_INFLIGHT_FD
                    | request::GET_MAX_MEM_SLOTS
                    | request::SET_LOG_BASE
            );
            if message.code == request::SET_PROTOCOL_FEATURES {
                // Acknowledged by the old word or the new one: nobody says which.
                self.wire.spoiled = true;
            }
            let gone = if answers || self.wire.spoiled {
                matches!(self.wire.ask(&message)?, Heard::Gone)
            } else {
                // Refused is not gone, but without acknowledgements nothing else can be seen.
                !self.wire.tell(message)? && !self.wire.acknowledges
            };
            if gone {
                return Err(End::Gone);
            }
            if self.random.one_in(8) {
                let _ = events.kick.write(1);
            }
        }
        Ok(())
    }

    /// The opening of every conversation that is to come to something; returns the features that were accepted.
    fn negotiate(&mut self) -> Result<u64, End> {
        self.tell(Message::new(request::SET_OWNER, Vec::new()))?;
        let offered = self.ask_number(request::GET_FEATURES)?;
        let protocol = self.ask_number(request::GET_PROTOCOL_FEATURES)? & PROTOCOL_FEATURES;
        self.tell(Message::words(request::SET_PROTOCOL_FEATURES, &[protocol]))?;
        self.wire.acknowledges = protocol & REPLY_ACK != 0;
        let optional = features::INDIRECT | features::EVENT_INDEX | features::RING_PACKED | features::IN_ORDER;
        let dropped = self.random.next() & optional;
        let accepted = offered & (!optional | dropped);
        self.insist(Message::words(request::SET_FEATURES, &[accepted | PROTOCOL]))?;
        Ok(accepted)
    }

    fn memory_table(&self, guest: &Guest) -> Result<Message, End> {
        let mut words = vec![guest.shares.len() as u64];
        let mut fds = Vec::new();
        for share in &guest.shares {
            words.extend(share.words());
            fds.push(share.fd()?);
        }
        Ok(Message::words(request::SET_MEM_TABLE, &words).with(fds))
    }

    fn ring(&mut self, guest: &Guest, accepted: u64) -> Ring {
        Ring::any(guest, accepted & features::RING_PACKED != 0, &mut self.random)
    }

    /// Starts a queue properly.
    fn start(&mut self, guest: &Guest, ring: &Ring, index: u32, events: &Events) -> Result<(), End> {
        self.insist(Message::state(request::SET_VRING_NUM, index, ring.size.into()))?;
        let base = if ring.packed { 0x8000_8000 } else { 0 };
        self.insist(Message::state(request::SET_VRING_BASE, index, base))?;
        self.insist(ring.addresses(guest, index))?;
        let event = |code, event| Ok::<_, End>(Message::words(code, &[u64::from(index)]).with([again(event)?]));
        self.insist(event(request::SET_VRING_ERR, &events.error)?)?;
        self.insist(event(request::SET_VRING_CALL, &events.call)?)?;
        self.insist(event(request::SET_VRING_KICK, &events.kick)?)?;
        self.insist(Message::state(request::SET_VRING_ENABLE, index, 1))
    }

    /// A proper start, and then a ring that is wrong.
    fn attack(&mut self, attack: Attack) -> Result<(), End> {
        self.told.about = format!("{attack:?}");
        let mut guest = Guest::new(&mut self.random, &FILE_OFFSETS)?;
        let accepted = self.negotiate()?;
        let table = self.memory_table(&guest)?;
        self.insist(table)?;
        for round in 0..=self.random.below(2) {
            if round > 0 {
                // The driver resets the device and goes on: what went before must not be felt.
                self.insist(Message::new(request::RESET_DEVICE, Vec::new()))?;
                self.insist(Message::words(request::SET_FEATURES, &[accepted | PROTOCOL]))?;
            }
            let mut ring = self.ring(&guest, accepted);
            // Events of its own: an error of the round before may still be on its way.
            let events = Events::new()?;
            let index = self.random.below(2) as u32;
            self.start(&guest, &ring, index, &events)?;
            if self.random.one_in(4) {
                events.block();
            }
            if self.random.one_in(2) {
                let outcome = good(&mut guest, &mut ring);
                self.wait_for(&guest, &events, outcome)?;
            }
            let outcome = attack.write(&mut guest, &mut ring, accepted, &mut self.random);
            self.wait_for(&guest, &events, outcome)?;
            match self.random.below(4) {
                0 => drop(self.ask(&Message::state(request::GET_VRING_BASE, index, 0))?),
                1 if attack != Attack::Truncate => {
                    // Memory that is in use goes away.
                    let share = &guest.shares[0];
                    let words = [&[0][..], &share.words()].concat();
                    self.tell(Message::words(request::REM_MEM_REG, &words))?;
                    let _ = events.kick.write(1);
                    return Ok(());
                }
                _ => {}
            }
            if attack == Attack::Truncate {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Rings the doorbell and waits for what must come.
    fn wait_for(&mut self, guest: &Guest, events: &Events, outcome: Outcome) -> Result<(), End> {
        self.count()?;
        let _ = events.kick.write(1);
        wait_for(&mut self.told, guest, outcome, |wait_ms| Ok(events.failed(wait_ms)))
    }

    /// A message with values that may be right.
    fn any_message(&mut self, guest: &Guest, events: &Events) -> Result<Message, End> {
        let random = &mut self.random;
        let code = match random.below(8) {
            0 => random.below(48) as u32,
            _ => random.pick(&[
                request::SET_FEATURES,
                request::SET_MEM_TABLE,
                request::SET_VRING_NUM,
                request::SET_VRING_ADDR,
                request::SET_VRING_BASE,
                request::GET_VRING_BASE,
                request::SET_VRING_KICK,
                request::SET_VRING_CALL,
                request::SET_VRING_ERR,
                request::SET_VRING_ENABLE,
                request::GET_CONFIG,
                request::SET_CONFIG,
                request::ADD_MEM_REG,
                request::REM_MEM_REG,
                request::SET_BACKEND_REQ_FD,
                request::RESET_DEVICE,
            ]),
        };
        let index = if random.one_in(8) { random.nasty() as u32 } else { random.below(2) as u32 };
        let share = &guest.shares[random.below(guest.shares.len() as u64) as usize];
        let mut region = share.words();
        if random.one_in(2) {
            let at = random.below(4) as usize;
            region[at] = random.nasty();
        }
        Ok(match code {
            request::SET_FEATURES => {
                let bits = random.next() & random.next();
                Message::words(code, &[random.pick(&[bits, features::VERSION_1 | PROTOCOL, PROTOCOL, u64::MAX])])
            }
            request::SET_PROTOCOL_FEATURES => Message::words(code, &[random.next()]),
            request::SET_MEM_TABLE => {
                let count = random.pick(&[0, 1, 1, 2, 3, 8, 31, 32, 33]);
                let mut words = vec![count];
                let mut fds = Vec::new();
                for number in 0..count {
                    let mut each = region;
                    if !random.one_in(3) {
                        each[0] = region[0].wrapping_add(number << 21);
                    }
                    words.extend(each);
                    fds.push(share.fd()?);
                }
                Message::words(code, &words).with(fds)
            }
            request::SET_VRING_NUM => {
                let size = random.pick(&[0, 1, 2, 3, 16, 128, 129, 1024, 32768, 65536, u32::MAX]);
                Message::state(code, index, size)
            }
            request::SET_VRING_BASE => Message::state(code, index, random.nasty() as u32),
            request::GET_VRING_BASE => Message::state(code, index, 0),
            request::SET_VRING_ENABLE => {
                let enable = random.pick(&[0, 1, 1, 2]);
                Message::state(code, index, enable)
            }
            request::SET_VRING_ADDR => {
                let base = guest.shares[0].user;
                let mut words = [index.into(), base, base + 0x10000, base + 0x8000, 0];
                if random.one_in(2) {
                    let at = random.below(5) as usize;
                    words[at] = random.pick(&[random.clone().nasty(), base + 1, base + share.bytes - 8]);
                }
                Message::words(code, &words)
            }
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                if random.one_in(4) {
                    Message::words(code, &[u64::from(index & 0xff) | 0x100])
                } else if random.one_in(4) {
                    Message::words(code, &[u64::from(index & 0xff)]).with(odd_fd(random))
                } else {
                    let event = [&events.kick, &events.call, &events.error][random.below(3) as usize];
                    Message::words(code, &[u64::from(index & 0xff)]).with([again(event)?])
                }
            }
            request::GET_CONFIG | request::SET_CONFIG => {
                let count = random.pick(&[1, 8, 60, 96, 256, 257, 1024]);
                let offset = random.pick(&[0, 32, 200, 0xffff_fff0]);
                let mut body: Vec<u8> =
                    [offset, count, random.below(4) as u32].iter().flat_map(|word| word.to_le_bytes()).collect();
                body.extend(random.bytes(count as usize));
                Message::new(code, body)
            }
            request::ADD_MEM_REG | request::REM_MEM_REG => {
                let fd = if code == request::ADD_MEM_REG { Some(share.fd()?) } else { None };
                Message::words(code, &[&[0][..], &region].concat()).with(fd)
            }
            request::SET_BACKEND_REQ_FD => Message::new(code, Vec::new()).with(odd_fd(random)),
            _ => Message::new(code, Vec::new()),
        })
    }
}
