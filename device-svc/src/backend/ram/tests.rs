#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;
use crate::backend::{Segments, Tag};

fn backend(size_bytes: u64) -> RamBackend {
    RamBackend::new(&RamSettings { size_bytes, read_only: false }).unwrap()
}

/// The ranges of `memory`, cut into pieces of these lengths.
fn cut(memory: &mut [u8], pieces: &[usize]) -> Vec<libc::iovec> {
    let mut rest = memory;
    let mut ranges = Vec::new();
    for &piece in pieces {
        let (front, back) = rest.split_at_mut(piece.min(rest.len()));
        ranges.push(libc::iovec { iov_base: front.as_mut_ptr().cast(), iov_len: front.len() });
        rest = back;
    }
    ranges.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    ranges
}

/// Runs one request to its end.
fn run(channel: &mut dyn BlockChannel, operation: BlockOperation, offset: u64, length: u64) -> Result<(), BlockFault> {
    run_with(channel, operation, offset, length, Segments::NONE)
}

fn run_with(
    channel: &mut dyn BlockChannel,
    operation: BlockOperation,
    offset: u64,
    length: u64,
    segments: Segments,
) -> Result<(), BlockFault> {
    let tag = Tag { lane: 0, row: 3 };
    channel.submit(BlockRequest { tag, operation, offset, length, segments }).unwrap();
    let mut completions = Vec::new();
    for _ in 0..100_000 {
        channel.poll(Moment(0), &mut completions);
        if let Some(completion) = completions.pop() {
            assert_eq!(completion.tag, tag);
            return completion.result;
        }
    }
    panic!("the request never ended");
}

fn write(channel: &mut dyn BlockChannel, offset: u64, data: &[u8]) -> Result<(), BlockFault> {
    let mut data = data.to_vec();
    let length = data.len() as u64;
    let ranges = cut(&mut data, &[]);
    // SAFETY: list and ranges live until `run_with` has seen the completion.
    let segments = unsafe { Segments::new(ranges.as_ptr(), ranges.len() as u32) };
    run_with(channel, BlockOperation::Write, offset, length, segments)
}

fn read(channel: &mut dyn BlockChannel, offset: u64, length: usize, pieces: &[usize]) -> Result<Vec<u8>, BlockFault> {
    let mut data = vec![0xee; length];
    let ranges = cut(&mut data, pieces);
    // SAFETY: as in `write`.
    let segments = unsafe { Segments::new(ranges.as_ptr(), ranges.len() as u32) };
    run_with(channel, BlockOperation::Read, offset, length as u64, segments)?;
    Ok(data)
}

#[test]
fn channels_share_one_volume() {
    let backend = backend(1 << 20);
    let mut one = backend.open_channel().unwrap();
    let mut other = backend.open_channel().unwrap();
    write(&mut *one, 4096, &[7; 1024]).unwrap();
    assert_eq!(read(&mut *other, 4096, 1024, &[1, 511, 7]).unwrap(), vec![7; 1024]);
    assert_eq!(read(&mut *other, 0, 512, &[]).unwrap(), vec![0; 512]);
}

#[test]
fn a_range_beyond_the_end_is_an_error_and_touches_nothing() {
    let backend = backend(1 << 20);
    let mut channel = backend.open_channel().unwrap();
    assert_eq!(write(&mut *channel, (1 << 20) - 512, &[1; 1024]), Err(BlockFault::Io));
    assert_eq!(read(&mut *channel, u64::MAX - 511, 1024, &[]), Err(BlockFault::Io));
    assert_eq!(
        run(&mut *channel, BlockOperation::WriteZeroes { unmap: true }, 0, (1 << 20) + 512),
        Err(BlockFault::Io)
    );
    assert_eq!(read(&mut *channel, (1 << 20) - 512, 512, &[]).unwrap(), vec![0; 512]);
}

#[test]
fn a_full_channel_hands_the_request_back() {
    let backend = backend(1 << 20);
    let mut channel = backend.open_channel().unwrap();
    let flush = |row| BlockRequest {
        tag: Tag { lane: 0, row },
        operation: BlockOperation::Flush,
        offset: 0,
        length: 0,
        segments: Segments::NONE,
    };
    for row in 0..DEPTH as u32 {
        channel.submit(flush(row)).unwrap();
    }
    assert_eq!(channel.submit(flush(1000)).unwrap_err().tag.row, 1000);
    assert_eq!(channel.in_flight(), DEPTH);
    let mut completions = Vec::new();
    channel.poll(Moment(0), &mut completions);
    assert_eq!(completions.len(), DEPTH);
    assert_eq!((channel.in_flight(), channel.deadline()), (0, None));
}

#[test]
fn a_huge_range_of_zeroes_takes_many_turns() {
    let size_bytes = 8 * POLL_BYTES_MAX;
    let backend = backend(size_bytes);
    let mut channel = backend.open_channel().unwrap();
    write(&mut *channel, size_bytes - 512, &[9; 512]).unwrap();
    let request = BlockRequest {
        tag: Tag { lane: 0, row: 0 },
        operation: BlockOperation::WriteZeroes { unmap: false },
        offset: 0,
        length: size_bytes,
        segments: Segments::NONE,
    };
    channel.submit(request).unwrap();
    let mut completions = Vec::new();
    for _ in 0..7 {
        channel.poll(Moment(0), &mut completions);
        assert!(completions.is_empty());
        assert_eq!(channel.deadline(), Some(Moment(0)), "a reactor must not sleep on it");
    }
    channel.poll(Moment(0), &mut completions);
    assert_eq!(completions.len(), 1);
    assert_eq!(read(&mut *channel, size_bytes - 512, 512, &[]).unwrap(), vec![0; 512]);
}

#[test]
fn a_discard_gives_memory_back() {
    let backend = backend(64 << 20);
    let mut channel = backend.open_channel().unwrap();
    for offset in (0..64 << 20).step_by(1 << 20) {
        write(&mut *channel, offset, &vec![5; 1 << 20]).unwrap();
    }
    let resident_bytes = || {
        let mut pages = vec![0_u8; (64 << 20) / 4096];
        // SAFETY: the range is mapped, and `pages` has a byte for each page of 4 KiB or more.
        let result = unsafe { libc::mincore(backend.memory.start.as_ptr().cast(), 64 << 20, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|&&page| page & 1 != 0).count() * 4096
    };
    assert_eq!(resident_bytes(), 64 << 20);
    run(&mut *channel, BlockOperation::Discard, 512, (64 << 20) - 512).unwrap();
    assert!(resident_bytes() <= PAGE_BYTES as usize, "{} bytes stay", resident_bytes());
    assert_eq!(read(&mut *channel, 0, 512, &[]).unwrap(), vec![5; 512], "what stood before the range stays");
}

#[test]
fn a_volume_grows_and_shrinks_in_place() {
    let backend = backend(1 << 20);
    let mut channel = backend.open_channel().unwrap();
    write(&mut *channel, (1 << 20) - 512, &[3; 512]).unwrap();
    assert_eq!(backend.resize(16 << 20).unwrap(), 16 << 20);
    write(&mut *channel, (16 << 20) - 512, &[4; 512]).unwrap();
    assert_eq!(read(&mut *channel, (1 << 20) - 512, 512, &[]).unwrap(), vec![3; 512]);
    let error = backend.resize((16 << 20) + 512).unwrap_err();
    assert!(matches!(error, BackendError::Refused(_)), "{error}");
    backend.resize(512).unwrap();
    backend.resize(16 << 20).unwrap();
    assert_eq!(read(&mut *channel, (1 << 20) - 512, 512, &[]).unwrap(), vec![0; 512], "what was cut off is gone");
    assert_eq!(read(&mut *channel, (16 << 20) - 512, 512, &[]).unwrap(), vec![0; 512]);
}

#[test]
fn a_size_is_whole_blocks() {
    for size_bytes in [0, 1, 513] {
        assert!(RamBackend::new(&RamSettings { size_bytes, read_only: false }).is_err());
    }
    let error = RamBackend::new(&RamSettings { size_bytes: 1 << 63, read_only: false }).unwrap_err();
    assert!(matches!(error, BackendError::Unavailable(_)), "{error}");
}

proptest! {
    /// Any sequence of requests leaves what a plain vector would hold; discarded ranges may hold anything.
    #[test]
    fn it_holds_what_a_vector_would(steps in prop::collection::vec((0..4_u8, 0..2048_u64, 1..512_u64, any::<u8>()), 1..40)) {
        const BLOCKS: u64 = 2048;
        let backend = backend(BLOCKS * 512);
        let mut channel = backend.open_channel().unwrap();
        let mut model = vec![Some(0_u8); BLOCKS as usize];
        for (kind, first, count, value) in steps {
            let count = count.min(BLOCKS - first);
            let (offset, length) = (first * 512, count * 512);
            let known = match kind {
                0 => { write(&mut *channel, offset, &vec![value; length as usize]).unwrap(); Some(value) }
                1 => { run(&mut *channel, BlockOperation::WriteZeroes { unmap: false }, offset, length).unwrap(); Some(0) }
                2 => { run(&mut *channel, BlockOperation::WriteZeroes { unmap: true }, offset, length).unwrap(); Some(0) }
                _ => { run(&mut *channel, BlockOperation::Discard, offset, length).unwrap(); None }
            };
            model[first as usize..(first + count) as usize].fill(known);
        }
        let content = read(&mut *channel, 0, BLOCKS as usize * 512, &[513, 4096]).unwrap();
        for (block, known) in content.chunks(512).zip(model) {
            if let Some(value) = known {
                prop_assert!(block.iter().all(|&byte| byte == value));
            }
        }
    }
}

/// `cargo test --release -p device-svc --lib ram::tests::measure -- --ignored --nocapture`: a channel at depth 32 beside
/// a bare copy at random, both over 256 MiB.
#[test]
#[ignore = "a measurement, not a check"]
fn measure() {
    const SPAN_BYTES: u64 = 256 << 20;
    const DEPTH: usize = 32;
    const BATCHES: usize = 20_000;
    let backend = backend(SPAN_BYTES);
    let mut channel = backend.open_channel().unwrap();
    for offset in (0..SPAN_BYTES).step_by(1 << 20) {
        write(&mut *channel, offset, &vec![1; 1 << 20]).unwrap();
    }
    let mut memory = vec![0_u8; DEPTH * 4096];
    let ranges = cut(&mut memory, &[4096; DEPTH - 1]);
    let mut state = 88_172_645_463_325_252_u64;
    let mut offset = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (SPAN_BYTES / 4096) * 4096
    };
    let mut completions = Vec::with_capacity(DEPTH);
    for operation in [BlockOperation::Read, BlockOperation::Write, BlockOperation::Read, BlockOperation::Write] {
        let begin = Moment::now();
        for _ in 0..BATCHES {
            for range in &ranges {
                let at = backend.memory.start.as_ptr().wrapping_add(offset() as usize);
                // SAFETY: both are 4 KiB inside what they point into.
                unsafe {
                    if operation == BlockOperation::Read {
                        std::ptr::copy_nonoverlapping(at.cast_const(), range.iov_base.cast(), 4096);
                    } else {
                        std::ptr::copy_nonoverlapping(range.iov_base.cast_const().cast(), at, 4096);
                    }
                }
            }
        }
        let bare = Moment::now().ns_since(begin) as f64 / (BATCHES * DEPTH) as f64;
        let begin = Moment::now();
        for _ in 0..BATCHES {
            for (row, range) in (0..).zip(&ranges) {
                // SAFETY: list and memory live to the end of the function.
                let segments = unsafe { Segments::new(range, 1) };
                let tag = Tag { lane: 0, row };
                channel.submit(BlockRequest { tag, operation, offset: offset(), length: 4096, segments }).unwrap();
            }
            completions.clear();
            channel.poll(Moment(0), &mut completions);
            assert_eq!(completions.len(), DEPTH);
        }
        let own = Moment::now().ns_since(begin) as f64 / (BATCHES * DEPTH) as f64;
        println!("{operation:?}: bare copy {bare:.0} ns, channel {own:.0} ns a request, ratio {:.2}", bare / own);
    }
}
