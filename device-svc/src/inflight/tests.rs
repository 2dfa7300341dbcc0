#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The record byte by byte, against the structures of the vhost-user specification, and records that are not what they should be.

use std::os::unix::fs::FileExt;

use super::*;
use crate::virtqueue::packed::{AVAIL, Place, USED};
use crate::virtqueue::{DESCRIPTOR_INDIRECT, PackedDescriptor};

const SPLIT: AreaShape = AreaShape { queues: 2, size: 4, packed: false };
const PACKED: AreaShape = AreaShape { queues: 2, size: 4, packed: true };

/// The record of queue 1 of a fresh area, and the file to look at it.
fn queue_1(shape: AreaShape) -> (File, QueueRecord) {
    let file = shape.create().unwrap();
    let area = RecordArea::open(&file, 0, shape.bytes(), shape).unwrap();
    let record = area.queue(1, shape.packed).unwrap();
    (file, record)
}

fn bytes(file: &File, shape: AreaShape) -> Vec<u8> {
    let mut bytes = vec![0; shape.region_bytes()];
    file.read_exact_at(&mut bytes, shape.region_bytes() as u64).unwrap();
    bytes
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(file: &File, shape: AreaShape, at: usize, bytes: &[u8]) {
    file.write_all_at(bytes, (shape.region_bytes() + at) as u64).unwrap();
}

#[test]
fn regions_stand_one_behind_the_other_on_lines_of_their_own() {
    assert_eq!(SPLIT.bytes(), 2 * 128, "16 and 4 times 16 bytes, rounded up");
    assert_eq!(PACKED.bytes(), 2 * 192, "32 and 4 times 32 bytes, rounded up");
    let file = SPLIT.create().unwrap();
    assert_eq!(file.metadata().unwrap().len(), 256);
    assert!(file.set_len(0).is_err(), "it cannot be cut short");
}

#[test]
fn a_split_record_is_the_specifications_byte_by_byte() {
    let (file, record) = queue_1(SPLIT);
    let mut split = SplitRecord::new(&record);
    // A ring that has been used before: after a migration, say.
    assert_eq!(split.attach(500, 4).unwrap(), None);
    let now = bytes(&file, SPLIT);
    assert_eq!((long(&now, 0), half(&now, 8), half(&now, 10)), (0, 1, 4), "features, version, desc_num");
    assert_eq!((half(&now, 12), half(&now, 14)), (0, 500), "last_batch_head, used_idx");
    split.mark([2, 0, 3].into_iter());
    split.link([0, 2].into_iter());
    let now = bytes(&file, SPLIT);
    let entry = |now: &[u8], number: usize| {
        let at = 16 + 16 * number;
        (now[at], half(now, at + 6), long(now, at + 8))
    };
    assert_eq!([entry(&now, 0), entry(&now, 2), entry(&now, 3)], [(1, 0, 2), (1, 0, 1), (1, 0, 3)]);
    assert_eq!((half(&now, 12), half(&now, 14)), (2, 500));
    split.complete([0, 2].into_iter(), 502);
    let now = bytes(&file, SPLIT);
    assert_eq!([entry(&now, 0).0, entry(&now, 2).0, entry(&now, 3).0], [0, 0, 1]);
    assert_eq!((half(&now, 12), half(&now, 14)), (2, 502));
    split.mark([0].into_iter());
    assert_eq!(SplitRecord::new(&record).attach(502, 4).unwrap(), Some(vec![3, 0]), "in the order fetched");
}

#[test]
fn a_split_batch_that_was_published_and_not_cleared_is_cleared() {
    let (file, record) = queue_1(SPLIT);
    let mut split = SplitRecord::new(&record);
    assert_eq!(split.attach(0xfffe, 4).unwrap(), None);
    split.mark([1, 0, 3, 2].into_iter());
    split.link([3, 0].into_iter());
    assert_eq!(SplitRecord::new(&record).attach(0xfffe, 4).unwrap(), Some(vec![1, 0, 3, 2]), "not yet published");
    assert_eq!(SplitRecord::new(&record).attach(0, 4).unwrap(), Some(vec![1, 2]), "published");
    assert_eq!(half(&bytes(&file, SPLIT), 14), 0, "and the record is as far as the ring");
}

fn descriptor(number: u16) -> PackedDescriptor {
    PackedDescriptor { address: 0x1000 + u64::from(number), length: 0x200, id: 7, flags: AVAIL | 2 }
}

#[test]
fn a_packed_record_is_the_specifications_byte_by_byte() {
    let (file, record) = queue_1(PACKED);
    let mut packed = PackedRecord::new(&record, 4).unwrap();
    let start = Place { slot: 3, wrap: true };
    assert_eq!(packed.attach(4, start, 0).unwrap(), None);
    let end = packed.fill(|filling| {
        assert_eq!(filling.chain([descriptor(0), descriptor(1)].into_iter()), 0);
        assert_eq!(filling.chain([descriptor(2)].into_iter()), 2);
    });
    assert_eq!(half(&bytes(&file, PACKED), 12), 0, "the batch's entries are free until they are marked");
    packed.mark(2, end);
    let now = bytes(&file, PACKED);
    let head = |now: &[u8]| [half(now, 8), half(now, 10), half(now, 12), half(now, 14), half(now, 16), half(now, 18)];
    assert_eq!(head(&now), [1, 4, 3, 3, 3, 3], "version, desc_num, free heads, used indices");
    assert_eq!(now[20..22], [1, 1], "wrap counters");
    // inflight, next, last, num, counter; then id, flags, len, addr.
    let entry = |now: &[u8], number: usize| {
        let at = 32 + 32 * number;
        (now[at], half(now, at + 2), half(now, at + 4), half(now, at + 6), long(now, at + 8))
    };
    assert_eq!([entry(&now, 0), entry(&now, 2)], [(1, 1, 1, 2, 1), (1, 3, 2, 1, 2)]);
    let second = 32 + 32;
    assert_eq!((half(&now, second + 16), half(&now, second + 18)), (7, AVAIL | 2));
    assert_eq!((now[second + 20..second + 24].to_vec(), long(&now, second + 24)), (vec![0, 2, 0, 0], 0x1001));
    packed.link([0].into_iter(), Place { slot: 1, wrap: false });
    let now = bytes(&file, PACKED);
    assert_eq!(head(&now)[2..], [0, 3, 1, 3], "the new head and place move, the old ones stay");
    assert_eq!((now[20..22].to_vec(), entry(&now, 1).1), (vec![0, 1], 3), "its last entry leads to the free list");
    packed.complete([0].into_iter());
    let now = bytes(&file, PACKED);
    assert_eq!(head(&now)[2..], [0, 0, 1, 1]);
    assert_eq!((now[20..22].to_vec(), entry(&now, 0).0), (vec![0, 0], 0));
}

#[test]
fn what_is_filled_in_and_not_marked_is_free() {
    let (file, record) = queue_1(PACKED);
    let mut packed = PackedRecord::new(&record, 4).unwrap();
    let start = Place { slot: 0, wrap: true };
    packed.attach(4, start, 0).unwrap();
    packed.fill(|filling| {
        for number in 0..3 {
            assert_eq!(filling.chain([descriptor(number)].into_iter()), number);
        }
    });
    packed.mark(1, 1);
    packed.forget([1, 2].into_iter());
    let in_flight = |file: &File| [0, 1, 2, 3].map(|number| bytes(file, PACKED)[32 + 32 * number]);
    assert_eq!(in_flight(&file), [1, 0, 0, 0]);
    assert_eq!(packed.take(&[&[descriptor(3), descriptor(4)]]), [1], "the next batch takes their entries");
    let (_, again) = PackedRecord::new(&record, 4).unwrap().attach(4, start, 0).unwrap().unwrap();
    let chains = [(0, vec![descriptor(0)]), (1, vec![descriptor(3), descriptor(4)])];
    assert_eq!(again, chains.map(|(entry, descriptors)| RecordedChain { entry, descriptors }));
}

#[test]
fn a_packed_batch_of_a_whole_lap_is_known_by_its_wrap_counter() {
    for (published, flags) in [(false, AVAIL), (true, AVAIL | USED)] {
        let (_, record) = queue_1(PACKED);
        let mut packed = PackedRecord::new(&record, 4).unwrap();
        let start = Place { slot: 0, wrap: true };
        assert_eq!(packed.attach(4, start, 0).unwrap(), None);
        let chains: Vec<_> = (0..4).map(|number| [descriptor(number)]).collect();
        assert_eq!(packed.take(&chains.iter().map(|chain| &chain[..]).collect::<Vec<_>>()), [0, 1, 2, 3]);
        let end = Place { slot: 0, wrap: false };
        packed.link([2, 1, 0, 3].into_iter(), end);
        let mut next = PackedRecord::new(&record, 4).unwrap();
        assert_eq!(next.doubtful_slot(), 0);
        let (used, again) = next.attach(4, Place { slot: 2, wrap: true }, flags).unwrap().unwrap();
        let entries: Vec<u16> = again.iter().map(|chain| chain.entry).collect();
        if published {
            assert_eq!((used, entries), (end, vec![]));
        } else {
            assert_eq!((used, entries), (start, vec![0, 1, 2, 3]));
            assert_eq!(again[3].descriptors, [descriptor(3)]);
        }
    }
}

#[test]
fn a_split_record_that_is_not_the_rings_is_refused() {
    let attach = |change: &dyn Fn(&File), used: u16, size: u16| {
        let (file, record) = queue_1(SPLIT);
        SplitRecord::new(&record).attach(10, 4).unwrap();
        change(&file);
        SplitRecord::new(&record).attach(used, size)
    };
    let set = |at: usize, value: u16| move |file: &File| put(file, SPLIT, at, &value.to_ne_bytes());
    assert_eq!(attach(&set(8, 2), 10, 4), Err(RecordFault::Version { version: 2, features: 0 }));
    assert_eq!(attach(&set(0, 1), 10, 4), Err(RecordFault::Version { version: 1, features: 1 }));
    assert_eq!(attach(&set(10, 8), 10, 4), Err(RecordFault::Entries { found: 8, expected: 4 }));
    assert_eq!(attach(&set(10, 4), 10, 8), Err(RecordFault::TooSmall { size: 8, entries: 4 }));
    assert_eq!(attach(&set(10, 4), 15, 4), Err(RecordFault::UsedIndex { record: 10, ring: 15 }));
    assert_eq!(attach(&set(10, 4), 9, 4), Err(RecordFault::UsedIndex { record: 10, ring: 9 }));
    assert_eq!(attach(&set(12, 4), 11, 4), Err(RecordFault::NoSuchEntry { number: 4, size: 4 }));
    assert_eq!(attach(&set(16 + 16 * 3, 1), 10, 2), Err(RecordFault::NoSuchEntry { number: 3, size: 2 }));
    // A list that runs in a circle ends with the batch.
    assert_eq!(attach(&set(12, 0), 14, 4), Ok(Some(vec![])));
}

#[test]
fn a_packed_record_with_broken_lists_is_refused() {
    let attach = |change: &dyn Fn(&File), size: u16| {
        let (file, record) = queue_1(PACKED);
        let mut packed = PackedRecord::new(&record, 4).unwrap();
        packed.attach(4, Place { slot: 0, wrap: true }, 0).unwrap();
        packed.take(&[&[descriptor(0), descriptor(1)]]);
        change(&file);
        let mut packed = PackedRecord::new(&record, size)?;
        packed.attach(size, Place { slot: 0, wrap: true }, 0).map(|found| found.unwrap().1.len())
    };
    let set = |at: usize, value: u16| move |file: &File| put(file, PACKED, at, &value.to_ne_bytes());
    let entry = |number: usize, field: usize| 32 + 32 * number + field;
    assert_eq!(attach(&set(10, 4), 4), Ok(1));
    assert_eq!(attach(&set(18, 4), 4), Err(RecordFault::NoSuchEntry { number: 4, size: 4 }));
    assert_eq!(attach(&set(10, 4), 1), Err(RecordFault::Lists), "more slots in flight than the ring has");
    assert_eq!(attach(&set(entry(3, 2), 2), 4), Err(RecordFault::Lists), "free entries in a circle");
    assert_eq!(attach(&set(entry(2, 2), 9), 4), Err(RecordFault::Lists), "an entry that is nowhere");
    assert_eq!(attach(&set(entry(0, 6), 3), 4), Err(RecordFault::Lists), "a chain that runs into the free list");
    assert_eq!(attach(&set(entry(0, 6), 0), 4), Err(RecordFault::Lists), "a chain without descriptors");
    assert_eq!(attach(&set(entry(0, 4), 0), 4), Err(RecordFault::Lists), "a chain that ends elsewhere");
    assert_eq!(attach(&set(entry(0, 2), 0), 4), Err(RecordFault::Lists), "a chain in a circle");
    let leads = AVAIL | DESCRIPTOR_INDIRECT;
    assert_eq!(attach(&set(entry(0, 18), leads), 4), Err(RecordFault::Lists), "a chain that goes on behind a table");
    assert_eq!(attach(&set(entry(1, 18), leads), 4), Ok(1));
    assert_eq!(attach(&set(entry(1, 0), 1), 4), Ok(1), "of a chain's entries only the first says that it is in flight");
}

#[test]
fn what_a_front_end_says_of_a_record_is_checked_before_it_is_mapped() {
    assert!(matches!(AreaShape { queues: 0, ..SPLIT }.check(2, 4), Err(AreaError::Shape { queues: 0, .. })));
    assert!(matches!(AreaShape { queues: 3, ..SPLIT }.check(2, 4), Err(AreaError::Shape { queues: 3, .. })));
    assert!(matches!(AreaShape { size: 5, ..SPLIT }.check(2, 4), Err(AreaError::Shape { size: 5, .. })));
    let file = SPLIT.create().unwrap();
    let open = |offset: u64, given: u64| RecordArea::open(&file, offset, given, SPLIT);
    assert!(matches!(open(0, 255), Err(AreaError::TooSmall { needed: 256, given: 255 })));
    assert!(matches!(open(4096, 256), Err(AreaError::Mapping(_))), "behind the file's end");
    assert!(matches!(open(1, 255 + 1), Err(AreaError::Mapping(_))), "not a page");
    assert!(matches!(open(u64::MAX, 256), Err(AreaError::Mapping(_))));
    let area = open(0, u64::MAX).unwrap();
    assert!(matches!(area.queue(2, false), Err(AreaError::NoSuchQueue { queue: 2 })));
    assert!(area.queue(1, false).is_ok());
    assert!(matches!(area.queue(0, true), Err(AreaError::NoSuchQueue { queue: 0 })), "the other ring does not fit");
}

#[test]
fn a_record_that_is_forgotten_begins_anew() {
    let file = SPLIT.create().unwrap();
    let area = RecordArea::open(&file, 0, SPLIT.bytes(), SPLIT).unwrap();
    let record = area.queue(1, false).unwrap();
    let mut split = SplitRecord::new(&record);
    split.attach(9, 4).unwrap();
    split.mark([1].into_iter());
    area.forget();
    assert_eq!(SplitRecord::new(&record).attach(0, 4), Ok(None));
    assert_eq!(SplitRecord::new(&record).attach(0, 4), Ok(Some(vec![])), "what was in flight is not any more");
}
