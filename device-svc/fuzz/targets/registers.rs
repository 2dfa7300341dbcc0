//! Any accesses to a function's registers. What is read-only stays, what the specification excludes does not come about, and who is
//! told what a write means (the link) is told of everything that it must act upon.
#![no_main]

use std::cell::Cell;

use device_svc::pci::{
    Change, Command, Identity, MSIX_BAR, NO_VECTOR, Outside, PciFunction, QueueRegisters, Space, VIRTIO_BAR, layout,
    status,
};
use device_svc::virtqueue::features;
use fuzz::Choices;
use libfuzzer_sys::fuzz_target;

const OFFERED: u64 = features::VERSION_1 | features::RING_PACKED | features::RING_RESET | features::NOTIFICATION_DATA;
const QUEUE_SIZE_MAX: u16 = 256;
const COMMON: u64 = layout::COMMON.offset as u64;
const CONFIG_BYTES: usize = 4096;
/// Where capabilities can be.
const LISTED_BYTES: usize = 256;

/// What lives outside of the registers.
#[derive(Default)]
struct World {
    isr: Cell<u8>,
    writes: Cell<u32>,
}

impl Outside for World {
    fn device_config(&self) -> Vec<u8> {
        (1..=60).collect()
    }

    fn write_device_config(&self, offset: u32, data: &[u8]) {
        assert!(offset as usize + data.len() <= layout::DEVICE.length as usize && !data.is_empty());
        self.writes.set(self.writes.get() + 1);
    }

    fn generation(&self) -> u8 {
        9
    }

    fn take_isr(&self) -> u8 {
        self.isr.take()
    }

    fn intx_pending(&self) -> bool {
        self.isr.get() != 0
    }

    fn vector_pending(&self, vector: u16) -> bool {
        vector % 3 == 0
    }
}

/// The registers, and how they were when they were made.
struct Bed {
    function: PciFunction,
    fresh: PciFunction,
    world: World,
    queues: u16,
    /// Bytes of the configuration space that no write changes.
    constant: Vec<(usize, u8)>,
    /// Where the data of the window to the BARs is.
    window: u64,
}

/// What a link acts upon.
#[derive(Clone, PartialEq)]
struct Seen {
    live: Vec<bool>,
    interrupts: (bool, bool, bool, u16, Vec<u16>, Vec<bool>),
    status: u8,
    accepted: u64,
    queues: Vec<QueueRegisters>,
}

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Choices(bytes);
    let mut bed = Bed::new(choices.byte());
    while !choices.is_empty() {
        bed.step(&mut choices);
    }
    assert!(bed.config(CONFIG_BYTES)[LISTED_BYTES..].iter().all(|byte| *byte == 0), "the extended space is empty");
    bed.function.reset();
    assert!(bed.function == bed.fresh, "a reset leads back");
});

impl Bed {
    fn new(kind: u8) -> Self {
        let queues = [1, 3, 15, 64][usize::from(kind & 3)];
        let function = PciFunction::new(Identity::BLK, OFFERED, queues, QUEUE_SIZE_MAX, kind & 4 == 0);
        let fresh = function.clone();
        let mut bed = Self { function, fresh, world: World::default(), queues, constant: Vec::new(), window: 0 };
        bed.find_constant();
        bed
    }

    /// By the specifications: ids, revision and class, subsystem, the list of capabilities, where virtio's structures are, and
    /// everything behind the last capability.
    fn find_constant(&mut self) {
        let space = self.config(LISTED_BYTES);
        let mut places: Vec<usize> = [0..4, 8..12, 14..16, 0x1c..0x3c, 0x3d..0x40].into_iter().flatten().collect();
        let (mut at, mut end) = (usize::from(space[0x34]), 0x40);
        while at != 0 {
            let length = match (space[at], space[at + 3]) {
                (1, _) => 8,
                (0x11, _) => 12,
                (0x10, _) => 60,
                // A window to the BARs, whose place and data are the driver's.
                (9, 5) => 20,
                (9, _) => usize::from(space[at + 2]),
                (other, _) => panic!("capability {other}"),
            };
            places.extend(at..at + 2);
            if (space[at], space[at + 3]) == (9, 5) {
                places.extend(at + 2..at + 4);
                self.window = at as u64 + 16;
            } else if space[at] == 9 {
                places.extend(at + 2..at + length);
            }
            end = end.max(at + length);
            at = usize::from(space[at + 1]);
        }
        places.extend(end..LISTED_BYTES);
        self.constant = places.into_iter().map(|at| (at, space[at])).collect();
    }

    /// The space, without an interrupt that is pending.
    fn config(&self, bytes: usize) -> Vec<u8> {
        let mut space = vec![0; bytes];
        let quiet = World::default();
        self.function.read(Space::Config, 0, &mut space, &quiet).expect("it is there");
        space
    }

    fn seen(&self) -> Seen {
        let PciFunction { config, msix, virtio } = &self.function;
        let no_intx = config.command() & Command::INTX_DISABLE != 0;
        Seen {
            live: (0..self.queues).map(|queue| self.function.is_live(queue)).collect(),
            interrupts: (
                config.msix_enabled(),
                config.msix_all_masked(),
                no_intx,
                virtio.config_vector(),
                virtio.queues().iter().map(|queue| queue.vector).collect(),
                (0..msix.vectors()).map(|vector| msix.is_masked(vector)).collect(),
            ),
            status: virtio.status(),
            accepted: virtio.accepted(),
            queues: virtio.queues().to_vec(),
        }
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        let kind = choices.byte();
        match kind % 16 {
            0 => {
                self.function.virtio.need_reset();
            }
            1 => self.function.msix.set_masked(choices.byte().into(), kind & 16 != 0),
            2 => self.function.config.set_msix_enabled(kind & 16 != 0),
            3 => self.world.isr.set(choices.byte() & 3),
            4..=6 => self.read(choices),
            // What most drivers do: a field of the common configuration.
            7..=10 => {
                let fields: [(u64, usize); 16] = [
                    (0x00, 4),
                    (0x04, 4),
                    (0x08, 4),
                    (0x0c, 4),
                    (0x10, 2),
                    (0x14, 1),
                    (0x14, 1),
                    (0x16, 2),
                    (0x18, 2),
                    (0x1a, 2),
                    (0x1c, 2),
                    (0x1e, 2),
                    (0x20, 8),
                    (0x28, 8),
                    (0x30, 4),
                    (0x3a, 2),
                ];
                let (offset, length) = fields[usize::from(kind / 16)];
                self.write(Space::Bar(VIRTIO_BAR), COMMON + offset, choices.bytes(length));
            }
            11 | 12 => {
                let (offset, length) = (choices.byte(), [1, 2, 4, 4][usize::from(kind / 16 % 4)]);
                self.write(Space::Config, offset.into(), choices.bytes(length));
            }
            _ => {
                let (space, offset) = place(choices.byte(), choices);
                let length = usize::from(choices.byte() % 20);
                self.write(space, offset, choices.bytes(length));
            }
        }
        self.check();
    }

    fn is_inside(&self, space: Space, offset: u64, length: usize) -> bool {
        let end = offset.checked_add(length as u64);
        length > 0 && end.is_some_and(|end| end <= self.function.bytes_of(space))
    }

    /// A read is answered if it is inside, and piece by piece it is the same as at once.
    fn read(&self, choices: &mut Choices<'_>) {
        let (space, offset) = place(choices.byte(), choices);
        let mut data = vec![0xaa; usize::from(choices.byte())];
        let done = self.function.read(space, offset, &mut data, &self.world);
        assert_eq!(done.is_ok(), self.is_inside(space, offset, data.len()));
        // The window's data is an access, and one to all of it at once.
        let touches_window = offset < self.window + 4 && self.window < offset.saturating_add(data.len() as u64);
        if done.is_ok() && space == Space::Config && !touches_window {
            for (at, whole) in (offset..).zip(&data) {
                let mut byte = [0xbb];
                self.function.read(space, at, &mut byte, &self.world).expect("it is inside");
                assert_eq!(byte[0], *whole, "byte {at:#x} of {space:?}");
            }
        }
    }

    fn write(&mut self, space: Space, offset: u64, data: &[u8]) {
        let before = self.seen();
        let is_aligned = matches!(data.len(), 1 | 2 | 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let good = self.is_inside(space, offset, data.len()) && (space == Space::Config || is_aligned);
        let done = self.function.write(space, offset, data, &self.world);
        assert_eq!(done.is_ok(), good);
        let after = self.seen();
        let Ok(change) = done else {
            return assert!(before == after, "a refused write changes nothing");
        };
        match change {
            Change::Nothing => assert!(before.live == after.live && before.interrupts == after.interrupts),
            Change::Interrupts => assert!(before.live == after.live),
            Change::Queues => {}
            Change::Notify(queue) => assert!(queue < self.queues && before == after),
            Change::QueueReset(queue) => {
                assert!(before.queues[usize::from(queue)].enabled && !after.queues[usize::from(queue)].enabled);
                assert!(before.interrupts == after.interrupts);
            }
            Change::DeviceReset => assert!(self.function.virtio == self.fresh.virtio),
            Change::FunctionReset => assert!(self.function == self.fresh),
        }
        if matches!(change, Change::DeviceReset | Change::FunctionReset) {
            return;
        }
        assert_eq!(before.status & !after.status, 0, "status bits only come");
        if before.status & status::FEATURES_OK != 0 {
            assert_eq!(before.accepted, after.accepted, "features stay once they are agreed upon");
        }
        for (number, (old, new)) in (0..).zip(before.queues.iter().zip(&after.queues)) {
            if old.enabled && change != Change::QueueReset(number) {
                assert!(*old == QueueRegisters { vector: old.vector, ..*new }, "a running queue stays as it is");
            }
        }
    }

    /// What always holds.
    fn check(&self) {
        let space = self.config(LISTED_BYTES);
        for (at, byte) in &self.constant {
            assert_eq!(space[*at], *byte, "{at:#x} of the configuration space was written");
        }
        let seen = self.seen();
        let bus_master = u16::from_le_bytes([space[4], space[5]]) & Command::BUS_MASTER != 0;
        let power = space[usize::from(space[0x34]) + 4] & 3;
        assert!(matches!(power, 0 | 3), "there is no D{power}");
        let has = |bit: u8| seen.status & bit != 0;
        assert!(!has(status::DRIVER_OK) || has(status::FEATURES_OK));
        assert!(!has(status::FEATURES_OK) || has(status::DRIVER));
        if has(status::FEATURES_OK) {
            assert!(seen.accepted & !OFFERED == 0 && seen.accepted & features::VERSION_1 != 0);
        }
        for (live, queue) in seen.live.iter().zip(&seen.queues) {
            let may = has(status::DRIVER_OK) && !has(status::NEEDS_RESET) && bus_master && power == 0;
            assert_eq!(*live, may && queue.enabled);
            assert!(!queue.enabled || has(status::FEATURES_OK), "enabled before the features were agreed upon");
            assert!(queue.size > 0 && queue.size <= QUEUE_SIZE_MAX);
            let packed = seen.accepted & features::RING_PACKED != 0;
            assert!(!queue.enabled || packed || queue.size.is_power_of_two(), "a split ring of {} entries", queue.size);
            assert!(queue.vector == NO_VECTOR || queue.vector < self.function.msix.vectors());
        }
        let mut common = [0; 4];
        self.function.read(Space::Bar(VIRTIO_BAR), COMMON + 0x12, &mut common, &self.world).expect("it is there");
        assert_eq!(common, [self.queues as u8, (self.queues >> 8) as u8, seen.status, 9]);
    }
}

fn place(kind: u8, choices: &mut Choices<'_>) -> (Space, u64) {
    let space = match kind / 16 {
        0..=4 => Space::Config,
        5..=8 => Space::Bar(VIRTIO_BAR),
        9..=12 => Space::Bar(MSIX_BAR),
        other => Space::Bar(other * 2 - 25),
    };
    let offset = if kind & 8 == 0 { choices.short().into() } else { choices.long() };
    (space, if kind & 4 == 0 { offset & 0x3ff } else { offset })
}
