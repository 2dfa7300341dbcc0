//! A front end's messages, with any content and any descriptors, in a session over a real socket. The session ends with the
//! connection at the latest, and what it passes on to the function behind it is sound.
#![no_main]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use device_svc::dma::{HostMemory, Removed};
use device_svc::driver::GuestMemory;
use device_svc::link::vhost_user::{Role, VhostUserLink, VhostUserSettings};
use device_svc::link::{FunctionSide, HostEvents, QueuePosition, QueueStart, Refusal};
use device_svc::mirror::check_addresses;
use device_svc::virtqueue::features;
use fuzz::Choices;
use libfuzzer_sys::fuzz_target;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const QUEUES: u16 = 2;
const QUEUE_SIZE_MAX: u16 = 256;
const OFFERED: u64 = features::VERSION_1 | features::INDIRECT | features::EVENT_INDEX | features::RING_PACKED;
const MESSAGES_MAX: u32 = 64;

/// The function behind the link: it checks what it is told, and counts the front ends that have gone.
#[derive(Default)]
struct Function {
    state: Mutex<State>,
    gone: Condvar,
}

#[derive(Default)]
struct State {
    memory: Arc<HostMemory>,
    events: Option<Arc<dyn HostEvents>>,
    running: [Option<QueueStart>; QUEUES as usize],
    fronts_gone: u64,
}

impl Function {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }
}

impl FunctionSide for Function {
    fn offered_features(&self) -> u64 {
        OFFERED
    }

    fn queue_count(&self) -> u16 {
        QUEUES
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    fn config_space(&self) -> Vec<u8> {
        vec![7; 60]
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Refusal> {
        if offset == 32 && data.len() == 1 { Ok(()) } else { Err(Refusal::Invalid("no such field".to_owned())) }
    }

    fn accept_features(&self, features: u64) -> Result<(), Refusal> {
        if features & !OFFERED == 0 { Ok(()) } else { Err(Refusal::Invalid("not offered".to_owned())) }
    }

    fn attach(&self, events: Arc<dyn HostEvents>) {
        assert!(self.state().events.replace(events).is_none(), "one front end at a time");
    }

    fn set_memory(&self, memory: Arc<HostMemory>) {
        let mut end = 0;
        for region in memory.regions() {
            assert!(region.start().0 >= end && region.length() > 0, "regions overlap");
            end = region.start().0 + region.length();
            assert!(region.mapping().is_some_and(|mapping| region.length() <= mapping.len() as u64));
        }
        self.state().memory = memory;
    }

    fn release_memory(&self, _removed: Removed) {}

    fn start_queue(&self, start: QueueStart) -> Result<(), Refusal> {
        let mut state = self.state();
        assert!(start.index < QUEUES && start.size > 0 && start.size <= QUEUE_SIZE_MAX);
        assert_eq!(start.features & !OFFERED, 0, "features that were not offered");
        check_addresses(&start, &state.memory).map_err(Refusal::Invalid)?;
        let index = usize::from(start.index);
        assert!(state.running[index].is_none(), "a queue is stopped before it is started anew");
        if let Some(events) = &state.events {
            events.needs_reset(Some(start.index));
            events.config_changed();
        }
        let mut port = start.port;
        port.take_doorbell();
        port.raise_interrupt();
        state.running[index] = Some(QueueStart { port, ..start });
        Ok(())
    }

    fn forget_queue(&self, _index: u16) {}

    fn stop_queue(&self, index: u16) -> Option<QueuePosition> {
        let stopped = self.state().running[usize::from(index)].take()?;
        Some(QueuePosition { next_avail: stopped.position.next_avail, ..stopped.position })
    }

    fn reset(&self) {
        self.state().running = [None, None];
    }

    fn detach(&self) {
        let mut state = self.state();
        *state = State { fronts_gone: state.fronts_gone + 1, ..State::default() };
        self.gone.notify_all();
    }
}

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
        let link = VhostUserLink::start(settings, Arc::clone(&function) as Arc<dyn FunctionSide>).expect("it listens");
        let memory = GuestMemory::new(0, 1 << 16).expect("there is memory");
        World { function, socket, memory, _link: link, _folder: folder }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let world = world();
    let gone_before = world.function.state().fronts_gone;
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
    let mut state = world.function.state();
    while state.fronts_gone == gone_before {
        state = world.function.gone.wait(state).expect("a panic ends the process");
    }
});

/// Sends one message; returns whether it went out.
fn send(stream: &UnixStream, world: &World, choices: &mut Choices<'_>) -> bool {
    let (code, shape) = (choices.byte(), choices.byte());
    let body = body(code, shape, world, choices);
    let size = if shape & 1 == 0 { body.len() as u32 } else { choices.long() as u32 };
    let flags = if shape & 2 == 0 { 1 | u32::from(shape & 8) } else { u32::from(choices.byte()) };
    let mut bytes: Vec<u8> = [code.into(), flags, size].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
    bytes.extend(body);
    let fds: Vec<OwnedFd> = (0..fd_count(code, shape, choices)).filter_map(|_| fd(code, world, choices)).collect();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    // What the other side does not read any more does not hold us up.
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) == Ok(bytes.len())
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

fn fd(code: u8, world: &World, choices: &mut Choices<'_>) -> Option<OwnedFd> {
    match (choices.byte() % 16, code) {
        (0, _) => Some(File::open("/dev/null").ok()?.into()),
        (1, _) => Some(UnixStream::pair().ok()?.0.into()),
        (2, _) => Some(nix::unistd::pipe().ok()?.0),
        (3, 5 | 37) | (4.., 12..=14) => Some(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).ok()?.into()),
        _ => Some(world.memory.file().try_clone().ok()?.into()),
    }
}
