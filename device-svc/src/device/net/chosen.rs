//! What the driver of a network function chose, by commands on its control queue.

use std::sync::Arc;

use super::filter::{Filter, Octets};
use super::hashing::Hashing;
use crate::backend::net::Offloads;

/// What the driver chose; at a reset it has chosen nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chosen {
    /// Which frames it wants.
    pub filter: Filter,
    /// How many queue pairs it uses.
    pub pairs: u16,
    /// What may be left undone of frames that it is brought, if it chose less than it negotiated.
    pub undone: Option<Offloads>,
    /// How frames are hashed, and where hashes lead to.
    pub hashing: Option<Arc<Hashing>>,
}

impl Chosen {
    /// What holds until the driver says something: one pair, if it has a queue to ask for more.
    #[must_use]
    pub const fn at_reset(mac: Octets, control: bool, pairs: u16) -> Self {
        Self { filter: Filter::all(mac), pairs: if control { 1 } else { pairs }, undone: None, hashing: None }
    }
}
