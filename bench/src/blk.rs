//! Block functions: which points are measured, beside whom, and what they should reach.

mod costs;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use device_svc::driver::client::{Access, Through};
use device_svc::driver::vfio_user::Sharing;

use crate::BlkArguments;
use crate::load::{BlockLoad, REQUEST_BYTES, SPAN_BYTES, Shown, Span};
use crate::machine::{Cpus, load_average, pin, processor};
use crate::peers::{DrayOptions, Server, dray, fio_iops, storage_daemon};
use crate::points::{Pairs, alternate};
use crate::report::{Beside, Goal, Report, Row, Unit};

/// How Dray's functions are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Link {
    /// vhost-user
    VhostUser,
    /// vfio-user; where reactors always poll, the doorbell is a store to a page that is shared
    VfioUser,
}

impl Link {
    /// The keys of a link in the configuration, for reactors that poll so.
    pub(crate) fn keys(self, poll: &str) -> &'static str {
        match self {
            Self::VhostUser => "type = \"vhost-user\"",
            // Nobody hears a store but a reactor that always polls.
            Self::VfioUser if poll == "always" => "type = \"vfio-user\", notify = \"mapped\"",
            Self::VfioUser => "type = \"vfio-user\"",
        }
    }

    /// How a client reaches them.
    pub(crate) const fn through(self) -> Through {
        match self {
            Self::VhostUser => Through::VhostUser,
            Self::VfioUser => Through::VfioUser(Sharing::Whole),
        }
    }
}

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Part {
    /// The null backend beside qemu-storage-daemon's
    Null,
    /// A file on tmpfs beside qemu-storage-daemon
    File,
    /// A file on tmpfs beside fio straight on it
    Fio,
    /// vfio-user beside vhost-user
    Links,
    /// The load generator beside fio's libblkio; over vhost-user only
    Generator,
    /// The ram backend beside memory copies
    Ram,
    /// DMA transactions of a read
    Dma,
    /// Resident memory
    Memory,
    /// What idle functions cost
    Idle,
    /// Latency beside a flooding neighbour
    Neighbour,
}

const DEPTHS: [u32; 3] = [1, 32, 128];
const FILE_BYTES: u64 = 1 << 30;

/// Goals: what the medians are held against.
const NULL_RATIO: f64 = 5.0;
const LATENCY_RATIO: f64 = 0.25;
const FILE_RATIO: f64 = 1.6;
const FIO_RATIO: f64 = 1.0;
const COPY_RATIO: f64 = 0.85;
const LINK_RATIO: f64 = 0.95;

/// How long and how often.
struct Pace {
    alternations: usize,
    duration: Duration,
    fio_seconds: u64,
}

/// All that the parts need.
struct Run {
    cpus: Cpus,
    link: Link,
    pace: Pace,
    folder: tempfile::TempDir,
    file: PathBuf,
    rows: Vec<Row>,
    start: Instant,
}

/// How a part is measured.
type Measure = fn(&mut Run) -> Result<()>;

/// The file that is measured; it goes with the run.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing is left to be done about one that cannot be removed.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Scratch {
    /// A file of [`FILE_BYTES`], the accessed part of it written, so that no request meets a hole.
    fn new() -> Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/dray-bench-{}.img", std::process::id()));
        let scratch = Self(path.clone());
        let mut file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
        let block = vec![0x5a; 1 << 20];
        for _ in 0..SPAN_BYTES >> 20 {
            file.write_all(&block)?;
        }
        file.set_len(FILE_BYTES)?;
        Ok(scratch)
    }
}

/// Measures the parts asked for.
pub(crate) fn measure(arguments: &BlkArguments) -> Result<Report> {
    let cpus = Cpus::find()?;
    pin(cpus.load);
    let pace = if arguments.quick {
        Pace { alternations: 3, duration: Duration::from_millis(200), fio_seconds: 1 }
    } else {
        Pace { alternations: 7, duration: Duration::from_millis(700), fio_seconds: 2 }
    };
    let asked = |part: Part| arguments.only.is_empty() || arguments.only.contains(&part);
    let needs_file = asked(Part::File) || asked(Part::Fio);
    let scratch = needs_file.then(Scratch::new).transpose()?;
    let file = scratch.as_ref().map(|scratch| scratch.0.clone()).unwrap_or_default();
    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let mut run = Run { cpus, link: arguments.link, pace, folder, file, rows: Vec::new(), start: Instant::now() };
    let parts: [(Part, Measure); 10] = [
        (Part::Null, null),
        (Part::File, file_beside_daemon),
        (Part::Fio, file_beside_fio),
        (Part::Links, links),
        (Part::Generator, generator),
        (Part::Ram, ram),
        (Part::Dma, costs::dma),
        (Part::Memory, costs::memory),
        (Part::Idle, costs::idle),
        (Part::Neighbour, costs::neighbour),
    ];
    let before = load_average();
    for (part, measure) in parts {
        if asked(part) {
            measure(&mut run).with_context(|| format!("{part:?}"))?;
        }
    }
    let about = format!(
        "{}, CPU {} serves, CPU {} loads; {} alternations of {} ms; {:.0} s; load average {before} before, {} after",
        processor(),
        cpus.server,
        cpus.load,
        run.pace.alternations,
        run.pace.duration.as_millis(),
        run.start.elapsed().as_secs_f64(),
        load_average()
    );
    Ok(Report { about, rows: run.rows })
}

impl Run {
    /// Says what is being measured.
    fn say(&self, what: &str) {
        eprintln!("bench: {:4.0} s  {what}", self.start.elapsed().as_secs_f64());
    }

    /// Starts Dray with one function on this backend, always polling.
    fn dray(&self, name: &str, backend: String) -> Result<Server> {
        self.dray_over(self.link, name, backend)
    }

    fn dray_over(&self, link: Link, name: &str, backend: String) -> Result<Server> {
        let options = DrayOptions { link, poll: "always", payload: "in-place", backends: vec![backend], keeper: false };
        dray(self.cpus, self.folder.path(), name, &options)
    }

    /// Reads with direct chains from Dray's functions.
    fn reads(&self, depth: u32) -> BlockLoad {
        BlockLoad { through: self.link.through(), ..BlockLoad::reads(depth, self.pace.duration) }
    }

    /// A backend on the file.
    fn file_backend(&self) -> String {
        format!("{{ type = \"file\", path = \"{}\" }}", self.file.display())
    }

    /// A row from pairs.
    fn add<T>(
        &mut self,
        name: String,
        pairs: &Pairs<T>,
        peer: &'static str,
        unit: Unit,
        figure: impl Fn(&T) -> f64,
        goal: Option<Goal>,
    ) {
        let beside = Beside {
            name: peer,
            values: pairs.theirs(&figure),
            ratios: pairs.ratios(&figure),
            round_trips: pairs.round_trips(),
            spoiled: pairs.spoiled,
        };
        self.rows.push(Row { name, values: pairs.ours(&figure), unit, beside: Some(beside), goal });
    }

    /// All depths, reads and writes, of two servers.
    fn all_points(
        &mut self,
        kind: &str,
        ours: &Server,
        theirs: &Server,
        goal_at: impl Fn(Access, u32) -> Option<f64>,
        latency_goal: Option<f64>,
    ) -> Result<()> {
        for access in [Access::Read, Access::Write] {
            let word = if access == Access::Read { "read" } else { "write" };
            for depth in DEPTHS {
                self.say(&format!("{kind}, random 4 KiB {word}, depth {depth}"));
                let load = BlockLoad { access, ..BlockLoad::reads(depth, self.pace.duration) };
                let through = self.link.through();
                let side =
                    |server: &Server, through| server.awake(|| BlockLoad { through, ..load }.run(&server.socket(0)));
                let (ours, theirs) = (|| side(ours, through), || side(theirs, Through::VhostUser));
                let pairs = alternate(self.cpus, self.pace.alternations, ours, theirs)?;
                let name = format!("{kind} {word}, depth {depth}");
                let goal = goal_at(access, depth).map(Goal::AtLeast);
                self.add(name, &pairs, "qemu-s-d", Unit::PerSecond, |shown: &Shown| shown.iops, goal);
                if depth == 1 {
                    let name = format!("{kind} {word}, depth 1, median latency");
                    let goal = latency_goal.map(Goal::AtMost);
                    self.add(name, &pairs, "qemu-s-d", Unit::Nanoseconds, |shown: &Shown| shown.median_ns, goal);
                }
            }
        }
        Ok(())
    }
}

fn null(run: &mut Run) -> Result<()> {
    let ours = run.dray("null", "{ type = \"null\", size = \"1G\" }".to_owned())?;
    let device = format!("null-co,size={FILE_BYTES},read-zeroes=off");
    let theirs = storage_daemon(run.cpus, run.folder.path(), "null-peer", &device)?;
    let goal = |_, depth| (depth > 1).then_some(NULL_RATIO);
    run.all_points("null", &ours, &theirs, goal, Some(LATENCY_RATIO))
}

fn file_beside_daemon(run: &mut Run) -> Result<()> {
    let ours = run.dray("file", run.file_backend())?;
    // Both have the one file, in turn.
    let device = format!("file,filename={},aio=io_uring,cache.direct=on,locking=off", run.file.display());
    let theirs = storage_daemon(run.cpus, run.folder.path(), "file-peer", &device)?;
    run.all_points("file", &ours, &theirs, |_, depth| (depth == 32).then_some(FILE_RATIO), None)
}

fn file_beside_fio(run: &mut Run) -> Result<()> {
    run.say("file, random 4 KiB read, depth 32, beside fio's io_uring straight on it");
    let ours = run.dray("file-fio", run.file_backend())?;
    let load = run.reads(32);
    let arguments = [format!("--filename={}", run.file.display()), "--ioengine=io_uring".into(), "--direct=1".into()];
    let seconds = run.pace.fio_seconds;
    let pairs = alternate(
        run.cpus,
        run.pace.alternations,
        || Ok(ours.awake(|| load.run(&ours.socket(0)))?.iops),
        || fio_iops(32, seconds, &arguments),
    )?;
    run.add(
        "file read, depth 32".into(),
        &pairs,
        "fio io_uring",
        Unit::PerSecond,
        |iops| *iops,
        Some(Goal::AtLeast(FIO_RATIO)),
    );
    Ok(())
}

/// The same function over both links, and what its doorbells cost.
fn links(run: &mut Run) -> Result<()> {
    let backend = "{ type = \"null\", size = \"1G\" }";
    let ours = run.dray_over(Link::VfioUser, "links-vfio", backend.to_owned())?;
    let theirs = run.dray_over(Link::VhostUser, "links-vhost", backend.to_owned())?;
    for depth in DEPTHS {
        run.say(&format!("null, random 4 KiB read, depth {depth}, over vfio-user and over vhost-user"));
        let side = |server: &Server, link: Link| {
            let load = BlockLoad { through: link.through(), ..BlockLoad::reads(depth, run.pace.duration) };
            server.awake(|| load.run(&server.socket(0)))
        };
        let (one, other) = (|| side(&ours, Link::VfioUser), || side(&theirs, Link::VhostUser));
        let pairs = alternate(run.cpus, run.pace.alternations, one, other)?;
        let goal = (depth == 32).then_some(Goal::AtLeast(LINK_RATIO));
        let name = format!("null read, depth {depth}, vfio-user");
        run.add(name, &pairs, "vhost-user", Unit::PerSecond, |shown: &Shown| shown.iops, goal);
        if depth == 32 {
            let row = |name: &str, values, goal| Row {
                name: format!("{name} of a load at depth 32"),
                values,
                unit: Unit::Count,
                beside: None,
                goal,
            };
            let messages = pairs.ours(|shown| shown.messages);
            run.rows.push(row("mapped doorbells", pairs.ours(|shown| shown.rings), None));
            run.rows.push(row("messages", messages, Some(Goal::AtMost(0.0))));
        }
    }
    Ok(())
}

fn generator(run: &mut Run) -> Result<()> {
    run.say("the load generator beside fio's libblkio, null, depth 128");
    let ours = run.dray_over(Link::VhostUser, "generator", "{ type = \"null\", size = \"1G\" }".to_owned())?;
    let load = BlockLoad::reads(128, run.pace.duration);
    let socket = ours.socket(0);
    let arguments = libblkio(&socket);
    let seconds = run.pace.fio_seconds;
    let pairs = alternate(
        run.cpus,
        3,
        || Ok(ours.awake(|| load.run(&socket))?.iops),
        || ours.awake(|| fio_iops(128, seconds, &arguments)),
    )?;
    let name = "load generator, Dray null, depth 128".to_owned();
    run.add(name, &pairs, "fio libblkio", Unit::PerSecond, |iops| *iops, None);
    Ok(())
}

/// fio's arguments for a vhost-user socket, given its best: it polls and batches.
fn libblkio(socket: &Path) -> [String; 7] {
    [
        "--ioengine=libblkio".into(),
        "--libblkio_driver=virtio-blk-vhost-user".into(),
        format!("--libblkio_path={}", socket.display()),
        "--thread=1".into(),
        "--hipri=1".into(),
        "--iodepth_batch_submit=32".into(),
        "--iodepth_batch_complete_max=32".into(),
    ]
}

fn ram(run: &mut Run) -> Result<()> {
    run.say("ram, random 4 KiB read over 256 MiB, depth 32, beside memory copies");
    let ours = run.dray("ram", format!("{{ type = \"ram\", size = \"{}M\" }}", SPAN_BYTES >> 20))?;
    // What was never written is no memory yet.
    let fill = BlockLoad { access: Access::Write, duration: Duration::from_secs(1), ..run.reads(32) };
    ours.awake(|| fill.run(&ours.socket(0)))?;
    let load = run.reads(32);
    let span = Span::new()?;
    let (cpus, duration) = (run.cpus, run.pace.duration);
    let pairs = alternate(
        cpus,
        run.pace.alternations,
        || Ok(ours.awake(|| load.run(&ours.socket(0)))?.iops),
        || Ok(cpus.on_server(|| span.copies_per_second(duration))),
    )?;
    let name = format!("ram read, depth 32, {} bytes", REQUEST_BYTES);
    run.add(name, &pairs, "memcpy", Unit::PerSecond, |iops| *iops, Some(Goal::AtLeast(COPY_RATIO)));
    Ok(())
}
