//! Channels whose queues hand over: what they wrote is durable, or at least not written again.

use std::time::Instant;

use super::fake::{Act, Fake, Manner};
use super::lane::BOUND;
use super::{count, lane, pattern, wire};
use crate::backend::{BlockFault, BlockOperation};
use crate::clock::Moment;

/// Turns the lane until that is so.
fn turn_until(lane: &mut super::Lane, mut done: impl FnMut(&mut super::Lane) -> bool) {
    let start = Instant::now();
    while !done(lane) {
        lane.turn();
        std::thread::yield_now();
        assert!(start.elapsed() < BOUND, "what must come did not");
    }
}

#[test]
fn what_was_written_is_made_durable_and_never_written_again() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    assert!(lane.channel.hand_over(), "nothing was written");
    lane.channel.take_back(true);
    lane.write(0, &pattern(1, 4096)).unwrap();
    assert!(!lane.channel.hand_over());
    turn_until(&mut lane, |lane| lane.channel.hand_over());
    assert_eq!(fake.durable()[..4096], pattern(1, 4096));
    assert_eq!(count(&fake, wire::COMMAND_FLUSH), 1);
    fake.lose_power();
    lane.channel.take_back(true);
    assert_eq!(lane.read(0, 4096).unwrap(), pattern(1, 4096));
    assert_eq!(count(&fake, wire::COMMAND_WRITE), 1);
}

#[test]
fn a_server_that_was_away_gets_what_it_lost_only_if_the_queues_come_back_first_and_unchanged() {
    for (comes_back, unchanged) in [(false, false), (true, false), (true, true)] {
        let fake = Fake::new(Manner::default());
        let (_backend, mut lane) = lane(&fake);
        lane.write(0, &pattern(1, 4096)).unwrap();
        fake.change(|manner| manner.size -= 512);
        fake.lose_power();
        let before = fake.connections();
        turn_until(&mut lane, |_| fake.connections() > before);
        assert!(lane.channel.hand_over(), "there is nobody to wait for");
        if comes_back {
            lane.channel.take_back(unchanged);
        }
        fake.change(|manner| *manner = Manner::default());
        let expected = if unchanged { pattern(1, 4096) } else { vec![0; 4096] };
        assert_eq!(lane.read(0, 4096).unwrap(), expected);
        assert_eq!(count(&fake, wire::COMMAND_WRITE), 1 + usize::from(unchanged));
    }
}

#[test]
fn a_server_that_says_nothing_is_cut_off() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 512)).unwrap();
    fake.script(|_| Act::Raw(Vec::new()));
    lane.holds = false;
    lane.put(1, &pattern(2, 512));
    lane.start(1, BlockOperation::Write, 4096, 512);
    turn_until(&mut lane, |_| count(&fake, wire::COMMAND_WRITE) == 2);
    assert!(!lane.channel.hand_over());
    turn_until(&mut lane, |_| count(&fake, wire::COMMAND_FLUSH) == 1);
    assert!(!lane.channel.hand_over(), "the flush is not answered");
    lane.cut_off(Moment::now());
    assert_eq!((lane.result(1), lane.channel.in_flight()), (Some(Err(BlockFault::Away)), 0));
    assert!(lane.channel.hand_over());
    // It is there again, and gets nothing of what was.
    fake.script(|_| Act::Serve);
    lane.holds = true;
    let writes = count(&fake, wire::COMMAND_WRITE);
    lane.read(0, 512).unwrap();
    assert_eq!(count(&fake, wire::COMMAND_WRITE), writes);
}
