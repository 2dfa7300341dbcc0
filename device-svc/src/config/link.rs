//! A link's settings: the socket by which a VM reaches a function, and how the two speak.

use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::field::{Fault, Field, Reading, Table};
use super::raw::RawLink;
use super::volume::doubled;

/// How a VM reaches a function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LinkConfig {
    /// The socket's path; absolute after loading from a file.
    pub socket: PathBuf,
    /// Permissions of the socket that the card makes, 0 to 0o777. A client makes none.
    pub socket_mode: u32,
    /// Where payload goes.
    pub payload: PayloadConfig,
    /// What is spoken on the socket.
    pub kind: LinkKind,
}

/// What is spoken on a link's socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkKind {
    /// vhost-user: the VMM shows the device, the card serves its virtqueues.
    VhostUser {
        /// Who listens.
        mode: SocketMode,
    },
    /// vfio-user: the card shows a whole PCI function.
    VfioUser {
        /// How doorbells arrive.
        notify: NotifyConfig,
        /// Whether it has MSI-X; without, it has INTx only.
        msix: bool,
    },
}

/// Who listens on a link's socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketMode {
    /// The card.
    Server,
    /// The VMM; the card connects, again and again if need be.
    Client,
}

/// How a function's doorbells arrive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotifyConfig {
    /// As messages, which wake a reactor that sleeps.
    Message,
    /// As plain stores to memory that the VMM has mapped: without a message, and without waking anybody.
    Mapped,
}

/// Where a function's payload goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PayloadConfig {
    /// Straight between the VM's memory and the backend, where the backend can.
    InPlace,
    /// Through card memory, as on a card without a window into the host's.
    Copy,
}

impl LinkConfig {
    /// The type's name in the configuration.
    #[must_use]
    pub const fn type_name(&self) -> &'static str {
        match self.kind {
            LinkKind::VhostUser { .. } => "vhost-user",
            LinkKind::VfioUser { .. } => "vfio-user",
        }
    }

    /// Whether doorbells wake nobody.
    #[must_use]
    pub const fn is_silent(&self) -> bool {
        matches!(self.kind, LinkKind::VfioUser { notify: NotifyConfig::Mapped, .. })
    }
}

/// As an option of a command: `vhost-user,socket=/run/dray/vm1.sock,mode=server,…`.
impl fmt::Display for LinkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},socket={}", self.type_name(), doubled(self.socket.display()))?;
        if let LinkKind::VhostUser { mode } = self.kind {
            write!(f, ",mode={}", mode.word())?;
        }
        write!(f, ",socket-mode={:04o},payload={}", self.socket_mode, self.payload.word())?;
        if let LinkKind::VfioUser { notify, msix } = self.kind {
            write!(f, ",notify={},msix={msix}", notify.word())?;
        }
        Ok(())
    }
}

impl SocketMode {
    /// As written in the configuration.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

impl NotifyConfig {
    /// As written in the configuration.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::Mapped => "mapped",
        }
    }
}

impl PayloadConfig {
    /// As written in the configuration.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::InPlace => "in-place",
            Self::Copy => "copy",
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    VhostUser,
    VfioUser,
}

pub(super) fn link(raw: &Spanned<RawLink>, place: &str, reading: Reading<'_>) -> Result<LinkConfig, Fault> {
    let table = Table { place: format!("{place}: link"), span: raw.span(), reading };
    let raw = raw.get_ref();
    let kind = table.word("type", &raw.r#type, &[("vhost-user", Kind::VhostUser), ("vfio-user", Kind::VfioUser)])?;
    let kind = table.required("type", kind, "`type = \"vhost-user\"` or `type = \"vfio-user\"`")?;
    let socket = table.path("socket", &raw.socket)?;
    let socket = table.required("socket", socket, "`socket = \"/run/dray/….sock\"`")?;
    check_socket_path(&socket).map_err(|message| table.fault_at("socket", &raw.socket, message))?;
    let socket_mode = match table.text("socket-mode", &raw.socket_mode)? {
        // The VMM seldom runs as the card's user, but it can share a group with it.
        None => 0o660,
        Some(text) => u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(|| {
            let message = format!("{text:?} is not a file mode; write octal digits, like \"0660\"");
            table.fault_at("socket-mode", &raw.socket_mode, message)
        })?,
    };
    let payloads = [("in-place", PayloadConfig::InPlace), ("copy", PayloadConfig::Copy)];
    let payload = table.word("payload", &raw.payload, &payloads)?.unwrap_or(PayloadConfig::InPlace);
    let absent = |key: &str, field: &Field, other: &str| match field {
        None => Ok(()),
        Some(_) => Err(table.fault_at(key, field, format_args!("only a {other} link has it; remove it"))),
    };
    let kind = match kind {
        Kind::VhostUser => {
            absent("notify", &raw.notify, "vfio-user")?;
            absent("msix", &raw.msix, "vfio-user")?;
            let modes = [("server", SocketMode::Server), ("client", SocketMode::Client)];
            LinkKind::VhostUser { mode: table.word("mode", &raw.mode, &modes)?.unwrap_or(SocketMode::Server) }
        }
        Kind::VfioUser => {
            absent("mode", &raw.mode, "vhost-user")?;
            let ways = [("message", NotifyConfig::Message), ("mapped", NotifyConfig::Mapped)];
            LinkKind::VfioUser {
                notify: table.word("notify", &raw.notify, &ways)?.unwrap_or(NotifyConfig::Message),
                msix: table.boolean("msix", &raw.msix)?.unwrap_or(true),
            }
        }
    };
    Ok(LinkConfig { socket, socket_mode, payload, kind })
}

/// `sun_path` holds 108 bytes with its NUL: a longer path cannot be bound.
pub(super) fn check_socket_path(path: &Path) -> Result<(), String> {
    if path.as_os_str().len() > 107 {
        return Err(format!("{path:?} is not a socket's path; it takes at most 107 bytes"));
    }
    Ok(())
}
