//! The demo's card: a temporary folder with a volume and a socket, and the service on them. Nothing of it stays behind,
//! however the demo ends.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::config::Config;
use crate::control::open_backend::open_backend;
use crate::control::seam::{Backing, FunctionRun};
use crate::control::starter::start_reactors;
use crate::volume::Volume;

/// A folder that goes with its owner.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("dray-demo-{}", uuid::Uuid::new_v4().simple()));
        DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("make the folder {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to who cleans the temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The card.
pub(super) struct Stand {
    function: Arc<dyn FunctionRun>,
    socket: PathBuf,
    folder: Folder,
}

impl Stand {
    /// Starts it.
    pub(super) fn start(volume_size: &str) -> Result<Self> {
        let folder = Folder::make()?;
        remove_on_signals(folder.0.clone())?;
        let config = Config::parse(&configuration(volume_size), "the demo's configuration", &folder.0)?;
        crate::dma::install_bus_fault_guard().context("install the guard against truncated VM memory")?;
        let (Some(volume), Some(function)) = (config.volumes.first(), config.functions.first()) else {
            anyhow::bail!("the demo's configuration has a volume and a function");
        };
        let starter = start_reactors(&config.reactors, None)?;
        let backend = open_backend(volume).with_context(|| format!("the volume in {}", folder.0.display()))?;
        let volume = Arc::new(Volume::new(volume, backend));
        let function = starter.start(function, None, Backing::Volume(volume), Box::new(|_| {}))?;
        let socket = folder.0.join("disk.sock");
        Ok(Self { function, socket, folder })
    }

    /// The function's socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The volume's file.
    pub(super) fn volume(&self) -> PathBuf {
        self.folder.0.join("disk.img")
    }

    /// Ends it; dropping it does the same.
    pub(super) fn stop(self) {
        drop(self);
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.function.stop();
    }
}

fn configuration(volume_size: &str) -> String {
    format!(
        r#"
[reactors]
count = 1
[[volume]]
name = "disk"
backend = {{ type = "file", path = "disk.img", create = "{volume_size}" }}
[[function]]
name = "disk"
type = "blk"
link = {{ type = "vhost-user", socket = "disk.sock" }}
volume = "disk"
"#
    )
}

/// Interrupted, the demo removes its folder and ends. Before any other thread starts, so that all are born with the signals
/// blocked.
fn remove_on_signals(folder: PathBuf) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("block signals")?;
    let taker = std::thread::Builder::new().name("signals".to_owned());
    taker.spawn(move || {
        if let Ok(signal) = signals.wait() {
            drop(Folder(folder));
            // As a shell reports a process that a signal ended.
            std::process::exit(128 + signal as i32);
        }
    })?;
    Ok(())
}
