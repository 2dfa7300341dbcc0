//! What a reactor has of one function: the channel to its backend, and the lanes of those of its queues that live here.
//!
//! A function's turn is whole: its lanes fetch and submit, the channel is polled, the lanes publish. So what one function
//! completes does not wait for the batch of the next, and the lanes of a function submit together.

use crate::backend::{BlockChannel, Completion};
use crate::clock::Moment;
use crate::device::Lane;

/// How many turns a lane counts as active after it had work: as long as a guest takes to add its next request.
const ACTIVE_TURNS: u64 = 64;

pub(super) struct LaneSlot {
    pub(super) queue: u16,
    pub(super) lane: Box<dyn Lane>,
    /// The turn in which it last had work.
    pub(super) worked_in: u64,
    /// Abandoned: kept only until its channel has no request of it.
    pub(super) abandoned: bool,
}

pub(super) struct FunctionSlot {
    /// The function's number.
    pub(super) function: u32,
    /// Dropped before the lanes: it may hold requests whose memory belongs to them.
    pub(super) channel: Box<dyn BlockChannel>,
    pub(super) lanes: Vec<Option<LaneSlot>>,
}

/// What a turn of a function came to.
#[derive(Default)]
pub(super) struct Turned {
    /// There was something to do.
    pub(super) did: bool,
    /// Lanes that had work in one of the last turns.
    pub(super) active: u16,
}

impl FunctionSlot {
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
        let mut turned = Turned::default();
        for slot in self.lanes.iter_mut().flatten() {
            if slot.lane.turn(now, chains_max, self.channel.as_mut()) {
                turned.did = true;
                slot.worked_in = turn;
            }
            turned.active += u16::from(turn - slot.worked_in < ACTIVE_TURNS);
        }
        if idle_too || self.channel.in_flight() > 0 {
            self.channel.poll(now, completions);
            turned.did |= self.complete(now, completions);
        }
        for slot in self.lanes.iter_mut().flatten() {
            turned.did |= slot.lane.finish_turn(now);
        }
        turned
    }

    /// Polls the channel outside a turn.
    pub(super) fn poll(&mut self, now: Moment, completions: &mut Vec<Completion>) {
        self.channel.poll(now, completions);
        self.complete(now, completions);
    }

    /// Hands what has ended to the lanes. Returns whether anything has.
    #[inline]
    fn complete(&mut self, now: Moment, completions: &mut Vec<Completion>) -> bool {
        if completions.is_empty() {
            return false;
        }
        for Completion { tag, result } in completions.drain(..) {
            if let Some(Some(slot)) = self.lanes.get_mut(tag.lane as usize) {
                slot.lane.complete(now, tag.row, result);
            }
        }
        true
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

    /// The next moment at which the function wants a turn though nothing wakes it.
    pub(super) fn deadline(&self) -> Option<Moment> {
        let lanes = self.lanes.iter().flatten().filter_map(|slot| slot.lane.deadline());
        lanes.chain(self.channel.deadline()).min()
    }
}
