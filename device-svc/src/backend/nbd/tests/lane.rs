//! A lane for tests: memory, tags, and the habit of holding requests while the server is away.
#![expect(unsafe_code, reason = "lends memory to a channel")]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::address::CardAddress;
use crate::backend::{BlockChannel, BlockFault, BlockOperation, BlockRequest, Completion, Segments, Tag};
use crate::clock::Moment;
use crate::dma::CardMemory;

/// How long a test waits for what must come.
pub(super) const BOUND: Duration = Duration::from_secs(30);

pub(super) struct Lane {
    // First, so that it is dropped before what it borrows.
    pub(super) channel: Box<dyn BlockChannel>,
    memory: CardMemory,
    lists: Vec<Box<[libc::iovec]>>,
    slot_bytes: usize,
    held: VecDeque<BlockRequest>,
    under_way: VecDeque<BlockRequest>,
    results: Vec<Option<Result<(), BlockFault>>>,
    completions: Vec<Completion>,
    /// Whether `Away` is a reason to try again, as for a guest, or a result.
    pub(super) holds: bool,
    pub(super) away: usize,
}

impl Lane {
    pub(super) fn new(channel: Box<dyn BlockChannel>, slots: usize, slot_bytes: usize) -> Self {
        Self {
            channel,
            memory: CardMemory::new((slots * slot_bytes) as u32).unwrap(),
            lists: (0..slots).map(|_| Box::default()).collect(),
            slot_bytes,
            held: VecDeque::new(),
            under_way: VecDeque::new(),
            results: vec![None; slots],
            completions: Vec::new(),
            holds: true,
            away: 0,
        }
    }

    fn segments(&mut self, slot: usize, length: usize) -> Segments {
        let base = slot * self.slot_bytes;
        // Odd pieces, so that headers and payload are cut where nobody expects it.
        let cuts = [0, length / 7, length / 7, length / 2 + 1, length];
        let list: Vec<_> = cuts
            .windows(2)
            .map(|cut| libc::iovec {
                iov_base: self.memory.pointer(CardAddress((base + cut[0]) as u32), cut[1] - cut[0]).cast(),
                iov_len: cut[1] - cut[0],
            })
            .collect();
        self.lists[slot] = list.into_boxed_slice();
        // SAFETY: the list is boxed and replaced only when its slot is used again, after the completion; the memory is
        // mapped and hands out no references.
        unsafe { Segments::new(self.lists[slot].as_ptr(), 4) }
    }

    pub(super) fn put(&self, slot: usize, data: &[u8]) {
        self.memory.copy_in(CardAddress((slot * self.slot_bytes) as u32), data);
    }

    pub(super) fn get(&self, slot: usize, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.copy_out(CardAddress((slot * self.slot_bytes) as u32), &mut data);
        data
    }

    /// Submits, or holds until there is room.
    pub(super) fn start(&mut self, slot: usize, operation: BlockOperation, offset: u64, length: usize) {
        let segments = match operation {
            BlockOperation::Read | BlockOperation::Write => self.segments(slot, length),
            _ => Segments::NONE,
        };
        self.results[slot] = None;
        let tag = Tag { lane: 7, row: slot as u32 };
        self.held.push_back(BlockRequest { tag, operation, offset, length: length as u64, segments });
    }

    /// One turn of a reactor that sleeps.
    pub(super) fn turn(&mut self) {
        while let Some(request) = self.held.pop_front() {
            match self.channel.submit(request) {
                Ok(()) => self.under_way.push_back(request),
                Err(request) => {
                    self.held.push_front(request);
                    break;
                }
            }
        }
        self.channel.poll(Moment::now(), &mut self.completions);
        self.take_completions();
    }

    /// Cuts the channel off.
    pub(super) fn cut_off(&mut self, now: Moment) {
        self.channel.cut_off(now, &mut self.completions);
        self.take_completions();
    }

    fn take_completions(&mut self) {
        let mut again = Vec::new();
        for completion in std::mem::take(&mut self.completions) {
            let at = self.under_way.iter().position(|request| request.tag == completion.tag).unwrap();
            if completion.result == Err(BlockFault::Away) && self.holds {
                self.away += 1;
                again.push(completion.tag);
            } else {
                self.under_way.remove(at);
                self.results[completion.tag.row as usize] = Some(completion.result);
            }
        }
        // In the order in which they were first submitted, before what has not been submitted yet.
        for at in (0..self.under_way.len()).rev() {
            if again.contains(&self.under_way[at].tag) {
                let request = self.under_way.remove(at).unwrap();
                self.held.push_front(request);
            }
        }
        assert_eq!(self.channel.in_flight(), self.under_way.len());
    }

    pub(super) fn sleep(&self) {
        let fd = self.channel.wake_fd().unwrap();
        // SAFETY: the channel keeps its descriptor open for its life, which is longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let bound = PollTimeout::try_from(BOUND).unwrap();
        let woken = nix::poll::poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], bound).unwrap();
        assert_eq!(woken, 1, "nothing woke the lane");
    }

    pub(super) fn until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        loop {
            self.turn();
            if done(self) {
                return;
            }
            assert!(start.elapsed() < BOUND, "what must come did not: {} in flight", self.channel.in_flight());
            if self.held.is_empty() || self.channel.in_flight() == 0 {
                self.sleep();
            }
        }
    }

    pub(super) fn result(&self, slot: usize) -> Option<Result<(), BlockFault>> {
        self.results[slot]
    }

    pub(super) fn run(&mut self, operation: BlockOperation, offset: u64, length: usize) -> Result<(), BlockFault> {
        self.start(0, operation, offset, length);
        self.until(|lane| lane.results[0].is_some());
        self.results[0].unwrap()
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), BlockFault> {
        self.put(0, data);
        self.run(BlockOperation::Write, offset, data.len())
    }

    pub(super) fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, BlockFault> {
        self.put(0, &vec![0x5a; length]);
        self.run(BlockOperation::Read, offset, length)?;
        Ok(self.get(0, length))
    }

    pub(super) fn finish(&mut self) {
        self.until(|lane| lane.held.is_empty() && lane.under_way.is_empty());
    }
}
