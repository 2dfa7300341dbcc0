#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! A reactor from outside: lanes and channels that keep a record, and what other threads ask of them.

mod fake;

use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::mailbox::Mailbox;
use super::*;
use crate::device::{AnyLane, Outlet};
use crate::dma::HostMemory;
use crate::link::QueuePosition;
use fake::{FakeChannel, FakeLane, Note, Record};

const PATIENCE: Duration = Duration::from_secs(60);

fn reactors(poll: PollConfig) -> Reactors {
    Reactors::start(&ReactorsConfig { count: ReactorCount::Exactly(1), poll }).unwrap()
}

/// One reactor with one function (number 1) that has this channel and these lanes.
struct Bed {
    record: Arc<Record>,
    reactors: Reactors,
}

impl Bed {
    fn new(poll: PollConfig) -> Self {
        let bed = Self { record: Arc::default(), reactors: reactors(poll) };
        let channel = Box::new(FakeChannel::new(&bed.record));
        bed.post(Message::OpenOutlet { function: 1, outlet: Outlet::Block(channel) });
        bed
    }

    fn post(&self, message: Message) {
        self.reactors.handles()[0].post(message);
    }

    fn start(&self, queue: u16, shape: impl FnOnce(&mut FakeLane)) {
        let mut lane = FakeLane::new(&self.record, queue);
        shape(&mut lane);
        self.post(Message::Start { key: key(queue), lane: AnyLane::Block(Box::new(lane)), unchanged: false });
    }

    fn stop(&self, queue: u16) -> Receiver<Option<Stopped>> {
        self.end(queue, false)
    }

    fn end(&self, queue: u16, hand_over: bool) -> Receiver<Option<Stopped>> {
        let (reply, answer) = channel();
        self.post(Message::Stop { key: key(queue), hand_over, reply });
        answer
    }

    /// What was asked of the channel as its queues handed over.
    fn handing_over(&self) -> Vec<Note> {
        let is_meant = |note: &&Note| matches!(note, Note::ChannelHandsOver | Note::CutOff | Note::TakenBack(_));
        self.record.with(|notes| notes.iter().filter(is_meant).copied().collect())
    }
}

fn key(queue: u16) -> QueueKey {
    QueueKey { function: 1, queue }
}

#[test]
fn a_flooding_queue_gets_one_turn_for_each_of_its_neighbour() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |lane| lane.busy = true);
    bed.start(1, |_| ());
    bed.record.wait_for(|notes| notes.iter().filter(|note| **note == Note::Turn(1)).count() >= 1000);
    bed.record.with(|notes| {
        let turns: Vec<u16> =
            notes.iter().filter_map(|note| if let Note::Turn(queue) = note { Some(*queue) } else { None }).collect();
        let both = turns.iter().position(|queue| *queue == 1).unwrap();
        for pair in turns[both..].chunks_exact(2) {
            assert_eq!(pair, [1, 0], "the neighbour is turned as often as the flood");
        }
    });
}

#[test]
fn busy_queues_share_what_one_fetches_alone() {
    let bed = Bed::new(PollConfig::Always);
    let share = |queue: u16| {
        move |notes: &[Note]| {
            notes.iter().rev().find_map(|note| match note {
                Note::Share(number, chains_max) if *number == queue => Some(*chains_max),
                _ => None,
            })
        }
    };
    bed.start(0, |lane| lane.busy = true);
    bed.record.wait_for(|notes| share(0)(notes) == Some(32));
    bed.start(1, |lane| lane.busy = true);
    bed.record.wait_for(|notes| share(0)(notes) == Some(16) && share(1)(notes) == Some(16));
    for queue in 2..40 {
        bed.start(queue, |lane| lane.busy = true);
    }
    // However many there are, each gets a few.
    bed.record.wait_for(|notes| (0..40).all(|queue| share(queue)(notes) == Some(4)));
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |lane| lane.requests = 3);
    bed.record.wait_for(|notes| notes.contains(&Note::Submitted(2)));
    let answer = bed.stop(0);
    // Asked over and over, the lane is not stopped while the channel has its requests.
    bed.record.wait_for(|notes| notes.iter().filter(|note| **note == Note::AskedStopped).count() >= 3);
    assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
    bed.record.release();
    let position = QueuePosition { next_avail: 3, ..QueuePosition::default() };
    assert_eq!(answer.recv_timeout(PATIENCE).unwrap(), Some(Stopped { position, parked: false }));
    bed.record.with(|notes| {
        let last = notes.iter().rposition(|note| matches!(note, Note::Completed(_))).unwrap();
        let stop = notes.iter().position(|note| *note == Note::Stop(0)).unwrap();
        assert!(stop < last);
        assert_eq!(notes.iter().filter(|note| matches!(note, Note::Completed(_))).count(), 3);
    });
}

#[test]
fn the_last_queue_that_hands_over_takes_the_channel_with_it() {
    let bed = Bed::new(PollConfig::Adaptive);
    for queue in [0, 1, 2] {
        bed.start(queue, |_| ());
    }
    // One that has only stopped has nothing to say.
    assert!(bed.stop(2).recv_timeout(PATIENCE).unwrap().is_some());
    assert!(bed.end(0, true).recv_timeout(PATIENCE).unwrap().is_some());
    bed.post(Message::Forget { key: key(0) });
    assert_eq!(bed.handing_over(), []);
    assert!(bed.end(1, true).recv_timeout(PATIENCE).unwrap().is_some());
    bed.post(Message::Forget { key: key(1) });
    assert_eq!(bed.handing_over(), [Note::ChannelHandsOver]);
    bed.start(0, |_| ());
    bed.record.wait_for(|notes| notes.contains(&Note::TakenBack(false)));
}

#[test]
fn a_server_that_says_nothing_is_cut_off_from_a_channel_that_knows_why() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |lane| (lane.requests, lane.gives_up) = (3, true));
    bed.record.wait_for(|notes| notes.contains(&Note::Submitted(2)));
    assert!(bed.end(0, true).recv_timeout(PATIENCE).unwrap().is_some());
    assert_eq!(bed.handing_over(), [Note::ChannelHandsOver, Note::CutOff]);
    bed.record.with(|notes| {
        let ended = notes.iter().filter(|note| matches!(note, Note::Completed(_))).count();
        assert_eq!(ended, 3, "nothing of it is in the channel any more");
    });
}

#[test]
fn what_is_not_there_has_stopped_nowhere() {
    let bed = Bed::new(PollConfig::Adaptive);
    assert_eq!(bed.stop(7).recv_timeout(PATIENCE).unwrap(), None);
    // A lane of a function without a channel was closed in the meantime: nobody turns it.
    let lane = Box::new(FakeLane::new(&bed.record, 9));
    bed.post(Message::Start { key: QueueKey { function: 2, queue: 9 }, lane: AnyLane::Block(lane), unchanged: false });
    bed.record.wait_for(|notes| notes.contains(&Note::LaneDropped(9)));
    assert_eq!(bed.record.with(|notes| notes.iter().filter(|note| **note == Note::Turn(9)).count()), 0);
}

#[test]
fn a_reset_abandons_and_answers_when_memory_is_let_go() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |lane| lane.requests = 1);
    bed.record.wait_for(|notes| notes.contains(&Note::Submitted(0)));
    let stop = bed.stop(0);
    bed.record.wait_for(|notes| notes.contains(&Note::Stop(0)));
    let (reply, answer) = channel();
    bed.post(Message::Reset { function: 1, reply });
    // The stop will never come true; its asker hears that instead of waiting for ever.
    assert!(stop.recv_timeout(PATIENCE).is_err());
    bed.record.wait_for(|notes| notes.iter().filter(|note| **note == Note::AskedLetGo).count() >= 3);
    assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
    bed.record.release();
    answer.recv_timeout(PATIENCE).unwrap();
    bed.record.wait_for(|notes| notes.contains(&Note::LaneDropped(0)));
    assert_eq!(bed.reactors.handles()[0].counters().lanes.get(), 0);
}

#[test]
fn memory_is_in_use_when_every_lane_has_taken_it() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |lane| lane.requests = 1);
    bed.start(1, |_| ());
    bed.record.wait_for(|notes| notes.contains(&Note::Submitted(0)));
    let (reply, answer) = channel();
    bed.post(Message::SetMemory { function: 1, memory: Arc::new(HostMemory::default()), reply });
    bed.record.wait_for(|notes| notes.iter().filter(|note| **note == Note::Memory(0)).count() >= 3);
    assert_eq!(answer.try_recv(), Err(TryRecvError::Empty), "a request uses the old table");
    bed.record.release();
    answer.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_queue_that_starts_anew_replaces_its_lane() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |_| ());
    bed.record.wait_for(|notes| notes.contains(&Note::Turn(0)));
    bed.start(0, |_| ());
    bed.record.wait_for(|notes| notes.contains(&Note::LaneDropped(0)));
    assert_eq!(bed.stop(0).recv_timeout(PATIENCE).unwrap().map(|stopped| stopped.parked), Some(false));
}

#[test]
fn a_channel_goes_before_the_lanes_whose_memory_it_may_hold() {
    for shutdown in [false, true] {
        let bed = Bed::new(PollConfig::Adaptive);
        bed.start(0, |_| ());
        bed.start(1, |_| ());
        bed.record.wait_for(|notes| notes.contains(&Note::Turn(1)));
        let Bed { record, reactors } = bed;
        if !shutdown {
            let (reply, answer) = channel();
            reactors.handles()[0].post(Message::CloseOutlet { function: 1, reply });
            answer.recv_timeout(PATIENCE).unwrap();
            assert!(record.with(|notes| notes.contains(&Note::LaneDropped(1))), "all is gone with the answer");
        }
        drop(reactors);
        record.with(|notes| {
            let at = |note| notes.iter().position(|other| *other == note).unwrap();
            assert!(at(Note::ChannelDropped) < at(Note::LaneDropped(0)));
            assert!(at(Note::ChannelDropped) < at(Note::LaneDropped(1)));
        });
    }
}

#[test]
fn an_idle_reactor_sleeps_until_a_doorbell_a_message_or_a_deadline() {
    let bed = Bed::new(PollConfig::Adaptive);
    let doorbell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let theirs = nix::unistd::dup(&doorbell).unwrap();
    bed.start(0, |lane| lane.doorbell = Some(theirs));
    let counters = Arc::clone(bed.reactors.handles()[0].counters());
    bed.record.wait_for(|notes| notes.contains(&Note::Armed(0)));
    let rung = |notes: &[Note]| notes.iter().filter(|note| **note == Note::Doorbell(0)).count();
    for times in 1..=100 {
        doorbell.write(1).unwrap();
        bed.record.wait_for(|notes| rung(notes) >= times);
    }
    // Each was taken off by a wake-up of its own; the last may not be counted yet.
    assert!(counters.sleeps.get() >= 99, "{} sleeps", counters.sleeps.get());
    for _ in 0..100 {
        assert_eq!(bed.stop(7).recv_timeout(PATIENCE).unwrap(), None);
    }
    // A lane with a deadline is turned again and again, though nothing wakes it.
    bed.start(1, |lane| lane.deadline = Some(Duration::from_millis(1)));
    let turns = |notes: &[Note]| notes.iter().filter(|note| **note == Note::Turn(1)).count();
    bed.record.wait_for(|notes| turns(notes) >= 20);
}

#[test]
fn a_nudge_makes_a_sleeper_turn() {
    let bed = Bed::new(PollConfig::Adaptive);
    bed.start(0, |_| ());
    let of = |notes: &[Note], kind: Note| notes.iter().filter(|note| **note == kind).count();
    for _ in 0..100 {
        // It may be about to sleep, or asleep: then the turn after the nudge is one that is made for it.
        let (turns, armed) = bed.record.with(|notes| (of(notes, Note::Turn(0)), of(notes, Note::Armed(0))));
        bed.reactors.handles()[0].nudge();
        bed.record.wait_for(|notes| of(notes, Note::Turn(0)) > turns && of(notes, Note::Armed(0)) > armed);
    }
}

#[test]
fn a_reactor_that_shall_poll_never_sleeps() {
    let bed = Bed::new(PollConfig::Always);
    bed.start(0, |_| ());
    bed.record.wait_for(|notes| notes.iter().filter(|note| **note == Note::Turn(0)).count() >= 10_000);
    let counters = bed.reactors.handles()[0].counters();
    assert_eq!(counters.sleeps.get(), 0);
    assert_eq!(bed.record.with(|notes| notes.iter().filter(|note| **note == Note::Armed(0)).count()), 0);
    assert_eq!(counters.lanes.get(), 1);
}

#[test]
fn a_mailbox_holds_so_many_and_no_more_in_order() {
    const CAPACITY: usize = 256;
    const ALL: usize = 3 * CAPACITY;
    let mailbox = Arc::new(Mailbox::new().unwrap());
    let posted = Arc::new(AtomicUsize::new(0));
    let (theirs, count) = (Arc::clone(&mailbox), Arc::clone(&posted));
    let poster = std::thread::spawn(move || {
        for queue in 0..ALL {
            let (reply, _) = channel();
            theirs.post(Message::Stop { key: key(queue as u16), hand_over: false, reply });
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    while posted.load(Ordering::SeqCst) < CAPACITY {
        std::thread::yield_now();
    }
    for taken in 0..ALL {
        // Nobody takes but this thread.
        assert!(posted.load(Ordering::SeqCst) <= CAPACITY + taken);
        let message = loop {
            if let Some(message) = mailbox.take() {
                break message;
            }
            std::thread::yield_now();
        };
        assert!(matches!(message, Message::Stop { key, .. } if usize::from(key.queue) == taken));
    }
    poster.join().unwrap();
    assert!(mailbox.is_empty());
}

#[test]
fn the_number_of_reactors_follows_the_cpus_that_may_be_used() {
    let cpus = available_cpus().unwrap();
    let too_many = ReactorCount::Exactly(u16::try_from(cpus.len()).unwrap() + 1);
    let config = |count| ReactorsConfig { count, poll: PollConfig::Adaptive };
    let error = Reactors::start(&config(too_many)).err().unwrap();
    assert!(matches!(error, ReactorError::TooMany { asked, available } if asked == available + 1), "{error}");
    let all = Reactors::start(&config(ReactorCount::Auto)).unwrap();
    assert_eq!(all.handles().len(), quota_cpus().map_or(cpus.len(), |quota| quota.min(cpus.len())));
    // With a mask of one CPU there is one reactor, and it is there.
    let last = *cpus.last().unwrap();
    let masked = std::thread::spawn(move || {
        cpus::pin(last);
        Reactors::start(&config(ReactorCount::Auto)).unwrap()
    });
    let masked = masked.join().unwrap();
    assert_eq!(masked.handles().iter().map(ReactorHandle::cpu).collect::<Vec<_>>(), [last]);
}

#[test]
fn queues_go_where_the_fewest_are() {
    let count = available_cpus().unwrap().len();
    let config = ReactorsConfig { count: ReactorCount::Exactly(count as u16), poll: PollConfig::Adaptive };
    let reactors = Reactors::start(&config).unwrap();
    // A volume that one channel must serve has all its queues in one place.
    let one = reactors.place(4, 1);
    assert_eq!(one, [one[0]; 4]);
    let spread = reactors.place(2 * count as u16, usize::MAX);
    for number in 0..count {
        assert_eq!(spread.iter().filter(|other| **other == number).count(), 2);
    }
    if count > 1 {
        assert_ne!(reactors.place(1, 1), [one[0]]);
    }
    reactors.release(&one);
    reactors.release(&spread);
    assert_eq!(reactors.place(1, 0).len(), 1, "no spread at all is still one place");
}
