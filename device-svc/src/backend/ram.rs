//! RAM.
