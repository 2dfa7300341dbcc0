#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::pci::{Identity, Outside, Space, status};
use crate::virtqueue::features;

struct Nobody;

impl Outside for Nobody {
    fn device_config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_device_config(&self, _offset: u32, _data: &[u8]) {}

    fn generation(&self) -> u8 {
        0
    }

    fn take_isr(&self) -> u8 {
        0
    }

    fn intx_pending(&self) -> bool {
        false
    }

    fn vector_pending(&self, _vector: u16) -> bool {
        false
    }
}

fn function(offered: u64, queues: u16) -> PciFunction {
    PciFunction::new(Identity::BLK, features::VERSION_1 | offered, queues, 256, true)
}

/// As a driver leaves it that has begun.
fn begun() -> PciFunction {
    let mut function = function(features::RING_PACKED, 2);
    let mut write = |space, offset, data: &[u8]| {
        function.write(space, offset, data, &Nobody).unwrap();
    };
    write(Space::Config, 0x04, &[6, 0]);
    write(Space::Config, 0x10, &[0, 0, 0xfe, 0xff]);
    write(Space::Bar(2), 16, &[1, 2, 3, 4, 5, 6, 7, 8]);
    write(Space::Bar(2), 28, &[0, 0, 0, 0]);
    let bar = Space::Bar(0);
    write(bar, 0x14, &[status::ACKNOWLEDGE]);
    write(bar, 0x14, &[status::DRIVER]);
    write(bar, 0x08, &[1, 0, 0, 0]);
    write(bar, 0x0c, &((features::VERSION_1 | features::RING_PACKED) >> 32).to_le_bytes()[..4]);
    write(bar, 0x14, &[status::FEATURES_OK]);
    write(bar, 0x16, &[1, 0]);
    write(bar, 0x18, &[100, 0]);
    write(bar, 0x1a, &[2, 0]);
    write(bar, 0x20, &0x1234_5678_9abc_d000_u64.to_le_bytes());
    write(bar, 0x1c, &[1, 0]);
    write(bar, 0x14, &[status::DRIVER_OK]);
    assert!(function.is_live(1) && !function.is_live(0));
    function
}

#[test]
fn registers_come_back_as_they_were() {
    let function = begun();
    let kept = serde_json::to_vec(&function.save()).unwrap();
    let mut again = self::function(features::RING_PACKED, 2);
    again.restore(&serde_json::from_slice(&kept).unwrap()).unwrap();
    assert_eq!(again, function);
}

#[test]
fn another_functions_registers_are_refused_and_leave_nothing() {
    let saved = begun().save();
    for (mut other, error) in [
        (function(features::RING_PACKED, 3), BadSaved::Other("MSI-X vectors")),
        (function(0, 2), BadSaved::Features(features::RING_PACKED)),
        (PciFunction::new(Identity::NET, features::VERSION_1, 2, 256, true), BadSaved::Other("ids")),
        (
            PciFunction::new(Identity::BLK, features::VERSION_1 | features::RING_PACKED, 2, 64, true),
            BadSaved::Other("queue sizes"),
        ),
    ] {
        let fresh = other.clone();
        assert_eq!(other.restore(&saved), Err(error));
        assert_eq!(other, fresh);
    }
}

#[test]
fn formats_next_to_ours_are_read_and_no_others() {
    let saved = begun().save();
    for (format, known) in [(0, false), (FORMAT, true), (FORMAT + 1, true), (FORMAT + 2, false)] {
        let mut again = function(features::RING_PACKED, 2);
        let restored = again.restore(&SavedRegisters { format, ..saved.clone() });
        assert_eq!(restored, if known { Ok(()) } else { Err(BadSaved::Format(format)) });
    }
}

#[test]
fn any_bytes_are_refused_or_taken_and_write_nothing_that_is_read_only() {
    proptest::proptest!(|(config: Vec<u8>, status: u8, vector: u16, size: u16)| {
        let fresh = function(features::RING_PACKED, 2);
        let mut saved = begun().save();
        saved.config.0.truncate(64);
        saved.config.0.extend(config);
        let mut json = serde_json::to_value(&saved).unwrap();
        json["virtio"]["status"] = status.into();
        json["virtio"]["queues"][0]["vector"] = vector.into();
        json["virtio"]["queues"][0]["size"] = size.into();
        let mut again = fresh.clone();
        if again.restore(&serde_json::from_value(json).unwrap()).is_ok() {
            let mut ids = [[0; 4]; 2];
            again.read(Space::Config, 0, &mut ids[0], &Nobody).unwrap();
            fresh.read(Space::Config, 0, &mut ids[1], &Nobody).unwrap();
            proptest::prop_assert_eq!(ids[0], ids[1]);
            proptest::prop_assert!(again.virtio.queues().iter().all(|queue| (1..=256).contains(&queue.size)));
        } else {
            proptest::prop_assert_eq!(again, fresh);
        }
    });
    for bad in ["abc", "zz", "é0"] {
        assert!(HexBytes::try_from(bad.to_owned()).is_err());
    }
}
