//! The one place where a volume's settings become its storage.

use std::sync::Arc;

use crate::backend::{BackendError, BlockBackend, BlockChannel, BlockInfo, PayloadPlace};
use crate::config::{BackendConfig, VolumeConfig};

/// Opens the storage of `config`.
///
/// # Errors
/// When the storage refuses or cannot be reached, in words that name the volume's storage and the next step.
pub fn open_backend(config: &VolumeConfig) -> Result<Arc<dyn BlockBackend>, BackendError> {
    match &config.backend {
        BackendConfig::Null { size_bytes } | BackendConfig::Ram { size_bytes } => {
            Ok(Arc::new(Unserved { size_bytes: std::sync::atomic::AtomicU64::new(*size_bytes) }))
        }
        BackendConfig::File { .. } | BackendConfig::Nbd(_) => {
            Err(BackendError::Refused(format!("backend type {:?} is not there yet", config.backend.type_name())))
        }
    }
}

/// A size without channels.
struct Unserved {
    size_bytes: std::sync::atomic::AtomicU64,
}

impl BlockBackend for Unserved {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            size_bytes: self.size_bytes.load(std::sync::atomic::Ordering::Relaxed),
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            volatile_cache: false,
            discard: false,
            write_zeroes: false,
            discard_alignment_bytes: 512,
            payload: PayloadPlace::Card,
            channels_max: 1,
        }
    }

    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError> {
        Err(BackendError::Refused("this backend is not there yet".to_owned()))
    }

    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        self.size_bytes.store(size_bytes, std::sync::atomic::Ordering::Relaxed);
        Ok(size_bytes)
    }
}
