#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn space(vectors: u16) -> ConfigSpace {
    ConfigSpace::new(Identity::BLK, vectors)
}

fn read<const N: usize>(space: &ConfigSpace, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    space.read(at, &mut bytes, false);
    bytes
}

/// The capabilities as a driver walks them: id and place.
fn capabilities(space: &ConfigSpace) -> Vec<(u8, usize)> {
    let mut found = Vec::new();
    let mut at = usize::from(read::<1>(space, header::CAPABILITIES)[0]);
    while at != 0 {
        assert!(at >= 0x40 && at.is_multiple_of(4) && found.len() < 48, "{at:#x} after {found:?}");
        let [id, next] = read(space, at);
        found.push((id, at));
        at = usize::from(next);
    }
    found
}

#[test]
fn the_header_is_that_of_a_modern_virtio_device() {
    let space = space(3);
    assert_eq!(read::<4>(&space, 0), [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(read::<4>(&space, 8), [1, 0, 0, 1], "revision 1, SCSI storage");
    assert_eq!(read::<1>(&space, 0x0e), [0], "a type 0 header of one function");
    assert_eq!(read::<4>(&space, 0x2c), [0xf4, 0x1a, 0x42, 0]);
    assert_eq!(read::<2>(&space, 0x3c), [0, 1], "INTA");
}

#[test]
fn capabilities_are_listed_once_each() {
    let ids = |vectors| capabilities(&space(vectors)).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
    assert_eq!(ids(2), [ID_POWER, ID_MSIX, ID_EXPRESS, ID_VENDOR, ID_VENDOR, ID_VENDOR, ID_VENDOR, ID_VENDOR]);
    assert_eq!(ids(0), [ID_POWER, ID_EXPRESS, ID_VENDOR, ID_VENDOR, ID_VENDOR, ID_VENDOR, ID_VENDOR]);
}

#[test]
fn bars_tell_their_size() {
    let mut space = space(3);
    for at in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24] {
        space.write(at, &[0xff; 4]);
    }
    assert_eq!(read::<8>(&space, 0x10), (!0x3fff_u64 | 0b1100).to_le_bytes(), "16 KiB, 64 bits, prefetchable");
    assert_eq!(read::<4>(&space, 0x18), (!0x7fff_u32).to_le_bytes(), "32 KiB, 32 bits");
    assert_eq!(read::<12>(&space, 0x1c), [0; 12]);
    space.write(0x10, &0x12_3456_8000_u64.to_le_bytes());
    assert_eq!(read::<8>(&space, 0x10), 0x12_3456_800c_u64.to_le_bytes());
    space.reset();
    assert_eq!(read::<8>(&space, 0x10), 0b1100_u64.to_le_bytes());
}

#[test]
fn what_is_read_only_stays() {
    let mut space = space(3);
    let before = read::<CONFIG_BYTES>(&space, 0);
    for at in 0..CONFIG_BYTES {
        space.write(at, &[0xff]);
    }
    let all = read::<CONFIG_BYTES>(&space, 0);
    for at in 0..CONFIG_BYTES {
        assert_eq!(all[at] & !space.writable[at], before[at] & !space.writable[at], "{at:#x}");
    }
    assert_eq!(space.command(), Command::WRITABLE);
    assert!(space.msix_enabled() && space.msix_all_masked());
    for at in 0..CONFIG_BYTES {
        space.write(at, &[0]);
    }
    assert!(!space.msix_enabled() && !space.msix_all_masked());
}

#[test]
fn a_write_across_the_end_keeps_to_the_space() {
    let mut space = space(3);
    assert!(!space.write(CONFIG_BYTES - 2, &[0xff; 8]));
    assert!(!space.write(CONFIG_BYTES + 7, &[0xff; 8]));
    assert_eq!(read::<8>(&space, CONFIG_BYTES - 4), [0; 8]);
}

#[test]
fn memory_is_reached_by_a_bus_master_with_power() {
    let mut space = space(3);
    assert!(!space.may_reach_memory());
    space.write(header::COMMAND, &Command::BUS_MASTER.to_le_bytes());
    assert!(space.may_reach_memory());
    let power = space.power + 4;
    space.write(power, &[1]);
    assert!(space.may_reach_memory(), "there is no D1");
    space.write(power, &[3]);
    assert!(!space.may_reach_memory());
    space.write(power, &[0]);
    assert!(space.may_reach_memory());
}

#[test]
fn a_function_level_reset_is_asked_for_by_one_bit() {
    let mut space = space(3);
    let control = space.express + 8;
    assert!(!space.write(control, &[0xff, 0x7f]));
    assert!(space.write(control, &[0, 0x80]));
    assert!(space.write(control + 1, &[0x80]));
    assert!(space.write(control - 2, &[0, 0, 0, 0x80]));
    assert_eq!(read::<2>(&space, control)[1] & 0x80, 0, "the bit reads as zero");
}

#[test]
fn the_status_shows_an_interrupt() {
    let space = space(0);
    let mut bytes = [0; 8];
    space.read(0, &mut bytes, true);
    assert_eq!(bytes[6] & 0x18, 0x18);
    space.read(6, &mut bytes[..1], false);
    assert_eq!(bytes[0] & 0x18, 0x10);
    space.read(7, &mut bytes[..1], true);
    assert_eq!(bytes[0], 0);
}

#[test]
fn the_window_is_checked() {
    let mut space = space(3);
    let data = space.window + 16;
    assert_eq!(space.window(data, 4), None, "a length of 0");
    space.write(space.window + 4, &[2]);
    space.write(space.window + 8, &8_u32.to_le_bytes());
    space.write(space.window + 12, &4_u32.to_le_bytes());
    assert_eq!(space.window(data, 4), Some((2, 8, 4)));
    assert_eq!(space.window(data + 1, 1), None);
    space.write(space.window + 8, &9_u32.to_le_bytes());
    assert_eq!(space.window(data, 4), None, "not aligned");
}
