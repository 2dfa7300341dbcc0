#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

/// Runs a program as the kernel does, over a network's header and a payload; `None` where the kernel would not take it.
fn run(program: &[libc::sock_filter], ip: &[u8], payload: &[u8]) -> Option<u32> {
    let mut accumulator = 0u32;
    let mut at = 0;
    loop {
        let libc::sock_filter { code, jt, jf, k } = *program.get(at)?;
        at += 1;
        let load = |bytes: usize| {
            let offset = k.wrapping_sub(libc::SKF_NET_OFF as u32);
            let (from, offset) = if k > i32::MAX as u32 { (ip, offset) } else { (payload, k) };
            let bytes = from.get(offset as usize..)?.get(..bytes)?;
            Some(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        };
        match u32::from(code) {
            LOAD_WORD => match load(4) {
                Some(value) => accumulator = value,
                None => return Some(0),
            },
            LOAD_HALF => match load(2) {
                Some(value) => accumulator = value,
                None => return Some(0),
            },
            SHIFT_RIGHT => accumulator >>= k,
            MODULO => accumulator %= k,
            JUMP_IF_EQUAL => at += usize::from(if accumulator == k { jt } else { jf }),
            RETURN => return Some(k),
            _ => return None,
        }
    }
}

fn packet(source_port: u16, vni: u32) -> (Vec<u8>, [u8; 8]) {
    let [_, high, middle, low] = vni.to_be_bytes();
    ([&[0x45; 20][..], &source_port.to_be_bytes()].concat(), [8, 0, 0, 0, high, middle, low, 0xaa])
}

#[test]
fn each_network_has_its_own_sockets_and_flows_spread_over_them() {
    let wanted = [(5, 1), (7, 2), (7, 4), (7, 9), (0xff_ffff, 3)].map(|(vni, place)| Wanted { vni, place });
    let program = program(wanted, 20);
    let place = |source_port, vni| {
        let (ip, payload) = packet(source_port, vni);
        run(&program, &ip, &payload).unwrap()
    };
    for source_port in [0, 1, 0xffff] {
        assert_eq!(place(source_port, 5), 1);
        assert_eq!(place(source_port, 0xff_ffff), 3);
        assert_eq!(place(source_port, 6), NOBODY);
    }
    let places: Vec<u32> = (300..306).map(|source_port| place(source_port, 7)).collect();
    assert_eq!(places, [2, 4, 9, 2, 4, 9]);
    assert_eq!(run(&program, &[], &[8, 0, 0, 0]), Some(NOBODY), "cut off");
}

#[test]
fn without_channels_nothing_is_taken() {
    let (ip, payload) = packet(1, 5);
    assert_eq!(run(&program([], 20), &ip, &payload), Some(NOBODY));
    assert_eq!(run(&NOTHING, &ip, &payload), Some(0));
}

/// The longest programs are within the kernel's bounds, and all of their jumps are right.
#[test]
fn the_largest_programs() {
    let most = SOCKETS_MAX as u32 - 1;
    for channels in [1, 2, 3, u32::from(CHANNELS_MAX)] {
        let wanted = (0..most).map(|number| Wanted { vni: number / channels, place: number + 1 });
        let program = program(wanted, 40);
        assert!(program.len() <= 20480 / 16, "{channels}: {}", program.len());
        for number in 0..most - most % channels {
            let mut ip = vec![0; 40];
            ip.extend((number % channels + channels * 3).to_be_bytes()[2..].iter());
            let payload = packet(0, number / channels).1;
            assert_eq!(run(&program, &ip, &payload), Some(number + 1), "{channels}");
        }
    }
    let wanted = (0..300).map(|number| Wanted { vni: 1, place: number + 1 });
    let (ip, payload) = packet(u16::MAX, 1);
    assert!(run(&program(wanted, 20), &ip, &payload).unwrap() <= u32::from(CHANNELS_MAX), "no jump is too far");
}
