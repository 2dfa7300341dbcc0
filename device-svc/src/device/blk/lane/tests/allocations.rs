//! No request costs an allocation, once every buffer has had its first use.

use super::*;
use crate::allocations::allocations_of;

#[test]
fn requests_are_carried_without_an_allocation() {
    for (ring, copy_payload, indirect) in [(0, false, false), (0, true, true), (features::RING_PACKED, false, true)] {
        let settings = BlkSettings { copy_payload, ..settings() };
        let wanted = ring | features::EVENT_INDEX | features::INDIRECT;
        let Bed { mut guest, mut lane, mut channel, memory: _memory, .. } = Bed::new(settings, wanted, 64, indirect);
        let mut completions = Vec::with_capacity(64);
        let (mut now, mut ended_count, mut allocated) = (1, 0, 0);
        for row in 0..8 {
            assert!(guest.read(row, 0, 4096));
        }
        guest.publish();
        for turn in 0..2000 {
            now += 1000;
            let work = || {
                let now = Moment(now);
                lane.turn(now, crate::mirror::FETCH_MAX, channel.as_mut());
                channel.poll(now, &mut completions);
                for completion in completions.drain(..) {
                    lane.complete(now, completion.tag.row, completion.result);
                }
                lane.finish_turn(now);
            };
            let count = allocations_of(work).1;
            if turn >= 1000 {
                allocated += count;
            }
            while let Some(ended) = guest.take_ended() {
                assert_eq!(ended.status, 0);
                ended_count += 1;
                assert!(if ended_count % 2 == 0 {
                    guest.read(ended.row, 8, 4096)
                } else {
                    guest.write(ended.row, 8, 4096)
                });
            }
            guest.publish();
        }
        assert!(ended_count > 2000 && allocated == 0, "{ended_count} requests, {allocated} allocations");
    }
}
