//! The servers that are measured: Dray's service and its peers, each pinned to the server's CPU, each stopped (SIGSTOP) while
//! another is measured, because each of them polls.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::blk::Link;
use crate::load::QUEUE_SIZE_MAX;
use crate::machine::Cpus;

/// A server while it exists.
pub(crate) struct Server {
    child: Child,
    folder: PathBuf,
}

impl Server {
    /// Where function `number`, from 0, is reached.
    pub(crate) fn socket(&self, number: usize) -> PathBuf {
        self.folder.join(format!("f{number}.sock"))
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // One that is gone shows itself with the next request.
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// Lets it run from now on.
    pub(crate) fn wake(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Lets it run for `work` alone.
    pub(crate) fn awake<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.wake();
        let result = work();
        self.signal(Signal::SIGSTOP);
        result
    }

    /// Kills Dray's service, and starts it anew as soon as it is gone. Returns at once: it serves when its socket is there.
    pub(crate) fn kill_and_start(&mut self, cpus: Cpus) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(cpus, &self.folder, false, &[])?;
        Ok(())
    }

    /// Kills the process that serves for Dray's keeper. When this returns it is dead.
    pub(crate) fn kill_service(&self) -> Result<()> {
        let keeper = self.id();
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        let service = children.split_whitespace().last().context("the keeper has no service")?;
        kill(Pid::from_raw(service.parse()?), Signal::SIGKILL)?;
        // Until it has ended it is neither gone nor a zombie, which waits for the keeper.
        let lives = |stat: String| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z'));
        while std::fs::read_to_string(format!("/proc/{service}/stat")).is_ok_and(lives) {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Has the same program take over Dray's service. Ends when it serves.
    pub(crate) fn update(&self, cpus: Cpus) -> Result<Child> {
        let control = format!("unix:{}", self.folder.join("card.sock").display());
        let program = device_svc()?;
        let mut command = Command::new(&program);
        command.args(["update", "--control", &control, "--binary"]).arg(&program).stdout(Stdio::null());
        cpus.on_server(|| command.spawn()).context("start device-svc update")
    }

    /// Reads and DMA transactions of Dray's function 0 so far.
    pub(crate) fn reads_and_transactions(&self) -> Result<(f64, f64)> {
        let function = self.function()?;
        let figure = |name| function[name].as_f64().with_context(|| format!("statistics have {name}"));
        Ok((figure("reads")?, figure("dma-transactions")?))
    }

    /// One figure of Dray's function 0, by its path in the statistics.
    pub(crate) fn figure(&self, path: &[&str]) -> Result<f64> {
        let function = self.function()?;
        let found = path.iter().try_fold(&function, |value, key| value.get(key));
        found.and_then(serde_json::Value::as_f64).with_context(|| format!("statistics have {}", path.join(".")))
    }

    /// The statistics of Dray's function 0.
    fn function(&self) -> Result<serde_json::Value> {
        let control = format!("unix:{}", self.folder.join("card.sock").display());
        let output = Command::new(device_svc()?).args(["stats", "--json", "--control", &control]).output()?;
        let mut stats: serde_json::Value = serde_json::from_slice(&output.stdout).context("statistics are JSON")?;
        Ok(stats["functions"][0].take())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.wake();
        self.signal(Signal::SIGTERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Dray's service, beside this program.
fn device_svc() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("device-svc");
    ensure!(path.exists(), "{} is not built: cargo build --release", path.display());
    Ok(path)
}

/// A program of the rig.
pub(crate) fn rig(program: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("DRAY_RIG").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        Some(cache?.join("dray/rig"))
    });
    let path = folder.context("neither $DRAY_RIG nor $HOME is set")?.join("bin").join(program);
    ensure!(path.exists(), "{} is not there: run tests/rig/make", path.display());
    Ok(path)
}

/// What Dray is started with.
pub(crate) struct DrayOptions<'a> {
    /// How functions are reached.
    pub(crate) link: Link,
    /// `reactors.poll`.
    pub(crate) poll: &'a str,
    /// `payload` of each link.
    pub(crate) payload: &'a str,
    /// A backend for each function, as the configuration writes it.
    pub(crate) backends: Vec<String>,
    /// Whether there is a keeper, which starts the service again.
    pub(crate) keeper: bool,
}

/// Starts Dray's service in a folder of its own below `parent`.
pub(crate) fn dray(cpus: Cpus, parent: &Path, name: &str, options: &DrayOptions<'_>) -> Result<Server> {
    let folder = parent.join(name);
    std::fs::create_dir(&folder)?;
    let mut text = format!(
        "[reactors]\ncount = 1\npoll = \"{}\"\n[control]\nlisten = \"unix:{}\"\n",
        options.poll,
        folder.join("card.sock").display()
    );
    for (number, backend) in options.backends.iter().enumerate() {
        let socket = folder.join(format!("f{number}.sock"));
        text.push_str(&format!(
            "[[volume]]\nname = \"v{number}\"\nbackend = {backend}\n[[function]]\nname = \"f{number}\"\ntype = \"blk\"\n\
             volume = \"v{number}\"\nqueue-size = {QUEUE_SIZE_MAX}\nlink = {{ {}, socket = \"{}\", payload = \"{}\" }}\n",
            options.link.keys(options.poll),
            socket.display(),
            options.payload
        ));
    }
    serve(cpus, folder, &text, options.keeper, &[])
}

/// What Dray is started with for a network function.
pub(crate) struct NetOptions<'a> {
    /// How the function is reached.
    pub(crate) link: Link,
    /// `reactors.poll`.
    pub(crate) poll: &'a str,
    /// The uplink, as the configuration writes it.
    pub(crate) uplink: &'a str,
    /// A program that runs the service, with its arguments.
    pub(crate) under: &'a [&'a str],
}

/// Starts Dray's service with one network function, in a folder of its own below `parent`.
pub(crate) fn dray_net(cpus: Cpus, parent: &Path, options: &NetOptions<'_>) -> Result<Server> {
    let folder = parent.join("dray");
    std::fs::create_dir(&folder)?;
    let text = format!(
        "[reactors]\ncount = 1\npoll = \"{}\"\n[control]\nlisten = \"unix:{}\"\n[[uplink]]\nname = \"u\"\n\
         backend = {}\n[[function]]\nname = \"f0\"\ntype = \"net\"\nuplink = \"u\"\nlink = {{ {}, socket = \"{}\" }}\n",
        options.poll,
        folder.join("card.sock").display(),
        options.uplink,
        options.link.keys(options.poll),
        folder.join("f0.sock").display()
    );
    serve(cpus, folder, &text, false, options.under)
}

/// Starts Dray's service on a configuration, under another program if one is named; it is stopped when it serves.
fn serve(cpus: Cpus, folder: PathBuf, text: &str, keeper: bool, under: &[&str]) -> Result<Server> {
    let configuration = folder.join("card.toml");
    std::fs::write(&configuration, text)?;
    let mut child = spawn(cpus, &folder, keeper, under)?;
    let output = child.stdout.take().context("its output is piped")?;
    let server = Server { child, folder };
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line.starts_with("ready:"), "device-svc did not start");
    server.signal(Signal::SIGSTOP);
    Ok(server)
}

/// Starts Dray's service on the configuration in a folder.
fn spawn(cpus: Cpus, folder: &Path, keeper: bool, under: &[&str]) -> Result<Child> {
    let service = device_svc()?;
    let mut command = match under {
        [] => Command::new(service),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(service);
            command
        }
    };
    command.args(["serve", "--no-state", "--config"]).arg(folder.join("card.toml"));
    if !keeper {
        command.arg("--no-keeper");
    }
    command.env("RUST_LOG", "error").stdout(Stdio::piped());
    cpus.on_server(|| command.spawn()).context("start device-svc")
}

/// Starts qemu-storage-daemon with this block device, exported by an I/O thread that polls.
pub(crate) fn storage_daemon(cpus: Cpus, parent: &Path, name: &str, device: &str) -> Result<Server> {
    let folder = parent.join(name);
    std::fs::create_dir(&folder)?;
    let socket = folder.join("f0.sock");
    let export = format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,iothread=io,num-queues=1",
        socket.display()
    );
    let mut command = Command::new(rig("qemu-storage-daemon")?);
    command.args(["--object", "iothread,id=io,poll-max-ns=1000000000"]);
    command.args(["--blockdev", &format!("{device},node-name=disk"), "--export", &export]);
    let child = cpus.on_server(|| command.spawn()).context("start qemu-storage-daemon")?;
    let mut server = Server { child, folder };
    let start = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        if let Some(status) = server.child.try_wait()? {
            bail!("qemu-storage-daemon ended: {status}");
        }
        ensure!(start.elapsed() < Duration::from_secs(20), "qemu-storage-daemon does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    server.signal(Signal::SIGSTOP);
    Ok(server)
}

/// Runs fio on the CPU of this thread, 4 KiB random reads at a depth; returns its requests per second.
pub(crate) fn fio_iops(depth: u32, seconds: u64, arguments: &[String]) -> Result<f64> {
    let output = Command::new(rig("fio")?)
        .args(["--name=bench", "--rw=randread", "--bs=4k", "--norandommap=1", "--randrepeat=0", "--time_based"])
        .args(["--output-format=json", "--gtod_reduce=1", "--size=256m"])
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={seconds}"))
        .args(arguments)
        .output()?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    // It may say something before.
    let text = String::from_utf8_lossy(&output.stdout);
    let begin = text.find('{').context("fio says JSON")?;
    let said: serde_json::Value = serde_json::from_str(&text[begin..]).context("fio says JSON")?;
    said["jobs"][0]["read"]["iops"].as_f64().context("fio says its IOPS")
}
