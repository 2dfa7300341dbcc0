//! One channel of a switch's port: what its VM sends goes where it belongs, what is for it waits in its inbox.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use super::frame::{Frame, Tag, range_of};
use super::uplink::{Burst, Held, UplinkSide};
use super::{Plug, Port, PortNumber, Ports, Shared, UPLINK};
use crate::backend::BackendError;
use crate::backend::net::flow::Flow;
use crate::backend::net::inbox::{Inbox, Outbox, Wakers};
use crate::backend::net::{BURST, ETHERNET_BYTES, Incoming, Missed, NetChannel, Offloads, Outgoing, Sent};
use crate::clock::Moment;

/// What became of one frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Became {
    /// It has gone where it belongs, or nobody wants it.
    Sent,
    /// Nothing could be done with it.
    Lost,
    /// It is for the uplink alone, which has no room.
    Waits,
}

/// The ports as this channel saw them last.
struct View {
    ports: Arc<Ports>,
    epoch: Option<u32>,
    /// Whose bell is still to be rung.
    ringing: Option<Arc<Inbox>>,
}

/// A channel.
pub(super) struct SwitchChannel {
    plug: Arc<Plug>,
    outbox: Outbox,
    view: View,
    burst: Burst,
    enabled: bool,
    /// A frame for the uplink was not taken: whoever makes room there rings the bell.
    waits: bool,
    /// What the uplink missed while this channel looked after it.
    missed: Missed,
    /// The bell, and what wakes the uplink.
    wakers: Wakers,
}

impl SwitchChannel {
    pub(super) fn open(plug: Arc<Plug>) -> Result<Self, BackendError> {
        let (inbox, outbox) = Inbox::pair()?;
        let wakers = Wakers::new(&outbox, plug.shared.uplink.as_ref().and_then(UplinkSide::wake_fd))?;
        plug.add(&inbox);
        let view = View { ports: Arc::default(), epoch: None, ringing: None };
        Ok(Self { plug, outbox, view, burst: Burst::new(), enabled: false, waits: false, missed: Missed::NONE, wakers })
    }
}

/// The VLAN that a frame is in which came by a port, and whether its tag says so; `None` if it must not come there.
#[inline]
fn vlan_of(frame: &Frame<'_>, port: Option<u16>) -> Option<(u16, Option<u16>)> {
    let tag = frame.tag();
    match (port, tag) {
        (None, tag) => Some((tag.unwrap_or(0), tag)),
        // Where its own is taken off, a tag of another would be left.
        (Some(_), _) if frame.has_hidden_tag() => None,
        (Some(own), None | Some(0)) => Some((own, tag)),
        (Some(own), Some(named)) => (own == named).then_some((own, tag)),
    }
}

/// What is done to the tag of a frame of this VLAN on its way out by a port; `None` if it is not let out there.
#[inline]
fn tag_for(port: Option<u16>, vlan: u16, tag: Option<u16>) -> Option<Tag> {
    match (port, tag) {
        (Some(own), _) if own != vlan => None,
        (Some(_), None) => Some(Tag::Keep),
        (Some(_), Some(_)) => Some(Tag::Remove),
        (None, tag) if tag.unwrap_or(0) == vlan => Some(Tag::Keep),
        (None, None) => Some(Tag::Insert(vlan)),
        (None, Some(_)) => Some(Tag::Rename(vlan)),
    }
}

impl View {
    #[inline]
    fn follow(&mut self, shared: &Shared) {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if self.epoch != Some(epoch) {
            self.ports = Arc::clone(&shared.ports());
            self.epoch = Some(epoch);
        }
    }

    /// Puts a frame in for a port, if it is let out there.
    #[inline]
    fn put(&mut self, number: usize, frame: &Frame<'_>, vlan: u16, tag: Option<u16>) {
        let Some(Some(port)) = self.ports.get(number) else { return };
        let (Some(tag), Some(inbox)) = (tag_for(port.vlan, vlan, tag), inbox_of(port, frame)) else { return };
        let changed = if port.vlan.is_some() && frame.has_hidden_tag() { None } else { frame.changed(tag) };
        let Some((header, bytes)) = changed else {
            inbox.refuse();
            return;
        };
        if inbox.put(header, bytes, |room| frame.write(tag, room))
            && !self.ringing.as_ref().is_some_and(|ringing| Arc::ptr_eq(ringing, inbox))
        {
            let inbox = Arc::clone(inbox);
            self.ring();
            self.ringing = Some(inbox);
        }
    }

    /// Puts a frame in for all ports but the one that it came by.
    fn put_all(&mut self, from: PortNumber, frame: &Frame<'_>, vlan: u16, tag: Option<u16>) {
        for number in 1..self.ports.len() {
            if number != from.index() {
                self.put(number, frame, vlan, tag);
            }
        }
    }

    /// Rings the bell that is still to be rung.
    #[inline]
    fn ring(&mut self) {
        if let Some(inbox) = self.ringing.take() {
            inbox.ring();
        }
    }
}

/// The inbox of the channel that takes this flow: one of those that are open, always the same.
#[inline]
fn inbox_of<'a>(port: &'a Port, frame: &Frame<'_>) -> Option<&'a Arc<Inbox>> {
    let count = port.inboxes.len();
    if count <= 1 {
        return port.inboxes.first().filter(|inbox| inbox.is_open());
    }
    let first = Flow::of(frame.head()).map_or(0, |flow| flow.spread()) as usize % count;
    (0..count).map(|step| &port.inboxes[(first + step) % count]).find(|inbox| inbox.is_open())
}

/// What comes from the uplink goes to the ports.
#[inline]
fn distribute(view: &mut View, shared: &Shared, frame: &Incoming, second: u32) {
    if frame.length() < ETHERNET_BYTES {
        return;
    }
    let range = range_of(frame);
    let frame = Frame::come(frame, &range);
    let Some((vlan, tag)) = vlan_of(&frame, None) else { return };
    learn(shared, &frame, vlan, UPLINK, second);
    match known(shared, &frame, vlan, second) {
        // It came from where it is.
        Some(UPLINK) => {}
        Some(port) => view.put(port.index(), &frame, vlan, tag),
        None => view.put_all(UPLINK, &frame, vlan, tag),
    }
}

#[inline]
fn learn(shared: &Shared, frame: &Frame<'_>, vlan: u16, port: PortNumber, second: u32) {
    let source = frame.source();
    if source[0] & 1 == 0 {
        shared.stations.hear(source, vlan, port, second);
    }
}

/// The port of the one station that a frame is for, if it is known.
#[inline]
fn known(shared: &Shared, frame: &Frame<'_>, vlan: u16, second: u32) -> Option<PortNumber> {
    let destination = frame.destination();
    if destination[0] & 1 != 0 { None } else { shared.stations.find(destination, vlan, second) }
}

fn second() -> u32 {
    (Moment::now().0 / 1_000_000_000) as u32
}

/// Sends one frame; what is for the uplink is gathered in the burst. What the uplink has no room for is not taken, unless it goes to
/// others as well: then it is not given again for the uplink's sake.
#[inline]
fn forward(plug: &Plug, view: &mut View, burst: &mut Burst, frame: &Outgoing, second: u32, full: bool) -> Became {
    if frame.bytes < ETHERNET_BYTES {
        return Became::Lost;
    }
    let shared = &plug.shared;
    let frame = Frame::sent(frame);
    let Some((vlan, tag)) = vlan_of(&frame, plug.vlan) else { return Became::Lost };
    let place = known(shared, &frame, vlan, second).filter(|port| shared.uplink.is_some() || *port != UPLINK);
    if place == Some(UPLINK) && full {
        return Became::Waits;
    }
    learn(shared, &frame, vlan, plug.number, second);
    match place {
        Some(UPLINK) => {}
        Some(port) => {
            if port != plug.number {
                view.put(port.index(), &frame, vlan, tag);
            }
            return Became::Sent;
        }
        None => view.put_all(plug.number, &frame, vlan, tag),
    }
    let (Some(uplink), Some(tag)) = (&shared.uplink, tag_for(None, vlan, tag)) else { return Became::Sent };
    let goes = if full { uplink.keep(plug.number, &frame, tag) } else { burst.push(&frame, tag) };
    if goes { Became::Sent } else { Became::Lost }
}

/// Lets others have the uplink, and wakes those who found it full if it has room again.
#[inline]
fn give_back(shared: &Shared, mut held: MutexGuard<'_, Held>) {
    let room_came = held.take_room_came();
    drop(held);
    if room_came {
        shared.wake_all();
    }
}

impl SwitchChannel {
    /// Sends what was gathered for the uplink. Returns how much of it was lost.
    fn flush(&mut self) -> usize {
        let count = self.burst.len();
        let Some(uplink) = self.plug.shared.uplink.as_ref().filter(|_| count > 0) else { return 0 };
        let mut sent = Sent::default();
        if let Some(mut held) = uplink.take() {
            if held.send_waiting() {
                sent = held.send(self.plug.number, self.burst.frames(0));
            }
            give_back(&self.plug.shared, held);
        }
        // Somebody else has it, or it has no room: what is left waits, as far as there is room for that.
        let Sent { taken, mut lost } = sent;
        for frame in self.burst.frames(taken) {
            lost += usize::from(!uplink.keep(self.plug.number, &Frame::sent(frame), Tag::Keep));
        }
        lost
    }
}

impl NetChannel for SwitchChannel {
    fn enable(&mut self, enabled: bool) {
        if self.enabled != enabled {
            self.enabled = enabled;
            if let Some(uplink) = &self.plug.shared.uplink {
                uplink.enable(enabled);
            }
        }
        self.outbox.open(enabled);
    }

    fn leave_undone(&mut self, _offloads: Offloads) {}

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        if !self.enabled {
            return Sent { taken: frames.len(), lost: frames.len() };
        }
        let Self { plug, view, burst, .. } = self;
        let shared = &plug.shared;
        view.follow(shared);
        burst.clear();
        // If somebody else has it, there is room as far as anybody knows.
        let full = shared.uplink.as_ref().and_then(UplinkSide::take).is_some_and(|mut held| {
            let full = !held.send_waiting();
            give_back(shared, held);
            full
        });
        let second = second();
        let mut sent = Sent::default();
        for frame in frames.iter().take(BURST) {
            match forward(plug, view, burst, frame, second, full) {
                Became::Sent => {}
                Became::Lost => sent.lost += 1,
                Became::Waits => break,
            }
            sent.taken += 1;
        }
        self.waits = sent.taken < frames.len();
        sent.lost += self.flush();
        self.view.ring();
        sent
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        self.outbox.frames(most)
    }

    #[inline]
    fn release(&mut self, count: usize) {
        self.outbox.release(count);
    }

    #[inline]
    fn carry(&mut self) -> bool {
        self.outbox.awake();
        let Self { plug, view, missed, .. } = self;
        let shared = &plug.shared;
        let Some(mut held) = shared.uplink.as_ref().and_then(UplinkSide::take) else { return false };
        view.follow(shared);
        held.send_waiting();
        let mut at = None;
        let did = held.receive(|frame| distribute(view, shared, frame, *at.get_or_insert_with(second)));
        *missed += held.missed();
        give_back(shared, held);
        view.ring();
        did
    }

    #[inline]
    fn missed(&mut self) -> Missed {
        let mut missed = std::mem::take(&mut self.missed);
        missed += self.outbox.missed();
        missed
    }

    #[inline]
    fn lost_later(&mut self) -> u64 {
        self.plug.shared.uplink.as_ref().map_or(0, |uplink| uplink.lost_of(self.plug.number))
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.wakers.fd())
    }

    fn woken(&mut self) {
        self.outbox.silence();
        self.wakers.drain();
        if let Some(mut held) = self.plug.shared.uplink.as_ref().and_then(UplinkSide::take) {
            held.woken();
        }
    }

    fn arm(&mut self) -> bool {
        self.outbox.arm()
    }

    fn arm_carrying(&mut self) -> bool {
        let shared = &self.plug.shared;
        let Some(uplink) = &shared.uplink else { return true };
        // Whoever has it now is awake, and may leave something behind.
        let Some(mut held) = uplink.take() else { return false };
        if self.waits {
            // In this order, while nobody else has the uplink: whoever makes room later finds this one asleep.
            self.outbox.expect_bell();
            self.waits = !held.send_waiting();
            if !self.waits {
                give_back(shared, held);
                return false;
            }
        }
        let may_sleep = held.arm();
        give_back(shared, held);
        may_sleep
    }
}

impl Drop for SwitchChannel {
    fn drop(&mut self) {
        self.enable(false);
        self.plug.remove(self.outbox.inbox());
        // It may have been the one that was awake to carry what comes from the uplink.
        self.plug.shared.wake_all();
    }
}
