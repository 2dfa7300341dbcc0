//! A named uplink: the network that functions send to and receive from.

use std::sync::Arc;

use crate::backend::net::NetBackend;

/// One uplink, open.
pub struct Uplink {
    /// Its name on this card.
    pub name: String,
    /// What carries its frames.
    pub backend: Arc<dyn NetBackend>,
}
