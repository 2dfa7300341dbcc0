#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::backend::{BlockOperation, Segments, Tag};

fn request(row: u32, operation: BlockOperation) -> BlockRequest {
    BlockRequest { tag: Tag { lane: 7, row }, operation, offset: 0, length: 4096, segments: Segments::NONE }
}

fn backend() -> NullBackend {
    NullBackend::new(&NullSettings { size_bytes: 1 << 30, read_only: false }).unwrap()
}

#[test]
fn every_operation_ends_well_and_in_order() {
    let mut channel = backend().open_channel().unwrap();
    let operations = [
        BlockOperation::Read,
        BlockOperation::Write,
        BlockOperation::Flush,
        BlockOperation::Discard,
        BlockOperation::WriteZeroes { unmap: true },
    ];
    for (row, operation) in (0..).zip(operations) {
        channel.submit(request(row, operation)).unwrap();
    }
    assert_eq!(channel.in_flight(), 5);
    let mut completions = Vec::new();
    channel.poll(Moment(0), &mut completions);
    assert_eq!(channel.in_flight(), 0);
    for (row, completion) in (0..).zip(&completions) {
        assert_eq!(completion.tag, Tag { lane: 7, row });
        assert_eq!(completion.result, Ok(()));
    }
    assert_eq!(completions.len(), 5);
    channel.poll(Moment(0), &mut completions);
    assert_eq!(completions.len(), 5, "nothing completes twice");
}

#[test]
fn a_full_channel_hands_the_request_back() {
    let mut channel = backend().open_channel().unwrap();
    for row in 0..DEPTH as u32 {
        channel.submit(request(row, BlockOperation::Read)).unwrap();
    }
    let back = channel.submit(request(99_999, BlockOperation::Read)).unwrap_err();
    assert_eq!(back.tag.row, 99_999);
    let mut completions = Vec::with_capacity(DEPTH);
    channel.poll(Moment(0), &mut completions);
    assert_eq!(completions.len(), DEPTH);
    channel.submit(back).unwrap();
}

#[test]
fn a_size_is_whole_blocks() {
    for size_bytes in [0, 1, 511, 513, u64::MAX] {
        let error = NullBackend::new(&NullSettings { size_bytes, read_only: false }).unwrap_err();
        assert!(error.to_string().contains(&size_bytes.to_string()), "{error}");
        assert!(backend().resize(size_bytes).is_err());
    }
    let backend = backend();
    assert_eq!(backend.resize(4096).unwrap(), 4096);
    assert_eq!(backend.info().size_bytes, 4096);
}
