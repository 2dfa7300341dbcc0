#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The program on the host and the service on the card, both as built: what host-shim says of what happens to the card.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use device_svc::address::Iova;
use device_svc::driver::Buffer;
use device_svc::driver::client::{Client, ClientSettings};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{Card, CardSettings, Process, program, wait_for};

const PARTS: &str = r#"
[[volume]]
name = "v"
uuid = "7f1c1d5e-8b0a-4c7e-9a55-0123456789ab"
backend = { type = "ram", size = "1M" }
[[function]]
name = "f"
type = "blk"
link = { type = "vhost-user", socket = "@/f.sock" }
volume = "v"
"#;

fn card() -> Card {
    Card::start(&CardSettings { parts: PARTS.to_owned(), ..CardSettings::default() })
}

fn shim(card: &Card, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("host-shim"));
    command.args(arguments).arg("--card").arg(format!("unix:{}", card.path("shim.sock").display()));
    command
}

/// A running `host-shim follow --json`, and how many of its lines have been looked at.
struct Follower {
    process: Process,
    seen: usize,
}

impl Follower {
    fn start(card: &Card) -> Self {
        Self { process: Process::start(&mut shim(card, &["follow", "--json"])), seen: 0 }
    }

    /// The next line.
    #[track_caller]
    fn next(&mut self) -> Value {
        let mut line = String::new();
        wait_for("the next event", || {
            line = self.process.output().lines().nth(self.seen).unwrap_or_default().to_owned();
            !line.is_empty() || !self.process.is_running()
        });
        self.seen += 1;
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{}", self.process.output()))
    }

    /// The next line, which must be this event.
    #[track_caller]
    fn expect(&mut self, event: &str) -> Value {
        let said = self.next();
        assert_eq!(said["event"], event, "{}", self.process.output());
        said
    }

    /// The next line, an event of a function with the number after `sequence`.
    #[track_caller]
    fn expect_after(&mut self, sequence: &mut u64, event: &str, function: &str) -> Value {
        let said = self.expect(event);
        assert_eq!(said["function"], function);
        let number = said["sequence"].as_u64().unwrap();
        assert!(*sequence == 0 || number == *sequence + 1, "{number} after {sequence}");
        *sequence = number;
        said
    }
}

#[test]
fn functions_are_listed_for_people_and_for_programs() {
    let card = card();
    let said = |arguments: &[&str]| {
        let output = shim(&card, arguments).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let text = said(&["list"]);
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let link = format!("vhost-user:{}", card.path("f.sock").display());
    assert_eq!(lines[0], ["NAME", "TYPE", "STATE", "SERIAL", "SIZE", "MAC", "LINK"]);
    assert_eq!(lines[1], ["f", "blk", "waiting", "7f1c1d5e8b0a4c7e9a55", "1048576", "-", &link]);
    assert_eq!(lines.len(), 2);

    let client = Client::connect(&card.path("f.sock"), ClientSettings::default()).unwrap();
    let list: Value = serde_json::from_str(&said(&["list", "--json"])).unwrap();
    let expected = serde_json::json!([{
        "name": "f", "type": "blk", "state": "attached", "link": link, "size-bytes": 1 << 20,
        "serial": "7f1c1d5e8b0a4c7e9a55", "volume-uuid": "7f1c1d5e-8b0a-4c7e-9a55-0123456789ab",
    }]);
    assert_eq!(list, expected);
    drop(client);
}

#[test]
fn what_happens_to_functions_is_followed() {
    let card = card();
    let mut follower = Follower::start(&card);
    let present = follower.expect("present");
    assert_eq!((&present["name"], &present["state"]), (&"f".into(), &"waiting".into()));
    let number = &mut 0;

    card.command(&["volume", "create", "--name", "w", "--backend", "null,size=1M"]);
    let link = format!("vhost-user,socket={}", card.path("g.sock").display());
    card.command(&["function", "create", "--name", "g", "--volume", "w", "--link", &link]);
    follower.expect_after(number, "created", "g");

    let mut client = Client::connect(&card.path("f.sock"), ClientSettings::default()).unwrap();
    follower.expect_after(number, "attached", "f");
    card.command(&["volume", "resize", "v", "2M"]);
    assert_eq!(follower.expect_after(number, "resized", "f")["size-bytes"], 2 << 20);
    assert_eq!(client.front_end().capacity_bytes().unwrap(), 2 << 20);

    // A guest that breaks a rule is told of, and that it was reset.
    assert!(client.queue().queue().add(&[Buffer { address: Iova(1 << 40), length: 16, writable: false }], 0));
    client.publish();
    let fault = follower.expect_after(number, "needs-reset", "f");
    assert!(fault["reason"].as_str().unwrap().contains("queue 0"), "{fault}");
    client.front_end().reset().unwrap();
    follower.expect_after(number, "recovered", "f");
    drop(client);
    follower.expect_after(number, "detached", "f");

    card.command(&["function", "delete", "g"]);
    follower.expect_after(number, "deleted", "g");
    // A second follower begins with what there is.
    let mut second = Follower::start(&card);
    assert_eq!(second.expect("present")["size-bytes"], 2 << 20);
    card.command(&["function", "delete", "f"]);
    assert_eq!(second.expect("deleted"), follower.expect_after(number, "deleted", "f"));
}

#[test]
fn a_card_that_restarts_is_waited_for() {
    let mut card = card();
    let mut follower = Follower::start(&card);
    follower.expect("present");
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        card.restart(signal);
        if signal == Signal::SIGTERM {
            // A card that ends in order takes its functions away.
            follower.expect("deleted");
        }
        follower.expect("away");
        // It may still have met the card that ends, once more.
        let mut said = follower.expect("back");
        while said["event"] == "back" || said["event"] == "away" {
            said = follower.next();
        }
        // Another card's events have other numbers: its functions are listed anew.
        assert_eq!((&said["event"], &said["missed"]), (&"missed".into(), &0.into()));
        assert_eq!(follower.expect("present")["name"], "f");
        let client = Client::connect(&card.path("f.sock"), ClientSettings::default()).unwrap();
        follower.expect("attached");
        drop(client);
        follower.expect("detached");
    }
}

#[test]
fn a_reader_that_has_seen_enough_ends_it() {
    let card = card();
    let mut child = shim(&card, &["follow"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("present f (waiting, vhost-user:"), "{line}");
    card.command(&["function", "delete", "f"]);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn what_cannot_be_reached_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        Command::new(program("host-shim")).args(arguments).current_dir(folder.path()).output().unwrap()
    };
    let line = |output: Output| {
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    };
    for command in ["list", "follow"] {
        let expected = format!(
            "host-shim: no card at unix:{}/none.sock; start device-svc, or give its address with --card\n",
            folder.path().display()
        );
        assert_eq!(line(run(&[command, "--card", "unix:none.sock"])), expected);
        assert!(line(run(&[command, "--card", "none.sock"])).contains("is not an address"));
    }
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(run(&["list", "--crad", "x"]).status.code(), Some(2));
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    assert!(help.contains("Exit status:") && help.contains("Examples:"), "{help}");
    assert!(String::from_utf8(run(&["completion", "bash"]).stdout).unwrap().contains("host-shim"));
}

#[test]
fn the_narrow_socket_shows_and_changes_nothing() {
    let card = card();
    let control = format!("unix:{}", card.path("shim.sock").display());
    for arguments in [&["function", "delete", "f"][..], &["volume", "list"]] {
        let output =
            Command::new(program("device-svc")).args(arguments).args(["--control", &control]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    assert!(card.command(&["function", "list"]).contains("f.sock"));
}
