//! A named volume: an identity, a time limit and the backend that holds its bytes.
//!
//! The guest's 20-byte serial is the first 20 hexadecimal digits of the UUID, unless the configuration gives another;
//! [`crate::config`] makes it and refuses two volumes with one.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::backend::{BlockBackend, BlockInfo};
use crate::config::{RecoveryConfig, SERIAL_BYTES, VolumeConfig};

/// One volume, open.
pub struct Volume {
    /// Its name on this card.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// What `VIRTIO_BLK_T_GET_ID` answers (virtio 1.3, 5.2.6), padded with NULs.
    pub serial: [u8; SERIAL_BYTES],
    /// Where its bytes are.
    pub backend: Arc<dyn BlockBackend>,
    /// How long a request is held while the server is away, before the guest sees an error.
    pub io_timeout: Duration,
    /// Whether the card was told not to write it. See also [`BlockInfo::read_only`]; [`info`](Self::info) joins them.
    pub read_only: bool,
    /// What becomes of requests that were in flight when the service before this one died.
    pub recovery: RecoveryConfig,
}

impl Volume {
    /// The volume that `config` describes, on a backend opened for it.
    #[must_use]
    pub fn new(config: &VolumeConfig, backend: Arc<dyn BlockBackend>) -> Self {
        Self {
            name: config.name.clone(),
            uuid: config.uuid,
            serial: config.serial,
            backend,
            io_timeout: config.io_timeout,
            read_only: config.read_only,
            recovery: config.recovery,
        }
    }

    /// What the volume can do now: what its backend can, and no writing if the card was told so.
    #[must_use]
    pub fn info(&self) -> BlockInfo {
        let info = self.backend.info();
        BlockInfo { read_only: info.read_only || self.read_only, ..info }
    }
}
