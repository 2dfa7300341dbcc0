//! What can be asked on the command line. The words are those of the configuration file.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use device_svc::control::demo::DemoArguments;

const FILES: &str = "\
Files:
  /run/dray/card.sock, or $XDG_RUNTIME_DIR/dray/card.sock when not root
          The control socket; only its owner may open it.
  /run/dray/shim.sock beside it
          What host-shim may see; owner and group may open it.
  /var/lib/dray, or $XDG_STATE_HOME/dray or ~/.local/state/dray when not root
          What a card remembers over a restart.

Exit status:
  0  done
  1  not done; one line on standard error says why and what to do
  2  the command line is wrong";

/// Where the options of `function create` stand that only one type has.
const DISKS: &str = "Options of type blk";
const NETS: &str = "Options of type net";

/// Carries the I/O of virtual machines from their virtqueues to storage servers and networks
///
/// device-svc runs on the card. It shows block devices and network interfaces to virtual machines (over vhost-user or vfio-user
/// sockets), polls their virtqueues, and forwards every request to a volume's storage (an NBD server, a file or block device, or
/// memory) and every frame to an uplink's network (a tap, an interface of the card's, a tunnel, a switch).
///
/// `device-svc serve` runs the card; the other commands ask a card that runs, over its control socket.
#[derive(Parser, Debug)]
#[command(name = "device-svc", version, max_term_width = 120, after_long_help = FILES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a card until SIGTERM or SIGINT
    Serve(Serve),
    /// Check a configuration file and show what it means, without starting anything
    Validate(Validate),
    /// Create, list, show, change and delete functions of a running card
    #[command(subcommand)]
    Function(FunctionCommand),
    /// Create, list, show, resize and delete volumes of a running card
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Create, list, show and delete uplinks of a running card
    #[command(subcommand)]
    Uplink(UplinkCommand),
    /// Show what functions and reactors of a running card have done
    Stats(Stats),
    /// Have another version of this program take over a running card
    Update(UpdateArguments),
    /// Run a card on a temporary file, drive real virtio traffic through it, and show how to go on
    Demo(DemoArguments),
    /// Print a completion script for a shell
    #[command(long_about = "Print a completion script for a shell\n\nFor bash: device-svc completion bash > \
                            ~/.local/share/bash-completion/completions/device-svc")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Run a card until SIGTERM or SIGINT
///
/// Prints one line that starts with `ready:` on standard output once every volume, uplink and function of the configuration
/// is there; with NOTIFY_SOCKET set (systemd, Type=notify) it says READY=1 there too. If anything cannot be started, nothing is.
///
/// The process that was started is the keeper, a small one: it starts another, which serves, and starts it again if that dies. It
/// keeps what a restart must not lose: the connections of VMMs on vfio-user, their memory and events, registers, and the record of
/// requests in flight. Drivers notice a pause. If the keeper itself is killed, the service ends too, and VMMs on vfio-user lose their
/// devices.
///
/// SIGTERM or SIGINT ends the card when what is in flight has completed, within bounded time; a second SIGINT ends it at once. SIGHUP
/// changes nothing.
///
/// What commands make and change is remembered in the state folder before they are answered, and comes back with the next start; what
/// the configuration file names, the file decides. A folder is one card's.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  device-svc serve --config /etc/dray.toml
  RUST_LOG=debug device-svc serve --config dray.toml --log-format json 2>dray.log")]
pub(crate) struct Serve {
    /// The configuration (TOML); without it the card starts empty
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The control socket, in place of the configuration's
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) control: Option<String>,
    /// The folder of what the card remembers over a restart, in place of the configuration's [default: $XDG_STATE_HOME/dray, or
    /// ~/.local/state/dray, or /var/lib/dray as root]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) state: Option<PathBuf>,
    /// Remember nothing: what commands make and change is gone with the service
    #[arg(long, conflicts_with = "state")]
    pub(crate) no_state: bool,
    /// How logs are written to standard error; RUST_LOG filters them (info unless set)
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// Serve in this process, without one that keeps it: nothing starts it again, and VMMs on vfio-user do not outlive it
    #[arg(long)]
    pub(crate) no_keeper: bool,
    /// Started by a keeper, to which standard input leads
    #[arg(long, hide = true, conflicts_with = "no_keeper")]
    pub(crate) kept: bool,
    /// Wait until the keeper says that it is time
    #[arg(long, hide = true, requires = "kept")]
    pub(crate) stand_by: bool,
}

/// Have another version of this program take over a running card
///
/// The new program starts beside the old one and reads the configuration. Then the old one lets what is in flight complete, and ends; the
/// new one goes on with every function where it was: drivers notice a pause, nothing else. A VMM on vfio-user keeps its connection, a
/// vhost-user front end must connect again by itself (QEMU: reconnect-ms).
///
/// If the new program cannot start, the old one serves on and the reason is shown. If it ends before it serves, the old one is
/// started again.
#[derive(Args, Debug)]
#[command(after_long_help = "Example:
  device-svc update --binary /usr/local/bin/device-svc.new")]
pub(crate) struct UpdateArguments {
    /// The program that takes over
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: PathBuf,
    /// The card
    #[command(flatten)]
    pub(crate) ask: Ask,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Check a configuration file and show what it means, without starting anything
///
/// Shows each volume's UUID and serial and each network interface's MAC address, also those that were not given: they are derived
/// from names and storage and stay the same.
#[derive(Args, Debug)]
pub(crate) struct Validate {
    /// The configuration (TOML)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How a running card is reached, and how its answer is shown.
#[derive(Args, Debug)]
pub(crate) struct Ask {
    /// The card's control socket, like unix:/run/dray/card.sock [default: $XDG_RUNTIME_DIR/dray/card.sock, or
    /// /run/dray/card.sock as root]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) control: Option<String>,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum FunctionCommand {
    /// Create a function; if it exists with the same settings, that is fine
    Create(Box<FunctionCreate>),
    /// List all functions
    List(Ask),
    /// Show one function
    Show(Named),
    /// Change a function while it runs
    Set(FunctionSet),
    /// Change a function's limit while it runs: the same as `set` with --limit
    SetLimit(FunctionSetLimit),
    /// Stop and delete a function
    Delete(Named),
}

#[derive(Args, Debug)]
pub(crate) struct Named {
    /// Its name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  device-svc function create --name vm1-disk0 --volume root --link vhost-user,socket=/run/dray/vm1-disk0.sock
  device-svc function create --name vm1-disk0 --volume root --queues 4 --limit iops=50000,bandwidth=400M \\
      --link vhost-user,socket=/run/dray/vm1-disk0.sock,mode=server,socket-mode=0660,payload=in-place
  device-svc function create --type net --name vm1-net0 --uplink wan --mac 52:54:00:12:34:56 --queue-pairs 2 \\
      --link vfio-user,socket=/run/dray/vm1-net0.sock
  device-svc function create --type net --name vm2-net0 --uplink lan --vlan 20 --anti-spoofing mac=true,ip=10.0.0.5,,fd00::5 \\
      --link vhost-user,socket=/run/dray/vm2-net0.sock

A disk (blk) needs a --volume, a network interface (net) an --uplink.")]
pub(crate) struct FunctionCreate {
    /// Its name on this card
    #[arg(long)]
    pub(crate) name: String,
    /// What the VM sees: blk, a disk, or net, a network interface
    #[arg(long, default_value = "blk")]
    pub(crate) r#type: String,
    /// How the VM reaches it: vhost-user,socket=PATH[,mode=server|client][,socket-mode=0660][,payload=in-place|copy], or
    /// vfio-user,socket=PATH[,socket-mode=0660][,payload=in-place|copy][,notify=message|mapped][,msix=true|false]
    #[arg(long, value_name = "TYPE,KEY=VALUE,…")]
    pub(crate) link: String,
    /// The name of its volume (blk)
    #[arg(long, value_name = "NAME", help_heading = DISKS)]
    pub(crate) volume: Option<String>,
    /// Request queues [default: 1]
    #[arg(long, value_name = "COUNT", help_heading = DISKS)]
    pub(crate) queues: Option<String>,
    /// Entries of a queue at most, a power of two [default: 256]
    #[arg(long, value_name = "ENTRIES")]
    pub(crate) queue_size: Option<String>,
    /// Whether the packed ring is offered [default: true]
    #[arg(long, value_name = "BOOL")]
    pub(crate) packed: Option<String>,
    /// How fast it may go, per second. A disk: iops, bandwidth, read-iops, write-iops, read-bandwidth, write-bandwidth. A network
    /// interface: packets, bandwidth, transmit-packets, receive-packets, transmit-bandwidth, receive-bandwidth. Bandwidths are bytes.
    /// Both: burst, how much time at the full rate may be saved up while idle (1s)
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub(crate) limit: Option<String>,
    /// Data segments of a request at most [default: 126, or what the queue size allows]
    #[arg(long, value_name = "COUNT", help_heading = DISKS)]
    pub(crate) seg_max: Option<String>,
    /// Logical block size shown to the VM, 512 or 4096 [default: the volume's]
    #[arg(long, value_name = "BYTES", help_heading = DISKS)]
    pub(crate) block_size: Option<String>,
    /// Whether the write cache is on until the VM says otherwise [default: true]
    #[arg(long, value_name = "BOOL", help_heading = DISKS)]
    pub(crate) write_cache: Option<String>,
    /// A limit group of the configuration file that it shares
    #[arg(long, value_name = "NAME", help_heading = DISKS)]
    pub(crate) limit_group: Option<String>,
    /// The name of its uplink (net)
    #[arg(long, value_name = "NAME", help_heading = NETS)]
    pub(crate) uplink: Option<String>,
    /// Its MAC address, like 52:54:00:12:34:56 [default: derived from its name, and shown]
    #[arg(long, value_name = "ADDRESS", help_heading = NETS)]
    pub(crate) mac: Option<String>,
    /// The largest IP packet, 68 to 65535, no more than the uplink carries [default: 1500]
    #[arg(long, value_name = "BYTES", help_heading = NETS)]
    pub(crate) mtu: Option<String>,
    /// Pairs of a receive and a transmit queue, 1 to 128 [default: 1]
    #[arg(long, value_name = "COUNT", help_heading = NETS)]
    pub(crate) queue_pairs: Option<String>,
    /// Whether its driver may say which flow goes to which queue pair, and be told each frame's hash (vfio-user) [default: false]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = NETS)]
    pub(crate) rss: Option<String>,
    /// On a switch: the VLAN of its port, 1 to 4094 [default: all VLANs, tagged]
    #[arg(long, value_name = "VLAN", help_heading = NETS)]
    pub(crate) vlan: Option<String>,
    /// What its VM may say it is: mac=true|false[,vlan=VLAN,,VLAN…][,ip=ADDRESS,,ADDRESS…]. Frames with another source, another VLAN's
    /// tag or another IP address are dropped and counted [default: anything]
    #[arg(long, value_name = "KEY=VALUE,…", help_heading = NETS)]
    pub(crate) anti_spoofing: Option<String>,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

/// Change a function while it runs
///
/// What is not given stays as it is; either all of it is changed or nothing. The VM is told as far as its driver listens: of the
/// link's state at once, of the MAC address and the MTU when the driver next reads them, which most do when they start.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  device-svc function set vm1-net0 --link down
  device-svc function set vm1-net0 --link up --mtu 1450 --limit bandwidth=125M,burst=2s
  device-svc function set vm1-disk0 --limit iops=1000")]
#[command(group(ArgGroup::new("change").required(true).multiple(true).args(["link", "mac", "mtu", "limit"])))]
pub(crate) struct FunctionSet {
    /// Its name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Whether its link is up, as far as its uplink has a carrier (net)
    #[arg(long, value_enum, value_name = "STATE")]
    pub(crate) link: Option<LinkArgument>,
    /// Its new MAC address, like 52:54:00:12:34:56 (net)
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) mac: Option<String>,
    /// The new largest IP packet, no more than the uplink carries (net)
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<String>,
    /// The new limit, as for `function create`; an empty text takes the limit away
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub(crate) limit: Option<String>,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LinkArgument {
    /// Up
    Up,
    /// Down
    Down,
}

#[derive(Args, Debug)]
pub(crate) struct FunctionSetLimit {
    /// Its name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The new limit, as for `function create`; an empty text takes the limit away
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub(crate) limit: String,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

#[derive(Subcommand, Debug)]
pub(crate) enum VolumeCommand {
    /// Create a volume; if it exists with the same settings, that is fine
    Create(Box<VolumeCreate>),
    /// List all volumes
    List(Ask),
    /// Show one volume
    Info(Named),
    /// Change a volume's size while it is in use; VMs are told
    Resize(VolumeResize),
    /// Delete a volume that no function uses; its bytes stay where they are, but for type ram
    Delete(Named),
}

#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  device-svc volume create --name scratch --backend null,size=1G
  device-svc volume create --name root --backend file,path=/srv/root.img,create=10G
  device-svc volume create --name data --backend nbd,uri=nbd://10.0.0.1:10809/data,connections=2 --io-timeout 60s

A comma within a value is written twice.")]
pub(crate) struct VolumeCreate {
    /// Its name on this card
    #[arg(long)]
    pub(crate) name: String,
    /// Where its bytes are: null,size=SIZE | ram,size=SIZE | file,path=PATH[,create=SIZE][,direct=BOOL] |
    /// nbd,uri=URI[,connections=COUNT][,tls-ca=PATH][,tls-certificate=PATH,tls-key=PATH][,tls-hostname=NAME]
    #[arg(long, value_name = "TYPE,KEY=VALUE,…")]
    pub(crate) backend: String,
    /// Its identity [default: derived from name and storage, and shown]
    #[arg(long)]
    pub(crate) uuid: Option<String>,
    /// The disk's serial that VMs see, 1 to 20 characters [default: the first 20 digits of the UUID]
    #[arg(long)]
    pub(crate) serial: Option<String>,
    /// How long requests are held while the storage server is away [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub(crate) io_timeout: Option<String>,
    /// Never write it
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub(crate) read_only: Option<String>,
    /// What becomes of requests that were in flight when the service died: reissue, or fail (with an I/O error) [default: reissue]
    #[arg(long, value_name = "POLICY")]
    pub(crate) recovery: Option<String>,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

#[derive(Args, Debug)]
pub(crate) struct VolumeResize {
    /// Its name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The new size, like 20G; of a volume whose size only its server can set, the size that is then shown is the server's
    #[arg(value_name = "SIZE")]
    pub(crate) size: String,
    /// Allow a smaller size: what lies beyond it is lost
    #[arg(long)]
    pub(crate) shrink: bool,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

#[derive(Subcommand, Debug)]
pub(crate) enum UplinkCommand {
    /// Create an uplink; if it exists with the same settings, that is fine
    Create(Box<UplinkCreate>),
    /// List all uplinks
    List(Ask),
    /// Show one uplink
    Show(Named),
    /// Delete an uplink that no function uses
    Delete(Named),
}

#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  device-svc uplink create --name wan --backend tap,name=dray0
  device-svc uplink create --name blue --backend tap,name=dray0,netns=blue,mtu=9000
  device-svc uplink create --name wire --backend af-packet,interface=eth1
  device-svc uplink create --name fast --backend af-xdp,interface=eth1,queues=2
  device-svc uplink create --name far --backend vxlan,vni=42,local=10.9.0.1,remote=10.9.0.2,,10.9.0.3
  device-svc uplink create --name lan --backend switch,uplink=wan
  device-svc uplink create --name bench --backend loopback

A tap interface that is not there is made; any other interface, and the network namespace, must be there (`ip netns add blue`).
af-packet leaves the interface to the card's stack as well; af-xdp has all that comes by the queues that a VM uses.
A tunnel's own address must be on an interface; a comma within a value is written twice.")]
pub(crate) struct UplinkCreate {
    /// Its name on this card
    #[arg(long)]
    pub(crate) name: String,
    /// The network behind it: tap,name=INTERFACE[,netns=NAME][,mtu=BYTES] | af-packet,interface=INTERFACE[,netns=NAME] |
    /// af-xdp,interface=INTERFACE[,queues=COUNT][,netns=NAME] | vxlan,vni=NUMBER,local=ADDRESS[,remote=ADDRESS,,ADDRESS…]
    /// [,mtu=BYTES][,port=PORT][,netns=NAME][,learn=listed|any|none] | geneve,… (the same) | switch[,uplink=NAME] (functions reach
    /// each other, and another uplink if one is named) | loopback (what is sent comes back) | null (what is sent is dropped)
    #[arg(long, value_name = "TYPE,KEY=VALUE,…")]
    pub(crate) backend: String,
    #[command(flatten)]
    pub(crate) ask: Ask,
}

/// Show what functions and reactors of a running card have done
///
/// Counts since each function was created; with --watch what happened in each interval, per second. P50 and P99 are upper
/// bounds of the latency, from a histogram in powers of two.
///
/// Network interfaces have a table of their own: frames and bytes to the VM (RX) and from it (TX), and frames that were dropped,
/// with the reasons.
#[derive(Args, Debug)]
pub(crate) struct Stats {
    /// Go on showing what happens, until interrupted
    #[arg(long)]
    pub(crate) watch: bool,
    /// How often with --watch
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    pub(crate) interval: String,
    /// Show each queue
    #[arg(long)]
    pub(crate) queues: bool,
    #[command(flatten)]
    pub(crate) ask: Ask,
}
