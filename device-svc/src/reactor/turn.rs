//! The reactor's loop.
//!
//! While there is work it turns without a pause. After [`SPIN`] without any it asks every lane for doorbells and sleeps on
//! one epoll descriptor: mailbox, doorbells, channels. What was asked of it that takes turns (a queue that must drain, memory
//! that is still in use) waits in a list that is looked at after each turn.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::mailbox::{Mailbox, Message, QueueKey, Stopped};
use crate::backend::{BlockChannel, Completion};
use crate::clock::Moment;
use crate::device::Lane;
use crate::dma::HostMemory;
use crate::metrics::ReactorCounters;
use crate::mirror::FETCH_MAX;

/// How long an idle reactor spins before it sleeps: several times what a wake-up costs, so that a guest which answers
/// quickly never pays it.
const SPIN: Duration = Duration::from_micros(60);
/// How often channels without requests are polled, in turns: to notice that a server has come back.
const IDLE_CHANNEL_TURNS: u64 = 256;
/// How many turns a lane counts as active after it had work: as long as a guest takes to add its next request.
const ACTIVE_TURNS: u64 = 64;
/// Chains that a lane may fetch in a turn, however many others are active.
const CHAINS_MIN: u16 = 4;
/// Events taken at one wake-up; more wait for the next.
const EVENTS: usize = 64;
/// How long a stopped or abandoned lane's waiters may have to wait for a turn while the reactor sleeps.
const WAIT_TICK: Duration = Duration::from_millis(5);

/// What an epoll event is about: the kind in the upper half, the slot in the lower.
const EVENT_BELL: u64 = 0;
const EVENT_LANE: u64 = 1 << 32;
const EVENT_CHANNEL: u64 = 2 << 32;

struct LaneSlot {
    key: QueueKey,
    lane: Box<dyn Lane>,
    channel: usize,
    /// The turn in which it last had work.
    worked_in: u64,
    /// Abandoned: kept only until its channel has no request of it.
    abandoned: bool,
}

struct ChannelSlot {
    function: u32,
    channel: Box<dyn BlockChannel>,
}

enum Wait {
    Stop(usize, Sender<Option<Stopped>>),
    Reset(u32, Sender<()>),
    Close(u32, Sender<()>),
    Memory(u32, Arc<HostMemory>, Sender<()>),
}

pub(super) struct Turning {
    mailbox: Arc<Mailbox>,
    counters: Arc<ReactorCounters>,
    always: bool,
    epoll: Epoll,
    lanes: Vec<Option<LaneSlot>>,
    channels: Vec<Option<ChannelSlot>>,
    waits: Vec<Wait>,
    completions: Vec<Completion>,
    turns: u64,
    /// Lanes that had work in one of the last turns.
    active: u16,
    /// Abandoned lanes that are still in a slot.
    abandoned: usize,
    shutdown: bool,
}

impl Turning {
    pub(super) fn new(mailbox: Arc<Mailbox>, counters: Arc<ReactorCounters>, always: bool) -> std::io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let turning = Self {
            mailbox,
            counters,
            always,
            epoll,
            lanes: Vec::new(),
            channels: Vec::new(),
            waits: Vec::new(),
            completions: Vec::with_capacity(4096),
            turns: 0,
            active: 0,
            abandoned: 0,
            shutdown: false,
        };
        turning.watch(turning.mailbox.bell_fd(), EVENT_BELL);
        Ok(turning)
    }

    pub(super) fn run(mut self) {
        let mut last = Moment::now();
        let mut last_work = last;
        while !self.shutdown {
            let did = self.turn(last);
            let now = Moment::now();
            let took_ns = now.ns_since(last);
            if did {
                self.counters.turns_busy.add(1);
                self.counters.busy_ns.add(took_ns);
                self.counters.turn_ns_max.raise(took_ns);
                last_work = now;
            } else {
                self.counters.turns_idle.add(1);
                self.counters.idle_ns.add(took_ns);
                std::hint::spin_loop();
            }
            last = now;
            if !did && !self.always && now.ns_since(last_work) > SPIN.as_nanos() as u64 {
                last = self.sleep(now);
                // Armed doorbells wake at once when there is work; without any there is no reason to spin again.
                if last.ns_since(now) < 1000 {
                    last_work = last;
                }
            }
        }
        // Channels go first, on the thread that polled them: they may hold requests whose memory belongs to the lanes.
        self.channels.clear();
        self.lanes.clear();
    }

    /// One turn. Returns whether there was something to do.
    fn turn(&mut self, now: Moment) -> bool {
        let mut did = false;
        if !self.mailbox.is_empty() {
            while let Some(message) = self.mailbox.take() {
                self.act(message, now);
            }
            did = true;
        }
        self.turns += 1;
        // A queue alone takes large batches; queues beside each other take smaller ones, so that none waits long for another.
        let chains_max = (FETCH_MAX / self.active.max(1)).max(CHAINS_MIN);
        self.active = 0;
        for slot in self.lanes.iter_mut().flatten() {
            if let Some(Some(channel)) = self.channels.get_mut(slot.channel)
                && slot.lane.turn(now, chains_max, channel.channel.as_mut())
            {
                did = true;
                slot.worked_in = self.turns;
            }
            self.active += u16::from(self.turns - slot.worked_in < ACTIVE_TURNS);
        }
        let idle_too = self.turns.is_multiple_of(IDLE_CHANNEL_TURNS);
        for slot in self.channels.iter_mut().flatten() {
            if idle_too || slot.channel.in_flight() > 0 {
                slot.channel.poll(now, &mut self.completions);
            }
        }
        did |= self.complete(now);
        for slot in self.lanes.iter_mut().flatten() {
            did |= slot.lane.finish_turn(now);
        }
        if !self.waits.is_empty() || self.abandoned > 0 {
            self.settle(now);
        }
        did
    }

    #[inline]
    fn complete(&mut self, now: Moment) -> bool {
        if self.completions.is_empty() {
            return false;
        }
        for Completion { tag, result } in self.completions.drain(..) {
            if let Some(Some(slot)) = self.lanes.get_mut(tag.lane as usize) {
                slot.lane.complete(now, tag.row, result);
            }
        }
        true
    }

    fn act(&mut self, message: Message, now: Moment) {
        match message {
            Message::OpenChannel { function, channel } => self.open_channel(function, channel),
            Message::CloseChannel { function, reply } => {
                self.abandon_function(function);
                self.waits.push(Wait::Close(function, reply));
            }
            Message::Start { key, lane } => self.start(key, lane),
            Message::Resume { key, start } => {
                if let Some(number) = self.lane_number(key) {
                    self.forget_doorbell(number);
                    if let Some(slot) = &mut self.lanes[number] {
                        slot.lane.resume(start);
                    }
                    self.watch_doorbell(number);
                }
            }
            Message::Stop { key, reply } => match self.lane_number(key) {
                Some(number) => {
                    if let Some(slot) = &mut self.lanes[number] {
                        slot.lane.stop(now);
                    }
                    self.waits.push(Wait::Stop(number, reply));
                }
                None => drop(reply.send(None)),
            },
            Message::Reset { function, reply } => {
                self.abandon_function(function);
                self.waits.push(Wait::Reset(function, reply));
            }
            Message::SetMemory { function, memory, reply } => self.waits.push(Wait::Memory(function, memory, reply)),
            Message::Shutdown => self.shutdown = true,
        }
    }

    fn open_channel(&mut self, function: u32, channel: Box<dyn BlockChannel>) {
        let number = free_slot(&mut self.channels);
        if let Some(fd) = channel.wake_fd() {
            self.watch(fd, EVENT_CHANNEL | number as u64);
        }
        self.channels[number] = Some(ChannelSlot { function, channel });
    }

    fn start(&mut self, key: QueueKey, mut lane: Box<dyn Lane>) {
        if let Some(old) = self.lane_number(key) {
            self.abandon(old);
        }
        let channel =
            self.channels.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.function == key.function));
        let Some(channel) = channel else {
            // The function was closed in the meantime.
            return;
        };
        let number = free_slot(&mut self.lanes);
        lane.set_number(number as u32);
        self.lanes[number] = Some(LaneSlot { key, lane, channel, worked_in: self.turns, abandoned: false });
        self.watch_doorbell(number);
        self.count_lanes();
    }

    fn lane_number(&self, key: QueueKey) -> Option<usize> {
        self.lanes.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.key == key && !slot.abandoned))
    }

    fn abandon_function(&mut self, function: u32) {
        for number in 0..self.lanes.len() {
            if self.lanes[number].as_ref().is_some_and(|slot| slot.key.function == function && !slot.abandoned) {
                self.abandon(number);
            }
        }
    }

    fn abandon(&mut self, number: usize) {
        self.forget_doorbell(number);
        if let Some(slot) = &mut self.lanes[number] {
            slot.lane.abandon();
            slot.abandoned = true;
            self.abandoned += 1;
            // A stop that was still waited for will not come.
            self.waits.retain(|wait| !matches!(wait, Wait::Stop(stopping, _) if *stopping == number));
        }
        self.count_lanes();
    }

    fn count_lanes(&self) {
        self.counters.lanes.set(self.lanes.iter().flatten().filter(|slot| !slot.abandoned).count() as u64);
    }

    /// Drops abandoned lanes that are drained, and answers what has come true.
    fn settle(&mut self, now: Moment) {
        let waits = std::mem::take(&mut self.waits);
        for wait in waits {
            if let Some(again) = self.settle_one(wait, now) {
                self.waits.push(again);
            }
        }
        for slot in &mut self.lanes {
            if slot.as_mut().is_some_and(|slot| slot.abandoned && slot.lane.is_drained()) {
                *slot = None;
            }
        }
        self.abandoned = self.lanes.iter().flatten().filter(|slot| slot.abandoned).count();
    }

    /// Answers a wait, or gives it back. An asker that has gone away is nobody's problem.
    fn settle_one(&mut self, wait: Wait, now: Moment) -> Option<Wait> {
        match wait {
            Wait::Stop(number, reply) => {
                let slot = self.lanes[number].as_mut()?;
                if !slot.lane.is_stopped(now) {
                    return Some(Wait::Stop(number, reply));
                }
                let _ = reply.send(Some(Stopped { position: slot.lane.position(), parked: slot.lane.has_parked() }));
                self.forget_doorbell(number);
                None
            }
            Wait::Reset(function, reply) => {
                if !self.of_function(function).all(|slot| !slot.abandoned || slot.lane.is_let_go()) {
                    return Some(Wait::Reset(function, reply));
                }
                let _ = reply.send(());
                None
            }
            Wait::Close(function, reply) => {
                if !self.of_function(function).all(|slot| slot.lane.is_let_go()) {
                    return Some(Wait::Close(function, reply));
                }
                for slot in &mut self.channels {
                    if slot.as_ref().is_some_and(|slot| slot.function == function) {
                        if let Some(fd) = slot.as_ref().and_then(|slot| slot.channel.wake_fd()) {
                            forget(&self.epoll, fd);
                        }
                        // The channel goes first: it may hold requests whose memory belongs to the lanes.
                        *slot = None;
                    }
                }
                for slot in &mut self.lanes {
                    if slot.as_ref().is_some_and(|slot| slot.key.function == function) {
                        *slot = None;
                    }
                }
                let _ = reply.send(());
                None
            }
            Wait::Memory(function, memory, reply) => {
                let mut all = true;
                for slot in self.of_function(function) {
                    all &= slot.lane.offer_memory(&memory);
                }
                if !all {
                    return Some(Wait::Memory(function, memory, reply));
                }
                let _ = reply.send(());
                None
            }
        }
    }

    fn of_function(&mut self, function: u32) -> impl Iterator<Item = &mut LaneSlot> {
        self.lanes.iter_mut().flatten().filter(move |slot| slot.key.function == function)
    }

    /// Sleeps until there is something to do, if there is nothing now. Returns the moment after.
    fn sleep(&mut self, now: Moment) -> Moment {
        for slot in self.lanes.iter_mut().flatten().filter(|slot| !slot.abandoned) {
            if slot.lane.arm() != Some(true) {
                return Moment::now();
            }
        }
        let Self { mailbox, .. } = self;
        if !mailbox.asleep.prepare(|| mailbox.is_empty()) {
            return Moment::now();
        }
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = self.epoll.wait(&mut events, self.timeout(now)).unwrap_or(0);
        self.mailbox.asleep.awake();
        for event in &events[..count] {
            let slot = (event.data() & 0xffff_ffff) as usize;
            match event.data() & !0xffff_ffff {
                EVENT_LANE => {
                    if let Some(Some(slot)) = self.lanes.get_mut(slot) {
                        slot.lane.take_doorbell();
                    }
                }
                EVENT_CHANNEL => {
                    if let Some(Some(slot)) = self.channels.get_mut(slot) {
                        slot.channel.poll(now, &mut self.completions);
                    }
                }
                _ => self.mailbox.silence(),
            }
        }
        let after = Moment::now();
        // Channels that wanted to be called by now.
        for slot in self.channels.iter_mut().flatten() {
            if slot.channel.deadline().is_some_and(|deadline| deadline <= after) {
                slot.channel.poll(after, &mut self.completions);
            }
        }
        self.complete(after);
        self.counters.sleeps.add(1);
        self.counters.asleep_ns.add(after.ns_since(now));
        after
    }

    fn timeout(&self, now: Moment) -> EpollTimeout {
        let lanes = self.lanes.iter().flatten().filter_map(|slot| slot.lane.deadline());
        let channels = self.channels.iter().flatten().filter_map(|slot| slot.channel.deadline());
        let waits = (!self.waits.is_empty()).then(|| now.after(WAIT_TICK));
        match lanes.chain(channels).chain(waits).min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                let wait = deadline.until(now);
                // Rounded up: a wake-up before the deadline would find nothing to do.
                let milliseconds = wait.as_nanos().div_ceil(1_000_000).min(60_000) as u16;
                EpollTimeout::from(milliseconds)
            }
        }
    }

    fn watch_doorbell(&self, number: usize) {
        if let Some(fd) = self.lanes[number].as_ref().and_then(|slot| slot.lane.doorbell_fd()) {
            self.watch(fd, EVENT_LANE | number as u64);
        }
    }

    fn forget_doorbell(&self, number: usize) {
        if let Some(fd) = self.lanes[number].as_ref().and_then(|slot| slot.lane.doorbell_fd()) {
            forget(&self.epoll, fd);
        }
    }

    fn watch(&self, fd: std::os::fd::RawFd, data: u64) {
        if let Err(error) = watch(&self.epoll, fd, EpollEvent::new(EpollFlags::EPOLLIN, data)) {
            // Without it the reactor does not wake for this descriptor; the driver's requests would wait for the next turn.
            tracing::error!(%error, "a descriptor cannot be waited on");
        }
    }
}

/// The number of a free slot, made if there is none.
fn free_slot<T>(slots: &mut Vec<Option<T>>) -> usize {
    match slots.iter().position(Option::is_none) {
        Some(number) => number,
        None => {
            slots.push(None);
            slots.len() - 1
        }
    }
}

#[expect(unsafe_code, reason = "borrows a descriptor whose owner outlives the call")]
fn watch(epoll: &Epoll, fd: std::os::fd::RawFd, event: EpollEvent) -> nix::Result<()> {
    // SAFETY: the lane, channel or mailbox that the descriptor came from is alive in this call's caller.
    epoll.add(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }, event)
}

#[expect(unsafe_code, reason = "borrows a descriptor whose owner outlives the call")]
fn forget(epoll: &Epoll, fd: std::os::fd::RawFd) {
    // SAFETY: as in `watch`.
    let _ = epoll.delete(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) });
}
