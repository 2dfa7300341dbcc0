#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::ReplayLog;
use crate::address::CardAddress;
use crate::backend::BlockOperation;
use crate::backend::nbd::payload::{CardRanges, Place};
use crate::dma::CardMemory;

fn log_of_16_pages() -> (ReplayLog, CardMemory, CardRanges) {
    (ReplayLog::new(65536).unwrap(), CardMemory::new(65536).unwrap(), CardRanges::new(1))
}

fn write(log: &mut ReplayLog, memory: &CardMemory, ranges: &mut CardRanges, offset: u64, data: &[u8]) -> bool {
    memory.copy_in(CardAddress(0), data);
    let segments = ranges.set(0, memory, [(0, data.len() / 3), (data.len() / 3, data.len() - data.len() / 3)]);
    if !log.reserve(BlockOperation::Write, data.len() as u64) {
        return false;
    }
    log.append(BlockOperation::Write, offset, data.len() as u64, segments);
    true
}

fn content(log: &mut ReplayLog, number: u64) -> (u64, Vec<u8>) {
    let record = log.get(number).unwrap();
    let segments = log.segments(0, &record);
    let mut data = vec![0; record.length as usize];
    assert_eq!(Place::new(segments, 0).take(&mut data), data.len());
    (record.offset, data)
}

#[test]
fn data_is_kept_in_order_around_the_end_of_the_ring() {
    let (mut log, memory, mut ranges) = log_of_16_pages();
    let mut oldest = 0;
    for round in 0..200u64 {
        let data: Vec<u8> = (0..5000).map(|byte| (byte as u64 * 7 + round) as u8).collect();
        while !write(&mut log, &memory, &mut ranges, round * 512, &data) {
            assert!(log.is_filling());
            let record = content(&mut log, oldest);
            assert_eq!(record.0, oldest * 512);
            assert!(record.1.iter().enumerate().all(|(byte, value)| *value == (byte as u64 * 7 + oldest) as u8));
            oldest += 1;
            log.forget_before(oldest);
        }
    }
    assert_eq!(log.mark(), 200);
    for number in oldest..200 {
        let record = content(&mut log, number);
        assert!(record.1.iter().enumerate().all(|(byte, value)| *value == (byte as u64 * 7 + number) as u8));
    }
    let mark = log.mark();
    log.forget_before(mark);
    assert_eq!(log.len(), 0);
    assert!(!log.is_filling());
}

#[test]
fn reserved_room_is_not_given_twice() {
    let (mut log, _memory, _ranges) = log_of_16_pages();
    assert!(log.reserve(BlockOperation::Write, 65536));
    assert!(!log.reserve(BlockOperation::Write, 512));
    assert!(log.reserve(BlockOperation::Discard, 1 << 40), "a discard has no data");
    log.release(BlockOperation::Write, 65536);
    for _ in 0..127 {
        assert!(log.reserve(BlockOperation::Discard, 512));
    }
    assert!(!log.reserve(BlockOperation::Discard, 512), "records have a bound too");
}
