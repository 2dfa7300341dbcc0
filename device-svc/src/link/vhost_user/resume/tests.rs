#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::dma::{Mapping, Region};
use crate::driver::GuestMemory;
use crate::link::QueuePort;
use crate::virtqueue::packed::{AVAIL, mark};

struct SilentPort;

impl QueuePort for SilentPort {
    fn doorbell_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
    fn take_doorbell(&mut self) -> bool {
        false
    }
    fn raise_interrupt(&mut self) {}
}

const RING: Iova = Iova(0x1_0000);

/// What `correct` makes of a ring of these flags and addresses that the front end says is at `position`, and the flags after it.
fn corrected(ring: [(u16, u64); 4], position: QueuePosition, in_order: bool) -> (QueuePosition, [u16; 4]) {
    let guest = GuestMemory::new(RING.0, 4096).unwrap();
    for (slot, (flags, address)) in (0..).zip(ring) {
        guest.put(Iova(RING.0 + 16 * slot), PackedDescriptor { address, length: 7, id: 0, flags });
    }
    let mapping = Arc::new(Mapping::new(guest.file(), 0, guest.len()).unwrap());
    let memory = Arc::new(HostMemory::new([Region::new(RING, guest.len(), mapping, 0).unwrap()]).unwrap());
    let mut start = QueueStart {
        index: 0,
        size: 4,
        descriptors: RING,
        driver: RING,
        device: RING,
        position,
        features: 0,
        port: Box::new(SilentPort),
        inflight: None,
        is_resumed: false,
    };
    correct(&mut start, in_order, &memory);
    let flags = [0, 1, 2, 3].map(|slot| guest.get::<PackedDescriptor>(Iova(RING.0 + 16 * slot)).flags);
    (start.position, flags)
}

const fn at(slot: u16, wrap: bool) -> QueuePosition {
    QueuePosition { next_avail: slot, avail_wrap: wrap, next_used: slot, used_wrap: wrap }
}

const BUFFER: u64 = 0x8_0000;

#[test]
fn a_ring_used_in_order_is_asked_itself() {
    let fresh = at(0, true);
    assert_eq!(corrected([(0, 0); 4], fresh, true).0, fresh);
    // On the second lap one was used, one is available; the others were used on the first.
    let ring = [(0, mark(1)), (USED, BUFFER), (AVAIL | USED, mark(1)), (AVAIL | USED, mark(1))];
    let flags = ring.map(|(flags, _)| flags);
    assert_eq!(corrected(ring, fresh, true), (at(1, false), flags));
    assert_eq!(corrected(ring, fresh, false), (fresh, flags), "of others the front end knows");
}

#[test]
fn a_batch_that_wants_only_its_flags_is_published() {
    let ring = [(AVAIL, mark(2)), (AVAIL, BUFFER), (AVAIL | USED, mark(1)), (AVAIL, BUFFER)];
    let (position, flags) = corrected(ring, at(0, true), true);
    assert_eq!(position, at(3, true));
    let used = PackedRing::used_flags(crate::virtqueue::packed::Place { slot: 0, wrap: true }, true);
    assert_eq!(flags, [used, AVAIL, AVAIL | USED, AVAIL]);
}

#[test]
fn a_base_of_zero_of_a_ring_that_was_never_used_is_its_beginning() {
    assert_eq!(corrected([(AVAIL, BUFFER); 4], QueuePosition::default(), false).0, at(0, true));
    assert_eq!(corrected([(AVAIL | USED, 0); 4], QueuePosition::default(), false).0, at(0, false));
}
