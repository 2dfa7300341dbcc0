//! How a fault of the guest gets from the reactor that met it to the function, which tells the host: by a courier thread, because
//! telling may block, and a reactor waits for nobody.

use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::CardFunction;
use crate::device::{FaultReport, QueueFault};

/// A fault on its way from a reactor to the host.
pub struct FaultNotice {
    function: Weak<CardFunction>,
    life: u64,
    queue: u16,
    fault: QueueFault,
}

/// The reactor's end of the courier.
pub(super) struct Reporter {
    pub(super) function: Weak<CardFunction>,
    /// Which of the function's lives the queue belongs to: a reset may overtake the courier.
    pub(super) life: u64,
    pub(super) courier: Sender<FaultNotice>,
}

impl FaultReport for Reporter {
    fn queue_failed(&self, queue: u16, fault: QueueFault) {
        // The service is ending if nobody listens any more.
        let function = Weak::clone(&self.function);
        let _ = self.courier.send(FaultNotice { function, life: self.life, queue, fault });
    }
}

/// Starts the thread that carries faults from the reactors to the functions they concern. It ends when the last sender is
/// gone.
///
/// # Errors
/// When the kernel refuses a thread.
pub fn start_courier() -> std::io::Result<Sender<FaultNotice>> {
    let (sender, receiver): (Sender<FaultNotice>, Receiver<FaultNotice>) = channel();
    std::thread::Builder::new().name("faults".to_owned()).spawn(move || {
        for FaultNotice { function, life, queue, fault } in receiver {
            if let Some(function) = function.upgrade() {
                function.queue_failed(life, queue, fault);
            }
        }
    })?;
    Ok(sender)
}
