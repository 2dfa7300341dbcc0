#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The link between real front ends, polite and not, and a function that only keeps a record.

mod bad_input;
mod fake;
mod meeting;
mod raw;
mod record;
mod talk;
