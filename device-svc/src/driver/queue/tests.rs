//! Tests of both rings.
