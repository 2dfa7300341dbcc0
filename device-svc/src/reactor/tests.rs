//! Tests of the reactors.
