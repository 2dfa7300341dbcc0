//! One front end's conversation, from connection to hang-up.
//!
//! Every message is checked here against what the function has. What is refused is answered with an error where the protocol
//! has an answer (REPLY_ACK), and ends the connection where it has none: a front end that is not told would go on as if the card
//! used memory or features that it does not use. What a guest got wrong is no reason to hang up on its front end: a ring that
//! cannot start stays off and signals its error event, and runs once it is set right.

mod requests;
mod rings;

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{BackendReqHandler, Error, Result, VhostUserBackendReqHandlerMut};

use super::channel::{Channel, NetMessage, Peeked};
use super::own_record::OwnRecord;
use super::regions::Regions;
use super::ring::Ring;
use crate::inflight::{AreaError, AreaShape, RecordArea};
use crate::link::event::Event;
use crate::link::{FunctionSide, HostEvents, NetworkSide};
use crate::virtqueue::features;

/// How a refusal is marked that is the guest's fault, not the front end's.
const GUEST_FAULT: ErrorKind = ErrorKind::InvalidData;

/// What the function can tell this front end.
#[derive(Default)]
struct Events {
    channel: Mutex<Option<Channel>>,
    errors: Mutex<Vec<Option<Event>>>,
    /// Something was refused, and people were told: once for each front end, which could otherwise fill a disk with our words.
    warned: AtomicBool,
}

impl HostEvents for Events {
    fn config_changed(&self) {
        if let Some(channel) = &*self.channel.lock().unwrap_or_else(PoisonError::into_inner)
            && let Err(error) = channel.config_changed()
        {
            tracing::debug!(%error, "the front end took no configuration change");
        }
    }

    fn needs_reset(&self, queue: Option<u16>) {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, event) in errors.iter().enumerate() {
            if let Some(event) = event
                && queue.is_none_or(|queue| usize::from(queue) == number)
            {
                event.signal_once();
            }
        }
    }
}

/// The state of the conversation.
struct Session {
    name: String,
    function: Arc<dyn FunctionSide>,
    events: Arc<Events>,
    regions: Regions,
    rings: Vec<Ring>,
    accepted: u64,
    /// The record of requests in flight, where the front end keeps one.
    inflight: Option<RecordArea>,
    /// For a front end that keeps none.
    own_record: Option<Arc<OwnRecord>>,
    protocol: bool,
    /// REPLY_ACK was negotiated.
    replies: bool,
    /// GET_VRING_BASE_INFLIGHT was negotiated: a ring that stops leaves what is in flight to its record.
    hands_over: bool,
}

/// Converses until the front end hangs up or breaks the protocol, or the link is `stopping` and ends the connection.
pub(super) fn run(
    stream: UnixStream,
    name: &str,
    function: &Arc<dyn FunctionSide>,
    own_record: Option<&Arc<OwnRecord>>,
    stopping: &AtomicBool,
) {
    let rings = usize::from(function.queue_count());
    let events = Arc::new(Events {
        errors: Mutex::new(std::iter::repeat_with(|| None).take(rings).collect()),
        ..Events::default()
    });
    function.attach(Arc::clone(&events) as Arc<dyn HostEvents>);
    let session = Session {
        name: name.to_owned(),
        function: Arc::clone(function),
        events: Arc::clone(&events),
        regions: Regions::default(),
        rings: std::iter::repeat_with(Ring::default).take(rings).collect(),
        accepted: 0,
        inflight: None,
        own_record: own_record.cloned(),
        protocol: false,
        replies: false,
        hands_over: false,
    };
    tracing::info!(function = name, "a front end is attached");
    let peeked = stream.try_clone();
    let network = function.network();
    let session = Arc::new(Mutex::new(session));
    let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let end = loop {
        let next = peeked.as_ref().map(|stream| Peeked::wait_for(stream, network.is_some())).unwrap_or_default();
        if let Some(channel) = next.channel {
            *events.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
        }
        let handled = match (next.net, network, &peeked) {
            (Some(message), Some(network), Ok(stream)) => {
                let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
                let done = session.hear(message, network);
                if next.wants_reply && session.replies {
                    // A front end that is gone is noticed with the next message.
                    let _ = message.answer(stream, done.is_ok());
                }
                done
            }
            _ => requests.handle_request(),
        };
        match handled {
            Ok(()) => {}
            Err(Error::ReqHandlerError(why)) if why.kind() == GUEST_FAULT => {}
            Err(Error::ReqHandlerError(_))
                if next.wants_reply && session.lock().unwrap_or_else(PoisonError::into_inner).replies => {}
            Err(end) => break end,
        }
    };
    match end {
        _ if stopping.load(Ordering::Acquire) => {
            tracing::info!(function = name, "the link ends the connection");
            crate::link::drain(function.as_ref(), 0..rings as u16);
        }
        Error::Disconnected | Error::PartialMessage => tracing::info!(function = name, "the front end is gone"),
        // What was refused has been said.
        Error::ReqHandlerError(_) => {
            tracing::info!(function = name, "the front end cannot be told of the refusal; the connection ends");
        }
        error if events.warned.load(Ordering::Relaxed) => {
            tracing::info!(function = name, %error, "the front end broke the protocol; the connection ends");
        }
        error => tracing::warn!(function = name, %error, "the front end broke the protocol; the connection ends"),
    }
    function.detach();
}

impl Session {
    const fn packed(&self) -> bool {
        self.accepted & features::RING_PACKED != 0
    }

    fn ring(&mut self, index: u32) -> Result<(u16, &mut Ring)> {
        let number = u16::try_from(index).ok().filter(|number| usize::from(*number) < self.rings.len());
        let number = number.ok_or(Error::InvalidParam)?;
        Ok((number, &mut self.rings[usize::from(number)]))
    }

    /// Refuses, and says why: the first time so that people see it.
    fn refuse(&self, what: &str, why: impl std::fmt::Display) -> Error {
        self.refuse_as(ErrorKind::InvalidInput, what, &why)
    }

    fn refuse_as(&self, kind: ErrorKind, what: &str, why: &dyn std::fmt::Display) -> Error {
        if self.events.warned.swap(true, Ordering::Relaxed) {
            tracing::debug!(function = %self.name, %why, "refused: {what}");
        } else {
            tracing::warn!(function = %self.name, %why, "refused: {what}; what is refused after it is not reported");
        }
        Error::ReqHandlerError(std::io::Error::new(kind, why.to_string()))
    }

    /// Does what a network function is told.
    fn hear(&mut self, message: NetMessage, network: &dyn NetworkSide) -> Result<()> {
        match message {
            NetMessage::Enable(index, enable) => self.set_vring_enable(index, enable),
            NetMessage::Announce(address) => {
                network.announce(address);
                Ok(())
            }
            NetMessage::Mtu(mtu) => network.use_mtu(mtu).map_err(|why| self.refuse("an MTU", why)),
        }
    }

    /// What a front end says of the record, checked.
    fn record_shape(&self, said: &VhostUserInflight) -> std::result::Result<AreaShape, AreaError> {
        let shape = AreaShape { queues: said.num_queues, size: said.queue_size, packed: self.packed() };
        shape.check(self.function.queue_count(), self.function.queue_size_max())
    }

    fn forget(&mut self) {
        // A front end that keeps its record over a reset shall not find in it what was before.
        if let Some(area) = self.inflight.take() {
            area.forget();
        }
        if let Some(own) = &self.own_record {
            own.forget();
        }
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        self.accepted = 0;
    }
}
