//! What a reactor has of one function: the channels of its backend, and the lanes of those of its queues that live here.
//!
//! A function's turn is whole: its lanes fetch and submit, its channels are polled, the lanes publish. So what one function
//! completes does not wait for the batch of the next, and the lanes of a function submit together.

use std::os::fd::RawFd;

use crate::backend::Completion;
use crate::backend::net::{BURST, NetChannel};
use crate::clock::Moment;
use crate::device::{AnyLane, NetLane, NetRole, Outlet};

/// How many turns a lane counts as active after it had work: as long as a guest takes to add its next request.
const ACTIVE_TURNS: u64 = 64;
/// What a lane's chains take of a turn: the two lanes of a queue pair together as much as one of a disk.
pub(super) const WEIGHT_BLOCK: u16 = 2;
const WEIGHT_NET: u16 = 1;

pub(super) struct LaneSlot {
    pub(super) queue: u16,
    pub(super) lane: AnyLane,
    /// The turn in which it last had work.
    pub(super) worked_in: u64,
    /// Abandoned: kept only until its channel has no request of it.
    pub(super) abandoned: bool,
}

impl LaneSlot {
    fn net(&mut self) -> Option<&mut (dyn NetLane + 'static)> {
        match &mut self.lane {
            AnyLane::Net(lane) => Some(lane.as_mut()),
            AnyLane::Block(_) => None,
        }
    }
}

pub(super) struct FunctionSlot {
    /// The function's number.
    pub(super) function: u32,
    /// Dropped before the lanes: it may hold requests whose memory belongs to them.
    pub(super) outlet: Outlet,
    pub(super) lanes: Vec<Option<LaneSlot>>,
    /// The channel has something to do before the last lane has handed over.
    handing_over: bool,
}

/// What a turn of a function came to.
#[derive(Default)]
pub(super) struct Turned {
    /// There was something to do.
    pub(super) did: bool,
    /// Lanes that had work in one of the last turns, each with its weight.
    pub(super) active: u16,
}

impl Turned {
    fn lane(&mut self, did: bool, turn: u64, worked_in: &mut u64, weight: u16) {
        if did {
            self.did = true;
            *worked_in = turn;
        }
        self.active += if turn - *worked_in < ACTIVE_TURNS { weight } else { 0 };
    }
}

impl FunctionSlot {
    pub(super) const fn new(function: u32, outlet: Outlet) -> Self {
        Self { function, outlet, lanes: Vec::new(), handing_over: false }
    }

    /// Takes a lane in, in a free slot; `unchanged`: no queue that was handed over has run elsewhere.
    pub(super) fn start(&mut self, number: usize, slot: LaneSlot, unchanged: bool) {
        self.lanes[number] = Some(slot);
        self.take_back(unchanged);
    }

    /// A lane goes on, or is new.
    pub(super) fn take_back(&mut self, unchanged: bool) {
        self.handing_over = false;
        if let Outlet::Block(channel) = &mut self.outlet {
            channel.take_back(unchanged);
        }
    }

    /// A lane that hands over has stopped. Returns whether nothing can reach the server any more that the next owner does not want there; to
    /// be asked again after a turn if not. `is_late`: that was long enough, and what is still under way is cut off.
    pub(super) fn hand_over(
        &mut self,
        lane: usize,
        is_late: bool,
        now: Moment,
        completions: &mut Vec<Completion>,
    ) -> bool {
        let runs = |(number, slot): (usize, &Option<LaneSlot>)| {
            number != lane && slot.as_ref().is_some_and(|slot| !slot.abandoned && !slot.lane.is_still())
        };
        let is_last = !self.lanes.iter().enumerate().any(runs);
        let mut is_done = self.has_handed_over(lane, is_last);
        if is_late
            && !is_done
            && let Outlet::Block(channel) = &mut self.outlet
        {
            // Others on this channel see a server that is away for a moment; a write that is carried out behind the next owner's is worse.
            channel.cut_off(now, completions);
            complete(&mut self.lanes, now, completions);
            // A channel that cannot be cut off has requests yet, and is waited for.
            is_done = self.has_handed_over(lane, is_last);
        }
        self.handing_over = !is_done;
        is_done
    }

    fn has_handed_over(&mut self, lane: usize, is_last: bool) -> bool {
        let Outlet::Block(channel) = &mut self.outlet else { return true };
        // Asked in any case: with the last lane the channel must know, whatever the server has.
        let is_clear = !is_last || channel.hand_over() && channel.in_flight() == 0;
        is_clear && self.lanes[lane].as_mut().is_none_or(|slot| slot.lane.is_drained())
    }

    /// One turn, the `turn`th of the reactor. Each lane fetches at most `chains_max` chains; a channel without requests is
    /// polled only if `idle_too`.
    #[inline]
    pub(super) fn turn(
        &mut self,
        now: Moment,
        turn: u64,
        chains_max: u16,
        idle_too: bool,
        completions: &mut Vec<Completion>,
    ) -> Turned {
        let Self { outlet, lanes, handing_over, .. } = self;
        let mut turned = match outlet {
            Outlet::Block(channel) => {
                let channel = channel.as_mut();
                let mut turned = Turned::default();
                for slot in lanes.iter_mut().flatten() {
                    let AnyLane::Block(lane) = &mut slot.lane else { continue };
                    turned.lane(lane.turn(now, chains_max, channel), turn, &mut slot.worked_in, WEIGHT_BLOCK);
                }
                if idle_too || *handing_over || channel.in_flight() > 0 {
                    channel.poll(now, completions);
                    turned.did |= complete(lanes, now, completions);
                }
                turned
            }
            Outlet::Net(channels) => turn_net(channels, lanes, now, turn, chains_max),
        };
        for slot in lanes.iter_mut().flatten() {
            turned.did |= slot.lane.finish_turn(now);
        }
        turned
    }

    /// A channel's descriptor has become readable, or its deadline has come.
    pub(super) fn woken(&mut self, channel: usize, now: Moment, completions: &mut Vec<Completion>) {
        match &mut self.outlet {
            Outlet::Block(channel) => {
                channel.poll(now, completions);
                complete(&mut self.lanes, now, completions);
            }
            Outlet::Net(channels) => {
                if let Some(Some(channel)) = channels.get_mut(channel) {
                    channel.woken();
                }
            }
        }
    }

    /// The descriptors to wait on for the channels, each with the channel's number, and whether edges count.
    pub(super) fn wake_fds(&self) -> (Vec<(usize, RawFd)>, bool) {
        match &self.outlet {
            Outlet::Block(channel) => (channel.wake_fd().map(|fd| (0, fd)).into_iter().collect(), false),
            Outlet::Net(channels) => {
                let fd = |(number, channel): (usize, &Option<Box<dyn NetChannel>>)| {
                    channel.as_ref()?.wake_fd().map(|fd| (number, fd))
                };
                (channels.iter().enumerate().filter_map(fd).collect(), true)
            }
        }
    }

    /// Whether nothing keeps the reactor from sleeping: each lane waits for its doorbell, and no channel has frames that a lane
    /// would take.
    pub(super) fn arm(&mut self) -> bool {
        let mut takers = 0u128;
        for slot in self.lanes.iter_mut().flatten().filter(|slot| !slot.abandoned) {
            if slot.lane.arm() != Some(true) {
                return false;
            }
            if let Some(lane) = slot.net()
                && let NetRole::Receive(pair) = lane.role()
                && lane.takes_frames()
            {
                takers |= 1 << (pair % 128);
            }
        }
        match &mut self.outlet {
            Outlet::Block(_) => true,
            Outlet::Net(channels) => channels.iter_mut().enumerate().all(|(pair, channel)| {
                let takes = takers >> (pair % 128) & 1 == 1;
                channel.as_mut().is_none_or(|channel| channel.arm_carrying() && (!takes || channel.arm()))
            }),
        }
    }

    /// The lane of a queue that has not been abandoned.
    pub(super) fn lane_of(&self, queue: u16) -> Option<usize> {
        self.lanes.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.queue == queue && !slot.abandoned))
    }

    /// Drops abandoned lanes that are drained. Returns how many remain.
    pub(super) fn drop_drained(&mut self) -> usize {
        for slot in &mut self.lanes {
            if slot.as_mut().is_some_and(|slot| slot.abandoned && slot.lane.is_drained()) {
                *slot = None;
            }
        }
        self.lanes.iter().flatten().filter(|slot| slot.abandoned).count()
    }

    /// Whether everything that was abandoned has let go of the VM's memory; if `all`, everything.
    pub(super) fn has_let_go(&mut self, all: bool) -> bool {
        self.lanes.iter_mut().flatten().all(|slot| !(all || slot.abandoned) || slot.lane.is_let_go())
    }

    /// Whether the channel has nothing of what was abandoned.
    pub(super) fn is_drained(&mut self) -> bool {
        self.lanes.iter_mut().flatten().all(|slot| !slot.abandoned || slot.lane.is_drained())
    }

    /// The next moment at which the function wants a turn though nothing wakes it.
    pub(super) fn deadline(&self) -> Option<Moment> {
        let lanes = self.lanes.iter().flatten().filter_map(|slot| slot.lane.deadline());
        lanes.chain(self.channel_deadline()).min()
    }

    /// The moment at which the channel wants to be polled though nothing wakes it.
    pub(super) fn channel_deadline(&self) -> Option<Moment> {
        match &self.outlet {
            Outlet::Block(channel) => channel.deadline(),
            Outlet::Net(_) => None,
        }
    }
}

/// Hands what has ended to the lanes. Returns whether anything has.
#[inline]
fn complete(lanes: &mut [Option<LaneSlot>], now: Moment, completions: &mut Vec<Completion>) -> bool {
    if completions.is_empty() {
        return false;
    }
    for Completion { tag, result } in completions.drain(..) {
        if let Some(Some(LaneSlot { lane: AnyLane::Block(lane), .. })) = lanes.get_mut(tag.lane as usize) {
            lane.complete(now, tag.row, result);
        }
    }
    true
}

/// The turn of a network device: lanes first, so that what comes back of what a VM sends is received in the same turn.
#[inline]
fn turn_net(
    channels: &mut [Option<Box<dyn NetChannel>>],
    lanes: &mut [Option<LaneSlot>],
    now: Moment,
    turn: u64,
    chains_max: u16,
) -> Turned {
    let mut turned = Turned::default();
    for channel in channels.iter_mut().flatten() {
        turned.did |= channel.carry();
    }
    for slot in lanes.iter_mut().flatten().filter(|slot| !slot.abandoned) {
        let AnyLane::Net(lane) = &mut slot.lane else { continue };
        let channel = match lane.role() {
            NetRole::Receive(pair) | NetRole::Transmit(pair) => {
                channels.get_mut(usize::from(pair)).and_then(Option::as_deref_mut)
            }
            NetRole::Control => None,
        };
        turned.lane(lane.turn(now, chains_max, channel), turn, &mut slot.worked_in, WEIGHT_NET);
    }
    for slot in lanes.iter_mut().flatten().filter(|slot| !slot.abandoned) {
        let AnyLane::Net(lane) = &mut slot.lane else { continue };
        let NetRole::Receive(pair) = lane.role() else { continue };
        let Some(Some(channel)) = channels.get_mut(usize::from(pair)) else { continue };
        if !lane.takes_frames() {
            continue;
        }
        let frames = channel.receive(usize::from(chains_max).min(BURST));
        if !frames.is_empty() {
            let taken = lane.deliver(now, frames);
            channel.release(taken);
            if taken > 0 {
                turned.did = true;
                slot.worked_in = turn;
            }
        }
    }
    turned
}
