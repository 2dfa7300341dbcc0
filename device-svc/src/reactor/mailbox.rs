//! What other threads ask of a reactor, and the bounded queue that carries it.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::asleep::Asleep;
use crate::device::{AnyLane, Outlet};
use crate::dma::{HostMemory, Removed};
use crate::link::{QueuePosition, QueueStart};

/// Messages that may wait; each is handled within a turn, and a poster waits if there are more.
const CAPACITY: usize = 256;

/// Names a lane from outside: the function's number and the queue's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QueueKey {
    /// The function's number, never used twice in a process.
    pub function: u32,
    /// The queue's number in the function.
    pub queue: u16,
}

/// A queue that has stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stopped {
    /// Where it would go on.
    pub position: QueuePosition,
    /// Whether requests remain that wait for a server that is away.
    pub parked: bool,
}

/// What a reactor is asked to do. Replies come when it is done, which may take turns; a reply whose asker is gone is
/// dropped.
pub enum Message {
    /// From now on this is where the lanes of a function on this reactor lead to.
    OpenOutlet {
        /// The function's number.
        function: u32,
        /// Its channels.
        outlet: Outlet,
    },
    /// Reset the function and drop its channels here.
    CloseOutlet {
        /// The function's number.
        function: u32,
        /// Told when it is done.
        reply: Sender<()>,
    },
    /// Turn this lane. A stopped lane of the same queue is abandoned.
    Start {
        /// The queue.
        key: QueueKey,
        /// Its lane.
        lane: AnyLane,
        /// Whether no queue that the function has handed over has run elsewhere since.
        unchanged: bool,
    },
    /// A stopped lane with parked requests goes on.
    Resume {
        /// The queue.
        key: QueueKey,
        /// Its port; the rest is as it was.
        start: QueueStart,
        /// As for a start.
        unchanged: bool,
    },
    /// Stop a queue. Its lane stays for the requests that are parked in it.
    Stop {
        /// The queue.
        key: QueueKey,
        /// Whether nothing shall begin any more that is in the record of its requests in flight.
        hand_over: bool,
        /// Told where it stopped; `None` if it was not there.
        reply: Sender<Option<Stopped>>,
    },
    /// Abandon a queue that has stopped.
    Forget {
        /// The queue.
        key: QueueKey,
    },
    /// Abandon all queues of a function here.
    Reset {
        /// The function's number.
        function: u32,
        /// Told when the VM's memory is not touched any more.
        reply: Sender<()>,
    },
    /// The function's host memory is this from now on.
    SetMemory {
        /// The function's number.
        function: u32,
        /// The new table.
        memory: Arc<HostMemory>,
        /// Told when all its lanes here use it.
        reply: Sender<()>,
    },
    /// This memory has left the function's table.
    LetGo {
        /// The function's number.
        function: u32,
        /// What has left it.
        removed: Arc<Removed>,
        /// Told when no lane touches it any more.
        reply: Sender<()>,
    },
    /// End the thread.
    Shutdown,
}

/// The mailbox of one reactor: a bounded queue, the sleep flag and the bell.
pub(super) struct Mailbox {
    queue: ArrayQueue<Message>,
    /// Lanes shall look again at what they share with other threads.
    nudged: AtomicBool,
    pub(super) asleep: Asleep,
    bell: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { queue: ArrayQueue::new(CAPACITY), nudged: AtomicBool::new(false), asleep: Asleep::default(), bell })
    }

    pub(super) fn post(&self, message: Message) {
        let mut message = message;
        while let Err(back) = self.queue.push(message) {
            message = back;
            self.ring_if_asleep();
            std::thread::yield_now();
        }
        self.ring_if_asleep();
    }

    /// Has the reactor make a turn if it sleeps. Never waits, so reactors may call it.
    pub(super) fn nudge(&self) {
        // Release: see `take`.
        self.nudged.store(true, Ordering::Release);
        self.ring_if_asleep();
    }

    fn ring_if_asleep(&self) {
        if self.asleep.must_ring() {
            // The only failure is a counter at its maximum, and then the bell rings already.
            let _ = self.bell.write(1);
        }
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && !self.nudged.load(Ordering::Relaxed)
    }

    /// The next message; a nudge ends with the last one.
    pub(super) fn take(&self) -> Option<Message> {
        let message = self.queue.pop();
        if message.is_none() {
            // Acquire: what was changed before the nudge is seen by the turn that follows.
            self.nudged.swap(false, Ordering::Acquire);
        }
        message
    }

    pub(super) fn bell_fd(&self) -> RawFd {
        self.bell.as_fd().as_raw_fd()
    }

    pub(super) fn silence(&self) {
        let _ = self.bell.read();
    }
}
