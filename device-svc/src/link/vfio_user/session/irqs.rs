//! Interrupts: which kinds the function has, and how the VMM connects, masks and triggers them (`VFIO_USER_DEVICE_GET_IRQ_INFO`,
//! `VFIO_USER_DEVICE_SET_IRQS`).

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::super::interrupts::Action;
use super::super::message::{IrqAction, IrqData, IrqInfo, IrqSet};
use super::{Refusal, Reply, Session, check_room, refusal};
use crate::link::event::Event;

/// Kinds of interrupts (`VFIO_PCI_NUM_IRQS`): INTx, MSI, MSI-X, error, request.
pub(super) const IRQS: u32 = 5;
const IRQ_INTX: u32 = 0;
const IRQ_MSIX: u32 = 2;

const IRQ_EVENTFD: u32 = 1;
const IRQ_MASKABLE: u32 = 1 << 1;
const IRQ_AUTOMASKED: u32 = 1 << 2;

impl Session {
    pub(super) fn irq_info(&self, info: IrqInfo) -> Result<Reply, Refusal> {
        let needed = size_of::<IrqInfo>() as u32;
        check_room(info.argsz, needed)?;
        let (count, flags) = match info.index {
            IRQ_INTX => (1, IRQ_EVENTFD | IRQ_MASKABLE | IRQ_AUTOMASKED),
            IRQ_MSIX => (u32::from(self.function.shown().interrupts.vectors()), IRQ_EVENTFD),
            index if index < IRQS => (0, 0),
            index => return refusal(Errno::EINVAL, format!("there are no interrupts of kind {index}")),
        };
        Ok(Reply::of(IrqInfo { argsz: needed, flags, index: info.index, count }.as_bytes()))
    }

    pub(super) fn set_irqs(
        &self,
        set: IrqSet,
        action: IrqAction,
        data: IrqData<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<Reply, Refusal> {
        let shown = self.function.shown();
        let there = match set.index {
            IRQ_INTX => 1,
            IRQ_MSIX => u32::from(shown.interrupts.vectors()),
            _ => 0,
        };
        let end = set.start.checked_add(set.count).filter(|end| *end <= there);
        let Some(end) = end else {
            return refusal(
                Errno::EINVAL,
                format!("there are no {} interrupts of kind {} from {} on", set.count, set.index, set.start),
            );
        };
        let range = set.start as u16..end as u16;
        let mut events = Vec::new();
        if data == IrqData::Events {
            if action != IrqAction::Trigger {
                return refusal(Errno::ENOTSUP, "interrupts are masked by messages only");
            }
            if !fds.is_empty() && fds.len() != range.len() {
                return refusal(Errno::EINVAL, format!("{} descriptors for {} interrupts", fds.len(), range.len()));
            }
            for fd in fds {
                let event = Event::new(File::from(fd)).or_else(|why| refusal(Errno::EINVAL, why))?;
                events.push(event);
            }
        }
        // Taken away: one by one, or the whole kind at once.
        let all_off = data == IrqData::None && action == IrqAction::Trigger && set.count == 0;
        if data == IrqData::Events || all_off {
            let range = if all_off { 0..there as u16 } else { range };
            let mut events = events.into_iter();
            for number in range {
                self.connect(set.index, number, events.next());
            }
        } else {
            for (number, place) in range.zip(0..) {
                let concerned = match data {
                    IrqData::Bools(bools) => bools.get(place).is_some_and(|wanted| *wanted != 0),
                    IrqData::None | IrqData::Events => true,
                };
                if concerned {
                    self.act(set.index, number, action);
                }
            }
        }
        let mut registers = shown.lock();
        if set.index == IRQ_MSIX && data == IrqData::Events {
            registers.config.set_msix_enabled(true);
        }
        shown.interrupts.follow(&registers);
        shown.set_changed();
        Ok(Reply::default())
    }

    fn connect(&self, kind: u32, number: u16, event: Option<Event>) {
        let shown = self.function.shown();
        if kind == IRQ_INTX {
            shown.interrupts.set_intx(event);
        } else {
            if event.is_some() {
                shown.lock().msix.set_masked(number, false);
            }
            shown.interrupts.set_vector(number, event);
        }
    }

    fn act(&self, kind: u32, number: u16, action: IrqAction) {
        let shown = self.function.shown();
        match (kind, action) {
            (IRQ_INTX, IrqAction::Mask) => shown.interrupts.act_on_intx(Action::Mask),
            (IRQ_INTX, IrqAction::Unmask) => shown.interrupts.act_on_intx(Action::Unmask),
            (IRQ_INTX, IrqAction::Trigger) => shown.interrupts.act_on_intx(Action::Trigger),
            (_, IrqAction::Mask) => shown.lock().msix.set_masked(number, true),
            (_, IrqAction::Unmask) => shown.lock().msix.set_masked(number, false),
            (_, IrqAction::Trigger) => shown.interrupts.trigger_vector(number),
        }
    }
}
