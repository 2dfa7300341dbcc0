//! A function's registers as they are kept by whoever outlives the service, and how they come back.
//!
//! What is kept is JSON: fields may be added, and a version that does not know one passes over it.
//!
//! What comes back is believed no more than what a driver writes: bits that cannot be written keep their values, features must be
//! offered, sizes and vectors be possible.

use serde::{Deserialize, Serialize};

use super::function::PciFunction;
use super::virtio::SavedVirtio;
use crate::format::{FORMAT, READ};

/// The registers of a function, for later.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedRegisters {
    format: u32,
    /// The configuration space, up to its last byte that is not zero.
    config: HexBytes,
    /// The MSI-X table.
    msix: HexBytes,
    virtio: SavedVirtio,
}

/// Bytes, two digits each.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HexBytes(pub Vec<u8>);

/// Why registers that were saved are not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadSaved {
    /// Of a version that this one does not know.
    #[error("they have format {0}; this version reads {low} to {high}", low = READ.start(), high = READ.end())]
    Format(u32),
    /// They are those of a function that is not this one.
    #[error("they are of a function with other {0}")]
    Other(&'static str),
    /// The driver uses what the function does not offer any more.
    #[error("the driver uses features {0:#x}, which the function no longer offers")]
    Features(u64),
}

impl PciFunction {
    /// What must be kept so that a driver finds the function as it left it.
    #[must_use]
    pub fn save(&self) -> SavedRegisters {
        SavedRegisters {
            format: FORMAT,
            config: HexBytes(self.config.save()),
            msix: HexBytes(self.msix.save()),
            virtio: self.virtio.save(),
        }
    }

    /// Makes the registers what they were when they were saved.
    ///
    /// # Errors
    /// When they are another function's, or unknown; then the registers are as after a reset.
    pub fn restore(&mut self, saved: &SavedRegisters) -> Result<(), BadSaved> {
        self.reset();
        if !READ.contains(&saved.format) {
            return Err(BadSaved::Format(saved.format));
        }
        let restored = (|| {
            self.config.restore(&saved.config.0)?;
            self.msix.restore(&saved.msix.0)?;
            self.virtio.restore(&saved.virtio)
        })();
        restored.inspect_err(|_| self.reset())
    }
}

impl From<HexBytes> for String {
    fn from(bytes: HexBytes) -> Self {
        bytes.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for HexBytes {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8).ok_or("not hexadecimal digits");
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if !rest.is_empty() {
            return Err("half a byte");
        }
        pairs.iter().map(|[high, low]| Ok(digit(*high)? << 4 | digit(*low)?)).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests;
