#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use super::*;

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, length, flags, next }
}

fn slot(address: u64, length: u32, flags: u16, id: u16) -> PackedDescriptor {
    PackedDescriptor { address, length, id, flags }
}

/// Walks a chain that begins at descriptor 0 of a split ring of these.
fn walk_ring(walk: &mut ChainWalk, ring: &[Descriptor]) -> Result<Option<WalkEnd>, RingFault> {
    walk.walk(0, ring.len() as u16, |number| Some(ring[usize::from(number)]))
}

/// The same as a chain of a packed ring, with buffer id 7.
fn walk_slots(walk: &mut ChainWalk, ring: &[Descriptor]) -> Result<WalkEnd, RingFault> {
    let slots = ring.iter().map(|descriptor| slot(descriptor.address, descriptor.length, descriptor.flags, 7));
    walk.walk_slots(slots).map(|(id, end)| {
        assert_eq!(id, 7);
        end
    })
}

#[test]
fn collects_readable_then_writable() {
    let ring = [
        descriptor(0x1000, 16, DESCRIPTOR_NEXT, 1),
        descriptor(0x2000, 4096, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, 2),
        descriptor(0x3000, 1, DESCRIPTOR_WRITE, 9),
    ];
    let mut walk = ChainWalk::new(false);
    for packed in [false, true] {
        let end = if packed { walk_slots(&mut walk, &ring) } else { walk_ring(&mut walk, &ring).map(Option::unwrap) };
        assert_eq!((end, walk.steps()), (Ok(WalkEnd::Chain), 3));
        let chain = walk.chain(0, 1);
        assert_eq!((chain.readable, chain.readable_bytes, chain.writable_bytes), (1, 16, 4097));
        assert_eq!(chain.segments.len(), 3);
    }
}

#[test]
fn goes_on_in_a_table() {
    let ring = [descriptor(0x1000, 16, DESCRIPTOR_NEXT, 1), descriptor(0x9000, 32, DESCRIPTOR_INDIRECT, 0)];
    let mut walk = ChainWalk::new(true);
    assert_eq!(walk_ring(&mut walk, &ring), Ok(Some(WalkEnd::Table)));
    let table =
        [descriptor(0x2000, 8, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, 1), descriptor(0x3000, 1, DESCRIPTOR_WRITE, 0)];
    walk.walk_table(2, |number| table[number as usize]).unwrap();
    assert_eq!((walk.chain(0, 1).segments.len(), walk.chain(0, 1).writable_bytes), (3, 9));
    assert_eq!(walk_slots(&mut walk, &ring), Ok(WalkEnd::Table));
    // A list goes on to its end whatever the flags say.
    walk.walk_list([slot(0x2000, 8, DESCRIPTOR_WRITE, 0), slot(0x3000, 1, DESCRIPTOR_WRITE, 0)].into_iter()).unwrap();
    assert_eq!((walk.chain(0, 1).segments.len(), walk.chain(0, 1).writable_bytes), (3, 9));
}

#[test]
fn stops_where_a_descriptor_is_not_here() {
    let mut walk = ChainWalk::new(true);
    let first = descriptor(0x1000, 16, DESCRIPTOR_NEXT, 1);
    assert_eq!(walk.walk(0, 4, |number| (number == 0).then_some(first)), Ok(None));
}

/// One that leads to itself.
fn loops() -> Descriptor {
    descriptor(0, 1, DESCRIPTOR_NEXT, 0)
}

#[test]
fn refuses_what_the_specification_forbids() {
    let mut walk = ChainWalk::new(true);
    let mut plain = ChainWalk::new(false);
    let both_refuse = |walk: &mut ChainWalk, ring: &[Descriptor], fault: RingFault| {
        assert_eq!(walk_ring(walk, ring), Err(fault));
        assert_eq!(walk_slots(walk, ring), Err(fault));
    };
    let write_first = [descriptor(0, 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1), descriptor(0, 1, 0, 0)];
    both_refuse(&mut walk, &write_first, RingFault::ReadableAfterWritable);
    let whole = [descriptor(0, u32::MAX, DESCRIPTOR_NEXT, 1), descriptor(0, 1, 0, 0)];
    both_refuse(&mut walk, &whole, RingFault::ChainTooLarge);
    let table = |length: u32, flags: u16| [descriptor(0, length, DESCRIPTOR_INDIRECT | flags, 0)];
    both_refuse(&mut walk, &table(17, 0), RingFault::IndirectSize { length: 17 });
    both_refuse(&mut walk, &table(0, 0), RingFault::IndirectSize { length: 0 });
    both_refuse(&mut walk, &table(16, DESCRIPTOR_NEXT), RingFault::IndirectNotAllowed);
    let long = RingFault::ChainTooLong { limit: SEGMENTS_MAX };
    both_refuse(&mut walk, &table(16 * (SEGMENTS_MAX + 1), 0), long);
    both_refuse(&mut plain, &table(16, 0), RingFault::IndirectNotAllowed);

    assert_eq!(walk_ring(&mut walk, &[loops()]), Err(long));
    assert_eq!(walk_slots(&mut walk, &[loops(); SEGMENTS_MAX as usize + 1]), Err(long));
    let outside = [descriptor(0, 1, DESCRIPTOR_NEXT, 1)];
    assert_eq!(walk_ring(&mut walk, &outside), Err(RingFault::NoSuchDescriptor { number: 1, size: 1 }));

    let nested = descriptor(0, 16, DESCRIPTOR_INDIRECT, 0);
    walk_ring(&mut walk, &table(32, 0)).unwrap();
    assert_eq!(walk.walk_table(2, |_| nested), Err(RingFault::IndirectNotAllowed));
    assert_eq!(walk.walk_table(2, |_| descriptor(0, 1, DESCRIPTOR_NEXT, 1)), Err(long));
    let outside = walk.walk_table(2, |_| descriptor(0, 1, DESCRIPTOR_NEXT, 2));
    assert_eq!(outside, Err(RingFault::NoSuchDescriptor { number: 2, size: 2 }));
    walk_slots(&mut walk, &table(32, 0)).unwrap();
    let nested = walk.walk_list(std::iter::once(slot(0, 16, DESCRIPTOR_INDIRECT, 0)));
    assert_eq!(nested, Err(RingFault::IndirectNotAllowed));
    // What was readable before the table counts in it.
    walk_slots(&mut walk, &[descriptor(0, 1, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 0), table(16, 0)[0]]).unwrap();
    assert_eq!(walk.walk_list(std::iter::once(slot(0, 1, 0, 0))), Err(RingFault::ReadableAfterWritable));
}
