//! iperf3 between namespaces and guests, and what it measured.

use std::time::Duration;

use serde_json::Value;

use crate::{Namespace, Process};

/// An iperf3 server in a namespace; it ends with the test.
#[derive(Debug)]
pub struct IperfServer(Process);

impl IperfServer {
    /// Starts one on iperf3's own port; it takes one client after another.
    ///
    /// # Panics
    /// When it does not listen.
    #[must_use]
    pub fn start(namespace: &Namespace) -> Self {
        let mut process = Process::start(namespace.command("iperf3").args(["--server", "--forceflush"]));
        process.wait_for_output("Server listening");
        Self(process)
    }

    /// Its process.
    pub const fn process(&mut self) -> &mut Process {
        &mut self.0
    }
}

/// What a server says, or its kernel, that is not there yet or has not done with the client before.
const PASSING: [&str; 4] =
    ["Connection refused", "Connection reset by peer", "server is busy", "control socket has closed"];

/// What a client measured, in its own eyes and the server's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IperfReport {
    /// Bytes of payload that were sent.
    pub sent_bytes: u64,
    /// Bytes of payload that arrived. Whoever receives stops counting when told that all has been sent, which on a busy machine may
    /// overtake the last of them.
    pub received_bytes: u64,
    /// Bits of payload that arrived in a second.
    pub received_bits_per_second: f64,
    /// TCP segments that were sent again; 0 for UDP.
    pub retransmits: u64,
    /// UDP datagrams that were sent; 0 for TCP.
    pub datagrams: u64,
    /// UDP datagrams that did not arrive.
    pub datagrams_lost: u64,
}

impl IperfReport {
    /// Runs a client in `namespace` against a server at `address`; `arguments` are iperf3's further ones: `-n 10M` bounds the
    /// bytes, `-R` turns the direction, `-u -b 100M -l 1400` is UDP, `-P 4` takes four connections.
    ///
    /// # Panics
    /// When the client fails.
    #[must_use]
    pub fn measure(namespace: &Namespace, address: &str, arguments: &[&str]) -> Self {
        let mut command = namespace.command("iperf3");
        command.args(["--json", "--connect-timeout", "10000", "--client", address]).args(arguments);
        for _ in 0..300 {
            let mut process = Process::start(&mut command);
            let status = process.end();
            let output = process.output();
            if status.success() {
                return Self::parse(&output);
            }
            assert!(PASSING.iter().any(|words| output.contains(words)), "iperf3: {status}: {output}");
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("iperf3's server is always busy")
    }

    /// Reads the one report of `iperf3 --json` in `output`, which may hold other lines, as a guest's console does.
    ///
    /// # Panics
    /// When there is none, or it says that the client failed.
    #[must_use]
    pub fn parse(output: &str) -> Self {
        // The report starts and ends with a brace at the start of a line.
        let lines: Vec<&str> = output.lines().map(str::trim_end).collect();
        let first = lines.iter().position(|line| *line == "{").unwrap_or_else(|| panic!("no report in {output}"));
        let last = lines.iter().rposition(|line| *line == "}").unwrap_or_else(|| panic!("no end in {output}"));
        let report: Value =
            serde_json::from_str(&lines[first..=last].concat()).unwrap_or_else(|error| panic!("{error} in {output}"));
        assert!(report["error"].is_null(), "iperf3: {}", report["error"]);
        let end = &report["end"];
        let udp = report["start"]["test_start"]["protocol"] == "UDP";
        let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("no number where one belongs in {end}"));
        let received = &end["sum_received"];
        Self {
            sent_bytes: number(&end["sum_sent"]["bytes"]),
            received_bytes: number(&received["bytes"]),
            received_bits_per_second: received["bits_per_second"].as_f64().unwrap_or_default(),
            // Only the side that sends knows, and not on every system.
            retransmits: end["sum_sent"]["retransmits"].as_u64().unwrap_or_default(),
            datagrams: if udp { number(&end["sum"]["packets"]) } else { 0 },
            datagrams_lost: if udp { number(&end["sum"]["lost_packets"]) } else { 0 },
        }
    }
}
