//! Frames to the queue pair that the driver's table says (virtio 1.3, 5.1.6.5.7), whatever channel they come by.
//!
//! A network spreads flows over its channels by rules of its own, and the pairs of a function may be on several reactors. So the
//! reactor of the channel that a frame comes by puts it into the inbox of the pair that it is for, unless that is its own: then the
//! frame stays where it is, as without steering. Only if frames for others are behind one that its own pair does not take, that one is
//! put into the pair's own inbox, so that a pair without buffers holds up no other.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::NetShared;
use super::hashing::Hashing;
use crate::backend::BackendError;
use crate::backend::net::inbox::{Inbox, Outbox, Wakers};
use crate::backend::net::{BURST, Incoming, Missed, NetChannel, Offloads, Outgoing, Sent};

/// The inboxes of all pairs of a function.
#[derive(Debug)]
pub struct Steering {
    shared: Arc<NetShared>,
    inboxes: Arc<[Arc<Inbox>]>,
    outboxes: Vec<Option<Outbox>>,
}

impl Steering {
    /// For a function's pairs.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(shared: &Arc<NetShared>) -> Result<Self, BackendError> {
        let pairs = (0..shared.pairs()).map(|_| Inbox::pair()).collect::<Result<Vec<_>, _>>()?;
        let (inboxes, outboxes): (Vec<_>, Vec<_>) = pairs.into_iter().map(|(inbox, out)| (inbox, Some(out))).unzip();
        Ok(Self { shared: Arc::clone(shared), inboxes: inboxes.into(), outboxes })
    }

    /// Stands around the channel of one pair.
    ///
    /// # Errors
    /// When the process has no descriptors left, or the pair has its channel.
    pub fn channel(&mut self, pair: u16, inner: Box<dyn NetChannel>) -> Result<Box<dyn NetChannel>, BackendError> {
        let outbox = self.outboxes.get_mut(usize::from(pair)).and_then(Option::take);
        let outbox =
            outbox.ok_or_else(|| BackendError::Refused(format!("queue pair {pair} has no channel to steer")))?;
        let wakers = Wakers::new(&outbox, inner.wake_fd())?;
        Ok(Box::new(SteeringChannel {
            inner,
            pair,
            outbox,
            wakers,
            inboxes: Arc::clone(&self.inboxes),
            shared: Arc::clone(&self.shared),
            epoch: None,
            hashing: None,
            from_inbox: false,
            is_held_up: false,
        }))
    }
}

struct SteeringChannel {
    inner: Box<dyn NetChannel>,
    pair: u16,
    outbox: Outbox,
    wakers: Wakers,
    inboxes: Arc<[Arc<Inbox>]>,
    shared: Arc<NetShared>,
    /// What holds as of this epoch.
    epoch: Option<u32>,
    hashing: Option<Arc<Hashing>>,
    /// What was handed over last came out of the inbox.
    from_inbox: bool,
    /// The oldest frame of the channel is for its own pair, and was the last time as well.
    is_held_up: bool,
}

impl SteeringChannel {
    #[inline]
    fn follow(&mut self) {
        let epoch = self.shared.epoch();
        if self.epoch.replace(epoch) != Some(epoch) {
            self.hashing.clone_from(&self.shared.chosen().hashing);
        }
    }

    /// Whether a frame is for this pair.
    #[inline]
    fn is_own(hashing: Option<&Hashing>, pair: u16, frame: &Incoming) -> bool {
        hashing.and_then(|hashing| hashing.pair_of(frame.bytes())).is_none_or(|other| other == pair)
    }
}

impl NetChannel for SteeringChannel {
    fn enable(&mut self, enabled: bool) {
        self.inner.enable(enabled);
        self.outbox.open(enabled);
        self.is_held_up = false;
    }

    fn leave_undone(&mut self, offloads: Offloads) {
        self.inner.leave_undone(offloads);
    }

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        self.inner.transmit(frames)
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        // What is in the inbox came first, and so did what is being put there.
        self.from_inbox = !self.outbox.is_drained();
        if self.from_inbox {
            return self.outbox.frames(most);
        }
        let Self { inner, hashing, pair, .. } = self;
        let frames = inner.receive(most);
        let own = frames.iter().take_while(|frame| Self::is_own(hashing.as_deref(), *pair, frame)).count();
        &frames[..own]
    }

    #[inline]
    fn release(&mut self, count: usize) {
        if count > 0 {
            self.is_held_up = false;
        }
        if self.from_inbox { self.outbox.release(count) } else { self.inner.release(count) }
    }

    #[inline]
    fn carry(&mut self) -> bool {
        self.outbox.awake();
        self.follow();
        let mut did = self.inner.carry();
        let Self { inner, hashing, pair, inboxes, is_held_up, .. } = self;
        let Some(hashing) = hashing.as_deref() else { return did };
        loop {
            let frames = inner.receive(BURST);
            let mut count = 0;
            for frame in frames {
                let to = hashing.pair_of(frame.bytes()).unwrap_or(*pair);
                if to == *pair && !*is_held_up {
                    break;
                }
                count += 1;
                let Some(inbox) = inboxes.get(usize::from(to)) else { continue };
                inbox.put(frame.header, frame.length(), |room| room.copy_from_slice(frame.bytes()));
            }
            // To ask all costs less than to remember which.
            if count > 0 {
                inboxes.iter().for_each(|inbox| inbox.ring());
            }
            let is_empty = frames.is_empty();
            if count == 0 {
                *is_held_up = !is_empty;
                return did;
            }
            inner.release(count);
            did = true;
        }
    }

    #[inline]
    fn missed(&mut self) -> Missed {
        let mut missed = self.inner.missed();
        missed += self.outbox.missed();
        missed
    }

    #[inline]
    fn lost_later(&mut self) -> u64 {
        self.inner.lost_later()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.wakers.fd())
    }

    fn woken(&mut self) {
        self.outbox.silence();
        self.wakers.drain();
        self.inner.woken();
    }

    fn arm(&mut self) -> bool {
        (self.hashing.is_some() || self.inner.arm()) && self.outbox.arm()
    }

    /// Where frames are for other pairs as well, they are carried whether or not this one takes its own.
    fn arm_carrying(&mut self) -> bool {
        self.inner.arm_carrying() && (self.hashing.is_none() || self.inner.arm())
    }
}

#[cfg(test)]
mod tests;
