//! The MSI-X table (PCI 3.0, 6.8.2): address, data and mask of each vector.
//!
//! A VMM usually keeps a table of its own for its guest and hands over a descriptor for each vector instead. The table here is
//! for those that do not; giving a vector a descriptor unmasks it, as a host's kernel does with a table that it owns.

use super::saved::BadSaved;

/// Bytes of an entry.
const ENTRY_BYTES: usize = 16;
/// Where an entry's vector control is; bit 0 masks the vector.
const CONTROL_AT: usize = 12;

/// The table of a function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MsixTable {
    bytes: Vec<u8>,
}

impl MsixTable {
    /// A table of `vectors` masked vectors.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let mut table = Self { bytes: vec![0; usize::from(vectors) * ENTRY_BYTES] };
        table.reset();
        table
    }

    /// Vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        (self.bytes.len() / ENTRY_BYTES) as u16
    }

    /// All vectors masked, all addresses forgotten.
    pub fn reset(&mut self) {
        self.bytes.fill(0);
        for vector in 0..self.vectors() {
            self.set_masked(vector, true);
        }
    }

    /// Whether a vector is masked; one that does not exist is.
    #[must_use]
    pub fn is_masked(&self, vector: u16) -> bool {
        self.bytes.get(usize::from(vector) * ENTRY_BYTES + CONTROL_AT).is_none_or(|control| control & 1 != 0)
    }

    /// Masks a vector, or unmasks it.
    pub fn set_masked(&mut self, vector: u16, masked: bool) {
        if let Some(control) = self.bytes.get_mut(usize::from(vector) * ENTRY_BYTES + CONTROL_AT) {
            *control = (*control & !1) | u8::from(masked);
        }
    }

    pub(super) fn save(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// The table becomes what it was.
    pub(super) fn restore(&mut self, saved: &[u8]) -> Result<(), BadSaved> {
        if saved.len() != self.bytes.len() {
            return Err(BadSaved::Other("MSI-X vectors"));
        }
        for (entry, bytes) in saved.chunks(ENTRY_BYTES).enumerate() {
            self.write((entry * ENTRY_BYTES) as u32, bytes);
        }
        Ok(())
    }

    /// Reads at an offset of the table; behind its end are zeroes.
    pub(super) fn read(&self, offset: u32, data: &mut [u8]) {
        copy_from(&self.bytes, offset as usize, data);
    }

    /// Writes 4 or 8 aligned bytes; the reserved bits of the control stay zero.
    pub(super) fn write(&mut self, offset: u32, data: &[u8]) {
        let offset = offset as usize;
        if let Some(place) = self.bytes.get_mut(offset..offset + data.len()) {
            place.copy_from_slice(data);
            let entry = offset - offset % ENTRY_BYTES;
            self.bytes[entry + CONTROL_AT] &= 1;
            self.bytes[entry + CONTROL_AT + 1..entry + ENTRY_BYTES].fill(0);
        }
    }
}

/// Copies `from[offset..]` to `data`, zeroes where there is nothing.
pub(super) fn copy_from(from: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    let there = from.get(offset..).unwrap_or_default();
    let count = there.len().min(data.len());
    data[..count].copy_from_slice(&there[..count]);
}
