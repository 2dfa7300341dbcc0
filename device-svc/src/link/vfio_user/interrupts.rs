//! A function's interrupts: which event is signalled for which queue, and whether it may be just now.
//!
//! Reactors raise interrupts and take no lock for it; the session's thread changes vectors, masks and events. Between the two
//! stand atomics; an event itself is taken over, under a lock, only after it has changed.
//!
//! A vector that is masked or has no event keeps its interrupt pending, and signals it when that ends. INTx is a level: it stays
//! asserted until the driver has read the ISR status, and is signalled again when the VMM unmasks it while it is.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use crate::link::event::{Bell, Event};
use crate::pci::{Command, NO_VECTOR, PciFunction};

/// ISR status: a queue has used buffers; the configuration has changed (virtio 1.3, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// An event that the VMM can change at any time.
#[derive(Debug, Default)]
struct Line {
    /// How often it was changed.
    changes: AtomicU32,
    event: Mutex<Option<Event>>,
}

impl Line {
    fn set(&self, event: Option<Event>) {
        *self.event.lock().unwrap_or_else(PoisonError::into_inner) = event;
        // Release: who sees the count finds the event.
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// A bell for the event as it is now, and the count that goes with it.
    fn bell(&self) -> (u32, Option<Bell>) {
        let event = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        let again = event.as_ref().and_then(|event| event.again().ok());
        (self.changes.load(Ordering::Acquire), again.map(Bell::new))
    }

    fn is_connected(&self) -> bool {
        self.event.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn signal_once(&self) {
        if let Some(event) = &*self.event.lock().unwrap_or_else(PoisonError::into_inner) {
            event.signal_once();
        }
    }
}

#[derive(Debug)]
struct Vector {
    line: Line,
    /// Masked by the driver, or without an event.
    closed: AtomicBool,
    pending: AtomicBool,
}

impl Default for Vector {
    fn default() -> Self {
        Self { line: Line::default(), closed: AtomicBool::new(true), pending: AtomicBool::new(false) }
    }
}

impl Vector {
    /// Whether its event is to be signalled for an interrupt that is raised now; if not, it is pending.
    fn claim(&self, all_masked: &AtomicBool) -> bool {
        let is_closed = || self.closed.load(Ordering::Relaxed) || all_masked.load(Ordering::Relaxed);
        if !is_closed() {
            return true;
        }
        self.pending.store(true, Ordering::Relaxed);
        // Our pending against their opening: whoever comes second sees the other's store, and signals.
        fence(Ordering::SeqCst);
        !is_closed() && self.pending.swap(false, Ordering::Relaxed)
    }

    /// After it was opened: whether an interrupt was pending that is to be signalled now.
    fn take_pending(&self) -> bool {
        fence(Ordering::SeqCst);
        self.pending.load(Ordering::Relaxed) && self.pending.swap(false, Ordering::Relaxed)
    }
}

/// The interrupts of one function.
#[derive(Debug)]
pub(super) struct Interrupts {
    vectors: Vec<Vector>,
    /// The vector of each queue.
    queues: Vec<AtomicU16>,
    config: AtomicU16,
    msix: AtomicBool,
    all_masked: AtomicBool,
    isr: AtomicU8,
    intx: Line,
    /// The driver forbids INTx.
    intx_disabled: AtomicBool,
    /// INTx was signalled, and the VMM has not unmasked it since.
    intx_masked: AtomicBool,
}

/// What a VMM does with one kind of interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    Mask,
    Unmask,
    Trigger,
}

impl Interrupts {
    /// For so many queues and MSI-X vectors.
    pub(super) fn new(queues: u16, vectors: u16) -> Self {
        Self {
            vectors: std::iter::repeat_with(Vector::default).take(vectors.into()).collect(),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config: AtomicU16::new(NO_VECTOR),
            msix: AtomicBool::new(false),
            all_masked: AtomicBool::new(false),
            isr: AtomicU8::new(0),
            intx: Line::default(),
            intx_disabled: AtomicBool::new(false),
            intx_masked: AtomicBool::new(false),
        }
    }

    /// MSI-X vectors.
    pub(super) fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Takes over what the registers say: vectors, masks, MSI-X or INTx. Signals what was waiting for that.
    pub(super) fn follow(&self, registers: &PciFunction) {
        for (queue, shown) in self.queues.iter().zip(registers.virtio.queues()) {
            queue.store(shown.vector, Ordering::Relaxed);
        }
        self.config.store(registers.virtio.config_vector(), Ordering::Relaxed);
        self.msix.store(registers.config.msix_enabled(), Ordering::Relaxed);
        self.all_masked.store(registers.config.msix_all_masked(), Ordering::Relaxed);
        self.intx_disabled.store(registers.config.command() & Command::INTX_DISABLE != 0, Ordering::Relaxed);
        for (number, vector) in (0..).zip(&self.vectors) {
            let closed = registers.msix.is_masked(number) || !vector.line.is_connected();
            vector.closed.store(closed, Ordering::Relaxed);
            if !closed && !registers.config.msix_all_masked() && vector.take_pending() {
                vector.line.signal_once();
            }
        }
        self.assert_intx();
    }

    /// Gives a vector its event, or takes it away; [`follow`](Self::follow) must come next.
    pub(super) fn set_vector(&self, vector: u16, event: Option<Event>) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.line.set(event);
        }
    }

    /// Gives INTx its event, or takes it away.
    pub(super) fn set_intx(&self, event: Option<Event>) {
        self.intx.set(event);
        self.intx_masked.store(false, Ordering::SeqCst);
        self.assert_intx();
    }

    /// The VMM masks INTx, unmasks it, or tries it out.
    pub(super) fn act_on_intx(&self, action: Action) {
        match action {
            Action::Mask => self.intx_masked.store(true, Ordering::SeqCst),
            Action::Unmask => {
                self.intx_masked.store(false, Ordering::SeqCst);
                self.assert_intx();
            }
            Action::Trigger => self.intx.signal_once(),
        }
    }

    /// The VMM tries a vector out.
    pub(super) fn trigger_vector(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            vector.line.signal_once();
        }
    }

    /// Whether a vector's interrupt is pending.
    pub(super) fn is_vector_pending(&self, vector: u16) -> bool {
        self.vectors.get(usize::from(vector)).is_some_and(|vector| vector.pending.load(Ordering::Relaxed))
    }

    /// Whether INTx is asserted.
    pub(super) fn is_intx_pending(&self) -> bool {
        !self.msix.load(Ordering::Relaxed) && self.isr.load(Ordering::SeqCst) != 0
    }

    /// The ISR status; reading it takes INTx back.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    /// A reset: nothing is pending any more.
    pub(super) fn forget(&self) {
        self.isr.store(0, Ordering::SeqCst);
        for vector in &self.vectors {
            vector.pending.store(false, Ordering::Relaxed);
        }
    }

    /// Whether INTx is to be signalled now; from then on it is masked, until the VMM says otherwise.
    fn claim_intx(&self) -> bool {
        self.is_intx_pending()
            && !self.intx_disabled.load(Ordering::Relaxed)
            && !self.intx_masked.swap(true, Ordering::SeqCst)
    }

    fn assert_intx(&self) {
        if self.claim_intx() {
            self.intx.signal_once();
        }
    }

    /// Raises every interrupt once. From any thread but a reactor's.
    pub(super) fn raise_all(&self) {
        if self.msix.load(Ordering::Relaxed) {
            for vector in &self.vectors {
                if vector.claim(&self.all_masked) {
                    vector.line.signal_once();
                }
            }
        } else {
            self.isr.fetch_or(ISR_QUEUE | ISR_CONFIG, Ordering::SeqCst);
            self.assert_intx();
        }
    }

    /// Raises the interrupt for a change of the configuration. From any thread but a reactor's.
    pub(super) fn raise_config(&self) {
        if !self.msix.load(Ordering::Relaxed) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
            self.assert_intx();
        } else if let Some(vector) = self.vectors.get(usize::from(self.config.load(Ordering::Relaxed)))
            && vector.claim(&self.all_masked)
        {
            vector.line.signal_once();
        }
    }
}

/// Raises one queue's interrupts; owned by the queue's reactor.
#[derive(Debug)]
pub(super) struct Raiser {
    queue: u16,
    /// What the bell belongs to: a vector, or INTx as [`NO_VECTOR`], and its count of changes.
    known: Option<(u16, u32)>,
    bell: Option<Bell>,
}

impl Raiser {
    pub(super) const fn new(queue: u16) -> Self {
        Self { queue, known: None, bell: None }
    }

    /// Raises the interrupt as the function's registers want it. Never blocks but for a moment after the VMM has changed the
    /// event.
    pub(super) fn raise(&mut self, interrupts: &Interrupts) {
        if interrupts.msix.load(Ordering::Relaxed) {
            let number = interrupts.queues[usize::from(self.queue)].load(Ordering::Relaxed);
            if let Some(vector) = interrupts.vectors.get(usize::from(number))
                && vector.claim(&interrupts.all_masked)
            {
                self.signal(number, &vector.line);
            }
        } else {
            interrupts.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
            if interrupts.claim_intx() {
                self.signal(NO_VECTOR, &interrupts.intx);
            }
        }
    }

    fn signal(&mut self, number: u16, line: &Line) {
        if self.known != Some((number, line.changes.load(Ordering::Acquire))) {
            let (changes, bell) = line.bell();
            self.known = Some((number, changes));
            self.bell = bell;
        }
        if let Some(bell) = &mut self.bell {
            bell.signal();
        }
    }
}

#[cfg(test)]
mod tests;
