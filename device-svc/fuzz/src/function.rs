//! A function that does nothing but check what its link tells it, and what goes through a link's socket: bytes with descriptors,
//! of which some are not what is wanted.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use device_svc::dma::{HostMemory, Question, Removed};
use device_svc::driver::GuestMemory;
use device_svc::link::{FunctionSide, HostEvents, QueuePosition, QueueStart, Refusal};
use device_svc::mirror::check_addresses;
use device_svc::virtqueue::features;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::Choices;

/// Queues that it has.
pub const QUEUES: u16 = 2;
/// The largest queue.
pub const QUEUE_SIZE_MAX: u16 = 256;
/// What it offers.
pub const OFFERED: u64 = features::VERSION_1 | features::INDIRECT | features::EVENT_INDEX | features::RING_PACKED;
/// Queues below this size fail as soon as they start.
const GOOD_SIZE_MIN: u16 = 8;

/// The function behind a link: it checks what it is told, and counts the hosts' ends that have gone.
#[derive(Default)]
pub struct Function {
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
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic ends the process")
    }

    /// How many front ends have gone.
    #[must_use]
    pub fn fronts_gone(&self) -> u64 {
        self.state().fronts_gone
    }

    /// Waits until more have gone.
    pub fn wait_until_gone(&self, before: u64) {
        let mut state = self.state();
        while state.fronts_gone == before {
            state = self.gone.wait(state).expect("a panic ends the process");
        }
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
        check_regions(&memory);
        self.state().memory = memory;
    }

    fn release_memory(&self, removed: Removed) {
        let state = self.state();
        check_regions(&state.memory);
        for running in state.running.iter().flatten() {
            assert!(!removed.touches(running.descriptors, 16), "a queue runs whose ring has gone");
        }
    }

    fn start_queue(&self, start: QueueStart) -> Result<(), Refusal> {
        let mut state = self.state();
        assert!(start.index < QUEUES && start.size > 0 && start.size <= QUEUE_SIZE_MAX);
        assert_eq!(start.features & !OFFERED, 0, "features that were not offered");
        check_addresses(&start, &state.memory).map_err(Refusal::Invalid)?;
        let index = usize::from(start.index);
        assert!(state.running[index].is_none(), "a queue is stopped before it is started anew");
        ask(&state.memory, &start);
        if let Some(events) = &state.events {
            events.config_changed();
            if start.size < GOOD_SIZE_MIN {
                events.needs_reset(Some(start.index));
            }
        }
        let mut port = start.port;
        port.take_doorbell();
        port.raise_interrupt();
        state.running[index] = Some(QueueStart { port, ..start });
        Ok(())
    }

    fn forget_queue(&self, index: u16) {
        assert!(self.state().running[usize::from(index)].is_none(), "a queue is stopped before it is forgotten");
    }

    fn stop_queue(&self, index: u16) -> Option<QueuePosition> {
        let mut stopped = self.state().running[usize::from(index)].take()?;
        stopped.port.raise_interrupt();
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

fn check_regions(memory: &HostMemory) {
    let mut end = 0;
    for region in memory.regions() {
        assert!(region.start().0 >= end && region.length() > 0, "regions overlap");
        end = region.start().0 + region.length();
        assert!(region.mapping().is_none_or(|mapping| region.length() <= mapping.len() as u64));
    }
}

/// As a lane does that has to ask for its ring: one question, whose answer may come or not.
fn ask(memory: &HostMemory, start: &QueueStart) {
    let (Some(distant), false) = (memory.distant(), memory.covers(start.descriptors, 16)) else { return };
    let Ok(Some(id)) = distant.ask(start.descriptors, Question::Read(distant.bytes_max().min(16))) else { return };
    for _ in 0..4 {
        match distant.answer(id, 16) {
            Ok(None) => {}
            Ok(Some(bytes)) => return assert_eq!(bytes.len(), 16, "an answer to another question"),
            Err(_) => break,
        }
    }
    distant.forget(id);
}

/// Sends bytes and descriptors; returns whether all went out. What the other side does not read any more does not hold us up.
#[must_use]
pub fn send_bytes(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) == Ok(bytes.len())
}

/// What a message wants of its descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Memory.
    Memory,
    /// An event.
    Event,
    /// Nothing that is known here.
    Other,
}

/// Mostly what is wanted.
#[must_use]
pub fn fd(wanted: Wanted, memory: &GuestMemory, choices: &mut Choices<'_>) -> Option<OwnedFd> {
    match (choices.byte() % 16, wanted) {
        (0, _) => Some(File::open("/dev/null").ok()?.into()),
        (1, _) => Some(UnixStream::pair().ok()?.0.into()),
        (2, _) => Some(nix::unistd::pipe().ok()?.0),
        (3, Wanted::Memory) | (4.., Wanted::Event) => {
            Some(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).ok()?.into())
        }
        _ => Some(memory.file().try_clone().ok()?.into()),
    }
}
