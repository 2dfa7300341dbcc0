//! The engine for guests that share no memory: the VMM is asked for every byte.
//!
//! Copies are done one after another in the order queued, each with as many questions as it takes; those in ranges that are mapped
//! are memory copies all the same. It is slow, and as a VMM's last resort it may be: what counts is that it is right, and that a VMM
//! which does not answer stops its own function and nobody else's.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    CardMemory, CopyEngine, Direction, DmaCounters, DmaEngine, DmaFault, HostMemory, Removed, Ticket, Unmapped,
};
use crate::address::{CardAddress, Iova};

/// How long the VMM may take for one answer: less than it waits for one of ours, which may depend on it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(3);

/// What is asked of memory that only the VMM can reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Question<'a> {
    /// What are this many bytes?
    Read(u32),
    /// Let them be these.
    Write(&'a [u8]),
}

/// Whoever can reach the memory. Called on reactors: nothing here waits.
pub trait DistantMemory: Send + Sync + fmt::Debug {
    /// Bytes that one question may be about.
    fn bytes_max(&self) -> u32;

    /// Asks about what starts at `at`. Questions arrive in the order asked. `None` if none can be asked at the moment.
    ///
    /// # Errors
    /// When nobody is there any more.
    fn ask(&self, at: Iova, question: Question<'_>) -> Result<Option<u16>, DmaFault>;

    /// The answer to a question about `count` bytes, if it has come: the bytes, if it was what they are.
    ///
    /// # Errors
    /// When the answer is a refusal or no answer to the question, or nobody is there any more.
    fn answer(&self, id: u16, count: u32) -> Result<Option<Vec<u8>>, DmaFault>;

    /// The answer does not matter any more.
    fn forget(&self, id: u16);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write,
    ReadIndex,
    WriteIndex,
    /// Flags first: of descriptors whose flags then say available, the second reading is whole.
    ReadPackedFlags,
    ReadPacked,
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    kind: Kind,
    host: Iova,
    card: CardAddress,
    length: u32,
    /// Bytes that are done.
    done: u32,
}

/// A question that was asked.
#[derive(Clone, Copy, Debug)]
struct Asked {
    id: u16,
    count: u32,
}

/// A DMA engine that asks.
#[derive(Debug)]
pub struct DistantEngine {
    near: CopyEngine,
    memory: Arc<dyn DistantMemory>,
    queued: VecDeque<Copy>,
    asked: Option<Asked>,
    /// Since when the copy in front has been waiting.
    since: Option<Instant>,
    /// Flags of a batch of packed descriptors.
    flags: Vec<u16>,
    bytes: Vec<u8>,
    issued: u64,
    submitted: u64,
    landed: u64,
    failed: bool,
    counters: DmaCounters,
}

/// How far a copy came.
enum Step {
    Done,
    Waiting,
}

/// Where a descriptor's flags are.
const FLAGS: u32 = 14;
const DESCRIPTOR_BYTES: u32 = 16;

impl DistantEngine {
    /// An engine between `card` and `memory`, parts of which only `distant` can reach.
    #[must_use]
    pub fn new(card: CardMemory, memory: Arc<HostMemory>, distant: Arc<dyn DistantMemory>) -> Self {
        Self {
            near: CopyEngine::new(card, memory),
            memory: distant,
            queued: VecDeque::new(),
            asked: None,
            since: None,
            flags: Vec::new(),
            bytes: Vec::new(),
            issued: 0,
            submitted: 0,
            landed: 0,
            failed: false,
            counters: DmaCounters::default(),
        }
    }

    fn queue(&mut self, kind: Kind, host: Iova, card: CardAddress, length: u32) -> Result<(), Unmapped> {
        let writes = matches!(kind, Kind::Write | Kind::WriteIndex);
        let direction = if writes { Direction::ToHost } else { Direction::FromHost };
        if !self.near.memory().reaches(host, length.into(), direction) {
            return Err(Unmapped { address: host, length: length.into() });
        }
        let (count, bytes) = if writes {
            (&mut self.counters.writes, &mut self.counters.write_bytes)
        } else {
            (&mut self.counters.reads, &mut self.counters.read_bytes)
        };
        *count += 1;
        *bytes += u64::from(length);
        self.queued.push_back(Copy { kind, host, card, length, done: 0 });
        self.issued += 1;
        Ok(())
    }

    /// Does as much of the copy in front as can be done now.
    fn step(&mut self, copy: &mut Copy) -> Result<Step, DmaFault> {
        while copy.done < copy.length {
            let (at, left) = (Iova(copy.host.0 + u64::from(copy.done)), copy.length - copy.done);
            let to = copy.card.add(copy.done);
            // It may have been taken away since the copy was queued.
            let found = self.near.memory().find(at).ok_or(DmaFault)?;
            let run = (found.length - (at.0 - found.start.0)).min(left.into()) as u32;
            if !found.base.is_null() {
                self.copy_near(copy.kind, at, to, run)?;
                copy.done += run;
                continue;
            }
            let Some(asked) = self.asked else {
                let count = run.min(self.memory.bytes_max());
                let question = if matches!(copy.kind, Kind::Write | Kind::WriteIndex) {
                    self.bytes.resize(count as usize, 0);
                    self.near.card().copy_out(to, &mut self.bytes);
                    Question::Write(&self.bytes)
                } else {
                    Question::Read(count)
                };
                match self.memory.ask(at, question)? {
                    Some(id) => self.asked = Some(Asked { id, count }),
                    None => return self.be_patient(),
                }
                continue;
            };
            let Some(bytes) = self.memory.answer(asked.id, asked.count)? else { return self.be_patient() };
            self.asked = None;
            self.since = None;
            self.near.card().copy_in(to, &bytes);
            copy.done += asked.count;
        }
        let descriptors = copy.length / DESCRIPTOR_BYTES;
        match copy.kind {
            Kind::ReadPackedFlags => {
                let card = self.near.card();
                let flags_at = |entry| copy.card.add(entry * DESCRIPTOR_BYTES + FLAGS);
                self.flags.clear();
                self.flags.extend((0..descriptors).map(|entry| card.get::<u16>(flags_at(entry))));
                *copy = Copy { kind: Kind::ReadPacked, done: 0, ..*copy };
                self.step(copy)
            }
            Kind::ReadPacked => {
                for (entry, flags) in (0..descriptors).zip(&self.flags) {
                    self.near.card().put(copy.card.add(entry * DESCRIPTOR_BYTES + FLAGS), *flags);
                }
                Ok(Step::Done)
            }
            _ => Ok(Step::Done),
        }
    }

    fn copy_near(&mut self, kind: Kind, at: Iova, card: CardAddress, length: u32) -> Result<(), DmaFault> {
        let done = match kind {
            Kind::ReadIndex if length == 2 => self.near.read_index(at, card),
            Kind::WriteIndex if length == 2 => self.near.write_index(card, at),
            Kind::Write | Kind::WriteIndex => self.near.write(card, at, length),
            Kind::Read | Kind::ReadIndex | Kind::ReadPacked | Kind::ReadPackedFlags => self.near.read(at, card, length),
        };
        self.near.submit();
        done.map_err(|_| DmaFault)
    }

    /// Waits on, if the VMM has not been silent for too long.
    fn be_patient(&mut self) -> Result<Step, DmaFault> {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > ANSWER_TIME_MAX { Err(DmaFault) } else { Ok(Step::Waiting) }
    }

    fn go_on(&mut self) {
        while self.landed < self.submitted
            && !self.failed
            && let Some(mut copy) = self.queued.pop_front()
        {
            match self.step(&mut copy) {
                Ok(Step::Done) => self.landed += 1,
                Ok(Step::Waiting) => {
                    self.queued.push_front(copy);
                    return;
                }
                Err(DmaFault) => self.failed = true,
            }
        }
    }
}

impl DmaEngine for DistantEngine {
    const LENDS: bool = false;

    fn card(&self) -> &CardMemory {
        self.near.card()
    }

    fn set_memory(&mut self, memory: Arc<HostMemory>) {
        debug_assert!(self.queued.is_empty(), "the memory changes under copies that are queued");
        self.near.set_memory(memory);
    }

    fn let_go(&mut self, removed: &Removed) -> bool {
        self.go_on();
        let touches = |copy: &Copy| removed.touches(copy.host, copy.length.into());
        (self.failed || !self.queued.iter().any(touches)) && self.near.let_go(removed)
    }

    fn memory(&self) -> &Arc<HostMemory> {
        self.near.memory()
    }

    fn read(&mut self, from: Iova, to: CardAddress, length: u32) -> Result<(), Unmapped> {
        self.queue(Kind::Read, from, to, length)
    }

    fn write(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped> {
        self.queue(Kind::Write, to, from, length)
    }

    fn read_index(&mut self, from: Iova, to: CardAddress) -> Result<(), Unmapped> {
        self.queue(Kind::ReadIndex, from, to, 2)
    }

    fn write_index(&mut self, from: CardAddress, to: Iova) -> Result<(), Unmapped> {
        self.queue(Kind::WriteIndex, to, from, 2)
    }

    fn read_packed(&mut self, from: Iova, to: CardAddress, count: u32) -> Result<(), Unmapped> {
        self.queue(Kind::ReadPackedFlags, from, to, count * DESCRIPTOR_BYTES)
    }

    /// Nothing to do: each copy is answered before the next is asked for.
    fn order(&mut self) {
        self.near.order();
    }

    fn queued(&self) -> Ticket {
        Ticket(self.issued)
    }

    fn submit(&mut self) -> Ticket {
        self.submitted = self.issued;
        self.go_on();
        Ticket(self.submitted)
    }

    fn landed(&mut self) -> Result<Ticket, DmaFault> {
        self.go_on();
        if self.failed { Err(DmaFault) } else { Ok(Ticket(self.landed)) }
    }

    fn is_idle(&mut self) -> bool {
        self.go_on();
        // Of a failed one nothing more will come.
        self.failed || self.queued.is_empty()
    }

    fn abandon(&mut self) {
        // What was asked to be written comes before whatever the VMM is told next; what was asked for nobody needs.
        self.queued.clear();
        self.submitted = self.issued;
        self.landed = self.issued;
        if let Some(asked) = self.asked.take() {
            self.memory.forget(asked.id);
        }
    }

    fn lend(
        &mut self,
        from: Iova,
        length: u32,
        _direction: Direction,
        _out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped> {
        Err(Unmapped { address: from, length: length.into() })
    }

    fn give_back(&mut self, _from: Iova, _length: u32, _written: bool) {}

    fn forgive_empty_poll(&mut self, bytes: u32) {
        self.counters.reads -= 1;
        self.counters.read_bytes -= u64::from(bytes);
        self.counters.empty_polls += 1;
    }

    fn counters(&self) -> DmaCounters {
        self.counters
    }
}

impl Drop for DistantEngine {
    fn drop(&mut self) {
        self.abandon();
    }
}

#[cfg(test)]
pub(super) mod tests;
