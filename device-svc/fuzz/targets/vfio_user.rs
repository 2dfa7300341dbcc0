//! A VMM's messages, with any content and any descriptors, in a session over a real socket. The session ends with the connection
//! at the latest, what it passes on to the function behind it is sound, and the next VMM is served as if nothing had been.
#![no_main]

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use device_svc::driver::GuestMemory;
use device_svc::link::FunctionSide;
use device_svc::link::vfio_user::framing::{
    DESCRIPTORS_MAX, FLAG_ERROR, FLAG_TYPE, Framing, FramingError, Header, Message, TYPE_COMMAND, TYPE_REPLY,
};
use device_svc::link::vfio_user::message::{
    BODY_BYTES_MAX, Capabilities, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionAccess, RegionInfo,
    SmallWrite, VersionBody, command, version_text,
};
use device_svc::link::vfio_user::{VfioUserLink, VfioUserSettings};
use device_svc::pci::Identity;
use fuzz::Choices;
use fuzz::function::{Function, OFFERED, Wanted, fd, send_bytes};
use libfuzzer_sys::fuzz_target;
use zerocopy::{FromBytes, IntoBytes};

const MESSAGES_MAX: u32 = 128;
const PAGE: u64 = 4096;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;

/// Beside the protocol's commands: some that together start a queue.
const START_QUEUE: u8 = 32;

/// A link that listens.
struct World {
    function: Arc<Function>,
    socket: PathBuf,
    memory: GuestMemory,
    _link: VfioUserLink,
    _folder: tempfile::TempDir,
}

impl World {
    fn new(full: bool) -> Self {
        let folder = tempfile::tempdir().expect("there is a temporary folder");
        let socket = folder.path().join("s");
        let function = Arc::new(Function::default());
        let settings = VfioUserSettings {
            function: "f".to_owned(),
            socket: socket.clone(),
            mode: 0o600,
            identity: Identity::BLK,
            mapped: full,
            msix: full,
        };
        let link =
            VfioUserLink::start(settings, Arc::clone(&function) as Arc<dyn FunctionSide>, None).expect("it listens");
        let memory = GuestMemory::new(0, 16 * PAGE).expect("there is memory");
        Self { function, socket, memory, _link: link, _folder: folder }
    }
}

/// They live for the whole process: one with MSI-X and notify registers that can be mapped, one with neither.
fn world(full: bool) -> &'static World {
    static WORLDS: OnceLock<[World; 2]> = OnceLock::new();
    &WORLDS.get_or_init(|| [World::new(false), World::new(true)])[usize::from(full)]
}

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Choices(bytes);
    let world = world(choices.byte() & 1 != 0);
    let gone_before = world.function.fronts_gone();
    let stream = UnixStream::connect(&world.socket).expect("the link listens");
    for number in 0..MESSAGES_MAX {
        if choices.is_empty() || !send(&stream, world, number as u16, &mut choices) {
            break;
        }
    }
    // Said everything; the answers are read to their end, which is the session's.
    let _ = stream.shutdown(Shutdown::Write);
    let mut heard = Framing::new(stream, BODY_BYTES_MAX, DESCRIPTORS_MAX);
    let mut message = Message::default();
    let end = loop {
        match heard.receive(&mut message) {
            Ok(()) => check_heard(&message),
            Err(end) => break end,
        }
    };
    assert!(matches!(end, FramingError::Closed), "the link broke the protocol: {end}");
    drop(heard);
    world.function.wait_until_gone(gone_before);
    converse_well(world);
});

/// What the link says is a whole reply, or a question about memory.
fn check_heard(message: &Message) {
    let Header { command, flags, error, .. } = message.header;
    if flags & FLAG_TYPE == TYPE_COMMAND {
        assert!(matches!(command, command::DMA_READ | command::DMA_WRITE));
        let (access, data) = DmaAccess::read_from_prefix(&message.body).expect("a question is whole");
        assert!(command == command::DMA_READ || data.len() as u64 == access.count);
        return;
    }
    assert_eq!(flags & FLAG_TYPE, TYPE_REPLY);
    assert_eq!(flags & FLAG_ERROR != 0, error != 0, "an error has a number, and nothing else has");
    if flags & FLAG_ERROR != 0 {
        return assert!(message.body.is_empty() && message.fds.is_empty());
    }
    if command == command::REGION_READ {
        let (access, data) = RegionAccess::read_from_prefix(&message.body).expect("a reply is whole");
        assert_eq!(access.count as usize, data.len(), "as many bytes as were asked for");
    }
}

/// A VMM that means well comes next, and is served.
fn converse_well(world: &World) {
    let gone_before = world.function.fronts_gone();
    let stream = UnixStream::connect(&world.socket).expect("the link listens");
    let mut framing = Framing::new(stream, BODY_BYTES_MAX, DESCRIPTORS_MAX);
    let version = [VersionBody { major: 0, minor: 1 }.as_bytes(), &version_text(&Capabilities::default())].concat();
    let info = DeviceInfo { argsz: 16, ..DeviceInfo::default() };
    for (command, body) in [(command::VERSION, &version[..]), (command::DEVICE_GET_INFO, info.as_bytes())] {
        let header = Header { id: command, command, flags: TYPE_COMMAND, ..Header::default() };
        framing.send(header, &[body], &[]).expect("it is taken");
        let mut message = Message::default();
        framing.receive(&mut message).expect("it is answered");
        let got = message.header;
        assert_eq!((got.id, got.command, got.flags), (command, command, TYPE_REPLY), "error {}", got.error);
    }
    drop(framing);
    world.function.wait_until_gone(gone_before);
}

/// Sends one message, or those that start a queue; returns whether all went out.
fn send(stream: &UnixStream, world: &World, id: u16, choices: &mut Choices<'_>) -> bool {
    let (code, shape) = (choices.byte(), choices.byte());
    if code == START_QUEUE {
        return start_queue(choices).iter().all(|body| {
            let header = Header { id, command: command::REGION_WRITE, ..Header::default() };
            send_bytes(stream, &message(header, body), &[])
        });
    }
    let body = body(code, shape, choices);
    // A reply names the question that it answers; the link's own start at 0.
    let answers = matches!(u16::from(code), command::DMA_READ | command::DMA_WRITE);
    let flags = if shape & 2 == 0 { u32::from(answers) | u32::from(shape & 16) } else { choices.byte().into() };
    let id = if answers { u16::from(choices.byte() % 4) } else { id };
    let header = Header { id, command: code.into(), flags, ..Header::default() };
    let mut bytes = message(header, &body);
    if shape & 1 != 0 {
        let size = choices.long() as u32;
        bytes[4..8].copy_from_slice(&size.to_ne_bytes());
    }
    let fds: Vec<OwnedFd> =
        (0..fd_count(code, shape, choices)).filter_map(|_| fd(wanted(code), &world.memory, choices)).collect();
    send_bytes(stream, &bytes, &fds)
}

fn message(header: Header, body: &[u8]) -> Vec<u8> {
    [Header { size: (size_of::<Header>() + body.len()) as u32, ..header }.as_bytes(), body].concat()
}

/// A body that fits the command, with a field that may not; or bytes as they come.
fn body(code: u8, shape: u8, choices: &mut Choices<'_>) -> Vec<u8> {
    if shape & 4 != 0 {
        let count = usize::from(choices.byte());
        return choices.bytes(count).to_vec();
    }
    let mut page = |mask: u8| u64::from(choices.byte() & mask) * PAGE;
    let mut body = match u16::from(code) {
        command::VERSION => {
            let texts: [&[u8]; 4] = [
                b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":8,\"write_multiple\":true}}\0",
                b"",
                b"{\"capabilities\":{\"migration\":{\"pgsize\":4096},\"twin_socket\":{\"supported\":true}}}\0",
                b"{\"capabilities\":7",
            ];
            [VersionBody { major: 0, minor: 1 }.as_bytes(), texts[usize::from(choices.byte() % 4)]].concat()
        }
        command::DMA_MAP => {
            let (offset, address, size) = (page(7), page(15), page(7) + PAGE);
            let flags = u32::from(!choices.byte() & 3);
            DmaMap { argsz: 32, flags, offset, address, size }.as_bytes().to_vec()
        }
        command::DMA_UNMAP => {
            let (address, size) = (page(15), page(15) + PAGE);
            DmaUnmap { argsz: 24, flags: 0, address, size }.as_bytes().to_vec()
        }
        command::DEVICE_GET_INFO => DeviceInfo { argsz: 16, ..DeviceInfo::default() }.as_bytes().to_vec(),
        command::DEVICE_GET_REGION_INFO => {
            let index = u32::from(choices.byte() % 10);
            let info = RegionInfo { argsz: 32 + u32::from(choices.byte() & 32), index, ..RegionInfo::default() };
            info.as_bytes().to_vec()
        }
        command::DEVICE_GET_IRQ_INFO => {
            IrqInfo { argsz: 16, index: u32::from(choices.byte() % 6), ..IrqInfo::default() }.as_bytes().to_vec()
        }
        command::DEVICE_SET_IRQS => {
            let bits = choices.byte();
            let flags = 1 << (bits % 3) | 8 << (bits / 4 % 3);
            let (start, count) = (u32::from(choices.byte() % 4), u32::from(choices.byte() % 5));
            let index = if bits & 128 == 0 { MSIX } else { u32::from(bits / 16 % 4) };
            let set = IrqSet { argsz: 20 + count, flags, index, start, count };
            [set.as_bytes(), choices.bytes(count as usize)].concat()
        }
        command::REGION_READ => access(choices).0.as_bytes().to_vec(),
        command::REGION_WRITE => {
            let (access, data) = access(choices);
            [access.as_bytes(), &data].concat()
        }
        command::DMA_READ => {
            let access = DmaAccess { address: page(15), count: u64::from(choices.byte() % 20) };
            [access.as_bytes(), &vec![7; access.count as usize]].concat()
        }
        command::REGION_WRITE_MULTI => {
            let count = usize::from(choices.byte() % 5);
            let mut body = (count as u64).to_ne_bytes().to_vec();
            for _ in 0..count {
                let (access, written) = access(choices);
                let mut data = [0; 8];
                data[..written.len().min(8)].copy_from_slice(&written[..written.len().min(8)]);
                let RegionAccess { offset, region, count } = access;
                body.extend(SmallWrite { offset, region, count, data }.as_bytes());
            }
            body
        }
        _ => Vec::new(),
    };
    if shape & 8 != 0 {
        let (at, value) = (usize::from(choices.byte()), choices.long());
        for (place, byte) in body.iter_mut().skip(at & !3).zip(value.to_le_bytes()) {
            *place = byte;
        }
    }
    body
}

/// An access to a region, and its data if it is a write.
fn access(choices: &mut Choices<'_>) -> (RegionAccess, Vec<u8>) {
    let bits = choices.byte();
    let region = [0, 0, 0, 2, CONFIG, CONFIG, 0, u32::from(bits / 8)][usize::from(bits % 8)];
    let count = [1, 2, 4, 8, 2, 4, 16, bits][usize::from(choices.byte() % 8)];
    let structure = [0, 0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0][usize::from(bits / 8 % 8)];
    let offset = if region == CONFIG { 0 } else { structure } + u64::from(choices.byte());
    let data = choices.bytes(count.into()).to_vec();
    (RegionAccess { offset, region, count: count.into() }, data)
}

/// The writes that let a queue run, at addresses that may be mapped.
fn start_queue(choices: &mut Choices<'_>) -> Vec<Vec<u8>> {
    let write = |region: u32, offset: u64, data: &[u8]| {
        [RegionAccess { offset, region, count: data.len() as u32 }.as_bytes(), data].concat()
    };
    let (queue, features) = (u16::from(choices.byte() % 3), OFFERED & (choices.long() | 1 << 32));
    let size = 1_u16 << (choices.byte() % 10);
    let mut writes = vec![write(CONFIG, 4, &6_u16.to_le_bytes()), write(0, 0x14, &[1]), write(0, 0x14, &[3])];
    for half in 0..2_u32 {
        writes.push(write(0, 8, &half.to_le_bytes()));
        writes.push(write(0, 12, &((features >> (32 * half)) as u32).to_le_bytes()));
    }
    writes.push(write(0, 0x14, &[11]));
    writes.push(write(0, 0x16, &queue.to_le_bytes()));
    writes.push(write(0, 0x18, &size.to_le_bytes()));
    writes.push(write(0, 0x1a, &u16::from(choices.byte()).to_le_bytes()));
    for field in [0x20, 0x28, 0x30] {
        let at = u64::from(choices.byte() & 15) * PAGE;
        writes.push(write(0, field, &at.to_le_bytes()));
    }
    writes.push(write(0, 0x1c, &1_u16.to_le_bytes()));
    writes.push(write(0, 0x14, &[15]));
    writes
}

/// As many descriptors as the message has, or not.
fn fd_count(code: u8, shape: u8, choices: &mut Choices<'_>) -> u8 {
    match u16::from(code) {
        _ if shape & 32 != 0 => choices.byte() % 40,
        command::DMA_MAP if shape & 64 == 0 => 1,
        command::DEVICE_SET_IRQS => choices.byte() % 4,
        _ => 0,
    }
}

/// What kind of descriptor the message has.
const fn wanted(code: u8) -> Wanted {
    match code as u16 {
        command::DMA_MAP => Wanted::Memory,
        command::DEVICE_SET_IRQS => Wanted::Event,
        _ => Wanted::Other,
    }
}
