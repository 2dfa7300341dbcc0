//! What can be asked on the command line.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};

const HELP: &str = "\
Examples:
  host-shim list
  host-shim follow --json --card unix:/run/dray/shim.sock

Files:
  /run/dray/shim.sock, or $XDG_RUNTIME_DIR/dray/shim.sock when not root
          The card's socket for host-shim; owner and group may open it.

Exit status:
  0  done
  1  not done; one line on standard error says why and what to do
  2  the command line is wrong";

/// Tells which functions a Dray card shows to this host's virtual machines, and what happens to them
///
/// host-shim is the one program of Dray on the host. It asks the card's narrow service, which changes nothing.
#[derive(Parser, Debug)]
#[command(name = "host-shim", version, max_term_width = 120, after_long_help = HELP)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// List the card's functions
    List(Ask),
    /// Follow what happens to the card's functions, until interrupted
    ///
    /// Says first which functions there are, then each event: created, deleted, attached, detached, needs-reset,
    /// recovered, resized, link-up, link-down. When the card goes away it is waited for, and following goes on where it
    /// was; if events were missed meanwhile, that is said, and the functions are listed anew.
    Follow(Ask),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Ask {
    /// The card's socket for host-shim, like unix:/run/dray/shim.sock [default: $XDG_RUNTIME_DIR/dray/shim.sock, or
    /// /run/dray/shim.sock as root]
    #[arg(long, value_name = "ADDRESS")]
    card: Option<String>,
    /// Write JSON; for follow, one object a line
    #[arg(long)]
    pub(crate) json: bool,
}

impl Ask {
    /// The socket's absolute path.
    pub(crate) fn socket(&self) -> Result<String> {
        let path = match &self.card {
            None => default_socket(),
            Some(address) => match address.strip_prefix("unix:") {
                Some(path) if !path.is_empty() => std::path::absolute(path)?,
                _ => bail!("--card: {address:?} is not an address; write one like \"unix:/run/dray/shim.sock\""),
            },
        };
        Ok(path.display().to_string())
    }
}

/// The user's runtime folder is tried first, as root has none in a system's session; then the system's card.
fn default_socket() -> PathBuf {
    let system = PathBuf::from("/run/dray/shim.sock");
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(|folder| PathBuf::from(folder).join("dray/shim.sock"));
    match runtime {
        Some(own) if own.is_absolute() && (own.exists() || !system.exists()) => own,
        _ => system,
    }
}
