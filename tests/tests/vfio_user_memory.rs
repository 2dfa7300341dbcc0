#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! How a VMM shares its guest's memory with a function over vfio-user: whole, page by page, or not at all.

use std::time::Duration;

use device_svc::address::Iova;
use device_svc::driver::client::{Access, Attached, Client, ClientSettings, Load, Through};
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};
use device_svc::virtqueue::features;
use tests::{Card, CardSettings, boot_guest, rig, wait_for};

fn card(backend: &str, link: &str, poll: &str) -> Card {
    let parts = format!(
        r#"
[[volume]]
name = "v"
backend = {backend}
[[function]]
name = "f"
type = "blk"
link = {{ type = "vfio-user", socket = "@/f.sock"{link} }}
volume = "v"
"#
    );
    Card::start(&CardSettings { parts, poll: poll.to_owned(), ..CardSettings::default() })
}

const RAM: &str = r#"{ type = "ram", size = "64M" }"#;
const REQUEST_BYTES: u32 = 64 << 10;
const ROWS: u32 = 8;

fn connect(card: &Card, sharing: Sharing, packed: bool) -> Client {
    let packed = if packed { features::RING_PACKED } else { 0 };
    let settings = ClientSettings {
        through: Through::VfioUser(sharing),
        features: features::INDIRECT | features::EVENT_INDEX | packed,
        indirect: packed == 0,
        depth: ROWS,
        request_bytes: REQUEST_BYTES,
        spin: false,
        ..ClientSettings::default()
    };
    Client::connect(&card.path("f.sock"), settings).unwrap()
}

fn device(client: &mut Client) -> &mut VfioUserDevice {
    match client.front_end() {
        Attached::VfioUser(device) => device,
        Attached::VhostUser(_) => panic!("it was connected over vfio-user"),
    }
}

/// Bytes of a row, none like another.
fn pattern(row: u32, seed: u32) -> Vec<u8> {
    (0..REQUEST_BYTES).map(|at| (at ^ at >> 8).wrapping_mul(row * 2 + seed * 16 + 3) as u8).collect()
}

fn end_all(client: &mut Client) {
    client.publish();
    for _ in 0..ROWS {
        assert_eq!(client.wait().unwrap().status, 0);
    }
}

/// Each row's pattern is written, and comes back.
fn verify(client: &mut Client, seed: u32) {
    let sector = |row: u32| u64::from(row) * 1001;
    for row in 0..ROWS {
        let at = client.queue().data_at(row);
        client.memory().copy_in(at, &pattern(row, seed));
        assert!(client.queue().write(row, sector(row), REQUEST_BYTES));
    }
    end_all(client);
    for row in 0..ROWS {
        let at = client.queue().data_at(row);
        client.memory().copy_in(at, &vec![0; REQUEST_BYTES as usize]);
        assert!(client.queue().read(row, sector(row), REQUEST_BYTES));
    }
    end_all(client);
    for row in 0..ROWS {
        let mut data = vec![0; REQUEST_BYTES as usize];
        let at = client.queue().data_at(row);
        client.memory().copy_out(at, &mut data);
        assert!(data == pattern(row, seed), "row {row}");
    }
}

#[test]
fn payload_is_right_however_memory_is_shared() {
    for link in ["", r#", payload = "copy""#] {
        let card = card(RAM, link, "");
        for (sharing, asks) in [(Sharing::Whole, false), (Sharing::Pages, false), (Sharing::Messages, true)] {
            for packed in [false, true] {
                let mut client = connect(&card, sharing, packed);
                for seed in 0..5 {
                    verify(&mut client, seed);
                }
                let asked = device(&mut client).memory_messages();
                assert_eq!(asked > 0, asks, "{sharing:?}: {asked} messages");
                client.leave().unwrap();
            }
        }
        assert_eq!(card.stats()["functions"][0]["errors"], 0);
    }
}

/// A store to a page that is shared rings the doorbell: nothing is sent, however often.
#[test]
fn a_mapped_doorbell_costs_no_message() {
    let card = card(RAM, r#", notify = "mapped""#, "always");
    let mut client = connect(&card, Sharing::Whole, false);
    let before = device(&mut client).messages_sent();
    for seed in 0..10 {
        client.events().ring();
        verify(&mut client, seed);
    }
    assert!(client.events().rings() >= 10);
    assert_eq!(device(&mut client).messages_sent(), before);
    client.leave().unwrap();
}

/// Without that, each doorbell is one message, and no answer is waited for.
#[test]
fn a_doorbell_by_message_costs_one() {
    let card = card(RAM, "", "");
    let mut client = connect(&card, Sharing::Whole, false);
    let before = device(&mut client).messages_sent();
    for seed in 0..10 {
        verify(&mut client, seed);
    }
    let rings = client.events().rings();
    assert!(rings > 0, "a reactor that sleeps has to be woken");
    assert_eq!(device(&mut client).messages_sent() - before, u64::from(rings));
    client.leave().unwrap();
}

/// Pages that nothing uses come and go beside a load, in which nothing may fail; and none of them is waited for.
#[test]
fn pages_come_and_go_beside_a_load() {
    let card = card(RAM, "", "");
    let mut client = connect(&card, Sharing::Pages, false);
    let elsewhere = Iova(1 << 40);
    let span_bytes = 32 << 20;
    for round in 0..20 {
        for page in 0..100 {
            let at = Iova(elsewhere.0 + page * 8192);
            device(&mut client).map(at, 4096, 0, true).unwrap();
        }
        let load = Load { access: Access::Read, span_bytes, duration: Duration::from_millis(20), timed: false };
        let done = client.run(&load).unwrap();
        assert_eq!(done.errors, 0);
        if round % 2 == 0 {
            for page in 0..100 {
                device(&mut client).unmap(Iova(elsewhere.0 + page * 8192), 4096).unwrap();
            }
        } else {
            device(&mut client).unmap(elsewhere, 1 << 30).unwrap();
        }
    }
    verify(&mut client, 3);
    client.leave().unwrap();
}

/// A request whose buffer is not mapped stops the function, until it is reset; the next client finds it as new.
#[test]
fn a_buffer_that_went_away_stops_the_function_alone() {
    let card = card(RAM, "", "");
    let mut client = connect(&card, Sharing::Pages, false);
    verify(&mut client, 1);
    let at = client.queue().data_at(0);
    device(&mut client).unmap(Iova((at.0 + 8192) & !4095), 4096).unwrap();
    assert!(client.queue().read(0, 0, REQUEST_BYTES));
    client.publish();
    let state = || card.command(&["function", "show", "f"]);
    wait_for("the function to say so", || state().contains("outside the VM's memory"));
    drop(client);
    verify(&mut connect(&card, Sharing::Pages, true), 2);
}

/// A queue whose memory is away waits for it, whatever else is written to the function meanwhile.
#[test]
fn a_queue_without_memory_waits_for_it() {
    let card = card(RAM, "", "");
    let mut client = connect(&card, Sharing::Whole, false);
    verify(&mut client, 1);
    let (base, bytes) = (client.memory().base(), client.memory().len());
    for may in [false, true] {
        device(&mut client).unmap(base, bytes).unwrap();
        device(&mut client).set_bus_master(false).unwrap();
        device(&mut client).set_bus_master(may).unwrap();
        device(&mut client).map(base, bytes, 0, true).unwrap();
        device(&mut client).set_bus_master(true).unwrap();
        verify(&mut client, 2 + u32::from(may));
    }
    client.leave().unwrap();
}

/// A VMM that is asked and goes away, while its memory is needed.
#[test]
fn clients_that_are_asked_come_and_go() {
    let card = card(RAM, "", "");
    for round in 0..10 {
        let mut client = connect(&card, Sharing::Messages, round % 2 == 0);
        for row in 0..ROWS {
            client.queue().write(row, 0, REQUEST_BYTES);
        }
        client.publish();
        if round % 3 == 0 {
            device(&mut client).reset().unwrap();
        }
        drop(client);
    }
    verify(&mut connect(&card, Sharing::Messages, false), 2);
}

/// A guest of a VMM that shares no memory at all: QEMU answers for every byte.
#[test]
fn a_guest_whose_memory_is_not_shared_uses_the_disk() {
    if rig().is_none() {
        return;
    }
    let card = card(r#"{ type = "file", path = "@/disk", create = "64M" }"#, "", "");
    let path = card.path("f.sock");
    let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#, path.display());
    // The blocks in one buffer make segments of more bytes than a socket takes at once.
    let job = "set -e
        dd if=/dev/urandom of=/tmp/blocks bs=64k count=64 2>/dev/null
        dd if=/tmp/blocks of=/dev/vda bs=64k seek=3 conv=notrunc 2>/dev/null
        sync
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda bs=64k skip=3 count=64 2>/dev/null | cmp - /tmp/blocks
        dd if=/tmp/blocks of=/dev/vda bs=4M seek=1 oflag=direct 2>/dev/null
        dd if=/dev/vda bs=4M skip=1 count=1 iflag=direct 2>/dev/null | cmp - /tmp/blocks
        md5sum /tmp/blocks";
    let own = ["-object", "memory-backend-ram,id=own,size=256M", "-machine", "memory-backend=own"];
    let output = boot_guest(&card, job, &[&["-device", &device], &own[..]].concat()).succeed();
    assert!(output.contains("/tmp/blocks"), "{output}");
    let stats = card.stats();
    let function = &stats["functions"][0];
    assert_eq!(function["errors"], 0, "{stats}");
    assert!(function["writes"].as_u64().unwrap() > 0 && function["reads"].as_u64().unwrap() > 0, "{stats}");
}
