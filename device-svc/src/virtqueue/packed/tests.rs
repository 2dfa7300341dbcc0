#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

fn ring(size: u16, place: Place) -> PackedRing {
    let at = QueueAddresses { descriptors: Iova(0), driver: Iova(0x1000), device: Iova(0x2000) };
    PackedRing::new(size, at, place, place)
}

#[test]
fn flags_mean_available_only_on_their_own_lap() {
    let first = Place { slot: 0, wrap: true };
    let second = Place { slot: 0, wrap: false };
    assert!(!PackedRing::is_available(0, first), "a fresh ring of zeroes");
    assert!(PackedRing::is_available(AVAIL, first));
    assert!(!PackedRing::is_available(AVAIL | USED, first), "used on this lap");
    assert!(!PackedRing::is_available(AVAIL | USED, second), "used on the lap before");
    assert!(PackedRing::is_available(USED, second));
}

#[test]
fn slots_are_taken_again_only_when_their_use_was_published() {
    let mut ring = ring(32768, Place { slot: 0, wrap: true });
    for _ in 0..128 {
        ring.has_room(256).unwrap();
        ring.take(256);
    }
    assert_eq!(ring.has_room(1), Err(RingFault::AvailableTwice { size: 32768 }));
    ring.stage_used(256);
    assert_eq!(
        ring.has_room(1),
        Err(RingFault::AvailableTwice { size: 32768 }),
        "staged is not yet seen by the driver"
    );
    assert_eq!(ring.publish(), 256);
    ring.has_room(256).unwrap();
    ring.take(256);
    assert_eq!(ring.has_room(1), Err(RingFault::AvailableTwice { size: 32768 }));
}

proptest! {
    #[test]
    fn places_go_round(size in 1u16..=32768, steps in proptest::collection::vec(0u16..500, 0..200)) {
        let mut place = Place { slot: 0, wrap: true };
        let mut total = 0u64;
        for step in steps {
            let step = step.min(size);
            place = place.advance(step, size);
            total += u64::from(step);
        }
        prop_assert_eq!(u64::from(place.slot), total % u64::from(size));
        prop_assert_eq!(place.wrap, (total / u64::from(size)).is_multiple_of(2));
    }

    #[test]
    fn an_event_is_passed_exactly_when_its_slot_was_published(
        size in 1u16..300, start in 0u32..1000, count in 0u16..300, event in 0u32..600,
    ) {
        let count = count.min(size);
        let at = |n: u32| Place { slot: (n % u32::from(size)) as u16, wrap: (n / u32::from(size)).is_multiple_of(2) };
        let mut ring = ring(size, at(start));
        for _ in 0..count {
            ring.take(1);
            ring.stage_used(1);
        }
        let published = ring.publish();
        let wanted = at(event);
        let lies = (start..start + u32::from(count)).any(|n| at(n) == wanted);
        prop_assert_eq!(ring.passes_event(wanted.encode(), published), lies);
    }
}
