#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::*;
use crate::dma::{Mapping, Region};
use crate::driver::{DriverQueue, GuestMemory, QueueOptions};
use crate::inflight::{PackedRecord, SplitRecord};
use crate::link::vhost_user::port::EventPort;
use crate::link::{QueuePosition, QueueStart};
use crate::tether::{Answer, LANGUAGE_FILES, Question, receive, send};
use crate::virtqueue::features;
use crate::virtqueue::packed::Place;

const SIZE: u16 = 16;
const FILE: FileIdentity = FileIdentity { device: 1, inode: 2 };

/// A keeper of one file, for one service after another.
struct Keeper(Option<OwnedFd>);

impl Keeper {
    /// A service opens the record and is asked nothing more.
    fn open(&mut self) -> OwnRecord {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let mut file = self.0.take();
        let keeper: JoinHandle<Option<OwnedFd>> = std::thread::spawn(move || {
            let (asked, _) = receive::<Question>(&theirs).unwrap();
            assert_eq!(asked, Question::ClaimFile { function: "f".to_owned() });
            let answer = if file.is_some() { Answer::Done } else { Answer::Nothing };
            send(&theirs, &answer, &file.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
            if file.is_none() {
                let (asked, mut fds) = receive::<Question>(&theirs).unwrap();
                assert_eq!(asked, Question::KeepFile { function: "f".to_owned() });
                file = fds.pop();
                send(&theirs, &Answer::Done, &[]).unwrap();
            }
            file
        });
        let record = OwnRecord::open(&Arc::new(Tether::new(ours, false, LANGUAGE_FILES)), "f", 2, 64).unwrap();
        self.0 = keeper.join().unwrap();
        record
    }
}

/// A ring in a guest's memory, as it is started.
struct Bed {
    guest: Arc<GuestMemory>,
    memory: Arc<HostMemory>,
    queue: DriverQueue,
    packed: bool,
}

impl Bed {
    fn new(packed: bool) -> Self {
        let guest = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let mapping = Arc::new(Mapping::new(guest.file(), 0, guest.len()).unwrap());
        let memory = Arc::new(HostMemory::new([Region::new(guest.base(), guest.len(), mapping, 0).unwrap()]).unwrap());
        let features = if packed { features::RING_PACKED } else { 0 };
        let queue = DriverQueue::new(&guest, QueueOptions { size: SIZE, features, indirect: false });
        Self { guest, memory, queue, packed }
    }

    fn start(&self) -> QueueStart {
        let at = self.queue.addresses();
        QueueStart {
            index: 1,
            size: SIZE,
            descriptors: at.descriptors,
            driver: at.driver,
            device: at.device,
            position: QueuePosition::fresh(self.packed),
            features: if self.packed { features::RING_PACKED } else { 0 },
            port: Box::new(EventPort { kick: None, call: None }),
            inflight: None,
            is_resumed: false,
        }
    }

    fn attach(&self, own: &OwnRecord, start: &mut QueueStart, file: FileIdentity) -> bool {
        own.attach(start, self.packed, None, file, &self.memory).unwrap()
    }

    /// Whether the ring, as it is, goes on by this record.
    fn goes_on(&self, own: &OwnRecord) -> bool {
        self.attach(own, &mut self.start(), FILE)
    }

    /// Two requests are fetched, and the first of them is used.
    fn use_one(&self, own: &OwnRecord) {
        let mut start = self.start();
        assert!(!self.attach(own, &mut start, FILE), "the ring is new");
        let record = start.inflight.unwrap();
        if self.packed {
            let mut record = PackedRecord::new(&record, SIZE).unwrap();
            assert_eq!(record.attach(SIZE, Place { slot: 0, wrap: true }, 0), Ok(None));
            let descriptor = PackedDescriptor { address: 0x1_0000, length: 512, id: 0, flags: 0 };
            let entries = record.take(&[&[descriptor], &[descriptor]]);
            record.link(entries[..1].iter().copied(), Place { slot: 1, wrap: true });
            self.guest.put(start.descriptors, PackedDescriptor { address: 1, flags: AVAIL | USED, ..descriptor });
            record.complete(entries[..1].iter().copied());
        } else {
            let mut record = SplitRecord::new(&record);
            assert_eq!(record.attach(0, SIZE), Ok(None));
            record.mark([3, 4].into_iter());
            record.link(std::iter::once(3));
            self.guest.put(Iova(start.driver.0 + INDEX_AT), 2_u16);
            self.put_used(1);
            record.complete(std::iter::once(3), 1);
        }
    }

    fn put_used(&self, used: u16) {
        self.guest.put(Iova(self.start().device.0 + INDEX_AT), used);
    }
}

#[test]
fn a_ring_that_was_left_goes_on_with_another_service() {
    for packed in [false, true] {
        let (mut keeper, bed) = (Keeper(None), Bed::new(packed));
        bed.use_one(&keeper.open());
        let own = keeper.open();
        let mut start = bed.start();
        assert!(bed.attach(&own, &mut start, FILE));
        let record = start.inflight.unwrap();
        if packed {
            let mut record = PackedRecord::new(&record, SIZE).unwrap();
            let (place, left) = record.attach(SIZE, Place { slot: 0, wrap: true }, 0).unwrap().unwrap();
            assert_eq!((place, left.len()), (Place { slot: 1, wrap: true }, 1));
        } else {
            assert_eq!(SplitRecord::new(&record).attach(1, SIZE), Ok(Some(vec![4])));
        }
    }
}

#[test]
fn a_ring_that_begins_anew_is_none_that_was_left() {
    for packed in [false, true] {
        let (mut keeper, bed) = (Keeper(None), Bed::new(packed));
        bed.use_one(&keeper.open());
        // The guest has reset the device while nobody was there, and uses the same places again.
        let at = if packed { bed.start().descriptors } else { bed.start().device };
        bed.guest.copy_in(at, &[0; 16 * SIZE as usize]);
        assert!(!bed.goes_on(&keeper.open()));
        // From then on nothing is known of what was before.
        if !packed {
            bed.put_used(1);
        }
        assert!(!bed.goes_on(&keeper.open()));
    }
}

#[test]
fn another_ring_is_none_that_was_left() {
    for packed in [false, true] {
        for change in [
            |start: &mut QueueStart, _: &mut FileIdentity| start.descriptors.0 += 4096,
            |start: &mut QueueStart, _: &mut FileIdentity| start.driver.0 += 4096,
            |start: &mut QueueStart, _: &mut FileIdentity| start.size /= 2,
            |start: &mut QueueStart, _: &mut FileIdentity| start.index = 0,
            |_: &mut QueueStart, file: &mut FileIdentity| file.inode += 1,
            |_: &mut QueueStart, file: &mut FileIdentity| file.device += 1,
        ] {
            let (mut keeper, bed) = (Keeper(None), Bed::new(packed));
            bed.use_one(&keeper.open());
            let (mut start, mut file) = (bed.start(), FILE);
            change(&mut start, &mut file);
            assert!(!bed.attach(&keeper.open(), &mut start, file));
            // One of the other kind has an area of its own.
            assert!(!Bed { packed: !packed, ..Bed::new(packed) }.goes_on(&keeper.open()));
        }
    }
}

#[test]
fn a_ring_that_somebody_else_has_used_since_is_none_that_was_left() {
    let (mut keeper, bed) = (Keeper(None), Bed::new(false));
    bed.use_one(&keeper.open());
    bed.put_used(2 + SIZE);
    assert!(!bed.goes_on(&keeper.open()));
}

#[test]
fn a_used_index_of_zero_is_the_beginning_only_at_the_beginning() {
    // As many as the ring holds may all be in flight; of more, some have ended.
    for (fetched, goes_on) in [(SIZE, false), (SIZE + 1, true)] {
        let (mut keeper, bed) = (Keeper(None), Bed::new(false));
        let mut start = bed.start();
        bed.put_used(u16::MAX);
        assert!(!bed.attach(&keeper.open(), &mut start, FILE));
        let mut record = SplitRecord::new(&start.inflight.unwrap());
        assert_eq!(record.attach(u16::MAX, SIZE), Ok(None));
        for _ in 0..fetched {
            record.mark([3].into_iter());
        }
        record.link(std::iter::once(3));
        bed.put_used(0);
        assert_eq!(bed.goes_on(&keeper.open()), goes_on, "{fetched} were fetched");
    }
}

#[test]
fn a_ring_in_which_less_is_available_than_was_in_flight_is_none_that_was_left() {
    let (mut keeper, bed) = (Keeper(None), Bed::new(false));
    bed.use_one(&keeper.open());
    bed.guest.put(Iova(bed.start().driver.0 + INDEX_AT), 1_u16);
    assert!(!bed.goes_on(&keeper.open()));
}

#[test]
fn a_packed_ring_that_is_full_of_its_third_lap_goes_on() {
    let (mut keeper, bed) = (Keeper(None), Bed::new(true));
    let own = keeper.open();
    let mut start = bed.start();
    assert!(!bed.attach(&own, &mut start, FILE));
    let mut record = PackedRecord::new(&start.inflight.unwrap(), SIZE).unwrap();
    let mut place = Place { slot: 0, wrap: true };
    assert_eq!(record.attach(SIZE, place, 0), Ok(None));
    let descriptor = PackedDescriptor { address: 0x1_0000, length: 512, id: 0, flags: AVAIL };
    // One is in flight all the time, and others pass it for two laps.
    record.take(&[&[descriptor]]);
    for _ in 0..2 * SIZE {
        let entry = record.take(&[&[descriptor]])[0];
        place = place.advance(1, SIZE);
        record.link(std::iter::once(entry), place);
        record.complete(std::iter::once(entry));
    }
    record.take(&[&[descriptor]]);
    assert_eq!(place, Place { slot: 0, wrap: true });
    for slot in 0..SIZE {
        bed.guest.put(Iova(start.descriptors.0 + 16 * u64::from(slot)), descriptor);
    }
    assert!(bed.goes_on(&keeper.open()));
    // A ring that begins anew is not full at once, or nobody was there for long.
    bed.guest.put(start.descriptors, PackedDescriptor::default());
    assert!(!bed.goes_on(&keeper.open()));
}

#[test]
fn a_reset_forgets_what_was_in_flight() {
    for packed in [false, true] {
        let (mut keeper, bed) = (Keeper(None), Bed::new(packed));
        let own = keeper.open();
        bed.use_one(&own);
        own.forget();
        assert!(!bed.goes_on(&keeper.open()));
    }
}

#[test]
fn a_ring_that_was_stopped_in_good_order_is_known_whatever_it_looks_like() {
    let (mut keeper, bed) = (Keeper(None), Bed::new(false));
    let own = keeper.open();
    let mut start = bed.start();
    assert!(!bed.attach(&own, &mut start, FILE));
    let mut record = SplitRecord::new(start.inflight.as_ref().unwrap());
    assert_eq!(record.attach(0, SIZE), Ok(None));
    record.mark([3].into_iter());
    // Nothing was used: requests wait for a server that is away.
    assert!(own.attach(&mut bed.start(), false, Some(true), FILE, &bed.memory).unwrap());
    assert!(!own.attach(&mut bed.start(), false, Some(false), FILE, &bed.memory).unwrap());
}

#[test]
fn a_file_of_another_shape_is_not_taken() {
    let mut keeper = Keeper(Some(File::from(memfd_create(c"other", MFdFlags::MFD_CLOEXEC).unwrap()).into()));
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let file = keeper.0.take().unwrap();
    let service = std::thread::spawn(move || {
        OwnRecord::open(&Arc::new(Tether::new(ours, false, LANGUAGE_FILES)), "f", 2, 64).unwrap()
    });
    receive::<Question>(&theirs).unwrap();
    send(&theirs, &Answer::Done, &[file.as_fd()]).unwrap();
    let (asked, fds) = receive::<Question>(&theirs).unwrap();
    assert_eq!((asked, fds.len()), (Question::KeepFile { function: "f".to_owned() }, 1));
    send(&theirs, &Answer::Done, &[]).unwrap();
    service.join().unwrap();
}
