//! Where a card's control interface is found.

use std::fmt;
use std::path::{Path, PathBuf};

use super::link::check_socket_path;

/// A control interface's address: today always a Unix socket, written `unix:/run/dray/card.sock`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControlAddress {
    socket: PathBuf,
}

impl ControlAddress {
    /// Parses an address whose relative path starts from `folder`.
    ///
    /// # Errors
    /// What is wrong with it and how to write it.
    pub fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() && !path.contains('\0') => {
                let socket: PathBuf = folder.join(path).components().collect();
                check_socket_path(&socket)?;
                Ok(Self { socket })
            }
            _ => Err(format!("{text:?} is not an address; write one like \"unix:/run/dray/card.sock\"")),
        }
    }

    /// The socket's absolute path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where host-shim finds its socket if nothing else is said: `shim.sock` beside this one.
    #[must_use]
    pub fn shim_beside(&self) -> Self {
        let mut name = self.socket.file_stem().unwrap_or_default().to_owned();
        // A card whose own socket has another name must not share the default shim socket with its neighbour.
        if name == "card" {
            name = "shim.sock".into();
        } else {
            name.push("-shim.sock");
        }
        Self { socket: self.socket.with_file_name(name) }
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.socket.display())
    }
}

/// The address when none is given: `$XDG_RUNTIME_DIR/dray/card.sock`, or `/run/dray/card.sock` for root and where there
/// is no such folder.
#[must_use]
pub fn default_control_address() -> ControlAddress {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = match runtime {
        Some(folder) if !nix::unistd::geteuid().is_root() => folder,
        _ => PathBuf::from("/run"),
    };
    ControlAddress { socket: folder.join("dray/card.sock") }
}
