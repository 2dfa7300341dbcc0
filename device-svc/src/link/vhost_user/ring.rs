//! One ring as the front end has described it so far, and when it runs.
//!
//! ```text
//!   num, addr, base, (call, err)  ─► kick ─► started ─► enable ─► runs
//!   get_vring_base ─► stopped, its position is the base from now on
//! ```

use super::port::EventPort;
use super::regions::Regions;
use crate::address::{FrontEndAddress, Iova};
use crate::inflight::QueueRecord;
use crate::link::event::{Bell, Event};
use crate::link::{QueuePosition, QueueStart};
use crate::virtqueue::{QUEUE_SIZE_MAX, features};

/// The three addresses of a ring, in the front end's terms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RingAddresses {
    pub(super) descriptors: FrontEndAddress,
    pub(super) driver: FrontEndAddress,
    pub(super) device: FrontEndAddress,
}

/// One ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// Where it goes on, if anybody has said.
    pub(super) position: Option<QueuePosition>,
    pub(super) kick: Option<Event>,
    pub(super) call: Option<Event>,
    pub(super) err: Option<Event>,
    /// A kick descriptor has come, or word that there will be none.
    pub(super) started: bool,
    pub(super) enabled: bool,
    /// The function was told to run it.
    pub(super) running: bool,
    /// It has run, so that its position is what we know, not what somebody says.
    pub(super) ran: bool,
    /// Where it was stopped last.
    pub(super) stopped_at: Option<QueuePosition>,
}

/// A base as SET_VRING_BASE and GET_VRING_BASE carry it: on a split ring the available index, on a packed ring available slot
/// and wrap counter in the lower half, used slot and wrap counter in the upper.
///
/// Front ends of before the upper half had a meaning (DPDK's) leave it empty: for them used and available place are one, because
/// nothing is in flight when they ask. A ring with something in flight whose used place is the first slot of a second lap looks the
/// same; only a base that we gave away ourselves can be that, and the session knows those.
pub(super) fn decode_base(base: u32, packed: bool) -> Result<QueuePosition, String> {
    if !packed {
        let next_avail = u16::try_from(base).map_err(|_| format!("{base:#x} is not an available index"))?;
        return Ok(QueuePosition { next_avail, ..QueuePosition::default() });
    }
    let (avail, used) = match (base as u16, (base >> 16) as u16) {
        (avail, 0) => (avail, avail),
        both => both,
    };
    Ok(QueuePosition {
        next_avail: avail & 0x7fff,
        avail_wrap: avail & 0x8000 != 0,
        next_used: used & 0x7fff,
        used_wrap: used & 0x8000 != 0,
    })
}

/// The other way round.
pub(super) fn encode_base(position: QueuePosition, packed: bool) -> u32 {
    if !packed {
        return u32::from(position.next_avail);
    }
    let half = |slot: u16, wrap: bool| u32::from(slot) | u32::from(wrap) << 15;
    half(position.next_avail, position.avail_wrap) | half(position.next_used, position.used_wrap) << 16
}

impl Ring {
    /// Takes the number of entries.
    pub(super) fn set_size(&mut self, size: u32, size_max: u16) -> Result<(), String> {
        match u16::try_from(size) {
            Ok(size) if size > 0 && size <= size_max.min(QUEUE_SIZE_MAX) => {
                self.size = size;
                Ok(())
            }
            _ => Err(format!("{size} is not a queue size from 1 to {size_max}")),
        }
    }

    /// Whether it is to run.
    pub(super) const fn is_wanted(&self) -> bool {
        self.started && self.enabled && self.addresses.is_some() && self.size > 0
    }

    /// Where its descriptors, driver and device area are in the guest's terms, if all are in the shared memory.
    pub(super) fn places(&self, regions: &Regions) -> Option<[Iova; 3]> {
        let RingAddresses { descriptors, driver, device } = self.addresses?;
        Some([regions.translate(descriptors)?, regions.translate(driver)?, regions.translate(device)?])
    }

    /// What the function needs to run it.
    pub(super) fn start(
        &self,
        index: u16,
        regions: &Regions,
        accepted: u64,
        inflight: Option<QueueRecord>,
    ) -> Result<QueueStart, String> {
        let Some(addresses) = self.addresses else { return Err("it has no addresses".to_owned()) };
        let translate = |address| {
            regions.translate(address).ok_or_else(|| format!("{:#x} is outside the shared memory", address.0))
        };
        let again =
            |event: &Option<Event>| event.as_ref().map(Event::again).transpose().map_err(|error| error.to_string());
        let port = EventPort { kick: again(&self.kick)?, call: again(&self.call)?.map(Bell::new) };
        let position = self.position.unwrap_or_else(|| QueuePosition::fresh(accepted & features::RING_PACKED != 0));
        Ok(QueueStart {
            index,
            size: self.size,
            descriptors: translate(addresses.descriptors)?,
            driver: translate(addresses.driver)?,
            device: translate(addresses.device)?,
            position,
            features: accepted,
            port: Box::new(port),
            inflight,
            is_resumed: false,
        })
    }
}
