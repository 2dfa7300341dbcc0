//! The card: polls the virtqueues of VMs across a link, mirrors their descriptors into card memory, and forwards each
//! request to a storage server.
//!
//! The modules below stand in the order in which a request meets them; each may import only what stands after it
//! (`tests/imports.rs` walks the imports and holds the rule). A request moves down this list, then back up:
//!
//! ```text
//!  VM driver ─► virtqueue in host memory
//!                  │  doorbell, or none: the card polls
//!   link ─► mirror ─► virtqueue ─► device ─► volume ─► backend ─► storage server
//!   (who the host is) (DMA)  (ring format)  (virtio-blk)      (null, ram, file, NBD)
//! ```

// In this order, which rustfmt.toml keeps.
pub mod keeper;
pub mod control;
pub mod state;
pub mod reactor;
pub mod device;
pub mod volume;
pub mod uplink;
pub mod mirror;
pub mod backend;
pub mod link;
pub mod tether;
pub mod pci;
mod asleep;
pub mod inflight;
pub mod virtqueue;
pub mod dma;
pub mod config;
pub mod format;
pub mod metrics;
pub mod address;
pub mod clock;

#[cfg(test)]
mod allocations;

/// What a guest does: the driver side of a virtqueue and of vhost-user, for the demo, the bench, tests and simulation.
pub mod driver;
