#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::{Cell, RefCell};

use proptest::prelude::*;

use super::*;
use crate::pci::status;
use crate::virtqueue::features;

#[derive(Default)]
struct FakeOutside {
    isr: Cell<u8>,
    written: RefCell<Vec<(u32, Vec<u8>)>>,
}

impl Outside for FakeOutside {
    fn device_config(&self) -> Vec<u8> {
        (1..=60).collect()
    }

    fn write_device_config(&self, offset: u32, data: &[u8]) {
        self.written.borrow_mut().push((offset, data.to_vec()));
    }

    fn generation(&self) -> u8 {
        77
    }

    fn take_isr(&self) -> u8 {
        self.isr.take()
    }

    fn intx_pending(&self) -> bool {
        self.isr.get() != 0
    }

    fn vector_pending(&self, vector: u16) -> bool {
        vector == 9 || vector == 200
    }
}

const OFFERED: u64 = features::VERSION_1 | features::RING_RESET;
const BAR: Space = Space::Bar(VIRTIO_BAR);

fn function() -> PciFunction {
    PciFunction::new(Identity::BLK, OFFERED, 16, 256, true)
}

#[test]
fn each_structure_is_where_its_capability_says() {
    let (function, outside) = (function(), FakeOutside::default());
    let mut space = [0; 256];
    function.read(Space::Config, 0, &mut space, &outside).unwrap();
    let mut found = [None; 6];
    let mut at = usize::from(space[0x34]);
    while at != 0 {
        if space[at] == 9 {
            let word = |from: usize| u32::from_le_bytes(space[at + from..at + from + 4].try_into().unwrap());
            found[usize::from(space[at + 3])] = Some((space[at + 4], u64::from(word(8)), word(12)));
        }
        at = usize::from(space[at + 1]);
    }
    let (bar, common, length) = found[1].unwrap();
    assert!(length >= 56);
    let mut bytes = [0; 64];
    function.read(Space::Bar(bar), common, &mut bytes, &outside).unwrap();
    assert_eq!((bytes[0x12], bytes[0x15]), (16, 77), "queues, generation");
    let (bar, device, _) = found[4].unwrap();
    function.read(Space::Bar(bar), device + 8, &mut bytes[..4], &outside).unwrap();
    assert_eq!(bytes[..4], [9, 10, 11, 12]);
    let (bar, isr, _) = found[3].unwrap();
    outside.isr.set(3);
    function.read(Space::Bar(bar), isr, &mut bytes[..1], &outside).unwrap();
    assert_eq!((bytes[0], outside.isr.get()), (3, 0), "reading clears");
}

#[test]
fn doorbells_name_their_queue() {
    let (mut function, outside) = (function(), FakeOutside::default());
    let at = u64::from(layout::NOTIFY.offset);
    assert_eq!(function.write(BAR, at + 4 * 5, &5_u16.to_le_bytes(), &outside), Ok(Change::Notify(5)));
    assert_eq!(function.write(BAR, at + 4 * 5, &0x1_0005_u32.to_le_bytes(), &outside), Ok(Change::Notify(5)));
    assert_eq!(function.write(BAR, at + 4 * 16, &[0; 2], &outside), Ok(Change::Nothing), "there are 16");
    assert_eq!(function.write(BAR, at + 4 * 5 + 2, &[0; 2], &outside), Ok(Change::Nothing));
}

#[test]
fn the_window_reaches_the_bars() {
    let (mut function, outside) = (function(), FakeOutside::default());
    let mut space = [0; 256];
    function.read(Space::Config, 0, &mut space, &outside).unwrap();
    let window = (0x40..250).step_by(4).find(|at| space[*at] == 9 && space[at + 3] == 5).unwrap() as u64;
    let mut set = |bar: u8, offset: u32, length: u32| {
        function.write(Space::Config, window + 4, &[bar], &outside).unwrap();
        function.write(Space::Config, window + 8, &offset.to_le_bytes(), &outside).unwrap();
        function.write(Space::Config, window + 12, &length.to_le_bytes(), &outside).unwrap();
    };
    set(VIRTIO_BAR, 0x14, 1);
    assert_eq!(function.write(Space::Config, window + 16, &[1, 0, 0, 0], &outside), Ok(Change::Nothing));
    assert_eq!(function.virtio.status(), status::ACKNOWLEDGE);
    let mut bytes = [9; 4];
    function.read(Space::Config, window + 16, &mut bytes, &outside).unwrap();
    assert_eq!(bytes, [1, 0, 0, 0]);
    let mut set = |bar: u8, offset: u32, length: u32| {
        function.write(Space::Config, window + 4, &[bar], &outside).unwrap();
        function.write(Space::Config, window + 8, &offset.to_le_bytes(), &outside).unwrap();
        function.write(Space::Config, window + 12, &length.to_le_bytes(), &outside).unwrap();
    };
    set(200, 0xffff_fff0, 4);
    assert_eq!(function.write(Space::Config, window + 16, &[1; 4], &outside), Ok(Change::Nothing));
}

#[test]
fn msix_bits_are_kept_and_shown() {
    let (mut function, outside) = (function(), FakeOutside::default());
    let bar = Space::Bar(MSIX_BAR);
    assert!(function.msix.is_masked(3));
    assert_eq!(function.write(bar, 16 * 3 + 12, &0xffff_fffe_u32.to_le_bytes(), &outside), Ok(Change::Interrupts));
    assert!(!function.msix.is_masked(3) && function.msix.is_masked(4));
    let mut bytes = [0; 16];
    function.read(bar, 16 * 3, &mut bytes, &outside).unwrap();
    assert_eq!(bytes, [0; 16], "reserved bits stay zero");
    let mut pending = [0; 8];
    function.read(bar, layout::MSIX_PENDING.offset.into(), &mut pending, &outside).unwrap();
    assert_eq!(pending, [0, 2, 0, 0, 0, 0, 0, 0], "vector 9, and none that does not exist");
}

#[test]
fn a_function_level_reset_clears_everything() {
    let (mut function, outside) = (function(), FakeOutside::default());
    let fresh = function.clone();
    function.write(Space::Config, 4, &[6, 0], &outside).unwrap();
    function.write(BAR, 0x14, &[1], &outside).unwrap();
    function.write(Space::Bar(MSIX_BAR), 12, &[0; 4], &outside).unwrap();
    assert_ne!(function, fresh);
    let mut space = [0; 256];
    function.read(Space::Config, 0, &mut space, &outside).unwrap();
    let express = (0x40..250).step_by(4).find(|at| space[*at] == 0x10).unwrap() as u64;
    assert_eq!(function.write(Space::Config, express + 8, &[0, 0x80], &outside), Ok(Change::FunctionReset));
    assert_eq!(function, fresh);
}

#[test]
fn bus_mastering_decides_what_runs() {
    let (mut function, outside) = (function(), FakeOutside::default());
    for (at, data) in [
        (0x14, &[3][..]),
        (0x08, &1_u32.to_le_bytes()),
        (0x0c, &1_u32.to_le_bytes()),
        (0x14, &[11]),
        (0x1c, &1_u16.to_le_bytes()),
        (0x14, &[15]),
    ] {
        function.write(BAR, at, data, &outside).unwrap();
    }
    assert!(function.virtio.is_live(0) && !function.is_live(0));
    assert_eq!(function.write(Space::Config, 4, &[4, 0], &outside), Ok(Change::Queues));
    assert!(function.is_live(0));
    assert_eq!(function.write(Space::Config, 4, &[0, 4], &outside), Ok(Change::Queues));
    assert!(!function.is_live(0));
}

proptest! {
    #[test]
    fn no_access_breaks_it(
        accesses in prop::collection::vec(
            (0_u8..8, prop_oneof![0..0x5000_u64, any::<u64>()], prop::collection::vec(any::<u8>(), 0..20), any::<bool>()),
            1..200,
        ),
    ) {
        let (mut function, outside) = (function(), FakeOutside::default());
        for (space, offset, mut data, write) in accesses {
            let space = if space == 7 { Space::Config } else { Space::Bar(space) };
            if write {
                let _ = function.write(space, offset, &data, &outside);
            } else {
                let _ = function.read(space, offset, &mut data, &outside);
            }
        }
        // Whatever was done, a reset leads back.
        function.reset();
        prop_assert_eq!(function, self::function());
    }
}
