#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The end of a card that has work to do: what is in flight completes, and whoever cannot wait need not.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use device_svc::driver::client::{Client, ClientSettings};
use device_svc::virtqueue::features;
use nix::sys::signal::Signal;
use tests::{Card, CardSettings, wait_for};

/// Requests in flight.
const DEPTH: u32 = 8;

/// An NBD server (fixed newstyle, one export of 1 MiB) that takes reads but answers none before it is told to.
#[derive(Default)]
struct SlowServer {
    answers: Mutex<bool>,
    told: Condvar,
    taken: AtomicU32,
}

fn read<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().unwrap())
}

impl SlowServer {
    fn start(socket: &Path) -> Arc<Self> {
        let server = Arc::new(Self::default());
        let (theirs, listener) = (Arc::clone(&server), UnixListener::bind(socket).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let server = Arc::clone(&theirs);
                // It ends when the card hangs up, which is an error of reading or writing.
                std::thread::spawn(move || server.serve(stream));
            }
        });
        server
    }

    /// From now on it answers.
    fn answer(&self) {
        *self.answers.lock().unwrap() = true;
        self.told.notify_all();
    }

    fn serve(&self, mut stream: UnixStream) -> std::io::Result<()> {
        // NBD_FLAG_FIXED_NEWSTYLE and NBD_FLAG_NO_ZEROES.
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        read::<4>(&mut stream)?;
        loop {
            let head = read::<16>(&mut stream)?;
            let option = word(&head[8..12]);
            let mut data = vec![0; word(&head[12..16]) as usize];
            stream.read_exact(&mut data)?;
            let mut reply = |kind: u32, data: &[u8]| {
                let head =
                    [&0x3_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()].concat();
                stream.write_all(&[&head[..], &(data.len() as u32).to_be_bytes(), data].concat())
            };
            if option == 7 {
                // NBD_REP_INFO with NBD_INFO_EXPORT, then NBD_REP_ACK.
                reply(3, &[&[0, 0][..], &(1_u64 << 20).to_be_bytes(), &[0, 1]].concat())?;
                reply(1, &[])?;
                break;
            }
            // NBD_REP_ERR_UNSUP.
            reply(0x8000_0001, &[])?;
        }
        let mut waiting = Vec::new();
        loop {
            let head = read::<28>(&mut stream)?;
            if head[6..8] != [0, 0] {
                return Ok(());
            }
            waiting.push((head[8..16].to_vec(), word(&head[24..28])));
            if self.taken.fetch_add(1, Ordering::SeqCst) + 1 < DEPTH {
                continue;
            }
            let mut answers = self.answers.lock().unwrap();
            while !*answers {
                answers = self.told.wait(answers).unwrap();
            }
            for (cookie, bytes) in waiting.drain(..) {
                let data = vec![0xa5; bytes as usize];
                stream.write_all(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &cookie, &data].concat())?;
            }
        }
    }
}

/// A card with a slow server behind its function, and a client of that which has `DEPTH` reads under way.
fn busy_card(folder: &Path, wanted: u64) -> (Card, Arc<SlowServer>, Client) {
    let socket = folder.join("nbd.sock");
    let server = SlowServer::start(&socket);
    let parts = format!(
        r#"
[[volume]]
name = "v"
backend = {{ type = "nbd", uri = "nbd+unix:///?socket={}", connections = 1 }}
[[function]]
name = "f"
type = "blk"
link = {{ type = "vhost-user", socket = "@/f.sock" }}
volume = "v"
"#,
        socket.display()
    );
    let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
    let settings = ClientSettings { features: wanted, depth: DEPTH, ..ClientSettings::default() };
    let mut client = Client::connect(&card.path("f.sock"), settings).unwrap();
    for row in 0..DEPTH {
        assert!(client.queue().read(row, u64::from(row) * 8, 4096));
    }
    client.publish();
    wait_for("the server has every request", || server.taken.load(Ordering::SeqCst) == DEPTH);
    (card, server, client)
}

/// Whether all that is in flight at SIGTERM completes. A server has half a second for it; where this machine took nearly as long,
/// nothing is shown if it does not.
fn completes_at_sigterm(wanted: u64) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let (mut card, server, mut client) = busy_card(folder.path(), wanted);
    let start = Instant::now();
    card.process().signal(Signal::SIGTERM);
    card.process().wait_for_output("stopping when what is in flight has completed");
    server.answer();
    let status = card.process().end();
    let in_time = start.elapsed() < Duration::from_millis(400);
    assert_eq!(status.code(), Some(0), "{}", card.process().output());
    assert!(!card.path("f.sock").exists() && !card.path("card.sock").exists());
    let mut ended = [0; DEPTH as usize];
    while let Some(one) = client.queue().take_ended() {
        if (one.status, one.written) != (0, 4097) && !in_time {
            return false;
        }
        assert_eq!((one.status, one.written), (0, 4097), "row {}", one.row);
        let mut data = vec![0; 4096];
        let at = client.queue().data_at(one.row);
        client.memory().copy_out(at, &mut data);
        assert!(data.iter().all(|byte| *byte == 0xa5));
        ended[one.row as usize] += 1;
    }
    let all = ended == [1; DEPTH as usize];
    assert!(all || !in_time, "each request completes once: {ended:?}");
    all
}

#[test]
fn what_is_in_flight_at_sigterm_completes() {
    for wanted in [features::EVENT_INDEX, features::RING_PACKED] {
        assert!((0..20).any(|_| completes_at_sigterm(wanted)), "this machine is too slow to show anything");
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (mut card, _server, _client) = busy_card(folder.path(), features::EVENT_INDEX);
    // A client that says nothing makes the farewell long.
    let _silent = UnixStream::connect(card.path("card.sock")).unwrap();
    card.process().signal(Signal::SIGTERM);
    card.process().wait_for_output("stopping when what is in flight has completed");
    card.process().signal(Signal::SIGINT);
    assert_eq!(card.process().end().code(), Some(128 + 2), "{}", card.process().output());
    card.process().wait_for_output("SIGINT again: ending at once");
}

#[test]
fn what_waits_for_a_limit_at_sigterm_completes_too() {
    let parts = r#"
[[volume]]
name = "v"
backend = { type = "ram", size = "1M" }
[[function]]
name = "f"
type = "blk"
link = { type = "vhost-user", socket = "@/f.sock" }
volume = "v"
limit = { iops = 1, burst = "1s" }
"#;
    let mut card = Card::start(&CardSettings { parts: parts.to_owned(), ..CardSettings::default() });
    let settings = ClientSettings { depth: DEPTH, ..ClientSettings::default() };
    let mut client = Client::connect(&card.path("f.sock"), settings).unwrap();
    for row in 0..DEPTH {
        assert!(client.queue().read(row, 0, 4096));
    }
    client.publish();
    wait_for("the limit holds some back", || card.stats()["functions"][0]["in-flight"].as_u64() >= Some(2));
    card.process().signal(Signal::SIGTERM);
    assert_eq!(card.process().end().code(), Some(0), "{}", card.process().output());
    let mut ended = 0;
    while let Some(one) = client.queue().take_ended() {
        assert_eq!(one.status, 0);
        ended += 1;
    }
    assert_eq!(ended, DEPTH);
}
