//! The internet checksum (RFC 1071): the complement of the sum of all 16-bit words, in ones' complement.
//!
//! The sum does not depend on the order of bytes in a word as long as it is written back in the same order, so words are added as this
//! machine has them, 32 bits at a time into sums of 64 bits, which a compiler turns into vector instructions.

/// Where UDP has its checksum, behind the start of its header; no other protocol has its own there.
const UDP_CHECKSUM_AT: u16 = 6;

/// A sum under way, over bytes that may come in several parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    folded: u16,
    /// Whether an odd number of bytes has been added: the next one is the second of its word.
    odd: bool,
}

impl Sum {
    /// Adds bytes that stand behind those added before.
    #[inline]
    #[must_use]
    pub fn over(self, bytes: &[u8]) -> Self {
        let part = fold(words(bytes));
        // A part that begins in the middle of a word has its bytes the other way round.
        let part = if self.odd { part.swap_bytes() } else { part };
        let folded = fold(u64::from(self.folded) + u64::from(part));
        Self { folded, odd: self.odd ^ (bytes.len() % 2 == 1) }
    }

    /// The checksum, as it stands in a packet.
    #[inline]
    #[must_use]
    pub const fn checksum(self) -> [u8; 2] {
        (!self.folded).to_ne_bytes()
    }

    /// The checksum where 0 means that there is none (UDP): then all ones, which counts the same.
    #[inline]
    #[must_use]
    pub const fn checksum_not_zero(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }
}

/// The words of a part, added up; it is less than 2^63 for anything shorter than 2^33 bytes.
#[inline]
fn words(bytes: &[u8]) -> u64 {
    let (blocks, rest) = bytes.as_chunks::<32>();
    let mut sums = [0u64; 8];
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block.as_chunks::<4>().0) {
            *sum += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, last) = rest.as_chunks::<2>();
    let rest: u64 = words.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum();
    let last = last.first().map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    sums.iter().sum::<u64>() + rest + last
}

/// A sum brought to 16 bits: what is carried out at the top is added at the bottom.
#[inline]
const fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Does what a frame asks for that has its pseudo-header's sum where its checksum shall be (virtio 1.3, 5.1.6.2): all from `start` on
/// is added up, and the checksum stored `offset` behind that. Returns whether both are inside; if not, nothing is changed.
#[inline]
#[must_use]
pub fn complete(frame: &mut [u8], start: u16, offset: u16) -> bool {
    let Some(counted) = frame.get_mut(usize::from(start)..) else { return false };
    let sum = Sum::default().over(counted);
    // Elsewhere all ones would count the same, but is not what a sender writes (RFC 1624, 3).
    let checksum = if offset == UDP_CHECKSUM_AT { sum.checksum_not_zero() } else { sum.checksum() };
    let at = usize::from(offset);
    let Some(place) = counted.get_mut(at..at + 2) else { return false };
    place.copy_from_slice(&checksum);
    true
}

#[cfg(test)]
mod tests;
