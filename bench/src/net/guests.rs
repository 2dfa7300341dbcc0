//! A Linux guest under QEMU (TCG: slow, so compared within a run only) on Dray's tap, by either link, beside the same guest on QEMU's
//! own tap, and on passt.
//!
//! All guests are up at once and idle while another is measured. Each has a network namespace, in which iperf3's client and the
//! requests of round trips are.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use tests::{GuestSettings, IperfReport, Namespace, Process, qmp_of};

use super::Run;
use super::ping::round_trips;
use crate::blk::Link;
use crate::peers::{self, NetOptions, Server};
use crate::report::Unit;

const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const MAC: &str = "52:54:00:12:34:56";
/// As long as all of a run may take.
const LIMIT: Duration = Duration::from_secs(1800);

/// What carries a guest's frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Network {
    Dray(Link),
    Tap,
    Passt,
}

impl Network {
    const ALL: [Self; 4] = [Self::Dray(Link::VhostUser), Self::Dray(Link::VfioUser), Self::Tap, Self::Passt];

    const fn name(self) -> &'static str {
        match self {
            Self::Dray(Link::VhostUser) => "vhost-user",
            Self::Dray(Link::VfioUser) => "vfio-user",
            Self::Tap => "QEMU's tap",
            Self::Passt => "passt",
        }
    }

    /// Whether packets pass, and not only what they carry.
    const fn passes_packets(self) -> bool {
        !matches!(self, Self::Passt)
    }
}

/// A guest with its network.
struct Lab {
    network: Network,
    guest: Process,
    /// How often its iperf3 was asked.
    asked: u32,
    /// Ends what is left in it.
    namespace: Namespace,
    folder: tempfile::TempDir,
    _server: Option<Server>,
}

impl Lab {
    fn start(run: &Run, network: Network) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
        let namespace = Namespace::new(&run.rig, "bench");
        let address = format!("{OWN}/24");
        let mut server = None;
        let arguments = match network {
            Network::Dray(link) => {
                let uplink = format!("{{ type = \"tap\", name = \"dray0\", netns = \"{}\" }}", namespace.name());
                let options = NetOptions { link, poll: "adaptive", uplink: &uplink, under: &[] };
                let dray = server.insert(peers::dray_net(run.cpus, folder.path(), &options)?);
                dray.wake();
                namespace.address("dray0", &address);
                dray_arguments(link, &dray.socket(0))
            }
            Network::Tap => {
                namespace.tap("tap0", &["vnet_hdr"]);
                namespace.address("tap0", &address);
                with_device("tap,id=n0,ifname=tap0,script=no,downscript=no")
            }
            Network::Passt => {
                // It wants an interface with a default route.
                namespace.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
                namespace.ip(&["link", "set", "eth0", "up"]);
                namespace.ip(&["link", "set", "eth1", "up"]);
                namespace.address("eth0", &address);
                namespace.ip(&["route", "add", "default", "via", "192.0.2.254", "dev", "eth0"]);
                let socket = folder.path().join("passt.sock");
                let mut command = namespace.command("passt");
                command.args(["--quiet", "--runas", "0:0", "--ipv4-only", "--tcp-ports", "5201", "--socket"]);
                command.arg(&socket).args(["--address", &GUEST.to_string(), "--netmask", "24"]);
                command.args(["--gateway", "192.0.2.254", "--interface", "eth0"]);
                // It goes into the background once it listens.
                Process::start(&mut command).succeed();
                with_device(&format!("stream,id=n0,server=off,addr.type=unix,addr.path={}", socket.display()))
            }
        };
        let job = format!(
            "set -e
            ip.iproute2 address add {GUEST}/24 dev eth0
            ip.iproute2 link set eth0 up
            ip.iproute2 route add default via 192.0.2.254
            iperf3 --server"
        );
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let settings = GuestSettings::new(folder.path(), &job, &arguments);
        let guest = GuestSettings { namespace: Some(&namespace), limit: LIMIT, ..settings }.boot();
        let mut lab = Self { network, guest, asked: 0, namespace, folder, _server: server };
        lab.wait_for_server();
        Ok(lab)
    }

    /// Between two clients iperf3's server does not listen.
    fn wait_for_server(&mut self) {
        self.guest.wait_for_output(&format!("(test #{})", self.asked + 1));
    }

    /// Payload bits per second of TCP, to the guest or from it.
    fn bits_per_second(&mut self, seconds: u32, from_guest: bool) -> f64 {
        self.wait_for_server();
        self.asked += 1;
        let to = if self.network.passes_packets() { GUEST } else { OWN };
        let seconds = seconds.to_string();
        let mut arguments = vec!["--time", &seconds];
        arguments.extend(from_guest.then_some("--reverse"));
        IperfReport::measure(&self.namespace, &to.to_string(), &arguments).received_bits_per_second
    }

    /// Ends the guest as a power cut does.
    fn end(mut self) {
        let _said = qmp_of(self.folder.path(), "guest", "quit", "{}");
        let _status = self.guest.end();
    }
}

fn with_device(netdev: &str) -> Vec<String> {
    ["-netdev", netdev, "-device", &format!("virtio-net-pci,netdev=n0,mac={MAC}")].map(str::to_owned).to_vec()
}

fn dray_arguments(link: Link, socket: &Path) -> Vec<String> {
    let path = socket.display();
    match link {
        Link::VhostUser => {
            let mut arguments = vec!["-chardev".to_owned(), format!("socket,id=c0,path={path}")];
            arguments.extend(with_device("vhost-user,id=n0,chardev=c0"));
            arguments
        }
        Link::VfioUser => {
            let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}}}"#);
            vec!["-device".to_owned(), device]
        }
    }
}

/// Measures all guests in turn.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let mut labs = Vec::new();
    for network in Network::ALL {
        run.say(&format!("a guest on {}", network.name()));
        labs.push(Lab::start(run, network)?);
    }
    let count = labs.len();
    for (from_guest, name) in [(false, "iperf3 to a guest"), (true, "iperf3 from a guest")] {
        run.say(name);
        let mut rates = vec![Vec::new(); count];
        for round in 0..run.pace.alternations {
            // Who goes first changes, so that a drift favours nobody.
            for number in (0..count).map(|number| (number + round) % count) {
                rates[number].push(labs[number].bits_per_second(run.pace.iperf_seconds, from_guest));
            }
        }
        for ours in 0..2 {
            for peer in 2..count {
                let name = format!("{name}, {}", labs[ours].network.name());
                let peer_name = labs[peer].network.name();
                run.add_turns(name, &rates[ours], peer_name, &rates[peer], Unit::BitsPerSecond);
            }
        }
    }
    run.say("round trips to a guest");
    let with_packets = labs.iter().filter(|lab| lab.network.passes_packets()).count();
    let mut shares = vec![[Vec::new(), Vec::new()]; with_packets];
    for round in 0..run.pace.alternations {
        for number in (0..with_packets).map(|number| (number + round) % with_packets) {
            let trips = round_trips(&labs[number].namespace, GUEST, run.pace.echoes)?;
            for (values, share) in shares[number].iter_mut().zip([0.5, 0.99]) {
                values.push(trips.at_share(share) as f64 / 1e3);
            }
        }
    }
    let peer = with_packets - 1;
    for ours in 0..peer {
        for (index, word) in ["median", "p99"].into_iter().enumerate() {
            let (ours_us, theirs_us) = (&shares[ours][index], &shares[peer][index]);
            let link = labs[ours].network.name();
            let name = format!("round trip to a guest, {word}, {link}");
            run.add_turns(name, ours_us, labs[peer].network.name(), theirs_us, Unit::Microseconds);
            run.add_difference(
                format!("  added to QEMU's tap, {word}, {link}"),
                ours_us,
                theirs_us,
                Unit::Microseconds,
            );
        }
    }
    labs.into_iter().for_each(Lab::end);
    Ok(())
}
