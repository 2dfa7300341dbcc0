//! A ring, split or packed, in memory of which any byte may change between any two turns of the lane that serves it. Whatever
//! is there, the lane carries out or refuses; it reports one fault at most, and it stops when it is told to.
#![no_main]

use device_svc::address::Iova;
use device_svc::driver::GuestMemory;
use device_svc::link::QueuePosition;
use device_svc::virtqueue::packed::AVAIL;
use device_svc::virtqueue::{
    DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, PackedDescriptor, QueueAddresses, features,
};
use fuzz::{BASE, Bed, Choices, LaneChoice, MEMORY_BYTES, QUEUE_SIZE_MAX, memory, tables};
use libfuzzer_sys::fuzz_target;

const AT: QueueAddresses =
    QueueAddresses { descriptors: Iova(BASE), driver: Iova(BASE + 0x800), device: Iova(BASE + 0xc00) };
/// Headers, statuses, tables and data come behind the ring.
const LINES: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x2000;
/// More changes than this teach nothing new.
const STEPS_MAX: u32 = 200;

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Choices(bytes);
    let flags = choices.byte();
    let packed = flags & 1 != 0;
    let mut accepted = 0;
    for (bit, feature) in
        [(1, features::RING_PACKED), (2, features::INDIRECT), (4, features::EVENT_INDEX), (8, features::IN_ORDER)]
    {
        if flags & bit != 0 {
            accepted |= feature;
        }
    }
    let size = choices.byte();
    let size = if packed { u16::from(size).clamp(1, QUEUE_SIZE_MAX) } else { 1 << (size % 7) };
    let position = (flags & 0x40 != 0).then(|| QueuePosition {
        next_avail: if packed { choices.short() % size } else { choices.short() },
        avail_wrap: flags & 0x80 != 0,
        next_used: choices.short() % size,
        used_wrap: choices.byte() & 1 != 0,
    });
    let choice = LaneChoice { features: accepted, size, copy: flags & 16 != 0, null: flags & 32 != 0, position };
    let memory = &*memory();
    let [whole, part] = tables(memory);
    let mut bed = Bed::new(choice, AT, &whole).expect("the addresses are right");
    // A read, to start from.
    chain(memory, packed, 0);
    for _ in 0..STEPS_MAX {
        if choices.is_empty() {
            break;
        }
        match choices.byte() % 12 {
            0 => memory.put(place(&mut choices, 1), choices.byte()),
            1 => memory.put(place(&mut choices, 2), choices.short()),
            2 => memory.put(place(&mut choices, 8), choices.long()),
            3 => {
                let at = place(&mut choices, 64);
                let count = usize::from(choices.byte() % 64);
                memory.copy_in(at, choices.bytes(count));
            }
            4..=6 => bed.turn(),
            7 => show(memory, packed, size, choices.byte()),
            8 => descriptor(memory, &mut choices, packed, size),
            9 => bed.arm(),
            10 => bed.change_memory(if choices.byte() & 1 == 0 { &part } else { &whole }),
            _ => chain(memory, packed, u16::from(choices.byte()) % size),
        }
    }
    bed.turn();
    bed.turn();
    bed.end();
});

/// Somewhere in memory, in the first pages mostly.
fn place(choices: &mut Choices<'_>, bytes: u64) -> Iova {
    let at = u64::from(choices.short()) * if choices.byte() == 255 { 4 } else { 1 };
    Iova(BASE + at.min(MEMORY_BYTES - bytes))
}

/// A whole read of one sector from this slot on, as far as slots go.
fn chain(memory: &GuestMemory, packed: bool, slot: u16) {
    memory.copy_in(Iova(LINES), &[0; 16]);
    let parts = [(LINES, 16, 0), (DATA, 512, DESCRIPTOR_WRITE), (LINES + 16, 1, DESCRIPTOR_WRITE)];
    for (number, (address, length, flags)) in parts.into_iter().enumerate() {
        let flags = flags | if number < 2 { DESCRIPTOR_NEXT } else { 0 };
        let next = slot + number as u16 + 1;
        put(memory, packed, next - 1, Descriptor { address, length, flags, next });
    }
}

fn put(memory: &GuestMemory, packed: bool, slot: u16, descriptor: Descriptor) {
    let Descriptor { address, length, flags, next } = descriptor;
    let at = Iova(AT.descriptors.0 + 16 * u64::from(slot % QUEUE_SIZE_MAX));
    if packed {
        memory.put(at, PackedDescriptor { address, length, id: next, flags });
    } else {
        memory.put(at, descriptor);
    }
}

/// Shows the device `count` entries more, or turns the marks of one slot of a packed ring.
fn show(memory: &GuestMemory, packed: bool, size: u16, count: u8) {
    if packed {
        let at = Iova(AT.descriptors.0 + 16 * u64::from(u16::from(count) % size) + 14);
        memory.put(at, memory.get::<u16>(at) ^ (AVAIL | if count & 0x80 != 0 { 0x8000 } else { 0 }));
    } else {
        let at = Iova(AT.driver.0 + 2);
        memory.put(at, memory.get::<u16>(at).wrapping_add(u16::from(count) % (size + 2)));
    }
}

/// A descriptor that may make sense.
fn descriptor(memory: &GuestMemory, choices: &mut Choices<'_>, packed: bool, size: u16) {
    let slot = choices.short();
    // In the ring, or in a table.
    let address = match choices.byte() % 8 {
        0 => choices.long(),
        1 => LINES,
        2 => LINES + 16,
        3 => BASE + MEMORY_BYTES - u64::from(choices.byte()),
        4 => BASE + MEMORY_BYTES / 2 - u64::from(choices.byte()),
        _ => DATA + u64::from(choices.short()),
    };
    let length = match choices.byte() % 8 {
        0 => choices.long() as u32,
        1 => 16,
        2 => 1,
        3 => 48,
        4 => u32::from(choices.byte()),
        5 => 16 * u32::from(choices.short()),
        _ => 512,
    };
    let flags = choices.short() & if packed { u16::MAX } else { 7 };
    let next = choices.short() % (size + 1);
    if slot & 0x8000 != 0 {
        memory.put(Iova(DATA + 16 * u64::from(slot & 0xff)), Descriptor { address, length, flags, next });
    } else {
        put(memory, packed, slot % size, Descriptor { address, length, flags, next });
    }
}
