//! The address of a tunnel's end point, IPv4 or IPv6 in one form: 128 bits, of which IPv4 has those that RFC 4291 (2.5.5.2) maps it to.
//! So addresses are compared and kept without asking which kind they are.
#![expect(unsafe_code, reason = "reads and writes socket addresses as the kernel has them")]

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::backend::net::stations::Place;

/// An end point's address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OuterAddress(u128);

impl OuterAddress {
    /// As the standard library has it.
    #[must_use]
    pub const fn ip(self) -> IpAddr {
        Ipv6Addr::from_bits(self.0).to_canonical()
    }
}

impl Place for OuterAddress {
    #[inline]
    fn bits(self) -> u128 {
        self.0
    }

    #[inline]
    fn from_bits(bits: u128) -> Self {
        Self(bits)
    }
}

impl From<IpAddr> for OuterAddress {
    fn from(address: IpAddr) -> Self {
        Self(match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        })
    }
}

impl fmt::Debug for OuterAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

/// Room for a socket's address of either family.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union SocketAddress {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl SocketAddress {
    /// No address yet.
    pub(super) const fn empty() -> Self {
        // SAFETY: a socket's address is plain data. All of it is set, so all of it can be read later.
        unsafe { std::mem::zeroed() }
    }

    /// This address and port, and how many bytes the kernel is to read of it.
    #[inline]
    pub(super) fn new(address: OuterAddress, port: u16) -> (Self, libc::socklen_t) {
        let mut socket_address = Self::empty();
        match address.ip() {
            IpAddr::V4(address) => {
                socket_address.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: port.to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
                    sin_zero: [0; 8],
                };
                (socket_address, size_of::<libc::sockaddr_in>() as libc::socklen_t)
            }
            IpAddr::V6(address) => {
                socket_address.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: port.to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: address.octets() },
                    sin6_scope_id: 0,
                };
                (socket_address, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
            }
        }
    }

    /// What the kernel wrote.
    #[inline]
    pub(super) fn address(&self) -> Option<OuterAddress> {
        // SAFETY: `empty` set all bytes, and every pattern of them is good for each of the members.
        let (family, v4, v6) = unsafe { (self.family, &self.v4, &self.v6) };
        match libc::c_int::from(family) {
            libc::AF_INET => Some(IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes()).into()),
            libc::AF_INET6 => Some(OuterAddress(u128::from_be_bytes(v6.sin6_addr.s6_addr))),
            _ => None,
        }
    }

    #[inline]
    pub(super) const fn as_mut_ptr(&mut self) -> *mut libc::c_void {
        std::ptr::from_mut(self).cast()
    }
}
