#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The card's service is killed at any moment and started again. Over vhost-user its front end keeps the record of what was in flight
//! and hands it back; over vfio-user a keeper has it, and the connection. Nobody sees an error, nothing is lost, nothing is done twice.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_svc::driver::block::BlockQueue;
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};
use device_svc::driver::vhost_user::{FrontEnd, InflightRecord};
use device_svc::driver::{GuestMemory, QueueEvents, QueueOptions};
use device_svc::virtqueue::features;
use nix::sys::signal::Signal;
use tests::{Card, CardSettings, Process, boot_guest, rig, rounds, wait_for};

const DISK: &str = r#"
[[volume]]
name = "v"
backend = { type = "file", path = "@/disk", create = "64M" }
[[function]]
name = "f"
type = "blk"
link = { type = "vhost-user", socket = "@/f.sock" }
volume = "v"
"#;

const QUEUE_SIZE: u16 = 64;
const ROWS: u32 = 20;
const BLOCK_BYTES: u32 = 4096;
const SECTORS: u64 = BLOCK_BYTES as u64 / 512;
/// How long nothing may end.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The same over vfio-user.
fn vfio_user_disk(more: &str) -> CardSettings {
    let link = format!("vfio-user\", socket = \"@/f.sock\"{more}");
    let parts = DISK.replace("vhost-user\", socket = \"@/f.sock\"", &link);
    CardSettings { parts, keeper: true, ..CardSettings::default() }
}

/// What a row waits for.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    Write(u64),
    Read(u64),
}

/// How it reaches the card.
enum Link {
    /// It connects again, and has the record.
    VhostUser(Box<FrontEnd>, InflightRecord),
    /// Its connection outlives the card.
    VfioUser(Box<VfioUserDevice>),
}

/// A guest that outlives its connections: each row writes numbers to a block of its own, and reads them back.
struct Verifier {
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
    fn connect(socket: &Path, wanted: u64) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let mut front_end = FrontEnd::connect(socket, wanted, Arc::clone(&memory)).unwrap();
        let record = front_end.make_record(1, QUEUE_SIZE).unwrap();
        front_end.hand_over_record(&record).unwrap();
        let mut queue = Self::queue(&memory, front_end.accepted());
        let events = front_end.start_queue(0, QUEUE_SIZE, queue.queue()).unwrap();
        Self::new(memory, Link::VhostUser(Box::new(front_end), record), queue, events)
    }

    fn connect_by_vfio_user(socket: &Path, wanted: u64, sharing: Sharing) -> Self {
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

    /// Comes again after the card's end, if it has to: same memory, same rings, same record.
    fn reconnect(&mut self, socket: &Path) {
        let Link::VhostUser(front_end, record) = &mut self.link else { return };
        let wanted = front_end.accepted();
        **front_end = FrontEnd::connect(socket, wanted, Arc::clone(&self.memory)).unwrap();
        assert_eq!(front_end.accepted(), wanted);
        front_end.hand_over_record(record).unwrap();
        self.events = front_end.start_queue(0, QUEUE_SIZE, self.queue.queue()).unwrap();
    }

    fn stop(&mut self) {
        match &mut self.link {
            Link::VhostUser(front_end, _) => drop(front_end.stop_queue(0).unwrap()),
            Link::VfioUser(device) => device.reset().unwrap(),
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    /// A request for each row that has none.
    fn fill(&mut self) {
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
    fn take(&mut self) -> bool {
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
        assert!(data == number.to_ne_bytes().repeat(BLOCK_BYTES as usize / 8), "row {row} does not read {number}");
    }

    /// Goes on until so many more requests have ended; with `more`, each is replaced by another.
    fn go_on(&mut self, requests: u64, more: bool) {
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
}

/// Kills the card in the middle of requests, again and again.
fn survive(mut card: Card, mut verifier: Verifier, kill: impl Fn(&mut Card)) {
    let socket = card.path("f.sock");
    let mut under_way = 0;
    for _ in 0..rounds(5, 50, 2000) {
        let requests = verifier.below(300);
        verifier.fill();
        verifier.go_on(requests, true);
        verifier.fill();
        // Somewhere in the twenty requests that were published just now.
        std::thread::sleep(Duration::from_micros(verifier.below(400)));
        kill(&mut card);
        verifier.take();
        under_way += verifier.queue.in_flight();
        verifier.reconnect(&socket);
    }
    assert!(under_way > 0, "the card was never killed with a request under way");
    let left = u64::from(verifier.queue.in_flight());
    verifier.go_on(left, false);
    assert_eq!(verifier.queue.in_flight(), 0);
    let stats = card.stats();
    assert_eq!(stats["functions"][0]["errors"], 0, "{stats}");
    verifier.stop();
    let disk = std::fs::read(card.path("disk")).unwrap();
    for (row, number) in verifier.blocks.iter().enumerate() {
        let at = row * BLOCK_BYTES as usize;
        assert_eq!(&disk[at..at + 8], number.to_ne_bytes(), "the block of row {row} on the disk");
    }
}

fn survive_over_vhost_user(wanted: u64) {
    let card = Card::start(&CardSettings { parts: DISK.to_owned(), ..CardSettings::default() });
    let verifier = Verifier::connect(&card.path("f.sock"), wanted);
    survive(card, verifier, |card| card.restart(Signal::SIGKILL));
}

fn survive_over_vfio_user(wanted: u64, sharing: Sharing, more: &str) {
    let card = Card::start(&vfio_user_disk(more));
    let verifier = Verifier::connect_by_vfio_user(&card.path("f.sock"), wanted, sharing);
    survive(card, verifier, |card| {
        let service = card.service_id();
        card.kill_service(Signal::SIGKILL);
        wait_for("another service", || card.service_id().is_some_and(|id| Some(id) != service));
    });
}

#[test]
fn a_card_that_is_killed_loses_nothing_of_a_split_ring() {
    survive_over_vhost_user(features::EVENT_INDEX);
}

#[test]
fn a_card_that_is_killed_loses_nothing_of_a_packed_ring() {
    survive_over_vhost_user(features::EVENT_INDEX | features::RING_PACKED);
}

#[test]
fn a_vmm_on_vfio_user_does_not_notice_that_the_service_is_killed() {
    survive_over_vfio_user(features::EVENT_INDEX, Sharing::Whole, "");
    survive_over_vfio_user(features::EVENT_INDEX | features::RING_PACKED, Sharing::Pages, "");
}

#[test]
fn a_vmm_on_vfio_user_that_shares_no_memory_does_not_notice_either() {
    survive_over_vfio_user(features::EVENT_INDEX, Sharing::Messages, "");
    survive_over_vfio_user(features::EVENT_INDEX | features::RING_PACKED, Sharing::Messages, "");
}

#[test]
fn a_guest_goes_on_over_a_kill() {
    if rig().is_none() {
        return;
    }
    for more in ["", ",packed=on"] {
        let mut card = Card::start(&CardSettings { parts: DISK.to_owned(), ..CardSettings::default() });
        let job = "for i in $(seq 1 24); do
                dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null
                dd if=/tmp/a of=/dev/vda bs=64k seek=$i conv=fsync 2>/dev/null || exit 1
                echo 3 >/proc/sys/vm/drop_caches
                dd if=/dev/vda of=/tmp/b bs=64k skip=$i count=16 2>/dev/null || exit 1
                cmp /tmp/a /tmp/b || exit 1
                echo ROUND $i
            done";
        let chardev = format!("socket,id=c0,path={},reconnect-ms=100", card.path("f.sock").display());
        let device = format!("vhost-user-blk-pci,chardev=c0,num-queues=1{more}");
        let mut guest: Process = boot_guest(&card, job, &["-chardev", &chardev, "-device", &device]);
        for round in ["ROUND 3\r", "ROUND 9\r", "ROUND 15\r"] {
            guest.wait_for_output(round);
            card.restart(Signal::SIGKILL);
        }
        let output = guest.succeed();
        assert!(output.contains("ROUND 24\r"), "{output}");
    }
}
