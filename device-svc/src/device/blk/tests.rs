#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! What a virtio-blk function shows of a volume, byte by byte, and which requests it takes.

use zerocopy::FromBytes;

use super::request::{Header, Request, Status};
use super::*;

const SEG_MAX: u32 = 2;
const RO: u32 = 5;
const FLUSH: u32 = 9;
const CONFIG_WCE: u32 = 11;
const DISCARD: u32 = 13;
const WRITE_ZEROES: u32 = 14;

fn settings() -> BlkSettings {
    BlkSettings {
        queues: 3,
        queue_size_max: 256,
        packed: true,
        segments_max: 126,
        block_bytes: None,
        write_back: true,
        copy_payload: false,
        read_only: false,
        serial: *b"12345678901234567890",
        io_timeout: Duration::from_secs(1),
        reissue: true,
        limits: Vec::new(),
    }
}

/// A volume of 1 MiB and one block that can do everything.
fn info() -> BlockInfo {
    BlockInfo {
        size_bytes: (1 << 20) + 512,
        block_bytes: 512,
        physical_block_bytes: 4096,
        read_only: false,
        volatile_cache: true,
        discard: true,
        write_zeroes: true,
        discard_alignment_bytes: 65536,
        payload: PayloadPlace::InPlace,
        channels_max: usize::MAX,
    }
}

fn offers(shared: &BlkShared, bit: u32) -> bool {
    shared.offered_features() >> bit & 1 == 1
}

/// A little-endian field of the configuration space.
fn field(space: &[u8], at: usize, bytes: usize) -> u64 {
    space[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[test]
fn the_configuration_space_is_laid_out_as_the_specification_says() {
    let shared = BlkShared::new(settings(), &info());
    let space = shared.config_space();
    // Name, offset, bytes, value: virtio 1.3, 5.2.4.
    let expected = [
        ("capacity", 0, 8, 2049),
        ("size_max", 8, 4, 0),
        ("seg_max", 12, 4, 126),
        ("geometry", 16, 4, 0),
        ("blk_size", 20, 4, 512),
        ("physical_block_exp", 24, 1, 3),
        ("alignment_offset", 25, 1, 0),
        ("min_io_size", 26, 2, 8),
        ("opt_io_size", 28, 4, 0),
        ("writeback", 32, 1, 1),
        ("unused0", 33, 1, 0),
        ("num_queues", 34, 2, 3),
        ("max_discard_sectors", 36, 4, 1 << 21),
        ("max_discard_seg", 40, 4, 16),
        ("discard_sector_alignment", 44, 4, 128),
        ("max_write_zeroes_sectors", 48, 4, 1 << 21),
        ("max_write_zeroes_seg", 52, 4, 16),
        ("write_zeroes_may_unmap", 56, 1, 1),
        ("unused1", 57, 3, 0),
    ];
    for (name, at, bytes, value) in expected {
        assert_eq!(field(&space, at, bytes), value, "{name}");
    }
    assert_eq!(space.len(), CONFIG_BYTES);
    assert!(space[60..].iter().all(|byte| *byte == 0), "secure erase and zones are not offered");
}

#[test]
fn features_are_those_of_the_volume_and_the_settings() {
    let features = BlkShared::new(settings(), &info()).offered_features();
    // VERSION_1, RING_PACKED, IN_ORDER; EVENT_IDX and INDIRECT_DESC; of the disk MQ, WRITE_ZEROES, DISCARD, CONFIG_WCE, TOPOLOGY,
    // FLUSH, BLK_SIZE, SEG_MAX. Not SIZE_MAX, GEOMETRY, RO, LIFETIME, SECURE_ERASE, ZONED.
    let bits = [32, 34, 35, 29, 28, 12, 14, 13, 11, 10, 9, 6, 2];
    assert_eq!(features, bits.iter().fold(0, |all, bit| all | 1_u64 << bit));

    let plain = BlockInfo { volatile_cache: false, discard: false, write_zeroes: false, ..info() };
    let plain = BlkShared::new(BlkSettings { packed: false, copy_payload: true, ..settings() }, &plain);
    for bit in [FLUSH, CONFIG_WCE, DISCARD, WRITE_ZEROES, 34] {
        assert!(!offers(&plain, bit), "bit {bit}");
    }
    // Through card memory the size of a buffer is bounded, and the driver is told.
    assert!(offers(&plain, 1) && offers(&plain, SEG_MAX));
    assert_eq!(field(&plain.config_space(), 8, 4), 32768);
    assert_eq!(field(&plain.config_space(), 56, 1), 0, "zeroes are not made by unmapping");
}

#[test]
fn a_chain_of_as_many_segments_as_shown_fits_the_ring() {
    for (queue_size, segments_max, shown) in [
        (256, 126, 126),
        (128, 126, 126),
        (64, 126, 62),
        (4, 126, 2),
        (2, 126, 1),
        (1, 126, 1),
        (256, 7, 7),
        (1024, 1024, 254),
    ] {
        let settings = BlkSettings { queue_size_max: queue_size, segments_max, ..settings() };
        let space = BlkShared::new(settings, &info()).config_space();
        assert_eq!(field(&space, 12, 4), shown, "{queue_size} entries, {segments_max} segments");
    }
}

#[test]
fn a_disk_ends_with_its_last_whole_block() {
    let shared = BlkShared::new(BlkSettings { block_bytes: Some(4096), ..settings() }, &info());
    assert_eq!(shared.size_bytes(), 1 << 20);
    assert_eq!((shared.block_bytes, field(&shared.config_space(), 24, 1)), (4096, 0));
    shared.set_size_bytes((2 << 20) + 4095);
    assert_eq!(field(&shared.config_space(), 0, 8), (2 << 20) / 512);
    // A block size below the volume's own cannot be shown.
    let coarse = BlockInfo { block_bytes: 4096, ..info() };
    assert_eq!(BlkShared::new(BlkSettings { block_bytes: Some(512), ..settings() }, &coarse).block_bytes, 4096);
}

fn header(kind: u32, sector: u64) -> Header {
    let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    Header::read_from_bytes(&bytes).unwrap()
}

#[test]
fn a_resize_moves_the_end_for_the_next_request() {
    let shared = BlkShared::new(settings(), &info());
    let last = |shared: &BlkShared, sector| header(0, sector).parse(shared, 0, 512);
    assert_eq!(last(&shared, 2048), Ok(Request::Transfer { write: false, offset: 1 << 20, bytes: 512 }));
    assert_eq!(last(&shared, 2049), Err(Status::IoError));
    shared.set_size_bytes(2 << 20);
    assert!(last(&shared, 4095).is_ok());
    shared.set_size_bytes(512);
    assert_eq!(last(&shared, 1), Err(Status::IoError));
    assert!(last(&shared, 0).is_ok());
}

#[test]
fn a_read_only_disk_takes_no_request_that_changes_it() {
    for shared in [
        BlkShared::new(BlkSettings { read_only: true, ..settings() }, &info()),
        BlkShared::new(settings(), &BlockInfo { read_only: true, ..info() }),
    ] {
        assert!(offers(&shared, RO) && !offers(&shared, DISCARD) && !offers(&shared, WRITE_ZEROES));
        assert_eq!(header(1, 0).parse(&shared, 512, 0), Err(Status::IoError));
        assert_eq!(header(11, 0).parse(&shared, 16, 0), Err(Status::IoError));
        assert_eq!(header(13, 0).parse(&shared, 16, 0), Err(Status::IoError));
        assert!(header(0, 0).parse(&shared, 0, 512).is_ok());
        assert_eq!(header(4, 0).parse(&shared, 0, 0), Ok(Request::Flush));
        assert_eq!(header(8, 0).parse(&shared, 0, 20), Ok(Request::GetId));
    }
}

#[test]
fn what_the_volume_cannot_do_is_unsupported() {
    let shared = BlkShared::new(settings(), &BlockInfo { discard: false, write_zeroes: false, ..info() });
    // Discard, write zeroes, secure erase, lifetime, zones, the SCSI commands of old, what nobody knows.
    for kind in [11, 13, 14, 10, 16, 2, 3, 5, 7, 0x8000_0000, u32::MAX] {
        assert_eq!(header(kind, 0).parse(&shared, 16, 16), Err(Status::Unsupported), "kind {kind}");
    }
}

#[test]
fn a_transfer_is_whole_blocks_one_way_and_bounded() {
    let big = BlockInfo { size_bytes: 8 << 30, ..info() };
    let coarse = BlkShared::new(BlkSettings { block_bytes: Some(4096), ..settings() }, &big);
    let copied = BlkShared::new(BlkSettings { copy_payload: true, ..settings() }, &big);
    for (shared, sector, readable, writable, well) in [
        (&coarse, 8, 0, 4096, true),
        (&coarse, 1, 0, 4096, false),
        (&coarse, 8, 0, 512, false),
        (&coarse, 8, 4096, 4096, false),
        (&coarse, 0, 0, 1 << 30, true),
        (&coarse, 0, 0, (1 << 30) + 4096, false),
        (&copied, 0, 0, 126 << 15, true),
        (&copied, 0, 0, (126 << 15) + 512, false),
        (&copied, u64::MAX / 512, 0, 512, false),
        (&copied, u64::MAX, 0, 512, false),
    ] {
        let parsed = header(0, sector).parse(shared, readable, writable);
        assert_eq!(parsed.is_ok(), well, "{readable} and {writable} bytes at {sector}: {parsed:?}");
    }
}

#[test]
fn ranges_come_whole_and_in_bounded_number() {
    let shared = BlkShared::new(settings(), &info());
    for (readable, count) in [(16, Some(1)), (256, Some(16)), (272, None), (0, None), (15, None), (24, None)] {
        for (kind, zero) in [(11, false), (13, true)] {
            let expected = count.map(|count| Request::Ranges { zero, count }).ok_or(Status::IoError);
            assert_eq!(header(kind, 0).parse(&shared, readable, 0), expected, "{readable} bytes");
        }
    }
}

#[test]
fn the_driver_chooses_the_write_cache_until_a_reset() {
    let shared = BlkShared::new(settings(), &info());
    let flush = 1_u64 << FLUSH;
    assert!(!shared.writes_through(flush));
    assert!(shared.writes_through(0), "a driver that knows no flush gets write-through");
    assert!(shared.write_config(32, &[0]));
    assert!(shared.writes_through(flush));
    assert_eq!(shared.config_space()[32], 0);
    shared.reset();
    assert!(!shared.writes_through(flush));
    // Nothing else is writable.
    for (offset, data) in [(0, &[1][..]), (31, &[1]), (33, &[1]), (32, &[1, 0]), (32, &[]), (u32::MAX, &[1])] {
        assert!(!shared.write_config(offset, data), "{data:?} at {offset}");
    }
    // A volume without a cache has nothing to choose, and every write is durable as it is.
    let shared = BlkShared::new(settings(), &BlockInfo { volatile_cache: false, ..info() });
    assert!(!shared.write_config(32, &[1]));
    assert!(!shared.writes_through(0));
    assert_eq!(shared.config_space()[32], 0);
    let shared = BlkShared::new(BlkSettings { write_back: false, ..settings() }, &info());
    assert!(shared.writes_through(flush));
}
