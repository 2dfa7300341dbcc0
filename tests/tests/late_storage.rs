#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Storage that completes late, under a service that is killed: what the dead process had issued lands long after its end. Until then
//! the next service issues nothing, and ends nothing; so nothing old can overwrite what is newer.
//!
//! All of it is in a guest, whose kernel has a disk that completes late (see `LateDisk`): the card, its keeper, and a driver on
//! vfio-user, which is this very program, started again in the guest. The disk has three roads to the same place. Writes go by a late
//! one; the service is killed while the device has them; what the driver writes once they have ended goes by a road that overtakes.
//! One road is late by less than a start waits for a file, one by more: then the volume has failed for a while.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use device_svc::driver::block::BlockQueue;
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};
use device_svc::driver::{GuestMemory, QueueEvents, QueueOptions};
use device_svc::virtqueue::features;
use nix::sys::signal::Signal;
use tests::{Archive, Card, CardSettings, GuestSettings, LateDisk, program, rig, rounds, wait_for};

/// Blocks that are written. Each has two rows of the queue, of which the second has what goes at once.
const BLOCKS: u32 = 16;
const ROWS: u32 = 2 * BLOCKS;
const BLOCK_BYTES: usize = 4096;
const SECTORS: u64 = BLOCK_BYTES as u64 / 512;
const DISK_BYTES: u64 = 1 << 20;
/// The roads: how late each is, ms.
const ROADS_MS: [u64; 3] = [1000, 4000, 0];
const AT_ONCE: usize = 2;
/// `VIRTIO_BLK_F_FLUSH`: without it the card would flush after each write, and the device delays flushes too.
const FLUSH: u64 = 1 << 9;
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;

/// Tells the program that it is in the guest, and what its disk is.
const IN_GUEST: &str = "DRAY_TEST_LATE_DISK";

#[test]
fn nothing_of_a_dead_service_lands_late() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let archive = Archive::new(folder.path());
    archive.add_module(&rig, "dm-mod");
    archive.add_module(&rig, "dm-delay");
    archive.add_program(&program("device-svc"), "device-svc");
    archive.add_program(&std::env::current_exe().unwrap(), "late_storage");
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();

    let rounds = rounds(1, 5, 20);
    let job = format!(
        "set -e
        insmod /lib/modules/dm-mod.ko
        insmod /lib/modules/dm-delay.ko
        export DRAY_BIN=/bin DRAY_TEST_ROUNDS={rounds} {IN_GUEST}=/dev/vda
        late_storage --exact in_the_guest --ignored --nocapture",
    );
    let drive = format!("file={},format=raw,if=none,id=d", disk.display());
    let arguments = ["-drive", &drive, "-device", "virtio-blk-pci,drive=d"];
    let settings = GuestSettings::new(folder.path(), &job, &arguments);
    let limit = Duration::from_secs(100 + 60 * u64::from(rounds));
    let guest = GuestSettings { memory_mib: 512, archive: Some(&archive.pack()), limit, ..settings }.boot();
    let output = guest.succeed();
    assert!(output.contains("1 passed"), "{output}");
    println!("{output}");
}

/// What the test above runs in its guest.
#[test]
#[ignore = "is run by another test, in its guest"]
fn in_the_guest() {
    let under = std::env::var(IN_GUEST).expect("this is for a guest, whose disk it overwrites");
    let rounds: u32 = std::env::var("DRAY_TEST_ROUNDS").unwrap().parse().unwrap();
    let late = LateDisk::new(Path::new(&under), DISK_BYTES, &ROADS_MS.map(Duration::from_millis));
    for recovery in ["reissue", "fail"] {
        let parts = format!(
            r#"
[[volume]]
name = "v"
backend = {{ type = "file", path = "{}" }}
recovery = "{recovery}"
[[function]]
name = "f"
type = "blk"
link = {{ type = "vfio-user", socket = "@/f.sock" }}
volume = "v"
"#,
            late.path().display()
        );
        let card = Card::start(&CardSettings { parts, keeper: true, ..CardSettings::default() });
        let mut driver = Driver::connect(&card.path("f.sock"));
        let mut killed = 0;
        for _ in 0..rounds {
            for road in 0..AT_ONCE {
                let held = driver.is_killed_under_way(&card, &late, road, recovery);
                println!("{recovery}, road {road}: {held} writes were held when the service had died");
                killed += u32::from(held > 0);
            }
        }
        assert!(killed > 0, "the service was never killed with a write under way");
        let said = card.output();
        let waited = said.matches("was in use, and was waited for").count();
        let failed = said.matches("the volume that had failed is there again").count();
        assert!(waited + failed > 0, "no service ever met what the one before had under way");
        assert!(failed <= rounds as usize, "what is late by less than a start waits for has failed");
    }
}

/// A driver that writes numbers to blocks.
struct Driver {
    memory: Arc<GuestMemory>,
    device: VfioUserDevice,
    queue: BlockQueue,
    events: QueueEvents,
    /// Which rows wait for the end of a request.
    waits: [bool; ROWS as usize],
    number: u64,
}

impl Driver {
    fn connect(socket: &Path) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let wanted = features::EVENT_INDEX | FLUSH;
        let mut device = VfioUserDevice::connect(socket, wanted, Arc::clone(&memory), Sharing::Whole).unwrap();
        let options = QueueOptions { size: 64, features: device.accepted(), indirect: false };
        let mut queue = BlockQueue::new(&memory, options, ROWS, BLOCK_BYTES as u32);
        let events = device.start_queue(0, 64, queue.queue()).unwrap();
        Self { memory, device, queue, events, waits: [false; ROWS as usize], number: 0 }
    }

    /// Writes the next number to each block, by way of a road.
    fn write(&mut self, late: &LateDisk, road: usize) {
        self.number += 1;
        for block in 0..BLOCKS {
            let row = if road == AT_ONCE { BLOCKS + block } else { block };
            self.memory.copy_in(self.queue.data_at(row), &self.number.to_ne_bytes().repeat(BLOCK_BYTES / 8));
            let sector = late.road_sector(road) + u64::from(block) * SECTORS;
            assert!(self.queue.write(row, sector, BLOCK_BYTES as u32));
            self.waits[row as usize] = true;
        }
        if self.queue.publish() {
            self.events.ring();
        }
    }

    /// Takes what has ended: the status of each request.
    fn take(&mut self) -> Vec<u8> {
        let mut statuses = Vec::new();
        while let Some(ended) = self.queue.take_ended() {
            assert!(std::mem::take(&mut self.waits[ended.row as usize]), "row {} ended twice", ended.row);
            statuses.push(ended.status);
        }
        statuses
    }

    /// Whether the number written last has landed in every block.
    fn has_landed(&self, late: &LateDisk) -> bool {
        let blocks = late.landed(BLOCKS as usize * BLOCK_BYTES);
        blocks.chunks(8).all(|number| number == self.number.to_ne_bytes())
    }

    /// Writes by a late road, and kills the service while the device has the writes; sees the next one end them, and writes once more,
    /// at once. Returns how many writes the device had when the service had died.
    fn is_killed_under_way(&mut self, card: &Card, late: &LateDisk, road: usize, recovery: &str) -> u32 {
        self.write(late, road);
        // All that has not ended is the device's now.
        wait_for("the device to have all", || {
            assert!(self.take().iter().all(|&status| status == STATUS_OK));
            late.writes_held() == self.queue.in_flight()
        });
        let service = card.service_id();
        card.kill_service(Signal::SIGKILL);
        wait_for("another service", || card.service_id().is_some_and(|id| Some(id) != service));
        let held = late.writes_held();
        let wanted = if recovery == "fail" { STATUS_IO_ERROR } else { STATUS_OK };
        // If it was a near thing, the dead service has ended some of them.
        assert!(self.take().iter().all(|&status| status == STATUS_OK || status == wanted));
        wait_for("the end of all that was under way", || {
            // What is issued again meets nothing that was issued before: no block is written twice at a time.
            let (held, in_flight) = (late.writes_held(), self.queue.in_flight());
            assert!(held <= in_flight, "the device has {held} writes for {in_flight} requests");
            let statuses = self.take();
            if !statuses.is_empty() {
                assert!(self.has_landed(late), "a request ended before what was issued before had landed");
                assert!(statuses.iter().all(|&status| status == wanted), "{statuses:?}");
            }
            self.queue.in_flight() == 0
        });

        // The memory of what has ended is for something else now.
        for row in 0..BLOCKS {
            self.memory.copy_in(self.queue.data_at(row), &[0xff; BLOCK_BYTES]);
        }
        self.write(late, AT_ONCE);
        wait_for("the writes that overtake", || {
            assert!(self.take().iter().all(|&status| status == STATUS_OK));
            self.queue.in_flight() == 0
        });
        wait_for("the device to be idle", || late.writes_held() == 0);
        assert!(self.has_landed(late), "the disk does not have what was written last");
        held
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The card that is stopped next has nothing under way.
        let _ = self.device.reset();
    }
}
