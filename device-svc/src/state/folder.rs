//! The folder of a kept state: it is one process's, and what is written there is there whole or not at all.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result as IoResult, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::document::{decode, encode};
use super::{CardState, DocumentFault, StateError};
use crate::format::FORMAT;

/// The state.
const STATE: &str = "card.state";
/// The next state, until it is whole.
const NEXT: &str = "card.state.new";
/// Locked by the process whose folder it is, which writes its number into it.
const LOCK: &str = "lock";
/// 4096 functions fit many times.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// A card's state folder: ours for as long as this is there, or the process.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    /// The folder itself, to make a renaming durable.
    folder: File,
    _lock: Flock<File>,
}

/// Where a card keeps its state if nothing else is said: `/var/lib/dray` as root, else `$XDG_STATE_HOME/dray`, or
/// `~/.local/state/dray`.
///
/// # Errors
/// When the environment names no place.
pub fn default_state_folder() -> Result<PathBuf, StateError> {
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/dray"));
    }
    let named = |name| std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute());
    let state = named("XDG_STATE_HOME").or_else(|| named("HOME").map(|home| home.join(".local/state")));
    Ok(state.ok_or(StateError::Nowhere)?.join("dray"))
}

impl StateFolder {
    /// Makes the folder if it is not there, takes it for this process, and reads the state in it; one that is not there is an empty
    /// one.
    ///
    /// # Errors
    /// When it is another process's, cannot be used, or holds something else than a state that this version reads.
    pub fn open(path: &Path) -> Result<(Self, CardState), StateError> {
        let fault = |source| StateError::Folder { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fault)?;
        let folder = File::open(path).map_err(fault)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(path.join(LOCK)).map_err(fault)?;
        let mut lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(lock, errno)| match errno {
            Errno::EWOULDBLOCK => StateError::InUse { folder: path.to_owned(), holder: holder(&lock) },
            errno => fault(errno.into()),
        })?;
        lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id())).map_err(fault)?;
        let folder = Self { path: path.to_owned(), folder, _lock: lock };
        let state = folder.read()?;
        Ok((folder, state))
    }

    /// The state's file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.path.join(STATE)
    }

    fn read(&self) -> Result<CardState, StateError> {
        let text = match read_text(&self.file()) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(CardState::default()),
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(self.document(DocumentFault::Foreign)),
            Err(source) => return Err(StateError::Folder { path: self.file(), source }),
        };
        decode(&text, FORMAT).map_err(|fault| self.document(fault))
    }

    fn document(&self, fault: DocumentFault) -> StateError {
        StateError::Document { path: self.file(), fault }
    }

    /// Puts `state` in place of what is there. When this returns it is there also after a loss of power; when it fails, what was
    /// there is still there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, state: &CardState) -> Result<(), StateError> {
        let text = encode(state, FORMAT).map_err(|fault| self.document(fault))?;
        self.replace(&text).map_err(|source| StateError::Folder { path: self.file(), source })
    }

    fn replace(&self, text: &str) -> IoResult<()> {
        let next = self.path.join(NEXT);
        // What is left of a process that died while it wrote was never the state.
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&next, self.file())?;
        self.folder.sync_all()
    }
}

/// Who has the lock, as far as it has said.
fn holder(lock: &File) -> String {
    let mut text = String::new();
    match lock.take(20).read_to_string(&mut text) {
        Ok(_) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => format!("process {text}"),
        _ => "another process".to_owned(),
    }
}

fn read_text(path: &Path) -> IoResult<String> {
    // A pipe would be waited for.
    if !std::fs::metadata(path)?.is_file() {
        return Err(Error::from(ErrorKind::InvalidData));
    }
    let mut text = String::new();
    let read = File::open(path)?.take(STATE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if read as u64 > STATE_BYTES_MAX {
        return Err(Error::from(ErrorKind::InvalidData));
    }
    Ok(text)
}
