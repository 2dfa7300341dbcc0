#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! Queues that stop: with their requests in the channel, held, before a limit, or still to be issued again. One that has stopped is
//! still; one that has handed over has left to the record what it did not do, and another lane on the same ring and record does it.
//! Towards the driver every request ends once.

use std::sync::atomic::Ordering;

use super::super::*;
use super::death::{BLOCK_BYTES, Mode, Random, World, modes};
use crate::device::limit::{Limit, Rates};
use crate::dma::DelayedEngine;
use crate::driver::block::Range as DriverRange;

/// Turns in which everything lands that is on its way.
const TURNS: u32 = 60;
/// Turns in which everything ends.
const TURNS_MAX: u32 = 5_000;

/// A ring, its driver, its disk, and a lane of one card after the other.
struct Ring {
    world: World,
    lane: BlkLane<DelayedEngine>,
    limit: Arc<Limit>,
    lives: u64,
}

impl Ring {
    fn new(mode: Mode, payload: PayloadPlace) -> Self {
        let mut world = World::new(mode);
        let limit = Arc::new(Limit::default());
        let shared = Arc::into_inner(world.shared).unwrap();
        let limits = vec![Arc::clone(&limit)];
        world.shared = Arc::new(BlkShared { payload, limits, write_zeroes: true, ..shared });
        let lane = world.lane(|card, memory| DelayedEngine::new(card, memory, mode.seed, 0));
        Self { world, lane, limit, lives: 1 }
    }

    /// Another card takes the ring over; the one before has nothing of it any more.
    fn take_over(&mut self) {
        self.world.position = self.lane.position();
        self.lane.abandon();
        assert!(!self.lane.queue.mirror.is_publishing() || self.lane.queue.ring_gone);
        let seed = self.world.mode.seed + 1000 * self.lives;
        self.lives += 1;
        self.lane = self.world.lane(|card, memory| DelayedEngine::new(card, memory, seed, 0));
        self.world.server.order.clear();
    }

    /// One request for each of the first rows, in this order: a write in even ones, a read in odd ones.
    fn request(&mut self, rows: impl IntoIterator<Item = u32>) {
        for row in rows {
            let data = self.world.guest.data_at(row);
            let write = row % 2 == 0;
            let number = if write { u64::from(row) + 100 } else { 0 };
            let added = if write {
                self.world.memory.put(data, number);
                self.world.guest.write(row, row.into(), BLOCK_BYTES)
            } else {
                self.world.memory.put(data, u64::MAX);
                self.world.guest.read(row, row.into(), BLOCK_BYTES)
            };
            assert!(added);
            self.world.rows[row as usize] = Some((number, write));
            self.world.made += 1;
        }
        self.world.guest.publish();
    }

    /// Turns in which the server says nothing.
    fn turns(&mut self, count: u32) {
        for _ in 0..count {
            self.world.now += 1000;
            let now = Moment(self.world.now);
            self.lane.turn(now, crate::mirror::FETCH_MAX, &mut self.world.server);
            self.lane.finish_turn(now);
        }
    }

    /// The server ends the request on this row's block.
    fn answer(&mut self, row: u32, result: Result<(), BlockFault>) {
        let offset = u64::from(row) * u64::from(BLOCK_BYTES);
        let at = self.world.server.pending.iter().position(|request| request.offset == offset).unwrap();
        let request = self.world.server.pending.remove(at);
        if result.is_ok() {
            self.world.server.carry_out(&request);
        }
        self.lane.complete(Moment(self.world.now), request.tag.row, result);
    }

    /// The rows on whose blocks requests came. (Writes whose payload is copied come behind reads that were fetched with them.)
    fn issued(&self) -> Vec<u64> {
        let mut rows: Vec<u64> = self.world.server.order.iter().map(|offset| offset / u64::from(BLOCK_BYTES)).collect();
        rows.sort_unstable();
        rows
    }

    fn is_stopped(&mut self) -> bool {
        self.lane.is_stopped(Moment(self.world.now))
    }

    /// All that the VM can see.
    fn seen(&self) -> (Vec<u8>, u32) {
        let mut bytes = vec![0; self.world.memory.len() as usize];
        self.world.memory.copy_out(self.world.memory.base(), &mut bytes);
        (bytes, self.world.interrupts.load(Ordering::Relaxed))
    }

    /// A lane that has stopped does nothing, however long it is turned, and lets its reactor sleep.
    fn assert_still(&mut self) {
        let (seen, submitted) = (self.seen(), self.world.server.order.len());
        for _ in 0..TURNS {
            self.world.now += 100_000_000;
            assert_eq!((self.lane.arm(), self.lane.deadline()), (Some(true), None));
            self.turns(1);
        }
        assert!(self.seen() == seen, "the VM's memory has changed");
        assert_eq!(self.world.server.order.len(), submitted, "storage got a request");
        assert!(self.is_stopped());
    }

    /// Lets everything end, and compares the disk.
    fn finish(&mut self) {
        for _ in 0..TURNS_MAX {
            self.world.guest();
            if self.world.is_done() {
                self.turns(TURNS);
                self.world.guest();
                return self.world.check();
            }
            self.world.turn(&mut self.lane);
        }
        panic!("{} of {} requests ended", self.world.ended, self.world.mode.requests);
    }

    fn limit_to(&self, iops: u64) {
        self.limit.set(&Rates { iops, burst: Duration::ZERO, ..Rates::default() });
    }

    /// Hands over what it has, of which the channel has nothing.
    fn hand_over(&mut self) {
        self.lane.hand_over(Moment(self.world.now));
        self.turns(TURNS);
        assert!(self.is_stopped());
    }
}

/// Every kind of ring, in order or not, with payload in place and copied; six requests each.
fn rings() -> impl Iterator<Item = Ring> {
    modes().filter(|(late, _)| *late).flat_map(|(_, mode)| {
        [(false, PayloadPlace::InPlace), (false, PayloadPlace::Card), (true, PayloadPlace::Card)]
            .map(|(in_order, payload)| Ring::new(Mode { size: 64, in_order, ..mode }, payload))
    })
}

const ALL: [u64; 6] = [0, 1, 2, 3, 4, 5];

#[test]
fn a_lane_that_has_stopped_is_still_until_it_goes_on() {
    for mut ring in rings().filter(|ring| ring.lane.payload == PayloadPlace::Card) {
        ring.request(0..6);
        ring.turns(TURNS);
        assert_eq!(ring.issued(), ALL);
        // One has ended, one is held, the rest is in the channel of a server that says nothing.
        ring.answer(0, Ok(()));
        ring.answer(1, Err(BlockFault::Away));
        ring.turns(TURNS);
        ring.lane.stop(Moment(ring.world.now));
        ring.turns(TURNS);
        assert!(!ring.is_stopped(), "within bounds it waits for the server");
        ring.world.now += 600_000_000;
        assert!(ring.is_stopped() && ring.lane.has_parked());
        ring.assert_still();
        // The server says something after all.
        let seen = ring.seen();
        ring.answer(2, Ok(()));
        ring.answer(3, Ok(()));
        ring.answer(4, Err(BlockFault::Away));
        assert!(ring.seen() == seen);
        ring.assert_still();
        ring.world.server.order.clear();
        let start = ring.world.start();
        ring.lane.resume(start);
        ring.turns(TURNS);
        ring.world.guest();
        let ended = if ring.world.mode.in_order { 1 } else { 3 };
        assert_eq!(ring.world.ended, ended, "what had ended in the meantime ends now, without being done again");
        // The two that met nobody go out again, in their order; the sixth is still where it was.
        ring.world.now += 20_000_000;
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [1, 4]);
        ring.finish();
    }
}

#[test]
fn a_lane_that_was_still_ends_a_request_of_two_parts_once() {
    for mut ring in rings().filter(|ring| ring.lane.payload == PayloadPlace::Card) {
        ring.world.mode.requests = 1;
        let range = |row: u64| DriverRange { sector: row, sectors: 1, flags: 0 };
        assert!(ring.world.guest.ranges(0, true, &[range(6), range(7)]));
        (ring.world.rows[0], ring.world.made) = (Some((0, true)), 1);
        ring.world.guest.publish();
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [6, 7]);
        ring.lane.stop(Moment(ring.world.now));
        ring.world.now += 600_000_000;
        ring.turns(TURNS);
        assert!(ring.is_stopped());
        ring.answer(7, Err(BlockFault::Away));
        ring.assert_still();
        let start = ring.world.start();
        ring.lane.resume(start);
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [6, 7], "one part is still in the channel");
        ring.answer(6, Ok(()));
        ring.world.now += 20_000_000;
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [6, 6, 7, 7]);
        ring.finish();
    }
}

#[test]
fn a_lane_that_was_still_and_is_forgotten_lets_go_when_the_channel_has() {
    for mut ring in rings().filter(|ring| ring.lane.payload == PayloadPlace::Card) {
        ring.request(0..3);
        ring.turns(TURNS);
        ring.lane.stop(Moment(ring.world.now));
        ring.world.now += 600_000_000;
        ring.turns(TURNS);
        assert!(ring.is_stopped());
        ring.answer(0, Ok(()));
        ring.lane.abandon();
        assert!(!ring.lane.is_drained() && ring.lane.is_let_go());
        ring.answer(1, Ok(()));
        ring.answer(2, Err(BlockFault::Away));
        assert!(ring.lane.is_drained());
        assert_eq!(ring.lane.rows.in_use(), 0);
    }
}

#[test]
fn what_waits_for_a_limit_is_handed_over() {
    for mut ring in rings() {
        ring.limit_to(1);
        ring.request(0..6);
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [0]);
        ring.answer(0, Ok(()));
        ring.hand_over();
        if !ring.world.mode.packed {
            assert_eq!(ring.lane.position().next_avail, 6, "behind all that the record has");
        }
        ring.assert_still();
        assert_eq!(ring.issued(), [0], "a queue that hands over exceeds no limit");
        ring.take_over();
        ring.limit_to(0);
        ring.turns(TURNS);
        assert_eq!(ring.issued(), ALL[1..], "what ended is not issued again, all else is");
        ring.finish();
    }
}

#[test]
fn a_queue_that_stops_without_handing_over_passes_its_limit() {
    for mut ring in rings() {
        ring.limit_to(1);
        ring.request(0..6);
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [0]);
        ring.lane.stop(Moment(ring.world.now));
        ring.turns(TURNS);
        assert_eq!(ring.issued(), ALL);
        assert!(!ring.is_stopped());
        for row in 0..6 {
            ring.answer(row, Ok(()));
        }
        ring.turns(TURNS);
        assert!(ring.is_stopped() && !ring.lane.has_parked());
        ring.finish();
    }
}

#[test]
fn what_waits_for_a_server_is_handed_over() {
    for mut ring in rings() {
        ring.request(0..6);
        ring.turns(TURNS);
        for row in [0, 1, 2, 4, 5] {
            ring.answer(row, Err(BlockFault::Away));
        }
        ring.lane.hand_over(Moment(ring.world.now));
        ring.world.now += 100_000_000;
        ring.turns(TURNS);
        assert!(!ring.is_stopped(), "one is in the channel");
        ring.answer(3, Err(BlockFault::Away));
        ring.turns(TURNS);
        assert!(ring.is_stopped());
        ring.assert_still();
        assert_eq!(ring.issued(), ALL, "nothing was tried again");
        ring.take_over();
        ring.turns(TURNS);
        assert_eq!(ring.issued(), ALL);
        ring.finish();
    }
}

#[test]
fn what_the_channel_has_ends_before_the_queue_has_handed_over() {
    for mut ring in rings() {
        ring.request(0..6);
        ring.turns(TURNS);
        ring.lane.hand_over(Moment(ring.world.now));
        for row in 0..6 {
            ring.turns(TURNS);
            assert!(!ring.is_stopped(), "row {row} is in the channel");
            ring.answer(row, Ok(()));
        }
        // What comes now is the next owner's.
        ring.world.mode.requests = 8;
        ring.request([6, 7]);
        ring.turns(TURNS);
        assert!(ring.is_stopped());
        ring.world.guest();
        assert_eq!(ring.world.ended, 6, "the driver sees what ended");
        ring.take_over();
        ring.turns(TURNS);
        assert_eq!(ring.issued(), [6, 7]);
        ring.finish();
    }
}

#[test]
fn what_was_to_be_issued_again_is_handed_on() {
    for mut ring in rings() {
        ring.request(0..6);
        ring.turns(TURNS);
        // It dies, and what it had given to storage with it.
        ring.world.server.pending.clear();
        ring.take_over();
        // The next one has not even looked at the record.
        ring.hand_over();
        assert!(ring.issued().is_empty());
        if !ring.world.mode.packed {
            assert_eq!(ring.lane.position().next_avail, 6, "the record says so");
        }
        ring.assert_still();
        ring.take_over();
        // The one after that issues some and meets a full limit.
        ring.limit_to(1);
        for _ in 0..TURNS_MAX {
            ring.turns(1);
            if !ring.issued().is_empty() {
                break;
            }
        }
        assert_eq!(ring.issued(), [0]);
        ring.answer(0, Ok(()));
        ring.hand_over();
        ring.take_over();
        ring.limit_to(0);
        ring.turns(TURNS);
        assert_eq!(ring.issued(), ALL[1..]);
        ring.finish();
    }
}

#[test]
fn a_server_that_says_nothing_is_waited_for_within_bounds_and_not_heard_afterwards() {
    for mut ring in rings() {
        ring.request(0..6);
        ring.turns(TURNS);
        ring.answer(0, Ok(()));
        ring.lane.hand_over(Moment(ring.world.now));
        ring.turns(TURNS);
        assert!(!ring.is_stopped());
        ring.world.now += 600_000_000;
        if ring.lane.payload == PayloadPlace::InPlace {
            ring.turns(TURNS);
            assert!(!ring.is_stopped(), "storage may still write to the VM's memory");
            continue;
        }
        assert!(ring.is_stopped());
        ring.assert_still();
        ring.world.position = ring.lane.position();
        ring.lane.abandon();
        let seen = ring.seen();
        for row in 1..6 {
            ring.answer(row, Ok(()));
        }
        ring.turns(TURNS);
        assert!(ring.seen() == seen);
        assert!(ring.lane.is_drained());
        ring.take_over();
        ring.turns(TURNS);
        assert_eq!(ring.issued(), ALL[1..], "nobody was told that they have ended");
        ring.finish();
    }
}

/// A ring goes from card to card while its driver goes on, at any moment, with limits that come and go.
#[test]
fn a_ring_that_is_handed_from_card_to_card_loses_nothing_and_ends_nothing_twice() {
    let rounds = if std::env::var_os("DRAY_TEST_LONG").is_some() { 200 } else { 4 };
    let mut handed = 0;
    for round in 0..rounds {
        for mut ring in rings() {
            let seed = round * 1009 + ring.world.mode.seed;
            let mut random = Random(seed << 4 | 1);
            (ring.world.mode.requests, ring.world.random) = (400, Random(seed << 8 | 1));
            for _ in 0..TURNS_MAX {
                ring.world.guest();
                if ring.world.is_done() {
                    break;
                }
                match random.below(30) {
                    0 => ring.limit_to(300_000),
                    1 => ring.limit_to(0),
                    2 => {
                        ring.lane.hand_over(Moment(ring.world.now));
                        for turn in 0.. {
                            assert!(turn < TURNS_MAX, "the queue does not stop");
                            if ring.is_stopped() {
                                break;
                            }
                            ring.world.turn(&mut ring.lane);
                        }
                        assert_eq!(ring.world.server.pending.len(), 0, "the channel was waited for");
                        ring.take_over();
                        handed += 1;
                    }
                    _ => ring.world.turn(&mut ring.lane),
                }
            }
            ring.limit_to(0);
            ring.finish();
        }
    }
    assert!(handed > rounds * 24 * 5, "{handed} times");
}
