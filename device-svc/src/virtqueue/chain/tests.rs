#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use super::*;

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, length, flags, next }
}

#[test]
fn collects_readable_then_writable() {
    let mut walk = ChainWalk::new(false);
    walk.begin();
    assert_eq!(walk.step(descriptor(0x1000, 16, DESCRIPTOR_NEXT, 1)), Ok(Step::Next(1)));
    assert_eq!(walk.step(descriptor(0x2000, 4096, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, 2)), Ok(Step::Next(2)));
    assert_eq!(walk.step(descriptor(0x3000, 1, DESCRIPTOR_WRITE, 9)), Ok(Step::End));
    let chain = walk.chain(0, 1);
    assert_eq!((chain.readable, chain.readable_bytes, chain.writable_bytes), (1, 16, 4097));
    assert_eq!(chain.segments.len(), 3);
}

#[test]
fn refuses_what_the_specification_forbids() {
    let mut walk = ChainWalk::new(true);
    walk.begin();
    walk.step(descriptor(0, 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1)).unwrap();
    assert_eq!(walk.step(descriptor(0, 1, 0, 0)), Err(RingFault::ReadableAfterWritable));

    walk.begin();
    assert_eq!(walk.step(descriptor(0, 17, DESCRIPTOR_INDIRECT, 0)), Err(RingFault::IndirectSize { length: 17 }));
    assert_eq!(walk.step(descriptor(0, 0, DESCRIPTOR_INDIRECT, 0)), Err(RingFault::IndirectSize { length: 0 }));
    let both = DESCRIPTOR_INDIRECT | DESCRIPTOR_NEXT;
    assert_eq!(walk.step(descriptor(0, 16, both, 0)), Err(RingFault::IndirectNotAllowed));

    walk.begin();
    walk.step(descriptor(0, 32, DESCRIPTOR_INDIRECT, 0)).unwrap();
    let nested = walk.walk_table(2, |_| descriptor(0, 16, DESCRIPTOR_INDIRECT, 0));
    assert_eq!(nested, Err(RingFault::IndirectNotAllowed));

    walk.begin();
    let looping = walk.walk_table(2, |_| descriptor(0, 1, DESCRIPTOR_NEXT, 1));
    assert_eq!(looping, Err(RingFault::ChainTooLong { limit: SEGMENTS_MAX }));

    walk.begin();
    let outside = walk.walk_table(2, |_| descriptor(0, 1, DESCRIPTOR_NEXT, 2));
    assert_eq!(outside, Err(RingFault::NoSuchDescriptor { number: 2, size: 2 }));

    let mut plain = ChainWalk::new(false);
    plain.begin();
    assert_eq!(plain.step(descriptor(0, 16, DESCRIPTOR_INDIRECT, 0)), Err(RingFault::IndirectNotAllowed));

    plain.begin();
    plain.step(descriptor(0, u32::MAX, DESCRIPTOR_NEXT, 1)).unwrap();
    assert_eq!(plain.step(descriptor(0, 1, 0, 0)), Err(RingFault::ChainTooLarge));
}
