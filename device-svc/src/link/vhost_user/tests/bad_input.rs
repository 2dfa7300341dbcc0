//! Messages that no decent front end sends: each ends its own connection with one clear line, or is answered with no, and
//! nobody else notices.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::fake::{Bed, Call};
use super::raw::{self, RawFrontEnd, message, state, words};
use crate::driver::GuestMemory;
use crate::virtqueue::features;

/// Sends `bytes` on a connection that has negotiated everything, which must end it.
#[track_caller]
fn ends(bed: &Bed, times: usize, what: &str, bytes: &[u8], fds: &[RawFd]) {
    let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
    let before = bed.warnings().len();
    front_end.send_bytes(bytes, fds);
    // A truncated message is one when nothing more comes.
    front_end.0.shutdown(std::net::Shutdown::Write).unwrap();
    front_end.wait_for_end();
    bed.function.wait_for_detached(times);
    let warnings = bed.warnings().split_off(before);
    assert_eq!(warnings.len(), 1, "{what}: {warnings:?}");
}

#[test]
fn malformed_messages_end_their_own_connection_only() {
    let (bed, neighbour) = (Bed::server("malformed"), Bed::server("neighbour"));
    let mut guest = neighbour.connect(0);
    let queue = guest.queue(16);
    let _events = guest.front_end.start_queue(0, 16, &queue).unwrap();
    let plain = raw::PLAIN;
    let huge: Vec<u8> = [raw::SET_FEATURES, plain, 0x7fff_ffff].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let region = [1 << 32, 4096, 1 << 40, 0];
    let table = |count: u64| words(&[&[count][..], &region[..]].concat());
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let fd = event.as_raw_fd();
    let cases: Vec<(&str, Vec<u8>, Vec<RawFd>)> = vec![
        ("request 0", message(0, plain, &[]), vec![]),
        ("an unknown request", message(99, plain, &[]), vec![]),
        ("a request of a feature that is not offered", message(31, plain, &[0; 24]), vec![]),
        ("version 0", message(raw::GET_FEATURES, 0, &[]), vec![]),
        ("reserved flags", message(raw::GET_FEATURES, 1 | 16, &[]), vec![]),
        ("a reply to nothing", message(raw::SET_FEATURES, 1 | 4, &words(&[0])), vec![]),
        ("two GiB of body", huge, vec![]),
        ("a body that is cut short", message(raw::SET_FEATURES, plain, &words(&[0]))[..15].to_vec(), vec![]),
        ("no body", message(raw::SET_FEATURES, plain, &[]), vec![]),
        ("too much body", message(raw::SET_FEATURES, plain, &words(&[0, 0])), vec![]),
        ("a body where there is none", message(raw::SET_OWNER, plain, &words(&[0])), vec![]),
        ("a descriptor where there is none", message(raw::SET_OWNER, plain, &[]), vec![fd]),
        ("a ring that does not exist", message(raw::SET_VRING_NUM, plain, &state(4, 16)), vec![]),
        ("a ring far away", message(raw::SET_VRING_BASE, plain, &state(u32::MAX, 0)), vec![]),
        ("the base of a ring that does not exist", message(raw::GET_VRING_BASE, plain, &state(4, 0)), vec![]),
        ("neither on nor off", message(raw::SET_VRING_ENABLE, plain, &state(0, 2)), vec![]),
        ("odd addresses", message(raw::SET_VRING_ADDR, plain, &[state(0, 0), words(&[1, 3, 5, 0])].concat()), vec![]),
        ("a doorbell without a descriptor", message(raw::SET_VRING_KICK, plain, &words(&[0])), vec![]),
        ("a doorbell that is none, with one", message(raw::SET_VRING_KICK, plain, &words(&[0x100])), vec![fd]),
        ("two doorbells", message(raw::SET_VRING_KICK, plain, &words(&[0])), vec![fd, fd]),
        ("a doorbell of no ring", message(raw::SET_VRING_KICK, plain, &words(&[200])), vec![fd]),
        ("no regions", message(raw::SET_MEM_TABLE, plain, &words(&[0])), vec![]),
        ("a region without its file", message(raw::SET_MEM_TABLE, plain, &table(1)), vec![]),
        ("more files than regions", message(raw::SET_MEM_TABLE, plain, &table(1)), vec![fd, fd]),
        ("more regions than the message holds", message(raw::SET_MEM_TABLE, plain, &table(8)), vec![fd; 8]),
        ("more regions than there are", message(raw::SET_MEM_TABLE, plain, &table(u64::from(u32::MAX))), vec![fd]),
        ("an empty region", message(raw::SET_MEM_TABLE, plain, &words(&[1, 0, 0, 0, 0])), vec![fd]),
        ("a region that wraps", message(raw::SET_MEM_TABLE, plain, &words(&[1, u64::MAX, 4096, 0, 0])), vec![fd]),
        ("a slot without a file", message(raw::ADD_MEM_REG, plain, &words(&[0, 0, 4096, 0, 0])), vec![]),
        ("a configuration of no size", message(raw::GET_CONFIG, plain, &[0; 12]), vec![]),
        ("a configuration beyond all", message(raw::GET_CONFIG, plain, &[0xff; 12]), vec![]),
    ];
    for (number, (what, bytes, fds)) in cases.iter().enumerate() {
        ends(&bed, number + 1, what, bytes, fds);
    }
    // Somebody decent is served by both.
    drop(bed.connect(0));
    guest.front_end.stop_queue(0).unwrap();
    assert_eq!(neighbour.function.count(&Call::Detach), 0);
    assert!(neighbour.warnings().is_empty(), "{:?}", neighbour.warnings());
}

#[test]
fn a_front_end_that_hangs_up_in_a_header_is_just_gone() {
    let bed = Bed::server("hang-up");
    for (number, length) in (0..12).enumerate() {
        let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
        front_end.send_bytes(&message(raw::SET_FEATURES, raw::PLAIN, &[])[..length.max(1)], &[]);
        drop(front_end);
        bed.function.wait_for_detached(number + 1);
    }
    assert!(bed.warnings().is_empty(), "{:?}", bed.warnings());
}

#[test]
fn memory_that_cannot_be_used_is_answered_with_no() {
    let bed = Bed::server("bad-memory");
    let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
    let memory = GuestMemory::new(0, 1 << 20).unwrap();
    let user = memory.user_address();
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let folder = std::fs::File::open("/tmp").unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let good = |front_end: &mut RawFrontEnd| {
        front_end.ask(raw::SET_MEM_TABLE, &words(&[1, 0, 1 << 20, user, 0]), &[memory.fd()])
    };
    assert_eq!(good(&mut front_end), 0);
    let whole = [1, 0, 1 << 20, user, 0];
    let cases: [(&str, &[u64], Vec<RawFd>); 10] = [
        ("a file that is too short", &[1, 0, 2 << 20, user, 0], vec![memory.fd()]),
        ("an offset beyond its end", &[1, 0, 4096, user, 1 << 30], vec![memory.fd()]),
        ("an offset that almost wraps", &[1, 0, 4096, user, u64::MAX - 4096], vec![memory.fd()]),
        ("a pipe", &whole, vec![pipe.as_raw_fd()]),
        ("a socket", &whole, vec![socket.as_raw_fd()]),
        ("an eventfd", &whole, vec![event.as_raw_fd()]),
        ("a folder", &whole, vec![folder.as_raw_fd()]),
        ("regions that overlap", &[2, 0, 8192, user, 0, 4096, 8192, user + 8192, 0], vec![memory.fd(); 2]),
        ("the same twice", &[2, 0, 8192, user, 0, 0, 8192, user, 0], vec![memory.fd(); 2]),
        ("a good one and a short one", &[2, 0, 8192, user, 0, 1 << 32, 2 << 20, user, 0], vec![memory.fd(); 2]),
    ];
    for (what, body, fds) in &cases {
        assert_ne!(front_end.ask(raw::SET_MEM_TABLE, &words(body), fds), 0, "{what}");
        // Said once, for each conversation.
        assert_eq!(bed.warnings().len(), 1, "{what}: {:?}", bed.warnings());
        assert_eq!(bed.function.with(|record| record.memory.regions().len()), 1, "{what}: the old table stays");
    }
    // An ordinary file is memory too, from any offset.
    let body = words(&[1, 1 << 32, (1 << 20) - 512, 1 << 40, 512]);
    assert_eq!(front_end.ask(raw::SET_MEM_TABLE, &body, &[file.as_raw_fd()]), 0);
    assert_eq!(good(&mut front_end), 0);
}

#[test]
fn a_configuration_that_no_space_holds_is_answered_with_nothing() {
    let bed = Bed::server("bad-config");
    let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
    for (offset, size) in [(256_u32, 1_u32), (255, 2), (0, 257), (0xf00, 0x100)] {
        let head: Vec<u8> = [offset, size, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        front_end.send(raw::GET_CONFIG, raw::PLAIN, &[&head[..], &vec![0; size as usize]].concat(), &[]);
        // The same head with a size of 0 is how the protocol says no.
        let no: Vec<u8> = [offset, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(front_end.reply(raw::GET_CONFIG), no);
    }
}

#[test]
fn what_is_no_eventfd_is_no_doorbell() {
    let bed = Bed::server("bad-event");
    let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let memory = GuestMemory::new(0, 4096).unwrap();
    for fd in [pipe.as_raw_fd(), memory.fd(), front_end.0.as_raw_fd()] {
        for request in raw::SET_VRING_KICK..=raw::SET_VRING_ERR {
            assert_ne!(front_end.ask(request, &words(&[0]), &[fd]), 0);
        }
    }
    // An event in blocking mode is no way to stall a reactor: writing to a full one comes back.
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    assert_eq!(front_end.ask(raw::SET_VRING_ERR, &words(&[0]), &[full.as_raw_fd()]), 0);
    bed.function.with(|record| record.host.clone()).unwrap().needs_reset(None);
}

#[test]
fn ring_parameters_out_of_bounds_are_answered_with_no() {
    let bed = Bed::server("bad-ring");
    let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
    let memory = GuestMemory::new(0, 1 << 20).unwrap();
    let body = words(&[1, 0, memory.len(), memory.user_address(), 0]);
    assert_eq!(front_end.ask(raw::SET_MEM_TABLE, &body, &[memory.fd()]), 0);
    for size in [0, 257, 0x1_0000, 0x1_0040, u32::MAX] {
        assert_ne!(front_end.ask(raw::SET_VRING_NUM, &state(0, size), &[]), 0, "{size} entries");
    }
    assert_ne!(front_end.ask(raw::SET_VRING_BASE, &state(0, 0x1_0000), &[]), 0, "not an available index");
    // A ring whose addresses are nowhere does not start, and says so by its error event too: a guest chooses them.
    let error = EventFd::new(EFD_NONBLOCK).unwrap();
    assert_eq!(front_end.ask(raw::SET_VRING_ERR, &words(&[0]), &[error.as_raw_fd()]), 0);
    assert_eq!(front_end.ask(raw::SET_VRING_NUM, &state(0, 64), &[]), 0);
    let beyond = memory.user_address() + memory.len();
    let addresses = [state(0, 0), words(&[beyond, beyond, beyond, 0])].concat();
    assert_eq!(front_end.ask(raw::SET_VRING_ADDR, &addresses, &[]), 0);
    assert_eq!(front_end.ask(raw::SET_VRING_KICK, &words(&[0x100]), &[]), 0);
    assert!(error.read().is_err());
    front_end.send(raw::SET_VRING_ENABLE, raw::PLAIN, &state(0, 1), &[]);
    // Set right, it runs.
    let at = |offset: u64| memory.user_address() + offset;
    let addresses = [state(0, 0), words(&[at(0), at(0x2000), at(0x3000), 0])].concat();
    assert_eq!(front_end.ask(raw::SET_VRING_ADDR, &addresses, &[]), 0);
    assert_eq!(bed.function.running(), [0]);
    assert!(error.read().is_ok(), "the guest's driver was told");
}

#[test]
fn a_refusal_that_cannot_be_told_ends_the_connection() {
    let bed = Bed::server("untold");
    let cases = [(raw::SET_FEATURES, words(&[1 << 50])), (raw::SET_VRING_NUM, state(0, 0))];
    for (number, (request, body)) in cases.iter().enumerate() {
        let mut front_end = RawFrontEnd::negotiated(&bed.socket(), features::VERSION_1);
        front_end.send(*request, raw::PLAIN, body, &[]);
        front_end.wait_for_end();
        bed.function.wait_for_detached(number + 1);
        assert_eq!(bed.warnings().len(), number + 1, "{:?}", bed.warnings());
    }
    // Without REPLY_ACK even a front end that asks for an answer gets none.
    let mut front_end = RawFrontEnd::connect(&bed.socket());
    front_end.send(raw::SET_FEATURES, raw::NEED_REPLY, &words(&[1 << 50]), &[]);
    front_end.wait_for_end();
}
