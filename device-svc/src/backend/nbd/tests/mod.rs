#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake;
mod garbage;
mod hand_over;
mod lane;
mod loss;
mod tls;

use self::fake::{ALL_FLAGS, Act, Fake, Manner};
use self::lane::Lane;
use super::{NbdBackend, NbdSettings, wire};
use crate::backend::{BackendError, BlockBackend, BlockFault, BlockOperation};

fn settings(fake: &Fake) -> NbdSettings {
    NbdSettings::new(fake.uri().parse().unwrap())
}

fn lane(fake: &Fake) -> (NbdBackend, Lane) {
    let backend = NbdBackend::open(settings(fake)).unwrap();
    let lane = Lane::new(backend.open_channel().unwrap(), 16, 1 << 18);
    (backend, lane)
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) >> 5) as u8 | 1).collect()
}

fn count(fake: &Fake, command: u16) -> usize {
    fake.seen().iter().filter(|seen| seen.command == command).count()
}

#[test]
fn every_way_to_shake_hands_leads_to_a_disk() {
    for fixed in [true, false] {
        for go in [true, false] {
            for structured in [true, false] {
                let fake = Fake::new(Manner { fixed, go, structured, ..Manner::default() });
                let (backend, mut lane) = lane(&fake);
                let info = backend.info();
                assert_eq!((info.size_bytes, info.block_bytes, info.channels_max), (1 << 20, 512, 1));
                assert!(info.volatile_cache && info.discard && info.write_zeroes && !info.read_only);
                let data = pattern(1, 70_144);
                lane.write(512, &data).unwrap();
                assert_eq!(lane.read(512, data.len()).unwrap(), data);
                lane.run(BlockOperation::WriteZeroes { unmap: false }, 1024, 512).unwrap();
                lane.run(BlockOperation::Discard, 8192, 4096).unwrap();
                lane.run(BlockOperation::Flush, 0, 0).unwrap();
                assert_eq!(lane.read(1024, 512).unwrap(), [0; 512]);
                assert_eq!(fake.durable()[512..1024], data[..512]);
                let zeroes =
                    fake.seen().iter().find(|seen| seen.command == wire::COMMAND_WRITE_ZEROES).copied().unwrap();
                assert_eq!(zeroes.flags, wire::COMMAND_FLAG_NO_HOLE);
            }
        }
    }
}

#[test]
fn chunks_may_come_in_any_order_with_holes() {
    let fake = Fake::new(Manner::default());
    fake.script(|_| Act::Scatter);
    let (_backend, mut lane) = lane(&fake);
    let mut data = pattern(3, 200_704);
    data[4096..20_480].fill(0);
    lane.write(4096, &data).unwrap();
    assert_eq!(lane.read(4096, data.len()).unwrap(), data);
}

#[test]
fn requests_are_cut_to_the_servers_limits() {
    let fake = Fake::new(Manner { block_sizes: Some([1024, 4096, 8192]), ..Manner::default() });
    let (backend, mut lane) = lane(&fake);
    assert_eq!(backend.info().block_bytes, 1024);
    let data = pattern(4, 65_536);
    lane.write(8192, &data).unwrap();
    assert_eq!(lane.read(8192, data.len()).unwrap(), data);
    assert_eq!(count(&fake, wire::COMMAND_WRITE), 8);
    assert!(fake.seen().iter().all(|seen| seen.length <= 8192));
}

#[test]
fn many_requests_spread_over_connections_that_are_coherent() {
    for (flags, expected) in [(ALL_FLAGS, 4), (ALL_FLAGS & !wire::FLAG_CAN_MULTI_CONN, 1)] {
        let fake = Fake::new(Manner { flags, ..Manner::default() });
        let backend = NbdBackend::open(NbdSettings { connections: 4, ..settings(&fake) }).unwrap();
        let mut lane = Lane::new(backend.open_channel().unwrap(), 64, 4096);
        assert_eq!(fake.connections(), expected);
        for slot in 0..64 {
            lane.put(slot, &pattern(slot as u64, 4096));
            lane.start(slot, BlockOperation::Write, slot as u64 * 4096, 4096);
        }
        lane.finish();
        for slot in 0..64 {
            lane.start(slot, BlockOperation::Read, (63 - slot as u64) * 4096, 4096);
        }
        lane.finish();
        for slot in 0..64 {
            assert_eq!(lane.result(slot), Some(Ok(())));
            assert_eq!(lane.get(slot, 4096), pattern(63 - slot as u64, 4096));
        }
    }
}

#[test]
fn errors_become_what_the_lane_does_about_them() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.holds = false;
    for structured in [true, false] {
        fake.change(|manner| manner.structured = structured);
        for (error, expected) in [
            (5, BlockFault::Away),
            (12, BlockFault::Away),
            (108, BlockFault::Away),
            (1, BlockFault::Io),
            (22, BlockFault::Io),
            (28, BlockFault::Io),
            (75, BlockFault::Io),
            (12_345, BlockFault::Io),
            (95, BlockFault::Unsupported),
        ] {
            fake.script(move |_| Act::Error(error));
            assert_eq!(lane.read(0, 512), Err(expected));
            assert_eq!(lane.write(0, &[1; 512]), Err(expected));
        }
        assert_eq!(fake.connections(), 1);
    }
}

#[test]
fn a_server_without_flush_is_told_to_write_through() {
    let fake = Fake::new(Manner { flags: 1 | wire::FLAG_SEND_FUA, ..Manner::default() });
    let (backend, mut lane) = lane(&fake);
    assert!(!backend.info().volatile_cache && !backend.info().discard);
    lane.write(0, &[7; 512]).unwrap();
    lane.run(BlockOperation::Flush, 0, 0).unwrap();
    assert_eq!(count(&fake, wire::COMMAND_FLUSH), 0);
    assert_eq!(fake.durable()[..512], [7; 512]);
}

#[test]
fn what_cannot_be_served_is_refused_with_the_reason() {
    let refused = |manner: Manner, export: &str, reason: &str| {
        let fake = Fake::new(manner);
        let uri = fake.uri().replace("/disk?", &format!("/{export}?"));
        match NbdBackend::open(NbdSettings::new(uri.parse().unwrap())) {
            Err(BackendError::Refused(text)) => assert!(text.contains(reason), "{text}"),
            other => panic!("{other:?}"),
        }
    };
    refused(Manner::default(), "other", "no export `other`: no such disk");
    refused(Manner { go: false, ..Manner::default() }, "other", "hung up");
    refused(Manner { block_sizes: Some([8192, 8192, 65_536]), ..Manner::default() }, "disk", "8192");
    refused(Manner { block_sizes: Some([3, 4096, 65_536]), ..Manner::default() }, "disk", "power of two");
    refused(Manner { block_sizes: Some([512, 4096, 512]), ..Manner::default() }, "disk", "maximum");
    let gone = NbdBackend::open(NbdSettings::new("nbd+unix:///x?socket=/nowhere/at/all".parse().unwrap()));
    assert!(matches!(gone, Err(BackendError::Unavailable(_))), "{gone:?}");
}

#[test]
fn one_channel_at_a_time_and_a_size_that_can_be_asked_for() {
    let fake = Fake::new(Manner::default());
    let (backend, mut lane) = lane(&fake);
    assert!(matches!(backend.open_channel(), Err(BackendError::Refused(_))));
    fake.change(|manner| manner.size = (1 << 21) + 100);
    assert_eq!(backend.resize(0).unwrap(), 1 << 21);
    assert_eq!(backend.info().size_bytes, 1 << 21);
    lane.write(0, &[1; 512]).unwrap();
    drop(lane);
    drop(backend.open_channel().unwrap());
}
