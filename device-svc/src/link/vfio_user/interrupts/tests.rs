#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;

use super::*;
use crate::pci::{Identity, Outside, Space};
use crate::virtqueue::features;

struct Nothing;

impl Outside for Nothing {
    fn device_config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn write_device_config(&self, _offset: u32, _data: &[u8]) {}
    fn generation(&self) -> u8 {
        0
    }
    fn take_isr(&self) -> u8 {
        0
    }
    fn intx_pending(&self) -> bool {
        false
    }
    fn vector_pending(&self, _vector: u16) -> bool {
        false
    }
}

struct Bed {
    registers: PciFunction,
    interrupts: Interrupts,
    raiser: Raiser,
}

impl Bed {
    fn new(msix: bool) -> Self {
        let registers = PciFunction::new(Identity::BLK, features::VERSION_1, 2, 64, msix);
        let interrupts = Interrupts::new(2, registers.msix.vectors());
        Self { registers, interrupts, raiser: Raiser::new(1) }
    }

    fn write(&mut self, space: Space, at: u64, data: &[u8]) {
        self.registers.write(space, at, data, &Nothing).unwrap();
        self.interrupts.follow(&self.registers);
    }

    /// Queue 1 and the configuration get these vectors.
    fn assign(&mut self, queue: u16, config: u16) {
        self.write(Space::Bar(0), 0x10, &config.to_le_bytes());
        self.write(Space::Bar(0), 0x16, &1_u16.to_le_bytes());
        self.write(Space::Bar(0), 0x1a, &queue.to_le_bytes());
    }

    fn connect(&mut self, vector: u16) -> Event {
        let event = Event::make().unwrap();
        self.interrupts.set_vector(vector, Some(event.again().unwrap()));
        self.registers.msix.set_masked(vector, false);
        self.registers.config.set_msix_enabled(true);
        self.interrupts.follow(&self.registers);
        event
    }

    fn raise(&mut self) {
        self.raiser.raise(&self.interrupts);
    }
}

#[test]
fn each_queue_raises_its_vector() {
    let mut bed = Bed::new(true);
    bed.assign(2, 0);
    let (mut queue, mut config) = (bed.connect(2), bed.connect(0));
    bed.raise();
    assert!(queue.take() && !config.take());
    bed.interrupts.raise_config();
    assert!(!queue.take() && config.take());
    bed.assign(NO_VECTOR, NO_VECTOR);
    bed.raise();
    bed.interrupts.raise_config();
    assert!(!queue.take() && !config.take());
    bed.assign(0, 0);
    bed.raise();
    assert!(config.take());
}

#[test]
fn what_is_masked_is_pending_and_comes_later() {
    let mut bed = Bed::new(true);
    bed.assign(2, 0);
    let mut event = bed.connect(2);
    bed.write(Space::Bar(2), 2 * 16 + 12, &1_u32.to_le_bytes());
    bed.raise();
    bed.raise();
    assert!(!event.take() && bed.interrupts.is_vector_pending(2));
    bed.write(Space::Bar(2), 2 * 16 + 12, &0_u32.to_le_bytes());
    assert!(event.take() && !bed.interrupts.is_vector_pending(2));
    bed.raise();
    assert!(event.take());
    // A vector that loses its event for a while loses no interrupt.
    bed.interrupts.set_vector(2, None);
    bed.interrupts.follow(&bed.registers);
    bed.raise();
    let mut other = bed.connect(2);
    assert!(other.take() && !event.take());
    bed.raise();
    assert!(other.take() && !event.take(), "the bell follows the event");
    bed.interrupts.set_vector(2, None);
    bed.interrupts.follow(&bed.registers);
    bed.raise();
    bed.interrupts.forget();
    assert!(!bed.connect(2).take(), "a reset forgets");
}

#[test]
fn intx_is_a_level() {
    let mut bed = Bed::new(false);
    let mut event = Event::make().unwrap();
    bed.interrupts.set_intx(Some(event.again().unwrap()));
    bed.raise();
    assert!(event.take());
    bed.raise();
    assert!(!event.take(), "masked since it was signalled");
    bed.interrupts.act_on_intx(Action::Unmask);
    assert!(event.take(), "still asserted");
    assert!(bed.interrupts.is_intx_pending());
    assert_eq!(bed.interrupts.take_isr(), ISR_QUEUE);
    bed.interrupts.act_on_intx(Action::Unmask);
    assert!(!event.take() && !bed.interrupts.is_intx_pending());
    bed.interrupts.raise_config();
    assert!(event.take());
    bed.raise();
    assert_eq!(bed.interrupts.take_isr(), ISR_QUEUE | ISR_CONFIG);
    bed.interrupts.act_on_intx(Action::Unmask);
    bed.write(Space::Config, 4, &Command::INTX_DISABLE.to_le_bytes());
    bed.raise();
    assert!(!event.take(), "the driver forbids it");
    bed.write(Space::Config, 4, &[0, 0]);
    assert!(event.take());
    bed.interrupts.act_on_intx(Action::Mask);
    bed.interrupts.act_on_intx(Action::Trigger);
    assert!(event.take(), "tried out");
}

#[test]
fn only_eventfds_are_taken() {
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(Event::new(File::from(std::os::fd::OwnedFd::from(reader))).is_err());
}
