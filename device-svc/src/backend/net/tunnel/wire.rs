//! What stands before a frame on its way through a tunnel: the header of VXLAN (RFC 7348, section 5) or Geneve (RFC 8926, section
//! 3.4), behind one of UDP (RFC 768).
//!
//! Both are 8 bytes with the number of the virtual network in the same place, and that is all we send. What arrives is untrusted:
//! [`TunnelKind::parse`] reads it once and says where the frame begins.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a tunnel's header without options.
pub const TUNNEL_HEADER_BYTES: usize = size_of::<TunnelHeader>();
/// Bytes of UDP's header.
pub const UDP_HEADER_BYTES: usize = 8;
/// Networks are told apart by 24 bits.
pub const VNI_MAX: u32 = 0xff_ffff;
/// Where a datagram of either kind has the number of its network: the first byte of four, of which the last one is reserved.
pub const VNI_AT: usize = 4;

/// VXLAN: the number is valid (the `I` flag).
const VXLAN_VALID: u8 = 0x08;
/// Geneve: the version, of which there is 0, and the length of the options in units of 4 bytes.
const GENEVE_VERSION: u8 = 0xc0;
const GENEVE_OPTIONS: u8 = 0x3f;
/// Geneve: not a frame but a message between end points (the `O` flag).
const GENEVE_CONTROL: u8 = 0x80;
/// Geneve: some option must be understood (the `C` flag). We know none.
const GENEVE_CRITICAL: u8 = 0x40;
/// Geneve: what follows is an Ethernet frame ("Trans Ether Bridging").
const ETHERNET: u16 = 0x6558;

/// How frames are encapsulated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TunnelKind {
    /// RFC 7348.
    Vxlan,
    /// RFC 8926.
    Geneve,
}

/// The header of either kind. VXLAN has flags where Geneve has its version, and reserves what Geneve has before the number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TunnelHeader {
    first: u8,
    flags: u8,
    protocol: [u8; 2],
    vni: [u8; 3],
    reserved: u8,
}

/// The headers of UDP and of the tunnel, as they go before a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OuterHeader {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    length: [u8; 2],
    /// 0 where there is none, or the kernel computes it.
    checksum: [u8; 2],
    tunnel: TunnelHeader,
}

/// Bytes of both.
pub const OUTER_HEADER_BYTES: usize = size_of::<OuterHeader>();
const _: () = assert!(OUTER_HEADER_BYTES == UDP_HEADER_BYTES + TUNNEL_HEADER_BYTES);

/// What a datagram holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Encapsulated {
    /// The number of its network.
    pub vni: u32,
    /// Where its frame begins: at most the datagram's length.
    pub frame_at: usize,
}

/// Why a datagram holds no frame for us.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoFrame {
    /// It ends within its own header.
    #[error("a datagram ends within its tunnel's header")]
    TooShort,
    /// VXLAN without a valid number of a network.
    #[error("a datagram names no network")]
    NoNetwork,
    /// Geneve of another version, with a message between end points, an option that must be understood, or something else than a
    /// frame.
    #[error("a datagram holds what is not understood here")]
    NotUnderstood,
}

impl TunnelKind {
    /// The port on which end points listen (IANA).
    #[must_use]
    pub const fn port(self) -> u16 {
        match self {
            Self::Vxlan => 4789,
            Self::Geneve => 6081,
        }
    }

    /// Its name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
        }
    }

    /// Reads the payload of a datagram.
    ///
    /// # Errors
    /// When it holds no frame for us. Such datagrams are dropped without an answer.
    #[inline]
    pub fn parse(self, datagram: &[u8]) -> Result<Encapsulated, NoFrame> {
        let Ok((header, rest)) = TunnelHeader::ref_from_prefix(datagram) else { return Err(NoFrame::TooShort) };
        let [high, middle, low] = header.vni;
        let vni = u32::from_be_bytes([0, high, middle, low]);
        match self {
            // All other bits are reserved, and to be ignored (RFC 7348, section 5).
            Self::Vxlan if header.first & VXLAN_VALID == 0 => Err(NoFrame::NoNetwork),
            Self::Vxlan => Ok(Encapsulated { vni, frame_at: TUNNEL_HEADER_BYTES }),
            Self::Geneve => {
                let understood = header.first & GENEVE_VERSION == 0
                    && header.flags & (GENEVE_CONTROL | GENEVE_CRITICAL) == 0
                    && u16::from_be_bytes(header.protocol) == ETHERNET;
                let options = usize::from(header.first & GENEVE_OPTIONS) * 4;
                if !understood {
                    Err(NoFrame::NotUnderstood)
                } else if options > rest.len() {
                    Err(NoFrame::TooShort)
                } else {
                    Ok(Encapsulated { vni, frame_at: TUNNEL_HEADER_BYTES + options })
                }
            }
        }
    }

    /// The headers before frames of the network `vni`, to end points that listen on `port`.
    #[must_use]
    pub fn header(self, vni: u32, port: u16) -> OuterHeader {
        let [_, high, middle, low] = vni.to_be_bytes();
        let (first, protocol) = match self {
            Self::Vxlan => (VXLAN_VALID, 0),
            Self::Geneve => (0, ETHERNET),
        };
        let protocol = u16::to_be_bytes(protocol);
        OuterHeader {
            source_port: [0; 2],
            destination_port: port.to_be_bytes(),
            length: [0; 2],
            checksum: [0; 2],
            tunnel: TunnelHeader { first, flags: 0, protocol, vni: [high, middle, low], reserved: 0 },
        }
    }
}

impl OuterHeader {
    /// The same for one frame of so many bytes. `None` if no datagram can hold it.
    #[inline]
    #[must_use]
    pub fn of_frame(self, source_port: u16, frame_bytes: u32) -> Option<Self> {
        let length = u16::try_from(frame_bytes.checked_add(OUTER_HEADER_BYTES as u32)?).ok()?;
        Some(Self { source_port: source_port.to_be_bytes(), length: length.to_be_bytes(), ..self })
    }
}

#[cfg(test)]
mod tests;
