//! Servers that speak something else, by chance or on purpose.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use super::fake::{Act, Fake, Manner, chunk, simple};
use super::{lane, pattern, wire};
use crate::backend::nbd::{NbdBackend, NbdSettings};

/// The same numbers in every run (splitmix64).
struct Random(u64);

impl Random {
    fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }
}

#[test]
fn replies_that_break_the_protocol_end_the_connection_and_nothing_else() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 4096)).unwrap();
    type Spoil = fn(u64) -> Vec<u8>;
    let spoils: [Spoil; 12] = [
        |_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        |cookie| simple(cookie, 0, &[0; 4096]),
        |cookie| simple(cookie + 1, 5, &[]),
        |cookie| chunk(cookie, true, wire::CHUNK_NONE, &[]),
        |cookie| chunk(cookie, true, wire::CHUNK_OFFSET_DATA, &[&0u64.to_be_bytes(), &[1; 512]]),
        |cookie| chunk(cookie, true, wire::CHUNK_OFFSET_DATA, &[&512u64.to_be_bytes(), &[1; 4096]]),
        |cookie| chunk(cookie, true, wire::CHUNK_OFFSET_DATA, &[&u64::MAX.to_be_bytes(), &[1; 512]]),
        |cookie| chunk(cookie, true, wire::CHUNK_OFFSET_HOLE, &[&0u64.to_be_bytes(), &u32::MAX.to_be_bytes()]),
        |cookie| {
            let one = chunk(cookie, false, wire::CHUNK_OFFSET_HOLE, &[&0u64.to_be_bytes(), &1024u32.to_be_bytes()]);
            let two = chunk(cookie, true, wire::CHUNK_OFFSET_HOLE, &[&512u64.to_be_bytes(), &3584u32.to_be_bytes()]);
            [one, two].concat()
        },
        |cookie| chunk(cookie, true, 5, &[&[0; 12]]),
        |cookie| chunk(cookie, true, wire::CHUNK_ERROR_BIT | 1, &[&5u32.to_be_bytes(), &[0xff, 0xff]]),
        |cookie| {
            let error = chunk(cookie, true, wire::CHUNK_ERROR_BIT | 1, &[&5u32.to_be_bytes(), &[0, 0]]);
            [error.clone(), error].concat()
        },
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        let before = fake.connections();
        let mut spoilt = false;
        fake.script(move |seen| {
            if seen.command == wire::COMMAND_READ && !std::mem::replace(&mut spoilt, true) {
                return Act::Raw(spoil(seen.cookie));
            }
            Act::Serve
        });
        assert_eq!(lane.read(0, 4096).unwrap(), pattern(1, 4096), "spoil {number}");
        assert_eq!(fake.connections(), before + 1, "spoil {number}");
    }
}

#[test]
fn a_reply_cut_anywhere_is_a_loss() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.write(0, &pattern(1, 1024)).unwrap();
    for cut in [1, 19, 20, 27, 28, 29, 600, 1051] {
        let mut spoilt = false;
        fake.script(move |seen| {
            if seen.command == wire::COMMAND_READ && !std::mem::replace(&mut spoilt, true) {
                let mut whole =
                    chunk(seen.cookie, true, wire::CHUNK_OFFSET_DATA, &[&0u64.to_be_bytes(), &pattern(7, 1024)]);
                whole.truncate(cut);
                return Act::RawAndHangUp(whole);
            }
            Act::Serve
        });
        let away = lane.away;
        assert_eq!(lane.read(0, 1024).unwrap(), pattern(1, 1024));
        assert_eq!(lane.away, away + 1);
    }
}

/// Right beginnings with random ends, so that every step of the handshake meets garbage.
#[test]
fn thousands_of_handshakes_with_garbage_end_in_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    const CONVERSATIONS: usize = 3000;
    let server = std::thread::spawn(move || {
        let mut random = Random(1);
        for _ in 0..CONVERSATIONS {
            let (mut socket, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            bytes.extend_from_slice(&wire::INIT_MAGIC.to_be_bytes());
            bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
            bytes.extend_from_slice(&((random.next_u32() % 4) as u16).to_be_bytes());
            for option in [wire::OPTION_STRUCTURED_REPLY, wire::OPTION_GO, wire::OPTION_GO, wire::OPTION_GO] {
                bytes.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
                bytes.extend_from_slice(&option.to_be_bytes());
                let kind = [wire::REPLY_INFO, wire::REPLY_INFO, wire::REPLY_ACK, random.next_u32()];
                bytes.extend_from_slice(&kind[random.next_u32() as usize % 4].to_be_bytes());
                let length = [0, 12, 14, random.next_u32() % 64, random.next_u32()][random.next_u32() as usize % 5];
                bytes.extend_from_slice(&length.to_be_bytes());
                for _ in 0..length.min(64) {
                    bytes.push(if random.next_u32().is_multiple_of(2) { 0 } else { random.next_u32() as u8 });
                }
            }
            let keep = random.next_u32() as usize % (bytes.len() + 1);
            if random.next_u32().is_multiple_of(3) {
                bytes.truncate(keep);
            } else if random.next_u32().is_multiple_of(2) {
                let at = random.next_u32() as usize % bytes.len();
                bytes[at] ^= 1 << (random.next_u32() % 8);
            }
            drop(socket.write_all(&bytes));
            drop(socket.shutdown(std::net::Shutdown::Write));
            drop(socket.read_to_end(&mut Vec::new()));
        }
    });
    let uri = format!("nbd+unix:///disk?socket={}", path.display());
    let mut opened = 0;
    for _ in 0..CONVERSATIONS {
        // Some random answers make an export that could exist.
        opened += usize::from(NbdBackend::open(NbdSettings::new(uri.parse().unwrap())).is_ok());
    }
    assert!(opened < CONVERSATIONS / 2);
    server.join().unwrap();
}

#[test]
fn thousands_of_random_replies_do_no_harm() {
    let fake = Fake::new(Manner::default());
    let (_backend, mut lane) = lane(&fake);
    lane.holds = false;
    let mut random = Random(1);
    let mut outcomes = [0; 2];
    // Each ends a connection, and a new one is made only after a back-off; so many bytes each instead.
    for _ in 0..12 {
        let mut seed = random.next_u64();
        fake.script(move |seen| {
            let mut bytes = Vec::new();
            for _ in 0..200 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let offset = (seen.offset + (seed >> 40) % 64 * 512).to_be_bytes();
                let data = vec![9; (seed >> 33) as usize % 1024];
                match (seed >> 60) % 8 {
                    0 => bytes.extend(chunk(
                        seen.cookie,
                        false,
                        wire::CHUNK_ERROR_BIT | 3,
                        &[&[0, 0, 0, 5, 0, 0], &data],
                    )),
                    1 => bytes.extend(chunk(seen.cookie, false, wire::CHUNK_OFFSET_DATA, &[&offset, &data])),
                    _ => bytes.extend(chunk(seen.cookie, false, wire::CHUNK_OFFSET_HOLE, &[&offset, &[0, 0, 2, 0]])),
                }
            }
            Act::RawAndHangUp(bytes)
        });
        outcomes[usize::from(lane.read(0, 32_768).is_ok())] += 1;
    }
    assert_eq!(outcomes, [12, 0]);
}
