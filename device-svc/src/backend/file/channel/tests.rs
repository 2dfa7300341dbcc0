#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use proptest::prelude::*;

use super::super::{DirectIo, FileSettings};
use super::*;

/// Far longer than anything here takes.
const BOUND: Duration = Duration::from_secs(30);

/// Memory of a request, page-aligned, and the list of its segments.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
    list: Vec<libc::iovec>,
}

impl Memory {
    /// `length` bytes, `skew` bytes after a page's start, cut after these many bytes each.
    fn new(length: usize, skew: usize, cuts: &[usize]) -> Self {
        let mut bytes = vec![0xee; length + skew + 4096];
        let start = bytes.as_ptr().align_offset(4096) + skew;
        let (mut at, mut left, mut list) = (bytes[start..].as_mut_ptr(), length, Vec::new());
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let piece = cut.min(left);
            list.push(libc::iovec { iov_base: at.cast(), iov_len: piece });
            at = at.wrapping_add(piece);
            left -= piece;
        }
        Self { bytes, start, length, list }
    }

    fn holding(content: &[u8], skew: usize, cuts: &[usize]) -> Self {
        let mut memory = Self::new(content.len(), skew, cuts);
        memory.bytes[memory.start..][..content.len()].copy_from_slice(content);
        memory
    }

    fn segments(&self) -> Segments {
        // SAFETY: a test keeps its memory until the request has ended.
        unsafe { Segments::new(self.list.as_ptr(), self.list.len() as u32) }
    }

    fn content(&self) -> &[u8] {
        &self.bytes[self.start..][..self.length]
    }
}

fn channel_of(folder: &std::path::Path, size_bytes: u64, direct: DirectIo) -> (FileChannel, Arc<OpenFile>) {
    let settings =
        FileSettings { path: folder.join("volume"), create_bytes: Some(size_bytes), read_only: false, direct };
    let file = Arc::new(OpenFile::open(&settings).unwrap());
    (FileChannel::new(Arc::clone(&file)).unwrap(), file)
}

/// The folders to test in: an ordinary file system and, where there is one, tmpfs.
fn folders() -> Vec<tempfile::TempDir> {
    let mut folders = vec![tempfile::tempdir().unwrap()];
    folders.extend(tempfile::tempdir_in("/dev/shm"));
    folders
}

fn request(operation: BlockOperation, offset: u64, length: u64, segments: Segments) -> BlockRequest {
    BlockRequest { tag: Tag { lane: 1, row: 5 }, operation, offset, length, segments }
}

/// Runs one request to its end.
fn run(channel: &mut FileChannel, request: BlockRequest) -> Result<(), BlockFault> {
    channel.submit(request).unwrap();
    let mut completions = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < BOUND {
        channel.poll(Moment(0), &mut completions);
        if let Some(completion) = completions.pop() {
            assert_eq!(completion.tag, request.tag);
            assert_eq!(channel.in_flight(), 0);
            return completion.result;
        }
    }
    panic!("the request never ended");
}

fn write(channel: &mut FileChannel, offset: u64, content: &[u8], skew: usize, cuts: &[usize]) {
    let memory = Memory::holding(content, skew, cuts);
    run(channel, request(BlockOperation::Write, offset, content.len() as u64, memory.segments())).unwrap();
}

fn read(channel: &mut FileChannel, offset: u64, length: usize, skew: usize, cuts: &[usize]) -> Vec<u8> {
    let memory = Memory::new(length, skew, cuts);
    run(channel, request(BlockOperation::Read, offset, length as u64, memory.segments())).unwrap();
    memory.content().to_vec()
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at / 512) as u8 ^ (at as u8).wrapping_mul(31) ^ seed).collect()
}

#[test]
fn what_is_written_is_read_whatever_the_memory() {
    for folder in folders() {
        for direct in [DirectIo::Auto, DirectIo::Never] {
            let (mut channel, _file) = channel_of(folder.path(), 1 << 20, direct);
            let cases: [(usize, usize, &[usize]); 6] = [
                (4096, 0, &[]),
                (512, 512, &[]),
                (8192, 0, &[512, 4096]),
                (8192, 1, &[]),
                (8192, 4, &[100, 1, 0, 3000]),
                (300 << 10, 7, &[70_000, 3]),
            ];
            for (seed, (length, skew, cuts)) in (1..).zip(cases) {
                let content = pattern(length, seed);
                write(&mut channel, 512, &content, skew, cuts);
                assert_eq!(read(&mut channel, 512, length, 0, &[]), content);
                assert_eq!(read(&mut channel, 512, length, skew, cuts), content);
            }
            run(&mut channel, request(BlockOperation::Flush, 0, 0, Segments::NONE)).unwrap();
        }
    }
}

#[test]
fn a_file_in_memory_takes_bounded_turns() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 8 << 20, DirectIo::Never);
    channel.copies = true;
    let content = pattern(8 << 20, 6);
    write(&mut channel, 0, &content, 0, &[513, 4096]);
    let memories = [(); 8].map(|()| Memory::new(1 << 20, 0, &[512, 512]));
    for (row, memory) in (0..).zip(&memories) {
        let mut read = request(BlockOperation::Read, u64::from(row) << 20, 1 << 20, memory.segments());
        read.tag.row = row;
        channel.submit(read).unwrap();
    }
    let mut completions = Vec::new();
    for count in 1..=8 {
        assert_eq!(channel.deadline(), Some(Moment(0)), "a reactor must not sleep on it");
        channel.poll(Moment(0), &mut completions);
        assert_eq!((completions.len(), channel.in_flight()), (count, 8 - count));
    }
    assert_eq!(channel.deadline(), None);
    for (memory, expected) in memories.iter().zip(content.chunks(1 << 20)) {
        assert!(memory.content() == expected);
    }
    let zeroes = request(BlockOperation::WriteZeroes { unmap: true }, 0, 1 << 20, Segments::NONE);
    run(&mut channel, zeroes).unwrap();
    assert!(read(&mut channel, 0, 8 << 20, 0, &[])[1 << 20..] == content[1 << 20..]);
}

#[test]
fn misaligned_memory_goes_through_aligned_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, file) = channel_of(folder.path(), 1 << 20, DirectIo::Never);
    // What a disk may ask for, whatever this one does.
    channel.rows.direct = Some(DirectAlignment { address_mask: 511, length_mask: 511 });
    let content = pattern(3 * PART_BYTES + 512, 9);
    write(&mut channel, 0, &content, 3, &[77]);
    assert!(channel.rows.bounce.is_some());
    assert_eq!(read(&mut channel, 0, content.len(), 3, &[5, 70_000]), content);
    assert_eq!(std::fs::read(file.path()).unwrap()[..content.len()], content);

    // There is little of it: what finds none is handed back, and finds some later.
    let memories = [(); 5].map(|()| Memory::new(512, 1, &[]));
    let mut reads = memories.iter().map(|memory| request(BlockOperation::Read, 0, 512, memory.segments()));
    for _ in 0..4 {
        channel.submit(reads.next().unwrap()).unwrap();
    }
    let back = channel.submit(reads.next().unwrap()).unwrap_err();
    let mut completions = Vec::new();
    let begin = Instant::now();
    while completions.len() < 4 && begin.elapsed() < BOUND {
        channel.poll(Moment(0), &mut completions);
    }
    run(&mut channel, back).unwrap();
    assert!(memories.iter().all(|memory| memory.content() == &content[..512]));
}

#[test]
fn a_full_channel_hands_the_request_back() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 1 << 20, DirectIo::Auto);
    let memory = Memory::new(4096, 0, &[]);
    let read = request(BlockOperation::Read, 0, 4096, memory.segments());
    for _ in 0..DEPTH {
        channel.submit(read).unwrap();
    }
    assert_eq!(channel.in_flight(), DEPTH as usize);
    assert_eq!(channel.deadline(), Some(Moment(0)), "nothing is with the kernel yet");
    assert!(channel.submit(read).is_err());
    let mut completions = Vec::new();
    let begin = Instant::now();
    while completions.len() < DEPTH as usize && begin.elapsed() < BOUND {
        channel.poll(Moment(0), &mut completions);
    }
    assert!(completions.iter().all(|completion| completion.result == Ok(())));
    assert_eq!((completions.len(), channel.in_flight()), (DEPTH as usize, 0));
    run(&mut channel, read).unwrap();
}

#[test]
fn zeroes_and_holes() {
    for folder in folders() {
        let (mut channel, file) = channel_of(folder.path(), 4 << 20, DirectIo::Auto);
        let content = pattern(4 << 20, 3);
        let allocated = || {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(file.path()).unwrap().blocks() * 512
        };
        for (unmap, no_punch, no_zero_range) in
            [(true, false, false), (true, true, false), (true, true, true), (false, false, false), (false, false, true)]
        {
            write(&mut channel, 0, &content, 0, &[]);
            run(&mut channel, request(BlockOperation::Flush, 0, 0, Segments::NONE)).unwrap();
            let full_bytes = allocated();
            // As if the file system had said before that it cannot.
            (channel.rows.no_punch, channel.rows.no_zero_range) = (no_punch, no_zero_range);
            let operation = BlockOperation::WriteZeroes { unmap };
            run(&mut channel, request(operation, 4096, (3 << 20) + 512, Segments::NONE)).unwrap();
            let mut expected = content.clone();
            expected[4096..4096 + (3 << 20) + 512].fill(0);
            assert!(read(&mut channel, 0, 4 << 20, 0, &[]) == expected, "unmap {unmap}, {no_punch}, {no_zero_range}");
            if unmap && !no_punch {
                assert!(allocated() + (2 << 20) <= full_bytes, "{} of {full_bytes} bytes stay", allocated());
            }
        }
        write(&mut channel, 0, &content, 0, &[]);
        run(&mut channel, request(BlockOperation::Discard, 0, 4 << 20, Segments::NONE)).unwrap();
        assert!(allocated() <= 1 << 20, "{} bytes stay", allocated());
    }
}

#[test]
fn a_file_that_ends_early_reads_as_zeroes() {
    for folder in folders() {
        for direct in [DirectIo::Auto, DirectIo::Never] {
            let (mut channel, file) = channel_of(folder.path(), 64 << 10, direct);
            write(&mut channel, 0, &pattern(64 << 10, 1), 0, &[]);
            for end in [10_000, 8192] {
                std::fs::File::options().write(true).open(file.path()).unwrap().set_len(end).unwrap();
                let mut expected = pattern(64 << 10, 1);
                expected[end as usize..].fill(0);
                assert_eq!(read(&mut channel, 0, 64 << 10, 0, &[4096, 512]), expected);
                assert_eq!(read(&mut channel, 32 << 10, 4096, 0, &[]), vec![0; 4096]);
            }
            std::fs::remove_file(file.path()).unwrap();
        }
    }
}

#[test]
fn memory_that_is_gone_is_an_error_of_that_request() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 1 << 20, DirectIo::Auto);
    let nowhere = libc::iovec { iov_base: 4096 as *mut libc::c_void, iov_len: 4096 };
    // SAFETY: only the kernel touches the range, and finds that it is not mapped.
    let segments = unsafe { Segments::new(&raw const nowhere, 1) };
    write(&mut channel, 0, &pattern(8192, 2), 0, &[]);
    assert_eq!(run(&mut channel, request(BlockOperation::Read, 0, 4096, segments)), Err(BlockFault::Io));
    assert_eq!(run(&mut channel, request(BlockOperation::Write, 0, 4096, segments)), Err(BlockFault::Io));
    assert_eq!(read(&mut channel, 0, 8192, 0, &[]), pattern(8192, 2));
}

#[test]
fn answers_of_the_kernel_become_fates_of_requests() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 1 << 20, DirectIo::Never);
    let rows = &mut channel.rows;
    let memory = Memory::new(8192, 0, &[]);
    let write = request(BlockOperation::Write, 0, 8192, memory.segments());
    let mut fate = |request: BlockRequest, answers: &[i32]| {
        let row = rows.take(request).unwrap();
        let mut last = None;
        for &answer in answers {
            assert!(last.is_none(), "an answer after the end");
            if let Next::End(result) = rows.next(row, answer) {
                last = Some(result);
            }
        }
        let done = rows.rows[row as usize].done;
        rows.release(row);
        (last, done)
    };
    assert_eq!(fate(write, &[8192]), (Some(Ok(())), 8192));
    assert_eq!(fate(write, &[4096]), (None, 4096));
    assert_eq!(fate(write, &[1000]), (None, 512), "goes on at a whole block");
    assert_eq!(fate(write, &[1000, 7680]), (Some(Ok(())), 8192));
    assert_eq!(fate(write, &[0]).0, Some(Err(BlockFault::Io)));
    assert_eq!(fate(write, &[-libc::EINTR, -libc::EAGAIN, 8192]).0, Some(Ok(())));
    for errno in [libc::ENOSPC, libc::EIO, libc::EFAULT, libc::EDQUOT, libc::ECANCELED] {
        assert_eq!(fate(write, &[-errno]).0, Some(Err(BlockFault::Io)));
    }
    let discard = request(BlockOperation::Discard, 0, 8192, Segments::NONE);
    assert_eq!(fate(discard, &[-libc::EOPNOTSUPP]).0, Some(Err(BlockFault::Unsupported)));
    let flush = request(BlockOperation::Flush, 0, 0, Segments::NONE);
    assert_eq!(fate(flush, &[-libc::EIO]).0, Some(Err(BlockFault::Io)));
    let zeroes = request(BlockOperation::WriteZeroes { unmap: true }, 0, 8192, Segments::NONE);
    assert_eq!(fate(zeroes, &[-libc::EOPNOTSUPP, 0]).0, Some(Ok(())), "punch, then zero range");
    assert_eq!(fate(zeroes, &[-libc::EOPNOTSUPP, 4096, 4096]).0, Some(Ok(())), "zero range, then writes");
    assert_eq!(fate(zeroes, &[4096, 4096]).0, Some(Ok(())), "it remembers");
}

/// An entry that ends when somebody writes a byte to the pipe.
fn push_pipe_read(channel: &mut FileChannel, pipe: &std::io::PipeReader, memory: &Memory) {
    channel.rows.direct = None;
    let row = channel.rows.take(request(BlockOperation::Read, 0, 1, memory.segments())).unwrap();
    let entry = opcode::Read::new(types::Fd(pipe.as_raw_fd()), memory.list[0].iov_base.cast(), 1)
        .build()
        .user_data(u64::from(row));
    // SAFETY: the tests below keep memory and pipe until the channel is gone.
    unsafe { channel.ring.push(&entry) };
    fall_asleep(channel, &mut Vec::new());
    assert_eq!(channel.in_flight(), 1);
}

/// Polls, as a reactor does, until the channel lets it sleep.
fn fall_asleep(channel: &mut FileChannel, completions: &mut Vec<Completion>) {
    for _ in 0..10_000 {
        channel.poll(Moment(0), completions);
        if channel.deadline().is_none() {
            return;
        }
    }
    panic!("a reactor would never sleep");
}

#[test]
fn a_sleeping_reactor_is_woken() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 1 << 20, DirectIo::Auto);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    // SAFETY: the channel outlives the borrow.
    let wake = unsafe { std::os::fd::BorrowedFd::borrow_raw(channel.wake_fd().unwrap()) };
    epoll.add(wake, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
    let sleep = |timeout: EpollTimeout| {
        let mut events = [EpollEvent::empty()];
        loop {
            match epoll.wait(&mut events, timeout) {
                // The kernel may run work of its own in this thread, which ends a wait.
                Err(nix::errno::Errno::EINTR) => {}
                result => return result.unwrap(),
            }
        }
    };
    for _ in 0..10 {
        let memory = Memory::new(1, 0, &[]);
        let (reader, mut writer) = std::io::pipe().unwrap();
        push_pipe_read(&mut channel, &reader, &memory);
        assert_eq!(sleep(EpollTimeout::ZERO), 0, "nothing has ended");
        let thread = std::thread::spawn(move || writer.write_all(b"!").unwrap());
        assert_eq!(sleep(EpollTimeout::try_from(BOUND).unwrap()), 1);
        let mut completions = Vec::new();
        channel.poll(Moment(0), &mut completions);
        assert_eq!((completions.len(), channel.in_flight()), (1, 0));
        assert_eq!(memory.content(), b"!");
        assert_eq!(sleep(EpollTimeout::ZERO), 0, "everything has been taken");
        thread.join().unwrap();
    }
    // And as a kernel worker ends a request.
    for _ in 0..100 {
        channel.submit(request(BlockOperation::Flush, 0, 0, Segments::NONE)).unwrap();
        let mut completions = Vec::new();
        fall_asleep(&mut channel, &mut completions);
        while completions.is_empty() {
            assert_eq!(sleep(EpollTimeout::try_from(BOUND).unwrap()), 1);
            channel.poll(Moment(0), &mut completions);
        }
        assert_eq!(sleep(EpollTimeout::ZERO), 0);
    }
}

#[test]
fn dropping_waits_for_what_the_kernel_has() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 1 << 20, DirectIo::Auto);
    let memory = Memory::new(1, 0, &[]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    push_pipe_read(&mut channel, &reader, &memory);
    // What has not been submitted is not waited for.
    channel.submit(request(BlockOperation::Flush, 0, 0, Segments::NONE)).unwrap();
    let written = Arc::new(AtomicBool::new(false));
    let state = format!("/proc/self/task/{}/stat", nix::unistd::gettid());
    let thread = std::thread::spawn({
        let written = Arc::clone(&written);
        move || {
            // The read ends only once the dropping thread is asleep.
            let begin = Instant::now();
            while begin.elapsed() < BOUND {
                let text = std::fs::read_to_string(&state).unwrap();
                if text.rsplit_once(')').unwrap().1.trim_start().starts_with('S') {
                    break;
                }
                std::thread::yield_now();
            }
            written.store(true, Ordering::SeqCst);
            writer.write_all(b"!").unwrap();
        }
    });
    drop(channel);
    assert!(written.load(Ordering::SeqCst), "the kernel still had the memory");
    assert_eq!(memory.content(), b"!");
    thread.join().unwrap();
}

#[test]
fn a_channel_moves_to_its_reactor() {
    let folder = tempfile::tempdir().unwrap();
    let (mut channel, _file) = channel_of(folder.path(), 1 << 20, DirectIo::Auto);
    std::thread::spawn(move || {
        write(&mut channel, 4096, &pattern(4096, 8), 0, &[]);
        assert_eq!(read(&mut channel, 4096, 4096, 0, &[]), pattern(4096, 8));
    })
    .join()
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any sequence of requests leaves what a plain vector would hold; discarded ranges may hold anything.
    #[test]
    fn it_holds_what_a_vector_would(
        direct in prop_oneof![Just(DirectIo::Auto), Just(DirectIo::Never)],
        steps in prop::collection::vec((0..5_u8, 0..256_u64, 1..64_u64, any::<u8>(), 0..9_usize, 1..9000_usize), 1..30),
    ) {
        const BLOCKS: u64 = 256;
        let folder = tempfile::tempdir().unwrap();
        let (mut channel, _file) = channel_of(folder.path(), BLOCKS * 512, direct);
        let mut model = vec![Some(0_u8); BLOCKS as usize];
        for (kind, first, count, value, skew, cut) in steps {
            let count = count.min(BLOCKS - first);
            let (offset, length) = (first * 512, count * 512);
            let known = match kind {
                0 => { write(&mut channel, offset, &vec![value; length as usize], skew, &[cut]); Some(value) }
                1 => { write(&mut channel, offset, &vec![value; length as usize], 0, &[]); Some(value) }
                2 | 3 => {
                    let operation = BlockOperation::WriteZeroes { unmap: kind == 2 };
                    run(&mut channel, request(operation, offset, length, Segments::NONE)).unwrap();
                    Some(0)
                }
                _ => {
                    run(&mut channel, request(BlockOperation::Discard, offset, length, Segments::NONE)).unwrap();
                    None
                }
            };
            model[first as usize..(first + count) as usize].fill(known);
        }
        let content = read(&mut channel, 0, BLOCKS as usize * 512, 0, &[513 * 8]);
        for (block, known) in content.chunks(512).zip(model) {
            if let Some(value) = known {
                prop_assert!(block.iter().all(|&byte| byte == value));
            }
        }
    }
}

/// `cargo test --release -p device-svc --lib channel::tests::measure -- --ignored --nocapture`: random 4 KiB over 256 MiB
/// of a 1 GiB file on tmpfs, one thread (pin it with `taskset`, or kernel workers take a second core). Beside each figure
/// stands the same work by bare `pread` and `pwrite`; `true` first: copied by this thread, then by the ring.
#[test]
#[ignore = "a measurement, not a check"]
fn measure() {
    use std::os::unix::fs::FileExt;
    const SPAN_BYTES: u64 = 256 << 20;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for copies in [true, false] {
        let (mut channel, file) = channel_of(folder.path(), 1 << 30, DirectIo::Auto);
        channel.copies = copies;
        let plain = std::fs::File::options().read(true).write(true).open(file.path()).unwrap();
        for offset in (0..SPAN_BYTES).step_by(1 << 20) {
            plain.write_all_at(&pattern(1 << 20, 1), offset).unwrap();
        }
        let mut state = 88_172_645_463_325_252_u64;
        let mut offset = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % (SPAN_BYTES / 4096) * 4096
        };
        for depth in [1, 32, 128_usize] {
            let memories: Vec<Memory> = (0..depth).map(|_| Memory::new(4096, 0, &[])).collect();
            let mut completions = Vec::with_capacity(depth);
            for operation in [BlockOperation::Read, BlockOperation::Write, BlockOperation::Read, BlockOperation::Write]
            {
                let total = 200_000;
                let mut scratch = vec![0_u8; depth * 4096];
                let begin = Moment::now();
                for at in 0..total / 2 {
                    let part = &mut scratch[at % depth * 4096..][..4096];
                    if operation == BlockOperation::Read {
                        plain.read_exact_at(part, offset()).unwrap();
                    } else {
                        plain.write_all_at(part, offset()).unwrap();
                    }
                }
                let call = Moment::now().ns_since(begin) as f64 / f64::from(total as u32 / 2);
                let begin = Moment::now();
                let (mut done, mut next): (usize, Vec<u32>) = (0, (0..depth as u32).collect());
                while done < total {
                    for row in next.drain(..) {
                        let mut request = request(operation, offset(), 4096, memories[row as usize].segments());
                        request.tag.row = row;
                        channel.submit(request).unwrap();
                    }
                    channel.poll(Moment(0), &mut completions);
                    done += completions.len();
                    next.extend(completions.drain(..).map(|completion| completion.tag.row));
                }
                let own = Moment::now().ns_since(begin) as f64 / done as f64;
                while channel.in_flight() > 0 {
                    channel.poll(Moment(0), &mut completions);
                }
                completions.clear();
                println!(
                    "{copies}, depth {depth}, {operation:?}: {:.0} thousand a second ({own:.0} ns); one call each {call:.0} ns",
                    1e6 / own
                );
            }
        }
    }
}
