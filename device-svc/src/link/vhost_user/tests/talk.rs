//! What a polite front end says while it is connected.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::fake::{Bed, CONFIG_BYTES, Call, OFFERED, PATIENCE, QUEUES};
use super::raw::{self, RawFrontEnd};
use crate::address::{CardAddress, Iova};
use crate::dma::{CardMemory, CopyEngine, DmaEngine};
use crate::driver::GuestMemory;
use crate::driver::QueueEvents;
use crate::driver::vhost_user::region;
use crate::link::QueuePosition;
use crate::virtqueue::features;

#[test]
fn a_handshake_hands_over_features_queues_and_memory() {
    let bed = Bed::server("handshake");
    let mut guest = bed.connect(features::EVENT_INDEX);
    assert_eq!(guest.front_end.offered(), OFFERED | raw::PROTOCOL);
    assert_eq!(guest.front_end.accepted(), features::VERSION_1 | features::EVENT_INDEX);
    assert_eq!(guest.front_end.queue_count().unwrap(), u64::from(QUEUES));
    let calls = [
        Call::Attach,
        Call::Features(features::VERSION_1 | features::EVENT_INDEX),
        Call::Memory(vec![(0x1_0000, 1 << 20)]),
    ];
    assert_eq!(bed.function.with(|record| record.calls.clone()), calls);
    // The table is the guest's own memory.
    guest.memory.put(Iova(0x1_2340), 0x5a_u8);
    let table = bed.function.with(|record| Arc::clone(&record.memory));
    let mut engine = CopyEngine::new(CardMemory::new(4096).unwrap(), table);
    engine.read(Iova(0x1_2340), CardAddress(0), 1).unwrap();
    engine.submit();
    let mut byte = [0];
    engine.card().copy_out(CardAddress(0), &mut byte);
    assert_eq!(byte, [0x5a]);
    drop(engine);
    drop(guest);
    bed.function.wait_for_detached(1);
    assert!(bed.warnings().is_empty(), "{:?}", bed.warnings());
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let bed = Bed::server("unoffered");
    let mut guest = bed.connect(0);
    assert!(guest.front_end.messages().set_features(features::VERSION_1 | 1 << 40).is_err());
    assert_eq!(guest.front_end.queue_count().unwrap(), u64::from(QUEUES), "the conversation goes on");
    assert_eq!(bed.warnings().len(), 1, "{:?}", bed.warnings());
}

#[test]
fn rings_are_found_in_any_of_several_regions() {
    let bed = Bed::server("regions");
    let mut guest = bed.connect(0);
    // Two regions of one file, the upper half first, and a third of another file.
    let other = GuestMemory::new(1 << 32, 1 << 20).unwrap();
    let (whole, third) = (region(&guest.memory), region(&other));
    let half = whole.memory_size / 2;
    let upper = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0x8000_0000,
        memory_size: half,
        userspace_addr: whole.userspace_addr + half,
        mmap_offset: half,
        mmap_handle: whole.mmap_handle,
    };
    let lower = VhostUserMemoryRegionInfo {
        guest_phys_addr: whole.guest_phys_addr,
        memory_size: half,
        userspace_addr: whole.userspace_addr,
        mmap_offset: 0,
        mmap_handle: whole.mmap_handle,
    };
    guest.front_end.messages().set_mem_table(&[upper, lower, third]).unwrap();
    let expected = vec![(0x1_0000, half), (0x8000_0000, half), (1 << 32, 1 << 20)];
    assert_eq!(bed.function.with(|record| record.calls.last().cloned()), Some(Call::Memory(expected)));
    // A ring that lies in the upper half is named by where the guest sees that.
    let _ = guest.memory.take(half, 4096);
    let queue = guest.queue(16);
    let _events = guest.front_end.start_queue(0, 16, &queue).unwrap();
    let inside = queue.addresses().descriptors.0 - 0x1_0000 - half;
    assert_eq!(bed.function.with(|record| record.running[&0].descriptors), Iova(0x8000_0000 + inside));
}

#[test]
fn slots_come_and_go_while_a_queue_runs() {
    let bed = Bed::server("slots");
    let mut guest = bed.connect(0);
    let queue = guest.queue(16);
    let _events = guest.front_end.start_queue(0, 16, &queue).unwrap();
    let starts = bed.function.count(&Call::Start(0));
    assert_eq!(guest.front_end.messages().get_max_mem_slots().unwrap(), 509);
    let others: Vec<GuestMemory> = (1..=20).map(|number| GuestMemory::new(number << 32, 2 << 20).unwrap()).collect();
    for other in &others {
        guest.front_end.messages().add_mem_region(&region(other)).unwrap();
    }
    assert_eq!(bed.function.with(|record| record.memory.regions().len()), 21);
    assert!(bed.function.with(|record| record.memory.covers(Iova(20 << 32), 2 << 20)));
    // One that is there, or overlaps, is refused and changes nothing.
    assert!(guest.front_end.messages().add_mem_region(&region(&others[3])).is_err());
    assert_eq!(bed.function.with(|record| record.memory.regions().len()), 21);
    for other in &others {
        guest.front_end.messages().remove_mem_region(&region(other)).unwrap();
    }
    assert!(guest.front_end.messages().remove_mem_region(&region(&others[0])).is_err(), "gone already");
    assert_eq!(bed.function.with(|record| record.memory.regions().len()), 1);
    assert_eq!(bed.function.running(), [0], "the queue ran all the time");
    assert_eq!(bed.function.count(&Call::Start(0)), starts);
    assert_eq!(bed.function.count(&Call::Stop(0)), 0);
}

#[test]
fn each_queue_has_its_own_doorbell_interrupt_and_error() {
    let bed = Bed::server("queues");
    let mut guest = bed.connect(0);
    let mut events = Vec::new();
    let mut errors = Vec::new();
    for index in 0..usize::from(QUEUES) {
        let queue = guest.queue(32);
        let error = EventFd::new(EFD_NONBLOCK).unwrap();
        guest.front_end.messages().set_vring_err(index, &error).unwrap();
        errors.push(error);
        events.push(guest.front_end.start_queue(index, 32, &queue).unwrap());
        let descriptors = bed.function.with(|record| record.running[&(index as u16)].descriptors);
        assert_eq!(descriptors, queue.addresses().descriptors);
    }
    assert_eq!(bed.function.running(), [0, 1, 2, 3]);
    events[1].ring();
    bed.function.with(|record| {
        for (number, start) in &mut record.running {
            assert_eq!(start.port.take_doorbell(), *number == 1);
            assert!(!start.port.take_doorbell(), "taken once");
            assert!(start.port.doorbell_fd().is_some());
        }
        record.running.get_mut(&2).unwrap().port.raise_interrupt();
    });
    let interrupted: Vec<bool> = events.iter().map(QueueEvents::take_interrupts).collect();
    assert_eq!(interrupted, [false, false, true, false]);
    let host = bed.function.with(|record| record.host.clone()).unwrap();
    host.needs_reset(Some(3));
    let signalled: Vec<bool> = errors.iter().map(|error| error.read().is_ok()).collect();
    assert_eq!(signalled, [false, false, false, true]);
    host.needs_reset(None);
    assert!(errors.iter().all(|error| error.read().is_ok()));
}

#[test]
fn a_ring_whose_memory_is_changed_waits_for_it_and_goes_on() {
    let bed = Bed::server("changed");
    let mut guest = bed.connect(0);
    let queue = guest.queue(16);
    let _events = guest.front_end.start_queue(0, 16, &queue).unwrap();
    bed.function.with(|record| record.advance = 5);
    // A front end that changes a region takes it away first; the card must not look for the ring then.
    let slot = region(&guest.memory);
    guest.front_end.messages().remove_mem_region(&slot).unwrap();
    assert!(bed.function.running().is_empty());
    assert_eq!(bed.function.count(&Call::Stop(0)), 1);
    guest.front_end.messages().add_mem_region(&slot).unwrap();
    bed.function.wait_for(|record| record.running.get(&0).is_some_and(|start| start.position.next_avail == 5));
    // One that was stopped in the meantime stays off.
    guest.front_end.messages().remove_mem_region(&slot).unwrap();
    guest.front_end.stop_queue(0).unwrap();
    guest.front_end.messages().add_mem_region(&slot).unwrap();
    assert_eq!(guest.front_end.queue_count().unwrap(), u64::from(QUEUES));
    assert!(bed.function.running().is_empty());
    assert!(bed.warnings().is_empty(), "{:?}", bed.warnings());
}

#[test]
fn the_configuration_space_is_read_in_parts_and_written() {
    let bed = Bed::server("config");
    let mut guest = bed.connect(0);
    let whole = guest.front_end.read_config(0, u32::from(CONFIG_BYTES)).unwrap();
    assert_eq!(whole, (1..=CONFIG_BYTES).collect::<Vec<u8>>());
    assert_eq!(guest.front_end.read_config(8, 4).unwrap(), [9, 10, 11, 12]);
    // Fields of later versions read as zeroes, up to the end of what a space may have.
    assert_eq!(guest.front_end.read_config(58, 6).unwrap(), [59, 60, 0, 0, 0, 0]);
    assert_eq!(guest.front_end.read_config(255, 1).unwrap(), [0]);
    guest.front_end.write_config(32, &[1]).unwrap();
    assert_eq!(bed.function.count(&Call::Config(32, vec![1])), 1);
    assert!(guest.front_end.write_config(0, &[1, 2]).is_err());
    assert_eq!(guest.front_end.queue_count().unwrap(), u64::from(QUEUES), "the conversation goes on");
}

#[test]
fn a_configuration_change_is_told_on_the_channel() {
    let bed = Bed::server("change");
    let mut guest = bed.connect(0);
    let host = bed.function.with(|record| record.host.clone()).unwrap();
    // Before there is a channel, nobody can be told.
    host.config_changed();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    guest.front_end.messages().set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    host.config_changed();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no body.
    assert_eq!(message.to_vec(), raw::message(2, 1, &[]));
    // A front end that does not read stalls nobody: this ends though the channel is full long before.
    for _ in 0..100_000 {
        host.config_changed();
    }
    drop(guest);
    bed.function.wait_for_detached(1);
    drop((bed, host));
    // The channel is closed with the connection.
    ours.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_ring_stops_alone_and_goes_on_where_it_was() {
    let bed = Bed::server("rings");
    let mut guest = bed.connect(0);
    let queues = [guest.queue(16), guest.queue(16)];
    let _events: Vec<_> = queues
        .iter()
        .enumerate()
        .map(|(index, queue)| guest.front_end.start_queue(index, 16, queue).unwrap())
        .collect();
    bed.function.with(|record| record.advance = 5);
    assert_eq!(guest.front_end.stop_queue(1).unwrap(), 5);
    assert_eq!(bed.function.running(), [0]);
    assert_eq!(guest.front_end.stop_queue(1).unwrap(), 5, "a stopped ring says the same again");
    // Enabled all the time: a new doorbell starts it at its base.
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.front_end.messages().set_vring_base(1, 7).unwrap();
    guest.front_end.messages().set_vring_kick(1, &kick).unwrap();
    assert_eq!(bed.function.running(), [0, 1]);
    assert_eq!(bed.function.with(|record| record.running[&1].position.next_avail), 7);
    // Disabled and enabled: it goes on by itself.
    guest.front_end.messages().set_vring_enable(1, false).unwrap();
    assert_eq!(bed.function.running(), [0]);
    guest.front_end.messages().set_vring_enable(1, true).unwrap();
    assert_eq!(bed.function.with(|record| record.running[&1].position.next_avail), 12);
    assert_eq!(bed.function.count(&Call::Stop(0)), 0, "its neighbour noticed nothing");
}

#[test]
fn a_packed_ring_says_slots_and_wrap_counters() {
    let bed = Bed::server("packed");
    let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1 | features::RING_PACKED);
    let base = |front_end: &mut RawFrontEnd| {
        front_end.send(raw::GET_VRING_BASE, raw::PLAIN, &raw::state(2, 0), &[]);
        front_end.reply(raw::GET_VRING_BASE)
    };
    // Never started: on its first lap, where both wrap counters are 1 (virtio 1.3, 2.8.1).
    assert_eq!(base(&mut front_end), raw::state(2, 0x8000_8000));

    let memory = GuestMemory::new(0, 1 << 20).unwrap();
    let body = raw::words(&[1, 0, memory.len(), memory.user_address(), 0]);
    assert_eq!(front_end.ask(raw::SET_MEM_TABLE, &body, &[memory.fd()]), 0);
    // 100 entries are a size for a packed ring.
    assert_eq!(front_end.ask(raw::SET_VRING_NUM, &raw::state(2, 100), &[]), 0);
    assert_eq!(front_end.ask(raw::SET_VRING_BASE, &raw::state(2, 0x8063_0007), &[]), 0);
    let at = |offset: u64| memory.user_address() + offset;
    let addresses = [raw::state(2, 0), raw::words(&[at(0), at(0x2000), at(0x3000), 0])].concat();
    assert_eq!(front_end.ask(raw::SET_VRING_ADDR, &addresses, &[]), 0);
    // No doorbell: bit 8 says that it is polled.
    assert_eq!(front_end.ask(raw::SET_VRING_KICK, &raw::words(&[2 | 0x100]), &[]), 0);
    assert_eq!(front_end.ask(raw::SET_VRING_ENABLE, &raw::state(2, 1), &[]), 0);
    bed.function.with(|record| {
        let start = &record.running[&2];
        let position = QueuePosition { next_avail: 7, avail_wrap: false, next_used: 0x63, used_wrap: true };
        assert_eq!((start.size, start.position), (100, position));
        assert_eq!((start.descriptors, start.driver, start.device), (Iova(0), Iova(0x3000), Iova(0x2000)));
        assert!(start.port.doorbell_fd().is_none());
        record.advance = 1;
    });
    assert_eq!(base(&mut front_end), raw::state(2, 0x8064_0008));

    // A base of 0 is the start of a second lap if the first slot was used in the first, and else a front end's way to say fresh.
    for (flags, wrap) in [(0_u16, true), (1 << 7, true), (1 << 7 | 1 << 15, false), (1 << 15, false)] {
        memory.put(Iova(14), flags);
        assert_eq!(front_end.ask(raw::SET_VRING_BASE, &raw::state(2, 0), &[]), 0);
        assert_eq!(front_end.ask(raw::SET_VRING_KICK, &raw::words(&[2 | 0x100]), &[]), 0);
        let position = bed.function.with(|record| record.running[&2].position);
        assert_eq!(position, QueuePosition { avail_wrap: wrap, used_wrap: wrap, ..QueuePosition::default() });
        base(&mut front_end);
    }
}

#[test]
fn a_reset_takes_everything_back_but_memory() {
    let bed = Bed::server("reset");
    let mut guest = bed.connect(features::EVENT_INDEX);
    let queue = guest.queue(16);
    let _events = guest.front_end.start_queue(0, 16, &queue).unwrap();
    guest.front_end.messages().reset_device().unwrap();
    assert_eq!(bed.function.count(&Call::Reset), 1);
    assert_eq!(bed.function.running(), Vec::<u16>::new());
    // A ring must be described anew before it runs.
    guest.front_end.messages().set_features(features::VERSION_1 | raw::PROTOCOL).unwrap();
    guest.front_end.messages().set_vring_enable(0, true).unwrap();
    assert_eq!(bed.function.running(), Vec::<u16>::new());
    let queue = guest.queue(32);
    let _events = guest.front_end.start_queue(0, 32, &queue).unwrap();
    let (size, accepted) = bed.function.with(|record| (record.running[&0].size, record.running[&0].features));
    assert_eq!((size, accepted), (32, features::VERSION_1));
    assert_eq!(bed.function.with(|record| record.memory.regions().len()), 1);
}

#[test]
fn a_front_end_without_protocol_features_needs_no_enable() {
    let bed = Bed::server("simple");
    let mut front_end = RawFrontEnd::connect(&bed.socket());
    let memory = GuestMemory::new(0, 1 << 20).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let at = |offset: u64| memory.user_address() + offset;
    front_end.send(raw::SET_OWNER, raw::PLAIN, &[], &[]);
    front_end.send(raw::SET_FEATURES, raw::PLAIN, &raw::words(&[features::VERSION_1]), &[]);
    let body = raw::words(&[1, 0, memory.len(), memory.user_address(), 0]);
    front_end.send(raw::SET_MEM_TABLE, raw::PLAIN, &body, &[memory.fd()]);
    front_end.send(raw::SET_VRING_NUM, raw::PLAIN, &raw::state(0, 64), &[]);
    let addresses = [raw::state(0, 0), raw::words(&[at(0), at(0x2000), at(0x3000), 0])].concat();
    front_end.send(raw::SET_VRING_ADDR, raw::PLAIN, &addresses, &[]);
    front_end.send(raw::SET_VRING_KICK, raw::PLAIN, &raw::words(&[0]), &[std::os::fd::AsRawFd::as_raw_fd(&kick)]);
    bed.function.wait_for(|record| record.running.contains_key(&0));
}
