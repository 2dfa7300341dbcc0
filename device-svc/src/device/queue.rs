//! What every lane does the same way, whatever its device: how it stands, when it asks for doorbells, how a batch is published.
//!
//! ```text
//!   Running ─► Stopping ──┬─► Stopped        the link stops the queue: what is in flight goes on to its end, then all is still
//!      │  └──► HandingOver ─┘                  or only what the channel has does: the rest is left to whoever has the record
//!      ├───────────► Failed                  the guest's ring is broken: nothing is fetched any more
//!      └───────────► Abandoned               reset: nobody will hear of it again
//! ```
//!
//! A queue that has stopped is still until it goes on: from the moment at which its link hears of it, nothing of it reads or writes the
//! VM's memory, and nothing of it is given to storage or network. Its link may give the memory away, and the ring to another card.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::{FaultReport, QueueFault};
use crate::clock::Moment;
use crate::dma::{DmaCounters, DmaEngine, HostMemory, Removed};
use crate::link::{QueuePort, QueueStart};
use crate::metrics::QueueCounters;
use crate::mirror::{CardLayout, Fetched, Mirror};

/// How long a stopping queue waits for what the other side of the card has not answered yet.
pub(crate) const STOP_PATIENCE: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// Fetching and completing.
    Running,
    /// Completing; told to stop, and the moment at which it stops waiting for the server.
    Stopping(Moment),
    /// The same, but nothing is begun any more that has not begun: its record says it to the next owner.
    HandingOver(Moment),
    /// It has stopped: still.
    Stopped,
    /// The guest's ring is broken: completing what can be, fetching nothing.
    Failed,
    /// Reset: what comes back from the channel is dropped.
    Abandoned,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Doorbell {
    /// The ring is polled.
    Polled,
    /// The driver is being asked to ring.
    Arming,
    /// The driver was asked to ring.
    Armed,
}

/// What publishing came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Published {
    /// There was nothing.
    Nothing,
    /// It is on its way.
    Pending,
    /// The driver can see the batch, and was interrupted if it wanted that.
    Batch,
}

/// One virtqueue, mirrored.
pub(super) struct Queue<E> {
    pub(super) mirror: Mirror<E>,
    pub(super) state: State,
    pub(super) counters: Arc<QueueCounters>,
    /// The ring itself cannot be reached: nothing can be published any more.
    pub(super) ring_gone: bool,
    number: u16,
    doorbell: Doorbell,
    /// It rang, and what for has not been found yet.
    rung: bool,
    /// What the engine had counted when it was last added to the counters.
    counted: DmaCounters,
    report: Arc<dyn FaultReport>,
    port: Box<dyn QueuePort>,
}

impl<E: DmaEngine> Queue<E> {
    /// The queue of `start`, whose addresses have been checked; `layout` holds the device's parts of the card memory.
    pub(super) fn new(
        start: QueueStart,
        layout: CardLayout,
        counters: Arc<QueueCounters>,
        report: Arc<dyn FaultReport>,
        engine: impl FnOnce(crate::dma::CardMemory) -> E,
    ) -> std::io::Result<Self> {
        let mirror = Mirror::new(&start, layout, engine)?;
        let mut port = start.port;
        if start.is_resumed {
            // With an event index the driver would never hear of what was published before the death, nor of what comes after; it looks
            // once more.
            port.raise_interrupt();
            counters.interrupts.add(1);
        }
        Ok(Self {
            mirror,
            state: State::Running,
            counters,
            ring_gone: false,
            number: start.index,
            doorbell: Doorbell::Polled,
            rung: false,
            counted: DmaCounters::default(),
            report,
            port,
        })
    }

    #[cold]
    pub(super) fn fail(&mut self, fault: QueueFault) {
        // Said once; a queue that is stopping goes on to stop.
        if self.state == State::Running {
            self.state = State::Failed;
            // Lost memory reads as zeroes, and what they seem to say is nobody's fault.
            let fault = if self.mirror.engine_ref().memory().is_lost() { QueueFault::MemoryLost } else { fault };
            self.report.queue_failed(self.number, fault);
        }
    }

    /// A turn came to this; a fault stops the queue. Returns whether there was something to do.
    #[inline]
    pub(super) fn end_turn(&mut self, worked: Result<bool, QueueFault>) -> bool {
        match worked {
            Ok(did) => did,
            Err(fault) => {
                // A ring that is broken while it stops is not fetched from again.
                let busy = self.mirror.is_fetching() || self.mirror.is_resuming();
                self.ring_gone |= busy && self.state != State::Running;
                self.fail(fault);
                true
            }
        }
    }

    /// Whether a turn makes sense: not of a queue that is still. One whose memory is lost fails here.
    #[inline]
    pub(super) fn begin_turn(&mut self) -> bool {
        if self.state == State::Running && self.mirror.engine_ref().memory().is_lost() {
            self.fail(QueueFault::MemoryLost);
        }
        !matches!(self.state, State::Stopped | State::Abandoned)
    }

    /// Whether the ring is to be looked at: it runs, or what it had begun to fetch when it was told to stop must come to its end.
    #[inline]
    pub(super) fn wants_fetch(&self) -> bool {
        match self.state {
            State::Running => !self.is_quiet(),
            State::Stopping(_) => (self.mirror.is_fetching() || self.mirror.is_resuming()) && !self.ring_gone,
            // Where it stands is known only when its record has been taken up.
            State::HandingOver(_) => (self.mirror.is_fetching() || self.mirror.is_attaching()) && !self.ring_gone,
            State::Stopped | State::Failed | State::Abandoned => false,
        }
    }

    /// Whether there is no reason to look at the ring. Where copies are late a look takes turns, and the lane could never sleep
    /// between two: so once it wants a doorbell it relies on that.
    fn is_quiet(&self) -> bool {
        E::LATE && self.doorbell != Doorbell::Polled && !self.rung && !self.mirror.is_fetching()
    }

    /// A fetch came so far: no doorbell is needed while there is work. Returns whether there was something to do.
    #[inline]
    pub(super) fn fetched(&mut self, fetched: Fetched) -> Result<bool, QueueFault> {
        match fetched {
            Fetched::Chains(_) => {
                self.rung = false;
                if self.doorbell != Doorbell::Polled {
                    self.doorbell = Doorbell::Polled;
                    self.mirror.disarm_doorbell()?;
                }
            }
            Fetched::Nothing => self.rung = false,
            Fetched::Waiting | Fetched::Looking => {}
        }
        Ok(matches!(fetched, Fetched::Chains(_) | Fetched::Waiting))
    }

    /// Whether something is staged or on its way, and can be published.
    #[inline]
    pub(super) const fn is_publishing(&self) -> bool {
        !self.ring_gone && self.mirror.is_publishing()
    }

    /// Publishes what is staged; a ring that cannot be reached fails.
    #[inline]
    pub(super) fn publish(&mut self) -> Published {
        if matches!(self.state, State::Stopped | State::Abandoned) || !self.is_publishing() {
            return Published::Nothing;
        }
        match self.mirror.publish() {
            Ok(None) => Published::Pending,
            Ok(Some(interrupt)) => {
                if interrupt {
                    self.port.raise_interrupt();
                    self.counters.interrupts.add(1);
                }
                Published::Batch
            }
            Err(fault) => {
                self.ring_gone = true;
                self.fail(fault);
                Published::Pending
            }
        }
    }

    /// Adds what has crossed since the last time. Counters live longer than lanes: a queue that starts again goes on counting.
    /// (An engine takes back the read of a poll that found nothing, so a difference may be negative.)
    #[inline]
    pub(super) fn count(&mut self, in_flight: u16) {
        let dma = self.mirror.engine_ref().counters();
        let before = std::mem::replace(&mut self.counted, dma);
        let counters = &self.counters;
        counters.in_flight.set(u64::from(in_flight));
        counters.dma_reads.add(dma.reads.wrapping_sub(before.reads));
        counters.dma_writes.add(dma.writes.wrapping_sub(before.writes));
        counters.dma_read_bytes.add(dma.read_bytes.wrapping_sub(before.read_bytes));
        counters.dma_write_bytes.add(dma.write_bytes.wrapping_sub(before.write_bytes));
        counters.dma_empty_polls.add(dma.empty_polls.wrapping_sub(before.empty_polls));
        counters.dma_lent.add(dma.lent.wrapping_sub(before.lent));
        counters.dma_lent_bytes.add(dma.lent_bytes.wrapping_sub(before.lent_bytes));
    }

    /// As for `Lane::arm`. `landing`: copies of the device are on their way to the card. `blocked`: it would fetch nothing, so it
    /// need not look; what unblocks it wakes it. `in_flight` is for the counters.
    pub(super) fn arm(&mut self, landing: bool, blocked: bool, in_flight: u16) -> Option<bool> {
        if self.state != State::Running {
            return Some(!landing && !self.is_publishing());
        }
        // Lost while the last turn looked at it: the next turn says so.
        if self.mirror.engine_ref().memory().is_lost() {
            return Some(false);
        }
        if self.doorbell == Doorbell::Armed {
            // Armed since it last found something; the driver rings for whatever came since.
            return Some(!E::LATE || self.is_quiet());
        }
        if self.mirror.is_publishing() || landing {
            return Some(false);
        }
        if blocked {
            return Some(true);
        }
        match self.mirror.arm_doorbell() {
            Ok(Some(true)) => {
                self.doorbell = Doorbell::Armed;
                self.count(in_flight);
                Some(true)
            }
            Ok(None) => {
                self.doorbell = Doorbell::Arming;
                None
            }
            Ok(Some(false)) => {
                // A look is under way; it shall be the last before the doorbell is asked for.
                self.doorbell = if self.mirror.is_fetching() { Doorbell::Arming } else { Doorbell::Polled };
                Some(false)
            }
            Err(fault) => {
                self.fail(fault);
                Some(false)
            }
        }
    }

    /// The moment at which a queue that is to stop stops waiting for the server.
    pub(super) const fn stopping_until(&self) -> Option<Moment> {
        match self.state {
            State::Stopping(until) | State::HandingOver(until) => Some(until),
            _ => None,
        }
    }

    /// Whether a queue that is to stop has: its device says that it `is_done`, and nothing is on its way between the VM's memory and
    /// the card's. From then on it is still.
    pub(super) fn is_stopped(&mut self, is_done: bool) -> bool {
        if self.stopping_until().is_none() {
            return true;
        }
        let busy = self.mirror.is_publishing() || self.mirror.is_fetching();
        let is_stopped = is_done && (!busy || self.ring_gone) && self.is_idle();
        if is_stopped {
            self.state = State::Stopped;
        }
        is_stopped
    }

    pub(super) fn abandon(&mut self) {
        self.state = State::Abandoned;
        self.mirror.engine().abandon();
        self.counters.in_flight.set(0);
    }

    /// Whether the table of memory may change hands: nothing is on its way.
    pub(super) fn may_change_memory(&mut self, landing: bool) -> bool {
        let running = self.state == State::Running || self.stopping_until().is_some();
        let running = running && !self.ring_gone;
        let busy = running && (self.mirror.is_fetching() || self.mirror.is_publishing() || landing);
        !busy && self.is_idle()
    }
}

/// What a lane's queue does when the lane has nothing to add; see [`Lane`](super::Lane), whose words these are.
pub trait LaneQueue {
    /// The descriptor to wait on for doorbells.
    fn doorbell_fd(&self) -> Option<RawFd>;

    /// Takes the doorbell's rings off.
    fn take_doorbell(&mut self);

    /// Fetch nothing more.
    fn stop(&mut self, now: Moment);

    /// Begin nothing more.
    fn hand_over(&mut self, now: Moment);

    /// Whether it has stopped, and not gone on since.
    fn is_still(&self) -> bool;

    /// Goes on with this port.
    fn resume(&mut self, port: Box<dyn QueuePort>);

    /// Whether no copy is on its way.
    fn is_idle(&mut self) -> bool;

    /// Uses this table of memory, if nothing is on its way. Returns whether it does.
    fn use_memory(&mut self, memory: &Arc<HostMemory>) -> bool;

    /// Lets go of memory. Returns whether no copy touches it.
    fn let_go(&mut self, removed: &Removed) -> bool;
}

impl<E: DmaEngine> LaneQueue for Queue<E> {
    fn doorbell_fd(&self) -> Option<RawFd> {
        self.port.doorbell_fd()
    }

    fn take_doorbell(&mut self) {
        if self.port.take_doorbell() {
            self.rung = true;
            self.counters.doorbells.add(1);
        }
    }

    fn stop(&mut self, now: Moment) {
        if matches!(self.state, State::Running | State::Failed) {
            self.state = State::Stopping(now.after(STOP_PATIENCE));
        }
    }

    fn hand_over(&mut self, now: Moment) {
        if matches!(self.state, State::Running | State::Failed) {
            self.state = State::HandingOver(now.after(STOP_PATIENCE));
        }
    }

    fn is_still(&self) -> bool {
        self.state == State::Stopped
    }

    fn resume(&mut self, port: Box<dyn QueuePort>) {
        self.port = port;
        self.state = State::Running;
        self.doorbell = Doorbell::Polled;
        self.rung = false;
    }

    fn is_idle(&mut self) -> bool {
        // What ended behind a request that has not, of a queue used in order, waits for the next batch to be started with it.
        self.mirror.engine().submit();
        self.mirror.engine().is_idle()
    }

    fn use_memory(&mut self, memory: &Arc<HostMemory>) -> bool {
        let may = self.may_change_memory(false);
        if may {
            self.mirror.set_memory(Arc::clone(memory));
        }
        may
    }

    fn let_go(&mut self, removed: &Removed) -> bool {
        self.mirror.engine().let_go(removed)
    }
}
