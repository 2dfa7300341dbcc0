//! A card that starts again: what commands made is there as it was, what the file names is as the file says, and what cannot be opened
//! has failed and keeps nothing else from starting.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{FunctionChange, Inventory, InventoryError};
use crate::config::{Config, DeviceConfig, FunctionConfig, LimitConfig, NetChange, UplinkConfig, VolumeConfig};
use crate::control::events::EventKind;
use crate::control::fake::{FakeStarter, config, inventory};
use crate::control::seam::Standing;
use crate::state::{CardState, StateError, StateFolder};

/// Opens a state folder that nobody has. A process that another test starts has copies of our descriptors for a moment, and the lock
/// with them.
fn open(folder: &Path) -> (StateFolder, CardState) {
    let start = Instant::now();
    loop {
        match StateFolder::open(folder) {
            Err(StateError::InUse { .. }) if start.elapsed().as_secs() < 60 => {
                std::thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// A card that keeps what it has in `folder`, and was started on `config`.
fn start(folder: &Path, config: &Config) -> Result<(Arc<Inventory>, Arc<FakeStarter>), InventoryError> {
    let (inventory, starter) = inventory();
    let (state, before) = open(folder);
    inventory.keep_in(state, before);
    inventory.start_all(config)?;
    Ok((inventory, starter))
}

/// The volume, uplink and functions of a text.
fn parsed(text: &str) -> Config {
    Config::parse(text, "test", Path::new("/")).unwrap()
}

const MADE: &str = "[[volume]]\nname = \"x\"\nbackend = { type = \"null\", size = \"4M\" }\n\
    [[uplink]]\nname = \"up\"\nbackend = { type = \"null\" }\n\
    [[function]]\nname = \"disk\"\ntype = \"blk\"\nvolume = \"x\"\nlink = { type = \"vhost-user\", socket = \"/tmp/disk.sock\" }\n\
    [[function]]\nname = \"net\"\ntype = \"net\"\nuplink = \"up\"\nmtu = 1400\nlink = { type = \"vfio-user\", socket = \"/tmp/net.sock\" }\n";

fn make(inventory: &Inventory) -> (VolumeConfig, UplinkConfig, Vec<FunctionConfig>) {
    let made = parsed(MADE);
    inventory.create_volume(made.volumes[0].clone()).unwrap();
    inventory.create_uplink(made.uplinks[0].clone()).unwrap();
    for function in &made.functions {
        inventory.create_function(function.clone()).unwrap();
    }
    (made.volumes[0].clone(), made.uplinks[0].clone(), made.functions)
}

/// Everything that is there: names and settings.
fn everything(inventory: &Inventory) -> (Vec<VolumeConfig>, Vec<UplinkConfig>, Vec<FunctionConfig>) {
    (
        inventory.volumes().into_iter().map(|volume| volume.config).collect(),
        inventory.uplinks().into_iter().map(|uplink| uplink.config).collect(),
        inventory.functions().into_iter().map(|function| function.config).collect(),
    )
}

#[test]
fn what_commands_made_and_changed_comes_back_after_a_death_and_after_an_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(&["f"]);
    let (first, _) = start(folder.path(), &file).unwrap();
    make(&first);
    let limit = LimitConfig { iops: Some(7), ..LimitConfig::NONE };
    first.set_function("disk", &FunctionChange::Blk(limit.clone())).unwrap();
    let change = NetChange { link_up: Some(false), mtu: Some(1300), ..NetChange::default() };
    first.set_function("net", &FunctionChange::Net(change)).unwrap();
    first.resize_volume("x", 8 << 20, false).unwrap();
    let before = everything(&first);
    // The first dies: nothing is stopped. The second ends.
    drop(first);
    for _ in 0..2 {
        let (again, starter) = start(folder.path(), &file).unwrap();
        assert_eq!(everything(&again), before);
        let disk = again.function("disk").unwrap();
        assert!(matches!(disk.config.device, DeviceConfig::Blk(blk) if blk.limit == limit));
        assert_eq!(again.volume("x").unwrap().info.unwrap().size_bytes, 8 << 20);
        let down = NetChange { link_up: Some(false), ..NetChange::default() };
        assert_eq!(*starter.function("net").changes.lock().unwrap(), [down], "its link is down from the start");
        let events = again.events().after(0).events;
        assert!(events.iter().any(|event| event.function == "net" && event.kind == EventKind::LinkDown));
        again.stop_all(false);
    }
    // What is deleted stays away.
    let (again, _) = start(folder.path(), &file).unwrap();
    again.delete_function("disk").unwrap();
    again.delete_function("net").unwrap();
    again.delete_volume("x").unwrap();
    again.delete_uplink("up").unwrap();
    drop(again);
    let (again, _) = start(folder.path(), &file).unwrap();
    assert_eq!(everything(&again), (file.volumes, file.uplinks, file.functions));
}

#[test]
fn what_the_file_names_is_as_the_file_says() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(&["f", "g"]);
    let (first, _) = start(folder.path(), &file).unwrap();
    let limit = LimitConfig { iops: Some(7), ..LimitConfig::NONE };
    first.set_function("f", &FunctionChange::Blk(limit)).unwrap();
    make(&first);
    drop(first);
    // It no longer names `g`, and names what a command made, with another limit and time limit.
    let mut changed = config(&["f"]);
    let made = parsed(&MADE.replace("volume = \"x\"", "volume = \"x\"\nlimit = { iops = 3 }"));
    changed.volumes.push(VolumeConfig { io_timeout: Duration::from_secs(1), ..made.volumes[0].clone() });
    changed.functions.push(made.functions[0].clone());
    let (again, _) = start(folder.path(), &changed).unwrap();
    assert_eq!(again.function("f").unwrap().config, file.functions[0], "the limit is the file's");
    assert!(again.function("g").is_err());
    assert_eq!(again.function("disk").unwrap().config, made.functions[0]);
    assert_eq!(again.volume("x").unwrap().config.io_timeout.as_secs(), 1);
    assert_eq!(again.function("net").unwrap().config, made.functions[1], "as the command made it");
    // From now on it is the file's, and goes with it.
    again.stop_all(false);
    drop(again);
    let (again, _) = start(folder.path(), &config(&["f"])).unwrap();
    assert!(again.volume("x").is_err() && again.function("disk").is_err() && again.function("net").is_ok());
}

#[test]
fn after_a_death_a_key_that_a_vm_would_notice_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = start(folder.path(), &config(&["f", "net0"])).unwrap();
    make(&first);
    drop(first);
    let mut wrong: Vec<(Config, &str)> = Vec::new();
    let mut file = config(&["f", "net0"]);
    file.volumes[1].read_only = false;
    wrong.push((file, "volume \"w\": `read-only`: "));
    let mut file = config(&["f", "net0"]);
    file.volumes[0].serial[0] ^= 1;
    wrong.push((file, "volume \"v\": `serial`: "));
    let mut file = config(&["f", "net0"]);
    file.functions[0].packed = false;
    wrong.push((file, "function \"f\": `packed`: "));
    let mut file = config(&["f", "net0"]);
    file.functions[1].link.socket = "/tmp/other.sock".into();
    wrong.push((file, "function \"net0\": `link`: "));
    let mut file = config(&["f", "net0"]);
    let DeviceConfig::Net(net) = &mut file.functions[1].device else { panic!("net0 is an interface") };
    net.queue_pairs = 2;
    wrong.push((file, "function \"net0\": `queue-pairs`: "));
    // Of what a command made as well.
    let mut file = config(&["f", "net0"]);
    let made = parsed(&MADE.replace("volume = \"x\"", "volume = \"x\"\nqueues = 2"));
    file.volumes.push(made.volumes[0].clone());
    file.functions.push(made.functions[0].clone());
    wrong.push((file, "function \"disk\": `queues`: "));
    for (file, expected) in &wrong {
        let Err(error) = start(folder.path(), file) else { panic!("{expected} was applied") };
        let error = error.to_string();
        assert!(error.starts_with(expected) && error.contains("put it back and start the card"), "{error}");
    }
    // Nothing of what is remembered has changed; and after an end by itself all of it is applied.
    let (again, _) = start(folder.path(), &config(&["f", "net0"])).unwrap();
    assert!(again.function("disk").is_ok());
    // One that hands over has not ended, as far as VMs can tell.
    again.stop_all(true);
    drop(again);
    assert!(start(folder.path(), &wrong[4].0).is_err());
    let (again, _) = start(folder.path(), &config(&["f", "net0"])).unwrap();
    again.stop_all(false);
    drop(again);
    let (again, _) = start(folder.path(), &wrong[4].0).unwrap();
    assert_eq!(again.function("net0").unwrap().config, wrong[4].0.functions[1]);
}

/// A file, which the fakes cannot open.
const AWAY: &str = "[[volume]]\nname = \"x\"\nbackend = { type = \"file\", path = \"/srv/x\", create = \"1M\" }\n";

#[test]
fn what_cannot_be_opened_has_failed_and_keeps_nothing_else_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = start(folder.path(), &config(&["f"])).unwrap();
    make(&first);
    drop(first);
    // As if the volume's server were away now.
    let (state, mut before) = open(folder.path());
    let at = before.volumes.iter().position(|kept| kept.config.name == "x").unwrap();
    before.volumes[at].config = parsed(AWAY).volumes[0].clone();
    let tap = parsed("[[uplink]]\nname = \"up\"\nbackend = { type = \"tap\", name = \"dray0\" }\n");
    let at = before.uplinks.iter().position(|kept| kept.config.name == "up").unwrap();
    before.uplinks[at].config = tap.uplinks[0].clone();
    state.write(&before).unwrap();
    drop(state);

    let (again, _) = start(folder.path(), &config(&["f"])).unwrap();
    assert_eq!(again.function("f").unwrap().standing, Standing::Waiting);
    assert!(again.has_failed());
    let why = "volume \"x\": the server is away";
    assert_eq!(again.volume("x").unwrap().info.unwrap_err(), why);
    assert_eq!(again.uplink("up").unwrap().info.unwrap_err(), "uplink \"up\": the kernel has no taps");
    let failed = format!("volume \"x\" has failed, and is tried again until it is there or deleted: {why}");
    assert_eq!(again.function("disk").unwrap().standing, Standing::Failed { reason: failed.clone() });
    assert!(
        matches!(again.function("net").unwrap().standing, Standing::Failed { reason } if reason.contains("no taps"))
    );
    // Nothing can be asked of it, but that it goes.
    let limit = FunctionChange::Blk(LimitConfig::NONE);
    let error = again.set_function("disk", &limit).unwrap_err().to_string();
    assert!(error.starts_with("function \"disk\" has failed") && error.ends_with(why), "{error}");
    assert_eq!(again.resize_volume("x", 1 << 20, false).unwrap_err(), InventoryError::Unavailable(failed.clone()));
    assert_eq!(again.create_volume(parsed(AWAY).volumes[0].clone()), Err(InventoryError::Unavailable(failed)));
    assert!(again.queue_counters().iter().all(|counters| counters.config.name == "f"));
    again.try_failed_again();
    assert!(again.has_failed());
    // It is still remembered.
    drop(again);
    let (again, starter) = start(folder.path(), &config(&["f"])).unwrap();
    assert!(again.volume("x").unwrap().info.is_err());
    again.delete_function("disk").unwrap();
    again.delete_volume("x").unwrap();
    again.delete_function("net").unwrap();
    again.delete_uplink("up").unwrap();
    assert!(!again.has_failed());
    assert!(again.events().after(0).events.iter().all(|event| event.function == "f"), "they never ran");
    drop(starter);
}

#[test]
fn what_has_failed_runs_once_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = start(folder.path(), &config(&["f"])).unwrap();
    make(&first);
    drop(first);
    // The file names a disk on the socket of one that a command made: the file decides, and the other has to wait.
    let mut file = config(&["f"]);
    file.functions[0].link.socket = "/tmp/disk.sock".into();
    let (state, before) = open(folder.path());
    state.write(&CardState { running: false, ..before }).unwrap();
    drop(state);
    let (again, starter) = start(folder.path(), &file).unwrap();
    let standing = again.function("disk").unwrap().standing;
    assert!(
        matches!(standing, Standing::Failed { reason } if reason.contains("has the socket /tmp/disk.sock already"))
    );
    again.delete_function("f").unwrap();
    again.try_failed_again();
    assert_eq!(again.function("disk").unwrap().standing, Standing::Waiting);
    assert_eq!(starter.function("disk").name, "disk");
    let last = again.events().after(0).events.pop().unwrap();
    assert_eq!((last.function.as_str(), last.kind), ("disk", EventKind::Created));
}

#[test]
fn what_the_file_names_first_starts_as_a_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = config(&["f"]);
    file.volumes.push(parsed(AWAY).volumes[0].clone());
    let Err(error) = start(folder.path(), &file) else { panic!("its server is away") };
    assert_eq!(error, InventoryError::Unavailable("volume \"x\": the server is away".to_owned()));
    // Nor was anything remembered.
    assert_eq!(open(folder.path()).1, CardState::default());
}

#[test]
fn a_change_that_cannot_be_remembered_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let (first, starter) = start(folder.path(), &config(&["f"])).unwrap();
    let (volume, _, functions) = make(&first);
    let before = everything(&first);
    // The next state cannot be written.
    std::fs::create_dir(folder.path().join("card.state.new")).unwrap();
    let unkept =
        |error: InventoryError| assert!(error.to_string().starts_with("it could not be remembered: "), "{error}");
    unkept(first.create_volume(parsed(&MADE.replace("\"x\"", "\"y\"")).volumes[0].clone()).unwrap_err());
    let other = FunctionConfig { name: "other".to_owned(), ..config(&["o"]).functions[0].clone() };
    unkept(first.create_function(other).unwrap_err());
    assert!(starter.function("other").stopped.load(std::sync::atomic::Ordering::Relaxed));
    unkept(first.set_function("disk", &FunctionChange::Blk(LimitConfig::NONE)).unwrap_err());
    unkept(first.delete_function("disk").unwrap_err());
    unkept(first.delete_volume("v").unwrap_err());
    assert_eq!(everything(&first), before);
    assert_eq!((&volume, &functions[0]), (&first.volume("x").unwrap().config, &first.function("disk").unwrap().config));
    drop(first);
    std::fs::remove_dir(folder.path().join("card.state.new")).unwrap();
    let (again, _) = start(folder.path(), &config(&["f"])).unwrap();
    assert_eq!(everything(&again), before);
}
