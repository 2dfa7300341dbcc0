//! What can be asked on the command line. The words are those of the configuration file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use device_svc::control::demo::DemoArguments;

const FILES: &str = "\
Files:
  /run/dray/card.sock, or $XDG_RUNTIME_DIR/dray/card.sock when not root
          The control socket; only its owner may open it.
  /run/dray/shim.sock beside it
          What host-shim may see; owner and group may open it.

Exit status:
  0  done
  1  not done; one line on standard error says why and what to do
  2  the command line is wrong";

/// Carries the I/O of virtual machines from their virtqueues to storage servers
///
/// device-svc runs on the card. It shows block devices to virtual machines (over vhost-user or vfio-user sockets), polls their
/// virtqueues, and forwards every request to a volume's storage: an NBD server, a file or block device, or memory.
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
    /// Create, list, show, limit and delete functions of a running card
    #[command(subcommand)]
    Function(FunctionCommand),
    /// Create, list, show, resize and delete volumes of a running card
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Show what functions and reactors of a running card have done
    Stats(Stats),
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
/// Prints one line that starts with `ready:` on standard output once every volume and function of the configuration is
/// there; with NOTIFY_SOCKET set (systemd, Type=notify) it says READY=1 there too. If anything cannot be started, nothing is.
///
/// SIGTERM or SIGINT ends the card when what is in flight has completed, within bounded time; a second one ends it at once.
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
    /// How logs are written to standard error; RUST_LOG filters them (info unless set)
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
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
/// Shows each volume's UUID and serial, also those that were not given: they are derived from the volume's name and
/// storage and stay the same.
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
    /// Change a function's limit while it runs
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
      --link vhost-user,socket=/run/dray/vm1-disk0.sock,mode=server,socket-mode=0660,payload=in-place")]
pub(crate) struct FunctionCreate {
    /// Its name on this card
    #[arg(long)]
    pub(crate) name: String,
    /// What the VM sees
    #[arg(long, default_value = "blk")]
    pub(crate) r#type: String,
    /// How the VM reaches it: vhost-user,socket=PATH[,mode=server|client][,socket-mode=0660][,payload=in-place|copy], or
    /// vfio-user,socket=PATH[,socket-mode=0660][,payload=in-place|copy][,notify=message|mapped][,msix=true|false]
    #[arg(long, value_name = "TYPE,KEY=VALUE,…")]
    pub(crate) link: String,
    /// The name of its volume
    #[arg(long)]
    pub(crate) volume: String,
    /// Request queues [default: 1]
    #[arg(long, value_name = "COUNT")]
    pub(crate) queues: Option<String>,
    /// Entries of a queue at most, a power of two [default: 256]
    #[arg(long, value_name = "ENTRIES")]
    pub(crate) queue_size: Option<String>,
    /// Whether the packed ring is offered [default: true]
    #[arg(long, value_name = "BOOL")]
    pub(crate) packed: Option<String>,
    /// Data segments of a request at most [default: 126, or what the queue size allows]
    #[arg(long, value_name = "COUNT")]
    pub(crate) seg_max: Option<String>,
    /// Logical block size shown to the VM, 512 or 4096 [default: the volume's]
    #[arg(long, value_name = "BYTES")]
    pub(crate) block_size: Option<String>,
    /// Whether the write cache is on until the VM says otherwise [default: true]
    #[arg(long, value_name = "BOOL")]
    pub(crate) write_cache: Option<String>,
    /// How fast it may go, per second: iops, bandwidth, read-iops, write-iops, read-bandwidth, write-bandwidth, and burst:
    /// how much time at the full rate may be saved up while idle (1s)
    #[arg(long, value_name = "KEY=VALUE,…")]
    pub(crate) limit: Option<String>,
    /// A limit group of the configuration file that it shares
    #[arg(long, value_name = "NAME")]
    pub(crate) limit_group: Option<String>,
    #[command(flatten)]
    pub(crate) ask: Ask,
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

/// Show what functions and reactors of a running card have done
///
/// Counts since each function was created; with --watch what happened in each interval, per second. P50 and P99 are upper
/// bounds of the latency, from a histogram in powers of two.
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
