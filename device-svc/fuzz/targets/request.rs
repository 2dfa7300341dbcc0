//! Requests of any kind, size and framing on a proper ring, against a model of the disk: status, data, and what the device says
//! it wrote are those that virtio 1.3, 5.2.6 names.
#![no_main]

use device_svc::address::Iova;
use device_svc::driver::{Buffer, DriverQueue, GuestMemory, QueueOptions};
use device_svc::virtqueue::features;
use fuzz::{BASE, Bed, Choices, DISK_BYTES, LaneChoice, SERIAL, memory, tables};
use libfuzzer_sys::fuzz_target;
use virtio_bindings::virtio_blk as spec;

const QUEUE_SIZE: u16 = 64;
/// Behind the ring and its tables.
const HEADER: u64 = BASE + 0x1_8000;
const STATUS: u64 = HEADER + 0x100;
/// A buffer may cross from one region of memory to the next, which is at half of it.
const READABLE: u64 = BASE + 0x1_f000;
const WRITABLE: u64 = BASE + 0x3_0000;
const DATA_BYTES_MAX: u16 = 0x2000;
const REQUESTS_MAX: u32 = 12;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const NONE: u8 = 255;

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Choices(bytes);
    let flags = choices.byte();
    let mut accepted = features::VERSION_1;
    for (bit, feature) in
        [(1, features::RING_PACKED), (2, features::INDIRECT), (4, features::EVENT_INDEX), (8, features::IN_ORDER)]
    {
        if flags & bit != 0 {
            accepted |= feature;
        }
    }
    let memory = memory();
    let options = QueueOptions { size: QUEUE_SIZE, features: accepted, indirect: flags & 32 != 0 };
    let mut queue = DriverQueue::new(&memory, options);
    let copy = flags & 16 != 0;
    let choice = LaneChoice { features: accepted, size: QUEUE_SIZE, copy, null: false, position: None };
    let mut bed = Bed::new(choice, queue.addresses(), &tables(&memory)[0]).expect("the addresses are right");
    let mut disk = vec![0u8; DISK_BYTES as usize];
    for _ in 0..REQUESTS_MAX {
        if choices.is_empty() {
            break;
        }
        one(&mut bed, &mut queue, &memory, &mut choices, &mut disk);
    }
    bed.end();
});

/// Header and data buffers of a request, as bytes.
struct Asked {
    kind: u32,
    sector: u64,
    readable: Vec<u8>,
    writable: u32,
}

fn ask(choices: &mut Choices<'_>) -> Asked {
    let kind = match choices.byte() {
        byte @ 0..=13 => u32::from(byte),
        byte if byte & 3 == 0 => spec::VIRTIO_BLK_T_IN,
        byte if byte & 3 == 1 => spec::VIRTIO_BLK_T_OUT,
        byte => {
            if byte & 4 == 0 {
                spec::VIRTIO_BLK_T_DISCARD
            } else {
                spec::VIRTIO_BLK_T_WRITE_ZEROES
            }
        }
    };
    let sector = match choices.byte() {
        255 => choices.long(),
        byte => u64::from(byte),
    };
    let mut length = || match choices.byte() {
        0..=99 => 0,
        byte @ 100..=130 => u32::from(byte - 100) * 512,
        131..=140 => 16,
        141..=145 => 20,
        146..=150 => 32,
        _ => u32::from(choices.short().min(DATA_BYTES_MAX)),
    };
    let (readable, writable) = (length(), length().min(u32::from(DATA_BYTES_MAX)));
    // A pattern, or ranges.
    let pattern = choices.byte();
    let mut bytes: Vec<u8> = (0..readable).map(|at| pattern.wrapping_add(at as u8)).collect();
    if matches!(kind, spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES) {
        for range in bytes.chunks_exact_mut(16) {
            let sector = u64::from(choices.byte());
            let (sectors, flags) = (u32::from(choices.byte()), u32::from(choices.byte()));
            let (sectors, flags) = if flags & 0x80 == 0 { (sectors, flags & 1) } else { (sectors << 24, flags & 0x7f) };
            range[..8].copy_from_slice(&sector.to_le_bytes());
            range[8..12].copy_from_slice(&sectors.to_le_bytes());
            range[12..].copy_from_slice(&flags.to_le_bytes());
        }
    }
    Asked { kind, sector, readable: bytes, writable }
}

/// What the specification makes of it: the status, what the data buffers then hold, and the disk.
fn model(asked: &Asked, disk: &mut [u8]) -> (u8, Vec<u8>) {
    let place = |bytes: u64| {
        let start = asked.sector.checked_mul(512)?;
        let end = start.checked_add(bytes)?;
        (bytes > 0 && bytes % 512 == 0 && end <= DISK_BYTES).then_some(start as usize..end as usize)
    };
    match asked.kind {
        spec::VIRTIO_BLK_T_IN => match place(asked.writable.into()) {
            Some(place) if asked.readable.is_empty() => (OK, disk[place].to_vec()),
            _ => (IO_ERROR, Vec::new()),
        },
        spec::VIRTIO_BLK_T_OUT => match place(asked.readable.len() as u64) {
            Some(place) if asked.writable == 0 => {
                disk[place].copy_from_slice(&asked.readable);
                (OK, Vec::new())
            }
            _ => (IO_ERROR, Vec::new()),
        },
        spec::VIRTIO_BLK_T_FLUSH => (OK, Vec::new()),
        spec::VIRTIO_BLK_T_GET_ID if asked.writable >= 20 && asked.readable.is_empty() => (OK, SERIAL.to_vec()),
        spec::VIRTIO_BLK_T_GET_ID => (IO_ERROR, Vec::new()),
        spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES => (ranges(asked, disk), Vec::new()),
        _ => (UNSUPPORTED, Vec::new()),
    }
}

/// All ranges are looked at before the first is carried out.
fn ranges(asked: &Asked, disk: &mut [u8]) -> u8 {
    let bytes = &asked.readable;
    if bytes.is_empty() || bytes.len() % 16 != 0 || bytes.len() > 16 * 16 {
        return IO_ERROR;
    }
    let mut places = Vec::new();
    for range in bytes.chunks_exact(16) {
        let number =
            |at: std::ops::Range<usize>| range[at].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let (sector, sectors, flags) = (number(0..8), number(8..12), number(12..16));
        if flags > 1 || (flags == 1 && asked.kind == spec::VIRTIO_BLK_T_DISCARD) {
            return UNSUPPORTED;
        }
        if (sector + sectors) * 512 > DISK_BYTES {
            return IO_ERROR;
        }
        places.push((sector * 512) as usize..((sector + sectors) * 512) as usize);
    }
    for place in places {
        // A discarded block reads as zeroes on a volume in memory.
        disk[place].fill(0);
    }
    OK
}

/// Cuts a range of memory into up to four buffers, some of which may be empty.
fn cut(choices: &mut Choices<'_>, mut address: u64, mut length: u32, writable: bool, buffers: &mut Vec<Buffer>) {
    for _ in 0..choices.byte() % 4 {
        let part = u32::from(choices.byte()).min(length);
        buffers.push(Buffer { address: Iova(address), length: part, writable });
        address += u64::from(part);
        length -= part;
    }
    if length > 0 {
        buffers.push(Buffer { address: Iova(address), length, writable });
    }
}

fn one(bed: &mut Bed, queue: &mut DriverQueue, memory: &GuestMemory, choices: &mut Choices<'_>, disk: &mut [u8]) {
    let asked = ask(choices);
    let mut header = [asked.kind.to_le_bytes(), [0; 4]].concat();
    header.extend(asked.sector.to_le_bytes());
    // Header and readable data are one run of bytes, and so are writable data and status: cut anywhere.
    let joined = choices.byte() & 1 != 0;
    let mut buffers = Vec::new();
    memory.copy_in(Iova(HEADER), &header);
    memory.copy_in(Iova(READABLE - 16), &header);
    memory.copy_in(Iova(READABLE), &asked.readable);
    let readable = asked.readable.len() as u32;
    if joined {
        cut(choices, READABLE - 16, 16 + readable, false, &mut buffers);
    } else {
        cut(choices, HEADER, 16, false, &mut buffers);
        cut(choices, READABLE, readable, false, &mut buffers);
    }
    memory.copy_in(Iova(WRITABLE), &vec![NONE; asked.writable as usize + 1]);
    memory.put(Iova(STATUS), NONE);
    let status_at = if joined {
        cut(choices, WRITABLE, asked.writable + 1, true, &mut buffers);
        WRITABLE + u64::from(asked.writable)
    } else {
        cut(choices, WRITABLE, asked.writable, true, &mut buffers);
        cut(choices, STATUS, 1, true, &mut buffers);
        STATUS
    };
    assert!(queue.add(&buffers, 7), "an empty ring takes a short chain");
    queue.publish();
    let mut used = None;
    for _ in 0..10 {
        bed.turn();
        used = queue.take_used();
        if used.is_some() {
            break;
        }
    }
    assert!(!bed.has_failed(), "a proper chain is no fault");
    let (status, data) = model(&asked, disk);
    let shown = format!("{} at {} of {readable} and {}, {buffers:?}", asked.kind, asked.sector, asked.writable);
    assert_eq!(used, Some((7, data.len() as u32 + 1)), "what the device says it wrote: {shown}");
    assert_eq!(memory.get::<u8>(Iova(status_at)), status, "the status of {shown}");
    let mut holds = vec![0; asked.writable as usize];
    memory.copy_out(Iova(WRITABLE), &mut holds);
    assert!(holds[..data.len()] == data, "the data of {shown}");
    let mut kept = vec![0; asked.readable.len()];
    memory.copy_out(Iova(READABLE), &mut kept);
    assert!(kept == asked.readable, "a device writes no readable buffer: {shown}");
}
