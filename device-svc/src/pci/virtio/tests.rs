#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

const OFFERED: u64 = features::VERSION_1 | features::RING_RESET | features::RING_PACKED | 1 << 5;

fn registers() -> VirtioRegisters {
    VirtioRegisters::new(OFFERED, 2, 256, 3)
}

fn read16(registers: &VirtioRegisters, offset: u32) -> u16 {
    let mut bytes = [0; 2];
    registers.read(offset, &mut bytes, 0);
    u16::from_le_bytes(bytes)
}

fn accept(registers: &mut VirtioRegisters, features: u64) {
    for half in 0..2_u32 {
        registers.write(at::DRIVER_FEATURE_SELECT, &half.to_le_bytes());
        registers.write(at::DRIVER_FEATURE, &((features >> (32 * half)) as u32).to_le_bytes());
    }
}

/// As a driver does it, up to FEATURES_OK.
fn negotiate(registers: &mut VirtioRegisters, features: u64) {
    registers.write(at::STATUS, &[status::ACKNOWLEDGE]);
    registers.write(at::STATUS, &[status::ACKNOWLEDGE | status::DRIVER]);
    accept(registers, features);
    registers.write(at::STATUS, &[status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK]);
}

#[test]
fn a_driver_brings_a_queue_up() {
    let mut registers = registers();
    negotiate(&mut registers, OFFERED);
    assert_eq!(registers.status(), 0b1011);
    assert_eq!(registers.accepted(), OFFERED);
    assert_eq!(read16(&registers, at::QUEUES), 2);
    registers.write(at::QUEUE_SELECT, &1_u16.to_le_bytes());
    assert_eq!(read16(&registers, at::QUEUE_SIZE), 256);
    assert_eq!(read16(&registers, at::QUEUE_NOTIFY_OFFSET), 1);
    registers.write(at::QUEUE_SIZE, &100_u16.to_le_bytes());
    assert_eq!(registers.write(at::QUEUE_VECTOR, &2_u16.to_le_bytes()), Written::Vectors);
    registers.write(at::QUEUE_DESCRIPTORS, &0x12_3456_7000_u64.to_le_bytes());
    registers.write(at::QUEUE_DRIVER, &0x2000_u32.to_le_bytes());
    registers.write(at::QUEUE_DRIVER + 4, &7_u32.to_le_bytes());
    registers.write(at::QUEUE_DEVICE, &0x3000_u64.to_le_bytes());
    assert_eq!(registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes()), Written::Queues);
    assert!(!registers.is_live(1));
    assert_eq!(registers.write(at::STATUS, &[15]), Written::Queues);
    assert!(registers.is_live(1) && !registers.is_live(0) && !registers.is_live(2));
    let queue = registers.queues()[1];
    assert_eq!(
        queue,
        QueueRegisters {
            size: 100,
            vector: 2,
            enabled: true,
            descriptors: 0x12_3456_7000,
            driver: 0x7_0000_2000,
            device: 0x3000
        }
    );
    // What runs is not changed under it.
    registers.write(at::QUEUE_SIZE, &64_u16.to_le_bytes());
    registers.write(at::QUEUE_DEVICE, &0_u64.to_le_bytes());
    registers.write(at::QUEUE_ENABLE, &0_u16.to_le_bytes());
    assert_eq!(registers.queues()[1], queue);
    assert_eq!(registers.write(at::QUEUE_RESET, &1_u16.to_le_bytes()), Written::QueueReset(1));
    assert_eq!((read16(&registers, at::QUEUE_RESET), read16(&registers, at::QUEUE_ENABLE)), (0, 0));
    assert_eq!(read16(&registers, at::QUEUE_SIZE), 256);
    assert_eq!(registers.write(at::STATUS, &[0]), Written::Reset);
    assert_eq!(registers, self::registers());
}

#[test]
fn steps_that_are_skipped_are_not_taken() {
    let mut registers = registers();
    registers.write(at::STATUS, &[status::DRIVER_OK | status::FEATURES_OK]);
    assert_eq!(registers.status(), 0, "no driver yet");
    registers.write(at::STATUS, &[status::DRIVER | status::FEATURES_OK | status::DRIVER_OK]);
    assert_eq!(registers.status(), status::DRIVER, "without VERSION_1");
    registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes());
    assert!(!registers.queues()[0].enabled, "before FEATURES_OK");
    accept(&mut registers, features::VERSION_1 | 1 << 60);
    registers.write(at::STATUS, &[status::DRIVER | status::FEATURES_OK]);
    assert_eq!(registers.status(), status::DRIVER, "a feature that was not offered");
    accept(&mut registers, features::VERSION_1);
    registers.write(at::STATUS, &[status::FEATURES_OK]);
    assert_eq!(registers.status(), status::DRIVER | status::FEATURES_OK, "bits are only added");
    accept(&mut registers, 0);
    assert_eq!(registers.accepted(), features::VERSION_1, "too late");
    registers.write(at::STATUS, &[status::NEEDS_RESET | status::DRIVER_OK]);
    assert_eq!(registers.status() & status::NEEDS_RESET, 0, "not the driver's to set");
}

#[test]
fn what_does_not_exist_reads_as_nothing() {
    let mut registers = registers();
    negotiate(&mut registers, features::VERSION_1);
    registers.write(at::QUEUE_SELECT, &2_u16.to_le_bytes());
    assert_eq!(read16(&registers, at::QUEUE_SIZE), 0);
    assert_eq!(registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes()), Written::Nothing);
    registers.write(at::QUEUE_SELECT, &0_u16.to_le_bytes());
    for bad in [0_u16, 100, 512, 0xffff] {
        registers.write(at::QUEUE_SIZE, &bad.to_le_bytes());
        assert_eq!(read16(&registers, at::QUEUE_SIZE), 256, "{bad} on a split ring");
    }
    registers.write(at::CONFIG_VECTOR, &3_u16.to_le_bytes());
    assert_eq!(read16(&registers, at::CONFIG_VECTOR), NO_VECTOR);
    registers.write(at::CONFIG_VECTOR, &2_u16.to_le_bytes());
    assert_eq!(registers.config_vector(), 2);
    registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes());
    assert_eq!(registers.write(at::QUEUE_RESET, &1_u16.to_le_bytes()), Written::Nothing, "RING_RESET was not accepted");
}

#[test]
fn a_device_that_needs_a_reset_runs_nothing() {
    let mut registers = registers();
    negotiate(&mut registers, features::VERSION_1);
    registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes());
    registers.write(at::STATUS, &[15]);
    assert!(registers.is_live(0));
    assert!(registers.need_reset());
    assert!(!registers.need_reset(), "said once");
    assert!(!registers.is_live(0));
    registers.write(at::STATUS, &[0]);
    assert!(!registers.need_reset(), "nobody is there to be told");
}

/// A size that is right for a packed ring only, and then a split one is agreed upon.
#[test]
fn a_split_ring_of_an_odd_size_is_not_enabled() {
    let mut registers = registers();
    registers.write(at::STATUS, &[status::DRIVER]);
    accept(&mut registers, features::VERSION_1 | features::RING_PACKED);
    registers.write(at::QUEUE_SIZE, &100_u16.to_le_bytes());
    negotiate(&mut registers, features::VERSION_1);
    assert_eq!(registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes()), Written::Nothing);
    registers.write(at::QUEUE_SIZE, &64_u16.to_le_bytes());
    assert_eq!(registers.write(at::QUEUE_ENABLE, &1_u16.to_le_bytes()), Written::Queues);
}
