//! What an operator wants: a TOML file (or a command's options) parsed once into types that cannot be wrong.
//!
//! ```text
//!  text ─ raw (which keys there are; serde) ─► field (types of values) ─► volume, uplink, function, limit (one table each)
//!       ─► this file (tables beside each other) ─► Config
//! ```
//!
//! Every error is one line: file, line and column, the volume, uplink or function, the key, what is wrong, what to write instead.

mod address;
mod anti_spoofing;
mod blk;
mod field;
mod function;
mod limit;
mod link;
mod mac;
mod name;
mod net;
mod options;
mod places;
pub mod quantity;
mod raw;
#[cfg(test)]
mod tests;
mod tunnel;
mod uplink;
mod volume;
mod written;

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;

pub use address::{ControlAddress, default_control_address};
pub use anti_spoofing::AntiSpoofingConfig;
pub use blk::{BlkConfig, SEG_MAX_DEFAULT};
pub use function::{DeviceConfig, FunctionConfig};
pub use limit::{BURST_DEFAULT, LimitConfig, LimitGroupConfig, NetLimitConfig};
pub use link::{LinkConfig, LinkKind, NotifyConfig, PayloadConfig, SocketMode};
pub use mac::MacAddress;
pub use net::{MTU_DEFAULT, NetChange, NetConfig};
pub use options::Options;
pub use tunnel::{LearnConfig, TunnelConfig};
pub use uplink::{AfPacketConfig, AfXdpConfig, TapConfig, UplinkBackendConfig, UplinkConfig};
pub use volume::{
    BackendConfig, IO_TIMEOUT_DEFAULT, NbdConfig, RecoveryConfig, SERIAL_BYTES, TlsIdentity, VolumeConfig, serial_of,
};

use field::{Fault, Reading, Table};
use raw::{RawConfig, RawControl, RawReactors};

/// A configuration is read as a whole, so its size is bounded first; 4096 functions fit many times.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Everything that a card is told when it starts.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Config {
    /// The threads that poll.
    pub reactors: ReactorsConfig,
    /// How the card is reached.
    pub control: ControlConfig,
    /// Volumes: names, UUIDs and serials are unique, and no storage is written twice.
    pub volumes: Vec<VolumeConfig>,
    /// Uplinks: names are unique, and no interface is used twice.
    pub uplinks: Vec<UplinkConfig>,
    /// Functions: names, sockets and MAC addresses are unique, volumes, uplinks and limit groups exist, and no volume is written by
    /// two.
    pub functions: Vec<FunctionConfig>,
    /// Limit groups; names are unique.
    pub limit_groups: Vec<LimitGroupConfig>,
}

/// The threads that poll.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReactorsConfig {
    /// How many.
    pub count: ReactorCount,
    /// What they do when there is nothing to do.
    pub poll: PollConfig,
}

/// How many reactors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReactorCount {
    /// One per CPU that this process may really use.
    Auto,
    /// This many; 1 to 1024.
    Exactly(u16),
}

/// What a reactor without work does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PollConfig {
    /// Sleeps after a short time, until a doorbell or a completion.
    Adaptive,
    /// Goes on polling.
    Always,
}

/// How the card is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlConfig {
    /// The socket of operators.
    pub listen: ControlAddress,
    /// The socket of host-shim, which sees less.
    pub shim: ControlAddress,
    /// Where Prometheus metrics are served, if at all.
    pub metrics: Option<SocketAddr>,
    /// The folder of what the card remembers over a restart; absolute after loading from a file. `None`: the default one.
    pub state: Option<PathBuf>,
}

impl Default for ReactorsConfig {
    fn default() -> Self {
        Self { count: ReactorCount::Auto, poll: PollConfig::Adaptive }
    }
}

impl Default for ControlConfig {
    fn default() -> Self {
        let listen = default_control_address();
        Self { shim: listen.shim_beside(), listen, metrics: None, state: None }
    }
}

/// A configuration that was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// What it says is wrong.
    #[error("{origin}:{line}:{column}: {message}")]
    Invalid {
        /// The file's name.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// The column, in characters from 1.
        column: usize,
        /// Place, key, what is wrong, next step.
        message: String,
    },
    /// A command's options, or a message, say something wrong; they have no lines.
    #[error("{0}")]
    Options(String),
}

impl Config {
    /// Loads a file, and checks that the files and folders it names are there.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |reason: String| ConfigError::Unreadable { path: path.to_path_buf(), reason };
        let metadata = std::fs::metadata(path).map_err(|error| unreadable(readable_reason(&error)))?;
        if !metadata.is_file() {
            return Err(unreadable("not a file; give a TOML file".to_owned()));
        }
        if metadata.len() > FILE_BYTES_MAX {
            return Err(unreadable(format!("{} bytes are too many; at most 16M are read", metadata.len())));
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(readable_reason(&error)))?;
        let absolute = std::path::absolute(path).map_err(|error| unreadable(error.to_string()))?;
        let folder = absolute.parent().unwrap_or(Path::new("/"));
        let origin = path.display().to_string();
        let (config, spans) =
            parse(&text, Reading { from_options: false, folder }).map_err(|fault| located(&origin, &text, fault))?;
        places::check(&config, &spans).map_err(|fault| located(&origin, &text, fault))?;
        Ok(config)
    }

    /// Parses a text whose relative paths start from `folder`. Asks the file system nothing.
    ///
    /// # Errors
    /// The first thing that is wrong with it, placed in `origin`.
    pub fn parse(text: &str, origin: &str, folder: &Path) -> Result<Self, ConfigError> {
        match parse(text, Reading { from_options: false, folder }) {
            Ok((config, _)) => Ok(config),
            Err(fault) => Err(located(origin, text, fault)),
        }
    }
}

impl Config {
    /// Whether what an uplink refers to is there.
    fn check_uplink(&self, uplink: &UplinkConfig) -> Result<(), (&'static str, String)> {
        let Some(name) = uplink.backend.uplink() else { return Ok(()) };
        match self.uplinks.iter().find(|other| other.name == name) {
            Some(other) => uplink.check_on(other),
            None => Err(("backend", format!("there is no uplink {name:?}; add an [[uplink]] of that name"))),
        }
    }

    /// Whether what a function refers to is there.
    fn check_function(&self, function: &FunctionConfig) -> Result<(), (&'static str, String)> {
        if let Some(volume) = function.device.volume()
            && !self.volumes.iter().any(|other| other.name == volume)
        {
            return Err(("volume", format!("there is no volume {volume:?}; add a [[volume]] of that name")));
        }
        if let DeviceConfig::Net(NetConfig { uplink, vlan, .. }) = &function.device {
            let Some(on) = self.uplinks.iter().find(|other| other.name == *uplink) else {
                return Err(("uplink", format!("there is no uplink {uplink:?}; add an [[uplink]] of that name")));
            };
            if vlan.is_some() && !matches!(on.backend, UplinkBackendConfig::Switch { .. }) {
                let message =
                    format!("uplink {uplink:?} is no switch, and has no ports with a VLAN; leave the key out");
                return Err(("vlan", message));
            }
        }
        if let Some(group) = function.device.limit_group()
            && !self.limit_groups.iter().any(|other| other.name == group)
        {
            let message = format!("there is no limit group {group:?}; add a [[limit-group]] of that name");
            return Err(("limit-group", message));
        }
        Ok(())
    }
}

/// Where each table stood, for errors that only show once all are known.
struct Spans {
    volumes: Vec<Range<usize>>,
    uplinks: Vec<Range<usize>>,
    functions: Vec<Range<usize>>,
}

fn parse(text: &str, reading: Reading<'_>) -> Result<(Config, Spans), Fault> {
    let raw: RawConfig = toml::from_str(text).map_err(from_toml)?;
    let reactors = raw.reactors.map_or_else(|| Ok(ReactorsConfig::default()), |raw| reactors(raw, reading))?;
    let control = raw.control.map_or_else(|| Ok(ControlConfig::default()), |raw| control(raw, reading))?;
    let mut config = Config { reactors, control, ..Config::default() };
    let mut spans = Spans { volumes: Vec::new(), uplinks: Vec::new(), functions: Vec::new() };

    for raw in raw.volume {
        let span = raw.span();
        let volume = volume::volume(raw, reading)?;
        for other in &config.volumes {
            beside(&span, "volume", &volume.name, volume.check_beside(other))?;
        }
        config.volumes.push(volume);
        spans.volumes.push(span);
    }
    for raw in raw.uplink {
        let span = raw.span();
        let uplink = uplink::uplink(raw, reading)?;
        for other in &config.uplinks {
            beside(&span, "uplink", &uplink.name, uplink.check_beside(other))?;
        }
        config.uplinks.push(uplink);
        spans.uplinks.push(span);
    }
    for (uplink, span) in config.uplinks.iter().zip(&spans.uplinks) {
        beside(span, "uplink", &uplink.name, config.check_uplink(uplink))?;
    }
    for raw in raw.limit_group {
        let span = raw.span();
        let group = limit::limit_group(raw, reading)?;
        if config.limit_groups.iter().any(|other| other.name == group.name) {
            let message = format!("there is already a limit-group {:?}; choose another name", group.name);
            beside(&span, "limit-group", &group.name, Err(("name", message)))?;
        }
        config.limit_groups.push(group);
    }
    for raw in raw.function {
        let span = raw.span();
        let function = function::function(raw, reading)?;
        let name = function.name.clone();
        beside(&span, "function", &name, config.check_function(&function))?;
        beside(&span, "function", &name, function.check_reactors(&config.reactors))?;
        let volume = function.device.volume();
        let shared = config.volumes.iter().any(|other| Some(other.name.as_str()) == volume && other.read_only);
        for other in &config.functions {
            beside(&span, "function", &name, function.check_beside(other, shared))?;
        }
        config.functions.push(function);
        spans.functions.push(span);
    }
    Ok((config, spans))
}

/// Places a table's trouble with another one.
fn beside(
    span: &Range<usize>,
    table: &str,
    name: &str,
    result: Result<(), (&'static str, String)>,
) -> Result<(), Fault> {
    result.map_err(|(key, message)| Fault {
        span: span.clone(),
        message: format!("{table} {name:?}: `{key}`: {message}"),
    })
}

fn reactors(raw: Spanned<RawReactors>, reading: Reading<'_>) -> Result<ReactorsConfig, Fault> {
    let table = Table { place: "reactors".to_owned(), span: raw.span(), reading };
    let raw = raw.into_inner();
    let is_auto = raw.count.as_ref().is_none_or(|value| value.get_ref().as_str() == Some("auto"));
    let count = if is_auto {
        ReactorCount::Auto
    } else {
        let count = table
            .integer("count", &raw.count, 1..=1024)
            .map_err(|fault| Fault { message: format!("{}, nor \"auto\"", fault.message), ..fault })?;
        count.map_or(ReactorCount::Auto, |count| ReactorCount::Exactly(count as u16))
    };
    let words = [("adaptive", PollConfig::Adaptive), ("always", PollConfig::Always)];
    let poll = table.word("poll", &raw.poll, &words)?.unwrap_or(PollConfig::Adaptive);
    Ok(ReactorsConfig { count, poll })
}

fn control(raw: Spanned<RawControl>, reading: Reading<'_>) -> Result<ControlConfig, Fault> {
    let table = Table { place: "control".to_owned(), span: raw.span(), reading };
    let raw = raw.into_inner();
    let address = |key: &str, field: &field::Field| match table.text(key, field)? {
        None => Ok(None),
        Some(text) => {
            ControlAddress::parse(text, reading.folder).map(Some).map_err(|message| table.fault_at(key, field, message))
        }
    };
    let listen = address("listen", &raw.listen)?.unwrap_or_else(default_control_address);
    let shim = address("shim", &raw.shim)?.unwrap_or_else(|| listen.shim_beside());
    if shim == listen {
        return Err(table.fault_at("shim", &raw.shim, "the same socket as `listen`; host-shim needs one of its own"));
    }
    let metrics = match table.text("metrics", &raw.metrics)? {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            let message = format!("{text:?} is not an address with a port; write one like \"127.0.0.1:9464\"");
            table.fault_at("metrics", &raw.metrics, message)
        })?),
    };
    let state = table.path("state", &raw.state)?;
    Ok(ControlConfig { listen, shim, metrics, state })
}

/// serde's own errors: syntax, unknown keys, a table where a value belongs.
fn from_toml(error: toml::de::Error) -> Fault {
    let message = error.message().replace('\n', ", ");
    let message = match message.strip_prefix("unknown field ") {
        Some(rest) => format!("unknown key {rest}"),
        None => message,
    };
    Fault { span: error.span().unwrap_or(0..0), message }
}

fn located(origin: &str, text: &str, fault: Fault) -> ConfigError {
    let before = text.get(..fault.span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|character| *character != '\n').count() + 1;
    ConfigError::Invalid { origin: origin.to_owned(), line, column, message: fault.message }
}

fn readable_reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file; check the path given with --config".to_owned(),
        std::io::ErrorKind::PermissionDenied => "may not be read; check its permissions".to_owned(),
        std::io::ErrorKind::InvalidData => "not UTF-8 text; give a TOML file".to_owned(),
        _ => error.to_string(),
    }
}
