//! What is of its own about a virtio-net function: its uplink's carrier, its settings that change, and what vhost-user says to it.

use std::fs::File;
use std::sync::{Arc, Weak};

use super::{CardFunction, FunctionPlace, Kind, Placement};
use crate::backend::BackendError;
use crate::backend::net::{CarrierWatcher, PortSettings};
use crate::config::{
    AntiSpoofingConfig, FunctionConfig, LinkKind, NetChange, NetConfig, NetLimitConfig, PayloadConfig,
};
use crate::control::seam::SetError;
use crate::device::Outlet;
use crate::device::limit::{Limit, Rates};
use crate::device::net::{AntiSpoofing, NetDevice, NetSettings, NetShared, Steering, create_kept};
use crate::link::{NetworkSide, Refusal};
use crate::reactor::ReactorHandle;
use crate::uplink::Uplink;

/// The smallest MTU that a network may have (virtio 1.3, 5.1.4.1), bytes.
const MTU_MIN: u16 = 68;

/// The rates of a configured limit: what the VM sends counts as written, what it is sent as read.
fn rates_of(config: &NetLimitConfig) -> Rates {
    Rates {
        iops: config.packets.unwrap_or(0),
        bandwidth: config.bandwidth.unwrap_or(0),
        read_iops: config.receive_packets.unwrap_or(0),
        read_bandwidth: config.receive_bandwidth.unwrap_or(0),
        write_iops: config.transmit_packets.unwrap_or(0),
        write_bandwidth: config.transmit_bandwidth.unwrap_or(0),
        burst: config.burst,
    }
}

fn rules_of(config: &AntiSpoofingConfig) -> AntiSpoofing {
    let AntiSpoofingConfig { mac, vlans, addresses } = config.clone();
    AntiSpoofing { mac, vlans, addresses }
}

impl CarrierWatcher for CardFunction {
    fn carrier_changed(&self, up: bool) {
        if let Kind::Net { shared, .. } = &self.kind
            && shared.set_carrier_up(up)
        {
            tracing::info!(function = %self.name, up, "the uplink's carrier decides the link");
            self.tell_config();
        }
    }
}

impl CardFunction {
    /// Makes the virtio-net function of `config`, whose settings as a network interface are `net`, on `uplink`: places its queue pairs
    /// and opens a channel for each.
    ///
    /// # Errors
    /// When the uplink refuses.
    pub fn net(
        config: &FunctionConfig,
        net: &NetConfig,
        uplink: &Uplink,
        place: FunctionPlace,
    ) -> Result<Arc<Self>, BackendError> {
        let limit = Arc::new(Limit::new(&rates_of(&net.limit)));
        let settings = NetSettings {
            mac: net.mac.octets(),
            mtu: net.mtu,
            pairs: net.queue_pairs,
            queue_size_max: config.queue_size,
            packed: config.packed,
            // Over vhost-user the front end keeps the control queue to itself.
            control: matches!(config.link.kind, LinkKind::VfioUser { .. }),
            copy_payload: config.link.payload == PayloadConfig::Copy,
            rss: net.rss,
            anti_spoofing: net.anti_spoofing.as_ref().map(rules_of),
            limits: vec![Arc::clone(&limit)],
        };
        let port = uplink.backend.port(PortSettings { vlan: net.vlan })?;
        let backend = port.as_ref().unwrap_or(&uplink.backend);
        let pairs = settings.pairs;
        let control = settings.control;
        let shared = Arc::new(NetShared::new(settings, backend.info(), backend.carrier().is_up()));
        let device = Arc::new(NetDevice(Arc::clone(&shared)));
        // Both queues of a pair are on one reactor, with their channel; the control queue touches no frames, and can be anywhere.
        let placed = place.reactors.place(pairs, usize::MAX);
        let both = placed.iter().flat_map(|reactor| [*reactor; 2]);
        let queues = both.chain(placed.first().copied().filter(|_| control)).collect();
        let placement = Placement { queues, placed: placed.clone() };
        let mut steering = net.rss.then(|| Steering::new(&shared)).transpose()?;
        let function = Self::assemble(&config.name, device, Kind::Net { shared, limit }, placement, place);
        let mut open = |pair: u16| {
            let channel = backend.open_channel()?;
            match &mut steering {
                Some(steering) => steering.channel(pair, channel),
                None => Ok(channel),
            }
        };
        let mut channels_on = |reactor: &usize| {
            let pairs = placed.iter().zip(0..);
            let channels = pairs.map(|(on, pair)| (on == reactor).then(|| open(pair)).transpose());
            channels.collect::<Result<Vec<_>, _>>().map(Outlet::Net)
        };
        let outlets = function.used_reactors().iter().map(&mut channels_on).collect::<Result<Vec<_>, _>>();
        let function = function.open(outlets)?;
        let used: Vec<_> =
            function.used_reactors().iter().map(|number| function.reactors.handles()[*number].clone()).collect();
        if let Kind::Net { shared, .. } = &function.kind {
            shared.wake_lanes_by(move || used.iter().for_each(ReactorHandle::nudge));
        }
        let watcher: Weak<Self> = Arc::downgrade(&function);
        backend.carrier().watch(watcher);
        // It may have changed before it was watched, or while that is told here: then what is told here may be older than what the
        // watcher was told meanwhile.
        loop {
            let is_up = backend.carrier().is_up();
            function.carrier_changed(is_up);
            if backend.carrier().is_up() == is_up {
                return Ok(function);
            }
        }
    }

    /// Changes a network interface while it runs.
    ///
    /// # Errors
    /// For a function that is none.
    pub fn set_net(&self, change: &NetChange) -> Result<(), SetError> {
        let Kind::Net { shared, limit } = &self.kind else {
            return Err(SetError::Refused("a disk has no settings of a network interface".to_owned()));
        };
        if let Some(rates) = &change.limit {
            limit.set(&rates_of(rates));
        }
        let mut told = false;
        if let Some(mac) = change.mac {
            shared.set_mac(mac.octets());
            told = true;
        }
        if let Some(mtu) = change.mtu {
            shared.set_mtu(mtu);
            told = true;
        }
        if let Some(up) = change.link_up {
            told |= shared.set_wanted_up(up);
        }
        if told {
            self.tell_config();
        }
        Ok(())
    }
}

impl NetworkSide for NetShared {
    fn pairs(&self) -> u16 {
        self.pairs()
    }

    fn make_kept(&self) -> std::io::Result<File> {
        create_kept()
    }

    fn keep_commands(&self, file: Option<File>, accepted: u64) -> Result<(), Refusal> {
        self.keep_commands(file, accepted).map_err(Refusal::Invalid)
    }

    fn use_mtu(&self, mtu: u64) -> Result<(), Refusal> {
        match u16::try_from(mtu) {
            Ok(mtu) if (MTU_MIN..=self.mtu_max()).contains(&mtu) => {
                self.set_mtu(mtu);
                Ok(())
            }
            _ => {
                let most = self.mtu_max();
                Err(Refusal::Invalid(format!("an MTU of {mtu} bytes; the uplink carries {MTU_MIN} to {most}")))
            }
        }
    }

    fn announce(&self, address: [u8; 6]) {
        self.announce_for(address);
    }
}
