//! The control half: what exists on this card, how it is changed and watched, and the glue between link, reactor and
//! device that makes one function.
//!
//! ```text
//!   Card (operators, 0600) ─┐
//!   HostView (host-shim) ───┼─► service ─► inventory ─► seam: a function starts, stops, counts
//!   GET /metrics ───────────┘                 └─► events ─► followers
//! ```
//!
//! It runs on the control thread and on threads that may block, never on a reactor.

pub mod demo;
pub mod events;
mod follow;
pub mod function;
pub mod inventory;
mod metrics_http;
pub mod metrics_page;
pub mod open_backend;
pub mod seam;
pub mod serve;
pub mod service;
pub mod socket;
mod standing;
pub mod starter;
pub mod wire;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use seam::{Backing, FunctionRun, FunctionStarter, Notify, SetError, Standing, StartError};
