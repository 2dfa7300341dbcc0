//! virtio-net (virtio 1.3, 5.1): features, configuration space, and what all queues of a function share.
//!
//! ```text
//!   transmit   fetch ─► header and headers of the frame land ─► parse ─► (limit) ─► channel ─► used
//!   receive    fetch buffers ─► wait for frames ─► filter ─► fill as many buffers as the frame needs ─► used
//!   control    fetch ─► command lands ─► parse ─► what the driver chose changes ─► answer ─► used
//! ```
//!
//! Frames are kept in order, and nothing of a frame outlives the turn in which a channel takes it: so a lane's rows are a ring, with a
//! counter for each stage, and no list of free ones.

mod anti_spoofing;
mod chosen;
mod command;
mod control;
mod filter;
mod hashing;
mod kept;
mod offered;
mod receive;
mod staging;
mod steering;
mod tally;
mod transmit;

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use virtio_bindings::virtio_net as spec;

use super::limit::{Limit, Way};
use super::{AnyLane, Device, LanePlace, NetLane, NetRole};
use crate::backend::net::NetInfo;
use crate::clock::Moment;
use crate::dma::{CopyEngine, DistantEngine, DmaEngine};
use crate::link::QueueStart;
use crate::mirror::Reach;

use command::Command;
use kept::KeptCommands;

pub use anti_spoofing::AntiSpoofing;
pub use chosen::Chosen;
pub use control::ControlLane;
pub use filter::{Filter, Octets};
pub use hashing::Hashing;
pub use kept::create as create_kept;
pub use receive::ReceiveLane;
pub use steering::Steering;
pub use transmit::TransmitLane;

/// Requests of a queue under way at most, in a queue that is larger.
const ROWS_MAX: u16 = 1024;

/// How a function presents its uplink.
#[derive(Clone, Debug)]
pub struct NetSettings {
    /// The MAC address that it has until the driver gives it another.
    pub mac: Octets,
    /// The largest IP packet that it tells the driver to send, bytes.
    pub mtu: u16,
    /// Queue pairs; 1 to 128.
    pub pairs: u16,
    /// The largest size of a queue.
    pub queue_size_max: u16,
    /// Whether packed rings are offered.
    pub packed: bool,
    /// Whether it has the control queue. Over vhost-user the front end has it, and the card does not see it.
    pub control: bool,
    /// Whether frames go through card memory as a whole though they could stay in place until they are sent.
    pub copy_payload: bool,
    /// Whether the driver may say which flow goes to which pair, and be told hashes. Needs the control queue, and channels that
    /// [`Steering`] stands around.
    pub rss: bool,
    /// What the VM may say it is; `None`: anything.
    pub anti_spoofing: Option<AntiSpoofing>,
    /// Limits, all of which a frame must pass.
    pub limits: Vec<Arc<Limit>>,
}

/// What all queues of one virtio-net function share: fixed, or changed while they run by the control thread and by the driver's
/// commands.
#[derive(Debug)]
pub struct NetShared {
    settings: NetSettings,
    uplink: NetInfo,
    /// What the driver chose; lanes look at it again when the epoch has changed.
    chosen: Mutex<Arc<Chosen>>,
    epoch: AtomicU32,
    mac: AtomicU64,
    mtu: AtomicU16,
    /// Whether the operator wants the link up, and whether the uplink is there.
    wanted_up: AtomicBool,
    carrier_up: AtomicBool,
    /// Wakes the reactors that the lanes are on.
    wake: OnceLock<Wake>,
    /// The driver shall announce itself (virtio 1.3, 5.1.6.5.4).
    announce: AtomicBool,
    /// The address that the card shall announce in the driver's place, if any: 0 is none.
    announced_by_card: AtomicU64,
    /// The driver's commands, where somebody keeps them for a service after this one.
    kept: Mutex<Option<KeptCommands>>,
}

/// What wakes the reactors that lanes are on.
struct Wake(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Wake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wake(…)")
    }
}

/// An address as a number, to be stored at once.
const fn bits_of(mac: Octets) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

/// From [`bits_of`].
const fn octets_of(bits: u64) -> Octets {
    let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
    [a, b, c, d, e, f]
}

impl NetShared {
    /// How an uplink like `uplink` is presented under these settings; `carrier_up` says whether it is there.
    #[must_use]
    pub fn new(settings: NetSettings, uplink: NetInfo, carrier_up: bool) -> Self {
        let chosen = Mutex::new(Arc::new(Chosen::at_reset(settings.mac, settings.control, settings.pairs)));
        Self {
            chosen,
            epoch: AtomicU32::new(0),
            mac: AtomicU64::new(bits_of(settings.mac)),
            mtu: AtomicU16::new(settings.mtu),
            wanted_up: AtomicBool::new(true),
            carrier_up: AtomicBool::new(carrier_up),
            wake: OnceLock::new(),
            announce: AtomicBool::new(false),
            announced_by_card: AtomicU64::new(0),
            kept: Mutex::default(),
            settings,
            uplink,
        }
    }

    /// The number of the control queue, if there is one (virtio 1.3, 5.1.2).
    fn control_queue(&self, accepted: u64) -> Option<u16> {
        let pairs = if accepted & (1 << spec::VIRTIO_NET_F_MQ | 1 << spec::VIRTIO_NET_F_RSS) != 0 {
            self.settings.pairs
        } else {
            1
        };
        self.settings.control.then_some(pairs * 2)
    }

    /// What a queue is for.
    fn role(&self, queue: u16, accepted: u64) -> NetRole {
        if self.control_queue(accepted) == Some(queue) {
            return NetRole::Control;
        }
        if queue.is_multiple_of(2) { NetRole::Receive(queue / 2) } else { NetRole::Transmit(queue / 2) }
    }

    /// A number that is another one whenever what follows has changed: what the driver chose, the link.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// What the driver chose.
    #[must_use]
    pub fn chosen(&self) -> Arc<Chosen> {
        Arc::clone(&self.chosen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes what the driver chose, if `change` finds nothing wrong; lanes see it with their next turn.
    fn choose<E>(&self, change: impl FnOnce(&mut Chosen) -> Result<(), E>) -> Result<(), E> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = Chosen::clone(&chosen);
        change(&mut new)?;
        *chosen = Arc::new(new);
        drop(chosen);
        self.tell_lanes();
        Ok(())
    }

    /// Release: a lane that sees the new epoch sees what was changed before. Lanes may be on several reactors, and asleep: what one pair
    /// does from now on may be for another.
    fn tell_lanes(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
        if let Some(Wake(wake)) = self.wake.get() {
            wake();
        }
    }

    /// From now on `wake` is called when lanes shall look at what has changed, on any thread, reactors' too. The first one stays.
    pub fn wake_lanes_by(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake.set(Wake(Box::new(wake)));
    }

    /// Whether frames pass.
    #[must_use]
    pub fn is_link_up(&self) -> bool {
        self.wanted_up.load(Ordering::Acquire) && self.carrier_up.load(Ordering::Acquire)
    }

    /// The operator wants the link up or down. Returns whether it changes.
    pub fn set_wanted_up(&self, up: bool) -> bool {
        self.change_link(&self.wanted_up, up)
    }

    /// The uplink has come or gone. Returns whether the link changes.
    pub fn set_carrier_up(&self, up: bool) -> bool {
        self.change_link(&self.carrier_up, up)
    }

    fn change_link(&self, part: &AtomicBool, up: bool) -> bool {
        let before = self.is_link_up();
        part.store(up, Ordering::Release);
        self.tell_lanes();
        self.is_link_up() != before
    }

    /// The function has another MAC address from the next reset on, and at once for a driver that reads it.
    pub fn set_mac(&self, mac: Octets) {
        self.mac.store(bits_of(mac), Ordering::Release);
        let _ = self.choose(|chosen| {
            chosen.filter.set_mac(mac);
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// The MAC address that the configuration space shows.
    #[must_use]
    pub fn mac(&self) -> Octets {
        octets_of(self.mac.load(Ordering::Acquire))
    }

    /// The function tells the driver another MTU, bytes.
    pub fn set_mtu(&self, mtu: u16) {
        self.mtu.store(mtu, Ordering::Release);
        self.tell_lanes();
    }

    /// The largest IP packet, bytes.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Acquire)
    }

    /// The driver shall tell the network where it is now. Returns whether it can be asked.
    pub fn announce(&self) -> bool {
        self.announce.store(self.settings.control, Ordering::Release);
        self.settings.control
    }

    /// Whether the function may have this address, or say that it has: where the VM may not say it is another, only its own.
    fn may_be(&self, address: Octets) -> bool {
        let keeps = self.settings.anti_spoofing.as_ref().is_some_and(|rules| rules.mac);
        !keeps || address == self.mac()
    }

    /// The card tells the network where this address is, for a driver that cannot be asked to.
    pub fn announce_for(&self, address: Octets) {
        if !self.may_be(address) {
            return;
        }
        self.announced_by_card.store(bits_of(address), Ordering::Release);
        self.tell_lanes();
    }

    /// Takes what the card is to announce.
    fn take_announcement(&self) -> Option<Octets> {
        let bits = self.announced_by_card.swap(0, Ordering::AcqRel);
        (bits != 0).then(|| octets_of(bits))
    }

    /// Queue pairs.
    #[must_use]
    pub const fn pairs(&self) -> u16 {
        self.settings.pairs
    }

    /// The largest MTU that can be set, bytes.
    #[must_use]
    pub const fn mtu_max(&self) -> u16 {
        self.uplink.mtu_max
    }

    /// The driver has announced itself.
    fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }

    /// Whether any limit limits anything now.
    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.settings.limits.iter().any(|limit| limit.is_limited())
    }

    /// A frame passes all limits, and pays for it, or is told when to ask again.
    ///
    /// # Errors
    /// The moment at which to ask again.
    pub(super) fn pass_limits(&self, now: Moment, way: Way, bytes: u32) -> Result<(), Moment> {
        let limits = || self.settings.limits.iter().filter(|limit| limit.is_limited());
        limits().try_for_each(|limit| limit.ready(now, way))?;
        limits().for_each(|limit| limit.pay(now, way, u64::from(bytes)));
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, Option<KeptCommands>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the driver's commands kept in `file`, or not; carries out those that are there, for a driver that accepted these features.
    ///
    /// # Errors
    /// When it is no such file.
    pub fn keep_commands(&self, file: Option<File>, accepted: u64) -> Result<(), String> {
        let kept = file.map(KeptCommands::open).transpose().map_err(|error| error.to_string())?;
        for command in kept.iter().flat_map(KeptCommands::commands) {
            let parsed = Command::parse(command, accepted, self.settings.pairs);
            if let Err(bad) = parsed.and_then(|command| command.carry_out(self)) {
                // What the operator has changed since: an address, say, that the VM may not have any more.
                tracing::warn!(%bad, bytes = ?&command[..command.len().min(8)], "what the driver chose does not hold any more");
            }
        }
        *self.kept() = kept;
        Ok(())
    }

    /// A command was carried out: it is kept before the driver hears of it.
    fn keep_command(&self, command: &[u8]) {
        if let Some(kept) = &mut *self.kept()
            && let Err(error) = kept.add(command)
        {
            tracing::warn!(%error, "what the driver chose cannot be kept; after the service's death it would be as before");
        }
    }

    /// Device reset.
    pub fn reset(&self) {
        if let Some(kept) = &mut *self.kept()
            && let Err(error) = kept.clear()
        {
            tracing::warn!(%error, "what the driver chose cannot be taken back where it is kept");
        }
        self.announced();
        let NetSettings { control, pairs, .. } = self.settings;
        *self.chosen.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Chosen::at_reset(self.mac(), control, pairs));
        self.tell_lanes();
    }
}

/// A virtio-net function's device.
#[derive(Debug)]
pub struct NetDevice(pub Arc<NetShared>);

impl NetDevice {
    fn lane_over<E: DmaEngine + 'static>(
        &self,
        start: QueueStart,
        place: LanePlace,
        engine: impl FnOnce(crate::dma::CardMemory, Arc<crate::dma::HostMemory>) -> E,
    ) -> std::io::Result<Box<dyn NetLane>> {
        let shared = Arc::clone(&self.0);
        let LanePlace { memory, counters, report, .. } = place;
        let engine = |card| engine(card, memory);
        Ok(match shared.role(start.index, start.features) {
            NetRole::Receive(pair) => Box::new(ReceiveLane::new(start, pair, shared, counters, report, engine)?),
            NetRole::Transmit(pair) => Box::new(TransmitLane::new(start, pair, shared, counters, report, engine)?),
            NetRole::Control => Box::new(ControlLane::new(start, shared, counters, report, engine)?),
        })
    }
}

impl Device for NetDevice {
    fn offered_features(&self) -> u64 {
        self.0.offered_features()
    }

    fn queue_count(&self) -> u16 {
        self.0.settings.pairs * 2 + u16::from(self.0.settings.control)
    }

    fn queue_size_max(&self) -> u16 {
        self.0.settings.queue_size_max
    }

    fn config_space(&self) -> Vec<u8> {
        self.0.config_space()
    }

    fn write_config(&self, _offset: u32, _data: &[u8]) -> bool {
        // The address is set by a command, whole (virtio 1.3, 5.1.6.5.2).
        false
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn lane(&self, start: QueueStart, place: LanePlace) -> std::io::Result<AnyLane> {
        let distant = place.memory.distant().cloned().filter(|_| place.reach == Reach::Distant);
        Ok(AnyLane::Net(match distant {
            Some(distant) => self.lane_over(start, place, |card, memory| DistantEngine::new(card, memory, distant))?,
            None => self.lane_over(start, place, CopyEngine::new)?,
        }))
    }
}

#[cfg(test)]
mod tests;
