//! Null.
