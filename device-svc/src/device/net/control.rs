//! The control queue: the driver's commands, one after another (virtio 1.3, 5.1.6.5).

use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_net as spec;

use super::NetShared;
use super::command::{COMMAND_BYTES_MAX, Command};
use crate::address::{CardAddress, Iova};
use crate::backend::net::{Incoming, NetChannel};
use crate::clock::Moment;
use crate::device::queue::{Published, Queue};
use crate::device::{FaultReport, Lane, LaneQueue, NetLane, NetRole, QueueFault};
use crate::dma::{CardMemory, DmaEngine, HostMemory, Ticket};
use crate::link::{QueuePosition, QueueStart};
use crate::metrics::QueueCounters;
use crate::mirror::CardLayout;
use crate::virtqueue::Chain;

/// How long the next command waits after one that changes channels: by system calls, on the reactor that other VMs' queues are on as well.
/// A driver gives such commands when it starts, and when somebody has it change its queues.
const REST: Duration = Duration::from_millis(10);

/// A command that was fetched; its bytes are on their way.
#[derive(Clone, Copy, Debug)]
struct Fetched {
    id: u16,
    slots: u16,
    entry: u16,
    bytes: u32,
    answer_at: Iova,
    ticket: Ticket,
}

/// The control queue. It has one command at a time.
pub struct ControlLane<E> {
    queue: Queue<E>,
    shared: Arc<NetShared>,
    accepted: u64,
    place: CardAddress,
    answer_place: CardAddress,
    command: Option<Fetched>,
    /// The next command is not fetched before.
    resting_until: Option<Moment>,
    bytes: Vec<u8>,
}

impl<E: DmaEngine> ControlLane<E> {
    /// A lane for the queue of `start`, whose addresses have been checked.
    ///
    /// # Errors
    /// When there is no card memory.
    pub fn new(
        start: QueueStart,
        shared: Arc<NetShared>,
        counters: Arc<QueueCounters>,
        report: Arc<dyn FaultReport>,
        engine: impl FnOnce(CardMemory) -> E,
    ) -> std::io::Result<Self> {
        let mut layout = CardLayout::default();
        let place = layout.take(COMMAND_BYTES_MAX);
        let answer_place = layout.take(1);
        let accepted = start.features;
        let queue = Queue::new(start, layout, counters, report, engine)?;
        Ok(Self { queue, shared, accepted, place, answer_place, command: None, resting_until: None, bytes: Vec::new() })
    }

    fn work(&mut self, now: Moment) -> Result<bool, QueueFault> {
        let mut did = false;
        if self.resting_until.is_some_and(|until| until <= now) {
            self.resting_until = None;
        }
        let may_fetch = self.command.is_none() && self.resting_until.is_none();
        // The answer's byte of card memory is free when what was answered has been published.
        if may_fetch && !self.queue.is_publishing() && self.queue.wants_fetch() {
            did |= self.fetch()?;
        }
        let Some(command) = self.command else { return Ok(did) };
        if self.queue.mirror.engine().landed()? < command.ticket {
            return Ok(did);
        }
        self.command = None;
        self.carry_out(command, now)?;
        Ok(true)
    }

    fn fetch(&mut self) -> Result<bool, QueueFault> {
        let Self { queue, place, command, .. } = self;
        let mut bad = None;
        let fetched = queue.mirror.fetch(1, |engine, chain| {
            let Some(answer) = chain.segments.last().filter(|_| chain.writable_bytes > 0) else {
                bad.get_or_insert(QueueFault::Request("a command has no room for its answer"));
                return;
            };
            let mut bytes = 0;
            for segment in &chain.segments[..chain.readable] {
                // What is longer than any command is refused by its length.
                let here = segment.length.min(COMMAND_BYTES_MAX - bytes.min(COMMAND_BYTES_MAX));
                if here > 0
                    && let Err(unmapped) = engine.read(segment.address, place.add(bytes), here)
                {
                    bad.get_or_insert(unmapped.into());
                }
                bytes += here;
            }
            let bytes = if chain.readable_bytes > COMMAND_BYTES_MAX { 0 } else { bytes };
            // The answer is the last byte (virtio 1.3, 5.1.6.5).
            let answer_at = Iova(answer.address.0.wrapping_add(u64::from(answer.length) - 1));
            let ticket = engine.queued();
            let Chain { id, slots, entry, .. } = chain;
            *command = Some(Fetched { id, slots, entry, bytes, answer_at, ticket });
        });
        queue.mirror.engine().submit();
        let fetched = fetched?;
        match bad {
            Some(fault) => Err(fault),
            None => queue.fetched(fetched),
        }
    }

    fn carry_out(&mut self, fetched: Fetched, now: Moment) -> Result<(), QueueFault> {
        self.bytes.resize(fetched.bytes as usize, 0);
        self.queue.mirror.engine_ref().card().copy_out(self.place, &mut self.bytes);
        let command = Command::parse(&self.bytes, self.accepted, self.shared.settings.pairs);
        let answer = match command.and_then(|command| {
            tracing::debug!(?command, "the driver commands");
            if command.changes_channels() {
                self.resting_until = Some(now.after(REST));
            }
            command.carry_out(&self.shared).inspect(|()| self.shared.keep_command(&self.bytes))
        }) {
            Ok(()) => spec::VIRTIO_NET_OK,
            Err(bad) => {
                tracing::debug!(%bad, bytes = ?&self.bytes[..self.bytes.len().min(8)], "a command is refused");
                self.queue.counters.errors.add(1);
                spec::VIRTIO_NET_ERR
            }
        };
        let engine = self.queue.mirror.engine();
        engine.card().put(self.answer_place, answer as u8);
        engine.write(self.answer_place, fetched.answer_at, 1)?;
        self.queue.mirror.stage_used(fetched.id, fetched.slots, 1, fetched.entry);
        Ok(())
    }
}

impl<E: DmaEngine> NetLane for ControlLane<E> {
    fn role(&self) -> NetRole {
        NetRole::Control
    }

    fn turn(&mut self, now: Moment, _chains_max: u16, _channel: Option<&mut (dyn NetChannel + 'static)>) -> bool {
        if !self.queue.begin_turn() {
            return false;
        }
        let worked = self.work(now);
        self.queue.end_turn(worked)
    }

    fn takes_frames(&self) -> bool {
        false
    }

    fn deliver(&mut self, _now: Moment, _frames: &[Incoming]) -> usize {
        0
    }
}

impl<E: DmaEngine> Lane for ControlLane<E> {
    fn queue(&self) -> &dyn LaneQueue {
        &self.queue
    }

    fn queue_mut(&mut self) -> &mut dyn LaneQueue {
        &mut self.queue
    }

    fn finish_turn(&mut self, _now: Moment) -> bool {
        let did = self.queue.publish() != Published::Nothing;
        if did {
            self.queue.count(u16::from(self.command.is_some()));
        }
        did
    }

    fn arm(&mut self) -> Option<bool> {
        let has_command = self.command.is_some();
        self.queue.arm(has_command, self.resting_until.is_some(), u16::from(has_command))
    }

    fn deadline(&self) -> Option<Moment> {
        self.resting_until
    }

    fn is_stopped(&mut self, _now: Moment) -> bool {
        self.queue.is_stopped(self.queue.ring_gone || self.command.is_none())
    }

    fn position(&self) -> QueuePosition {
        self.queue.mirror.position_before(u16::from(self.command.is_some()))
    }

    fn abandon(&mut self) {
        self.command = None;
        self.queue.abandon();
    }

    fn offer_memory(&mut self, memory: &Arc<HostMemory>) -> bool {
        let may = self.queue.may_change_memory(self.command.is_some());
        if may {
            self.queue.mirror.set_memory(Arc::clone(memory));
        }
        may
    }
}
