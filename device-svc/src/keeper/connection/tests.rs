#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::link::vfio_user::framing::{FLAG_ERROR, TYPE_REPLY};
use crate::link::vfio_user::message::{DmaMap, DmaUnmap, IrqSet, VersionBody, command};

/// One end of a conversation.
struct Peer(Framing);

impl Peer {
    fn new(stream: &UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(framing(stream).unwrap())
    }

    fn says(&self, id: u16, command: u16, flags: u32, body: &[u8], fds: &[&File]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.0.send(Header { id, command, flags, ..Header::default() }, &[body], &fds).unwrap();
    }

    fn hears(&mut self) -> Message {
        let mut message = Message::default();
        self.0.receive(&mut message).unwrap();
        message
    }

    /// What a service does with a command of which it makes nothing but an answer.
    fn answers(&mut self, flags: u32) -> Message {
        let message = self.hears();
        let reply =
            if message.header.flags & FLAG_NO_REPLY == 0 { TYPE_REPLY | flags } else { TYPE_REPLY | FLAG_KEEPER };
        self.says(message.header.id, message.header.command, reply, &[], &[]);
        message
    }
}

/// A connection, its VMM, and the stream of its first service.
fn begin() -> (Arc<Connection>, Peer, UnixStream) {
    let (vmm, ours) = UnixStream::pair().unwrap();
    let (service, theirs) = UnixStream::pair().unwrap();
    let connection = Connection::start("f".to_owned(), ours, theirs).unwrap();
    (connection, Peer::new(&vmm), service)
}

fn next_service(connection: &Connection) -> UnixStream {
    let (service, theirs) = UnixStream::pair().unwrap();
    connection.offer(theirs);
    service
}

fn memory() -> File {
    let file = File::from(memfd_create(c"vm", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    file
}

fn inode(fds: &[OwnedFd]) -> Vec<u64> {
    fds.iter().map(|fd| File::from(fd.try_clone().unwrap()).metadata().unwrap().ino()).collect()
}

fn version() -> Vec<u8> {
    [VersionBody { major: 0, minor: 1 }.as_bytes(), b"{}\0"].concat()
}

fn map(address: u64) -> DmaMap {
    DmaMap { argsz: size_of::<DmaMap>() as u32, flags: 3, offset: address, address, size: 0x1000 }
}

#[test]
fn a_command_is_said_again_until_it_is_answered_and_never_after() {
    let (connection, mut vmm, service) = begin();
    let file = memory();
    vmm.says(1, command::VERSION, 0, &version(), &[]);
    let mut first = Peer::new(&service);
    assert_eq!(first.answers(0).header.id, 1);
    assert_eq!(vmm.hears().header.command, command::VERSION);
    vmm.says(2, command::DMA_MAP, 0, map(0).as_bytes(), &[&file]);
    vmm.says(3, command::REGION_WRITE, FLAG_NO_REPLY, b"doorbell", &[]);
    vmm.says(4, command::REGION_READ, 0, b"register", &[]);
    assert_eq!(first.hears().header.id, 2);
    // It dies when it has said half of its answer.
    first.0.send_some(&[0; 7]).unwrap();
    drop((first, service));

    let service = next_service(&connection);
    let mut second = Peer::new(&service);
    let again = second.answers(0);
    assert_eq!((again.header.command, again.header.flags & FLAG_KEEPER), (command::VERSION, FLAG_KEEPER));
    assert_eq!(second.answers(0).header.command, kept::RESTORE);
    let mapped = second.answers(0);
    assert_eq!((mapped.header.id, mapped.header.flags), (2, 0));
    assert_eq!((&mapped.body[..], inode(&mapped.fds)), (map(0).as_bytes(), vec![file.metadata().unwrap().ino()]));
    assert_eq!(vmm.hears().header.id, 2);
    assert_eq!(second.answers(0).header.id, 3);
    // The last is answered, and the service dies before anybody has read that.
    assert_eq!(second.answers(0).header.id, 4);
    drop((second, service));
    assert_eq!(vmm.hears().header.id, 4);

    let service = next_service(&connection);
    let mut third = Peer::new(&service);
    assert_eq!(third.answers(0).header.command, command::VERSION);
    let again = third.answers(0);
    assert_eq!((again.header.command, again.header.flags & FLAG_KEEPER), (command::DMA_MAP, FLAG_KEEPER));
    assert_eq!(inode(&again.fds), [file.metadata().unwrap().ino()]);
    assert_eq!(third.answers(0).header.command, kept::RESTORE);
    vmm.says(5, command::DEVICE_RESET, 0, &[], &[]);
    assert_eq!(third.answers(0).header.id, 5);
    assert_eq!(vmm.hears().header.id, 5);
}

#[test]
fn a_new_service_hears_what_is_settled_and_nothing_else() {
    let (connection, mut vmm, service) = begin();
    let (file, event) = (memory(), memory());
    let mut first = Peer::new(&service);
    let mut say = |first: &mut Peer, id, command, body: &[u8], fds: &[&File], flags| {
        vmm.says(id, command, 0, body, fds);
        first.answers(flags);
        assert_eq!(vmm.hears().header.id, id);
    };
    let unmap = |address, size| DmaUnmap { argsz: 24, flags: 0, address, size };
    let set = |start, count| IrqSet { argsz: 20, flags: 1 << 2 | 1 << 5, index: 2, start, count };
    say(&mut first, 1, command::VERSION, &version(), &[], 0);
    for address in [0x1000, 0x2000, 0x3000] {
        say(&mut first, 2, command::DMA_MAP, map(address).as_bytes(), &[&file], 0);
    }
    say(&mut first, 3, command::DMA_MAP, map(0x9000).as_bytes(), &[&file], FLAG_ERROR);
    say(&mut first, 4, command::DMA_UNMAP, unmap(0x2000, 0x1000).as_bytes(), &[], 0);
    say(&mut first, 5, command::DMA_UNMAP, unmap(0x3000, 0x1000).as_bytes(), &[], FLAG_ERROR);
    say(&mut first, 6, command::DEVICE_SET_IRQS, set(0, 3).as_bytes(), &[&event, &event, &event], 0);
    say(&mut first, 7, command::DEVICE_SET_IRQS, set(1, 1).as_bytes(), &[], 0);
    // A state that came, and whose command was never answered, does not hold.
    first.says(0, kept::STATE, FLAG_KEEPER | FLAG_NO_REPLY, b"good", &[&file]);
    say(&mut first, 8, command::DEVICE_RESET, &[], &[], 0);
    vmm.says(9, command::DEVICE_RESET, 0, &[], &[]);
    first.hears();
    first.says(0, kept::STATE, FLAG_KEEPER | FLAG_NO_REPLY, b"never", &[]);
    drop((first, service));

    let service = next_service(&connection);
    let mut second = Peer::new(&service);
    let mut told = Vec::new();
    loop {
        let message = second.answers(0);
        let is_last = message.header.command == kept::RESTORE;
        told.push(message);
        if is_last {
            break;
        }
    }
    let commands: Vec<u16> = told.iter().map(|message| message.header.command).collect();
    let (maps, irqs) = (command::DMA_MAP, command::DEVICE_SET_IRQS);
    assert_eq!(commands, [command::VERSION, maps, maps, irqs, irqs, kept::RESTORE]);
    let address = |message: &Message| DmaMap::read_from_bytes(&message.body).unwrap().address;
    assert_eq!((address(&told[1]), address(&told[2])), (0x1000, 0x3000));
    let start = |message: &Message| IrqSet::read_from_bytes(&message.body).unwrap().start;
    assert_eq!((start(&told[3]), start(&told[4])), (0, 2));
    assert_eq!((&told[5].body[..], told[5].fds.len()), (&b"good"[..], 1));
    assert_eq!(second.answers(0).header.id, 9);
    assert_eq!(vmm.hears().header.id, 9);
}

#[test]
fn answers_to_a_dead_services_questions_go_nowhere() {
    let (connection, mut vmm, service) = begin();
    let first = Peer::new(&service);
    first.says(7, command::DMA_READ, 0, b"first", &[]);
    let asked = vmm.hears();
    drop((first, service));
    let service = next_service(&connection);
    let mut second = Peer::new(&service);
    // The VMM has not said a thing, which is said.
    let nothing = second.answers(0);
    assert_eq!((nothing.header.command, nothing.body.len()), (kept::RESTORE, 0));
    second.says(7, command::DMA_READ, 0, b"second", &[]);
    let asked_again = vmm.hears();
    assert_ne!(asked.header.id, asked_again.header.id);
    vmm.says(asked.header.id, command::DMA_READ, TYPE_REPLY, b"to the first", &[]);
    vmm.says(asked_again.header.id, command::DMA_READ, TYPE_REPLY, b"to the second", &[]);
    // Nobody asked this.
    vmm.says(999, command::DMA_READ, TYPE_REPLY, b"to nobody", &[]);
    let heard = second.hears();
    assert_eq!((heard.header.id, &heard.body[..]), (7, &b"to the second"[..]));
    vmm.says(1, command::DEVICE_RESET, 0, &[], &[]);
    assert_eq!(second.answers(0).header.id, 1);
}

#[test]
fn a_vmm_cannot_say_what_only_a_keeper_may() {
    let (_connection, vmm, service) = begin();
    vmm.says(1, kept::RESTORE, FLAG_KEEPER, b"{}", &[]);
    let mut first = Peer::new(&service);
    assert_eq!(first.hears().header.flags & FLAG_KEEPER, 0);
}

#[test]
fn whoever_hangs_up_ends_the_other() {
    let (connection, vmm, service) = begin();
    drop(vmm);
    let mut first = Peer::new(&service);
    assert!(matches!(first.0.receive(&mut Message::default()), Err(FramingError::Closed)));
    while !connection.is_ended() {
        std::thread::yield_now();
    }
    // Without a service too.
    let (connection, vmm, service) = begin();
    drop((service, vmm));
    while !connection.is_ended() {
        std::thread::yield_now();
    }
    let (connection, mut vmm, _service) = begin();
    connection.end();
    assert!(matches!(vmm.0.receive(&mut Message::default()), Err(FramingError::Closed)));
}

#[test]
fn who_floods_is_not_heard_until_there_is_room() {
    let (_connection, vmm, service) = begin();
    let (count, body) = (3 * AWAITED_MAX as u16, vec![0; 1024]);
    let flood = std::thread::spawn(move || {
        for id in 0..count {
            vmm.says(id, command::REGION_WRITE, FLAG_NO_REPLY, &body, &[]);
        }
        vmm
    });
    let mut first = Peer::new(&service);
    for id in 0..count {
        assert_eq!(first.answers(0).header.id, id);
    }
    drop(flood.join().unwrap());
}

#[test]
fn what_was_refused_without_a_word_is_not_settled() {
    let (connection, vmm, service) = begin();
    let mut first = Peer::new(&service);
    vmm.says(1, command::VERSION, FLAG_NO_REPLY, &version(), &[]);
    let heard = first.hears();
    first.says(heard.header.id, kept::DONE, TYPE_REPLY | FLAG_KEEPER | FLAG_ERROR, &[], &[]);
    drop((first, service));
    let service = next_service(&connection);
    assert_eq!(Peer::new(&service).hears().header.command, kept::RESTORE);
}

#[test]
fn a_range_without_end_is_no_work() {
    let (connection, vmm, service) = begin();
    let event = memory();
    let set = |start, count| IrqSet { argsz: 20, flags: 1 << 2 | 1 << 5, index: 2, start, count };
    let mut first = Peer::new(&service);
    vmm.says(1, command::DEVICE_SET_IRQS, FLAG_NO_REPLY, set(5, 1).as_bytes(), &[&event]);
    vmm.says(2, command::DEVICE_SET_IRQS, FLAG_NO_REPLY, set(0, u32::MAX).as_bytes(), &[]);
    first.answers(0);
    first.answers(0);
    drop((first, service));
    let service = next_service(&connection);
    // None is left.
    assert_eq!(Peer::new(&service).hears().header.command, kept::RESTORE);
}

#[test]
fn a_command_that_kills_is_not_given_to_everybody() {
    let (connection, mut vmm, mut service) = begin();
    vmm.says(1, command::DEVICE_RESET, 0, &[], &[]);
    Peer::new(&service).hears();
    for _ in 0..DEATHS_MAX {
        drop(service);
        service = next_service(&connection);
        let mut peer = Peer::new(&service);
        assert_eq!(peer.answers(0).header.command, kept::RESTORE);
        assert_eq!(peer.hears().header.command, command::DEVICE_RESET);
    }
    drop(service);
    let _last = next_service(&connection);
    assert!(matches!(vmm.0.receive(&mut Message::default()), Err(FramingError::Closed)));
}
