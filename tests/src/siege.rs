//! Hosts that mean harm, over either link: conversations with some functions of a card, while neighbours on the same reactor go on
//! undisturbed.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};

use device_svc::driver::client::{Client, ClientSettings, Through};
use device_svc::driver::hostile::{Misdeed, Told};
use device_svc::virtqueue::features;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Card, CardSettings, Log, rounds, wait_for, wait_for_or};

/// A function: name, backend, further keys of the link and the function. All have two queues.
pub type Besieged = (&'static str, &'static str, &'static str, &'static str);

/// How a link is besieged.
#[derive(Clone, Copy, Debug)]
pub struct Siege {
    /// The link's type.
    pub link: &'static str,
    /// How an honest client reaches a function.
    pub through: Through,
    /// The functions that are attacked.
    pub attacked: &'static [Besieged],
    /// Holds the conversation of a seed.
    pub converse: fn(&Path, u64) -> Result<Told, Misdeed>,
    /// Cuts the memory of a running queue short.
    pub truncate_memory: fn(&Path, u64) -> Result<Told, Misdeed>,
    /// What the service says when somebody is attached.
    pub attached: &'static str,
}

/// Those that must notice nothing.
const NEIGHBOURS: [Besieged; 2] = [
    ("beside", r#"{ type = "ram", size = "8M" }"#, "", ""),
    ("beside-file", r#"{ type = "file", path = "@/disk-beside", create = "8M" }"#, "", ""),
];

impl Siege {
    /// One reactor for all: who stops it stops everybody. With it comes the right to be the only siege: a process that another test
    /// starts meanwhile has our sockets for a moment, and who hangs up has not, and is in the way of its successor.
    pub fn card(&self) -> (Card, MutexGuard<'static, ()>) {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        // Who cuts a memory file short still has it mapped: without this the attacker would be the one that ends.
        device_svc::dma::install_bus_fault_guard().expect("a handler for bus faults can be installed");
        let kind = self.link;
        let mut parts = String::new();
        for (name, backend, link, keys) in self.attacked.iter().chain(&NEIGHBOURS) {
            parts += &format!(
                r#"
[[volume]]
name = "{name}"
backend = {backend}
[[function]]
name = "{name}"
type = "blk"
link = {{ type = "{kind}", socket = "@/{name}.sock"{link} }}
volume = "{name}"
queues = 2
packed = true
{}
"#,
                if keys.is_empty() { "queue-size = 128" } else { keys }
            );
        }
        (Card::start(&CardSettings { parts, ..CardSettings::default() }), alone)
    }

    /// An honest client.
    ///
    /// # Panics
    /// When it is not served.
    #[must_use]
    pub fn connect(&self, card: &Card, name: &str, packed: bool) -> Client {
        let packed = if packed { features::RING_PACKED } else { 0 };
        let settings = ClientSettings {
            through: self.through,
            features: features::INDIRECT | features::EVENT_INDEX | packed,
            queue_size: 64,
            depth: 4,
            spin: false,
            ..ClientSettings::default()
        };
        Client::connect(&card.path(&format!("{name}.sock")), settings).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A front end that means well comes and is served.
    ///
    /// # Panics
    /// When it is not.
    pub fn serves(&self, card: &Card, name: &str, number: u32) {
        let mut client = self.connect(card, name, number % 2 == 1);
        if name == "null" {
            assert!(client.queue().get_id(0));
            client.publish();
            assert_eq!(client.wait().unwrap().status, 0);
        } else {
            verify(&mut client, number);
        }
        client.leave().unwrap();
    }

    /// Thousands of hostile conversations disturb nobody.
    ///
    /// # Panics
    /// When they do.
    pub fn lay(&self) {
        let (mut card, _alone) = self.card();
        let process = card.process().id();
        let each = rounds(600, 2000, 20_000);
        let seed = std::env::var("DRAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let first: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 32);
        println!("seeds from {first} on; DRAY_TEST_SEED={first} says the same again");

        let (over, verified) = (AtomicBool::new(false), AtomicU32::new(0));
        let all: Mutex<BTreeMap<&str, Vec<Told>>> = Mutex::default();
        let (warm, go_on) = (Barrier::new(self.attacked.len() + 1), Barrier::new(self.attacked.len() + 1));
        let (mut before, mut resident_before) = (BTreeMap::new(), 0);
        let log = card.process().log();
        std::thread::scope(|scope| {
            let beside = scope.spawn(|| {
                let mut clients =
                    [self.connect(&card, NEIGHBOURS[0].0, false), self.connect(&card, NEIGHBOURS[1].0, true)];
                let mut number = 0;
                while !over.load(Ordering::Relaxed) {
                    number += 1;
                    for client in &mut clients {
                        verify(client, number);
                    }
                    verified.store(number, Ordering::Relaxed);
                }
                clients.into_iter().for_each(|client| client.leave().unwrap());
            });
            let attackers: Vec<_> = self
                .attacked
                .iter()
                .enumerate()
                .map(|(place, (name, ..))| {
                    let (card, all, warm, go_on, log) = (&card, &all, &warm, &go_on, &log);
                    scope.spawn(move || {
                        let attack = || {
                            let mut told = Vec::new();
                            for number in 0..each {
                                if number == each / 4 {
                                    self.serves(card, name, number);
                                    told.push(Told::default());
                                    warm.wait();
                                    go_on.wait();
                                }
                                let seed = first + place as u64 * 1_000_000 + u64::from(number);
                                let one = (self.converse)(&card.path(&format!("{name}.sock")), seed);
                                told.push(one.unwrap_or_else(|misdeed| {
                                    // Past the test's own output, which ends with the process.
                                    let words = last_words(log, name);
                                    let _ = writeln!(std::io::stderr(), "{name}, seed {seed}: {misdeed}\n{words}");
                                    panic!("{name}: {misdeed}")
                                }));
                            }
                            self.serves(card, name, each);
                            all.lock().unwrap().insert(*name, told);
                        };
                        // The others would wait at the barrier for ever.
                        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(attack)).is_err() {
                            let _ = kill(Pid::from_raw(process.cast_signed()), Signal::SIGKILL);
                            std::process::exit(101);
                        }
                    })
                })
                .collect();
            warm.wait();
            (before, resident_before) = (file_descriptors(process), resident_kib(process));
            go_on.wait();
            for attacker in attackers {
                attacker.join().unwrap();
            }
            let verified_before = verified.load(Ordering::Relaxed);
            wait_for("the neighbours to go on", || {
                verified.load(Ordering::Relaxed) > verified_before || beside.is_finished()
            });
            over.store(true, Ordering::Relaxed);
            beside.join().unwrap();
        });

        assert!(card.process().is_running());
        assert!(verified.load(Ordering::Relaxed) > 3, "the neighbours did next to nothing");
        let open = |kinds: &BTreeMap<String, usize>| kinds.values().sum::<usize>();
        wait_for_or(
            || open(&file_descriptors(process)) <= open(&before),
            || format!("descriptors to be closed: {before:?} became {:?}", file_descriptors(process)),
        );
        let resident = resident_kib(process);
        assert!(resident < resident_before + 16 * 1024, "{resident_before} KiB resident became {resident} KiB");

        // Otherwise nothing was shown: most conversations came as far as a ring.
        let all = all.into_inner().unwrap();
        let (faults, answered) = all
            .values()
            .flatten()
            .fold((0, 0), |(faults, answered), told| (faults + told.faults, answered + told.answered));
        println!("{faults} faults, {answered} answers, {} passes of the neighbours", verified.load(Ordering::Relaxed));
        let conversations = each * self.attacked.len() as u32;
        assert!(faults > conversations / 10 && answered > conversations / 10, "{faults} faults, {answered} answers");
        // One word about what is refused, one about why the connection ends, and one about the device until each reset.
        for (name, told) in &all {
            // What the card says comes through a pipe and a thread of ours.
            wait_for_or(
                || self.warnings(&log.text(), name).len() >= told.len(),
                || format!("{name}: {} conversations in the log", told.len()),
            );
            let warnings = self.warnings(&log.text(), name);
            for (number, (count, told)) in warnings.iter().zip(told).enumerate() {
                assert!(*count <= 3 + told.resets, "{name}, conversation {number}, {told:?}: {count} warnings");
            }
        }
        let output = log.text();
        for (name, ..) in NEIGHBOURS {
            assert_eq!(self.warnings(&output, name), [0], "{name}");
        }
        assert!(!output.contains("panicked"), "{output}");
    }

    /// A memory file that is cut short ends that function only.
    ///
    /// # Panics
    /// When it does more.
    pub fn cut_memory(&self) {
        let (mut card, _alone) = self.card();
        let mut beside = self.connect(&card, "beside", false);
        for number in 0..rounds(20, 50, 500) {
            for (name, ..) in self.attacked {
                (self.truncate_memory)(&card.path(&format!("{name}.sock")), u64::from(number))
                    .unwrap_or_else(|error| panic!("{name}: {error}\n{}", card.process().output()));
                verify(&mut beside, number);
            }
        }
        for (name, ..) in self.attacked {
            self.serves(&card, name, 1);
        }
        assert!(card.process().is_running());
        let output = card.process().output();
        assert!(output.contains("the VM's memory file was truncated"), "{output}");
        assert!(!output.contains("panicked"), "{output}");
        assert!(Path::new(&card.path("beside.sock")).exists());
        beside.leave().unwrap();
    }

    /// The conversations of a function in the log: how many warnings each had.
    fn warnings(&self, log: &str, name: &str) -> Vec<u32> {
        let function = format!("function={name} ");
        let mut counts = Vec::new();
        for line in
            log.lines().map(|line| format!("{} ", line.replace('"', ""))).filter(|line| line.contains(&function))
        {
            if line.contains(self.attached) {
                counts.push(0);
            } else if line.contains("WARN") || line.contains("ERROR") {
                *counts.last_mut().unwrap_or_else(|| panic!("a warning before any front end: {line}")) += 1;
            }
        }
        counts
    }
}

/// Writes a pattern of this number to four places and reads it back.
fn verify(client: &mut Client, number: u32) {
    let places: [u64; 4] = std::array::from_fn(|row| (u64::from(number) * 7 + row as u64 * 401) % 2000 * 8);
    for pass in 0..2 {
        for (row, sector) in places.iter().enumerate() {
            let at = client.queue().data_at(row as u32);
            let pattern = if pass == 0 { number.wrapping_mul(row as u32 + 1) } else { 0 };
            client.memory().copy_in(at, &pattern.to_le_bytes().repeat(1024));
            let added = if pass == 0 {
                client.queue().write(row as u32, *sector, 4096)
            } else {
                client.queue().read(row as u32, *sector, 4096)
            };
            assert!(added);
        }
        client.publish();
        for _ in 0..4 {
            let ended = client.wait().unwrap();
            assert_eq!(ended.status, 0, "pass {pass} of {number}");
        }
    }
    for row in 0..4 {
        let mut bytes = vec![0; 4096];
        let at = client.queue().data_at(row);
        client.memory().copy_out(at, &mut bytes);
        assert!(bytes == number.wrapping_mul(row + 1).to_le_bytes().repeat(1024), "row {row} of {number} differs");
    }
}

/// What a process has open: how many of each kind, numbers in the names left out.
fn file_descriptors(process: u32) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
        // One that was closed in the meantime has no name any more.
        if let Ok(name) = std::fs::read_link(entry.unwrap().path()) {
            let kind = name.to_string_lossy().replace(|character: char| character.is_ascii_digit(), "");
            *kinds.entry(kind).or_default() += 1;
        }
    }
    kinds
}

fn resident_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The end of what the service said of a function.
fn last_words(log: &Log, name: &str) -> String {
    let log = log.text();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(name) || line.contains("panicked")).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
