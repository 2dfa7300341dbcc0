//! The control half.

pub mod function;
