#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Many functions in one process, as a card has many virtual functions.

use std::fmt::Write;

use device_svc::driver::block::BlockQueue;
use device_svc::driver::client::{Client, ClientSettings, Through};
use device_svc::driver::vfio_user::Sharing;
use tests::{Card, CardSettings, wait_for};

const FUNCTIONS: u32 = 64;
/// What a further function may cost, bytes.
const RESIDENT_MAX: u64 = 1 << 20;
/// What its disk takes beside: memory comes in huge pages.
const DISK_BYTES: u64 = 2 << 20;

fn card() -> Card {
    let mut parts = String::new();
    for number in 0..FUNCTIONS {
        let _ = write!(
            parts,
            r#"
[[volume]]
name = "v{number}"
backend = {{ type = "ram", size = "1M" }}
[[function]]
name = "f{number}"
type = "blk"
link = {{ type = "vfio-user", socket = "@/f{number}.sock" }}
volume = "v{number}"
queues = 2
"#
        );
    }
    Card::start(&CardSettings { parts, ..CardSettings::default() })
}

fn connect(card: &Card, number: u32) -> Client {
    let through = Through::VfioUser(Sharing::Whole);
    let settings = ClientSettings { through, spin: false, ..ClientSettings::default() };
    Client::connect(&card.path(&format!("f{number}.sock")), settings).unwrap()
}

/// Resident memory of the card without that of the VMs, which it maps: theirs is shared.
fn resident_bytes(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn end(client: &mut Client, add: impl FnOnce(&mut BlockQueue) -> bool) {
    assert!(add(client.queue()));
    client.publish();
    assert_eq!(client.wait().unwrap().status, 0);
}

/// Each has its own disk, its own registers, and little memory.
#[test]
fn sixty_four_functions_live_in_one_process() {
    let mut card = card();
    let id = card.process().id();
    let before = resident_bytes(id);
    let mut clients: Vec<Client> = (0..FUNCTIONS).map(|number| connect(&card, number)).collect();
    for (client, number) in clients.iter_mut().zip(0..) {
        let at = client.queue().data_at(0);
        client.memory().copy_in(at, &[number as u8 + 1; 4096]);
        end(client, |queue| queue.write(0, 8, 4096));
    }
    let each = (resident_bytes(id) - before) / u64::from(FUNCTIONS);
    assert!(each < DISK_BYTES + RESIDENT_MAX, "{each} bytes for each function");
    for (client, number) in clients.iter_mut().zip(0..) {
        end(client, |queue| queue.read(0, 8, 4096));
        let mut data = [0; 4096];
        let at = client.queue().data_at(0);
        client.memory().copy_out(at, &mut data);
        assert!(data.iter().all(|byte| *byte == number as u8 + 1), "function {number}");
    }
    // Every other VMM goes; the others notice nothing, and a function that is free takes the next.
    let mut staying = Vec::new();
    for (client, number) in clients.into_iter().zip(0..) {
        if number % 2 == 0 {
            staying.push(client);
        }
    }
    let waiting = || card.command(&["function", "list"]).matches("waiting").count();
    wait_for("the others to be gone", || waiting() == FUNCTIONS as usize / 2);
    for client in &mut staying {
        end(client, |queue| queue.read(0, 8, 4096));
    }
    end(&mut connect(&card, 1), |queue| queue.read(0, 8, 4096));
    let stats = card.stats();
    assert!(stats["functions"].as_array().unwrap().iter().all(|function| function["errors"] == 0), "{stats}");
}
