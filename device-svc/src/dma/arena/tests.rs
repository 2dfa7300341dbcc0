#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

#[test]
fn every_number_has_a_place_of_its_own_and_keeps_it() {
    let arena: Arena<AtomicU32> = Arena::default();
    assert!(arena.get(0).is_none());
    for number in 0..10_000 {
        let element = arena.make(number).unwrap();
        assert_eq!(element.load(Ordering::Relaxed), 0);
        element.store(number + 1, Ordering::Relaxed);
    }
    for number in 0..10_000 {
        assert_eq!(arena.get(number).unwrap().load(Ordering::Relaxed), number + 1);
    }
}

#[test]
fn the_last_number_is_the_last() {
    let arena: Arena<AtomicU32> = Arena::default();
    assert!(arena.make(ELEMENTS_MAX - 1).is_some());
    for number in [ELEMENTS_MAX, u32::MAX] {
        assert!(arena.make(number).is_none() && arena.get(number).is_none());
    }
    assert!(arena.get(0).is_none(), "only the last chunk was made");
}
