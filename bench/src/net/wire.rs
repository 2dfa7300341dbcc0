//! Without a guest: two namespaces between which frames pass DPDK's driver and a function of Dray's, beside two that plain virtual
//! Ethernet joins.
//!
//! ```text
//!   near ── veth ── testpmd: af_packet port ◄─► virtio-user port ── vhost-user ── Dray ── tap ── far
//!   near ── veth ── far
//! ```
//!
//! The driver takes whole frames only, so what the near sides send is cut and has its checksums before it goes onto the veth, as on a
//! wire. Driver and Dray poll on a CPU each, which the programs that send and receive share with them.

use std::net::Ipv4Addr;

use anyhow::Result;
use nix::sys::signal::Signal;
use tests::{Driver, IperfReport, IperfServer, Namespace, Port, Testpmd, TestpmdSettings};

use super::Run;
use super::ping::round_trips;
use crate::blk::Link;
use crate::peers::{self, NetOptions};
use crate::report::Unit;

const NEAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const PEER: &str = "plain veth";

/// Two namespaces that reach each other.
struct Pair {
    near: Namespace,
    far: Namespace,
}

impl Pair {
    /// Gives both sides their addresses; the near one sends whole frames.
    fn set_up(&self, near: &str, far: &str) {
        self.near.address(near, &format!("{NEAR}/24"));
        self.far.address(far, &format!("{FAR}/24"));
        self.near.run("ethtool", &["-K", near, "tx", "off", "tso", "off", "gso", "off"]);
    }

    /// Payload bits per second of TCP, from the near side to the far one or back.
    fn bits_per_second(&self, seconds: u32, back: bool) -> f64 {
        let seconds = seconds.to_string();
        let mut arguments = vec!["--time", &seconds];
        arguments.extend(back.then_some("--reverse"));
        IperfReport::measure(&self.near, &FAR.to_string(), &arguments).received_bits_per_second
    }
}

/// Measures both pairs in turn.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    run.say("two namespaces, and what joins them");
    let plain = Pair { near: Namespace::new(&run.rig, "near"), far: Namespace::new(&run.rig, "far") };
    plain.near.join("eth0", &plain.far, "eth0");
    plain.set_up("eth0", "eth0");
    // What crosses a wire is whole, whoever sends it.
    plain.far.run("ethtool", &["-K", "eth0", "tx", "off", "tso", "off", "gso", "off"]);

    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let ours = Pair { near: Namespace::new(&run.rig, "near"), far: Namespace::new(&run.rig, "far") };
    let middle = Namespace::new(&run.rig, "middle");
    ours.near.join("eth0", &middle, "wire0");
    let uplink = format!("{{ type = \"tap\", name = \"dray0\", netns = \"{}\" }}", ours.far.name());
    let options = NetOptions { link: Link::VhostUser, poll: "adaptive", uplink: &uplink, under: &[] };
    let server = peers::dray_net(run.cpus, folder.path(), &options)?;
    server.wake();
    ours.set_up("eth0", "dray0");
    let settings = TestpmdSettings { cpu: run.cpus.load, namespace: Some(&middle), ..TestpmdSettings::default() };
    let ports = [Port::VirtioUser(server.socket(0), Driver::default()), Port::AfPacket("wire0".to_owned())];
    let mut driver = Testpmd::start(&run.rig, &ports, &settings);
    driver.go(0);
    let servers = [IperfServer::start(&ours.far), IperfServer::start(&plain.far)];

    let mut rates = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    let mut shares = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    run.say("iperf3 and round trips between two namespaces");
    for round in 0..run.pace.alternations {
        for side in [round % 2, 1 - round % 2] {
            let pair = [&ours, &plain][side];
            driver.process().signal(if side == 0 { Signal::SIGCONT } else { Signal::SIGSTOP });
            for (back, values) in [false, true].into_iter().zip(&mut rates[side]) {
                values.push(pair.bits_per_second(run.pace.iperf_seconds, back));
            }
            let trips = round_trips(&pair.near, FAR, run.pace.echoes)?;
            for (values, share) in shares[side].iter_mut().zip([0.5, 0.99]) {
                values.push(trips.at_share(share) as f64 / 1e3);
            }
        }
    }
    driver.process().signal(Signal::SIGCONT);
    drop(servers);
    driver.quit();

    let [ours, theirs] = &rates;
    for (index, way) in ["to the tap", "from the tap"].into_iter().enumerate() {
        let name = format!("iperf3 between namespaces, {way}");
        run.add_turns(name, &ours[index], PEER, &theirs[index], Unit::BitsPerSecond);
    }
    let [ours, theirs] = &shares;
    for (index, word) in ["median", "p99"].into_iter().enumerate() {
        let name = format!("round trip between namespaces, {word}");
        run.add_turns(name, &ours[index], PEER, &theirs[index], Unit::Microseconds);
        let name = format!("  added by driver and Dray, {word}");
        run.add_difference(name, &ours[index], &theirs[index], Unit::Microseconds);
    }
    Ok(())
}
