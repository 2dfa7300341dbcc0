#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! A vfio-user client that is not ours walks the function and does block I/O through it, without a VM.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use device_svc::driver::block::BlockQueue;
use device_svc::driver::{GuestMemory, QueueOptions};
use device_svc::virtqueue::features;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use tests::{Card, CardSettings, wait_for};
use vfio_user::Client;

const CONFIG: u32 = 7;
const BAR: u32 = 0;
const INTX: u32 = 0;
const MSIX: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const EVENTS: u32 = 0b10_0100;
/// `VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK`.
const UNMASK: u32 = 0b01_0001;

fn card(link: &str, poll: &str) -> Card {
    let mut parts = String::new();
    for (name, link) in [("f", link), ("beside", "")] {
        parts += &format!(
            r#"
[[volume]]
name = "{name}"
backend = {{ type = "ram", size = "16M" }}
[[function]]
name = "{name}"
type = "blk"
link = {{ type = "vfio-user", socket = "@/{name}.sock"{link} }}
volume = "{name}"
queues = 2
queue-size = 128
"#
        );
    }
    Card::start(&CardSettings { parts, poll: poll.to_owned(), ..CardSettings::default() })
}

/// The function as its client sees it.
struct Device {
    client: Client,
    common: u64,
    notify: u64,
    isr: u64,
    own: u64,
    multiplier: u64,
}

impl Device {
    /// Connects and finds virtio's structures as a driver does.
    fn open(card: &Card, name: &str) -> Self {
        let mut client = Client::new(&card.path(&format!("{name}.sock"))).unwrap();
        let mut space = [0; 256];
        client.region_read(CONFIG, 0, &mut space).unwrap();
        assert_eq!(space[..4], [0xf4, 0x1a, 0x42, 0x10]);
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        let mut device = Self { client, common: 0, notify: 0, isr: 0, own: 0, multiplier: 0 };
        let mut found = Vec::new();
        let mut at = usize::from(space[0x34]);
        while at != 0 {
            assert!(!found.contains(&at), "the list of capabilities is a ring");
            found.push(at);
            if space[at] == 9 {
                let offset = u64::from(word(at + 8));
                assert!(space[at + 4] == BAR as u8);
                match space[at + 3] {
                    1 => device.common = offset,
                    2 => (device.notify, device.multiplier) = (offset, u64::from(word(at + 16))),
                    3 => device.isr = offset,
                    4 => device.own = offset,
                    5 => {}
                    other => panic!("a structure {other}"),
                }
            }
            at = usize::from(space[at + 1]);
        }
        // Memory accesses, and bus mastering.
        device.client.region_write(CONFIG, 4, &[6, 0]).unwrap();
        device
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        self.client.region_write(BAR, self.common + at, data).unwrap();
    }

    fn get<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.client.region_read(BAR, self.common + at, &mut data).unwrap();
        data
    }

    /// Up to FEATURES_OK; returns what was accepted.
    fn negotiate(&mut self, wanted: u64) -> u64 {
        self.put(0x14, &[0]);
        self.put(0x14, &[1]);
        self.put(0x14, &[3]);
        let mut offered = 0;
        for half in 0..2_u32 {
            self.put(0, &half.to_le_bytes());
            offered |= u64::from(u32::from_le_bytes(self.get(4))) << (32 * half);
        }
        assert_eq!(wanted & !offered, 0, "{wanted:#x} of {offered:#x}");
        for half in 0..2_u32 {
            self.put(8, &half.to_le_bytes());
            self.put(12, &((wanted >> (32 * half)) as u32).to_le_bytes());
        }
        self.put(0x14, &[11]);
        assert_eq!(self.get(0x14), [11]);
        wanted
    }

    /// Starts a queue and the device.
    fn start(&mut self, index: u16, size: u16, vector: u16, queue: &mut BlockQueue) {
        let places = queue.queue().addresses();
        self.put(0x16, &index.to_le_bytes());
        self.put(0x18, &size.to_le_bytes());
        self.put(0x1a, &vector.to_le_bytes());
        self.put(0x20, &places.descriptors.0.to_le_bytes());
        self.put(0x28, &places.driver.0.to_le_bytes());
        self.put(0x30, &places.device.0.to_le_bytes());
        self.put(0x1c, &[1, 0]);
        self.put(0x14, &[15]);
        assert_eq!(self.get(0x14), [15]);
    }

    fn ring(&mut self, index: u16) {
        let at = self.notify + self.multiplier * u64::from(index);
        self.client.region_write(BAR, at, &index.to_le_bytes()).unwrap();
    }
}

fn event() -> EventFd {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap()
}

/// Waits for an event and takes it.
fn comes(event: &EventFd) {
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(60_000_u16)).unwrap(), 1, "no interrupt came");
    event.read().unwrap();
}

const ROWS: u32 = 16;

/// Writes each row's pattern and reads it back; the interrupt of each batch must come.
fn verify(
    device: &mut Device,
    queue: &mut BlockQueue,
    memory: &GuestMemory,
    index: u16,
    mut wait: impl FnMut(&mut Device),
) {
    let mut run = |device: &mut Device, queue: &mut BlockQueue, write: bool| {
        for row in 0..ROWS {
            let sector = u64::from(row) * 808;
            assert!(if write { queue.write(row, sector, 4096) } else { queue.read(row, sector, 4096) });
        }
        queue.queue().want_interrupts(true);
        queue.publish();
        device.ring(index);
        let mut left = ROWS;
        while left > 0 {
            wait(device);
            while let Some(ended) = queue.take_ended() {
                assert_eq!(ended.status, 0);
                left -= 1;
            }
            queue.queue().want_interrupts(true);
        }
    };
    for row in 0..ROWS {
        memory.copy_in(queue.data_at(row), &[row as u8 + 7; 4096]);
    }
    run(device, queue, true);
    for row in 0..ROWS {
        memory.copy_in(queue.data_at(row), &[0; 4096]);
    }
    run(device, queue, false);
    for row in 0..ROWS {
        let mut data = [0; 4096];
        memory.copy_out(queue.data_at(row), &mut data);
        assert!(data.iter().all(|byte| *byte == row as u8 + 7), "row {row}");
    }
}

const ALWAYS: u64 = features::VERSION_1 | features::ACCESS_PLATFORM | features::ORDER_PLATFORM;

/// Memory that the device reaches at these addresses, and a queue in it.
fn attach(device: &mut Device, base: u64, accepted: u64) -> (Arc<GuestMemory>, BlockQueue) {
    let memory = Arc::new(GuestMemory::new(base, 1 << 20).unwrap());
    // In two ranges that share the file: requests that reach over the border see nothing of it.
    let half = memory.len() / 2;
    device.client.dma_map(0, base, half, memory.fd()).unwrap();
    device.client.dma_map(half, base + half, half, memory.fd()).unwrap();
    let options = QueueOptions { size: 64, features: accepted, indirect: accepted & features::INDIRECT != 0 };
    let queue = BlockQueue::new(&memory, options, ROWS, 4096);
    (memory, queue)
}

#[test]
fn the_device_is_what_it_says() {
    let card = card("", "");
    let mut device = Device::open(&card, "f");
    let sizes: Vec<u64> = (0..9).map(|index| device.client.region(index).unwrap().size).collect();
    assert_eq!(sizes, [0x4000, 0, 0x8000, 0, 0, 0, 0, 0x1000, 0]);
    assert!((0..9).all(|index| device.client.region(index).unwrap().file_offset.is_none()), "nothing can be mapped");
    let counts: Vec<u32> = (0..5).map(|index| device.client.get_irq_info(index).unwrap().count).collect();
    assert_eq!(counts, [1, 0, 3, 0, 0], "INTx; a vector for each queue and one for the configuration");
    assert_eq!(device.get::<2>(0x12), [2, 0], "queues");
    let mut capacity = [0; 8];
    let at = device.own;
    device.client.region_read(BAR, at, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), (16 << 20) / 512);
}

#[test]
fn blocks_are_written_and_read_with_msix() {
    let card = card("", "");
    let mut device = Device::open(&card, "f");
    for (number, more) in
        [0, features::RING_PACKED, features::INDIRECT, features::NOTIFICATION_DATA, features::EVENT_INDEX]
            .into_iter()
            .enumerate()
    {
        let accepted = device.negotiate(ALWAYS | more);
        // High addresses, as behind an IOMMU.
        let base = 0xffff_0000_0000 + number as u64 * (1 << 21);
        let (memory, mut queue) = attach(&mut device, base, accepted);
        let events = [event(), event(), event()];
        let fds = events.each_ref().map(|event| event.as_fd().as_raw_fd());
        device.client.set_irqs(MSIX, EVENTS, 0, 3, &fds).unwrap();
        device.start(1, 64, 2, &mut queue);
        verify(&mut device, &mut queue, &memory, 1, |_| comes(&events[2]));
        // Before the configuration has a vector, and after.
        card.command(&["volume", "resize", "f", &format!("{}M", 17 + 2 * number)]);
        device.put(0x10, &[0, 0]);
        card.command(&["volume", "resize", "f", &format!("{}M", 18 + 2 * number)]);
        comes(&events[0]);
        device.client.reset().unwrap();
        assert_eq!(device.get(0x14), [0], "a reset clears the status");
        device.client.region_write(CONFIG, 4, &[6, 0]).unwrap();
        for half in 0..2 {
            device.client.dma_unmap(base + half * memory.len() / 2, memory.len() / 2).unwrap();
        }
    }
    let stats = card.stats();
    assert_eq!(stats["functions"][0]["errors"], 0, "{stats}");
}

#[test]
fn blocks_are_written_and_read_with_intx() {
    let card = card(", msix = false", "");
    let mut device = Device::open(&card, "f");
    assert_eq!(device.client.get_irq_info(MSIX).unwrap().count, 0);
    let accepted = device.negotiate(ALWAYS);
    let (memory, mut queue) = attach(&mut device, 0, accepted);
    let line = event();
    device.client.set_irqs(INTX, EVENTS, 0, 1, &[line.as_raw_fd()]).unwrap();
    device.start(0, 64, 0xffff, &mut queue);
    verify(&mut device, &mut queue, &memory, 0, |device| {
        comes(&line);
        let mut isr = [0];
        let at = device.isr;
        device.client.region_read(BAR, at, &mut isr).unwrap();
        assert_eq!(isr, [1]);
        device.client.set_irqs(INTX, UNMASK, 0, 1, &[]).unwrap();
    });
}

/// One client after another; nothing of the first is left for the second.
#[test]
fn clients_come_and_go() {
    let card = card("", "");
    for round in 0..20 {
        let mut device = Device::open(&card, "f");
        let accepted = device.negotiate(ALWAYS);
        let (memory, mut queue) = attach(&mut device, 0, accepted);
        let done = event();
        device.client.set_irqs(MSIX, EVENTS, 1, 1, &[done.as_raw_fd()]).unwrap();
        device.start(0, 64, 1, &mut queue);
        if round % 2 == 0 {
            verify(&mut device, &mut queue, &memory, 0, |_| comes(&done));
        } else {
            // Requests under way, and gone.
            for row in 0..ROWS {
                queue.read(row, 0, 4096);
            }
            queue.publish();
            device.ring(0);
        }
        device.client.shutdown().unwrap();
    }
    let state = || card.command(&["function", "show", "f"]);
    wait_for("the last one to be gone", || state().contains("waiting"));
}

/// The notify registers can be mapped, and nothing else: whoever stores to another register must be heard.
#[test]
fn notify_registers_can_be_mapped() {
    let card = card(r#", notify = "mapped""#, "always");
    let device = Device::open(&card, "f");
    let region = device.client.region(BAR).unwrap();
    let areas: Vec<_> = region.sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
    assert_eq!(areas, [(device.notify, 0x1000)]);
    let file = region.file_offset.as_ref().unwrap();
    assert_eq!(file.file().metadata().unwrap().len(), region.size);
}
