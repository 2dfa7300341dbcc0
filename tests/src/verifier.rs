//! A driver that knows what its disk must hold, and outlives the card's service.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_svc::driver::block::BlockQueue;
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};
use device_svc::driver::vhost_user::{FrontEnd, InflightRecord};
use device_svc::driver::{FrontEndError, GuestMemory, QueueEvents, QueueOptions};
use device_svc::virtqueue::features;

const QUEUE_SIZE: u16 = 64;
const ROWS: u32 = 20;
const BLOCK_BYTES: u32 = 4096;
const SECTORS: u64 = BLOCK_BYTES as u64 / 512;
/// How long nothing may end.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// What a row waits for.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    Write(u64),
    Read(u64),
}

/// How a front end connects.
type Connect = fn(&Path, u64, Arc<GuestMemory>) -> Result<FrontEnd, FrontEndError>;

/// How it reaches the card.
enum Link {
    /// It connects again, and may have the record.
    VhostUser { front_end: Box<FrontEnd>, record: Option<InflightRecord>, connect: Connect },
    /// Its connection outlives the card.
    VfioUser(Box<VfioUserDevice>),
}

/// A driver that outlives its connections: each of twenty rows writes numbers to a block of 4 KiB of its own, and reads them back. Every
/// method panics when a request ends with an error, twice, or with other bytes than were written last.
pub struct Verifier {
    memory: Arc<GuestMemory>,
    link: Link,
    queue: BlockQueue,
    events: QueueEvents,
    rows: Vec<Option<Awaited>>,
    /// The number in each row's block.
    blocks: Vec<u64>,
    number: u64,
    ended: u64,
    random: u64,
}

impl Verifier {
    /// A driver at a vhost-user socket; the card offers it the record of requests in flight. Of `wanted` feature bits those are used that
    /// are offered.
    pub fn connect(socket: &Path, wanted: u64) -> Self {
        Self::connect_by_vhost_user(FrontEnd::connect, socket, wanted, true)
    }

    /// As [`connect`](Self::connect), of a front end that keeps no record.
    pub fn connect_without_record(socket: &Path, wanted: u64) -> Self {
        Self::connect_by_vhost_user(FrontEnd::connect, socket, wanted, false)
    }

    /// As [`connect`](Self::connect), to a card whose queues hand over when they stop.
    pub fn connect_to_hand_over(socket: &Path, wanted: u64) -> Self {
        Self::connect_by_vhost_user(FrontEnd::connect_to_hand_over, socket, wanted, true)
    }

    fn connect_by_vhost_user(connect: Connect, socket: &Path, wanted: u64, has_record: bool) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let mut front_end = connect(socket, wanted, Arc::clone(&memory)).unwrap();
        let record = has_record.then(|| front_end.make_record(1, QUEUE_SIZE).unwrap());
        record.iter().for_each(|record| front_end.hand_over_record(record).unwrap());
        let mut queue = Self::queue(&memory, front_end.accepted());
        let events = front_end.start_queue(0, QUEUE_SIZE, queue.queue()).unwrap();
        let link = Link::VhostUser { front_end: Box::new(front_end), record, connect };
        Self::new(memory, link, queue, events)
    }

    /// A VMM and driver at a vfio-user socket.
    pub fn connect_by_vfio_user(socket: &Path, wanted: u64, sharing: Sharing) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let mut device = VfioUserDevice::connect(socket, wanted, Arc::clone(&memory), sharing).unwrap();
        let mut queue = Self::queue(&memory, device.accepted());
        let events = device.start_queue(0, QUEUE_SIZE, queue.queue()).unwrap();
        Self::new(memory, Link::VfioUser(Box::new(device)), queue, events)
    }

    fn queue(memory: &Arc<GuestMemory>, accepted: u64) -> BlockQueue {
        let options = QueueOptions { size: QUEUE_SIZE, features: accepted, indirect: false };
        BlockQueue::new(memory, options, ROWS, BLOCK_BYTES)
    }

    fn new(memory: Arc<GuestMemory>, link: Link, queue: BlockQueue, events: QueueEvents) -> Self {
        Self {
            memory,
            link,
            queue,
            events,
            rows: vec![None; ROWS as usize],
            blocks: vec![0; ROWS as usize],
            number: 0,
            ended: 0,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Comes again after the card's end, if it has to: same memory, same rings, same record if it has one.
    pub fn reconnect(&mut self, socket: &Path) {
        let Link::VhostUser { front_end, record, connect } = &mut self.link else { return };
        let wanted = front_end.accepted();
        // A service that the keeper has started may not listen yet.
        crate::wait_for("the card to listen", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        **front_end = connect(socket, wanted, Arc::clone(&self.memory)).unwrap();
        assert_eq!(front_end.accepted(), wanted);
        record.iter().for_each(|record| front_end.hand_over_record(record).unwrap());
        self.events = front_end.start_queue(0, QUEUE_SIZE, self.queue.queue()).unwrap();
    }

    /// Has the card stop the queue.
    pub fn stop(&mut self) {
        match &mut self.link {
            Link::VhostUser { front_end, .. } => drop(front_end.stop_queue(0).unwrap()),
            Link::VfioUser(device) => device.reset().unwrap(),
        }
    }

    /// Has the card stop the queue, and takes what has ended. Returns how many requests the card had and leaves to the record, by the
    /// base that it says.
    pub fn hand_over(&mut self) -> u32 {
        let Link::VhostUser { front_end, .. } = &mut self.link else { panic!("only over vhost-user") };
        let (base, packed) = (front_end.stop_queue(0).unwrap(), front_end.accepted() & features::RING_PACKED != 0);
        self.take();
        if !packed {
            return base.wrapping_sub(self.ended as u32) & 0xffff;
        }
        // Slots, and above them the laps' parity, of the next available and the next used descriptor; three for each request.
        let (available, used) = (base & 0xffff, base >> 16);
        let lap = if (available ^ used) >> 15 == 0 { 0 } else { u32::from(QUEUE_SIZE) };
        ((available & 0x7fff) + lap - (used & 0x7fff)) / 3
    }

    /// A random number below `limit`.
    pub const fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    /// A request for each row that has none.
    pub fn fill(&mut self) {
        for row in 0..ROWS {
            if self.rows[row as usize].is_some() {
                continue;
            }
            let (data, sector) = (self.queue.data_at(row), u64::from(row) * SECTORS);
            let write = self.below(2) == 0;
            let (added, awaited) = if write {
                self.number += 1;
                self.memory.copy_in(data, &self.number.to_ne_bytes().repeat(BLOCK_BYTES as usize / 8));
                (self.queue.write(row, sector, BLOCK_BYTES), Awaited::Write(self.number))
            } else {
                self.memory.copy_in(data, &[0xff; BLOCK_BYTES as usize]);
                (self.queue.read(row, sector, BLOCK_BYTES), Awaited::Read(self.blocks[row as usize]))
            };
            assert!(added, "the queue has room for every row");
            self.rows[row as usize] = Some(awaited);
        }
        if self.queue.publish() {
            self.events.ring();
        }
    }

    /// Takes what has ended. A row that ends twice ends without a request, or the ring does not know its chain.
    pub fn take(&mut self) -> bool {
        let mut any = false;
        while let Some(ended) = self.queue.take_ended() {
            let row = ended.row as usize;
            match self.rows[row].take() {
                None => panic!("row {row} ended twice"),
                Some(awaited) => {
                    assert_eq!(ended.status, 0, "{awaited:?} of row {row}");
                    match awaited {
                        Awaited::Write(number) => self.blocks[row] = number,
                        Awaited::Read(number) => self.check_data(ended.row, number),
                    }
                }
            }
            self.ended += 1;
            any = true;
        }
        any
    }

    fn check_data(&self, row: u32, number: u64) {
        let mut data = vec![0; BLOCK_BYTES as usize];
        self.memory.copy_out(self.queue.data_at(row), &mut data);
        let first = u64::from_ne_bytes(data[..8].try_into().unwrap());
        let is_whole = data == first.to_ne_bytes().repeat(BLOCK_BYTES as usize / 8);
        assert!(is_whole && first == number, "row {row} reads {first} (all of it: {is_whole}), not {number}");
    }

    /// Goes on until so many more requests have ended; with `more`, each is replaced by another.
    pub fn go_on(&mut self, requests: u64, more: bool) {
        let until = self.ended + requests;
        let mut since = Instant::now();
        while self.ended < until {
            if self.take() {
                since = Instant::now();
                if more {
                    self.fill();
                }
            } else {
                assert!(since.elapsed() < SILENCE_MAX, "nothing ends; {:?}", self.rows);
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Requests that have not ended.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.queue.in_flight()
    }

    /// Lets all requests end, stops the queue, and compares the disk, a file.
    pub fn finish(&mut self, disk: &Path) {
        self.go_on(u64::from(self.in_flight()), false);
        assert_eq!(self.in_flight(), 0);
        self.stop();
        let disk = std::fs::read(disk).unwrap();
        for (row, number) in self.blocks.iter().enumerate() {
            let at = row * BLOCK_BYTES as usize;
            assert_eq!(&disk[at..at + 8], number.to_ne_bytes(), "the block of row {row} on the disk");
        }
    }
}
