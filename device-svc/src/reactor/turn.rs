//! The reactor's loop.
//!
//! While there is work it turns without a pause. After [`SPIN`] without any it asks every lane for doorbells and sleeps on
//! one epoll descriptor: mailbox, doorbells, channels. What was asked of it that takes turns (a queue that must drain, memory
//! that is still in use) waits in a list that is looked at after each turn.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::function::{FunctionSlot, LaneSlot, WEIGHT_BLOCK};
use super::mailbox::{Mailbox, Message, QueueKey, Stopped};
use crate::backend::Completion;
use crate::clock::Moment;
use crate::device::STOP_PATIENCE;
use crate::device::{AnyLane, Outlet};
use crate::dma::{HostMemory, Removed};
use crate::metrics::ReactorCounters;
use crate::mirror::FETCH_MAX;

/// How long an idle reactor spins before it sleeps: several times what a wake-up costs, so that a guest which answers
/// quickly never pays it.
const SPIN: Duration = Duration::from_micros(60);
/// How often channels without requests are polled, in turns: to notice that a server has come back.
const IDLE_CHANNEL_TURNS: u64 = 256;
/// Chains that a lane may fetch in a turn, however many others are active.
const CHAINS_MIN: u16 = 4;
/// Events taken at one wake-up; more wait for the next.
const EVENTS: usize = 64;
/// How long a stopped or abandoned lane's waiters may have to wait for a turn while the reactor sleeps.
const WAIT_TICK: Duration = Duration::from_millis(5);

/// What an epoll event is about: the kind in the uppermost bits, below them the function's slot and the lane's.
const EVENT_BELL: u64 = 0;
const EVENT_LANE: u64 = 1 << 62;
const EVENT_CHANNEL: u64 = 2 << 62;
const EVENT_KIND: u64 = 3 << 62;

/// Where a lane is: the slot of its function, and its own in there.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    function: usize,
    lane: usize,
}

enum Wait {
    /// The lane, how long it may take if it hands over, and who asks.
    Stop(Place, Option<Moment>, Sender<Option<Stopped>>),
    /// The function, how long the channel may have something of it, and who asks.
    Reset(u32, Moment, Sender<()>),
    Close(u32, Sender<()>),
    Memory(u32, Arc<HostMemory>, Sender<()>),
    LetGo(u32, Arc<Removed>, Sender<()>),
}

pub(super) struct Turning {
    mailbox: Arc<Mailbox>,
    counters: Arc<ReactorCounters>,
    always: bool,
    epoll: Epoll,
    functions: Vec<Option<FunctionSlot>>,
    waits: Vec<Wait>,
    completions: Vec<Completion>,
    turns: u64,
    /// Lanes that had work in one of the last turns, each with its weight.
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
            functions: Vec::new(),
            waits: Vec::new(),
            completions: Vec::with_capacity(4096),
            turns: 0,
            active: 0,
            abandoned: 0,
            shutdown: false,
        };
        turning.watch(turning.mailbox.bell_fd(), EpollFlags::EPOLLIN, EVENT_BELL);
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
        // On the thread that polled them.
        self.functions.clear();
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
        let chains_max = (FETCH_MAX * WEIGHT_BLOCK / self.active.max(WEIGHT_BLOCK)).max(CHAINS_MIN);
        self.active = 0;
        let idle_too = self.turns.is_multiple_of(IDLE_CHANNEL_TURNS);
        for function in self.functions.iter_mut().flatten() {
            let turned = function.turn(now, self.turns, chains_max, idle_too, &mut self.completions);
            did |= turned.did;
            self.active += turned.active;
        }
        if !self.waits.is_empty() || self.abandoned > 0 {
            self.settle(now);
        }
        did
    }

    fn act(&mut self, message: Message, now: Moment) {
        match message {
            Message::OpenOutlet { function, outlet } => self.open_outlet(function, outlet),
            Message::CloseOutlet { function, reply } => {
                self.abandon_function(function);
                self.waits.push(Wait::Close(function, reply));
            }
            Message::Start { key, lane, unchanged } => self.start(key, lane, unchanged),
            Message::Resume { key, start, unchanged } => {
                if let Some(place) = self.place_of(key) {
                    if let Some(Some(slot)) = self.functions.get_mut(place.function) {
                        slot.take_back(unchanged);
                    }
                    self.forget_doorbell(place);
                    if let Some(slot) = self.lane(place) {
                        slot.lane.resume(start);
                    }
                    self.watch_doorbell(place);
                }
            }
            Message::Stop { key, hand_over, reply } => match self.place_of(key) {
                Some(place) => {
                    match self.lane(place) {
                        Some(slot) if hand_over => slot.lane.hand_over(now),
                        Some(slot) => slot.lane.stop(now),
                        None => {}
                    }
                    let until = hand_over.then(|| now.after(STOP_PATIENCE));
                    self.waits.push(Wait::Stop(place, until, reply));
                }
                None => drop(reply.send(None)),
            },
            Message::Forget { key } => {
                if let Some(place) = self.place_of(key) {
                    self.abandon(place);
                }
            }
            Message::Reset { function, reply } => {
                self.abandon_function(function);
                self.waits.push(Wait::Reset(function, now.after(STOP_PATIENCE), reply));
            }
            Message::SetMemory { function, memory, reply } => self.waits.push(Wait::Memory(function, memory, reply)),
            Message::LetGo { function, removed, reply } => self.waits.push(Wait::LetGo(function, removed, reply)),
            Message::Shutdown => self.shutdown = true,
        }
    }

    fn open_outlet(&mut self, function: u32, outlet: Outlet) {
        let number = free_slot(&mut self.functions);
        let slot = FunctionSlot::new(function, outlet);
        let (fds, edges) = slot.wake_fds();
        let flags = if edges { EpollFlags::EPOLLIN | EpollFlags::EPOLLET } else { EpollFlags::EPOLLIN };
        for (channel, fd) in fds {
            self.watch(fd, flags, EVENT_CHANNEL | (number as u64) << 32 | channel as u64);
        }
        self.functions[number] = Some(slot);
    }

    fn start(&mut self, key: QueueKey, mut lane: AnyLane, unchanged: bool) {
        if let Some(old) = self.place_of(key) {
            self.abandon(old);
        }
        let turns = self.turns;
        let Some(function) = self.number_of(key.function) else {
            // The function was closed in the meantime.
            return;
        };
        let Some(slot) = &mut self.functions[function] else { return };
        let number = free_slot(&mut slot.lanes);
        if let AnyLane::Block(lane) = &mut lane {
            lane.set_number(number as u32);
        }
        let lane = LaneSlot { queue: key.queue, lane, worked_in: turns, abandoned: false };
        slot.start(number, lane, unchanged);
        self.watch_doorbell(Place { function, lane: number });
        self.count_lanes();
    }

    fn number_of(&self, function: u32) -> Option<usize> {
        self.functions.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.function == function))
    }

    fn place_of(&self, key: QueueKey) -> Option<Place> {
        let function = self.number_of(key.function)?;
        let lane = self.functions[function].as_ref()?.lane_of(key.queue)?;
        Some(Place { function, lane })
    }

    fn lane(&mut self, place: Place) -> Option<&mut LaneSlot> {
        self.functions.get_mut(place.function)?.as_mut()?.lanes.get_mut(place.lane)?.as_mut()
    }

    fn abandon_function(&mut self, function: u32) {
        let Some(function) = self.number_of(function) else { return };
        let lanes = self.functions[function].as_ref().map_or(0, |slot| slot.lanes.len());
        for lane in 0..lanes {
            self.abandon(Place { function, lane });
        }
    }

    fn abandon(&mut self, place: Place) {
        self.forget_doorbell(place);
        let Some(slot) = self.lane(place) else { return };
        if !slot.abandoned {
            slot.lane.abandon();
            slot.abandoned = true;
            self.abandoned += 1;
            // A stop that was still waited for will not come.
            self.waits.retain(|wait| !matches!(wait, Wait::Stop(stopping, ..) if *stopping == place));
        }
        self.count_lanes();
    }

    fn count_lanes(&self) {
        self.counters.lanes.set(self.all_lanes().filter(|slot| !slot.abandoned).count() as u64);
    }

    /// Drops abandoned lanes that are drained, and answers what has come true.
    fn settle(&mut self, now: Moment) {
        let waits = std::mem::take(&mut self.waits);
        for wait in waits {
            if let Some(again) = self.settle_one(wait, now) {
                self.waits.push(again);
            }
        }
        self.abandoned = self.functions.iter_mut().flatten().map(FunctionSlot::drop_drained).sum();
    }

    /// Answers a wait, or gives it back. An asker that has gone away is nobody's problem.
    fn settle_one(&mut self, wait: Wait, now: Moment) -> Option<Wait> {
        match wait {
            Wait::Stop(place, until, reply) => {
                let is_stopped = self.lane(place)?.lane.is_stopped(now);
                let function = self.functions.get_mut(place.function)?.as_mut()?;
                let mut has_handed_over =
                    |until| function.hand_over(place.lane, until <= now, now, &mut self.completions);
                if !is_stopped || !until.is_none_or(&mut has_handed_over) {
                    return Some(Wait::Stop(place, until, reply));
                }
                let slot = self.lane(place)?;
                let _ = reply.send(Some(Stopped { position: slot.lane.position(), parked: slot.lane.has_parked() }));
                self.forget_doorbell(place);
                None
            }
            Wait::Reset(function, until, reply) => {
                // What the channel still has would land behind what the driver writes after the reset.
                let is_over = |slot: &mut FunctionSlot| slot.has_let_go(false) && (until <= now || slot.is_drained());
                if !self.function(function).is_none_or(is_over) {
                    return Some(Wait::Reset(function, until, reply));
                }
                let _ = reply.send(());
                None
            }
            Wait::Close(function, reply) => {
                if !self.function(function).is_none_or(|slot| slot.has_let_go(true)) {
                    return Some(Wait::Close(function, reply));
                }
                if let Some(number) = self.number_of(function)
                    && let Some(slot) = self.functions[number].take()
                {
                    for (_, fd) in slot.wake_fds().0 {
                        forget(&self.epoll, fd);
                    }
                }
                let _ = reply.send(());
                None
            }
            Wait::Memory(function, memory, reply) => {
                let mut all = true;
                for slot in self.function(function).into_iter().flat_map(|slot| slot.lanes.iter_mut().flatten()) {
                    all &= slot.lane.offer_memory(&memory);
                }
                if !all {
                    return Some(Wait::Memory(function, memory, reply));
                }
                let _ = reply.send(());
                None
            }
            Wait::LetGo(function, removed, reply) => {
                let mut all = true;
                for slot in self.function(function).into_iter().flat_map(|slot| slot.lanes.iter_mut().flatten()) {
                    all &= slot.lane.let_go(&removed);
                }
                if !all {
                    return Some(Wait::LetGo(function, removed, reply));
                }
                let _ = reply.send(());
                None
            }
        }
    }

    fn function(&mut self, function: u32) -> Option<&mut FunctionSlot> {
        self.functions.iter_mut().flatten().find(|slot| slot.function == function)
    }

    fn all_lanes(&self) -> impl Iterator<Item = &LaneSlot> {
        self.functions.iter().flatten().flat_map(|slot| slot.lanes.iter().flatten())
    }

    /// Sleeps until there is something to do, if there is nothing now. Returns the moment after.
    fn sleep(&mut self, now: Moment) -> Moment {
        if !self.functions.iter_mut().flatten().all(FunctionSlot::arm) {
            return Moment::now();
        }
        let Self { mailbox, .. } = self;
        if !mailbox.asleep.prepare(|| mailbox.is_empty()) {
            return Moment::now();
        }
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = self.epoll.wait(&mut events, self.timeout(now)).unwrap_or(0);
        self.mailbox.asleep.awake();
        for event in &events[..count] {
            let function = (event.data() & !EVENT_KIND) >> 32;
            let place = Place { function: function as usize, lane: (event.data() & 0xffff_ffff) as usize };
            match event.data() & EVENT_KIND {
                EVENT_LANE => {
                    if let Some(slot) = self.lane(place) {
                        slot.lane.take_doorbell();
                    }
                }
                EVENT_CHANNEL => {
                    if let Some(Some(slot)) = self.functions.get_mut(place.function) {
                        slot.woken(place.lane, now, &mut self.completions);
                    }
                }
                _ => self.mailbox.silence(),
            }
        }
        let after = Moment::now();
        // Channels that wanted to be called by now.
        for slot in self.functions.iter_mut().flatten() {
            if slot.channel_deadline().is_some_and(|deadline| deadline <= after) {
                slot.woken(0, after, &mut self.completions);
            }
        }
        self.counters.sleeps.add(1);
        self.counters.asleep_ns.add(after.ns_since(now));
        after
    }

    fn timeout(&self, now: Moment) -> EpollTimeout {
        let functions = self.functions.iter().flatten().filter_map(FunctionSlot::deadline);
        let waits = (!self.waits.is_empty()).then(|| now.after(WAIT_TICK));
        match functions.chain(waits).min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                let wait = deadline.until(now);
                // Rounded up: a wake-up before the deadline would find nothing to do.
                let milliseconds = wait.as_nanos().div_ceil(1_000_000).min(60_000) as u16;
                EpollTimeout::from(milliseconds)
            }
        }
    }

    fn doorbell_fd(&self, place: Place) -> Option<RawFd> {
        self.functions.get(place.function)?.as_ref()?.lanes.get(place.lane)?.as_ref()?.lane.doorbell_fd()
    }

    fn watch_doorbell(&self, place: Place) {
        if let Some(fd) = self.doorbell_fd(place) {
            let event = EVENT_LANE | (place.function as u64) << 32 | place.lane as u64;
            self.watch(fd, EpollFlags::EPOLLIN, event);
        }
    }

    fn forget_doorbell(&self, place: Place) {
        if let Some(fd) = self.doorbell_fd(place) {
            forget(&self.epoll, fd);
        }
    }

    fn watch(&self, fd: RawFd, flags: EpollFlags, data: u64) {
        if let Err(error) = watch(&self.epoll, fd, EpollEvent::new(flags, data)) {
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
fn watch(epoll: &Epoll, fd: RawFd, event: EpollEvent) -> nix::Result<()> {
    // SAFETY: the lane, channel or mailbox that the descriptor came from is alive in this call's caller.
    epoll.add(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }, event)
}

#[expect(unsafe_code, reason = "borrows a descriptor whose owner outlives the call")]
fn forget(epoll: &Epoll, fd: RawFd) {
    // SAFETY: as in `watch`.
    let _ = epoll.delete(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) });
}
