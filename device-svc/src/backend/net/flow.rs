//! Which flow a frame belongs to, and its Toeplitz hash (virtio 1.3, 5.1.6.4.3).
//!
//! Read is what the first headers say, and nothing is believed of it: it only decides where a frame goes. A packet in fragments has no
//! ports that all of them know, so it is hashed by its addresses.

use super::ETHERNET_BYTES;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// IEEE 802.1Q and 802.1ad.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Extension headers that may stand before TCP or UDP: hop-by-hop, routing, destination options (RFC 8200, 4.1).
const EXTENSIONS: [u8; 3] = [0, 43, 60];

/// Bytes of a Toeplitz key: enough for two IPv6 addresses and two ports.
pub const KEY_BYTES: usize = 40;
/// Bytes that are hashed at most.
const INPUT_BYTES_MAX: usize = KEY_BYTES - 4;

/// What a flow is told by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// Addresses alone.
    Ip,
    /// Addresses and ports of TCP.
    Tcp,
    /// Addresses and ports of UDP.
    Udp,
}

/// The flow of one frame: source and destination address, and behind them the ports, in the order in which they are sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// What the ports are of.
    pub protocol: Protocol,
    /// Whether the addresses are of IPv6.
    pub is_ipv6: bool,
    text: [u8; INPUT_BYTES_MAX],
}

impl Flow {
    /// The flow of a frame; `None` for what is not IP.
    #[inline]
    #[must_use]
    pub fn of(frame: &[u8]) -> Option<Self> {
        let mut rest = frame.get(ETHERNET_BYTES as usize - 2..)?;
        let (mut kind, mut behind) = rest.split_first_chunk::<2>()?;
        while TAGS.contains(kind) {
            rest = behind.get(2..)?;
            (kind, behind) = rest.split_first_chunk::<2>()?;
        }
        match *kind {
            IPV4 => Self::of_ipv4(behind),
            IPV6 => Self::of_ipv6(behind),
            _ => None,
        }
    }

    fn of_ipv4(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<20>()?;
        let mut text = [0; INPUT_BYTES_MAX];
        text[..8].copy_from_slice(&header[12..]);
        let header_bytes = usize::from(header[0] & 0xf) * 4;
        // More fragments, or an offset.
        let in_fragments = header[6] & 0x3f != 0 || header[7] != 0;
        let ports = if in_fragments { None } else { packet.get(header_bytes..) };
        Some(Self { protocol: ports_to(&mut text[8..], header[9], ports), is_ipv6: false, text })
    }

    fn of_ipv6(packet: &[u8]) -> Option<Self> {
        let (header, mut rest) = packet.split_first_chunk::<40>()?;
        let mut text = [0; INPUT_BYTES_MAX];
        text[..32].copy_from_slice(&header[8..]);
        let mut next = header[6];
        while EXTENSIONS.contains(&next) {
            let [following, length, ..] = *rest else { break };
            let Some(behind) = rest.get((usize::from(length) + 1) * 8..) else { break };
            (next, rest) = (following, behind);
        }
        Some(Self { protocol: ports_to(&mut text[32..], next, Some(rest)), is_ipv6: true, text })
    }

    /// What is hashed: with the ports, or the addresses alone.
    #[inline]
    #[must_use]
    pub fn text(&self, with_ports: bool) -> &[u8] {
        let addresses = if self.is_ipv6 { 32 } else { 8 };
        &self.text[..addresses + if with_ports { 4 } else { 0 }]
    }

    /// A number with all that tells the flow, for those who spread flows and do not need both directions together.
    #[inline]
    #[must_use]
    pub fn mixed(&self) -> u64 {
        let (words, _) = self.text.as_chunks::<8>();
        let rest = u64::from(u32::from_be_bytes([self.text[32], self.text[33], self.text[34], self.text[35]]));
        words.iter().fold(mix(self.protocol as u64, rest), |state, word| mix(state, u64::from_be_bytes(*word)))
    }

    /// A number that both directions of the flow have in common, for those who only need to spread flows.
    #[inline]
    #[must_use]
    pub fn spread(&self) -> u32 {
        let (words, _) = self.text.as_chunks::<4>();
        // Addition does not care who is the source; the ports are mixed in both orders as one sum too.
        let sum = words.iter().enumerate().fold(0_u32, |sum, (at, word)| {
            let is_ports = at == if self.is_ipv6 { 8 } else { 2 };
            let word = u32::from_be_bytes(*word);
            sum.wrapping_add(if is_ports { (word >> 16) + (word & 0xffff) } else { word })
        });
        let mixed = (sum ^ sum >> 15).wrapping_mul(0x2c1b_3c6d);
        mixed ^ mixed >> 12
    }
}

/// Mixes a word into a state, so that each bit of both changes about half of what comes out.
#[inline]
#[must_use]
pub const fn mix(state: u64, word: u64) -> u64 {
    let product = (state ^ word) as u128 * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

/// Copies the ports of TCP or UDP, if they are there. Returns what they are of.
#[inline]
fn ports_to(text: &mut [u8], protocol: u8, header: Option<&[u8]>) -> Protocol {
    let protocol = match protocol {
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return Protocol::Ip,
    };
    let Some(ports) = header.and_then(|header| header.first_chunk::<4>()) else { return Protocol::Ip };
    text[..4].copy_from_slice(ports);
    protocol
}

/// A Toeplitz key, spread out so that four bits of the text are hashed at once.
#[derive(Clone, PartialEq, Eq)]
pub struct Toeplitz {
    nibbles: Box<[[u32; 16]; INPUT_BYTES_MAX * 2]>,
}

impl std::fmt::Debug for Toeplitz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Toeplitz(…)")
    }
}

impl Toeplitz {
    /// For this key.
    #[must_use]
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        // The 32 bits of the key that begin with bit `at`.
        let window = |at: usize| {
            let byte = |number: usize| u64::from(key.get(number).copied().unwrap_or(0));
            let five = (0..5).fold(0, |all, number| all << 8 | byte(at / 8 + number));
            (five >> (8 - at % 8)) as u32
        };
        let mut nibbles = Box::new([[0; 16]; INPUT_BYTES_MAX * 2]);
        for (at, row) in nibbles.iter_mut().enumerate() {
            for (value, hash) in row.iter_mut().enumerate() {
                let bits = (0..4).filter(|bit| value >> (3 - bit) & 1 == 1);
                *hash = bits.fold(0, |all, bit| all ^ window(at * 4 + bit));
            }
        }
        Self { nibbles }
    }

    /// The hash of a text of at most two IPv6 addresses and two ports.
    #[inline]
    #[must_use]
    pub fn hash(&self, text: &[u8]) -> u32 {
        let rows = self.nibbles.as_chunks::<2>().0;
        text.iter()
            .zip(rows)
            .fold(0, |hash, (byte, [high, low])| hash ^ high[usize::from(byte >> 4)] ^ low[usize::from(byte & 0xf)])
    }
}

#[cfg(test)]
mod tests;
