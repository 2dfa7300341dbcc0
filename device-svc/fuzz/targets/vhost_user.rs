//! A front end's messages, with any content and any descriptors, in a session over a real socket. The session ends with the
//! connection at the latest, and what it passes on to the function behind it is sound.
#![no_main]

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use device_svc::driver::GuestMemory;
use device_svc::link::FunctionSide;
use device_svc::link::vhost_user::{Role, VhostUserLink, VhostUserSettings};
use fuzz::Choices;
use fuzz::function::{Function, OFFERED, Wanted, fd, send_bytes};
use libfuzzer_sys::fuzz_target;

const MESSAGES_MAX: u32 = 64;

/// What lives for the whole process: a link that listens, and a guest's memory.
struct World {
    function: Arc<Function>,
    socket: PathBuf,
    memory: GuestMemory,
    _link: VhostUserLink,
    _folder: tempfile::TempDir,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let folder = tempfile::tempdir().expect("there is a temporary folder");
        let socket = folder.path().join("s");
        let function = Arc::new(Function::default());
        let settings =
            VhostUserSettings { function: "f".to_owned(), socket: socket.clone(), role: Role::Server { mode: 0o600 } };
        let link =
            VhostUserLink::start(settings, Arc::clone(&function) as Arc<dyn FunctionSide>, None).expect("it listens");
        let memory = GuestMemory::new(0, 1 << 16).expect("there is memory");
        World { function, socket, memory, _link: link, _folder: folder }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let world = world();
    let gone_before = world.function.fronts_gone();
    let mut stream = UnixStream::connect(&world.socket).expect("the link listens");
    let mut choices = Choices(bytes);
    for _ in 0..MESSAGES_MAX {
        if choices.is_empty() || !send(&stream, world, &mut choices) {
            break;
        }
    }
    // Said everything; the answers are read to their end, which is the session's.
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
    drop(stream);
    world.function.wait_until_gone(gone_before);
});

/// Sends one message; returns whether it went out.
fn send(stream: &UnixStream, world: &World, choices: &mut Choices<'_>) -> bool {
    let (code, shape) = (choices.byte(), choices.byte());
    let body = body(code, shape, world, choices);
    let size = if shape & 1 == 0 { body.len() as u32 } else { choices.long() as u32 };
    let flags = if shape & 2 == 0 { 1 | u32::from(shape & 8) } else { u32::from(choices.byte()) };
    let mut bytes: Vec<u8> = [code.into(), flags, size].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
    bytes.extend(body);
    let fds: Vec<OwnedFd> =
        (0..fd_count(code, shape, choices)).filter_map(|_| fd(wanted(code), &world.memory, choices)).collect();
    send_bytes(stream, &bytes, &fds)
}

/// A body that fits the message, with a value or two that may not; or bytes as they come.
fn body(code: u8, shape: u8, world: &World, choices: &mut Choices<'_>) -> Vec<u8> {
    if shape & 4 != 0 {
        let count = usize::from(choices.byte());
        return choices.bytes(count).to_vec();
    }
    let index = u64::from(choices.byte() % 3);
    let size = world.memory.len();
    let user = 0x7000_0000;
    let mut words = match code {
        2 => vec![OFFERED & choices.long() | 1 << 30],
        16 => vec![0xffff_ffff],
        5 => {
            let count = u64::from(choices.byte() % 4);
            let region = |number: u64| [number * size, size, user + number * size, 0];
            std::iter::once(count).chain((0..count).flat_map(region)).collect()
        }
        8 => vec![index | u64::from(choices.byte()) << 32],
        9 => vec![index, user, user + 0x4000, user + 0x2000, 0],
        10 | 11 => vec![index | u64::from(choices.short()) << 32],
        12..=14 => vec![index | if choices.byte() & 1 == 0 { 0 } else { 0x100 }],
        18 => vec![index | u64::from(choices.byte() & 1) << 32],
        24 | 25 => {
            let (offset, count) = (choices.byte(), choices.byte());
            let mut bytes = [u32::from(offset), u32::from(count), 1].map(u32::to_le_bytes).concat();
            bytes.resize(12 + usize::from(count), offset);
            return bytes;
        }
        37 | 38 => vec![0, size * index, size, user + size * index, 0],
        _ => Vec::new(),
    };
    if shape & 16 != 0
        && let Some(word) = words.get_mut(usize::from(choices.byte() % 12))
    {
        *word = choices.long();
    }
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// As many descriptors as the message has, or not.
fn fd_count(code: u8, shape: u8, choices: &mut Choices<'_>) -> u8 {
    match code {
        _ if shape & 32 != 0 => choices.byte() % 40,
        12..=14 | 21 | 37 => 1,
        5 => choices.byte() % 4,
        _ => 0,
    }
}

/// What kind of descriptor the message has.
const fn wanted(code: u8) -> Wanted {
    match code {
        5 | 37 => Wanted::Memory,
        12..=14 => Wanted::Event,
        _ => Wanted::Other,
    }
}
