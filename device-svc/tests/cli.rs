//! The command line, as its users meet it: the built program, its output and its exit status.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CONFIG: &str = r#"
[reactors]
count = 1

[control]
listen = "unix:card.sock"
metrics = "127.0.0.1:0"
state = "state"

[[volume]]
name = "scratch"
backend = { type = "null", size = "1M" }

[[function]]
name = "f"
type = "blk"
volume = "scratch"
link = { type = "vhost-user", socket = "f.sock" }
"#;

fn program(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_device-svc")).args(arguments).current_dir(folder).output().unwrap()
}

/// What a command says that succeeds.
#[track_caller]
fn said(arguments: &[&str], folder: &Path) -> String {
    let output = program(arguments, folder);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a command that fails with status 1.
#[track_caller]
fn refused(arguments: &[&str], folder: &Path) -> String {
    let output = program(arguments, folder);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.lines().last().unwrap().to_owned();
    assert!(line.starts_with("device-svc: "), "{text}");
    line["device-svc: ".len()..].to_owned()
}

/// A card that serves a configuration; killed if a test fails before it has ended.
struct Served {
    child: Child,
    folder: tempfile::TempDir,
    ready: String,
}

impl Served {
    fn start(more: &[&str], environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("dray.toml"), CONFIG).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_device-svc"));
        command.args(["serve", "--config", "dray.toml"]).args(more).current_dir(folder.path());
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        command.envs(environment.iter().copied()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut ready).unwrap();
        let served = Self { child, folder, ready };
        assert!(!served.ready.is_empty(), "not ready: {}", served.log());
        served
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap()
    }

    /// Ends it by a signal; returns its log.
    fn end(mut self, signal: Signal) -> String {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        let status = self.child.wait().unwrap();
        let log = self.log();
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(!self.path().join("card.sock").exists() && !self.path().join("shim.sock").exists());
        log
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_card_from_start_to_end() {
    let served = Served::start(&[], &[]);
    let folder = served.path().display();
    let expected =
        format!("ready: control unix:{folder}/card.sock, volumes 1, uplinks 0, functions 1, metrics http://127.0.0.1:");
    assert!(served.ready.starts_with(&expected), "{}", served.ready);
    let ask = |arguments: &[&str]| said(&[arguments, &["--control", "unix:card.sock"]].concat(), served.path());
    let no = |arguments: &[&str]| refused(&[arguments, &["--control", "unix:card.sock"]].concat(), served.path());

    assert!(ask(&["function", "list"]).contains("f     blk"));
    let list: serde_json::Value = serde_json::from_str(&ask(&["volume", "list", "--json"])).unwrap();
    assert_eq!(list[0]["name"], "scratch");
    assert_eq!(list[0]["size-bytes"], 1 << 20);
    assert_eq!(list[0]["functions"][0], "f");

    let volume = ["volume", "create", "--name", "more", "--backend", "ram,size=64K"];
    assert!(ask(&volume).starts_with("volume more created: uuid "));
    assert!(ask(&volume).starts_with("volume more is there already with these settings"));
    let line = no(&["volume", "create", "--name", "more", "--backend", "ram,size=128K"]);
    assert!(line.starts_with("volume \"more\": `backend`: it exists with another value; delete it first"), "{line}");
    let link = "vhost-user,socket=g.sock,payload=copy";
    let function = ["function", "create", "--name", "g", "--volume", "more", "--link", link, "--limit", "iops=50"];
    assert!(ask(&function).starts_with("function g created: 64K at "));
    let shown: serde_json::Value = serde_json::from_str(&ask(&["function", "show", "g", "--json"])).unwrap();
    assert_eq!(shown["link"]["payload"], "copy");
    assert_eq!(shown["limit"]["iops"], 50);
    assert_eq!(shown["state"], "waiting");
    assert!(ask(&["function", "set-limit", "g", "--limit", ""]).contains("limit           none"));
    assert_eq!(no(&["volume", "delete", "more"]), "volume \"more\" is used by function g; delete that first");
    assert!(ask(&["volume", "info", "more"]).contains("64K (65536 bytes)"));
    assert!(no(&["volume", "resize", "scratch", "64K"]).contains("--shrink"));
    assert_eq!(ask(&["volume", "resize", "scratch", "2M"]), "volume scratch has 2M now\n");
    assert!(ask(&["stats", "--queues"]).contains("FUNCTION  QUEUE"));
    let stats: serde_json::Value = serde_json::from_str(&ask(&["stats", "--json"])).unwrap();
    assert_eq!(stats["functions"].as_array().unwrap().len(), 2);
    assert_eq!(ask(&["function", "delete", "g"]), "function g deleted\n");
    assert_eq!(ask(&["volume", "delete", "more"]), "volume more deleted\n");

    let second = refused(&["serve", "--config", "dray.toml"], served.path());
    assert!(
        second.contains("/state is used by process ") && second.contains("end that, or give this card"),
        "{second}"
    );
    let second = refused(&["serve", "--config", "dray.toml", "--no-state"], served.path());
    assert!(second.contains("card.sock is in use by a running service"), "{second}");
    served.end(Signal::SIGTERM);
}

#[test]
fn what_is_set_and_what_is_not() {
    let served = Served::start(&[], &[]);
    let ask = |arguments: &[&str]| said(&[arguments, &["--control", "unix:card.sock"]].concat(), served.path());
    let no = |arguments: &[&str]| refused(&[arguments, &["--control", "unix:card.sock"]].concat(), served.path());
    assert!(ask(&["function", "set", "f", "--limit", "iops=5"]).contains("limit           iops=5,burst=1s"));
    assert!(ask(&["function", "set-limit", "f", "--limit", "iops=6"]).contains("limit           iops=6,burst=1s"));
    assert_eq!(
        no(&["function", "set", "f", "--link", "down"]),
        "function \"f\": only a function of type \"net\" has a link that can be set"
    );
    assert_eq!(
        no(&["function", "set", "f", "--mtu", "1400", "--limit", "iops=7"]),
        "function \"f\": `mtu`: only a function of type \"net\" has it; remove it"
    );
    assert_eq!(
        no(&["function", "set", "f", "--limit", "packets=7"]),
        "function \"f\": limit: `packets`: only the limit of a function of type \"net\" has it; write `iops`"
    );
    assert_eq!(
        no(&["function", "set", "g", "--link", "up"]),
        "there is no function \"g\"; `device-svc function list` shows all"
    );
    // What was refused changed nothing.
    let shown: serde_json::Value = serde_json::from_str(&ask(&["function", "show", "f", "--json"])).unwrap();
    assert_eq!(shown["limit"]["iops"], 6);
    // Nothing to change, or no state of a link.
    assert_eq!(program(&["function", "set", "f"], served.path()).status.code(), Some(2));
    assert_eq!(program(&["function", "set", "f", "--link", "sideways"], served.path()).status.code(), Some(2));
    served.end(Signal::SIGTERM);
}

#[test]
fn uplinks_come_and_go() {
    let served = Served::start(&[], &[]);
    let ask = |arguments: &[&str]| said(&[arguments, &["--control", "unix:card.sock"]].concat(), served.path());
    let no = |arguments: &[&str]| refused(&[arguments, &["--control", "unix:card.sock"]].concat(), served.path());
    assert_eq!(ask(&["uplink", "list"]), "NAME  CARRIER  MTU-MAX  BACKEND  FUNCTIONS\n");
    assert_eq!(ask(&["uplink", "list", "--json"]), "[]\n");
    let none = "there is no uplink \"u\"; `device-svc uplink list` shows all";
    assert_eq!(no(&["uplink", "show", "u"]), none);
    assert_eq!(no(&["uplink", "delete", "u"]), none);
    let link = "vhost-user,socket=n.sock";
    let function = ["function", "create", "--type", "net", "--name", "n", "--uplink", "u", "--link", link];
    assert_eq!(no(&function), none);
    assert_eq!(
        no(&["function", "create", "--type", "net", "--name", "n", "--volume", "scratch", "--link", link]),
        "function \"n\": `volume`: only a function of type \"blk\" has it; give an `uplink`"
    );
    assert_eq!(
        no(&["function", "create", "--name", "n", "--link", link]),
        "function \"n\": `volume` is missing; add `volume = \"…\"`, the name of a volume"
    );
    assert_eq!(
        no(&["uplink", "create", "--name", "u", "--backend", "tap"]),
        "uplink \"u\": backend: `name` is missing; add `name = \"dray0\"`, the interface"
    );
    assert!(!served.path().join("n.sock").exists());

    let create = ["uplink", "create", "--name", "u", "--backend", "loopback"];
    assert_eq!(ask(&create), "uplink u created: loopback, carrier up, mtu up to 65535\n");
    assert!(ask(&create).starts_with("uplink u is there already with these settings: loopback"));
    assert_eq!(
        no(&["uplink", "create", "--name", "u", "--backend", "null"]),
        "uplink \"u\": `backend`: it exists with another value; delete it first, or ask for the settings that it has"
    );
    let shown: serde_json::Value = serde_json::from_str(&ask(&["uplink", "show", "u", "--json"])).unwrap();
    assert_eq!(shown["backend"], serde_json::json!({ "type": "loopback" }));
    assert_eq!((&shown["carrier"], &shown["functions-max"]), (&true.into(), &serde_json::Value::Null));
    assert!(ask(&["uplink", "show", "u"]).contains("functions-max    no limit\n"));
    assert_eq!(ask(&["uplink", "delete", "u"]), "uplink u deleted\n");
    served.end(Signal::SIGTERM);
}

#[test]
fn a_function_that_exists_is_created_again_only_as_it_is() {
    let served = Served::start(&[], &[]);
    let control = ["--control", "unix:card.sock"];
    let other = said(
        &[&["volume", "create", "--name", "w", "--backend", "null,size=1M"], &control[..]].concat(),
        served.path(),
    );
    assert!(other.starts_with("volume w created"), "{other}");
    let first = ["--volume", "w", "--link", "vhost-user,socket=g.sock,socket-mode=0600", "--queues", "2"];
    let function = |more: &[&str]| {
        let arguments = [&["function", "create", "--name", "g"], more, &control].concat();
        program(&arguments, served.path())
    };
    let output = function(&first);
    assert!(output.status.success(), "{output:?}");
    let output = function(&first);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.starts_with("function g is there already with these settings"), "{text}");
    // Each setting counts, and the line says which one differs.
    for (key, other) in [
        ("queues", ["--volume", "w", "--link", "vhost-user,socket=g.sock,socket-mode=0600", "--queues", "3"]),
        ("link", ["--volume", "w", "--link", "vhost-user,socket=h.sock,socket-mode=0600", "--queues", "2"]),
        ("link", ["--volume", "w", "--link", "vhost-user,socket=g.sock,socket-mode=0660", "--queues", "2"]),
        ("volume", ["--volume", "scratch", "--link", "vhost-user,socket=g.sock,socket-mode=0600", "--queues", "2"]),
    ] {
        let output = function(&other);
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(line.starts_with(&format!("device-svc: function \"g\": `{key}")), "{line}");
    }
    // One that is new, on a volume that another writes or a socket that another has, is refused; nothing of it stays.
    for more in [["--link", "vhost-user,socket=k.sock"], ["--link", "vhost-user,socket=f.sock"]] {
        let output = program(
            &[&["function", "create", "--name", "k", "--volume", "scratch"], &more[..], &control].concat(),
            served.path(),
        );
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    let list = said(&[&["function", "list", "--json"], &control[..]].concat(), served.path());
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    assert!(!served.path().join("k.sock").exists());
    served.end(Signal::SIGTERM);
}

#[test]
fn sockets_have_the_permissions_that_were_asked_for() {
    use std::os::unix::fs::PermissionsExt;
    let served = Served::start(&[], &[]);
    let mode = |name: &str| served.path().join(name).metadata().unwrap().permissions().mode() & 0o777;
    // The card's own socket is its owner's alone, host-shim's the group's too.
    assert_eq!((mode("card.sock"), mode("shim.sock"), mode("f.sock")), (0o600, 0o660, 0o660));
    for asked in ["0600", "0666"] {
        let (name, socket) = (format!("g{asked}"), format!("g{asked}.sock"));
        let volume = ["volume", "create", "--name", &name, "--backend", "null,size=1M", "--control", "unix:card.sock"];
        said(&volume, served.path());
        let link = format!("vhost-user,socket={socket},socket-mode={asked}");
        let function = ["function", "create", "--name", &name, "--volume", &name, "--link", &link];
        said(&[&function[..], &["--control", "unix:card.sock"]].concat(), served.path());
        assert_eq!(mode(&socket), u32::from_str_radix(asked, 8).unwrap());
    }
    let path = served.path().to_owned();
    served.end(Signal::SIGTERM);
    assert!(!path.join("g0600.sock").exists() && !path.join("f.sock").exists());
}

#[test]
fn a_card_is_found_where_it_is_by_default_or_where_control_says() {
    let runtime = tempfile::tempdir().unwrap();
    let runtime = runtime.path().to_str().unwrap();
    let served = Served::start(&["--control", "unix:elsewhere.sock"], &[]);
    let ask = |environment: &[(&str, &str)], more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_device-svc"));
        command.args(["function", "list"]).args(more).current_dir(served.path()).envs(environment.iter().copied());
        command.output().unwrap()
    };
    // The command line stands above the configuration.
    assert!(!served.path().join("card.sock").exists());
    assert!(ask(&[], &["--control", "unix:elsewhere.sock"]).status.success());
    let absolute = format!("unix:{}/elsewhere.sock", served.path().display());
    assert!(ask(&[], &["--control", &absolute]).status.success());
    // Without it, the system's place is asked by root, the user's own by everybody else.
    if nix::unistd::geteuid().is_root() {
        // Another card may run on this machine: what counts is that the user's place is not asked.
        let output = ask(&[("XDG_RUNTIME_DIR", runtime)], &[]);
        assert!(!String::from_utf8_lossy(&output.stderr).contains(runtime), "{output:?}");
    } else {
        let output = ask(&[("XDG_RUNTIME_DIR", runtime)], &[]);
        let place = format!("{runtime}/dray/card.sock");
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains(&place), "{output:?}");
        std::fs::create_dir(format!("{runtime}/dray")).unwrap();
        std::os::unix::fs::symlink(served.path().join("elsewhere.sock"), &place).unwrap();
        assert!(ask(&[("XDG_RUNTIME_DIR", runtime)], &[]).status.success());
    }
    served.end(Signal::SIGTERM);
}

#[test]
fn sigint_ends_a_card_too_and_systemd_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify.sock");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let served = Served::start(&[], &[("NOTIFY_SOCKET", path.to_str().unwrap())]);
    let mut state = [0; 64];
    let length = manager.recv(&mut state).unwrap();
    assert_eq!(&state[..length], b"READY=1");
    served.end(Signal::SIGINT);
    let length = manager.recv(&mut state).unwrap();
    assert_eq!(&state[..length], b"STOPPING=1");
}

#[test]
fn logs_can_be_json() {
    let logs = Served::start(&["--log-format", "json"], &[("RUST_LOG", "info")]).end(Signal::SIGTERM);
    assert!(logs.lines().count() > 0);
    for line in logs.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["level"].is_string());
    }
}

#[test]
fn a_card_that_is_gone_is_found_out() {
    let mut served = Served::start(&["--no-keeper"], &[]);
    served.child.kill().unwrap();
    served.child.wait().unwrap();
    assert!(served.path().join("card.sock").exists(), "SIGKILL leaves the socket behind");
    let line = refused(&["stats", "--control", "unix:card.sock"], served.path());
    assert!(line.contains("no card runs there"), "{line}");
    // Another takes its place.
    let mut command = Command::new(env!("CARGO_BIN_EXE_device-svc"));
    command.args(["serve", "--no-keeper", "--config", "dray.toml"]).current_dir(served.path());
    served.child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut ready = String::new();
    BufReader::new(served.child.stdout.as_mut().unwrap()).read_line(&mut ready).unwrap();
    assert!(ready.starts_with("ready: "), "{ready}");
    served.end(Signal::SIGTERM);
}

#[test]
fn a_bad_configuration_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(folder.path().join("dray.toml"), text).unwrap();
    for command in ["serve", "validate"] {
        let line = refused(&[command, "--config", "none.toml"], folder.path());
        assert_eq!(line, "none.toml: no such file; check the path given with --config");
        write(&CONFIG.replace("volume = \"scratch\"", "volume = \"other\""));
        let line = refused(&[command, "--config", "dray.toml"], folder.path());
        assert_eq!(
            line,
            "dray.toml:14:1: function \"f\": `volume`: there is no volume \"other\"; add a [[volume]] of that name"
        );
        write(&CONFIG.replace("count = 1", "cuont = 1"));
        let line = refused(&[command, "--config", "dray.toml"], folder.path());
        assert_eq!(line, "dray.toml:3:1: unknown key `cuont`, expected `count` or `poll`");
    }
    assert!(!folder.path().join("card.sock").exists());
}

#[test]
fn a_good_configuration_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("dray.toml"), CONFIG).unwrap();
    let text = said(&["validate", "--config", "dray.toml"], folder.path());
    assert!(text.starts_with("dray.toml: good\nvolume scratch: uuid "), "{text}");
    let shown: serde_json::Value =
        serde_json::from_str(&said(&["validate", "--json", "--config", "dray.toml"], folder.path())).unwrap();
    assert_eq!(shown["volumes"][0]["serial"].as_str().unwrap().len(), 20);
    assert_eq!(shown["functions"][0]["volume"], "scratch");

    let net = format!(
        "{CONFIG}\n[[uplink]]\nname = \"lan\"\nbackend = {{ type = \"tap\", name = \"dray0\" }}\n[[function]]\nname = \"n\"\n\
         type = \"net\"\nuplink = \"lan\"\nlink = {{ type = \"vfio-user\", socket = \"n.sock\" }}\n"
    );
    std::fs::write(folder.path().join("dray.toml"), net).unwrap();
    let shown: serde_json::Value =
        serde_json::from_str(&said(&["validate", "--json", "--config", "dray.toml"], folder.path())).unwrap();
    assert_eq!(shown["uplinks"], serde_json::json!([{ "name": "lan", "backend": "tap,name=dray0" }]));
    let function = &shown["functions"][1];
    assert_eq!(
        (&function["uplink"], &function["mtu"], &function["queue-pairs"]),
        (&"lan".into(), &1500.into(), &1.into())
    );
    // An address that was not given is shown, and stays.
    let text = said(&["validate", "--config", "dray.toml"], folder.path());
    assert!(text.contains("uplink lan: tap,name=dray0\n"), "{text}");
    let mac = function["mac"].as_str().unwrap();
    assert!(text.contains(&format!("function n: uplink lan, mac {mac}, mtu 1500, socket ")), "{text}");
}

#[test]
fn wrong_usage_and_no_card() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(program(&["function"], folder.path()).status.code(), Some(2));
    assert_eq!(program(&["volume", "create", "--nmae", "x"], folder.path()).status.code(), Some(2));
    let line = refused(&["function", "list", "--control", "unix:none.sock"], folder.path());
    assert_eq!(
        line,
        format!(
            "cannot reach the card at unix:{}/none.sock: no card runs there; start one with `device-svc serve`, or \
             give its address with --control",
            folder.path().display()
        )
    );
    let line = refused(&["function", "list", "--control", "none.sock"], folder.path());
    assert!(line.starts_with("--control: \"none.sock\" is not an address"), "{line}");
    let line = refused(&["volume", "create", "--name", "x", "--backend", "ram"], folder.path());
    assert_eq!(line, "volume \"x\": backend: `size` is missing; add `size = \"1G\"`");
}

#[test]
fn help_and_completion() {
    let folder = tempfile::tempdir().unwrap();
    let help = said(&["--help"], folder.path());
    assert!(help.contains("Exit status:") && help.contains("Files:"), "{help}");
    for command in [["volume", "create"], ["uplink", "create"], ["function", "create"], ["function", "set"]] {
        assert!(said(&[&command[..], &["--help"]].concat(), folder.path()).contains("Examples:"), "{command:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(said(&["completion", shell], folder.path()).contains("device-svc"));
    }
}
