//! How often each queue of a function was reset, in a file that outlives the service.
//!
//! A reset takes back the record of requests in flight at once, and the state that is kept of the registers only with the reply. Who dies
//! in between leaves registers of before and a record of after. The count goes up first, and stands in the state too: where the two
//! differ, the next service knows that the queue is not what the registers say.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// The counts.
#[derive(Debug)]
pub(super) struct Lives {
    file: File,
    pub(super) counts: Vec<u64>,
}

impl Lives {
    /// A file for so many queues, none of which was ever reset.
    pub(super) fn create(queues: usize) -> io::Result<File> {
        let file = File::from(memfd_create(c"dray-lives", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(8 * queues as u64)?;
        Ok(file)
    }

    /// The counts in a file.
    pub(super) fn open(file: File, queues: usize) -> io::Result<Self> {
        let mut bytes = vec![0; 8 * queues];
        file.read_exact_at(&mut bytes, 0)?;
        let counts = bytes.as_chunks::<8>().0.iter().map(|count| u64::from_ne_bytes(*count)).collect();
        Ok(Self { file, counts })
    }

    /// These queues are reset.
    pub(super) fn end(&mut self, queues: Range<usize>) {
        for number in queues {
            if let Some(count) = self.counts.get_mut(number) {
                *count += 1;
                // The file is memory, and as long as this: it can only fail where the machine has none left.
                if let Err(error) = self.file.write_all_at(&count.to_ne_bytes(), 8 * number as u64) {
                    tracing::warn!(%error, "a reset cannot be noted");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn counts_outlive_who_counts() {
        let file = Lives::create(3).unwrap();
        let mut lives = Lives::open(file.try_clone().unwrap(), 3).unwrap();
        lives.end(0..3);
        lives.end(1..2);
        assert_eq!(Lives::open(file.try_clone().unwrap(), 3).unwrap().counts, [1, 2, 1]);
        assert!(Lives::open(file, 4).is_err());
    }
}
