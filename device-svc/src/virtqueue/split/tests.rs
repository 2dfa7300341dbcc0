#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use proptest::prelude::*;

use super::*;

fn ring(size: u16, next_avail: u16) -> SplitRing {
    let at = QueueAddresses { descriptors: Iova(0x1000), driver: Iova(0x2000), device: Iova(0x3000) };
    SplitRing::new(size, at, next_avail, next_avail)
}

#[test]
fn an_index_may_not_jump() {
    let mut ring = ring(8, 65534);
    assert_eq!(ring.see_avail(6), Ok(8));
    assert_eq!(ring.see_avail(7), Err(RingFault::IndexJump { from: 65534, to: 7, size: 8 }));
    assert_eq!(ring.see_avail(65533), Err(RingFault::IndexJump { from: 65534, to: 65533, size: 8 }));
}

#[test]
fn places_follow_the_specification() {
    let ring = ring(4, 0);
    assert_eq!(ring.avail_index_at(), Iova(0x2002));
    assert_eq!(ring.avail_entry_at(3), Iova(0x200a));
    assert_eq!(ring.used_event_at(), Iova(0x200c));
    assert_eq!(ring.used_index_at(), Iova(0x3002));
    assert_eq!(ring.used_element_at(1), Iova(0x300c));
    assert_eq!(ring.avail_event_at(), Iova(0x3024));
    assert_eq!((avail_bytes(4), used_bytes(4), table_bytes(4)), (14, 38, 64));
}

proptest! {
    #[test]
    fn runs_cover_the_slots_in_order(from: u16, shift in 0u32..=15, part in 0u32..=1000) {
        let size = 1u16 << shift;
        let count = (u32::from(size) * part / 1000) as u16;
        let [first, second] = runs(from, count, size);
        let slots: Vec<u16> = (first.slot..first.slot + first.count).chain(second.slot..second.slot + second.count).collect();
        let expected: Vec<u16> = (0..count).map(|i| (from.wrapping_add(i)) % size).collect();
        prop_assert_eq!(slots, expected);
    }

    #[test]
    fn an_event_is_passed_exactly_when_it_lies_in_the_published_range(event: u16, old: u16, count in 0u16..1000) {
        let new = old.wrapping_add(count);
        let lies = (0..count).any(|i| old.wrapping_add(i) == event);
        prop_assert_eq!(passes_event(event, old, new), lies);
    }
}
