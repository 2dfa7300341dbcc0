//! What a card remembers over the end of its service: its volumes, uplinks and functions, and who made them.
//!
//! ```text
//!   inventory ─► CardState ─► document.rs (text, sealed) ─► folder.rs (one process; whole or not at all) ─► card.state
//!   serve     ◄─ CardState ◄─ document.rs (parsed once)  ◄─ folder.rs
//! ```
//!
//! Everything is kept, also what the configuration file names: a start compares that with the file as it is then.

mod document;
mod folder;

use std::path::PathBuf;

use crate::config::{FunctionConfig, UplinkConfig, VolumeConfig};
use crate::format::FORMAT;

pub use folder::{StateFolder, default_state_folder};

/// Who made a thing, and so who decides what becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The configuration file.
    File,
    /// A command.
    Command,
}

/// One thing, and who made it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept<T> {
    /// Its settings.
    pub config: T,
    /// Who made it.
    pub origin: Origin,
}

/// A function, and what of it is in no settings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptFunction {
    /// Its settings, and who made it.
    pub kept: Kept<FunctionConfig>,
    /// Of a network interface: whether its link shall be up.
    pub link_up: bool,
}

/// What a card has; names of each kind are unique.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct CardState {
    /// Whether the service runs: after it has ended by itself, false; after it has died, still true.
    pub running: bool,
    /// Its volumes.
    pub volumes: Vec<Kept<VolumeConfig>>,
    /// Its uplinks.
    pub uplinks: Vec<Kept<UplinkConfig>>,
    /// Its functions.
    pub functions: Vec<KeptFunction>,
}

/// Why the state of a card cannot be had or kept. Nothing on the disk was changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder is another process's.
    #[error(
        "the state folder {} is used by {holder}; end that, or give this card another with --state, or none with --no-state",
        folder.display()
    )]
    InUse {
        /// The folder.
        folder: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// There is no folder to be had.
    #[error("{}: {source}; give a folder that can be written with --state, or --no-state to keep nothing", path.display())]
    Folder {
        /// What could not be done there.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody said where, and the environment names no place.
    #[error("there is no HOME for a state folder; give one with --state, or --no-state to keep nothing")]
    Nowhere,
    /// What is there is not to be used, and is left as it is.
    #[error("{}: {fault}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What it is, and the next step.
        fault: DocumentFault,
    },
}

/// What is wrong with a kept state.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DocumentFault {
    /// It is something else.
    #[error("this is no state of a card; move it away, or give another folder with --state")]
    Foreign,
    /// It is not what was written.
    #[error(
        "the state is torn, or was changed by hand; put back a copy that is whole, or move it away: the card then starts with what \
         its configuration file names, and what was created by command must be created again"
    )]
    Torn,
    /// A version of later than the next one has written it.
    #[error("the state has format {format}, and this version reads up to {}; start the version that wrote it, or the one after this", FORMAT + 1)]
    Newer {
        /// Its format.
        format: u32,
    },
    /// A version of earlier than the one before has written it.
    #[error(
        "the state has format {format}, which this version no longer reads; start the version between once, which carries it on"
    )]
    Older {
        /// Its format.
        format: u32,
    },
    /// It was written so, and is wrong all the same.
    #[error("the state is whole but wrong ({0}); start the version that wrote it, or move it away")]
    Wrong(String),
}

#[cfg(test)]
mod tests;
