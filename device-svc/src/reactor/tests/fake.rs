//! A lane and a channel that note what is asked of them, and end requests when the test says so.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::PATIENCE;
use crate::backend::{BlockChannel, BlockFault, BlockOperation, BlockRequest, Completion, Segments, Tag};
use crate::clock::Moment;
use crate::device::{BlockLane, Lane, LaneQueue};
use crate::dma::{HostMemory, Removed};
use crate::link::{QueuePosition, QueueStart};

/// What was asked of a lane or channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Note {
    Turn(u16),
    /// It may fetch so many chains in a turn from now on.
    Share(u16, u16),
    Armed(u16),
    Doorbell(u16),
    Stop(u16),
    HandOver(u16),
    Memory(u16),
    AskedStopped,
    AskedLetGo,
    Submitted(u32),
    Completed(u32),
    ChannelHandsOver,
    CutOff,
    /// It was handed over, and whether nothing has changed since.
    TakenBack(bool),
    ChannelDropped,
    LaneDropped(u16),
}

#[derive(Default)]
pub(super) struct Record {
    notes: Mutex<Vec<Note>>,
    changed: Condvar,
    released: std::sync::atomic::AtomicBool,
}

impl Record {
    fn note(&self, note: Note) {
        self.notes.lock().unwrap().push(note);
        self.changed.notify_all();
    }

    pub(super) fn with<T>(&self, look: impl FnOnce(&[Note]) -> T) -> T {
        look(&self.notes.lock().unwrap())
    }

    #[track_caller]
    pub(super) fn wait_for(&self, what: impl Fn(&[Note]) -> bool) {
        let notes = self.notes.lock().unwrap();
        let (notes, _) = self.changed.wait_timeout_while(notes, PATIENCE, |notes| !what(notes)).unwrap();
        assert!(what(&notes), "waited too long; of {} notes the last: {:?}", notes.len(), notes.last());
    }

    /// From now on requests end.
    pub(super) fn release(&self) {
        self.released.store(true, std::sync::atomic::Ordering::Release);
    }
}

pub(super) struct FakeChannel {
    record: Arc<Record>,
    held: Vec<Tag>,
    handed_over: bool,
}

impl FakeChannel {
    pub(super) fn new(record: &Arc<Record>) -> Self {
        Self { record: Arc::clone(record), held: Vec::new(), handed_over: false }
    }
}

impl BlockChannel for FakeChannel {
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        self.held.push(request.tag);
        self.record.note(Note::Submitted(request.tag.row));
        Ok(())
    }

    fn poll(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        if self.record.released.load(std::sync::atomic::Ordering::Acquire) {
            completions.extend(self.held.drain(..).map(|tag| Completion { tag, result: Ok(()) }));
        }
    }

    fn in_flight(&self) -> usize {
        self.held.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn deadline(&self) -> Option<Moment> {
        // Nothing wakes a reactor when the test lets go, so the channel asks to be looked at.
        (!self.held.is_empty()).then(|| Moment::now().after(Duration::from_millis(1)))
    }

    fn hand_over(&mut self) -> bool {
        if !std::mem::replace(&mut self.handed_over, true) {
            self.record.note(Note::ChannelHandsOver);
        }
        true
    }

    fn cut_off(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        self.record.note(Note::CutOff);
        completions.extend(self.held.drain(..).map(|tag| Completion { tag, result: Err(BlockFault::Away) }));
    }

    fn take_back(&mut self, unchanged: bool) {
        if std::mem::take(&mut self.handed_over) {
            self.record.note(Note::TakenBack(unchanged));
        }
    }
}

impl Drop for FakeChannel {
    fn drop(&mut self) {
        self.record.note(Note::ChannelDropped);
    }
}

pub(super) struct FakeLane {
    record: Arc<Record>,
    queue: u16,
    number: u32,
    in_flight: u32,
    submitted: u32,
    /// It has work in every turn.
    pub(super) busy: bool,
    /// How many requests it submits in all.
    pub(super) requests: u32,
    /// What is waited on for doorbells.
    pub(super) doorbell: Option<OwnedFd>,
    /// It wants a turn this often.
    pub(super) deadline: Option<Duration>,
    /// When it is to stop, it stops without its requests.
    pub(super) gives_up: bool,
    stops: bool,
    chains_max: u16,
}

impl FakeLane {
    pub(super) fn new(record: &Arc<Record>, queue: u16) -> Self {
        Self {
            record: Arc::clone(record),
            queue,
            number: 0,
            in_flight: 0,
            submitted: 0,
            busy: false,
            requests: 0,
            doorbell: None,
            chains_max: 0,
            deadline: None,
            gives_up: false,
            stops: false,
        }
    }
}

impl BlockLane for FakeLane {
    fn set_number(&mut self, number: u32) {
        self.number = number;
    }

    fn turn(&mut self, _now: Moment, chains_max: u16, channel: &mut dyn BlockChannel) -> bool {
        if self.chains_max != chains_max {
            self.chains_max = chains_max;
            self.record.note(Note::Share(self.queue, chains_max));
        }
        self.record.note(Note::Turn(self.queue));
        let did = self.submitted < self.requests;
        while self.submitted < self.requests {
            let tag = Tag { lane: self.number, row: self.submitted };
            let operation = BlockOperation::Flush;
            let request = BlockRequest { tag, operation, offset: 0, length: 0, segments: Segments::NONE };
            channel.submit(request).unwrap();
            self.submitted += 1;
            self.in_flight += 1;
        }
        did || self.busy
    }

    fn complete(&mut self, _now: Moment, row: u32, _result: Result<(), BlockFault>) {
        self.in_flight -= 1;
        self.record.note(Note::Completed(row));
    }
}

impl Lane for FakeLane {
    fn queue(&self) -> &dyn LaneQueue {
        unreachable!("it answers everything itself")
    }

    fn queue_mut(&mut self) -> &mut dyn LaneQueue {
        unreachable!("it answers everything itself")
    }

    fn finish_turn(&mut self, _now: Moment) -> bool {
        false
    }

    fn arm(&mut self) -> Option<bool> {
        self.record.note(Note::Armed(self.queue));
        Some(true)
    }

    fn doorbell_fd(&self) -> Option<RawFd> {
        self.doorbell.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn take_doorbell(&mut self) {
        let mut count = [0; 8];
        if nix::unistd::read(self.doorbell.as_ref().unwrap(), &mut count).is_ok() {
            self.record.note(Note::Doorbell(self.queue));
        }
    }

    fn deadline(&self) -> Option<Moment> {
        self.deadline.map(|wait| Moment::now().after(wait))
    }

    fn stop(&mut self, _now: Moment) {
        self.record.note(Note::Stop(self.queue));
        self.stops = true;
    }

    fn hand_over(&mut self, _now: Moment) {
        self.record.note(Note::HandOver(self.queue));
        self.stops = true;
    }

    fn is_still(&self) -> bool {
        self.stops && (self.in_flight == 0 || self.gives_up)
    }

    fn is_stopped(&mut self, _now: Moment) -> bool {
        self.record.note(Note::AskedStopped);
        self.in_flight == 0 || self.gives_up
    }

    fn position(&self) -> QueuePosition {
        QueuePosition { next_avail: self.submitted as u16, ..QueuePosition::default() }
    }

    fn has_parked(&self) -> bool {
        false
    }

    fn resume(&mut self, _start: QueueStart) {}

    fn abandon(&mut self) {}

    fn is_let_go(&mut self) -> bool {
        self.record.note(Note::AskedLetGo);
        self.in_flight == 0
    }

    fn is_drained(&mut self) -> bool {
        self.in_flight == 0
    }

    fn offer_memory(&mut self, _memory: &Arc<HostMemory>) -> bool {
        self.record.note(Note::Memory(self.queue));
        self.in_flight == 0
    }

    fn let_go(&mut self, _removed: &Removed) -> bool {
        self.in_flight == 0
    }
}

impl Drop for FakeLane {
    fn drop(&mut self) {
        self.record.note(Note::LaneDropped(self.queue));
    }
}
