//! Servers that go away, and what must outlive them.

use proptest::prelude::*;

use super::fake::{Act, Fake, Manner};
use super::{Lane, NbdBackend, NbdSettings, count, lane, pattern, settings, wire};
use crate::backend::{BlockBackend, BlockFault, BlockOperation};

#[test]
fn acknowledged_writes_outlive_a_power_loss() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    let (old, new) = (pattern(1, 8192), pattern(2, 4096));
    lane.write(0, &old).unwrap();
    lane.write(4096, &new).unwrap();
    lane.run(BlockOperation::WriteZeroes { unmap: true }, 0, 512).unwrap();
    assert_eq!(count(&fake, wire::COMMAND_FLUSH), 0);
    fake.lose_power();
    assert_eq!(fake.durable()[..8192], [0; 8192]);
    let found = lane.read(0, 8192).unwrap();
    assert_eq!(found[..512], [0; 512]);
    assert_eq!(found[512..4096], old[512..4096]);
    assert_eq!(found[4096..], new);
}

#[test]
fn what_a_flush_covered_is_not_written_again() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 4096)).unwrap();
    lane.run(BlockOperation::Flush, 0, 0).unwrap();
    lane.write(8192, &pattern(2, 512)).unwrap();
    let before = count(&fake, wire::COMMAND_WRITE);
    fake.lose_power();
    assert_eq!(lane.read(8192, 512).unwrap(), pattern(2, 512));
    assert_eq!(count(&fake, wire::COMMAND_WRITE), before + 1);
}

#[test]
fn while_away_requests_are_handed_back_and_the_first_come_back_as_away() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.holds = false;
    fake.script(|_| Act::PowerLossBefore);
    assert_eq!(lane.read(0, 512), Err(BlockFault::Away));
    assert_eq!(lane.channel.in_flight(), 0);
    fake.script(|_| Act::Serve);
    assert_eq!(lane.read(0, 512), Ok(vec![0; 512]));
}

#[test]
fn a_flush_that_fails_has_everything_written_again() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 4096)).unwrap();
    let mut failed = false;
    fake.script(move |seen| {
        if seen.command == wire::COMMAND_FLUSH && !std::mem::replace(&mut failed, true) {
            return Act::Error(wire::ERROR_EIO);
        }
        Act::Serve
    });
    lane.run(BlockOperation::Flush, 0, 0).unwrap();
    assert_eq!(count(&fake, wire::COMMAND_WRITE), 2);
    assert_eq!(fake.durable()[..4096], pattern(1, 4096));
}

#[test]
fn the_log_makes_room_by_a_flush_and_large_writes_go_around_it() {
    let fake = Fake::new(Manner::default());
    let backend = NbdBackend::open(NbdSettings { replay_bytes: 65_536, ..settings(&fake) }).unwrap();
    let mut lane = Lane::new(backend.open_channel().unwrap(), 32, 65_536);
    for round in 0..8 {
        for slot in 0..32 {
            lane.put(slot, &pattern(slot as u64 + round, 8192));
            lane.start(slot, BlockOperation::Write, slot as u64 * 8192, 8192);
        }
        lane.finish();
    }
    let flushes = count(&fake, wire::COMMAND_FLUSH);
    assert!(flushes >= 256 * 8192 / 65_536 - 2, "{flushes} flushes");
    // Written before and still in the log; what is larger must not be overwritten by it.
    lane.write(0, &[1; 512]).unwrap();
    lane.write(0, &pattern(9, 65_536)).unwrap();
    assert_eq!(fake.durable()[..65_536], pattern(9, 65_536));
    fake.lose_power();
    assert_eq!(lane.read(0, 65_536).unwrap(), pattern(9, 65_536));
    assert_eq!(lane.read(31 * 8192, 8192).unwrap(), pattern(31 + 7, 8192));
}

#[test]
fn the_next_channel_writes_again_what_the_last_one_left() {
    let fake = Fake::new(Manner::default());
    let (backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 4096)).unwrap();
    drop(lane);
    fake.lose_power();
    let mut lane = Lane::new(backend.open_channel().unwrap(), 1, 4096);
    assert_eq!(lane.read(0, 4096).unwrap(), pattern(1, 4096));
}

#[test]
fn a_server_that_comes_back_with_less_is_kept_out() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 4096)).unwrap();
    for spoil in [
        |manner: &mut Manner| manner.size -= 512,
        |manner: &mut Manner| manner.flags |= wire::FLAG_READ_ONLY,
        |manner: &mut Manner| manner.flags &= !wire::FLAG_SEND_FLUSH,
        |manner: &mut Manner| manner.block_sizes = Some([4096, 4096, 65_536]),
    ] {
        fake.change(spoil);
        fake.lose_power();
        let (before, seen) = (fake.connections(), fake.seen().len());
        lane.start(1, BlockOperation::Read, 0, 4096);
        while fake.connections() < before + 2 {
            lane.turn();
            std::thread::yield_now();
        }
        assert_eq!(fake.seen().len(), seen, "it was used");
        fake.change(|manner| *manner = Manner::default());
        lane.finish();
        assert_eq!(lane.get(1, 4096), pattern(1, 4096));
    }
}

/// A step of a guest's life.
#[derive(Clone, Debug)]
enum Step {
    Write(u8, u8),
    Zeroes(u8),
    Flush,
    PowerLoss,
    /// The power fails at the so many'th command from now, before or after it is done.
    PowerLossAt(u8, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u8..32, 1u8..8).prop_map(|(at, sectors)| Step::Write(at, sectors)),
        2 => (0u8..32).prop_map(Step::Zeroes),
        1 => Just(Step::Flush),
        1 => Just(Step::PowerLoss),
        1 => (0u8..4, any::<bool>()).prop_map(|(at, after)| Step::PowerLossAt(at, after)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn nothing_acknowledged_is_ever_lost(steps in proptest::collection::vec(step(), 1..40)) {
        let fake = Fake::new(Manner { size: 32_768, ..Manner::default() });
        let backend = NbdBackend::open(NbdSettings { connections: 2, replay_bytes: 65_536, ..settings(&fake) }).unwrap();
        let mut lane = Lane::new(backend.open_channel().unwrap(), 1, 32_768);
        let mut model = vec![0u8; 32_768];
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Write(at, sectors) => {
                    let data = pattern(number as u64, usize::from(sectors) * 512);
                    lane.write(u64::from(at) * 512, &data).unwrap();
                    model[usize::from(at) * 512..][..data.len()].copy_from_slice(&data);
                }
                Step::Zeroes(at) => {
                    lane.run(BlockOperation::WriteZeroes { unmap: true }, u64::from(at) * 512, 1024).unwrap();
                    model[usize::from(at) * 512..][..1024].fill(0);
                }
                Step::Flush => {
                    lane.run(BlockOperation::Flush, 0, 0).unwrap();
                    prop_assert_eq!(&fake.durable(), &model);
                }
                Step::PowerLoss => fake.lose_power(),
                Step::PowerLossAt(at, after) => {
                    let mut left = at;
                    let mut lost = false;
                    fake.script(move |_| {
                        if left == 0 && !lost {
                            lost = true;
                            return if after { Act::PowerLossAfter } else { Act::PowerLossBefore };
                        }
                        left = left.saturating_sub(1);
                        Act::Serve
                    });
                }
            }
        }
        prop_assert_eq!(lane.read(0, 32_768).unwrap(), model);
    }
}
