#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! What a card remembers, seen from outside: what commands made and changed is there again after a kill and after an end, in this version
//! and the next; a storage that went away keeps nothing but its own functions waiting; a state that is none is refused by name. And
//! signals: storms of them to every thread lose nothing and end the service once; requests that were in flight fail where the volume
//! says so.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_svc::driver::block::BlockQueue;
use device_svc::driver::client::{Client, ClientSettings};
use device_svc::driver::vhost_user::FrontEnd;
use device_svc::driver::{GuestMemory, QueueOptions};
use device_svc::virtqueue::features;
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{Card, CardSettings, Process, network_rig, program, rig, signal_thread, threads_of, wait_for};

const DISK: &str = r#"
[[volume]]
name = "v"
backend = { type = "file", path = "@/disk", create = "64M" }
[[function]]
name = "f"
type = "blk"
link = { type = "vhost-user", socket = "@/f.sock" }
volume = "v"
"#;

const BLOCK_BYTES: u32 = 4096;
const SECTORS: u64 = BLOCK_BYTES as u64 / 512;

fn start(parts: &str) -> Card {
    Card::start(&CardSettings { parts: parts.to_owned(), ..CardSettings::default() })
}

/// What a command says in JSON.
fn asked(card: &Card, arguments: &[&str]) -> Value {
    serde_json::from_str(&card.command(&[arguments, &["--json"]].concat())).unwrap()
}

/// Everything that a card has, but for what changes by itself.
fn everything(card: &Card) -> [Value; 3] {
    ["volume", "uplink", "function"].map(|kind| asked(card, &[kind, "list"]))
}

/// A volume, an uplink and functions on them, made and changed by commands.
fn make(card: &Card) {
    let at = |name: &str| card.path(name).display().to_string();
    card.command(&[
        "volume",
        "create",
        "--name",
        "made",
        "--recovery",
        "fail",
        "--backend",
        &format!("file,path={},create=1M", at("made")),
    ]);
    card.command(&["uplink", "create", "--name", "up", "--backend", "null"]);
    let link = format!("vhost-user,socket={},payload=copy", at("disk.sock"));
    card.command(&["function", "create", "--name", "disk", "--volume", "made", "--queues", "2", "--link", &link]);
    let link = format!("vfio-user,socket={}", at("net.sock"));
    card.command(&["function", "create", "--type", "net", "--name", "net", "--uplink", "up", "--link", &link]);
    card.command(&["function", "set", "disk", "--limit", "iops=7,burst=2s"]);
    card.command(&["function", "set", "net", "--link", "down", "--mtu", "1400"]);
    card.command(&["volume", "resize", "made", "2M"]);
    // Of the file's volume too: its file is larger than the configuration makes it.
    card.command(&["volume", "resize", "v", "65M"]);
}

#[test]
fn what_commands_made_and_changed_comes_back() {
    let mut card = start(DISK);
    make(&card);
    let before = everything(&card);
    assert_eq!(before[0][0]["name"], "made");
    assert_eq!((&before[0][0]["recovery"], &before[0][1]["recovery"]), (&"fail".into(), &"reissue".into()));
    assert_eq!((&before[0][0]["size-bytes"], &before[0][1]["size-bytes"]), (&(2 << 20).into(), &(65 << 20).into()));
    let net = before[2].as_array().unwrap().iter().find(|function| function["name"] == "net").unwrap();
    assert_eq!((&net["link-set"], &net["mtu"]), (&"down".into(), &1400.into()));
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
        card.restart(signal);
        assert_eq!(everything(&card), before, "after {signal}");
        let mut client = Client::connect(&card.path("disk.sock"), ClientSettings::default()).unwrap();
        assert!(client.queue().write(0, 0, BLOCK_BYTES));
        client.publish();
        wait_for("the disk writes", || client.queue().take_ended().is_some_and(|one| one.status == 0));
    }
    card.command(&["function", "delete", "disk"]);
    card.restart(Signal::SIGKILL);
    assert!(!everything(&card)[2].to_string().contains("\"disk\""));
}

/// Ends a card by a signal and lets one of this program serve in its place.
fn hand_over(card: &mut Card, name: &str, signal: Signal) -> Process {
    card.process().signal(signal);
    card.process().end();
    let config = card.path("card.toml");
    let mut next = Process::start(Command::new(program(name)).args(["serve", "--no-keeper", "--config"]).arg(config));
    next.wait_for_output("ready:");
    next
}

/// Version 1 writes, version 2 carries it on, and version 1 reads what that has written.
#[test]
fn the_next_version_reads_the_state_and_this_one_reads_what_it_writes() {
    if rig().is_none() {
        return;
    }
    let mut card = start(DISK);
    make(&card);
    let before = everything(&card);
    let format = |card: &Card| {
        let text = std::fs::read_to_string(card.path("state/card.state")).unwrap();
        text.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(format(&card), "format=1");
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut next = hand_over(&mut card, "device-svc-next", signal);
        assert_eq!(format(&card), "format=2");
        assert_eq!(everything(&card), before);
        card.command(&["function", "set", "disk", "--limit", "iops=8,burst=2s"]);
        card.command(&["function", "set", "disk", "--limit", "iops=7,burst=2s"]);
        next.signal(signal);
        next.end();
        card.restart(Signal::SIGKILL);
        assert_eq!(format(&card), "format=1");
        assert_eq!(everything(&card), before);
    }
}

#[test]
fn a_file_that_is_gone_is_not_made_anew_and_its_functions_wait_for_it() {
    let mut card = start(DISK);
    make(&card);
    card.process().signal(Signal::SIGKILL);
    card.process().end();
    std::fs::rename(card.path("made"), card.path("elsewhere")).unwrap();
    std::fs::rename(card.path("disk"), card.path("other")).unwrap();
    // Also what the file names: the service died.
    card.restart(Signal::SIGKILL);
    for (volume, function) in [("made", "disk"), ("v", "f")] {
        let failed = asked(&card, &["volume", "info", volume])["failed"].as_str().unwrap().to_owned();
        assert!(failed.contains("No such file"), "{failed}");
        let function = asked(&card, &["function", "show", function]);
        assert_eq!(function["state"], "failed");
        assert!(function["reason"].as_str().unwrap().contains("No such file"), "{function}");
    }
    assert!(!card.path("made").exists() && !card.path("disk").exists(), "nothing was made anew");
    assert!(UnixStream::connect(card.path("f.sock")).is_err(), "nobody is let in");
    assert_eq!(asked(&card, &["function", "show", "net"])["state"], "waiting");
    // It is back, and nobody has to say so.
    std::fs::rename(card.path("elsewhere"), card.path("made")).unwrap();
    std::fs::rename(card.path("other"), card.path("disk")).unwrap();
    wait_for("the functions run again", || {
        ["disk", "f"].iter().all(|name| asked(&card, &["function", "show", name])["state"] == "waiting")
    });
    assert_eq!(asked(&card, &["volume", "info", "made"])["size-bytes"], 2 << 20);
    assert_eq!(asked(&card, &["volume", "info", "v"])["failed"], Value::Null);
}

#[test]
fn a_server_that_is_away_at_the_start_is_waited_for() {
    let Some(rig) = rig() else { return };
    let mut card = start(DISK);
    let socket = card.path("nbd.sock");
    let nbdkit = || {
        let server = Process::start(
            Command::new(rig.join("bin/nbdkit")).args(["-f", "-U"]).arg(&socket).args(["memory", "64M"]),
        );
        wait_for("the server listens", || socket.exists());
        server
    };
    let server = nbdkit();
    let backend = format!("nbd,uri=nbd+unix:///?socket={}", socket.display());
    card.command(&["volume", "create", "--name", "n", "--backend", &backend]);
    let link = format!("vhost-user,socket={}", card.path("n.sock").display());
    card.command(&["function", "create", "--name", "n", "--volume", "n", "--link", &link]);
    drop(server);
    let _ = std::fs::remove_file(&socket);
    card.restart(Signal::SIGTERM);
    assert_eq!(asked(&card, &["function", "show", "n"])["state"], "failed");
    assert_eq!(asked(&card, &["function", "show", "f"])["state"], "waiting");
    let _server = nbdkit();
    wait_for("the function runs again", || asked(&card, &["function", "show", "n"])["state"] == "waiting");
}

/// A network namespace that goes with its test.
struct Removed(String);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).output();
    }
}

#[test]
fn an_uplink_that_is_gone_keeps_nothing_but_its_functions_from_starting() {
    let Some(_rig) = network_rig() else { return };
    let name = format!("dray-state-{}", std::process::id());
    let ip =
        |arguments: &[&str]| assert!(Command::new("ip").args(arguments).status().unwrap().success(), "{arguments:?}");
    let mut card = start(DISK);
    ip(&["netns", "add", &name]);
    let _removed = Removed(name.clone());
    card.command(&["uplink", "create", "--name", "tap", "--backend", &format!("tap,name=t0,netns={name}")]);
    let link = format!("vfio-user,socket={}", card.path("net.sock").display());
    card.command(&["function", "create", "--type", "net", "--name", "net", "--uplink", "tap", "--link", &link]);
    card.process().signal(Signal::SIGKILL);
    card.process().end();
    ip(&["netns", "delete", &name]);
    card.restart(Signal::SIGKILL);
    let failed = asked(&card, &["uplink", "show", "tap"])["failed"].as_str().unwrap().to_owned();
    assert!(failed.contains(&name), "{failed}");
    assert_eq!(asked(&card, &["function", "show", "net"])["state"], "failed");
    assert_eq!(asked(&card, &["function", "show", "f"])["state"], "waiting");
    ip(&["netns", "add", &name]);
    wait_for("the interface runs again", || asked(&card, &["function", "show", "net"])["state"] == "waiting");
}

/// A start that is refused; the last line that it says.
fn refused(card: &Card) -> String {
    let mut process = Process::start(
        Command::new(program("device-svc")).args(["serve", "--no-keeper", "--config"]).arg(card.path("card.toml")),
    );
    assert_eq!(process.end().code(), Some(1), "{}", process.output());
    process.output().lines().last().unwrap().to_owned()
}

#[test]
fn a_start_that_would_lose_something_is_refused_by_name() {
    let mut card = start(DISK);
    make(&card);
    let before = everything(&card);
    let line = refused(&card);
    assert!(line.contains(&format!("is used by process {}", card.process().id())), "{line}");
    card.process().signal(Signal::SIGKILL);
    card.process().end();
    // A key that a VM would notice, after a death.
    let config = std::fs::read_to_string(card.path("card.toml")).unwrap();
    std::fs::write(card.path("card.toml"), config.replace("volume = \"v\"\n", "volume = \"v\"\nqueues = 4\n")).unwrap();
    let line = refused(&card);
    assert!(line.contains("function \"f\": `queues`: the configuration file changes it"), "{line}");
    std::fs::write(card.path("card.toml"), &config).unwrap();
    // A state that is torn.
    let file = card.path("state/card.state");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let line = refused(&card);
    assert!(line.contains("card.state: the state is torn"), "{line}");
    assert_eq!(std::fs::read(&file).unwrap(), whole[..whole.len() / 2], "it was left as it is");
    std::fs::write(&file, &whole).unwrap();
    card.restart(Signal::SIGKILL);
    assert_eq!(everything(&card), before);
}

/// A guest's disk over vhost-user whose front end keeps the record of what is in flight.
struct Guest {
    memory: Arc<GuestMemory>,
    front_end: FrontEnd,
    record: device_svc::driver::vhost_user::InflightRecord,
    queue: BlockQueue,
    events: device_svc::driver::QueueEvents,
}

const ROWS: u32 = 16;

impl Guest {
    fn connect(socket: &Path) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let mut front_end = FrontEnd::connect(socket, features::EVENT_INDEX, Arc::clone(&memory)).unwrap();
        let record = front_end.make_record(1, 64).unwrap();
        front_end.hand_over_record(&record).unwrap();
        let options = QueueOptions { size: 64, features: front_end.accepted(), indirect: false };
        let mut queue = BlockQueue::new(&memory, options, ROWS, BLOCK_BYTES);
        let events = front_end.start_queue(0, 64, queue.queue()).unwrap();
        Self { memory, front_end, record, queue, events }
    }

    /// Comes again after the service's end.
    fn reconnect(&mut self, socket: &Path) {
        let wanted = self.front_end.accepted();
        self.front_end = FrontEnd::connect(socket, wanted, Arc::clone(&self.memory)).unwrap();
        self.front_end.hand_over_record(&self.record).unwrap();
        self.events = self.front_end.start_queue(0, 64, self.queue.queue()).unwrap();
    }

    fn publish(&mut self) {
        if self.queue.publish() {
            self.events.ring();
        }
    }

    /// Writes each row's number once more, waits for all, and counts them.
    fn round(&mut self, number: u64) -> u64 {
        for row in 0..ROWS {
            self.memory.put(self.queue.data_at(row), number);
            assert!(self.queue.write(row, u64::from(row) * SECTORS, BLOCK_BYTES));
        }
        self.publish();
        self.finish()
    }

    /// Waits for all that is under way, and counts it.
    fn finish(&mut self) -> u64 {
        let (mut ended, start) = (0, Instant::now());
        while self.queue.in_flight() > 0 {
            match self.queue.take_ended() {
                Some(one) => {
                    assert_eq!(one.status, 0);
                    ended += 1;
                }
                None => std::thread::sleep(Duration::from_micros(20)),
            }
            assert!(start.elapsed() < Duration::from_secs(60), "nothing ends");
        }
        ended
    }
}

const STORM: [Signal; 10] = [
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGPIPE,
    Signal::SIGIO,
    Signal::SIGQUIT,
    Signal::SIGCHLD,
];

#[test]
fn storms_of_signals_to_every_thread_lose_nothing_and_end_it_once() {
    let mut card = start(DISK);
    let mut guest = Guest::connect(&card.path("f.sock"));
    let process = card.process().id();
    let over = Arc::new(AtomicBool::new(false));
    let storm = std::thread::spawn({
        let over = Arc::clone(&over);
        move || {
            let mut sent = 0_u64;
            // Bounded also if nobody says that it is over.
            while !over.load(Ordering::Relaxed) && sent < 10_000_000 {
                for thread in threads_of(process) {
                    for signal in STORM {
                        signal_thread(process, thread, signal);
                        sent += 1;
                    }
                }
            }
            sent
        }
    });
    let mut ended = 0;
    for number in 1..=500 {
        ended += guest.round(number);
    }
    over.store(true, Ordering::Relaxed);
    let sent = storm.join().unwrap();
    assert!(sent > 1000, "{sent} signals are no storm");
    let stats = card.stats();
    let function = &stats["functions"][0];
    assert_eq!((ended, &function["writes"], &function["errors"]), (500 * u64::from(ROWS), &ended.into(), &0.into()));
    // Now of SIGTERM, while requests are under way: the service stops once, and the next one has what it left.
    for row in 0..ROWS {
        guest.memory.put(guest.queue.data_at(row), 501_u64);
        assert!(guest.queue.write(row, u64::from(row) * SECTORS, BLOCK_BYTES));
    }
    guest.publish();
    for _ in 0..200 {
        for thread in threads_of(process) {
            signal_thread(process, thread, Signal::SIGTERM);
            signal_thread(process, thread, Signal::SIGHUP);
        }
    }
    assert_eq!(card.process().end().code(), Some(0), "{}", card.output());
    assert_eq!(card.output().matches("SIGTERM: stopping when").count(), 1, "{}", card.output());
    card.restart(Signal::SIGKILL);
    guest.reconnect(&card.path("f.sock"));
    guest.finish();
    guest.front_end.stop_queue(0).unwrap();
    let disk = std::fs::read(card.path("disk")).unwrap();
    for row in 0..ROWS as usize {
        assert_eq!(&disk[row * BLOCK_BYTES as usize..][..8], 501_u64.to_ne_bytes(), "row {row}");
    }
}

/// What was under way when the service was killed ends with an error, once, and is not done; what comes after is.
#[test]
fn requests_in_flight_fail_where_the_volume_says_so() {
    // A limit keeps requests under way for as long as the test needs.
    let parts = DISK.replace("create = \"64M\" }", "create = \"64M\" }\nrecovery = \"fail\"")
        + "limit = { iops = 1, burst = \"1s\" }\n";
    let mut card = start(&parts);
    let mut guest = Guest::connect(&card.path("f.sock"));
    for row in 0..ROWS {
        guest.memory.put(guest.queue.data_at(row), 7_u64);
        assert!(guest.queue.write(row, u64::from(row) * SECTORS, BLOCK_BYTES));
    }
    guest.publish();
    wait_for("all are under way", || card.stats()["functions"][0]["in-flight"].as_u64() >= Some(8));
    card.process().signal(Signal::SIGKILL);
    card.process().end();
    let mut done = 0;
    while let Some(one) = guest.queue.take_ended() {
        assert_eq!(one.status, 0);
        done += 1;
    }
    let left = guest.queue.in_flight();
    assert!(left >= 8, "{left} were under way");
    // The new one has no limit, so that what it does is seen at once.
    let config = std::fs::read_to_string(card.path("card.toml")).unwrap();
    std::fs::write(card.path("card.toml"), config.replace("limit = { iops = 1, burst = \"1s\" }\n", "")).unwrap();
    card.restart(Signal::SIGKILL);
    assert_eq!(asked(&card, &["volume", "list"])[0]["recovery"], "fail");
    guest.reconnect(&card.path("f.sock"));
    let (mut failed, start) = (Vec::new(), Instant::now());
    while guest.queue.in_flight() > 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "{} never end", guest.queue.in_flight());
        match guest.queue.take_ended() {
            Some(one) => {
                // VIRTIO_BLK_S_IOERR.
                assert_eq!(one.status, 1);
                failed.push(one.row as usize);
            }
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
    assert_eq!((failed.len(), card.stats()["functions"][0]["errors"].as_u64()), (left as usize, Some(u64::from(left))));
    assert_eq!(done + left, ROWS);
    let disk = std::fs::read(card.path("disk")).unwrap();
    let written = failed.iter().filter(|row| disk[**row * BLOCK_BYTES as usize..][..8] != [0; 8]).count();
    assert!(written <= 1, "the limit let one through before the kill at most, and none was issued again: {written}");
    // And the disk goes on.
    assert_eq!(guest.round(9), u64::from(ROWS));
}
