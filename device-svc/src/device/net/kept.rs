//! The driver's commands in a file that outlives the service, so that the next one knows what the driver chose.
//!
//! Kept are the commands themselves, the last of each kind in the order in which they came; carried out once more they lead to the same.
//! They stand in one of two slots, and a number at the front says in which: it is written last, so whoever dies in between leaves what
//! was kept before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::virtio_net as spec;

/// Bytes of a slot: a command for each VLAN, and the longest of every other kind, fit many times.
const SLOT_BYTES: u64 = 64 << 10;
/// Where the first slot is.
const SLOTS_AT: u64 = 4096;

/// The commands, and where they are kept.
#[derive(Debug)]
pub(super) struct KeptCommands {
    file: File,
    sequence: u64,
    commands: Vec<Vec<u8>>,
}

/// A file for a function's commands: no command was given yet.
///
/// # Errors
/// When the system has none for us.
pub fn create() -> io::Result<File> {
    let file = File::from(memfd_create(c"dray-choices", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(SLOTS_AT + 2 * SLOT_BYTES)?;
    Ok(file)
}

/// Two commands with the same key: only the later one counts.
fn key(command: &[u8]) -> &[u8] {
    let Some((&[class, _], data)) = command.split_first_chunk::<2>() else { return command };
    // A VLAN is added or deleted; what counts is which.
    if u32::from(class) == spec::VIRTIO_NET_CTRL_VLAN { data } else { &command[..2] }
}

fn is_same_kind(one: &[u8], other: &[u8]) -> bool {
    one.first() == other.first() && key(one) == key(other)
}

impl KeptCommands {
    /// What was kept in `file`, in order.
    ///
    /// # Errors
    /// When it is not such a file.
    pub(super) fn open(file: File) -> io::Result<Self> {
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "the file of the driver's commands is broken");
        let mut sequence = [0; 8];
        file.read_exact_at(&mut sequence, 0)?;
        let sequence = u64::from_ne_bytes(sequence);
        let mut slot = vec![0; SLOT_BYTES as usize];
        file.read_exact_at(&mut slot, SLOTS_AT + sequence % 2 * SLOT_BYTES)?;
        let mut commands = Vec::new();
        let mut rest = &slot[..];
        // A length of zero is the end.
        while let Some((length, behind)) = rest.split_first_chunk::<2>()
            && *length != [0; 2]
        {
            let (command, behind) = behind.split_at_checked(u16::from_ne_bytes(*length).into()).ok_or_else(broken)?;
            commands.push(command.to_vec());
            rest = behind;
        }
        Ok(Self { file, sequence, commands })
    }

    pub(super) fn commands(&self) -> &[Vec<u8>] {
        &self.commands
    }

    /// A command was carried out.
    pub(super) fn add(&mut self, command: &[u8]) -> io::Result<()> {
        self.commands.retain(|kept| !is_same_kind(kept, command));
        self.commands.push(command.to_vec());
        self.write()
    }

    /// The driver has chosen nothing any more.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.commands.clear();
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        let mut slot = Vec::new();
        for command in &self.commands {
            slot.extend((command.len() as u16).to_ne_bytes());
            slot.extend(command);
        }
        slot.extend([0; 2]);
        if slot.len() as u64 > SLOT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let sequence = self.sequence + 1;
        self.file.write_all_at(&slot, SLOTS_AT + sequence % 2 * SLOT_BYTES)?;
        self.file.write_all_at(&sequence.to_ne_bytes(), 0)?;
        self.sequence = sequence;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
